"""Router, backward: from the gradients of probabilities and weights to those of the logits, the projection's input and
the router's parameters. The two GEMMs between are torch's.

Formulas: `omnigene_fast.reference.topk_gate_bwd` and `route_bwd`. What a parameter's gradient sums over tokens is first
summed inside a program, whose partial goes to a row of its own; torch sums the rows. Nothing is summed by atomics.

| array              | shape  | dtype            | meaning                                                             |
|--------------------|--------|------------------|---------------------------------------------------------------------|
| probabilities      | [T, E] | fp32             | softmax over E                                                      |
| index              | [T, K] | int64            | expert ids, distinct within a token                                 |
| d_logits           | [T, E] | fp32             | zeros included                                                      |
| hidden             | [T, H] | bf16, fp16, fp32 | residual stream                                                     |
| d_scaled, d_hidden | [T, H] | dtype of hidden  | gradients of the normed, scaled hidden state, and of hidden         |
| partial            | [P, .] | fp32             | one row per program                                                 |
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import round_to
from .gate import inverse_rms, launch_norm_scale_fwd
from .gate_select import last_contiguous


@triton.jit
def _topk_gate_bwd_kernel(
    grad_probabilities_ptr,
    grad_weights_ptr,
    probabilities_ptr,
    index_ptr,
    expert_scale_ptr,
    d_logits_ptr,
    partial_ptr,
    T,
    E,
    top_k,
    stride_grad,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """d_logits, and the partials of d per_expert_scale. Grid: (cdiv(T, BLOCK_T),); a program owns BLOCK_T tokens and
    all experts.

    grad_probabilities_ptr  [T, E] fp32, rows `stride_grad` apart; or None: zeros
    grad_weights_ptr        [T, K] fp32, contiguous; or None: zeros
    probabilities_ptr       [T, E] fp32
    index_ptr               [T, K] int64
    expert_scale_ptr        [E] any float
    d_logits_ptr            [T, E] fp32, written
    partial_ptr             [programs, E] fp32, written; or None
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (token < T)[:, None]
    token = token.to(tl.int64)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    real = inside & (expert < E)
    d_logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    d_scale = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if grad_weights_ptr is not None:
        slot = tl.arange(0, BLOCK_K)[None, :]
        chosen = inside & (slot < top_k)
        index = tl.load(index_ptr + token * top_k + slot, mask=chosen, other=0)
        grad = tl.load(grad_weights_ptr + token * top_k + slot, mask=chosen, other=0.0)
        q = tl.load(probabilities_ptr + token * E + index, mask=chosen, other=0.0)
        q /= tl.where(inside, tl.sum(q, 1)[:, None], 1.0)
        d = grad * tl.load(expert_scale_ptr + index, mask=chosen, other=0.0).to(tl.float32)
        d = q * (d - tl.sum(q * d, 1)[:, None])
        for k in range(0, top_k):
            here = slot == k
            hit = expert == tl.sum(tl.where(here, index, 0), 1)[:, None]
            d_logits += tl.where(hit, tl.sum(tl.where(here, d, 0.0), 1)[:, None], 0.0)
            if partial_ptr is not None:
                d_scale += tl.where(hit, tl.sum(tl.where(here, q * grad, 0.0), 1)[:, None], 0.0)
    if grad_probabilities_ptr is not None:
        p = tl.load(probabilities_ptr + token * E + expert, mask=real, other=0.0)
        grad_p = tl.load(grad_probabilities_ptr + token * stride_grad + expert, mask=real, other=0.0)
        d_logits += p * (grad_p - tl.sum(p * grad_p, 1)[:, None])
    tl.store(d_logits_ptr + token * E + expert, d_logits, mask=real)
    if partial_ptr is not None:
        column = tl.arange(0, BLOCK_E)
        partial = tl.sum(tl.where(real, d_scale, 0.0), 0)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * E + column, partial, mask=column < E)


