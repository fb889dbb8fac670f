"""DDP and FSDP2 on two processes (gloo): the gradients of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .helpers import moe_layers, relative_error, tokens
from .test_training import prepared

WORLD = 2
CASES = [
    ("ddp", "full"),
    ("ddp", "lora on experts"),
    ("fsdp2", "full"),
    ("fsdp2 by module", "lora on experts"),
]


def _shard(model, how, mesh):
    for layer in moe_layers(model):
        if how == "fsdp2 by module":  # the experts' own group, inside their LoRA wrappers if there are any
            experts = layer.experts
            fully_shard(experts.get_base_layer() if hasattr(experts, "get_base_layer") else experts, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _gradients(how, recipe, batch, mesh=None):
    model = prepared(recipe, implementation="omnigene_fast")
    if recipe != "full":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    run = model
    if how == "ddp":
        run = DistributedDataParallel(model)
    elif how != "one process":
        _shard(model, how, mesh)
    run(input_ids=batch, labels=batch).loss.backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _worker(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=WORLD)
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        batch = tokens(2 * WORLD, 24).chunk(WORLD)[rank]
        results = {case: _gradients(*case, batch, mesh) for case in CASES}
        if rank == 0:
            torch.save(results, f"{path}/gradients.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(_worker, args=(str(path),), nprocs=WORLD)
    return torch.load(path / "gradients.pt")


@pytest.mark.parametrize(("how", "recipe"), CASES)
def test_gradients_equal_those_of_one_process(how, recipe, distributed):
    expected = _gradients("one process", recipe, tokens(2 * WORLD, 24))
    half = _gradients("one process", recipe, tokens(2 * WORLD, 24).chunk(WORLD)[0])
    assert set(distributed[how, recipe]) == set(expected)
    for name, gradient in distributed[how, recipe].items():
        assert relative_error(gradient, expected[name]) < 1e-5, name
    assert max(relative_error(half[name], expected[name]) for name in expected) > 1e-2, "one half is no control"
