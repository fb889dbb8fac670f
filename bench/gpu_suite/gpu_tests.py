"""Step "tests": `pytest -m gpu`, one process per file, so that a crash of the device is one file's.

DIR/tests.json has each test's outcome; tests that have one are not run again by a call that goes on.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..providers import installed
from . import status

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "omnigene_fast_outcomes"
PLUGIN_PLACE = Path(__file__).resolve().parent / "pytest_plugin"


def run(context: status.Context) -> str | None:
    """Run each file that is not done; the sentence counts what failed and names the first."""
    if not installed("pytest"):
        raise status.MissingTool("pytest is not installed")
    files = test_files(context.tiny)
    if not files:
        raise status.MissingTool("there are no tests beside this package: it was installed, not checked out")
    path = context.out / "tests.json"
    done: dict[str, dict[str, Any]] = status.load_json(path, {})
    if context.retry:
        forget_bad(done, files, context)
        status.save_json(path, done)
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


def forget_bad(done: dict[str, dict[str, Any]], files: list[Path], context: status.Context) -> None:
    """Drop the outcomes of tests that failed, and the problems of files, here and in the lines of the plugin."""
    for file in files:
        lines = lines_of(file, context)
        if lines.exists():
            kept = {test: outcome for test, outcome in read_outcomes(lines).items() if not _is_bad(outcome)}
            lines.write_text("".join(json.dumps(pair) + "\n" for pair in kept.items()))
        name = str(file.relative_to(ROOT))
        if name in done:
            found = done[name]["outcomes"]
            kept = {test: outcome for test, outcome in found.items() if not _is_bad(outcome)}
            over = done[name]["over"] and kept == found and not done[name]["problem"]
            done[name] = {"outcomes": kept, "problem": "", "over": over}


def lines_of(file: Path, context: status.Context) -> Path:
    """Where the plugin writes the outcomes of a file's tests."""
    return context.out / "tests" / f"{file.parent.name}-{file.stem}.jsonl"


def run_file(file: Path, context: status.Context, before: dict[str, str]) -> dict[str, Any]:
    """The tests of one file that have no outcome in `before`; "over" is whether pytest came to its end."""
    lines = lines_of(file, context)
    lines.parent.mkdir(parents=True, exist_ok=True)
    before = before | read_outcomes(lines)  # what a process that was killed had come to
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "-o", "addopts="]
    command += ["-p", PLUGIN, f"--rootdir={ROOT}", "--outcomes", str(lines), f"--junitxml={lines.with_suffix('.xml')}"]
    command += [*(() if context.tiny else ("-m", "gpu")), str(file)]
    command += [word for test in before for word in ("--deselect", test)]
    try:
        code: int | None = run_group(command, variables())
    except status.OutOfTime:
        code = None
    found = before | read_outcomes(lines)
    # 0: all passed; 1, 2: some failed, or could not be collected; 5: nothing was selected.
    said = code in (0, 5) or (code in (1, 2) and found != before)
    problem = "" if code is None or said else f"pytest ended with status {code}"
    return {"outcomes": found, "problem": problem, "over": code is not None}


def read_outcomes(path: Path) -> dict[str, str]:
    """What the plugin wrote, by test; nothing if no test came to its end. A line that was cut off is left out."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            test, outcome = json.loads(line)
        except ValueError:
            continue
        found[test] = outcome
    return found


def run_group(command: list[str], environment: dict[str, str]) -> int:
    """Run `command` in the repository; if we are interrupted, nothing of it is left behind."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return child.wait()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise


def variables() -> dict[str, str]:
    """The environment of a child that imports this checkout."""
    places = [str(ROOT), str(PLUGIN_PLACE), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
