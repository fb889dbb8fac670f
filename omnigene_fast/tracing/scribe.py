"""What happens to a call's records in the background thread: who the tokens are, then into the store."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .buffers import Host, Taken
from .calls import Place
from .identity import Generation, Numbering, Tokens
from .records import PHASES, Records, count_unrouted, text_hash, unused

COMMIT_SECONDS = 60.0  # after which even a small segment is made durable

Labels = Mapping[str, str | Sequence[str | None]]


@dataclass
class Handover:
    """One call on its way to the store; B rows of S tokens."""

    shape: tuple[int, int]
    training: bool
    tokens: Host  # valid, token, position, keep: each [B, S] or None; valid cached tokens [B] or None
    past: int  # cached tokens before these
    place: Place
    generation: Generation | None
    doc_ids: NDArray[np.int64] | None
    labels: Labels
    taken: Taken | None  # None: dropped
    fed: int  # columns that stay in the sequences; the others were candidates that `generate` took back

    def row_labels(self, row: int) -> dict[str, str]:
        """The labels of a row's documents; ValueError if there is not one per row."""
        found = {}
        for name, value in self.labels.items():
            if not isinstance(value, str) and len(value) != self.shape[0]:
                raise ValueError(
                    f"labels: expected one {name!r} per row of the call, {self.shape[0]}, got {len(value)};"
                    " call label() again when the batch changes."
                )
            text = value if isinstance(value, str) else value[row]
            if text is not None:
                found[name] = text
        return found


class Scribe:
    """Numbers the tokens of one call after the other and hands their records to a store.

    Args:
        store: a `store.Writer`, or what stands in for one.
        layers: decoder indices, for errors.
        num_experts: E.
        eos: ids that end a generated sequence.
    """

    def __init__(self, store: Any, layers: Sequence[int], num_experts: int, eos: tuple[int, ...]) -> None:
        self._store, self._layers, self._experts = store, layers, num_experts
        self._numbering = Numbering(store.next_doc, eos, store.documents)
        self._committed = time.monotonic()
        self.tokens = self.dropped = 0
        self.unrouted = np.zeros(len(layers), np.int64)  # tokens to which a layer's router gave NaN

    def write(self, handover: Handover) -> None:
        """Take in one call; its tensors may still be on their way."""
        valid, token, position, keep, before = handover.tokens.arrays()
        if handover.fed < handover.shape[1]:
            valid = np.ones(handover.shape, bool) if valid is None else valid.copy()
            valid[:, handover.fed :] = False
            keep = None if keep is None else keep & valid
        tokens = self._numbering.assign(
            handover.place.stream,
            handover.shape,
            valid if keep is None or valid is None else valid | keep,
            token,
            position,
            handover.doc_ids,
            past=handover.past,
            before=before,
            source=handover.place.source,
            branches=handover.place.branches,
            generation=handover.generation,
        )
        rows = tokens.valid if keep is None else tokens.valid & keep
        flat = np.flatnonzero(rows)
        if handover.taken is None:
            self.dropped += len(flat)
            self._store.drop(len(flat))
            return
        if not len(flat):
            return
        phase = "train" if handover.training else "decode" if tokens.decodes else "prefill"
        ids, weights, stats = handover.taken.arrays()
        self._check_written(ids)
        doc, row = tokens.doc.ravel()[flat], tokens.row.ravel()[flat]
        records = Records(
            doc,
            tokens.pos.ravel()[flat],
            np.full(len(flat), -1, np.int32) if token is None else token.ravel()[flat].astype(np.int32),
            np.full(len(flat), PHASES.index(phase), np.uint8),
            _of(ids, flat),
            None if weights is None else _of(weights, flat),
            None if stats is None else _of(stats, flat),
        )
        numbers, first = np.unique(doc, return_index=True)
        labels = {
            number: handover.row_labels(int(row[at]))
            for number, at in zip(numbers.tolist(), first.tolist(), strict=True)
        }
        self._store.add(records, labels, {} if token is None else _hashes(tokens, token, labels))
        self.tokens += len(flat)
        self.unrouted += count_unrouted(records.ids, self._experts)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._store.commit()
            self._committed = time.monotonic()

    def _check_written(self, ids: NDArray[Any]) -> None:
        silent = (ids == unused(self._experts)).any((1, 2))
        if silent.any():
            raise RuntimeError(
                f"trace: the router of layer {self._layers[int(silent.argmax())]} did not write all its tokens; do not"
                " accelerate, restore or compile the model while a trace is open, and accelerate a model before it is"
                " compiled."
            )


def _hashes(tokens: Tokens, token: NDArray[Any], wanted: Collection[int]) -> dict[int, str]:
    """Of the documents that begin in this call, recorded or not: the hash of the tokens that it brings."""
    doc, pos, ids = (each[tokens.valid] for each in (tokens.doc, tokens.pos, token))
    return {number: text_hash(ids[doc == number]) for number in doc[pos == 0].tolist() if number in wanted}


def _of(array: NDArray[Any], rows: NDArray[np.intp]) -> NDArray[Any]:
    """`array` [L, T, ...] at some of its T rows; itself for all."""
    return array if len(rows) == array.shape[1] else array[:, rows]
