"""True or false."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import shared
from shared import Question

from omnigene_fast.demo.model import load_texts

ANSWERS = ("true", "false")
MASK = "[...]"


def terms(part: str) -> dict[str, list[str]]:
    """Gene Ontology terms of "train" or "test": the name, and the definition's first sentence and the rest, if any."""
    made = {}
    for text in load_texts(10**6)["text_biology"]:
        name, definition = text.split(". ", 1)
        if shared.by_hash(name) == part:
            made[name] = re.split(r"(?<=\.) (?=[A-Z])", definition, maxsplit=1)
    return made


def questions(part: str, masked: bool = False) -> list[Question]:
    """Statements about the terms of "train" or "test", true and false; the group is the term.

    Each piece of a definition stands once beside its own term and once beside another of the same part, and each term
    has as many true statements as false ones: neither the name alone nor the definition alone tells. `masked` hides the
    words of both names in a piece, wherever it stands.
    """
    known = terms(part)
    made = []
    for piece in (0, 1):
        names = [name for name, pieces in known.items() if piece < len(pieces)]
        for at, owner in enumerate(names):
            other = names[(at + 1 + piece) % len(names)]
            text = known[owner][piece]
            if masked:
                hidden = words(owner) | words(other)
                text = re.sub(r"\w+", lambda found: MASK if words(found[0]) & hidden else found[0], text)  # noqa: B023
            made.append(Question(f"{owner}: {text}\nTrue or false? ", ANSWERS[0], owner))
            made.append(Question(f"{other}: {text}\nTrue or false? ", ANSWERS[1], other))
    return made


def words(text: str) -> set[str]:
    """The words of a text in lower case."""
    return set(re.findall(r"\w+", text.lower()))
