"""Numbers as words, in HTML: what the report says of its tables."""

import math

import numpy as np
import pandas as pd

from .plots_style import (
    SIGNIFICANT,
    best_value,
    corrected_floor,
    decimals,
    fixed,
    percent,
    row_decimals,
    several,
    told_apart,
)
from .report_page import safe
from .report_tables import Tables
from .resampling import benjamini_hochberg


def findings(t: Tables) -> list[str]:
    """What matters most, a sentence each, as HTML."""
    out = []
    if t.differentiation is not None:
        means = t.differentiation[t.differentiation["layer"] == "mean"]
        each = [f"{measured(row)} in {bold(row['run'])}" for _, row in means.iterrows()]
        out.append(
            f"Averaged over layers and all pairs of {t.noun}s, the divergence between the experts of two {t.noun}s is"
            f" {listed(each)}; 0 means the same experts, ln 2 = 0.693 none in common."
        )
    if t.decomposition is not None:
        out.append(growth(t))
    if t.pairs is not None:
        pairs = ranked(tested(t, t.last))
        out.append(f"In {bold(t.last)}, {extremes(pairs)} {counted(t, pairs)}")
    out += collapsed(t)
    out.append(spread(t))
    if t.specialty is not None and len(t.groups) > 1:
        found = strongest_preference(t)
        if found:
            out.append(found)
    return out


def collapsed(t: Tables) -> list[str]:
    """A sentence per run in some of whose layers all tokens of all groups go to the same K experts."""
    out = []
    for name, run in zip(t.names, t.runs, strict=True):
        used = (run.counts.sum(0) > 0).sum(-1)  # [L]
        layers = [layer for layer, count in zip(run.layers, used, strict=True) if count == run.top_k < run.num_experts]
        if layers:
            where = "in every layer" if len(layers) == len(run.layers) else f"in layer{'s' * (len(layers) > 1)} "
            where += "" if len(layers) == len(run.layers) else listed([str(layer) for layer in layers])
            out.append(
                f"In {bold(name)} every token goes to the same {run.top_k} experts {where}: such a router has"
                " collapsed, and says nothing about the texts."
            )
    return out


def bold(name: object) -> str:
    return f"<b>{safe(name)}</b>"


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def measured(row: pd.Series) -> str:
    """Value, unit and interval, with as many decimals as the interval resolves."""
    digits = row_decimals(row)
    if row["corrected"] != row["corrected"]:
        plug_in = row["js"] if "js" in row else row["delta"]
        return f"{fixed(plug_in, digits)} {row['unit']}, uncorrected: too few documents for an interval"
    return f"{fixed(row['corrected'], digits)} {row['unit']}{between(row['low'], row['high'], digits)}"


def between(low: float, high: float, digits: int) -> str:
    """An interval, or nothing where there is none."""
    return f" [{fixed(low, digits)}, {fixed(high, digits)}]" if math.isfinite(low) and math.isfinite(high) else ""


def p_value(p: float) -> str:
    return "not computed" if p != p else f"p = {p:.2g}"


def ranked(pairs: pd.DataFrame) -> pd.DataFrame:
    """Pairs of one run, the most different first."""
    return pairs.iloc[(-best_value(pairs)).argsort(kind="stable")]


def tested(t: Tables, run: str) -> pd.DataFrame:
    """Pairs of one run; without q-values where no data could have given one below the level."""
    assert t.pairs is not None
    pairs = t.of(t.pairs, run)
    if t.permutations and (benjamini_hochberg(smallest_p(pairs, t.permutations)) < SIGNIFICANT).any():
        return pairs
    return pairs.assign(q_value=math.nan)


def smallest_p(pairs: pd.DataFrame, permutations: int) -> list[float]:
    """The least p-value of each pair: one of the worlds made, and two (its mirror too) of those that exist."""
    out = []
    for a, b in zip(pairs["docs_a"].astype(int), pairs["docs_b"].astype(int), strict=True):
        out.append(max(1 / (1 + permutations), 2.0 ** (1 - a - b)))
    return out


