"""Tile choice: one small record per kernel, picked by rules that fit on a screen.

`expert_tiles` and `route_tile` choose; `all_configs` and `all_route_tiles` list everything that they can choose on an
architecture, so that a test compiles and runs each. Pass a record of your own to a launcher to override the choice.
No measurement takes place at run time.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from triton import cdiv, next_power_of_2

# Shared memory that one block may use, in bytes, by compute capability (CUDA C++ Programming Guide, technical
# specifications). An architecture that is not listed gets the smallest.
SHARED_LIMIT = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
SHARED_LEAST = 101_376  # 86, 89, 120, 121


@dataclass(frozen=True)
class Tile:
    """Tile of one GEMM program: rows, columns, reduction step; warps; software-pipeline stages; whether a low-rank
    update goes on in the GEMM's accumulator, which takes fewer registers; whether weights come by TMA descriptors;
    whether programs are as many as multiprocessors and take tile after tile."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    chain: bool = True
    tma: bool = False
    persistent: bool = False

    def for_rank(self, rank: int) -> "Tile":
        """The same with no more columns than a multiple of 16 needs: the largest power of two that divides `rank`."""
        return replace(self, block_n=min(self.block_n, rank & -rank))


@dataclass(frozen=True)
class ExpertTiles:
    """Tiles of the expert GEMMs. Those over rows share one tile table and so one `block_m`."""

    up: Tile
    down: Tile  # and the gradient of hidden, d_pre @ gate_up_proj: the same kernel
    down_bwd: Tile
    low_rank: Tile  # rows times a low-rank factor; the tile of rank 64 and more
    gram: Tile  # gradients of the projections
    low_rank_gram: Tile  # gradients of low-rank factors; the tile of rank 64 and more

    def __post_init__(self) -> None:
        rows = {tile.block_m for tile in (self.up, self.down, self.down_bwd, self.low_rank)}
        if len(rows) != 1:
            raise ValueError(f"up, down, down_bwd and low_rank must share block_m, got {sorted(rows)}.")

    @property
    def block_m(self) -> int:
        return self.up.block_m


class _Columns(NamedTuple):
    """(block_n, block_k, warps) of the GEMMs over rows; the up GEMM holds block_n gate columns and as many up ones."""

    up: tuple[int, int, int]
    down: tuple[int, int, int]
    down_bwd: tuple[int, int, int]


