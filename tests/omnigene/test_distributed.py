"""Two processes (gloo) train, compute and trace what one does: DDP, FSDP2, expert parallelism; each with a control."""

import argparse
import json
import multiprocessing
import os
import re
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer

import omnigene_fast
from omnigene_fast.demo import training
from omnigene_fast.demo.model import Size, small_model

from ..helpers import relative_error
from .helpers import load

TINY = Size(H=64, I=32, E=8, K=2, layers=2)
SHORT = ["--steps", "4", "--length", "48", "--rank", "4", "--lr", "2e-3", "--dtype", "float32", "--threads", "1"]
BFLOAT16 = "fsdp2, bfloat16"
CASES = {
    "ddp": [],
    "fsdp2": ["--compare", "--fsdp"],
    BFLOAT16: ["--compare", "--fsdp", "--dtype", "bfloat16"],
    "fsdp2, experts full": ["--fsdp", "--experts", "full"],
    "fsdp2, experts lora": ["--fsdp", "--experts", "lora"],
    "another order": ["--seed", "1"],
}


def _train(path, case, arguments, batch):
    arguments = [*SHORT, *arguments, "--model", str(path / "base"), "--batch", str(batch), "--out", str(path / case)]
    return {way: run.losses for way, run in load("cpt").main(arguments).items()}


def _worker(rank, path, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        made = {
            "losses": {case: _train(path, case, arguments, 2) for case, arguments in CASES.items()},
            "unsharded": _unsharded(path),
            "parallel": _parallel(path, rank),
        }
        _trace(_sharded(path), path / "trace of two")
        if rank == 0:
            (path / "outcome.json").write_text(json.dumps(made))
    finally:
        dist.destroy_process_group()


def _unsharded(path):
    """The error where accelerate has its way: on a CPU it takes DDP for FSDP2."""
    with pytest.MonkeyPatch.context() as patch:
        ours, stock = training._Trainer, Trainer.create_accelerator_and_postprocess
        patch.setattr(ours, "create_accelerator_and_postprocess", stock)
        with pytest.raises(RuntimeError) as refused:
            _train(path, "unsharded", ["--fsdp"], 2)
    return str(refused.value)


def _parallel(path, rank):
    """What expert_parallel.py compares by case; last, where the second process' experts of one layer add nothing."""
    script = load("expert_parallel")
    common = ["--model", str(path / "base"), "--batch", "3", "--length", "40", "--rounds", "1", "--threads", "1"]

    def run(case, *arguments):
        return script.main([*common, "--out", str(path / case), *arguments])

    made = {
        "all_reduce": run("all_reduce", "--compare", "--reference"),
        "all_to_all": run("all_to_all", "--compare", "--reference", "--exchange", "all_to_all"),
    }
    with pytest.MonkeyPatch.context() as patch:
        # No process holds the whole model, and without the accelerator being asked for it does nothing.
        patch.setattr(script.shared, "load", None)
        made["shares"] = run("shares", "--compare")
        patch.setattr(omnigene_fast, "accelerate", None)
        made["stock"] = run("stock", "--stock")
    switch = script.shared.switch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.shared, "switch", lambda model, way: _muted(switch(model, way), way, rank))
        try:
            made["muted"] = run("muted", "--compare")
        except RuntimeError as error:
            made["muted"] = str(error)
    return made


def _sharded(path):
    options = argparse.Namespace(dtype="float32", exchange="all_reduce")
    return load("expert_parallel").sharded(options, path / "base", 2)


def _trace(model, path):
    ids = torch.arange(3, 3 + 3 * 11).view(3, 11)
    with torch.no_grad(), omnigene_fast.trace(omnigene_fast.accelerate(model), path, labels={"kind": ["a", "b", "a"]}):
        model(input_ids=ids)


def _muted(model, way, rank):
    """The control: accelerated, the second process' experts of one layer add nothing."""
    weight = model.model.layers[0].experts.down_proj
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape[0] == TINY.E // 2
    if rank == 1 and way == "accelerated":
        weight.data.to_local().zero_()
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path, shared = tmp_path_factory.mktemp("distributed"), load("shared")
    shared.save(small_model(TINY, torch.device("cpu"))[0].float(), shared.byte_tokenizer(), path / "base")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # A server that imports once for both processes, which is most of what they would do.
    multiprocessing.set_forkserver_preload([__name__, "peft", "transformers.models.gemma4.modeling_gemma4"])
    torch.multiprocessing.start_processes(_worker, args=(path, port), nprocs=2, start_method="forkserver")
    return path


@pytest.fixture(scope="module")
def outcome(path):
    return json.loads((path / "outcome.json").read_text())


