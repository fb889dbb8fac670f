"""The trace that the router kernels write beside their outputs, against those outputs and float64."""

import math

import pytest
import torch

from omnigene_fast import backends, reference
from omnigene_fast.backends import TraceBuffers

from .. import helpers
from . import gate_forms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = ("ids", "weights", "stats")
BEFORE, AFTER = 1, 512  # rows of the buffers that belong to other calls; no program has more tokens
SENTINEL = 77
BACKEND = backends.load("triton")


@pytest.fixture(params=list(gate_forms.FORMS))
def path(request, monkeypatch):
    """Every form of the router: see gate.py."""
    gate_forms.force(monkeypatch, request.param)
    return request.param


def open_trace(T, E, K, device, kinds=EVERYTHING):
    """Buffers larger than the call, and the rows of them that it is to write."""
    rows = BEFORE + T + AFTER
    half = {"dtype": torch.float16, "device": device}
    whole = TraceBuffers(
        torch.full((rows, K), SENTINEL, dtype=torch.uint8 if E <= 254 else torch.int16, device=device),
        torch.full((rows, K), SENTINEL, **half) if "weights" in kinds else None,
        torch.full((rows, 3), SENTINEL, **half) if "stats" in kinds else None,
    )
    return whole, TraceBuffers(*(None if buffer is None else buffer[BEFORE:] for buffer in whole))


def statistics(probabilities, K):
    """Entropy in nats, mass of the K largest and their margin [T, 3] float64."""
    p = probabilities.double()
    ordered = torch.nn.functional.pad(p.sort(-1, descending=True).values, (0, 1))
    return torch.stack(
        [torch.special.entr(p).sum(-1), ordered[:, :K].sum(-1), ordered[:, K - 1] - ordered[:, K]], dim=-1
    )


def check(whole, weights, index, probabilities):
    """Ids bit for bit, weights rounded, statistics of `probabilities` within half a unit of float16, no other row."""
    T, K = index.shape
    ids, halves, stats = (None if buffer is None else buffer[BEFORE : BEFORE + T] for buffer in whole)
    mask = 0xFF if ids.dtype == torch.uint8 else 0xFFFF
    routed = probabilities.isfinite().all(-1, keepdim=True)
    assert torch.equal(ids.long() & mask, torch.where(routed, index, -2 & mask))
    if halves is not None:
        torch.testing.assert_close(halves, weights.half(), rtol=0, atol=0, equal_nan=True)
    if stats is not None:
        expected = statistics(probabilities, K)
        assert torch.equal(stats.isnan(), expected.isnan())
        half_unit = 2.0 ** (expected.abs().clamp_min(2.0**-14).log2().floor() - 11)
        sound = expected.isfinite()
        assert ((stats - expected).abs() <= half_unit + 2e-6)[sound].all(), (stats, expected)
    for buffer in whole:
        assert buffer is None or torch.cat([buffer[:BEFORE], buffer[BEFORE + T :]]).eq(SENTINEL).all()


def same_bits(ours, wanted):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(ours, wanted, strict=True))


def router_case(device, dtype, T, E, K, H=40, seed=0):
    router = helpers.stock_router(E, K, H, dtype, seed=seed).to(device)
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(seed + 1)).to(device, dtype)
    arguments = helpers.router_arguments(router)
    order = ("proj_weight", "scale", "per_expert_scale", "top_k", "eps")
    return hidden, [arguments[name] for name in order]


def gate_case(device, dtype, T, E, spread=3.0):
    """Logits, per-expert scale, and the softmax in float64."""
    logits = (torch.randn(T, E, generator=torch.Generator().manual_seed(E)) * spread).to(device, dtype)
    return logits, torch.rand(E, device=device) + 0.5, logits.double().softmax(-1)