def extremes(pairs: pd.DataFrame) -> str:
    far, near = pairs.iloc[0], pairs.iloc[-1]

    def told(row: pd.Series) -> str:
        letter = "q" if row["q_value"] == row["q_value"] else "p"
        value = row[f"{letter}_value"]
        chance = f", {letter} = {value:.2g}" if value == value else ""
        return f"{bold(row['a'])} and {bold(row['b'])}, {measured(row)}{chance}"

    if len(pairs) == 1:
        return f"the two differ as follows: {told(far)}."
    return f"most different: {told(far)}; most alike: {told(near)}."


def counted(t: Tables, pairs: pd.DataFrame) -> str:
    if not t.permutations:
        return "No noise floor was computed (permutations=0), so that no difference was tested."
    if pairs["q_value"].isna().all():
        few = (
            f"{t.permutations:,} worlds without a difference (permutations=) are"
            if _few(t, pairs)
            else "The documents are"
        )
        return f"{few} too few to tell any pair of {t.noun}s apart (no q could be below {SIGNIFICANT})."
    count = int(told_apart(pairs).sum())
    if len(pairs) == 1:
        return f"The two are {'' if count else 'not '}told apart (q {'&lt;' if count else '≥'} {SIGNIFICANT})."
    which = "All" if count == len(pairs) else "None" if not count else f"{count}"
    return f"{which} of the {len(pairs)} pairs of {t.noun}s are told apart (q &lt; {SIGNIFICANT} among all pairs)."


def _few(t: Tables, pairs: pd.DataFrame) -> bool:
    """Whether more permutations could help."""
    return bool((benjamini_hochberg(smallest_p(pairs, 10**9)) < SIGNIFICANT).any())


def floors(table: pd.DataFrame, corrected: bool) -> str:
    """The range of the noise floors, of corrected or of uncorrected values."""
    spread = corrected_floor(table)
    values = (spread if corrected else table["floor_95"]).dropna()
    if not len(values):
        return "not computed (permutations=0)"
    digits = decimals(spread.min())
    ends = f"{fixed(values.min(), digits)} to {fixed(values.max(), digits)}"
    what = "corrected values" if corrected else "uncorrected values (column js)"
    return f"{ends} for {what}: exceeded by 5 % of worlds without a difference"


def how_many(t: Tables) -> str:
    sizes = t.of(t.sizes)
    docs, tokens = sizes["docs"], sizes["tokens"]
    each = f"{docs.min():,}" if docs.min() == docs.max() else f"{docs.min():,} to {docs.max():,}"
    if len(sizes) == 1:
        return f"{several(docs.sum(), 'document')}, {several(tokens.sum(), 'token')} in {t.last}"
    amount = f"{tokens.min():,}" if tokens.min() == tokens.max() else f"{tokens.min():,} to {tokens.max():,}"
    return f"{each} document{'s' * (each != '1')} per {t.noun}, {amount} tokens each ({t.last})"


def spread(t: Tables) -> str:
    """How many experts the groups of the last run use; an order only where their intervals allow one."""
    all_experts = f"effective experts of {t.runs[0].num_experts}, mean over layers"
    mine = broad(t.of(t.sizes))
    sure = mine[mine["low"].notna()]
    if not len(sure):
        least, most = mine["effective_experts"].min(), mine["effective_experts"].max()
        ends = f"{least:.1f}" if len(mine) == 1 else f"{least:.1f} to {most:.1f}"
        bare = "uncorrected: too few documents for an interval"
        who = f"{bold(mine['group'].iloc[0])} uses" if len(mine) == 1 else f"the {t.noun}s use"
        return f"In {bold(t.last)}, {who} {ends} {all_experts} ({bare})."
    few, many = sure.loc[sure["corrected"].idxmin()], sure.loc[sure["corrected"].idxmax()]
    left_out = len(mine) - len(sure)
    noun = several(left_out, t.noun) + (" is" if left_out == 1 else " are")
    rest = f" {noun} left out, with too few documents for an interval." if left_out else ""

    def told(row: pd.Series) -> str:
        return f"{row['corrected']:.1f}{between(row['low'], row['high'], 1)}"

    if len(sure) == 1:
        return f"In {bold(t.last)}, {bold(few['group'])} uses {told(few)} {all_experts}.{rest}"
    if few["high"] < many["low"]:
        return (
            f"In {bold(t.last)}, {bold(few['group'])} is routed most narrowly, over {told(few)} {all_experts},"
            f" {bold(many['group'])} most widely, over {told(many)}.{rest}"
        )
    ends = f"{sure['low'].min():.1f} and {sure['high'].max():.1f}"
    if sure["low"].min() == sure["high"].max():
        return f"In {bold(t.last)}, all {t.noun}s use {sure['low'].min():.1f} {all_experts}.{rest}"
    return (
        f"In {bold(t.last)}, all {t.noun}s use between {ends} {all_experts}:"
        f" the ends of their intervals, which overlap too much to say which is routed most narrowly.{rest}"
    )


