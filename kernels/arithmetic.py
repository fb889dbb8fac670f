"""The matrix product and the rounding that all kernels share.

Compiled, they are `tl.dot` and `Tensor.to`. Triton's interpreter multiplies bfloat16 operands by their bits and cuts
bfloat16 results off instead of rounding them; there, both are spelled out, so that a CPU test sees the numbers of a
GPU.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b, accumulated in float32; float32 operands are multiplied in full precision, never in TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
