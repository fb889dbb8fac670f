"""Tile choice: one small record per kernel, from tables (tables.py) and rules that fit on a screen.

`expert_tiles` and `route_tile` choose; `all_configs` and `all_route_tiles` list everything that they can choose on an
architecture, so that a test compiles and runs each. Pass a record of your own to a launcher to override the choice.
No measurement takes place at run time: `omnigene-fast tune` measures, and writes a table.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from triton import cdiv, next_power_of_2

from .tables import KERNELS, Bucket, ExpertTiles, Kind, Table, Tile, committed_tables, tables

__all__ = [
    "MAX_FUSED_EXPERTS",
    "ExpertTiles",
    "RouteTile",
    "Tile",
    "all_configs",
    "all_route_tiles",
    "expert_tiles",
    "gpu_name",
    "kind",
    "route_tile",
    "rows_per_expert",
    "shared_limit",
    "tables_of",
]

# Shared memory that one block may use, in bytes, by compute capability (CUDA C++ Programming Guide, technical
# specifications). An architecture that is not listed gets the smallest.
SHARED_LIMIT = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
SHARED_LEAST = 101_376  # 86, 89, 120, 121


# The most stages of the rule below, and the padding of I's columns that a tile wider than 64 may cost.
_MAX_STAGES = 4
_WIDE_PADDING = 1.125
# Triton 3.7.1 has miscompiled two products chained into one accumulator for sm_100.
_CHAIN_BELOW = 100
_DEFAULT_ARCH = 80
BARRIERS = 256  # bytes of shared memory, at most, that TMA takes beside its stages
_WEIGHTS = {"up": 2, "down": 1, "down_bwd": 1}  # how many tiles of weights, which 8 bits halve, a stage holds


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one block may use on `arch` (80, 90, 100, ...)."""
    return SHARED_LIMIT.get(arch, SHARED_LEAST)


@lru_cache(maxsize=64)
def gpu_name(device: torch.device) -> str | None:
    """The GPU's name, which tables measured on it carry; None on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@lru_cache(maxsize=4096)
def expert_tiles(
    rows_per_expert: int,
    intermediate: int,
    dtype: torch.dtype,
    arch: int,
    *,
    aligned: bool = True,
    lora: bool = False,
    weight_bits: int = 16,
    device: str | None = None,
) -> ExpertTiles:
    """Tiles of the expert GEMMs: the nearest bucket of the first table (tables.py) that serves such operands.

    Args:
        rows_per_expert: T * K / E, rounded up.
        intermediate: I.
        dtype: of hidden, and of weights that are not stored in 8 bits.
        arch: compute capability, 80, 90, 100, ...
        aligned: every row of every operand begins at a multiple of 16 bytes.
        lora: a projection has a low-rank update.
        weight_bits: 8 if the projections are stored in int8 or float8; any other number means `dtype`.
        device: the GPU's name, for tables measured on it; None: the architecture's table.
    """
    wanted = kind(dtype, aligned, lora, weight_bits)
    for table in tables_of(arch, device):
        bucket = table.nearest(wanted, rows_per_expert)
        if bucket is not None:
            return _fitted(bucket, table, intermediate, dtype, arch, wanted)
    raise AssertionError(f"no table serves {wanted}")  # sm_80.json serves every kind, which a test checks


def all_configs(arch: int, *, weight_bits: int = 16) -> list[tuple[torch.dtype, bool, bool, ExpertTiles]]:
    """Every (dtype, aligned, lora, tiles) that `expert_tiles` can return on `arch` from tables of this package;
    bfloat16 stands for float16 too."""
    configs = []
    committed = committed_tables(arch)
    asked = [*committed, *(table for table in tables_of(arch, None) if table not in committed)]
    for dtype, aligned in product((torch.bfloat16, torch.float32), (True, False)):
        kinds = {lora: kind(dtype, aligned, lora, weight_bits) for lora in (False, True)}
        for table in asked:
            for bucket, (lora, wanted) in product(table.buckets, kinds.items()):
                for intermediate in range(64, 1025, 64) if bucket.serves(wanted) else ():
                    config = (dtype, aligned, lora, _fitted(bucket, table, intermediate, dtype, arch, wanted))
                    if config not in configs:
                        configs.append(config)
    return configs


def kind(dtype: torch.dtype, aligned: bool, lora: bool, weight_bits: int) -> Kind:
    """What a bucket has to serve for such operands."""
    name = "float32" if dtype == torch.float32 else "half"
    return Kind(name, aligned, lora, "8bit" if weight_bits == 8 else "same")


def tables_of(arch: int, device: str | None) -> tuple[Table, ...]:
    """Tables in the order to ask them in, ending with one that serves every kind: of an architecture without a table
    the default's, sm_80's, which asks for nothing that later ones lack."""
    found = tables(arch, device)
    return found if any(table.device is None for table in found) else (*found, *tables(_DEFAULT_ARCH))


def _fitted(
    bucket: Bucket, table: Table, intermediate: int, dtype: torch.dtype, arch: int, wanted: Kind
) -> ExpertTiles:
    """The bucket's tiles within what the table cannot know: I, the shared memory of `arch`, a fault of the compiler."""
    fitted = {}
    for name in KERNELS:
        tile = getattr(bucket.tiles, name)
        block_n = _unpadded(tile.block_n, intermediate) if name in ("up", "down_bwd") else tile.block_n
        weights = _WEIGHTS.get(name, 0) if wanted.weights == "8bit" else 0
        columns = 2 * block_n if name == "up" else block_n
        stage = (tile.block_m + columns) * tile.block_k * dtype.itemsize
        shared = shared_limit(arch) - (BARRIERS if tile.tma else 0)
        if weights:  # converted, they lie in shared memory beside the stages
            converted = weights * block_n * tile.block_k
            stage -= converted * (dtype.itemsize - 1)
            shared -= converted * dtype.itemsize
        as_stored = not weights or bucket.weights == wanted.weights
        counted = arch == table.arch[0] and as_stored and block_n == tile.block_n
        stages = min(tile.stages, shared // stage) if counted else _stages(stage, shared)
        fitted[name] = replace(tile, block_n=block_n, stages=stages, chain=tile.chain and arch < _CHAIN_BELOW)
    return ExpertTiles(**fitted)


def _unpadded(block_n: int, intermediate: int) -> int:
    """`block_n`, halved down to 64 while tiles as wide would spend more than an eighth of the work on no columns."""
    while block_n > 64 and cdiv(intermediate, block_n) * block_n > _WIDE_PADDING * intermediate:
        block_n //= 2
    return block_n


def _stages(stage_bytes: int, shared: int) -> int:
    """Up to four pipeline stages; three will do if that leaves room for a second block on the multiprocessor."""
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
