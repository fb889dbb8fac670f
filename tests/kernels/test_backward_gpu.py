"""What only a GPU can show of the backward, at Gemma-4's H and I: its tiles, graph capture, offsets past 2^31."""

import pytest
import torch

from omnigene_fast import ops

from .. import helpers
from . import gradients
from .gradients import EVERYTHING, FROZEN, FULL

pytestmark = pytest.mark.gpu
E, K, H, I = 16, 4, 2816, 704  # noqa: E741
CUDA = torch.device("cuda")


def make(T, dtype=torch.bfloat16, ranks=None, mode="uniform", experts=E, top_k=K):
    return gradients.make(CUDA, dtype, T, experts, top_k, H, I, ranks=ranks, mode=mode)


def same(ours, others):
    return all(a is b if a is None else torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("mode", helpers.ROUTINGS)
@pytest.mark.parametrize("T", [1, 7, 17, 128, 511, 4096])
def test_as_accurate_as_transformers(T, mode):
    """From few rows of an expert to thousands: every tile configuration of this GPU."""
    for needed, ranks in ((FULL, None), (EVERYTHING, (16, 64))):
        case = make(T, ranks=ranks, mode=mode)
        _, preactivation = gradients.forward(case, save=True)
        ours = gradients.backward(case, needed, preactivation)
        gradients.check(case, ours, needed, mode)
        assert same(gradients.backward(case, needed), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype):
    case = make(129, dtype, ranks=(16, 5))
    gradients.check(case, gradients.backward(case, EVERYTHING), EVERYTHING)


@pytest.mark.parametrize("T", [64, 2048])
def test_same_bits_twenty_times(T):
    case = make(T, ranks=(16, 64), mode="language")
    first = gradients.backward(case, EVERYTHING)
    assert all(same(gradients.backward(case, EVERYTHING), first) for _ in range(20))


def test_frozen_weights_cost_no_memory_of_their_size():
    case = make(64, experts=128, top_k=8)
    _, preactivation = gradients.forward(case, save=True)
    gradients.backward(case, FROZEN, preactivation)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = gradients.backward(case, FROZEN, preactivation)
    assert kept[1] is None
    rows = 64 * 8
    buffers = rows * (2 * I + H) * 2 + rows * (I // 64) * 4 + 2 * 64 * H * 2
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * buffers + 2**20


def test_capture_of_a_training_step_in_a_cuda_graph():
    """Capture refuses any synchronisation; a replay follows new ids and values."""
    router = helpers.stock_router(E, K, H, torch.bfloat16).to(CUDA)
    case = make(64, ranks=(16, 64))
    hidden = torch.randn(64, H, device=CUDA).bfloat16().requires_grad_()
    arguments = {
        name: value.detach().requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in helpers.router_arguments(router).items()
    }
    factors = [x.clone().requires_grad_() for x in case.inputs[4:]]
    trained = [hidden, *(x for x in arguments.values() if isinstance(x, torch.Tensor)), *factors]

    def step():
        _, weights, index = ops.route(hidden, **arguments, backend="triton")
        out = ops.expert_mlp(
            hidden,
            *case.inputs[1:3],
            index,
            weights,
            activation="gelu_tanh",
            gate_up_lora=(factors[0], factors[1]),
            down_lora=(factors[2], factors[3]),
            backend="triton",
        )
        return torch.autograd.grad(out, trained, case.grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    assert same(grads, step())


def test_offsets_past_two_to_the_31():
    """T * K * H passes 2^31 near 95,000 tokens; the last tokens must get what the same tokens get alone."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    T, block = 100_000, make(512, ranks=(16, 16), experts=128, top_k=8)
    hidden, gate_up, down, weights, *factors = block.inputs
    times = T // 512 + 1

    def repeated(tensor):
        return tensor.repeat(times, 1)[:T]

    case = block._replace(
        inputs=(repeated(hidden), gate_up, down, repeated(weights), *factors),
        index=repeated(block.index),
        grad_out=repeated(block.grad_out),
    )
    shift = T % 512
    alone = block._replace(
        inputs=(hidden.roll(-shift, 0), gate_up, down, weights.roll(-shift, 0), *factors),
        index=block.index.roll(-shift, 0),
        grad_out=block.grad_out.roll(-shift, 0),
    )
    needed = (True, False, False, True, True, True, True, True)
    ours, wanted = gradients.backward(case, needed), gradients.backward(alone, needed)
    for number in (0, 3):  # other tiles, so other roundings
        assert ours[number].isfinite().all()
        assert helpers.relative_error(ours[number][-512:], wanted[number]) < 1e-2
    for number in range(4, 8):  # 195 times the gradient of 512 tokens, and a remainder
        assert helpers.relative_error(ours[number] / (T / 512), wanted[number]) < 2e-2
