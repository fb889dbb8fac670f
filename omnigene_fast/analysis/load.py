"""How evenly the experts of a layer are used."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .entropy import shannon
from .groups import RunLike, group
from .resampling import Jackknife

if TYPE_CHECKING:
    import pandas

MEASURES = ("cv", "max_vio", "gini", "entropy", "effective_experts")


def load(run: RunLike, by: str | None = "task") -> "pandas.DataFrame":
    """Balance of the load over experts, per group and layer.

    Args:
        run: an opened trace.
        by: label that makes the groups, or None for one group "all".

    Returns:
        a row per group and layer: group, layer (decoder index), picks, tokens, docs, cv (population standard deviation
        of the load over its mean), max_vio (max / mean - 1; Wang et al. 2024, arXiv 2408.15664), gini, dead (experts
        never picked), dead_fraction, dead_floor (that fraction expected of as many tokens under perfectly even
        routing), dead_bound (with 95 % confidence a dead expert is used in fewer than this share of documents), entropy
        (nats), entropy_floor (ln K: the K picks of a token are distinct), entropy_max (ln E), effective_experts (exp of
        the entropy), experts, unit (of the entropy); cv, max_vio, gini, entropy and effective_experts also with
        _corrected, _low and _high (jackknife over documents, 95 %; entropy's end at ln E, effective_experts' at E). The
        jackknife is not consistent for max_vio, a maximum: where several experts are nearly the fullest, its interval
        is a rough guide and its correction need not remove the bias.

    Raises:
        ValueError: no such label, or a group without picks.
    """
    import pandas as pd

    groups = group(run, by)
    frames = []
    for g, name in enumerate(groups.names):
        whole, experts = groups.sums[g], groups.sums.shape[-1]
        estimate = Jackknife(balance(whole)).stratum(map(balance, groups.without_one(g)), groups.sizes(g))  # [L, 5]
        tokens = whole.sum(-1) / groups.top_k
        dead = (whole == 0).sum(-1)
        columns: dict[str, Any] = {
            "group": name,
            "layer": groups.layers,
            "picks": whole.sum(-1).astype(np.int64),
            "tokens": tokens.round().astype(np.int64),
            "docs": groups.docs[g],
            "dead": dead,
            "dead_fraction": dead / experts,
            "dead_floor": (1 - groups.top_k / experts) ** tokens,
            "dead_bound": 1 - 0.05 ** (1 / groups.docs[g]),
            "entropy_floor": float(np.log(groups.top_k)),
            "entropy_max": float(np.log(experts)),
            "experts": experts,
            "unit": "nats",
        }
        most = np.array([np.inf, np.inf, np.inf, np.log(experts), experts])
        for name, values in (
            ("", estimate.value),
            ("_corrected", estimate.corrected),
            ("_low", estimate.low),
            ("_high", estimate.high),
        ):
            for measure, column in zip(MEASURES, np.minimum(values, most).T, strict=True):
                columns[measure + name] = column
        frames.append(pd.DataFrame(columns))
    table = pd.concat(frames, ignore_index=True)
    first = ["group", "layer", "picks", "tokens", "docs"]
    return table[first + [name for name in table.columns if name not in first]]


def balance(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., L, E] counts to [..., L, 5] numbers in the order of `MEASURES`."""
    E = counts.shape[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = counts / counts.sum(-1, keepdims=True)
    entropy = shannon(share)
    ranks = np.arange(1, E + 1)
    gini = (2 * (np.sort(share, -1) * ranks).sum(-1) - (E + 1)) / E
    return np.stack([share.std(-1) * E, share.max(-1) * E - 1, gini, entropy, np.exp(entropy)], -1)
