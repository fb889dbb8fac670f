"""Damaged and half-downloaded checkpoints: each verb that takes one names the file in one sentence, before it loads."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from omnigene_fast import checkpoint
from omnigene_fast.cli import main
from omnigene_fast.demo.model import Size, small_model

SIZE = Size(H=64, I=24, E=16, K=4, layers=3)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00012.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same checkpoint in one file and in shards, an adapter, and a text."""
    from peft import LoraConfig, get_peft_model
    from transformers import ByT5Tokenizer

    path = tmp_path_factory.mktemp("whole")
    model, _, _ = small_model(SIZE, torch.device("cpu"))
    for name, options in (("one", {}), ("shards", {"max_shard_size": "100KB"})):
        model.save_pretrained(path / name, **options)
        ByT5Tokenizer(extra_ids=0).save_pretrained(path / name)
    assert (path / "shards" / SHARD).exists()
    get_peft_model(model, LoraConfig(r=2, target_modules=["router.proj"])).save_pretrained(path / "adapter")
    (path / "d.jsonl").write_text('{"text": "ACGT"}\n')
    return path


def remove(name):
    return lambda path: (path / name).unlink()


def put(name, data):
    return lambda path: (path / name).write_bytes(data)


def cut(name, share=0.5):
    def damage(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * share)])

    return damage


def dangle(path):
    (path / ONE).unlink()
    (path / ONE).symlink_to("/no/such/blob")


def drop_from_shard(path):
    tensors = load_file(path / SHARD)
    tensors.pop(min(tensors))
    save_file(tensors, path / SHARD)


def edit_index(**changes):
    def damage(path):
        index = json.loads((path / INDEX).read_text())
        (path / INDEX).write_text(json.dumps(index | changes))

    return damage


def pickled(share, name="pytorch_model.bin"):
    def damage(path):
        (path / ONE).unlink()
        torch.save({"a": torch.ones(99)}, path / name)
        cut(name, share)(path)

    return damage


