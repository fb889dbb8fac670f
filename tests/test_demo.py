"""The demo on a tiny model: it prints what it promises, leaves the model stock, and its texts are complete."""

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import omnigene_fast
from omnigene_fast import demo
from omnigene_fast.bench import runner
from omnigene_fast.bench.floors import Probe
from omnigene_fast.demo import compare, layer, lesson, training
from omnigene_fast.demo.model import BOS, BYTES, PAD, encode_bytes, load_texts, small_model

CPU = torch.device("cpu")
TINY = demo.Size(H=64, I=24, E=16, K=4, layers=2, texts=2, length=24, rounds=1)
LESSON = demo.Lesson(steps=4, seconds=60, compared=3, batch=3, length=24, traced=3)
FAMILIES = [
    "protein",
    "dna_coding",
    "dna_genomic",
    "struct_3di",
    "struct_dssp",
    "homology_standard",
    "homology_remote",
    "text_biology",
    "text_general",
    "molecule",
    "cell",
    "code",
]


def test_data_has_twelve_families_of_fifty():
    text = (files("omnigene_fast") / "data" / "modalities.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert Counter(row["family"] for row in rows) == dict.fromkeys(FAMILIES, 50)
    assert all(row["text"].strip() and row["source"] for row in rows)


def test_every_family_has_a_licence():
    text = (files("omnigene_fast") / "data" / "LICENSES.md").read_text(encoding="utf-8")
    assert all(family in text for family in FAMILIES)


def test_bytes_and_padding():
    batch = encode_bytes(["AC", "é"], 3)
    assert batch.ids.tolist() == [[BOS, BYTES + 65, BYTES + 67], [BOS, BYTES + 0xC3, BYTES + 0xA9]]
    short = encode_bytes(["A", ""], 9)
    assert short.ids.tolist() == [[BOS, BYTES + 65], [BOS, PAD]]
    assert short.mask.tolist() == [[1, 1], [1, 0]]


def test_load_texts_keeps_the_order_of_families():
    assert list(load_texts(3)) == FAMILIES
    assert {len(texts) for texts in load_texts(3).values()} == {3}


def test_demo_prints_every_part(capsys):
    demo.run(CPU, true_shape=False, size=TINY, lesson=LESSON)
    out = capsys.readouterr().out
    assert out.count("sliding") >= 2
    assert "full" in out
    for family in FAMILIES:
        assert f"\n  {family}" in out
    parts = ("parity per layer", "experts each family prefers", "The weights are random", "tokens/s", "training, every")
    for part in (*parts, "summary"):
        assert part in out
    assert "within the bound of 2x" in out


def test_training_has_the_stock_losses_and_learns(monkeypatch, capsys):
    ran = []
    train = training.train
    monkeypatch.setattr(
        training,
        "train",
        lambda model, *a, **k: ran.append(model.get_experts_implementation()) or train(model, *a, **k),
    )
    line = lesson.learn(CPU, TINY, demo.Lesson(steps=12, seconds=60, compared=3, batch=3, length=24))
    out = capsys.readouterr().out
    stock, ours = (
        [float(loss) for loss in row.split()[-3:]]
        for row in out.splitlines()
        if row.split()[:1] in (["stock"], ["accelerated"])
    )
    assert ran == [{"": "omnigene_fast"}, {"": "grouped_mm"}]
    assert len(set(stock)) == 3
    assert ours == pytest.approx(stock, rel=1e-5)
    before, after = map(float, re.search(r"held-out loss (\S+) to (\S+) in 12 steps", line).groups())
    assert after < before - 0.05
    for family in FAMILIES:
        assert f"\n  {family}" in out


def test_training_without_accelerate_is_skipped_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(lesson.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in lesson.learn(CPU, TINY)
    assert "pip install 'omnigene-fast[train]'" in capsys.readouterr().out


def test_audit_traces_and_reports(tmp_path, capsys):
    demo.run(CPU, true_shape=False, size=TINY, lesson=LESSON, out=tmp_path / "demo")
    out = capsys.readouterr().out
    path = Path(out.strip().splitlines()[-1])
    assert path == tmp_path / "demo" / "report.html"
    assert path.stat().st_size > 1e6
    runs = [omnigene_fast.open_trace(tmp_path / "demo" / name) for name in ("before", "after")]
    for run in runs:
        assert run.verify() == []
        assert run.documents.groupby("task").size().to_dict() == dict.fromkeys(FAMILIES, LESSON.traced)
    assert (runs[0].counts != runs[1].counts).any()
    assert (runs[0].documents["text_hash"] == runs[1].documents["text_hash"]).all()
    shown = [float(row) for row in re.findall(r"^ +mean +(\d\.\d+) \[", out, re.MULTILINE)]
    mean = omnigene_fast.analysis.differentiation(runs[0]).iloc[-1]
    assert shown == [pytest.approx(mean["corrected"], abs=6e-4)]
    with pytest.raises(FileExistsError, match="expected a directory that does not exist yet"):
        demo.run(CPU, true_shape=False, size=TINY, lesson=LESSON, out=tmp_path / "demo")


def test_audit_without_its_packages_is_skipped_in_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "missing_packages", lambda: ["duckdb"])
    demo.run(CPU, true_shape=False, size=TINY, lesson=LESSON, out=tmp_path / "demo")
    out = capsys.readouterr().out
    assert "router audit: skipped, duckdb missing (pip install 'omnigene-fast[report]')" in out
    assert "training: held-out loss" in out
    assert not (tmp_path / "demo").exists()


def test_recording_leaves_padding_out_and_no_hook():
    model, encode, _ = small_model(TINY, CPU)
    batch = encode(["ACGT", "A"], 8)
    with compare.recording(model, batch.mask) as made, torch.no_grad():
        model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    assert [tuple(index.shape) for index in made.index] == [(5 + 2, TINY.K)] * TINY.layers
    assert [tuple(hidden.shape) for hidden in made.hidden] == [(5 + 2, TINY.H)] * TINY.layers
    assert not any(module._forward_hooks for each in compare.decoder_layers(model) for module in (each, each.router))


def test_preferences_count_what_the_router_picks(capsys):
    model, encode, _ = small_model(TINY, CPU)
    batches = [encode([texts[0] for texts in load_texts(1).values()], 12)]
    line = compare.preferences(model, batches, FAMILIES, random_weights=True)
    assert "effective experts of 16" in line
    assert model.config._experts_implementation == "grouped_mm"  # restored
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if row.strip().startswith(tuple(FAMILIES))]
    assert [int(row[1]) for row in rows] == batches[0].mask.sum(1).tolist()


