"""The report's figures, one function each: a tidy table in, a plotly figure out; usable from a notebook.

Every table has a column `run`; where there is more than one run, buttons above the figure choose which is shown, or all
share the axes. Names of groups and runs come from data: plotly reads a subset of HTML, so they are escaped first.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plots_routes import routes
from .plots_style import (
    CELL,
    COLORS,
    EMPTY,
    INK,
    LEAST_LIFT,
    LONGEST,
    MUTED,
    ROW_OF_BUTTONS,
    SIGNIFICANT,
    axis_name,
    best_value,
    corrected_floor,
    expert_ticks,
    faint,
    fixed,
    grid_of,
    layer_ticks,
    layout,
    legend,
    note,
    percent,
    plain,
    row_decimals,
    run_buttons,
    size_of,
    told_apart,
    unique,
)
from .plots_tree import linkage, task_tree, tree_order


def heatmaps(table: pd.DataFrame, sizes: pd.DataFrame, top_k: int) -> go.Figure:
    """Share of the picks of each layer that go to each expert, a panel per group.

    Args:
        table: `specialty` of one or more runs.
        sizes: a row per (run, group) with docs and tokens.
        top_k: experts a token picks: no expert can have more than 1 / top_k of the picks.
    """
    runs, groups = unique(table["run"]), unique(table["group"])
    layers, experts = sorted(table["layer"].unique()), int(table["expert"].max()) + 1
    columns = 1 if len(groups) == 1 else 2 if len(groups) in (2, 4) else 3
    rows = math.ceil(len(groups) / columns)
    panel = max(120, min(220, 5 * len(layers) + 20))
    top, gap = 96 + 34 * (len(runs) > 1), 62
    height = top + rows * panel + (rows - 1) * gap + 56
    inner = height - top - 56
    figure = make_subplots(
        rows, columns, horizontal_spacing=0.035, vertical_spacing=gap / inner if rows > 1 else 0, shared_yaxes=True
    )
    for run in runs:
        of_run = table[table["run"] == run]
        for number, group in enumerate(groups):
            cells = of_run[of_run["group"] == group]
            share, mean = (grid_of(cells, layers, experts, column) for column in ("share", "mean_share"))
            lift = np.log2(np.maximum(share * experts, LEAST_LIFT))
            figure.add_trace(
                go.Heatmap(
                    z=lift.astype(np.float32),
                    y=layers,
                    customdata=np.stack([100 * share, share / np.maximum(mean, 1e-12)], -1).astype(np.float32),
                    coloraxis="coloraxis",
                    visible=run == runs[-1],
                    name=plain(f"{group}, {run}"),
                    hovertemplate="layer %{y}, expert %{x}<br>%{customdata[0]:.2f} % of the picks (an even spread:"
                    f" {percent(1 / experts, 2)})<br>%{{customdata[1]:.2f}} x the mean of the groups",
                ),
                row=number // columns + 1,
                col=number % columns + 1,
            )
    highest = math.log2(experts / top_k) if experts > top_k else 1.0
    ticks = [tick for tick in range(round(math.log2(LEAST_LIFT)), 10) if tick <= highest]
    labels = [f"1/{2**-tick}" if tick < 0 else f"{2**tick}" for tick in ticks]
    labels[0] = "≤ " + labels[0]
    figure.update_layout(
        **layout(height, top=top, bottom=56, left=46, right=8),
        coloraxis={
            "colorscale": "Cividis",
            "cmin": math.log2(LEAST_LIFT),
            "cmax": highest,
            "colorbar": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1 + 40 / inner,
                "yanchor": "bottom",
                "len": 0.5,
                "thickness": 10,
                "tickvals": ticks,
                "ticktext": labels,
                "title": {"text": "times as often as an even spread", "side": "top", "font": {"size": 12}},
            },
        },
    )
    for number, group in enumerate(groups):
        size = f"<span style='font-size:10px;color:{MUTED}'>{size_of(sizes, group)}</span>"
        text = f"<b>{plain(group, LONGEST)}</b><br>{size}"
        note(
            figure,
            text,
            x=0,
            y=1,
            xref=f"{axis_name('x', number)} domain",
            yref=f"{axis_name('y', number)} domain",
            yshift=2,
            size=12,
        )
    figure.update_xaxes(tickvals=expert_ticks(experts), showgrid=False, ticks="outside", ticklen=3)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="outside", ticklen=3)
    figure.update_yaxes(tickvals=layer_ticks(layers, 4))
    figure.update_yaxes(title={"text": "layer", "standoff": 4}, col=1)
    for column in range(1, columns + 1):
        last = max(row for row in range(1, rows + 1) if (row - 1) * columns + column <= len(groups))
        below = axis_name("y", (last - 1) * columns + column - 1)
        across = axis_name("x", (last - 1) * columns + column - 1)
        place = {"x": 0.5, "xref": f"{across} domain", "y": 0, "yref": f"{below} domain", "yshift": -36}
        note(figure, "expert", size=12, xanchor="center", **place)
    run_buttons(figure, runs, [run for run in runs for _ in groups], y=1 + (top - 4) / inner)
    return figure


def divergence_matrix(table: pd.DataFrame, order: Sequence[str]) -> go.Figure:
    """Jensen-Shannon divergence of every pair of groups; grey where q says that the two cannot be told apart.

    Args:
        table: `divergence_summary` of one or more runs; q_value NaN: not tested, never grey.
        order: of the groups, from `tree_order`.
    """
    runs = unique(table["run"])
    unit = str(table["unit"].iloc[0])
    place = {group: number for number, group in enumerate(order)}
    names = [plain(group, LONGEST) for group in order]
    table = table.assign(value=best_value(table), apart=told_apart(table))
    highest = max(float(table["value"].max()), 1e-6)
    top = 58 + 34 * (len(runs) > 1)
    bottom = 24 + round(5.2 * min(LONGEST, max(len(str(group)) for group in order)))
    height = top + CELL * len(order) + bottom
    figure, owner = go.Figure(), []
    for run in runs:
        of_run = table[table["run"] == run]
        grids = np.full((2, len(order), len(order)), np.nan)
        words, written = (np.full((len(order), len(order)), "", object) for _ in range(2))
        for _, row in of_run.iterrows():
            for i, j in ((place[row["a"]], place[row["b"]]), (place[row["b"]], place[row["a"]])):
                grids[0 if row["apart"] else 1, i, j] = row["value"]
                words[i, j] = _pair(row)
                written[i, j] = fixed(row["value"], 2 if len(order) <= 16 else 1)
        # Each trace writes into its own cells only: the colour of the writing is chosen for them.
        own = [np.where(np.isnan(grid), "", written) for grid in grids]
        shared = {
            "customdata": words,
            "hovertemplate": "%{customdata}<extra></extra>",
            "texttemplate": "%{text}" if len(order) <= 24 else None,
            "textfont": {"size": 11},
            "xgap": 1,
            "ygap": 1,
            "hoverongaps": False,
            "visible": run == runs[-1],
        }
        if not np.isnan(grids[0]).all():
            owner.append(run)
            figure.add_trace(
                go.Heatmap(
                    z=grids[0],
                    text=own[0],
                    colorscale="Viridis",
                    zmin=0,
                    zmax=highest,
                    colorbar={"title": {"text": unit}, "thickness": 12, "len": 1},
                    name=plain(run),
                    **shared,
                )
            )
        if not np.isnan(grids[1]).all():
            owner.append(run)
            figure.add_trace(
                go.Heatmap(
                    z=grids[1],
                    text=own[1],
                    colorscale=[[0, EMPTY], [1, EMPTY]],
                    showscale=False,
                    name=plain(run) + ", not told apart",
                    **shared,
                )
            )
    inner = height - top - bottom
    figure.update_layout(**layout(height, top=top, bottom=bottom, left=150, right=20))
    figure.update_xaxes(tickvals=[*range(len(order))], ticktext=names, tickangle=-45, showgrid=False, zeroline=False)
    figure.update_yaxes(
        tickvals=[*range(len(order))], ticktext=names, autorange="reversed", showgrid=False, zeroline=False
    )
    if table["q_value"].notna().any():
        key = f"<span style='color:{EMPTY}'>■</span> not told apart (q ≥ {SIGNIFICANT})"
        note(figure, key, x=0, y=1, xref="paper", yref="paper", yshift=6, size=12)
    run_buttons(figure, runs, owner, y=1 + (top - 4) / inner)
    return figure


def _pair(row: pd.Series) -> str:
    """What the hover of a pair says."""
    digits = row_decimals(row)
    text = f"{plain(row['a'])} and {plain(row['b'])}<br>{fixed(row['value'], digits)} {row['unit']}{_ends(row, digits)}"
    text += _beside_floor(row, digits)
    if row["q_value"] == row["q_value"]:
        text += f"<br>{'told apart' if row['apart'] else 'NOT told apart'}, q = {row['q_value']:.2g}"
    return text


def _ends(row: pd.Series, digits: int) -> str:
    return "" if row["low"] != row["low"] else f" [{fixed(row['low'], digits)}, {fixed(row['high'], digits)}]"


def _beside_floor(row: pd.Series, digits: int) -> str:
    """The uncorrected value beside the floor, which is uncorrected too."""
    if row["floor_95"] != row["floor_95"]:
        return ""
    js, floor = fixed(row["js"], digits), fixed(row["floor_95"], digits)
    return f"<br>uncorrected {js}, noise floor {floor}, p = {row['p_value']:.2g}"


def differentiation_curves(table: pd.DataFrame) -> go.Figure:
    """Expert differentiation per layer, a line and a band per run, dashed the noise floor of corrected values.

    Args:
        table: `differentiation` of one or more runs; its rows "mean" are left out.
    """
    figure = go.Figure()
    unit = str(table["unit"].iloc[0])
    table = table[table["layer"] != "mean"]
    for number, run in enumerate(unique(table["run"])):
        rows = table[table["run"] == run].sort_values("layer")
        color, name = COLORS[number % len(COLORS)], plain(run, LONGEST)
        layers = rows["layer"].tolist()
        figure.add_trace(
            go.Scatter(
                x=layers + layers[::-1],
                y=rows["high"].tolist() + rows["low"].tolist()[::-1],
                mode="lines",
                fill="toself",
                fillcolor=faint(color),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=str(number),
                name=name + ", 95 % interval",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=best_value(rows),
                text=[_layer(row) for _, row in rows.assign(value=best_value(rows)).iterrows()],
                mode="lines+markers",
                line={"color": color, "width": 2.5},
                marker={"size": 6, "symbol": number},
                legendgroup=str(number),
                name=name,
                hovertemplate="%{text}",
            )
        )
        if rows["floor_95"].isna().all():
            continue
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=corrected_floor(rows),
                mode="lines",
                line={"color": color, "width": 1.5, "dash": "dash"},
                legendgroup=str(number),
                name=name + ", corrected noise floor",
                hoverinfo="skip",
            )
        )
    figure.update_layout(**layout(440, top=70, bottom=56, left=70, right=16), legend=legend())
    figure.update_xaxes(title="layer", zeroline=False, tickvals=layer_ticks(sorted(table["layer"].unique()), 10))
    figure.update_yaxes(title=f"expert differentiation, {unit}", rangemode="tozero")
    return figure


def _layer(row: pd.Series) -> str:
    """What the hover of a layer says."""
    digits = row_decimals(row)
    value = f"{fixed(row['value'], digits)} {row['unit']}{_ends(row, digits)}"
    return f"layer {row['layer']}: {value}{_beside_floor(row, digits)}"


def decomposition_bars(table: pd.DataFrame, names: Sequence[str]) -> go.Figure:
    """What each stage of training adds to expert differentiation, with intervals, a panel per convention.

    Args:
        table: rows of `decompose` whose layer is "mean".
        names: of the stages in the order of the table.
    """
    titles = {"divergence": "divergence: mean of JS", "distance": "distance: mean of √JS"}
    conventions, stages = unique(table["convention"]), unique(table["stage"])
    figure = make_subplots(1, len(conventions), horizontal_spacing=0.14)
    places = [*range(len(stages))]
    for number, convention in enumerate(conventions):
        rows = table[table["convention"] == convention].set_index("stage").loc[stages]
        value = best_value(rows).to_numpy(float)
        figure.add_trace(
            go.Bar(
                x=places,
                y=value,
                width=0.5,
                marker={"color": [COLORS[place + 1] for place in places]},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": rows["high"].to_numpy(float) - value,
                    "arrayminus": value - rows["low"].to_numpy(float),
                    "color": INK,
                    "thickness": 1.6,
                    "width": 7,
                },
                name=plain(convention),
                showlegend=False,
                hovertext=[
                    f"{fixed(row['value'], row_decimals(row), '+')}{_ends(row, row_decimals(row))}"
                    for _, row in rows.assign(value=value).iterrows()
                ],
                hovertemplate="%{hovertext}<extra></extra>",
            ),
            row=1,
            col=number + 1,
        )
        text = f"<b>{plain(titles.get(convention, convention))}</b>"
        note(figure, text, x=0, y=1, xref=f"{axis_name('x', number)} domain", yref="paper", yshift=8, size=13)
        figure.update_yaxes(title=plain(rows["unit"].iloc[0]), row=1, col=number + 1)
        ticks = [
            f"{plain(name, 2 * LONGEST)}<br><b>{fixed(one, 3, '+')}</b>" for name, one in zip(names, value, strict=True)
        ]
        figure.update_xaxes(tickvals=places, ticktext=ticks, row=1, col=number + 1)
    figure.update_layout(**layout(350, top=44, bottom=54, left=72, right=16))
    figure.update_xaxes(showgrid=False, range=[-0.6, len(places) - 0.4])
    figure.update_yaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1)
    return figure


def effective_experts(table: pd.DataFrame, num_experts: int) -> go.Figure:
    """Effective experts, exp(entropy), per layer and group, a panel per run.

    Args:
        table: `load` of one or more runs.
        num_experts: E.
    """
    runs, groups = unique(table["run"]), unique(table["group"])
    layers = sorted(table["layer"].unique())
    # Side by side while the names of the runs fit above their panels, else one below the other.
    beside = len(runs) <= 3 and sum(len(str(run)) for run in runs) <= ROW_OF_BUTTONS
    rows, columns = (1, len(runs)) if beside else (len(runs), 1)
    panel, gap = 24 * len(groups) + 10, 64
    inner = rows * panel + (rows - 1) * gap
    spacing = gap / inner if rows > 1 else 0
    figure = make_subplots(rows, columns, shared_yaxes=beside, horizontal_spacing=0.02, vertical_spacing=spacing)
    for number, run in enumerate(runs):
        of_run = table[table["run"] == run]
        grid = of_run.pivot(index="group", columns="layer", values="effective_experts").reindex(groups)[layers]
        words = np.array([[plain(group)] * len(layers) for group in groups], object)
        figure.add_trace(
            go.Heatmap(
                z=grid.to_numpy(float),
                x=layers,
                coloraxis="coloraxis",
                xgap=0.5,
                ygap=1,
                text=words,
                name=plain(run),
                hovertemplate="%{text}, layer %{x}<br>%{z:.1f} effective experts<extra></extra>",
            ),
            row=1 if beside else number + 1,
            col=number + 1 if beside else 1,
        )
        if len(runs) > 1:
            text = f"<b>{plain(run, LONGEST)}</b>"
            across, down = (f"{axis_name(letter, number)} domain" for letter in "xy")
            note(figure, text, size=13, x=0, xref=across, y=1, yref=down, yshift=4)
    scale = {"title": {"text": f"of {num_experts}"}, "thickness": 12, "nticks": max(2, min(8, inner // 40))}
    figure.update_layout(
        **layout(inner + 90, top=34, bottom=56, left=150, right=20),
        coloraxis={"colorscale": "Cividis", "colorbar": scale},
    )
    figure.update_xaxes(title={"text": "layer", "standoff": 4}, showgrid=False, zeroline=False)
    figure.update_xaxes(tickvals=layer_ticks(layers, 6))
    names = [plain(group, LONGEST) for group in groups]
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    figure.update_yaxes(tickvals=[*range(len(groups))], ticktext=names)
    return figure


__all__ = [
    "decomposition_bars",
    "differentiation_curves",
    "divergence_matrix",
    "effective_experts",
    "heatmaps",
    "linkage",
    "routes",
    "task_tree",
    "tree_order",
]
