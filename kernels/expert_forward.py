"""Expert GEMMs, forward: h = act(gate(x)) * up(x), then y = down(h), for rows sorted by expert.

The first has the kernel of this file, on the grid that grouped_gemm.py describes; the second is a plain grouped GEMM.

| array                        | shape       | dtype            | meaning                                              |
|------------------------------|-------------|------------------|------------------------------------------------------|
| hidden                       | [T, H]      | bf16, fp16, fp32 | input of the experts                                 |
| gate_up_proj                 | [E, 2I, H]  | same, or 8 bits  | rows 0..I-1 gate, I..2I-1 up                         |
| down_proj                    | [E, H, I]   | same, or 8 bits  |                                                      |
| scale                        | [E, 2I], [E, H] | fp32         | of the rows of weights in 8 bits (weights.py)        |
| pre                          | [N, 2I]     | same             | pre-activation (gate, up), by row                    |
| h                            | [N, I]      | same             | activation, by position                              |
| y                            | [N, H]      | same             | output of a row's expert, unweighted, by position    |
| order, offsets, tile_*       | see dispatch.py                                                                       |

y is rounded to the input's dtype, as the stock model rounds it: in float32 it would double the traffic of the largest
workspace. The pre-activation is stored only for a backward, which takes it by row so that it need not know the order of
the positions; rows of no expert are unset, as are h and y from position offsets[E] on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .arithmetic import dot, round_to
from .dispatch import Dispatch
from .grouped_gemm import (
    LowRank,
    add_low_rank,
    blocks,
    halves,
    launch_grouped_gemm,
    load_tile,
    parts,
    programs,
    rank_options,
    tile_and_column,
    tile_table,
)
from .tiles import Tile
from .weights import describe, described_tile, scale_columns, widen


@triton.jit
def _expert_up_fwd_kernel(
    hidden_ptr,
    gate_up_ptr,
    scale_ptr,
    low_ptr,
    factor_ptr,
    pre_ptr,
    h_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    top_k,
    H,
    I,  # noqa: E741
    rank,
    stride_hidden,
    stride_expert,
    stride_row,
    stride_factor_expert,
    stride_factor_rank,
    stride_factor_row,
    ACTIVATION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PERSISTENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHAIN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """h = act(gate) * up. Grid: (num_tiles * cdiv(I, BLOCK_N),), or fewer if PERSISTENT; a tile is BLOCK_M positions of
    one expert and BLOCK_N columns of h, for which BLOCK_N gate columns and BLOCK_N up columns are summed.

    hidden_ptr       [T, H] bf16, fp16 or fp32, rows `stride_hidden` apart, gathered: row // top_k is the token
    gate_up_ptr      [E, 2I, H] same dtype, or 8 bits (weights.py); experts `stride_expert`, rows `stride_row` apart;
                     or, if DESCRIBED, its descriptor
    scale_ptr        [E, 2I] fp32, scales of weights in 8 bits; or None
    low_ptr          [N, rank] same dtype, contiguous; or None: no low-rank update
    factor_ptr       [E, rank, 2I] same dtype, any strides; or None
    pre_ptr          [N, 2I] same dtype, by row, written; or None
    h_ptr            [N, I] same dtype, by position, written; or None
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
            # Rows and columns past the end repeat number 0: in bounds without a mask, and never stored.
            row = tl.load(order_ptr + position, mask=inside, other=0)
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            weight_row = tl.where(n < I, n, 0).to(tl.int64)
            k = tl.arange(0, BLOCK_K)
            x_ptrs = hidden_ptr + (row // top_k).to(tl.int64)[:, None] * stride_hidden + k[None, :]
            if not DESCRIBED:
                weight_ptrs = gate_up_ptr + expert * stride_expert + k[:, None]
                gate_ptrs = weight_ptrs + weight_row[None, :] * stride_row
                up_ptrs = weight_ptrs + (weight_row[None, :] + I) * stride_row

            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, H, BLOCK_K):
                in_k = k < H - start
                x = load_tile(x_ptrs, inside, in_k, True, EVEN_K)
                if DESCRIBED:
                    # In the last column tile, the gate's columns past I are the up projection's first, and its own are
                    # past the matrix, where TMA reads zeros. Neither is stored.
                    gate_weight = described_tile(gate_up_ptr, expert, column * BLOCK_N, start, True)
                    up_weight = described_tile(gate_up_ptr, expert, I + column * BLOCK_N, start, True)
                else:
                    gate_weight = load_tile(gate_ptrs, in_k, n < I, EVEN_K, True)
                    up_weight = load_tile(up_ptrs, in_k, n < I, EVEN_K, True)
                    gate_ptrs += BLOCK_K
                    up_ptrs += BLOCK_K
                gate = dot(x, widen(gate_weight, None, x.dtype), gate)
                up = dot(x, widen(up_weight, None, x.dtype), up)
                x_ptrs += BLOCK_K
            if scale_ptr is not None:
                scales_ptr = scale_ptr + expert * (2 * I)
                gate = scale_columns(gate, scales_ptr, n, n < I)
                up = scale_columns(up, scales_ptr + I, n, n < I)
            if low_ptr is not None:
                own = tl.where(inside, position, 0).to(tl.int64)
                factors_ptr = factor_ptr + expert * stride_factor_expert
                gate = add_low_rank(
                    gate,
                    low_ptr,
                    factors_ptr,
                    own,
                    weight_row,
                    n < I,
                    rank,
                    stride_factor_rank,
                    stride_factor_row,
                    True,
                    CHAIN,
                    BLOCK_R,
                )
                up = add_low_rank(
                    up,
                    low_ptr,
                    factors_ptr,
                    own,
                    weight_row + I,
                    n < I,
                    rank,
                    stride_factor_rank,
                    stride_factor_row,
                    True,
                    CHAIN,
                    BLOCK_R,
                )
            row = row.to(tl.int64)
            position = position.to(tl.int64)
            if PARTS == 1:
                _activate_and_store(gate, up, column * BLOCK_N, pre_ptr, h_ptr, row, position, inside, I, ACTIVATION)
            else:
                left = column * BLOCK_N
                gate, right_gate = halves(gate)
                up, right_up = halves(up)
                _activate_and_store(gate, up, left, pre_ptr, h_ptr, row, position, inside, I, ACTIVATION)
                left += BLOCK_N // 2
                _activate_and_store(right_gate, right_up, left, pre_ptr, h_ptr, row, position, inside, I, ACTIVATION)


