"""Measures providers side by side: checked first, then in interleaved rounds A B C A B C ..., in a fixed order.

Where a backward is measured, every provider's peak memory is taken in a call of its own, between check and rounds.

Bandwidth and peak are probed before, between (every `PROBE_EVERY` seconds) and after the rounds of a case; the floor
uses the medians. Providers run in the order of their list, which is the order of the rows; within a round each takes
another draw, so that none finds its expert weights in the cache because the one before it has just read them, and over
the rounds all see the same draws. The router's projection is one of many equal copies, more than the cache holds. How
a call is timed on a GPU, from a cold L2 and without the host's launches, is written in `timing.py`.
"""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks
from .floors import Probe, synchronize, work
from .lowbit import LOW_BIT_OPS
from .memory import peak_bytes
from .providers import EXTRA_OPS, FORWARD_OPS, NAMES, OPS, OURS, OURS_INPUT, REFERENCE, ROUTES, Missing, Provider, build
from .timing import Elapsed, stopwatch
from .training import TRAINING_OPS
from .workloads import MODES, TRUE_SHAPE, Draw, Layer, Shape

Row = dict[str, Any]
DRAWS = 8
PROBE_EVERY = 0.3  # seconds: memory bandwidth drifts with the neighbours, and a floor is as good as its probe
TOKENS = (1, 4, 16, 64, 256, 1024)
TRAINING_TOKENS = (16, 256, 1024)
TRAINING_MODES = ("uniform", "protein")


@dataclass(frozen=True)
class Settings:
    """What `run` measures.

    `seconds` is the time per case (op, mode, T) after the check; it grows up to fourfold to reach `min_rounds` rounds,
    and a case has at least three. `tokens` and `modes` are those of the forward operations.
    """

    ops: tuple[str, ...] = OPS
    tokens: tuple[int, ...] = TOKENS
    modes: tuple[str, ...] = MODES
    training_tokens: tuple[int, ...] = TRAINING_TOKENS
    training_modes: tuple[str, ...] = TRAINING_MODES
    providers: tuple[str, ...] = NAMES
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shape: Shape = TRUE_SHAPE
    backend: str = "auto"
    seconds: float = 6.0
    min_rounds: int = 7
    max_rounds: int = 200
    draws: int = DRAWS

    def __post_init__(self) -> None:
        for name, values, known in (
            ("op", self.ops, (*OPS, *EXTRA_OPS)),
            ("mode", self.modes, MODES),
            ("mode", self.training_modes, MODES),
            ("provider", self.providers, NAMES),
        ):
            wrong = [value for value in values if value not in known]
            if wrong or not values:
                got = repr(wrong[0]) if wrong else "none"
                raise ValueError(f"{name}: expected some of {', '.join(known)}, got {got}.")
        for tokens in (self.tokens, self.training_tokens):
            if not tokens or min(tokens) < 1:
                raise ValueError(f"tokens: expected numbers >= 1, got {list(tokens)}.")

    def cases(self) -> list[tuple[str, str, int]]:
        """(op, mode, T) in the order they are measured; the router does not depend on the mode and runs in one."""
        found = []
        for op in self.ops:
            modes, counts = self.modes, self.tokens
            if op in TRAINING_OPS:
                modes, counts = self.training_modes, self.training_tokens
            found += [(op, mode, tokens) for mode in (modes[:1] if op in ROUTES else modes) for tokens in counts]
        return found


def run(
    settings: Settings,
    environment: Row,
    progress: Callable[[str], None] = lambda case: None,
    extra: Callable[[str, Layer], list[Provider]] | None = None,
    probe: Probe | None = None,
) -> list[Row]:
    """Measure every case.

    Args:
        settings: what to measure.
        environment: fields copied into each row (device, versions, date).
        progress: called with a case's name before it is measured.
        extra: more providers for (op, layer): tests pass a wrong one.
        probe: of bandwidth and peak; tests pass a constant one.

    Returns:
        one row per case and provider; see `timed_row`.

    Raises:
        MemoryError: the layer does not fit in memory.
    """
    need_memory(settings.shape, settings.dtype, settings.device, set(settings.ops))
    layer = Layer(settings.shape, settings.dtype, settings.device)
    probe = probe or Probe(settings.device, settings.dtype)
    rows: list[Row] = []
    with torch.no_grad():
        for op, mode, tokens in settings.cases():
            progress(f"{op} {mode} T={tokens}")
            built = build(op, layer, settings.providers, settings.backend)
            built += extra(op, layer) if extra else []
            rows += [environment | row for row in measure(op, mode, tokens, layer, built, probe, settings)]
    return rows


