"""Triton backend: NVIDIA GPUs from compute capability 8.0 on, and CPU tensors under Triton's interpreter.

Triton is imported by the first call that needs it. Nothing here reads data back to the host, so every call can be
captured in a CUDA graph; OMNIGENE_FAST_CHECK_IDS=1 gives that up for a check of the expert ids.
"""

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import PLAIN, Lora, Scales, TraceBuffers

if TYPE_CHECKING:
    from ..kernels.lora import LoraFactors
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
    trace: TraceBuffers | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`omnigene_fast.ops.route` on validated arguments."""
    from ..kernels.gate import launch_route_fwd

    with _on(hidden.device):
        return launch_route_fwd(
            hidden, proj_weight, scale, per_expert_scale, top_k, eps, numerics, _arch(hidden.device), trace=trace
        )


def topk_gate(
    logits: Tensor, per_expert_scale: Tensor, top_k: int, trace: TraceBuffers | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`omnigene_fast.ops.topk_gate` on validated arguments."""
    from ..kernels.gate import launch_topk_gate_fwd

    with _on(logits.device):
        return launch_topk_gate_fwd(logits, per_expert_scale, top_k, trace)


def topk_gate_bwd(
    grad_probabilities: Tensor | None,
    grad_weights: Tensor | None,
    probabilities: Tensor,
    index: Tensor,
    per_expert_scale: Tensor,
    need_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the logits [T, E] float32 and, if `need_scale`, of per_expert_scale [E] float32."""
    from ..kernels.gate_backward import launch_topk_gate_bwd

    with _on(probabilities.device):
        return launch_topk_gate_bwd(
            grad_probabilities, grad_weights, probabilities, index, per_expert_scale, need_scale
        )


def route_bwd(
    d_logits: Tensor, hidden: Tensor, proj_weight: Tensor, scale: Tensor, eps: float, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, proj_weight and scale (float32), where `needed`, from those of the logits [T, E] float32."""
    from ..kernels.gate_backward import launch_route_bwd

    need_hidden, need_proj, need_scale = needed
    with _on(hidden.device):
        return launch_route_bwd(d_logits, hidden, proj_weight, scale, eps, (need_hidden, need_proj, need_scale))


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
    scales: Scales = PLAIN,
    tiles: "ExpertTiles | None" = None,
) -> tuple[Tensor, Tensor | None]:
    """`omnigene_fast.ops.expert_mlp` on validated arguments; `tiles` overrides the choice of `kernels.tiles`."""
    from ..cuda import decode
    from ..kernels.combine import launch_combine_fwd
    from ..kernels.dispatch import launch_dispatch_fwd
    from ..kernels.expert_forward import launch_expert_down_fwd, launch_expert_up_fwd
    from ..kernels.lora import launch_lora_fwd

    E, _, I = down_proj.shape  # noqa: E741
    if hidden.numel() == 0 or I == 0:
        pre = hidden.new_zeros((index.numel(), 2 * I)) if save_preactivation else None
        return torch.zeros_like(hidden, memory_format=torch.contiguous_format), pre
    if os.environ.get("OMNIGENE_FAST_CHECK_IDS") == "1":
        _check_ids(index, E, expert_parallel)
    with _on(hidden.device):
        if tiles is None and decode.serves(hidden, gate_up_proj, index, lora, save_preactivation):
            return decode.expert_mlp(hidden, gate_up_proj, down_proj, index, weights, activation, scales), None
        hidden = _last_contiguous(hidden)
        gate_up_proj, down_proj, scales = _readable(gate_up_proj, down_proj, scales)
        tiles = tiles or _tiles(index, lora, hidden, gate_up_proj, down_proj)
        gate_up_lora, down_lora = _factors(lora)
        dispatch = launch_dispatch_fwd(index, E, tiles.block_m)
        low = launch_lora_fwd(hidden, gate_up_lora, dispatch, tiles, gather=True) if gate_up_lora else None
        h, pre = launch_expert_up_fwd(
            hidden,
            gate_up_proj,
            dispatch,
            activation,
            tiles.up,
            scale=scales.gate_up,
            low_rank=low,
            want_preactivation=save_preactivation,
        )
        assert h is not None
        low = launch_lora_fwd(h, down_lora, dispatch, tiles) if down_lora else None
        y = launch_expert_down_fwd(h, down_proj, dispatch, tiles.down, scale=scales.down, low_rank=low)
        return launch_combine_fwd(y, dispatch.position, weights, index.shape[1]), pre


