"""Two runs over the same tokens: how many of the picks they share."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..tracing.counting import count_picks
from ..tracing.records import id_dtype
from .groups import RunLike
from .resampling import ratio
from .tokens import BATCH, chosen_layers, layer_groups, no_tokens, shared

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
    for layer, sums, _, tokens in _compared(run_a, run_b, layers):
        estimate = ratio(sums, tokens)
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
                    "tokens": int(tokens.sum()),
                    "docs": len(tokens),
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
    for layer, sums, picks, tokens in _compared(run, final, layers):
        estimate, n, K = ratio(sums, tokens), tokens.sum(), run.top_k
        loads, tops = picks[0] / n, picks[1] / n
        frames.append(
            pd.DataFrame(
                {
                    "layer": [layer],
                    "saturation": estimate.value[3],
                    "low": estimate.low[3],
                    "high": estimate.high[3],
                    "expected": float(loads[0] @ loads[1]) / K,
                    "uniform": K / run.num_experts,
                    "top1": estimate.value[4],
                    "top1_low": estimate.low[4],
                    "top1_high": estimate.high[4],
                    "top1_expected": float(tops[0] @ tops[1]),
                    "tokens": int(n),
                    "docs": len(tokens),
                    "unit": "share of experts",
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _compared(
    run_a: RunLike, run_b: RunLike, layers: Sequence[int] | None
) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]]:
    """Per layer: sums over the tokens of each document [D, 5]; picks [2, 2, E] of all experts and of first ones, by
    both runs; tokens [D]. The sums are those of `_measured`; documents without tokens are left out."""
    kept = chosen_layers(run_a, layers)
    chosen_layers(run_b, kept)
    if (run_a.num_experts, run_a.top_k) != (run_b.num_experts, run_b.top_k):
        raise ValueError(
            f"run_b: expected the {run_a.num_experts} experts and top-{run_a.top_k} of {run_a.name!r}, got"
            f" {run_b.num_experts} and top-{run_b.top_k}."
        )
    doc, places = _matched(run_a, run_b)
    tokens = np.bincount(doc)
    held = doc.nbytes + sum(place.nbytes for place in places)
    K, E, n = run_a.top_k, run_a.num_experts, len(doc)
    for some in layer_groups(kept, 2 * n * K * np.dtype(id_dtype(E)).itemsize, held):
        ids = [_in_order(run, some, place) for run, place in zip((run_a, run_b), places, strict=True)]
        for at, layer in enumerate(some):
            sums, picks = np.zeros((len(tokens), 5)), np.zeros((2, 2, E), np.int64)
            for start in range(0, n, BATCH):
                here = doc[start : start + BATCH]
                a, b = (one[at, start : start + BATCH] for one in ids)
                values, zero = _measured(a, b), np.zeros(len(here), np.int64)
                for column, one in enumerate(values):
                    sums[here[0] : here[-1] + 1, column] += np.bincount(here - here[0], weights=one)
                for run, one in enumerate((a, b)):
                    picks[0, run] += count_picks(one[None], zero, 1, E)[0, 0]
                    picks[1, run] += count_picks(one[None, :, :1], zero, 1, E)[0, 0]
            yield layer, sums, picks, tokens


def _measured(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Per token [n], ids [n, K]: other experts, the same in another order, Jaccard, shared / K, the same first one."""
    K, common = a.shape[1], shared(a, b)
    moved = (common == K) & (a != b).any(1)
    return common < K, moved, common / (2 * K - common), common / K, a[:, 0] == b[:, 0]


def _matched(run_a: RunLike, run_b: RunLike) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """[n] document of each token in order of document and position, counted from 0; the place there of each token as
    both runs store them."""
    found, places = [], []
    for run in (run_a, run_b):
        columns: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for part in run.batches(layers=[], kinds=()):
            for column, values in zip(columns, (part.doc, part.pos, part.token), strict=True):
                column.append(values)
        if not columns[0]:
            raise no_tokens(run)
        doc, pos, token = (np.concatenate(column) for column in columns)
        del columns
        order = np.lexsort((pos, doc))
        place = np.empty(len(order), np.int32 if len(order) < 1 << 31 else np.int64)
        place[order] = np.arange(len(order), dtype=place.dtype)
        found.append((doc[order], pos[order], token[order]))
        places.append(place)
    (doc, pos, token), other = found
    if not (np.array_equal(doc, other[0]) and np.array_equal(pos, other[1])):
        raise ValueError(
            f"run_b: expected the tokens of {run_a.name!r} (by doc_id and position), got others in {run_b.name!r};"
            " trace the same documents with the same doc_ids."
        )
    if ((token != other[2]) & (token >= 0) & (other[2] >= 0)).any():
        raise ValueError(f"run_b: expected the token ids of {run_a.name!r} at each position, got others.")
    return np.cumsum(np.diff(doc, prepend=doc[0]) > 0, dtype=place.dtype), places


def _in_order(run: RunLike, layers: Sequence[int], place: NDArray[Any]) -> NDArray[Any]:
    """Ids [L, n, K], each token at its place."""
    out = np.empty((len(layers), len(place), run.top_k), id_dtype(run.num_experts))
    start = 0
    for part in run.batches(layers=list(layers), kinds=("ids",)):
        out[:, place[start : start + len(part)]] = part.ids
        start += len(part)
    return out
