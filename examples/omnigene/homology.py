"""Homology of two protein domains: a Gemma-4 MoE's yes or no beside MMseqs2, DIAMOND and ESM-2, on the same pairs.

    python examples/omnigene/homology.py                             a small model, trained on the training pairs first
    python examples/omnigene/homology.py --compare                   with the accelerator and without it
    python examples/omnigene/homology.py --model CKPT                a checkpoint as it is; with --steps trained first
    python examples/omnigene/homology.py --esm PATH                  a row for a local ESM-2 checkpoint
    python examples/omnigene/homology.py --methods model diamond     without MMseqs2
    python examples/omnigene/homology.py --model CKPT --template "{a}\\n{b}\\nRelated?" --answers Yes No

Pairs are standard (homologues of at least 40 % identity) or remote (below 25 %). By the split no superfamily is in
training and in test pairs; what a checkpoint has seen before is another matter. The model answers by one prefill: the
logit of "yes" less that of "no" is its score, and `generate` is held against it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import alignment
import answers
import measures
import shared
from shared import Pair, Question

LEVELS = ("standard", "remote")
ANSWERS = ("yes", "no")
TEMPLATE = "### Sequence 1:\n{a}\n\n### Sequence 2:\n{b}\n\nHomologous?"
METHODS = ("model", *(name for commands in alignment.COMMANDS.values() for name in commands), "ESM-2, cosine")
COLOURS = dict(zip(METHODS, ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"), strict=True))
WIDTHS = dict(zip(METHODS, (1.5, 6, 4, 2, 1.5), strict=True))  # a curve that lies on another hides nothing
Scores = dict[str, float]  # by the name of the pair's first domain: no domain is in two pairs


def question(pair: Pair, template: str = TEMPLATE, words: Sequence[str] = ANSWERS) -> Question:
    """The pair as a question, with the first of two words as the answer if it is homologous; its group is its level."""
    prompt = template.replace("{a}", pair.a.sequence).replace("{b}", pair.b.sequence)
    return Question(prompt, words[not pair.homologous], pair.level)


def questions(
    part: str, level: str | None = None, template: str = TEMPLATE, words: Sequence[str] = ANSWERS
) -> list[Question]:
    """The pairs of "train" or "test" as questions, of one level or of both."""
    return [question(pair, template, words) for pair in shared.split_pairs(part) if level in (None, pair.level)]


def main(argv: Sequence[str] | None = None) -> None:
    """Score the test pairs by every method, and report."""
    options = arguments(argv)
    shared.start(options)
    # What is missing shows before anything long begins.
    shared.need("scipy")
    shared.need("matplotlib")
    aligners = {name: command for method in options.methods for name, command in alignment.required(method).items()}
    esm = alignment.load_esm(options.esm) if options.esm else None
    results = shared.Results(options, "Homology", "Are two protein domains homologous? One batched prefill answers.")
    train, test = (limited(shared.split_pairs(part), options.limit) for part in ("train", "test"))
    everything = shared.pairs() if options.limit is None else train + test

    rows, everywhere, curves = [], [], {}
    if "model" in options.methods:
        form = {"template": options.template, "words": options.answers}
        model, tokenizer = answers.tuned(options, [question(pair, **form) for pair in train], results)
        asked = [question(pair, **form) for pair in test]
        margins, seconds = answers.asked(model, tokenizer, asked, tuple(options.answers), options, results)
        curves["model"] = named(test, margins)
        rows += table(test, "model", curves["model"], 0.0, "its answer", seconds)
        del model
    others: dict[str, tuple[list[float], float]] = {}
    for name, command in aligners.items():
        others[name] = alignment.aligned(command, everything, options.threads)
    if esm:
        others[METHODS[-1]] = alignment.similar(esm, everything, options.batch)
    for name, (values, seconds) in others.items():
        scores = curves[name] = named(everything, values)
        cut = alignment.threshold([scores[pair.a.name] for pair in train], [pair.homologous for pair in train])
        rows += table(test, name, scores, cut, alignment.rule("score", cut), seconds)
        everywhere += table(everything, name, scores, cut, alignment.rule("score", cut), seconds)

    families = {domain.superfamily for pair in test for domain in (pair.a, pair.b)}
    results.table(
        f"Homology, {len(test)} test pairs of {len(families)} superfamilies",
        rows,
        f"The model's answer is {' or '.join(options.answers)}. The other methods have a score, and the threshold that"
        " is right for most training pairs of both levels; a pair without a hit up to E = 10 scores 0. Seconds: the"
        f" model's for the test pairs; those of the others for all {len(everything)}, which one search covers."
        " Intervals (95 %, Wilson; DeLong, or Newcombe at an AUC of 1) are over pairs: no domain is in two, but they"
        " share superfamilies, and intervals over superfamilies would be wider. None where all pairs score the same. No"
        " superfamily of these pairs is in training pairs, and no domain in what cpt.py and sft.py train on.",
    )
    if options.limit is None and everywhere:
        results.table(f"Homology, all {len(everything)} pairs", everywhere, "As above; training pairs are among them.")
    picture(test, curves, results)
    results.save()


def limited(pairs: Sequence[Pair], count: int | None) -> list[Pair]:
    """The first `count` pairs of each level, half of them homologous; all for None."""
    kept = []
    for level in LEVELS:
        for homologous in (True, False):
            chosen = [pair for pair in pairs if pair.level == level and pair.homologous == homologous]
            kept += chosen if count is None else chosen[: (count + homologous) // 2]
    return kept


def named(pairs: Sequence[Pair], values: Sequence[float]) -> Scores:
    """Scores by the name of each pair's first domain."""
    return {pair.a.name: value for pair, value in zip(pairs, values, strict=True)}


