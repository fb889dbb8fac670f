"""The public operators against float64 truth, with transformers' own error in the same dtype as the yardstick."""

import functools
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from omnigene_fast import ops, reference
from omnigene_fast.ops import expert_mlp, route, topk_gate

from .helpers import (
    FLOOR,
    ROUTINGS,
    assert_as_accurate,
    assert_same,
    backend_params,
    experts_truth,
    relative_error,
    router_arguments,
    routing,
    stock_experts,
    stock_router,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOKENS = (0, 1, 2, 7, 16, 17, 127, 128, 129, 511)
SEEDS = 20
SHAPES = ((16, 96, 40), (32, 67, 35), (128, 96, 72), (16, 64, 48))  # E, H, I; seeds go round them

backends = pytest.mark.parametrize("backend", backend_params())


@functools.cache
def _experts(E, H, intermediate, dtype):
    return stock_experts(E, H, intermediate, dtype, seed=E + H)


@functools.cache
def _router(E, K, H, dtype):
    return stock_router(E, K, H, dtype, seed=E + H)


def _run(experts, hidden, index, weights, backend="auto", **options):
    options = {"activation": "gelu_tanh"} | options
    return expert_mlp(hidden, experts.gate_up_proj, experts.down_proj, index, weights, backend=backend, **options)


def _assert_experts_parity(experts, hidden, index, weights, backend, what=""):
    out = _run(experts, hidden, index, weights, backend)
    assert out.dtype == hidden.dtype
    truth = experts_truth(experts, hidden, index, weights)
    assert_as_accurate(out, experts(hidden, index, weights), truth, what)


# --- expert_mlp -------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("mode", ROUTINGS)
@pytest.mark.parametrize("T", TOKENS)
def test_expert_mlp_parity(T, mode, dtype, backend):
    for seed in range(SEEDS):
        E, H, intermediate = SHAPES[seed % len(SHAPES)]
        hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(seed)).to(dtype)
        index, weights = routing(mode, T, 8, E, seed)
        _assert_experts_parity(_experts(E, H, intermediate, dtype), hidden, index, weights, backend, f"seed {seed}")


@backends
@pytest.mark.parametrize("T", [1, 17, 128])
def test_expert_mlp_parity_fp16(T, backend):
    index, weights = routing("language", T, 4, 32, seed=T)
    _assert_experts_parity(_experts(32, 67, 35, F16), torch.randn(T, 67).half(), index, weights, backend)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0])
def test_expert_mlp_magnitudes(magnitude, dtype, backend):
    hidden = (torch.randn(65, 67) * magnitude).to(dtype)
    index, weights = routing("uniform", 65, 4, 32, seed=0)
    _assert_experts_parity(_experts(32, 67, 35, dtype), hidden, index, weights, backend)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "case", ["all tokens to one expert", "three giant groups", "one expert each", "every expert", "repeated expert"]
)
def test_expert_mlp_loads(case, dtype, backend):
    E, T = 16, 130
    index = {
        "all tokens to one expert": torch.full((T, 1), 11),
        "three giant groups": torch.tensor([3, 0, 15]).expand(T, 3),
        "one expert each": torch.arange(T).remainder(E)[:, None],
        "every expert": torch.arange(E).expand(T, E),
        "repeated expert": torch.tensor([5, 5]).expand(T, 2),  # no router does it; the sum over picks still holds
    }[case].contiguous()
    weights = torch.rand(index.shape)
    _assert_experts_parity(_experts(E, 67, 35, dtype), torch.randn(T, 67).to(dtype), index, weights, backend)


@backends
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_expert_mlp_activations(activation, backend):
    names = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "silu": "silu"}
    experts = stock_experts(16, 67, 35, F32, activation=names[activation])
    hidden = torch.randn(65, 67)
    index, weights = routing("uniform", 65, 4, 16, seed=0)
    truth = reference.expert_mlp(
        *(x.double() for x in (hidden, experts.gate_up_proj, experts.down_proj)), index, weights, activation=activation
    )
    out = _run(experts, hidden, index, weights, backend, activation=activation)
    assert_as_accurate(out, experts(hidden, index, weights), truth)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("control", ["silu", "erf", "gate and up swapped", "next expert", "one pick less"])
