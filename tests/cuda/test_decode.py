"""The decode kernels, run thread by thread on the CPU, against transformers' own experts and the float64 reference."""

import mmap

import pytest
import torch

from omnigene_fast import reference
from omnigene_fast.backends import PLAIN, Scales
from omnigene_fast.cuda import Kernel, decode

from .. import helpers
from .emulated import build, emulate, needs_compiler

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [None, torch.int8, torch.float8_e4m3fn]
ERROR_OF = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def quantise(weight, dtype):
    """Stored form [..., rows, columns] and scale [..., rows] of a projection."""
    largest = 127 if dtype == torch.int8 else 448
    scale = weight.float().abs().amax(-1) / largest
    stored = weight.float() / scale[..., None]
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scale


def case(dtype, T, E=6, K=2, H=64, I=32, weight=None, mode="uniform", magnitude=1.0, seed=0):  # noqa: E741
    """Arguments of `decode.expert_mlp` and of the reference, and the stock experts that hold the (rounded) weights."""
    experts = helpers.stock_experts(E, H, I, dtype, seed=seed)
    hidden = (torch.randn(T, H, generator=torch.Generator().manual_seed(seed + 1)) * magnitude).to(dtype)
    index, weights = helpers.routing(mode, T, K, E, seed)
    projections, scales = (experts.gate_up_proj.detach(), experts.down_proj.detach()), PLAIN
    if weight is not None:
        (gate_up, gate_up_scale), (down, down_scale) = (quantise(x, weight) for x in projections)
        projections, scales = (gate_up, down), Scales(gate_up_scale, down_scale)
        for parameter, stored, scale in zip(
            (experts.gate_up_proj, experts.down_proj), projections, scales, strict=True
        ):
            parameter.data = reference.dequantise(stored, scale, dtype)
    return experts, (hidden, *projections, index, weights), scales


def run(arguments, scales=PLAIN, activation="gelu_tanh", **how):
    return decode.expert_mlp(*arguments, activation, scales, run=emulate(**how))


def truth_of(arguments, scales=PLAIN, activation="gelu_tanh"):
    hidden, gate_up, down, index, weights = arguments
    doubles = (hidden.double(), gate_up.double(), down.double(), index, weights.double())
    return reference.expert_mlp(*doubles, activation=activation, gate_up_scale=scales.gate_up, down_scale=scales.down)


def check(out, experts, arguments, scales=PLAIN, what=""):
    hidden, _, _, index, weights = arguments
    assert out.dtype == hidden.dtype
    stock = experts(hidden, index, weights.to(hidden.dtype))
    helpers.assert_as_accurate(out, stock, truth_of(arguments, scales), what)


# T, E, K, H, I: several steps of a row, ragged rows, rows of whole chunks that are no whole step, one expert for all.
SHAPES = [(1, 6, 1, 288, 160), (2, 6, 6, 47, 33), (5, 16, 2, 48, 80), (16, 16, 3, 64, 33), (7, 1, 1, 130, 67)]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_transformers(dtype, weight):
    vectorised = set()
    for shape in SHAPES:
        experts, arguments, scales = case(dtype, *shape, weight=weight)
        launches = []
        out = run(arguments, scales, seed=3, batches=launches)
        check(out, experts, arguments, scales, what=str(shape))
        vectorised |= {(launch.kernel.name, launch.kernel.vec) for launch in launches}
    assert len(vectorised) == 4, "both kernels run with and without 16-byte loads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_of_one_expert(dtype):
    """More than 8 of them, and more than the 16 that a warp multiplies at once (a token may name an expert twice)."""
    experts, (hidden, gate_up, down, index, weights), _ = case(dtype, 16, E=4, K=3, mode="protein")
    for column, expert in ((0, 2), (1, 2), (2, 0)):
        index[:, column] = expert
    index[3, 2] = 3
    arguments = (hidden, gate_up, down, index, weights)
    truth = truth_of(arguments)
    assert helpers.relative_error(run(arguments, seed=1), truth) < ERROR_OF[dtype]
    index[:, 1] = torch.arange(16) % 2
    check(run(arguments, seed=2), experts, arguments)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_other_activations(activation):
    _, arguments, _ = case(torch.float32, 3)
    out = run(arguments, activation=activation)
    assert helpers.relative_error(out, truth_of(arguments, activation=activation)) < 1e-6
    assert helpers.relative_error(out, truth_of(arguments)) > 1e-5  # erf and tanh differ by 2e-4 at most


