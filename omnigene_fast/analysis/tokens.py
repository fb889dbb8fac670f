"""Streams of tokens: what the measures read that need more than counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tracing.records import Records, id_dtype
from .groups import RunLike

BLOCKS = 20  # of documents; where a table has E x E cells, one block is left out at a time instead of one document
_BYTES = 256 << 20  # what the arrays of one pass over a run may take


@dataclass
class Rows:
    """From document id to row of run.documents."""

    doc_ids: NDArray[np.int64]  # sorted
    order: NDArray[np.int64]

    @classmethod
    def of(cls, run: RunLike) -> "Rows":
        """The rows of a run."""
        doc_ids = np.asarray(run.documents["doc_id"], np.int64)
        order = np.argsort(doc_ids, kind="stable")
        return cls(doc_ids[order], order)

    def __call__(self, doc: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] rows of the documents of tokens; ValueError for a document the run does not list."""
        if not len(self.doc_ids):
            raise ValueError("run: expected documents, got none.")
        at = np.minimum(np.searchsorted(self.doc_ids, doc), len(self.doc_ids) - 1)
        if (self.doc_ids[at] != doc).any():
            raise ValueError(
                f"run: expected tokens of listed documents, got doc_id {int(doc[self.doc_ids[at] != doc][0])}."
            )
        return self.order[at]


def chosen_layers(run: RunLike, layers: Sequence[int] | None) -> list[int]:
    """Decoder indices in recorded order; ValueError for one that was not recorded."""
    recorded = [int(layer) for layer in run.layers]
    if layers is None:
        return recorded
    unknown = [layer for layer in layers if layer not in recorded]
    if unknown:
        raise ValueError(f"layers: expected decoder indices among {recorded}, got {unknown}.")
    return [layer for layer in recorded if layer in set(layers)]


def layer_groups(layers: Sequence[int], bytes_each: int) -> Iterator[list[int]]:
    """Layers in runs of as many as one pass may hold."""
    size = max(1, _BYTES // max(1, bytes_each))
    for start in range(0, len(layers), size):
        yield list(layers[start : start + size])


def gathered(run: RunLike, layers: Sequence[int]) -> Records:
    """Every token of some layers, sorted by document and position, with `doc` as row of run.documents."""
    rows = Rows.of(run)
    parts = []
    for part in run.batches(layers=list(layers), kinds=("ids",)):
        part.doc = rows(part.doc)
        parts.append(part)
    if not parts:
        empty = np.zeros(0, np.int64)
        shape = (len(layers), 0, run.top_k)
        return Records(
            empty, empty.astype(np.int32), empty.astype(np.int32), empty.astype(np.uint8), np.zeros(shape, np.uint8)
        )
    whole = joined(parts)
    return whole.take(np.lexsort((whole.pos, whole.doc)))


def joined(parts: Sequence[Records]) -> Records:
    """Records of several calls in one, without weights and statistics."""
    return Records(
        np.concatenate([part.doc for part in parts]),
        np.concatenate([part.pos for part in parts]),
        np.concatenate([part.token for part in parts]),
        np.concatenate([part.phase for part in parts]),
        np.concatenate([part.ids for part in parts], 1),
    )


def whole_documents(run: RunLike, layers: Sequence[int]) -> Iterator[Records]:
    """Batches of whole documents in order of position, `doc` as row of run.documents.

    A document that lies in several shards is held back until its last token has come.

    Raises:
        ValueError: tokens of a document are missing or are there twice.
    """
    rows = Rows.of(run)
    lengths = np.asarray(run.documents["n_tokens"], np.int64)
    held: dict[int, list[Records]] = {}
    seen = np.zeros(len(lengths), np.int64)
    for part in run.batches(layers=list(layers), kinds=("ids",)):
        part.doc = rows(part.doc)
        here = np.bincount(part.doc, minlength=len(lengths))
        seen += here
        if (seen > lengths).any():
            raise ValueError(_length(run, int(np.flatnonzero(seen > lengths)[0]), seen))
        complete = (here == lengths)[part.doc]
        ready = [part.take(complete)] if complete.any() else []
        for row in np.unique(part.doc[~complete]):
            held.setdefault(int(row), []).append(part.take(part.doc == row))
            if seen[row] == lengths[row]:
                ready += held.pop(int(row))
        if ready:
            batch = joined(ready)
            yield batch.take(np.lexsort((batch.pos, batch.doc)))
    if (seen != lengths).any():
        raise ValueError(_length(run, int(np.flatnonzero(seen != lengths)[0]), seen))


def one_hot(ids: NDArray[Any], experts: int) -> NDArray[np.float32]:
    """[n, E] 1 where a token [n, K] picked the expert."""
    out = np.zeros((len(ids), experts), np.float32)
    out[np.arange(len(ids))[:, None], ids] = 1
    return out


def no_tokens(run: RunLike) -> ValueError:
    """The error of a measure of tokens of a run that has none."""
    return ValueError(f"run: expected tokens with expert ids in {run.name!r}, got none (record=('ids',) keeps them).")


def id_bytes(run: RunLike) -> int:
    """Bytes that the ids of one layer take, with what sorting them takes."""
    tokens = int(np.asarray(run.documents["n_tokens"], np.int64).sum())
    return 3 * tokens * run.top_k * np.dtype(id_dtype(run.num_experts)).itemsize


def _length(run: RunLike, row: int, seen: NDArray[np.int64]) -> str:
    documents = run.documents
    tokens, name = int(documents["n_tokens"].iloc[row]), int(documents["doc_id"].iloc[row])
    return f"run: expected {tokens} tokens of document {name} of {run.name!r}, got {int(seen[row])}."
