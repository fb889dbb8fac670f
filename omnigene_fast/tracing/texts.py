"""Tracing a file of texts: `omnigene-fast trace`, in batches that a second run makes again, so that it can go on."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .capture import Tracer, trace
from .labels import check_name, check_text
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
        path: of the file, one JSON object per line; empty lines count and are left out.
        text: column with the text.
        labels: columns that become labels; numbers and booleans are taken as text, absent ones are left out.
        limit: rows to read, from the beginning.

    Raises:
        ValueError: no file, no row, a line that is not a JSON object, or without a text; a label that cannot be one.
    """
    path = Path(path)
    for name in labels:
        check_name(name)
    if not path.is_file():
        raise ValueError(f"data: expected a JSON-lines file, got {str(path)!r}.")
    rows: list[Row] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if limit is not None and len(rows) == limit:
                break
            if line.strip():
                rows.append(_row(number, line, text, labels))
    if not rows:
        raise ValueError(f"data: expected at least one row, got none in {str(path)!r}.")
    missing = [name for name in labels if not any(name in row.labels for row in rows)]
    if missing:
        raise ValueError(f"labels: expected a column of {str(path)!r}, got {missing[0]!r}, which no row has.")
    return rows


def _row(number: int, line: str, text: str, labels: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: expected one JSON object per line, line {number + 1} is not JSON ({error}).") from None
    if not isinstance(row, dict) or not isinstance(row.get(text), str):
        got = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"data: expected a JSON object with a text {text!r} in line {number + 1}, got {got}.")
    found = {}
    for name in labels:
        value = row.get(name)
        if isinstance(value, (str, int, float)):
            found[name] = value if isinstance(value, str) else json.dumps(value)
            check_text(found[name], f"labels: expected the value of {name!r} in line {number + 1}")
        elif value is not None:
            raise ValueError(f"labels: expected text or a number in {name!r} of line {number + 1}, got {value!r}.")
    return Row(number, row[text], found)


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
        ValueError: a text without tokens, a run that holds other texts under these numbers, or what `trace` raises.
    """
    device = next(model.parameters()).device
    names = sorted({name for row in rows for name in row.labels})
    tracer = trace(model, path, **options)
    with torch.no_grad(), tracer:
        held = open_trace(path).gathered
        done = dict(zip(held.doc_ids.tolist(), held.text_hash.tolist(), strict=True))
        total = sum(row.number not in done for row in rows)
        with tqdm(total=total, desc="tracing", unit="text", disable=not progress) as bar:
            for batch in _batches(rows, encode, max_length, batch_tokens):
                todo = [(row, ids) for row, ids in batch if not _is_held(row, ids, done, path)]
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


def _is_held(row: Row, ids: list[int], done: Mapping[int, Any], path: str | Path) -> bool:
    if row.number not in done:
        return False
    if done[row.number] not in (None, text_hash(np.array(ids, np.int32))):
        raise ValueError(
            f"data: expected the texts that {str(path)!r} was made of, got another one in line {row.number + 1}; give"
            " the same file, tokenizer and length, or another path."
        )
    return True


def _batches(
    rows: Sequence[Row], encode: Encode, max_length: int, batch_tokens: int
) -> Iterator[list[tuple[Row, list[int]]]]:
    for start in range(0, len(rows), WINDOW):
        window = rows[start : start + WINDOW]
        encoded = [ids[:max_length] for ids in encode([row.text for row in window])]
        empty = next((row for row, ids in zip(window, encoded, strict=True) if not ids), None)
        if empty is not None:
            raise ValueError(f"data: expected texts with tokens, got none in line {empty.number + 1}.")
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
