"""The sections of the report: what each figure shows, in words with the numbers filled in."""

import math
from collections.abc import Iterator

import pandas as pd

from . import plots
from .plots_style import SIGNIFICANT, best_value, percent, several, told_apart
from .report_method import METHOD, REFERENCES
from .report_page import Section, items, safe
from .report_tables import Tables, strongest
from .report_words import (
    between,
    bold,
    broad,
    counted,
    extremes,
    floors,
    growth,
    how_many,
    listed,
    measured,
    p_value,
    preferences,
    ranked,
    spread,
    strongest_preference,
    tested,
    without_tokens,
)

RESAMPLED = "95 %, jackknife over documents"


def sections(t: Tables) -> Iterator[Section]:
    """Every section up to the tokens."""
    yield heatmaps(t)
    if t.pairs is not None:
        yield matrix(t)
        yield curves(t)
        yield stages(t)
        yield tree(t)
    else:
        only = f"All documents are of one {t.noun}, {bold(t.groups[0])}"
        needed = "this needs at least two values of the label."
        for anchor, title in (
            ("divergence", f"How different the {t.noun}s are"),
            ("layers", "Where in the model they differ"),
            ("stages", "What each stage of training changed"),
            ("tree", f"Which {t.noun}s are alike"),
        ):
            yield Section(anchor, title, [f"{only}: {needed}"])
    yield paths(t)


def heatmaps(t: Tables) -> Section:
    assert t.specialty is not None
    experts, top_k, several_groups = t.runs[0].num_experts, t.runs[0].top_k, len(t.groups) > 1
    words = [
        f"{'Each panel' if several_groups else 'The panel'} is one {t.noun}, each row a layer, each column an expert;"
        " the colour says how often the router"
        f" of the layer sends the tokens of that {t.noun} to the expert. Bright: much more often than if all"
        f" {experts} experts were used alike (1 x is {percent(1 / experts, 2)} of the picks; a token picks {top_k}"
        f" different experts, so that no expert can exceed {experts / top_k:.3g} x). Experts have numbers within"
        " their layer only: expert 5 of layer 3 and expert 5 of layer 4 are different networks.",
        (
            "Look for panels with bright spots of their own: those experts are the specialists. "
            if several_groups
            else ""
        )
        + spread(t),
    ]
    if several_groups:
        found = strongest_preference(t)
        words += [found] if found else []
    best = preferences(t).head(200) if several_groups else pd.DataFrame()
    tables = []
    if len(best):
        columns = ["group", "layer", "expert", "share", "mean_share", "corrected", "low", "high", "q_value", "docs"]
        title = f"Table: the {len(best)} strongest preferences in {t.last} (q < {SIGNIFICANT})"
        tables.append((title, best[columns].rename(columns={"corrected": "specialty"}).reset_index(drop=True)))
    return Section(
        "experts",
        f"Which experts each {t.noun} uses" if several_groups else "Which experts are used",
        words,
        plots.heatmaps(t.specialty, t.sizes, top_k),
        f"Heat maps of the share of picks by layer and expert, a panel per {t.noun}",
        {
            "Unit": "share of the picks of a layer, as a multiple of an even spread (logarithmic colours)",
            "n": how_many(t),
            "Interval and p-value": "of the specialty, per cell, in the table and the CSV; q: Benjamini-Hochberg"
            if several_groups
            else "none: they would compare groups",
        },
        ("specialty.csv",),
        tables,
    )


def matrix(t: Tables) -> Section:
    assert t.pairs is not None
    shown = pd.concat([tested(t, name) for name in t.names], ignore_index=True)
    pairs = ranked(t.of(shown))
    unit = pairs["unit"].iloc[0]
    words = [
        f"Each cell compares two {t.noun}s: 0 means that their tokens go to the same experts equally often, ln 2 ="
        " 0.693 nats that they share no expert. The number is the mean over the layers of the Jensen-Shannon"
        f" divergence, corrected for the finite number of documents. {t.noun.capitalize()}s with similar routing"
        f" stand side by side. A grey cell could be noise: documents as long and as unlike each other as these differ"
        f" as much where both are routed alike (q ≥ {SIGNIFICANT}, corrected for the number of pairs).",
        f"In {bold(t.last)}, {extremes(pairs)} {counted(t, pairs)}",
    ]
    order = plots.tree_order(t.of(t.pairs))
    table = shown.assign(told_apart=told_apart(shown).astype(object).where(shown["q_value"].notna()))
    return Section(
        "divergence",
        f"How different the {t.noun}s are",
        words,
        plots.divergence_matrix(shown, order),
        f"Matrix of the divergence of every two {t.noun}s",
        {
            "Unit": f"{unit}, mean over {len(t.runs[0].layers)} layers",
            "n": how_many(t),
            "Interval": RESAMPLED,
            "Noise floor": floors(pairs, corrected=False),
        },
        ("divergence.csv", "divergence_by_layer.csv"),
        [(f"Table: {several(len(table), 'pair')} with interval and noise floor", table)],
    )


