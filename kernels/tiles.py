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
