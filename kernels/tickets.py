"""Counters by which the last program of several finds out that it is the last.

Each program adds one to a counter when its part is stored; the one that finds the others' count there goes on with all
parts, and sets the counter back to zero for the next launch. So a counter has to be zero when a launch begins, and no
second launch may use it meanwhile. A fresh tensor of zeros would ensure both and cost a launch of its own, so counters
come from one zeroed arena per device, created by the first call:

- A launch outside CUDA graphs takes the counters of its stream: launches of one stream never overlap. A stream that
  torch did not make has to be idle before it is destroyed, as its handle, and so its counters, may come again.
- A launch that is being captured takes counters that nobody else ever gets: replays of different graphs may overlap
  each other and any stream, while replays of one graph never overlap.

Where the arena has none left, or does not exist yet when a capture begins, or the stream is CUDA's per-thread default,
one handle for a stream in every thread, a tensor of zeros is made after all: right at every replay too, as the graph
then holds the memset.
"""

import threading

import torch
from torch import Tensor

CAPACITY = 1 << 18  # counters of a device: 1 MB, 2^13 captured launches of 32 tokens
PER_STREAM = 256
_PER_THREAD_STREAM = 2  # the handle cudaStreamPerThread


class _Arena:
    def __init__(self, device: torch.device):
        self.counters = torch.zeros(CAPACITY, dtype=torch.int32, device=device)
        self.used = 0
        self.streams: dict[int, Tensor] = {}
        if device.type == "cuda":
            # Once per device, so that the zeros are there for every stream.
            torch.cuda.current_stream(device).synchronize()

    def take(self, count: int) -> Tensor | None:
        if self.used + count > CAPACITY:
            return None
        self.used += count
        return self.counters[self.used - count : self.used]


_arenas: dict[torch.device, _Arena] = {}
_lock = threading.Lock()


def _new_arena(device: torch.device) -> _Arena | None:
    """Made by a thread of its own: the caller's may be one whose allocations go to a CUDA graph's pool, as in the
    warm-up of torch.compile's "reduce-overhead", and the arena outlives every graph."""
    made: list[_Arena] = []
    thread = threading.Thread(target=lambda: made.append(_Arena(device)))
    thread.start()
    thread.join()
    return made[0] if made else None


def tickets(device: torch.device, count: int) -> Tensor:
    """`count` int32 zeros for one launch on the current stream of `device`, which has to leave them zero."""
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    on_gpu = device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    taken = None
    with _lock:
        arena = _arenas.get(device)
        if arena is None and not capturing:
            arena = _new_arena(device)
            if arena is not None:
                _arenas[device] = arena
        if arena is not None and capturing:
            taken = arena.take(count)
        elif arena is not None and count <= PER_STREAM and stream != _PER_THREAD_STREAM:
            taken = arena.streams.get(stream)
            if taken is None:
                taken = arena.take(PER_STREAM)
                if taken is not None:
                    arena.streams[stream] = taken
    return torch.zeros(count, dtype=torch.int32, device=device) if taken is None else taken
