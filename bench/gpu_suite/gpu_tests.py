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


def run(context: status.Context) -> str | None:
    """Run each file that is not done; the sentence counts what failed and names the first."""
    if not environment.installed("pytest"):
        raise status.MissingTool("pytest is not installed")
    files = test_files(context.tiny)
    if not files:
        raise status.MissingTool("there are no tests beside this package: it was installed, not checked out")
    path = context.out / "tests.json"
    done: dict[str, Any] = status.load_json(path, {})
    for file in files:
        name = str(file.relative_to(ROOT))
        if name in done:
            continue
        junit = context.out / "tests" / f"{file.parent.name}-{file.stem}.xml"
        done[name] = run_file(file, junit, marked=not context.tiny)
        status.save_json(path, done)
        context.progressed()
        print(f"{name}: {done[name]}", flush=True)
    counts = {key: sum(found[key] for found in done.values()) for key in ("passed", "failed", "skipped")}
    print(counts)
    bad = [each for found in done.values() for each in found["failures"]]
    return f"{counts['failed']} failed, {counts['passed']} passed: " + "; ".join(bad[:8]) if bad else None


def test_files(tiny: bool) -> list[Path]:
    """The files with GPU tests, those at the true size last; for the tiny suite one that needs no GPU."""
    tests = ROOT / "tests"
    if tiny:
        return [path for path in (tests / "test_reference.py",) if path.exists()]
    marked = [path for path in sorted(tests.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    return sorted(marked, key=lambda path: "backward" in path.name)


def run_file(file: Path, junit: Path, *, marked: bool) -> dict[str, Any]:
    """Passed, failed, skipped and the names of failures of one file; a file that cannot be collected failed."""
    junit.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-o", "addopts=", f"--junitxml={junit}", *(("-m", "gpu") if marked else ()), str(file)]
    return read_junit(junit, run_group(command, variables()))


def variables() -> dict[str, str]:
    """The environment of a child that imports this checkout."""
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, places))}


def run_group(command: list[str], environment: dict[str, str]) -> int:
    """Run `command` in the repository; if we are interrupted, nothing of it is left behind."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return child.wait()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise


def read_junit(junit: Path, code: int) -> dict[str, Any]:
    """The counts of a report; without one, what pytest's exit status says."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "status": code}
    try:
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        cases = []
    for case in cases:
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            message = (bad[0].get("message") or "").strip().splitlines() or [""]
            found["failures"].append(f"{case.get('name')}: {message[0][:160]}")
        kind = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        found[kind] += 1
    if code not in (0, 1, 5) and not found["failures"]:  # 5: nothing was selected
        found["failures"].append(f"{junit.stem}: pytest ended with status {code}")
        found["failed"] += 1
    return found
