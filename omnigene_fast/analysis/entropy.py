"""Entropy of what a router returned, whether it returned logits or probabilities."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .groups import check_unit


def router_entropy(values: ArrayLike, base: str = "nats") -> NDArray[np.float64]:
    """Entropy of the full softmax of each token.

    Gemma-4's router returns probabilities in the field that transformers calls logits; a softmax of those gives 3.98
    bits where 2.4 is true. So rows that are non-negative and sum to 1 are taken as probabilities, all others as logits.

    Args:
        values: [..., E] floating, finite; a tensor must be on the CPU.
        base: "nats" (at most ln E) or "bits".

    Returns:
        [...] float64.

    Raises:
        ValueError: no expert, a number that is not finite, or probabilities in some rows and logits in others.
    """
    unit = check_unit(base)
    rows = np.asarray(values, np.float64)
    if rows.ndim < 1 or rows.shape[-1] < 1:
        raise ValueError(f"values: expected [..., E] with at least one expert, got shape {rows.shape}.")
    if not np.isfinite(rows).all():
        raise ValueError("values: expected finite numbers, got NaN or infinity.")
    if not is_probability(rows):
        rows = np.exp(rows - rows.max(-1, keepdims=True))
    rows = rows / rows.sum(-1, keepdims=True)
    return shannon(rows) * unit


def shannon(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy in nats of distributions [..., E]; 0 ln 0 = 0."""
    return np.asarray(-(p * np.log(np.maximum(p, 1e-300))).sum(-1))


def is_probability(rows: NDArray[Any]) -> bool:
    """True if every row is a distribution (to the 1 % that a sum in float16 or bfloat16 may be off), False if none is.

    Raises:
        ValueError: some rows are and some are not.
    """
    each = (rows >= 0).all(-1) & (np.abs(rows.sum(-1) - 1) < 1e-2)
    if each.any() and not each.all():
        raise ValueError(
            f"values: expected probabilities in all rows or logits in all, got {int(each.sum())} of {each.size} rows"
            " that are non-negative with sum 1."
        )
    return bool(each.all())
