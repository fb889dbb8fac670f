"""Intervals, p-values and their correction. The document is the unit: it is left out or relabelled as a whole.

Tokens of one document resemble each other, so that resampling them gives intervals several times too narrow.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95


@dataclass
class Jackknife:
    """Delete-one jackknife of a statistic of one or several independent samples (strata) of documents.

    Corrected value, with n_g documents in stratum g and a bar for the mean over its documents: v - sum_g (n_g - 1)
    (bar(v_-i) - v); variance: sum_g (n_g - 1) / n_g sum_i (v_-i - bar(v_-i))^2 (Efron and Stein 1981; Arvesen 1969 for
    several samples). The interval is centred on the corrected value, with the quantile of Student's t at Welch's
    degrees of freedom, for which documents are counted as Kish (1965) does, (sum s)^2 / sum s^2 of their sizes s: where
    one document holds half of the tokens, the others say little of how much it might vary.
    """

    value: NDArray[np.float64]  # [...] of all documents
    limits: tuple[float, float] = (-np.inf, np.inf)  # of what is estimated; a share lies in [0, 1]
    bias: NDArray[np.float64] = field(init=False)
    variance: NDArray[np.float64] = field(init=False)
    _spread: NDArray[np.float64] = field(init=False)
    _fewest: int = field(init=False, default=0)  # documents in a stratum

    def __post_init__(self) -> None:
        self.value = np.asarray(self.value, np.float64)
        self.bias, self.variance, self._spread = (np.zeros_like(self.value) for _ in range(3))

    def stratum(self, deleted: NDArray[Any] | Iterable[NDArray[Any]], sizes: NDArray[Any] | None = None) -> "Jackknife":
        """Add a sample.

        Args:
            deleted: [n, ...] values with each of its n documents left out, or chunks of them.
            sizes: [n] weight of each document, such as its tokens; all the same if None.
        """
        first, second, size = np.zeros_like(self.value), np.zeros_like(self.value), 0
        for chunk in [deleted] if isinstance(deleted, np.ndarray) else deleted:
            change = chunk - self.value
            first, second, size = first + change.sum(0), second + (change**2).sum(0), size + len(change)
        if size < 2:  # one document says nothing about how documents differ
            self.variance = np.full_like(self.value, np.nan)
            self.bias = np.full_like(self.value, np.nan)
            return self
        self._fewest = min(self._fewest or size, size)
        part = np.maximum(second - first**2 / size, 0) * (size - 1) / size
        self.bias = self.bias + first * (size - 1) / size
        self.variance = self.variance + part
        effective = (
            size if sizes is None else np.sum(sizes, dtype=np.float64) ** 2 / np.sum(np.square(sizes, dtype=np.float64))
        )
        self._spread = self._spread + part**2 / max(effective - 1, 1)
        return self

    @property
    def corrected(self) -> NDArray[np.float64]:
        """Value without its bias of order 1/n; NaN where a stratum has fewer than two documents."""
        return self.value - self.bias

    @property
    def error(self) -> NDArray[np.float64]:
        """Standard error."""
        return np.sqrt(self.variance)

    @property
    def margin(self) -> NDArray[np.float64]:
        """Half the width of the 95 % interval. Of a bounded number that is the same without each of n documents it is
        1 - 0.05^(1/n) (the rule of three): what fewer than so many documents do may have been missed."""
        margin = quantile(self.freedom) * self.error
        width = self.limits[1] - self.limits[0]
        if not np.isfinite(width) or not self._fewest:
            return margin
        return np.where(self.variance <= (1e-12 * width) ** 2, (1 - 0.05 ** (1 / self._fewest)) * width, margin)

    @property
    def freedom(self) -> NDArray[np.float64]:
        """Welch's degrees of freedom."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.variance > 0, self.variance**2 / self._spread, np.inf)

    @property
    def low(self) -> NDArray[np.float64]:
        """Lower end of the 95 % interval."""
        return np.maximum(self.corrected - self.margin, self.limits[0])

    @property
    def high(self) -> NDArray[np.float64]:
        """Upper end of the 95 % interval."""
        return np.minimum(self.corrected + self.margin, self.limits[1])


def ratio(numerator: NDArray[Any], denominator: NDArray[Any], limits: tuple[float, float] = (0.0, 1.0)) -> Jackknife:
    """Jackknife of sum(numerator) / sum(denominator) over documents.

    In simulated worlds of 5 to 100 documents of 20 to 2,000 tokens its interval covered the truth in 92 to 98 %.

    Args:
        numerator: [D, ...] per document.
        denominator: [D] or [D, ...].
        limits: of the ratio.
    """
    below = denominator.reshape(denominator.shape + (1,) * (numerator.ndim - denominator.ndim))
    above_all, below_all = numerator.sum(0), below.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = Jackknife(above_all / below_all, limits)
        sizes = denominator if denominator.ndim == 1 else denominator.reshape(len(denominator), -1).sum(1)
        return estimate.stratum((above_all - numerator) / (below_all - below), sizes)


def quantile(freedom: ArrayLike, of: ArrayLike = 1) -> NDArray[np.float64]:
    """The 97.5 % quantile of Student's t; of several numbers that shall all lie below it, Bonferroni's."""
    from scipy import stats

    return np.asarray(stats.t.isf((1 - LEVEL) / 2 / np.asarray(of), freedom), np.float64)


def p_value(null: NDArray[Any], observed: ArrayLike) -> NDArray[np.float64]:
    """(1 + permutations at least as large as observed) / (1 + permutations) (Phipson and Smyth 2010).

    Args:
        null: [R, ...] the statistic under R permutations; observed: [...].
    """
    value = np.asarray(observed, np.float64)
    above = (null >= value - 1e-12).sum(0)  # equal values may differ in their last bits
    return np.asarray((1.0 + above) / (1.0 + len(null)))


def benjamini_hochberg(p_values: ArrayLike) -> NDArray[np.float64]:
    """q-values of Benjamini and Hochberg (1995) over all cells of an array; NaN cells stay NaN and do not count.

    Args:
        p_values: any shape, in [0, 1].

    Returns:
        the same shape: the smallest false discovery rate at which a cell is significant.

    Raises:
        ValueError: a value outside [0, 1].
    """
    p = np.asarray(p_values, np.float64)
    q = np.full(p.shape, np.nan)
    known = ~np.isnan(p)
    values = p[known]
    if ((values < 0) | (values > 1)).any():
        raise ValueError(
            f"p_values: expected numbers in [0, 1], got one of {float(values.min())}..{float(values.max())}."
        )
    order = np.argsort(values, kind="stable")
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    ranked = np.empty_like(values)
    ranked[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    q[known] = np.minimum(ranked, 1)
    return q
