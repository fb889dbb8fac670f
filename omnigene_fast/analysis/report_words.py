"""Numbers as words, in HTML: what the report says of its tables."""

import math

import pandas as pd

from .plots_style import above_floor, best_value, percent
from .report_page import safe
from .report_tables import Tables

SIGNIFICANT = 0.05  # q-value of a specialty that the words call a preference


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
        pairs = ranked(t.of(t.pairs))
        out.append(f"In {bold(t.last)}, {extremes(pairs)}")
        out.append(counted(t, pairs))
    out.append(spread(t))
    if t.specialty is not None and len(t.groups) > 1:
        found = strongest_preference(t)
        if found:
            out.append(found)
    return out


def bold(name: object) -> str:
    return f"<b>{safe(name)}</b>"


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def measured(row: pd.Series) -> str:
    """Value, unit and interval, with as many decimals as the interval resolves."""
    plug_in = row["js"] if "js" in row else row["delta"]
    if row["corrected"] != row["corrected"]:
        return f"{plug_in:.3f} {row['unit']} (one document in a group: no interval)"
    half = (row["high"] - row["low"]) / 2
    digits = min(5, max(3, -math.floor(math.log10(half)))) if half > 0 else 3
    return f"{row['corrected']:.{digits}f} {row['unit']}{between(row['low'], row['high'], digits)}"


def between(low: float, high: float, digits: int) -> str:
    """An interval, or nothing where there is none."""
    return f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) and math.isfinite(high) else ""


def p_value(p: float) -> str:
    return "not computed" if p != p else f"p = {p:.2g}"


def ranked(pairs: pd.DataFrame) -> pd.DataFrame:
    """Pairs of one run, the most different first."""
    return pairs.iloc[(-best_value(pairs)).argsort(kind="stable")]


def extremes(pairs: pd.DataFrame) -> str:
    far, near = pairs.iloc[0], pairs.iloc[-1]

    def told(row: pd.Series) -> str:
        floor = "" if row["floor_95"] != row["floor_95"] else f", noise floor {row['floor_95']:.3f}"
        return f"{bold(row['a'])} and {bold(row['b'])}, {measured(row)}{floor}"

    if len(pairs) == 1:
        return f"the two differ as follows: {told(far)}."
    return f"most different: {told(far)}; most alike: {told(near)}."


def counted(t: Tables, pairs: pd.DataFrame) -> str:
    if pairs["floor_95"].isna().all():
        return "No noise floor was computed (permutations=0)."
    count = int(above_floor(pairs).sum())
    if len(pairs) == 1:
        return "The difference is above the noise floor." if count else "The difference is not above the noise floor."
    which = "All" if count == len(pairs) else "None" if not count else f"{count}"
    return f"{which} of the {len(pairs)} pairs of {t.noun}s are above their noise floor."


def floors(table: pd.DataFrame) -> str:
    floors = table["floor_95"].dropna()
    if not len(floors):
        return "not computed (permutations=0)"
    return f"{floors.min():.3f} to {floors.max():.3f}: exceeded by 5 % of shuffled labels"


def how_many(t: Tables) -> str:
    sizes = t.of(t.sizes)
    docs, tokens = sizes["docs"], sizes["tokens"]
    each = f"{docs.min():,}" if docs.min() == docs.max() else f"{docs.min():,} to {docs.max():,}"
    if len(sizes) == 1:
        return f"{each} documents, {tokens.sum():,} tokens in {t.last}"
    return f"{each} documents per {t.noun}, {tokens.min():,} to {tokens.max():,} tokens each ({t.last})"


def effective(load: pd.DataFrame) -> pd.Series:
    return load["effective_experts_corrected"].fillna(load["effective_experts"])


def spread(t: Tables) -> str:
    mine = t.of(t.load)
    means = effective(mine).groupby(mine["group"]).mean()
    all_experts = t.runs[0].num_experts
    few, many = means.idxmin(), means.idxmax()
    if len(means) == 1:
        return (
            f"In {bold(t.last)}, {bold(few)} spreads over {means[few]:.1f} effective experts of {all_experts} (mean"
            " over layers)."
        )
    return (
        f"In {bold(t.last)}, {bold(few)} is routed most narrowly, over {means[few]:.1f} effective experts of"
        f" {all_experts} (mean over layers), {bold(many)} most widely, over {means[many]:.1f}."
    )


def preferences(t: Tables) -> pd.DataFrame:
    """Cells of the last run that a group uses significantly more than the mean, the strongest first."""
    assert t.specialty is not None
    mine = t.of(t.specialty)
    sure = mine[(mine["q_value"] < SIGNIFICANT) & (mine["low"] > 0)]
    return sure.sort_values("low", ascending=False, kind="stable")


def strongest_preference(t: Tables) -> str:
    best = preferences(t)
    if not len(best):
        return (
            f"No expert of {bold(t.last)} is preferred by a {t.noun} beyond what chance explains (q < {SIGNIFICANT})."
        )
    row = best.iloc[0]
    return (
        f"In {bold(t.last)}, {len(best):,} of the {len(t.of(t.specialty)):,} cells are preferences beyond chance (q"
        f" < {SIGNIFICANT}); the clearest: expert {row['expert']} of layer {row['layer']} gets"
        f" {percent(row['share'])} of the picks of {bold(row['group'])} and {percent(row['mean_share'])} on average"
        f" over {t.noun}s (specialty {row['specialty']:.2f} nats [{row['low']:.2f}, {row['high']:.2f}], at most ln"
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
    shares = [
        f"{_share(one['share'].iloc[0])} and {_share(one['share'].iloc[1])}{_share_interval(one.iloc[1])} (mean {kind})"
        for kind, one in means.groupby("convention", sort=False)
    ]
    return f"{text} Of the total, {first} and {second} make {listed(shares)}; the interval is of the second."


def _share(share: float) -> str:
    return "undefined" if share != share else percent(share)


def _share_interval(row: pd.Series) -> str:
    low, high = row["share_low"], row["share_high"]
    if not (math.isfinite(low) and math.isfinite(high)):
        return " (no bounded interval)"
    return f" [{percent(low)}, {percent(high)}]"


def without_tokens(t: Tables) -> str:
    if len(t.runs[0].layers) < 2:
        return "One layer was recorded: there is no step from layer to layer."
    return (
        "The runs hold counts per document but no records of tokens, so this cannot be shown; trace with"
        " record=(&quot;ids&quot;,)."
    )
