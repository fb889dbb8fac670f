"""Every gradient of the router against float64 truth, with transformers' own router as the yardstick."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigene_fast import reference
from omnigene_fast.ops import route, topk_gate

from .gradients import Comparison
from .helpers import assert_same, backend_params, relative_error, router_arguments, stock_router

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOKENS = (0, 1, 2, 7, 16, 17, 127, 128, 129, 511)
PARAMETERS = ("proj_weight", "scale", "per_expert_scale")
NAMES = ("hidden", *PARAMETERS)
OPS = torch.ops.omnigene_fast

backends = pytest.mark.parametrize("backend", backend_params())
dtypes = pytest.mark.parametrize("dtype", [F32, BF16])
numerics = pytest.mark.parametrize("numerics", reference.NUMERICS)
outputs = pytest.mark.parametrize("outputs", ["weights", "probabilities", "both"])


class Problem:
    """A router, tokens on whose experts ours and transformers' agree, and the gradients that come back."""

    def __init__(self, T=65, E=16, K=4, H=67, *, dtype=F32, seed=0, spread=1.0, magnitude=1.0, which="both"):
        generator = torch.Generator().manual_seed(seed)
        self.router = stock_router(E, K, H, dtype, seed=seed, spread=spread)
        self.arguments = router_arguments(self.router)
        self.eps, self.top_k = self.arguments.pop("eps"), self.arguments.pop("top_k")
        hidden = (magnitude * torch.randn(2 * T + 20, H, generator=generator)).to(dtype)
        ours = [route(hidden, **self.arguments, eps=self.eps, top_k=K, numerics=n)[2] for n in reference.NUMERICS]
        agrees = (ours[0] == self.router(hidden)[2]).all(-1) & (ours[0] == ours[1]).all(-1)
        assert agrees.sum() >= T
        self.hidden, self.index = hidden[agrees][:T], ours[0][agrees][:T]
        self.grads = [torch.randn(T, E, generator=generator), torch.randn(T, K, generator=generator)]
        if which != "both":
            self.grads[which == "probabilities"] = None

    def leaves(self, dtype=None, wanted=NAMES):
        tensors = {"hidden": self.hidden, **self.arguments}
        return {n: x.detach().clone().to(dtype or x.dtype).requires_grad_(n in wanted) for n, x in tensors.items()}

    def results(self, outs, leaves):
        """The outputs `outs` (probabilities, weights) backward from the problem's gradients."""
        pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outs, self.grads, strict=True) if grad is not None]
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        grads = torch.autograd.grad(
            [out for out, _ in pairs], wanted.values(), [grad for _, grad in pairs], allow_unused=True
        )
        return {
            n: torch.zeros_like(x) if grad is None else grad for (n, x), grad in zip(wanted.items(), grads, strict=True)
        }

    def ours(self, wanted=NAMES, **options):
        leaves = self.leaves(wanted=wanted)
        probabilities, weights, index = route(**leaves, eps=self.eps, top_k=self.top_k, **options)
        assert torch.equal(index, self.index)
        return self.results((probabilities, weights), leaves)

    def stock(self):
        router = self.router.requires_grad_()
        hidden = self.hidden.clone().requires_grad_()
        leaves = dict(zip(NAMES, (hidden, router.proj.weight, router.scale, router.per_expert_scale), strict=True))
        return self.results(router(hidden)[:2], leaves)

    def truth(self, wanted=NAMES):
        """In float64, on the experts that were chosen."""
        leaves = self.leaves(F64, wanted)
        x = leaves["hidden"]
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        logits = F.linear(normed * leaves["scale"] * x.shape[-1] ** -0.5, leaves["proj_weight"])
        probabilities = torch.softmax(logits, -1)
        chosen = probabilities.gather(-1, self.index)
        weights = chosen / chosen.sum(-1, keepdim=True) * leaves["per_expert_scale"][self.index]
        return self.results((probabilities, weights), leaves)


@backends
@numerics
@dtypes
@outputs
def test_route_parity(outputs, dtype, numerics, backend):
    comparison = Comparison()
    for seed, (E, K, H) in enumerate(((128, 8, 96), (16, 4, 67), (40, 8, 33))):
        p = Problem(65, E, K, H, dtype=dtype, seed=seed, which=outputs)
        comparison.add(p.ours(numerics=numerics, backend=backend), p.stock(), p.truth())
    comparison.check()


@backends
@dtypes
@pytest.mark.parametrize("T", TOKENS)
def test_route_any_number_of_tokens(T, dtype, backend):
    comparison = Comparison()
    for seed in range(1 if T > 100 else 6):
        p = Problem(T, 40, 8, 67, dtype=dtype, seed=seed)
        comparison.add(p.ours(backend=backend), p.stock(), p.truth())
    comparison.check()


