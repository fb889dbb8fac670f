"""Everything the report shows, as tables: the measures of every run, one under the other with a column `run`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .coactivation import flow
from .decomposition import decompose
from .divergence import differentiation, divergence_tables
from .entropy import shannon
from .groups import MOST_GROUPS, distinct, group, label_column, weights_of
from .load import load
from .resampling import Jackknife
from .specialty import specialty

STEPS = 5  # that `collect` reports per run, and one more for all
EDGES = 40  # strongest steps between layers that are drawn, per run
SMALLEST_PATH = 0.01  # share of the tokens that a drawn step must carry: a lift of rare steps is noise


@dataclass
class Tables:
    """Measures of all runs. What could not be measured is None, and `notes` has the sentence that says why."""

    names: list[str]  # of the runs, all different
    runs: list[Any]
    by: str
    groups: list[str]
    sizes: pd.DataFrame  # run, group, docs, tokens, effective experts (mean over layers), experts
    load: pd.DataFrame
    specialty: pd.DataFrame | None = None
    pairs: pd.DataFrame | None = None  # mean over layers
    pairs_by_layer: pd.DataFrame | None = None
    differentiation: pd.DataFrame | None = None  # layer: index or "mean"
    decomposition: pd.DataFrame | None = None
    flow: pd.DataFrame | None = None
    permutations: int = 0
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def noun(self) -> str:
        """What a group is called."""
        return "task" if self.by == "task" else "group"

    @property
    def last(self) -> str:
        """The run that the words speak of where they speak of one."""
        return self.names[-1]

    def of(self, table: pd.DataFrame, run: str | None = None) -> pd.DataFrame:
        """The rows of one run, the last by default."""
        return table[table["run"] == (self.last if run is None else run)]


def check(runs: Sequence[Any], by: str) -> list[str]:
    """The groups of the runs; ValueError unless the runs can stand side by side."""
    if not runs:
        raise ValueError("runs: expected at least one run, got none; open one with omnigene_fast.open_trace.")
    first, names = runs[0], distinct(runs)
    found: list[str] = []
    for run, name in zip(runs, names, strict=True):
        label_column(run, by)
        groups = group(run, by, most=MOST_GROUPS).names
        if found and groups != found:
            odd = sorted(set(groups) ^ set(found))
            raise ValueError(
                f"runs: expected the same values of {by!r} in {names[0]!r} and {name!r}, got {odd!r} in one"
                " of them only; report on them one by one."
            )
        found = groups
        if weights_of(run) != weights_of(first):
            raise ValueError("runs: expected equal_weights of all runs or of none, got some with it and some without.")
        if list(run.layers) != list(first.layers) or run.num_experts != first.num_experts or run.top_k != first.top_k:
            raise ValueError(
                f"runs: expected the layers, experts and top-k of {names[0]!r}, got others in {name!r};"
                " report on them one by one."
            )
    return found


def collect(
    runs: Sequence[Any], by: str, permutations: int, seed: int, step: Callable[[str], None] = lambda _: None
) -> Tables:
    """Measure the runs; `step` is told what comes next."""
    groups, names = check(runs, by), distinct(runs)
    several = len(groups) > 1
    parts: dict[str, list[pd.DataFrame]] = {}

    def add(kind: str, name: str, table: pd.DataFrame) -> None:
        parts.setdefault(kind, []).append(table.assign(run=name)[["run", *table.columns]])

    for name, run in zip(names, runs, strict=True):
        step(f"{name}: load")
        add("load", name, load(run, by))
        add("sizes", name, _sizes(run, by))
        step(f"{name}: specialty")
        add("specialty", name, specialty(run, by) if several else _shares(run, by))
        step(f"{name}: divergence")
        if several:
            by_layer, summary = divergence_tables(run, by, permutations=permutations, seed=seed)
            add("pairs_by_layer", name, by_layer)
            add("pairs", name, summary)
        step(f"{name}: differentiation")
        if several:
            add("differentiation", name, differentiation(run, by, permutations=permutations, seed=seed))
        step(f"{name}: flow")
        if has_tokens(run) and len(run.layers) > 1:
            add("flow", name, _with_share(flow(run), run))
    tables = {kind: pd.concat(frames, ignore_index=True) for kind, frames in parts.items()}
    out = Tables(names, list(runs), by, groups, **{str(kind): table for kind, table in tables.items()})
    out.permutations = permutations
    step("decomposition")
    if several:
        _decompose(out, permutations, seed)
    return out


def has_tokens(run: Any) -> bool:
    """Whether the run has a record per token, and not only counts per document."""
    return "ids" in run.record


def strongest(edges: pd.DataFrame) -> pd.DataFrame:
    """The steps of one run with the largest lift among those that enough tokens take, by the documents that chose."""
    edges = edges[(edges["tokens"] > 0) & edges["lift"].notna()]  # of experts that the other half never picks: none
    often = edges[edges["share"] >= SMALLEST_PATH]
    if len(often) < EDGES:
        often = edges.sort_values("share", ascending=False, kind="stable").head(2 * EDGES)
    return often.sort_values("lift_choice", ascending=False, kind="stable").head(EDGES)


def _with_share(edges: pd.DataFrame, run: Any) -> pd.DataFrame:
    """Steps with the share of all tokens that take them."""
    return edges.assign(share=edges["tokens"] / int(run.documents["n_tokens"].sum()))


def _sizes(run: Any, by: str) -> pd.DataFrame:
    """What the groups hold, and their effective experts averaged over layers: a document is left out of all at once."""
    groups = group(run, by)

    def effective(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            share = counts / counts.sum(-1, keepdims=True)
        return np.asarray(np.exp(shannon(share)).mean(-1))

    estimates = [
        Jackknife(effective(sums)).stratum(map(effective, groups.without_one(g)), groups.sizes(g))
        for g, sums in enumerate(groups.sums)
    ]
    return pd.DataFrame(
        {
            "group": groups.names,
            "docs": groups.docs,
            "tokens": groups.tokens,
            "effective_experts": [float(one.value) for one in estimates],
            "effective_experts_corrected": [float(one.corrected) for one in estimates],
            "effective_experts_low": [float(one.low) for one in estimates],
            "effective_experts_high": [float(one.high) for one in estimates],
            "experts": groups.sums.shape[-1],
        }
    )


def _shares(run: Any, by: str) -> pd.DataFrame:
    """What `specialty` has for one group: its shares."""
    groups = group(run, by)
    experts = groups.sums.shape[-1]
    table = pd.MultiIndex.from_product([groups.names, groups.layers, range(experts)]).to_frame(index=False)
    table.columns = ["group", "layer", "expert"]
    share = groups.probabilities.ravel()
    return table.assign(picks=groups.sums.ravel().astype(int), share=share, mean_share=share, specialty=0.0)


def _decompose(tables: Tables, permutations: int, seed: int) -> None:
    runs = tables.runs
    if len(runs) not in (2, 3):
        count = "only one run was given" if len(runs) == 1 else f"{len(runs)} runs were given"
        tables.notes["decomposition"] = f"This compares two runs (before, after) or three (base, CPT, SFT); {count}."
        return
    try:
        # With two runs the second stage is no change at all, and its rows are left out.
        table = decompose(runs[0], runs[1], runs[-1], tables.by, permutations=permutations, seed=seed, per_layer=True)
    except ValueError as error:
        tables.notes["decomposition"] = f"The runs cannot be paired by document: {error}"
        return
    tables.decomposition = table if len(runs) == 3 else table[table["stage"] == "d_cpt"].reset_index(drop=True)
