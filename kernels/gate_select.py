"""What follows the router's projection: softmax, top-k, renormalise, per-expert scale, and the trace of them.

`select_and_store` serves the fused router of gate.py; the kernel here serves logits that another launch has written,
the router's own for many tokens or a projection that is a module of its own. Arrays: see gate.py.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import round_to

if TYPE_CHECKING:
    from ..backends import TraceBuffers

# A trace may begin at any row of a larger buffer, and its alignment must not decide which kernel is compiled.
TRACE_POINTERS = ("trace_ids_ptr", "trace_weights_ptr", "trace_stats_ptr")


@triton.jit
def select_and_store(
    logits,
    token,
    end,
    expert_scale_ptr,
    probabilities_ptr,
    weights_ptr,
    index_ptr,
    trace_ids_ptr,
    trace_weights_ptr,
    trace_stats_ptr,
    E,
    top_k,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Softmax, top-k, renormalise, scale and store for fp32 logits [rows, BLOCK_E] of the tokens [rows] below `end`.

    A probability is >= 0, so its bits order as an integer. Each of the K rounds takes two maxima of 32 bits, which a
    warp finds in one instruction each: of the bits, then the lowest id among their holders. The bits of a NaN row are
    taken as 0; those of an expert that does not exist or is chosen already are -1.
    """
    expert = tl.arange(0, BLOCK_E)[None, :]
    real = expert < E
    logits = tl.where(real, logits, float("-inf"))
    below = logits - tl.max(logits, 1)[:, None]
    exponential = tl.where(real, tl.exp(below), 0.0)
    total = tl.sum(exponential, 1)[:, None]
    probability = exponential / total
    row = token.to(tl.int64)[:, None]
    inside = token[:, None] < end
    tl.store(probabilities_ptr + row * E + expert, probability, mask=inside & real)

    if trace_stats_ptr is not None:
        # ln p = below - ln total, so one logarithm serves all experts; where p is 0, `below` may be -Inf.
        inner = tl.sum(probability * tl.where(probability > 0.0, below, 0.0), 1)[:, None]
        entropy = tl.log(total) - inner

    bits = tl.where(probability == probability, probability.to(tl.int32, bitcast=True), 0)
    bits = tl.where(real, bits, -1)
    slot = tl.arange(0, BLOCK_K)[None, :]
    best = tl.zeros([logits.shape[0], BLOCK_K], tl.int32)
    index = tl.zeros([logits.shape[0], BLOCK_K], tl.int32)
    for k in range(0, top_k):
        largest = tl.max(bits, 1)[:, None]
        first = tl.min(tl.where(bits == largest, expert, BLOCK_E), 1)[:, None]
        best = tl.where(slot == k, largest, best)
        index = tl.where(slot == k, first, index)
        bits = tl.where(expert == first, -1, bits)

    chosen = slot < top_k
    value = tl.where(chosen, best.to(tl.float32, bitcast=True), 0.0)
    expert_scale = tl.load(expert_scale_ptr + index, mask=chosen, other=0.0).to(tl.float32)
    mass = tl.sum(value, 1)[:, None]
    weight = value / mass * expert_scale
    tl.store(weights_ptr + row * top_k + slot, weight, mask=inside & chosen)
    tl.store(index_ptr + row * top_k + slot, index.to(tl.int64), mask=inside & chosen)

    if trace_ids_ptr is not None:
        # -2 stands for a NaN row, whose experts nobody chose.
        trace_id = tl.where(total == total, index, -2).to(trace_ids_ptr.dtype.element_ty)
        tl.store(trace_ids_ptr + row * top_k + slot, trace_id, mask=inside & chosen)
    if trace_weights_ptr is not None:
        tl.store(trace_weights_ptr + row * top_k + slot, round_to(weight, tl.float16), mask=inside & chosen)
    if trace_stats_ptr is not None:
        last = tl.sum(tl.where(slot == top_k - 1, value, 0.0), 1)[:, None]
        # Nothing is left, only -1, where all experts were chosen.
        following = tl.maximum(tl.max(bits, 1), 0)[:, None]
        margin = last - following.to(tl.float32, bitcast=True)
        stat = tl.arange(0, 4)[None, :]
        stats = tl.where(stat == 0, entropy, tl.where(stat == 1, mass, margin))
        stats = tl.where(total == total, stats, float("nan"))
        tl.store(trace_stats_ptr + row * 3 + stat, round_to(stats, tl.float16), mask=inside & (stat < 3))


@triton.jit(do_not_specialize_on_alignment=TRACE_POINTERS)
def _topk_gate_fwd_kernel(
    logits_ptr,
    expert_scale_ptr,
    probabilities_ptr,
    weights_ptr,
    index_ptr,
    trace_ids_ptr,
    trace_weights_ptr,
    trace_stats_ptr,
    T,
    E,
    top_k,
    stride_logits,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What follows the projection. Grid: (cdiv(T, BLOCK_T),); a program owns BLOCK_T tokens and all experts.

    logits_ptr         [T, E] any float, rows `stride_logits` apart
    expert_scale_ptr   [E] any float
    probabilities_ptr  [T, E] fp32, written
    weights_ptr        [T, K] fp32, written
    index_ptr          [T, K] int64, written
    trace_ids_ptr      [T, K] uint8 or int16, written; None: no trace
    trace_weights_ptr  [T, K] fp16, written; or None
    trace_stats_ptr    [T, 3] fp16, written: entropy in nats, mass of the chosen, p_K - p_(K+1); or None
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    logits = tl.load(
        logits_ptr + token.to(tl.int64)[:, None] * stride_logits + expert[None, :],
        mask=(token < T)[:, None] & (expert < E)[None, :],
        other=0.0,
    ).to(tl.float32)
    select_and_store(
        logits,
        token,
        T,
        expert_scale_ptr,
        probabilities_ptr,
        weights_ptr,
        index_ptr,
        trace_ids_ptr,
        trace_weights_ptr,
        trace_stats_ptr,
        E,
        top_k,
        BLOCK_E,
        BLOCK_K,
    )


def launch_topk_gate_fwd(
    logits: Tensor, per_expert_scale: Tensor, top_k: int, trace: "TraceBuffers | None" = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What follows the projection, `reference.topk_gate`: probabilities, weights, index as `launch_route_fwd`."""
    T, E = logits.shape
    logits, per_expert_scale = last_contiguous(logits), last_contiguous(per_expert_scale)
    outputs = gate_outputs(logits, E, top_k)
    if T == 0:
        return outputs
    block_e = triton.next_power_of_2(E)
    block_t = max(512 // block_e, 1)
    _topk_gate_fwd_kernel[(triton.cdiv(T, block_t),)](
        logits,
        per_expert_scale,
        *outputs,
        *(trace or (None, None, None)),
        T,
        E,
        top_k,
        logits.stride(0),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=4,
    )
    return outputs


def gate_outputs(like: Tensor, E: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unset probabilities [T, E] fp32, weights [T, K] fp32, index [T, K] int64 for the rows of `like`."""
    T, device = like.shape[0], like.device
    return (
        torch.empty((T, E), dtype=torch.float32, device=device),
        torch.empty((T, top_k), dtype=torch.float32, device=device),
        torch.empty((T, top_k), dtype=torch.int64, device=device),
    )


def last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
