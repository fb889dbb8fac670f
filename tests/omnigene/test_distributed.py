"""Two processes (gloo) train and compute what one does: DDP, FSDP2, expert parallelism; each with a control."""

import json
import os
import re
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from omnigene_fast.demo.model import Size, small_model

from ..helpers import relative_error
from .helpers import load

TINY = Size(H=64, I=32, E=8, K=2, layers=2)
SHORT = ["--steps", "4", "--length", "48", "--rank", "4", "--lr", "2e-3", "--dtype", "float32", "--threads", "1"]
CASES = {
    "ddp": ["--compare"],
    "fsdp2": ["--compare", "--fsdp"],
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
        losses = {case: _train(path, case, arguments, 2) for case, arguments in CASES.items()}
        parallel = load("expert_parallel")
        apart = {
            exchange: parallel.main([*_parallel(path), "--compare", "--exchange", exchange])
            for exchange in ("all_reduce", "all_to_all")
        }
        sharded = parallel.sharded
        parallel.sharded = lambda *arguments: _without_experts(sharded(*arguments), rank == 1)
        control = parallel.main(_parallel(path))
        if rank == 0:
            (path / "outcome.json").write_text(json.dumps({"losses": losses, "apart": apart, "control": control}))
    finally:
        dist.destroy_process_group()


def _parallel(path):
    more = ["--batch", "3", "--length", "40", "--rounds", "1", "--threads", "1"]
    return ["--model", str(path / "base"), "--out", str(path / "parallel"), *more]


def _without_experts(model, mute):
    """The control: one process' experts of one layer add nothing."""
    weight = model.model.layers[0].experts.down_proj
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape[0] == TINY.E // 2
    if mute:
        weight.data.to_local().zero_()
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path, shared = tmp_path_factory.mktemp("distributed"), load("shared")
    shared.save(small_model(TINY, torch.device("cpu"))[0].float(), shared.byte_tokenizer(), path / "base")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, args=(path, port), nprocs=2)
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


@pytest.mark.parametrize("case", [case for case in CASES if case != "another order"])
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
    parts = json.loads((path / "fsdp2" / "result.json").read_text())["parts"]
    assert any(part.get("note") == "2 processes, FSDP2" for part in parts)


@pytest.mark.parametrize("exchange", ["all_reduce", "all_to_all"])
def test_expert_parallelism_gives_what_one_process_does(exchange, outcome):
    apart = outcome["apart"][exchange]
    assert list(apart) == ["stock", "accelerated"]
    for each in apart.values():
        assert len(each) == 5  # logits, loss, routers, the experts of either process
        assert max(each.values()) < 5e-5, each


def test_without_one_process_experts_nothing_is_equal(outcome):
    (apart,) = outcome["control"].values()
    assert apart["logits"] > 1e-2
    assert apart["gradients of the routers"] > 1e-2


def test_each_process_holds_its_share(path, outcome):
    result = json.loads((path / "parallel" / "result.json").read_text())
    (table,) = (part for part in result["parts"] if part.get("title") == "Forward and backward")
    one, each = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
    assert (one["experts"], each["experts"]) == ("8", "4")
    weights = TINY.layers * TINY.E * 3 * TINY.I * TINY.H * 4 / 1e6
    assert float(one["MB of expert weights"]) == pytest.approx(weights, rel=1e-3)
    assert float(each["MB of expert weights"]) == pytest.approx(weights / 2, rel=1e-3)


def test_without_torchrun_it_says_how_to_start():
    with pytest.raises(RuntimeError, match=re.escape("torchrun --nproc_per_node 2 examples/omnigene/expert_parallel")):
        load("expert_parallel").main([])