@backends
def test_route_fp16(backend):
    p = Problem(dtype=F16)
    Comparison().add(p.ours(backend=backend), p.stock(), p.truth()).check()


@backends
@dtypes
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0])
def test_route_magnitudes(magnitude, dtype, backend):
    """Of the input, which the norm takes out again, and of the logits."""
    for options in ({"magnitude": magnitude}, {"spread": min(magnitude, 4.0)}):
        p = Problem(dtype=dtype, **options)
        Comparison().add(p.ours(backend=backend), p.stock(), p.truth()).check()


@backends
@pytest.mark.parametrize("K", [1, 16])
def test_route_one_expert_or_all(K, backend):
    """With one expert the weight is its scale: no gradient reaches the logits but by rounding."""
    p = Problem(K=K, which="weights")
    mine, exact = p.ours(backend=backend), p.truth()
    for name in NAMES:
        if K == 1 and name != "per_expert_scale":
            assert mine[name].abs().max() < 1e-5, name
        else:
            assert relative_error(mine[name], exact[name]) < 1e-5, name


@backends
@settings(max_examples=20, deadline=None)
@given(
    T=st.integers(0, 20), E=st.integers(1, 140), K=st.integers(1, 16), H=st.integers(1, 70), seed=st.integers(0, 1000)
)
def test_route_any_shape(backend, T, E, K, H, seed):
    p = Problem(T, E, min(K, E), H, seed=seed)
    mine, exact = p.ours(backend=backend), p.truth()
    for name, expected in exact.items():  # with one expert, or all alike, the truth is rounding
        assert torch.allclose(mine[name].double(), expected, rtol=1e-3, atol=1e-4), name


@backends
@pytest.mark.parametrize("wanted", [c for n in range(1, 5) for c in itertools.combinations(NAMES, n)], ids="+".join)
def test_route_only_what_is_needed(wanted, backend):
    p = Problem(33)
    expected, mine = p.ours(backend=backend), p.ours(wanted, backend=backend)
    assert set(mine) == set(wanted)
    for name in wanted:
        assert relative_error(mine[name], expected[name]) < 1e-6


@backends
@dtypes
@pytest.mark.parametrize("control", ["no norm", "no scale", "next expert", "wrong eps", "no per-expert scale"])
def test_route_parity_rejects(control, dtype, backend):
    """Negative controls: the backward alone with one mistake, after a right forward."""
    p = Problem(129, dtype=dtype, magnitude=1e-3 if control == "wrong eps" else 2.0, which="weights")
    hidden, arguments, index, eps = p.hidden, dict(p.arguments), p.index, p.eps
    probabilities = route(hidden, **arguments, eps=eps, top_k=p.top_k)[0]
    if control == "no norm":
        hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    elif control == "no scale":
        arguments["scale"] = torch.ones_like(arguments["scale"])
    elif control == "no per-expert scale":
        arguments["per_expert_scale"] = torch.ones_like(arguments["per_expert_scale"])
    elif control == "next expert":
        index = (index + 1) % 16
    else:
        eps = 0.0
    grads = OPS.route_bwd(
        *p.grads, hidden, *(arguments[n] for n in PARAMETERS), probabilities, index, eps, [True] * 4, backend
    )
    with pytest.raises(AssertionError, match="relative error"):
        Comparison().add(dict(zip(NAMES, grads, strict=True)), p.stock(), p.truth()).check()


@backends
@dtypes
def test_bug_13_two_runs_two_gradients_and_inputs_unchanged(dtype, backend):
    """13: 20 runs, bit for bit; 4: nothing that was given is written to."""
    p = Problem(129, 128, 8, 96, dtype=dtype)
    copies = [p.hidden.clone(), *(x.clone() for x in p.arguments.values())]
    first = p.ours(backend=backend)
    for _ in range(19):
        again = p.ours(backend=backend)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)
    assert all(torch.equal(x, y) for x, y in zip([p.hidden, *p.arguments.values()], copies, strict=True))


@backends
def test_route_second_backward_and_layouts(backend):
    p = Problem(33)
    leaves = p.leaves()
    outs = route(**leaves, eps=p.eps, top_k=p.top_k, backend=backend)[:2]
    grads = [torch.randn(3, x.shape[1], x.shape[0])[0].t() for x in outs]  # strided columns
    first = torch.autograd.grad(outs, leaves.values(), grads, retain_graph=True)
    second = torch.autograd.grad(outs, leaves.values(), grads, retain_graph=True)
    third = torch.autograd.grad(outs, leaves.values(), [grad.contiguous() for grad in grads], retain_graph=True)
    for mine, again, contiguous in zip(first, second, third, strict=True):
        assert torch.equal(mine, again)
        assert_same(mine, contiguous, backend)
    for out in outs:  # a gradient of stride 0
        one = torch.autograd.grad(out.sum(), leaves.values(), retain_graph=True)
        other = torch.autograd.grad(out, leaves.values(), torch.ones_like(out), retain_graph=True)
        for mine, contiguous in zip(one, other, strict=True):
            assert_same(mine, contiguous, backend)


