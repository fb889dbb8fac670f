"""Step "tests": `pytest -m gpu`, one process per file, so that a crash of the device is one file's."""

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from . import environment, status

ROOT = Path(__file__).resolve().parents[2]
_GRACE = 6.0  # seconds that an interrupted program has to write down what it knows


def run(context: status.Context) -> str | None:
    """Run each file that is not done; the sentence counts what failed and names the first."""
    if not environment.installed("pytest"):
        raise status.MissingTool("pytest is not installed")
    files = test_files(context.tiny)
    if not files:
        raise status.MissingTool("there are no tests beside this package: it was installed, not checked out")
    path = context.out / "tests.json"
    done: dict[str, dict[str, Any]] = status.load_json(path, {})
    for file in files:
        name = str(file.relative_to(ROOT))
        before = done.get(name, {"outcomes": {}, "problem": "", "over": False})
        if before["over"]:
            continue
        done[name] = run_file(file, context, before["outcomes"])
        if done[name]["outcomes"] != before["outcomes"]:
            context.progressed()
        elif not done[name]["over"]:
            done[name] |= {"over": context.whole, "problem": "its first test did not end in the step's time"}
        status.save_json(path, done)
        print(f"{name}: {count(done[name])}", flush=True)
        if not done[name]["over"]:
            raise status.OutOfTime
    bad = [f"{test}: {what}" for found in done.values() for test, what in found["outcomes"].items() if _is_bad(what)]
    bad += [f"{name}: {found['problem']}" for name, found in done.items() if found["problem"]]
    passed = sum(count(found)["passed"] for found in done.values())
    return f"{len(bad)} failed, {passed} passed: " + "; ".join(bad[:8]) if bad else None


def _is_bad(outcome: str) -> bool:
    return outcome not in ("passed", "skipped")


def count(found: dict[str, Any]) -> dict[str, int]:
    """How many of a file's tests passed, were skipped, and failed."""
    outcomes = list(found["outcomes"].values())
    counts = {name: outcomes.count(name) for name in ("passed", "skipped")}
    return counts | {"failed": len(outcomes) - sum(counts.values())}


def test_files(tiny: bool) -> list[Path]:
    """The files with GPU tests, those at the true size last; for the tiny suite one that needs no GPU."""
    tests = ROOT / "tests"
    if tiny:
        return [path for path in (tests / "test_reference.py",) if path.exists()]
    marked = [path for path in sorted(tests.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    return sorted(marked, key=lambda path: "backward" in path.name)


def run_file(file: Path, context: status.Context, before: dict[str, str]) -> dict[str, Any]:
    """The tests of one file that have no outcome in `before`; "over" is whether pytest came to its end."""
    junit = context.out / "tests" / f"{file.parent.name}-{file.stem}.xml"
    junit.parent.mkdir(parents=True, exist_ok=True)
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "-o", "addopts="]
    command += [f"--junitxml={junit}", *(() if context.tiny else ("-m", "gpu")), str(file)]
    command += [word for test in before for word in ("--deselect", f"{file.relative_to(ROOT)}::{test}")]
    try:
        code: int | None = run_group(command, variables())
    except status.OutOfTime:
        code = None
    outcomes = before | read_junit(junit, f"{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}")
    # 1: some failed; 5: nothing was selected. A crash of the interpreter has no report.
    crashed = code is not None and (code not in (0, 1, 5) or (code == 1 and outcomes == before))
    return {
        "outcomes": outcomes,
        "problem": f"pytest ended with status {code}" if crashed else "",
        "over": code is not None,
    }


def read_junit(junit: Path, module: str) -> dict[str, str]:
    """ "passed", "skipped" or the first line of what went wrong, by test; nothing if pytest wrote no report."""
    found: dict[str, str] = {}
    try:
        tests = list(ElementTree.parse(junit).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return found
    for test in tests:
        classes = (test.get("classname") or "").removeprefix(module).strip(".")
        name = "::".join(filter(None, (classes.replace(".", "::"), test.get("name"))))
        bad = [child for child in test if child.tag in ("failure", "error")]
        message = (bad[0].get("message") or "").strip().splitlines() or ["failed"] if bad else []
        found[name] = message[0][:200] if bad else "skipped" if test.find("skipped") is not None else "passed"
    return found


def run_group(command: list[str], environment: dict[str, str]) -> int:
    """Run `command` in the repository; if we are interrupted, it is, so that it can still write its report."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return child.wait()
    except BaseException:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.killpg(child.pid, signal.SIGINT)
        try:
            child.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        raise


def variables() -> dict[str, str]:
    """The environment of a child that imports this checkout."""
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
