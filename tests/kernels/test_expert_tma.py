"""Weights read through tensor descriptors: the same bits as through pointers, and nothing from beyond a matrix."""

import logging
from dataclasses import replace

import pytest
import torch

from omnigene_fast.kernels import expert_backward, expert_forward, grouped_gemm, tiles, weights

from . import gradients
from .gradients import FULL, LORA
from .test_expert_low_bits import E4M3, make

pytestmark = pytest.mark.skipif(weights.TensorDescriptor is None, reason="this Triton has no host-side descriptors")
E, H, I = 3, 144, 80  # noqa: E741


def with_tma(choice, tma=True):
    gemms = ("up", "down", "down_bwd")
    return replace(choice, **{name: replace(getattr(choice, name), tma=tma) for name in gemms})


# Tiles that divide neither H nor I: the last ones reach beyond an expert's rows, and columns, on every side.
TILE = tiles.Tile(16, 64, 64, 4, 3)
SMALL = tiles.ExpertTiles(TILE, TILE, TILE, TILE, TILE, TILE)


def surrounded(weight):
    """The same weights inside a larger matrix of NaN (127 in int8), which begins and ends beyond each of them."""
    experts, rows, columns = weight.shape
    bits = weight if weight.dtype == torch.bfloat16 else weight.view(torch.uint8)
    fill = torch.nan if weight.dtype == torch.bfloat16 else 0x7F
    outer = torch.full((experts + 2, rows + 16, columns + 16), fill, dtype=bits.dtype, device=weight.device)
    outer[1:-1, :rows, :columns] = bits
    return outer.view(weight.dtype)[1:-1, :rows, :columns]


@pytest.fixture
def described(monkeypatch):
    """Whatever `describe` returned."""
    made = []

    def describe(*arguments):
        made.append(original(*arguments))
        return made[-1]

    original = weights.describe
    for module in ("expert_backward", "expert_forward", "grouped_gemm"):
        monkeypatch.setattr(f"omnigene_fast.kernels.{module}.describe", describe)
    return made


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8, E4M3])
def test_same_bits_as_through_pointers(device, kind, described):
    if kind == torch.bfloat16:
        case, needed = gradients.make(device, kind, 25, E, 1, H, I, ranks=(16, 3)), (True,) * 8
    else:
        case, needed = make(device, torch.bfloat16, kind, 25, E, 1, H, I, ranks=(16, 3))[0], LORA
    case.index[-3:] = E - 1  # the last expert, beyond which nothing belongs to the weights
    gate_up, down = case.inputs[1:3]
    case = case.with_inputs(gate_up_proj=surrounded(gate_up), down_proj=surrounded(down))

    def run(choice, case=case):
        out, preactivation = gradients.forward(case, save=True, choice=choice)
        return [out, preactivation, *gradients.backward(case, needed, preactivation, choice=choice)]

    expected = run(with_tma(SMALL, False))
    assert described == []
    ours = run(with_tma(SMALL))
    assert len(described) == 4
    assert None not in described
    for a, b in zip(ours, expected, strict=True):
        assert a is b if b is None else torch.equal(a, b)
        assert b is None or b.isfinite().all()
    other = run(with_tma(SMALL), case._replace(index=(case.index + 1) % E))
    assert all(b is None or not torch.equal(a, b) for a, b in zip(other, expected, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the interpreter's small tiles prove nothing more")
def test_nan_beside_the_weights_would_show(device):
    """The control of the test above: the same reads without the matrix's bounds meet NaN."""
    weight = surrounded(torch.zeros(E, H, I, dtype=torch.bfloat16, device=device))
    assert weight.as_strided((E, H + 1, I), weight.stride())[-1, -1].isnan().all()
    assert weight.as_strided((E, H, I + 1), weight.stride())[-1, :, -1].isnan().all()


def test_what_cannot_be_described_goes_through_pointers(device, described, caplog, monkeypatch):
    """Said once, with the reason; the result is that of the pointers."""
    caplog.set_level(logging.INFO, logger="omnigene_fast")
    weights._log_once.cache_clear()
    odd = gradients.make(device, torch.bfloat16, 7, E, 2, 47, 33)
    wide = gradients.make(device, torch.float32, 7, E, 2, 48, 32)
    shifted = gradients.make(device, torch.bfloat16, 7, E, 2, 48, 32)
    gate_up = shifted.inputs[1]
    memory = torch.empty(gate_up.numel() + 1, dtype=gate_up.dtype, device=device)[1:]
    shifted = shifted.with_inputs(gate_up_proj=memory.view(gate_up.shape).copy_(gate_up))
    for case, reason, served in (
        (odd, "not multiples of 16 bytes apart", 0),
        (wide, "float32 weights", 0),
        (shifted, "do not begin at a multiple of 16 bytes", 1),
    ):
        expected = gradients.backward(case, FULL, choice=with_tma(SMALL, False))
        for _ in range(2):
            described.clear()
            ours = gradients.backward(case, FULL, choice=with_tma(SMALL))
            assert sum(made is not None for made in described) == served
            assert all(torch.equal(a, b) for a, b in zip(ours[:4], expected[:4], strict=True))
        assert [reason in message for message in caplog.messages].count(True) == 1
    monkeypatch.setattr(weights, "TensorDescriptor", None)
    assert weights.describe(gate_up, 16, 16) is None
    assert "has no host-side tensor descriptors" in caplog.messages[-1]


def test_persistent_programs_take_every_tile(device, monkeypatch):
    """Six programs walk 14 tiles or more, spare ones among them; the control lets each of the six take one only."""
    case = gradients.make(device, torch.bfloat16, 40, 8, 1, H, I, ranks=(16, 3))
    persistent = replace(TILE, persistent=True)
    walking = replace(SMALL, up=persistent, down=persistent, down_bwd=persistent)

    def run(choice):
        out, preactivation = gradients.forward(case, save=True, choice=choice)
        return [out, preactivation, *gradients.backward(case, (True,) * 8, preactivation, choice=choice)]

    expected, launched = run(SMALL), []
    original = grouped_gemm.programs

    def programs(tile, count, device, accumulators=1):
        made = original(tile, count, device, accumulators)
        if tile.persistent:
            launched.append((made, count))
        return made

    modules = (expert_backward, expert_forward, grouped_gemm)
    for module in modules:
        monkeypatch.setattr(module, "programs", programs)
    ours = run(walking)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert len(launched) == 4
    if device.type == "cpu":
        assert all(made == 6 and count >= 14 for made, count in launched)
        for module in modules:
            monkeypatch.setattr(module, "programs", lambda tile, count, device, accumulators=1: min(count, 6))
        assert not torch.equal(run(SMALL)[0], expected[0])
