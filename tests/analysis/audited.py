"""Runs made up for the report: groups that prefer experts of their own, in the form `open_trace` gives, in memory."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from omnigene_fast.tracing.counting import count_picks
from omnigene_fast.tracing.records import Records, id_dtype

# Groups of one kin share a part of their taste.
KIN = {
    "protein": "protein",
    "dna_coding": "dna",
    "dna_genomic": "dna",
    "struct_3di": "structure",
    "struct_dssp": "structure",
    "homology_standard": "protein",
    "homology_remote": "protein",
    "text_biology": "text",
    "text_general": "text",
    "molecule": "molecule",
    "cell": "cell",
    "code": "text",
}
LETTERS = {"protein": "ACDEFGHIKLMNPQRSTVWY", "dna": "ACGT", "structure": "HGEBTSC", "text": "the cell is read by "}


class AuditedRun:
    """What the report needs of a run."""

    dropped = 0

    def __init__(self, name, meta, documents, records, num_experts, top_k):
        self.name, self.meta, self.documents, self.records = name, meta, documents, records
        self.layers, self.num_experts, self.top_k = meta["layers"], num_experts, top_k
        self.record = ("ids",)
        self.path = Path("runs") / name
        self.counts = count_picks(records.ids, records.doc, len(documents), num_experts)

    def batches(self, layers=None, kinds=("ids",), where=None):
        places = [self.layers.index(layer) for layer in (self.layers if layers is None else layers)]
        r = self._where(where)
        yield Records(r.doc, r.pos, r.token, r.phase, r.ids[places])

    def iter_documents(self, layers=None, kinds=("ids",), where=None):
        for records in self.batches(layers, kinds, where):
            for row in self.documents.to_dict("records"):
                mine = records.doc == row["doc_id"]
                if mine.any():
                    yield row, records.take(mine)

    def _where(self, where):
        if where is None:
            return self.records
        chosen = re.fullmatch(r"doc_id IN \(([0-9, ]+)\)", where).group(1)
        return self.records.take(np.isin(self.records.doc, [int(one) for one in chosen.split(",")]))


def audited(
    name="base",
    groups=("protein", "dna_coding", "text_general"),
    documents=12,
    tokens=40,
    layers=4,
    experts=16,
    top_k=2,
    strength=1.0,
    seed=0,
    label="task",
):
    """A run whose groups differ by `strength`; its documents are the same for every name and strength."""
    text, taste, noise = (np.random.default_rng([seed, number]) for number in range(3))
    rows, slot, token, group_of = [], [], [], []
    own = taste.normal(size=(len(groups), layers, experts))
    kin = {family: taste.normal(size=(layers, experts)) for family in dict.fromkeys(KIN.get(g, g) for g in groups)}
    mine = 0.7 * own + np.stack([kin[KIN.get(group, group)] for group in groups])
    for number, group in enumerate(groups):
        letters = LETTERS.get(KIN.get(group, ""), "0123456789abcdef")
        for _ in range(documents):
            length = int(text.integers(tokens * 3 // 4, tokens * 5 // 4 + 1))
            rows.append({"doc_id": len(rows), "n_tokens": length, "text_hash": f"{len(rows):08x}", label: group})
            slot += [len(rows) - 1] * length
            token += [3 + ord(letters[place]) for place in text.integers(0, len(letters), length)]
            group_of += [number] * length
    slot, token, group_of = np.array(slot), np.array(token, np.int32), np.array(group_of)
    everyone = 0.7 * taste.normal(size=(layers, experts))
    by_token = 0.8 * taste.normal(size=(layers, 259, experts))
    by_document = 0.4 * taste.normal(size=(len(rows), layers, experts))
    depth = np.sin(np.linspace(0.4, 2.6, layers))  # the middle layers differ the most
    ids = np.empty((layers, len(slot), top_k), id_dtype(experts))
    for layer in range(layers):
        logits = everyone[layer] + strength * depth[layer] * mine[group_of, layer]
        logits += by_document[slot, layer] + by_token[layer, token] + noise.gumbel(size=logits.shape)
        ids[layer] = np.argsort(-logits, axis=1)[:, :top_k]
    starts = np.r_[0, np.flatnonzero(np.diff(slot)) + 1]
    pos = (np.arange(len(slot)) - np.repeat(starts, np.diff(np.r_[starts, len(slot)]))).astype(np.int32)
    records = Records(slot.astype(np.int64), pos, token, np.zeros(len(slot), np.uint8), ids)
    meta = {
        "layers": [*range(layers)],
        "num_experts": experts,
        "top_k": top_k,
        "model": f"a model, {name}",
        "dtype": "bfloat16",
        "tokenizer": "bytes",
        "versions": {"omnigene_fast": "0.1.0", "torch": "2.13.0"},
    }
    return AuditedRun(name, meta, pd.DataFrame(rows), records, experts, top_k)