def measure(
    op: str,
    mode: str,
    tokens: int,
    layer: Layer,
    built: list[Provider | Missing],
    probe: Probe,
    settings: Settings,
) -> list[Row]:
    """Check and time the providers of one case; rows with their floor and ratios."""
    draws = list(layer.draws(mode, tokens, settings.draws))
    routed = op in (*ROUTES, "block")
    copies = projection_copies(layer.projection(mode), layer.device) if routed else [layer.projection(mode)]
    status: dict[str, tuple[str, str]] = {}
    error: dict[str, dict[str, float]] = {}
    ready: list[Provider] = []
    peaks: dict[str, int | None] = {}
    picked = checks.sample(layer, draws[0])
    expected = checks.truth(op, layer, draws[0], copies[0], picked)
    eager = checks.eager_errors(op, layer, draws[0], copies[0], expected, picked)
    for provider in built:
        if isinstance(provider, Missing):
            status[provider.name] = ("missing", provider.reason)
        elif reason := provider.skipped(tokens):
            status[provider.name] = ("skipped", reason)
        elif provider.wrong:
            status[provider.name] = ("wrong", provider.wrong)
        else:
            error[provider.name], crash = _checked(op, layer, provider, draws[0], copies[0], expected, picked)
            if crash:
                status[provider.name] = ("failed", crash)
            elif checks.passes(error[provider.name], eager, layer.dtype):
                status[provider.name] = ("ok", provider.note)
                ready.append(provider)
                if op in TRAINING_OPS:
                    peaks[provider.name] = peak_bytes(functools.partial(provider.call, draws[0]), layer.device)
            else:
                status[provider.name] = ("wrong", provider.note or "its error is more than twice transformers' eager")
    calls = _interleaved(ready, draws, copies, probe, settings)
    times = {name: [call.ms for call in found] for name, found in calls.items()}
    works = [work(op, layer.shape, draw, layer.dtype) for draw in draws]
    floor = statistics.median(each.floor_ms(probe.bandwidth, probe.peak) for each in works)
    case = {"op": op, "mode": mode, "tokens": tokens} | setting(layer.shape, layer.dtype)
    case |= {
        "floor_ms": digits(floor),
        "bound": works[0].bound(probe.bandwidth, probe.peak),
        "bandwidth_gb_s": digits(probe.bandwidth),
        "peak_gflop_s": digits(probe.peak),
        "probe": probe.kind,
        "eager_error": digits(max(eager.values())),
    }
    rows: list[Row] = [
        case
        | timed_row(provider.name, status[provider.name], error.get(provider.name), times.get(provider.name), floor)
        for provider in built
    ]
    for row in rows:
        host = [call.host_ms for call in calls.get(row["provider"], []) if call.host_ms is not None]
        if settings.device.type == "cuda":
            row["host_ms"] = digits(statistics.median(host)) if host else None
            row["tflops"] = digits(works[0].flops / row["p50_ms"] / 1e9) if row["p50_ms"] else None
        if op in TRAINING_OPS:
            peak = peaks.get(row["provider"])
            row["peak_mb"] = None if peak is None else digits(peak / 1e6)
    return against_the_best_peer(rows)


def against_the_best_peer(rows: list[Row]) -> list[Row]:
    """The rows of one case, each with the best correct peer's time over its own."""
    best = min((row["p50_ms"] for row in rows if is_peer(row) and row["p50_ms"]), default=None)
    for row in rows:
        row["best_peer_over_this"] = digits(best / row["p50_ms"]) if best and row["p50_ms"] else None
    return rows


def setting(shape: Shape, dtype: torch.dtype) -> Row:
    """The layer as a row names it."""
    return {"dtype": str(dtype).removeprefix("torch."), "shape": [shape.H, shape.I, shape.E, shape.K]}


def is_peer(row: Row) -> bool:
    """Whether a row belongs to somebody else's implementation that gave the right numbers."""
    return row["provider"] not in (OURS, OURS_INPUT, REFERENCE) and row["status"] == "ok"


