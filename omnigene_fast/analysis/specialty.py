"""Which experts a group of documents prefers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .groups import Groups, RunLike, group, share_variances, total
from .resampling import Jackknife, benjamini_hochberg, quantile

if TYPE_CHECKING:
    import pandas


def specialty(run: RunLike, by: str = "task", *, pseudo_count: float = 0.5) -> "pandas.DataFrame":
    """Log-specialty of every expert for every group: ln(p_t(e) / mean_t' p_t'(e)), within a layer.

    It cannot exceed ln(number of groups), which an expert reaches that one group alone uses. The score is that of the
    OmniGene-4 paper (analysis/25-layer_local_specialty.py), with a pseudo-count in place of its 1e-10, under which an
    expert that a group never uses scores -20 or so whatever the sample.

    Args:
        run: an opened trace.
        by: label that makes the groups.
        pseudo_count: added to the picks of every expert in every group, > 0; 0.5 is Jeffreys' prior.

    Returns:
        a row per group, layer and expert: group, layer (decoder index), expert, picks, docs (documents of the group
        with a pick), share (of the group's picks), mean_share (over groups), specialty, corrected, low, high (jackknife
        over documents of all groups, 95 %; NaN if fewer than two documents of the group picked the expert), p_value
        (two-sided: the group's share against the mean share of the others, by Welch's t over documents; NaN where a
        group has one document, or no group the expert), q_value (Benjamini-Hochberg over the layers and experts of a
        group), ceiling (ln groups), unit. In simulated worlds of equal routing (3 to 100 documents a group, unequal
        lengths and dispersions) a group had a q_value below 0.05 in at most 1 % of worlds, a p_value of at most 0.05 in
        at most 4 % of cells (`python -m omnigene_fast.bench.simulations --only level`); the intervals covered the truth
        in 93 to 97 % with 10 to 100 documents and in 94 to 98 % with 5 (`--only coverage`).

    Raises:
        ValueError: no such label, fewer than two groups, or a pseudo-count that is not above 0.
    """
    import pandas as pd

    if not pseudo_count > 0:
        raise ValueError(f"pseudo_count: expected a number above 0, got {pseudo_count!r}.")
    groups = group(run, by, minimum=2)
    G, L, E = groups.sums.shape
    estimate = Jackknife(_scores(groups.sums + pseudo_count))
    for g in range(G):
        estimate.stratum(_without(groups, g, pseudo_count), groups.sizes(g))
    margin = _margins(groups, groups.sums + pseudo_count)
    using = np.stack([(groups.counts[rows] > 0).sum(0) for rows in groups.rows])
    p = _p_values(groups)
    q = np.stack([benjamini_hochberg(one) for one in p])
    unsure = using < 2
    grid = np.indices((G, L, E)).reshape(3, -1)
    share = groups.probabilities
    columns = {
        "picks": groups.sums.round().astype(np.int64),
        "docs": using,
        "share": share,
        "mean_share": np.broadcast_to(share.mean(0), share.shape),
        "specialty": estimate.value,
        "corrected": np.where(unsure, np.nan, estimate.corrected),
        "low": np.where(unsure, np.nan, estimate.value - margin),
        "high": np.where(unsure, np.nan, estimate.value + margin),
        "p_value": p,
        "q_value": q,
    }
    table = pd.DataFrame(
        {
            "group": np.array(groups.names, object)[grid[0]],
            "layer": np.array(groups.layers)[grid[1]],
            "expert": grid[2],
            **{name: values.ravel() for name, values in columns.items()},
        }
    )
    return table.assign(ceiling=float(np.log(G)), unit="nats")


def domain(run: RunLike, by: str = "task") -> "pandas.DataFrame":
    """Domain specialisation (OLMoE, arXiv 2409.02060, section 5.3): the share of a domain's tokens an expert gets.

    Args:
        run: an opened trace.
        by: label whose values are the domains.

    Returns:
        a row per group, layer and expert: group, layer (decoder index), expert, specialisation (tokens routed to the
        expert among any of its K picks / tokens), low, high (jackknife over documents, 95 %; in simulated worlds of 10
        to 100 documents 94 to 98 %, of 5 99 %), uniform (K / E), picks, tokens, docs, unit.

    Raises:
        ValueError: no such label.
    """
    import pandas as pd
    from scipy.special import expit, logit

    groups, frames = group(run, by), []
    _, L, E = groups.sums.shape
    smoothed = (groups.sums + 0.5) / (groups.sums + 0.5).sum(-1, keepdims=True)
    error = np.sqrt(share_variances(groups, smoothed)) / (smoothed * (1 - smoothed))
    for g, name in enumerate(groups.names):
        tokens = groups.sums[g].sum(-1, keepdims=True) / groups.top_k
        ends = logit(smoothed[g]) + quantile(max(groups.docs[g] - 1, 1)) * error[g] * np.array([-1, 1])[:, None, None]
        low, high = np.minimum(groups.top_k * expit(ends), 1)
        never = (groups.sums[g] == 0) & ~np.isnan(low)
        low = np.where(never, 0, low)
        high = np.where(never, np.minimum(high, 1 - 0.05 ** (1 / groups.docs[g])), high)
        grid = np.indices((L, E)).reshape(2, -1)
        frames.append(
            pd.DataFrame(
                {
                    "group": name,
                    "layer": np.array(groups.layers)[grid[0]],
                    "expert": grid[1],
                    "specialisation": (groups.sums[g] / tokens).ravel(),
                    "low": low.ravel(),
                    "high": high.ravel(),
                    "uniform": groups.top_k / E,
                    "picks": groups.sums[g].ravel().round().astype(np.int64),
                    "tokens": np.broadcast_to(tokens, (L, E)).ravel().round().astype(np.int64),
                    "docs": groups.docs[g],
                    "unit": "share of tokens",
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _scores(smoothed: NDArray[np.float64]) -> NDArray[np.float64]:
    """[G, L, E] smoothed counts to log-specialties."""
    share = smoothed / smoothed.sum(-1, keepdims=True)
    return np.asarray(np.log(share) - np.log(share.mean(0)))


def _without(groups: Groups, g: int, pseudo_count: float) -> Iterator[NDArray[np.float64]]:
    """[n, G, L, E] scores with each document of group g left out; one chunk of documents at a time."""
    smoothed = groups.sums + pseudo_count
    share = smoothed / smoothed.sum(-1, keepdims=True)
    logs, mean = np.log(share), share.mean(0)
    for chunk in groups.without_one(g):
        step = max(1, len(chunk) // len(share))  # a chunk grows G-fold here
        for start in range(0, len(chunk), step):
            left = chunk[start : start + step] + pseudo_count
            left = left / left.sum(-1, keepdims=True)
            centre = np.log(mean + (left - share[g]) / len(share))
            scores = logs - centre[:, None]
            scores[:, g] = np.log(left) - centre
            yield scores


def _p_values(groups: Groups) -> NDArray[np.float64]:
    """[G, L, E] two-sided p of the difference between a group's share and the mean share of the others, by Welch's t.

    Degrees of freedom count documents by the squares of their parts, as a long one makes most of a variance.
    """
    from scipy import stats

    sums = groups.sums.sum(0)
    share, G = groups.probabilities, len(groups.names)
    pooled = np.broadcast_to(sums / sums.sum(-1, keepdims=True), share.shape)
    variance = np.where(sums > 0, share_variances(groups, pooled), np.nan)
    freedom = np.empty(share.shape[:2])
    for g, rows in enumerate(groups.rows):
        squares = (total(groups.counts[rows], -1) / groups.sums[g].sum(-1)) ** 2  # [n, L]
        freedom[g] = np.maximum(squares.sum(0) ** 2 / (squares**2).sum(0) - 1, 1)
    out = np.empty_like(share)
    for g in range(G):
        others = [h for h in range(G) if h != g]
        parts = np.concatenate([variance[g][None], variance[others] / (G - 1) ** 2])
        margin, degrees = _welch(parts, freedom[[g, *others]][..., None])
        with np.errstate(invalid="ignore", divide="ignore"):
            out[g] = 2 * stats.t.sf(np.abs(share[g] - share[others].mean(0)) / margin, degrees)
    return out


def _welch(parts: NDArray[np.float64], freedom: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standard error of a sum of independent parts with variances [P, ...], and Welch's degrees of freedom."""
    whole = parts.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(whole), whole**2 / (parts**2 / freedom).sum(0)


def _margins(groups: Groups, smoothed: NDArray[np.float64]) -> NDArray[np.float64]:
    """[G, L, E] half the width of the 95 % interval of a log-specialty, by the delta method from `share_variances`."""
    share = smoothed / smoothed.sum(-1, keepdims=True)
    variance, mean, G = share_variances(groups, share), share.mean(0), len(share)
    freedom = np.maximum(np.array(groups.docs) - 1.0, 1)[:, None, None]
    out = np.empty_like(share)
    for g in range(G):
        slopes = np.full_like(share, -1) / (G * mean)
        slopes[g] += 1 / share[g]
        error, degrees = _welch(slopes**2 * variance, freedom)
        out[g] = quantile(degrees) * error
    return out