def curves(t: Tables) -> Section:
    assert t.differentiation is not None
    table = t.differentiation
    per_layer = t.of(table[table["layer"] != "mean"])
    values = best_value(per_layer)
    most, least = per_layer.loc[values.idxmax()], per_layer.loc[values.idxmin()]
    pairs = len(t.groups) * (len(t.groups) - 1) // 2
    mean_of = f"the divergence of the two {t.noun}s"
    if pairs > 1:
        mean_of = f"the mean divergence over all {pairs} pairs of {t.noun}s"
    words = [
        f"Expert differentiation of a layer is {mean_of}: the higher, the more the layer sends"
        f" different {t.noun}s to different experts. The line is corrected for the finite number of documents; the"
        " band is its 95 % interval.",
    ]
    if t.permutations:
        words[0] += (
            f" The dashed line is the noise floor for corrected values: a layer that does not tell the {t.noun}s apart"
            " stays below it in 95 % of the cases. The hover has the uncorrected value and its floor, which are both"
            " higher."
        )
    if len(per_layer) > 1:
        words.append(
            f"In {bold(t.last)}, layer {most['layer']} separates the {t.noun}s most ({measured(most)}), layer"
            f" {least['layer']} least ({measured(least)})."
        )
    means = [f"{bold(row['run'])} {measured(row)}" for _, row in table[table["layer"] == "mean"].iterrows()]
    words.append(f"Mean over layers: {'; '.join(means)}.")
    docs, tokens = per_layer[["docs", "tokens"]].iloc[0]
    return Section(
        "layers",
        "Where in the model they differ",
        words,
        plots.differentiation_curves(table),
        "Expert differentiation by layer, a line per run",
        {
            "Unit": f"{most['unit']}, mean over pairs",
            "n": f"{several(docs, 'document')}, {several(tokens, 'token')} in {t.last}",
            "Interval": RESAMPLED,
            "Noise floor": floors(per_layer, corrected=True),
        },
        ("differentiation.csv",),
        [("Table: differentiation by layer", table)],
    )


def stages(t: Tables) -> Section:
    title = "What each stage of training changed" if len(t.names) != 2 else "What changed between the runs"
    table = t.decomposition
    if table is None:
        return Section("stages", title, [safe(t.notes["decomposition"])])
    means = table[table["layer"] == "mean"]
    words = [
        f"A bar is the change of expert differentiation (the mean over pairs of {t.noun}s and over layers) from one"
        " run to the next; above 0, the experts moved apart. The runs are paired: each document is compared with"
        " itself. The two panels are two ways to average, which cannot be mixed: the mean of the divergence, and"
        " the mean of its square root, the distance.",
        growth(t),
    ]
    if len(t.names) == 3:
        words.append(
            f"The runs are taken in the order given: {bold(t.names[0])} (base), {bold(t.names[1])} (CPT, continued"
            f" pretraining), {bold(t.names[2])} (SFT, fine-tuning). A share of the total is only meaningful where the"
            " total is clearly above 0; its interval says so."
        )
    names = [f"{before} → {after}" for before, after in zip(t.names, t.names[1:], strict=False)]
    return Section(
        "stages",
        title,
        words,
        plots.decomposition_bars(means, names),
        "Change of expert differentiation from run to run",
        {
            "Unit": "nats for the divergence, the square root of nats for the distance",
            "n": f"{int(means['docs'].iloc[0]):,} documents, the same in every run",
            "Interval": "95 %, jackknife over documents, paired; of the shares: Fieller",
            "p-value": "each document's two runs swapped at random: "
            + ", ".join(
                f"{name} {p_value(p)}"
                for name, p in zip(names, means[means["convention"] == "divergence"]["p_value"], strict=True)
            ),
        },
        ("decomposition.csv",),
        [("Table: both conventions", means)],
    )


