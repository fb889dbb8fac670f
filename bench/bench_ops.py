"""pytest-benchmark microbenchmarks: one provider at a time, for comparing one's own changes.

    pytest bench/bench_ops.py -o addopts= --benchmark-autosave
    pytest bench/bench_ops.py -o addopts= --benchmark-compare -k "experts and T16"

`omnigene-fast bench` is the comparison between providers: it interleaves them and relates them to the floor. These
cases share its workloads, providers and checks; OMNIGENE_FAST_BENCH_SHAPE="H,I,E,K" takes another layer than the true
one.
"""

import os
from itertools import cycle

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from omnigene_fast.bench import checks
from omnigene_fast.bench.providers import OPS, OURS, OURS_INPUT, TRANSFORMERS, Missing, Output, build
from omnigene_fast.bench.runner import DRAWS, TOKENS, TRAINING_MODES, TRAINING_TOKENS, need_memory, projection_copies
from omnigene_fast.bench.training import FALLBACK, TRAINING_OPS
from omnigene_fast.bench.workloads import MODES, TRUE_SHAPE, Draw, Layer, Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16


@pytest.fixture(scope="session")
def layer() -> Layer:
    """The layer whose weights every case shares."""
    text = os.environ.get("OMNIGENE_FAST_BENCH_SHAPE")
    shape = Shape(*map(int, text.split(","))) if text else TRUE_SHAPE
    try:
        need_memory(shape, DTYPE, DEVICE, OPS)
    except MemoryError as short:
        pytest.skip(str(short))
    return Layer(shape, DTYPE, DEVICE)


@pytest.mark.parametrize("provider_name", [OURS, OURS_INPUT, *TRANSFORMERS, FALLBACK])
@pytest.mark.parametrize("tokens", TOKENS, ids=lambda tokens: f"T{tokens}")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark: BenchmarkFixture, layer: Layer, op: str, mode: str, tokens: int, provider_name: str) -> None:
    """One provider of one operation, the routing redrawn on each call."""
    if op == "route" and mode != MODES[0]:
        pytest.skip("the router does not depend on the mode")
    if op in TRAINING_OPS and (mode not in TRAINING_MODES or tokens not in TRAINING_TOKENS):
        pytest.skip("forward and backward run in fewer cases")
    built = build(op, layer, (provider_name,))
    if not built:
        pytest.skip(f"{provider_name} does not have {op}")
    (provider,) = built
    assert not isinstance(provider, Missing)
    if reason := provider.skipped(tokens):
        pytest.skip(reason)
    draws = list(layer.draws(mode, tokens, DRAWS))
    copies = projection_copies(layer.projection(mode), DEVICE)
    turns = zip(cycle(draws), cycle(copies))

    def setup() -> tuple[tuple, dict]:
        draw, proj = next(turns)
        provider.prepare(proj)
        return (draw,), {}

    def call(draw: Draw) -> Output:
        out = provider.call(draw)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return out

    picked = checks.sample(layer, draws[0])
    expected = checks.truth(op, layer, draws[0], copies[0], picked)
    with torch.no_grad():
        eager = checks.eager_errors(op, layer, draws[0], copies[0], expected, picked)
        provider.prepare(copies[0])
        error = checks.errors(op, layer, provider.call(draws[0]), expected, picked)
        assert checks.passes(error, eager, DTYPE), (error, eager)
        benchmark.group = f"{op} {mode} T={tokens}"
        benchmark.extra_info["error"] = max(error.values())
        benchmark.pedantic(call, setup=setup, rounds=DRAWS, warmup_rounds=1)