@pytest.fixture(scope="module")
def alone(path, outcome):
    """One process with the batch of two: losses and checkpoint by what is trained of the experts."""
    done = {}
    for experts in ("frozen", "full", "lora"):
        losses = _train(path, experts, ["--experts", experts], 4)["accelerated"]
        done[experts] = losses, load_file(path / experts / "model" / "model.safetensors")
    return done


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("another order", BFLOAT16)])
def test_two_processes_train_as_one(case, path, outcome, alone):
    expected, weights = alone[case.rpartition("experts ")[2] if "experts" in case else "frozen"]
    for way, losses in outcome["losses"][case].items():
        assert losses == pytest.approx(expected, rel=1e-6), way
    saved = load_file(path / case / "model" / "model.safetensors")
    base = load_file(path / "base" / "model.safetensors")
    assert saved.keys() == weights.keys() == base.keys()
    for name, tensor in saved.items():
        # What was learned, not the weights alone, most of which is what was there before; Adam's first steps amplify.
        moved = relative_error(base[name], weights[name])
        assert relative_error(tensor, weights[name]) < max(1e-7, 1e-2 * moved), name
    assert max(relative_error(base[name], weights[name]) for name in base) > 1e-3


def test_another_order_of_the_batches_is_another_training(path, outcome, alone):
    expected, weights = alone["frozen"]
    other = outcome["losses"]["another order"]["accelerated"]
    assert other != pytest.approx(expected, rel=1e-3)
    saved = load_file(path / "another order" / "model" / "model.safetensors")
    assert max(relative_error(saved[name], weights[name]) for name in saved) > 1e-3


def test_the_first_process_alone_writes(path, outcome):
    made = {file.name for file in (path / "ddp").iterdir()}
    assert made == {"data.jsonl", "model", "loss.png", "result.json"}
    assert json.loads((path / "fsdp2" / "result.json").read_text())["title"].endswith("2 processes by FSDP2")


def test_sharded_in_bfloat16_it_trains_as_in_float32(outcome):
    exact, rounded = outcome["losses"]["fsdp2"], outcome["losses"][BFLOAT16]
    assert set(rounded) == {"stock", "accelerated"}
    for way, losses in rounded.items():
        assert losses == pytest.approx(exact[way], rel=0.005), way  # bfloat16 has steps of 0.6 % here


def test_what_accelerate_does_not_shard_is_not_trained(outcome):
    assert outcome["unsharded"].startswith("fsdp: expected parameters that FSDP2 has sharded over several processes")


def test_a_model_without_named_layers_is_not_sharded():
    model = small_model(TINY, torch.device("cpu"))[0]
    model._no_split_modules = ["OtherLayer"]
    with pytest.raises(ValueError, match=r"got Gemma4.* with OtherLayer; train it without fsdp"):
        training._blocks(model)


@pytest.mark.parametrize("exchange", ["all_reduce", "all_to_all"])
def test_expert_parallelism_gives_what_one_process_does(exchange, outcome):
    apart = outcome["parallel"][exchange]
    assert list(apart) == ["stock", "accelerated"]
    for each in apart.values():
        assert len(each) == 5  # logits, loss, routers, the experts of either process
        assert max(each.values()) < 5e-5, each


def test_without_a_reference_stock_is_the_measure(path, outcome):
    apart = outcome["parallel"]["shares"]
    assert list(apart) == ["accelerated"]
    assert len(apart["accelerated"]) == 5
    assert 0 < max(apart["accelerated"].values()) < 5e-5, apart
    titles = [part["title"] for part in json.loads((path / "shares" / "result.json").read_text())["parts"]]
    assert titles[0] == "Relative difference to stock, in 2 processes too"


def test_stock_alone_never_accelerates(path, outcome):
    assert outcome["parallel"]["stock"] == {}
    (row,) = _table(path / "stock", "Forward and backward")
    assert "tokens/s stock" in row
    assert "tokens/s accelerated" not in row


def test_without_one_process_experts_it_ends_with_a_fault(path, outcome):
    assert outcome["parallel"]["muted"].startswith("accelerated: logits differ by ")
    (part, *_) = json.loads((path / "muted" / "result.json").read_text())["parts"]
    apart = {row[0]: float(row[1]) for row in part["rows"]}
    assert apart["logits"] > 1e-2
    assert apart["gradients of the routers"] > 1e-2


def test_processes_that_share_a_batch_trace_it_once(path, outcome):
    options = argparse.Namespace(dtype="float32")
    _trace(load("shared").load(options, path / "base")[0], path / "trace of one")
    one, two = (omnigene_fast.open_trace(path / f"trace of {name}") for name in ("one", "two"))
    assert len(two.documents) == 3
    assert two.counts.sum() == 3 * 11 * TINY.layers * TINY.K
    assert np.array_equal(two.counts, one.counts)
    assert two.documents["kind"].tolist() == one.documents["kind"].tolist()


def test_each_process_holds_its_share(path, outcome):
    one, each = _table(path / "all_reduce", "Forward and backward")
    assert (one["experts"], each["experts"]) == ("8", "4")
    weights = TINY.layers * TINY.E * 3 * TINY.I * TINY.H * 4 / 1e6
    assert float(one["MB of expert weights"]) == pytest.approx(weights, rel=1e-3)
    assert float(each["MB of expert weights"]) == pytest.approx(weights / 2, rel=1e-3)


def _table(path, title):
    parts = json.loads((path / "result.json").read_text())["parts"]
    (table,) = (part for part in parts if part.get("title") == title)
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def test_without_torchrun_it_says_how_to_start():
    with pytest.raises(RuntimeError, match=re.escape("torchrun --nproc_per_node 2 examples/omnigene/expert_parallel")):
        load("expert_parallel").main([])
