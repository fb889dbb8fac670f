"""Weights stored in 8 bits: what a GEMM's load makes of them.

The weight is float(stored) * scale of its row, a row being what a projection computes one output from. Stored is int8,
or float8_e4m3fn: as such where the GPU converts it (compute capability 8.9 and later), and as uint8, its bits, where it
does not. Either is read with half the bytes of bfloat16 and fits exactly into bfloat16, float16 and float32, so that
the tensor cores multiply what is stored, and the only questions are where the scale goes and what rounds:

- A projection's output has one column per row of the weight. Its scale multiplies the float32 sum, once and unrounded,
  before a low-rank update is added.
- In a backward the rows are what is summed over. There the scale goes into the weight tile, in float32, rounded once to
  the dtype of the operands: that is the dequantised weight, of ordinary size, as a stock model would hold it. Scaling
  the other operand, the gradients, would cost as much error; but scale * gradient is small enough to leave float16's
  range, and the gradients, which otherwise go from memory to the tensor cores without a register, would have to pass
  through registers, as the weights do anyway.
"""

from dataclasses import replace

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, round_to
from .tiles import ExpertTiles


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
def scale_of_steps(scale_ptr, step, in_step, EVEN: tl.constexpr):
    """[BLOCK_K, 1] scales of the weights' rows that a reduction step sums over; None if there are none."""
    if scale_ptr is None:
        return None
    elif EVEN:
        return tl.load(scale_ptr + step)[:, None]
    else:
        return tl.load(scale_ptr + step, mask=in_step, other=0.0)[:, None]


def tiles_of_8_bits(tiles: ExpertTiles, bits: bool) -> ExpertTiles:
    """`tiles` for weights in 8 bits, which pass through registers: no room for two accumulators of 128 columns.

    With `bits`, e4m3 is converted by integer arithmetic: from 64 rows on, half a reduction step leaves registers for it.
    """
    up = replace(tiles.up, block_n=min(tiles.up.block_n, 64))
    if bits and up.block_m >= 64:
        up = replace(up, block_k=min(up.block_k, 32))
    return replace(tiles, up=up)
