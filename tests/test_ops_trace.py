"""The gate's record of its own decision: what stands in the buffers is what the operator returned."""

import pytest
import torch
from torch import Tensor

from omnigene_fast import ops, reference
from omnigene_fast.ops import TraceBuffers

from .helpers import backend_params, relative_error, router_arguments, stock_router

backends = pytest.mark.parametrize("backend", backend_params())
UNUSED = -1  # as int16 the bits of 65535; as uint8 255


def buffers(T_max: int, K: int, E: int, kinds: tuple[str, ...] = ("weights", "stats")) -> TraceBuffers:
    ids = torch.full((T_max, K), 255 if E <= 254 else UNUSED, dtype=torch.uint8 if E <= 254 else torch.int16)
    weights = torch.full((T_max, K), -7.0, dtype=torch.float16) if "weights" in kinds else None
    stats = torch.full((T_max, 3), -7.0, dtype=torch.float16) if "stats" in kinds else None
    return TraceBuffers(ids, weights, stats)


def as_ids(ids: Tensor) -> Tensor:
    return ids.long() & (0xFF if ids.dtype == torch.uint8 else 0xFFFF)


def case(E: int, K: int, T: int, dtype: torch.dtype, H: int = 40):
    router = stock_router(E, K, H, dtype)
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(dtype), router_arguments(router)


def true_statistics(probabilities: Tensor, K: int) -> Tensor:
    """Entropy, mass and margin from sorted probabilities in float64: another way than the kernels'."""
    p = probabilities.double()
    top = p.sort(-1, descending=True).values
    after = top[:, K] if p.shape[1] > K else torch.zeros(len(p), dtype=torch.float64)
    entropy = torch.special.entr(p).sum(-1)
    return torch.stack([entropy, top[:, :K].sum(-1), top[:, K - 1] - after], dim=-1)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("E", "K"), [(6, 1), (6, 6), (128, 8), (254, 8), (255, 8), (256, 8), (257, 3), (512, 8)])
@pytest.mark.parametrize("T", [1, 7, 65])
def test_records_what_it_returns(E, K, T, dtype, backend):
    hidden, arguments = case(E, K, T, dtype)
    trace = buffers(T + 3, K, E)
    probabilities, weights, index = ops.route(hidden, **arguments, backend=backend, trace=trace)
    assert torch.equal(as_ids(trace.ids[:T]), index)
    assert torch.equal(trace.weights[:T], weights.half())
    expected = true_statistics(probabilities, K)
    assert (trace.stats[:T].double() - expected).abs().max() <= 2e-3 * expected.abs().max()
    assert (as_ids(trace.ids[T:]) == (255 if E <= 254 else 65535)).all(), "rows past T were written"
    assert (trace.weights[T:] == -7).all()
    assert (trace.stats[T:] == -7).all()


@backends
def test_the_trace_changes_no_bit_of_the_result(backend):
    hidden, arguments = case(128, 8, 33, torch.bfloat16)
    plain = ops.route(hidden, **arguments, backend=backend)
    for kinds in ((), ("weights",), ("stats",), ("weights", "stats")):
        traced = ops.route(hidden, **arguments, backend=backend, trace=buffers(33, 8, 128, kinds))
        assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True)), kinds
    logits = torch.randn(33, 128)
    plain = ops.topk_gate(logits, torch.ones(128), top_k=8, backend=backend)
    trace = buffers(33, 8, 128)
    traced = ops.topk_gate(logits, torch.ones(128), top_k=8, backend=backend, trace=trace)
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    assert torch.equal(as_ids(trace.ids), plain[2])


@backends
def test_statistics_are_told_apart_from_a_double_softmax(backend):
    """22: moewatch takes the softmax of a softmax: 3.98 bits where 2.4 is true."""
    logits = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)) * 3
    trace = buffers(9, 8, 128)
    probabilities, _, _ = ops.topk_gate(logits, torch.ones(128), top_k=8, backend=backend, trace=trace)
    entropy = trace.stats[:, 0].double()
    wrong = torch.special.entr(probabilities.double().softmax(-1)).sum(-1)
    assert (entropy - torch.special.entr(logits.double().softmax(-1)).sum(-1)).abs().max() < 4e-3
    assert (entropy - wrong).abs().min() > 0.5


@backends
def test_minus_infinity_among_the_logits(backend):
    logits = torch.randn(3, 20)
    logits[:, 5:] = -torch.inf
    trace = buffers(3, 5, 20)
    probabilities, _, _ = ops.topk_gate(logits, torch.ones(20), top_k=5, backend=backend, trace=trace)
    expected = true_statistics(probabilities, 5)
    assert (trace.stats.double() - expected).abs().max() < 2e-3


