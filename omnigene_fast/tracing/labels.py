"""Names and values of labels: what may become a column, and what text may stand in one."""

import re
import unicodedata
from collections.abc import Iterable, Mapping

from .records import KINDS

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Columns of the documents, the tokens and the counts: a label of that name would hide one of them in SQL.
RESERVED = {"doc_id", "n_tokens", "text_hash", "counts", "pos", "token_id", "phase", "layer", "expert", "picks"} | set(
    KINDS
)


def check_labels(labels: Mapping[int, Mapping[str, str]], known: Iterable[str] = ()) -> set[str]:
    """Check labels per document; a column's name is compared without regard to case, as SQL does.

    Args:
        labels: name -> value per document id.
        known: names in use already.

    Returns:
        The names in `labels`.

    Raises:
        ValueError: a name that is no identifier, is reserved, or differs from another one in case only; a value with
            control characters or lone surrogates.
        TypeError: a value that is no text.
    """
    spelled = {name.lower(): name for name in known}
    names: set[str] = set()
    for values in labels.values():
        for name, value in values.items():
            if name not in names:
                check_name(name)
                if spelled.setdefault(name.lower(), name) != name:
                    raise ValueError(f"labels: expected one spelling, got {name!r} beside {spelled[name.lower()]!r}.")
                names.add(name)
            check_text(value, f"labels: expected the value of {name!r}")
    return names


def check_name(name: str) -> None:
    """Raise ValueError if `name` cannot name a label."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"labels: expected a name of letters, digits and _, not first a digit, got {name!r}.")
    if name.lower() in RESERVED:
        raise ValueError(f"labels: expected a name that is no column of the store, got {name!r}; choose another one.")


def check_text(value: str, expected: str) -> None:
    """Raise, in a sentence that begins with `expected`, if `value` is not text that every reader can show."""
    if not isinstance(value, str):
        raise TypeError(f"{expected} to be text, got {type(value).__name__}.")
    if value.isascii() and value.isprintable():
        return
    bad = next((char for char in value if unicodedata.category(char) in ("Cc", "Cs")), None)
    if bad is not None:
        raise ValueError(f"{expected} to be free of control characters and lone surrogates, got {value!r}.")