def test_expert_mlp_parity_rejects(control, dtype, backend):
    """Negative controls: the criterion of the parity tests must see each of these mistakes."""
    if control == "erf" and dtype == BF16:
        pytest.skip("erf differs from tanh by 2e-4, below bfloat16's rounding")
    experts = _experts(16, 67, 35, dtype)
    hidden = torch.randn(129, 67).to(dtype)
    index, weights = routing("uniform", 129, 4, 16, seed=0)
    gate_up, options = experts.gate_up_proj, {"activation": "gelu_tanh"}
    wrong_index, wrong_weights = index, weights
    if control == "silu":
        options = {"activation": "silu"}
    elif control == "erf":
        options = {"activation": "gelu"}
    elif control == "gate and up swapped":
        gate_up = torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1)
    elif control == "next expert":
        wrong_index = (index + 1) % 16
    else:
        wrong_index, wrong_weights = index[:, :-1], weights[:, :-1]
    out = expert_mlp(hidden, gate_up, experts.down_proj, wrong_index, wrong_weights, backend=backend, **options)
    truth, stock = experts_truth(experts, hidden, index, weights), experts(hidden, index, weights)
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_accurate(out, stock, truth)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_expert_mlp_sentinels(dtype, backend):
    """Ids >= E belong to other ranks: whatever their weight, they add nothing."""
    E = 16
    experts = _experts(E, 67, 35, dtype)
    hidden = torch.randn(33, 67).to(dtype)
    index, weights = routing("uniform", 33, 4, E, seed=0)
    index[::2, 1] = E
    index[::3, 3] = E + 5
    index[4] = E
    out = _run(experts, hidden, index, weights, backend, expert_parallel=True)
    kept = torch.where(index < E, weights, 0.0)
    truth = experts_truth(experts, hidden, index.clamp(max=E - 1), kept)
    assert_as_accurate(out, experts(hidden, index.clamp(max=E - 1), kept), truth)
    assert torch.equal(out[4], torch.zeros_like(out[4]))


@backends
def test_expert_mlp_only_sentinels(backend):
    experts = _experts(16, 67, 35, F32)
    out = _run(experts, torch.randn(5, 67), torch.full((5, 2), 16), torch.ones(5, 2), backend, expert_parallel=True)
    assert torch.equal(out, torch.zeros(5, 67))


@backends
@pytest.mark.parametrize("index", [torch.tensor([[0, 16]]), torch.tensor([[-1, 0]])])
def test_expert_mlp_id_out_of_range(index, backend):
    experts = _experts(16, 67, 35, F32)
    with pytest.raises(IndexError, match=r"index: expected .*got (16|-1)"):
        _run(experts, torch.randn(1, 67), index, torch.ones(1, 2), backend)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", ["strided rows", "transposed", "unaligned", "expanded"])
def test_expert_mlp_hidden_layouts(layout, dtype, backend):
    experts = _experts(16, 67, 35, dtype)
    index, weights = routing("uniform", 33, 4, 16, seed=0)
    hidden = _layout(torch.randn(33, 67).to(dtype), layout)
    out = _run(experts, hidden, index, weights, backend)
    assert_same(out, _run(experts, hidden.contiguous(), index, weights, backend), backend)
    assert out.is_contiguous()


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_expert_mlp_unaligned_and_strided_weights(dtype, backend):
    """Memory-mapped safetensors start anywhere; fused checkpoints are read through views."""
    experts = _experts(16, 67, 35, dtype)
    hidden = torch.randn(33, 67).to(dtype)
    index, weights = routing("uniform", 33, 4, 16, seed=0)
    expected = _run(experts, hidden, index, weights, backend)
    unaligned = [_unaligned(weight) for weight in (experts.gate_up_proj, experts.down_proj)]
    assert torch.equal(
        expert_mlp(hidden, *unaligned, index, weights, activation="gelu_tanh", backend=backend), expected
    )
    padded = [F.pad(weight, (3, 2))[..., 3:-2] for weight in (experts.gate_up_proj, experts.down_proj)]
    assert not padded[0].is_contiguous()
    assert_same(expert_mlp(hidden, *padded, index, weights, activation="gelu_tanh", backend=backend), expected, backend)