@backends
@pytest.mark.parametrize(("E", "code"), [(20, 254), (254, 254), (255, 65534), (300, 65534)])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("kinds", [(), ("weights", "stats")])
def test_a_poisoned_token_is_recorded_as_such(kinds, poison, E, code, backend):
    """No expert's id, and none that says "not written"; what the gate returns is as it was."""
    logits = torch.randn(3, E)
    logits[1, 4] = poison
    trace = buffers(3, 4, E, kinds)
    _, weights, index = ops.topk_gate(logits, torch.ones(E), top_k=4, backend=backend, trace=trace)
    assert as_ids(trace.ids[1]).tolist() == [code] * 4
    assert torch.equal(as_ids(trace.ids[[0, 2]]), index[[0, 2]])
    assert weights[1].isnan().all()
    assert ((index[1] >= 0) & (index[1] < E)).all()
    assert index[1].unique().numel() == 4
    if kinds:
        assert trace.weights[1].isnan().all()
        assert trace.stats[1].isnan().all()
        assert trace.weights[[0, 2]].isfinite().all()


@backends
def test_gradients_are_those_without_a_trace(backend):
    results = []
    for trace in (None, buffers(17, 8, 128)):
        hidden, arguments = case(128, 8, 17, torch.float32)
        leaves = [hidden.requires_grad_(), arguments["proj_weight"].clone().requires_grad_()]
        arguments["proj_weight"] = leaves[1]
        probabilities, weights, _ = ops.route(hidden, **arguments, backend=backend, trace=trace)
        results.append(torch.autograd.grad(weights.square().sum() + probabilities.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].abs().max() > 0


@backends
def test_opcheck(backend):
    hidden, arguments = case(6, 2, 5, torch.float32)
    hidden.requires_grad_()
    tensors = hidden, arguments["proj_weight"], arguments["scale"], arguments["per_expert_scale"]
    for kinds in ((), ("weights", "stats")):
        torch.library.opcheck(
            torch.ops.omnigene_fast.route_traced_fwd,
            (*tensors, 2, 1e-6, "hf", backend, *buffers(5, 2, 6, kinds)),
        )
        torch.library.opcheck(
            torch.ops.omnigene_fast.topk_gate_traced_fwd,
            (torch.randn(5, 6, requires_grad=True), torch.ones(6), 2, backend, *buffers(5, 2, 6, kinds)),
        )


@backends
def test_compiled_fullgraph_with_gradients(backend):
    hidden, arguments = case(128, 8, 17, torch.float32)
    hidden.requires_grad_()
    trace = buffers(20, 8, 128)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, trace):
        _, weights, index = ops.route(x * 1.0, **arguments, backend=backend, trace=trace)
        return weights.sum(), index

    total, index = run(hidden, trace)
    total.backward()
    assert torch.equal(as_ids(trace.ids[:17]), index)
    assert (trace.ids[17:] == 255).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(4, 2, dtype=torch.int64)}, "trace.ids: expected dtype uint8, int16, got int64"),
        ({"ids": torch.zeros(3, 2, dtype=torch.uint8)}, r"T_max >= 4, got shape \[3, 2\]"),
        ({"ids": torch.zeros(4, 4, dtype=torch.uint8)[:, ::2]}, "expected contiguous"),
        ({"weights": torch.zeros(4, 2)}, "trace.weights: expected dtype float16, got float32"),
        ({"stats": torch.zeros(4, 2, dtype=torch.float16)}, r"trace.stats: expected contiguous \[T_max, 3\]"),
    ],
)
def test_wrong_buffers_are_refused_in_a_sentence(change, message):
    trace = buffers(4, 2, 6)._replace(**change)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.topk_gate(torch.randn(4, 6), torch.ones(6), top_k=2, trace=trace)


@backends
def test_wide_ids_may_hold_few_experts(backend):
    """The layer of a model of which another one has more experts."""
    logits = torch.randn(4, 20)
    logits[1, 3] = torch.nan
    trace = TraceBuffers(torch.full((4, 2), UNUSED, dtype=torch.int16))
    _, _, index = ops.topk_gate(logits, torch.ones(20), top_k=2, trace=trace, backend=backend)
    index[1] = 65534
    assert torch.equal(as_ids(trace.ids), index)


def test_more_than_254_experts_need_wide_ids():
    """29: prime-rl #3051 kept the ids of more than 256 experts in uint8; 254 and 255 are no expert's here."""
    for E in (255, 256, 512):
        trace = TraceBuffers(torch.zeros(4, 2, dtype=torch.uint8))
        with pytest.raises(TypeError, match=r"trace\.ids: expected dtype"):
            ops.topk_gate(torch.randn(4, E), torch.ones(E), top_k=2, trace=trace)


def test_reference_statistics_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    found = reference.statistics(p, torch.tensor([[0, 1]]))
    assert relative_error(found, torch.tensor([[1.75 * 0.6931471805599453, 0.75, 0.125]])) < 1e-7
