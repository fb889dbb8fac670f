"""Tracing a file of texts: `omnigene-fast trace`, in batches that a second run makes again, so that it can go on."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .capture import Tracer, trace
from .documents import Documents
from .labels import check_name, check_text
from .lines import json_lines
from .records import text_hash
from .run import open_trace

WINDOW = 512  # rows that are sorted by length together
Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Row:
    """A line of the file: its number, which is its document's, its text and its labels."""

    number: int
    text: str
    labels: dict[str, str]


def read_rows(path: str | Path, text: str = "text", labels: Sequence[str] = (), limit: int | None = None) -> list[Row]:
    """The rows of a JSON-lines file; documents are numbered by line, from 0.

    Args:
        path: of the file or pipe, one JSON object per line, as `lines.json_lines` reads them; empty lines count and are
            left out.
        text: column with the text.
        labels: columns that become labels; numbers and booleans are taken as text, absent ones are left out.
        limit: rows to read, from the beginning.

    Raises:
        ValueError: no file, no row, a line that is not a JSON object, or without a text; a label that cannot be one.
            The sentence names the file and the line.
    """
    path = Path(path)
    for name in labels:
        check_name(name)
    if not path.exists() or path.is_dir():
        raise ValueError(f"data: expected a JSON-lines file, got {str(path)!r}.")
    rows: list[Row] = []
    for number, where, entry in json_lines(path, "data"):
        rows.append(_row(number, where, entry, text, labels))
        if len(rows) == limit:
            break  # what follows is not read, and may be no JSON yet
    if not rows:
        raise ValueError(f"data: expected at least one row, got none in {str(path)!r}.")
    missing = [name for name in labels if not any(name in row.labels for row in rows)]
    if missing:
        raise ValueError(f"labels: expected a column of {str(path)!r}, got {missing[0]!r}, which no row has.")
    return rows


def _row(number: int, where: str, row: Any, text: str, labels: Sequence[str]) -> Row:
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: expected a JSON object, got {type(row).__name__}; every line is read as one object."
        )
    if text not in row:
        raise ValueError(
            f"{where}: expected a text in the column {text!r}, got only {', '.join(map(repr, row)) or 'no columns'};"
            " name the one with the text by --text-col."
        )
    value = row[text]
    if not isinstance(value, str):
        got = "null" if value is None else type(value).__name__
        raise ValueError(
            f"{where}: expected a text in the column {text!r}, got {got}; leave the line out, or name another column by"
            " --text-col."
        )
    _check_encodable(value, f"{where}: expected the text in the column {text!r}")
    found = {}
    for name in labels:
        label = row.get(name)
        if isinstance(label, (str, int, float)):
            found[name] = label if isinstance(label, str) else json.dumps(label)
            check_text(found[name], f"{where}: expected the value of the label {name!r}")
        elif label is not None:
            raise ValueError(
                f"{where}: expected text or a number in the label {name!r}, got {label!r}; leave --label-col {name}"
                " out, or write it as text."
            )
    return Row(number, value, found)


def _check_encodable(text: str, expected: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{expected} to be Unicode, got the lone surrogate U+{ord(text[error.start]):04X} at character"
            f" {error.start + 1}; put U+FFFD in its place, or leave the line out."
        ) from None


