"""Triton backend: NVIDIA GPUs from compute capability 8.0 on, and CPU tensors under Triton's interpreter.

Triton is imported by the first call that needs it. Nothing here reads data back to the host, so every call can be
captured in a CUDA graph; OMNIGENE_FAST_CHECK_IDS=1 gives that up for a check of the expert ids.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import Lora

if TYPE_CHECKING:
    from ..kernels.tiles import ExpertTiles

MIN_CAPABILITY = (8, 0)
_INTERPRETED_ARCH = 80


def unavailable(device: torch.device) -> str | None:
    """None if Triton can serve tensors on `device`, else one sentence: why not, and the way out."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install it with `pip install 'omnigene-fast[triton]'`."
    if device.type != "cuda":
        if device.type == "cpu" and _interpreted():
            return None
        return (
            f"Triton kernels need a CUDA device, got {device}; move the tensors to cuda, or set TRITON_INTERPRET=1"
            " before triton is imported to run them, slowly, in its interpreter on the CPU."
        )
    if torch.version.hip is not None:
        return (
            "this torch is built for ROCm, and the Triton kernels are written for NVIDIA GPUs; use backend='reference'."
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; check the driver, or install a CUDA build of torch."
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and the"
            " Triton kernels need 8.0 (Ampere) or newer; use backend='reference'."
        )
    return None


def route(
    hidden: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    per_expert_scale: Tensor,
    top_k: int,
    eps: float,
    numerics: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`omnigene_fast.ops.route` on validated arguments."""
    from ..kernels.gate import launch_route_fwd

    with _on(hidden.device):
        return launch_route_fwd(
            hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, _arch(hidden.device)
        )


def topk_gate(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`omnigene_fast.ops.topk_gate` on validated arguments."""
    from ..kernels.gate import launch_topk_gate_fwd

    with _on(logits.device):
        return launch_topk_gate_fwd(logits, per_expert_scale, top_k)


def expert_mlp(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    lora: Lora,
    activation: str,
    expert_parallel: bool,
    save_preactivation: bool,
    tiles: "ExpertTiles | None" = None,
) -> tuple[Tensor, Tensor | None]:
    """`omnigene_fast.ops.expert_mlp` on validated arguments; `tiles` overrides the choice of `kernels.tiles`."""
    from ..kernels.combine import launch_combine_fwd
    from ..kernels.dispatch import launch_dispatch_fwd
    from ..kernels.expert_forward import launch_expert_down_fwd, launch_expert_up_fwd
    from ..kernels.tiles import expert_tiles, rows_per_expert

    T, H = hidden.shape
    E, _, I = down_proj.shape  # noqa: E741
    if hidden.numel() == 0 or I == 0:
        return torch.zeros_like(hidden, memory_format=torch.contiguous_format), None
    if os.environ.get("OMNIGENE_FAST_CHECK_IDS") == "1":
        _check_ids(index, E, expert_parallel)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    if tiles is None:
        aligned = H % 16 == 0 and I % 16 == 0 and all(map(_aligned, (hidden, gate_up_proj, down_proj)))
        rows = rows_per_expert(T, index.shape[1], E)
        tiles = expert_tiles(rows, I, hidden.dtype, _arch(hidden.device), aligned=aligned)
    with _on(hidden.device):
        dispatch = launch_dispatch_fwd(index, E, tiles.up.block_m)
        h = launch_expert_up_fwd(hidden, gate_up_proj, dispatch, activation, tiles.up)
        y = launch_expert_down_fwd(h, down_proj, dispatch, tiles.down)
        return launch_combine_fwd(y, dispatch.position, weights), None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, so that has to be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _aligned(tensor: Tensor) -> bool:
    """Whether Triton knows that every row begins at a multiple of 16 bytes: it looks at pointers and strides."""
    return tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in tensor.stride()[:-1])


def _check_ids(index: Tensor, num_experts: int, expert_parallel: bool) -> None:
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or (high >= num_experts and not expert_parallel):
        raise IndexError(
            f"index: expected expert ids in [0, {num_experts}), got {low if low < 0 else high};"
            " pass expert_parallel=True if ids >= E are sentinels of other ranks."
        )
