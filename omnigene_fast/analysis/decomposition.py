"""Which stage of training set the experts apart: base -> continued pretraining (CPT) -> fine-tuning (SFT)."""

import functools
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .divergence import differentiation_values
from .groups import MOST_GROUPS, Groups, RunLike, check_permutations, check_unit, distinct, group, label_column
from .null import null_swap
from .resampling import Jackknife, p_value, quantile

if TYPE_CHECKING:
    import pandas

CONVENTIONS = ("divergence", "distance")  # of which the mean is taken: JS, or its square root


def decomposition_of(
    base: float, cpt: float, sft: float, *, convention: str = "divergence", unit: str = "nats"
) -> dict[str, float]:
    """Shares of two stages in the growth of differentiation, from its three values.

    The layer means 0.13829, 0.23037, 0.23232 nats of the OmniGene-4 paper (analysis/23-three_way_compare.py) give 97.9
    % and 2.1 %. Its 96 % and 4 % follow from 0.344, 0.440, 0.444 (supplementary table S2), numbers on the scale of the
    square root, the JS distance. Numbers of the two conventions cannot be mixed.

    Args:
        base, cpt, sft: mean JS over task pairs and layers of each checkpoint.
        convention: "divergence" (JS, at most ln 2 nats) or "distance" (its square root).
        unit: "nats" or "bits".

    Returns:
        d_cpt = cpt - base, d_sft = sft - cpt, total = d_cpt + d_sft, share_cpt, share_sft (NaN if total is 0).

    Raises:
        ValueError: a value that the convention cannot have, an unknown convention or unit.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected 'divergence' or 'distance', got {convention!r}.")
    largest = float(np.log(2)) * check_unit(unit)
    largest = largest if convention == "divergence" else largest**0.5
    for name, value in (("base", base), ("cpt", cpt), ("sft", sft)):
        if not 0 <= value <= largest * (1 + 1e-12):
            raise ValueError(
                f"{name}: expected a mean JS {convention} in [0, {largest:.4f}] ({unit}), got {value!r}; a JS"
                " divergence is at most ln 2 nats, so this number is in another unit or not a JS divergence."
            )
    first, second = cpt - base, sft - cpt
    total = first + second
    shares = (first / total, second / total) if total else (float("nan"), float("nan"))
    return {"d_cpt": first, "d_sft": second, "total": total, "share_cpt": shares[0], "share_sft": shares[1]}


def decompose(
    base: RunLike,
    cpt: RunLike,
    sft: RunLike,
    by: str = "task",
    *,
    permutations: int = 1000,
    seed: int = 0,
    unit: str = "nats",
    per_layer: bool = False,
) -> "pandas.DataFrame":
    """Growth of expert differentiation by stage: d_cpt = J_cpt - J_base, d_sft = J_sft - J_cpt, and their shares.

    J is the mean over task pairs (and layers). The three runs are paired by document: a document is left out of all
    three at once, and `p_value` comes from swapping a document's two checkpoints with probability 1/2 (two-sided).
    In simulated worlds of 5 to 100 documents a group the intervals of the divergence covered the truth in 93 to 99 %
    (`python -m omnigene_fast.bench.simulations --only coverage`). Those of the distance are a little short where
    divergences are near 0 and their root is steep: 93 to 96 % with 60 documents.

    Args:
        base, cpt, sft: runs over the same documents with the same labels.
        by: label that makes the groups.
        permutations: swaps per stage; 0: NaN in `p_value`.
        seed: of the swaps.
        unit: "nats" or "bits".
        per_layer: rows of every layer (decoder index) too, beside those of "mean".

    Returns:
        rows "d_cpt" and "d_sft" in both conventions (mean of the divergence; mean of its square root, the distance):
        layer, stage, convention, before, after, delta (plug-in), corrected, low, high (paired jackknife, 95 %),
        p_value, share (of d_cpt + d_sft, plug-in), share_corrected, share_low, share_high (Fieller 1954; -inf and inf
        where the total cannot be told from 0), docs, unit.

    Raises:
        ValueError: the runs differ in layers, experts, documents, text or labels, or as `divergence`.
    """
    import pandas as pd

    scale = check_unit(unit)
    check_permutations(permutations)
    groups = _paired((base, cpt, sft), by)
    frames = []
    measured = [differentiation_values(one, roots=(False, True)) for one in groups]
    nulls = [null_swap(x, y, permutations, seed) if permutations else None for x, y in pairwise(groups)]
    for kind, convention in enumerate(CONVENTIONS):
        factor = scale if kind == 0 else scale**0.5
        values, deleted = zip(*(one[kind] for one in measured), strict=True)
        stages = [_change(groups[0], values, deleted, new, old) for new, old in ((1, 0), (2, 1), (2, 0))]
        share = _fieller(stages[0], stages[2], stages[1])
        for stage, name in enumerate(("d_cpt", "d_sft")):
            estimate = stages[stage]
            plain = share if stage == 0 else {"value": 1 - share["value"], "corrected": 1 - share["corrected"]}
            ends = (share["low"], share["high"]) if stage == 0 else (1 - share["high"], 1 - share["low"])
            frames.append(
                pd.DataFrame(
                    {
                        "layer": [*groups[0].layers, "mean"],
                        "stage": name,
                        "convention": convention,
                        "before": values[stage] * factor,
                        "after": values[stage + 1] * factor,
                        "delta": estimate.value * factor,
                        "corrected": estimate.corrected * factor,
                        "low": estimate.low * factor,
                        "high": estimate.high * factor,
                        "p_value": _swapped(nulls[stage], kind, estimate),
                        "share": plain["value"],
                        "share_corrected": plain["corrected"],
                        "share_low": ends[0],
                        "share_high": ends[1],
                        "docs": sum(groups[0].docs),
                        "unit": unit if kind == 0 else f"sqrt({unit})",
                    }
                )
            )
    table = pd.concat(frames, ignore_index=True)
    return table if per_layer else table[table["layer"] == "mean"].reset_index(drop=True)


def _change(groups: Groups, values: Any, deleted: Any, new: int, old: int) -> Jackknife:
    estimate = Jackknife(values[new] - values[old])
    for g, (later, earlier) in enumerate(zip(deleted[new], deleted[old], strict=True)):
        estimate.stratum(later - earlier, groups.sizes(g))
    return estimate


def _fieller(part: Jackknife, whole: Jackknife, rest: Jackknife) -> dict[str, NDArray[np.float64]]:
    """part / whole with Fieller's interval; whole = part + rest gives the covariance."""
    a, t = part.corrected, whole.corrected
    q = quantile(whole.freedom) ** 2
    covariance = (part.variance + whole.variance - rest.variance) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        lead = t**2 - q * whole.variance
        middle = a * t - q * covariance
        spread = np.sqrt(np.maximum(middle**2 - lead * (a**2 - q * part.variance), 0))
        bounded = lead > 0
        low = np.where(bounded, (middle - spread) / lead, -np.inf)
        high = np.where(bounded, (middle + spread) / lead, np.inf)
        unknown = np.isnan(lead)
        low, high = np.where(unknown, np.nan, low), np.where(unknown, np.nan, high)
        return {"value": part.value / whole.value, "corrected": a / t, "low": low, "high": high}


