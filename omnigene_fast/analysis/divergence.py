"""How differently groups of documents are routed: Jensen-Shannon divergence, by layer."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .entropy import shannon
from .groups import MOST_GROUPS, Groups, RunLike, check_permutations, check_unit, group
from .null import deleted_pairs, null_mean, pair_values
from .resampling import Jackknife, benjamini_hochberg, p_value

if TYPE_CHECKING:
    import pandas


def js_divergence(p: ArrayLike, q: ArrayLike, base: str = "nats", eps: float = 0.0) -> float:
    """Jensen-Shannon divergence of two distributions: KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2, 0 ln 0 = 0.

    scipy's `jensenshannon` is its square root. Lin (1991), IEEE Trans. Inf. Theory 37(1).

    Args:
        p, q: [E] non-negative shares or counts, each normalised to sum 1.
        base: unit, "nats" (at most ln 2) or "bits" (at most 1).
        eps: added to both after normalising, then normalised again: 1e-10 is what the analysis scripts of OmniGene-4
            do (`js_div` in analysis/22-analyze_per_layer.py of maris205/omnigene4).

    Raises:
        ValueError: different or empty shapes, negative or non-finite numbers, a sum of 0, an unknown base.
    """
    unit = check_unit(base)
    first, second = _distribution("p", p, eps), _distribution("q", q, eps)
    if first.shape != second.shape:
        raise ValueError(f"q: expected the shape {first.shape} of p, got {second.shape}.")
    middle = (first + second) / 2
    return float(max((_relative(first, middle) + _relative(second, middle)) / 2, 0.0) * unit)


def generalized_js(ps: ArrayLike, weights: ArrayLike | None = None, base: str = "nats") -> float:
    """Divergence of several distributions at once: H(sum_t w_t p_t) - sum_t w_t H(p_t) (Lin 1991).

    Args:
        ps: [G, E] non-negative shares or counts, each row normalised to sum 1.
        weights: [G] non-negative, normalised to sum 1; equal if None.
        base: "nats" (at most ln G) or "bits".

    Raises:
        ValueError: as `js_divergence`, or weights that do not fit.
    """
    unit = check_unit(base)
    rows = np.asarray(ps, np.float64)
    if rows.ndim != 2:
        raise ValueError(f"ps: expected a matrix [G, E], got shape {rows.shape}.")
    shares = np.stack([_distribution("ps", row, 0.0) for row in rows])
    share = _distribution("weights", np.ones(len(rows)) if weights is None else weights, 0.0)
    if len(share) != len(rows):
        raise ValueError(f"weights: expected {len(rows)} numbers, one for each row of ps, got {len(share)}.")
    middle = share @ shares
    return float(sum(w * _relative(row, middle) for w, row in zip(share, shares, strict=True)) * unit)


def divergence(
    run: RunLike, by: str = "task", *, permutations: int = 1000, seed: int = 0, base: str = "nats"
) -> "pandas.DataFrame":
    """Divergence of every two groups of documents, in each layer.

    Args:
        run: an opened trace.
        by: label that makes the groups; documents without it are left out.
        permutations: worlds in which the two groups of a pair are routed alike, for `floor` and `p_value`; 0: NaN
            there. In each, every document keeps its length and departs from the shares of both groups together as much
            as it did, but to a random side (`null.null_mean`).
        seed: of these worlds; a pair's are the same in all layers.
        base: "nats" or "bits".

    Returns:
        a row per layer and pair: layer (decoder index), a, b, js (plug-in), corrected (jackknife over documents; below
        0 it says no more than noise), low, high (95 %), floor (mean of js in these worlds: what js is when the expected
        routing of these groups is equal), floor_95 (its 95th percentile), p_value, q_value (Benjamini-Hochberg over the
        rows of this table), docs_a, docs_b, tokens_a, tokens_b, unit.

        In 200 simulated worlds of equal routing each (5 to 100 documents a group of 20 to 2,000 tokens, also of unequal
        lengths and dispersions), p_value was at most 0.05 in 0 to 5 % of them, and js 0.88 to 1.13 of its floor; with
        few documents the test is cautious (`python -m omnigene_fast.bench.simulations --only level`).

    Raises:
        ValueError: no such label, fewer than 2 groups or more than 50, an unknown base.
    """
    return divergence_tables(run, by, permutations=permutations, seed=seed, base=base)[0]


def divergence_summary(
    run: RunLike, by: str = "task", *, permutations: int = 1000, seed: int = 0, base: str = "nats"
) -> "pandas.DataFrame":
    """Divergence of every two groups, averaged over the layers: a mean of values, never of distributions.

    The interval, floor and p-value are those of the mean: a document is left out of, and departs in, all layers at
    once. Arguments and columns as `divergence`, with `layers`, their number, in place of `layer`.
    """
    return divergence_tables(run, by, permutations=permutations, seed=seed, base=base)[1]


def divergence_tables(
    run: RunLike, by: str = "task", *, permutations: int = 1000, seed: int = 0, base: str = "nats"
) -> tuple["pandas.DataFrame", "pandas.DataFrame"]:
    """The tables of `divergence` and `divergence_summary`, whose arguments these are, from one set of worlds."""
    import pandas as pd

    unit = check_unit(base)
    check_permutations(permutations)
    groups = group(run, by, minimum=2, most=MOST_GROUPS)
    layers, means = [], []
    for a, b, value, deleted, null in _pairs(groups, permutations, seed):
        layers.append({"layer": groups.layers, **_columns(groups, a, b, unit, value, deleted, null)})
        mean = [_mean(value), [_mean(part) for part in deleted], None if null is None else _mean(null)]
        means.append({"layers": [len(groups.layers)], **_columns(groups, a, b, unit, *mean)})
    found = [pd.concat([pd.DataFrame(columns) for columns in rows], ignore_index=True) for rows in (layers, means)]
    table = _finished(found[0], "layer", base).sort_values(["layer", "a", "b"], ignore_index=True)
    return table, _finished(found[1], "layers", base)


def differentiation(
    run: RunLike, by: str = "task", *, permutations: int = 1000, seed: int = 0, base: str = "nats"
) -> "pandas.DataFrame":
    """Expert differentiation: the mean divergence over all pairs of groups, in each layer and averaged over layers.

    Args: as `divergence`; in the worlds of `permutations` all groups are routed alike.

    Returns:
        a row per layer and one for their mean: layer (decoder index, "mean"), js, corrected, low, high (jackknife over
        documents, stratified by group; in simulated worlds of 5 to 100 documents a group they covered the truth in 93
        to 99 %, also where it is 0), floor, floor_95, p_value, generalized_js (equal weights) with
        generalized_js_corrected, _low, _high, groups, docs, tokens, unit.

    Raises:
        ValueError: as `divergence`.
    """
    import pandas as pd

    unit = check_unit(base)
    check_permutations(permutations)
    groups = group(run, by, minimum=2, most=MOST_GROUPS)
    estimate = differentiation_estimate(groups)
    general = _generalized(groups)
    everything = range(len(groups.names))
    null = with_mean(null_mean(groups, everything, permutations, [seed, len(groups.names)])) if permutations else None
    table = pd.DataFrame({"layer": [*groups.layers, "mean"], **_measured(estimate, null, unit)})
    for name, values in _measured(general, None, unit).items():
        if name in ("js", "corrected", "low", "high"):
            table["generalized_js" if name == "js" else f"generalized_js_{name}"] = values
    table["groups"], table["docs"] = len(groups.names), sum(groups.docs)
    table["tokens"], table["unit"] = int(groups.tokens.sum()), base
    return table


def differentiation_estimate(groups: Groups) -> Jackknife:
    """Jackknife of [L + 1] the mean over pairs in each layer and, last, its mean over layers, in nats."""
    value, deleted = differentiation_values(groups)[0]
    estimate = Jackknife(value)
    for g, part in enumerate(deleted):
        estimate.stratum(part, groups.sizes(g))
    return estimate


def differentiation_values(
    groups: Groups, roots: Sequence[bool] = (False,)
) -> list[tuple[NDArray[np.float64], list[NDArray[np.float64]]]]:
    """The mean over pairs [L + 1] (last: over layers), and per group [n, L + 1] with each document left out.

    Args:
        roots: for each result, whether the mean is one of square roots (the distance) and not of divergences.
    """
    between, deleted = pair_values(groups.probabilities), deleted_pairs(groups)  # [G, G, L], each [n, G, L]
    pairs, found = len(groups.pairs), []
    for root in roots:
        change = (lambda x: np.sqrt(np.maximum(x, 0))) if root else (lambda x: x)
        changed = change(between)
        whole = changed.sum((0, 1)) / 2
        left = [with_mean((whole - changed[g].sum(0) + change(part).sum(1)) / pairs) for g, part in enumerate(deleted)]
        found.append((with_mean(whole / pairs), left))
    return found


def with_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., L] with the mean over layers behind: [..., L + 1]."""
    return np.concatenate([values, _mean(values)], -1)


