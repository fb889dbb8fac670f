"""Matrices stored in 8 bits with a scale for each row, the form that `ops.expert_mlp` takes for frozen projections.

The weight is float(stored) * scale of its row. A row's largest magnitude lands on the largest number of the format, so
no value is clipped; int8 then errs by at most half of scale = amax / 127 everywhere in the row, e4m3 by at most 1/16 of
each value (values below amax / 28672, which are subnormal there, by at most scale / 1024).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._validate import DTYPES, LOW_BIT, check_tensor, shape_of

__all__ = ["FORMATS", "dequantise", "quantise", "round_rows", "row_scales"]

FORMATS: dict[str, tuple[torch.dtype, float]] = {  # the dtype of what is stored, and the largest number it can hold
    "int8": (torch.int8, 127.0),  # -128 is not used: the format is symmetric
    "fp8": (torch.float8_e4m3fn, 448.0),
}


def quantise(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Round matrices to 8 bits, with one scale for each row.

    One expert is worked on at a time, so that the float32 copies are of its size. The same weights give the same bits
    on every device: the scale is a correctly rounded quotient, and ties go to the even neighbour.

    Args:
        weight: [E, rows, columns] float32, bfloat16, float16 or float64.
        format: "int8" (symmetric, scale = amax / 127) or "fp8" (e4m3, scale = amax / 448).

    Returns:
        stored [E, rows, columns] int8 or float8_e4m3fn, and scale [E, rows] float32; 1 for a row of zeros.

    Raises:
        TypeError: `weight` is no floating tensor.
        ValueError: an unknown format, another rank, a NaN or an infinity (also a float64 beyond float32's range).
    """
    check_format("format", format)
    check_tensor("weight", weight, "[E, rows, columns]", 3)
    scale = row_scales(weight, format)
    expert = first_not_finite(scale)
    if expert is not None:
        raise ValueError(f"weight: expected finite numbers in float32's range, got NaN or infinity in expert {expert}.")
    return round_rows(weight, scale, format), scale


def check_format(name: str, format: str) -> None:
    """ValueError if `format`, the value of the argument `name`, is none of `FORMATS`."""
    if format not in FORMATS:
        raise ValueError(f"{name}: expected 'int8' or 'fp8', got {format!r}.")


@torch.no_grad()
def row_scales(weight: Tensor, format: str) -> Tensor:
    """The scale [E, rows] float32 of each row of `weight`; infinity where the row has no finite 8-bit form."""
    largest = FORMATS[format][1]

    def of_expert(expert: int, out: Tensor) -> None:
        if weight.shape[2]:
            scale = weight[expert].abs().amax(-1).float() / largest
            scale.masked_fill_(scale == 0, 1)  # zeros, and what is too small for a float32 scale
            out.copy_(scale.masked_fill_(~(scale * largest).isfinite(), torch.inf))
        else:
            out.fill_(1)

    return _by_expert(weight, weight.shape[:2], torch.float32, of_expert)


@torch.no_grad()
def round_rows(weight: Tensor, scale: Tensor, format: str) -> Tensor:
    """`weight` [E, rows, columns] divided by the scales of its rows and rounded to the format, ties to even."""
    dtype, largest = FORMATS[format]
    wide = torch.promote_types(weight.dtype, torch.float32)

    def of_expert(expert: int, out: Tensor) -> None:
        # A division, not a product with the reciprocal, whose second rounding would move the largest value.
        quotient = (weight[expert].to(wide) / scale[expert].to(wide)[:, None]).clamp_(-largest, largest)
        out.copy_(quotient.round_() if dtype == torch.int8 else quotient)

    return _by_expert(weight, weight.shape, dtype, of_expert)


@torch.no_grad()
def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """The weights [E, rows, columns] that `stored` and `scale` stand for, rounded once to `dtype`.

    Args:
        stored: [E, rows, columns] int8 or float8_e4m3fn.
        scale: [E, rows] float32.
        dtype: float32, bfloat16, float16 or float64.
        device: of the result; that of `stored` if None. One expert at a time is moved.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    check_tensor("stored", stored, "[E, rows, columns]", 3, dtypes=LOW_BIT)
    check_tensor("scale", scale, "[E, rows]", 2, device=stored.device, dtypes=(torch.float32,))
    if scale.shape != stored.shape[:2]:
        raise ValueError(f"scale: expected shape {shape_of(stored)[:2]}, got {shape_of(scale)}.")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}.")
    wide = torch.promote_types(dtype, torch.float32)

    def of_expert(expert: int, out: Tensor) -> None:
        out.copy_((stored[expert].to(wide) * scale[expert].to(wide)[:, None]).to(dtype))

    return _by_expert(stored, stored.shape, dtype, of_expert, device)


def first_not_finite(scale: Tensor) -> int | None:
    """The first expert with a scale that is not finite; None also for tensors without data."""
    if scale.device.type == "meta" or isinstance(scale, FakeTensor) or scale.isfinite().all():
        return None
    return int((~scale.isfinite()).any(1).nonzero()[0])


def _by_expert(
    like: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    write: Callable[[int, Tensor], None],
    device: torch.device | None = None,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=like.device if device is None else device)
    for expert in range(shape[0]):
        write(expert, out[expert])
    return out
