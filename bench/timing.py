"""How long a call takes: on the CPU by the clock, on a GPU by events on its stream, from a cold cache.

A GPU runs behind the host. Timed as it comes, a call of a few small kernels would measure Python's launches and not the
kernels, and the weights of the call before would still be in L2. So before each call the stream reads a buffer that is
several times L2 (reading leaves clean lines; what a write leaves would be written back within the call) and then spins
for longer than the host needs to launch the call. What the events then bracket is what a CUDA graph of the call would
take. A call that waits for the device itself, as transformers' eager path does, cannot be hidden and shows its
launches: they are part of its price. The time that the host spends in the call is kept beside, as `host_ms`.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

_FLUSH_BYTES = 256 << 20
_FIRST_HIDE_MS = 1.0
_MOST_HIDE_MS = 5.0
_SPIN_CYCLES = 2_000_000


class Elapsed(NamedTuple):
    """Milliseconds of one call: of the device, and of the host until the call returned (None where they are one)."""

    ms: float
    host_ms: float | None


class Stopwatch(Protocol):
    """Times `call`; `name` says which calls are alike."""

    def __call__(self, name: str, call: Callable[[], object]) -> Elapsed: ...


def stopwatch(device: torch.device) -> Stopwatch:
    """The way to time calls on `device`."""
    return CudaStopwatch(device) if device.type == "cuda" else wall_clock


def wall_clock(name: str, call: Callable[[], object]) -> Elapsed:
    """One call by the clock."""
    begin = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - begin
    del result  # giving back a layer's gradient takes time that is not the call's
    return Elapsed(elapsed * 1e3, None)


class CudaStopwatch:
    """One call between two events, behind a flush of L2 and a spin that hides the host's launches."""

    def __init__(self, device: torch.device) -> None:
        size = max(_FLUSH_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._device = device
        self._buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)
        self._host_ms: dict[str, float] = {}
        self._cycles_per_ms = self._calibrate()

    def __call__(self, name: str, call: Callable[[], object]) -> Elapsed:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        torch.sum(self._buffer, dim=0, out=self._sum)
        hide = min(_MOST_HIDE_MS, 1.5 * self._host_ms.get(name, _FIRST_HIDE_MS) + 0.05)
        torch.cuda._sleep(int(hide * self._cycles_per_ms))
        start.record()
        begin = time.perf_counter()
        result = call()
        host_ms = (time.perf_counter() - begin) * 1e3
        end.record()
        torch.cuda.synchronize(self._device)
        del result
        self._host_ms[name] = host_ms
        return Elapsed(start.elapsed_time(end), host_ms)

    def _calibrate(self) -> float:
        times = []
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(_SPIN_CYCLES)
            end.record()
            torch.cuda.synchronize(self._device)
            times.append(start.elapsed_time(end))
        return _SPIN_CYCLES / min(times)