# By block_m. 64 columns divide Gemma-4's I = 704. Below 64 rows the weights' bytes are the bound, so those tiles are
# narrow and deep; wgmma and tcgen05 need 64 rows.
_HALF = {
    16: _Columns(up=(32, 128, 4), down=(64, 128, 4), down_bwd=(64, 128, 4)),
    32: _Columns(up=(32, 128, 4), down=(64, 128, 4), down_bwd=(64, 128, 4)),
    64: _Columns(up=(64, 64, 4), down=(128, 64, 4), down_bwd=(64, 64, 4)),
    128: _Columns(up=(64, 64, 8), down=(128, 64, 8), down_bwd=(64, 64, 8)),
}
# At 128 rows on Hopper and datacentre Blackwell the tensor cores read their operands from shared memory: a dot 64
# columns wide takes all of its 128 bytes per clock and leaves none for filling it. Twice the width takes three
# quarters, which by this count (not by measurement) pays for a last column tile that is half empty.
_HALF_WIDE = _Columns(up=(128, 64, 8), down=(256, 64, 8), down_bwd=(128, 64, 8))
_WIDE_ARCHES = (90, 100, 103)
_WIDE_PADDING = 1.125
# Rows that are not 16-byte aligned are loaded element by element, through registers: smaller tiles, or they spill.
_HALF_UNALIGNED = {
    16: _Columns(up=(32, 64, 4), down=(64, 64, 4), down_bwd=(64, 64, 4)),
    64: _Columns(up=(32, 32, 4), down=(64, 32, 4), down_bwd=(32, 32, 8)),
}
_FLOAT = {
    16: _Columns(up=(32, 32, 4), down=(64, 32, 4), down_bwd=(64, 32, 4)),
    64: _Columns(up=(32, 32, 8), down=(32, 32, 8), down_bwd=(64, 32, 8)),
}
# (block_m, block_n, block_k, warps) of the Gram products, then of those with a low-rank factor's rows.
_HALF_GRAM = ((128, 128, 64, 8), (128, 64, 64, 8))
_HALF_GRAM_WIDE = ((128, 256, 64, 8), (128, 64, 64, 8))
_HALF_GRAM_UNALIGNED = ((64, 64, 32, 4), (64, 64, 32, 4))
_FLOAT_GRAM = ((64, 64, 32, 8), (64, 64, 32, 8))
_MAX_STAGES = 4
# Triton 3.7.1 has miscompiled two products chained into one accumulator for sm_100. There, a low-rank update has its
# own, which leaves no registers for wide tiles.
_CHAIN_BELOW = 100


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one block may use on `arch` (80, 90, 100, ...)."""
    return SHARED_LIMIT.get(arch, SHARED_LEAST)


def expert_tiles(
    rows_per_expert: int, intermediate: int, dtype: torch.dtype, arch: int, *, aligned: bool = True, lora: bool = False
) -> ExpertTiles:
    """Tiles of the expert GEMMs.

    Args:
        rows_per_expert: T * K / E, rounded up.
        intermediate: I.
        dtype: of hidden and weights.
        arch: compute capability, 80, 90, 100, ...
        aligned: every row of every operand begins at a multiple of 16 bytes.
        lora: a projection has a low-rank update.
    """
    table = _table(dtype, aligned)
    block_m = min(max(next_power_of_2(max(rows_per_expert, 1)), 16), max(table))
    while block_m not in table:
        block_m //= 2
    wide_up = cdiv(intermediate, 128) * 128 <= _WIDE_PADDING * intermediate
    return _build(block_m, dtype, arch, aligned, wide_up, lora)


def all_configs(arch: int) -> list[tuple[torch.dtype, bool, bool, ExpertTiles]]:
    """Every (dtype, aligned, lora, tiles) that `expert_tiles` can return on `arch`; bfloat16 stands for float16 too."""
    configs = []
    for dtype in (torch.bfloat16, torch.float32):
        for aligned in (True, False):
            for block_m in _table(dtype, aligned):
                for wide_up, lora in product((False, True), repeat=2):
                    config = (dtype, aligned, lora, _build(block_m, dtype, arch, aligned, wide_up, lora))
                    if config not in configs:
                        configs.append(config)
    return configs


def _table(dtype: torch.dtype, aligned: bool) -> dict[int, _Columns]:
    if dtype == torch.float32:
        return _FLOAT
    return _HALF if aligned else _HALF_UNALIGNED


def _build(block_m: int, dtype: torch.dtype, arch: int, aligned: bool, wide_up: bool, lora: bool) -> ExpertTiles:
    columns = _table(dtype, aligned)[block_m]
    half_aligned = aligned and dtype != torch.float32
    if half_aligned:
        gram = _HALF_GRAM_WIDE if arch in _WIDE_ARCHES else _HALF_GRAM
    else:
        gram = _FLOAT_GRAM if dtype == torch.float32 else _HALF_GRAM_UNALIGNED
    if half_aligned and block_m == 128 and arch in _WIDE_ARCHES and (arch < _CHAIN_BELOW or not lora):
        columns = _HALF_WIDE if wide_up else columns._replace(down=_HALF_WIDE.down)

    def tile(rows: int, n: int, k: int, warps: int, operands: int = 1) -> Tile:
        return Tile(rows, n, k, warps, _stages((rows + operands * n) * k * dtype.itemsize, arch), arch < _CHAIN_BELOW)

    return ExpertTiles(
        up=tile(block_m, *columns.up, operands=2),
        down=tile(block_m, *columns.down),
        down_bwd=tile(block_m, *columns.down_bwd),
        low_rank=tile(block_m, 64, *columns.down[1:]),
        gram=tile(*gram[0]),
        low_rank_gram=tile(*gram[1]),
    )


def _stages(stage_bytes: int, arch: int) -> int:
    """Up to four pipeline stages; three will do if that leaves room for a second block on the multiprocessor."""
    shared = shared_limit(arch)
    if shared // 2 // stage_bytes >= 3:
        shared //= 2
    return min(_MAX_STAGES, shared // stage_bytes)


@dataclass(frozen=True)
class RouteTile:
    """Tile of the router: tokens and experts of a program, step over H, warps, stages; whether the launch goes on to
    the choice, by the last of the programs that share a token tile, or leaves that to a second launch. One token to a
    program is a form of its own, which takes all of H in one step."""

    block_t: int
    block_n: int
    block_h: int
    warps: int
    stages: int
    select: bool = True


MAX_FUSED_EXPERTS = 512  # a program that selects holds the logits of all experts, for several tokens
_ROUTE_TILES = ((16, 16), (16, 32), (16, 64), (64, 32), (64, 64), (64, 128), (128, 128))
_TOKEN_ELEMENTS = 16384  # of the projection, in registers at once, where a program has one token
_TOKEN_EXPERTS = 4
_STAGE_BYTES = 32768
# The prediction behind `route_tile`: a program takes in its experts' rows of the projection, and its tokens' hidden
# states, twice where the norm comes first; programs run in waves of one per multiprocessor, which takes in 50 bytes per
# nanosecond; a second launch costs 2 microseconds, which is 100 KB.
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 103: 148}
_LAUNCH_BYTES = 100_000


@lru_cache(maxsize=4096)
def route_tile(T: int, E: int, H: int, dtype: torch.dtype, numerics: str, arch: int) -> RouteTile:
    """Tile of the router with the fewest predicted bytes through one multiprocessor.

    Args:
        T, E, H: sizes.
        dtype: of hidden and the projection.
        numerics: of the kernel, "hf", "fp32" or "fp32_split".
        arch: compute capability, 80, 90, 100, ...
    """
    multiprocessors = _MULTIPROCESSORS.get(arch, 100)
    reads = 1 if numerics == "fp32_split" else 2

    def predicted(tile: RouteTile) -> tuple[float, int]:
        programs = cdiv(T, tile.block_t) * cdiv(E, tile.block_n)
        rows, waves = reads * tile.block_t + tile.block_n, float(cdiv(programs, multiprocessors))
        if tile.block_t == 1:  # several fit on a multiprocessor, and hidden stays in registers
            rows, waves = 1 + tile.block_n, max(programs / multiprocessors, 1.0)
        return waves * rows * H * dtype.itemsize + (0 if tile.select else _LAUNCH_BYTES), programs

    return min(_route_tiles(E, H, dtype, numerics, arch), key=predicted)


def all_route_tiles(E: int, arch: int, H: int = 2816) -> list[tuple[torch.dtype, str, RouteTile]]:
    """Every (dtype, numerics of the operator, tile) that the launcher can choose for `E` experts of width `H`."""
    return [
        (dtype, numerics, tile)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for numerics in ("hf", "fp32")
        for tile in _route_tiles(E, H, dtype, kernel_numerics(dtype, numerics), arch)
    ]


def kernel_numerics(dtype: torch.dtype, numerics: str) -> str:
    """The kernel's for the operator's: bfloat16 keeps to tensor cores in "fp32" too."""
    return "fp32_split" if numerics == "fp32" and dtype == torch.bfloat16 else numerics


def takes_float_products(dtype: torch.dtype, numerics: str) -> bool:
    """Whether the kernel's dot takes float32 operands, which no tensor core multiplies exactly."""
    return dtype == torch.float32 or numerics == "fp32"


