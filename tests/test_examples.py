"""examples/train_lora.py: stock and accelerated training coincide, adapters survive a file, errors are sentences."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from omnigene_fast.demo.model import BOS, EOS, small_model
from omnigene_fast.demo.training import IGNORED, Plan, Run, chunks, collate, train

from .helpers import gemma4, gemma4_conditional

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_lora.py"
CPU = torch.device("cpu")
SHORT = ["--steps", "3", "--batch", "2", "--length", "32", "--rank", "4", "--dtype", "float32", "--threads", "1"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_lora", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(script, monkeypatch):
    def parsed(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["train_lora", *SHORT, *arguments])
        return script.arguments()

    return parsed


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def figures(output: str) -> list[tuple[float, float]]:
    """The losses of the table, stock and accelerated."""
    return [(float(a), float(b)) for a, b in re.findall(r"^ +\d+ +(\d+\.\d+) +(\d+\.\d+)$", output, re.MULTILINE)]


def test_script_stock_and_accelerated_coincide(tmp_path):
    done = run(*SHORT, "--compare", "--out", str(tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr
    losses = figures(done.stdout)
    assert len(losses) == 3
    assert len({stock for stock, _ in losses}) == 3
    for stock, ours in losses:
        assert ours == pytest.approx(stock, rel=1e-5)
    apart = float(re.search(r"largest relative difference over 3 steps (\S+)", done.stdout)[1])
    assert apart < 1e-5
    for words in ("loss: of transformers, softcap 30.0", "experts: frozen", "tokens/s", "speed-up"):
        assert words in done.stdout
    assert "3/3" in done.stderr  # the progress bar
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "adapter" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_expert_lora_with_answers_coincides(script, options, tmp_path, capsys, save):
    data = tmp_path / "qa.jsonl"
    rows = [{"prompt": f"Is {number} even? ", "response": "yes" if number % 2 == 0 else "no"} for number in range(9)]
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "--compare",
        "--experts",
        "lora",
        "--answer-only",
        "--data",
        str(data),
        "--save",
        save,
        "--accumulate",
        "2",
    ]
    options(*arguments)
    script.main()
    out = capsys.readouterr().out
    losses = figures(out)
    assert len(losses) == 3
    for stock, ours in losses:
        assert ours == pytest.approx(stock, rel=1e-5)
    assert f"experts: LoRA, accelerate(save='{save}')" in out


def test_another_model_has_other_losses(script, options):
    """The negative control of the comparison: one expert's rows swapped, and the losses part."""
    chosen = options()
    samples = script.read_samples(chosen, None)
    runs = {}
    for name in ("stock", "accelerated"):
        model = script.build_model(chosen, CPU, accelerated=name == "accelerated")
        if name == "accelerated":
            weight = model.get_base_model().model.layers[0].experts.gate_up_proj.data
            weight.copy_(weight.roll(weight.shape[1] // 2, 1))  # gate and up change places
        runs[name] = train(model, samples, plan(), pad=0, title=name)
    assert script.difference(runs) > 1e-5


def test_a_loss_that_is_no_number_is_no_agreement(script):
    assert script.difference({"stock": Run([1.0]), "accelerated": Run([float("nan")])}) == float("inf")


def plan(**changes) -> Plan:
    return Plan(**({"steps": 3, "batch": 2, "learning_rate": 2e-3, "bf16": False} | changes))


@pytest.mark.parametrize("experts", [[], ["--experts", "lora"]], ids=["frozen", "expert LoRA"])
def test_adapter_survives_a_file(script, options, tmp_path, experts):
    chosen = options(*experts)
    model = script.build_model(chosen, CPU, accelerated=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in ("q_proj", "o_proj", "mlp.gate_proj", "mlp.down_proj", "router.proj", "embed_tokens"):
        assert any(part in name for name in trained), part
    assert any("experts" in name for name in trained) == bool(experts)
    assert all("lora_" in name or "embed_tokens" in name for name in trained)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, script.read_samples(chosen, None), plan(), pad=0, title="test")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name
    base = model.get_base_model()
    assert base.lm_head.weight is base.get_input_embeddings().weight  # tied, and so trained as one

    ids = collate(chunks([BOS, *range(40, 60)], 32), pad=0)["input_ids"]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        fresh = small_model(script.SMALL, CPU)[0].float()
        plain = fresh(input_ids=ids).logits
        again = PeftModel.from_pretrained(fresh, tmp_path).eval()
        script.omnigene_fast.accelerate(again)
        assert torch.equal(again(input_ids=ids).logits, expected)
    assert (plain - expected).abs().max() > 1e-2  # without the adapter it is another model


@pytest.mark.parametrize("make", [gemma4, gemma4_conditional], ids=["causal", "conditional"])
def test_checkpoint_with_its_tokenizer(script, options, tmp_path, capsys, make):
    """Any Gemma-4 MoE checkpoint: that of a text model, and the released kind with a vision tower, left alone."""
    from transformers import ByT5Tokenizer

    make().save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    options("--compare", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "adapter"))
    script.main()
    losses = figures(capsys.readouterr().out)
    assert len(losses) == 3
    for stock, ours in losses:
        assert ours == pytest.approx(stock, rel=1e-5)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any("router.proj" in name for name in names)
    assert not any("vision" in name for name in names)


def test_prompts_are_not_learned(script, options, tmp_path, capsys):
    data = tmp_path / "qa.jsonl"
    rows = [{"prompt": "AB", "response": "C"}, {"prompt": "A" * 40, "response": "C"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    (sample,) = script.read_samples(options("--answer-only", "--data", str(data)), None)
    assert capsys.readouterr().out == "left out: 1 of 2 prompts, which have 32 tokens (--length) or more\n"
    assert sample["input_ids"] == [BOS, 68, 69, 70, EOS]
    assert sample["labels"] == [IGNORED, IGNORED, IGNORED, 70, EOS]
    batch = collate([sample, {"input_ids": [BOS, 68], "labels": [BOS, 68]}], pad=0)
    assert batch["labels"].tolist()[1] == [BOS, 68, *[IGNORED] * 3]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    data.write_text(json.dumps(rows[0]))
    script.read_samples(options("--answer-only", "--data", str(data)), None)
    assert capsys.readouterr().out == ""
    data.write_text(json.dumps(rows[1]))
    with pytest.raises(
        ValueError, match="--length: expected more tokens than a prompt has, got 32, and all are longer"
    ):
        script.read_samples(options("--answer-only", "--data", str(data)), None)


def test_documents_are_cut_into_samples():
    assert [sample["input_ids"] for sample in chunks([1, 2, 3, 4, 5, 6, 7], 3)] == [[1, 2, 3], [4, 5, 6]]  # one is none


def test_tokens_and_losses_are_counted():
    """Three optimizer steps of two batches each: a loss per step, tokens without padding and without the first step."""
    from omnigene_fast.demo import Size

    model = small_model(Size(H=32, I=16, E=4, K=2, layers=1), CPU)[0].float()
    samples = [{"input_ids": [BOS] + [5] * 9, "labels": [BOS] + [5] * 9}] * 2
    samples += [{"input_ids": [BOS, 5], "labels": [BOS, 5]}] * 2
    made = train(model, samples, plan(accumulate=2), pad=0, title="test")
    assert len(made.losses) == 3
    assert made.tokens == 2 * (2 * 10 + 2 * 2)
    assert made.speed > 0
    whole = train(
        small_model(Size(H=32, I=16, E=4, K=2, layers=1), CPU)[0].float(), samples, plan(batch=4), pad=0, title="test"
    )
    assert made.losses == pytest.approx(whole.losses, rel=1e-5)  # accumulation changes nothing


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"text": 1', [], "--data: expected one JSON object per line, line 1 is not JSON"),
        ("[1]", [], "--data: expected one JSON object per line, line 1 is a list."),
        ('{"body": "x"}', [], "--data: expected a text column 'text' in row 1, got body."),
        ('{"text": "x"}', ["--answer-only"], "--data: expected a text column 'prompt' in row 1, got text."),
        ("", [], "--data: expected texts of at least two tokens, got none"),
        (None, ["--model", "no/such/model"], "--model: expected a checkpoint directory with a config.json"),
        ('{"text": "ACGT"}', ["--out", __file__], "--out: expected a directory"),
    ],
)
def test_bad_input_is_refused(script, options, tmp_path, content, arguments, message):
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
        arguments = [*arguments, "--data", str(tmp_path / "x.jsonl")]
    options(*arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        script.main()


def test_bad_input_ends_the_script_with_one_sentence(tmp_path):
    done = run("--data", str(tmp_path / "missing.jsonl"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("train_lora: --data: expected a jsonl file, got ")
    assert "Traceback" not in done.stderr


def test_a_missing_package_is_one_sentence():
    """A process in which it is not to be found, neither by its name nor by importing it."""
    hide = "import importlib.util as u, runpy, sys; find = u.find_spec; sys.modules['peft'] = None; "
    hide += "u.find_spec = lambda name, *rest: None if name == 'peft' else find(name, *rest); "
    hide += f"sys.argv = ['train_lora']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    sentence = "train_lora: peft is not installed; install it with: pip install peft accelerate"
    assert done.stderr.strip().splitlines()[-1] == sentence
    assert "Traceback" not in done.stderr


def test_bad_options_are_usage_errors(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        options("--steps", "0")
    assert "expected an integer of at least 1, got '0'" in capsys.readouterr().err


def test_load_of_the_experts_is_shown(script, options, capsys):
    options("--router-every", "2", "--steps", "3")
    script.main()
    out = capsys.readouterr().out
    table = out[out.index("load of the experts") :].splitlines()
    rows = [row.split() for row in table if row.split()[:1] in (["1"], ["3"])]
    assert len(rows) == 2
    for row in rows:
        assert 4 <= float(row[4]) <= 32  # effective experts: between K and E