def expert_mlp_bwd(
    grad_out: Tensor,
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    index: Tensor,
    weights: Tensor,
    lora: Lora,
    preactivation: Tensor | None,
    activation: str,
    expert_parallel: bool,
    needed: Sequence[bool],
    scales: Scales = PLAIN,
    tiles: "ExpertTiles | None" = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, gate_up_proj, down_proj, weights and the four of `lora`, None where not `needed`."""
    from ..kernels.combine import launch_combine_fwd
    from ..kernels.dispatch import launch_dispatch_fwd
    from ..kernels.expert_backward import launch_expert_down_bwd
    from ..kernels.expert_forward import launch_expert_up_fwd
    from ..kernels.grouped_gemm import launch_grouped_gemm, launch_grouped_gram
    from ..kernels.lora import launch_lora_bwd, launch_lora_fwd, launch_lora_lhs_bwd, launch_lora_rhs_bwd

    inputs = (hidden, gate_up_proj, down_proj, weights, *lora)
    E, _, I = down_proj.shape  # noqa: E741
    if hidden.numel() == 0 or I == 0:
        wanted = zip(inputs, needed, strict=True)
        return tuple(x.new_zeros(x.shape) if need and x is not None else None for x, need in wanted)
    if not any(needed):
        return (None,) * len(inputs)
    need_hidden, need_gate_up, need_down, need_weights, need_up_lhs, need_up_rhs, need_down_lhs, need_down_rhs = needed
    d_hidden = d_gate_up = d_down = d_up_lhs = d_up_rhs = d_down_lhs = d_down_rhs = None
    with _on(hidden.device):
        hidden, grad_out = _last_contiguous(hidden), _last_contiguous(grad_out)
        gate_up_proj, down_proj, scales = _readable(gate_up_proj, down_proj, scales)
        tiles = tiles or _tiles(index, lora, hidden, gate_up_proj, down_proj, grad_out)
        gate_up_lora, down_lora = _factors(lora)
        dispatch = launch_dispatch_fwd(index, E, tiles.block_m)

        x_rhs = None
        if gate_up_lora and (preactivation is None or need_up_lhs):
            x_rhs = launch_lora_fwd(hidden, gate_up_lora, dispatch, tiles, gather=True)
        if preactivation is None:
            _, preactivation = launch_expert_up_fwd(
                hidden,
                gate_up_proj,
                dispatch,
                activation,
                tiles.up,
                scale=scales.gate_up,
                low_rank=x_rhs,
                want_h=False,
                want_preactivation=True,
            )
        assert preactivation is not None

        # Down projection, activation, weights.
        want_d_pre = need_hidden or need_gate_up or need_up_lhs or need_up_rhs
        g_lhs = None
        if down_lora and (want_d_pre or need_weights or need_down_rhs):
            g_lhs = launch_lora_bwd(grad_out, down_lora, dispatch, tiles, gather=True)
        d_pre, weighted_h, d_weights = launch_expert_down_bwd(
            grad_out,
            down_proj,
            preactivation,
            weights,
            dispatch,
            activation,
            tiles.down_bwd,
            scale=scales.down,
            low_rank=g_lhs,
            want_d_pre=want_d_pre,
            want_weighted_h=need_down or need_down_lhs or need_down_rhs,
            want_d_weights=need_weights,
        )
        if weighted_h is not None:
            if need_down:
                d_down = torch.empty_like(down_proj, memory_format=torch.contiguous_format)
                launch_grouped_gram(grad_out, weighted_h, d_down, dispatch, tiles.gram, gather_left=True)
            if down_lora and need_down_lhs:
                h_rhs = launch_lora_fwd(weighted_h, down_lora, dispatch, tiles)
                d_down_lhs = launch_lora_lhs_bwd(grad_out, h_rhs.low, down_lora, dispatch, tiles, gather=True)
            if down_lora and need_down_rhs and g_lhs:
                d_down_rhs = launch_lora_rhs_bwd(weighted_h, g_lhs.low, down_lora, dispatch, tiles)

        # Gate and up projections.
        if d_pre is not None:
            d_lhs = None
            if gate_up_lora and (need_hidden or need_up_rhs):
                d_lhs = launch_lora_bwd(d_pre, gate_up_lora, dispatch, tiles)
            if need_hidden:
                d_x = launch_grouped_gemm(
                    d_pre,
                    gate_up_proj,
                    dispatch,
                    tiles.down,
                    scale=scales.gate_up,
                    scale_reduced=True,
                    low_rank=d_lhs,
                )
                d_hidden = launch_combine_fwd(d_x, dispatch.position, None, index.shape[1])
            if need_gate_up:
                d_gate_up = torch.empty_like(gate_up_proj, memory_format=torch.contiguous_format)
                launch_grouped_gram(d_pre, hidden, d_gate_up, dispatch, tiles.gram, gather_right=True)
            if gate_up_lora and need_up_lhs and x_rhs:
                d_up_lhs = launch_lora_lhs_bwd(d_pre, x_rhs.low, gate_up_lora, dispatch, tiles)
            if gate_up_lora and need_up_rhs and d_lhs:
                d_up_rhs = launch_lora_rhs_bwd(hidden, d_lhs.low, gate_up_lora, dispatch, tiles, gather=True)
    return d_hidden, d_gate_up, d_down, d_weights, d_up_lhs, d_up_rhs, d_down_lhs, d_down_rhs


def _readable(gate_up_proj: Tensor, down_proj: Tensor, scales: Scales) -> tuple[Tensor, Tensor, Scales]:
    """Projections and scales as the kernels take them: GPUs that cannot convert e4m3 get its bits."""
    if scales.gate_up is None or scales.down is None:
        return gate_up_proj, down_proj, PLAIN
    from ..kernels.weights import CONVERTS_E4M3

    if gate_up_proj.dtype == torch.float8_e4m3fn and _arch(gate_up_proj.device) < CONVERTS_E4M3:
        gate_up_proj = gate_up_proj.view(torch.uint8)
    if down_proj.dtype == torch.float8_e4m3fn and _arch(down_proj.device) < CONVERTS_E4M3:
        down_proj = down_proj.view(torch.uint8)
    return gate_up_proj, down_proj, Scales(scales.gate_up.contiguous(), scales.down.contiguous())


def _tiles(
    index: Tensor, lora: Lora, hidden: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *others: Tensor
) -> "ExpertTiles":
    """The choice of `kernels.tiles` for these operands."""
    from ..kernels.tiles import expert_tiles, gpu_name, rows_per_expert
    from ..kernels.weights import tiles_of_8_bits

    E, H, I = down_proj.shape  # noqa: E741
    T, K = index.shape
    stored = {gate_up_proj.dtype, down_proj.dtype}
    plain = stored == {hidden.dtype}
    tiles = expert_tiles(
        rows_per_expert(T, K, E),
        I,
        hidden.dtype,
        _arch(hidden.device),
        aligned=H % 16 == 0 and I % 16 == 0 and all(map(_aligned, (hidden, gate_up_proj, down_proj, *others))),
        lora=any(factor is not None for factor in lora),
        weight_bits=16 if plain else 8,
        device=gpu_name(hidden.device),
    )
    return tiles if plain else tiles_of_8_bits(tiles, torch.uint8 in stored)


def _factors(lora: Lora) -> "tuple[LoraFactors | None, LoraFactors | None]":
    from ..kernels.lora import pad_factors

    def pair(lhs: Tensor | None, rhs: Tensor | None) -> "LoraFactors | None":
        return None if lhs is None or rhs is None else pad_factors(lhs, rhs)

    return pair(lora.gate_up_lhs, lora.gate_up_rhs), pair(lora.down_lhs, lora.down_rhs)


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


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
