"""Hugging Face `datasets`: one row per document, as trainers that replay routing want it.

A row: doc_id; text_hash; a column per label, by its name; num_experts; layers [L], decoder indices; input_ids [n];
positions [n]; phases [n], 0 prefill, 1 decode, 2 train; routed_experts [n, L, K], uint8 or uint16; and if they are
recorded router_weights [n, L, K] and router_stats [n, L, 3] (entropy, mass, margin), float16. Token first, as in the
arrays of vLLM and SGLang. Every row says its shape, for a part of a dataset to be enough.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..beside import new_directory, new_file
from ..columns import naming
from ..records import STATISTICS, Records, id_dtype
from .building import Labels, new_run
from .files import OWN, existing, portable_meta, resolve_meta
from .responses import every_document

if TYPE_CHECKING:
    import datasets

    from ..run import Run

GROUP_TOKENS = 1 << 14  # in memory at a time: 4 MB of ids at 30 layers and top 8
SHARD_TOKENS = 1 << 20
_COLUMNS = {"ids": "routed_experts", "weights": "router_weights", "stats": "router_stats"}
_LISTS = {"input_ids": pa.int32(), "positions": pa.int32(), "phases": pa.uint8()}
_FIXED = ("doc_id", "text_hash", "num_experts", "layers", *_LISTS, *_COLUMNS.values())
_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- mixture-of-experts
- routing-traces
---
Router decisions of a mixture-of-experts model, one row per document; `routed_experts` is [tokens, layers, K], `layers`
the decoder index of each entry of its second axis. Written by omnigene-fast.

    datasets.load_dataset(DIRECTORY, split="train", streaming=True)
"""


def export_datasets(run: "Run", path: str | os.PathLike[str]) -> list[str]:
    """Write a directory of Parquet files and a card: `datasets.load_dataset(path, split="train")`.

    Some ten thousand tokens are in memory at a time. The metadata of the Parquet files hold the run's meta.json.

    Returns:
        What was left out.
    """
    schema = _schema(run)
    tables = _tables(run, schema)
    first = next(tables)
    with new_directory(path) as beside:
        rest: Iterator[pa.Table] = chain((first,), tables)
        shard = 0
        while (table := next(rest, None)) is not None:
            with new_file(beside / "data" / f"train-{shard:05d}.parquet") as file, _writer(file, schema) as writer:
                tokens = 0
                while table is not None:
                    writer.write_table(table)
                    tokens += len(table["input_ids"].combine_chunks().flatten())
                    table = next(rest, None) if tokens < SHARD_TOKENS else None
            shard += 1
        with new_file(beside / "README.md") as file:
            file.write(_CARD.encode())
    return []


def import_datasets(
    source: Any,
    path: str | os.PathLike[str],
    *,
    meta: Mapping[str, Any] | None = None,
    labels: Labels = None,
    columns: Collection[str] | None = None,
) -> "Run":
    """Read a directory that `export_datasets` wrote, one Parquet file, or a Dataset or IterableDataset.

    routed_experts is needed, the other columns are taken if there: without layers and num_experts `meta` must say them,
    without doc_id documents are numbered from 0. Columns of text under other names are labels.

    Args:
        source, path, meta, labels: as for `import_run`.
        columns: the columns of text that become labels, by default all of them.
    """
    if not isinstance(source, str | os.PathLike):
        return from_dataset(source, path, meta=meta, labels=labels, columns=columns)
    root = existing(source)
    files = [root] if root.is_file() else sorted(root.glob("**/*.parquet"))
    if not files:
        raise ValueError(f"{root}: expected Parquet files, found none; of a saved Dataset pass load_from_disk({root}).")
    known: dict[str, Any] = {}
    for file in files:
        with naming(file):
            found = _known(pq.read_schema(file).metadata)
        known = known or found
    documents = known.get("documents") if root.is_dir() else None
    return _build((t for file in files for t in _read(file)), path, meta, labels, columns, known, documents, root)


def to_dataset(run: "Run") -> "datasets.Dataset":
    """A run as a Dataset in memory; one that is larger goes through `export_run` and `datasets.load_dataset`."""
    import datasets

    return datasets.Dataset(pa.concat_tables(_tables(run, _schema(run))).replace_schema_metadata(None))


def from_dataset(
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    meta: Mapping[str, Any] | None = None,
    labels: Labels = None,
    columns: Collection[str] | None = None,
) -> "Run":
    """Write a Dataset or IterableDataset with the columns of this module as a new run, a few rows at a time.

    Args:
        dataset: with routed_experts and, as far as it has them, the other columns.
        path, meta, labels: as for `import_run`; columns: as for `import_datasets`.
    """
    if not hasattr(dataset, "with_format"):
        raise TypeError(f"source: expected a path, a Dataset or an IterableDataset, got {type(dataset).__name__}.")
    batches = dataset.with_format("arrow").iter(batch_size=16)
    return _build((("rows", table) for table in batches), path, meta, labels, columns, {}, None, dataset)


