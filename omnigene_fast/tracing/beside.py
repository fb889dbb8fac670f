"""New files and directories that appear whole, under their name, and never in the place of another."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from . import layout


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to beside `path`; at the end of the block it is made durable and gets its name.

    Raises:
        FileExistsError: something is at `path`, now or at the end of the block.
    """
    target = Path(path)
    _check_new(target)
    beside = _beside(target)
    try:
        with open(beside, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, target)  # unlike a rename, it never replaces
        except FileExistsError:
            _check_new(target)
            raise
        except OSError:  # a file system without hard links
            _check_new(target)
            beside.rename(target)
        layout.sync_directory(target.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory to fill beside `path`; at the end of the block it gets its name.

    Raises:
        FileExistsError: a file or a directory that is not empty is at `path`.
    """
    target = Path(path)
    if not (target.is_dir() and not any(target.iterdir())):
        _check_new(target)
    beside = _beside(target)
    beside.mkdir()
    try:
        yield beside
        beside.rename(target)
        layout.sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _check_new(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target}: expected nothing there, found something; choose another path.")


def _beside(target: Path) -> Path:
    layout.check_place(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}{layout.TEMPORARY}")
