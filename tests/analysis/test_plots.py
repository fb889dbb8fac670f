"""The figure builders: that what is drawn is what the table says."""

import numpy as np
import pandas as pd
import pytest

from omnigene_fast.analysis import plots
from omnigene_fast.analysis.plots_style import fixed, plain


def pairs(values, run="base", floor=0.05):
    """A table as `divergence_summary` gives it, from {(a, b): js}."""
    rows = [
        {"run": run, "a": a, "b": b, "js": js, "corrected": js - 0.01, "low": js - 0.03, "high": js + 0.01}
        for (a, b), js in values.items()
    ]
    table = pd.DataFrame(rows).assign(floor=floor / 2, floor_95=floor, p_value=0.01, unit="nats")
    return table.assign(q_value=np.where(table["js"] > floor, 0.02, 0.4))


NEAR = {("a", "b"): 0.1, ("a", "c"): 0.4, ("a", "d"): 0.41, ("b", "c"): 0.42, ("b", "d"): 0.4, ("c", "d"): 0.04}


def shown(figure):
    return [trace for trace in figure.data if trace.visible is not False]


def test_matrix_is_symmetric_and_marks_what_is_not_told_apart():
    figure = plots.divergence_matrix(pairs(NEAR), ["a", "b", "c", "d"])
    above, below = figure.data
    first, second = (np.array(trace.z, float) for trace in (above, below))
    assert first[0, 1] == first[1, 0] == pytest.approx(0.09)
    assert np.isnan(first[2, 3])
    assert second[2, 3] == second[3, 2] == pytest.approx(0.03)
    assert np.isnan(second).sum() == 14
    assert len(set(color for _, color in below.colorscale)) == 1
    assert below.text[2][3] == "0.03"
    # A cell is written into by one trace: two writings over each other cannot be read.
    written = np.array([[[bool(cell) for cell in row] for row in trace.text] for trace in (above, below)])
    assert np.array_equal(written, ~np.isnan([first, second]))
    sentence = (
        "c and d<br>0.030 nats [0.010, 0.050]<br>uncorrected 0.040, noise floor 0.050, p = 0.01<br>NOT told apart"
    )
    assert below.customdata[2][3] == sentence + ", q = 0.4"
    assert "[0.070, 0.110]" in above.customdata[0][1]
    # The negative controls: nothing is marked if all are told apart, or if nothing was tested.
    for table in (pairs(NEAR, floor=0.01), pairs(NEAR).assign(q_value=np.nan)):
        assert len(plots.divergence_matrix(table, ["a", "b", "c", "d"]).data) == 1
    assert not plots.divergence_matrix(table, ["a", "b", "c", "d"]).layout.annotations


def test_matrix_goes_by_the_q_value_and_not_by_the_floor():
    """Above its floor, as one in twenty is of the pairs that do not differ: among many pairs no difference."""
    table = pairs({("a", "b"): 0.06, ("a", "c"): 0.4, ("b", "c"): 0.4}).assign(q_value=[0.2, 0.001, 0.001])
    _, grey = plots.divergence_matrix(table, [*"abc"]).data
    assert grey.z[0][1] == pytest.approx(0.05)


def test_no_negative_zero_is_written():
    table = pairs({("a", "b"): 0.0098, ("a", "c"): 0.4, ("b", "c"): 0.4}).assign(q_value=[0.2, 0.001, 0.001])
    _, grey = plots.divergence_matrix(table, [*"abc"]).data
    assert grey.z[0][1] < 0
    assert grey.text[0][1] == "0.00"
    assert "<br>0.000 nats [-0.020, 0.020]" in grey.customdata[0][1]
    assert [fixed(-0.0004, 3), fixed(-0.0004, 4), fixed(-0.0, 1, "+"), fixed(0.25, 1, "+")] == [
        "0.000",
        "-0.0004",
        "0.0",
        "+0.2",
    ]


def test_hovers_have_the_digits_that_the_interval_resolves():
    table = pairs({("a", "b"): 0.01023}).assign(low=0.00011, high=0.00035, floor_95=0.00071)
    (trace,) = plots.divergence_matrix(table, ["a", "b"]).data
    assert "0.0002 nats [0.0001, 0.0003]<br>uncorrected 0.0102, noise floor 0.0007" in trace.customdata[0][1]


def test_matrix_follows_the_order_given():
    figure = plots.divergence_matrix(pairs(NEAR, floor=0.0), ["d", "a", "c", "b"])
    grid = np.array(figure.data[0].z, float)
    assert grid[0, 2] == pytest.approx(0.03)
    assert grid[3, 1] == pytest.approx(0.09)
    assert list(figure.layout.yaxis.ticktext) == ["d", "a", "c", "b"]


