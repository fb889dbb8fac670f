"""Expert GEMMs, backward, for rows sorted by expert.

With x a row's hidden state, (gate, up) its pre-activation, h = act(gate) * up, w its weight and g the output's gradient
(`omnigene_fast.reference.expert_mlp_bwd` has the derivation):

    a = g W_down,   d w = <a, h>,   d pre = (w a * up * act'(gate), w a * act(gate)),   d x = d pre W_gate_up

The first GEMM has the kernel of this file, whose epilogue does all that is elementwise; the second is a plain grouped
GEMM, and the gradients of the weights are grouped Gram products (grouped_gemm.py). Nothing is summed by atomics.

| array       | shape      | dtype            | meaning                                                                |
|-------------|------------|------------------|------------------------------------------------------------------------|
| grad_out    | [T, H]     | bf16, fp16, fp32 | gradient of the output                                                 |
| pre         | [N, 2I]    | same             | pre-activation (gate, up), by row (expert_forward.py)                  |
| d_pre       | [N, 2I]    | same             | its gradient, by position, rounded once                                |
| weighted_h  | [N, I]     | same             | w * h, by position                                                     |
| partial     | [C, N]     | fp32             | <a, h> over one of C column tiles, by row; then summed in fixed order  |

Arrays by position are unset from offsets[E] on, those by row in rows of no expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate_with_slope
from .arithmetic import dot, round_to
from .dispatch import Dispatch
from .grouped_gemm import (
    LowRank,
    add_low_rank,
    blocks,
    halves,
    load_tile,
    parts,
    programs,
    rank_options,
    tile_and_column,
    tile_table,
)
from .tiles import Tile
from .weights import describe, described_tile, widen_step


@triton.jit
def _expert_down_bwd_kernel(
    grad_ptr,
    down_ptr,
    scale_ptr,
    low_ptr,
    factor_ptr,
    pre_ptr,
    weights_ptr,
    d_pre_ptr,
    weighted_h_ptr,
    partial_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    top_k,
    N,
    H,
    I,  # noqa: E741
    rank,
    stride_grad,
    stride_expert,
    stride_row,
    stride_factor_expert,
    stride_factor_rank,
    stride_factor_column,
    ACTIVATION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PERSISTENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHAIN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """a = grad @ down (+ low @ factor) and what follows from it. Grid: (num_tiles * cdiv(I, BLOCK_N),), or fewer if
    PERSISTENT; a tile is BLOCK_M positions of one expert and BLOCK_N columns of a.

    With H = 0 there is no GEMM: then only weighted_h is of use. What is elementwise runs over one of PARTS column parts
    after the other, or its values would not fit into the registers.

    grad_ptr         [T, H] bf16, fp16 or fp32, rows `stride_grad` apart, gathered: row // top_k is the token
    down_ptr         [E, H, I] same dtype, or 8 bits (weights.py); experts `stride_expert`, rows `stride_row` apart;
                     or, if DESCRIBED, its descriptor
    scale_ptr        [E, H] fp32, scales of weights in 8 bits; or None
    low_ptr          [N, rank] same dtype, contiguous; or None: no low-rank update
    factor_ptr       [E, rank, I] same dtype, any strides; or None
    pre_ptr          [N, 2I] same dtype
    weights_ptr      [N] any float, by row
    d_pre_ptr        [N, 2I] same dtype, written; or None
    weighted_h_ptr   [N, I] same dtype, written; or None
    partial_ptr      [cdiv(I, BLOCK_N), N] fp32, written; or None
    order_ptr        [N] int32
    offsets_ptr      [E + 1] int32
    tile_expert_ptr  [num_tiles] int32
    tile_start_ptr   [num_tiles] int32
    """
    num_columns = tl.cdiv(I, BLOCK_N)
    first = tl.program_id(0)
    end = num_tiles * num_columns if PERSISTENT else first + 1  # the loop over one tile is no loop once compiled
    for index in range(first, end, tl.num_programs(0) if PERSISTENT else 1):
        tile, column = tile_and_column(index, num_tiles, num_columns, GROUP_M)
        expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
        if expert >= 0:
            position = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
            inside = position < tl.load(offsets_ptr + expert + 1)
            row = tl.load(order_ptr + position, mask=inside, other=0)  # past the end row 0: in bounds, and never stored
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            wide_n = n.to(tl.int64)
            k = tl.arange(0, BLOCK_K)
            grad_ptrs = grad_ptr + (row // top_k).to(tl.int64)[:, None] * stride_grad + k[None, :]
            if not DESCRIBED:
                down_ptrs = down_ptr + expert * stride_expert + k.to(tl.int64)[:, None] * stride_row + wide_n[None, :]

            scales_ptr = scale_ptr if scale_ptr is None else scale_ptr + expert * H

            a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, H, BLOCK_K):
                in_k = k < H - start
                g = load_tile(grad_ptrs, inside, in_k, True, EVEN_K)
                if DESCRIBED:
                    down = described_tile(down_ptr, expert, start, column * BLOCK_N, False)
                else:
                    down = load_tile(down_ptrs, in_k, n < I, EVEN_K, EVEN_N)
                    down_ptrs += tl.cast(stride_row, tl.int64) * BLOCK_K
                a = dot(g, widen_step(down, scales_ptr, start + k, in_k, EVEN_K, g.dtype), a)
                grad_ptrs += BLOCK_K
            if low_ptr is not None:
                a = add_low_rank(
                    a,
                    low_ptr,
                    factor_ptr + expert * stride_factor_expert,
                    tl.where(inside, position, 0).to(tl.int64),
                    wide_n,
                    n < I,
                    rank,
                    stride_factor_rank,
                    stride_factor_column,
                    EVEN_N,
                    CHAIN,
                    BLOCK_R,
                )

            row = row.to(tl.int64)
            position = position.to(tl.int64)
            weight = tl.load(weights_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
            pre_ptrs = pre_ptr + row[:, None] * (2 * I)
            d_pre_ptrs = d_pre_ptr if d_pre_ptr is None else d_pre_ptr + position[:, None] * (2 * I)
            h_ptrs = weighted_h_ptr if weighted_h_ptr is None else weighted_h_ptr + position[:, None] * I
            inside = inside[:, None]
            left_column = column * BLOCK_N
            partial = tl.zeros([BLOCK_M], tl.float32)
            if PARTS == 1:
                partial += _elementwise(a, left_column, pre_ptrs, weight, d_pre_ptrs, h_ptrs, inside, I, ACTIVATION)
            else:
                HALF: tl.constexpr = BLOCK_N // 2
                left, right = halves(a)
                if PARTS == 2:
                    partial += _elementwise(
                        left, left_column, pre_ptrs, weight, d_pre_ptrs, h_ptrs, inside, I, ACTIVATION
                    )
                    partial += _elementwise(
                        right, left_column + HALF, pre_ptrs, weight, d_pre_ptrs, h_ptrs, inside, I, ACTIVATION
                    )
                else:
                    QUARTER: tl.constexpr = BLOCK_N // 4
                    for part in tl.static_range(4):
                        quarter = halves(left if part < 2 else right)[part % 2]
                        here = left_column + part * QUARTER
                        partial += _elementwise(
                            quarter, here, pre_ptrs, weight, d_pre_ptrs, h_ptrs, inside, I, ACTIVATION
                        )
            if partial_ptr is not None:
                tl.store(partial_ptr + column.to(tl.int64) * N + row, partial, mask=tl.reshape(inside, [BLOCK_M]))


@triton.jit
def _elementwise(a, first, pre_ptrs, weight, d_pre_ptrs, h_ptrs, inside, I, ACTIVATION: tl.constexpr):  # noqa: E741
    """Stores d_pre and weighted_h for the columns of `a` from `first` on; returns the rows' sums of a * h.

    The pointers are those of the rows, [rows, 1]; d_pre_ptrs and h_ptrs may be None.
    """
    n = first + tl.arange(0, a.shape[1])[None, :]
    stored = inside & (n < I)
    gate = tl.load(pre_ptrs + n, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(pre_ptrs + (n + I), mask=stored, other=0.0).to(tl.float32)
    act, slope = activate_with_slope(gate, ACTIVATION)
    h = act * up
    if h_ptrs is not None:
        tl.store(h_ptrs + n, round_to(weight * h, h_ptrs.dtype.element_ty), mask=stored)
    if d_pre_ptrs is not None:
        d_h = a * weight
        tl.store(d_pre_ptrs + n, round_to(d_h * up * slope, d_pre_ptrs.dtype.element_ty), mask=stored)
        tl.store(d_pre_ptrs + (n + I), round_to(d_h * act, d_pre_ptrs.dtype.element_ty), mask=stored)
    return tl.sum(tl.where(stored, a * h, 0.0), 1)


@triton.jit
def _expert_weights_bwd_kernel(
    partial_ptr,
    position_ptr,
    d_weights_ptr,
    N,
    C,
    BLOCK: tl.constexpr,
):
    """d weight of a row = its partials, summed from the first column tile to the last; 0 for a row of no expert.
    Grid: (cdiv(N, BLOCK),); a program owns BLOCK rows.

    partial_ptr    [C, N] fp32
    position_ptr   [N] int32
    d_weights_ptr  [N] any float, written
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = tl.load(position_ptr + row, mask=row < N, other=-1) >= 0
    total = tl.zeros([BLOCK], tl.float32)
    partial_ptrs = partial_ptr + row
    for _ in range(0, C):
        total += tl.load(partial_ptrs, mask=held, other=0.0)
        partial_ptrs += N
    tl.store(d_weights_ptr + row, round_to(total, d_weights_ptr.dtype.element_ty), mask=row < N)


