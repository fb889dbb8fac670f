"""The decode kernels on a GPU at Gemma-4's width: parity, bits over 20 runs, and a CUDA graph with changing routing."""

import pytest
import torch

from omnigene_fast import ops
from omnigene_fast.backends import Scales
from omnigene_fast.cuda import decode, unavailable

from .. import helpers
from .test_decode import quantise, truth_of

REASON = unavailable(torch.device("cuda")) if torch.cuda.is_available() else "torch finds no CUDA GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
E, K, H, I = 32, 8, 2816, 704  # noqa: E741


def layer(T, dtype=torch.bfloat16, seed=0):
    experts = helpers.stock_experts(E, H, I, dtype, seed=seed).cuda()
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(seed + 1)).to("cuda", dtype)
    index, weights = (x.cuda() for x in helpers.routing("uniform", T, K, E, seed))
    return experts, (hidden, experts.gate_up_proj.detach(), experts.down_proj.detach(), index, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 2, 7, 16])
def test_as_accurate_as_transformers(T, dtype):
    experts, arguments = layer(T, dtype)
    plain = decode.expert_mlp(*arguments, "gelu_tanh")
    hidden, _, _, index, weights = arguments
    helpers.assert_as_accurate(plain, experts(hidden, index, weights.to(dtype)), truth_of(arguments))
    for _ in range(20):
        assert torch.equal(decode.expert_mlp(*arguments, "gelu_tanh"), plain)


@pytest.mark.parametrize("weight", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_low_bit(weight):
    _, (hidden, gate_up, down, index, weights) = layer(5)
    (gate_up, gate_up_scale), (down, down_scale) = quantise(gate_up, weight), quantise(down, weight)
    arguments, scales = (hidden, gate_up, down, index, weights), Scales(gate_up_scale, down_scale)
    out = decode.expert_mlp(*arguments, "gelu_tanh", scales)
    assert helpers.relative_error(out, truth_of(arguments, scales)) < 5e-3


def test_a_graph_serves_every_routing():
    """Captured once; then other ids, weights and hidden states are copied in, and it is replayed."""
    _, (hidden, gate_up, down, index, weights) = layer(4)

    def call():
        return ops.expert_mlp(hidden, gate_up, down, index, weights, activation="gelu_tanh")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in range(1, 6):
        new_index, new_weights = helpers.routing("uniform", 4, K, E, seed)
        hidden.copy_(torch.randn(4, H, generator=torch.Generator().manual_seed(seed)))
        index.copy_(new_index)
        weights.copy_(new_weights)
        graph.replay()
        assert torch.equal(out, call())
        assert helpers.relative_error(out, truth_of((hidden, gate_up, down, index, weights))) < 1e-2
