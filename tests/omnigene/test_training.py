"""Continued pre-training and instruction tuning: what is trained, what is left out, what the next stage gets."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from omnigene_fast.demo.model import Size, load_texts, small_model

from .helpers import load

SHORT = ["--steps", "4", "--length", "48", "--rank", "4", "--lr", "2e-3", "--threads", "1"]
TINY = Size(H=64, I=32, E=8, K=2, layers=2)
EXPERTS = re.compile(r"experts\.(gate_up|down)_proj$")


@pytest.fixture(scope="module")
def shared():
    return load("shared")


@pytest.fixture(scope="module")
def train_lora(shared):
    return load("train_lora")


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory):
    path = tmp_path_factory.mktemp("omnigene") / "base"
    shared.save(small_model(TINY, torch.device("cpu"))[0].float(), shared.byte_tokenizer(), path)
    return path


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45)[None]).logits


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path)


def table(out, title):
    parts = json.loads((out / "result.json").read_text())["parts"]
    (part,) = (part for part in parts if part.get("title") == title)
    return part


def test_cpt_both_ways_and_its_checkpoint(base, tmp_path, capsys):
    runs = load("cpt").main([*SHORT, "--model", str(base), "--batch", "4", "--compare", "--out", str(tmp_path)])
    assert list(runs) == ["stock", "accelerated"]
    assert len(set(runs["stock"].losses)) == 4
    assert runs["accelerated"].losses == pytest.approx(runs["stock"].losses, rel=1e-5)
    rows = table(tmp_path, "Loss in nats per token")["rows"]
    assert rows[-1] == ["4", f"{runs['stock'].losses[-1]:.6f}", f"{runs['accelerated'].losses[-1]:.6f}"]
    assert "speed-up" in table(tmp_path, "Speed and memory")["columns"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "model"))
    assert before.keys() == after.keys()  # transformers' names, the output layer tied
    for name, tensor in before.items():
        trained = "_proj.weight" in name or "embed_tokens" in name or "router.proj" in name
        assert torch.equal(tensor, after[name]) != trained, name
    model = loaded(tmp_path / "model")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("AB")["input_ids"] == [68, 69]
    assert "checkpoint: " in capsys.readouterr().out


def test_cpt_leaves_texts_for_the_audit():
    trained, every = load("cpt").texts(), load_texts(50)
    assert trained.keys() == every.keys()
    for family, each in every.items():
        assert trained[family] == each[:34]
        assert len(each[34:]) == 16


@pytest.mark.parametrize("experts", ["frozen", "lora", "full"])
def test_merged_checkpoint_is_the_trained_model(train_lora, base, tmp_path, experts, monkeypatch):
    """Against the model as it was before merging, and against the adapter's own file."""
    seen = []
    keep = train_lora.keep
    monkeypatch.setattr(train_lora, "keep", lambda model, *rest: (seen.append(logits(model)), keep(model, *rest)))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    arguments = [*SHORT, "--model", str(base), "--dtype", "float32", "--experts", experts]
    train_lora.main([*arguments, "--out", str(adapter), "--merged", str(merged)])
    ours, plain = logits(loaded(merged)), logits(loaded(base))
    torch.testing.assert_close(ours, seen[0], rtol=1e-5, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-2
    before, after = (load_file(path / "model.safetensors") for path in (base, merged))
    assert before.keys() == after.keys()
    changed = {bool(EXPERTS.search(name)) for name in before if not torch.equal(before[name], after[name])}
    assert (True in changed) == (experts != "frozen")
    assert (adapter / "adapter_config.json").exists() == (experts != "full")
    if experts != "full":
        again = logits(PeftModel.from_pretrained(loaded(base), adapter))
        torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-4)
    assert not merged.with_name("merged.new").exists()
    if experts == "frozen":  # written again over what is there
        train_lora.main([*arguments, "--merged", str(merged), "--seed", "1"])
        assert not torch.equal(logits(loaded(merged)), ours)


def test_stock_never_calls_the_accelerator(train_lora, base, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("accelerated")

    monkeypatch.setattr(train_lora.omnigene_fast, "accelerate", refuse)
    arguments = [*SHORT, "--steps", "1", "--model", str(base), "--dtype", "float32"]
    assert list(train_lora.main([*arguments, "--stock"])) == ["stock"]
    with pytest.raises(AssertionError, match="accelerated"):
        train_lora.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fsdp"], "--fsdp: expected several processes, got one; start them with torchrun"),
        (["--merged", "next"], "--merged: expected with --model"),
        (["--model", "base", "--merged", "base"], "--merged: expected another directory than --model, got base."),
        (["--model", "base", "--merged", __file__], "--merged: expected a directory, got "),
        (["--experts", "full", "--out", "adapter"], "--experts full: expected --merged with --out"),
    ],
)
def test_options_that_do_not_go_together(train_lora, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train_lora.main(arguments)


def test_processors_of_the_checkpoint_come_along(train_lora, base, tmp_path):
    (base / "preprocessor_config.json").write_text("{}")
    arguments = [*SHORT, "--steps", "1", "--model", str(base), "--dtype", "float32", "--stock"]
    train_lora.main([*arguments, "--merged", str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == "{}"


def test_sft_learns_the_answers_of_training_questions(shared, base, tmp_path):
    sft = load("sft")
    asked = sft.mixture(6)
    assert {task: sum(one.group == task for one in asked) for task in sft.TASKS} == dict.fromkeys(sft.TASKS, 6)
    prompts = {one.prompt for one in sft.mixture()}
    assert {one.prompt for one in asked} < prompts
    for questions in sft.TASKS.values():  # nothing that is asked later is trained on
        assert not prompts & {one.prompt for one in questions("test")}
    arguments = ["--model", str(base), "--limit", "6", "--length", "512", "--batch", "2", "--compare"]
    runs = sft.main([*SHORT, *arguments, "--length", "512", "--out", str(tmp_path)])
    assert runs["accelerated"].losses == pytest.approx(runs["stock"].losses, rel=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["response"]) for row in rows] == [(one.prompt, one.answer) for one in asked]
    assert loaded(tmp_path / "model").config.num_hidden_layers == TINY.layers


def test_kinds_are_asked_about_the_texts_of_their_part():
    sft, every = load("sft"), load_texts(50)
    asked = {part: {(one.prompt, one.answer) for one in sft.kinds(part)} for part in ("train", "test")}
    for part, chosen in (("train", slice(34)), ("test", slice(34, 50))):
        expected = {(text[:90] + "\nWhich kind? ", name) for name, each in every.items() for text in each[chosen]}
        assert asked[part] <= expected
        assert len(asked[part]) >= 0.98 * len(expected)  # few texts begin alike
    assert not asked["train"] & asked["test"]
    train_lora = load("train_lora")
    question = sft.kinds("train")[0]
    tokens = load("shared").byte_tokenizer()
    first, answer = (train_lora.ids(text, tokens, begin=False) for text in (question.prompt, question.answer))
    assert tokens.decode(first + answer) == question.prompt + question.answer
