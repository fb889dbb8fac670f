"""What lets a measurement be stopped and gone on with: seconds, a journal, and files that are written whole."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Budget:
    """Seconds that may be spent, by a clock that is passed in."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._end, self._clock = clock() + seconds, clock

    @property
    def spent(self) -> bool:
        return self._clock() >= self._end


class Journal:
    """Measurements of a run that was stopped, one JSON line each, kept beside the table until that is written.

    The first line says what they hold for; if another run finds anything else there, it starts from nothing.
    """

    def __init__(self, path: Path, valid_for: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        head = json.dumps(valid_for, sort_keys=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines and lines[0] == head:
            for line in lines[1:]:
                try:
                    self.found |= {(entry := json.loads(line))["key"]: entry}
                except (json.JSONDecodeError, KeyError):  # the line that was being written when the run was killed
                    break
            kept = [json.dumps(entry) for entry in self.found.values()]
        else:
            kept = []
        write(path, "".join(f"{line}\n" for line in (head, *kept)))

    def add(self, key: str, entry: dict[str, Any]) -> None:
        self.found[key] = {"key": key, **entry}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.found[key]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def write(path: Path, content: str) -> None:
    """Beside `path`, durable, then renamed: never half a file, and nothing lost if this fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