def tree(t: Tables) -> Section:
    assert t.pairs is not None
    title = f"Which {t.noun}s are alike"
    if len(t.groups) < 3:
        return Section("tree", title, [f"A tree needs at least three {t.noun}s; these documents have two."])
    pairs = ranked(t.of(t.pairs))
    near = pairs.iloc[-1]
    words = [
        f"{t.noun.capitalize()}s that are routed alike are joined on the left, at their divergence; a long"
        f" horizontal line is a {t.noun}, or a family of them, that keeps experts of its own. The tree is a summary"
        " of the matrix above (average linkage) and says nothing that the matrix does not.",
        f"In {bold(t.last)}, the first to be joined are {bold(near['a'])} and {bold(near['b'])}, at {measured(near)}.",
    ]
    if len(t.names) > 1:
        words[0] += " All runs share one scale: longer branches mean experts further apart."
    return Section(
        "tree",
        title,
        words,
        plots.task_tree(t.pairs),
        f"Tree of the {t.noun}s by divergence",
        {"Unit": f"{near['unit']}, mean over layers", "n": how_many(t), "Interval": "none: see the matrix"},
        ("divergence.csv",),
    )


def many(some: int, of: int) -> str:
    """The subject and verb of a sentence about some of the drawn steps."""
    if of == 1:
        return "the step is" if some else "the step is not surely"
    return f"{some if some else 'none'} of the {of} steps {'is' if some < 2 else 'are'}"


def paths(t: Tables) -> Section:
    title = "Paths through the layers"
    if t.flow is None:
        return Section("paths", title, [without_tokens(t)])
    drawn = pd.concat([strongest(t.of(t.flow, name)) for name in t.names], ignore_index=True)
    last = drawn["run"].iloc[-1]
    mine, run = t.of(drawn, last), t.runs[t.names.index(last)]
    first, sure = mine.iloc[0], int((mine["q_value"] < SIGNIFICANT).sum())
    words = [
        "A token visits experts in every layer. A line is a step from an expert of one layer to an expert of the"
        f" next: the {len(mine)} that one half of the documents takes most beyond what two layers that choose"
        " independently would give, among those that enough tokens take. How much more often (the lift) is measured in"
        " the other half, because the largest of many are large by chance too. The darker, the stronger the link; the"
        " thicker, the more tokens take it; a dotted step could be chance (q &ge; 0.05). Chains of lines are paths that"
        f" many tokens share. Lift is over all documents pooled: {t.noun}s that use different experts make lift by"
        " being mixed, even where the tokens of each choose independently.",
        f"In {bold(last)}, {many(sure, len(mine))} taken more often than by chance. The first leads from expert"
        f" {first['expert']} of layer {first['layer']} to expert {first['next_expert']} of layer {first['next_layer']}:"
        f" {percent(first['share'])} of the tokens take it, {first['lift']:.1f}"
        f" x{between(first['lift_low'], first['lift_high'], 1)} as many as independent choices would give.",
    ]
    counts_only = [bold(name) for name in t.names if name not in set(drawn["run"])]
    if counts_only:
        words.append(f"Not shown, for want of records of tokens: {listed(counts_only)}.")
    columns = [
        "run",
        "layer",
        "expert",
        "next_layer",
        "next_expert",
        "tokens",
        "share",
        "lift",
        "lift_low",
        "lift_high",
        "q_value",
    ]
    return Section(
        "paths",
        title,
        words,
        plots.routes(drawn, t.runs[0].num_experts),
        "Strongest steps from an expert of one layer to one of the next",
        {
            "Unit": "lift: observed over expected frequency, 1 = independent; share of the tokens",
            "n": f"{int(run.documents['n_tokens'].sum()):,} tokens, those of all documents, in {last}",
            "Interval": "95 % of the lift, jackknife over blocks of documents, and q, in the table",
        },
        ("flow.csv",),
        [(f"Table: the {len(drawn)} steps that are drawn", drawn[columns])],
    )


def tokens(t: Tables, examples: pd.DataFrame, html: str) -> Section:
    """One document per group, coloured."""
    title = "Tokens and their experts"
    if not len(examples):
        return Section("tokens", title, [without_tokens(t)])
    known = examples["text"].notna().all()
    words = [
        f"The beginning of one document{f' of each {t.noun}' if len(t.groups) > 1 else ''}."
        " The colour of a token is the expert that the router of"
        " the chosen layer ranks first for it; the seven experts most frequent in these examples have a colour,"
        " the others are grey. Point at a token to read its expert. If one colour fills a whole document, the"
        " expert follows the kind of text; if a colour follows a letter or a word, it follows the token.",
    ]
    if not known:
        words.append("The numbers are token ids: the run does not say how to turn them into text.")
    documents = len(examples[["run", "doc_id"]].drop_duplicates())
    return Section(
        "tokens",
        title,
        words,
        facts={
            "Unit": "first of the experts of a token",
            "n": f"{several(documents, 'document')}, {several(len(examples), 'token')}",
            "Interval": "none: examples",
        },
        csv=("tokens.csv",),
        extra=html,
    )


