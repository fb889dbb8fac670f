"""Documents of a run gathered from the docs files of its segments, whose counts add up and whose later labels win."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .columns import LABEL, opened_docs
from .manifest import Segment


@dataclass
class Documents:
    """Documents ascending by id."""

    doc_ids: NDArray[np.int64]  # [D]
    n_tokens: NDArray[np.int64]  # [D]
    text_hash: NDArray[Any]  # [D] str or None
    labels: dict[str, NDArray[Any]]  # name -> [D] str or None

    def __len__(self) -> int:
        return len(self.doc_ids)

    def label_rows(self) -> list[dict[str, str]]:
        """The labels of each document."""
        columns = [(name, values.tolist()) for name, values in self.labels.items()]
        return [{name: values[i] for name, values in columns if values[i] is not None} for i in range(len(self))]


def read_docs(directory: Path, segment: Segment, *, counts: bool) -> Iterator[pa.Table]:
    """The docs file of a segment, one row group at a time, with the counts or all that is not counts."""
    with opened_docs(directory, segment.docs) as parquet:
        names = ["doc_id", "counts"] if counts else [name for name in parquet.schema_arrow.names if name != "counts"]
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group, columns=names, use_threads=False)


def gather(tables: Iterable[pa.Table]) -> Documents:
    """Join what the segments know of each document; the order of `tables` decides which label is later."""
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    tokens: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    texts: dict[str, list[tuple[int, NDArray[Any]]]] = {"text_hash": []}
    start = 0
    for table in tables:
        ids.append(table["doc_id"].to_numpy())
        tokens.append(table["n_tokens"].to_numpy())
        for name in table.column_names:
            if name == "text_hash" or name.startswith(LABEL):
                texts.setdefault(name, []).append((start, np.array(table[name].to_pylist(), object)))
        start += table.num_rows
    doc_ids, row = np.unique(np.concatenate(ids), return_inverse=True)
    n_tokens = np.zeros(len(doc_ids), np.int64)
    np.add.at(n_tokens, row, np.concatenate(tokens))
    columns = {}
    for name in sorted(texts):
        columns[name] = np.full(len(doc_ids), None, object)
        for first, values in texts[name]:
            given = np.flatnonzero(values != None)  # noqa: E711  (elementwise)
            columns[name][row[first + given]] = values[given]
    text_hash = columns.pop("text_hash")
    return Documents(doc_ids, n_tokens, text_hash, {name.removeprefix(LABEL): c for name, c in columns.items()})


def add_counts(total: NDArray[np.int64], doc_ids: NDArray[np.int64], tables: Iterable[pa.Table]) -> None:
    """Add the counts of the tables to `total` [D, L, E], whose rows are `doc_ids`."""
    for table in tables:
        rows = np.searchsorted(doc_ids, table["doc_id"].to_numpy())
        total[rows] += counts_of(table, total.shape[1:])


def counts_of(table: pa.Table, shape: Sequence[int]) -> NDArray[np.int32]:
    """[D, L, E] the counts in a docs table; `shape` is (L, E); ValueError if they are not of that shape."""
    values = table["counts"].combine_chunks()
    flat = values.flatten().to_numpy()
    if len(flat) != table.num_rows * shape[0] * shape[1]:
        raise ValueError(f"counts: expected {shape[0]} x {shape[1]} numbers for a document, got {len(flat)} in total.")
    return flat.reshape(table.num_rows, *shape)
