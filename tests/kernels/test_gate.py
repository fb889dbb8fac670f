"""The router kernels against transformers' own router and the float64 reference."""

import pytest
import torch

from omnigene_fast import ops, reference
from omnigene_fast.kernels import tiles

from .. import helpers
from . import gate_forms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=list(gate_forms.FORMS))
def path(request, monkeypatch):
    """Every form of the router: see gate.py."""
    gate_forms.force(monkeypatch, request.param)
    return request.param


def route(hidden, arguments, numerics):
    return ops.route(hidden, **arguments, numerics=numerics, backend="triton")


def router_case(device, dtype, T=17, E=6, K=2, H=40, magnitude=1.0, seed=0):
    router = helpers.stock_router(E, K, H, dtype, seed=seed).to(device)
    hidden = (torch.randn(T, H, generator=torch.Generator().manual_seed(seed + 1)) * magnitude).to(device, dtype)
    return router, hidden, helpers.router_arguments(router)


def check_choice(probabilities, weights, index, per_expert_scale):
    """Weights and ids follow from the kernel's own probabilities, ties to the lowest id."""
    K = index.shape[1]
    wanted = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices[:, :K]
    assert torch.equal(index, wanted)
    top = probabilities.double().gather(1, index)
    expected = top / top.sum(-1, keepdim=True) * per_expert_scale.double()[index]
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("numerics", reference.NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "E", "K", "H"), [(1, 6, 1, 40), (17, 6, 6, 47), (16, 60, 8, 130), (7, 128, 8, 64), (2, 257, 3, 33)]
)
def test_as_accurate_as_transformers(device, path, dtype, numerics, T, E, K, H):
    router, hidden, arguments = router_case(device, dtype, T, E, K, H)
    probabilities, weights, index = route(hidden, arguments, numerics)
    assert (probabilities.dtype, weights.dtype, index.dtype) == (torch.float32, torch.float32, torch.int64)
    wide = helpers.router_arguments(router, torch.float64)
    truth, _, _ = reference.route(hidden.double(), **wide, numerics=numerics)
    stock, _, stock_index = router(hidden)
    helpers.assert_as_accurate(probabilities, stock, truth)
    check_choice(probabilities, weights, index, router.per_expert_scale)
    if numerics == "fp32" and dtype == torch.bfloat16:
        assert helpers.relative_error(probabilities, truth) < 1e-5
    if numerics == "hf" and K < E:
        log = torch.sort(stock.double().log(), dim=-1, descending=True).values
        clear = log[:, K - 1] - log[:, K] > 0.1  # the last place is not a matter of rounding
        assert torch.equal(index.sort(-1).values[clear], stock_index.sort(-1).values[clear])


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes(device, path, dtype, magnitude):
    router, hidden, arguments = router_case(device, dtype, 16, 16, 4, 40, magnitude)
    probabilities, weights, index = route(hidden, arguments, "hf")
    truth, _, _ = reference.route(hidden.double(), **helpers.router_arguments(router, torch.float64))
    helpers.assert_as_accurate(probabilities, router(hidden)[0], truth)
    check_choice(probabilities, weights, index, router.per_expert_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hf_rounds_where_transformers_rounds(device, path, dtype):
    """With a projection that only picks columns no sum can hide a rounding: equal up to the softmax's own error."""
    _, hidden, arguments = router_case(device, dtype, 33, 40, 8, 40)
    arguments["proj_weight"] = torch.eye(40, dtype=dtype, device=device)
    ours, _, index = route(hidden, arguments, "hf")
    wanted, _, wanted_index = reference.route(hidden, **arguments, numerics="hf")
    assert helpers.relative_error(ours, wanted) < 1e-6
    assert torch.equal(index, wanted_index)
    unrounded, _, _ = route(hidden, arguments, "fp32")
    assert helpers.relative_error(unrounded, wanted) > 1e-5


def test_ties_go_to_the_lowest_id(device, path):
    for E, K in ((6, 6), (60, 8), (128, 8)):
        _, hidden, arguments = router_case(device, torch.bfloat16, 3, E, K, 40)
        arguments["proj_weight"] = torch.zeros_like(arguments["proj_weight"])
        _, _, index = route(hidden, arguments, "hf")
        assert index.tolist() == [list(range(K))] * 3


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("numerics", reference.NUMERICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_poisoned_token_stays_alone(device, path, dtype, numerics, poison):
    _, hidden, arguments = router_case(device, dtype, 5, 6, 3, 40)
    clean = route(hidden, arguments, numerics)
    hidden[2, 7] = poison
    probabilities, weights, index = route(hidden, arguments, numerics)
    assert weights[2].isnan().all()
    assert probabilities[2].isnan().all()
    assert index[2].tolist() == [0, 1, 2]
    others = [0, 1, 3, 4]
    for ours, before in zip((probabilities, weights, index), clean, strict=True):
        assert torch.equal(ours[others], before[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("E", "K"), [(6, 1), (6, 6), (128, 8), (257, 5), (700, 4)])
def test_topk_gate(device, dtype, E, K):
    logits = torch.randn(17, E, device=device).to(dtype)
    expert_scale = torch.rand(E, device=device) + 0.5
    probabilities, weights, index = ops.topk_gate(logits, expert_scale, top_k=K, backend="triton")
    truth, true_weights, _ = reference.topk_gate(logits.double(), expert_scale.double(), top_k=K)
    assert helpers.relative_error(probabilities, truth) < 1e-6
    assert helpers.relative_error(weights, true_weights) < 1e-6
    check_choice(probabilities, weights, index, expert_scale)


def test_topk_gate_takes_extreme_logits(device):
    logits = torch.tensor([[1e38, -1e38, 0, 3, -torch.inf, 1], [-torch.inf] * 6, [0, torch.inf, 1, 2, 3, 4]])
    probabilities, weights, index = ops.topk_gate(
        logits.to(device), torch.ones(6, device=device), top_k=3, backend="triton"
    )
    assert probabilities[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert index.tolist() == [[0, 1, 2]] * 3
    assert weights[0].tolist() == [1, 0, 0]
    assert weights[1:].isnan().all()


def test_strided_inputs(device, path):
    router, hidden, arguments = router_case(device, torch.bfloat16, 9, 16, 4, 40)
    expected = route(hidden, arguments, "hf")
    row_strided = torch.stack([hidden, hidden], 1).flatten(1)[:, :40]
    transposed = hidden.t().contiguous().t()
    for view in (row_strided, transposed):
        assert not view.is_contiguous()
        for ours, wanted in zip(route(view, arguments, "hf"), expected, strict=True):
            assert torch.equal(ours, wanted)
    wide_projection = torch.cat([router.proj.weight] * 2, 1)[:, :40]
    for ours, wanted in zip(route(hidden, arguments | {"proj_weight": wide_projection}, "hf"), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_no_tokens(device, path):
    _, hidden, arguments = router_case(device, torch.bfloat16, 1, 6, 2, 40)
    shapes = [list(output.shape) for output in route(hidden[:0], arguments, "hf")]
    assert shapes == [[0, 6], [0, 2], [0, 2]]


def test_many_tokens(device):
    """As the tokens grow, one launch turns into two; products of float32 go to torch's GEMM. All agree with the
    reference."""
    for dtype, numerics, T in ((torch.float32, "hf", 300), (torch.bfloat16, "fp32", 300), (torch.bfloat16, "fp32", 65)):
        _, hidden, arguments = router_case(device, dtype, T, 6, 2, 40)
        probabilities, _, index = route(hidden, arguments, numerics)
        wanted, _, wanted_index = reference.route(hidden, **arguments, numerics=numerics)
        assert helpers.relative_error(probabilities, wanted) < 1e-6
        assert (index == wanted_index).float().mean() > 0.99


def test_the_rule_splits_the_projection_while_there_are_few_tokens():
    """At Gemma-4's sizes on an H100: no multiprocessor takes in the whole projection before there are 1,000 tokens."""
    forms = [tiles.route_tile(T, 128, 2816, torch.bfloat16, "hf", 90) for T in (1, 16, 64, 256, 512, 1024, 4096, 16384)]
    assert [(form.block_t, form.block_n, form.select) for form in forms] == [
        (1, 4, True),
        (1, 4, True),
        (16, 16, True),
        (16, 16, True),
        (16, 32, True),
        (16, 64, True),
        (64, 64, False),
        (128, 128, False),
    ]
    assert set(forms) <= {tile for _, numerics, tile in tiles.all_route_tiles(128, 90) if numerics == "hf"}
    assert not tiles.route_tile(4, 600, 64, torch.bfloat16, "hf", 90).select


def test_same_bits_every_time(device, path):
    _, hidden, arguments = router_case(device, torch.bfloat16, 33, 16, 4, 40)
    first = route(hidden, arguments, "hf")
    for _ in range(3):
        for ours, before in zip(route(hidden, arguments, "hf"), first, strict=True):
            assert torch.equal(ours, before)


def test_negative_control_wrong_eps_or_scale_fails(device, path):
    router, hidden, arguments = router_case(device, torch.float32, 16, 16, 4, 40, magnitude=0.1)
    truth, _, _ = reference.route(hidden.double(), **helpers.router_arguments(router, torch.float64))
    stock = router(hidden)[0]
    for wrong in ({"eps": 1e-4}, {"scale": torch.ones_like(router.scale)}):
        probabilities, _, _ = route(hidden, arguments | wrong, "hf")
        with pytest.raises(AssertionError, match="relative error"):
            helpers.assert_as_accurate(probabilities, stock, truth)
