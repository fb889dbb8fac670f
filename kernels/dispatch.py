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

Up to 4,096 rows take one launch, in which every program reads all ids, twice. For more rows that is what takes the time
(at 131,072 rows and 128 experts 268 MB, in 64 steps that wait for each other), so there are two launches: one counts
the ids of at most 256 sections, one places the rows of each section.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_LAUNCH_ROWS = 4096
MAX_SECTIONS = 256
SECTION_STEP = 512  # rows; a section has a multiple of it
MAX_COUNTED_EXPERTS = 1024  # a program that places rows compares some of them with all experts at once


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
def _store_tiles(expert, first, end, is_last, tile_expert_ptr, tile_start_ptr, num_tiles, BLOCK_M, BLOCK: tl.constexpr):
    """The tiles of an expert whose positions are first .. end-1. They start at slot first // BLOCK_M +
    min(expert, first): at most as many slots as `num_tiles`, and enough for each expert before the next one's begin.
    """
    slot_first = first // BLOCK_M + tl.minimum(expert, first)
    slot_end = end // BLOCK_M + tl.minimum(expert + 1, end)
    slot_end = tl.where(is_last, num_tiles, slot_end)
    for start in range(slot_first, slot_end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tile_start = first + (slot - slot_first) * BLOCK_M
        tl.store(tile_expert_ptr + slot, tl.where(tile_start < end, expert, -1), mask=slot < slot_end)
        tl.store(tile_start_ptr + slot, tile_start, mask=slot < slot_end)


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
    nothing from each other, so there are no atomics, no second launch, and one possible result.

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
    _store_tiles(expert, first, end, is_last, tile_expert_ptr, tile_start_ptr, num_tiles, BLOCK_M, BLOCK)

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


@triton.jit
def _dispatch_count_kernel(
    index_ptr,
    counts_ptr,
    N,
    E,
    SECTION,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """How often each id occurs. Grid: (cdiv(N, SECTION),); a program owns SECTION rows, in steps of BLOCK.

    index_ptr   [N] int32 or int64
    counts_ptr  [programs, E] int32, written
    """
    section = tl.program_id(0)
    begin = section * SECTION
    counts = tl.zeros([BINS], tl.int32)
    for start in range(begin, begin + SECTION, BLOCK):
        row = start + tl.arange(0, BLOCK)
        ids = tl.load(index_ptr + row, mask=row < N, other=-1)
        # BINS > E, so there is a bin for what belongs to no expert.
        counts += tl.histogram(tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32), BINS)
    expert = tl.arange(0, BINS)
    tl.store(counts_ptr + section * E + expert, counts, mask=expert < E)


@triton.jit
def _dispatch_place_kernel(
    index_ptr,
    counts_ptr,
    order_ptr,
    position_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    N,
    E,
    num_tiles,
    sections,
    SECTION,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Places rows by the counts of all sections. Grid: (sections,); a program owns SECTION rows, in steps of ROWS, and
    the tiles and offsets of the experts program_id, program_id + sections, ...

    A row's place is where its expert begins, and the rows of that expert in sections before, and before it in its own:
    a sum of integers, so there is one possible result. Every program adds the counts up itself: at most 256 times E.

    index_ptr        [N] int32 or int64
    counts_ptr       [sections, E] int32
    order_ptr        [N] int32, written
    position_ptr     [N] int32, written
    offsets_ptr      [E + 1] int32, written
    tile_expert_ptr  [num_tiles] int32, written
    tile_start_ptr   [num_tiles] int32, written
    """
    mine = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    part = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, sections, ROWS):
        section = start + part
        mask = (section < sections) & (expert < E)[None, :]
        counts = tl.load(counts_ptr + section * E + expert[None, :], mask=mask, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(section < mine, counts, 0), 0)
    first = tl.cumsum(total, 0) - total

    for own in range(mine, E, sections):
        is_own = expert == own
        own_first = tl.sum(tl.where(is_own, first, 0), 0)
        own_end = own_first + tl.sum(tl.where(is_own, total, 0), 0)
        is_last = own == E - 1
        tl.store(offsets_ptr + own, own_first)
        tl.store(offsets_ptr + E, own_end, mask=is_last)
        _store_tiles(own, own_first, own_end, is_last, tile_expert_ptr, tile_start_ptr, num_tiles, BLOCK_M, 256)

    base = first + before
    begin = mine * SECTION
    for start in range(begin, begin + SECTION, ROWS):
        row = start + tl.arange(0, ROWS)
        ids = tl.load(index_ptr + row, mask=row < N, other=-1)
        held = (ids >= 0) & (ids < E)
        hit = ids[:, None] == expert[None, :]
        rank = tl.cumsum(hit.to(tl.int32), 0)
        position = tl.sum(tl.where(hit, base[None, :] + rank - 1, 0), 1)
        tl.store(order_ptr + position, row, mask=held)
        tl.store(position_ptr + row, tl.where(held, position, -1), mask=row < N)
        base += tl.sum(hit.to(tl.int32), 0)


def launch_dispatch_fwd(index: Tensor, num_experts: int, block_m: int) -> Dispatch:
    """Sorts the rows of `index` [T, K] (int32 or int64, at least one row) by expert, for tiles of `block_m` rows."""
    index = index.contiguous()
    N, E = index.numel(), num_experts
    num_tiles = N // block_m + min(E, N)

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=index.device)

    dispatch = Dispatch(empty(N), empty(N), empty(E + 1), empty(num_tiles), empty(num_tiles), block_m, index.shape[1])
    arrays = (dispatch.order, dispatch.position, dispatch.offsets, dispatch.tile_expert, dispatch.tile_start)
    if N <= ONE_LAUNCH_ROWS or E > MAX_COUNTED_EXPERTS:
        small = N <= 512
        _dispatch_fwd_kernel[(E,)](
            index,
            *arrays,
            N,
            E,
            num_tiles,
            BLOCK_M=block_m,
            BLOCK=512 if small else 4096,
            num_warps=4 if small else 8,
        )
        return dispatch
    section = triton.cdiv(N, MAX_SECTIONS * SECTION_STEP) * SECTION_STEP
    sections = triton.cdiv(N, section)
    counts = empty(sections * E)
    block_e = triton.next_power_of_2(E)
    _dispatch_count_kernel[(sections,)](
        index, counts, N, E, section, BLOCK=SECTION_STEP, BINS=triton.next_power_of_2(E + 1), num_warps=4
    )
    _dispatch_place_kernel[(sections,)](
        index,
        counts,
        *arrays,
        N,
        E,
        num_tiles,
        sections,
        section,
        BLOCK_M=block_m,
        BLOCK_E=block_e,
        ROWS=min(8192 // block_e, 128),
        num_warps=8,
    )
    return dispatch
