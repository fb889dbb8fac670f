"""Processes that write runs, to be killed or to race.

They are forked from a server that has imported what they need and used none of it. Forked from the tests' own process,
beside the threads that Arrow, DuckDB and torch have started there, a child may crash for no fault of the writer's.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess

_context = multiprocessing.get_context("forkserver")
# The last three are what a first write imports.
_PRELOAD = [
    "tests.tracing.test_crash",
    "tests.tracing.test_three_writers",
    "tests.tracing.test_store",
    "pandas",
    "pyarrow.compute",
    "omnigene_fast._cpu",
]
_context.set_forkserver_preload(_PRELOAD)


def start(work: Callable[..., None], *arguments: object) -> ForkServerProcess:
    """A child that does `work`, a function of a module, and ends without cleaning up; 1 if it raised."""
    child = _context.Process(target=_run, args=(work, arguments), daemon=True)
    child.start()
    return child


def pipe():
    """Two connections: what the second sends, the first receives."""
    return _context.Pipe(duplex=False)


def exit_code(child: ForkServerProcess) -> int:
    child.join()
    return child.exitcode


def _run(work: Callable[..., None], arguments: tuple) -> None:
    try:
        work(*arguments)
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
        os._exit(1)
    os._exit(0)
