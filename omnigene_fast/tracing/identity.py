"""Which document each token of a call belongs to, and where in it it stands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(eq=False)
class Stream:
    """The sequences of a cache: row b continues document `docs[b]` behind `lengths[b]` tokens."""

    docs: NDArray[np.int64] | None = None
    lengths: NDArray[np.int64] | None = None
    finished: NDArray[np.bool_] | None = None  # rows that have ended while the batch goes on


@dataclass
class Generation:
    """What one `generate` has fed so far without a cache: token ids [B, S] and the state of their sequences."""

    fed: list[tuple[NDArray[Any], Stream]] = field(default_factory=list)

    def match(self, token: NDArray[Any]) -> tuple[int, Stream, list[int]] | None:
        """How `token` [B, S] begins with what was fed before: columns, state, and which row each row continues."""
        for number, (known, stream) in reversed(list(enumerate(self.fed))):
            columns = known.shape[1]
            if len(known) != len(token) or columns >= token.shape[1]:
                continue
            rows = {row.tobytes(): at for at, row in reversed(list(enumerate(known)))}
            source = [
                at if (token[at, :columns] == known[at]).all() else rows.get(token[at, :columns].tobytes())
                for at in range(len(token))
            ]
            found = [at for at in source if at is not None]
            if len(found) == len(source):
                del self.fed[number]
                return columns, stream, found
        return None


@dataclass
class Tokens:
    """The identity of the tokens of a call, [B, S] each."""

    doc: NDArray[np.int64]
    pos: NDArray[np.int32]
    valid: NDArray[np.bool_]  # no padding, and of a document
    row: NDArray[np.int64] = field(repr=False)  # of the batch
    known: int = 0  # columns that an earlier call of the same `generate` brought already, which has no cache
    source: list[int] | None = None  # whose rows they continue
    decodes: bool = False  # one more token of each sequence
    stream: Stream | None = field(default=None, repr=False)


class Numbering:
    """Numbers documents and the tokens in them, call after call.

    Every row of a call is a document of its own, unless it continues a cached one, or packs several (its positions
    begin anew, or the caller numbers its tokens). Positions count the tokens of a document from 0, padding left out.
    What goes on from a prefix that is not the end of its document (the cache was cropped, copied, repeated, or filled
    before the trace) is a document of its own, whose first position is the length of the prefix.

    Args:
        first: number of the first automatic document.
        eos: ids that end a generated sequence.
        held: gives the tokens per document so far; asked when the caller first numbers documents.
    """

    def __init__(
        self, first: int, eos: tuple[int, ...] = (), held: Callable[[], Mapping[int, int]] = lambda: {}
    ) -> None:
        self.next = first
        self._eos = np.array(eos, np.int64)
        self._held = held
        self._lengths: dict[int, int] | None = None  # of all documents, once the caller numbers some

    def assign(
        self,
        stream: Stream,
        shape: tuple[int, int],
        valid: NDArray[np.bool_] | None,
        token: NDArray[Any] | None,
        position: NDArray[Any] | None,
        doc_ids: NDArray[np.int64] | None,
        *,
        past: int = 0,
        before: NDArray[Any] | None = None,
        source: list[int] | None = None,
        branches: bool = False,
        generation: Generation | None = None,
    ) -> Tokens:
        """Identify the tokens of one call.

        Args:
            stream: state of the cached sequences, updated.
            shape: B, S.
            valid: [B, S], padding False; None for all.
            token: [B, S] token ids or None.
            position: [B or 1, S] position ids or None.
            doc_ids: the caller's numbers, [B] or [B, S] (negative: no document), or None.
            past: cached tokens of each row, padding included; 0 if the call begins sequences.
            before: [B] those of them that are no padding; None for all. Asked where the call branches.
            source, branches: what became of the cached sequences, see `calls.Place`.
            generation: of the `generate` that makes the call.

        Raises:
            ValueError: `doc_ids` of another shape.
        """
        B, S = shape
        valid = np.ones(shape, bool) if valid is None else valid.copy()
        known, rows = 0, None
        if generation is not None and not past and token is not None:
            if (found := generation.match(token)) is not None:
                known, stream, rows = found
                valid[:, :known] = False
            generation.fed.append((token, stream))
        continues, decodes = bool(past or known), bool(past or known) and S - known == 1
        if source is not None and stream.docs is not None:
            self._follow_rows(stream, source)
        if not continues or not decodes or stream.finished is None or len(stream.finished) != B:
            stream.finished = np.zeros(B, bool)  # a new turn of a chat wakes the rows that had ended
        elif B > 1 and token is not None and self._eos.size:
            # `generate` feeds finished rows until the last is done: alone they would have ended.
            stream.finished |= np.isin(token[:, -1], self._eos)
            valid &= ~stream.finished[:, None]
        row = np.repeat(np.arange(B), S).reshape(shape)
        more: dict[str, Any] = {"known": known, "source": rows, "decodes": decodes, "stream": stream}
        if doc_ids is not None:
            return self._by_caller(doc_ids, valid, row, more)
        segment = None if continues or position is None else _segments(position, valid)
        if segment is not None:
            doc = self._number(segment + np.arange(B)[:, None] * S)
            return self._noted(Tokens(doc, _rank(doc, valid), valid, row, **more))
        if not continues or branches or stream.docs is None or stream.lengths is None or len(stream.docs) != B:
            stream.docs = self._take(B)
            stream.lengths = np.full(B, past) if before is None else before.astype(np.int64)
        doc = np.broadcast_to(stream.docs[:, None], shape)
        pos = stream.lengths[:, None] + np.cumsum(valid, 1) - 1
        stream.lengths = stream.lengths + valid.sum(1)
        return self._noted(Tokens(doc, pos.astype(np.int32), valid, row, **more))

    def _take(self, documents: int) -> NDArray[np.int64]:
        self.next += documents
        return np.arange(self.next - documents, self.next)

    def _follow_rows(self, stream: Stream, source: list[int]) -> None:
        """Rows were reordered, selected or repeated: those of which there are several now begin documents."""
        assert stream.docs is not None
        assert stream.lengths is not None
        docs, lengths = stream.docs[source], stream.lengths[source]
        several = np.array([source.count(row) > 1 for row in source], bool)
        docs[several] = self._take(int(several.sum()))
        if stream.finished is not None:
            stream.finished = stream.finished[source]
        stream.docs, stream.lengths = docs, lengths

    def _noted(self, tokens: Tokens) -> Tokens:
        if self._lengths is not None:
            numbers, counts = np.unique(tokens.doc[tokens.valid], return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                self._lengths[number] = self._lengths.get(number, 0) + count
        return tokens

    def _by_caller(
        self, doc_ids: NDArray[np.int64], valid: NDArray[np.bool_], row: NDArray[np.int64], more: dict[str, Any]
    ) -> Tokens:
        B, S = valid.shape
        if doc_ids.shape not in ((B,), (B, S)):
            raise ValueError(
                f"doc_ids: expected one per row [{B}] or one per token [{B}, {S}] of the call, got shape"
                f" {list(doc_ids.shape)}; call label() again when the batch changes."
            )
        if self._lengths is None:
            self._lengths = dict(self._held())
        doc = np.broadcast_to(doc_ids[:, None] if doc_ids.ndim == 1 else doc_ids, valid.shape)
        valid = valid & (doc >= 0)
        pos = _rank(doc, valid)
        for number in np.unique(doc[valid]).tolist():
            pos[valid & (doc == number)] += self._lengths.get(number, 0)
        if valid.any():
            self.next = max(self.next, int(doc[valid].max()) + 1)
        return self._noted(Tokens(doc, pos, valid, row, **more))

    def _number(self, key: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keys as consecutive new document numbers, in rising order."""
        keys, inverse = np.unique(key, return_inverse=True)
        doc = self.next + inverse.reshape(key.shape)
        self.next += len(keys)
        return doc


