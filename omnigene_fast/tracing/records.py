"""What one forward call leaves behind: the records that go from the capture to the store, and out of it again."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PHASES = ("prefill", "decode", "train")  # what `Records.phase` numbers
KINDS = ("ids", "weights", "stats")  # what `record=` may name, beside the counts, which are always kept
STATISTICS = ("entropy", "mass", "margin")  # of the full softmax: nats; sum of the chosen; p_K - p_(K+1)


def check_record(record: Sequence[str]) -> tuple[str, ...]:
    """The kinds to record in the order of KINDS; ValueError if one is none of them."""
    record = (record,) if isinstance(record, str) else tuple(record)
    if set(record) - set(KINDS):
        raise ValueError(f"record: expected some of {', '.join(KINDS)}, got {', '.join(map(repr, record))}.")
    return tuple(kind for kind in KINDS if kind in record)


def id_dtype(num_experts: int) -> type[np.unsignedinteger[Any]]:
    """uint8 for up to 254 experts, uint16 beyond: the two largest values are never experts."""
    return np.uint8 if num_experts <= 254 else np.uint16


def unused(num_experts: int) -> int:
    """What a slot holds that no expert was written to; never 0, which is an expert."""
    return int(np.iinfo(id_dtype(num_experts)).max)


def unrouted(num_experts: int) -> int:
    """What all slots of a token hold whose router gave NaN: 254 or 65534; the experts that ran, nobody chose."""
    return int(np.iinfo(id_dtype(num_experts)).max) - 1


def count_unrouted(ids: NDArray[Any], num_experts: int) -> NDArray[np.int64]:
    """[L] how many of the tokens of ids [L, n, K] no router chose experts for."""
    return np.count_nonzero(ids[:, :, 0] == unrouted(num_experts), axis=1).astype(np.int64)


def unrouted_fault(layers: Sequence[int], counts: Sequence[int]) -> str | None:
    """A sentence about `counts` [L] tokens, by decoder index, that no router chose experts for; None if there are none.

    It names the first layer first: what comes after it is NaN because that one is.
    """
    found = [(layer, count) for layer, count in zip(layers, counts, strict=True) if count > 0]
    if not found:
        return None
    listed = ", ".join(f"{layer} ({count:,} tokens)" for layer, count in found)
    return (
        f"the routers gave NaN in layers {listed}, and these tokens count for no expert there; look at the weights of"
        f" layer {found[0][0]}, and at what it is given."
    )


def text_hash(token: NDArray[np.int32]) -> str:
    """16 hexadecimal digits that stand for token ids: those of a document's first call, its text or its prompt, by
    which the runs of two checkpoints are paired."""
    return hashlib.blake2b(np.ascontiguousarray(token, np.int32).tobytes(), digest_size=8).hexdigest()


@dataclass
class Records:
    """The routing of n tokens in L layers. Masked tokens are not among them.

    A token is identified by its document and its position in it, counted from 0 with padding left out.
    """

    doc: NDArray[np.int64]  # [n]
    pos: NDArray[np.int32]  # [n]
    token: NDArray[np.int32]  # [n] token id, -1 where the model was called with embeddings
    phase: NDArray[np.uint8]  # [n] position in PHASES
    ids: NDArray[Any]  # [L, n, K] uint8 or uint16 (`id_dtype`), in the router's order; see `unrouted`
    weights: NDArray[np.float16] | None = None  # [L, n, K]
    stats: NDArray[np.float16] | None = None  # [L, n, 3] as STATISTICS

    def __len__(self) -> int:
        return len(self.doc)

    @property
    def nbytes(self) -> int:
        """Memory held by the arrays, in bytes."""
        every = (self.doc, self.pos, self.token, self.phase, self.ids, self.weights, self.stats)
        return sum(array.nbytes for array in every if array is not None)

    def take(self, rows: Any) -> "Records":
        """The records of `rows`, an index or mask over tokens."""
        return Records(
            self.doc[rows],
            self.pos[rows],
            self.token[rows],
            self.phase[rows],
            self.ids[:, rows],
            None if self.weights is None else self.weights[:, rows],
            None if self.stats is None else self.stats[:, rows],
        )
