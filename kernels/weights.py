"""Weights on their way into a GEMM: through pointers or TMA descriptors, in the rows' dtype or in 8 bits.

A descriptor (Hopper and later) describes a matrix per expert, [E, rows, columns], to the TMA unit, which then copies
whole tiles into shared memory at the word of one thread: no address arithmetic, no registers, and zeros beyond an
expert's rows and columns. It is made on the host for each launch and passed by value, so that it is bound to no thread,
no scratch memory and no allocator, and is captured in a CUDA graph like any argument. Rows of activations, which are
gathered, go on coming through pipelined 16-byte copies; what TMA cannot describe comes through pointers.

In 8 bits, the weight is float(stored) * scale of its row, a row being what a projection computes one output from.
Stored is int8, or float8_e4m3fn: as such where the GPU converts it (compute capability 8.9 and later), and as uint8,
its bits, where it does not. Either is read with half the bytes of bfloat16 and fits exactly into bfloat16, float16 and
float32, so that the tensor cores multiply what is stored, and the only questions are where the scale goes and what
rounds:

- A projection's output has one column per row of the weight. Its scale multiplies the float32 sum, once and unrounded,
  before a low-rank update is added.
- In a backward the rows are what is summed over. There the scale goes into the weight tile, in float32, rounded once to
  the dtype of the operands: that is the dequantised weight, of ordinary size, as a stock model would hold it. Scaling
  the other operand, the gradients, would cost as much error; but scale * gradient is small enough to leave float16's
  range, and the gradients, which otherwise go from memory to the tensor cores without a register, would have to pass
  through registers, as the weights do anyway.
"""

import functools
import logging
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, round_to
from .tables import ExpertTiles, Tile

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

logger = logging.getLogger("omnigene_fast")
CONVERTS_E4M3 = 89  # the compute capability from which on GPUs convert e4m3; below, kernels get its bits in uint8


@triton.jit
def described_tile(descriptor, expert, row, column, TRANSPOSED: tl.constexpr):
    """The tile of an expert's matrix that begins at (row, column), zero outside the matrix."""
    tile = descriptor.load([expert.to(tl.int32), row, column])
    tile = tl.reshape(tile, [tile.shape[1], tile.shape[2]])
    return tl.trans(tile) if TRANSPOSED else tile


@triton.jit
def widen(stored, scale, dtype: tl.constexpr):
    """Stored weights in `dtype`: as they are if that is what they have, else exact; with a `scale`, which broadcasts
    over them, rounded once."""
    if scale is not None:
        return round_to(_float32(stored) * scale, dtype)
    elif stored.dtype == dtype:
        return stored
    elif stored.dtype == tl.uint8 or INTERPRETED:
        return round_to(_float32(stored), dtype)
    else:
        return stored.to(dtype)


@triton.jit
def _float32(stored):
    """int8, e4m3, or in uint8 the bits of e4m3.

    Sign, exponent and mantissa of e4m3 move to where float32 has them; 2**120 makes up for the exponents' biases (7 and
    127), for subnormal numbers too. There is one NaN of either sign, and no infinity.
    """
    if stored.dtype == tl.uint8:
        bits = (stored.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where((bits & 0x7F00000) == 0x7F00000, float("nan"), value)
    else:
        return stored.to(tl.float32)


@triton.jit
def scale_columns(total, scale_ptr, column, in_column):
    """total * scale of each column; as it is if there are no scales."""
    if scale_ptr is None:
        return total
    else:
        return total * tl.load(scale_ptr + column, mask=in_column, other=0.0)[None, :]


@triton.jit
def widen_step(stored, scale_ptr, step, in_step, EVEN: tl.constexpr, dtype: tl.constexpr):
    """`widen` for the weights [BLOCK_K, columns] of a reduction step, each row with its scale if there are scales."""
    if scale_ptr is None:
        return widen(stored, None, dtype)
    elif EVEN:
        return widen(stored, tl.load(scale_ptr + step)[:, None], dtype)
    else:
        return widen(stored, tl.load(scale_ptr + step, mask=in_step, other=0.0)[:, None], dtype)


def describe(weight: Tensor, rows: int, columns: int) -> Any | None:
    """A descriptor of `weight` [E, ..., contiguous] for tiles of `rows` x `columns`, or None if TMA cannot serve it,
    whose reason is logged once."""
    reason = _undescribable(weight)
    if reason is None:
        return TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [1, rows, columns])
    _log_once(reason)
    return None


def _undescribable(weight: Tensor) -> str | None:
    if TensorDescriptor is None:
        return f"Triton {triton.__version__} has no host-side tensor descriptors"
    if weight.is_cuda and not _has_tma(weight.device):
        return f"{torch.cuda.get_device_name(weight.device)} has no TMA unit"
    if weight.dtype.itemsize > 2:
        return "float32 weights are multiplied outside the tensor cores"
    if weight.stride(-1) != 1 or any(stride * weight.dtype.itemsize % 16 for stride in weight.stride()[:-1]):
        return "rows of the weights are not multiples of 16 bytes apart"
    if weight.data_ptr() % 16:
        return "the weights do not begin at a multiple of 16 bytes"
    return None


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("Weights are read through pointers and not by TMA: %s.", reason)


def tiles_of_8_bits(tiles: ExpertTiles, bits: bool) -> ExpertTiles:
    """`tiles` for weights in 8 bits, which have buckets of their own in the tables; `bits`: e4m3 as uint8."""
    return replace(tiles, up=up_of_bits(tiles.up)) if bits else tiles


def up_of_bits(tile: Tile) -> Tile:
    """The up GEMM's `tile` for e4m3 as uint8: the integer arithmetic that converts it leaves registers for half the
    step from 64 rows on."""
    return replace(tile, block_k=min(tile.block_k, 32)) if tile.block_m >= 64 else tile
