"""How many blocks of a kernel a multiprocessor holds at once.

Limits: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute Capability".
Granularities, which that table leaves out: `cuda_occupancy.h` of the CUDA toolkit. A multiprocessor has four partitions
with a quarter of the registers each; a warp gets its registers in units of 256 from the partition it runs on, so

    warps by registers = 4 * floor(65536 / 4 / (256 * ceil(32 * registers / 256)))
    blocks = min(blocks limit, warps limit // warps, warps by registers // warps,
                 shared memory // (block's shared memory + 1 KB of the driver's, in units of 128 bytes),
                 tensor memory columns // block's columns)

and none if the registers of a block, its warps rounded up to a multiple of four, exceed 65536. The tensor memory (512
columns, allocated by powers of two from 32) is compute capability 10's, from the PTX ISA, "tcgen05.alloc".
"""

from dataclasses import dataclass
from math import ceil

_REGISTERS = 65_536
_PARTITIONS = 4
_REGISTER_UNIT = 256
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024
_MAX_REGISTERS = 255
_MAX_THREADS = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor; shared memory in bytes, of all its blocks and of one."""

    blocks: int
    warps: int
    shared: int
    shared_block: int
    tensor_columns: int = 0


_KB = 1024
MULTIPROCESSORS = {
    80: Multiprocessor(32, 64, 164 * _KB, 163 * _KB),
    86: Multiprocessor(16, 48, 100 * _KB, 99 * _KB),
    87: Multiprocessor(16, 48, 164 * _KB, 163 * _KB),
    89: Multiprocessor(24, 48, 100 * _KB, 99 * _KB),
    90: Multiprocessor(32, 64, 228 * _KB, 227 * _KB),
    100: Multiprocessor(32, 64, 228 * _KB, 227 * _KB, tensor_columns=512),
    103: Multiprocessor(32, 64, 228 * _KB, 227 * _KB, tensor_columns=512),
    120: Multiprocessor(24, 48, 100 * _KB, 99 * _KB),
}


def blocks_per_multiprocessor(arch: int, registers: int, threads: int, shared: int, tensor_columns: int = 0) -> int:
    """Blocks that fit at once; 0 if not even one does: then a launch fails.

    Args:
        registers: per thread.
        threads: per block.
        shared: bytes per block, static and dynamic.
        tensor_columns: of tensor memory per block.
    """
    limits = MULTIPROCESSORS[arch]
    warps = ceil(threads / 32)
    if registers > _MAX_REGISTERS or threads > _MAX_THREADS or shared > limits.shared_block:
        return 0
    per_warp = _REGISTER_UNIT * ceil(max(registers, 1) * 32 / _REGISTER_UNIT)
    if per_warp * _PARTITIONS * ceil(warps / _PARTITIONS) > _REGISTERS:
        return 0
    warps_by_registers = _PARTITIONS * (_REGISTERS // _PARTITIONS // per_warp)
    blocks = [
        limits.blocks,
        limits.warps // warps,
        warps_by_registers // warps,
        limits.shared // (_SHARED_UNIT * ceil((shared + _SHARED_RESERVED) / _SHARED_UNIT)),
    ]
    if tensor_columns:
        blocks.append(limits.tensor_columns // tensor_columns)
    return min(blocks)
