"""The router's gradients against float64 and transformers' own, with controls that have to fail."""

import pytest
import torch

from omnigene_fast import ops, reference
from omnigene_fast.backends import triton as backend

from .. import helpers

NAMES = ("hidden", "proj_weight", "scale", "per_expert_scale")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 6, 1, 40), (2, 257, 3, 33), (7, 128, 8, 64), (17, 6, 6, 47), (16, 60, 8, 1100)]


def gate_case(device, T, E, K, seed=0):
    """Logits with distinct probabilities, a per-expert scale, and gradients of both outputs."""
    generator = torch.Generator().manual_seed(seed)
    logits, grad_p = torch.randn(T, E, generator=generator), torch.randn(T, E, generator=generator)
    scale, grad_w = 0.7 + 0.6 * torch.rand(E, generator=generator), torch.randn(T, K, generator=generator)
    return [tensor.to(device) for tensor in (logits, scale, grad_p, grad_w)]


def gate_truth(logits, scale, grad_p, grad_w, index):
    """torch's own gradients in float64, for the choice in `index`."""
    logits, scale = (x.double().requires_grad_() for x in (logits, scale))
    probabilities = torch.softmax(logits, -1)
    weights = probabilities.gather(1, index)
    weights = weights / weights.sum(-1, keepdim=True) * scale[index]
    wanted = [(out, grad.double()) for out, grad in ((probabilities, grad_p), (weights, grad_w)) if grad is not None]
    outputs, grads = zip(*wanted, strict=True)
    d_logits, d_scale = torch.autograd.grad(outputs, (logits, scale), grads, allow_unused=True)
    return d_logits, torch.zeros_like(scale) if d_scale is None else d_scale


@pytest.mark.parametrize("which", ["both", "weights", "probabilities"])
@pytest.mark.parametrize(("T", "E", "K", "H"), SHAPES)
def test_topk_gate(device, T, E, K, H, which):
    logits, scale, grad_p, grad_w = gate_case(device, T, E, K)
    grad_p, grad_w = None if which == "weights" else grad_p, None if which == "probabilities" else grad_w
    probabilities, _, index = backend.topk_gate(logits, scale, K)
    ours = backend.topk_gate_bwd(grad_p, grad_w, probabilities, index, scale, True)
    for out, exact in zip(ours, gate_truth(logits, scale, grad_p, grad_w, index), strict=True):
        assert out.dtype == torch.float32
        # With K = 1 the weight is the scale alone and its gradient rounds to about zero.
        assert (out - exact).norm() <= 2e-6 * exact.norm() + (1e-6 if K == 1 else 0)
    d_logits, nothing = backend.topk_gate_bwd(grad_p, grad_w, probabilities, index, scale, False)
    assert nothing is None
    assert torch.equal(d_logits, ours[0])
    if which == "weights":
        others = torch.ones(T, E, dtype=torch.bool, device=device).scatter_(1, index, False)
        assert torch.equal(d_logits[others], torch.zeros_like(d_logits[others]))


def test_topk_gate_takes_gradients_of_any_strides(device):
    logits, scale, grad_p, grad_w = gate_case(device, 7, 6, 3)
    probabilities, _, index = backend.topk_gate(logits, scale, 3)
    for p, w in (
        (grad_p.t().contiguous().t(), grad_w.t().contiguous().t()),
        (grad_p[:1].expand(7, 6), grad_w[:1].expand(7, 3)),
        (grad_p[:1, :1].expand(7, 6), grad_w[:1, :1].expand(7, 3)),
    ):
        ours = backend.topk_gate_bwd(p, w, probabilities, index, scale, True)
        same = backend.topk_gate_bwd(p.contiguous(), w.contiguous(), probabilities, index, scale, True)
        assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))


def router_case(device, dtype, T, E, K, H, magnitude=1.0):
    router = helpers.stock_router(E, K, H, dtype).to(device)
    generator = torch.Generator().manual_seed(1)
    hidden = (torch.randn(T, H, generator=generator) * magnitude).to(device, dtype)
    return router, hidden, *(torch.randn(T, n, generator=generator).to(device) for n in (E, K))


def router_gradients(router, hidden, grad_p, grad_w, numerics="hf", changes=None):
    """By the operator through autograd; the index that it chose."""
    arguments = helpers.router_arguments(router) | (changes or {})
    inputs = [x.detach().clone().requires_grad_() for x in (hidden, *(arguments[name] for name in NAMES[1:]))]
    options = {"top_k": arguments["top_k"], "eps": arguments["eps"], "numerics": numerics}
    probabilities, weights, index = ops.route(*inputs, **options, backend="triton")
    return torch.autograd.grad((probabilities, weights), inputs, (grad_p, grad_w)), index


