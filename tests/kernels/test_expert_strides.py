"""Offsets beyond 2^31 elements, in memory that is reserved and touched only where a few pages hold numbers."""

import mmap
from dataclasses import replace

import pytest
import torch

from omnigene_fast.kernels import tiles

from . import gradients
from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="reserves addresses of the host")
STRIDE = 2**25  # rows of all operands are this many elements apart
BELOW = 2**32 + STRIDE  # elements below the base: where a 32-bit product would land, and find zeros
ROOM = BELOW + 160 * STRIDE


@pytest.fixture
def reserve(monkeypatch):
    """A function that moves a tensor to rows STRIDE apart, which no one else uses; experts are small steps apart."""
    from triton.runtime import interpreter

    # The interpreter works on CPU storage in place, and then copies all of it over itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, 2 * ROOM, flags=flags), dtype=torch.bfloat16)
    taken = 0

    def move(tensor):
        nonlocal taken
        width = -tensor.shape[-1] % 64 + tensor.shape[-1]
        strides = (STRIDE, 1) if tensor.dim() == 2 else (width, STRIDE, 1)
        moved = memory.as_strided(tensor.shape, strides, BELOW + taken)
        taken += width * (1 if tensor.dim() == 2 else tensor.shape[0])
        assert taken < STRIDE
        moved.copy_(tensor)
        return moved

    return move


TILE = tiles.Tile(64, 64, 64, 4, 3)
CHOICE = tiles.ExpertTiles(TILE, TILE, TILE, TILE, TILE, TILE)


@pytest.mark.parametrize("tma", [False, True])
def test_products_of_rows_and_strides_are_64_bits_wide(device, reserve, tma):
    """Every operand's last row is beyond 2^31 elements, and so is one step of 64 rows: forward and backward."""
    T, needed = 70, (True, False, False, True, True, True, True, True)
    case = gradients.make(device, torch.bfloat16, T, 2, 1, 144, 80, ranks=(16, 16))
    gate_up, down = (reserve(weight) for weight in case.inputs[1:3])
    far = case.with_inputs(hidden=reserve(case.inputs[0]), gate_up_proj=gate_up, down_proj=down)
    far = far._replace(grad_out=reserve(case.grad_out))
    for operand in (far.inputs[0], gate_up, down, far.grad_out):
        assert operand.stride(-2) == STRIDE
        assert (operand.shape[-2] - 1) * STRIDE >= 2**31
    gemm = replace(TILE, tma=tma)
    choice = replace(CHOICE, up=gemm, down=gemm, down_bwd=gemm)
    out, preactivation = gradients.forward(far, save=True, choice=choice)
    expected, expected_preactivation = gradients.forward(case, save=True, choice=CHOICE)
    assert torch.equal(out, expected)
    assert torch.equal(preactivation, expected_preactivation)
    ours = gradients.backward(far, needed, preactivation, choice=choice)
    theirs = gradients.backward(case, needed, preactivation, choice=CHOICE)
    for name, a, b in zip(gradients.NAMES, ours, theirs, strict=True):
        assert a is b if b is None else torch.equal(a, b), name


def test_a_32_bit_product_would_be_caught(device, reserve):
    """The control: where such a product lands there is memory, and it does not hold the row."""
    rows = reserve(torch.randn(70, 16, dtype=torch.bfloat16, device=device))
    wrapped = (69 * STRIDE + 2**31) % 2**32 - 2**31
    assert wrapped < 0
    below = rows.as_strided((16,), (1,), rows.storage_offset() + wrapped)
    assert torch.equal(below, torch.zeros_like(below))
    assert not torch.equal(below, rows[69])