# --- topk_gate --------------------------------------------------------------------------------------------------------


def _gate(function, logits, scale, grads, top_k, **options):
    leaves = logits.clone().requires_grad_(), scale.clone().requires_grad_()
    probabilities, weights, index = function(*leaves, top_k=top_k, **options)
    pairs = [(o, g.to(o.dtype)) for o, g in ((probabilities, grads[0]), (weights, grads[1])) if g is not None]
    found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    found = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, found, strict=True)]
    return dict(zip(("logits", "per_expert_scale"), found, strict=True)), index


@backends
@dtypes
@outputs
@pytest.mark.parametrize("T", [0, 1, 17, 129])
def test_topk_gate_parity(T, outputs, dtype, backend):
    comparison = Comparison()
    for seed in range(4):
        torch.manual_seed(seed)
        logits, scale = (2 * torch.randn(T, 128)).to(dtype), (0.7 + 0.6 * torch.rand(128)).to(dtype)
        grads = [torch.randn(T, 128), torch.randn(T, 8)]
        if outputs != "both":
            grads[outputs == "probabilities"] = None
        mine, index = _gate(topk_gate, logits, scale, grads, 8, backend=backend)
        exact, chosen = _gate(reference.topk_gate, logits.double(), scale.double(), grads, 8)
        assert torch.equal(index, chosen)
        comparison.add(mine, _gate(reference.topk_gate, logits, scale, grads, 8)[0], exact)
    comparison.check()


@backends
@pytest.mark.parametrize("scale_dtype", [F32, BF16, F64])
def test_topk_gate_scale_of_another_dtype(scale_dtype, backend):
    logits, scale = torch.randn(9, 16).bfloat16(), (0.7 + 0.6 * torch.rand(16)).to(scale_dtype)
    mine, _ = _gate(topk_gate, logits, scale, (None, torch.randn(9, 3)), 3, backend=backend)
    assert (mine["logits"].dtype, mine["per_expert_scale"].dtype) == (BF16, scale_dtype)


@backends
@dtypes
def test_topk_gate_ties_and_extreme_logits(dtype, backend):
    """Equal logits share by what was chosen; experts masked with -inf and far-out logits give finite gradients."""
    logits = torch.zeros(3, 16, dtype=dtype)
    logits[1, 5:] = -torch.inf
    logits[2] = 1000.0 * torch.arange(16)
    scale, grads = torch.ones(16, dtype=dtype), (torch.randn(3, 16), torch.randn(3, 4))
    mine, index = _gate(topk_gate, logits, scale, grads, 4, backend=backend)
    assert index[0].tolist() == [0, 1, 2, 3]
    exact, _ = _gate(reference.topk_gate, logits.double(), scale.double(), grads, 4)
    for name, gradient in mine.items():
        assert gradient.isfinite().all()
        assert relative_error(gradient, exact[name]) < (1e-5 if dtype == F32 else 5e-3)
    assert torch.equal(mine["logits"][1, 5:], torch.zeros(11, dtype=dtype))


@pytest.mark.parametrize("function", ["route", "topk_gate"])
def test_gradcheck(function):
    """The written formulas against differences in float64."""
    p = Problem(5, 6, 3, 7, dtype=F64)
    leaves = p.leaves(F64)

    def routed(*arguments):
        return route(*arguments, top_k=3, eps=p.eps)[:2]

    def gated(*arguments):
        return topk_gate(*arguments, top_k=3)[:2]

    logits = torch.randn(5, 6, dtype=F64, requires_grad=True)
    inputs = list(leaves.values()) if function == "route" else [logits, leaves["per_expert_scale"]]
    assert torch.autograd.gradcheck({"route": routed, "topk_gate": gated}[function], inputs)


@backends
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_forward_and_backward(dynamic, backend):
    torch._dynamo.reset()

    def both(hidden, proj_weight, scale, per_expert_scale):
        probabilities, weights, _ = route(
            hidden, proj_weight, scale, per_expert_scale, top_k=4, eps=1e-6, backend=backend
        )
        return weights, topk_gate(probabilities.log(), per_expert_scale, top_k=4, backend=backend)[1]

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (7, 12):
        p = Problem(T)
        results = []
        for call in (compiled, both):
            leaves = p.leaves()
            outs = call(**leaves)
            results.append([*outs, *torch.autograd.grad(outs, leaves.values(), [p.grads[1]] * 2)])
        assert all(torch.equal(mine, same) for mine, same in zip(*results, strict=True))
