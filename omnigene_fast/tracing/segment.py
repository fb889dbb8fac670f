"""The open segment of a writer: buffers for its tokens, and the two tables they become."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .checks import is_sorted
from .columns import DOCUMENT_ROWS, LABEL, blob_type, docs_schema, part_schema, to_blob
from .counting import count_picks
from .records import KINDS, Records, count_unrouted

_ARRAYS = tuple(field.name for field in fields(Records))


class OpenSegment:
    """Tokens and documents that are not committed yet, for L layers (decoder indices), E experts and top-K."""

    def __init__(self, layers: list[int], num_experts: int, top_k: int, record: tuple[str, ...], capacity: int) -> None:
        self.layers, self.num_experts, self.top_k, self.record = layers, num_experts, top_k, record
        self.tokens = 0
        self.labels: dict[int, dict[str, str]] = {}  # of every document that was named, with tokens or without
        self.hashes: dict[int, str] = {}
        self._room = self._allocate(capacity)
        self._sorted = True

    def __bool__(self) -> bool:
        return bool(self.tokens or self.labels or self.hashes)

    def _allocate(self, capacity: int) -> Records:
        L = len(self.layers)
        blobs: dict[str, Any] = dict.fromkeys(KINDS)
        for kind in {"ids", *self.record}:  # the counts need the ids, recorded or not
            dtype, values = blob_type(kind, self.num_experts, self.top_k)
            blobs[kind] = np.empty((L, capacity, values), dtype)
        return Records(
            np.empty(capacity, np.int64),
            np.empty(capacity, np.int32),
            np.empty(capacity, np.int32),
            np.empty(capacity, np.uint8),
            **blobs,
        )

    def _filled(self) -> Records:
        """Views on the buffers as far as they are filled."""
        return self._room.take(slice(0, self.tokens))

    def append(self, records: Records, labels: Mapping[int, Mapping[str, str]], hashes: Mapping[int, str]) -> None:
        """Copy checked records in; of a label given twice the last value stays."""
        start, stop = self.tokens, self.tokens + len(records)
        if stop > len(self._room):
            old, self._room = self._filled(), self._allocate(stop)
            _copy(old, self._room.take(slice(0, start)))
        _copy(records, self._room.take(slice(start, stop)))
        self.tokens = stop
        seam = slice(max(0, start - 1), stop)
        self._sorted = self._sorted and is_sorted(self._room.doc[seam], self._room.pos[seam])
        for doc, values in labels.items():
            self.labels.setdefault(int(doc), {}).update(values)
        for doc, text_hash in hashes.items():
            self.hashes[int(doc)] = text_hash

    def clear(self) -> None:
        """Forget everything; the buffers stay."""
        self.tokens, self.labels, self.hashes, self._sorted = 0, {}, {}, True

    def _sort(self) -> None:
        if self._sorted:
            return
        filled = self._filled()
        order = np.lexsort((filled.pos, filled.doc))
        for array in _present(filled).values():
            for rows in array if array.ndim == 3 else (array,):
                rows[:] = np.take(rows, order, axis=0)
        self._sorted = True

    def part_table(self) -> pa.Table:
        """The tokens, sorted by (doc_id, pos), over the memory of the buffers."""
        self._sort()
        filled = self._filled()
        schema = part_schema(self.layers, self.num_experts, self.top_k, self.record)
        columns = [pa.array(array) for array in (filled.doc, filled.pos, filled.token, filled.phase)]
        for kind in KINDS:
            if kind in self.record:
                columns += [
                    to_blob(rows, schema.field(len(columns) + i).type) for i, rows in enumerate(getattr(filled, kind))
                ]
        return pa.Table.from_arrays(columns, schema=schema)

    def unrouted(self) -> NDArray[np.int64]:
        """[L] tokens that no router chose experts for."""
        return count_unrouted(self._filled().ids, self.num_experts)

    def document_ids(self) -> NDArray[np.int64]:
        """[D] ids of the documents with tokens, a label or a hash, ascending."""
        self._sort()
        doc = self._room.doc[: self.tokens]
        named = np.fromiter({*self.labels, *self.hashes}, np.int64)
        return np.union1d(doc[np.diff(doc, prepend=-1) > 0], named)

    def docs_schema(self) -> pa.Schema:
        """Schema of `docs_tables`."""
        return docs_schema(sorted({name for values in self.labels.values() for name in values}))

    def docs_tables(self) -> Iterator[pa.Table]:
        """The documents, ascending by id, with the counts of this segment; some hundred of them at a time."""
        self._sort()
        filled, ids, schema = self._filled(), self.document_ids(), self.docs_schema()
        edges = np.append(np.searchsorted(filled.doc, ids), self.tokens)
        for first in range(0, len(ids), DOCUMENT_ROWS):
            some, edge = ids[first : first + DOCUMENT_ROWS], edges[first : first + DOCUMENT_ROWS + 1]
            tokens = np.diff(edge)
            counts = count_picks(
                filled.ids[:, edge[0] : edge[-1]], np.repeat(np.arange(len(some)), tokens), len(some), self.num_experts
            )
            yield docs_table(schema, some, tokens, counts, self.labels, self.hashes)


def docs_table(
    schema: pa.Schema,
    doc_ids: NDArray[np.int64],
    n_tokens: NDArray[np.int64],
    counts: NDArray[np.int32],
    labels: Mapping[int, Mapping[str, str]],
    hashes: Mapping[int, str],
) -> pa.Table:
    """Rows of a docs file: `doc_ids` [D], `n_tokens` [D], `counts` [D, L, E]; labels and hashes by document id."""
    keys = doc_ids.tolist()
    columns = [pa.array(doc_ids), pa.array(n_tokens), pa.array([hashes.get(key) for key in keys], pa.string())]
    for field in schema:
        if field.name.startswith(LABEL):
            name = field.name.removeprefix(LABEL)
            columns.append(pa.array([labels.get(key, {}).get(name) for key in keys], pa.string()))
    offsets = np.arange(len(keys) + 1, dtype=np.int32) * counts[0].size
    columns.append(pa.ListArray.from_arrays(offsets, counts.reshape(-1), type=schema.field("counts").type))
    return pa.Table.from_arrays(columns, schema=schema)


def _present(records: Records) -> dict[str, NDArray[Any]]:
    arrays = {name: getattr(records, name) for name in _ARRAYS}
    return {name: array for name, array in arrays.items() if array is not None}


def _copy(source: Records, target: Records) -> None:
    for name, array in _present(target).items():
        array[...] = getattr(source, name)
