"""The simulations behind the statistics' promises, with few worlds; the table has more (bench/results/simulations)."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from omnigene_fast.bench.simulations import level
from omnigene_fast.bench.simulations.__main__ import cells, main
from omnigene_fast.bench.simulations.cells import Cell, simulate

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "simulations"
SMALL = (
    "5 short (60) and 100 long (900)",
    "20 of dispersion 20 and 20 of 500",
    "5 and 5 documents of 20 to 2,000 tokens",
)


@pytest.mark.parametrize("setting", SMALL)
def test_tests_hold_their_level(setting):
    (cell,) = [cell for cell in level.cells() if cell.setting == setting and cell.measure == "level"]
    for figure in simulate(cell, 12):
        assert figure.holds, figure


def test_a_figure_outside_its_bounds_is_seen():
    cell = Cell("m", "s", lambda seed: {"share": 0.3 + 0.01 * (seed % 2)}, {"share": (0.0, 0.07)})
    (figure,) = simulate(cell, 10)
    assert figure.mean == pytest.approx(0.305)
    assert not figure.holds


def test_the_committed_table_has_every_cell_of_200_worlds_and_holds():
    rows = [row for file in sorted(RESULTS.glob("*.json")) for row in json.loads(file.read_text())]
    found = {(row["measure"], row["setting"], row["figure"]): row for row in rows}
    assert set(found) == {(cell.measure, cell.setting, name) for cell in cells() for name in cell.wanted}
    for row in rows:
        assert row["worlds"] >= 200, row
        assert row["low"] - 2 * row["error"] <= row["mean"] <= row["high"] + 2 * row["error"], row


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["--worlds", "3", "--only", "12 families of 3", "--processes", "1", "--out", str(out)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert [row["figure"] for row in json.loads(out.read_text())] == sorted(
        row["figure"] for row in json.loads(out.read_text())
    )
    assert "12 families of 3 | js / floor" in done.output
    assert CliRunner().invoke(main, ["--only", "no such cell"]).exit_code == 1
