"""Two runs over the same tokens: how many of the picks they share."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .groups import RunLike
from .resampling import ratio
from .tokens import chosen_layers, gathered, id_bytes, layer_groups, no_tokens

if TYPE_CHECKING:
    import pandas


def replay_distance(run_a: RunLike, run_b: RunLike, *, layers: Sequence[int] | None = None) -> "pandas.DataFrame":
    """How far a replayed or repeated run is from another, token by token, matched by document and position.

    Args:
        run_a, run_b: runs over the same documents, with ids.
        layers: decoder indices; all of `run_a` if None.

    Returns:
        a row per layer: layer, differing (share of tokens with any other expert), differing_low, differing_high,
        reordered (share with the same experts in another order), jaccard (mean of |A and B| / |A or B|), jaccard_low,
        jaccard_high (jackknife over documents, 95 %), tokens, docs, unit.

    Raises:
        ValueError: the runs differ in layers, experts, top-k, tokens or token ids.
    """
    import pandas as pd

    frames = []
    for layer, a, b, doc, D in _matched(run_a, run_b, layers):
        common = (a[:, :, None] == b[:, None, :]).sum((1, 2))
        K = a.shape[1]
        differs, moved = common < K, (common == K) & (a != b).any(1)
        sums = np.stack([_by_document(doc, values, D) for values in (differs, moved, common / (2 * K - common))], 1)
        tokens = np.bincount(doc, minlength=D)
        some = tokens > 0
        estimate = ratio(sums[some], tokens[some])
        frames.append(
            pd.DataFrame(
                {
                    "layer": [layer],
                    "differing": estimate.value[0],
                    "differing_low": estimate.low[0],
                    "differing_high": estimate.high[0],
                    "reordered": estimate.value[1],
                    "jaccard": estimate.value[2],
                    "jaccard_low": estimate.low[2],
                    "jaccard_high": estimate.high[2],
                    "tokens": len(doc),
                    "docs": int(some.sum()),
                    "unit": "share of tokens",
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def saturation(run: RunLike, final: RunLike, *, layers: Sequence[int] | None = None) -> "pandas.DataFrame":
    """Router saturation (OLMoE, arXiv 2409.02060, section 5.1): the share of a token's experts that the final
    checkpoint picks for it too.

    Args:
        run: an earlier checkpoint over the same documents.
        final: the last checkpoint.
        layers: decoder indices; all of `run` if None.

    Returns:
        a row per layer: layer, saturation (mean of |A and B| / K), low, high (jackknife over documents, 95 %), expected
        (if the two picked independently, each with its own load), uniform (K / E), top1 (share of tokens with the same
        first expert), top1_low, top1_high, top1_expected, tokens, docs, unit.

    Raises:
        ValueError: as `replay_distance`.
    """
    import pandas as pd

    frames = []
    for layer, a, b, doc, D in _matched(run, final, layers):
        K, E, n = a.shape[1], run.num_experts, len(doc)
        common = (a[:, :, None] == b[:, None, :]).sum((1, 2)) / K
        sums = np.stack([_by_document(doc, values, D) for values in (common, a[:, 0] == b[:, 0])], 1)
        tokens = np.bincount(doc, minlength=D)
        some = tokens > 0
        estimate = ratio(sums[some], tokens[some])
        loads = [np.bincount(ids.ravel(), minlength=E) / n for ids in (a, b)]
        tops = [np.bincount(ids[:, 0], minlength=E) / n for ids in (a, b)]
        frames.append(
            pd.DataFrame(
                {
                    "layer": [layer],
                    "saturation": estimate.value[0],
                    "low": estimate.low[0],
                    "high": estimate.high[0],
                    "expected": float(loads[0] @ loads[1]) / K,
                    "uniform": K / E,
                    "top1": estimate.value[1],
                    "top1_low": estimate.low[1],
                    "top1_high": estimate.high[1],
                    "top1_expected": float(tops[0] @ tops[1]),
                    "tokens": n,
                    "docs": int(some.sum()),
                    "unit": "share of experts",
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _matched(
    run_a: RunLike, run_b: RunLike, layers: Sequence[int] | None
) -> Iterator[tuple[int, NDArray[Any], NDArray[Any], NDArray[np.int64], int]]:
    """Per layer: ids [n, K] of both, [n] row of the document in `run_a`, and the number of documents."""
    kept = chosen_layers(run_a, layers)
    chosen_layers(run_b, kept)
    if (run_a.num_experts, run_a.top_k) != (run_b.num_experts, run_b.top_k):
        raise ValueError(
            f"run_b: expected the {run_a.num_experts} experts and top-{run_a.top_k} of {run_a.name!r}, got"
            f" {run_b.num_experts} and top-{run_b.top_k}."
        )
    names = [np.asarray(run.documents["doc_id"], np.int64) for run in (run_a, run_b)]
    for some in layer_groups(kept, id_bytes(run_a) + id_bytes(run_b)):
        a, b = gathered(run_a, some), gathered(run_b, some)
        if not len(a):
            raise no_tokens(run_a)
        same = len(a) == len(b) and np.array_equal(names[0][a.doc], names[1][b.doc]) and np.array_equal(a.pos, b.pos)
        if not same:
            raise ValueError(
                f"run_b: expected the tokens of {run_a.name!r} (by doc_id and position), got others in {run_b.name!r};"
                " trace the same documents with the same doc_ids."
            )
        known = (a.token >= 0) & (b.token >= 0)
        if (a.token != b.token)[known].any():
            raise ValueError(f"run_b: expected the token ids of {run_a.name!r} at each position, got others.")
        for at, layer in enumerate(some):
            yield layer, a.ids[at], b.ids[at], a.doc, len(names[0])


def _by_document(doc: NDArray[np.int64], values: NDArray[Any], documents: int) -> NDArray[np.float64]:
    return np.bincount(doc, weights=values, minlength=documents).astype(np.float64)
