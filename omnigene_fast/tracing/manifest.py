"""The manifest of a run: which segments are committed, how one is added, and what a crash may leave behind."""

import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .layout import (
    FORMAT,
    TEMPORARY,
    File,
    add_checksum,
    check_format,
    checksum_fault,
    first_line,
    is_count,
    locked,
    naming,
    sync_directory,
    write_file,
)

MANIFEST = "manifest.jsonl"
DATA = re.compile(rf"(part|docs)-(\d+)-(\d+)\.parquet({re.escape(TEMPORARY)})?")


@dataclass(frozen=True)
class Segment:
    """A committed segment: one line of the manifest."""

    rank: int
    seq: int
    tokens: int
    documents: int
    part: File
    docs: File
    dropped: int = 0  # tokens that came since the segment before and were not recorded
    unrouted: tuple[int, ...] = ()  # by layer, tokens to which its router gave NaN; () where there are none


def data_name(kind: str, rank: int, seq: int) -> str:
    """File name of a "part" or "docs" file."""
    return f"{kind}-{rank}-{seq:06d}.parquet"


def write_segment(
    path: Path,
    rank: int,
    seq: int,
    part: Callable[[], Any],
    docs: Callable[[], Any],
    *,
    tokens: int,
    documents: int,
    dropped: int = 0,
    unrouted: Sequence[int] = (),
) -> None:
    """Write the two files of a segment side by side and, once they are durable, its line of the manifest.

    Args:
        part, docs: give the bytes of the files; called in two threads, so that the disk need not wait for the CPU.
    """
    with ThreadPoolExecutor(1) as helper:
        beside = helper.submit(lambda: write_file(path, data_name("part", rank, seq), part()))
        docs_file = write_file(path, data_name("docs", rank, seq), docs())
        part_file = beside.result()
    sync_directory(path)
    lost = tuple(map(int, unrouted)) if any(unrouted) else ()
    append_manifest(path, Segment(rank, seq, tokens, documents, part_file, docs_file, dropped, lost))


def read_manifest(path: Path) -> list[Segment]:
    """The committed segments in the order of their commits; a torn last line is none of them.

    Checksums are not compared: see `manifest_faults`.

    Raises:
        ValueError: a damaged line, or one of a newer format.
    """
    return [_segment(line, f"{path / MANIFEST}, line {number}") for number, line in enumerate(_lines(path), 1)]


def manifest_faults(path: Path) -> list[str]:
    """Sentences about lines of the manifest that are not what was written."""
    faults = (
        checksum_fault(_load(line, where), where)
        for number, line in enumerate(_lines(path), 1)
        for where in [f"{path / MANIFEST}, line {number}"]
    )
    return [fault for fault in faults if fault]


def _lines(path: Path) -> list[bytes]:
    try:
        whole, newline, tail = (path / MANIFEST).read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return []
    lines = whole.split(b"\n") if newline else []
    return [*lines, tail[:size]] if (size := _whole_size(tail)) else lines


def _whole_size(tail: bytes) -> int:
    """Bytes of `tail`, which no newline ends, that are a whole line: its newline is damaged; 0 for a torn line.

    A line is an object with two objects in it, so a third brace closes it; a line cut short by a crash has fewer.
    """
    return tail.rfind(b"}") + 1 if tail.count(b"}") >= 3 else 0


def _load(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ValueError(f"{where}: expected a committed segment as JSON, got {first_line(error)}.") from None
    return entry


def _segment(line: bytes, where: str) -> Segment:
    entry = _load(line, where)
    check_format(entry, where)
    try:
        rank, seq, tokens, documents = (entry[key] for key in ("rank", "seq", "tokens", "documents"))
        part, docs, dropped = File(**entry["part"]), File(**entry["docs"]), entry.get("dropped", 0)
        unrouted = tuple(entry.get("unrouted", ()))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: expected the fields of a segment, got an error with {error}.") from None
    numbers = (rank, seq, tokens, documents, dropped, *unrouted, part.size, part.crc32, docs.size, docs.crc32)
    names = (data_name("part", rank, seq), data_name("docs", rank, seq)) if is_count(seq, 0) else None
    if not all(is_count(number, 0) for number in numbers) or (part.name, docs.name) != names:
        raise ValueError(f"{where}: expected counts and the file names of its rank and seq, got {entry!r}.")
    return Segment(rank, seq, tokens, documents, part, docs, dropped, unrouted)


def append_manifest(path: Path, segment: Segment) -> None:
    """Commit a segment whose files are in place; a torn line that a crash left behind is cut first."""
    line = json.dumps(add_checksum({"format": FORMAT, **asdict(segment)})).encode() + b"\n"
    with locked(path), naming(path / MANIFEST):
        handle = os.open(path / MANIFEST, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            end = _cut_torn_line(handle)
            try:
                os.lseek(handle, end, os.SEEK_SET)
                if os.write(handle, line) != len(line):
                    raise OSError(f"{path / MANIFEST}: expected room for a line, got a full disk.")
                os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, end)  # else a second try would commit the segment twice
                raise
        finally:
            os.close(handle)
    sync_directory(path)


def _cut_torn_line(handle: int) -> int:
    """Drop a torn line after the last newline, or end a whole one with its newline; the size that is left."""
    size = end = os.fstat(handle).st_size
    while end:
        start = max(0, end - 4096)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        end = start + newline + 1  # with no newline in sight, on to what lies before
        if newline >= 0:
            break
    if end != size:
        whole = _whole_size(os.pread(handle, size - end, end))
        if whole:
            os.pwrite(handle, b"\n", end + whole)
            end += whole + 1
        os.ftruncate(handle, end)
    return end


def recover(path: Path, rank: int) -> list[Segment]:
    """What is committed, once a torn line and the uncommitted files of `rank` are gone; its writer's lock is held."""
    with locked(path):
        segments = read_manifest(path)  # refuses a damaged line before anything is changed
        if faults := manifest_faults(path):
            raise ValueError(faults[0])
        try:
            handle = os.open(path / MANIFEST, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        else:
            try:
                _cut_torn_line(handle)
            finally:
                os.close(handle)
    for name in uncommitted(path, segments):
        match = DATA.fullmatch(name)
        if match and int(match[2]) == rank:
            (path / name).unlink()
    return segments


def uncommitted(path: Path, segments: list[Segment]) -> list[str]:
    """Names of the data files that no line of the manifest lists."""
    listed = {file.name for segment in segments for file in (segment.part, segment.docs)}
    return sorted(name for name in os.listdir(path) if DATA.fullmatch(name) and name not in listed)
