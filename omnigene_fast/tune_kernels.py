"""What `omnigene-fast tune` runs and how it times: the launchers of the expert GEMMs on operands of a layer's size."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import lowbit
from .kernels.dispatch import Dispatch, launch_dispatch_fwd
from .kernels.expert_backward import launch_expert_down_bwd
from .kernels.expert_forward import launch_expert_down_fwd, launch_expert_up_fwd
from .kernels.grouped_gemm import LowRank, launch_grouped_gemm, launch_grouped_gram
from .kernels.tables import Tile
from .tune import Settings, Workload
from .tune_model import Device, Work

_FLUSHED_BYTES = 256 << 20
_ACTIVATION = "gelu_tanh"


def this_device(device: torch.device) -> Device:
    """Name, compute capability and multiprocessors of a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)
    return Device(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


class Layer:
    """Weights of one layer, and for each number of tokens the kernels over them; seeded, so the same in every run."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        H, I, E, _ = settings.shape  # noqa: E741
        self.gate_up, self.gate_up_scale = self._weights(E, 2 * I, H)
        self.down, self.down_scale = self._weights(E, H, I)
        rank = settings.rank + -settings.rank % 16
        self.rhs = self.normal(E, rank, H, scale=H**-0.5) if rank else None
        self.up_factor = self.normal(E, 2 * I, rank, scale=rank**-0.5).transpose(1, 2) if rank else None
        self.down_factor = self.normal(E, H, rank, scale=rank**-0.5).transpose(1, 2) if rank else None
        self.bwd_factor = self.normal(E, rank, I, scale=rank**-0.5) if rank else None

    def normal(self, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return (torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32) * scale).to(
            self.settings.dtype
        )

    def _weights(self, experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """One expert at a time: in float32 all of them would take twice the space of the layer."""
        low = None if self.settings.bits == 16 else lowbit.FORMATS[self.settings.weights][0]
        weight = torch.empty(experts, rows, columns, dtype=low or self.settings.dtype, device=self.device)
        scale = torch.empty(experts, rows, dtype=torch.float32, device=self.device) if low else None
        for expert in range(experts):
            own = self.normal(rows, columns, scale=columns**-0.5, seed=expert)
            if scale is None:
                weight[expert] = own
                continue
            stored, scales = lowbit.quantise(own[None], self.settings.weights)
            weight[expert], scale[expert] = stored[0], scales[0]
        if self.settings.as_bits:
            weight = weight.view(torch.uint8)  # as the backend hands it to the kernels
        return weight, scale

    def at(self, tokens: int) -> "Tokens":
        return Tokens(self, tokens)


class Tokens:
    """The `tune.Workload` of `tokens` tokens, routed uniformly."""

    def __init__(self, layer: Layer, tokens: int) -> None:
        settings, self.layer, self.tokens = layer.settings, layer, tokens
        H, I, E, K = settings.shape  # noqa: E741
        generator = torch.Generator().manual_seed(tokens)
        self.index = torch.rand(tokens, E, generator=generator).topk(K, dim=-1).indices.to(layer.device)
        self.weights = torch.full((tokens, K), 1 / K, dtype=torch.float32, device=layer.device)
        N, rank = tokens * K, 0 if layer.rhs is None else layer.rhs.shape[1]
        self.hidden, self.grad = layer.normal(tokens, H, seed=1), layer.normal(tokens, H, seed=2)
        self.h, self.pre = layer.normal(N, I, seed=3), layer.normal(N, 2 * I, seed=4)
        self.low = layer.normal(N, rank, seed=5) if rank else None
        self._dispatches: dict[int, Dispatch] = {}
        hit = min(E, N)
        size, stored = settings.dtype.itemsize, layer.down.dtype.itemsize
        work = {
            "up": Work(hit, N / hit, I, H, size, stored, operands=2),
            "down": Work(hit, N / hit, H, I, size, stored),
            "down_bwd": Work(hit, N / hit, I, H, size, stored),
            "gram": Work(E, 2 * I, H, N / E, size, size, weighted=False),
            "low_rank": Work(hit, N / hit, rank, H, size, size, low_rank=True),
            "low_rank_gram": Work(E, 2 * I, rank, N / E, size, size, low_rank=True, weighted=False),
        }
        self.work = {name: work[name] for name in settings.kernels}

    def outputs(self, kernel: str, tile: Tile) -> tuple[Tensor, ...]:
        """What `kernel` computes with `tile`."""
        layer, low = self.layer, self.low
        found: tuple[Tensor | None, ...]
        dispatch = self._dispatch(tile.block_m if kernel not in ("gram", "low_rank_gram") else 16)
        if kernel == "up":
            found = launch_expert_up_fwd(
                self.hidden,
                layer.gate_up,
                dispatch,
                _ACTIVATION,
                tile,
                low_rank=self._update(layer.up_factor),
                **_scale(layer.gate_up_scale),
            )
        elif kernel == "down":
            update = self._update(layer.down_factor)
            scale = _scale(layer.down_scale)
            found = (launch_expert_down_fwd(self.h, layer.down, dispatch, tile, low_rank=update, **scale),)
        elif kernel == "down_bwd":
            found = launch_expert_down_bwd(
                self.grad,
                layer.down,
                self.pre,
                self.weights,
                dispatch,
                _ACTIVATION,
                tile,
                low_rank=self._update(layer.bwd_factor),
                want_weighted_h=layer.settings.bits == 16 or low is not None,
                **_scale(layer.down_scale),
            )
        elif kernel == "gram":
            E, H, I = layer.down.shape  # noqa: E741
            gate_up, down = self.grad.new_empty((E, 2 * I, H)), self.grad.new_empty((E, H, I))
            launch_grouped_gram(self.pre, self.hidden, gate_up, dispatch, tile, gather_right=True)
            launch_grouped_gram(self.grad, self.h, down, dispatch, tile, gather_left=True)
            found = (gate_up, down)
        elif kernel == "low_rank":
            assert layer.rhs is not None
            factor = layer.rhs.transpose(1, 2)
            tile = tile.for_rank(factor.shape[2])
            found = (launch_grouped_gemm(self.hidden, factor, dispatch, tile, gather=True),)
        else:
            assert low is not None
            lhs = self.grad.new_empty((layer.down.shape[0], self.pre.shape[1], low.shape[1]))
            launch_grouped_gram(self.pre, low, lhs, dispatch, tile.for_rank(low.shape[1]))
            found = (lhs,)
        return tuple(output for output in found if output is not None)

    def _dispatch(self, block_m: int) -> Dispatch:
        if block_m not in self._dispatches:
            self._dispatches[block_m] = launch_dispatch_fwd(self.index, self.layer.down.shape[0], block_m)
        return self._dispatches[block_m]

    def _update(self, factor: Tensor | None) -> LowRank | None:
        return None if factor is None or self.low is None else LowRank(self.low, factor)


def _scale(scale: Tensor | None) -> dict[str, Any]:
    return {} if scale is None else {"scale": scale}


class CudaTimer:
    """`tune.Measure` by CUDA events: the L2 cache is overwritten before each call, tiles take turns, from another one
    in each round, and the median counts. Overwriting also keeps the GPU busy while the host prepares the launch."""

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._flushed = torch.empty(max(_FLUSHED_BYTES, 4 * cache), dtype=torch.int8, device=device)

    def __call__(self, workload: Workload, kernel: str, tiles: Sequence[Tile], rounds: int) -> list[float]:
        def event() -> torch.cuda.Event:
            return torch.cuda.Event(enable_timing=True)

        marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in tiles]
        for round in range(rounds):
            for turn in range(len(tiles)):
                n = (turn + round) % len(tiles)
                start, end = event(), event()
                self._flushed.zero_()
                start.record()
                workload.outputs(kernel, tiles[n])
                end.record()
                marks[n].append((start, end))
            torch.cuda.synchronize()
        return [1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs) for pairs in marks]