def test_tree_puts_what_is_alike_side_by_side_at_its_height():
    order = plots.tree_order(pairs(NEAR))
    assert abs(order.index("a") - order.index("b")) == 1
    assert abs(order.index("c") - order.index("d")) == 1
    figure = plots.task_tree(pairs(NEAR))
    joins = sorted({round(x, 6) for x in figure.data[0].x if x})
    assert joins == pytest.approx([0.03, 0.09, np.mean([0.39, 0.40, 0.41, 0.39])])
    assert plots.tree_order(pairs({("x", "y"): 0.2})) == ["x", "y"]


def test_tree_takes_negative_and_missing_values():
    table = pairs({("a", "b"): 0.005, ("a", "c"): 0.3, ("b", "c"): 0.2})
    table.loc[2, "corrected"] = np.nan
    joins = {round(x, 6) for x in plots.task_tree(table).data[0].x if x}
    assert joins == {round(np.mean([0.29, 0.2]), 6)}


def curve(run, values):
    rows = [{"layer": layer, "corrected": value, "js": value + 0.01} for layer, value in enumerate(values)]
    rows.append({"layer": "mean", "corrected": 99.0, "js": 99.0})
    table = pd.DataFrame(rows).assign(run=run, unit="nats", floor=0.008, floor_95=0.02, p_value=0.002)
    return table.assign(low=table["corrected"] - 0.1, high=table["corrected"] + 0.1)


def test_curves_have_a_line_a_band_and_a_floor_per_run_without_the_mean():
    figure = plots.differentiation_curves(pd.concat([curve("base", [0.1, 0.2]), curve("cpt", [0.3, 0.4])]))
    assert len(figure.data) == 6
    band, line, floor = figure.data[3:]
    assert list(line.y) == [0.3, 0.4]
    assert list(band.y) == pytest.approx([0.4, 0.5, 0.3, 0.2])
    assert list(band.x) == [0, 1, 1, 0]
    assert list(floor.y) == pytest.approx([0.012, 0.012])  # of corrected values, as the line: without the mean
    assert "corrected noise floor" in floor.name
    hover = "layer 0: 0.300 nats [0.200, 0.400]<br>uncorrected 0.310, noise floor 0.020, p = 0.002"
    assert line.text[0] == hover
    assert line.line.color != figure.data[1].line.color
    assert line.marker.symbol != figure.data[1].marker.symbol


def cells(run, shares):
    """`specialty` from {group: [L, E]}."""
    mean = np.mean([*shares.values()], axis=0)
    frames = []
    for group, share in shares.items():
        layers, experts = np.indices(share.shape).reshape(2, -1)
        columns = {"layer": 3 * layers, "expert": experts, "share": share.ravel(), "mean_share": mean.ravel()}
        frames.append(pd.DataFrame({"run": run, "group": group, **columns}))
    return pd.concat(frames, ignore_index=True)


