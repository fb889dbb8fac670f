"""Combine: each token's sum over its rows. Forward, of its experts' outputs with its weights; backward, of its hidden
state's gradients, which hold the weights already.

| array    | shape  | dtype            | meaning                                                        |
|----------|--------|------------------|----------------------------------------------------------------|
| y        | [N, H] | bf16, fp16, fp32 | what a row's expert gave, by position                          |
| position | [N]    | int32            | row -> position, -1 for a row of no expert (dispatch.py)       |
| weights  | [T, K] | any float        | row's weight, or None: each is 1                               |
| out      | [T, H] | dtype of y       | sum over k in the order 0..K-1, in float32, rounded once       |
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import round_to


@triton.jit
def _add_pick(total, y_ptr, position_ptr, weights_ptr, row, h, H):
    """total + weight * y of one row; a row of no expert adds 0 and is not read: its weight may be anything."""
    position = tl.load(position_ptr + row).to(tl.int64)
    held = position >= 0
    columns = tl.where(held, H, 0)
    y = tl.load(y_ptr + position * H + h, mask=h < columns, other=0.0).to(tl.float32)
    if weights_ptr is None:
        return total + y
    else:
        return total + tl.load(weights_ptr + row, mask=held, other=0.0).to(tl.float32) * y


@triton.jit
def _combine_fwd_kernel(
    y_ptr,
    position_ptr,
    weights_ptr,
    out_ptr,
    H,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[t] = sum over k of weights[t, k] * y[position[t, k]]. Grid: (T, cdiv(H, BLOCK_H)); a program owns one token
    and BLOCK_H columns.

    y_ptr         [N, H] bf16, fp16 or fp32
    position_ptr  [N] int32
    weights_ptr   [N] any float; or None
    out_ptr       [T, H] dtype of y, written
    """
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    if TOP_K <= 16:  # unrolled, so that all of a token's loads are in flight at once
        for k in tl.static_range(TOP_K):
            total = _add_pick(total, y_ptr, position_ptr, weights_ptr, token * TOP_K + k, h, H)
    else:
        for k in range(TOP_K):
            total = _add_pick(total, y_ptr, position_ptr, weights_ptr, token * TOP_K + k, h, H)
    tl.store(out_ptr + token * H + h, round_to(total, out_ptr.dtype.element_ty), mask=h < H)


def launch_combine_fwd(y: Tensor, position: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """out [T, H] from y [N, H] by position, and weights [T, K] or None for ones."""
    N, H = y.shape
    T = N // top_k
    out = torch.empty((T, H), dtype=y.dtype, device=y.device)
    block_h = 1024
    _combine_fwd_kernel[(T, triton.cdiv(H, block_h))](
        y,
        position,
        None if weights is None else weights.contiguous(),
        out,
        H,
        TOP_K=top_k,
        BLOCK_H=block_h,
        num_warps=4,
    )
    return out
