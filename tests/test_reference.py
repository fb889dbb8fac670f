"""The oracle itself, against transformers' own modules and against arithmetic done by hand."""

import math

import pytest
import torch

from omnigene_fast import reference

from .helpers import experts_truth, relative_error, router_arguments, routing, stock_experts, stock_router


@pytest.mark.parametrize("mode", ["uniform", "language", "protein"])
def test_experts_equal_transformers_in_float64(mode):
    experts = stock_experts(E=16, H=67, intermediate=35, dtype=torch.float64)
    hidden = torch.randn(33, 67, dtype=torch.float64)
    index, weights = routing(mode, 33, 4, 16, seed=1)
    expected = experts(hidden, index, weights.double())
    assert relative_error(experts_truth(experts, hidden, index, weights), expected) < 1e-14


def test_one_expert_by_hand():
    hidden = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    gate_up = torch.tensor([[[0.5, -1.0], [3.0, 1.0]]], dtype=torch.float64)  # E=1, I=1: gate = -1.5, up = 5
    down = torch.tensor([[[2.0], [-1.0]]], dtype=torch.float64)
    for activation, act in (
        ("gelu", -1.5 * 0.5 * (1 + math.erf(-1.5 / math.sqrt(2)))),
        ("gelu_tanh", -1.5 * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (-1.5 + 0.044715 * -(1.5**3))))),
        ("silu", -1.5 / (1 + math.exp(1.5))),
    ):
        out = reference.expert_mlp(
            hidden, gate_up, down, torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 0.25), activation=activation
        )
        expected = 0.25 * act * 5.0 * torch.tensor([[2.0, -1.0]], dtype=torch.float64)
        assert torch.allclose(out, expected, rtol=1e-13, atol=0), activation


def test_sentinels_contribute_nothing():
    experts = stock_experts(E=4, H=6, intermediate=5, dtype=torch.float64)
    hidden = torch.randn(3, 6, dtype=torch.float64)
    index = torch.tensor([[0, 4], [4, 4], [2, 3]])
    weights = torch.rand(3, 2)
    out = experts_truth(experts, hidden, index, weights)
    kept = torch.where(index < 4, weights, 0)
    expected = experts_truth(experts, hidden, index.clamp(max=3), kept)
    assert torch.equal(out[1], torch.zeros(6, dtype=torch.float64))
    assert relative_error(out, expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_is_bit_equal_to_transformers_in_hf_numerics(dtype):
    router = stock_router(E=32, K=4, H=67, dtype=dtype)
    hidden = torch.randn(65, 67).to(dtype)
    probabilities, weights, index = router(hidden)
    ours = reference.route(hidden, **router_arguments(router), numerics="hf")
    assert torch.equal(ours[0], probabilities)
    # Sorted by id, because torch.topk may order equal probabilities either way.
    for mine, stock in zip(_sorted(ours[2], ours[1]), _sorted(index, weights), strict=True):
        same_set = (_sorted(ours[2], ours[1])[0] == _sorted(index, weights)[0]).all(-1)
        assert torch.equal(mine[same_set], stock[same_set])
        assert same_set.float().mean() > 0.9


def test_fp32_numerics_round_less_than_hf():
    router = stock_router(E=32, K=4, H=67, dtype=torch.bfloat16)
    hidden = torch.randn(200, 67).bfloat16()
    truth = reference.route(hidden.double(), **router_arguments(router, torch.float64))[0]
    hf, fp32 = (
        relative_error(reference.route(hidden, **router_arguments(router), numerics=numerics)[0], truth)
        for numerics in reference.NUMERICS
    )
    assert fp32 < 1e-6 < 1e-4 < hf


def test_ties_go_to_the_lowest_expert():
    _, weights, index = reference.topk_gate(torch.full((3, 16), 0.5), torch.ones(16), top_k=5)
    assert torch.equal(index, torch.arange(5).expand(3, 5))
    assert torch.allclose(weights, torch.full((3, 5), 0.2))


def test_per_expert_scale_multiplies_after_the_renormalisation():
    logits = torch.tensor([[0.0, math.log(3.0), -50.0]], dtype=torch.float64)
    scale = torch.tensor([10.0, 2.0, 7.0], dtype=torch.float64)
    _, weights, index = reference.topk_gate(logits, scale, top_k=2)
    assert index.tolist() == [[1, 0]]
    assert torch.allclose(weights, torch.tensor([[0.75 * 2.0, 0.25 * 10.0]], dtype=torch.float64))


def _sorted(index, weights):
    order = index.argsort(-1)
    return index.gather(-1, order), weights.gather(-1, order)