def launch_expert_down_bwd(
    grad_out: Tensor,
    down_proj: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    dispatch: Dispatch,
    activation: str,
    tile: Tile,
    *,
    scale: Tensor | None = None,
    low_rank: LowRank | None = None,
    want_d_pre: bool = True,
    want_weighted_h: bool = False,
    want_d_weights: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_pre [N, 2I] and weighted_h [N, I] by position, d_weights [T, K] in the dtype of `weights`, where wanted.

    Args:
        grad_out: [T, H], the last dimension contiguous.
        preactivation: [N, 2I] by row, contiguous.
        weights: [T, K].
        scale: [E, H] of weights in 8 bits, contiguous.
        low_rank: adds low @ factor [E, r, I] to the gradient of h.
    """
    H, I = down_proj.shape[1:]  # noqa: E741
    N, dtype, device = dispatch.order.shape[0], grad_out.dtype, grad_out.device
    columns = triton.cdiv(I, tile.block_n)
    d_pre = torch.empty((N, 2 * I), dtype=dtype, device=device) if want_d_pre else None
    weighted_h = torch.empty((N, I), dtype=dtype, device=device) if want_weighted_h else None
    partial = torch.empty((columns, N), dtype=torch.float32, device=device) if want_d_weights else None
    reduction = H if want_d_pre or want_d_weights else 0
    if reduction == 0:
        low_rank = None
    descriptor = describe(down_proj, tile.block_k, tile.block_n) if tile.tma else None
    _expert_down_bwd_kernel[(programs(tile, dispatch.num_tiles * columns, device),)](
        grad_out,
        down_proj if descriptor is None else descriptor,
        scale,
        *(low_rank or (None, None)),
        preactivation,
        weights.contiguous(),
        d_pre,
        weighted_h,
        partial,
        *tile_table(dispatch),
        dispatch.top_k,
        N,
        reduction,
        I,
        low_rank.low.shape[1] if low_rank else 0,
        grad_out.stride(0),
        *(down_proj.stride()[:2] if descriptor is None else (0, 0)),
        *(low_rank.factor.stride() if low_rank else (0, 0, 0)),
        ACTIVATION=activation,
        DESCRIBED=descriptor is not None,
        PERSISTENT=tile.persistent,
        EVEN_K=reduction % tile.block_k == 0,
        EVEN_N=I % tile.block_n == 0,
        **rank_options(low_rank, tile),
        PARTS=min(parts(tile), 4),
        **blocks(tile),
    )
    if partial is None:
        return d_pre, weighted_h, None
    d_weights = torch.empty(weights.shape, dtype=weights.dtype, device=device)
    _expert_weights_bwd_kernel[(triton.cdiv(N, 256),)](
        partial, dispatch.position, d_weights, N, columns, BLOCK=256, num_warps=4
    )
    return d_pre, weighted_h, d_weights
