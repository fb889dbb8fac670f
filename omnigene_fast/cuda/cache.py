"""Compiled kernels on disk, in the folder cubin of `cache_folder`.

A file holds the SHA-256 of a cubin and then the cubin. It is written beside, flushed and renamed, so that whoever reads
it, in whatever process, finds all of it or nothing; one that does not match its hash is compiled again.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from .._cache import cache_folder

logger = logging.getLogger("omnigene_fast")

_DIGEST = hashlib.sha256().digest_size


def folder() -> Path:
    """Where cubins are kept; need not exist."""
    return cache_folder("cubin")


def key(*parts: str | bytes) -> str:
    """A name for what `parts` decide: equal for equal parts only."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def read(name: str) -> bytes | None:
    """The cubin kept under `name`; None if there is none, or if what is there is damaged."""
    path = folder() / f"{name}.cubin"
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, cubin = data[:_DIGEST], data[_DIGEST:]
    if cubin and hashlib.sha256(cubin).digest() == digest:
        return cubin
    logger.warning("omnigene_fast compiles a kernel again: %s is damaged", path)
    return None


def write(name: str, cubin: bytes) -> None:
    """Keep `cubin` under `name`; a folder that cannot be written to is said in the log."""
    path = folder() / f"{name}.cubin"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{name[:16]}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(cubin).digest() + cubin)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
    except OSError as error:
        logger.warning("omnigene_fast cannot keep compiled kernels in %s: %s", path.parent, error)
