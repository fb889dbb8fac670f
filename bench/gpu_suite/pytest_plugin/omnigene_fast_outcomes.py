"""A pytest plugin: one line of JSON per test, [its id, its outcome], as soon as the test is over.

    PYTHONPATH=bench/gpu_suite/pytest_plugin pytest -p omnigene_fast_outcomes --outcomes FILE

A JUnit report is written at the end, which a run that is cut off does not reach, and it counts a test that was
interrupted as passed. The outcome is "passed", "skipped" or the first line of what went wrong. The plugin has a
directory of its own, so that loading it imports no torch.
"""

import json
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, help="file that gets a line of JSON per test")


def pytest_configure(config: Any) -> None:
    if path := config.getoption("--outcomes"):
        config.pluginmanager.register(_Writer(path))


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._over: set[str] = set()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write(report.nodeid, f"cannot be collected: {_message(report)}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._write(report.nodeid, _message(report))
        elif report.skipped:
            self._write(report.nodeid, "skipped")
        elif report.when == "teardown":
            self._write(report.nodeid, "passed")

    def _write(self, test: str, outcome: str) -> None:
        if test in self._over:
            return
        self._over.add(test)
        with self._path.open("a") as file:
            file.write(json.dumps([test, outcome]) + "\n")


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or "").strip().rpartition("\n")[2]
    return (text.strip().splitlines() or ["failed"])[0][:200]
