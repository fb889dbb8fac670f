"""Divergence of single documents, pair by pair: do two prompts take different experts?"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .groups import RunLike, check_permutations, check_unit, chunk_rows, label_column
from .null import entropy
from .resampling import Jackknife, p_value

if TYPE_CHECKING:
    import pandas

_DRAWS = 2000  # of the noise floor, over all pairs


def pairwise(
    run: RunLike,
    by_pair: str = "pair",
    by: str | None = "task",
    *,
    permutations: int = 1000,
    cross: int = 2000,
    seed: int = 0,
    base: str = "nats",
    average: bool = False,
) -> "pandas.DataFrame":
    """Divergence of the two documents of each pair, beside that of single documents of different groups.

    The OmniGene-4 paper asks with it whether pairs that the model answers differently also take different experts. A
    document is a small sample, so that two of the very same distribution diverge as well: `floor` is the mean
    divergence when the tokens of the two documents are dealt out to them at random, each expert's on its own
    (hypergeometric: exact for each expert if tokens are exchangeable, needs no table of tokens). Tokens of a document
    resemble each other, so the true floor lies above it; `repaired` needs no such assumption.

    Args:
        run: an opened trace.
        by_pair: label with the pair's id; each value stands on exactly two documents, others are left out.
        by: label of the groups, or None: no "cross" rows, and pairs are re-formed among all documents.
        permutations: re-pairings of the pairs' documents within their group; 0: NaN in repaired and p_value.
        cross: at most so many pairs of documents of different groups, drawn at random from all documents with labels.
        seed: of all draws.
        base: "nats" or "bits".
        average: add the rows of "mean", the mean over the layers; a document falls away from, and is re-paired in, all
            layers at once.

    Returns:
        a row per layer and kind: layer (decoder index, "mean"), kind ("pair", "cross"), js (mean over pairs), floor,
        corrected (js - floor), low, high (of corrected; "pair": over pairs, "cross": jackknife over documents, 95 %),
        repaired (mean js of random pairs of the same group), p_value (of re-pairing, two-sided; NaN for "cross"),
        pairs, docs, tokens (median of a document), unit.

    Raises:
        ValueError: no such label, a pair without exactly two documents, or no pair.
    """
    import pandas as pd

    unit = check_unit(base)
    check_permutations(permutations)
    first, second, stratum = _pairs(run, by_pair, by)
    draw = np.random.default_rng(seed)
    tables = []
    value = _values(run, first, second)
    floor = _floors(run, first, second, draw)
    null = _repaired(run, first, second, value, stratum, permutations, draw) if permutations else None
    members = np.stack([np.arange(len(first))] * 2, 1)
    tables.append(_table(run, "pair", value, floor, members, null, np.concatenate([first, second]), unit))
    if by is not None:
        a, b = _crossing(label_column(run, by), run.counts.any(axis=(1, 2)), cross, draw)
        if len(a):
            value, floor = _values(run, a, b), _floors(run, a, b, draw)
            tables.append(_table(run, "cross", value, floor, np.stack([a, b], 1), None, np.unique([a, b]), unit))
    table = pd.concat(tables).assign(unit=base)
    table = table.sort_values(["place", "kind"], ascending=[True, False], ignore_index=True).drop(columns="place")
    return table if average else table[table["layer"] != "mean"].reset_index(drop=True).astype({"layer": int})


def _table(
    run: RunLike,
    kind: str,
    value: NDArray[np.float64],
    floor: NDArray[np.float64],
    members: NDArray[np.int64],
    null: NDArray[np.float64] | None,
    docs: NDArray[np.int64],
    unit: float,
) -> "pandas.DataFrame":
    """Rows of one kind, the mean over layers last; `members` [P, 2] are the units that a pair falls away with."""
    import pandas as pd

    value, floor = (np.column_stack([each, each.mean(1)]) for each in (value, floor))
    null = None if null is None else np.column_stack([null, null.mean(1)])
    excess = value - floor
    estimate = Jackknife(excess.mean(0))
    estimate.stratum(_deleted(excess, members))
    nothing = np.full(value.shape[1], np.nan)
    tail = nothing
    if null is not None:
        tail = np.minimum(1, 2 * np.minimum(p_value(null, value.mean(0)), p_value(-null, -value.mean(0))))
    return pd.DataFrame(
        {
            "place": [*(int(layer) for layer in run.layers), np.inf],
            "layer": [*(int(layer) for layer in run.layers), "mean"],
            "kind": kind,
            "js": value.mean(0) * unit,
            "floor": floor.mean(0) * unit,
            "corrected": excess.mean(0) * unit,
            "low": (excess.mean(0) - estimate.margin) * unit,
            "high": (excess.mean(0) + estimate.margin) * unit,
            "repaired": nothing if null is None else null.mean(0) * unit,
            "p_value": tail,
            "pairs": len(value),
            "docs": len(np.unique(docs)),
            "tokens": int(np.median(np.asarray(run.documents["n_tokens"])[np.unique(docs)])),
        }
    )


def _deleted(values: NDArray[np.float64], members: NDArray[np.int64]) -> NDArray[np.float64]:
    """[units, L] means of the pairs that remain when every pair with one unit falls away."""
    units, at = np.unique(members, return_inverse=True)
    at = at.reshape(members.shape)
    gone, number = np.zeros((len(units), values.shape[1])), np.zeros(len(units))
    for column in range(2 if np.any(at[:, 0] != at[:, 1]) else 1):
        np.add.at(gone, at[:, column], values)
        np.add.at(number, at[:, column], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((values.sum(0) - gone) / (len(values) - number)[:, None])


def _pairs(run: RunLike, by_pair: str, by: str | None) -> tuple[NDArray[np.int64], NDArray[np.int64], list[Any]]:
    """Rows of the first and second document of each pair, and the group in which they may be re-paired."""
    ids, filled = label_column(run, by_pair), np.asarray(run.counts.any(axis=(1, 2)))
    labels = label_column(run, by) if by is not None else ["all"] * len(ids)
    where: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        if name is not None:
            where.setdefault(name, []).append(row)
    wrong = [name for name, rows in where.items() if len(rows) != 2]
    if wrong:
        raise ValueError(
            f"by_pair: expected exactly two documents with each value of {by_pair!r}, got {len(where[wrong[0]])} with"
            f" {wrong[0]!r}."
        )
    kept = [rows for rows in where.values() if filled[rows].all()]
    if not kept:
        raise ValueError(f"by_pair: expected a pair of documents with tokens under {by_pair!r}, got none.")
    array = np.array(kept, np.int64)
    return array[:, 0], array[:, 1], [(labels[a], labels[b]) for a, b in kept]


def _crossing(labels: list[str | None], filled: Any, most: int, draw: np.random.Generator) -> Any:
    """Rows of pairs of documents of different groups, no pair twice."""
    rows = np.array([row for row, label in enumerate(labels) if label is not None and filled[row]], np.int64)
    code = np.unique([str(labels[row]) for row in rows], return_inverse=True)[1] if len(rows) else rows
    if len(rows) <= 2000:
        a, b = np.triu_indices(len(rows), 1)
        a, b = (part[code[a] != code[b]] for part in (a, b))
        chosen = draw.permutation(len(a))[:most]
        return rows[a[chosen]], rows[b[chosen]]
    a, b = np.sort(draw.integers(0, len(rows), (2, 4 * most)), axis=0)
    key = np.unique((a * len(rows) + b)[code[a] != code[b]])
    key = draw.permutation(key)[:most]
    return rows[key // len(rows)], rows[key % len(rows)]


def _share(counts: NDArray[Any]) -> torch.Tensor:
    values = torch.from_numpy(np.asarray(counts, np.float64))
    return values / values.sum(-1, keepdim=True)


def _js(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray((entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2).clamp_min_(0).numpy())


def _values(run: RunLike, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """[P, L] divergence of the documents in rows a and b."""
    return np.concatenate([_js(_share(run.counts[a[s]]), _share(run.counts[b[s]])) for s in _slices(run, len(a))])


def _floors(run: RunLike, a: NDArray[np.int64], b: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.float64]:
    """[P, L] mean divergence when the tokens that picked an expert are dealt out to the two documents at random.

    Experts are dealt out on their own, so that the picks of a draw need not add up to K a token. Divided by that sum
    they would vary less than shares do; divided by K times the tokens each expert varies as under a permutation of
    tokens, and the mean of the divergence, a sum over experts, is exact.
    """
    draws, out = max(1, _DRAWS // len(a)), []
    for some in _slices(run, len(a), draws):
        x, y = run.counts[a[some]].astype(np.int64), run.counts[b[some]].astype(np.int64)
        tokens = [counts.sum(-1, keepdims=True) // run.top_k for counts in (x, y)]
        both, size = x + y, (draws, *x.shape)
        left = draw.hypergeometric(both, np.maximum(tokens[0] + tokens[1] - both, 0), tokens[0], size)
        samples = zip((left, both - left), tokens, strict=True)
        p, q = (torch.from_numpy(sample / np.maximum(run.top_k * count, 1)) for sample, count in samples)
        out.append(_js(p, q).mean(0))
    return np.concatenate(out)


def _repaired(
    run: RunLike,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    value: NDArray[np.float64],
    stratum: list[Any],
    permutations: int,
    draw: np.random.Generator,
) -> NDArray[np.float64]:
    """[R, L] mean divergence of re-formed pairs.

    Re-pairing leaves the documents and with them the entropies of their own shares: only that of the middle changes.
    """
    total = np.zeros((permutations, value.shape[1]))
    for name in sorted(set(stratum), key=str):
        here = np.array([at for at, one in enumerate(stratum) if one == name])
        a, b = first[here], second[here]
        total += value[here].sum(0) - _middles(run, a, b).sum(0)
        if len(here) > permutations:
            for one in total:
                one += _middles(run, a, b[draw.permutation(len(here))]).sum(0)
            continue
        order = np.stack([draw.permutation(len(here)) for _ in range(permutations)])
        for at, row in enumerate(a):
            total += _middles(run, np.full_like(b, row), b)[order[:, at]]
    return total / len(stratum)


def _middles(run: RunLike, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """[P, L] entropy of the mean of the shares of the documents in rows a and b."""
    found = [entropy((_share(run.counts[a[s]]) + _share(run.counts[b[s]])) / 2) for s in _slices(run, len(a))]
    return np.asarray(torch.cat(found).numpy())


def _slices(run: RunLike, pairs: int, draws: int = 1) -> list[slice]:
    size = chunk_rows(draws * int(np.prod(run.counts.shape[1:])))
    return [slice(start, start + size) for start in range(0, pairs, size)]
