"""Router: RMSNorm without weight, scale, projection, softmax, top-k, renormalise, per-expert scale.

One launch up to about a thousand tokens, two above, and in both the trace is written by the launch that chooses. The
projection is what takes time: 720 KB of weights through multiprocessors that each take in some 50 bytes per nanosecond.
So its experts are split over programs, and the last program of a token tile (tickets.py) goes on with the tile's
logits; `tiles.route_tile` picks the form and says by which prediction.

| form                    | kernels                             | serves                                               |
|-------------------------|-------------------------------------|------------------------------------------------------|
| a token per program     | `_route_token_fwd`                  | few tokens, at most 512 experts                      |
| a token tile, selecting | `_route_fwd`                        | up to some 1,000 tokens, at most 512 experts         |
| a token tile, no choice | `_route_fwd`, `_topk_gate_fwd`      | more of either                                       |
| torch's GEMM            | `_norm_scale_fwd`, `_topk_gate_fwd` | float32 products from 256 tokens or past 512 experts |

| array         | shape  | dtype           | meaning                                                                |
|---------------|--------|-----------------|------------------------------------------------------------------------|
| hidden        | [T, H] | bf16, fp16, fp32 | residual stream                                                        |
| logits        | [T, E] | any of those    | projection of the normed, scaled hidden state                          |
| probabilities | [T, E] | fp32            | softmax over E                                                         |
| weights       | [T, K] | fp32            | top-k probabilities, divided by their sum, times the per-expert scale  |
| index         | [T, K] | int64           | expert ids by falling probability; equal ones by rising id             |

A token whose logits hold a NaN or +Inf gets NaN weights and the ids 0..K-1: valid and distinct; a trace gets -2.

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
from .gate_select import TRACE_POINTERS, gate_outputs, last_contiguous, launch_topk_gate_fwd, select_and_store
from .tickets import tickets
from .tiles import MAX_FUSED_EXPERTS, RouteTile, kernel_numerics, route_tile, takes_float_products

if TYPE_CHECKING:
    from ..backends import TraceBuffers

GEMM_FROM = 256  # tokens; from here products of float32 fill the GPU as a GEMM of their own
_UNALIGNED = (*TRACE_POINTERS, "ticket_ptr")  # any row of a buffer


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
def _select_if_last(
    ticket_ptr,
    first,
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
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The rest of the router for the tokens first .. end-1, in the program that stored the last part of their logits,
    which lie where the probabilities go. ROWS tokens at a time.

    All threads have stored their logits before the first one takes the ticket, and its acquiring and releasing order
    the parts of all programs before what the last one reads; it reads past its first-level cache.
    """
    tl.debug_barrier()
    is_last = True
    if SPLITS > 1:
        is_last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if is_last:
        if SPLITS > 1:
            tl.store(ticket_ptr, 0)
        expert = tl.arange(0, BLOCK_E)[None, :]
        for start in range(0, BLOCK_T, ROWS):
            token = first + start + tl.arange(0, ROWS)
            logits = tl.load(
                probabilities_ptr + token.to(tl.int64)[:, None] * E + expert,
                mask=(token < end)[:, None] & (expert < E),
                other=0.0,
                cache_modifier=".cg",
            )
            if ROWS * BLOCK_E < 256:  # several warps hold a row: all have it before the first writes over it
                tl.debug_barrier()
            select_and_store(
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
                BLOCK_E,
                BLOCK_K,
            )


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _route_token_fwd_kernel(
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
    ticket_ptr,
    T,
    H,
    E,
    top_k,
    eps,
    root,
    stride_hidden,
    stride_proj,
    NUMERICS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The whole router in one launch, for few tokens. Grid: (T * SPLITS,); a program owns one token and BLOCK_N
    experts, and one program of each token the rest.

    All it reads is asked for at once, the projection's rows before the norm is known: one wait for memory.
    Arguments: see `_route_fwd_kernel`; ticket_ptr is [T]. "fp32_split" is for tensor cores and does not occur.
    """
    token = tl.program_id(0) // SPLITS
    expert = tl.program_id(0) % SPLITS * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)[None, :]
    in_h = h < H
    proj_ptrs = proj_ptr + expert.to(tl.int64)[:, None] * stride_proj + h
    x = tl.load(hidden_ptr + token.to(tl.int64) * stride_hidden + h, mask=in_h, other=0.0)
    w = tl.load(proj_ptrs, mask=(expert < E)[:, None] & in_h, other=0.0)
    scale = tl.load(scale_ptr + h, mask=in_h, other=0.0)
    wide = x.to(tl.float32)
    reciprocal = inverse_rms(tl.sum(wide * wide, 1), H, eps)[:, None]
    if NUMERICS == "hf":
        scaled = _norm_scale_hf(x, reciprocal, scale, root).to(tl.float32)
    else:
        scaled = wide * reciprocal * scale.to(tl.float32) * root
    logits = tl.sum(scaled * w.to(tl.float32), 1)
    if NUMERICS == "hf":
        logits = round_to(logits, hidden_ptr.dtype.element_ty).to(tl.float32)
    tl.store(probabilities_ptr + token.to(tl.int64) * E + expert, logits, mask=expert < E)
    _select_if_last(
        None if SPLITS == 1 else ticket_ptr + token,
        token,
        token + 1,
        expert_scale_ptr,
        probabilities_ptr,
        weights_ptr,
        index_ptr,
        trace_ids_ptr,
        trace_weights_ptr,
        trace_stats_ptr,
        E,
        top_k,
        SPLITS,
        1,
        ROWS,
        BLOCK_E,
        BLOCK_K,
    )


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _route_fwd_kernel(
    hidden_ptr,
    proj_ptr,
    scale_ptr,
    expert_scale_ptr,
    logits_ptr,
    weights_ptr,
    index_ptr,
    trace_ids_ptr,
    trace_weights_ptr,
    trace_stats_ptr,
    ticket_ptr,
    T,
    H,
    E,
    top_k,
    eps,
    root,
    stride_hidden,
    stride_proj,
    NUMERICS: tl.constexpr,
    SPLITS: tl.constexpr,
    SELECT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Norm and projection, and if SELECT the whole router. Grid: (cdiv(T, BLOCK_T) * SPLITS,); a program owns BLOCK_T
    tokens and BLOCK_N experts, and one program of each token tile the rest.

    NUMERICS "hf" rounds like transformers; "fp32" keeps float32, with float32 operands of the dot; "fp32_split" does
    so for bfloat16 inputs on tensor cores: a product of two bfloat16 is exactly the sum of a high and a low bfloat16,
    and each of these has its accumulator. It needs the norm at the end only, and so reads hidden once; the others read
    it twice, the second time from its end, where the second-level cache still holds what was read last.

    hidden_ptr         [T, H] bf16, fp16 or fp32, rows `stride_hidden` apart
    proj_ptr           [E, H] same dtype, rows `stride_proj` apart
    scale_ptr          [H] same dtype
    expert_scale_ptr   [E] any float
    logits_ptr         [T, E] written: the probabilities, fp32, if SELECT, else the logits, "hf" in the dtype of hidden
    weights_ptr        [T, K] fp32, written; or None
    index_ptr          [T, K] int64, written; or None
    trace_ids_ptr      [T, K] uint8 or int16, written; None: no trace
    trace_weights_ptr  [T, K] fp16, written; or None
    trace_stats_ptr    [T, 3] fp16, written: entropy in nats, mass of the chosen, p_K - p_(K+1); or None
    ticket_ptr         [cdiv(T, BLOCK_T)] int32, zeros before and after; or None: SPLITS is 1 or nothing is selected
    """
    first = tl.program_id(0) // SPLITS * BLOCK_T
    token = first + tl.arange(0, BLOCK_T)
    inside = token < T
    expert = tl.program_id(0) % SPLITS * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    rows = hidden_ptr + token.to(tl.int64)[:, None] * stride_hidden
    hidden_ptrs = rows + h[None, :]
    proj_ptrs = proj_ptr + expert.to(tl.int64)[None, :] * stride_proj + h[:, None]

    if NUMERICS == "fp32_split":
        square = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    else:
        # Nothing hides the latency of this pass, so it takes few, wide steps.
        square = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        s = tl.arange(0, BLOCK_S)[None, :]
        for start in range(0, H, BLOCK_S):
            x = tl.load(rows + start + s, mask=inside[:, None] & (s < H - start), other=0.0).to(tl.float32)
            square += x * x
        reciprocal = inverse_rms(tl.sum(square, 1), H, eps)[:, None]

    logits = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    low = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    steps = tl.cdiv(H, BLOCK_H)
    for step in range(0, steps):
        start = (steps - 1 - step) * BLOCK_H
        in_h = h < H - start
        x = tl.load(hidden_ptrs + start, mask=inside[:, None] & in_h[None, :], other=0.0)
        w = tl.load(proj_ptrs + start, mask=(expert < E)[None, :] & in_h[:, None], other=0.0)
        scale = tl.load(scale_ptr + start + h, mask=in_h, other=0.0)[None, :]
        if NUMERICS == "hf":
            logits = dot(_norm_scale_hf(x, reciprocal, scale, root), w, logits)
        elif NUMERICS == "fp32_split":
            wide = x.to(tl.float32)
            square += wide * wide
            product = wide * scale.to(tl.float32)
            high = round_to(product, tl.bfloat16)
            logits = dot(high, w, logits)
            low = dot(round_to(product - high.to(tl.float32), tl.bfloat16), w, low)
        else:
            scaled = x.to(tl.float32) * reciprocal * scale.to(tl.float32) * root
            logits = dot(scaled, w.to(tl.float32), logits)
    if NUMERICS == "hf":
        logits = round_to(logits, hidden_ptr.dtype.element_ty)
    if NUMERICS == "fp32_split":
        logits = (logits + low) * (inverse_rms(tl.sum(square, 1), H, eps)[:, None] * root)
    logits_ptrs = logits_ptr + token.to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(logits_ptrs, logits.to(logits_ptr.dtype.element_ty), mask=inside[:, None] & (expert < E)[None, :])
    if SELECT:
        _select_if_last(
            None if SPLITS == 1 else ticket_ptr + tl.program_id(0) // SPLITS,
            first,
            tl.minimum(first + BLOCK_T, T),
            expert_scale_ptr,
            logits_ptr,
            weights_ptr,
            index_ptr,
            trace_ids_ptr,
            trace_weights_ptr,
            trace_stats_ptr,
            E,
            top_k,
            SPLITS,
            BLOCK_T,
            ROWS,
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

    A `tile` forces a form; otherwise `tiles.route_tile` chooses. The first T rows of `trace` are written.
    """
    T, H = hidden.shape
    E = proj_weight.shape[0]
    hidden, proj_weight, scale, per_expert_scale = map(last_contiguous, (hidden, proj_weight, scale, per_expert_scale))
    if T == 0:
        return gate_outputs(hidden, E, top_k)
    within = kernel_numerics(hidden.dtype, numerics)
    if tile is None:
        if takes_float_products(hidden.dtype, within) and (E > MAX_FUSED_EXPERTS or T >= GEMM_FROM):
            projected = _project(hidden, proj_weight, scale, eps, numerics)
            return launch_topk_gate_fwd(projected, per_expert_scale, top_k, trace)
        tile = route_tile(T, E, H, hidden.dtype, within, arch)
    if tile.select:
        probabilities, weights, index = outputs = gate_outputs(hidden, E, top_k)
        decided = probabilities, weights, index, *(trace or (None, None, None))
    else:
        dtype = hidden.dtype if numerics == "hf" else torch.float32
        logits = torch.empty((T, E), dtype=dtype, device=hidden.device)
        decided = logits, None, None, None, None, None
    splits = triton.cdiv(E, tile.block_n)
    token_tiles = triton.cdiv(T, tile.block_t)
    arguments = (
        hidden,
        proj_weight,
        scale,
        per_expert_scale,
        *decided,
        tickets(hidden.device, token_tiles) if tile.select and splits > 1 else None,
        T,
        H,
        E,
        top_k,
        eps,
        H**-0.5,
        hidden.stride(0),
        proj_weight.stride(0),
    )
    block_e = triton.next_power_of_2(E)
    options = {
        "SPLITS": splits,
        "BLOCK_N": tile.block_n,
        "BLOCK_H": tile.block_h,
        "BLOCK_E": block_e,
        "BLOCK_K": triton.next_power_of_2(top_k),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if tile.block_t == 1:
        # As many rows as warps, all but one of them masked: then a row is one warp's, and its maxima need no barrier.
        # Past 256 experts that is too much to hold beside the products.
        rows = tile.warps if block_e <= 256 else tile.warps // 2
        _route_token_fwd_kernel[(T * splits,)](*arguments, NUMERICS=numerics, ROWS=rows, **options)
        return outputs
    _route_fwd_kernel[(token_tiles * splits,)](
        *arguments,
        NUMERICS=within,
        SELECT=tile.select,
        BLOCK_T=tile.block_t,
        BLOCK_S=2048 * tile.warps // tile.block_t,
        ROWS=min(max(256 * tile.warps // block_e, 1), tile.block_t),
        **options,
    )
    return outputs if tile.select else launch_topk_gate_fwd(logits, per_expert_scale, top_k, trace)


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
