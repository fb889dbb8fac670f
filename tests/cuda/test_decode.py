"""The decode kernels, run thread by thread on the CPU, against transformers' own experts and the float64 reference."""

import pytest
import torch

from omnigene_fast import reference
from omnigene_fast.backends import PLAIN, Scales
from omnigene_fast.cuda import decode

from .. import helpers
from .emulated import emulate, needs_compiler

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
