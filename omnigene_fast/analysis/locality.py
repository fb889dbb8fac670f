"""Whether neighbouring tokens pick the same experts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .groups import RunLike, label_column
from .resampling import ratio
from .tokens import chosen_layers, layer_groups, one_hot, whole_documents

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
    # a token of one layer: its ids, their comparison with the next token's, its row of one-hot floats
    for some in layer_groups(kept, int(lengths.max(initial=1)) * (run.top_k**2 + 4 * run.num_experts)):
        seen, expected = (np.zeros((len(lengths), len(some), len(MEASURES))) for _ in range(2))
        for part in whole_documents(run, some):
            starts = np.flatnonzero(np.diff(part.doc, prepend=-1))
            for start, stop in zip(starts, [*starts[1:], len(part)], strict=True):
                if stop - start > 1:
                    row = part.doc[start]
                    for at in range(len(some)):
                        ids = part.ids[at, start:stop]
                        seen[row, at] = _consecutive(ids)
                        expected[row, at] = _shuffled(ids, run.num_experts) * pairs[row]
        for name in sorted({label for label in labels if label is not None}):
            rows = np.array([label == name for label in labels]) & (pairs > 0)
            if not rows.any():
                continue
            value = ratio(seen[rows], pairs[rows])
            excess = ratio(seen[rows] - expected[rows], pairs[rows])
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


def _consecutive(ids: NDArray[np.unsignedinteger]) -> NDArray[np.float64]:
    """[3] sums over consecutive tokens of a document [n, K], in the order of `MEASURES`."""
    same = ids[1:, :, None] == ids[:-1, None, :]
    common = same.sum((1, 2))
    return np.array([same[:, 0, 0].sum(), (common > 0).sum(), common.sum() / ids.shape[1]], np.float64)


def _shuffled(ids: NDArray[np.unsignedinteger], experts: int) -> NDArray[np.float64]:
    """[3] means over ordered pairs of different tokens of a document [n, K]."""
    n, K = ids.shape
    first = np.bincount(ids[:, 0], minlength=experts).astype(np.float64)
    each = np.bincount(ids.ravel(), minlength=experts).astype(np.float64)
    hot = one_hot(ids, experts)
    some = np.arange(n) if n <= _EXACT else np.linspace(0, n - 1, 512).astype(np.int64)
    meet = sum(int((hot[rows] @ hot.T > 0).sum()) for rows in np.array_split(some, max(1, len(some) * n >> 22)))
    pairs = n * (n - 1)
    return np.array(
        [
            (first * (first - 1)).sum() / pairs,
            (meet - len(some)) / (len(some) * (n - 1)),  # a token meets itself
            (each * (each - 1)).sum() / (K * pairs),
        ]
    )
