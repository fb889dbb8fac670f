"""Cells of the table: a figure of one measure in one kind of world, over many worlds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cell:
    """What is simulated.

    `simulate` makes the world of a seed, and returns figures of it by name, such as the share of intervals that cover
    the truth or of p-values at most 0.05. A figure is averaged over worlds, and its standard error is that between
    worlds; `wanted` says where each figure has to lie.
    """

    measure: str
    setting: str
    simulate: Callable[[int], Mapping[str, float]]
    wanted: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    measure: str
    setting: str
    figure: str
    mean: float
    error: float
    worlds: int
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the figure lies where it has to, or may by two standard errors."""
        return self.low - 2 * self.error <= self.mean <= self.high + 2 * self.error


def simulate(cell: Cell, worlds: int, first: int = 0) -> list[Figure]:
    """The figures of a cell over worlds with seeds first, first + 1, ...; a figure that is NaN in a world is left out
    of it."""
    rows = [cell.simulate(seed) for seed in range(first, first + worlds)]
    out = []
    for name, (low, high) in cell.wanted.items():
        values = np.array([row[name] for row in rows], float)
        values = values[~np.isnan(values)]
        mean = float(values.mean()) if len(values) else float("nan")
        # At least that of one world in as many again: where all of them agree, the next may not.
        error = max(float(values.std(ddof=1)) / len(values) ** 0.5, 1 / (2 * len(values))) if len(values) > 1 else 1.0
        out.append(Figure(cell.measure, cell.setting, name, mean, error, len(values), low, high))
    return out
