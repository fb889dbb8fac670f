"""Frozen experts in 8 bits, forward and backward: against float64 and transformers' own with the weights dequantised.

The truth multiplies stored weights and scales in float64; transformers holds their product, rounded to its dtype.
"""

import pytest
import torch
import triton
import triton.language as tl

from omnigene_fast import ops, reference
from omnigene_fast.backends import Scales
from omnigene_fast.kernels.weights import tiles_of_8_bits, widen

from .. import helpers
from . import gradients
from .gradients import FROZEN, LORA
from .test_expert_forward import every_config

E4M3 = torch.float8_e4m3fn
KINDS = [torch.int8, E4M3]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGEST = {torch.int8: 127.0, E4M3: 448.0}


def quantise(weight, kind):
    """Stored weights and the scales of their rows, which differ by a few powers of two from row to row."""
    rows = torch.arange(weight.shape[1], device=weight.device)
    wide = weight.float() * torch.exp2((rows * 5 % 7 - 3).float())[:, None]
    scale = wide.abs().amax(2) / LARGEST[kind]
    stored = wide / scale[..., None]
    return (stored.round() if kind == torch.int8 else stored).to(kind), scale


def make(device, dtype, kind, *sizes, **options):
    """The case in 8 bits, the same as transformers holds it, and the same in float64."""
    case = gradients.make(device, dtype, *sizes, **options)
    (gate_up, up_scale), (down, down_scale) = (quantise(weight, kind) for weight in case.inputs[1:3])
    stored = case.with_inputs(gate_up_proj=gate_up, down_proj=down)._replace(scales=Scales(up_scale, down_scale))

    def dequantised(to):
        weights = {
            "gate_up_proj": reference.dequantise(gate_up, up_scale, to),
            "down_proj": reference.dequantise(down, down_scale, to),
        }
        return case.with_inputs(**weights)

    return stored, dequantised(dtype), dequantised(torch.float64)


def output(case, dtype=None):
    """transformers' output in the case's dtype, or with `dtype` the reference's."""
    hidden, gate_up, down, weights, *factors = case.inputs
    if dtype is None:
        if factors[0] is not None:
            gate_up, down = gate_up + factors[0] @ factors[1], down + factors[2] @ factors[3]
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(case.experts, parameters, (hidden, case.index, weights.to(hidden.dtype)))
    wide = [None if x is None else x.to(dtype) for x in case.inputs]
    updates = {} if factors[0] is None else {"gate_up_lora": wide[4:6], "down_lora": wide[6:]}
    return reference.expert_mlp(*wide[:3], case.index, wide[3], activation=case.activation, **updates)


def check(cases, out, grads, needed, what=""):
    """The criterion for the output and for every gradient that was needed; the projections have none."""
    stored, stock, exact = cases
    helpers.assert_as_accurate(out, output(stock), output(exact, torch.float64), f"{what} output")
    names = zip(gradients.NAMES, stored.inputs, needed, grads, strict=True)
    for (name, x, need, ours), theirs, truth in zip(names, gradients.stock(stock), gradients.truth(exact), strict=True):
        if not need or x is None:
            assert ours is None, f"{what} {name}: not needed, yet computed"
            continue
        assert (ours.dtype, ours.shape) == (x.dtype, x.shape)
        helpers.assert_as_accurate(ours, theirs, truth, f"{what} d_{name}")


