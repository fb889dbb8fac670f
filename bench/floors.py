"""The physical floor of an operation: the larger of its bytes / bandwidth and its FLOPs / peak.

Bandwidth and peak are probed in the same process, between the rounds of measurements, and the medians are used: memory
bandwidth drifts with the neighbours on a shared machine.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnigene_fast import backends

from .lowbit import LOW_BIT_OPS
from .training import RANKS, TRAINING_OPS
from .workloads import Draw, Shape

_PROBE_BYTES = 256 << 20


@dataclass(frozen=True)
class Work:
    """What an operation must at least move and compute."""

    bytes: float
    flops: float

    def floor_ms(self, bandwidth: float, peak: float) -> float:
        """Milliseconds at `bandwidth` GB/s and `peak` GFLOP/s."""
        return max(self.bytes / bandwidth, self.flops / peak) / 1e6

    def bound(self, bandwidth: float, peak: float) -> str:
        """Which of the two it is: "memory" or "compute"."""
        return "memory" if self.bytes / bandwidth >= self.flops / peak else "compute"


def work(op: str, shape: Shape, draw: Draw, dtype: torch.dtype) -> Work:
    """Bytes and FLOPs of `op` on `draw`: each weight that is hit is read once, activations are read and written once.

    route    bytes: projection, hidden states, probabilities and picks; FLOPs: 2·T·E·H
    experts  bytes: the hit experts' weights; FLOPs: 6·T·K·H·I (activations are left out: they may stay in cache)
    block    the sum, the router's activations left out too

    A forward and backward of the experts, activations and saved tensors left out as in `experts`:

    experts_frozen  bytes: the hit experts' weights twice, once for each direction; FLOPs: 2 · 6·T·K·H·I
    experts_full    also the gradient of all E experts, written once; FLOPs: 3 · 6·T·K·H·I
    experts_lora    as experts_frozen, with the hit experts' factors (r rows of 2H + 3I each) read twice and the
                    gradient of all E experts' factors written once; FLOPs: also 3 · 2·T·K·r·(2H + 3I)

    experts_int8, experts_fp8: as experts, a byte per weight and a float32 per row. route_traced: as route, with ids of
    one byte, half-precision weights and three half-precision statistics written. decode: as block.
    """
    return work_of(op, shape, len(draw.index), len(draw.index.unique()), dtype)


def work_of(op: str, shape: Shape, tokens: int, hit: int, dtype: torch.dtype) -> Work:
    """The same for `tokens` tokens that visit `hit` experts between them."""
    size = dtype.itemsize
    experts = Work(hit * shape.expert_bytes(dtype), 6.0 * tokens * shape.K * shape.H * shape.I)
    if op == "experts":
        return experts
    if op in LOW_BIT_OPS:
        return Work(hit * (shape.expert_bytes(torch.int8) + 4 * (2 * shape.I + shape.H)), experts.flops)
    if op in TRAINING_OPS:
        twice = Work(2 * experts.bytes, 2 * experts.flops)
        if op == "experts_full":
            return Work(twice.bytes + shape.layer_bytes(dtype), 3 * experts.flops)
        factors = RANKS.get(op, 0) * (2 * shape.H + 3 * shape.I)  # elements per expert
        return Work(twice.bytes + (2 * hit + shape.E) * factors * size, twice.flops + 6.0 * tokens * shape.K * factors)
    proj = shape.E * shape.H * size
    flops = 2.0 * tokens * shape.E * shape.H
    if op in ("route", "route_traced"):
        traced = tokens * (shape.K * 3 + 6) if op == "route_traced" else 0
        return Work(proj + tokens * (shape.H * size + shape.E * 4 + shape.K * 12) + traced, flops)
    return Work(experts.bytes + proj, experts.flops + flops)


@dataclass
class Probe:
    """Bandwidth (GB/s) and peak (GFLOP/s) of `device` in `dtype`, measured again at each `sample()`.

    On the CPU with the C++ module: the best of its read loops over 256 MB and its multiply-add loop (float32's for
    float16, which goes through float32 there). Else, named "torch" in the rows: a sum over 256 MB and a matrix product.

    On a GPU, named "cuda" and timed by events: the better of reading 1 GiB and copying it, and an 8192³ product of
    normal numbers (a product of equal numbers flips fewer bits, draws less power and runs faster than any real one).
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float = 0.02
    bandwidths: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    kind: str = "torch"

    def __post_init__(self) -> None:
        self._native = None
        if self.device.type == "cpu" and self.dtype.itemsize <= 4:
            cpu = backends.load("cpu")
            if cpu.unavailable(self.device) is None:
                self._native, self.kind = cpu, "native"
                self._buffer = torch.ones(_PROBE_BYTES, dtype=torch.uint8)
        if self.device.type == "cuda":
            self.kind = "cuda"
            self._buffer = torch.zeros(1 << 28, dtype=torch.float32, device=self.device)
            self._copy = torch.empty_like(self._buffer)
            self._sum = torch.empty((), dtype=torch.float32, device=self.device)
            self._matrix = torch.randn(8192, 8192, device=self.device).to(self.dtype)
            self._product = torch.empty_like(self._matrix)
        elif self._native is None:
            self._buffer = torch.zeros(_PROBE_BYTES // 4, dtype=torch.float32, device=self.device)
            self._matrix = torch.ones(1024, 1024, dtype=self.dtype, device=self.device)

    def sample(self) -> None:
        """Measure both once more."""
        if self._native is not None:
            name = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
            self.bandwidths.append(self._native.probe_bandwidth(0, self._buffer))  # type: ignore[attr-defined]
            self.peaks.append(self._native.probe_peak(name, self.seconds))  # type: ignore[attr-defined]
            return
        size = self._buffer.numel() * 4
        if self.device.type == "cuda":
            read = size / self._time(lambda: torch.sum(self._buffer, dim=0, out=self._sum))
            copied = 2 * size / self._time(lambda: self._copy.copy_(self._buffer))
            self.bandwidths.append(max(read, copied) / 1e9)
            multiply = self._time(lambda: torch.mm(self._matrix, self._matrix, out=self._product))
        else:
            self.bandwidths.append(size / self._time(self._buffer.sum) / 1e9)
            multiply = self._time(lambda: self._matrix @ self._matrix)
        self.peaks.append(2 * self._matrix.shape[0] ** 3 / multiply / 1e9)

    def _time(self, call: Callable[[], Tensor]) -> float:
        """Seconds, the least of three after one call that is not counted."""
        call()
        times: list[float] = []
        while len(times) < 3:
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize(self.device)
                times.append(start.elapsed_time(end) / 1e3)
                continue
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return min(times)

    def reset(self) -> None:
        """A new case begins: keep only the sample that ended the one before."""
        del self.bandwidths[:-1], self.peaks[:-1]

    @property
    def bandwidth(self) -> float:
        """Median of the samples, GB/s."""
        return statistics.median(self.bandwidths)

    @property
    def peak(self) -> float:
        """Median of the samples, GFLOP/s."""
        return statistics.median(self.peaks)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
