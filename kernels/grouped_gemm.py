"""Grouped GEMMs over rows sorted by expert: rows times a matrix of their expert, and rows transposed times rows.

Both serve the experts' projections and their low-rank updates, forward and backward; the two GEMMs with an activation
in their epilogue have kernels of their own (expert_forward.py, expert_backward.py) built from the same parts.

The first kind runs over the tile table of `dispatch.py` on a one-dimensional grid of num_tiles * column tiles; programs
of spare tiles exit. Neighbouring programs take GROUP_M row tiles before the next column tile, so weights and rows are
read again while they are in L2; few giant experts and many small ones fill the GPU alike, tiles being all the grid
knows. Sums run in float32; float32 inputs are multiplied in full precision, never in TF32.

With `Tile.persistent`, as many programs as run at once walk the same tiles in the same order, a static stride apart.
That saves the start of a program per tile and costs up to 72 registers, by compilation for Hopper. By count, not by
measurement, it pays nowhere at Gemma-4's sizes, and no table asks for it: as many waves remain, a spare tile costs the
load of its number either way (about 1 % of the time for all of them, at 512 tokens as at 16,384), and what a tile has
to wait for, row numbers and its first stages, is hidden better by a second program on the multiprocessor.

A low-rank update of a matrix, W + lhs @ rhs, is never built: rows @ rhs^T is a GEMM of its own, whose product with
lhs^T is added to rows @ W^T before it leaves the accumulator (from one of its own where `Tile.chain` is False). Ranks
are padded to multiples of 16 by zeros (lora.py).
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import dot, round_to
from .dispatch import Dispatch
from .tiles import Tile
from .weights import describe, described_tile, scale_columns, widen_step

GROUP_M = 8


class LowRank(NamedTuple):
    """What is added to rows @ B: low @ factor."""

    low: Tensor  # [N, r] by position, contiguous, r a multiple of 16
    factor: Tensor  # [E, r, columns], any strides


@triton.jit
def tile_and_column(index, num_tiles, num_columns, GROUP_M: tl.constexpr):
    """Which tile and which column tile the index stands for."""
    group = index // (GROUP_M * num_columns)
    within = index % (GROUP_M * num_columns)
    size = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % size, within // size


@triton.jit
def load_tile(ptrs, in_row, in_column, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A tile of a matrix, zero outside; a side that the blocks divide evenly needs no mask."""
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(ptrs)
    elif EVEN_ROWS:
        return tl.load(ptrs, mask=in_column[None, :], other=0.0)
    elif EVEN_COLUMNS:
        return tl.load(ptrs, mask=in_row[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=in_row[:, None] & in_column[None, :], other=0.0)


@triton.jit
def add_low_rank(
    total,
    low_ptr,
    factor_ptr,
    row,
    column,
    in_column,
    rank,
    stride_rank,
    stride_column,
    EVEN_COLUMNS: tl.constexpr,
    CHAIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """total + low @ factor for the int64 rows, all within bounds, and columns of `total`.

    low_ptr     [N, rank], contiguous; BLOCK_R divides the rank
    factor_ptr  [rank, columns] of this expert
    """
    r = tl.arange(0, BLOCK_R)
    low_ptrs = low_ptr + row[:, None] * rank + r[None, :]
    factor_ptrs = factor_ptr + r.to(tl.int64)[:, None] * stride_rank + column[None, :] * stride_column
    update = total if CHAIN else tl.zeros_like(total)
    for _ in range(0, rank, BLOCK_R):
        update = dot(tl.load(low_ptrs), load_tile(factor_ptrs, r >= 0, in_column, True, EVEN_COLUMNS), update)
        low_ptrs += BLOCK_R
        factor_ptrs += tl.cast(stride_rank, tl.int64) * BLOCK_R
    return update if CHAIN else total + update


@triton.jit
def halves(a):
    """Left and right half of the columns."""
    parts = tl.reshape(a, [a.shape[0], 2, a.shape[1] // 2])
    return tl.split(tl.permute(parts, [0, 2, 1]))


@triton.jit
def _token_or_position(order_ptr, position, inside, top_k, GATHER: tl.constexpr):
    """int64 row number of the operand that a position stands for; past the end number 0, in bounds without a mask."""
    if GATHER:
        return (tl.load(order_ptr + position, mask=inside, other=0) // top_k).to(tl.int64)
    else:
        return tl.where(inside, position, 0).to(tl.int64)


@triton.jit
def _grouped_gemm_kernel(
    rows_ptr,
    weight_ptr,
    scale_ptr,
    low_ptr,
    factor_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    top_k,
    K,
    N,
    rank,
    stride_rows,
    stride_expert,
    stride_k,
    stride_n,
    stride_factor_expert,
    stride_factor_rank,
    stride_factor_n,
    GATHER: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SCALED_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = rows @ weight + low @ factor. Grid: (num_tiles * cdiv(N, BLOCK_N),), or fewer if PERSISTENT; a tile is
    BLOCK_M positions of one expert and BLOCK_N columns of out.

    rows_ptr         [T, K] if GATHER (row // top_k is the token), else [positions, K]; bf16, fp16 or fp32
    weight_ptr       [E, K, N] same dtype, or 8 bits (weights.py); any strides. If DESCRIBED is "k" or "n", a
                     descriptor of it with that dimension last: [E, N, K] or [E, K, N]
    scale_ptr        [E, K] if SCALED_K, else [E, N], fp32: scales of weights in 8 bits; or None
    low_ptr          [positions, rank] same dtype, contiguous; or None: nothing is added
    factor_ptr       [E, rank, N] same dtype, any strides; or None
    out_ptr          [positions, N] same dtype, contiguous, written
    order_ptr        [positions] int32
    offsets_ptr      [E + 1] int32
    tile_expert_ptr  [num_tiles] int32
    tile_start_ptr   [num_tiles] int32
    """
    num_columns = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0)
    end = num_tiles * num_columns if PERSISTENT else first + 1  # the loop over one tile is no loop once compiled
    for index in range(first, end, tl.num_programs(0) if PERSISTENT else 1):
        tile, column = tile_and_column(index, num_tiles, num_columns, GROUP_M)
        expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
        if expert >= 0:
            position = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
            inside = position < tl.load(offsets_ptr + expert + 1)
            row = _token_or_position(order_ptr, position, inside, top_k, GATHER)
            n = column * BLOCK_N + tl.arange(0, BLOCK_N)
            wide_n = n.to(tl.int64)
            k = tl.arange(0, BLOCK_K)
            rows_ptrs = rows_ptr + row[:, None] * stride_rows + k[None, :]
            if DESCRIBED == "":
                weight_ptrs = weight_ptr + expert * stride_expert
                weight_ptrs += k.to(tl.int64)[:, None] * stride_k + wide_n[None, :] * stride_n

            scales_ptr = scale_ptr if scale_ptr is None else scale_ptr + expert * (K if SCALED_K else N)

            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, K, BLOCK_K):
                in_k = k < K - start
                x = load_tile(rows_ptrs, inside, in_k, True, EVEN_K)
                if DESCRIBED == "k":
                    weight = described_tile(weight_ptr, expert, column * BLOCK_N, start, True)
                elif DESCRIBED == "n":
                    weight = described_tile(weight_ptr, expert, start, column * BLOCK_N, False)
                else:
                    weight = load_tile(weight_ptrs, in_k, n < N, EVEN_K, EVEN_N)
                    weight_ptrs += tl.cast(stride_k, tl.int64) * BLOCK_K
                weight = widen_step(weight, scales_ptr if SCALED_K else None, start + k, in_k, EVEN_K, x.dtype)
                total = dot(x, weight, total)
                rows_ptrs += BLOCK_K
            if scale_ptr is not None and not SCALED_K:
                total = scale_columns(total, scales_ptr, n, n < N)
            if low_ptr is not None:
                total = add_low_rank(
                    total,
                    low_ptr,
                    factor_ptr + expert * stride_factor_expert,
                    tl.where(inside, position, 0).to(tl.int64),
                    wide_n,
                    n < N,
                    rank,
                    stride_factor_rank,
                    stride_factor_n,
                    EVEN_N,
                    CHAIN,
                    BLOCK_R,
                )
            out_ptrs = out_ptr + position.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@triton.jit
def _grouped_gram_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    top_k,
    M,
    N,
    right_columns,
    stride_left,
    stride_right,
    stride_expert,
    stride_m,
    stride_n,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[e] = left^T @ right over the rows of expert e, zeros if it has none. Grid: (E * cdiv(M, BLOCK_M) *
    cdiv(N, BLOCK_N),), experts outermost; a program owns a tile of one expert's matrix and sums over all of its rows.

    left_ptr     [T, M] if GATHER_LEFT (row // top_k is the token), else [positions, M]; bf16, fp16 or fp32
    right_ptr    [T, right_columns] if GATHER_RIGHT, else [positions, right_columns]; same dtype; the first N count
    out_ptr      [E, M, N] same dtype, any strides, written
    order_ptr    [positions] int32
    offsets_ptr  [E + 1] int32
    """
    per_expert = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // per_expert
    within = tl.program_id(0) % per_expert
    group = within // (GROUP_M * tl.cdiv(N, BLOCK_N))
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = within % (GROUP_M * tl.cdiv(N, BLOCK_N))
    m = (group * GROUP_M + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // size) * BLOCK_N + tl.arange(0, BLOCK_N)
    left_ptrs = left_ptr + m[:, None]
    right_ptrs = right_ptr + n[None, :]
    k = tl.arange(0, BLOCK_K)
    first = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_K):
        position = start + k
        inside = position < end
        left_row = _token_or_position(order_ptr, position, inside, top_k, GATHER_LEFT)
        right_row = _token_or_position(order_ptr, position, inside, top_k, GATHER_RIGHT)
        left_ptrs_k = left_ptrs + left_row[None, :] * stride_left
        right_ptrs_k = right_ptrs + right_row[:, None] * stride_right
        left = load_tile(left_ptrs_k, m < M, inside, EVEN_M, False)
        right = load_tile(right_ptrs_k, inside, n < right_columns, False, EVEN_N)
        total = dot(left, right, total)
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_expert
    out_ptrs += m.to(tl.int64)[:, None] * stride_m + n.to(tl.int64)[None, :] * stride_n
    tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def launch_grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    dispatch: Dispatch,
    tile: Tile,
    *,
    gather: bool = False,
    low_rank: LowRank | None = None,
    scale: Tensor | None = None,
    scale_reduced: bool = False,
) -> Tensor:
    """rows @ weight[expert] (+ low @ factor[expert]), [N, columns] by position.

    Args:
        rows: [N, K] by position, or with `gather` [T, K] by token; the last dimension contiguous.
        weight: [E, K, columns], any strides.
        low_rank: what is added.
        scale: of weights in 8 bits, contiguous: [E, columns], or with `scale_reduced` [E, K].
    """
    _, K, N = weight.shape
    out = torch.empty((dispatch.order.shape[0], N), dtype=rows.dtype, device=rows.device)
    last, descriptor = "", None
    if tile.tma and weight.stride(2) == 1:
        last, descriptor = "n", describe(weight, tile.block_k, tile.block_n)
    elif tile.tma:
        last, descriptor = "k", describe(weight.transpose(1, 2), tile.block_n, tile.block_k)
    _grouped_gemm_kernel[(programs(tile, dispatch.num_tiles * triton.cdiv(N, tile.block_n), rows.device),)](
        rows,
        weight if descriptor is None else descriptor,
        scale,
        *(low_rank or (None, None)),
        out,
        *tile_table(dispatch),
        dispatch.top_k,
        K,
        N,
        low_rank.low.shape[1] if low_rank else 0,
        rows.stride(0),
        *(weight.stride() if descriptor is None else (0, 0, 0)),
        *(low_rank.factor.stride() if low_rank else (0, 0, 0)),
        GATHER=gather,
        DESCRIBED="" if descriptor is None else last,
        PERSISTENT=tile.persistent,
        SCALED_K=scale is not None and scale_reduced,
        EVEN_K=K % tile.block_k == 0,
        EVEN_N=N % tile.block_n == 0,
        **rank_options(low_rank, tile),
        **blocks(tile),
    )
    return out


def launch_grouped_gram(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    dispatch: Dispatch,
    tile: Tile,
    *,
    gather_left: bool = False,
    gather_right: bool = False,
) -> None:
    """out[e] = left^T @ right over the rows of expert e; out [E, M, N] may have any strides.

    left [positions, M] and right [positions, >= N] are by position, or with `gather_*` [T, ...] by token; their last
    dimension is contiguous.
    """
    E, M, N = out.shape
    _grouped_gram_kernel[(E * triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)](
        left,
        right,
        out,
        dispatch.order,
        dispatch.offsets,
        dispatch.top_k,
        M,
        N,
        right.shape[1],
        left.stride(0),
        right.stride(0),
        *out.stride(),
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=gather_right,
        EVEN_M=M % tile.block_m == 0,
        EVEN_N=right.shape[1] % tile.block_n == 0,
        # A gathered row comes through a second load, of its number: only twice the depth holds as many tiles in flight.
        **blocks(replace(tile, stages=2 * tile.stages - 1) if gather_left or gather_right else tile),
    )


def programs(tile: Tile, count: int, device: torch.device, accumulators: int = 1) -> int:
    """How many programs walk `count` tiles: one each, or if persistent as many as run at once.

    Two share a multiprocessor if accumulators leave each thread the registers that half of a register file allows.
    """
    if not tile.persistent:
        return count
    held = accumulators * tile.block_m * tile.block_n // (32 * tile.warps)
    return min(count, _multiprocessors(device) * (2 if held <= 64 else 1))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # in the interpreter any number will do
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_table(dispatch: Dispatch) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The arguments of `dispatch` that every kernel over its tiles takes, in their order."""
    return dispatch.order, dispatch.offsets, dispatch.tile_expert, dispatch.tile_start, dispatch.num_tiles


def rank_options(low_rank: LowRank | None, tile: Tile) -> dict[str, int | bool]:
    """Step over the rank: the largest power of two that divides it, and no more than the GEMM's own step."""
    if low_rank is None:
        return {"BLOCK_R": 0, "CHAIN": False}
    rank = low_rank.low.shape[1]
    return {"BLOCK_R": min(rank & -rank, tile.block_k), "CHAIN": tile.chain}


def parts(tile: Tile) -> int:
    """How many column parts leave a thread 16 values of an accumulator at a time: what is elementwise needs registers
    for several of each."""
    return max(tile.block_m * tile.block_n // (512 * tile.warps), 1)


def blocks(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