def _schema(run: "Run") -> pa.Schema:
    run.check_kinds(("ids",))
    labels = sorted(run.gathered.labels)
    taken = [name for name in labels if name in _FIXED]
    if taken:
        raise ValueError(f"labels: expected names that are no column of the dataset, got {taken[0]!r}.")
    fields: list[tuple[str, pa.DataType]] = [("doc_id", pa.int64()), ("text_hash", pa.string())]
    fields += [(name, pa.string()) for name in labels]
    fields += [("num_experts", pa.int32()), ("layers", pa.list_(pa.int32()))]
    fields += [(name, pa.list_(kind)) for name, kind in _LISTS.items()]
    for kind in run.record:
        last = len(STATISTICS) if kind == "stats" else run.top_k
        number = pa.from_numpy_dtype(id_dtype(run.num_experts)) if kind == "ids" else pa.float16()
        inner = pa.list_(pa.list_(number, last), len(run.layers))
        fields.append((_COLUMNS[kind], pa.list_(inner)))
    own = json.dumps({"meta": portable_meta(run), "documents": len(run.gathered)})
    return pa.schema(fields, metadata={OWN: own})


def _tables(run: "Run", schema: pa.Schema) -> Iterator[pa.Table]:
    """The documents, as many at a time as have GROUP_TOKENS tokens."""
    rows: list[dict[str, Any]] = []
    parts: list[Records] = []
    for row, records in every_document(run, run.record):
        rows.append(row)
        parts.append(records)
        if sum(map(len, parts)) >= GROUP_TOKENS:
            yield _table(run, schema, rows, parts)
            rows, parts = [], []
    if rows:
        yield _table(run, schema, rows, parts)


def _table(run: "Run", schema: pa.Schema, rows: list[dict[str, Any]], parts: list[Records]) -> pa.Table:
    edges = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    columns: dict[str, Any] = {key: [row[key] for row in rows] for key in ("doc_id", "text_hash")}
    columns |= {name: [row["labels"].get(name) for row in rows] for name in run.gathered.labels}
    columns |= {"num_experts": [run.num_experts] * len(rows), "layers": [run.layers] * len(rows)}
    for name, field in zip(_LISTS, ("token", "pos", "phase"), strict=True):
        values = np.concatenate([getattr(part, field) for part in parts])
        columns[name] = pa.ListArray.from_arrays(edges, pa.array(values))
    for kind in run.record:
        blocks = [getattr(part, kind).transpose(1, 0, 2) for part in parts]
        values = np.ascontiguousarray(np.concatenate(blocks))  # [n, L, K or 3]
        inner = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[2])
        outer = pa.FixedSizeListArray.from_arrays(inner, values.shape[1])
        columns[_COLUMNS[kind]] = pa.ListArray.from_arrays(edges, outer)
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _writer(file: Any, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)