DAMAGE = {
    "empty folder": ("one", lambda path: [file.unlink() for file in path.iterdir()], "config.json"),
    "no folder": ("one", shutil.rmtree, "got nothing there"),
    "no config": ("one", remove("config.json"), "config.json"),
    "cut config": ("one", cut("config.json"), "config.json"),
    "config is a list": ("one", put("config.json", b"[]"), "config.json"),
    "config is a pointer": ("one", put("config.json", POINTER), "config.json"),
    "cut generation config": ("one", cut("generation_config.json"), "generation_config.json"),
    "no weights": ("one", remove(ONE), ONE),
    "weights are a pointer": ("one", put(ONE, POINTER), ONE),
    "weights are empty": ("one", put(ONE, b""), ONE),
    "four bytes": ("one", put(ONE, b"abcd"), ONE),
    "a web page": ("one", put(ONE, b"<html>not found</html>" * 9), ONE),
    "half": ("one", cut(ONE), ONE),
    "almost whole": ("one", cut(ONE, 0.9999), ONE),
    "dangling link": ("one", dangle, ONE),
    "cut pickle": ("one", pickled(0.5), "pytorch_model.bin"),
    "no tokenizer": ("one", remove("tokenizer_config.json"), "tokenizer"),
    "cut tokenizer": ("one", cut("tokenizer_config.json"), "tokenizer_config.json"),
    "tokenizer is a pointer": ("one", put("tokenizer.json", POINTER), "tokenizer.json"),
    "sentencepiece is a pointer": ("one", put("tokenizer.model", POINTER), "tokenizer.model"),
    "no shard": ("shards", remove(SHARD), SHARD),
    "half a shard": ("shards", cut(SHARD), SHARD),
    "shard is a pointer": ("shards", put(SHARD, POINTER), SHARD),
    "shard lacks a tensor": ("shards", drop_from_shard, SHARD),
    "no index": ("shards", remove(INDEX), INDEX),
    "cut index": ("shards", cut(INDEX), INDEX),
    "index without a map": ("shards", edit_index(weight_map={}), INDEX),
    "index names another": ("shards", edit_index(weight_map={"a": "b.safetensors"}), "b.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_sentence(whole, tmp_path, name):
    which, damage, said = DAMAGE[name]
    shutil.copytree(whole / which, tmp_path / "model")
    damage(tmp_path / "model")
    trace = ["trace", tmp_path / "model", whole / "d.jsonl", "--out", tmp_path / "run"]
    for command in (trace, ["demo", "--model", tmp_path / "model", "--no-true-shape"]):
        done = CliRunner().invoke(main, [str(each) for each in command])
        assert done.exit_code == 1, done.output
        (line,) = done.output.strip().splitlines()  # nothing else, such as a progress bar: no weights were read
        assert line.startswith("Error: ")
        assert said in line
        assert str(tmp_path / "model") in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["one", "shards"])
def test_whole_ones_pass(whole, which):
    checkpoint.check(whole / which)
    checkpoint.check_adapter(whole / "adapter")
    assert checkpoint.digest(whole / "one") == checkpoint.digest(whole / which)


def test_weights_that_are_missing_or_of_another_shape_are_not_made_up(whole, tmp_path):
    for name, change in (("lacks", lambda t: None), ("shape", lambda t: t[:3].contiguous())):
        path = shutil.copytree(whole / "one", tmp_path / name)
        tensors = load_file(path / ONE)
        key = "model.layers.0.router.proj.weight"
        changed = change(tensors.pop(key))
        save_file(tensors | ({} if changed is None else {key: changed}), path / ONE, metadata={"format": "pt"})
        checkpoint.check(path)
        with pytest.raises(ValueError, match=f"{key}.*{name}|{name}.*{key}"):
            checkpoint.load_model(path, torch.bfloat16, "cpu")


@pytest.mark.parametrize("kind", ["GemmaTokenizer", "GPT2Tokenizer", "NoSuchTokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(whole, tmp_path, kind):
    path = shutil.copytree(whole / "one", tmp_path / "model")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(ValueError, match=r"model: expected .*tokenizer"):
        checkpoint.load_tokenizer(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "adapter_config.json"),
        (remove("adapter_config.json"), "adapter_config.json"),
        (remove("adapter_model.safetensors"), "adapter_model.safetensors"),
        (cut("adapter_config.json"), "adapter_config.json"),
        (cut("adapter_model.safetensors"), "adapter_model.safetensors"),
        (put("adapter_model.safetensors", POINTER), "Git LFS pointer"),
    ],
)
def test_a_damaged_adapter_is_named_before_the_model_is_loaded(whole, tmp_path, damage, said):
    adapter = shutil.copytree(whole / "adapter", tmp_path / "adapter")
    damage(adapter)
    command = ["trace", whole / "one", whole / "d.jsonl", "--out", tmp_path / "run", "--adapter", adapter]
    done = CliRunner().invoke(main, [str(each) for each in command])
    assert done.exit_code == 1
    (line,) = done.output.strip().splitlines()
    assert line.startswith("Error: adapter: ")
    assert said in line


def test_an_adapter_that_lacks_tensors_is_refused(whole, tmp_path):
    adapter = shutil.copytree(whole / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter: expected a PEFT adapter of the model"):
        checkpoint.load_model(whole / "one", torch.bfloat16, "cpu", adapter)


@pytest.mark.parametrize(
    "more",
    [("--record", "logits"), ("--adapter", "no/such"), ("--out", "file"), ("--out", "file/run"), ("--out", "foreign")],
    ids=" ".join,
)
def test_options_are_checked_before_the_model_is_loaded(whole, tmp_path, monkeypatch, more):
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("x")
    done = CliRunner().invoke(main, ["trace", str(whole / "one"), str(whole / "d.jsonl"), "--out", "run", *more])
    assert done.exit_code == 1
    assert done.output.count("Error: ") == 1
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
