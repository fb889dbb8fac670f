"""What `omnigene-fast tune` runs: operands, launches, and that a candidate with wrong numbers does not get through."""

import pytest
import torch

from omnigene_fast import reference, tune, tune_kernels
from omnigene_fast.kernels import tables, tiles
from omnigene_fast.tune_model import Device

from .. import helpers

SHAPE = (48, 32, 4, 2)  # H, I, E, K
T = 21


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path):
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "table.json"
    tables.forget()
    tiles.expert_tiles.cache_clear()


def make(device, **options):
    """Settings and a workload, on the GPU that there is or on one that exists in name only."""
    described = Device("a GPU", 80, 108) if device.type == "cpu" else tune_kernels.this_device(device)
    settings = tune.Settings(described, SHAPE, tokens=(T,), **({"dtype": torch.float32} | options))
    return settings, tune_kernels.Layer(settings, device).at(T)


def dequantised(layer, name):
    """The weights `name` in float64."""
    stored, scale = getattr(layer, name), getattr(layer, f"{name}_scale")
    if scale is None:
        return stored.double()
    stored = stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored
    return reference.dequantise(stored, scale, torch.float64)


def by_expert(load):
    """(expert, rows, positions) in the order of positions."""
    ids = load.index.flatten()
    order = ids.argsort(stable=True)
    for expert in range(SHAPE[2]):
        yield expert, order[ids[order] == expert], (ids[order] == expert).nonzero().flatten()


def expected(load):
    """Every kernel's outputs in float64."""
    layer, K, I = load.layer, SHAPE[3], SHAPE[1]  # noqa: E741
    wide = {name: value.double() for name, value in vars(load).items() if isinstance(value, torch.Tensor)}
    weight = {name: value.double() for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    weight |= {name: dequantised(layer, name) for name in ("gate_up", "down")}
    out = {name: [] for name in ("up", "down", "low_rank")}
    d_pre, weighted_h = torch.zeros_like(wide["pre"]), torch.zeros_like(wide["h"])
    d_weights = torch.zeros_like(wide["weights"]).flatten()
    gram = [torch.zeros_like(weight["gate_up"]), torch.zeros_like(weight["down"])]
    low_gram = torch.zeros(SHAPE[2], 2 * I, wide["low"].shape[1], dtype=torch.float64, device=load.index.device)
    for expert, rows, positions in by_expert(load):
        x, g, low, h = wide["hidden"][rows // K], wide["grad"][rows // K], wide["low"][positions], wide["h"][positions]
        gate, up = (x @ weight["gate_up"][expert].T + low @ weight["up_factor"][expert]).chunk(2, dim=-1)
        out["up"].append(torch.nn.functional.gelu(gate, approximate="tanh") * up)
        out["down"].append(h @ weight["down"][expert].T + low @ weight["down_factor"][expert])
        out["low_rank"].append(x @ weight["rhs"][expert].T)
        gate, up = (half.requires_grad_() for half in wide["pre"][rows].chunk(2, dim=-1))
        own = torch.nn.functional.gelu(gate, approximate="tanh") * up
        a = g @ weight["down"][expert] + low @ weight["bwd_factor"][expert]
        scale = wide["weights"].flatten()[rows, None]
        d_pre[positions] = torch.cat(torch.autograd.grad(own, (gate, up), a * scale), dim=-1)
        weighted_h[positions] = (own * scale).detach()
        d_weights[rows] = (a * own).sum(-1).detach()
        gram[0][expert], gram[1][expert] = wide["pre"][positions].T @ x, g.T @ h
        low_gram[expert] = wide["pre"][positions].T @ low
    joined = {name: [torch.cat(parts)] for name, parts in out.items()}
    backward = [d_pre, weighted_h, d_weights.view(T, K)]
    return joined | {"down_bwd": backward, "gram": gram, "low_rank_gram": [low_gram]}


@pytest.mark.parametrize("weights", ["same", "int8", "fp8"])
def test_every_kernel_computes_what_its_name_says(device, weights):
    settings, load = make(device, rank=16, weights=weights)
    choice = settings.present(T, None)
    truth = expected(load)
    for kernel in tables.KERNELS:
        outputs = load.outputs(kernel, getattr(choice, kernel))
        assert len(outputs) == len(truth[kernel])
        for out, right in zip(outputs, truth[kernel], strict=True):
            assert helpers.relative_error(out, right) < 2e-6, kernel
            assert helpers.relative_error(out, right.roll(1, 0)) > 0.1  # the control: rows of another expert


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_weights_in_8_bits_are_those_of_the_layer(device, weights):
    """Stored and scaled, they are the plain layer's to what 8 bits resolve."""
    _, plain = make(device)
    _, low = make(device, weights=weights)
    for name in ("gate_up", "down"):
        assert getattr(low.layer, name).dtype.itemsize == 1
        error = helpers.relative_error(dequantised(low.layer, name), getattr(plain.layer, name))
        assert 1e-3 < error < (0.01 if weights == "int8" else 0.04)


@pytest.mark.parametrize("sabotaged", [False, True])
def test_a_search_over_real_launches(device, user, monkeypatch, sabotaged):
    """Every candidate agrees with the present tile, and would be taken; with one wrong element it is rejected."""
    settings, load = make(device, dtype=torch.bfloat16, training=False)
    before = settings.present(T, settings.device.name)
    measured = []
    monkeypatch.setattr(tune, "SIZES", 2)
    monkeypatch.setattr(tune, "depths", lambda work, tile, arch: [])
    monkeypatch.setattr(tune, "switches", lambda work, tile, arch: [])

    def measure(load, kernel, candidates, rounds):
        measured.append((kernel, tuple(candidates)))
        return [100.0 if tile == getattr(before, kernel) else 50.0 for tile in candidates]

    plain = load.outputs

    def outputs(kernel, tile):
        (found,) = plain(kernel, tile)
        if sabotaged and tile != getattr(before, kernel):
            found[T, 7] += found.abs().max() / 20
        return (found,)

    load.outputs = outputs
    said = tune.run(
        settings, lambda tokens: load, measure, user, seconds=1e9, command="omnigene-fast tune", versions={}
    )
    (bucket,) = [b for b in tables.read(user).buckets if "microseconds" in (b.note or {})]
    assert ("candidates were rejected" in said) == sabotaged
    assert (bucket.tiles == before) == sabotaged
    assert all((tried == (getattr(before, kernel),)) == sabotaged for kernel, tried in measured)


@pytest.mark.gpu
def test_on_a_gpu_the_clock_is_the_gpu_s(device, user):
    """A real, small search: it ends, and its table serves the device."""
    settings, load = make(device, dtype=torch.bfloat16)
    tune.run(
        settings,
        lambda tokens: load,
        tune_kernels.CudaTimer(device),
        user,
        seconds=60,
        command="omnigene-fast tune",
        versions={},
    )
    table = tables.read(user)
    assert table.device == torch.cuda.get_device_name(device)
    assert all(us > 0 for b in table.buckets for us in (b.note or {}).get("microseconds", {}).values())