def balance(t: Tables) -> Section:
    layers, experts, top_k = len(t.runs[0].layers), t.runs[0].num_experts, t.runs[0].top_k
    table, bare = _corrected(t.load)
    measures = ["cv", "max_vio", "gini", "dead_fraction", "entropy"]
    means = table.groupby(["run", "group"], sort=False)[measures].mean().reset_index()
    sizes = broad(t.sizes)
    sizes["effective_experts"] = sizes["corrected"].fillna(sizes["effective_experts"])
    every = sizes[["run", "group", "docs", "tokens"]].merge(means, on=["run", "group"])
    every = every.merge(sizes[["run", "group", "effective_experts", "low", "high"]], on=["run", "group"])
    names = {
        "docs": "documents",
        "cv": "CV",
        "max_vio": "MaxVio",
        "gini": "Gini",
        "dead_fraction": "dead fraction",
        "entropy": "entropy, nats",
        "effective_experts": "effective experts",
    }
    words = [
        "Effective experts is the number of equally used experts that would give the same entropy:"
        f" {experts} if a {t.noun} uses all alike, at least {top_k}, since a token always picks {top_k} different"
        " ones. Dark: few experts do all the work.",
        spread(t),
        "The table has the mean over layers of the other usual measures. <b>CV</b>: standard deviation of the load"
        " over its mean. <b>MaxVio</b>: how much busier than the mean the busiest expert is (1 = twice the mean)."
        " <b>Gini</b>: 0 if all experts are used alike, towards 1 if one does everything. <b>Dead fraction</b>:"
        " experts never picked (the CSV has what chance alone would leave unpicked in a sample of this size)."
        f" <b>Entropy</b>: in nats, at least ln {top_k} = {math.log(top_k):.2f}, at most ln {experts} ="
        f" {math.log(experts):.2f}. The interval is that of the effective experts.",
        "CV, Gini, entropy and effective experts are corrected for the finite number of documents, and clipped where"
        f" that exceeds what is possible ({experts} effective experts, the entropy ln {experts}, a CV or Gini of 0)."
        " MaxVio and the dead fraction are shown as measured: the correction, a jackknife, does not hold for a"
        " maximum or a count of zeros, and with few documents they are too large.",
    ]
    if bare:
        words.append(f"Too few documents to correct by, so shown as measured: {listed(bare)}.")
    return Section(
        "load",
        "How evenly the experts are used",
        words,
        plots.effective_experts(table, experts),
        f"Effective experts by layer and {t.noun}",
        {
            "Unit": "experts; entropy in nats",
            "n": how_many(t),
            "Interval": f"{RESAMPLED}: of the mean over layers in the table, per layer in the CSV",
        },
        ("load.csv", "sizes.csv"),
        [(f"Table: load by {t.noun}, mean over {several(layers, 'layer')}", every.rename(columns=names))],
        open_tables=True,
    )


def _corrected(load: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The load with its measures corrected, within what they can be; the groups that stay as measured, in bold.

    A group with nothing to correct by in some layer stays as measured in all: no mean over layers mixes the two.
    """
    least_most = {
        "cv": (0.0, math.inf),
        "gini": (0.0, 1.0),
        "entropy": (0.0, load["entropy_max"]),
        "effective_experts": (0.0, load["experts"]),
    }
    unknown = load["entropy_corrected"].isna().groupby([load["run"], load["group"]]).transform("any")
    columns = {
        name: load[name].where(unknown, load[f"{name}_corrected"].clip(*ends)) for name, ends in least_most.items()
    }
    bare = load.loc[unknown, ["run", "group"]].drop_duplicates()
    return load.assign(**columns), [f"{bold(row['group'])} of {bold(row['run'])}" for _, row in bare.iterrows()]


def method(t: Tables, permutations: int, seed: int) -> Section:
    worlds = f"Here: {permutations:,} worlds, seed {seed}." if permutations else "Here no worlds were made: no floor."
    lines = [line.replace("WORLDS", worlds) for line in METHOD]
    return Section(
        "method", "How these numbers are made", [], extra=items(lines) + "<h3>References</h3>" + items(REFERENCES)
    )
