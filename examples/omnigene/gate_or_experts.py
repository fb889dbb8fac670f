"""The second question of audit.py: does the gate decide an answer, or the modality alone?

The OmniGene-4 paper forwards five homology prompts and finds that the experts of a prompt with a homologous pair differ
from those of one without by at most 0.04 nats in any layer, against 0.23 between families of 50 prompts each: "the gate
selects the modality, the experts compute the answer". Its two numbers have different noise: a prompt is a small sample
of tokens, a family pooled over 50 prompts a large one. With 8 of 128 experts a token, two prompts of T tokens of one
and the same distribution diverge by up to about (127 / 8) * 2 / (8 T) = 4 / T nats: 0.02 of the 0.04 at 200 tokens,
0.0004 of the 0.23. Here single texts are compared with single texts, each with the floor at its number of tokens:

- prompts with different answers, and with the same: if the gate saw the answer, the first would differ more;
- the two sequences within a prompt, homologous or not, without the words around them, which all prompts share;
- texts of different families, and of one.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import homology
import pandas as pd
import shared
import torch

import omnigene_fast
from omnigene_fast import analysis
from omnigene_fast.tracing.run import Run
from omnigene_fast.tracing.texts import Row, trace_texts

ANSWERS = {True: "homologous", False: "not homologous"}
PARTS = re.split(r"{[ab]}", homology.TEMPLATE)  # the words around the sequences
FAMILIES, WITHIN = "texts of different families", "texts of one family"
OTHER, SAME = "prompts of different answers", "prompts of one answer"
SEQUENCES = {kind: f"two sequences of a prompt, {answer}" for kind, answer in ANSWERS.items()}


def audit(model: Any, encode: Any, families: Run, options: argparse.Namespace, results: shared.Results) -> pd.DataFrame:
    """Trace homology prompts through `model`, the checkpoint of the run `families`; table, picture and a sentence."""
    chosen = prompts(options.pairs)
    path = families.path.parent
    table = compared(
        families,
        trace_prompts(model, encode, chosen, path / "prompts", options.batch),
        trace_sequences(model, encode, chosen, path / "sequences", options.batch),
        options,
    )
    pooled = analysis.differentiation(families, permutations=options.permutations)
    results.table(
        f"Does the gate decide the answer? {families.name}, Jensen-Shannon divergence in nats",
        rows(table, pooled, families.layers),
        "js: mean over pairs; floor: what chance gives at that number of tokens; corrected: js - floor, with its 95 %"
        " interval;\n  re-paired: js of sequences put together at random; p: of js as far from that by chance. Tokens"
        " of a text are alike, so\n  that the true floors lie above these. Pooled families: floor of texts without a"
        f" difference, corrected by the jackknife over them.\n\n  {beside_the_paper(table, pooled)}",
    )
    results.picture(
        picture(table, pooled),
        "gate",
        "Divergence, mean over layers: grey, what chance gives at that number of tokens; coloured, the rest, with its"
        " 95 % interval.",
    )
    return table


def prompts(number: int) -> list[shared.Pair]:
    """At most `number` pairs of the test part, which no stage trains on, with each answer, the levels in turn."""
    found: list[shared.Pair] = []
    for homologous in ANSWERS:
        levels: dict[str, list[shared.Pair]] = {}
        for pair in shared.split_pairs("test"):
            if pair.homologous == homologous:
                levels.setdefault(pair.level, []).append(pair)
        found += [pair for turn in zip(*levels.values(), strict=False) for pair in turn][: number // 2 * 2]
    return found


def trace_prompts(model: Any, encode: Any, chosen: Sequence[shared.Pair], path: Path, batch: int) -> Run:
    """A run of whole prompts, each a document; two with the same answer have the same "pair"."""
    found = []
    for number, pair in enumerate(chosen):
        labels = {"answer": ANSWERS[pair.homologous], "pair": str(number // 2)}
        found.append(Row(number, homology.question(pair).prompt, labels))
    longest = max(len(ids) for ids in encode([row.text for row in found]))
    trace_texts(model, encode, found, path, max_length=longest, batch_tokens=batch * longest, progress=True)
    return omnigene_fast.open_trace(path)


def trace_sequences(model: Any, encode: Any, chosen: Sequence[shared.Pair], path: Path, batch: int) -> Run:
    """A run of the two sequences of each prompt as documents of their own, where they stand in the prompt; the label
    "homologous" or "not homologous" is the number of their pair. The words around them are left out."""
    begin = encode([""])[0]
    plain = [ids[len(begin) :] for ids in encode(list(PARTS))]
    device = next(model.parameters()).device
    with torch.no_grad(), omnigene_fast.trace(model, path) as tracer:
        for start in range(0, len(chosen), batch):
            ids, documents = [], []
            for number, pair in enumerate(chosen[start : start + batch], start):
                # In pieces, so that it is known which tokens are a sequence's.
                both = [one[len(begin) :] for one in encode([pair.a.sequence, pair.b.sequence])]
                pieces = [begin + plain[0], both[0], plain[1], both[1], plain[2]]
                whose = [-1, 2 * number, -1, 2 * number + 1, -1]
                ids.append([token for piece in pieces for token in piece])
                documents.append([doc for piece, doc in zip(pieces, whose, strict=True) for _ in piece])
            here = list(enumerate(chosen[start : start + batch], start))
            labels = {
                label(kind): [str(number) if pair.homologous == kind else None for number, pair in here]
                for kind in ANSWERS
            }
            tracer.label(doc_ids=shared.padded(documents, -1, torch.device("cpu"))["input_ids"], **labels)
            model(**shared.padded(ids, 0, device), use_cache=False)
    return omnigene_fast.open_trace(path)


def label(homologous: bool) -> str:
    """The label of the sequences whose value is the number of their pair."""
    return ANSWERS[homologous].replace(" ", "_")


def compared(families: Run, whole: Run, sequences: Run, options: argparse.Namespace) -> pd.DataFrame:
    """The rows of `analysis.pairwise` of all comparisons, named by `what`."""
    more: dict[str, Any] = {"permutations": options.permutations, "average": True}
    tables = []
    for run, by, names in ((families, "task", (WITHIN, FAMILIES)), (whole, "answer", (SAME, OTHER))):
        table = analysis.pairwise(run, "pair", by, **more)
        tables.append(table.assign(what=table["kind"].map(dict(zip(("pair", "cross"), names, strict=True)))))
    for kind, name in SEQUENCES.items():
        tables.append(analysis.pairwise(sequences, label(kind), None, **more).assign(what=name))
    return pd.concat(tables, ignore_index=True)


def rows(table: pd.DataFrame, pooled: pd.DataFrame, layers: Sequence[int]) -> list[dict[str, Any]]:
    """The table that is shown: means over the layers, then the first, the middle and the last one."""
    shown = []
    for layer in ("mean", *sorted({layers[0], layers[len(layers) // 2], layers[-1]})):
        line = pooled[pooled["layer"] == layer].iloc[0]
        shown.append({"layer": layer, "compared": "families, pooled", "js": f"{line['js']:.4f}"})
        shown[-1] |= {"floor": f"{line['floor']:.4f}", "corrected": interval(line)}
        shown[-1]["pairs"] = int(line["groups"] * (line["groups"] - 1) // 2)
        shown[-1]["tokens"] = int(line["tokens"] // line["groups"])
        for line in table[table["layer"] == layer].to_dict("records"):
            shown.append({"layer": layer, "compared": line["what"], "js": f"{line['js']:.4f}"})
            shown[-1] |= {"floor": f"{line['floor']:.4f}", "corrected": interval(line)}
            shown[-1] |= {"pairs": line["pairs"], "tokens": line["tokens"]}
            if line["what"] in SEQUENCES.values():
                shown[-1] |= {"re-paired": f"{line['repaired']:.4f}", "p": line["p_value"]}
    return shown


def beside_the_paper(table: pd.DataFrame, pooled: pd.DataFrame) -> str:
    """What the floors do to the comparison of 0.04 with 0.23."""
    mean = table[table["layer"] == "mean"].set_index("what")
    prompt, text = mean.loc[OTHER], mean.loc[FAMILIES]
    largest = table[(table["what"] == OTHER) & (table["layer"] != "mean")]["js"].max()
    family = pooled[pooled["layer"] == "mean"].iloc[0]
    apart, largely = prompt["corrected"], 1 - family["corrected"] / family["js"]
    return (
        f"The paper sets 0.04, the most by which one prompt differs from another in any layer, beside 0.23, the mean of"
        f" pooled families, 5.8 times as much.\n  Here they are {largest:.3f} and {family['js']:.3f},"
        f" {times(family['js'] / largest)} as much; but chance alone gives {1 - apart / prompt['js']:.0%} of"
        f" what prompts differ by, and {largely:.0%} of what families do.\n  Text against text,"
        f" less what chance gives: {apart:.4f} between prompts of different answers"
        f" ({mean.loc[SAME]['corrected']:.4f} of one answer) and {text['corrected']:.4f} between families, "
        + (
            f"{times(text['corrected'] / apart)} as much."
            if prompt["low"] > 0
            else "and prompts differ by no more than chance gives."
        )
    )


def times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def interval(line: Any) -> str:
    return f"{line['corrected']:.4f} [{line['low']:.4f}, {line['high']:.4f}]"


def picture(table: pd.DataFrame, pooled: pd.DataFrame) -> Any:
    """A bar for each comparison, mean over the layers: what chance gives, and what is beyond it."""
    mean = table[table["layer"] == "mean"].set_index("what")
    lines = {"families, pooled": pooled[pooled["layer"] == "mean"].iloc[0]}
    lines |= {name: mean.loc[name] for name in (FAMILIES, WITHIN, OTHER, SAME, *SEQUENCES.values())}
    figure, axes = shared.axes(8.0, 3.6)
    for place, line in enumerate(lines.values()):
        chance = line["js"] - line["corrected"]
        axes.barh(place, chance, color="lightgrey", label=None if place else "what chance gives")
        axes.barh(place, line["corrected"], left=chance, color="C0", label=None if place else "beyond chance")
        # The interval is that of the corrected value: moved to where the bar ends.
        ends = [[line["corrected"] - line["low"]], [line["high"] - line["corrected"]]]
        axes.errorbar(line["js"], place, xerr=ends, color="black", capsize=3)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.invert_yaxis()
    axes.set_xlabel("Jensen-Shannon divergence (nats)")
    axes.legend()
    return figure
