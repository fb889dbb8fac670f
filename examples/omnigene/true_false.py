"""True or false: statements about Gene Ontology terms, several to a term, answered by one batched prefill.

    python examples/omnigene/true_false.py               a small model, trained on the statements of other terms first
    python examples/omnigene/true_false.py --compare     with the accelerator and without it
    python examples/omnigene/true_false.py --model CKPT  a checkpoint as it is; with --steps trained first
    python examples/omnigene/true_false.py --masked      without the words of the term's name in the statement

The form is that of BixBench's multiple true/false questions. Each statement puts a piece of a term's definition beside
the term or beside another one. Definitions repeat words of the name: how far that alone goes is a row of the table.
"""

import argparse
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import alignment
import answers
import measures
import shared
from shared import Question

from omnigene_fast.demo.model import load_texts

ANSWERS = ("true", "false")
MASK = "[...]"
CUE = "\nTrue or false?"


def terms(part: str) -> dict[str, list[str]]:
    """Gene Ontology terms of "train" or "test": the name, and the definition's first sentence and the rest, if any."""
    made = {}
    for text in load_texts(10**6)["text_biology"]:
        name, definition = text.split(". ", 1)
        if shared.by_hash(name) == part:
            made[name] = re.split(r"(?<=\.) (?=[A-Z])", definition, maxsplit=1)
    return made


def questions(part: str, masked: bool = False, limit: int | None = None) -> list[Question]:
    """Statements about the terms of "train" or "test" (or the first `limit`), true and false; the group is the term.

    Each piece of a definition stands once beside its own term and once beside another of the same part, and each term
    has as many true statements as false ones: neither the name alone nor the definition alone tells. `masked` hides the
    words of both names in a piece, wherever it stands.
    """
    known = dict(itertools.islice(terms(part).items(), limit))
    made = []
    for piece in (0, 1):
        names = [name for name, pieces in known.items() if piece < len(pieces)]
        if len(names) < 2:  # there is no other term
            continue
        for at, owner in enumerate(names):
            # The next term for the first pieces, the one after it for the others; never the term itself.
            other = names[(at + 1 + piece % (len(names) - 1)) % len(names)]
            text = known[owner][piece]
            if masked:
                text = without(text, words(owner) | words(other))
            made.append(Question(statement(owner, text), ANSWERS[0], owner))
            made.append(Question(statement(other, text), ANSWERS[1], other))
    return made


def statement(name: str, text: str) -> str:
    """The prompt."""
    return f"{name}: {text}{CUE}"


def words(text: str) -> set[str]:
    """The words of a text in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def without(text: str, hidden: set[str]) -> str:
    """The text with a mask for each of the `hidden` words."""
    return re.sub(r"\w+", lambda found: MASK if found[0].lower() in hidden else found[0], text)


def overlap(question: Question) -> float:
    """The share of the words of the term's name that the statement repeats."""
    name = words(question.group)
    text = question.prompt.removeprefix(question.group).removesuffix(CUE)
    return len(name & words(text)) / len(name)


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the test statements and report, beside what the overlap of words gives."""
    options = arguments(argv)
    shared.start(options)
    shared.need("scipy")
    shared.need("matplotlib")
    about = "Does the definition belong to the term? One batched prefill answers several statements a term."
    results = shared.Results(options, "True or false", about)
    train = questions("train", options.masked)
    test = questions("test", options.masked, options.limit)

    model, tokenizer = answers.tuned(options, train, results)
    margins, seconds = answers.asked(model, tokenizer, test, ANSWERS, options, results)
    cut = alignment.threshold([overlap(each) for each in train], [each.answer == ANSWERS[0] for each in train])
    rows = table("model", "its answer", test, margins, 0.0)
    rows += table("overlap of words", alignment.rule("overlap", cut), test, [overlap(each) for each in test], cut)
    results.table(
        f"True or false, {len(test)} statements about {len({each.group for each in test})} terms",
        rows,
        "A term is right if all its statements are. Overlap: the share of the words of the name that the statement"
        " repeats, no model; its threshold is right for most training statements. Intervals (95 %) are Wilson's over"
        " the rows' n, and DeLong's for the AUC: statements share terms and definitions, so theirs are too narrow, and"
        f" those over terms are not. The model took {seconds:.3g} s.",
    )
    picture(rows, results)
    results.save()


def table(method: str, rule: str, asked: Sequence[Question], scores: Sequence[float], cut: float) -> list[dict]:
    """Two rows: statements, and terms with all statements right; "true" is a score above `cut`."""
    right: dict[str, list[bool]] = defaultdict(list)
    sides: dict[str, list[float]] = {answer: [] for answer in ANSWERS}
    for each, score in zip(asked, scores, strict=True):
        sides[each.answer].append(score)
        right[each.group].append((score > cut) == (each.answer == ANSWERS[0]))
    start = {"method": method, "true if": rule}
    chance = sum(0.5 ** len(each) for each in right.values()) / len(right)
    statements = measures.accuracy(itertools.chain(*right.values())) | {"chance": 0.5}
    return [
        start | {"of": "statements"} | statements | measures.auc(*sides.values()),
        start | {"of": "terms"} | measures.accuracy(map(all, right.values())) | {"chance": chance},
    ]


def picture(rows: list[dict], results: shared.Results) -> None:
    """Accuracy with its interval beside chance."""
    figure, axis = shared.axes(7, 3)
    for at, row in enumerate(reversed(rows)):
        value, colour = row["accuracy"], "#D55E00" if row["method"] == "model" else "#0072B2"
        axis.barh(at, value, color=colour, alpha=0.75, height=0.6)
        axis.errorbar(value, at, xerr=[[value - row["low"]], [row["high"] - value]], color="black", capsize=4)
        axis.plot([row["chance"]] * 2, [at - 0.38, at + 0.38], color="black", ls=":", label=None if at else "chance")
    axis.set(xlim=(0, 1), xlabel="share right (95 %)")
    axis.set_yticks(range(len(rows)), [f"{row['method']}, {row['of']}" for row in reversed(rows)])
    figure.legend(loc="outside upper right")
    results.picture(figure, "true_false", "Statements right, and terms with all statements right; dotted: by chance.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = answers.parser(__doc__, "true_false", "terms of the test")
    parser.add_argument("--masked", action="store_true", help="hide the words of the term's name in the statement")
    return answers.parsed(parser, argv, "terms, each the other's distractor")


if __name__ == "__main__":
    shared.script("true_false", main)