def timed_row(
    name: str, status: tuple[str, str], error: dict[str, float] | None, times: list[float] | None, floor: float
) -> Row:
    """What a row says of one provider: its status with a note, its worst error, percentiles, ratio to the floor."""
    row: Row = {"provider": name, "status": status[0], "note": status[1], "error": None, "rounds": len(times or [])}
    if error:
        worst = max(error.values())
        row["error"] = digits(worst) if math.isfinite(worst) else "inf"
    for key, percent in (("p20_ms", 20), ("p50_ms", 50), ("p80_ms", 80)):
        row[key] = digits(percentile(times, percent)) if times else None
    row["over_floor"] = digits(row["p50_ms"] / floor) if times else None
    return row


def _checked(
    op: str,
    layer: Layer,
    provider: Any,
    draw: Draw,
    proj: Tensor,
    expected: dict[str, Tensor],
    picked: checks.Sample,
) -> tuple[dict[str, float], str]:
    """Errors of one call and, if it raised, the sentence."""
    try:
        provider.prepare(proj)
        return checks.errors(op, layer, provider.call(draw), expected, picked), ""
    except Exception as crash:  # any provider may fail in its own way: that is a result, not the end of the run
        lines = str(crash).strip().splitlines() or [""]
        return dict.fromkeys(expected, math.inf), f"{type(crash).__name__}: {lines[0][:200]}"


def _interleaved(
    ready: list[Provider], draws: list[Draw], copies: list[Tensor], probe: Probe, settings: Settings
) -> dict[str, list[Elapsed]]:
    """The time of every call by provider."""
    times: dict[str, list[Elapsed]] = {provider.name: [] for provider in ready}
    watch = stopwatch(settings.device)
    probe.reset()
    probe.sample()
    start = probed = time.perf_counter()
    calls = 0
    gc.collect()
    gc.disable()
    try:
        for turn in range(settings.max_rounds):
            spent = time.perf_counter() - start
            if turn >= 3 and spent > settings.seconds * (1 if turn >= settings.min_rounds else 4):
                break
            for place, provider in enumerate(ready):
                draw = draws[(turn + place * max(1, len(draws) // len(ready))) % len(draws)]
                provider.prepare(copies[calls % len(copies)])
                calls += 1
                times[provider.name].append(watch(provider.name, functools.partial(provider.call, draw)))
            if time.perf_counter() - probed > PROBE_EVERY:
                probe.sample()
                probed = time.perf_counter()
        probe.sample()
    finally:
        gc.enable()
    if settings.device.type == "cuda":  # in the first call the host's time to launch it was a guess
        times = {name: found[1:] if len(found) > 3 else found for name, found in times.items()}
    return times


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the closest ranks."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), percent / 100).item()


def projection_copies(proj: Tensor, device: torch.device) -> list[Tensor]:
    """Equal copies of the router's projection, together twice the last-level cache."""
    total = 2 * last_level_cache(device)
    return [proj.clone() for _ in range(max(1, min(1024, -(-total // (proj.numel() * proj.itemsize)))))]


def last_level_cache(device: torch.device) -> int:
    """Bytes; 64 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(text[:-1]) << 10 for path in sizes if (text := path.read_text().strip()).endswith("K")]
    return min(max(found, default=64 << 20), 256 << 20)


def need_memory(shape: Shape, dtype: torch.dtype, device: torch.device, ops: Collection[str] = FORWARD_OPS) -> None:
    """Raise MemoryError, in one sentence, unless the layer and its peers' copies fit.

    batched_mm copies about a layer; a backward of transformers or PEFT makes up to three: a merged weight, its
    gradient, and one of them again; for 8-bit experts there are half a layer of them, and a layer dequantised.
    """
    layers = 5 if set(ops) & set(TRAINING_OPS) else 4 if set(ops) & set(LOW_BIT_OPS) else 2
    need = layers * shape.layer_bytes(dtype) + (1 << 30)
    free = available_memory(device)
    if free is not None and free < need:
        raise MemoryError(
            f"a layer of {shape.layer_bytes(dtype) / 1e9:.1f} GB with the copies that its peers make needs"
            f" {need / 1e9:.1f} GB of memory on {device}, {free / 1e9:.1f} GB are available."
        )


def available_memory(device: torch.device) -> int | None:
    """Bytes free on `device`, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def digits(value: float) -> float:
    """Five significant digits: rows stay readable and reproduce exactly."""
    return float(f"{value:.5g}")


__all__ = [
    "FORWARD_OPS",
    "MODES",
    "NAMES",
    "OPS",
    "TRAINING_OPS",
    "Layer",
    "Row",
    "Settings",
    "measure",
    "need_memory",
    "run",
    "synchronize",
]
