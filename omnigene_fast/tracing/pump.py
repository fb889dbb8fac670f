"""A bounded queue to one background thread: what the model's thread hands over is worked off elsewhere, in order."""

import re
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

POLICIES = ("block", "drop", "raise")  # what `on_full` may say
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(budget: int | str) -> int:
    """Bytes from a number or a text such as "2GiB" or "500 MB"; ValueError for anything else."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        if found and found[2].lower() in _UNITS and float(found[1]) > 0:
            return int(float(found[1]) * _UNITS[found[2].lower()])
    raise ValueError(f"budget: expected bytes as a positive number or a text such as '2GiB', got {budget!r}.")


class Pump:
    """Runs `work(item)` for every item in a thread of its own.

    An error in `work` is raised by the next call of the putting thread, or by `close`; what comes after it is not
    worked off.

    Args:
        work: called with one item at a time, in the order of `put`.
        budget: bytes that may wait; one item always may.
    """

    def __init__(self, work: Callable[[Any], None], budget: int) -> None:
        self._work, self._budget = work, budget
        self._items: deque[tuple[Any, int]] = deque()
        self._waiting = 0  # bytes, the item being worked on included
        self._busy = self._closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="omnigene-fast trace", daemon=True)
        self._thread.start()

    def full(self, size: int) -> bool:
        """Whether an item of `size` bytes would have to wait now."""
        with self._changed:
            return self._waiting > 0 and self._waiting + size > self._budget

    def put(self, item: Any, size: int) -> None:
        """Hand over an item of `size` bytes, when there is room for it; raises the error of an earlier one."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._waiting or self._waiting + size <= self._budget)
            self._raise()
            self._items.append((item, size))
            self._waiting += size
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything is worked off; raises the error of an item."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or (not self._items and not self._busy))
            self._raise()

    def close(self) -> None:
        """Work off what is left and end the thread; raises the error of an item."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closing)
                if not self._items:
                    return
                item, size = self._items.popleft()
                self._busy = True
            try:
                if self._error is None:
                    self._work(item)
            except BaseException as error:
                self._error = error
            finally:
                del item
                with self._changed:
                    self._busy = False
                    self._waiting -= size
                    self._changed.notify_all()
