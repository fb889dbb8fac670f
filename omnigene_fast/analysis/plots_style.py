"""What the report's figures share: colours, layout, names as plotly shows them, buttons that choose a run."""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

# Okabe and Ito's palette, told apart with every kind of colour blindness; its yellow is too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK, MUTED, GRID, EMPTY = "#1f2933", "#5f6b76", "#e4e8ec", "#d9dde2"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
LONGEST = 24  # characters of a name on an axis; the hover shows it whole
ROW_OF_BUTTONS = 60  # characters of names that fit beside each other at the narrowest width
LEAST_LIFT = 1 / 8  # rarer than this is shown as this
CELL = 34  # pixels a row of a labelled matrix is high
SIGNIFICANT = 0.05  # q-value below which the report speaks of a difference or a preference
# Characters that turn the text after them around, beyond the name they stand in: shown as their number.
TURNING = {number: f"\\u{number:04x}" for number in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def plain(text: object, longest: int | None = None) -> str:
    """`text` as plotly shows it verbatim: escaped, and of more than `longest` characters without its middle."""
    shown = straight(text)
    if longest is not None and len(shown) > longest:
        shown = shown[: (longest - 1) // 2] + "…" + shown[len(shown) - longest // 2 :]
    return html.escape(shown, quote=False).replace("$", "&#36;")  # between two of which plotly expects TeX


def straight(text: object) -> str:
    """`text` with the characters that reverse a line written out."""
    return str(text).translate(TURNING)


def percent(share: float, digits: int = 1) -> str:
    """A share as text."""
    return f"{100 * share:.{digits}f} %"


def best_value(table: pd.DataFrame) -> pd.Series:
    """The corrected value; the plug-in one where a group has a single document, which leaves nothing to correct by."""
    return table["corrected"].fillna(table["js" if "js" in table else "delta"])


def fixed(value: float, digits: int, sign: str = "") -> str:
    """A number with `digits` decimals; what rounds to 0 has no sign. `sign`: "+" for one before positive numbers."""
    text = f"{value:{sign}.{digits}f}"
    return text if any(digit in text for digit in "123456789n") else text.lstrip("+-")


def decimals(width: float) -> int:
    """As many decimals as a number has that is known to `width`, from 3 to 5."""
    return min(5, max(3, -math.floor(math.log10(width)))) if 0 < width < math.inf else 3


def row_decimals(row: pd.Series) -> int:
    """Decimals of a divergence, its interval and floor: what half the interval, or the spread of the null, resolves."""
    half = (row["high"] - row["low"]) / 2
    return decimals(half if half == half else row.get("floor_95", math.nan) - row.get("floor", math.nan))


def told_apart(table: pd.DataFrame) -> pd.Series:
    """Whether the difference of two groups is significant among all pairs; True where it was not tested."""
    return ~(table["q_value"] >= SIGNIFICANT)


def corrected_floor(table: pd.DataFrame) -> pd.Series:
    """What a corrected value stays below in 95 % of the cases if groups are routed alike; the correction takes off the
    mean of the null, which the values of the null still have."""
    return table["floor_95"] - table["floor"]


def axis_name(letter: str, number: int) -> str:
    """Plotly's name of the axis of the subplot `number`, from 0."""
    return letter if number == 0 else f"{letter}{number + 1}"


def unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def several(count: int, noun: str) -> str:
    """How many, with the noun: "1 document", "2,000 documents"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_of(sizes: pd.DataFrame, group: str) -> str:
    """How much a group holds, in the last run."""
    docs, tokens = sizes.loc[sizes["group"] == group, ["docs", "tokens"]].iloc[-1]
    return f"{several(docs, 'document')}, {several(tokens, 'token')}"


def grid_of(cells: pd.DataFrame, layers: Sequence[int], experts: int, column: str) -> Any:
    """[layers, experts] of one column; 0 where a cell has no row."""
    out = np.zeros((len(layers), experts))
    places = {layer: number for number, layer in enumerate(layers)}
    out[cells["layer"].map(places).to_numpy(int), cells["expert"].to_numpy(int)] = cells[column].to_numpy(float)
    return out


def expert_ticks(experts: int) -> list[int]:
    """About four round numbers from 0."""
    return [*range(0, experts, max(1, 2 ** round(math.log2(max(experts / 4, 1)))))]


def layer_ticks(layers: Sequence[int], most: int) -> list[int]:
    """At most `most` of the layers, evenly spaced from the first on."""
    step = math.ceil(len(layers) / most)
    step = next(nice for nice in (1, 2, 5, 10, 20, 50, 100, step) if nice >= step)
    return [int(layer) for layer in layers[::step]]


def faint(color: str) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def layout(height: int, *, top: int = 40, bottom: int = 50, left: int = 60, right: int = 20) -> dict[str, Any]:
    axis = {"gridcolor": GRID, "linecolor": GRID, "tickfont": {"size": 11}, "title": {"font": {"size": 12}}}
    axis |= {"zerolinecolor": GRID}
    return {
        "template": {"layout": {"xaxis": axis, "yaxis": axis}},
        "height": height,
        "margin": {"t": top, "b": bottom, "l": left, "r": right},
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left", "namelength": -1},
    }


def legend() -> dict[str, Any]:
    return {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "groupclick": "togglegroup"}


def note(figure: go.Figure, text: str, *, size: int, xanchor: str = "left", **place: Any) -> None:
    """Text without an arrow, its lower edge at `place`."""
    figure.add_annotation(
        text=text, showarrow=False, align="left", xanchor=xanchor, yanchor="bottom", font={"size": size}, **place
    )


def run_buttons(figure: go.Figure, runs: Sequence[str], owner: Sequence[str | None], *, y: float) -> None:
    """A button per run that shows its traces and hides the others'; a list where buttons would need too much room.

    Args:
        owner: the run of each trace of the figure, None for those that always stay.
        y: of the upper edge, in units of the plot's height.
    """
    if len(runs) < 2:
        return
    labels = [plain(run, LONGEST) for run in runs]
    buttons = [
        {"label": label, "method": "restyle", "args": [{"visible": [one in (None, run) for one in owner]}]}
        for label, run in zip(labels, runs, strict=True)
    ]
    menu = {
        "type": "buttons" if sum(len(str(run)) + 4 for run in runs) <= ROW_OF_BUTTONS else "dropdown",
        "direction": "right",
        "active": len(runs) - 1,
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": y,
        "yanchor": "top",
        "pad": {"t": 0, "b": 0, "l": 0, "r": 0},
        "bgcolor": "white",
        "bordercolor": "#b8c0c8",
        "font": {"size": 12},
    }
    if menu["type"] == "dropdown":
        menu["direction"] = "down"
    figure.update_layout(updatemenus=[menu])
