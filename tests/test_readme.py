"""The README's tables are those of the committed rows, and what it names exists."""

import re
from pathlib import Path

import pytest

from omnigene_fast.bench import report
from omnigene_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_tables_are_generated_from_committed_rows():
    assert README.read_text() == report.rewrite(README), "run `make tables`"


def test_a_changed_table_is_noticed(tmp_path):
    changed = tmp_path / "README.md"
    changed.write_text(README.read_text().replace(report.END, "| made up | 9x |\n\n" + report.END))
    assert changed.read_text() != report.rewrite(changed)


def test_missing_markers_are_an_error(tmp_path):
    bare = tmp_path / "README.md"
    bare.write_text("no tables")
    with pytest.raises(ValueError, match="markers"):
        report.rewrite(bare)


def test_commands_exist():
    text = README.read_text()
    for verb in re.findall(r"`omnigene-fast (\w+)", text):
        assert verb in main.commands
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)\s+#", text) + re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_paths_in_the_layout_exist():
    for name in re.findall(r"^([\w./]+/)\s{2,}", README.read_text(), re.MULTILINE):
        assert (ROOT / name).is_dir(), name


def test_examples_are_valid_python():
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        compile(example, "README.md", "exec")
        assert len(example.splitlines()) <= 10


def test_training_example_trains(tmp_path, monkeypatch):
    """The README's second example on a tiny model, as it stands there."""
    import torch

    import omnigene_fast
    from omnigene_fast.demo.model import Size, small_model
    from omnigene_fast.demo.training import chunks

    monkeypatch.chdir(tmp_path)
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    model = small_model(Size(H=32, I=16, E=4, K=2, layers=1), torch.device("cpu"))[0]
    dataset = [{**sample, "attention_mask": [1] * 8} for sample in chunks(list(range(3, 19)), 8)]
    names: dict = {"model": model, "omnigene_fast": omnigene_fast, "dataset": dataset}
    exec(example, names)
    trained = [p for name, p in names["model"].named_parameters() if "router.proj.lora_B" in name]
    assert trained
    assert all(parameter.any() for parameter in trained)  # lora_B starts as zeros


def test_trace_example_traces(tmp_path, monkeypatch):
    """The README's third example on a tiny model, as it stands there."""
    import torch

    import omnigene_fast
    from omnigene_fast.demo.model import Size, small_model

    monkeypatch.chdir(tmp_path)
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[2]
    model, encode, _ = small_model(Size(H=32, I=16, E=8, K=2, layers=2), torch.device("cpu"))
    first, second = (encode(texts, 40) for texts in (["MSRSVLVLN" * 4] * 3, ["ACGTACGTTA" * 4] * 3))
    batches = [{"input_ids": each.ids, "attention_mask": each.mask} for each in (first, second)]
    names: dict = {"model": omnigene_fast.accelerate(model), "batch": batches[0], "other_batch": batches[1]}
    exec(example, names)
    assert names["run"].documents["task"].tolist() == ["protein"] * 3 + ["dna"] * 3
    assert (tmp_path / "report.html").exists()


def test_script_options_exist():
    for name, line in re.findall(r"^python (examples/\w+\.py)(.*?)(?:\s+#.*)?$", README.read_text(), re.MULTILINE):
        script = (ROOT / name).read_text()
        for option in re.findall(r"--[\w-]+", line):
            assert f'"{option}"' in script, option


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results").glob("*.json")), ids=lambda path: path.name)
def test_committed_rows_carry_their_origin(path):
    for row in report.load(path):
        for field in ("device", "threads", "versions", "date", "provider", "op", "mode", "tokens", "dtype", "status"):
            assert row[field] not in (None, ""), field
        assert {"python", "torch", "transformers", "omnigene_fast"} <= row["versions"].keys()
        assert row["status"] in ("ok", "wrong", "failed", "skipped", "missing")
        if row["status"] == "ok":
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["floor_ms"] > 0
