"""What only a GPU can show, at Gemma-4's sizes: the same criterion, streams, graph capture, offsets past 2^31."""

import pytest
import torch

from omnigene_fast import ops, reference

from .. import helpers

pytestmark = pytest.mark.gpu
E, K, H, I = 128, 8, 2816, 704  # noqa: E741


@pytest.fixture(scope="module")
def experts():
    return helpers.stock_experts(E, H, I, torch.bfloat16).to("cuda")


def inputs(T, mode):
    index, weights = helpers.routing(mode, T, K, E, seed=T)
    return torch.randn(T, H, device="cuda").bfloat16(), index.cuda(), weights.cuda()


def run(experts, hidden, index, weights):
    weights_of_experts = (experts.gate_up_proj, experts.down_proj)
    return ops.expert_mlp(hidden, *weights_of_experts, index, weights, activation="gelu_tanh", backend="triton")


@pytest.mark.parametrize("mode", helpers.ROUTINGS)
@pytest.mark.parametrize("T", [1, 2, 7, 16, 17, 127, 128, 129, 511, 4096])
def test_experts_as_accurate_as_transformers(experts, T, mode):
    hidden, index, weights = inputs(T, mode)
    truth = torch.zeros(T, H, dtype=torch.float64, device="cuda")
    for expert in index.unique().tolist():  # float64 copies of one expert at a time
        token, pick = torch.where(index == expert)
        truth.index_add_(
            0,
            token,
            reference.expert_mlp(
                hidden[token].double(),
                experts.gate_up_proj[expert, None].double(),
                experts.down_proj[expert, None].double(),
                torch.zeros_like(token)[:, None],
                weights[token, pick, None].double(),
                activation="gelu_tanh",
            ),
        )
    out = run(experts, hidden, index, weights)
    helpers.assert_as_accurate(out, experts(hidden, index, weights.bfloat16()), truth, mode)


@pytest.mark.parametrize("numerics", reference.NUMERICS)
@pytest.mark.parametrize("T", [1, 16, 255, 256, 4096])
def test_router_as_accurate_as_transformers(T, numerics):
    router = helpers.stock_router(E, K, H, torch.bfloat16).to("cuda")
    hidden = torch.randn(T, H, device="cuda").bfloat16()
    probabilities, _, index = ops.route(hidden, **helpers.router_arguments(router), numerics=numerics, backend="triton")
    truth, _, _ = reference.route(hidden.double(), **helpers.router_arguments(router, torch.float64))
    stock, _, stock_index = router(hidden)
    helpers.assert_as_accurate(probabilities, stock, truth)
    if numerics == "hf":
        same = (index.sort(-1).values == stock_index.sort(-1).values).all(-1).float().mean()
        assert same > 0.97


def test_same_bits_twenty_times(experts):
    case = inputs(512, "language")
    first = run(experts, *case)
    assert all(torch.equal(run(experts, *case), first) for _ in range(20))


def test_launches_go_to_the_current_stream(experts):
    hidden, index, weights = inputs(64, "uniform")
    expected = run(experts, hidden, index, weights)
    late = torch.empty_like(hidden)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(hidden)  # on another stream the kernels would read it too early
        out = run(experts, late, index, weights)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_capture_in_a_cuda_graph(experts):
    """Capture refuses any synchronisation; a replay follows new ids and values."""
    router = helpers.stock_router(E, K, H, torch.bfloat16).to("cuda")
    hidden, _, _ = inputs(64, "uniform")

    def block():
        _, weights, index = ops.route(hidden, **helpers.router_arguments(router), backend="triton")
        return run(experts, hidden, index, weights)

    block()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block()
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    assert torch.equal(out, block())


def test_offsets_past_two_to_the_31(experts):
    """T * K * H passes 2^31 near 95,000 tokens; the last tokens must equal the same tokens alone."""
    T = 100_000
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    index, weights = helpers.routing("uniform", 512, K, E, seed=0)
    index, weights = (tensor.cuda().repeat(T // 512 + 1, 1)[:T] for tensor in (index, weights))
    hidden = torch.randn(512, H, device="cuda").bfloat16().repeat(T // 512 + 1, 1)[:T]
    out = run(experts, hidden, index, weights)
    alone = run(experts, hidden[-512:], index[-512:], weights[-512:])  # other tiles, so other roundings
    assert out.isfinite().all()
    assert helpers.relative_error(out[-512:], alone) < 1e-2