@pytest.mark.parametrize(("needed", "ranks", "mode"), [(FROZEN, None, "protein"), (LORA, (5, 16), "uniform")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_dequantised_weights(device, kind, dtype, needed, ranks, mode):
    """Saved or computed again, the pre-activation has the same bits, and so has every gradient."""
    cases = make(device, dtype, kind, 17, 8, 2, 47, 33, ranks=ranks, mode=mode)
    out, preactivation = gradients.forward(cases[0], save=True)
    grads = gradients.backward(cases[0], needed, preactivation)
    check(cases, out, grads, needed)
    again = gradients.backward(cases[0], needed)
    assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(again, grads, strict=True))


ALIGNED = [
    pytest.param(p.values[2], id=p.id)
    for p in every_config()
    if p.values[0] == torch.bfloat16 and p.values[1] and p.values[2].block_m in (16, 128)
]


@pytest.mark.parametrize("choice", ALIGNED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_configuration(device, kind, choice):
    T = choice.block_m + 9
    cases = make(device, torch.bfloat16, kind, T, 3, 1, 144, 80, ranks=(16, 3))
    cases[0].index[:-4] = 1  # one giant expert, shared by the three cases: a full tile and a few rows
    choice = tiles_of_8_bits(choice, kind == E4M3)
    out, preactivation = gradients.forward(cases[0], save=True, choice=choice)
    check(cases, out, gradients.backward(cases[0], LORA, preactivation, choice=choice), LORA)


@pytest.mark.parametrize("kind", KINDS)
def test_small_gradients_survive_float16(device, kind):
    """Scale times gradient would be subnormal in float16; the dequantised weight is not."""
    cases = [
        case._replace(grad_out=case.grad_out * 1e-3) for case in make(device, torch.float16, kind, 17, 6, 2, 48, 32)
    ]
    grads = gradients.backward(cases[0], FROZEN)
    check(cases, gradients.forward(cases[0], save=False)[0], grads, FROZEN)
    scale, grad = cases[0].scales.down.mean(), cases[0].grad_out.float().abs().mean()
    assert scale * grad < torch.finfo(torch.float16).tiny


def test_negative_controls_fail(device):
    """Scales forgotten, those of the next row or expert, int8 taken for something else, in float32 and everywhere."""
    cases = make(device, torch.float32, torch.int8, 9, 6, 3)
    stored, stock, exact = cases
    ones = Scales(*map(torch.ones_like, stored.scales))
    gate_up, down = stored.inputs[1:3]

    def unsigned(weight):
        return weight.to(torch.int16) & 0xFF

    wrong = {
        "no scales": stored._replace(scales=ones),
        "scales of the next row": stored._replace(scales=Scales(*(scale.roll(1, 1) for scale in stored.scales))),
        "scales of the next expert": stored._replace(scales=Scales(*(scale.roll(1, 0) for scale in stored.scales))),
        "down's scales only": stored._replace(scales=stored.scales._replace(gate_up=ones.gate_up)),
        "gate_up's scales only": stored._replace(scales=stored.scales._replace(down=ones.down)),
        "int8 as e4m3": stored.with_inputs(gate_up_proj=gate_up.view(torch.uint8), down_proj=down.view(torch.uint8)),
        "int8 as uint8": stock.with_inputs(
            gate_up_proj=reference.dequantise(unsigned(gate_up), stored.scales.gate_up, torch.float32),
            down_proj=reference.dequantise(unsigned(down), stored.scales.down, torch.float32),
        ),
    }
    theirs, truth = gradients.stock(stock), gradients.truth(exact)
    for what, changed in wrong.items():
        out, preactivation = gradients.forward(changed, save=True)
        with pytest.raises(AssertionError, match="relative error"):
            helpers.assert_as_accurate(out, output(stock), output(exact, torch.float64), what)
        ours = gradients.backward(changed, FROZEN, preactivation)
        for number in (0, 3):
            with pytest.raises(AssertionError, match="relative error"):
                helpers.assert_as_accurate(ours[number], theirs[number], truth[number], what)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_weights_and_scales(device, kind):
    stored, _, _ = make(device, torch.bfloat16, kind, 17, 6, 2, 47, 33, ranks=(3, 4))
    (gate_up, down), (up_scale, down_scale) = stored.inputs[1:3], stored.scales
    bits = torch.int8, kind  # torch concatenates no float8
    strided = stored.with_inputs(
        gate_up_proj=torch.cat([gate_up.view(bits[0])] * 2, 2).view(bits[1])[:, :, :47],
        down_proj=torch.cat([down.view(bits[0])] * 2, 1).view(bits[1])[:, :47],
    )._replace(scales=Scales(up_scale.t().contiguous().t(), torch.cat([down_scale] * 2, 1)[:, :47]))
    assert torch.equal(gradients.forward(strided, save=False)[0], gradients.forward(stored, save=False)[0])
    for ours, expected in zip(gradients.backward(strided, LORA), gradients.backward(stored, LORA), strict=True):
        assert ours is expected if expected is None else torch.equal(ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_updates_train_on_top(device, kind):
    """Through the public function and autograd, with the bits of the backend; the projections get no gradient."""
    stored, _, _ = make(device, torch.bfloat16, kind, 7, 3, 2, ranks=(3, 4))
    leaves = [x if x.dtype == kind else x.clone().requires_grad_() for x in stored.inputs]
    hidden, gate_up, down, weights, *factors = leaves
    out = ops.expert_mlp(
        hidden,
        gate_up,
        down,
        stored.index,
        weights,
        activation="gelu_tanh",
        backend="triton",
        gate_up_lora=tuple(factors[:2]),
        down_lora=tuple(factors[2:]),
        gate_up_scale=stored.scales.gate_up,
        down_scale=stored.scales.down,
    )
    out.backward(stored.grad_out)
    for leaf, expected in zip(leaves, gradients.backward(stored, LORA), strict=True):
        assert leaf.grad is None if expected is None else torch.equal(leaf.grad, expected)


@triton.jit
def _widen_kernel(stored_ptr, scale_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    scale = scale_ptr if scale_ptr is None else tl.load(scale_ptr + lane)
    out_type: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + lane, widen(tl.load(stored_ptr + lane), scale, out_type))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_256_values_of_either_kind_are_exact(device, dtype):
    """Subnormal numbers, both zeros and the two NaNs of e4m3 too; with a scale, the product is rounded once."""
    bits = torch.arange(256, dtype=torch.uint8, device=device)
    scale = torch.rand(256, device=device) + 0.01
    stored_as = [(bits.view(torch.int8), bits.view(torch.int8)), (bits, bits.view(E4M3))]
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        stored_as.append((bits.view(E4M3), bits.view(E4M3)))  # the interpreter's own conversion is not the GPU's
    for stored, values in stored_as:
        for scales in (None, scale):
            out = torch.empty(256, dtype=dtype, device=device)
            _widen_kernel[(1,)](stored, scales, out, BLOCK=256)
            wide = values.float() if scales is None else values.float() * scales
            assert torch.equal(out.isnan(), wide.isnan())
            assert torch.equal(out.nan_to_num(), wide.to(dtype).nan_to_num())
            assert torch.equal(out.signbit() & ~out.isnan(), wide.signbit() & ~wide.isnan())
