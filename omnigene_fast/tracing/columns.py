"""The Parquet side of the store: schemas, encoding, and reading a file of the manifest with errors that name it."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .layout import File, first_line
from .records import KINDS, STATISTICS, id_dtype

ROW_GROUP = 65536  # tokens
DOCUMENT_ROWS = 512  # documents per row group: 8 MB of counts at 30 layers x 128 experts
PREFIXES = {"ids": "layer", "weights": "weights", "stats": "stats"}  # of the columns of each kind
LABEL = "label_"


def column(kind: str, layer: int) -> str:
    """Column of a kind of record in a decoder layer."""
    return f"{PREFIXES[kind]}_{layer:02d}"


def blob_type(kind: str, num_experts: int, top_k: int) -> tuple[np.dtype[Any], int]:
    """dtype and number of the values that a token has in one layer: a column holds their bytes, little-endian."""
    if kind == "ids":
        return np.dtype(id_dtype(num_experts)).newbyteorder("<"), top_k
    return np.dtype("<f2"), top_k if kind == "weights" else len(STATISTICS)


def part_schema(layers: Sequence[int], num_experts: int, top_k: int, record: Sequence[str]) -> pa.Schema:
    """Columns of a part file."""
    fields = [("doc_id", pa.int64()), ("pos", pa.int32()), ("token_id", pa.int32()), ("phase", pa.uint8())]
    for kind in KINDS:
        if kind in record:
            dtype, values = blob_type(kind, num_experts, top_k)
            fields += [(column(kind, layer), pa.binary(dtype.itemsize * values)) for layer in layers]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


def docs_schema(labels: Iterable[str]) -> pa.Schema:
    """Columns of a docs file with these labels."""
    fields = [pa.field("doc_id", pa.int64(), nullable=False), pa.field("n_tokens", pa.int64(), nullable=False)]
    fields += [pa.field("text_hash", pa.string()), *(pa.field(LABEL + name, pa.string()) for name in labels)]
    return pa.schema([*fields, pa.field("counts", pa.list_(pa.field("element", pa.int32(), False)), nullable=False)])


def to_blob(array: NDArray[Any], schema_type: pa.DataType) -> pa.Array:
    """A column over the memory of `array` [n, values]."""
    return pa.Array.from_buffers(schema_type, len(array), [None, pa.py_buffer(np.ascontiguousarray(array))])


def from_blob(values: pa.ChunkedArray, dtype: np.dtype[Any], per_row: int) -> NDArray[Any]:
    """[n, per_row] over the memory of a column."""
    array = (
        values.chunk(0) if values.num_chunks == 1 else pa.concat_arrays(values.chunks or [pa.array([], values.type)])
    )
    if not len(array):
        return np.empty((0, per_row), dtype)
    flat = np.frombuffer(array.buffers()[1], dtype, len(array) * per_row, array.offset * array.type.byte_width)
    return flat.reshape(-1, per_row)


def encode(schema: pa.Schema, tables: Iterable[pa.Table], row_group: int) -> pa.Buffer:
    """A Parquet file in memory: zstd, page checksums, statistics where they help to skip pages."""
    sink = pa.BufferOutputStream()
    plain = [name for name in schema.names if name in ("doc_id", "pos", "n_tokens")]
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=[path for path in _leaves(schema) if path.startswith((LABEL, "text_hash", "counts"))],
        write_statistics=plain,
        write_page_checksum=True,
    ) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=row_group)
    return sink.getvalue()


def _leaves(schema: pa.Schema) -> list[str]:
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a Parquet file is read into a sentence that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path}: expected a whole Parquet file, but reading it failed: {first_line(error)}."
        ) from error


def check_size(directory: Path, file: File) -> Path:
    """Path of a file of the manifest, there and of its size.

    Raises:
        ValueError: it is missing, truncated or was changed.
    """
    path = directory / file.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a file of {file.size} bytes, found none; restore it.") from None
    if size != file.size:
        raise ValueError(f"{path}: expected {file.size} bytes as the manifest says, found {size}; restore it.")
    return path


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def check_file(directory: Path, file: File) -> Path:
    """As `check_size`, the bytes included."""
    path = check_size(directory, file)
    found = checksum(path)
    if found != file.crc32:
        raise ValueError(
            f"{path}: expected checksum {file.crc32:08x} as the manifest says, found {found:08x}; restore it."
        )
    return path


@contextmanager
def opened_part(directory: Path, file: File, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
    """A part file of the manifest, the checksums of whose pages are checked as they are read.

    Raises:
        ValueError: no such file, or what goes wrong in it inside the block; columns other than those of `schema`.
    """
    path = check_size(directory, file)
    with naming(path), pq.ParquetFile(path, page_checksum_verification=True) as parquet:
        if not parquet.schema_arrow.equals(schema):
            raise ValueError(f"{path}: expected the columns that its meta.json asks for, got others.")
        yield parquet


@contextmanager
def opened_docs(directory: Path, file: File) -> Iterator[pq.ParquetFile]:
    """A docs file of the manifest, checked as a whole first: it is small beside its part file."""
    path = check_file(directory, file)
    with naming(path), pq.ParquetFile(path) as parquet:
        yield parquet