@backends
def test_expert_mlp_index_and_weight_layouts(backend):
    experts = _experts(16, 67, 35, F32)
    hidden = torch.randn(33, 67)
    index, weights = routing("uniform", 33, 4, 16, seed=0)
    expected = _run(experts, hidden, index, weights, backend)
    wide = torch.zeros(33, 9, dtype=torch.int64)
    wide[:, 2:6] = index
    assert torch.equal(_run(experts, hidden, wide[:, 2:6], weights, backend), expected)
    assert torch.equal(_run(experts, hidden, index.int(), weights, backend), expected)
    assert torch.equal(_run(experts, hidden, index, weights.t().contiguous().t(), backend), expected)
    assert torch.equal(_run(experts, hidden, index, weights.double(), backend), expected)


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_expert_mlp_keeps_a_bad_token_to_itself(bad, backend):
    experts = _experts(16, 67, 35, F32)
    hidden = torch.randn(33, 67)
    index, weights = routing("protein", 33, 4, 16, seed=0)
    expected = _run(experts, hidden, index, weights, backend)
    hidden[7, 3] = bad
    out = _run(experts, hidden, index, weights, backend)
    others = torch.arange(33) != 7
    assert torch.equal(out[others], expected[others])
    assert not out[7].isfinite().all()


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_expert_mlp_is_deterministic_and_leaves_its_inputs_alone(dtype, backend):
    experts = _experts(128, 96, 72, dtype)
    hidden = torch.randn(129, 96).to(dtype)
    index, weights = routing("protein", 129, 8, 128, seed=0)
    arguments = [hidden, experts.gate_up_proj, experts.down_proj, index, weights]
    copies = [argument.clone() for argument in arguments]
    first = expert_mlp(*arguments, activation="gelu_tanh", backend=backend)
    for _ in range(19):
        assert torch.equal(expert_mlp(*arguments, activation="gelu_tanh", backend=backend), first)
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, copies, strict=True))


@backends
@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 40),
    E=st.integers(1, 20),
    K=st.integers(1, 20),
    H=st.integers(1, 70),
    intermediate=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_expert_mlp_any_shape(backend, T, E, K, H, intermediate, seed):
    experts = stock_experts(E, H, intermediate, F32, seed=seed)
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(seed))
    index, weights = routing("uniform", T, min(K, E), E, seed)
    _assert_experts_parity(experts, hidden, index, weights, backend)


# --- route and topk_gate ----------------------------------------------------------------------------------------------


def _stock_logits(router, hidden):
    return router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)


def _unit_in_the_last_place(x):
    return torch.finfo(x.dtype).eps * torch.exp2(torch.floor(torch.log2(x.double().abs().clamp_min(1e-30))))


def _assert_same_sets(index, router, hidden):
    """Equal top-k sets, except where the stock K-th and (K+1)-th logits are at most one last-place unit apart."""
    E, K = router.proj.out_features, router.config.top_k_experts
    expected = router(hidden)[2]
    differs = (index.sort(-1).values != expected.sort(-1).values).any(-1)
    if not differs.any():
        return
    assert K < E, "every expert is chosen, and the sets differ"
    logits = _stock_logits(router, hidden).sort(-1, descending=True).values[differs]
    gap = (logits[:, K - 1] - logits[:, K]).double()
    assert (gap <= _unit_in_the_last_place(logits[:, K - 1])).all(), f"another expert set at a gap of {gap.max():.3e}"


def _dense(weights, index, E):
    return torch.zeros(index.shape[0], E, dtype=F64).scatter_(1, index, weights.double())


def _assert_gate_parity(router, hidden, out, what=""):
    """Probabilities everywhere, and weights of the tokens on whose experts everybody agrees."""
    E = router.proj.out_features
    truth = reference.route(hidden.double(), **router_arguments(router, F64))
    stock = router(hidden)
    probabilities, weights, index = out
    assert (probabilities.dtype, weights.dtype, index.dtype) == (F32, F32, torch.int64)
    _assert_valid_ids(index, E)
    assert_as_accurate(probabilities, stock[0], truth[0], f"probabilities, {what}")
    agree = torch.ones(hidden.shape[0], dtype=torch.bool)
    for other in (stock[2], truth[2]):
        agree &= (index.sort(-1).values == other.sort(-1).values).all(-1)
    mine, theirs, exact = (_dense(w, i, E)[agree] for w, i in ((weights, index), stock[1:], truth[1:]))
    assert_as_accurate(mine, theirs, exact, f"weights, {what}")


def _assert_route_parity(router, hidden, out, what=""):
    _assert_same_sets(out[2], router, hidden)
    _assert_gate_parity(router, hidden, out, what)


def _assert_valid_ids(index, E):
    assert ((index >= 0) & (index < E)).all()
    ordered = index.sort(-1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "an expert twice in one row"


def _assert_descending(weights, index, per_expert_scale):
    unscaled = weights.double() / per_expert_scale.double()[index]
    assert (unscaled.diff(dim=-1) <= 1e-6).all()


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("T", TOKENS)
def test_route_parity(T, dtype, backend):
    for seed in range(SEEDS):
        E, H = ((128, 96), (16, 67), (40, 33), (128, 64))[seed % 4]
        router = _router(E, 8, H, dtype)
        hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(seed)).to(dtype)
        out = route(hidden, **router_arguments(router), backend=backend)
        _assert_route_parity(router, hidden, out, f"seed {seed}")
        _assert_descending(out[1], out[2], router.per_expert_scale)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("T", [0, 1, 17, 129])