def _route_tiles(E: int, H: int, dtype: torch.dtype, numerics: str, arch: int) -> list[RouteTile]:
    width = next_power_of_2(H)
    wide, split = takes_float_products(dtype, numerics), numerics == "fp32_split"
    tiles = []
    if E <= MAX_FUSED_EXPERTS and width <= _TOKEN_ELEMENTS:
        tiles.append(RouteTile(1, min(_TOKEN_ELEMENTS // width, _TOKEN_EXPERTS), width, 8, 1))
    for block_t, block_n in _ROUTE_TILES[:1] if wide else _ROUTE_TILES:
        if block_n > 16 and block_n >= 2 * E:
            continue
        bytes_per_h = (block_t + block_n) * dtype.itemsize
        most = max(2048 // block_t, 32) if split else max(4096 // block_t, 64)
        block_h = min(1 << (_STAGE_BYTES // bytes_per_h).bit_length() - 1, 32 if wide else most)
        stages = min(_MAX_STAGES, shared_limit(arch) // (bytes_per_h * block_h))
        tiles.append(RouteTile(block_t, block_n, block_h, 8, stages, block_t <= 16 and E <= MAX_FUSED_EXPERTS))
    return tiles


def rows_per_expert(T: int, K: int, E: int) -> int:
    """T * K / E, rounded up."""
    return cdiv(T * K, E)