@pytest.mark.parametrize("numerics", reference.NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "K"), [(17, 6, 2), (3, 128, 8), (2, 257, 3)])
def test_route(device, path, dtype, numerics, T, E, K):
    hidden, arguments = router_case(device, dtype, T, E, K)
    plain = BACKEND.route(hidden, *arguments, numerics)
    whole, trace = open_trace(T, E, K, device)
    traced = BACKEND.route(hidden, *arguments, numerics, trace)
    assert same_bits(traced, plain)
    probabilities, weights, index = traced
    check(whole, weights, index, probabilities)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("E", "K"), [(6, 1), (6, 6), (128, 8), (254, 8), (255, 8), (256, 8), (257, 5), (512, 16), (700, 4), (1, 1)]
)
def test_topk_gate(device, dtype, E, K):
    logits, scale, truth = gate_case(device, dtype, 17, E)
    plain = BACKEND.topk_gate(logits, scale, K)
    whole, trace = open_trace(17, E, K, device)
    traced = BACKEND.topk_gate(logits, scale, K, trace)
    assert same_bits(traced, plain)
    _, weights, index = traced
    check(whole, weights, index, truth)


@pytest.mark.parametrize(
    ("E", "dtype"), [(254, torch.uint8), (255, torch.int16), (256, torch.int16), (512, torch.int16)]
)
def test_the_last_expert_fits(device, path, E, dtype):
    hidden, arguments = router_case(device, torch.float32, 3, E, 4)
    arguments[0] = torch.zeros_like(arguments[0])
    arguments[0][E - 1] = hidden[0] * arguments[1].sign()
    whole, trace = open_trace(3, E, 4, device)
    probabilities, weights, index = BACKEND.route(hidden, *arguments, "hf", trace)
    assert trace.ids.dtype == dtype
    assert index[0].tolist() == [E - 1, 0, 1, 2]
    check(whole, weights, index, probabilities)


@pytest.mark.parametrize("kinds", [("ids",), ("ids", "weights"), ("ids", "stats")])
@pytest.mark.parametrize("E", [128, 257])
def test_record_less(device, path, kinds, E):
    hidden, arguments = router_case(device, torch.bfloat16, 5, E, 8)
    whole, trace = open_trace(5, E, 8, device, kinds)
    probabilities, weights, index = BACKEND.route(hidden, *arguments, "hf", trace)
    check(whole, weights, index, probabilities)


def test_many_tokens_take_torchs_gemm(device):
    hidden, arguments = router_case(device, torch.float32, 300, 6, 2)
    whole, trace = open_trace(300, 6, 2, device)
    probabilities, weights, index = BACKEND.route(hidden, *arguments, "hf", trace)
    check(whole, weights, index, probabilities)


@pytest.mark.parametrize(("E", "K"), [(6, 2), (6, 6), (60, 8), (257, 8)])
def test_ties(device, path, E, K):
    """All experts alike: the lowest ids, entropy ln E, a mass of K / E, and no margin unless none is left out."""
    hidden, arguments = router_case(device, torch.bfloat16, 3, E, K)
    arguments[0] = torch.zeros_like(arguments[0])
    whole, trace = open_trace(3, E, K, device)
    probabilities, weights, index = BACKEND.route(hidden, *arguments, "hf", trace)
    check(whole, weights, index, probabilities)
    assert trace.ids[:3].tolist() == [list(range(K))] * 3
    expected = torch.tensor([math.log(E), K / E, 1 / E if K == E else 0.0]).half()
    assert (trace.stats[:3].cpu() - expected).abs().max() <= 2**-9
    assert K == E or trace.stats[:3, 2].eq(0).all()


def test_a_tie_at_the_last_place_has_no_margin(device):
    logits = torch.tensor([[0.0, 3, 1, 1, 2, 1]], device=device)
    whole, trace = open_trace(1, 6, 3, device)
    _, weights, index = BACKEND.topk_gate(logits, torch.ones(6, device=device), 3, trace)
    check(whole, weights, index, logits.double().softmax(-1))
    assert trace.ids[0].tolist() == [1, 4, 2]
    assert trace.stats[0, 2] == 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("E", [6, 257])