def chosen_gradients(router, hidden, grad_p, grad_w, index, dtype):
    """torch's own for the choice in `index`: in float64 the truth, in the model's dtype what transformers gets."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, *router.state_dict(keep_vars=True).values())]
    names = ["hidden", *(name.removesuffix(".weight") for name in router.state_dict())]
    by_name = dict(zip(names, inputs, strict=True))
    wide = torch.promote_types(dtype, torch.float32)
    x = by_name["hidden"].to(wide)
    normed = (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + router.eps, -0.5)).to(dtype)
    logits = (normed * by_name["scale"] * hidden.shape[1] ** -0.5) @ by_name["proj"].T
    probabilities = torch.softmax(logits, -1, dtype=wide)
    weights = probabilities.gather(1, index)
    weights = weights / weights.sum(-1, keepdim=True) * by_name["per_expert_scale"][index]
    wanted = [by_name[name] for name in ("hidden", "proj", "scale", "per_expert_scale")]
    return torch.autograd.grad((probabilities, weights), wanted, (grad_p.to(wide), grad_w.to(weights.dtype)))


@pytest.mark.parametrize("numerics", reference.NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "K", "H"), SHAPES)
def test_router_as_accurate_as_transformers(device, dtype, numerics, T, E, K, H):
    router, *inputs = router_case(device, dtype, T, E, K, H)
    ours, index = router_gradients(router, *inputs, numerics)
    theirs = chosen_gradients(router, *inputs, index, dtype)
    exact = chosen_gradients(router, *inputs, index, torch.float64)
    for name, x, *grads in zip(NAMES, (inputs[0], *[None] * 3), ours, theirs, exact, strict=True):
        assert grads[0].dtype == dtype
        assert x is None or grads[0].shape == x.shape
        helpers.assert_as_accurate(*grads, name)


@pytest.mark.parametrize("magnitude", [1e-3, 30.0])
def test_magnitudes(device, magnitude):
    router, *inputs = router_case(device, torch.bfloat16, 17, 16, 4, 40, magnitude)
    ours, index = router_gradients(router, *inputs)
    theirs = chosen_gradients(router, *inputs, index, torch.bfloat16)
    exact = chosen_gradients(router, *inputs, index, torch.float64)
    for name, *grads in zip(NAMES, ours, theirs, exact, strict=True):
        helpers.assert_as_accurate(*grads, name)


def test_only_what_is_needed(device):
    router, hidden, grad_p, _ = router_case(device, torch.bfloat16, 7, 6, 3, 40)
    arguments = (grad_p, hidden, router.proj.weight, router.scale, router.eps)
    everything = backend.route_bwd(*arguments, (True, True, True))
    for number in range(3):
        alone = backend.route_bwd(*arguments, [other == number for other in range(3)])
        assert [grad is None for grad in alone] == [other != number for other in range(3)]
        assert torch.equal(alone[number], everything[number])
    assert backend.route_bwd(*arguments, (False, False, False)) == (None, None, None)


def test_strided_inputs_are_read_and_left_alone(device):
    router, hidden, grad_p, _ = router_case(device, torch.bfloat16, 17, 6, 3, 47)
    expected = backend.route_bwd(grad_p, hidden, router.proj.weight, router.scale, router.eps, (True,) * 3)
    wide = torch.cat([hidden, hidden], 1)[:, :47]
    transposed = hidden.t().contiguous().t()
    proj = torch.cat([router.proj.weight] * 2, 1)[:, :47]
    for view in (wide, transposed):
        before = view.clone()
        ours = backend.route_bwd(grad_p, view, proj, router.scale, router.eps, (True,) * 3)
        assert torch.equal(view, before)
        for out, wanted in zip(ours, expected, strict=True):
            assert helpers.relative_error(out, wanted) <= 2 * torch.finfo(torch.bfloat16).eps  # torch's GEMM, strided


def test_same_bits_every_time(device):
    router, *inputs = router_case(device, torch.bfloat16, 33, 16, 4, 40)
    first, _ = router_gradients(router, *inputs)
    for _ in range(2 if device.type == "cpu" else 20):
        for ours, before in zip(router_gradients(router, *inputs)[0], first, strict=True):
            assert torch.equal(ours, before)


def test_no_tokens(device):
    router, hidden, grad_p, grad_w = router_case(device, torch.bfloat16, 1, 6, 3, 40)
    grads, _ = router_gradients(router, hidden[:0], grad_p[:0], grad_w[:0])
    assert grads[0].shape == (0, 40)
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


def test_negative_controls_fail(device):
    router, hidden, grad_p, grad_w = router_case(device, torch.float32, 17, 16, 4, 40, magnitude=0.1)
    ours, index = router_gradients(router, hidden, grad_p, grad_w)
    theirs = chosen_gradients(router, hidden, grad_p, grad_w, index, torch.float32)
    exact = chosen_gradients(router, hidden, grad_p, grad_w, index, torch.float64)
    ones = torch.ones_like(router.scale)
    wrong = {
        "eps": router_gradients(router, hidden, grad_p, grad_w, changes={"eps": 1e-3})[0],
        "scale": router_gradients(router, hidden, grad_p, grad_w, changes={"scale": ones})[0],
        "no gradient of the probabilities": router_gradients(router, hidden, 0 * grad_p, grad_w)[0],
        "another token's gradient": router_gradients(router, hidden, grad_p, grad_w.roll(1, 0))[0],
    }
    for what, grads in wrong.items():
        with pytest.raises(AssertionError, match="relative error"):
            helpers.assert_as_accurate(grads[0], theirs[0], exact[0], what)
    helpers.assert_as_accurate(ours[0], theirs[0], exact[0])
