"""Worlds of documents with a known truth: token types, their experts, and documents that prefer some of the types."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ...tracing.records import Records

Lengths = Callable[[np.random.Generator, int], NDArray[np.int64]]


@dataclass
class Simulated:
    """A run in memory; see `omnigene_fast.analysis.groups.RunLike`."""

    counts: NDArray[Any]  # [D, L, E]
    documents: pd.DataFrame
    top_k: int
    records: Records | None = None
    name: str = "simulated"

    def __post_init__(self) -> None:
        self.layers = list(range(self.counts.shape[1]))
        self.num_experts = self.counts.shape[2]
        self.record = () if self.records is None else ("ids",)
        self.meta: dict[str, Any] = {}

    def batches(self, layers: Sequence[int] | None = None, kinds: Sequence[str] = ("ids",)) -> Iterator[Records]:
        """All tokens at once."""
        assert self.records is not None
        part = self.records.take(slice(None))
        part.ids = part.ids[self.layers if layers is None else list(layers)]
        yield part

    def iter_documents(
        self, layers: Sequence[int] | None = None, kinds: Sequence[str] = ("ids",)
    ) -> Iterator[tuple[dict[str, Any], Records]]:
        """Documents in the order of their records, which lie together."""
        (whole,) = self.batches(layers, kinds)
        starts = np.flatnonzero(np.diff(whole.doc, prepend=-1))
        for start, stop in zip(starts, np.append(starts[1:], len(whole)), strict=True):
            part = whole.take(slice(start, stop))
            yield {"doc_id": int(part.doc[0]), "n_tokens": len(part), "text_hash": None}, part


class World:
    """Token types with K fixed experts in each layer; a task is a distribution over types, a document a draw around it.

    Picks are without replacement, as those of a router, and layers are correlated through the types. In an `even` world
    all types are as frequent, and all experts as full.
    """

    def __init__(
        self, seed: int = 7, types: int = 400, layers: int = 4, experts: int = 128, top_k: int = 8, even: bool = False
    ) -> None:
        rng = np.random.default_rng(seed)
        self.layers, self.experts, self.top_k = layers, experts, top_k
        load = rng.standard_normal((layers, 1, experts))
        score = load + 1.5 * rng.gumbel(size=(layers, types, experts))
        self.sets = np.argsort(-score, -1)[..., :top_k]  # [L, V, K]
        if even:
            dealt = rng.permuted(np.tile(np.arange(experts), (layers, types * top_k // experts, 1)), axis=-1)
            self.sets = dealt.reshape(layers, types, top_k)
        self.incidence = np.zeros((types, layers * experts), np.float32)
        for layer in range(layers):
            self.incidence[np.arange(types)[:, None], layer * experts + self.sets[layer]] = 1
        frequency = np.exp(rng.standard_normal(types) * (not even))
        self.base = frequency / frequency.sum()

    def task(self, seed: int, distance: float) -> NDArray[np.float64]:
        """A distribution over types; tasks of distance 0 are all the same."""
        weight = self.base * np.exp(distance * np.random.default_rng([8, seed]).standard_normal(len(self.base)))
        return np.asarray(weight / weight.sum())

    def shares(self, task: NDArray[np.float64]) -> NDArray[np.float64]:
        """[L, E] the true shares of the picks of a task."""
        return (task @ self.incidence).reshape(self.layers, self.experts) / self.top_k

    def trained(self, seed: int, changed: float) -> "World":
        """A later checkpoint: a share of the token types has experts that were drawn anew."""
        other, rng = World(seed, len(self.base), self.layers, self.experts, self.top_k), np.random.default_rng(seed)
        kept = rng.random(len(self.base)) >= changed
        other.incidence[kept], other.base = self.incidence[kept], self.base
        other.sets[:, kept] = self.sets[:, kept]
        return other

    def texts(
        self,
        rng: np.random.Generator,
        tasks: Sequence[NDArray[np.float64]],
        docs: Sequence[int],
        concentration: float | Sequence[float],
        lengths: Lengths | Sequence[Lengths],
    ) -> tuple[NDArray[np.int64], pd.DataFrame]:
        """Documents of each task, labelled "t000", "t001", ...

        Args:
            concentration: of the Dirichlet distribution of a document's types around its task's: 20 is strong
                over-dispersion, 500 little. One for all tasks, or one each.
            lengths: draws the tokens of n documents; one for all tasks, or one each.

        Returns:
            [D, V] tokens of each type, and the table of documents.
        """
        tokens, labels = [], []
        for number, (task, n) in enumerate(zip(tasks, docs, strict=True)):
            drawn = (lengths if callable(lengths) else lengths[number])(rng, n)
            alpha = task * (concentration if isinstance(concentration, (int, float)) else concentration[number])
            own = rng.standard_gamma(np.maximum(np.broadcast_to(alpha, (n, len(alpha))), 1e-9))
            tokens.append(rng.multinomial(drawn, own / own.sum(1, keepdims=True)))
            labels += [f"t{number:03d}"] * n
        every = np.concatenate(tokens)
        table = pd.DataFrame({"doc_id": np.arange(len(labels)), "n_tokens": every.sum(1), "text_hash": None})
        return every, table.assign(task=pd.Series(labels, dtype=object))

    def routed(self, tokens: NDArray[np.int64], table: pd.DataFrame) -> Simulated:
        """The run of the documents of `texts`."""
        counts = (tokens.astype(np.float32) @ self.incidence).astype(np.int64)
        return Simulated(counts.reshape(-1, self.layers, self.experts), table, self.top_k)

    def written(self, texts: Sequence[NDArray[np.int64]], **labels: Sequence[str]) -> Simulated:
        """The run of documents that are token types in an order, with its records."""
        sizes = np.array([len(text) for text in texts])
        doc, token = np.repeat(np.arange(len(texts)), sizes), np.concatenate(texts)
        counts = np.stack([np.bincount(text, minlength=len(self.base)) for text in texts])
        table = pd.DataFrame({"doc_id": np.arange(len(texts)), "n_tokens": sizes, "text_hash": None, **labels})
        run = self.routed(counts, table)
        position = np.concatenate([np.arange(size) for size in sizes]).astype(np.int32)
        ids = self.sets[:, token].astype(np.uint8)
        records = Records(doc, position, token.astype(np.int32), np.zeros(len(token), np.uint8), ids)
        return Simulated(run.counts, run.documents, run.top_k, records)

    def run(self, rng: np.random.Generator, *texts: Any) -> Simulated:
        """The run of documents that are drawn as by `texts`, whose arguments these are."""
        return self.routed(*self.texts(rng, *texts))


def about(median: float, spread: float = 0.3) -> Lengths:
    """Log-normal lengths."""
    return lambda rng, n: np.maximum(1, np.exp(np.log(median) + spread * rng.standard_normal(n))).astype(np.int64)


def between(low: int = 20, high: int = 2000) -> Lengths:
    """Lengths that are even on a logarithmic scale."""
    return lambda rng, n: np.exp(rng.uniform(np.log(low), np.log(high), n)).astype(np.int64)
