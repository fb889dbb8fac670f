"""Example documents whose tokens the report colours by expert."""

import base64
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from .groups import label_column
from .report_page import safe
from .report_tables import Tables, has_tokens

Texts = Callable[[int], str] | Mapping[int, str]
SHOWN = 200  # tokens of a document
ENOUGH = 60  # the example is the first document of a group that has so many tokens, or its longest
LONGEST = 40  # characters of a token
BYTES = 3  # token ids of a byte tokenizer: padding, end, beginning, then the 256 bytes
SPECIAL = ("<pad>", "<eos>", "<bos>")


def examples(tables: Tables, texts: Texts | None) -> pd.DataFrame:
    """A row per token of one document of each group and run: its text and, per layer, the expert ranked first.

    Empty if no run has tokens.
    """
    frames = []
    for name, run in zip(tables.names, tables.runs, strict=True):
        if not has_tokens(run):
            continue
        chosen = _chosen(run, tables.by)
        rows = ", ".join(str(doc) for doc in chosen.values())
        group_of = {doc: group for group, doc in chosen.items()}
        read = _reader(run, texts)
        found = {}
        for row, records in run.iter_documents(where=f"doc_id IN ({rows})"):
            few = records.take(slice(0, SHOWN))
            frame = pd.DataFrame(
                {
                    "run": name,
                    "group": group_of[int(row["doc_id"])],
                    "doc_id": int(row["doc_id"]),
                    "pos": few.pos,
                    "token_id": few.token,
                    "text": [read(int(token)) for token in few.token],
                    "document_tokens": len(records),
                }
            )
            first = pd.DataFrame(few.ids[:, :, 0].T, columns=[f"layer_{layer}" for layer in run.layers])
            found[group_of[int(row["doc_id"])]] = pd.concat([frame, first], axis=1)
        frames += [found[group] for group in tables.groups if group in found]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def painting(tables: Tables, table: pd.DataFrame, layer: int) -> tuple[dict[str, Any], str]:
    """What the page's script colours, and the HTML that it colours.

    Args:
        table: from `examples`, not empty.
        layer: decoder index shown first.
    """
    layers = list(tables.runs[0].layers)
    names = [name for name in tables.names if name in set(table["run"])]
    columns = [f"layer_{one}" for one in layers]
    runs, boxes = [], []
    for place, name in enumerate(names):
        documents, lines = [], []
        for (group, doc), rows in table[table["run"] == name].groupby(["group", "doc_id"], sort=False):
            first = np.ascontiguousarray(rows[columns].to_numpy(np.uint16).T)
            documents.append({"tokens": len(rows), "first": base64.b64encode(first.astype("<u2").tobytes()).decode()})
            whole = int(rows["document_tokens"].iloc[0])
            size = f"{whole} tokens" if whole == len(rows) else f"the first {len(rows)} of {whole} tokens"
            known = rows["text"].notna().all()
            kind = "tokens" if known else "tokens ids"
            shown = rows["text"] if known else rows["token_id"]
            spans = "".join(f"<i>{safe(one)}</i>" for one in shown)
            lines.append(
                f"<h3>{safe(group)} <span class=small>document {doc}, {size}</span></h3><p class='{kind}'>{spans}</p>"
            )
        runs.append({"documents": documents})
        boxes.append(f"<div class=examples data-run={place}>{''.join(lines)}</div>")
    last = len(names) - 1
    run_options = "".join(
        f"<option value={place}{' selected' if place == last else ''}>{safe(name)}</option>"
        for place, name in enumerate(names)
    )
    layer_options = "".join(
        f"<option value={place}{' selected' if one == layer else ''}>{one}</option>" for place, one in enumerate(layers)
    )
    controls = (
        f"<div class=controls><label>Run <select id=choose-run>{run_options}</select></label>"
        f"<label>Layer <select id=choose-layer>{layer_options}</select></label></div>"
        "<div class=legend id=token-legend></div>"
    )
    return {"runs": runs}, controls + "".join(boxes)


def _chosen(run: Any, by: str) -> dict[str, int]:
    """A document of each group."""
    documents = run.documents.assign(group=label_column(run, by))
    documents = documents[documents["group"].notna() & (documents["n_tokens"] > 0)]
    chosen = {}
    for group, rows in documents.groupby("group"):
        enough = rows[rows["n_tokens"] >= ENOUGH]
        row = enough["doc_id"].iloc[0] if len(enough) else rows.loc[rows["n_tokens"].idxmax(), "doc_id"]
        chosen[str(group)] = int(row)
    return chosen


def _reader(run: Any, texts: Texts | None) -> Callable[[int], str | None]:
    """From a token id to what is shown; None where there is nothing but the id."""
    known: dict[int, str | None] = {}

    def read(token: int) -> str | None:
        if token not in known:
            known[token] = _visible(_text(run, texts, token))
        return known[token]

    return read


def _text(run: Any, texts: Texts | None, token: int) -> str | None:
    if texts is not None:
        return str(texts.get(token, f"#{token}") if isinstance(texts, Mapping) else texts(token))
    if run.meta.get("tokenizer") != "bytes":
        return None
    if not BYTES <= token < BYTES + 256:
        return SPECIAL[token] if 0 <= token < BYTES else f"#{token}"
    byte = token - BYTES
    return chr(byte) if 32 <= byte < 127 or byte in (9, 10) else f"\\x{byte:02x}"


def _visible(text: str | None) -> str | None:
    if text is None:
        return None
    text = text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
