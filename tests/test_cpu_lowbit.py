"""The C++ experts on projections of 8 bits: exact numbers, every gradient, whatever is beside the bytes untouched.

Truth is float64 with the exact weights float(stored) * scale; the yardstick is the reference in the dtype of the
hidden states, whose weights are dequantised and rounded to it. OMNIGENE_FAST_CPU_ISA chooses the instruction set.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from omnigene_fast import backends, lowbit, ops, reference

from .gradients import FROZEN, LORA, Comparison, Problem, problem
from .helpers import ROUTINGS

cpu = backends.load("cpu")
REASON = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

STORED = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDES = {"gate_up_proj": "gate_up_scale", "down_proj": "down_scale"}
WANTED = {0: FROZEN, 3: (*FROZEN, *LORA)}

stored_as = pytest.mark.parametrize("stored", STORED, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def low_bit(p: Problem, stored: torch.dtype) -> tuple[Problem, dict[str, Tensor]]:
    """`p` with its projections in 8 bits, and their scales; rows differ in magnitude, so that a scale matters."""
    tensors, scales = dict(p.tensors), {}
    for seed, (name, side) in enumerate(SIDES.items()):
        weight = tensors[name]
        spread = torch.rand(weight.shape[:2], generator=torch.Generator().manual_seed(seed)) + 0.5
        tensors[name], scales[side] = lowbit.quantise(weight.float() * spread[..., None], STORED[stored])
    return Problem(tensors, p.index, p.grad), scales


def run(
    p: Problem, scales: dict[str, Tensor], wanted, *, dtype=None, op=ops.expert_mlp, **options
) -> dict[str, Tensor]:
    """The output and the wanted gradients, all in `dtype` but the numbers of 8 bits and their scales."""

    def leaf(name: str) -> Tensor | None:
        x = p.tensors[name]
        if x is None or name in SIDES:
            return x
        return x.detach().clone().to(dtype or x.dtype).requires_grad_(name in wanted)

    leaves = {name: leaf(name) for name in p.tensors}
    pairs = {
        f"{side}_lora": None if leaves[f"{side}_lhs"] is None else (leaves[f"{side}_lhs"], leaves[f"{side}_rhs"])
        for side in ("gate_up", "down")
    }
    projections = (leaves["gate_up_proj"], leaves["down_proj"])
    options = {"activation": "gelu_tanh"} | options
    out = op(leaves["hidden"], *projections, p.index, leaves["weights"], **pairs, **scales, **options)
    out.backward(p.grad.to(out.dtype))
    return {"out": out.detach()} | {name: leaves[name].grad for name in wanted}


def compare(p: Problem, scales: dict[str, Tensor], wanted, comparison: Comparison, **options) -> dict[str, Tensor]:
    """Ours with `options` against the truth and the reference in the same dtype, into `comparison`."""
    mine = run(p, scales, wanted, backend="cpu", **options)
    theirs = run(p, scales, wanted, op=reference.expert_mlp)
    comparison.add(mine, theirs, run(p, scales, wanted, dtype=torch.float64, op=reference.expert_mlp))
    return mine


@stored_as
@dtypes
@pytest.mark.parametrize("rank", WANTED, ids=["frozen", "lora"])
@pytest.mark.parametrize("T", [1, 3, 17, 64])
def test_output_and_gradients(T, rank, dtype, stored):
    """Every routing mode and what a backward keeps; tails of every vector width."""
    comparison = Comparison()
    for seed, (mode, (H, I)) in enumerate(itertools.product(ROUTINGS, ((67, 35), (96, 40)))):  # noqa: E741
        p, scales = low_bit(problem(T, 8, 3, H, I, dtype=dtype, rank=rank, mode=mode, seed=seed), stored)
        results = [compare(p, scales, WANTED[rank], comparison, save=save) for save in ops.SAVE]
        assert torch.equal(results[0]["out"], results[1]["out"])
    comparison.check()


@stored_as
@dtypes
def test_many_tokens_on_one_expert(dtype, stored):
    """Several passes of an expert, and panels of every width beside single tokens."""
    comparison = Comparison()
    for T in (40, 130):
        p = problem(dtype=dtype, rank=3, H=130, I=49, index=torch.full((T, 1), 11))
        compare(*low_bit(p, stored), WANTED[3], comparison)
    comparison.check()


@stored_as
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation, stored):
    p, scales = low_bit(problem(33), stored)
    options = {"activation": activation}
    mine, truth = (
        run(p, scales, FROZEN, backend="cpu", **options),
        run(p, scales, FROZEN, dtype=torch.float64, op=reference.expert_mlp, **options),
    )
    for name, expected in truth.items():
        assert (mine[name].double() - expected).norm() <= 2e-6 * expected.norm(), name


@stored_as
def test_the_criterion_sees_a_wrong_conversion(stored):
    """Negative controls: no scale, the scale of the next row, int8 read without its sign, e5m2 in place of e4m3."""
    for T in (2, 40):
        p, scales = low_bit(problem(T, 8, 3), stored)
        wrong = [(p, {name: torch.ones_like(scale) for name, scale in scales.items()})]
        wrong.append((p, {name: scale.roll(1, -1) for name, scale in scales.items()}))
        misread = dict(p.tensors)
        for name in SIDES:
            numbers = misread[name]
            if stored == torch.int8:
                other = numbers.view(torch.uint8).float()
            else:
                other = numbers.view(torch.float8_e5m2).float()
            misread[name] = (other.nan_to_num(0, 0, 0) * scales[SIDES[name]][..., None]).float()
        for each, factors in (*wrong, (Problem(misread, p.index, p.grad), {})):
            mine = run(each, factors, FROZEN, backend="cpu")
            theirs = run(p, scales, FROZEN, op=reference.expert_mlp)
            truth = run(p, scales, FROZEN, dtype=torch.float64, op=reference.expert_mlp)
            with pytest.raises(AssertionError, match="relative error"):
                Comparison().add(mine, theirs, truth).check()


def codes(stored: torch.dtype) -> Tensor:
    """All 256 numbers of 8 bits, in the order of their codes."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(stored)


