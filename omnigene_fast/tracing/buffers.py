"""The memory that gates write their decisions into, and the way out of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..integrations.gemma4 import set_trace
from ..ops import TraceBuffers
from .records import id_dtype


class Buffers:
    """Fixed-address buffers [L, T_max, K] of every device that holds routers, and their place in the routers.

    Slots that no gate has written hold the largest id, which is no expert.
    """

    def __init__(self, routers: Sequence[Any], num_experts: int, top_k: int, kinds: Sequence[str]) -> None:
        self._routers, self._top_k, self._kinds = routers, top_k, kinds
        self._wide = id_dtype(num_experts) is np.uint16
        self.tokens = 0  # T_max
        self._groups: list[tuple[list[int], TraceBuffers]] = []  # per device: positions of its layers, their buffers
        self._views: list[TraceBuffers] = []

    @torch.inference_mode(False)  # a later call outside inference mode could not write into what is made within it
    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` rows; whether the addresses changed."""
        if tokens <= self.tokens:
            return False
        self.tokens = 1 << max(tokens - 1, 255).bit_length()  # few sizes, so that compiled graphs see few
        by_device: dict[torch.device, list[int]] = {}
        for layer, router in enumerate(self._routers):
            by_device.setdefault(_device(router), []).append(layer)
        self._groups = [(layers, self._allocate(len(layers), device)) for device, layers in by_device.items()]
        views: dict[int, TraceBuffers] = {}
        for layers, base in self._groups:
            for row, layer in enumerate(layers):
                views[layer] = TraceBuffers(*(None if each is None else each[row] for each in base))  # type: ignore[arg-type]
        self._views = [views[layer] for layer in range(len(self._routers))]
        return True

    def _allocate(self, layers: int, device: torch.device) -> TraceBuffers:
        ids = torch.empty(
            (layers, self.tokens, self._top_k), dtype=torch.int16 if self._wide else torch.uint8, device=device
        )
        _clear(ids)

        def half(kind: str, width: int) -> Tensor | None:
            shape = (layers, self.tokens, width)
            return torch.zeros(shape, dtype=torch.float16, device=device) if kind in self._kinds else None

        return TraceBuffers(ids, half("weights", self._top_k), half("stats", 3))

    def attach(self) -> None:
        """From now on the gates write into these buffers."""
        for router, view in zip(self._routers, self._views, strict=True):
            set_trace(router, view)

    def detach(self) -> None:
        """From now on the gates write nowhere."""
        for router in self._routers:
            set_trace(router, None)

    @torch.inference_mode(False)
    def take(self, tokens: int) -> "Taken":
        """What the gates wrote into the first `tokens` rows, copied; the rows are unused again.

        On a GPU nothing waits: the rows are cloned in the order of the stream, and copied to pinned memory beside it.
        """
        taken = Taken(len(self._routers), self._wide)
        for layers, base in self._groups:
            parts = [None if each is None else each[:, :tokens].clone() for each in base]
            _clear(base.ids[:, :tokens])
            taken.add(layers, to_host(parts))
        return taken


class Taken:
    """The rows of one call on their way to the host."""

    def __init__(self, layers: int, wide: bool) -> None:
        self._layers, self._wide = layers, wide
        self._parts: list[tuple[list[int], Host]] = []

    def add(self, layers: list[int], part: "Host") -> None:
        self._parts.append((layers, part))

    @property
    def nbytes(self) -> int:
        """Bytes that wait on the host."""
        return sum(part.nbytes for _, part in self._parts)

    def arrays(self) -> tuple[NDArray[Any], NDArray[np.float16] | None, NDArray[np.float16] | None]:
        """ids [L, T, K], weights [L, T, K] and stats [L, T, 3], once they have arrived."""
        arrived = [(layers, part.arrays()) for layers, part in self._parts]
        if len(arrived) == 1:
            ids, weights, stats = arrived[0][1]
        else:
            ids, weights, stats = (_merged(self._layers, arrived, kind) for kind in range(3))
        assert ids is not None
        return ids.view(np.uint16) if self._wide else ids, weights, stats


class Host:
    """Tensors on their way to the host, with what to wait for."""

    def __init__(self, tensors: Sequence[Tensor | None], ready: Sequence[Any] = ()) -> None:
        self._tensors, self._ready = tensors, ready

    @property
    def nbytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self._tensors if each is not None)

    def arrays(self) -> list[NDArray[Any] | None]:
        """The tensors as numpy arrays; waits for the copies, in whatever thread calls it."""
        for event in self._ready:
            event.synchronize()
        return [None if each is None else each.numpy() for each in self._tensors]


_side_streams: dict[torch.device, Any] = {}


def to_host(tensors: Sequence[Tensor | None]) -> Host:
    """Begin to copy tensors to the host; nothing may be written to them any more.

    Those of a GPU go beside its stream, into pinned memory: nobody waits but `Host.arrays`.
    """
    gpus = {each.device for each in tensors if each is not None and each.device.type == "cuda"}
    for device in gpus:
        side = _side_streams.setdefault(device, torch.cuda.Stream(device))
        side.wait_stream(torch.cuda.current_stream(device))
    copies: list[Tensor | None] = []
    for each in tensors:
        if each is None or each.device not in gpus:
            copies.append(None if each is None else each.cpu())
            continue
        pinned = torch.empty(each.shape, dtype=each.dtype, pin_memory=True)
        with torch.cuda.stream(_side_streams[each.device]):
            copies.append(pinned.copy_(each, non_blocking=True))
        each.record_stream(_side_streams[each.device])
    events = [torch.cuda.Event() for _ in gpus]
    for device, event in zip(gpus, events, strict=True):
        event.record(_side_streams[device])
    return Host(copies, events)


def _merged(
    layers: int, arrived: Sequence[tuple[list[int], Sequence[NDArray[Any] | None]]], kind: int
) -> NDArray[Any] | None:
    first = arrived[0][1][kind]
    if first is None:
        return None
    whole = np.empty((layers, *first.shape[1:]), first.dtype)
    for rows, arrays in arrived:
        whole[rows] = arrays[kind]
    return whole


def _clear(ids: Tensor) -> None:
    # A compiled forward under checkpointing keeps the buffer for its backward, which does not read it.
    with torch.autograd._unsafe_preserve_version_counter(ids):
        ids.fill_(255 if ids.dtype == torch.uint8 else -1)


def _device(router: Any) -> torch.device:
    """Where `router` runs: with weights that the accelerate library keeps elsewhere, where its hook takes them."""
    hook: Mapping[str, Any] = getattr(router.__dict__.get("_hf_hook"), "__dict__", {})
    elsewhere = hook.get("execution_device")
    if elsewhere is not None:
        return torch.device(elsewhere)
    device: torch.device = router.scale.device
    return device
