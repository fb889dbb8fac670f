"""shared.py and measures.py: the ways are compared and enforced, results are this run's, intervals cover."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, Gemma4Config, Gemma4ForConditionalGeneration

import omnigene_fast
from omnigene_fast.demo.model import small_model, text_config
from omnigene_fast.demo.training import Run
from omnigene_fast.integrations.transformers import served

from .helpers import load

shared, measures = load("shared"), load("measures")
NAN = math.nan


def options(out, *more):
    made = shared.parser("", "x").parse_args(["--out", str(out), "--threads", "1", *more])
    shared.start(made)
    return made


@pytest.fixture
def results(tmp_path):
    return shared.Results(options(tmp_path), "", "")


def test_apart_by_hand():
    stock = [2.0] * 12
    ours = [*stock[:3], 2.002, *stock[4:11], 1.9]
    assert shared.apart(stock, ours) == pytest.approx((1e-3, 0.05))
    assert shared.apart(stock, stock) == (0, 0)


@pytest.mark.parametrize("wrong", [NAN, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_apart(wrong):
    good, late, early = [1.0] * 12, [1.0] * 11 + [wrong], [1.0, wrong] + [1.0] * 10
    for one, other in ((good, late), (late, good), (late, late)):
        assert shared.apart(one, other) == (0, math.inf)
    for one, other in ((good, early), (early, good), (early, early)):
        assert shared.apart(one, other) == (math.inf, math.inf)
    assert shared.apart(good, good[:-1]) == shared.apart([], []) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("stock", "ours", "dtype", "faults"),
    [
        ([1.0] * 20, [1.0] * 19 + [1.0009], "float32", 0),
        ([1.0] * 20, [1.0] * 19 + [1.0011], torch.float32, 1),
        ([1.0] * 101, [1.0] * 100 + [1.0011], "float32", 0),
        ([1.0] * 20, [1.0] * 9 + [1.00002] + [1.0] * 10, "float32", 1),
        ([1.0] * 101, [1.00002] + [1.0] * 100, torch.float32, 1),
        ([1.0] * 20, [1.1] * 20, "bfloat16", 0),
        ([1.0] * 20, [1.0] * 19 + [NAN], "bfloat16", 1),
        ([NAN] + [1.0] * 19, [1.0] * 20, torch.bfloat16, 1),
        ([NAN] * 20, [NAN] * 20, "float32", 1),
        ([1.0] * 20, [1.0] * 19, "float32", 1),
    ],
)
def test_losses_that_differ_are_a_fault(results, stock, ours, dtype, faults):
    said = shared.check_losses(results, {"stock": Run(stock), "accelerated": Run(ours)}, dtype)
    assert "in the first ten steps" in said
    assert len(results.content["faults"]) == faults
    assert shared.check_losses(results, {"stock": Run([NAN])}, dtype) == ""


def test_a_fault_is_saved_and_then_raised(results, capsys):
    results.table("T", [{"a": 1}])
    for sentence in ("one is not two.", "up is not down."):
        results.fault(sentence)
    assert "one is not two." in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"one is not two\.; up is not down\."):
        results.save()
    content = json.loads((results.out / "result.json").read_text())
    assert content["faults"] == ["one is not two.", "up is not down."]
    assert content["parts"][0]["title"] == "T"


def test_an_old_result_goes(tmp_path):
    old = tmp_path / "result.json"
    old.write_text("{}")
    made = options(tmp_path)
    assert not old.exists()
    old.write_text("{}")
    shared.Results(made, "", "").save()
    assert json.loads(old.read_text())["faults"] == []


def made(name):
    if name == "images":
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        vision |= {"num_key_value_heads": 4, "head_dim": 16}
        text = text_config(shared.SMALL, 400).to_dict()
        return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, audio_config=None))
    model = small_model(shared.SMALL, torch.device("cpu"), 0)[0]
    if name == "peft":
        adapted = LoraConfig(target_modules=["router.proj"], target_parameters=["experts.gate_up_proj"])
        return get_peft_model(model, adapted)
    return model.model if name == "inner" else model


@pytest.mark.parametrize("name", ["causal", "inner", "peft", "images"])
def test_a_switch_is_verified(name, monkeypatch):
    model = made(name)
    layers = shared.SMALL.layers
    assert served(model) == (0, 2 * layers)
    assert served(shared.switch(model, "accelerated")) == (2 * layers, 2 * layers)
    with monkeypatch.context() as patch:
        patch.setattr(omnigene_fast, "restore", lambda model: model)
        with pytest.raises(RuntimeError, match=r"expected it stock, got 8 of its 8 routers and experts accelerated"):
            shared.switch(model, "stock")
    router = next(module for module in model.modules() if "forward" in module.__dict__ and hasattr(module, "proj"))
    forward = router.__dict__.pop("forward")
    assert served(model) == (2 * layers - 1, 2 * layers)
    router.forward = forward
    assert served(shared.switch(model, "stock")) == (0, 2 * layers)
    monkeypatch.setattr(omnigene_fast, "accelerate", lambda model: model)
    with pytest.raises(RuntimeError, match=r"expected it accelerated, got 0 of its 8 routers and experts accelerated"):
        shared.switch(model, "accelerated")


def test_nothing_to_switch_is_no_switch():
    with pytest.raises(RuntimeError, match="got 0 of its 0"):
        shared.switch(torch.nn.Linear(2, 2), "stock")


def test_the_checkpoint_is_of_this_seed_and_size(tmp_path, monkeypatch):
    path = shared.checkpoint(options(tmp_path))
    weights = path / "model.safetensors"
    first, written = weights.read_bytes(), weights.stat().st_mtime_ns
    assert shared.checkpoint(options(tmp_path)) == path
    assert weights.stat().st_mtime_ns == written
    shared.checkpoint(options(tmp_path, "--seed", "1"))
    assert weights.read_bytes() != first
    shared.checkpoint(options(tmp_path))
    assert weights.read_bytes() == first
    monkeypatch.setattr(shared, "SMALL", shared.Size(H=64, I=64, E=8, K=2, layers=1))
    shared.checkpoint(options(tmp_path))
    assert AutoConfig.from_pretrained(path).hidden_size == 64
    (path / "made.json").unlink()
    with pytest.raises(ValueError, match=r"--out: expected in .*base what a script made"):
        shared.checkpoint(options(tmp_path))
    assert weights.is_file()


def test_the_dtype_is_the_checkpoints_or_what_was_asked_for(tmp_path):
    path = shared.checkpoint(options(tmp_path))
    assert shared.dtype_of(options(tmp_path), path) == "float32"
    assert shared.dtype_of(options(tmp_path, "--dtype", "bfloat16"), path) == "bfloat16"
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert shared.dtype_of(options(tmp_path), path) == "bfloat16"


def test_memory_is_that_of_the_largest_batch(monkeypatch):
    measured = []
    monkeypatch.setattr(shared, "peak_bytes", lambda call, device: measured.append(call()) or 7)
    model = small_model(shared.SMALL, torch.device("cpu"), 0)[0]
    made = shared.each_way(
        model, argparse.Namespace(compare=True, stock=False), [[1], [1, 1, 1], [1, 1]], lambda batch: batch, len
    )
    assert measured == [[1, 1, 1]] * 2
    assert [one.tokens for one in made.values()] == [6, 6]
    assert made["stock"].values == [[1], [1, 1, 1], [1, 1]]


@pytest.mark.parametrize("count", [4, 12])
def test_the_interval_of_few_groups_covers(count):
    generator = np.random.default_rng(0)
    covered = normal = 0
    for _ in range(1500):
        sizes = generator.integers(15, 26, count)
        groups = np.repeat(np.arange(count), sizes)
        values = np.repeat(generator.normal(0, 1, count), sizes) + generator.normal(0, 1, len(groups))
        mean, low, high = measures.clustered(values, groups)
        assert low < mean < high
        covered += low <= 0 <= high
        half = (high - mean) * 1.96 / {4: 3.182, 12: 2.201}[count]
        normal += abs(mean) <= half
    assert 0.92 <= covered / 1500 <= 0.98
    assert normal < covered - 20  # negative control: the normal quantile covers too little


def test_one_group_has_no_interval():
    mean, low, high = measures.clustered([1.0, 0.0], [0, 0])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