def test_route_fp32_numerics(T, dtype, backend):
    """Nothing is rounded on the way: as close to float64 as float32 arithmetic gets, whatever the input's dtype."""
    router = _router(128, 8, 96, dtype)
    hidden = torch.randn(T, 96).to(dtype)
    out = route(hidden, **router_arguments(router), numerics="fp32", backend=backend)
    exact = reference.route(hidden.double(), **router_arguments(router, F64))
    wide = _router_in_float32(router)
    assert_as_accurate(out[0], wide(hidden.float())[0], exact[0])
    assert torch.equal(out[2], exact[2])
    assert_as_accurate(out[1], reference.route(hidden.float(), **router_arguments(wide))[1], exact[1])


def _router_in_float32(router):
    wide = stock_router(router.proj.out_features, router.config.top_k_experts, router.hidden_size, F32)
    wide.load_state_dict(router.state_dict())
    return wide


@backends
@pytest.mark.parametrize("K", [1, 7, 16])
def test_route_any_k(K, backend):
    router = _router(16, K, 67, F32)
    hidden = torch.randn(65, 67)
    out = route(hidden, **router_arguments(router), backend=backend)
    _assert_route_parity(router, hidden, out)


@backends
def test_route_fp16(backend):
    router = _router(16, 4, 67, F16)
    hidden = torch.randn(65, 67).half()
    out = route(hidden, **router_arguments(router), backend=backend)
    _assert_route_parity(router, hidden, out)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0])
def test_route_magnitudes(magnitude, dtype, backend):
    """Norm first: the input's magnitude goes; the logits' magnitude is the projection's."""
    router = stock_router(32, 4, 67, dtype, spread=magnitude)
    hidden = (torch.randn(65, 67) * magnitude).to(dtype)
    out = route(hidden, **router_arguments(router), backend=backend)
    _assert_route_parity(router, hidden, out)


@backends
@pytest.mark.parametrize("control", ["no norm", "no scale", "no per-expert scale", "next expert", "wrong eps"])
def test_route_parity_rejects(control, backend):
    router = _router(32, 4, 67, F32)
    hidden = torch.randn(65, 67) * (1e-3 if control == "wrong eps" else 2.0)
    arguments = router_arguments(router)
    if control == "no norm":
        x = hidden * router.scale * router.scalar_root_size
        out = topk_gate(F.linear(x, router.proj.weight), router.per_expert_scale, top_k=4, backend=backend)
    else:
        if control == "no scale":
            arguments["scale"] = torch.ones(67)
        elif control == "no per-expert scale":
            arguments["per_expert_scale"] = torch.ones(32)
        elif control == "next expert":
            arguments["proj_weight"] = arguments["proj_weight"].roll(1, dims=0)
        else:
            arguments["eps"] = 0.0
        out = route(hidden, **arguments, backend=backend)
    with pytest.raises(AssertionError, match=r"relative error|expert set"):
        _assert_route_parity(router, hidden, out)


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("T", [0, 1, 17, 129])
def test_topk_gate_parity(T, dtype, backend):
    logits = (3 * torch.randn(T, 128)).to(dtype)
    scale = (0.7 + 0.6 * torch.rand(128)).to(dtype)
    out = topk_gate(logits, scale, top_k=8, backend=backend)
    exact = reference.topk_gate(logits.double(), scale.double(), top_k=8)
    assert relative_error(out[0], exact[0]) <= FLOOR
    assert torch.equal(out[2], exact[2])  # also among the equal logits that bfloat16 is full of
    assert relative_error(out[1], exact[1]) <= FLOOR


@backends
@pytest.mark.parametrize("scale_dtype", [F32, BF16, F64])
def test_topk_gate_scale_of_another_dtype(scale_dtype, backend):
    logits, scale = torch.randn(9, 16).bfloat16(), (0.7 + 0.6 * torch.rand(16)).to(scale_dtype)
    _, weights, _ = topk_gate(logits, scale, top_k=3, backend=backend)
    exact = reference.topk_gate(logits.double(), scale.double(), top_k=3)
    assert relative_error(weights, exact[1]) <= FLOOR


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_topk_gate_ties(dtype, backend):
    constant = topk_gate(torch.full((5, 128), 0.5, dtype=dtype), torch.ones(128, dtype=dtype), top_k=8, backend=backend)
    assert torch.equal(constant[2], torch.arange(8).expand(5, 8))
    assert torch.allclose(constant[1], torch.full((5, 8), 0.125))
    logits = torch.zeros(1, 128, dtype=dtype)
    logits[0, 100] = 1
    logits[0, [7, 9, 64, 127]] = 0.5
    index = topk_gate(logits, torch.ones(128, dtype=dtype), top_k=7, backend=backend)[2]
    assert index.tolist() == [[100, 7, 9, 64, 127, 0, 1]]