def _swapped(null: NDArray[np.float64] | None, kind: int, estimate: Jackknife) -> NDArray[np.float64]:
    if null is None:
        return np.full(estimate.value.shape, np.nan)
    changes = np.concatenate([null[kind], null[kind].mean(-1, keepdims=True)], -1)
    return p_value(np.abs(changes), np.abs(estimate.value))


def _paired(runs: tuple[RunLike, RunLike, RunLike], by: str) -> list[Groups]:
    """Groups of the three runs, whose documents stand in the same order."""
    first, names = runs[0], distinct(runs)
    documents = first.documents
    for run, name in zip(runs, names, strict=True):
        table = run.documents
        if list(run.layers) != list(first.layers) or run.counts.shape[1:] != first.counts.shape[1:]:
            raise ValueError(f"runs: expected the layers and experts of {names[0]!r}, got others in {name!r}.")
        if not np.array_equal(table["doc_id"], documents["doc_id"]):
            missing = sorted(set(documents["doc_id"]) ^ set(table["doc_id"]))
            raise ValueError(
                f"runs: expected the same documents in {names[0]!r} and {name!r}, which differ in"
                f" {len(missing)} doc_ids (the first: {missing[:3]}); trace the same texts with the same doc_ids."
            )
        labels = zip(label_column(first, by), label_column(run, by), strict=True)
        if any(one != other for one, other in labels):
            raise ValueError(f"by: expected the same {by!r} of each document in {names[0]!r} and {name!r}.")
        if "text_hash" in table and "text_hash" in documents:
            hashes = [table["text_hash"], documents["text_hash"]]
            both = hashes[0].notna().to_numpy() & hashes[1].notna().to_numpy()
            if (hashes[0].to_numpy()[both] != hashes[1].to_numpy()[both]).any():
                raise ValueError(
                    f"runs: expected the same text of each document in {names[0]!r} and {name!r}; text_hash differs."
                )
    texts = [run.documents["text_hash"] for run in runs if "text_hash" in run.documents]
    known = functools.reduce(lambda one, other: one.where(one.notna(), other), texts) if texts else None
    found = [group(run, by, minimum=2, most=MOST_GROUPS, hashes=known) for run in runs]
    if any(not np.array_equal(x, y) for one in found[1:] for x, y in zip(one.rows, found[0].rows, strict=True)):
        raise ValueError("runs: expected tokens of the same documents in all three.")
    return found
