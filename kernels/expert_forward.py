"""Expert GEMMs, forward: h = act(gate(x)) * up(x), then y = down(h), for rows sorted by expert.

Both run over the tile table of `dispatch.py` on a one-dimensional grid of num_tiles * column tiles; programs of spare
tiles exit. Neighbouring programs take GROUP_M row tiles before the next column tile, so weights and rows are read
again while they are in L2; few giant experts and many small ones fill the GPU alike, tiles being all the grid knows.

| array                        | shape       | dtype            | meaning                                              |
|------------------------------|-------------|------------------|------------------------------------------------------|
| hidden                       | [T, H]      | bf16, fp16, fp32 | input of the experts                                 |
| gate_up_proj                 | [E, 2I, H]  | same             | rows 0..I-1 gate, I..2I-1 up                         |
| down_proj                    | [E, H, I]   | same             |                                                      |
| h                            | [N, I]      | same             | activation, by position                              |
| y                            | [N, H]      | same             | output of a row's expert, unweighted, by position    |
| order, offsets, tile_*       | see dispatch.py                                                                       |

y is rounded to the input's dtype, as the stock model rounds it: in float32 it would double the traffic of the largest
workspace. Sums run in float32; float32 inputs are multiplied in full precision, never in TF32. h and y are unset from
position offsets[E] on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import dot, round_to
from .dispatch import Dispatch
from .tiles import Tile

GROUP_M = 8


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) through exp2, with the exponent bounded so that nothing overflows."""
    return 1.0 / (1.0 + tl.exp2(tl.minimum(x * -1.4426950408889634, 126.0)))


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """Activation in float32. gelu_tanh: 0.5 * (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    tl.static_assert(ACTIVATION == "gelu_tanh" or ACTIVATION == "gelu" or ACTIVATION == "silu")
    if ACTIVATION == "gelu_tanh":
        return gate * _sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        return gate * _sigmoid(gate)


@triton.jit
def _tile_and_column(num_tiles, num_columns, GROUP_M: tl.constexpr):
    """Which tile and which column tile this program owns."""
    program = tl.program_id(0)
    group = program // (GROUP_M * num_columns)
    within = program % (GROUP_M * num_columns)
    size = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % size, within // size


@triton.jit
def _expert_up_fwd_kernel(
    hidden_ptr,
    gate_up_ptr,
    h_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    top_k,
    H,
    I,  # noqa: E741
    stride_hidden,
    stride_expert,
    stride_row,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """h = act(gate) * up. Grid: (num_tiles * cdiv(I, BLOCK_N),); a program owns BLOCK_M positions of one expert and
    BLOCK_N columns of h, for which it sums BLOCK_N gate columns and BLOCK_N up columns.

    hidden_ptr       [T, H] bf16, fp16 or fp32, rows `stride_hidden` apart, gathered: row // top_k is the token
    gate_up_ptr      [E, 2I, H] same dtype, experts `stride_expert` and rows `stride_row` apart
    h_ptr            [N, I] same dtype, written
    order_ptr        [N] int32
    offsets_ptr      [E + 1] int32
    tile_expert_ptr  [num_tiles] int32
    tile_start_ptr   [num_tiles] int32
    """
    tile, column = _tile_and_column(num_tiles, tl.cdiv(I, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    position = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    inside = position < tl.load(offsets_ptr + expert + 1)
    # Rows and columns past the end repeat number 0: in bounds without a mask, and never stored.
    token = tl.load(order_ptr + position, mask=inside, other=0) // top_k
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = tl.where(n < I, n, 0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = hidden_ptr + token.to(tl.int64)[:, None] * stride_hidden + k[None, :]
    weight_ptrs = gate_up_ptr + expert.to(tl.int64) * stride_expert + k[:, None]
    gate_ptrs = weight_ptrs + weight_row[None, :] * stride_row
    up_ptrs = weight_ptrs + (weight_row[None, :] + I) * stride_row

    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, H, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            gate_weight = tl.load(gate_ptrs)
            up_weight = tl.load(up_ptrs)
        else:
            in_k = k < H - start
            x = tl.load(x_ptrs, mask=in_k[None, :], other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=in_k[:, None], other=0.0)
            up_weight = tl.load(up_ptrs, mask=in_k[:, None], other=0.0)
        gate = dot(x, gate_weight, gate)
        up = dot(x, up_weight, up)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    h = _activate(gate, ACTIVATION) * up
    h_ptrs = h_ptr + position.to(tl.int64)[:, None] * I + n[None, :]
    tl.store(h_ptrs, round_to(h, h_ptr.dtype.element_ty), mask=inside[:, None] & (n < I)[None, :])


@triton.jit
def _expert_down_fwd_kernel(
    h_ptr,
    down_ptr,
    y_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    H,
    I,  # noqa: E741
    stride_expert,
    stride_row,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = down(h). Grid: (num_tiles * cdiv(H, BLOCK_N),); a program owns BLOCK_M positions of one expert and BLOCK_N
    columns of y.

    h_ptr            [N, I] bf16, fp16 or fp32
    down_ptr         [E, H, I] same dtype, experts `stride_expert` and rows `stride_row` apart
    y_ptr            [N, H] same dtype, written
    offsets_ptr      [E + 1] int32
    tile_expert_ptr  [num_tiles] int32
    tile_start_ptr   [num_tiles] int32
    """
    tile, column = _tile_and_column(num_tiles, tl.cdiv(H, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    position = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    inside = position < tl.load(offsets_ptr + expert + 1)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = tl.where(n < H, n, 0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    h_ptrs = h_ptr + tl.where(inside, position, 0).to(tl.int64)[:, None] * I + k[None, :]
    weight_ptrs = down_ptr + expert.to(tl.int64) * stride_expert + weight_row[None, :] * stride_row + k[:, None]

    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, I, BLOCK_K):
        if EVEN_K:
            h = tl.load(h_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            in_k = k < I - start
            h = tl.load(h_ptrs, mask=in_k[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=in_k[:, None], other=0.0)
        y = dot(h, weight, y)
        h_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    y_ptrs = y_ptr + position.to(tl.int64)[:, None] * H + n[None, :]
    tl.store(y_ptrs, round_to(y, y_ptr.dtype.element_ty), mask=inside[:, None] & (n < H)[None, :])


def launch_expert_up_fwd(
    hidden: Tensor, gate_up_proj: Tensor, dispatch: Dispatch, activation: str, tile: Tile
) -> Tensor:
    """h [N, I] by position, from hidden [T, H] with a contiguous last dimension."""
    H = hidden.shape[1]
    I = gate_up_proj.shape[1] // 2  # noqa: E741
    h = torch.empty((dispatch.order.shape[0], I), dtype=hidden.dtype, device=hidden.device)
    _expert_up_fwd_kernel[(dispatch.num_tiles * triton.cdiv(I, tile.block_n),)](
        hidden,
        gate_up_proj,
        h,
        dispatch.order,
        dispatch.offsets,
        dispatch.tile_expert,
        dispatch.tile_start,
        dispatch.num_tiles,
        dispatch.top_k,
        H,
        I,
        hidden.stride(0),
        gate_up_proj.stride(0),
        gate_up_proj.stride(1),
        ACTIVATION=activation,
        EVEN_K=H % tile.block_k == 0,
        **_blocks(tile),
    )
    return h


def launch_expert_down_fwd(h: Tensor, down_proj: Tensor, dispatch: Dispatch, tile: Tile) -> Tensor:
    """y [N, H] by position, from h [N, I] contiguous."""
    H, I = down_proj.shape[1:]  # noqa: E741
    y = torch.empty((h.shape[0], H), dtype=h.dtype, device=h.device)
    _expert_down_fwd_kernel[(dispatch.num_tiles * triton.cdiv(H, tile.block_n),)](
        h,
        down_proj,
        y,
        dispatch.offsets,
        dispatch.tile_expert,
        dispatch.tile_start,
        dispatch.num_tiles,
        H,
        I,
        down_proj.stride(0),
        down_proj.stride(1),
        EVEN_K=I % tile.block_k == 0,
        **_blocks(tile),
    )
    return y


def _blocks(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
