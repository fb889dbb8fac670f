"""Steps between experts of consecutive layers."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .plots_style import INK, SIGNIFICANT, expert_ticks, layer_ticks, layout, percent, plain, run_buttons, unique


def routes(table: pd.DataFrame, num_experts: int) -> go.Figure:
    """The strongest steps from an expert of one layer to an expert of the next.

    Args:
        table: a row per edge with run, layer, expert, next_layer, next_expert, share, lift and q_value; those of q of
            0.05 or more are dotted.
        num_experts: E, the height of the figure.
    """
    runs = unique(table["run"])
    top = 24 + 40 * (len(runs) > 1)
    height = top + 420 + 56
    figure, owner = go.Figure(), []
    for run in runs:
        edges = table[table["run"] == run]
        strongest = float(edges["share"].max())
        for _, edge in edges.iterrows():
            owner.append(run)
            figure.add_trace(
                go.Scatter(
                    x=[edge["layer"], edge["next_layer"]],
                    y=[edge["expert"], edge["next_expert"]],
                    mode="lines+markers",
                    line={
                        "width": 1 + 4 * float(edge["share"]) / strongest,
                        "color": _ramp(float(edge["lift"]), table),
                        "dash": "solid" if edge["q_value"] < SIGNIFICANT else "dot",
                    },
                    marker={"size": 6, "color": INK},
                    showlegend=False,
                    visible=run == runs[-1],
                    name=plain(run),
                    hovertemplate=f"layer {edge['layer']}, expert {edge['expert']} → layer {edge['next_layer']}, expert"
                    f" {edge['next_expert']}<br>{percent(edge['share'])} of the tokens"
                    f"<br>{edge['lift']:.1f} x independent choices<extra></extra>",
                )
            )
    low, high = _lift_range(table)
    figure.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={
                "color": [low],
                "cmin": low,
                "cmax": high,
                "colorscale": "Cividis",
                "reversescale": True,
                "showscale": True,
                "colorbar": {
                    "title": {"text": "lift"},
                    "thickness": 12,
                    "tickvals": [low, (low + high) / 2, high],
                    "ticktext": [f"{2**tick:.3g}" for tick in (low, (low + high) / 2, high)],
                },
            },
            hoverinfo="skip",
            showlegend=False,
            name="scale",
        )
    )
    figure.update_layout(**layout(height, top=top, bottom=56, left=64, right=20))
    layers = [*table["layer"], *table["next_layer"]]
    figure.update_xaxes(title="layer", zeroline=False, range=[min(layers) - 0.7, max(layers) + 0.7])
    figure.update_xaxes(tickvals=layer_ticks(sorted(set(layers)), 10))
    figure.update_yaxes(title="expert (its number within its layer)", zeroline=False, range=[-1, num_experts])
    figure.update_yaxes(tickvals=expert_ticks(num_experts))
    run_buttons(figure, runs, [*owner, None], y=1 + (top - 4) / 420)
    return figure


def _lift_range(table: pd.DataFrame) -> tuple[float, float]:
    lifts = np.log2(np.maximum(table["lift"].to_numpy(float), 1e-6))
    low, high = float(lifts.min()), float(lifts.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ramp(lift: float, table: pd.DataFrame) -> str:
    """The colour of a lift on the (reversed) cividis scale of `routes`."""
    from plotly.colors import sample_colorscale

    low, high = _lift_range(table)
    place = (math.log2(max(lift, 1e-6)) - low) / (high - low)
    return str(sample_colorscale("Cividis", [1 - place])[0])