@backends
def test_topk_gate_extreme_logits(backend):
    """Masked experts (-inf) are never chosen while others are left; probabilities that underflow are ties."""
    logits = torch.full((2, 16), -math.inf)
    logits[0, [3, 5, 9]] = torch.tensor([1.0, 3.0, 2.0])
    logits[1] = -1000.0 * torch.arange(16)
    probabilities, weights, index = topk_gate(logits, torch.ones(16), top_k=3, backend=backend)
    assert index.tolist() == [[5, 9, 3], [0, 1, 2]]
    assert torch.allclose(probabilities.sum(-1), torch.ones(2))
    assert torch.allclose(weights.sum(-1), torch.ones(2))


@backends
@pytest.mark.parametrize("layout", ["strided rows", "transposed", "unaligned", "expanded"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gate_layouts(layout, dtype, backend):
    router = _router(16, 4, 67, dtype)
    arguments = router_arguments(router)
    hidden = _layout(torch.randn(33, 67).to(dtype), layout)
    expected = route(hidden.contiguous(), **arguments, backend=backend)
    weight = _layout(arguments.pop("proj_weight"), layout if layout != "expanded" else "unaligned")
    for mine, same in zip(route(hidden, weight, **arguments, backend=backend), expected, strict=True):
        assert_same(mine, same, backend)
    logits = _layout(torch.randn(33, 16).to(dtype), layout)
    both = (topk_gate(x, router.per_expert_scale, top_k=4, backend=backend) for x in (logits, logits.contiguous()))
    for mine, same in zip(*both, strict=True):
        assert torch.equal(mine, same)


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gate_keeps_a_bad_token_to_itself(bad, backend):
    router = _router(16, 4, 67, F32)
    hidden = torch.randn(9, 67)
    expected = route(hidden, **router_arguments(router), backend=backend)
    hidden[4, 3] = bad
    out = route(hidden, **router_arguments(router), backend=backend)
    _assert_valid_ids(out[2], 16)
    assert out[0][4].isnan().all()
    others = torch.arange(9) != 4
    for mine, same in zip(out, expected, strict=True):
        assert torch.equal(mine[others], same[others])


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_route_is_deterministic_and_leaves_its_inputs_alone(dtype, backend):
    router = _router(128, 8, 96, dtype)
    hidden = torch.randn(129, 96).to(dtype)
    copies = [hidden.clone(), *(parameter.clone() for parameter in router.parameters())]
    first = route(hidden, **router_arguments(router), backend=backend)
    for _ in range(19):
        again = route(hidden, **router_arguments(router), backend=backend)
        assert all(torch.equal(mine, same) for mine, same in zip(again, first, strict=True))
    assert all(torch.equal(x, copy) for x, copy in zip([hidden, *router.parameters()], copies, strict=True))


@backends
@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 20), E=st.integers(1, 140), K=st.integers(1, 16), H=st.integers(1, 70), seed=st.integers(0, 1000)
)
def test_route_any_shape(backend, T, E, K, H, seed):
    router = stock_router(E, min(K, E), H, F32, seed=seed)
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(seed))
    out = route(hidden, **router_arguments(router), backend=backend)
    _assert_valid_ids(out[2], E)
    _assert_gate_parity(router, hidden, out)


# --- layouts ----------------------------------------------------------------------------------------------------------


