"""Streams of tokens: what the measures read that need more than counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tracing.records import Records
from ..tracing.whole import concatenate
from .groups import RunLike, check_equal_experts, say_that_layers_are_left_out

BLOCKS = 20  # of documents; where a table has E x E cells, one block is left out at a time instead of one document
BATCH = 1 << 14  # tokens that are compared at once
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
    """Decoder indices in recorded order, by default of all layers that chose experts for every token.

    Raises:
        ValueError: a layer that was not recorded or, asked for or with no other left, whose router gave NaN.
    """
    check_equal_experts(run)
    recorded = [int(layer) for layer in run.layers]
    lost = getattr(run, "unrouted", np.zeros(len(recorded), np.int64))
    gone = tuple(layer for layer, count in zip(recorded, lost, strict=True) if count)
    if gone and (len(gone) == len(recorded) or set(layers or ()) & set(gone)):
        raise ValueError(
            f"layers: expected layers whose routers chose experts for every token, got NaN in {list(gone)} of"
            f" {run.name!r}; choose other layers."
        )
    if layers is None:
        if gone:
            say_that_layers_are_left_out(str(run.name), gone)
        return [layer for layer in recorded if layer not in gone]
    unknown = [layer for layer in layers if layer not in recorded]
    if unknown:
        raise ValueError(f"layers: expected decoder indices among {recorded}, got {unknown}.")
    return [layer for layer in recorded if layer in set(layers)]


def layer_groups(layers: Sequence[int], bytes_each: int, besides: int = 0) -> Iterator[list[int]]:
    """Layers in runs of as many as one pass may hold, at `bytes_each` and `besides` for all of them."""
    size = max(1, (_BYTES - besides) // max(1, bytes_each))
    for start in range(0, len(layers), size):
        yield list(layers[start : start + size])


def whole_documents(run: RunLike, layers: Sequence[int]) -> Iterator[Records]:
    """Batches of whole documents in order of position, `doc` as row of run.documents.

    Raises:
        ValueError: tokens of a document are missing or are there twice.
    """
    rows = Rows.of(run)
    lengths = np.asarray(run.documents["n_tokens"], np.int64)
    seen = np.zeros(len(lengths), np.int64)
    held: list[Records] = []
    tokens = 0
    for _, part in run.iter_documents(layers=list(layers), kinds=("ids",)):
        row = int(rows(part.doc[:1])[0])
        part.doc = np.full(len(part), row, np.int64)
        seen[row] += len(part)
        held.append(part)
        tokens += len(part)
        if tokens >= BATCH:
            yield concatenate(held)
            held, tokens = [], 0
    if held:
        yield concatenate(held)
    if (seen != lengths).any():
        row = int(np.flatnonzero(seen != lengths)[0])
        raise ValueError(
            f"run: expected {lengths[row]} tokens of document {int(run.documents['doc_id'].iloc[row])} of"
            f" {run.name!r}, got {seen[row]}."
        )


def shared(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.int64]:
    """[n] experts that both of two tokens picked, ids [n, K]."""
    first, second = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    found = np.zeros(len(a), np.uint16)
    for one in first:  # K * K passes over bytes: far faster than [n, K, K] at once
        for other in second:
            found += one == other
    return found.astype(np.int64)


def one_hot(ids: NDArray[Any], experts: int) -> NDArray[np.float32]:
    """[n, E] 1 where a token [n, K] picked the expert."""
    out = np.zeros((len(ids), experts), np.float32)
    out[np.arange(len(ids))[:, None], ids] = 1
    return out


def no_tokens(run: RunLike) -> ValueError:
    """The error of a measure of tokens of a run that has none."""
    return ValueError(f"run: expected tokens with expert ids in {run.name!r}, got none (record=('ids',) keeps them).")
