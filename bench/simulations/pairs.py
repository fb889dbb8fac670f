"""Intervals of what is read from tokens: pairs of documents, and the steps and co-activations chosen among many."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from omnigene_fast import analysis
from omnigene_fast.tracing.records import Records

from .cells import Cell
from .world import Lengths, Simulated, World, between

AT_LEAST, EXCLUDES = (0.92, 1.0), (0.0, 0.05)
LENGTHS: dict[str, Lengths] = {
    "200": lambda rng, n: np.full(n, 200),
    "50 and 800": lambda rng, n: np.resize([50, 800], n),
    "20 to 2,000": between(),
}


def cells() -> list[Cell]:
    """Pairs of streams, alike or not, whose tokens repeat the one before more or less often; and even routing."""
    out = []
    wanted = {"interval": AT_LEAST, "counts alone, interval": AT_LEAST, "counts alone, low above the truth": EXCLUDES}
    for name, lengths in LENGTHS.items():
        for stays in (0.0, 0.5, 0.9):
            setting = f"40 pairs of one stream, {name} tokens, each the one before with probability {stays}"
            out.append(Cell("pairwise", setting, _Streams(lengths, stays, 0.0), wanted))
    for stays in (0.0, 0.5):
        setting = f"40 pairs that differ, 200 tokens, each the one before with probability {stays}"
        out.append(Cell("pairwise", setting, _Streams(LENGTHS["200"], stays, 0.4), wanted))
    flow = {"flow, interval": AT_LEAST, "flow, edges with q < 0.05": EXCLUDES}
    of = "40 documents of 300 tokens, layers that choose independently,"
    out.append(Cell("selection", f"{of} even loads", _Independent(0.0), flow | {"coactivation, interval": AT_LEAST}))
    out.append(Cell("selection", f"{of} uneven loads", _Independent(1.0), flow))
    setting = "40 documents of 20 to 2,000 tokens, layers that choose by the type of token"
    wanted = {"flow, interval": AT_LEAST, "coactivation, interval": AT_LEAST}
    out.append(Cell("selection", setting, _Dependent(), wanted))
    return out


class _Streams:
    """Pairs of documents of two tasks at a distance; 0: of one stream."""

    def __init__(self, lengths: Lengths, stays: float, distance: float) -> None:
        self._lengths, self._stays, self._world = lengths, stays, World()
        self._tasks = [self._world.task(number, distance) for number in range(2)]
        shares = [self._world.shares(task) for task in self._tasks]
        self._truth = np.mean([analysis.js_divergence(*each) for each in zip(*shares, strict=True)])

    def __call__(self, seed: int) -> Mapping[str, float]:
        rng, texts = np.random.default_rng([3, seed]), []
        for number, n in enumerate(self._lengths(rng, 80)):
            drawn = rng.choice(len(self._world.base), n, p=self._tasks[number % 2])
            texts.append(drawn[np.maximum.accumulate(np.where(rng.random(n) < self._stays, 0, np.arange(n)))])
        run = self._world.written(texts, pair=[f"p{number // 2}" for number in range(80)])
        out = {}
        for words in ("", "counts alone, "):
            table = analysis.pairwise(run, by=None, permutations=0, average=True)
            mean = table.iloc[-1]
            out[f"{words}interval"] = float(mean["low"] <= self._truth <= mean["high"])
            out[f"{words}low above the truth"] = float(mean["low"] > self._truth)
            run.record = ()
        return out


class _Independent:
    """Picks that depend on nothing but the load of an expert."""

    def __init__(self, spread: float) -> None:
        self._spread = spread

    def __call__(self, seed: int) -> Mapping[str, float]:
        rng, docs, n, experts = np.random.default_rng([4, seed]), 40, 300, 128
        load = self._spread * rng.standard_normal((2, 1, experts))
        ids = np.argsort(-(load + rng.gumbel(size=(2, docs * n, experts))), -1)[..., :8].astype(np.uint8)
        token = np.zeros(docs * n, np.int32)
        doc, pos = np.repeat(np.arange(docs), n), np.tile(np.arange(n, dtype=np.int32), docs)
        table = pd.DataFrame({"doc_id": np.arange(docs), "n_tokens": n, "text_hash": None})
        records = Records(doc, pos, token, np.zeros(docs * n, np.uint8), ids)
        run = Simulated(np.zeros((docs, 2, experts), np.int64), table, 8, records)
        edges, out = analysis.flow(run), {}
        out["flow, interval"] = _inside(edges, 1.0)
        out["flow, edges with q < 0.05"] = float((edges["q_value"] < 0.05).mean())
        if not self._spread:
            pairs = analysis.coactivation(run, layers=[0])
            out["coactivation, interval"] = _inside(pairs, pairs["lift_uniform"])
        return out


class _Dependent:
    """Documents whose token types decide all layers; the lifts of the whole world are the truth."""

    def __init__(self) -> None:
        self._world = World(layers=2)
        self._task = self._world.task(0, 0.0)
        hot = self._world.incidence.reshape(-1, 2, self._world.experts).transpose(1, 0, 2)
        share = self._task @ hot  # [L, E]
        joint = [[(first * self._task[:, None]).T @ second for second in hot] for first in hot]
        with np.errstate(invalid="ignore", divide="ignore"):
            self._within = joint[0][0] / np.outer(share[0], share[0])
            self._across = joint[0][1] / np.outer(share[0], share[1])

    def __call__(self, seed: int) -> Mapping[str, float]:
        rng, world = np.random.default_rng([6, seed]), self._world
        tokens, _ = world.texts(rng, [self._task], [40], 100, between())
        texts = [rng.permutation(np.repeat(np.arange(len(row)), row)) for row in tokens]
        run = world.written(texts)
        edges, pairs = analysis.flow(run), analysis.coactivation(run, layers=[0])
        return {
            "flow, interval": _inside(edges, self._across[edges["expert"], edges["next_expert"]]),
            "coactivation, interval": _inside(pairs, self._within[pairs["a"], pairs["b"]]),
        }


def _inside(table: pd.DataFrame, truth: ArrayLike) -> float:
    return float(((table["lift_low"] <= truth) & (truth <= table["lift_high"]))[table["lift_low"].notna()].mean())