@stored_as
@dtypes
@pytest.mark.parametrize("T", [1, 4, 9, 25])
def test_every_code_is_exact(T, dtype, stored):
    """One-hot hidden states read each of the 256 codes through the up-projection: single tokens, and panels.

    Row r of the gate and of the up-projection holds code r at column r % 64, beside zeros; a row with a NaN is NaN.
    """
    H, intermediate = 64, 256
    numbers = codes(stored)
    rows = torch.zeros(intermediate, H, dtype=torch.uint8)
    at = torch.arange(256) % H
    rows[torch.arange(256), at] = numbers.view(torch.uint8)
    gate_up = torch.cat([rows, rows])[None].view(stored)
    down = torch.zeros(1, H, intermediate, dtype=torch.uint8).view(stored)
    hidden = torch.eye(H)[torch.arange(T) % H].to(dtype)
    scales = backends.Scales(torch.full((1, 2 * intermediate), 0.5), torch.ones(1, H))
    index, weights = torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1)
    lora = backends.Lora(None, None, None, None)
    expected = numbers.float() * 0.5
    nan = expected.isnan()
    assert nan.sum() == (0 if stored == torch.int8 else 2)
    for shift in range(0, H, T):
        turned = hidden.roll(shift, 1)
        _, pre = cpu.expert_mlp(turned, gate_up, down, index, weights, lora, "gelu_tanh", False, True, scales)
        for token, column in enumerate(turned.argmax(1).tolist()):
            want = torch.where(at == column, expected, 0.0)
            want[nan] = math.nan
            assert torch.equal(
                pre[token].float().nan_to_num(12345.0), want.to(dtype).float().nan_to_num(12345.0).repeat(2)
            )


@stored_as
@dtypes
@pytest.mark.parametrize("T", [1, 4, 9, 25])
def test_every_code_is_exact_in_the_backward(T, dtype, stored):
    """The gradient of the hidden state is the transposed product: one row of the gradient reaches each code in turn."""
    H, intermediate = 256, 2
    numbers = codes(stored)
    up = torch.stack([torch.zeros(256, dtype=torch.uint8)] * 3 + [numbers.view(torch.uint8)])[None].view(stored)
    down = torch.zeros(1, H, intermediate, dtype=torch.uint8)
    one = torch.ones(1).to(stored).view(torch.uint8)
    down[0, 0, 1] = one
    scales = backends.Scales(torch.full((1, 4), 0.5), torch.full((1, H), 2.0))
    lora = backends.Lora(None, None, None, None)
    grad = torch.zeros(T, H)
    grad[:, 0] = 1
    pre = torch.zeros(T, 4)
    pre[:, 1] = 30.0  # the gate of the second unit, wide open
    d_hidden = cpu.expert_mlp_bwd(
        grad.to(dtype), torch.zeros(T, H).to(dtype), up, down.view(stored), torch.zeros(T, 1, dtype=torch.long),
        torch.ones(T, 1), lora, pre.to(dtype), "gelu_tanh", False, (True, *(False,) * 7), scales,
    )[0]  # fmt: skip
    expected = (30 * numbers.float()).to(dtype)  # d up = 1 * 2 * 1 * 30 by the scale 0.5
    for token in range(T):
        assert torch.equal(d_hidden[token].nan_to_num(12345.0), expected.nan_to_num(12345.0))


@stored_as
@dtypes
def test_layouts_and_sentinels(dtype, stored):
    """Rows and experts with a stride, odd addresses, and ids of other ranks; the bytes between rows are never used."""
    p, scales = low_bit(problem(40, 8, 3, 67, 35, dtype=dtype), stored)
    p.index[3:30, 1] = 8  # a sentinel
    comparison = Comparison()
    plain = compare(p, scales, FROZEN, comparison, expert_parallel=True)
    comparison.check()
    apart = dict(p.tensors)
    for name in SIDES:
        E, rows, columns = apart[name].shape
        room = torch.full((E * (rows + 2) * (columns + 5) + 1,), 0x7F, dtype=torch.uint8)  # a NaN of e4m3
        view = room[1:].view(E, rows + 2, columns + 5)[:, 1 : rows + 1, 2 : columns + 2]
        view.copy_(apart[name].view(torch.uint8))
        apart[name] = view.view(stored)
        assert apart[name].data_ptr() % 2 or apart[name].stride(1) % 2
    moved = run(Problem(apart, p.index, p.grad), scales, FROZEN, backend="cpu", expert_parallel=True)
    for name, expected in plain.items():
        assert torch.equal(moved[name], expected), name
        assert expected.isfinite().all()


@stored_as
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_and_thread_counts_do_not_change_a_bit(dtype, stored):
    p, scales = low_bit(problem(130, 16, 4, 192, 96, dtype=dtype, rank=3), stored)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(p, scales, WANTED[3], backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(other[name], expected), name


def test_projections_of_8_bits_get_no_gradient():
    p, scales = low_bit(problem(5), torch.int8)
    tensors = [p.tensors[name] for name in ("hidden", *SIDES)]
    lora = backends.Lora(None, None, None, None)
    with pytest.raises(ValueError, match="frozen"):
        cpu.expert_mlp_bwd(
            p.grad, *tensors, p.index, p.tensors["weights"], lora, None, "gelu_tanh", False,
            (False, True, *(False,) * 6), backends.Scales(scales["gate_up_scale"], scales["down_scale"]),
        )  # fmt: skip
