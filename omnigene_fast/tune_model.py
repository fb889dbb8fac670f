"""Which tiles are worth measuring: a set around the present one, cut to what fits, in the order that a model predicts.

The model counts; it was fitted to nothing. A program reads its operands tile by tile, and takes as long as the slowest
of tensor cores, shared memory and L2. As many programs run at a time as shared memory, registers and warps allow, in
waves over the multiprocessors. In all, the kernel takes no less than DRAM needs for each weight once, which it reaches
only with enough bytes in flight. Only the order of its answers is used.
"""

from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from .kernels import tiles
from .kernels.tables import Tile

# By architecture: DRAM bytes per second and FLOPs per second, half and float32 (NVIDIA's data sheets, dense).
_RATES = {80: (2.0e12, 3.1e14, 1.9e13), 90: (3.3e12, 9.9e14, 6.7e13), 100: (8.0e12, 2.2e15, 7.5e13)}
_SHARED_BYTES = 128 * 1.7e9  # per second and multiprocessor: 128 bytes per clock
_L2_OVER_DRAM = 2.5
_LATENCY = 8e-7  # seconds from DRAM
_REGISTERS = 65_536  # of a multiprocessor
_THREADS = 2048
_MOST_ACCUMULATORS = 128  # float32 sums per thread; with more, the rest does not fit into 255 registers
_NO_OVERLAP = 0.1  # what the shorter of computing and reading adds to the longer
_MMA_SHARE = 0.6  # of the rate, for tiles of fewer rows than wgmma and tcgen05 take


@dataclass(frozen=True)
class Device:
    """What a table is measured on."""

    name: str
    arch: int
    multiprocessors: int


@dataclass(frozen=True)
class Work:
    """One kernel's work. (A Gram product has no weights that TMA could bring.)

    A GEMM over rows: `experts` times `rows` rows, `columns` wide, reduced over `depth`; `operands` weight tiles at a
    time (the up GEMM has a gate and an up tile). A Gram product: `rows` x `columns` for each expert, over `depth` rows.
    """

    experts: int
    rows: float
    columns: int
    depth: float
    size: int  # bytes of an element of the rows
    weight_size: int  # and of the weights
    operands: int = 1
    low_rank: bool = False
    weighted: bool = True  # False: a Gram product, which has no weights

    def stage_bytes(self, tile: Tile) -> int:
        return (tile.block_m * self.size + self.operands * tile.block_n * self.weight_size) * tile.block_k

    def shared_bytes(self, tile: Tile) -> int:
        """Stages, one tile of weights as converted from 8 bits, and what TMA takes."""
        converted = self.operands * tile.block_n * tile.block_k * self.size if self.weight_size < self.size else 0
        return tile.stages * self.stage_bytes(tile) + converted + (tiles.BARRIERS if tile.tma else 0)


def sizes(work: Work, now: Tile, block_m: int, device: Device, most: int) -> list[Tile]:
    """Tiles of `block_m` rows with columns and step of `now`, half and twice as many: at most `most`, each with warps
    and stages that fit, the most promising first."""
    # A low-rank factor has few columns: the launcher cuts its tile's to the rank.
    columns = [now.block_n] if work.low_rank else _near(now.block_n, 32, 256)
    found = [
        replace(now, block_m=block_m, block_n=n, block_k=k, warps=warps, stages=stages)
        for n, k, warps, stages in product(columns, _near(now.block_k, 32, 128), (4, 8), (2, 3, 4))
    ]
    found = [tile for tile in found if fits(work, tile, device.arch)]
    # What the model cannot tell apart stays near the present tile.
    found.sort(key=lambda tile: (predict(work, tile, device), abs(tile.stages - now.stages), tile.warps != now.warps))
    best: dict[tuple[int, int], Tile] = {}
    for tile in found:
        best.setdefault((tile.block_n, tile.block_k), tile)
    return list(best.values())[:most]


def switches(work: Work, tile: Tile, arch: int) -> list[Tile]:
    """`tile` with weights by TMA descriptors and without, where there is TMA."""
    has_tma = arch >= 90 and work.size == 2 and work.weighted and not work.low_rank
    found = [replace(tile, tma=tma) for tma in ((False, True) if has_tma else (tile.tma,))]
    return [each for each in found if fits(work, each, arch)]


def depths(work: Work, tile: Tile, arch: int) -> list[Tile]:
    """`tile` with 4 or 8 warps and a stage more or less, where that fits."""
    stages = range(max(tile.stages - 1, 2), min(tile.stages + 1, 6) + 1)
    found = [replace(tile, warps=warps, stages=number) for warps, number in product((4, 8), stages)]
    return [tile for tile in found if fits(work, tile, arch)]


def fits(work: Work, tile: Tile, arch: int) -> bool:
    """Within the shared memory and the registers of a program."""
    accumulators = tile.block_m * tile.block_n * work.operands / (32 * tile.warps)
    return work.shared_bytes(tile) <= tiles.shared_limit(arch) and accumulators <= _MOST_ACCUMULATORS


def _near(value: int, low: int, high: int) -> list[int]:
    return sorted({value, *(size for size in (value // 2, value * 2) if low <= size <= high)})


def predict(work: Work, tile: Tile, device: Device) -> float:
    """Seconds, by the count that this file describes."""
    family = max((arch for arch in _RATES if arch <= device.arch), default=80)
    dram, half_rate, float_rate = _RATES[family]
    rate = half_rate if work.size == 2 else float_rate
    if work.size == 2 and family >= 90 and tile.block_m < 64:
        rate *= _MMA_SHARE
    columns = work.operands * tile.block_n
    steps = ceil(work.depth / tile.block_k)
    moved = steps * work.stage_bytes(tile)
    per_program = max(
        2 * tile.block_m * columns * steps * tile.block_k / (rate / device.multiprocessors),
        moved / _SHARED_BYTES,
        moved / (_L2_OVER_DRAM * dram / device.multiprocessors),
    )
    registers = min(tile.block_m * columns / (32 * tile.warps) + 64, 255) * 32 * tile.warps
    together = int(
        min(
            (tiles.shared_limit(device.arch) + 1024) // (work.shared_bytes(tile) + 1024),
            _REGISTERS // registers,
            _THREADS // (32 * tile.warps),
        )
    )
    together = max(together, 1)
    programs = work.experts * ceil(work.rows / tile.block_m) * ceil(work.columns / tile.block_n)
    waves = ceil(programs / (device.multiprocessors * together))
    busy = waves * (together * per_program + _LATENCY)  # each program fills its pipeline
    weights = work.experts * work.operands * work.columns * work.depth * work.weight_size
    rows = work.experts * work.rows * work.depth * work.size
    in_flight = together * (tile.stages - 1) * work.stage_bytes(tile)
    reached = min(1.0, in_flight / (_LATENCY * dram / device.multiprocessors))
    read = (weights + rows) / (dram * reached)
    return max(busy, read) + _NO_OVERLAP * min(busy, read)
