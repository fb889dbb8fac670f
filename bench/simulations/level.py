"""Level of the tests and truth of the floors where all groups have one expected routing; power where they differ."""

from collections.abc import Mapping, Sequence

import numpy as np

from omnigene_fast import analysis

from .cells import Cell
from .world import Lengths, World, about, between

LEVEL = (0.0, 0.07)
FLOOR = (0.85, 1.15)  # js over its floor
# Median and spread (of the logarithm) of the tokens of the texts that the demo ships, by family.
FAMILIES = (
    (370, 0.4), (895, 0.4), (700, 0.01), (147, 0.15), (266, 0.2), (288, 0.2), (580, 0.2), (457, 0.15), (290, 0.1),
    (621, 0.03), (591, 0.4), (147, 0.15),
)  # fmt: skip
Setting = tuple[list[int], float | Sequence[float], Lengths | list[Lengths]]
PAIRS: dict[str, Setting] = {
    "10 and 10 documents, median length 200": ([10, 10], 50, about(200, 0.8)),
    "50 and 50 documents, median length 200": ([50, 50], 50, about(200, 0.8)),
    "5 and 5 documents of 20 to 2,000 tokens": ([5, 5], 50, between()),
    "10 and 10 documents of 20 to 2,000 tokens": ([10, 10], 50, between()),
    "20 and 20 documents of 20 to 2,000 tokens": ([20, 20], 50, between()),
    "10 of length 60 and 10 of 900": ([10, 10], 50, [about(60), about(900)]),
    "5 short (60) and 100 long (900)": ([5, 100], 50, [about(60), about(900)]),
    "5 long (900) and 100 short (60)": ([5, 100], 50, [about(900), about(60)]),
    "20 of dispersion 20 and 20 of 500": ([20, 20], [20, 500], about(300, 0.5)),
    "5 of dispersion 20 and 50 of 500": ([5, 50], [20, 500], about(300, 0.5)),
    "5 of dispersion 20 and 5 of 500, 20 to 2,000 tokens": ([5, 5], [20, 500], between()),
}
MANY: dict[str, Setting] = {
    "12 families of 10, the demo's lengths": ([10] * 12, 50, [about(*one) for one in FAMILIES]),
    "12 families of 10, dispersions 20 to 500": (
        [10] * 12,
        [20, 100, 20, 200, 50, 50, 20, 20, 300, 500, 20, 200],
        [about(*one) for one in FAMILIES],
    ),
    "12 families of 3": ([3] * 12, 50, about(300, 0.5)),
    "12 families of 5, one long": ([5] * 12, 50, [about(1500, 0.2), *[about(100, 0.2)] * 11]),
}
POWER = {name: PAIRS[name] for name in list(PAIRS)[:2] + list(PAIRS)[4:6]}


def cells() -> list[Cell]:
    """Every world of equal routing, and of four the same with routing that differs."""
    out = []
    for name, setting in {**PAIRS, **MANY}.items():
        wanted = dict.fromkeys(("differentiation p <= 0.05", "specialty, a group with q < 0.05"), LEVEL)
        wanted |= {"specialty p <= 0.05": LEVEL, "js / floor": FLOOR}
        if name in PAIRS:
            wanted |= dict.fromkeys(("divergence of a layer p <= 0.05", "divergence_summary p <= 0.05"), LEVEL)
            wanted |= {"equal weights, differentiation p <= 0.05": LEVEL, "equal weights, js / floor": FLOOR}
        out.append(Cell("level", name, _simulation(setting, 0.0), wanted))
    for name, setting in POWER.items():
        wanted = {"divergence_summary p <= 0.05": (0.5, 1.0)}
        out.append(Cell("power, groups that differ by 0.6", name, _simulation(setting, 0.6), wanted))
    return out


class _simulation:
    """The figures of one world; `distance` 0: all groups are routed alike."""

    def __init__(self, setting: Setting, distance: float) -> None:
        self._setting, self._distance, self._world = setting, distance, World()

    def __call__(self, seed: int) -> Mapping[str, float]:
        docs, concentration, lengths = self._setting
        tasks = [self._world.task(group, self._distance) for group in range(len(docs))]
        run = self._world.run(np.random.default_rng([5, seed]), tasks, docs, concentration, lengths)
        whole = analysis.differentiation(run, permutations=199, seed=seed).iloc[-1]
        cells = analysis.specialty(run)
        out = {
            "differentiation p <= 0.05": whole["p_value"] <= 0.05,
            "js / floor": whole["js"] / whole["floor"],
            "specialty p <= 0.05": (cells["p_value"] <= 0.05).mean(),
            "specialty, a group with q < 0.05": (cells.groupby("group")["q_value"].min() < 0.05).mean(),
        }
        if len(docs) == 2:
            by_layer, summary = analysis.divergence_tables(run, permutations=199, seed=seed)
            out["divergence of a layer p <= 0.05"] = (by_layer["p_value"] <= 0.05).mean()
            equal = analysis.differentiation(analysis.equal_weights(run), permutations=199, seed=seed).iloc[-1]
            out["equal weights, differentiation p <= 0.05"] = equal["p_value"] <= 0.05
            out["equal weights, js / floor"] = equal["js"] / equal["floor"]
            out["divergence_summary p <= 0.05"] = summary["p_value"].iloc[0] <= 0.05
        return out