def trace_texts(
    model: nn.Module,
    encode: Encode,
    rows: Sequence[Row],
    path: str | Path,
    *,
    pad: int = 0,
    max_length: int = 1024,
    batch_tokens: int = 4096,
    progress: bool = False,
    **options: Any,
) -> Tracer:
    """Run texts through `model` under a trace, each a document; rows that the run holds already are left out.

    Their texts are compared with the run's, and their labels are corrected and added where the rows have others.

    Batches are made of all rows, in windows sorted by length, whether a run is new or continued: with the same
    arguments an interrupted run ends as one that was not.

    Args:
        model: Gemma-4; called with `use_cache=False`, without gradients, as it is (train or eval).
        encode: texts to lists of token ids, cut by this function at `max_length`.
        rows: as `read_rows` gives them; `number` is the document's.
        path: directory of the run.
        pad: token id of padding, on the right, masked.
        max_length: tokens of a text that are kept.
        batch_tokens: tokens of a batch, padding included; a longer text is a batch by itself.
        progress: show a progress bar.
        options: of `trace`.

    Returns:
        the closed `Tracer`, whose `tokens` are 0 if the run held all rows.

    Raises:
        ValueError: a text without tokens; a run that holds other texts under these numbers, more of them, or labels
            that the rows lack; or what `trace` raises.
    """
    device = next(model.parameters()).device
    names = sorted({name for row in rows for name in row.labels})
    tracer = trace(model, path, **options)
    with torch.no_grad(), tracer:
        held = open_trace(path).gathered
        corrected = _check_held(rows, held, encode, max_length, path)
        if corrected:
            tracer.relabel(corrected)
        done = set(held.doc_ids.tolist())
        total = sum(row.number not in done for row in rows)
        with tqdm(total=total, desc="tracing", unit="text", disable=not progress) as bar:
            for batch in _batches(rows, encode, max_length, batch_tokens):
                todo = [(row, ids) for row, ids in batch if row.number not in done]
                if not todo:
                    continue
                tracer.label(
                    doc_ids=[row.number for row, _ in todo],
                    **{name: [row.labels.get(name) for row, _ in todo] for name in names},
                )
                ids, mask = _padded([ids for _, ids in todo], pad)
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                bar.update(len(todo))
        if not total:
            tracer.abandon()
    return tracer


def _check_held(
    rows: Sequence[Row], held: Documents, encode: Encode, max_length: int, path: str | Path
) -> dict[int, dict[str, str]]:
    """Compare the rows with the documents that the run holds, before a model sees one.

    Returns:
        Labels to correct or to add, name -> value per document.

    Raises:
        ValueError: documents without a row, another text, a label that a document has and its row has not.
    """
    numbered = {row.number: row for row in rows}
    lost = next((number for number in held.doc_ids.tolist() if number not in numbered), None)
    if lost is not None:
        raise ValueError(
            f"data: expected the texts that {str(path)!r} was made of, got none in line {lost + 1}; give the same file"
            " and no smaller limit, or another path."
        )
    known = [numbered[number] for number in held.doc_ids.tolist()]
    for start in range(0, len(known), WINDOW):
        window = known[start : start + WINDOW]
        encoded = encode([row.text for row in window])
        for row, ids, there in zip(window, encoded, held.text_hash[start : start + WINDOW], strict=True):
            if there not in (None, text_hash(np.array(ids[:max_length], np.int32))):
                raise ValueError(
                    f"data: expected the texts that {str(path)!r} was made of, got another one in line"
                    f" {row.number + 1}; give the same file, tokenizer and length, or another path."
                )
    corrected = {}
    for row, there in zip(known, held.label_rows(), strict=True):
        gone = next((name for name in there if name not in row.labels), None)
        if gone is not None:
            raise ValueError(
                f"labels: expected the label {gone!r}, which {str(path)!r} holds of line {row.number + 1}, got none: a"
                f" label is corrected or added, not taken away; give --label-col {gone} and its value, or another path."
            )
        if row.labels != there:
            corrected[row.number] = {name: value for name, value in row.labels.items() if there.get(name) != value}
    return corrected


def _batches(
    rows: Sequence[Row], encode: Encode, max_length: int, batch_tokens: int
) -> Iterator[list[tuple[Row, list[int]]]]:
    for start in range(0, len(rows), WINDOW):
        window = rows[start : start + WINDOW]
        encoded = [ids[:max_length] for ids in encode([row.text for row in window])]
        empty = next((row for row, ids in zip(window, encoded, strict=True) if not ids), None)
        if empty is not None:
            raise ValueError(f"data: expected texts with tokens, got none in line {empty.number + 1}; leave it out.")
        batch: list[tuple[Row, list[int]]] = []
        longest = 0
        for row, ids in sorted(zip(window, encoded, strict=True), key=lambda pair: (len(pair[1]), pair[0].number)):
            longest = max(longest, len(ids))
            if batch and longest * (len(batch) + 1) > batch_tokens:
                yield batch
                batch, longest = [], len(ids)
            batch.append((row, ids))
        yield batch


def _padded(encoded: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, encoded))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
    return ids, mask
