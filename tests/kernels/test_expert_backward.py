"""The experts' gradients against float64 and transformers' own, with controls that have to fail."""

import pytest
import torch
import triton
import triton.language as tl

from omnigene_fast import ops, reference
from omnigene_fast.kernels import tiles
from omnigene_fast.kernels.activation import activate_with_slope

from .. import helpers
from . import gradients
from .gradients import EVERYTHING, FROZEN, FULL, LORA
from .test_expert_forward import every_config

DTYPES = [torch.float32, torch.bfloat16]


def same(ours, others):
    return all(a is b if a is None else torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("mode", helpers.ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("needed", "ranks"), [(FROZEN, None), (FULL, None), (LORA, (5, 16))], ids=["frozen", "full", "lora"]
)
def test_as_accurate_as_transformers(device, needed, ranks, dtype, mode):
    """Saved or computed again, the pre-activation has the same bits, and so has every gradient."""
    case = gradients.make(device, dtype, 17, E=8, H=47, I=33, ranks=ranks, mode=mode)
    _, preactivation = gradients.forward(case, save=True)
    assert preactivation.shape == (34, 66)
    ours = gradients.backward(case, needed, preactivation)
    gradients.check(case, ours, needed)
    assert same(gradients.backward(case, needed), ours)


@pytest.mark.parametrize(
    ("T", "E", "K", "H", "I", "ranks"),
    [
        (1, 6, 6, 40, 24, (1, 64)),
        (2, 6, 1, 47, 33, (64, 1)),
        (7, 16, 2, 47, 24, (48, 17)),
        (17, 5, 3, 130, 67, (16, 8)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_ranks(device, dtype, T, E, K, H, I, ranks):  # noqa: E741
    """Everything trains at once: the gradients of the projections and of their updates do not disturb each other."""
    case = gradients.make(device, dtype, T, E, K, H, I, ranks=ranks)
    gradients.check(case, gradients.backward(case, EVERYTHING), EVERYTHING)


@pytest.mark.parametrize(("dtype", "lora", "choice"), every_config())
def test_every_tile_configuration(device, dtype, lora, choice):
    """Known bug: one tile shape was wrong, unseen at small values under an absolute tolerance."""
    T, needed = choice.block_m + 9, EVERYTHING if lora else FULL
    for magnitude in (1.0,) if lora else (1e-3, 1.0, 30.0):
        case = gradients.make(
            device, dtype, T, E=3, K=1, H=47, I=33, ranks=(20, 3) if lora else None, magnitude=magnitude
        )
        case.index[:-4] = 1  # one giant expert: a full tile and a few rows
        ours = gradients.backward(case, needed, choice=choice)
        gradients.check(case, ours, needed, f"magnitude {magnitude}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_forward_as_accurate_as_merged_weights(device, dtype):
    for ranks in ((1, 64), (16, 5)):
        case = gradients.make(device, dtype, 17, H=47, I=33, ranks=ranks)
        hidden, gate_up, down, weights, *factors = case.inputs
        wide = [x.double() for x in case.inputs]
        exact = reference.expert_mlp(
            *wide[:3], case.index, wide[3], activation="gelu_tanh", gate_up_lora=wide[4:6], down_lora=wide[6:]
        )
        merged = {"gate_up_proj": gate_up + factors[0] @ factors[1], "down_proj": down + factors[2] @ factors[3]}
        stock = torch.func.functional_call(case.experts, merged, (hidden, case.index, weights.to(dtype)))
        out, nothing = gradients.forward(case, save=False)
        assert nothing is None
        helpers.assert_as_accurate(out, stock, exact, f"ranks {ranks}")
        for drop in (4, 6):  # either update matters
            dropped = case._replace(
                inputs=tuple(None if i in (drop, drop + 1) else x for i, x in enumerate(case.inputs))
            )
            with pytest.raises(AssertionError, match="relative error"):
                helpers.assert_as_accurate(gradients.forward(dropped, save=False)[0], stock, exact)


def test_one_update_without_the_other(device):
    case = gradients.make(device, torch.float32, 17, ranks=(3, 4))
    exact = gradients.truth(case.with_inputs(gate_up_lhs=0 * case.inputs[4]))
    only_down = case._replace(inputs=(*case.inputs[:4], None, None, *case.inputs[6:]))
    needed = (True, True, True, True, False, False, True, True)
    for out, expected in zip(gradients.backward(only_down, needed), exact, strict=True):
        assert out is None or helpers.relative_error(out, expected) < 1e-6
    exact = gradients.truth(case.with_inputs(down_lhs=0 * case.inputs[6]))
    only_up = case._replace(inputs=(*case.inputs[:6], None, None))
    needed = (True, True, True, True, True, True, False, False)
    for out, expected in zip(gradients.backward(only_up, needed), exact, strict=True):
        assert out is None or helpers.relative_error(out, expected) < 1e-6


def test_each_gradient_alone_has_the_bits_that_it_has_among_all(device):
    case = gradients.make(device, torch.bfloat16, 7, E=3, ranks=(3, 4))
    _, preactivation = gradients.forward(case, save=True)
    everything = gradients.backward(case, EVERYTHING, preactivation)
    for number in range(8):
        needed = [other == number for other in range(8)]
        alone = gradients.backward(case, needed, preactivation)
        assert torch.equal(alone[number], everything[number])
        assert [grad is not None for grad in alone] == needed
    assert gradients.backward(case, (False,) * 8, preactivation) == (None,) * 8


def test_all_tokens_to_one_expert(device):
    """The other experts get zeros, written by the kernels: memory that nobody wrote would be NaN."""
    case = gradients.make(device, torch.bfloat16, 17, E=4, K=1, ranks=(3, 4))
    for expert in (0, 3):
        one = case._replace(index=torch.full_like(case.index, expert))
        ours = gradients.backward(one, EVERYTHING)
        gradients.check(one, ours, EVERYTHING)
        others = [e for e in range(4) if e != expert]
        for grad in (ours[1], ours[2], *ours[4:]):
            assert torch.equal(grad[others], torch.zeros_like(grad[others]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sentinels_get_no_gradient(device, dtype):
    """Ids >= E and negative ones: neither their weights nor their pre-activation nor their gradient may matter."""
    case = gradients.make(device, dtype, 9, E=6, K=3, ranks=(3, 4))
    foreign = torch.rand(case.index.shape, generator=torch.Generator().manual_seed(3)).to(device) < 0.4
    foreign[4] = True  # a token without any expert here
    weights = case.inputs[3]
    ids = torch.where(foreign, torch.tensor([6, 7, -1], device=device), case.index)
    marked = case._replace(index=ids).with_inputs(weights=torch.where(foreign, torch.nan, weights))
    _, preactivation = gradients.forward(marked, save=True, expert_parallel=True)
    assert torch.equal(preactivation.isnan().all(1), foreign.flatten())  # unwritten, which the tests fill with NaN
    ours = gradients.backward(marked, EVERYTHING, preactivation, expert_parallel=True)
    zeroed = case.with_inputs(weights=torch.where(foreign, 0, weights))
    theirs, exact = gradients.stock(zeroed), gradients.truth(zeroed)
    for grads in (theirs, exact):
        grads[3] = torch.where(foreign, 0, grads[3])
    for name, *grads in zip(gradients.NAMES, ours, theirs, exact, strict=True):
        helpers.assert_as_accurate(*grads, name)
    assert torch.equal(ours[0][4], torch.zeros_like(ours[0][4]))
    assert torch.equal(ours[3][foreign], torch.zeros_like(ours[3][foreign]))


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_activations(device, dtype, activation):
    case = gradients.make(device, dtype, 17, activation=activation)
    gradients.check(case, gradients.backward(case, FULL), FULL)


def test_float16(device):
    case = gradients.make(device, torch.float16, 17, ranks=(3, 4))
    gradients.check(case, gradients.backward(case, EVERYTHING), EVERYTHING)


def test_negative_controls_fail(device):
    """What the criterion has to catch, at gates of about 1, in float32."""
    case = gradients.make(device, torch.float32, 9, K=3, ranks=(3, 4))
    _, preactivation = gradients.forward(case, save=True)
    gate, up = preactivation.chunk(2, dim=1)
    weights = case.inputs[3]
    wrong = {
        "silu": (case._replace(activation="silu"), preactivation),
        "erf": (case._replace(activation="gelu"), preactivation),
        "gate and up swapped": (case, torch.cat([up, gate], dim=1)),
        "pre-activation by position": (case, preactivation.flip(0)),
        "off by one expert": (case._replace(index=(case.index + 1) % 6), preactivation),
        "unweighted": (case.with_inputs(weights=torch.ones_like(weights)), preactivation),
        "no updates": (case._replace(inputs=(*case.inputs[:4], None, None, None, None)), preactivation),
        "another token's gradient": (case._replace(grad_out=case.grad_out.roll(1, 0)), preactivation),
    }
    theirs, exact = gradients.stock(case), gradients.truth(case)
    for what, (changed, saved) in wrong.items():
        ours = gradients.backward(changed, FULL, saved)
        for number, name in enumerate(gradients.NAMES[:4]):
            # The weights' gradient holds no weight; down_proj's takes h from the saved pre-activation.
            if (what, name) in (("unweighted", "weights"), ("no updates", "down_proj")):
                continue
            with pytest.raises(AssertionError, match="relative error"):
                helpers.assert_as_accurate(ours[number], theirs[number], exact[number], f"{what} {name}")


@triton.jit
def _slope_kernel(x_ptr, act_ptr, slope_ptr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    act, slope = activate_with_slope(tl.load(x_ptr + lane), ACTIVATION)
    tl.store(act_ptr + lane, act)
    tl.store(slope_ptr + lane, slope)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_slopes(device, activation):
    """Against torch's own derivative in float64, from 1e-3 to far beyond where x^3 overflows."""
    x = torch.linspace(-12, 12, 1024)
    x[:12] = torch.tensor([0, 1e-3, -1e-3, 30, -30, 97, -97, 1e4, -1e4, 1e30, -1e30, torch.nan])
    x = x.to(device)
    act, slope = torch.empty_like(x), torch.empty_like(x)
    _slope_kernel[(1,)](x, act, slope, ACTIVATION=activation, BLOCK=1024)
    wide = x.double().requires_grad_()
    exact = reference.ACTIVATIONS[activation](wide)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    assert act[11].isnan()
    assert slope[11].isnan()
    real = torch.arange(1024, device=device) != 11
    exact_slope = torch.where(wide.abs() > 96, (wide > 0).double(), exact_slope)  # torch's formula overflows too
    assert (slope[real] - exact_slope[real]).abs().max() < 1e-6
    small = wide.abs() < 1e4
    assert ((act - exact)[real & small].abs() <= 1e-6 * wide[real & small].abs()).all()


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_extreme_gates_stay_finite(device, activation):
    """Gates of about 1e4 either way: the slope is one, or zero."""
    case = gradients.make(device, torch.float32, 17, magnitude=1e4, activation=activation)
    for out, exact in zip(gradients.backward(case, FULL), gradients.truth(case), strict=True):
        assert out is None or helpers.relative_error(out, exact) < 1e-6


def leaves(case):
    return [None if x is None else x.clone().requires_grad_() for x in case.inputs]


def apply(inputs, index, **options):
    hidden, gate_up, down, weights, *factors = inputs
    pairs = {} if factors[0] is None else {"gate_up_lora": tuple(factors[:2]), "down_lora": tuple(factors[2:])}
    return ops.expert_mlp(
        hidden, gate_up, down, index, weights, activation="gelu_tanh", backend="triton", **pairs, **options
    )


@pytest.mark.parametrize("save", ops.SAVE)
def test_autograd_twice_with_inputs_unchanged(device, save):
    """Known bug: a backward that wrote into saved tensors made the second one wrong."""
    case = gradients.make(device, torch.bfloat16, 7, E=3, ranks=(3, 4))
    inputs = leaves(case)
    out = apply(inputs, case.index, save=save)
    first = torch.autograd.grad(out, inputs, case.grad_out, retain_graph=True)
    assert same(first, gradients.backward(case, EVERYTHING))
    for _ in range(2 if device.type == "cpu" else 20):
        assert same(torch.autograd.grad(out, inputs, case.grad_out, retain_graph=True), first)
    assert same([x.detach() for x in inputs], case.inputs)


def test_gradients_of_any_strides(device):
    case, needed = gradients.make(device, torch.bfloat16, 7, E=3, H=48, I=32), (True, False, True, True, *[False] * 4)
    grad_out = case.grad_out
    for name, grad in {
        "scalar": grad_out[:1, :1].expand(7, 48),
        "one row": grad_out[:1].expand(7, 48),
        "transposed": grad_out.t().contiguous().t(),
        "every other column": torch.stack([grad_out, grad_out], 2).flatten(1)[:, ::2],
        "unaligned": torch.empty(7 * 48 + 1, dtype=grad_out.dtype, device=device)[1:].view(7, 48).copy_(grad_out),
    }.items():
        plain = grad.clone(memory_format=torch.contiguous_format)
        expected = gradients.backward(case._replace(grad_out=plain), needed)
        assert same(gradients.backward(case._replace(grad_out=grad), needed), expected), name
        assert torch.equal(grad, plain)


def test_factors_of_any_strides(device):
    """PEFT's factors are views: its lora_B is [out, r * E], rank-major."""
    case = gradients.make(device, torch.bfloat16, 7, E=3, ranks=(16, 5))
    up_lhs, up_rhs, down_lhs, down_rhs = case.inputs[4:]
    strided = case.with_inputs(
        gate_up_lhs=up_lhs.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        gate_up_rhs=up_rhs.transpose(1, 2).contiguous().transpose(1, 2),
        down_lhs=down_lhs.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        down_rhs=torch.cat([down_rhs, down_rhs], 2)[:, :, :24],
    )
    assert torch.equal(gradients.forward(strided, save=False)[0], gradients.forward(case, save=False)[0])
    ours = gradients.backward(strided, EVERYTHING)
    assert same(ours, gradients.backward(case, EVERYTHING))
    assert all(grad.is_contiguous() for grad in ours)


def test_weights_are_read_in_place_through_their_strides(device):
    case = gradients.make(device, torch.bfloat16, 17, H=47, I=33)
    gate_up, down = case.inputs[1:3]
    strided = case.with_inputs(
        gate_up_proj=torch.cat([gate_up] * 2, 2)[:, :, :47], down_proj=torch.cat([down] * 2, 1)[:, :47]
    )
    assert same(gradients.backward(strided, FULL), gradients.backward(case, FULL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_router_weights_of_any_dtype(device, dtype):
    case = gradients.make(device, torch.bfloat16, 7)
    weights = case.inputs[3].to(dtype)
    ours = gradients.backward(case.with_inputs(weights=weights), FROZEN)
    expected = gradients.backward(case.with_inputs(weights=weights.float()), FROZEN)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[3], expected[3].to(dtype))


def test_no_tokens(device):
    case = gradients.make(device, torch.bfloat16, 1, ranks=(3, 4))
    empty = case._replace(index=case.index[:0], grad_out=case.grad_out[:0]).with_inputs(
        hidden=case.inputs[0][:0], weights=case.inputs[3][:0]
    )
    out, preactivation = gradients.forward(empty, save=True)
    assert (list(out.shape), list(preactivation.shape)) == ([0, 40], [0, 48])
    for x, grad in zip(empty.inputs, gradients.backward(empty, EVERYTHING, preactivation), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_tiles_of_one_table_share_their_rows():
    good = tiles.expert_tiles(1, 704, torch.bfloat16, 80)
    other = tiles.expert_tiles(64, 704, torch.bfloat16, 80)
    with pytest.raises(ValueError, match=r"must share block_m, got \[16, 64\]"):
        tiles.ExpertTiles(good.up, good.down, other.down_bwd, good.low_rank, good.gram, good.low_rank_gram)
