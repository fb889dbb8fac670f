"""Runs in memory, with a known truth."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from omnigene_fast.tracing.records import Records, id_dtype


@dataclass
class Memory:
    """What the measures need of a run."""

    counts: np.ndarray  # [D, L, E]
    documents: pd.DataFrame
    top_k: int
    records: Records | None = None
    name: str = "memory"
    layers: list | None = None
    shard: int = 10**9  # tokens per batch

    def __post_init__(self):
        self.num_experts = self.counts.shape[-1]
        self.record = () if self.records is None else ("ids",)
        if self.layers is None:
            self.layers = list(range(self.counts.shape[1]))

    def batches(self, layers=None, kinds=("ids",)):
        for part in self.unsorted(layers, kinds):
            yield part.take(np.lexsort((part.pos, part.doc)))

    def unsorted(self, layers=None, kinds=("ids",)):
        for start in range(0, len(self.records), self.shard):
            yield self.chosen(slice(start, start + self.shard), layers)

    def iter_documents(self, layers=None, kinds=("ids",)):
        for doc in dict.fromkeys(self.records.doc.tolist()):  # in the order in which the run began them
            part = self.chosen(self.records.doc == doc, layers)
            row = self.documents[self.documents["doc_id"] == doc].iloc[0].to_dict()
            yield row, part.take(np.argsort(part.pos, kind="stable"))

    def chosen(self, tokens, layers):
        part = self.records.take(tokens)
        part.ids = part.ids[[self.layers.index(layer) for layer in (self.layers if layers is None else layers)]]
        return part


def doc_ids(count):
    """Ids of documents, ascending as in `Run.documents`, none of which is a row, with gaps of different sizes."""
    rows = np.arange(count)
    return 1000 + 7 * rows + rows % 3


def documents(labels, tokens, **more):
    """A table of documents with one label, `task`."""
    table = pd.DataFrame({"doc_id": doc_ids(len(labels)), "n_tokens": tokens, "text_hash": None})
    return table.assign(task=pd.Series(labels, dtype=object), **more)


def dispersed(rng, shares, docs, tokens, top_k, concentration):
    """Documents whose expert shares are Dirichlet around [G, L, E] `shares`: picks over-dispersed by
    1 + (tokens * top_k - 1) / (1 + concentration). The expected share of a group is `shares` itself."""
    G, L, _ = shares.shape
    alpha = np.repeat(shares, docs, axis=0) * concentration
    draws = rng.standard_gamma(np.maximum(alpha, 1e-12))
    own = draws / draws.sum(-1, keepdims=True)
    sizes = rng.integers(tokens // 2, tokens * 3 // 2 + 1, G * docs)
    counts = rng.multinomial(np.broadcast_to(sizes[:, None] * top_k, (G * docs, L)), own)
    names = np.repeat([f"task{g:02d}" for g in range(G)], docs)
    return Memory(counts.astype(np.int32), documents(names, sizes), top_k)


def skewed(rng, *shape, sharpness=1.0):
    """Distributions over experts as routers have them: log-normal shares."""
    weights = np.exp(sharpness * rng.standard_normal(shape))
    return weights / weights.sum(-1, keepdims=True)


def routed(rng, docs=6, tokens=40, layers=3, experts=12, top_k=3, vocabulary=9, tasks=2, skew=1.0, **more):
    """A run of tokens whose experts depend on the token id, the layer and chance; its last document came first."""
    taste = skew * rng.standard_normal((vocabulary, layers, experts))
    sizes = rng.integers(tokens // 2, tokens * 3 // 2 + 1, docs)
    n = int(sizes.sum())
    rows = np.roll(np.arange(docs), 1)
    sizes = sizes[rows]
    doc, token = np.repeat(doc_ids(docs)[rows], sizes), rng.integers(0, vocabulary, n)
    scores = taste[token].transpose(1, 0, 2) + rng.gumbel(size=(layers, n, experts))
    ids = np.argsort(-scores, -1)[..., :top_k].astype(id_dtype(experts))
    pos = np.concatenate([np.arange(size) for size in sizes]).astype(np.int32)
    records = Records(doc.astype(np.int64), pos, token.astype(np.int32), np.zeros(n, np.uint8), ids)
    return from_records(records, [f"task{d % tasks}" for d in range(docs)], experts, **more)


def from_records(records, labels, experts, **more):
    """A run of given records; the document in row d is `labels[d]`."""
    L, _, K = records.ids.shape
    counts = np.zeros((len(labels), L, experts), np.int32)
    row_of = {doc: row for row, doc in enumerate(doc_ids(len(labels)).tolist())}
    rows = np.array([row_of[doc] for doc in records.doc.tolist()])
    for layer in range(L):
        np.add.at(counts, (rows[:, None], layer, records.ids[layer]), 1)
    table = documents(labels, np.bincount(rows, minlength=len(labels)))
    return Memory(counts, table, K, records, **more)