def parse_doc_ids(doc_ids: Any) -> NDArray[np.int64] | None:
    """The caller's numbers as an array; ValueError unless they are integers [B] or [B, S]."""
    if doc_ids is None:
        return None
    numbers = np.asarray(doc_ids.cpu() if hasattr(doc_ids, "cpu") else doc_ids)
    if not np.issubdtype(numbers.dtype, np.integer) or numbers.ndim not in (1, 2):
        raise ValueError(
            f"doc_ids: expected integers [B] or [B, S], got {numbers.dtype} of shape {list(numbers.shape)}."
        )
    return numbers.astype(np.int64)


def _segments(position: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """Numbers [B, S] of the packed sequences in each row, or None if no row packs any: positions begin anew at 0."""
    if position.ndim != 2:  # more axes are those of images
        return None
    first = valid & (np.cumsum(valid, 1) == 1)
    again = valid & ~first & (np.broadcast_to(position, valid.shape) == 0)
    if not again.any():
        return None
    return np.maximum(np.cumsum(first | again, 1) - 1, 0)  # the first piece of a row may go on with an earlier one


def _rank(doc: NDArray[np.int64], valid: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How many valid tokens of its document stand before each one, in reading order."""
    flat, keep = np.ascontiguousarray(doc).ravel(), valid.ravel()
    order = np.argsort(flat[keep], kind="stable")
    ordered = flat[keep][order]
    rank = np.zeros(len(ordered), np.int32)
    rank[order] = np.arange(len(ordered)) - np.searchsorted(ordered, ordered, side="left")
    out = np.zeros(flat.shape, np.int32)
    out[keep] = rank
    return out.reshape(doc.shape)
