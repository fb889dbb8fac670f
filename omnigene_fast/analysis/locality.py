"""Whether neighbouring tokens pick the same experts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..tracing.counting import count_picks
from .groups import RunLike, chunk_rows, label_column
from .resampling import ratio
from .tokens import BATCH, chosen_layers, layer_groups, shared, whole_documents

if TYPE_CHECKING:
    import pandas

MEASURES = ("first", "any", "overlap")
_EXACT = 1024  # tokens of a document up to which every pair of its tokens is compared


def locality(run: RunLike, by: str | None = None, *, layers: Sequence[int] | None = None) -> "pandas.DataFrame":
    """Repetition of experts by consecutive tokens (Mixtral, arXiv 2401.04088, section 5), against shuffled tokens.

    The expectation is that of the document's own tokens in random order, in closed form: f_e (f_e - 1) / (n (n - 1))
    summed over experts for "first" and "overlap", the share of all pairs of tokens with a common expert for "any" (in
    documents of more than 1,024 tokens: of 512 evenly spaced tokens with all others).

    Args:
        run: an opened trace with ids.
        by: label that makes the groups; None: one group "all".
        layers: decoder indices; all if None.

    Returns:
        a row per group, layer and measure: group, layer, measure ("first": same first expert; "any": at least one
        common expert; "overlap": common experts / K), value, low, high (jackknife over documents, 95 %), expected
        (shuffled), excess (value - expected), excess_low, excess_high, pairs (of consecutive tokens), docs, unit.

    Raises:
        ValueError: no such label or layer, or documents of which tokens are missing.
    """
    import pandas as pd

    kept = chosen_layers(run, layers)
    labels = label_column(run, by) if by is not None else ["all"] * len(run.documents)
    lengths = np.asarray(run.documents["n_tokens"], np.int64)
    pairs = np.maximum(lengths - 1, 0)
    frames = []
    for some in layer_groups(kept, 2 * max(BATCH, int(lengths.max(initial=1))) * run.top_k):
        seen, expected = (np.zeros((len(lengths), len(some), len(MEASURES))) for _ in range(2))
        for part in whole_documents(run, some):
            starts = np.flatnonzero(np.diff(part.doc, prepend=-1))
            here, sizes = part.doc[starts], np.diff(starts, append=len(part))
            for at, ids in enumerate(part.ids):
                seen[here, at] = _consecutive(ids, sizes)
                expected[here, at] = _shuffled(ids, sizes, run.num_experts) * pairs[here, None]
        for name in sorted({label for label in labels if label is not None}):
            rows = np.array([label == name for label in labels]) & (pairs > 0)
            if not rows.any():
                continue
            value = ratio(seen[rows], pairs[rows])
            excess = ratio(seen[rows] - expected[rows], pairs[rows], limits=(-1, 1))
            grid = np.indices((len(some), len(MEASURES))).reshape(2, -1)
            frames.append(
                pd.DataFrame(
                    {
                        "group": name,
                        "layer": np.array(some)[grid[0]],
                        "measure": np.array(MEASURES, object)[grid[1]],
                        "value": value.value.ravel(),
                        "low": value.low.ravel(),
                        "high": value.high.ravel(),
                        "expected": (value.value - excess.value).ravel(),
                        "excess": excess.value.ravel(),
                        "excess_low": excess.low.ravel(),
                        "excess_high": excess.high.ravel(),
                        "pairs": int(pairs[rows].sum()),
                        "docs": int(rows.sum()),
                        "unit": "share of consecutive tokens",
                    }
                )
            )
    if not frames:
        raise ValueError(f"run: expected a document of at least two tokens in {run.name!r}, got none.")
    return pd.concat(frames, ignore_index=True).sort_values(["group", "layer"], kind="stable", ignore_index=True)


def _consecutive(ids: NDArray[Any], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """[d, 3] sums over consecutive tokens of each of d documents, in the order of `MEASURES`.

    Args:
        ids: [n, K] of the documents one after another, of `sizes` [d] tokens.
    """
    slot = np.repeat(np.arange(len(sizes)), sizes)
    inside = slot[1:] == slot[:-1]
    a, b, slot = ids[1:][inside], ids[:-1][inside], slot[1:][inside]
    common = shared(a, b)
    values = (a[:, 0] == b[:, 0], common > 0, common / ids.shape[1])
    return np.stack([np.bincount(slot, weights=one, minlength=len(sizes)) for one in values], 1)


def _shuffled(ids: NDArray[Any], sizes: NDArray[np.int64], experts: int) -> NDArray[np.float64]:
    """[d, 3] means over ordered pairs of different tokens of each document; arguments as `_consecutive`."""
    slot = np.repeat(np.arange(len(sizes)), sizes)
    first, each = (count_picks(part[None], slot, len(sizes), experts)[:, 0] for part in (ids[:, :1], ids))
    pairs = np.maximum(sizes * (sizes - 1), 1)
    equal = [(counts * (counts - 1.0)).sum(-1) / pairs for counts in (first, each)]
    return np.stack([equal[0], _meeting(ids, sizes, experts), equal[1] / ids.shape[1]], 1)


def _meeting(ids: NDArray[Any], sizes: NDArray[np.int64], experts: int) -> NDArray[np.float64]:
    """[d] share of the ordered pairs of different tokens of each document with a common expert."""
    sets, out = _bits(ids, experts), np.zeros(len(sizes))
    for at, (stop, n) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        if n < 2:
            continue
        own = sets[:, stop - n : stop]
        some = own if n <= _EXACT else own[:, np.linspace(0, n - 1, 512).astype(np.int64)]
        meet, step = 0, chunk_rows(some.shape[1])
        for start in range(0, n, step):
            common = np.bitwise_and.outer(some[0], own[0, start : start + step])
            for word in range(1, len(sets)):
                common |= np.bitwise_and.outer(some[word], own[word, start : start + step])
            meet += int(np.count_nonzero(common))
        out[at] = (meet - some.shape[1]) / (some.shape[1] * (n - 1))  # a token meets itself
    return out


def _bits(ids: NDArray[Any], experts: int) -> NDArray[np.uint64]:
    """[words, n] the set of experts of each token, 64 a word."""
    out, rows = np.zeros((-(-experts // 64), len(ids)), np.uint64), np.arange(len(ids))
    for one in ids.T:
        out[one // 64, rows] |= np.uint64(1) << (one % 64).astype(np.uint64)
    return out
