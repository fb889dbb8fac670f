"""The C++ backend by itself: what the operators' tests, which run on every backend, do not reach."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omnigene_fast import backends, ops, reference

cpu = backends.load("cpu")
REASON = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def layer(T, H, I, E, K, dtype, seed=0):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    index = torch.rand(T, E, generator=generator).topk(K, dim=1).indices
    return (
        normal(T, H).to(dtype),
        (normal(E, 2 * I, H) / H**0.5).to(dtype),
        (normal(E, H, I) / I**0.5).to(dtype),
        index,
        torch.rand(T, K, generator=generator),
    )


def error(out, truth):
    return ((out.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 5, 9, 16, 40, 100, 300])
def test_true_width_is_as_exact_as_pytorch(T, dtype):
    """H=2816, I=704: long sums. T reaches every tile: single tokens, one to six vectors, several passes."""
    hidden, gate_up, down, index, weights = layer(T, 2816, 704, 3, 2, dtype)
    truth = reference.expert_mlp(
        hidden.double(), gate_up.double(), down.double(), index, weights.double(), activation="gelu_tanh"
    )
    plain = reference.expert_mlp(hidden, gate_up, down, index, weights, activation="gelu_tanh")
    ours = ops.expert_mlp(hidden, gate_up, down, index, weights, activation="gelu_tanh", backend="cpu")
    assert error(ours, truth) <= 1.5 * error(plain, truth)


def test_thread_count_does_not_change_a_bit():
    """Tasks are handed out as threads come; the order of a sum does not depend on who computes it."""
    arguments = layer(130, 192, 96, 16, 4, torch.bfloat16)
    proj, ones = torch.randn(128, 192).bfloat16(), torch.ones(192).bfloat16()
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results[threads] = [ops.expert_mlp(*arguments, activation="gelu_tanh", backend="cpu")]
            results[threads] += ops.route(arguments[0], proj, ones, ones[:128], top_k=8, eps=1e-6, backend="cpu")
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3, 5):
        for one, other in zip(results[1], results[threads], strict=True):
            assert torch.equal(one, other)


def test_half_precision_extremes_survive():
    """float16 goes through float32 and back: a subnormal result, the largest value, overflow to Inf."""
    hidden = torch.tensor([[6e-8, 1.0], [65504.0, 1.0]], dtype=torch.float16)
    gate_up = torch.tensor([[[0.0, 20.0], [1.0, 0.0]]], dtype=torch.float16)  # gate 20, up the first element
    down = torch.tensor([[[0.05], [0.1]]], dtype=torch.float16)
    index, weights = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    out = ops.expert_mlp(hidden, gate_up, down, index, weights, activation="gelu_tanh", backend="cpu")
    wide = [tensor.double() for tensor in (hidden, gate_up, down)]
    truth = reference.expert_mlp(*wide, index, weights.double(), activation="gelu_tanh")
    assert torch.equal(out, truth.half())
    assert out[1, 1].isinf()
    assert 0 < out[0, 0] < 2**-14


def test_tiny_probabilities_keep_their_order():
    """exp goes on through the subnormals: the eighth pick, 94.5 nats below the first, is still the right one."""
    logits = -torch.arange(32, dtype=torch.float32).flip(0)[None] * 13.5
    _, _, index = ops.topk_gate(logits, torch.ones(32), top_k=8, backend="cpu")
    assert index[0].tolist() == list(range(31, 23, -1))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_a_long_prefill_gives_its_memory_back():
    """Scratch above 64 MiB a slot is freed after the call."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    arguments = layer(20000, 64, 640, 2, 2, torch.float32)  # 102 MB of activations between the projections
    before = resident()
    for _ in range(3):
        ops.expert_mlp(*arguments, activation="silu", backend="cpu")
    assert resident() - before < 80 << 20


def test_the_probes_measure_something():
    """Within what any machine can do; the floor in the benchmarks rests on them."""
    assert 0.5 < cpu.probe_bandwidth(0, torch.ones(2**27, dtype=torch.uint8)) < 2000
    assert 1 < cpu.probe_peak("float32", 0.02) < 1e6


def test_an_instruction_set_that_is_not_there_is_named():
    code = (
        "import torch; from omnigene_fast import backends;print(backends.load('cpu').unavailable(torch.device('cpu')))"
    )
    environment = os.environ | {"OMNIGENE_FAST_CPU_ISA": "sse9"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for word in ("OMNIGENE_FAST_CPU_ISA", "sse9", "portable"):
        assert word in run.stdout


def test_large_gradients_take_over_memory_that_is_free_and_no_other():
    """The gradients of expert weights are kept for reuse: a live one is never touched, a stale one never seen."""
    E, H, intermediate = 8, 1024, 1056  # more than 32 MiB of float32 for gate_up_proj
    experts = [
        (torch.randn(E, rows, columns) / columns**0.5).requires_grad_()
        for rows, columns in ((2 * intermediate, H), (H, intermediate))
    ]

    def gradients(seed):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(5, H, generator=generator)
        index = torch.randint(0, 4, (5, 2), generator=generator)  # experts 4 to 7 are empty: their zeros are written
        out = ops.expert_mlp(hidden, *experts, index, torch.ones(5, 2), activation="gelu_tanh", backend="cpu")
        return torch.autograd.grad(out.square().sum(), experts)

    cpu.release_memory()
    first = gradients(0)
    expected = [grad.clone() for grad in first]
    second = gradients(1)
    assert {x.data_ptr() for x in first}.isdisjoint(x.data_ptr() for x in second)
    assert all(torch.equal(x, y) for x, y in zip(first, expected, strict=True))
    address = second[0].data_ptr()
    view = second[0][3]  # keeps the memory alive
    kept = view.clone()
    del second
    third = gradients(2)
    assert third[0].data_ptr() != address
    assert torch.equal(view, kept)
    del view, third, first
    cpu.release_memory()
    fourth = gradients(0)
    assert all(torch.equal(x, y) for x, y in zip(fourth, expected, strict=True))
    address = fourth[0].data_ptr()
    del fourth
    fifth = gradients(1)  # in the memory of the fourth, whose values must not show
    assert fifth[0].data_ptr() == address
    assert not fifth[0][4:].any()
    cpu.release_memory()


def test_the_storage_of_a_large_gradient_may_be_resized():
    E, H, intermediate = 8, 1024, 1056
    experts = [torch.randn(E, 2 * intermediate, H).requires_grad_(), torch.randn(E, H, intermediate).requires_grad_()]
    index, weights = torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)

    def gradient():
        out = ops.expert_mlp(torch.ones(5, H), *experts, index, weights, activation="silu", backend="cpu")
        return torch.autograd.grad(out.sum(), experts[0])[0]

    cpu.release_memory()
    expected = gradient().clone()
    freed = gradient()
    freed.untyped_storage().resize_(0)
    assert freed.untyped_storage().nbytes() == 0
    assert torch.equal(gradient(), expected)
    assert cpu._kept_bytes() <= expected.nbytes * 3 // 2  # one for each projection, none of those that were freed
    cpu.release_memory()
