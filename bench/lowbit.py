"""Frozen experts stored in 8 bits: the same layer's weights, quantised row by row.

    experts_int8   int8, the largest of a row at 127
    experts_fp8    float8_e4m3fn, the largest of a row at 448

Others have no such path: they run the weights that the 8 bits stand for, in the layer's dtype. The truth is computed
from the stored bits and scales themselves, in float64.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from omnigene_fast import reference

from .workloads import Layer

LOW_BIT_OPS = ("experts_int8", "experts_fp8")
_LARGEST = {"experts_int8": (torch.int8, 127.0), "experts_fp8": (torch.float8_e4m3fn, 448.0)}


class LowBit(NamedTuple):
    """Both projections of a layer in 8 bits, with a float32 scale per row, and the layer that they stand for."""

    gate_up: Tensor  # [E, 2I, H]
    down: Tensor  # [E, H, I]
    gate_up_scale: Tensor  # [E, 2I]
    down_scale: Tensor  # [E, H]
    layer: Layer  # dequantised


def low_bit(layer: Layer, op: str) -> LowBit:
    """The layer's weights in the format of `op`, made once per layer."""
    if op not in layer.low_bits:
        gate_up, gate_up_scale = quantise(layer.gate_up, op)
        down, down_scale = quantise(layer.down, op)
        plain = copy.copy(layer)
        plain.adapters, plain.low_bits = {}, {}
        plain.gate_up = _dequantised(gate_up, gate_up_scale, layer.dtype)
        plain.down = _dequantised(down, down_scale, layer.dtype)
        layer.low_bits[op] = LowBit(gate_up, down, gate_up_scale, down_scale, plain)
    return layer.low_bits[op]


def quantise(weight: Tensor, op: str) -> tuple[Tensor, Tensor]:
    """`weight` [E, rows, columns] to the nearest values of the format, and the scales [E, rows]."""
    dtype, largest = _LARGEST[op]
    stored = torch.empty_like(weight, dtype=dtype)
    scale = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
    for expert in range(len(weight)):  # widened one at a time
        rows = weight[expert].float()
        scale[expert] = rows.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / largest
        units = (rows / scale[expert][:, None]).clamp(-largest, largest)
        stored[expert] = units.round().to(dtype) if dtype == torch.int8 else units.to(dtype)
    return stored, scale


def _dequantised(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    plain = torch.empty(stored.shape, dtype=dtype, device=stored.device)
    for expert in range(len(stored)):
        plain[expert] = reference.dequantise(stored[expert], scale[expert], dtype)
    return plain