@pytest.mark.parametrize("magnitude", [1e-3, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_and_large_gates(dtype, magnitude):
    experts, arguments, _ = case(dtype, 4, magnitude=magnitude)
    check(run(arguments), experts, arguments)


def test_sentinels_contribute_nothing():
    """Their weights are not read, which NaN shows; a token of sentinels alone is zero."""
    _, (hidden, gate_up, down, index, weights), _ = case(torch.bfloat16, 5, E=6, K=3)
    index[0] = 6
    index[1, 1], index[2, 0], index[3, 2] = 6, 1000, 2**40
    held = index < 6
    out = run((hidden, gate_up, down, index, torch.where(held, weights, torch.nan)), seed=5)
    assert not out[0].any()
    clean = (hidden, gate_up, down, torch.where(held, index, 6), torch.where(held, weights, 0))
    helpers.assert_as_accurate(out, reference.expert_mlp(*clean, activation="gelu_tanh"), truth_of(clean))
    negative = run((hidden, gate_up, down, torch.where(held, index, -1), weights), seed=6)
    assert torch.equal(out, negative)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types_of_ids_and_weights(index_dtype, weights_dtype):
    _, (hidden, gate_up, down, index, weights), _ = case(torch.float32, 3)
    arguments = (hidden, gate_up, down, index, weights.to(weights_dtype))
    out = run((*arguments[:3], index.to(index_dtype), arguments[4]))
    assert helpers.relative_error(out, truth_of(arguments)) < 1e-6


def test_strides():
    """Rows and experts apart, tokens and picks not contiguous, tensors that do not begin at 16 bytes."""
    _, (hidden, gate_up, down, index, weights), _ = case(torch.bfloat16, 4)
    plain = run((hidden, gate_up, down, index, weights))

    def apart(tensor, rows, columns, begin=0):
        wide = torch.full((*tensor.shape[:-2], tensor.shape[-2] + rows, tensor.shape[-1] + columns), torch.nan)
        wide = wide.to(tensor.dtype)
        wide[..., : tensor.shape[-2], begin : begin + tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-2], begin : begin + tensor.shape[-1]]

    for columns, begin, vec in ((8, 0, True), (8, 8, True), (3, 0, False), (8, 4, False)):
        launches = []
        apart_ones = (
            apart(hidden, 0, columns, begin),
            apart(gate_up, 2, columns, begin),
            apart(down, 1, columns, begin),
        )
        turned = index.T.contiguous().T, weights.T.contiguous().T
        assert torch.equal(run((*apart_ones, *turned), seed=4, batches=launches), plain)
        assert [launch.kernel.vec for launch in launches] == [vec, vec]
    assert torch.equal(run((hidden.T.contiguous().T, gate_up, down, index, weights)), plain)


def test_addresses_are_64_bit():
    """An expert 2^31 elements after the first, in memory that is mostly never touched."""
    _, (hidden, gate_up, down, index, weights), scales = case(torch.bfloat16, 2, E=2, K=2, weight=torch.int8)
    plain = run((hidden, gate_up, down, index, weights), scales)

    def far(tensor):
        stride = 2**31 + 64
        memory = torch.frombuffer(mmap.mmap(-1, stride + tensor[0].numel()), dtype=torch.int8)
        view = memory.as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
        view.copy_(tensor)
        return view

    assert torch.equal(run((hidden, far(gate_up), far(down), index, weights), scales), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_stored_byte(dtype):
    """All 256 codes of both 8-bit types, with NaN where float8 has it and nowhere else."""
    for weight in (torch.int8, torch.float8_e4m3fn):
        H = I = 64  # noqa: E741
        codes = torch.arange(256, dtype=torch.uint8).view(weight)
        gate_up = torch.zeros(1, 2 * I, H, dtype=weight)
        gate_up[0, : 2 * I : I, 0] = torch.ones(2).to(weight)  # gate and up of column 0 are x[0]
        down = torch.zeros(1, 256, I).to(weight)
        down[0, :, 0] = codes
        # 256 columns out of one number h[0] = act(1): H differs between the two projections, so each runs by itself.
        hidden = torch.zeros(1, 256, dtype=dtype)
        hidden[0, 0] = 1
        gate_up = torch.zeros(1, 2 * I, 256).to(weight)
        gate_up[0, 0, 0] = gate_up[0, I, 0] = torch.ones(()).to(weight)
        scales = Scales(torch.full((1, 2 * I), 0.5), torch.full((1, 256), 2.0))
        arguments = (hidden, gate_up, down, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        out, truth = run(arguments, scales)[0], truth_of(arguments, scales)[0]
        expected = codes.float().isnan()
        assert expected.sum() == (2 if weight == torch.float8_e4m3fn else 0)
        assert torch.equal(out.isnan(), expected)
        assert helpers.relative_error(out[~expected], truth[~expected]) < ERROR_OF[dtype]
        # The same codes in the other kernel, where each multiplies its own number of hidden.
        for code in (0x7F, 0xFF):
            gate_up[0, 5, 17] = torch.tensor(code, dtype=torch.uint8).view(weight)
            nan = run(arguments, scales).isnan().any().item()
            assert nan == (weight == torch.float8_e4m3fn)


def test_same_bits_in_every_order():
    """20 orders of blocks and threads, and tokens beside others, give the bits of the ascending order."""
    _, (hidden, gate_up, down, index, weights), _ = case(torch.bfloat16, 5, E=4, K=3, H=48, I=24)
    plain = run((hidden, gate_up, down, index, weights))
    for seed in range(1, 21):
        assert torch.equal(run((hidden, gate_up, down, index, weights), seed=seed), plain), f"seed {seed}"
    alone = [run((hidden[t : t + 2], gate_up, down, index[t : t + 2], weights[t : t + 2])) for t in (0, 3)]
    assert torch.equal(alone[0], plain[:2])
    assert torch.equal(alone[1], plain[3:])


MISTAKES = {
    "a lane's sum left out": ("dot.cuh", "sums[r][m] += __shfl_xor_sync(ALL_LANES, sums[r][m], 2);", ""),
    "gate and up swapped": (
        "decode_up.cu",
        "activate(gate, int(activation)) * up",
        "activate(up, int(activation)) * gate",
    ),
    "silu": ("decode_up.cu", "activate(gate, int(activation))", "activate(gate, SILU)"),
    "scale of the next row": (
        "decode_down.cu",
        "scale + expert * H + column + c)",
        "scale + expert * H + column + (c ^ 1))",
    ),
    "scale of the gate for up": ("decode_up.cu", "up *= load(scales + I)", "up *= load(scales)"),
    "next expert": ("decode_down.cu", "down + expert * stride_expert", "down + (expert + 1) % E * stride_expert"),
    "K - 1 picks": ("decode_down.cu", "for (int k = 0; k < K; ++k)", "for (int k = 1; k < K; ++k)"),
    "one of two tokens": ("picks.cuh", "rank < begin + SLOTS", "rank < begin + 1"),
    "no barrier before the sums": ("decode_up.cu", "sum; });\n        __syncthreads();", "sum; });"),
    "no barrier before the combine": (
        "decode_down.cu",
        "or this grid could end before the previous one\n    __syncthreads();",
        "\n",
    ),
    "no wait for the previous grid": ("dot.cuh", "if (wait && step == begin) wait_for_previous_grid();", ""),
    "an unaligned load": ("dot.cuh", "load_weights_16(row + i * 4 * EACH)", "load_weights_16(row + i * 4 * EACH + 1)"),
    "a load past the end": ("dot.cuh", "if (left > 0) v =", "if (left > -100) v ="),
    "lanes that part": (
        "picks.cuh",
        "    __syncwarp();\n    return total;",
        "    if (lane) __syncwarp();\n    return total;",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_show(mistake):
    """Controls: with a mistake put into the source, the parity test fails or the emulator objects."""
    file, text, replacement = MISTAKES[mistake]
    dtype = torch.float32 if mistake in ("a lane's sum left out", "silu") else torch.bfloat16
    experts, arguments, scales = case(dtype, 4, E=3, K=2, weight=torch.int8 if "scale" in mistake else None, H=80)
    check(run(arguments, scales, seed=1), experts, arguments, scales)
    edit = (file, text, replacement)
    build(*(kernel_types(arguments)), edit)
    with pytest.raises((AssertionError, RuntimeError), match=r"relative error|\(block|lanes of a warp|threads wait"):
        check_in_five_orders(experts, arguments, scales, edit)


def kernel_types(arguments):
    macros = Kernel("decode_up", arguments[0].dtype, arguments[1].dtype, True).macros
    return macros["HIDDEN"], macros["WEIGHT"], macros["VEC"]


def check_in_five_orders(experts, arguments, scales, edit):
    for seed in range(1, 6):
        check(run(arguments, scales, seed=seed, edit=edit), experts, arguments, scales)
