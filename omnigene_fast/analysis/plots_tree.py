"""Groups as a tree: alike ones joined first."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .plots_style import COLORS, LONGEST, axis_name, best_value, layout, note, plain, unique


def task_tree(table: pd.DataFrame) -> go.Figure:
    """Groups joined by average linkage on their divergence, a panel per run on one scale.

    Args:
        table: `divergence_summary` of one or more runs; at least three groups.
    """
    from scipy.cluster.hierarchy import dendrogram

    runs = unique(table["run"])
    trees = [dendrogram(linkage(table[table["run"] == run])[1], no_plot=True) for run in runs]
    names = [linkage(table[table["run"] == run])[0] for run in runs]
    panel, gap = 20 * len(names[0]) + 12, 48
    inner = len(runs) * panel + (len(runs) - 1) * gap
    figure = make_subplots(len(runs), 1, shared_xaxes=True, vertical_spacing=gap / inner if len(runs) > 1 else 0)
    for number, (run, tree, groups) in enumerate(zip(runs, trees, names, strict=True)):
        x: list[float | None] = []
        y: list[float | None] = []
        for heights, places in zip(tree["dcoord"], tree["icoord"], strict=True):
            x += [*heights, None]
            y += [*places, None]
        color = COLORS[number % len(COLORS)]
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                line={"color": color, "width": 2},
                name=plain(run),
                showlegend=False,
                hovertemplate="joined at %{x:.3g}<extra></extra>",
            ),
            row=number + 1,
            col=1,
        )
        leaves = [10 * place + 5 for place in range(len(groups))]
        ticks = [plain(groups[leaf], LONGEST) for leaf in tree["leaves"]]
        figure.update_yaxes(tickvals=leaves, ticktext=ticks, autorange="reversed", row=number + 1, col=1)
        if len(runs) > 1:
            text = f"<b>{plain(run, LONGEST)}</b>"
            note(figure, text, x=0, y=1, xref="paper", yref=f"{axis_name('y', number)} domain", yshift=4, size=13)
    figure.update_layout(**layout(inner + 30 * (len(runs) > 1) + 62, top=8 + 22 * (len(runs) > 1), left=150, right=16))
    figure.update_yaxes(showgrid=False, zeroline=False, side="left")
    longest = max(max(max(heights) for heights in tree["dcoord"]) for tree in trees)
    figure.update_xaxes(range=[0, 1.04 * longest or 1], zeroline=False, showticklabels=True)
    figure.update_xaxes(
        title={"text": f"mean divergence of what is joined, {table['unit'].iloc[0]}", "standoff": 6}, row=len(runs)
    )
    return figure


def linkage(pairs: pd.DataFrame) -> tuple[list[str], Any]:
    """Groups, and their average linkage on the corrected divergence, below 0 counted as 0; leaves in the best order."""
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    groups = unique([*pairs["a"], *pairs["b"]])
    place = {group: number for number, group in enumerate(groups)}
    square = np.zeros((len(groups), len(groups)))
    for a, b, value in zip(pairs["a"], pairs["b"], best_value(pairs), strict=True):
        square[place[a], place[b]] = square[place[b], place[a]] = max(float(value), 0.0)
    return groups, hierarchy.linkage(squareform(square), "average", optimal_ordering=True)


def tree_order(pairs: pd.DataFrame) -> list[str]:
    """The groups as the leaves of their tree: alike ones side by side."""
    groups = unique([*pairs["a"], *pairs["b"]])
    if len(groups) < 3:
        return groups
    from scipy.cluster.hierarchy import leaves_list

    groups, joined = linkage(pairs)
    return [groups[leaf] for leaf in leaves_list(joined)]
