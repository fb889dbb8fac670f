"""Tile choice: one small record per kernel, picked by rules that fit on a screen.

`expert_tiles` and `route_tile` choose; `all_configs` and `all_route_tiles` list everything that they can choose on an
architecture, so that a test compiles and runs each. Pass a record of your own to a launcher to override the choice.
No measurement takes place at run time.
"""

from dataclasses import dataclass

import torch
from triton import cdiv, next_power_of_2

# Shared memory that one block may use, in bytes, by compute capability (CUDA C++ Programming Guide, technical
# specifications). An architecture that is not listed gets the smallest.
SHARED_LIMIT = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
SHARED_LEAST = 101_376  # 86, 89, 120, 121


@dataclass(frozen=True)
class Tile:
    """Tile of one GEMM program: rows, columns, reduction step; warps; software-pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ExpertTiles:
    """Tiles of both expert GEMMs. They share one tile table and so one `block_m`."""

    up: Tile
    down: Tile

    def __post_init__(self) -> None:
        if self.up.block_m != self.down.block_m:
            raise ValueError(f"up and down must share block_m, got {self.up.block_m} and {self.down.block_m}.")


# block_m: (block_n, block_k, warps) of the up GEMM, then of the down GEMM. The up GEMM holds block_n gate columns and
# block_n up columns: 64 divides Gemma-4's I = 704. Below 64 rows the weights' bytes are the bound, so those tiles are
# narrow and deep; wgmma and tcgen05 need 64 rows.
_HALF = {
    16: ((32, 128, 4), (64, 128, 4)),
    32: ((32, 128, 4), (64, 128, 4)),
    64: ((64, 64, 4), (128, 64, 4)),
    128: ((64, 64, 8), (128, 64, 8)),
}
# At 128 rows on Hopper and datacentre Blackwell the tensor cores read their operands from shared memory: a dot 64
# columns wide takes all of its 128 bytes per clock and leaves none for filling it. Twice the width takes three
# quarters, which by this count (not by measurement) pays for a last column tile that is half empty.
_HALF_WIDE = ((128, 64, 8), (256, 64, 8))
_WIDE_ARCHES = (90, 100, 103)
_WIDE_PADDING = 1.125
# Rows that are not 16-byte aligned are loaded element by element, through registers: smaller tiles, or they spill.
_HALF_UNALIGNED = {
    16: ((32, 64, 4), (64, 64, 4)),
    64: ((32, 32, 4), (64, 32, 4)),
}
_FLOAT = {
    16: ((32, 32, 4), (64, 32, 4)),
    64: ((32, 32, 8), (64, 32, 8)),
}
_MAX_STAGES = 4


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one block may use on `arch` (80, 90, 100, ...)."""
    return SHARED_LIMIT.get(arch, SHARED_LEAST)


def expert_tiles(
    rows_per_expert: int, intermediate: int, dtype: torch.dtype, arch: int, *, aligned: bool = True
) -> ExpertTiles:
    """Tiles of the expert GEMMs.

    Args:
        rows_per_expert: T * K / E, rounded up.
        intermediate: I.
        dtype: of hidden and weights.
        arch: compute capability, 80, 90, 100, ...
        aligned: every row of every operand begins at a multiple of 16 bytes.
    """
    table = _table(dtype, aligned)
    block_m = min(max(next_power_of_2(max(rows_per_expert, 1)), 16), max(table))
    while block_m not in table:
        block_m //= 2
    wide = cdiv(intermediate, 128) * 128 <= _WIDE_PADDING * intermediate
    return _build(block_m, dtype, arch, aligned, wide)


def all_configs(arch: int) -> list[tuple[torch.dtype, bool, ExpertTiles]]:
    """Every (dtype, aligned, tiles) that `expert_tiles` can return on `arch`; bfloat16 stands for float16 too."""
    configs = []
    for dtype in (torch.bfloat16, torch.float32):
        for aligned in (True, False):
            for block_m in _table(dtype, aligned):
                for wide in (False, True):
                    config = (dtype, aligned, _build(block_m, dtype, arch, aligned, wide))
                    if config not in configs:
                        configs.append(config)
    return configs


def _table(dtype: torch.dtype, aligned: bool) -> dict[int, tuple[tuple[int, int, int], tuple[int, int, int]]]:
    if dtype == torch.float32:
        return _FLOAT
    return _HALF if aligned else _HALF_UNALIGNED


def _build(block_m: int, dtype: torch.dtype, arch: int, aligned: bool, wide: bool) -> ExpertTiles:
    up, down = _table(dtype, aligned)[block_m]
    if block_m == 128 and arch in _WIDE_ARCHES:
        up, down = (_HALF_WIDE[0] if wide else up), _HALF_WIDE[1]
    return ExpertTiles(
        up=Tile(block_m, *up, _stages((block_m + 2 * up[0]) * up[1] * dtype.itemsize, arch)),
        down=Tile(block_m, *down, _stages((block_m + down[0]) * down[1] * dtype.itemsize, arch)),
    )


def _stages(stage_bytes: int, arch: int) -> int:
    """Up to four pipeline stages; three will do if that leaves room for a second block on the multiprocessor."""
    shared = shared_limit(arch)
    if shared // 2 // stage_bytes >= 3:
        shared //= 2
    return min(_MAX_STAGES, shared // stage_bytes)


@dataclass(frozen=True)
class RouteTile:
    """Tile of the fused router: tokens per program, step over H, warps, stages."""

    block_t: int
    block_h: int
    warps: int
    stages: int


MAX_FUSED_EXPERTS = 512  # a program of the fused router holds the logits of all experts
_ROUTE_STEPS = {256: 64, 512: 16}  # padded number of experts: step over H, for fewer experts 128


def route_tile(T: int, E: int, dtype: torch.dtype, widened: bool, arch: int) -> RouteTile:
    """Tile of the fused router; `widened` says that its dot takes float32 operands."""
    return _route_tile(16 if T < 256 else 32, next_power_of_2(max(E, 16)), dtype, widened, arch)


def all_route_tiles(E: int, arch: int) -> list[tuple[torch.dtype, str, RouteTile]]:
    """Every (dtype, numerics, tile) that the launcher can choose for `E` experts on `arch`."""
    columns = next_power_of_2(max(E, 16))
    return [
        (dtype, numerics, _route_tile(block_t, columns, dtype, widened, arch))
        for dtype, numerics, block_t, widened in (
            (torch.bfloat16, "hf", 16, False),
            (torch.bfloat16, "fp32", 16, False),
            (torch.bfloat16, "fp32", 32, False),
            (torch.float16, "hf", 16, False),
            (torch.float16, "fp32", 16, True),
            (torch.float32, "hf", 16, True),
            (torch.float32, "fp32", 16, True),
        )
    ]


def _route_tile(block_t: int, columns: int, dtype: torch.dtype, widened: bool, arch: int) -> RouteTile:
    if columns > MAX_FUSED_EXPERTS:
        raise ValueError(f"the fused router serves at most {MAX_FUSED_EXPERTS} experts.")
    block_h = _ROUTE_STEPS.get(columns, 128)
    if widened:
        block_h = min(block_h, 32)
    stage_bytes = (block_t + columns) * block_h * dtype.itemsize
    return RouteTile(block_t, block_h, 8, min(_MAX_STAGES, shared_limit(arch) // stage_bytes))


def rows_per_expert(T: int, K: int, E: int) -> int:
    """T * K / E, rounded up."""
    return cdiv(T * K, E)
