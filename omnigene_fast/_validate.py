"""Checks of the operators' arguments. Every error names the argument, what was expected and what came."""

from typing import cast

import torch
from torch import Tensor

from .backends import NAMES as BACKENDS
from .backends import TraceBuffers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW_BIT = (torch.int8, torch.float8_e4m3fn)


def check_ids(index: Tensor, num_experts: int, expert_parallel: bool) -> None:
    """Raise IndexError if an id is negative, or >= `num_experts` without expert parallelism. Reads the data."""
    if index.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or (high >= num_experts and not expert_parallel):
        raise IndexError(
            f"index: expected expert ids in [0, {num_experts}), got {low if low < 0 else high};"
            " pass expert_parallel=True if ids >= E are sentinels of other ranks."
        )


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_tensor(
    name: str,
    tensor: Tensor,
    layout: str,
    rank: int,
    *,
    like: Tensor | None = None,
    device: torch.device | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(tensor).__name__}.")
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {layout}, got shape {shape_of(tensor)}.")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}.")
    if like is not None:
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name}: expected the dtype of the first argument, {like.dtype}, got {tensor.dtype}.")
        device = like.device
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, that of the first argument, got {tensor.device}.")


def check_size(name: str, tensor: Tensor, dim: int, expected: int, source: str) -> None:
    if tensor.shape[dim] != expected:
        raise ValueError(f"{name}: expected shape[{dim}] = {expected} ({source}), got shape {shape_of(tensor)}.")


def check_vector(name: str, tensor: Tensor, size: int, source: str, first: Tensor, *, same_dtype: bool = True) -> None:
    check_tensor(name, tensor, f"[{size}]", 1, like=first if same_dtype else None, device=first.device)
    check_size(name, tensor, 0, size, source)


def check_top_k(top_k: int, E: int) -> None:
    if not isinstance(top_k, int) or not 1 <= top_k <= E:
        raise ValueError(f"top_k: expected an integer in [1, {E}], got {top_k!r}.")


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")


def check_trace(trace: TraceBuffers, rows: Tensor, top_k: int, E: int) -> None:
    if not isinstance(trace, TraceBuffers):
        raise TypeError(f"trace: expected TraceBuffers or None, got {type(trace).__name__}.")
    id_dtypes = (torch.uint8, torch.int16) if E <= 254 else (torch.int16,)
    for name, buffer, width, dtypes in (
        ("ids", trace.ids, top_k, id_dtypes),
        ("weights", trace.weights, top_k, (torch.float16,)),
        ("stats", trace.stats, 3, (torch.float16,)),
    ):
        if buffer is None and name != "ids":
            continue
        buffer = cast(Tensor, buffer)  # or it is refused
        check_tensor(f"trace.{name}", buffer, f"[T_max, {width}]", 2, device=rows.device, dtypes=dtypes)
        if buffer.shape[0] < rows.shape[0] or buffer.shape[1] != width or not buffer.is_contiguous():
            raise ValueError(
                f"trace.{name}: expected contiguous [T_max, {width}] with T_max >= {rows.shape[0]}, got shape"
                f" {shape_of(buffer)} and strides {list(buffer.stride())}."
            )
