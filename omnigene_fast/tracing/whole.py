"""Rows of part files by number, and from them documents in one piece wherever their tokens lie."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .documents import read_docs
from .records import Records

if TYPE_CHECKING:
    from .run import Run

_GROUPS = 3  # row groups kept: a document under way lies in the last one or two


class Rows:
    """Rows of the part files of a run, with the row groups read last kept in memory."""

    def __init__(self, run: "Run", layers: Sequence[int] | None, kinds: Sequence[str]) -> None:
        self._run, self._layers, self._kinds = run, layers, kinds
        self._edges: dict[int, list[int]] = {}  # segment -> first row of each row group, and the end
        self._groups: OrderedDict[tuple[int, int], Records] = OrderedDict()

    def edges(self, segment: int) -> list[int]:
        """First row of each row group of a segment's part file, then the number of its rows."""
        if segment not in self._edges:
            with self._run.opened(self._run.segments[segment]) as parquet:
                sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            self._edges[segment] = [0, *np.cumsum(sizes).tolist()]
        return self._edges[segment]

    def read(self, segment: int, start: int, stop: int) -> Iterator[Records]:
        """Rows [start, stop) as views, one for each row group that they lie in."""
        edges = self.edges(segment)
        for group, (first, end) in enumerate(pairwise(edges)):
            if first < stop and start < end:
                yield self._group(segment, group).take(slice(max(start - first, 0), min(stop, end) - first))

    def _group(self, segment: int, group: int) -> Records:
        key = (segment, group)
        if key not in self._groups:
            while len(self._groups) >= _GROUPS:
                self._groups.popitem(last=False)
            with self._run.opened(self._run.segments[segment]) as parquet:
                self._groups[key] = self._run.read_group(parquet, group, self._layers, self._kinds)
        self._groups.move_to_end(key)
        return self._groups[key]


def whole_documents(
    run: "Run", layers: Sequence[int] | None, kinds: Sequence[str], where: str | None
) -> Iterator[tuple[dict[str, Any], Records]]:
    """The documents of `Run.iter_documents`, whose arguments were checked."""
    known, rows = run.gathered, Rows(run, layers, kinds)
    pieces = []  # of each segment: segment, document, first row, end
    for segment in range(len(run.segments)):
        if not run.segments[segment].tokens:  # no rows, though the documents may have tokens: `Writer.add_counts`
            continue
        tables = list(read_docs(run.path, run.segments[segment], counts=False))
        ids = [np.empty(0, np.int64), *(table["doc_id"].to_numpy() for table in tables)]
        ends = np.cumsum(np.concatenate([ids[0], *(table["n_tokens"].to_numpy() for table in tables)]))
        starts = np.append(0, ends[:-1])[: len(ends)]
        pieces.append(np.stack([np.full(len(ends), segment), np.concatenate(ids), starts, ends]))
    every = np.concatenate([np.empty((4, 0), np.int64), *pieces], axis=1)
    every = every[:, every[3] > every[2]]
    if where is not None:
        every = every[:, np.isin(every[1], run.database.documents(where))]
    order = np.argsort(every[1], kind="stable")  # pieces of a document together, in the order of the segments
    heads = np.flatnonzero(np.diff(every[1][order], prepend=-1))
    groups = np.split(order, heads[1:]) if len(order) else []
    for group in sorted(groups, key=lambda pieces: int(pieces[0])):
        parts = []
        for segment, _, start, stop in every[:, group].T.tolist():
            parts += list(rows.read(segment, start, stop))
        records = concatenate(parts)
        if (np.diff(records.pos) < 0).any():
            records = records.take(np.argsort(records.pos, kind="stable"))
        doc = int(np.searchsorted(known.doc_ids, every[1, group[0]]))
        texts = {"text_hash": known.text_hash[doc], **{name: values[doc] for name, values in known.labels.items()}}
        yield {"doc_id": int(known.doc_ids[doc]), "n_tokens": int(known.n_tokens[doc]), **texts}, records


def concatenate(parts: Sequence[Records]) -> Records:
    """One batch of records of several, in memory of its own."""
    joined: dict[str, Any] = {}
    for field in fields(Records):
        arrays = [getattr(part, field.name) for part in parts]
        missing = arrays[0] is None
        joined[field.name] = None if missing else np.concatenate(arrays, axis=1 if arrays[0].ndim == 3 else 0)
    return Records(**joined)