def _unaligned(x):
    """The same values, starting one element after an aligned address."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    moved = storage[1:].view(x.shape).copy_(x)
    assert moved.data_ptr() % 16 == x.element_size()
    return moved


def _layout(x, layout):
    if layout == "strided rows":
        return F.pad(x, (2, 5))[:, 2:-5]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "unaligned":
        return _unaligned(x)
    return x[:1].expand(x.shape)


# --- arguments --------------------------------------------------------------------------------------------------------

T, H, E, K, INTERMEDIATE = 5, 6, 4, 2, 3
ROUTE = {
    "hidden": torch.ones(T, H),
    "proj_weight": torch.ones(E, H),
    "scale": torch.ones(H),
    "per_expert_scale": torch.ones(E),
    "top_k": K,
    "eps": 1e-6,
    "numerics": "hf",
    "backend": "reference",
}
GATE = {"logits": torch.ones(T, E), "per_expert_scale": torch.ones(E), "top_k": K, "backend": "reference"}
MLP = {
    "hidden": torch.ones(T, H),
    "gate_up_proj": torch.ones(E, 2 * INTERMEDIATE, H),
    "down_proj": torch.ones(E, H, INTERMEDIATE),
    "index": torch.zeros(T, K, dtype=torch.int64),
    "weights": torch.ones(T, K),
    "activation": "silu",
    "backend": "reference",
}
WRONG = [
    (route, ROUTE, "hidden", [1.0, torch.ones(H), torch.ones(2, T, H), torch.ones(T, H).long()]),
    (route, ROUTE, "proj_weight", [None, torch.ones(E, H + 1), torch.ones(E, H).bfloat16(), torch.ones(E)]),
    (route, ROUTE, "scale", [torch.ones(H + 1), torch.ones(1, H), torch.ones(H).half(), 1.0]),
    (route, ROUTE, "per_expert_scale", [torch.ones(E - 1), torch.ones(E, 1), torch.ones(E).double()]),
    (route, ROUTE, "top_k", [0, E + 1, 2.0, None]),
    (route, ROUTE, "eps", [-1e-6, "small", None, math.nan]),
    (route, ROUTE, "numerics", ["fp64", None]),
    (route, ROUTE, "backend", ["cuda", None]),
    (topk_gate, GATE, "logits", [[1.0], torch.ones(E), torch.ones(T, E).int()]),
    (topk_gate, GATE, "per_expert_scale", [torch.ones(E + 1), torch.ones(T, E), torch.ones(E).long()]),
    (topk_gate, GATE, "top_k", [0, E + 1, "2"]),
    (topk_gate, GATE, "backend", ["gpu"]),
    (expert_mlp, MLP, "hidden", [None, torch.ones(H), torch.ones(1, T, H), torch.ones(T, H).int()]),
    (
        expert_mlp,
        MLP,
        "gate_up_proj",
        [
            torch.ones(E, 2 * INTERMEDIATE - 1, H),
            torch.ones(E, 2 * INTERMEDIATE, H + 1),
            torch.ones(0, 2 * INTERMEDIATE, H),
            torch.ones(2 * INTERMEDIATE, H),
            torch.ones(E, 2 * INTERMEDIATE, H).bfloat16(),
            torch.ones(E, H, 2 * INTERMEDIATE).transpose(1, 2),
        ],
    ),
    (
        expert_mlp,
        MLP,
        "down_proj",
        [
            torch.ones(E + 1, H, INTERMEDIATE),
            torch.ones(E, INTERMEDIATE, H),
            torch.ones(E, H, 2 * INTERMEDIATE),
            torch.ones(H, INTERMEDIATE),
            torch.ones(E, H, INTERMEDIATE).half(),
            torch.ones(E, INTERMEDIATE, H).transpose(1, 2),
        ],
    ),
    (expert_mlp, MLP, "index", [torch.zeros(T, K), torch.zeros(T), torch.zeros(T + 1, K).long(), [[0, 1]]]),
    (expert_mlp, MLP, "weights", [torch.ones(T, K + 1), torch.ones(T), torch.ones(T, K).long(), 1.0]),
    (expert_mlp, MLP, "activation", ["swiglu", None, "gelu_pytorch_tanh"]),
    (expert_mlp, MLP, "backend", ["sonicmoe"]),
]


@pytest.mark.parametrize(
    ("function", "good", "name", "value"),
    [(function, good, name, value) for function, good, name, values in WRONG for value in values],
    ids=[f"{f.__name__}-{name}-{n}" for f, _, name, values in WRONG for n in range(len(values))],
)
def test_a_wrong_argument_is_named(function, good, name, value):
    function(**good)
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**good | {name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: expected ")
    assert "got " in message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize(("function", "good"), [(route, ROUTE), (topk_gate, GATE), (expert_mlp, MLP)])
def test_a_tensor_on_another_device_is_named(function, good):
    tensors = [name for name, value in good.items() if isinstance(value, torch.Tensor)]
    for name in tensors[1:]:
        with pytest.raises(ValueError, match=f"^{name}: expected device cpu"):
            function(**good | {name: good[name].to("meta")})


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(RuntimeError, match=r"backend: 'triton' is not available: .+"):
        expert_mlp(**MLP | {"backend": "triton"})
    with pytest.raises(RuntimeError, match="no float64 kernels"):
        topk_gate(torch.ones(T, E, dtype=F64), torch.ones(E), top_k=K, backend="cpu")


# --- torch.library ----------------------------------------------------------------------------------------------------

OPS = torch.ops.omnigene_fast
FORWARDS, BACKWARDS = ("route_fwd", "topk_gate_fwd", "expert_mlp_fwd"), ("route_bwd", "topk_gate_bwd", "expert_mlp_bwd")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def _op_arguments(name, dtype, backend):
    """Arguments of an operator in the order of its schema: all that is optional is there, all gradients are wanted."""
    hidden, router, experts = torch.randn(9, 67).to(dtype), _router(16, 4, 67, dtype), _experts(16, 67, 35, dtype)
    parameters = [p.detach() for p in (router.proj.weight, router.scale, router.per_expert_scale)]
    probabilities, weights, index = reference.route(hidden, *parameters, top_k=4, eps=1e-6)
    factors = (torch.randn(16, size, 5).to(dtype) / 8 for size in (70, 67, 67, 35))
    lora = [factor if n % 2 == 0 else factor.mT.contiguous() for n, factor in enumerate(factors)]
    block = (hidden, experts.gate_up_proj.detach(), experts.down_proj.detach(), index, weights, *lora, None, None)
    grads = torch.randn_like(probabilities), torch.randn_like(weights)
    return {
        "route_fwd": (hidden, *parameters, 4, 1e-6, "hf", backend),
        "route_bwd": (*grads, hidden, *parameters, probabilities, index, 1e-6, [True] * 4, backend),
        "topk_gate_fwd": (torch.randn(9, 16).to(dtype), parameters[2], 4, backend),
        "topk_gate_bwd": (*grads, probabilities, index, parameters[2], dtype, [True] * 2, backend),
        "expert_mlp_fwd": (*block, "gelu_tanh", True, True, backend),
        "expert_mlp_bwd": (
            torch.randn_like(hidden),
            *block,
            OPS.expert_mlp_fwd(*block, "gelu_tanh", True, True, backend)[1],
            "gelu_tanh",
            True,
            [True] * 8,
            backend,
        ),
    }[name]


def _opcheck(name, arguments):
    result = torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=CHECKS)
    assert dict.fromkeys(CHECKS, "SUCCESS") == result


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", FORWARDS)
def test_opcheck_with_gradients(name, dtype, backend):
    arguments = _op_arguments(name, dtype, backend)
    _opcheck(
        name,
        tuple(
            argument.clone().requires_grad_()
            if isinstance(argument, torch.Tensor) and argument.is_floating_point()
            else argument
            for argument in arguments
        ),
    )


@backends
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
def test_opcheck(name, dtype, backend):
    _opcheck(name, _op_arguments(name, dtype, backend))


@backends
@pytest.mark.parametrize("name", BACKWARDS)
def test_opcheck_of_a_backward_that_is_asked_for_nothing(name, backend):
    """Gradients that nobody needs come back empty, and absent gradients and factors are no special case."""
    arguments = [
        None if n < 2 and name != "expert_mlp_bwd" else a for n, a in enumerate(_op_arguments(name, F32, backend))
    ]
    if name == "expert_mlp_bwd":
        arguments[6:10] = [None] * 4
    arguments[-2] = [False] * len(arguments[-2])
    _opcheck(name, tuple(arguments))
    assert [out.numel() for out in getattr(OPS, name)(*arguments)] == [0] * len(arguments[-2])


@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_fake_and_meta_tensors(name, dtype):
    """Shapes, dtypes and strides come without data, and so without a synchronisation."""
    arguments = _op_arguments(name, dtype, "auto")
    real = getattr(OPS, name)(*arguments)
    with FakeTensorMode() as mode:
        fake = getattr(OPS, name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    meta = getattr(OPS, name)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    for r, f, m in zip(real, fake, meta, strict=True):
        assert m.device.type == "meta"
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()) == (m.shape, m.dtype, m.stride())


@backends
@pytest.mark.parametrize("dynamic", [False, True])
def test_public_functions_compile_to_one_graph(dynamic, backend):
    router, experts = _router(16, 4, 67, F32), _experts(16, 67, 35, F32)

    def block(hidden):
        probabilities, weights, index = route(hidden, **router_arguments(router), backend=backend)
        _, again, _ = topk_gate(probabilities.log(), router.per_expert_scale, top_k=4, backend=backend)
        return _run(experts, hidden, index, weights, backend), weights, again

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (7, 12):
        hidden = torch.randn(T, 67)
        for mine, same in zip(compiled(hidden), block(hidden), strict=True):
            assert torch.equal(mine, same)


@backends
def test_autocast_does_not_reach_inside_the_operators(backend):
    """The dtypes of the arguments decide, whatever autocast says."""
    router, experts = _router(16, 4, 67, F32), _experts(16, 67, 35, F32)
    hidden = torch.randn(9, 67)
    _, weights, index = expected = route(hidden, **router_arguments(router), backend=backend)
    mlp = _run(experts, hidden, index, weights, backend)
    with torch.autocast("cpu", torch.bfloat16):
        for mine, same in zip(route(hidden, **router_arguments(router), backend=backend), expected, strict=True):
            assert torch.equal(mine, same)
        assert torch.equal(_run(experts, hidden, index, weights, backend), mlp)


@backends
@pytest.mark.parametrize(("function", "good"), [(route, ROUTE), (topk_gate, GATE), (expert_mlp, MLP)])
def test_outputs_want_a_gradient_where_an_input_does(function, good, backend):
    """For every argument alone, in eager mode and in a compiled graph; the values do not change."""
    good = good | {"backend": backend}
    expected = function(**good)
    wanting = [n for n, v in good.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    for name, call in itertools.product(
        wanting, (function, torch.compile(function, fullgraph=True, backend="aot_eager"))
    ):
        leaf = good[name].clone().requires_grad_()
        out = call(**good | {name: leaf})
        outs = out if isinstance(out, tuple) else (out,)
        for mine, same in zip(outs, expected if isinstance(expected, tuple) else (expected,), strict=True):
            assert torch.equal(mine, same)
            assert mine.requires_grad == mine.is_floating_point()
        (outs[0] if len(outs) == 1 else outs[1]).sum().backward()
        assert leaf.grad is not None, name


def test_there_are_no_second_derivatives():
    hidden = torch.ones(T, H, requires_grad=True)
    out = expert_mlp(**MLP | {"hidden": hidden})
    (grad,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()
    loss = lambda hidden: expert_mlp(**MLP | {"hidden": hidden}).square().sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(hidden.detach())
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(loss, (hidden.detach(),), (torch.ones(T, H),))


def _function_of_all(backend):
    """Router, gate and experts of one layer, as a function of everything that has a gradient."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    E, K, width = 6, 2, 8
    arguments = (
        draw(E, H), draw(H), draw(E), draw(E, 2 * width, H), draw(E, H, width),
        draw(E, 2 * width, 2), draw(E, 2, H), draw(E, H, 2), draw(E, 2, width), draw(H, E),
    )  # fmt: skip

    def loss(hidden, proj, scale, expert_scale, gate_up, down, up_lhs, up_rhs, down_lhs, down_rhs, other):
        probabilities, weights, index = ops.route(hidden, proj, scale, expert_scale, top_k=K, eps=1e-6, backend=backend)
        _, more, _ = ops.topk_gate(hidden @ other, expert_scale, top_k=K, backend=backend)
        out = expert_mlp(
            hidden, gate_up, down, index, weights, activation="gelu_tanh", backend=backend,
            gate_up_lora=(up_lhs, up_rhs), down_lora=(down_lhs, down_rhs),
        )  # fmt: skip
        return out.square().mean() + probabilities.square().sum() + more.square().sum()

    return loss, (draw(3, T, H), *arguments)