def test_checkpoint_directory(tmp_path, capsys):
    from transformers import ByT5Tokenizer

    model, _, _ = small_model(TINY, CPU)
    model.save_pretrained(tmp_path)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    demo.run(CPU, tmp_path, true_shape=False, size=TINY)
    out = capsys.readouterr().out
    assert f"Gemma4ForCausalLM from {tmp_path}" in out
    assert "The weights are random" not in out
    assert "within the bound of 2x" in out


def test_checkpoint_without_experts_is_refused(tmp_path):
    from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mixture-of-experts"):
        demo.run(CPU, tmp_path, true_shape=False, size=TINY)


def test_no_memory_for_float64_compares_with_stock(monkeypatch, capsys):
    monkeypatch.setattr(compare, "available_memory", lambda device: 1000)
    model, encode, _ = small_model(TINY, CPU)
    line = compare.parity(model, encode(["ACGT", "MSRS"], 8))
    assert "differ from the stock model's by at most" in line
    assert "no memory for a float64 copy" in capsys.readouterr().out


def tiny_settings() -> runner.Settings:
    return runner.Settings(
        ops=("experts",),
        tokens=(1, 17),
        modes=("uniform",),
        providers=("omnigene_fast", "eager", "grouped_mm", "batched_mm"),
        shape=runner.Shape(H=96, I=40, E=16, K=4),
        seconds=0.0,
        min_rounds=3,
    )


def test_true_shape_table(monkeypatch, capsys):
    monkeypatch.setattr(Probe, "sample", lambda self: (self.bandwidths.append(10.0), self.peaks.append(100.0)))
    line = layer.true_shape(CPU, tiny_settings())
    assert line.startswith("true shape: ")
    assert "T=17 against transformers' best path" in line
    out = capsys.readouterr().out
    assert "speed-up" in out
    (row,) = (each for each in out.splitlines() if each.startswith("     17"))
    assert row.split()[4] == "-"  # batched_mm, above its 16 tokens


def test_true_shape_without_memory_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(runner, "available_memory", lambda device: 1000)
    assert layer.true_shape(CPU, tiny_settings()) == "true shape: skipped, memory is short"
    assert "skipped: a layer of" in capsys.readouterr().out