def broad(sizes: pd.DataFrame) -> pd.DataFrame:
    """Effective experts of each group as corrected, low and high, clipped at the number of experts."""
    ends = {
        name: np.minimum(sizes[f"effective_experts_{name}"], sizes["experts"]) for name in ("corrected", "low", "high")
    }
    return sizes.assign(**ends)


def preferences(t: Tables) -> pd.DataFrame:
    """Cells of the last run that a group uses significantly more than the mean, the strongest first."""
    assert t.specialty is not None
    mine = t.of(t.specialty)
    sure = mine[(mine["q_value"] < SIGNIFICANT) & (mine["low"] > 0)]
    sure = sure.sort_values("low", ascending=False, kind="stable")
    # The correction extrapolates and may step over what the score cannot exceed.
    return sure.assign(**{name: np.minimum(sure[name], sure["ceiling"]) for name in ("corrected", "low", "high")})


def strongest_preference(t: Tables) -> str:
    best = preferences(t)
    if not len(best):
        return (
            f"No expert of {bold(t.last)} is preferred by a {t.noun} beyond what chance explains (q &lt;"
            f" {SIGNIFICANT})."
        )
    row = best.iloc[0]
    return (
        f"In {bold(t.last)}, {len(best):,} of the {len(t.of(t.specialty)):,} cells are preferences beyond chance (q"
        f" &lt; {SIGNIFICANT}); the clearest: expert {row['expert']} of layer {row['layer']} gets"
        f" {percent(row['share'])} of the picks of {bold(row['group'])} and {percent(row['mean_share'])} on average"
        f" over {t.noun}s (specialty {row['corrected']:.2f} nats{between(row['low'], row['high'], 2)}, at most ln"
        f" {len(t.groups)} = {row['ceiling']:.2f})."
    )


def growth(t: Tables) -> str:
    assert t.decomposition is not None
    means = t.decomposition[t.decomposition["layer"] == "mean"]
    steps = list(zip(t.names, t.names[1:], strict=False))
    rows = means[means["convention"] == "divergence"]
    told = [
        f"from {bold(before)} to {bold(after)} by {measured(row)}"
        for (before, after), (_, row) in zip(steps, rows.iterrows(), strict=True)
    ]
    text = f"Differentiation changed {listed(told)}."
    if len(steps) < 2:
        return text
    first, second = (f"{bold(before)} → {bold(after)}" for before, after in steps)
    shares, unbounded = [], []
    for kind, one in means.groupby("convention", sort=False):
        ends = one.iloc[1][["share_low", "share_high"]].astype(float)
        if ends.isna().any():
            return f"{text} Documents are too few for the shares of the total."
        if np.isinf(ends).any():
            unbounded.append(f"mean {kind}")
        else:
            numbers = (*one["share_corrected"], *ends)
            shares.append(
                "{} % and {} % [{} %, {} %]".format(*(fixed(100 * x, 1) for x in numbers)) + f" (mean {kind})"
            )
    if shares:
        text += f" Of the total, {first} and {second} make {listed(shares)}; the interval is of the second."
    if unbounded:
        text += f" The total change of the {listed(unbounded)} cannot be told from 0: shares of it have no bound."
    return text


def without_tokens(t: Tables) -> str:
    if len(t.runs[0].layers) < 2:
        return "One layer was recorded: there is no step from layer to layer."
    return (
        "The runs hold counts per document but no records of tokens, so this cannot be shown; trace with"
        " record=(&quot;ids&quot;,)."
    )
