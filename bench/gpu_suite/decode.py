"""Step "decode": blocks of several layers in one CUDA graph, as a decoder runs them; milliseconds per layer.

The layers are more than L2 holds, so that every weight comes from memory as it does in a model of thirty of them, and
each has a routing of its own. A provider that cannot be captured, because it waits for the device, is timed by
launches, and its note says so.
"""

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks, runner
from ..floors import Probe, work
from ..providers import FALLBACK, GPU_ONLY, OURS, TRANSFORMERS, Missing, Provider, build
from ..timing import stopwatch
from ..workloads import Draw, Layer
from . import cases, status, table

PROVIDERS = (OURS, *TRANSFORMERS, FALLBACK, *GPU_ONLY)
LEAST_LAYERS = 4
CACHES = 4  # times L2 that the weights of one pass at T = 1 take


def run(context: status.Context) -> str | None:
    """Measure every case that has no rows yet."""
    layers: list[Layer] = []
    probe = cases.probe_of(context.device, context.tiny)

    def measure(case: cases.Case) -> list[runner.Row]:
        if not layers:
            layers.extend(rotating(cases.shape_of(context.tiny), context.device, context.tiny))
        tokens = cases.tokens_of(case[2], context.tiny)
        with torch.no_grad():
            return rows_of(layers, case[1], tokens, probe, rounds=3 if context.tiny else 40)

    return table.each(context, "decode", cases.decode(), measure)


def rotating(shape: Any, device: torch.device, tiny: bool) -> list[Layer]:
    """Layers with weights of their own: the same experts in another order, which is as good to a memory."""
    first = Layer(shape, torch.bfloat16, device)
    read = shape.K * shape.expert_bytes(first.dtype)
    count = 2 if tiny else max(LEAST_LAYERS, math.ceil(CACHES * runner.last_level_cache(device) / read))
    layers = [first]
    for place in range(1, count):
        layer = copy.copy(first)
        layer.gate_up, layer.down = first.gate_up.roll(place, 0), first.down.roll(place, 0)
        layers.append(layer)
    return layers


def rows_of(layers: list[Layer], mode: str, tokens: int, probe: Probe, rounds: int) -> list[runner.Row]:
    """One row per provider of a pass over `layers`."""
    first, count = layers[0], len(layers)
    draws = [next(layer.draws(mode, tokens, 1, seed=1 + place)) for place, layer in enumerate(layers)]
    projections = [layer.projection(mode).clone() for layer in layers]
    picked = checks.sample(first, draws[0])
    expected = checks.truth("block", first, draws[0], projections[0], picked)
    eager = checks.eager_errors("block", first, draws[0], projections[0], expected, picked)
    state: dict[str, tuple[str, str]] = {}
    error: dict[str, dict[str, float]] = {}
    passes: dict[str, Callable[[], object]] = {}
    for name in PROVIDERS:
        built = [each for layer in layers for each in build("block", layer, (name,))]
        if not built:
            continue
        if isinstance(built[0], Missing):
            state[name] = ("missing", built[0].reason)
            continue
        blocks = [each for each in built if isinstance(each, Provider)]
        if reason := blocks[0].skipped(tokens) or blocks[0].wrong:
            state[name] = ("wrong" if blocks[0].wrong else "skipped", reason)
            continue
        for block, proj in zip(blocks, projections, strict=True):
            block.prepare(proj)
        try:
            error[name] = checks.errors("block", first, blocks[0].call(draws[0]), expected, picked)
            if checks.passes(error[name], eager, first.dtype):
                passes[name], note = captured(blocks, draws, first.device)
                state[name] = ("ok", "; ".join(filter(None, (blocks[0].note, note))))
            else:
                state[name] = ("wrong", blocks[0].note or "its error is more than twice transformers' eager")
        except Exception as crash:  # a provider's own way to fail
            state[name] = ("failed", status.sentence(crash))
    times = _timed(passes, first.device, count, probe, rounds)
    floor = statistics.mean(
        work("block", first.shape, draw, first.dtype).floor_ms(probe.bandwidth, probe.peak) for draw in draws
    )
    case = {"op": "decode", "mode": mode, "tokens": tokens} | runner.setting(first.shape, first.dtype)
    case |= {
        "floor_ms": runner.digits(floor),
        "bound": work("block", first.shape, draws[0], first.dtype).bound(probe.bandwidth, probe.peak),
        "bandwidth_gb_s": runner.digits(probe.bandwidth),
        "peak_gflop_s": runner.digits(probe.peak),
        "probe": probe.kind,
        "eager_error": runner.digits(max(eager.values())),
        "layers": count,
    }
    rows = [case | runner.timed_row(name, state[name], error.get(name), times.get(name), floor) for name in state]
    return runner.against_the_best_peer(rows)


def captured(blocks: list[Provider], draws: list[Draw], device: torch.device) -> tuple[Callable[[], object], str]:
    """A pass over all layers as one graph's replay; or as calls, and why."""

    def call() -> list[Any]:
        return [block.call(draw) for block, draw in zip(blocks, draws, strict=True)]

    if device.type != "cuda":
        return call, "without a graph: not on a GPU"
    try:
        plain = without_synchronising(call)
    except RuntimeError as refused:
        return call, f"without a graph, it waits for the device: {status.sentence(refused)}"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs: list[Tensor] = call()
    except Exception as refused:  # a synchronisation, or a kernel that is not on the captured stream
        torch.cuda.synchronize()
        return call, f"without a graph, it cannot be captured: {status.sentence(refused)}"
    graph.replay()
    torch.cuda.synchronize()
    if not all(torch.isfinite(output).all() for output in outputs):
        raise RuntimeError("a replay gives numbers that are not finite")
    # Atomics may round differently; another routing would differ by far more.
    off = max(((a - b).double().norm() / b.double().norm()).item() for a, b in zip(outputs, plain, strict=True))
    if off > 1e-2:
        raise RuntimeError(f"a replay differs from a plain call by {off:.1e}")

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay, ""


def without_synchronising(call: Callable[[], Any]) -> Any:
    """The result of `call`; RuntimeError where it waits for the device.

    To find that out by capturing it would leave torch's allocator and generators in the middle of a capture.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _timed(
    passes: dict[str, Callable[[], object]], device: torch.device, layers: int, probe: Probe, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds per layer of interleaved passes."""
    watch = stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in passes}
    probe.reset()
    probe.sample()
    for turn in range(rounds + 1):
        for name, call in passes.items():
            elapsed = watch(name, call).ms / layers
            if turn:
                times[name].append(elapsed)
    probe.sample()
    return times
