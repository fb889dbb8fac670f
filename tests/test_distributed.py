"""DDP and FSDP2 on two processes (gloo): the gradients of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from omnigene_fast import accelerate, restore

from . import helpers
from .helpers import moe_layers, relative_error, tokens
from .test_lowbit import DEFAULT, FORMATS
from .test_training import prepared

WORLD = 2
CASES = [
    ("ddp", "full"),
    ("ddp", "lora on experts"),
    ("fsdp2", "full"),
    ("fsdp2 by module", "lora on experts"),
    *((how, f"lora on experts, {format}") for how in ("ddp", "fsdp2", "fsdp2 by module") for format in FORMATS),
]


def _shard(model, how, mesh):
    for layer in moe_layers(model):
        if how == "fsdp2 by module":  # the experts' own group, inside their LoRA wrappers if there are any
            experts = layer.experts
            fully_shard(experts.get_base_layer() if hasattr(experts, "get_base_layer") else experts, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _prepared(recipe):
    """A model to train; its experts stored in 8 bits if `recipe` ends in a format."""
    recipe, _, format = recipe.partition(", ")
    options = {"experts_dtype": format, "backend": DEFAULT} if format else {}
    return prepared(recipe, implementation="omnigene_fast", **options)


def _gradients(how, recipe, batch, mesh=None):
    model = _prepared(recipe)
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
        states = {format: _sharded_state(format, rank, mesh) for format in FORMATS}
        if rank == 0:
            torch.save(results, f"{path}/gradients.pt")
            torch.save(states, f"{path}/states.pt")
    finally:
        dist.destroy_process_group()


def _sharded_state(format, rank, mesh):
    """The gathered state dict of a sharded model with experts in 8 bits, and what it refuses."""
    model = accelerate(helpers.gemma4(), experts_dtype=format, backend=DEFAULT)
    if rank:  # only the process that saves has the weights that are to be found again
        model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor, 0)
    _shard(model, "fsdp2", mesh)
    model(tokens())
    state = model.state_dict()
    assert all(isinstance(tensor, DTensor) for name, tensor in state.items() if "experts." in name)
    with pytest.raises(RuntimeError, match="cannot be rounded to 8 bits when it is sharded"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="got a model sharded by FSDP"):
        restore(model)
    with pytest.raises(ValueError, match=r"which is a DTensor \(quantised or sharded"):
        accelerate(_sharded(helpers.gemma4(), mesh), experts_dtype=format)
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def _sharded(model, mesh):
    _shard(model, "fsdp2", mesh)
    return model


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(_worker, args=(str(path),), nprocs=WORLD)
    return path


@pytest.fixture(scope="module")
def distributed(outputs):
    return torch.load(outputs / "gradients.pt")


@pytest.mark.parametrize("format", FORMATS)
def test_a_sharded_model_saves_its_8_bits_as_weights(format, outputs):
    expected = accelerate(helpers.gemma4(), experts_dtype=format, backend=DEFAULT).state_dict()
    state = torch.load(outputs / "states.pt")[format]
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("how", "recipe"), CASES)
def test_gradients_equal_those_of_one_process(how, recipe, distributed):
    expected = _gradients("one process", recipe, tokens(2 * WORLD, 24))
    half = _gradients("one process", recipe, tokens(2 * WORLD, 24).chunk(WORLD)[0])
    assert set(distributed[how, recipe]) == set(expected)
    for name, gradient in distributed[how, recipe].items():
        assert relative_error(gradient, expected[name]) < 1e-5, name
    assert max(relative_error(half[name], expected[name]) for name in expected) > 1e-2, "one half is no control"