def test_heatmaps_show_lift_by_layer_and_expert():
    rng = np.random.default_rng(0)
    shares = {group: rng.dirichlet(np.ones(8), 4) for group in ("a", "b", "c")}
    shares["b"][1] = [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    other = {group: share[:, ::-1] for group, share in shares.items()}
    table = pd.concat([cells("base", shares), cells("cpt", other)])
    sizes = pd.DataFrame({"run": "cpt", "group": [*"abc"], "docs": [1, 2, 3], "tokens": [10, 20000, 30]})
    figure = plots.heatmaps(table, sizes, 2)
    assert len(figure.data) == 6
    assert [trace.name for trace in shown(figure)] == ["a, cpt", "b, cpt", "c, cpt"]
    b = figure.data[1]
    assert list(b.y) == [0, 3, 6, 9]
    z = np.array(b.z)
    assert z[1].tolist() == pytest.approx([2, 2] + [-3] * 6)  # 4 x an even spread; never seen: at the lower end
    assert z[0] == pytest.approx(np.log2(np.maximum(8 * shares["b"][0], 1 / 8)), abs=1e-6)
    assert np.array(figure.data[4].z)[0] == pytest.approx(z[0][::-1], abs=1e-6)
    to_mean = 0.5 / np.mean([share[1, 0] for share in shares.values()])
    assert np.array(b.customdata)[1, 0] == pytest.approx([50, to_mean], 1e-5)
    assert figure.layout.coloraxis.cmax == 2  # no expert can exceed E / K = 4 x
    assert any("2 documents, 20,000 tokens" in note.text for note in figure.layout.annotations)
    assert any("1 document, 10 tokens" in note.text for note in figure.layout.annotations)


def test_buttons_show_one_run():
    table = pd.concat([pairs(NEAR, "base"), pairs(NEAR, "cpt", floor=0.0), pairs(NEAR, "sft", floor=9)])
    figure = plots.divergence_matrix(table, ["a", "b", "c", "d"])
    assert [trace.name for trace in figure.data] == [
        "base",
        "base, not told apart",
        "cpt",
        "sft, not told apart",
    ]
    (menu,) = figure.layout.updatemenus
    visible = [button.args[0]["visible"] for button in menu.buttons]
    assert visible == [[True, True, False, False], [False, False, True, False], [False, False, False, True]]
    assert [trace.name for trace in shown(figure)] == ["sft, not told apart"]
    assert menu.active == 2
    assert menu.type == "buttons"
    long = pd.concat([pairs(NEAR, f"a rather long name of a run {number}") for number in range(4)])
    assert plots.divergence_matrix(long, ["a", "b", "c", "d"]).layout.updatemenus[0].type == "dropdown"


def test_bars_have_the_value_and_its_interval():
    rows = [
        ("d_cpt", "divergence", 0.09, 0.08, 0.11, "nats"),
        ("d_sft", "divergence", -0.01, -0.02, 0.0, "nats"),
        ("d_cpt", "distance", 0.1, 0.09, 0.12, "sqrt(nats)"),
        ("d_sft", "distance", 0.0, -0.01, 0.01, "sqrt(nats)"),
    ]
    table = pd.DataFrame(rows, columns=["stage", "convention", "corrected", "low", "high", "unit"]).assign(delta=9.0)
    figure = plots.decomposition_bars(table, ["base → cpt", "cpt → sft"])
    first, second = figure.data
    assert list(first.y) == [0.09, -0.01]
    assert list(first.error_y.array) == pytest.approx([0.02, 0.01])
    assert list(first.error_y.arrayminus) == pytest.approx([0.01, 0.01])
    assert list(second.y) == [0.1, 0.0]
    assert "-0.010" in figure.layout.xaxis.ticktext[1]
    assert figure.layout.yaxis2.title.text == "sqrt(nats)"


def test_routes_are_wider_for_more_tokens_and_darker_for_more_lift():
    table = pd.DataFrame(
        {"run": "base", "layer": [0, 1], "expert": [5, 2], "next_layer": [1, 2], "next_expert": [2, 7]}
        | {"share": [0.1, 0.4], "lift": [8.0, 2.0], "q_value": [0.01, 0.3]}
    )
    figure = plots.routes(table, 8)
    first, second, scale = figure.data
    assert list(first.x) == [0, 1]
    assert list(first.y) == [5, 2]
    assert first.line.width < second.line.width
    assert (first.line.dash, second.line.dash) == ("solid", "dot")
    assert _brightness(first.line.color) < _brightness(second.line.color)
    assert list(scale.marker.colorbar.ticktext) == ["2", "4", "8"]


def _brightness(color):
    return sum(float(part) for part in color.removeprefix("rgb(").rstrip(")").split(","))


def test_effective_experts_by_group_and_layer():
    rows = [("base", group, layer, 10.0 * layer + place) for place, group in enumerate("ab") for layer in (4, 2)]
    table = pd.DataFrame(rows, columns=["run", "group", "layer", "effective_experts"])
    (trace,) = plots.effective_experts(table, 64).data
    assert list(trace.x) == [2, 4]
    assert np.array(trace.z).tolist() == [[20, 40], [21, 41]]


def test_names_are_escaped_and_cut():
    assert plain("<b>&'\"", 10) == "&lt;b&gt;&amp;'\""
    assert plain("$x$") == "&#36;x&#36;"
    assert plain("abcdefghijklmnop", 9) == "abcd…mnop"
    assert plain("abcdefghijklmnop", 8) == "abc…mnop"
    assert plain("a\u202eb\u2069") == "a\\u202eb\\u2069"  # what would turn the rest of the line around
    name = "<a href='javascript:1'>%{z}"
    figure = plots.divergence_matrix(pairs({(name, "b"): 0.3}, run=name), [name, "b"])
    assert "<a" not in figure.to_json().replace("\\u003c", "<").replace("<br", "")
    assert "%{z}" not in figure.data[0].hovertemplate
