"""docs/omnigene.md: what it names exists, its code runs, and no figure or table of the paper is left out."""

import re
from pathlib import Path

import pytest
import torch

from omnigene_fast import accelerate, analysis
from omnigene_fast.demo.audit import trace_families
from omnigene_fast.demo.model import Size, load_texts, small_model

from .helpers import FOLDER, load

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "omnigene.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def rows(page: str, title: str) -> list[str]:
    """First cells of the table under a heading."""
    part = page.split(f"## {title}\n")[1].split("\n## ")[0]
    return [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("|")][2:]


def numbers(cells: list[str]) -> list[int]:
    return sorted(int(found) for cell in cells for found in re.findall(r"\d+", cell))


def test_every_figure_and_table_has_a_row(page: str) -> None:
    assert numbers(rows(page, "Figures")) == list(range(1, 11))
    assert numbers(rows(page, "Tables")) == list(range(1, 17))
    supplement = " ".join(rows(page, "Supplement"))
    figures = " ".join(re.findall(r"Figures? (?:S\d+(?:, )?)+", supplement))
    tables = re.sub(r"Figures? (?:S\d+(?:, )?)+|\(.*?\)", "", supplement)
    assert sorted(map(int, re.findall(r"S(\d+)", figures))) == [1, 2, 3, 4]
    assert sorted(map(int, re.findall(r"S(\d+)", tables))) == list(range(1, 12))


def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)h][^)]*)\)", page):
        path, _, anchor = link.partition("#")
        assert not path or (PAGE.parent / path).exists(), link
        headings = [title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", page, re.M)]
        assert not anchor or anchor in headings, link


def test_functions_and_sections_exist(page: str) -> None:
    for name in ("differentiation", "decompose", "pairwise", "specialty", "vocabulary", "load"):
        assert f"`{name}`" in page
        assert hasattr(analysis, name)
    source = (ROOT / "omnigene_fast/analysis/report_sections.py").read_text()
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    sections = re.findall(r'"([A-Z][^"]* [^"]*)"', tables)
    assert len(sections) >= 8
    for title in sections:
        assert title.replace("tasks", "{t.noun}s").replace("task ", "{t.noun} ") in source or title in source, title


def test_the_code_runs_and_its_tables_are_right(page: str, tmp_path: Path) -> None:
    texts = {family: each[:3] for family, each in load_texts(3).items() if family in ("protein", "molecule", "code")}
    runs = []
    for seed, name in enumerate(("base", "sft")):
        model = small_model(Size(H=64, I=32, E=16, K=4, layers=3), torch.device("cpu"), seed)[0]
        runs.append(trace_families(accelerate(model), tmp_path / name, texts, 64, name))
    code = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code) == 1
    code[0] = code[0].replace("out/audit/traces/accelerated", str(tmp_path))
    made: dict = {}
    exec(compile(code[0], PAGE.name, "exec"), made)

    counts = [run.counts.reshape(3, 3, 3, 16) for run in runs]  # families, documents, layers, experts
    pooled = [each.sum(1)[:, 2] / each.sum(1)[:, 2].sum(-1, keepdims=True) for each in counts]
    names = list(texts)
    assert made["change"].loc[names].to_numpy() == pytest.approx(pooled[1] - pooled[0])
    assert made["document"].sum() == pytest.approx(3)
    assert made["busiest"][0] == runs[1].counts[0, 2].argmax()
    picks = counts[1].sum(1)[:, 2]  # families, experts
    expected = (picks / picks.sum(0)).T
    assert made["purity"].loc[2][names].to_numpy() == pytest.approx(expected, nan_ok=True)
    totals = made["often"].groupby("expert")["n"].sum()
    assert totals.to_dict() == {e: n for e, n in enumerate(picks.sum(0)) if n}
    pairs = made["pairs"]
    assert made["alone"]["code"] == pytest.approx(pairs[(pairs[["a", "b"]] == "code").any(axis=1)]["corrected"].mean())


COMMANDS = re.findall(
    r"^(?:python|torchrun --nproc_per_node 2) examples/omnigene/(\w+)\.py(.*?)(?:\s+#.*)?$",
    PAGE.read_text() + (ROOT / "README.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize("name", sorted({name for name, _ in COMMANDS}))
def test_the_scripts_have_the_options_that_are_named(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        load(name).main(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    named = {option for script, line in COMMANDS for option in re.findall(r"--[\w-]+", line) if script == name}
    assert named <= known


def test_every_script_that_is_named_exists(page: str) -> None:
    workflow = (ROOT / "README.md").read_text().split("## The OmniGene-4 workflow")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+\.py)", page + workflow)) - {"train_lora.py"}
    assert {name for name in named if not (FOLDER / name).is_file()} == set()
    scripts = {path.name for path in FOLDER.glob("*.py") if "def main(" in path.read_text()}
    assert scripts - {"run_all.py"} <= named
