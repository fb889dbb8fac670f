"""Homology."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import shared
from shared import Pair, Question

LEVELS = ("standard", "remote")
ANSWERS = ("yes", "no")


def question(pair: Pair) -> Question:
    """The pair as a question with the answer "yes" or "no"; its group is the pair's level."""
    prompt = f"### Sequence 1:\n{pair.a.sequence}\n\n### Sequence 2:\n{pair.b.sequence}\n\nHomologous? "
    return Question(prompt, ANSWERS[not pair.homologous], pair.level)


def questions(part: str, level: str | None = None) -> list[Question]:
    """The pairs of "train" or "test" as questions, of one level or of both."""
    return [question(pair) for pair in shared.split_pairs(part) if level in (None, pair.level)]