def _pairs(groups: Groups, permutations: int, seed: int) -> Iterator[tuple[int, int, Any, list[Any], Any]]:
    """Per pair of groups: positions, value [L], values [n, L] without each document of either, permutations [R, L]."""
    between, deleted = pair_values(groups.probabilities), deleted_pairs(groups)
    for a, b in groups.pairs:
        null = null_mean(groups, (a, b), permutations, [seed, a, b]) if permutations else None
        yield a, b, between[a, b], [deleted[a][:, b], deleted[b][:, a]], null


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values.mean(-1, keepdims=True))


def _generalized(groups: Groups) -> Jackknife:
    p = groups.probabilities
    middle, own = p.mean(0), shannon(p)
    estimate = Jackknife(with_mean(shannon(middle) - own.mean(0)))
    for g in range(len(p)):
        estimate.stratum(_generalized_without(groups, g, p, middle, own), groups.sizes(g))
    return estimate


def _generalized_without(groups: Groups, g: int, p: Any, middle: Any, own: Any) -> Any:
    for counts in groups.without_one(g):
        with np.errstate(invalid="ignore"):
            left = counts / counts.sum(-1, keepdims=True)
        moved = shannon(middle + (left - p[g]) / len(p))
        yield with_mean(moved - own.mean(0) - (shannon(left) - own[g]) / len(p))


