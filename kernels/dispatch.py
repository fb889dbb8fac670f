"""Dispatch: from each token's expert ids to rows grouped by expert, and to the tiles of the grouped GEMMs.

A row is a (token, pick) pair, numbered token * K + pick; N = T * K of them. A position is a row's place once the rows
are sorted by expert, stably. Ids outside [0, E) belong to no expert: their rows have no position.

| array       | shape       | dtype | meaning                                                                          |
|-------------|-------------|-------|----------------------------------------------------------------------------------|
| index       | [T, K]      | int   | expert id of each row                                                            |
| order       | [N]         | int32 | position -> row; entries from offsets[E] on are unset                            |
| position    | [N]         | int32 | row -> position, -1 for a row of no expert                                       |
| offsets     | [E + 1]     | int32 | positions offsets[e] .. offsets[e+1]-1 belong to expert e                        |
| tile_expert | [num_tiles] | int32 | expert of a tile of block_m positions, -1 for a spare tile                       |
| tile_start  | [num_tiles] | int32 | first position of the tile                                                       |

num_tiles = N // block_m + min(E, N) bounds the tiles of every routing, so the host never has to know the counts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """The arrays of this file's table, with the `block_m` and `top_k` that they were made for."""

    order: Tensor
    position: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_start: Tensor
    block_m: int
    top_k: int

    @property
    def num_tiles(self) -> int:
        return self.tile_expert.shape[0]


@triton.jit
def _dispatch_fwd_kernel(
    index_ptr,
    order_ptr,
    position_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    N,
    E,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stable counting sort in one launch. Grid: (E,); a program owns one expert and reads all ids.

    It counts the rows of lower experts (where its own begin) and its own, then places its rows in order: programs need
    nothing from each other, so there are no atomics, no second launch, and one possible result. The tiles of expert e
    start at slot first // BLOCK_M + min(e, first): at most as many slots as `num_tiles`, and enough for each expert
    before the next one's begin.

    index_ptr        [N] int32 or int64
    order_ptr        [N] int32, written
    position_ptr     [N] int32, written
    offsets_ptr      [E + 1] int32, written
    tile_expert_ptr  [num_tiles] int32, written
    tile_start_ptr   [num_tiles] int32, written
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], tl.int32)
    own = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        row = start + lane
        ids = tl.load(index_ptr + row, mask=row < N, other=-1)
        lower += ((ids >= 0) & (ids < expert)).to(tl.int32)
        own += (ids == expert).to(tl.int32)
    first = tl.sum(lower, 0)
    end = first + tl.sum(own, 0)
    is_last = expert == E - 1
    tl.store(offsets_ptr + expert, first)
    tl.store(offsets_ptr + E, end, mask=is_last)

    slot_first = first // BLOCK_M + tl.minimum(expert, first)
    slot_end = end // BLOCK_M + tl.minimum(expert + 1, end)
    slot_end = tl.where(is_last, num_tiles, slot_end)
    for start in range(slot_first, slot_end, BLOCK):
        slot = start + lane
        tile_start = first + (slot - slot_first) * BLOCK_M
        tl.store(tile_expert_ptr + slot, tl.where(tile_start < end, expert, -1), mask=slot < slot_end)
        tl.store(tile_start_ptr + slot, tile_start, mask=slot < slot_end)

    placed = first
    for start in range(0, N, BLOCK):
        row = start + lane
        ids = tl.load(index_ptr + row, mask=row < N, other=-1)
        is_own = ids == expert
        rank = tl.cumsum(is_own.to(tl.int32), 0)
        position = placed + rank - 1
        tl.store(order_ptr + position, row, mask=is_own)
        tl.store(position_ptr + row, position, mask=is_own)
        if expert == 0:
            orphan = (row < N) & ((ids < 0) | (ids >= E))
            tl.store(position_ptr + row, tl.full([BLOCK], -1, tl.int32), mask=orphan)
        placed += tl.sum(is_own.to(tl.int32), 0)


def launch_dispatch_fwd(index: Tensor, num_experts: int, block_m: int) -> Dispatch:
    """Sorts the rows of `index` [T, K] (int32 or int64, at least one row) by expert, for tiles of `block_m` rows."""
    index = index.contiguous()
    N, E = index.numel(), num_experts
    num_tiles = N // block_m + min(E, N)

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=index.device)

    dispatch = Dispatch(empty(N), empty(N), empty(E + 1), empty(num_tiles), empty(num_tiles), block_m, index.shape[1])
    small = N <= 512
    _dispatch_fwd_kernel[(E,)](
        index,
        dispatch.order,
        dispatch.position,
        dispatch.offsets,
        dispatch.tile_expert,
        dispatch.tile_start,
        N,
        E,
        num_tiles,
        BLOCK_M=block_m,
        BLOCK=512 if small else 4096,
        num_warps=4 if small else 8,
    )
    return dispatch