def test_a_poisoned_token_stays_alone(device, path, E, poison):
    hidden, arguments = router_case(device, torch.float32, 5, E, 3)
    hidden[2, 7] = poison
    whole, trace = open_trace(5, E, 3, device)
    probabilities, weights, index = BACKEND.route(hidden, *arguments, "hf", trace)
    check(whole, weights, index, probabilities)
    assert index[2].tolist() == [0, 1, 2]
    assert trace.ids[2].tolist() == [254 if E <= 254 else -2] * 3
    assert trace.weights[2].isnan().all()
    assert trace.stats[2].isnan().all()
    assert trace.stats[[0, 1, 3, 4]].isfinite().all()


def test_extreme_logits(device):
    """0 * -Inf is no NaN; a certain choice has no entropy; weights pass through subnormal float16 to 0."""
    logits = torch.tensor(
        [
            [1e38, -1e38, 0, 3, -torch.inf, 1],
            [0, -torch.inf, -torch.inf, -torch.inf, -torch.inf, 0],
            [0, -12, -18, -19, -20, -25],
            [-torch.inf] * 6,
            [0, torch.inf, 1, 2, 3, 4],
            [0, torch.nan, 1, 2, 3, 4],
        ],
        device=device,
    )
    whole, trace = open_trace(6, 6, 3, device)
    _, weights, index = BACKEND.topk_gate(logits, torch.ones(6, device=device), 3, trace)
    check(whole, weights, index, logits.double().softmax(-1))
    assert trace.stats[0].tolist() == [0, 1, 0]
    assert trace.stats[1, 0].item() == pytest.approx(math.log(2), abs=2**-12)
    assert (trace.weights[2] > 0).tolist() == [True, True, False]
    assert trace.stats[3:6].isnan().all()


def test_no_tokens_write_nothing(device, path):
    hidden, arguments = router_case(device, torch.bfloat16, 1, 6, 2)
    whole, trace = open_trace(0, 6, 2, device)
    BACKEND.route(hidden[:0], *arguments, "hf", trace)
    assert all(buffer.eq(SENTINEL).all() for buffer in whole)


def test_negative_control_wrong_traces_fail(device):
    """One bit of an id or of a weight, a statistic of something else, or a row of another call."""
    logits, scale, truth = gate_case(device, torch.float32, 9, 16)
    whole, trace = open_trace(9, 16, 4, device)
    _, weights, index = BACKEND.topk_gate(logits, scale, 4, trace)
    check(whole, weights, index, truth)

    def fails(kind, change):
        changed = TraceBuffers(*(buffer.clone() for buffer in whole))
        change(getattr(changed, kind)[BEFORE:])
        with pytest.raises(AssertionError):
            check(changed, weights, index, truth)

    fails("ids", lambda ids: ids[4, 1].bitwise_xor_(1))
    fails("ids", lambda ids: ids[:9, :2].copy_(ids[:9, :2].flip(1)))
    fails("weights", lambda halves: halves.view(torch.int16)[4, 1].bitwise_xor_(1))
    chosen = truth.gather(1, index)
    for wrong in (truth.softmax(-1), chosen / chosen.sum(-1, keepdim=True)):  # softmax twice; of the chosen alone
        fails("stats", lambda stats, wrong=wrong: stats[:9, 0].copy_(statistics(wrong, 4)[:, 0]))
    fails("stats", lambda stats: stats[:9, 0].div_(math.log(2)))  # bits
    fails("stats", lambda stats: stats[:9, 1:].copy_(statistics(truth, 5)[:, 1:]))
    for kind in EVERYTHING:
        fails(kind, lambda buffer: buffer[9].zero_())


@pytest.mark.gpu
def test_a_graph_writes_the_trace_at_every_replay():
    hidden, arguments = router_case("cuda", torch.bfloat16, 16, 128, 8)
    whole, trace = open_trace(16, 128, 8, "cuda")
    BACKEND.route(hidden, *arguments, "hf", trace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        probabilities, weights, index = BACKEND.route(hidden, *arguments, "hf", trace)
    for seed in (1, 2):
        hidden.copy_(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        check(whole, weights, index, probabilities)