@pytest.mark.parametrize("backend", backend_params())
def test_torch_func_gives_the_gradients_of_autograd(backend):
    """grad, vjp, vmap and per-sample gradients, by torch's own rules for operators."""
    loss, (samples, *weights) = _function_of_all(backend)
    everything = tuple(range(1 + len(weights)))
    expected = []
    for hidden in samples:
        leaves = [x.clone().requires_grad_() for x in (hidden, *weights)]
        expected.append(torch.autograd.grad(loss(*leaves), leaves))
    for grads in (
        torch.func.grad(loss, everything)(samples[0], *weights),
        torch.func.vjp(loss, samples[0], *weights)[1](torch.tensor(1.0)),
    ):
        for mine, theirs in zip(grads, expected[0], strict=True):
            assert torch.equal(mine, theirs)
    over_samples = (0, *(None for _ in weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch runs the samples one after the other, and says that this is slow
        values = torch.func.vmap(loss, over_samples)(samples, *weights)
        each = torch.func.vmap(torch.func.grad(loss, everything), over_samples)(samples, *weights)
    assert torch.allclose(values, torch.stack([loss(hidden, *weights) for hidden in samples]), rtol=1e-6)
    for mine, *theirs in zip(each, *expected, strict=True):
        assert relative_error(mine, torch.stack(theirs)) < 1e-6


def test_no_graph_is_kept_without_grad():
    hidden = torch.ones(T, H, requires_grad=True)
    with torch.no_grad():
        assert not expert_mlp(**MLP | {"hidden": hidden}).requires_grad
    with torch.inference_mode():
        assert expert_mlp(**MLP | {"hidden": hidden}).is_inference()


def test_check_ids_reads_the_bounds():
    ops.check_ids(torch.tensor([[0, 3]]), 4, expert_parallel=False)
    ops.check_ids(torch.tensor([[0, 9]]), 4, expert_parallel=True)
    ops.check_ids(torch.empty(0, 2, dtype=torch.int64), 4, expert_parallel=False)
    for index, parallel in ((4, False), (-1, False), (-1, True)):
        with pytest.raises(IndexError, match=f"got {index}"):
            ops.check_ids(torch.tensor([[0, index]]), 4, expert_parallel=parallel)
