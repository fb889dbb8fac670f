"""The report as one HTML page: style, scripts, and the escaping of everything that comes from data."""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pandas as pd

from .plots_style import straight
from .report_scripts import DRAW, PAINT, STYLE

SHOWN_ROWS = 400  # of a table on the page; its CSV has all


@dataclass
class Section:
    """A part of the report. `words`, `extra` are HTML, already escaped; the rest is text."""

    anchor: str
    title: str
    words: list[str]
    figure: Any = None  # plotly figure
    label: str = ""  # what the figure is, for screen readers
    facts: dict[str, str] = field(default_factory=dict)  # unit, n, interval, floor: under the figure
    csv: tuple[str, ...] = ()  # names of files beside the report
    tables: list[tuple[str, pd.DataFrame]] = field(default_factory=list)  # title, rows
    extra: str = ""
    open_tables: bool = False  # shown without a click


def safe(text: object) -> str:
    """`text` for HTML, inside an element or a quoted attribute."""
    return html.escape(straight(text), quote=True)


def in_script(value: Any) -> str:
    """`value` as JSON that cannot end the <script> it stands in."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def number(value: object) -> str:
    """A cell of a table: integers whole, others to four significant digits, nothing for a missing value, a dash for an
    end of an interval that is not bounded."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return str(value)
    as_float = float(value)
    if math.isinf(as_float):
        return "–"
    if as_float == int(as_float) and abs(as_float) < 1e15 and not isinstance(value, float):
        return f"{int(as_float):,}"
    return f"{as_float or 0.0:.4g}"


def rows_of(table: pd.DataFrame, wrap: bool = False) -> str:
    """An HTML table in a box of its own that scrolls; `wrap`: long cells take several lines."""
    numeric = {name: table[name].dtype.kind in "iuf" for name in table.columns}
    head = "".join(f"<th{' class=n' if numeric[name] else ''}>{safe(name)}</th>" for name in table.columns)
    lines = []
    for row in table.head(SHOWN_ROWS).itertuples(index=False):
        cells = zip(table.columns, row, strict=True)
        lines.append(
            "<tr>"
            + "".join(f"<td{' class=n' if numeric[name] else ''}>{safe(number(value))}</td>" for name, value in cells)
            + "</tr>"
        )
    rest = len(table) - SHOWN_ROWS
    more = f"<p class=small>{rest:,} more rows are in the CSV.</p>" if rest > 0 else ""
    box = "scroll wrap" if wrap else "scroll"
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f"<div class='{box}'><table>{body}</table></div>{more}"


def page(title: str, header: str, sections: Sequence[Section], folder: str, *, painted: Any = None) -> str:
    """The whole file.

    Args:
        title: of the page, text.
        header: HTML above the table of contents, escaped.
        sections: in order.
        folder: name of the directory with the CSV files, beside the page.
        painted: what `PAINT` colours, or None.
    """
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), DRAW] + ([PAINT] if painted is not None else [])
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    contents = "".join(f'<li><a href="#{part.anchor}">{safe(part.title)}</a></li>' for part in sections)
    body = "".join(_section(part, place, folder) for place, part in enumerate(sections, 1))
    data = [] if painted is None else [f'<script type="application/json" id="painted">{in_script(painted)}</script>']
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            header,
            f"<nav aria-label=Contents><h2>Contents</h2><ol>{contents}</ol></nav>",
            body,
            "</main>",
            *data,
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _section(part: Section, place: int, folder: str) -> str:
    out = [f'<section id="{part.anchor}">', f"<h2><span>{place}</span>{safe(part.title)}</h2>"]
    out += [f"<p>{words}</p>" for words in part.words]
    if part.figure is not None:
        height = int(part.figure.layout.height)
        out.append(
            f'<figure><div class="plot" id="plot-{part.anchor}" role="img" aria-label="{safe(part.label)}"'
            f' style="min-height:{height}px"></div>'
            f'<script type="application/json" class="spec">{in_script(part.figure.to_json())}</script></figure>'
        )
    out.append(part.extra)
    facts = [f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in part.facts.items()]
    if part.csv:
        links = ", ".join(f'<a href="{quote(folder)}/{quote(name)}">{safe(name)}</a>' for name in part.csv)
        facts.append(f"<div><dt>Data</dt><dd>{links}</dd></div>")
    if facts:
        out.append(f"<dl class=facts>{''.join(facts)}</dl>")
    for title, table in part.tables:
        out.append(f"<details{' open' * part.open_tables}><summary>{safe(title)}</summary>{rows_of(table)}</details>")
    return "\n".join([*out, "</section>"])


def items(lines: Iterable[str]) -> str:
    """A list of HTML lines."""
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"