@triton.jit
def _activate_and_store(gate, up, first, pre_ptr, h_ptr, row, position, inside, I, ACTIVATION: tl.constexpr):  # noqa: E741
    """Pre-activation by row and activation by position, where wanted, for the columns of `gate` from `first` on."""
    n = first + tl.arange(0, gate.shape[1])
    stored = inside[:, None] & (n < I)[None, :]
    if pre_ptr is not None:
        pre_ptrs = pre_ptr + row[:, None] * (2 * I) + n[None, :]
        tl.store(pre_ptrs, round_to(gate, pre_ptr.dtype.element_ty), mask=stored)
        tl.store(pre_ptrs + I, round_to(up, pre_ptr.dtype.element_ty), mask=stored)
    if h_ptr is not None:
        h = activate(gate, ACTIVATION) * up
        h_ptrs = h_ptr + position[:, None] * I + n[None, :]
        tl.store(h_ptrs, round_to(h, h_ptr.dtype.element_ty), mask=stored)


def launch_expert_up_fwd(
    hidden: Tensor,
    gate_up_proj: Tensor,
    dispatch: Dispatch,
    activation: str,
    tile: Tile,
    *,
    scale: Tensor | None = None,
    low_rank: LowRank | None = None,
    want_h: bool = True,
    want_preactivation: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """h [N, I] by position and the pre-activation [N, 2I] by row, where wanted.

    `hidden` [T, H] has a contiguous last dimension; `scale` [E, 2I], contiguous, is that of weights in 8 bits;
    `low_rank` adds low @ factor [E, r, 2I] to the pre-activation.
    """
    N, H = dispatch.order.shape[0], hidden.shape[1]
    I = gate_up_proj.shape[1] // 2  # noqa: E741
    h = torch.empty((N, I), dtype=hidden.dtype, device=hidden.device) if want_h else None
    pre = torch.empty((N, 2 * I), dtype=hidden.dtype, device=hidden.device) if want_preactivation else None
    descriptor = describe(gate_up_proj, tile.block_n, tile.block_k) if tile.tma else None
    columns = triton.cdiv(I, tile.block_n)
    _expert_up_fwd_kernel[(programs(tile, dispatch.num_tiles * columns, hidden.device, accumulators=2),)](
        hidden,
        gate_up_proj if descriptor is None else descriptor,
        scale,
        *(low_rank or (None, None)),
        pre,
        h,
        *tile_table(dispatch),
        dispatch.top_k,
        H,
        I,
        low_rank.low.shape[1] if low_rank else 0,
        hidden.stride(0),
        *(gate_up_proj.stride()[:2] if descriptor is None else (0, 0)),
        *(low_rank.factor.stride() if low_rank else (0, 0, 0)),
        ACTIVATION=activation,
        DESCRIBED=descriptor is not None,
        PERSISTENT=tile.persistent,
        EVEN_K=H % tile.block_k == 0,
        **rank_options(low_rank, tile),
        PARTS=2 if want_preactivation and parts(tile) >= 4 else 1,
        **blocks(tile),
    )
    return h, pre


def launch_expert_down_fwd(
    h: Tensor,
    down_proj: Tensor,
    dispatch: Dispatch,
    tile: Tile,
    *,
    scale: Tensor | None = None,
    low_rank: LowRank | None = None,
) -> Tensor:
    """y [N, H] by position, from h [N, I] contiguous; `scale` [E, H]; `low_rank` adds low @ factor [E, r, H]."""
    return launch_grouped_gemm(h, down_proj.transpose(1, 2), dispatch, tile, scale=scale, low_rank=low_rank)
