"""A run directory on disk: its files, meta.json, its locks, and how a file gets there whole or not at all.

meta.json                     what was traced: layers, num_experts, top_k, model, record, format, ...
part-<rank>-<seq>.parquet     the tokens of one segment, sorted by (doc_id, pos)
docs-<rank>-<seq>.parquet     the documents of the same segment: labels, text hash and the counts of this segment
manifest.jsonl                one line per committed segment; a file that is not in it does not exist for a reader
run.lock, writer-<rank>.lock  locks of the manifest and of a live writer; empty, never deleted
"""

import fcntl
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import KINDS

FORMAT = 1
META, LOCK, CHECKSUM = "meta.json", "run.lock", "checksum"
TEMPORARY = ".new"
# What a reopened run must share with its meta.json, as far as both say it, and what to do where that differs; the rest
# (versions, dates) may differ between sessions. Runs of before these were kept say less.
IDENTITY = {
    "weights_digest": "the checkpoint is another one or was changed: give the one that the run was made of",
    "adapter_digest": "the adapter is another one or was changed: give the one that the run was made of",
    "tokenizer_digest": "the tokenizer is another one or was changed: give the one that the run was made of",
    "format": "",
    "record": "record the same",
    "max_length": "give the same length",
    "layers": "",
    "num_experts": "",
    "top_k": "",
    "model": "give the same model",
    "config_hash": "give a model of the same config",
    "dtype": "load the model in the same dtype",
    "quantization": "quantise the model in the same way",
    "numerics": "accelerate the model, or leave it stock, as in the run",
}
_BOOKKEEPING = re.compile(r"run\.lock|writer-\d+\.lock|meta\.json\.new")


@dataclass(frozen=True)
class File:
    """A file of the manifest with what it must look like."""

    name: str
    size: int
    crc32: int


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Name `file` in an OSError that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run's lock: for creating meta.json and for appending to the manifest."""
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def lock_writer(path: Path, rank: int) -> io.FileIO:
    """Take the lock of a rank's writer; it goes with the process, however that ends.

    Returns:
        The file that holds the lock until it is closed.

    Raises:
        RuntimeError: another live writer holds it.
    """
    file = io.FileIO(path / f"writer-{rank}.lock", "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RuntimeError(
            f"{path}: expected to be the only writer of rank {rank}, but another one is open; close it, or give each"
            " process its own rank=."
        ) from None
    return file


def unlock_writer(file: io.FileIO) -> None:
    """Give the lock back at once, also where a child that was forked just now has the file open still."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def has_live_writer(path: Path, rank: int) -> bool:
    """Whether a writer of `rank` is open now, in this process or another one."""
    try:
        handle = os.open(path / f"writer-{rank}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def write_file(path: Path, name: str, data: Any) -> File:
    """Write `data` beside, make it durable, rename it to `name`; the caller syncs the directory."""
    beside = path / (name + TEMPORARY)
    try:
        with naming(path / name), open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path / name)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    view = memoryview(data)
    return File(name, view.nbytes, zlib.crc32(view))


def sync_directory(path: Path) -> None:
    """Make renames in `path` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def create_or_check(path: Path, meta: Mapping[str, Any]) -> None:
    """Make `path` a run described by `meta`, or check that it is one already.

    Raises:
        FileExistsError: a file, or a directory of something else; nothing in it was touched.
        ValueError: a run of another format, model or shape, or of other record kinds.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise FileExistsError(_file_in_the_way(path)) from None
    _refuse_foreign(path)
    with locked(path):
        _refuse_foreign(path)
        if (path / META).exists():
            _check_run(path, meta)
        else:
            write_file(path, META, json.dumps(add_checksum(meta), indent=2).encode() + b"\n")
            sync_directory(path)


def check_target(path: Path, meta: Mapping[str, Any]) -> None:
    """Raise what `create_or_check` would, as far as `meta` knows the run already; create nothing.

    Raises:
        FileExistsError, ValueError: as `create_or_check`.
        PermissionError: a directory that this user may not write to.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise FileExistsError(_file_in_the_way(path))
    check_place(path)
    if path.is_dir():
        _refuse_foreign(path)
        if (path / META).exists():
            _check_run(path, meta)


def check_place(path: Path) -> None:
    """Raise OSError, in a sentence, if `path` cannot be made where it is to be; create nothing.

    Raises:
        NotADirectoryError: something on the way is no directory.
        PermissionError: the directory that is there already may not be written to.
    """
    there = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    parent = there if there.is_dir() else there.parent
    if there != path and not there.is_dir():
        raise NotADirectoryError(f"{path}: expected a path in a directory, but {there} is a file; choose another path.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: expected a place to write to, but {parent} is not; choose another path.")


def _file_in_the_way(path: Path) -> str:
    return f"{path}: expected a directory for the run, got a file; choose another path."


