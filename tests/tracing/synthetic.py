"""Records without a model, and what of a run may be compared."""

from dataclasses import fields
from pathlib import Path

import numpy as np

from omnigene_fast.tracing.records import KINDS, Records, id_dtype
from omnigene_fast.tracing.run import Run


def meta(layers=(0, 1, 2), num_experts=16, top_k=4, **more) -> dict:
    return {"layers": list(layers), "num_experts": num_experts, "top_k": top_k, "model": "synthetic", **more}


def records(doc, pos, layers=3, num_experts=16, top_k=4, seed=0) -> Records:
    """Records of the given tokens; those of a token depend on it and the seed alone, not on the others."""
    doc, pos = np.asarray(doc, np.int64), np.asarray(pos, np.int32)
    n = len(doc)
    ids = np.empty((layers, n, top_k), id_dtype(num_experts))
    weights = np.empty((layers, n, top_k), np.float16)
    stats = np.empty((layers, n, 3), np.float16)
    token = np.empty(n, np.int32)
    for row in range(n):
        rng = np.random.default_rng([seed, int(doc[row]), int(pos[row])])
        token[row] = rng.integers(0, 1000)
        scores = rng.random((layers, num_experts))
        scores[:, int(doc[row]) % num_experts] += 1  # documents differ
        ids[:, row] = np.argsort(-scores, axis=1)[:, :top_k]
        weights[:, row] = rng.random((layers, top_k))
        stats[:, row] = rng.random((layers, 3))
    return Records(doc, pos, token, (pos > 3).astype(np.uint8), ids, weights, stats)


def documents(lengths: dict[int, int], **shape) -> Records:
    """Whole documents, id -> tokens, one after the other."""
    doc = np.repeat(list(lengths), list(lengths.values()))
    pos = np.concatenate([np.arange(n) for n in lengths.values()]) if lengths else []
    return records(doc, pos, **shape)


def same(left: Records, right: Records, kinds=KINDS) -> bool:
    names = [field.name for field in fields(Records) if field.name not in KINDS or field.name in kinds]
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def everything(run: Run) -> dict:
    """All that a run says of its documents, whatever segments they lie in."""
    rows = {row["doc_id"]: (row, found) for row, found in run.iter_documents(kinds=run.record)}
    assert list(sorted(rows)) == run.documents["doc_id"][run.documents["n_tokens"] > 0].tolist()
    return rows


def assert_equal_runs(left: Run, right: Run) -> None:
    assert left.documents.equals(right.documents)
    assert np.array_equal(left.counts, right.counts)
    mine, other = everything(left), everything(right)
    assert mine.keys() == other.keys()
    for doc, (row, found) in mine.items():
        assert row == other[doc][0]
        assert same(found, other[doc][1], left.record), f"document {doc}"


def contents(path: Path) -> dict[str, bytes]:
    """Every file under a directory; empty lock files left out."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.suffix != ".lock"}
