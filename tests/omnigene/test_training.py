"""Continued pre-training and instruction tuning: what is trained, what is left out, what the next stage gets."""

import importlib.util
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


def kept_out(shared):
    """What no training text may hold, by its kind, in upper case: each anew from the data."""
    every, domains = load_texts(50), shared.domains().values()
    audited = {text.upper() for each in every.values() for text in each[-16:]}
    prompts = "\n".join(text for family in ("homology_standard", "homology_remote") for text in every[family][-16:])
    terms = [text for text in every["text_biology"] if shared.by_hash(text.split(". ")[0]) == "test"]
    assert len(audited) == 12 * 16
    assert len(terms) > 20
    return {
        "audited text": audited,
        "audited pair": {each.sequence for each in domains if each.sequence in prompts},
        "test pair": {each.sequence for pair in shared.split_pairs("test") for each in (pair.a, pair.b)},
        "test sequence": {each.sequence for each in shared.split_domains("test")},
        "test 3Di": {each.tracks["3di"].upper() for each in shared.split_domains("test")},
        "test DSSP": {each.tracks["dssp"].upper() for each in shared.split_domains("test")},
        "test term": {text.upper() for text in terms},
    }


def leaks(texts, kept):
    """The kinds of what a text holds or is a part of."""
    found = [text.upper() for text in texts]
    return {kind for kind, held in kept.items() if any(one in text or text in one for text in found for one in held)}


def test_cpt_trains_on_nothing_that_is_tested_or_audited(shared, base, tmp_path):
    kept, every = kept_out(shared), load_texts(50)
    # The controls: the shipped texts do hold these, and one text of a kind is found among others.
    shipped = [text for each in every.values() for text in each[:34]]
    assert leaks(shipped, kept) == kept.keys() - {"audited pair"}  # which sft.py would train on
    load("cpt").main(
        [*SHORT, "--steps", "1", "--rank", "1", "--model", str(base), "--batch", "1", "--stock", "--out", str(tmp_path)]
    )
    trained = [json.loads(line)["text"] for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert not leaks(trained, kept)
    for kind, held in kept.items():
        assert kind in leaks([*trained[:3], f"> {min(held).lower()}"], kept)
    # Nothing else is left out.
    for family, each in load("cpt").texts().items():
        assert set(each) <= set(trained)
        assert all(leaks([text], kept) for text in set(every[family][:34]) - set(each))
    about = json.loads((tmp_path / "result.json").read_text())["about"]
    assert f"on {len(trained)} texts of 12 families; {12 * 34 - len(trained)} more left out" in about


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
    arguments = ["--model", str(base), "--limit", "6", "--batch", "2", "--compare"]
    runs = sft.main([*SHORT, *arguments, "--length", "340", "--out", str(tmp_path)])
    assert runs["accelerated"].losses == pytest.approx(runs["stock"].losses, rel=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    short = [one for one in asked if 1 + len(one.prompt.encode()) < 340]
    assert 12 < len(short) < 18
    assert [(row["prompt"], row["response"]) for row in rows] == [(one.prompt, f" {one.answer}") for one in short]
    about = json.loads((tmp_path / "result.json").read_text())["about"]
    assert f"6 kind; {18 - len(short)} more left out, of 340 tokens or more" in about
    with pytest.raises(ValueError, match="--length: expected more than "):
        sft.main([*SHORT, *arguments, "--length", "9", "--out", str(tmp_path)])
    assert loaded(tmp_path / "model").config.num_hidden_layers == TINY.layers


def test_sft_trains_on_nothing_that_is_tested_or_audited(shared):
    sft, true_false, kept = load("sft"), load("true_false"), kept_out(shared)
    asked = sft.mixture()
    assert not leaks([one.prompt.removesuffix("\nWhich kind?") for one in asked], kept)
    every = [one for questions in sft.TASKS.values() for one in questions("train")]
    assert "audited pair" in leaks([one.prompt for one in every], kept)  # the control: it takes leaving out
    # Of a term a statement holds the name and a piece of the definition.
    audited = {text.split(". ")[0] for text in load_texts(50)["text_biology"][-16:]}
    known = true_false.terms("train")
    assert audited & known.keys()
    pieces = {piece for name in audited & known.keys() for piece in known[name]}
    pieces |= {piece for each in true_false.terms("test").values() for piece in each}
    found = {True: 0, False: 0}
    for trained, statements in ((True, asked), (False, true_false.questions("train"))):
        for one in statements:
            named = any(one.prompt.startswith(f"{name}: ") for name in {*audited, *true_false.terms("test")})
            found[trained] += named or any(piece in one.prompt for piece in pieces)
    assert found[True] == 0
    assert found[False] > 20
    answers = [one.answer for one in asked if one.group == "true/false"]
    assert answers.count("true") == answers.count("false") > 20


def test_kinds_are_asked_about_the_texts_of_their_part():
    sft, every, trained = load("sft"), load_texts(50), load("cpt").texts()
    asked = {part: {(one.prompt, one.answer) for one in sft.kinds(part)} for part in ("train", "test")}
    for part, texts in (("train", trained), ("test", {name: each[34:] for name, each in every.items()})):
        expected = {(text[:90] + "\nWhich kind?", name) for name, each in texts.items() for text in each}
        assert asked[part] <= expected
        assert len(asked[part]) >= 0.98 * len(expected)  # few texts begin alike
    assert not asked["train"] & asked["test"]
    train_lora = load("train_lora")
    question = sft.kinds("train")[0]
    tokens = load("shared").byte_tokenizer()
    first, answer = (train_lora.ids(text, tokens, begin=False) for text in (question.prompt, f" {question.answer}"))
    assert tokens.decode(first + answer) == f"{question.prompt} {question.answer}"


def test_what_is_missing_shows_before_anything_is_made(shared, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    for missing in ("peft", "accelerate", "matplotlib"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, gone=missing: None if name == gone else found(name)
        )
        for stage in ("cpt", "sft"):
            with pytest.raises(ImportError, match=f"{missing} is not installed; install it with: pip install"):
                load(stage).main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