def _refuse_foreign(path: Path) -> None:
    if (path / META).exists():
        return
    foreign = sorted(name for name in os.listdir(path) if not _BOOKKEEPING.fullmatch(name))
    if foreign:
        raise FileExistsError(
            f"{path}: expected a run or an empty directory, got one without {META} that holds {foreign[0]!r};"
            " choose another path."
        )


def _check_run(path: Path, meta: Mapping[str, Any]) -> None:
    if fault := meta_fault(path):
        raise ValueError(fault)
    found = read_meta(path)
    if "layers" in meta and found.get("experts_by_layer") != meta.get("experts_by_layer"):
        raise ValueError(
            f"{path}: expected to append to a run with experts_by_layer {found.get('experts_by_layer')}, got"
            f" {meta.get('experts_by_layer')}; choose another path."
        )
    for key, way in IDENTITY.items():
        if key in found and key in meta and found[key] != meta[key] and not _is_same_model(key, found, meta):
            raise ValueError(
                f"{path}: expected to append to a run with {key} {found[key]!r}, got {meta[key]!r};"
                f"{f' {way}, or' if way else ''} choose another path."
            )


def _is_same_model(key: str, found: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
    """Whether two names stand for one model: of weights known by their digest, or two paths to one place."""
    if key != "model":
        return False
    if all("weights_digest" in each for each in (found, meta)):
        return True
    return os.path.realpath(found[key]) == os.path.realpath(meta[key])


def check_meta(meta: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, in a sentence that begins with `where`, if `meta` does not describe a run."""
    layers: Any = meta.get("layers")
    experts: Any = meta.get("num_experts")
    top_k: Any = meta.get("top_k")
    if not isinstance(layers, list) or not layers or not all(is_count(layer, 0) for layer in layers):
        raise ValueError(f"{where}: expected layers to be a list of decoder indices, got {layers!r}.")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{where}: expected layers without repeats, got {layers!r}.")
    if not is_count(experts, 1) or experts > 65534:
        raise ValueError(f"{where}: expected num_experts in [1, 65534], got {experts!r}.")
    if not is_count(top_k, 1) or top_k > experts:
        raise ValueError(f"{where}: expected top_k in [1, {experts}], got {top_k!r}.")
    by_layer: Any = meta.get("experts_by_layer", [experts])
    known = isinstance(by_layer, list) and all(is_count(each, top_k) for each in by_layer) and max(by_layer) == experts
    if not known or ("experts_by_layer" in meta and len(by_layer) != len(layers)):
        raise ValueError(
            f"{where}: expected experts_by_layer to hold a number of at least top_k for each of {len(layers)} layers,"
            f" {experts} the largest, got {by_layer!r}."
        )
    if not isinstance(meta.get("model"), str):
        raise ValueError(f"{where}: expected model to be text, got {meta.get('model')!r}.")
    record = meta.get("record")
    if not isinstance(record, list) or not all(kind in KINDS for kind in record):
        raise ValueError(f"{where}: expected record to name some of {', '.join(KINDS)}, got {record!r}.")


def is_count(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def add_checksum(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry` with the CRC-32 of its other fields as its last one; spaces and the order of fields do not count."""
    fields = {key: value for key, value in entry.items() if key != CHECKSUM}
    return {**fields, CHECKSUM: zlib.crc32(json.dumps(fields, sort_keys=True).encode())}


def checksum_fault(entry: Mapping[str, Any], where: str) -> str | None:
    """A sentence if `entry` is not what was written; None also for one of a run from before there were checksums."""
    if CHECKSUM not in entry or entry[CHECKSUM] == (found := add_checksum(entry)[CHECKSUM]):
        return None
    return f"{where}: expected checksum {entry[CHECKSUM]!r}, found {found}: damaged; restore it from a copy of the run."


def meta_fault(path: Path) -> str | None:
    """A sentence if the meta.json of a run is not what was written."""
    return checksum_fault(_load_meta(path), str(path / META))


def read_meta(path: Path) -> dict[str, Any]:
    """The run's meta.json, checked, but for its checksum: see `meta_fault`.

    Raises:
        FileNotFoundError, NotADirectoryError: no directory at `path`.
        ValueError: a directory without meta.json, a damaged one, or one of a newer format.
    """
    meta = _load_meta(path)
    meta.pop(CHECKSUM, None)
    return meta


def _load_meta(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a run directory, found nothing there.")
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a run directory, got a file.")
    file = path / META
    if not file.exists():
        raise ValueError(f"{path}: expected a run directory, got one without {META}.")
    try:
        meta = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {first_line(error)}.") from None
    if not isinstance(meta, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(meta).__name__}.")
    check_format(meta, str(file))
    check_meta(meta, str(file))
    return meta


def check_format(entry: Mapping[str, Any], where: str) -> None:
    found: Any = entry.get("format")
    if not is_count(found, 1):
        raise ValueError(f"{where}: expected format to be {FORMAT}, got {found!r}.")
    if found > FORMAT:
        raise ValueError(f"{where}: expected format {FORMAT} or older, got {found}; a newer omnigene-fast reads it.")


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