def _measured(estimate: Jackknife, null: NDArray[np.float64] | None, unit: float) -> dict[str, Any]:
    nothing = np.full(estimate.value.shape, np.nan)
    return {
        "js": estimate.value * unit,
        "corrected": estimate.corrected * unit,
        "low": estimate.low * unit,
        "high": estimate.high * unit,
        "floor": nothing if null is None else null.mean(0) * unit,
        "floor_95": nothing if null is None else np.quantile(null, 0.95, axis=0) * unit,
        "p_value": nothing if null is None else p_value(null, estimate.value),
    }


def _columns(groups: Groups, a: int, b: int, unit: float, value: Any, deleted: Any, null: Any) -> dict[str, Any]:
    estimate = Jackknife(value)
    for g, part in zip((a, b), deleted, strict=True):
        estimate.stratum(part, groups.sizes(g))
    return {
        "a": groups.names[a],
        "b": groups.names[b],
        **_measured(estimate, null, unit),
        "docs_a": groups.docs[a],
        "docs_b": groups.docs[b],
        "tokens_a": int(groups.tokens[a]),
        "tokens_b": int(groups.tokens[b]),
    }


def _finished(table: "pandas.DataFrame", first: str, base: str) -> "pandas.DataFrame":
    table = table.assign(q_value=benjamini_hochberg(table["p_value"]), unit=base)
    names = "a b js corrected low high floor floor_95 p_value q_value docs_a docs_b tokens_a tokens_b unit"
    return table[[first, *names.split()]]


def _distribution(name: str, values: ArrayLike, eps: float) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: expected a vector of shares or counts, got shape {array.shape}.")
    if not np.isfinite(array).all() or (array < 0).any() or not array.sum() > 0:
        raise ValueError(f"{name}: expected finite numbers >= 0 with a sum above 0, got {array!r}.")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}.")
    array = array / array.sum()
    if eps:
        array = (array + eps) / (array + eps).sum()
    return array


def _relative(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """KL(p || q) in nats."""
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