def _read(file: Path) -> Iterator[tuple[str, pa.Table]]:
    with naming(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        for number in range(parquet.num_row_groups):
            yield str(file), parquet.read_row_group(number, use_threads=False)


def _known(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What `export_datasets` left in the metadata of a file."""
    try:
        own = json.loads((metadata or {})[OWN.encode()])
    except (ValueError, KeyError):
        return {}
    return own if isinstance(own, dict) and isinstance(own.get("meta"), dict) else {}


def _build(
    tables: Iterable[tuple[str, pa.Table]],
    path: str | os.PathLike[str],
    meta: Mapping[str, Any] | None,
    labels: Labels,
    columns: Collection[str] | None,
    known: Mapping[str, Any],
    documents: Any,
    source: object,
) -> "Run":
    from ..run import open_trace

    rest = iter(tables)
    first = next(rest, None)
    if first is None or not first[1].num_rows:
        raise ValueError("source: expected at least one document, found none.")
    found = {**known.get("meta", {}), **_shape(*first)}
    resolved = resolve_meta(meta, found, "datasets", source)
    kinds = [kind for kind, name in _COLUMNS.items() if name in first[1].column_names]
    with new_run(path, resolved, labels, record=kinds) as builder:
        row = 0
        for where, table in chain((first,), rest):
            for own, token, arrays in _documents(where, table, kinds, columns, resolved, row):
                builder.add(f"{where}, row {row}", arrays.pop("ids"), token, own=own, **arrays)
                row += 1
        builder.finish(documents)
    return open_trace(path)


def _shape(where: str, table: pa.Table) -> dict[str, Any]:
    """layers, num_experts and top_k as the first row says them; None for what it does not."""
    if _COLUMNS["ids"] not in table.column_names:
        raise ValueError(f"{where}: expected a column {_COLUMNS['ids']}, got {table.column_names}.")
    _, values = _dense(where, table, _COLUMNS["ids"], 3)
    names = table.column_names
    shape: dict[str, Any] = {
        "layers": table["layers"][0].as_py() if "layers" in names else None,
        "num_experts": table["num_experts"][0].as_py() if "num_experts" in names else None,
        "top_k": values.shape[2] or None,
    }
    return {key: value for key, value in shape.items() if value is not None}


def _documents(
    where: str,
    table: pa.Table,
    kinds: Sequence[str],
    columns: Collection[str] | None,
    meta: Mapping[str, Any],
    row: int,
) -> Iterator[tuple[dict[str, Any], Any, dict[str, NDArray[Any]]]]:
    """Of each row what the builder takes: its own part, token ids, and the arrays of each kind [n, L, ...]."""
    missing = [_COLUMNS[kind] for kind in kinds if _COLUMNS[kind] not in table.column_names]
    if missing:
        raise ValueError(f"{where}: expected the columns of the first file, got none named {missing[0]}.")
    for key, value in (("layers", meta["layers"]), ("num_experts", meta["num_experts"])):
        if key in table.column_names:
            wrong = next((got for got in table[key].to_pylist() if got != value), None)
            if wrong is not None:
                raise ValueError(f"{where}: expected {key} {value} in every row, got {wrong}.")
    dense = {kind: _dense(where, table, _COLUMNS[kind], 3) for kind in kinds}
    for kind, (_, values) in dense.items():
        last = len(STATISTICS) if kind == "stats" else meta["top_k"]
        if len(values) and values.shape[1:] != (len(meta["layers"]), last):
            raise ValueError(
                f"{where}: expected {_COLUMNS[kind]} to be [tokens, {len(meta['layers'])}, {last}], got"
                f" {['tokens', *values.shape[1:]]}."
            )
        if not len(values):
            values = values.reshape(0, len(meta["layers"]), last)
        dense[kind] = dense[kind][0], values if kind == "ids" else values.astype(np.float16)
    lists = {name: _dense(where, table, name, 1) for name in _LISTS if name in table.column_names}
    texts = {
        name: table[name].to_pylist()
        for name in table.column_names
        if name not in _FIXED and _is_text(table.schema.field(name).type) and (columns is None or name in columns)
    }
    plain = {name: table[name].to_pylist() for name in ("doc_id", "text_hash") if name in table.column_names}
    for i in range(table.num_rows):
        own: dict[str, Any] = {name: values[i] for name, values in plain.items()}
        own["labels"] = {name: values[i] for name, values in texts.items() if values[i] is not None}
        flat = {name: values[edges[i] : edges[i + 1]] for name, (edges, values) in lists.items()}
        own |= {key: flat[name] for key, name in (("pos", "positions"), ("phase", "phases")) if name in flat}
        arrays = {kind: values[edges[i] : edges[i + 1]] for kind, (edges, values) in dense.items()}
        lengths = {len(array) for array in (*flat.values(), *arrays.values())}
        if len(lengths) > 1:
            raise ValueError(
                f"{where}, row {row + i}: expected lists of one length, the tokens, got {sorted(lengths)}."
            )
        yield own, flat.get("input_ids"), arrays


def _dense(where: str, table: pa.Table, name: str, depth: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """A column of lists, `depth` deep, as the edges of its rows and one array of all their values.

    Raises:
        ValueError: values missing, lists of other depths, or ragged ones below the first level.
    """
    column = table[name].combine_chunks()
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    edges, shape = np.zeros(1, np.int64), []
    for level in range(depth):
        if not _is_list(column.type) or column.null_count:
            raise ValueError(f"{where}: expected {name} to be lists {depth} deep, nothing missing, got {column.type}.")
        lengths = np.asarray(pc.list_value_length(column), np.int64)
        if level == 0:
            edges = np.append(0, np.cumsum(lengths))
        else:
            if len(lengths) and (lengths != lengths[0]).any():
                raise ValueError(f"{where}: expected {name} to be [tokens, layers, K], got ragged lists.")
            shape.append(int(lengths[0]) if len(lengths) else 0)
        column = column.flatten()
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ValueError(f"{where}: expected {name} to hold numbers, nothing missing, got {column.type}.")
    return edges, column.to_numpy(zero_copy_only=False).reshape(-1, *shape) if shape else column.to_numpy(False)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
