"""Coverage of the 95 % intervals: documents of 20 to 2,000 tokens, alike within a task or not."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from omnigene_fast import analysis
from omnigene_fast.analysis.load import MEASURES, balance
from omnigene_fast.analysis.resampling import ratio

from .cells import Cell
from .world import Lengths, World, about, between

COVERS, AT_LEAST = (0.92, 0.98), (0.92, 1.0)
SETTINGS: dict[str, tuple[int, float, Lengths]] = {
    f"{docs} documents of {name}, dispersion {dispersion}": (docs, dispersion, lengths)
    for docs in (5, 10, 20, 50, 100)
    for dispersion in (20, 100, 500)
    for name, lengths in (("20 to 2,000 tokens", between()), ("about 300 tokens", about(300)))
}

EVEN = {f"even routing, {name}": SETTINGS[name] for name in SETTINGS if name.startswith(("10 ", "50 "))}


def cells() -> list[Cell]:
    """A cell of every measure per setting; of 5 documents coverage is shown and not asked for.

    An interval may cover more often where the truth lies at an end of what is possible, as that of even routing does.
    """
    out = []
    for name, setting in [*SETTINGS.items(), *EVEN.items()]:
        figures = [
            "specialty",
            "specialty, equal weights",
            "domain",
            *MEASURES,
            "differentiation",
            "differentiation, equal weights",
            "decompose, d_cpt",
            "ratio (saturation, locality)",
        ]
        few, even = setting[0] < 10, name in EVEN
        wanted = dict.fromkeys(figures, (0.0, 1.0) if few else AT_LEAST if even else COVERS)
        if not few:
            wanted |= {"max_vio": AT_LEAST, "gini": AT_LEAST}
        out.append(Cell("coverage", name, _simulation(*setting, even), wanted))
    return out


class _simulation:
    """Coverage in one world, of all cells, layers and groups."""

    def __init__(self, docs: int, concentration: float, lengths: Lengths, even: bool) -> None:
        base = World(even=even)
        self._settings, self._worlds = ([docs, docs], concentration, lengths), [base, base.trained(2, 0.3)]
        self._worlds.append(self._worlds[1].trained(3, 0.1))
        self._tasks = [base.task(number, 0.0 if even else 1.0) for number in range(2)]

    def __call__(self, seed: int) -> Mapping[str, float]:
        rng = np.random.default_rng([1, seed])
        texts = self._worlds[0].texts(rng, self._tasks, *self._settings)
        runs = [world.routed(*texts) for world in self._worlds]
        domain, load = analysis.domain(runs[0]), analysis.load(runs[0])
        truth, K = np.stack([self._worlds[0].shares(task) for task in self._tasks]), self._worlds[0].top_k
        out = {"domain": _covers(domain["low"], truth * K, domain["high"])}
        for place, name in enumerate(MEASURES):
            out[name] = _covers(load[f"{name}_low"], balance(truth)[..., place], load[f"{name}_high"])
        differing = [self._differentiation(world) for world in self._worlds]
        for weights, run in (("", runs[0]), (", equal weights", analysis.equal_weights(runs[0]))):
            table = analysis.differentiation(run, permutations=0)
            out[f"differentiation{weights}"] = _covers(table["low"], differing[0], table["high"])
            table = analysis.specialty(run)
            out[f"specialty{weights}"] = _covers(table["low"], np.log(truth / truth.mean(0)), table["high"])
        growth = analysis.decompose(runs[0], runs[1], runs[2], permutations=0)
        change = growth[(growth["stage"] == "d_cpt") & (growth["convention"] == "divergence")]
        out["decompose, d_cpt"] = _covers(change["low"], (differing[1] - differing[0])[-1:], change["high"])
        tokens = texts[1]["n_tokens"].to_numpy()
        rates = rng.beta(0.6 * self._settings[1], 0.4 * self._settings[1], len(tokens))
        share = ratio(rng.binomial(tokens, rates), tokens)
        out["ratio (saturation, locality)"] = _covers(share.low, np.array(0.6), share.high)
        return out

    def _differentiation(self, world: World) -> NDArray[np.float64]:
        shares = [world.shares(task) for task in self._tasks]
        pairs = [analysis.js_divergence(*each) for each in zip(*shares, strict=True)]
        return np.array([*pairs, np.mean(pairs)])


def _covers(low: object, truth: NDArray[np.float64], high: object) -> float:
    ends = [np.asarray(end, np.float64) for end in (low, high)]
    known = np.isfinite(ends[0])
    return float(((ends[0] <= truth.ravel()) & (truth.ravel() <= ends[1]))[known].mean())
