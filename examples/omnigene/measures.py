"""Measures of answers and labels, each with its 95 % interval: accuracy, AUC, means over groups, confusion."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch


def accuracy(right: Iterable[bool]) -> dict[str, Any]:
    """Share of right answers with its 95 % interval (Wilson) and their number."""
    from scipy.stats import binomtest

    each = [bool(one) for one in right]
    interval = binomtest(sum(each), len(each)).proportion_ci(method="wilson")
    return {"accuracy": sum(each) / len(each), "low": interval.low, "high": interval.high, "n": len(each)}


def clustered(values: Any, groups: Any) -> tuple[float, float, float]:
    """Mean of values [N] with its 95 % interval where groups [N] of ids from 0 are drawn as wholes.

    The mean is a ratio, sum over size, linearised; its error comes from the groups' totals alone, so that values may
    depend on each other inside a group. Student's t for one less than the groups; NaN where there is one group, of
    whose spread nothing is known.
    """
    from scipy.stats import t

    values, groups = torch.as_tensor(values, dtype=torch.float64), torch.as_tensor(groups)
    mean = values.mean()
    size = int(groups.max()) + 1
    if size < 2:
        return mean.item(), math.nan, math.nan
    totals = torch.zeros(size, dtype=torch.float64).index_add_(0, groups, values - mean)
    margin = t.ppf(0.975, size - 1) * (size / (size - 1) * totals.square().sum()).sqrt() / len(values)
    return mean.item(), (mean - margin).item(), (mean + margin).item()


def confusion(true: Any, predicted: Any, rows: int, columns: int) -> Any:
    """How often class `true` [N] met class `predicted` [N], as a numpy array [rows, columns]."""
    import numpy

    return numpy.bincount(true * columns + predicted, minlength=rows * columns).reshape(rows, columns)


def macro_f1(counts: Any) -> float:
    """The mean F1 of the classes that occur, of a confusion matrix [classes, classes]."""
    f1 = 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1)).clip(min=1)
    return float(f1[counts.sum(1) > 0].mean())


def draw_confusion(axis: Any, counts: Any, names: Sequence[str], title: str) -> None:
    """A confusion matrix [classes, classes] as percentages of its rows, the commonest class first."""
    order = (-counts.sum(1)).argsort(kind="stable")
    percent = (100 * counts / counts.sum(1, keepdims=True).clip(min=1))[order][:, order]
    axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for y, row in enumerate(percent):
        for x, value in enumerate(row):
            if value >= 9.5:
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", size=8, color="w" if value > 50 else "k")
    axis.set(xlabel="predicted", ylabel="true", title=title)
    axis.set_xticks(range(len(names)), [names[n] for n in order])
    axis.set_yticks(range(len(names)), [names[n] for n in order])


def auc(positive: Sequence[float], negative: Sequence[float]) -> dict[str, float]:
    """Area under the ROC curve, ties counted half, with its 95 % interval.

    DeLong's (1988); where all positives are above all negatives, or below, and it has no width, Newcombe's (2006,
    method 5); NaN where neither exists.
    """
    above = torch.tensor(positive, dtype=torch.float64)[:, None]
    below = torch.tensor(negative, dtype=torch.float64)[None]
    wins = (above > below).double() + (above == below).double() / 2  # [positives, negatives]
    value = wins.mean().item()
    spread = math.nan  # of one pair's score nothing is known
    if min(wins.shape) > 1:
        spread = wins.mean(1).var().item() / len(positive) + wins.mean(0).var().item() / len(negative)
    low = high = math.nan
    if spread > 0:
        low, high = max(value - 1.96 * math.sqrt(spread), 0.0), min(value + 1.96 * math.sqrt(spread), 1.0)
    elif value in (0.0, 1.0):
        low, high = sorted((value, abs(value - _newcombe(len(positive), len(negative)))))
    return {"auc": value, "auc low": low, "auc high": high}


def _newcombe(positives: int, negatives: int) -> float:
    """How far below 1 the AUC may be, though the scores show 1."""
    size = (positives + negatives) / 2 - 1

    def beyond(area: float) -> bool:
        factor = 1 + size * ((1 - area) / (2 - area) + area / (1 + area))
        return (1 - area) ** 2 > 1.96**2 * area * (1 - area) * factor / (positives * negatives)

    low, high = 0.0, 1.0  # beyond holds at the first and not at the second
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle) else (low, middle)
    return 1 - low