def sides(pairs: Sequence[Pair], scores: Scores, level: str) -> tuple[list[float], list[float]]:
    """The scores of the homologous pairs of a level and of the others."""
    positive, negative = (
        [scores[pair.a.name] for pair in pairs if pair.level == level and pair.homologous == homologous]
        for homologous in (True, False)
    )
    return positive, negative


def table(pairs: Sequence[Pair], method: str, scores: Scores, cut: float, rule: str, seconds: float) -> list[dict]:
    """One row a level: accuracy of "homologous if the score is above `cut`", AUC, both with intervals."""
    rows = []
    for level in LEVELS:
        positive, negative = sides(pairs, scores, level)
        right = [score > cut for score in positive] + [score <= cut for score in negative]
        rows.append({"method": method, "level": level, "homologous if": rule, **measures.accuracy(right)})
        rows[-1] |= measures.auc(positive, negative) | {"seconds": seconds}
    return rows


def picture(pairs: Sequence[Pair], curves: dict[str, Scores], results: shared.Results) -> None:
    """ROC curves of the test pairs, one panel a level."""
    figure, panels = shared.axes(10.5, 6.4, columns=2)
    for panel, level in zip(panels, LEVELS, strict=True):
        for method, scores in curves.items():
            positive, negative = sides(pairs, scores, level)
            cuts = sorted({*positive, *negative}, reverse=True)
            x, y = ([0.0, *(sum(s >= c for s in side) / len(side) for c in cuts)] for side in (negative, positive))
            found = measures.auc(positive, negative)
            interval = f" ({found['auc low']:.2f} to {found['auc high']:.2f})" if found["auc low"] >= 0 else ""
            panel.plot(x, y, color=COLOURS[method], lw=WIDTHS[method], label=f"{method}: {found['auc']:.3f}{interval}")
        panel.plot([0, 1], [0, 1], color="grey", lw=1, ls=":", label="chance: 0.5")
        panel.set(xlabel="false positives (share)", ylabel="true positives (share)", title=f"{level} pairs")
        panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), title="area under the curve (95 %)", fontsize=9)
    results.picture(figure, "homology", "ROC curves of the test pairs; straight pieces join pairs of equal score.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = answers.parser(__doc__, "homology", "pairs of each level that train and that test")
    methods = ("model", *alignment.COMMANDS)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="default: all of them")
    parser.add_argument("--template", default=TEMPLATE, help=r"the prompt, {a} and {b} the sequences, \n a new line")
    parser.add_argument("--answers", nargs=2, default=ANSWERS, metavar=("YES", "NO"), help="default: yes no")
    parser.add_argument("--esm", type=Path, help="directory of an ESM-2 checkpoint, for a row of its own")
    options = answers.parsed(parser, argv, "pairs, one homologous and one not")
    options.template = options.template.replace("\\n", "\n")
    if not {"{a}", "{b}"} <= set(re.findall(r"{\w}", options.template)):
        raise ValueError(f"--template: expected a text with {{a}} and {{b}}, got {options.template!r}.")
    return options


if __name__ == "__main__":
    shared.script("homology", main)
