"""The top of the report: what was traced, and what matters most."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from .groups import weights_of
from .report_page import items, rows_of, safe
from .report_tables import Tables

UNKNOWN = "not recorded"
WEIGHTS = {
    "tokens": "The documents of a {noun} are pooled by their tokens: a long one counts for more.",
    "documents": "The documents of a {noun} have equal weights, however long they are.",
}
TERMS = (
    "<b>nats</b>: the unit of divergence and entropy with the natural logarithm. <b>[a, b]</b>: 95 % interval."
    " <b>p</b>: how often chance alone gives a difference as large; <b>q</b>: p corrected for the number of"
    " comparisons."
    " <b>Effective experts</b>: how many equally used experts would be used as evenly as these. A <b>cell</b> is one"
    " expert of one layer for one group of documents."
)


def header(t: Tables, findings: Sequence[str]) -> str:
    """HTML above the table of contents."""
    run = t.runs[-1]
    layers = len(run.layers)
    word = "run" if len(t.names) == 1 else "runs"
    where = f"each of the {layers} recorded layers" if layers > 1 else "the recorded layer"
    if len(t.groups) > 1:
        shown = f"the {len(t.groups)} {t.noun}s use, how different their choices are,"
    else:
        shown = f"the documents, all of one {t.noun}, use"
    names = ", ".join(safe(name) for name in t.names)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    group = "" if t.noun == t.by else f" A group is the documents with one value of the label <b>{safe(t.by)}</b>."
    intro = (
        f"In {where} of this model a router sends every token to {run.top_k} of {run.num_experts} small networks, the"
        f" experts. This report shows which experts {shown} and how sure one can be of it.{group}"
    )
    intro += f" {WEIGHTS[weights_of(run)].format(noun=t.noun)}"
    if len(t.names) > 1:
        intro += f" It compares {len(t.names)} runs, in the order given."
    return "\n".join(
        [
            f"<header><h1>Router report: {names}</h1><p class=sub>{word.capitalize()} by <b>{safe(t.by)}</b> · made"
            f" {made}</p></header>",
            f"<p>{intro}</p>",
            f"<div class='card findings'><h2>Key findings</h2>{items(findings)}<p class=small>{TERMS}</p></div>",
            f"<div class=card><h2>What was traced</h2>{rows_of(_runs(t), wrap=True)}</div>",
        ]
    )


def _runs(t: Tables) -> pd.DataFrame:
    rows = []
    for name, run in zip(t.names, t.runs, strict=True):
        sizes = t.sizes[t.sizes["run"] == name]
        used, all_documents = int(sizes["docs"].sum()), len(run.documents)
        documents = (
            f"{used:,}" if used == all_documents else f"{used:,} of {all_documents:,} (with the label and tokens)"
        )
        rows.append(
            {
                "run": name,
                "model": _text(run.meta.get("model")),
                "traced": _text(run.meta.get("created")),
                "documents": documents,
                "tokens": f"{int(sizes['tokens'].sum()):,}",
                "dropped tokens": f"{run.dropped:,}",
                "note": _text(run.meta.get("note")),
                "layers": _span(run.layers),
                "experts": f"{run.num_experts}, top {run.top_k}",
                "recorded": ", ".join([*run.record, "counts"]),
                "numerics": ", ".join(
                    str(run.meta[key]) for key in ("dtype", "quantization", "numerics") if run.meta.get(key)
                ),
                "versions": _versions(run.meta.get("versions")),
                "directory": str(run.path),
            }
        )
    facts = [name for name in rows[0] if name != "run"]
    if all(run.meta.get("note") is None for run in t.runs):
        facts.remove("note")
    columns = [[row[fact] for fact in facts] for row in rows]
    return pd.DataFrame(dict(zip(["", *t.names], [facts, *columns], strict=True)))  # no run's name is empty


def _text(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def _versions(versions: Any) -> str:
    if not isinstance(versions, dict):
        return _text(versions)
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)


def _span(layers: Sequence[int]) -> str:
    """Layers as text: "30 (0 to 29)", or all their numbers where some are missing."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{len(layers)} ({layers[0]} to {layers[-1]})"
    return f"{len(layers)} ({', '.join(str(layer) for layer in layers)})"
