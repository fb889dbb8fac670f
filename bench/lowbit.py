"""Frozen experts stored in 8 bits: the same layer's weights, quantised row by row.

    experts_int8   int8
    experts_fp8    float8_e4m3fn

Others have no such path: they run the weights that the 8 bits stand for, in the layer's dtype. The truth is computed
from the stored bits and scales themselves, in float64.
"""

import copy
from typing import NamedTuple

from torch import Tensor

from omnigene_fast import lowbit

from .workloads import Layer

LOW_BIT_OPS = ("experts_int8", "experts_fp8")
_FORMATS = {"experts_int8": "int8", "experts_fp8": "fp8"}


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
        gate_up, gate_up_scale = lowbit.quantise(layer.gate_up, _FORMATS[op])
        down, down_scale = lowbit.quantise(layer.down, _FORMATS[op])
        plain = copy.copy(layer)
        plain.adapters, plain.low_bits = {}, {}
        plain.gate_up = lowbit.dequantise(gate_up, gate_up_scale, layer.dtype)
        plain.down = lowbit.dequantise(down, down_scale, layer.dtype)
        layer.low_bits[op] = LowBit(gate_up, down, gate_up_scale, down_scale, plain)
    return layer.low_bits[op]