@triton.jit
def _norm_scale_bwd_kernel(
    d_scaled_ptr,
    hidden_ptr,
    scale_ptr,
    d_hidden_ptr,
    partial_ptr,
    T,
    H,
    eps,
    root,
    stride_hidden,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """d_hidden, and the partials of d scale. Grid: (cdiv(T, BLOCK_T),); a program owns BLOCK_T tokens and reads them
    twice: with n = x r, d x = r (d n - n mean(n d n)) needs both means, of x^2 and of n d n, before its first element.

    d_scaled_ptr  [T, H] dtype of hidden, contiguous
    hidden_ptr    [T, H] bf16, fp16 or fp32, rows `stride_hidden` apart
    scale_ptr     [H] same dtype
    d_hidden_ptr  [T, H] same dtype, contiguous, written; or None
    partial_ptr   [programs, H] fp32, written; or None
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (token < T)[:, None]
    token = token.to(tl.int64)[:, None]
    h = tl.arange(0, BLOCK_H)
    hidden_ptrs = hidden_ptr + token * stride_hidden + h[None, :]
    d_scaled_ptrs = d_scaled_ptr + token * H + h[None, :]

    square = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    inner = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        in_h = h < H - start
        mask = inside & in_h[None, :]
        x = tl.load(hidden_ptrs + start, mask=mask, other=0.0).to(tl.float32)
        d_scaled = tl.load(d_scaled_ptrs + start, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + start + h, mask=in_h, other=0.0).to(tl.float32)[None, :]
        square += x * x
        inner += x * (d_scaled * scale)
    r = inverse_rms(tl.sum(square, 1), H, eps)[:, None]
    mean = tl.sum(inner, 1)[:, None] * root * r / H

    for start in range(0, H, BLOCK_H):
        in_h = h < H - start
        mask = inside & in_h[None, :]
        normed = tl.load(hidden_ptrs + start, mask=mask, other=0.0).to(tl.float32) * r
        d_scaled = tl.load(d_scaled_ptrs + start, mask=mask, other=0.0).to(tl.float32) * root
        if d_hidden_ptr is not None:
            scale = tl.load(scale_ptr + start + h, mask=in_h, other=0.0).to(tl.float32)[None, :]
            d_hidden = r * (d_scaled * scale - normed * mean)
            d_hidden_ptrs = d_hidden_ptr + token * H + start + h[None, :]
            tl.store(d_hidden_ptrs, round_to(d_hidden, d_hidden_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            partial = tl.sum(tl.where(mask, d_scaled * normed, 0.0), 0)
            tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * H + start + h, partial, mask=in_h)


def launch_topk_gate_bwd(
    grad_probabilities: Tensor | None,
    grad_weights: Tensor | None,
    probabilities: Tensor,
    index: Tensor,
    per_expert_scale: Tensor,
    need_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the logits [T, E] fp32 and, if `need_scale`, of per_expert_scale [E] fp32."""
    T, E = probabilities.shape
    top_k, device = index.shape[1], probabilities.device
    d_logits = torch.empty((T, E), dtype=torch.float32, device=device)
    block_e = triton.next_power_of_2(E)
    block_t = max(512 // block_e, 1)
    programs = triton.cdiv(T, block_t)
    partial = torch.empty((programs, E), dtype=torch.float32, device=device) if need_scale else None
    if T > 0:
        if grad_probabilities is not None:
            grad_probabilities = last_contiguous(grad_probabilities)
        _topk_gate_bwd_kernel[(programs,)](
            grad_probabilities,
            None if grad_weights is None else grad_weights.contiguous(),
            probabilities.contiguous(),
            index.contiguous(),
            last_contiguous(per_expert_scale),
            d_logits,
            partial,
            T,
            E,
            top_k,
            0 if grad_probabilities is None else grad_probabilities.stride(0),
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_K=triton.next_power_of_2(top_k),
            num_warps=4,
        )
    return d_logits, None if partial is None else partial.sum(0)


def launch_route_bwd(
    d_logits: Tensor, hidden: Tensor, proj_weight: Tensor, scale: Tensor, eps: float, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden [T, H], proj_weight [E, H] and scale [H] fp32, where `needed`, from those of the logits.

    The GEMMs run in the dtype of hidden, as in the stock router; in float32 torch's own setting decides over TF32.
    """
    T, H = hidden.shape
    need_hidden, need_proj, need_scale = needed
    hidden, scale = last_contiguous(hidden), last_contiguous(scale)
    d_logits = d_logits.to(hidden.dtype)
    d_proj = d_hidden = partial = None
    if need_proj:
        d_proj = d_logits.T @ launch_norm_scale_fwd(hidden, scale, eps, hidden.dtype)
    if need_hidden or need_scale:
        block_t = 4
        programs = triton.cdiv(T, block_t)
        d_scaled = d_logits @ proj_weight
        if need_hidden:
            d_hidden = torch.empty((T, H), dtype=hidden.dtype, device=hidden.device)
        if need_scale:
            partial = torch.empty((programs, H), dtype=torch.float32, device=hidden.device)
        if T > 0:
            _norm_scale_bwd_kernel[(programs,)](
                d_scaled,
                hidden,
                scale,
                d_hidden,
                partial,
                T,
                H,
                eps,
                H**-0.5,
                hidden.stride(0),
                BLOCK_T=block_t,
                BLOCK_H=min(triton.next_power_of_2(H), 1024),
                num_warps=8,
            )
    return d_hidden, d_proj, None if partial is None else partial.sum(0)
