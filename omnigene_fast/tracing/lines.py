"""Files of JSON lines as people have them: UTF-8, UTF-16 or UTF-32, with a byte-order mark or without, compressed."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .layout import first_line

_HEAD = 8  # bytes that tell a format
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": "Zstandard's compression; decompress it with `zstd -d`",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "Parquet; write it as JSON lines",
    b"version ": "a Git LFS pointer; run `git lfs pull`",
}


def json_lines(path: Path, argument: str = "") -> Iterator[tuple[int, str, Any]]:
    """Read JSON values from a file of text, gzip, bzip2 or xz, one per line; empty lines count and are left out.

    A pipe is read once, to its end, before the first line is returned.

    Args:
        path: of the file or pipe.
        argument: begins every sentence of an error.

    Returns:
        Line number from 0, words that name the file and the line, what `json.loads` makes of it.

    Raises:
        ValueError: a directory, bytes that are no text of their encoding, a line that is not JSON, a damaged archive.
    """
    said = f"{argument}: " if argument else ""
    if path.is_dir():
        raise ValueError(f"{said}expected a file of JSON lines, got the directory {str(path)!r}.")
    number = -1
    with open(path, "rb") as file:
        try:
            for number, line in enumerate(_text(file if file.seekable() else io.BytesIO(file.read()), path, said)):
                where = f"{said}{path}, line {number + 1}"
                _check_text(line, where)
                if line := line.removeprefix(
                    "\ufeff"
                ).strip():  # inside a file after `cat` of several, each with its own
                    yield number, where, _value(line, where)
        except (EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError, OSError) as error:
            raise ValueError(
                f"{said}{path}: expected JSON lines to the file's end, but reading stopped after line {number + 1}:"
                f" {first_line(error)}; copy the file again."
            ) from None


def _text(file: IO[bytes], path: Path, said: str) -> IO[str]:
    head = file.read(_HEAD)
    file.seek(0)
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{said}{path}: expected JSON lines, got {name} first.")
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
    if opener is not None:
        file = opener(file)
        head = file.read(_HEAD)
        file.seek(0)
    encoding = json.detect_encoding(head)
    # Bytes that are no UTF-8 become lone surrogates, which `_check_text` finds with their line.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
    return io.TextIOWrapper(file, encoding, errors)


def _check_text(line: str, where: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        code = ord(line[error.start])
        got = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:04X}"
        raise ValueError(
            f"{where}: expected UTF-8, got {got} at character {error.start + 1}; convert the file, such as with `iconv"
            " -f LATIN1 -t UTF-8`."
        ) from None


def _value(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        got = f"what is not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:
        got = f"JSON that Python does not read ({first_line(error)})"
    raise ValueError(f"{where}: expected a JSON object, got {got}; every line is read as one object.")
