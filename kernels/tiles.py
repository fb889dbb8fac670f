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
# block_n up columns: 64 divides Gemma-4's I = 704, 128 does not. Below 64 rows the weights' bytes are the bound, so
# those tiles are narrow and deep; wgmma and tcgen05 need 64 rows.
_HALF = {
    16: ((32, 128, 4), (64, 128, 4)),
    32: ((32, 128, 4), (64, 128, 4)),
    64: ((64, 64, 4), (128, 64, 4)),
    128: ((64, 64, 8), (128, 64, 8)),
}
_HALF_WIDE_DOWN = (256, 64, 8)  # at 128 rows where the accumulators fit: Hopper and datacentre Blackwell
_FLOAT = {
    16: ((32, 32, 4), (64, 32, 4)),
    64: ((32, 32, 8), (64, 32, 8)),
}
_MAX_STAGES = 4


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one block may use on `arch` (80, 90, 100, ...)."""
    return SHARED_LIMIT.get(arch, SHARED_LEAST)


def expert_tiles(rows_per_expert: int, dtype: torch.dtype, arch: int) -> ExpertTiles:
    """Tiles for about `rows_per_expert` rows (T * K / E) of `dtype` on compute capability `arch` (80, 90, 100, ...)."""
    table = _FLOAT if dtype == torch.float32 else _HALF
    block_m = min(max(next_power_of_2(max(rows_per_expert, 1)), 16), max(table))
    while block_m not in table:
        block_m //= 2
    return _build(block_m, dtype, arch)


def all_configs(arch: int) -> list[tuple[torch.dtype, ExpertTiles]]:
    """Every (dtype, tiles) that `expert_tiles` can return on `arch`; bfloat16 stands for float16 too."""
    return [
        *((torch.bfloat16, _build(block_m, torch.bfloat16, arch)) for block_m in _HALF),
        *((torch.float32, _build(block_m, torch.float32, arch)) for block_m in _FLOAT),
    ]


def _build(block_m: int, dtype: torch.dtype, arch: int) -> ExpertTiles:
    up, down = (_FLOAT if dtype == torch.float32 else _HALF)[block_m]
    if block_m == 128 and arch in (90, 100, 103):
        down = _HALF_WIDE_DOWN
    size = dtype.itemsize
    return ExpertTiles(
        up=_staged(block_m, *up, columns=2 * up[0], size=size, arch=arch),
        down=_staged(block_m, *down, columns=down[0], size=size, arch=arch),
    )


def _staged(block_m: int, block_n: int, block_k: int, warps: int, *, columns: int, size: int, arch: int) -> Tile:
    """As many pipeline stages as shared memory holds, up to four."""
    stage = (block_m + columns) * block_k * size
    return Tile(block_m, block_n, block_k, warps, min(_MAX_STAGES, shared_limit(arch) // stage))


@dataclass(frozen=True)
class RouteTile:
    """Tile of the fused router: tokens per program, step over H, warps, stages."""

    block_t: int
    block_h: int
    warps: int
    stages: int


MAX_FUSED_EXPERTS = 512  # a program of the fused router holds the logits of all experts


def route_tile(T: int, E: int, dtype: torch.dtype, widened: bool, arch: int) -> RouteTile:
    """Tile of the fused router; `widened` says that its dot takes float32 operands."""
    return _route_tile(16 if T < 256 else 64, next_power_of_2(max(E, 16)), dtype, widened, arch)


def all_route_tiles(E: int, arch: int) -> list[tuple[torch.dtype, str, RouteTile]]:
    """Every (dtype, numerics, tile) that the launcher can choose for `E` experts on `arch`."""
    columns = next_power_of_2(max(E, 16))
    return [
        (torch.bfloat16, "hf", _route_tile(16, columns, torch.bfloat16, False, arch)),
        (torch.bfloat16, "fp32", _route_tile(16, columns, torch.bfloat16, False, arch)),
        (torch.bfloat16, "fp32", _route_tile(64, columns, torch.bfloat16, False, arch)),
        (torch.float16, "fp32", _route_tile(16, columns, torch.float16, True, arch)),
        (torch.float32, "hf", _route_tile(16, columns, torch.float32, True, arch)),
        (torch.float32, "fp32", _route_tile(16, columns, torch.float32, True, arch)),
    ]


def _route_tile(block_t: int, columns: int, dtype: torch.dtype, widened: bool, arch: int) -> RouteTile:
    if columns > MAX_FUSED_EXPERTS:
        raise ValueError(f"the fused router serves at most {MAX_FUSED_EXPERTS} experts.")
    block_h = max(16384 // columns, 16) if not widened else 32
    stage = (block_t + columns) * block_h * dtype.itemsize
    return RouteTile(block_t, min(block_h, 128), 8, min(_MAX_STAGES, shared_limit(arch) // stage))


def rows_per_expert(T: int, K: int, E: int) -> int:
    """T * K / E, rounded up."""
    return cdiv(T * K, E)
