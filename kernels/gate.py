"""Router: RMSNorm without weight, scale, projection, softmax, top-k, renormalise, per-expert scale.

Fewer than 256 tokens take one launch (`launch_route_fwd`, which projects inside the kernel). More tokens take a norm
kernel, torch's GEMM, and a kernel for all that follows the logits, which also serves routers whose projection is a
module of its own (`launch_topk_gate_fwd`).

| array         | shape  | dtype           | meaning                                                                |
|---------------|--------|-----------------|------------------------------------------------------------------------|
| hidden        | [T, H] | bf16, fp16, fp32 | residual stream                                                        |
| logits        | [T, E] | any of those    | projection of the normed, scaled hidden state                          |
| probabilities | [T, E] | fp32            | softmax over E                                                         |
| weights       | [T, K] | fp32            | top-k probabilities, divided by their sum, times the per-expert scale  |
| index         | [T, K] | int64           | expert ids by falling probability; equal ones by rising id             |

A token whose logits hold a NaN or +Inf gets NaN weights and the ids 0..K-1: valid and distinct.

A trace is written where the decision is made, by the same launch: `TraceBuffers`, row t for token t, no other row.
Without one the pointers are None, a compile-time constant: the kernel is the one without the stores.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import dot, round_to
from .tiles import MAX_FUSED_EXPERTS, RouteTile, route_tile

if TYPE_CHECKING:
    from ..backends import TraceBuffers

FUSED_BELOW = 256  # tokens; from here the projection fills the GPU as a GEMM of its own
# A trace may begin at any row of a larger buffer, and its alignment must not decide which kernel is compiled.
_TRACE = ("trace_ids_ptr", "trace_weights_ptr", "trace_stats_ptr")


@triton.jit
def inverse_rms(square_sum, H, eps):
    """(mean square + eps) ** -0.5, correctly rounded at each step: a row pays for it once."""
    return tl.div_rn(tl.full(square_sum.shape, 1.0, tl.float32), tl.sqrt_rn(square_sum / H + eps))


@triton.jit
def _norm_scale_hf(x, reciprocal, scale, root):
    """Normed and scaled row in the dtype of x, rounded three times, where transformers rounds."""
    dtype: tl.constexpr = x.dtype
    normed = round_to(x.to(tl.float32) * reciprocal, dtype)
    scaled = round_to(normed.to(tl.float32) * scale.to(tl.float32), dtype)
    return round_to(scaled.to(tl.float32) * root, dtype)


@triton.jit
def _select_and_store(
    logits,
    token,
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
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Softmax, top-k, renormalise, scale and store for a tile of fp32 logits [rows, BLOCK_E] of the tokens [rows].

    A key holds the bits of a probability (which order as integers, being >= 0) above E-1-id, so one integer maximum
    finds the largest probability and, among equals, the lowest id. Keys of a NaN row keep only the id.
    """
    expert = tl.arange(0, BLOCK_E)[None, :]
    real = expert < E
    logits = tl.where(real, logits, float("-inf"))
    below = logits - tl.max(logits, 1)[:, None]
    exponential = tl.where(real, tl.exp(below), 0.0)
    total = tl.sum(exponential, 1)[:, None]
    probability = exponential / total
    row = token.to(tl.int64)[:, None]
    inside = token[:, None] < T
    tl.store(probabilities_ptr + row * E + expert, probability, mask=inside & real)

    if trace_stats_ptr is not None:
        # ln p = below - ln total, so one logarithm serves all experts; where p is 0, `below` may be -Inf.
        inner = tl.sum(probability * tl.where(probability > 0.0, below, 0.0), 1)[:, None]
        entropy = tl.log(total) - inner

    bits = tl.where(probability == probability, probability.to(tl.int32, bitcast=True), 0)
    key = (bits.to(tl.int64) << 32) | (E - 1 - expert).to(tl.int64)
    key = tl.where(real, key, -1)
    slot = tl.arange(0, BLOCK_K)[None, :]
    best = tl.zeros([logits.shape[0], BLOCK_K], tl.int64)
    for k in range(0, top_k):
        largest = tl.max(key, 1)[:, None]
        best = tl.where(slot == k, largest, best)
        key = tl.where(key == largest, -1, key)

    chosen = slot < top_k
    index = (E - 1) - (best & 0x7FFFFFFF)
    value = tl.where(chosen, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    expert_scale = tl.load(expert_scale_ptr + index, mask=chosen, other=0.0).to(tl.float32)
    mass = tl.sum(value, 1)[:, None]
    weight = value / mass * expert_scale
    tl.store(weights_ptr + row * top_k + slot, weight, mask=inside & chosen)
    tl.store(index_ptr + row * top_k + slot, index, mask=inside & chosen)

    if trace_ids_ptr is not None:
        trace_id = index.to(trace_ids_ptr.dtype.element_ty)
        tl.store(trace_ids_ptr + row * top_k + slot, trace_id, mask=inside & chosen)
    if trace_weights_ptr is not None:
        tl.store(trace_weights_ptr + row * top_k + slot, round_to(weight, tl.float16), mask=inside & chosen)
    if trace_stats_ptr is not None:
        last = tl.sum(tl.where(slot == top_k - 1, value, 0.0), 1)[:, None]
        # No key is left, only -1, where all experts were chosen.
        following = tl.maximum(tl.max(key, 1), 0)[:, None]
        margin = last - (following >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        stat = tl.arange(0, 4)[None, :]
        stats = tl.where(stat == 0, entropy, tl.where(stat == 1, mass, margin))
        stats = tl.where(total == total, stats, float("nan"))
        tl.store(trace_stats_ptr + row * 3 + stat, round_to(stats, tl.float16), mask=inside & (stat < 3))


@triton.jit(do_not_specialize_on_alignment=_TRACE)
def _route_fwd_kernel(
    hidden_ptr,
    proj_ptr,
    scale_ptr,
    expert_scale_ptr,
    probabilities_ptr,
    weights_ptr,
    index_ptr,
    trace_ids_ptr,
    trace_weights_ptr,
    trace_stats_ptr,
    T,
    H,
    E,
    top_k,
    eps,
    root,
    stride_hidden,
    stride_proj,
    NUMERICS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The whole router in one launch. Grid: (cdiv(T, BLOCK_T),); a program owns BLOCK_T tokens and all experts.

    NUMERICS "hf" rounds like transformers; "fp32" keeps float32, with float32 operands of the dot; "fp32_split" does
    so for bfloat16 inputs on tensor cores: a product of two bfloat16 is exactly the sum of a high and a low bfloat16,
    and each of these has its accumulator.

    hidden_ptr         [T, H] bf16, fp16 or fp32, rows `stride_hidden` apart
    proj_ptr           [E, H] same dtype, rows `stride_proj` apart
    scale_ptr          [H] same dtype
    expert_scale_ptr   [E] any float
    probabilities_ptr  [T, E] fp32, written
    weights_ptr        [T, K] fp32, written
    index_ptr          [T, K] int64, written
    trace_ids_ptr      [T, K] uint8 or int16, written; None: no trace
    trace_weights_ptr  [T, K] fp16, written; or None
    trace_stats_ptr    [T, 3] fp16, written: entropy in nats, mass of the chosen, p_K - p_(K+1); or None
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < T
    expert = tl.arange(0, BLOCK_E)
    h = tl.arange(0, BLOCK_H)
    hidden_ptrs = hidden_ptr + token.to(tl.int64)[:, None] * stride_hidden + h[None, :]
    proj_ptrs = proj_ptr + expert.to(tl.int64)[None, :] * stride_proj + h[:, None]

    # Nothing hides the latency of this pass, so it takes few, wide steps.
    BLOCK_SQUARE: tl.constexpr = 16384 // BLOCK_T
    s = tl.arange(0, BLOCK_SQUARE)[None, :]
    square = tl.zeros([BLOCK_T, BLOCK_SQUARE], tl.float32)
    for start in range(0, H, BLOCK_SQUARE):
        square_ptrs = hidden_ptr + token.to(tl.int64)[:, None] * stride_hidden + start + s
        x = tl.load(square_ptrs, mask=inside[:, None] & (s < H - start), other=0.0).to(tl.float32)
        square += x * x
    reciprocal = inverse_rms(tl.sum(square, 1), H, eps)[:, None]

    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    low = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, H, BLOCK_H):
        in_h = h < H - start
        x = tl.load(hidden_ptrs + start, mask=inside[:, None] & in_h[None, :], other=0.0)
        w = tl.load(proj_ptrs + start, mask=(expert < E)[None, :] & in_h[:, None], other=0.0)
        scale = tl.load(scale_ptr + start + h, mask=in_h, other=0.0)[None, :]
        if NUMERICS == "hf":
            logits = dot(_norm_scale_hf(x, reciprocal, scale, root), w, logits)
        elif NUMERICS == "fp32_split":
            product = x.to(tl.float32) * scale.to(tl.float32)
            high = round_to(product, tl.bfloat16)
            logits = dot(high, w, logits)
            low = dot(round_to(product - high.to(tl.float32), tl.bfloat16), w, low)
        else:
            scaled = x.to(tl.float32) * reciprocal * scale.to(tl.float32) * root
            logits = dot(scaled, w.to(tl.float32), logits)
    if NUMERICS == "hf":
        logits = round_to(logits, hidden_ptr.dtype.element_ty).to(tl.float32)
    if NUMERICS == "fp32_split":
        logits = (logits + low) * (reciprocal * root)
    _select_and_store(
        logits,
        token,
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
        BLOCK_E,
        BLOCK_K,
    )


@triton.jit
def _norm_scale_fwd_kernel(
    hidden_ptr,
    scale_ptr,
    out_ptr,
    H,
    eps,
    root,
    stride_hidden,
    BLOCK_H: tl.constexpr,
):
    """What precedes the projection. Grid: (T,); a program owns one token.

    hidden_ptr  [T, H] bf16, fp16 or fp32, rows `stride_hidden` apart
    scale_ptr   [H] same dtype
    out_ptr     [T, H] written, contiguous; in the dtype of hidden it is rounded like transformers, in fp32 not at all
    """
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    hidden_ptr += token * stride_hidden
    out_ptr += token * H
    square = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        x = tl.load(hidden_ptr + start + h, mask=h < H - start, other=0.0).to(tl.float32)
        square += x * x
    reciprocal = inverse_rms(tl.sum(square, 0)[None], H, eps)
    for start in range(0, H, BLOCK_H):
        x = tl.load(hidden_ptr + start + h, mask=h < H - start, other=0.0)
        scale = tl.load(scale_ptr + start + h, mask=h < H - start, other=0.0)
        if out_ptr.dtype.element_ty == hidden_ptr.dtype.element_ty:
            out = _norm_scale_hf(x, reciprocal, scale, root)
        else:
            out = x.to(tl.float32) * reciprocal * scale.to(tl.float32) * root
        tl.store(out_ptr + start + h, out, mask=h < H - start)


@triton.jit(do_not_specialize_on_alignment=_TRACE)
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
    _select_and_store(
        logits,
        token,
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
        BLOCK_E,
        BLOCK_K,
    )


def launch_route_fwd(
    hidden: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    per_expert_scale: Tensor,
    top_k: int,
    eps: float,
    numerics: str,
    arch: int,
    tile: RouteTile | None = None,
    trace: "TraceBuffers | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Router of `reference.route`: probabilities [T, E] fp32, weights [T, K] fp32, index [T, K] int64.

    A `tile` forces the fused kernel; otherwise the number of tokens decides. The first T rows of `trace` are written.
    """
    T, H = hidden.shape
    E = proj_weight.shape[0]
    hidden, proj_weight, scale, per_expert_scale = map(last_contiguous, (hidden, proj_weight, scale, per_expert_scale))
    split = numerics == "fp32" and hidden.dtype == torch.bfloat16
    if tile is None and (E > MAX_FUSED_EXPERTS or (T >= FUSED_BELOW and not split)):
        projected = _project(hidden, proj_weight, scale, eps, numerics)
        return launch_topk_gate_fwd(projected, per_expert_scale, top_k, trace)
    widened = hidden.dtype == torch.float32 or (numerics == "fp32" and not split)
    tile = tile or route_tile(T, E, hidden.dtype, widened, arch)
    outputs = _outputs(hidden, E, top_k)
    if T == 0:
        return outputs
    _route_fwd_kernel[(triton.cdiv(T, tile.block_t),)](
        hidden,
        proj_weight,
        scale,
        per_expert_scale,
        *outputs,
        *(trace or (None, None, None)),
        T,
        H,
        E,
        top_k,
        eps,
        H**-0.5,
        hidden.stride(0),
        proj_weight.stride(0),
        NUMERICS="fp32_split" if split else numerics,
        BLOCK_T=tile.block_t,
        BLOCK_E=triton.next_power_of_2(max(E, 16)),
        BLOCK_H=tile.block_h,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return outputs


def launch_topk_gate_fwd(
    logits: Tensor, per_expert_scale: Tensor, top_k: int, trace: "TraceBuffers | None" = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What follows the projection, `reference.topk_gate`: probabilities, weights, index as `launch_route_fwd`."""
    T, E = logits.shape
    logits, per_expert_scale = last_contiguous(logits), last_contiguous(per_expert_scale)
    outputs = _outputs(logits, E, top_k)
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


def _project(hidden: Tensor, proj_weight: Tensor, scale: Tensor, eps: float, numerics: str) -> Tensor:
    """Logits [T, E] by torch's GEMM; in float32 torch's own setting decides over TF32, as in the stock router."""
    dtype = hidden.dtype if numerics == "hf" else torch.float32
    return F.linear(launch_norm_scale_fwd(hidden, scale, eps, dtype), proj_weight.to(dtype))


def launch_norm_scale_fwd(hidden: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The projection's input [T, H]: in the dtype of hidden rounded like transformers, in float32 not at all."""
    T, H = hidden.shape
    scaled = torch.empty((T, H), dtype=dtype, device=hidden.device)
    if T > 0:
        _norm_scale_fwd_kernel[(T,)](
            hidden,
            scale,
            scaled,
            H,
            eps,
            H**-0.5,
            hidden.stride(0),
            BLOCK_H=min(triton.next_power_of_2(H), 4096 if dtype.itemsize == 2 else 2048),
            num_warps=4,
        )
    return scaled


def _outputs(like: Tensor, E: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    T, device = like.shape[0], like.device
    return (
        torch.empty((T, E), dtype=torch.float32, device=device),
        torch.empty((T, top_k), dtype=torch.float32, device=device),
        torch.empty((T, top_k), dtype=torch.int64, device=device),
    )


def last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
