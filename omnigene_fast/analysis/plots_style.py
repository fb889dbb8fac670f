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


def plain(text: object, longest: int | None = None) -> str:
    """`text` as plotly shows it verbatim: escaped, and of more than `longest` characters without its middle."""
    shown = str(text)
    if longest is not None and len(shown) > longest:
        shown = shown[: (longest - 1) // 2] + "…" + shown[len(shown) - longest // 2 :]
    return html.escape(shown, quote=False).replace("$", "&#36;")  # between two of which plotly expects TeX


def percent(share: float, digits: int = 1) -> str:
    """A share as text."""
    return f"{100 * share:.{digits}f} %"


def best_value(table: pd.DataFrame) -> pd.Series:
    """The corrected value; the plug-in one where a group has a single document, which leaves nothing to correct by."""
    return table["corrected"].fillna(table["js" if "js" in table else "delta"])


def above_floor(table: pd.DataFrame) -> pd.Series:
    """Whether a divergence exceeds 95 % of those under shuffled labels; True where labels were not shuffled."""
    return ~(table["js"] <= table["floor_95"])


def axis_name(letter: str, number: int) -> str:
    """Plotly's name of the axis of the subplot `number`, from 0."""
    return letter if number == 0 else f"{letter}{number + 1}"


def unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def size_of(sizes: pd.DataFrame, group: str) -> str:
    """How much a group holds, in the last run."""
    docs, tokens = sizes.loc[sizes["group"] == group, ["docs", "tokens"]].iloc[-1]
    return f"{docs:,} document{'s' * (docs != 1)}, {tokens:,} tokens"


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
