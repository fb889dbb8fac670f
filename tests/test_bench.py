"""The benchmark itself: floors by hand, routing statistics, wrong providers shown as wrong, rows and tables."""

import json
import math

import pytest
import torch

from omnigene_fast.bench import checks, plot, report, runner
from omnigene_fast.bench.floors import Probe, work
from omnigene_fast.bench.providers import (
    FORWARD_OPS,
    NAMES,
    OURS,
    REFERENCE,
    TRANSFORMERS,
    Missing,
    Provider,
    build,
)
from omnigene_fast.bench.workloads import MODES, TRUE_SHAPE, Draw, Layer, Shape, cheap_random, effective_experts

CPU = torch.device("cpu")
TINY = Shape(H=96, I=40, E=16, K=4)
ENVIRONMENT = {
    "device": "a test",
    "isa": "avx512_bf16",
    "backend": "cpu",
    "threads": 2,
    "versions": dict.fromkeys(("python", "torch", "transformers", "triton", "omnigene_fast"), "0"),
    "date": "2000-01-01",
}


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(TINY, torch.bfloat16, CPU)


class ConstantProbe(Probe):
    """10 GB/s and 100 GFLOP/s: the native probe reads 1 GiB, which no test needs sixteen times."""

    def __init__(self) -> None:
        self.kind = "constant"

    def sample(self) -> None: ...

    def reset(self) -> None: ...

    bandwidth, peak = 10.0, 100.0


def settings(**changes) -> runner.Settings:
    values = {"ops": FORWARD_OPS, "shape": TINY, "tokens": (1, 16, 17), "modes": ("uniform", "protein")}
    return runner.Settings(**values | {"seconds": 0.0, "min_rounds": 3} | changes)


@pytest.fixture(scope="module")
def rows() -> list[runner.Row]:
    def wrong(op: str, layer: Layer) -> list[Provider]:
        """Ours with one expert off: a fast nonsense."""
        if op != "experts":
            return []
        (ours,) = build(op, layer, (REFERENCE,))

        def shifted(draw: Draw):
            index = (draw.index + 1) % layer.shape.E
            return ours.call(Draw(draw.hidden, draw.normed, index, draw.weights))

        def crashing(draw: Draw):
            raise RuntimeError("no such kernel\nsecond line")

        return [Provider("off_by_one", shifted, note="one expert off"), Provider("crashing", crashing)]

    return runner.run(settings(), ENVIRONMENT, extra=wrong, probe=ConstantProbe())


def test_every_case_has_its_providers(rows):
    assert len(report.cases(rows)) == 3 + 2 * 3 + 2 * 3
    for case in report.cases(rows):
        expected = [OURS, "eager", REFERENCE] if case[0]["op"] == "route" else [OURS, *TRANSFORMERS, REFERENCE]
        assert [row["provider"] for row in case if row["provider"] in NAMES] == expected


def test_the_floor_is_that_of_the_probe(rows):
    for row in rows:
        assert (row["probe"], row["bandwidth_gb_s"], row["peak_gflop_s"]) == ("constant", 10.0, 100.0)
        if (row["op"], row["tokens"]) == ("experts", 1):
            assert row["floor_ms"] == pytest.approx(4 * 3 * 96 * 40 * 2 / 10e9 * 1e3, rel=1e-4)


def test_probe_measures_something():
    probe = Probe(CPU, torch.float64)  # float64 has no native probe
    probe.sample()
    probe.sample()
    assert (probe.kind, len(probe.peaks)) == ("torch", 2)
    assert min(*probe.bandwidths, *probe.peaks) > 0
    probe.reset()
    assert len(probe.bandwidths) == len(probe.peaks) == 1


def test_right_providers_pass(rows):
    for row in rows:
        if row["provider"] in NAMES and row["status"] != "skipped":
            assert row["status"] == "ok", row
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["over_floor"] == pytest.approx(row["p50_ms"] / row["floor_ms"], rel=1e-3)


def test_wrong_provider_is_wrong_not_fast(rows):
    found = [row for row in rows if row["provider"] == "off_by_one"]
    assert found
    for row in found:
        assert (row["status"], row["p50_ms"], row["best_peer_over_this"]) == ("wrong", None, None)
        assert row["error"] > 0.1
        assert "WRONG: one expert off" in report.console([row])


def test_crashing_provider_is_a_row(rows):
    found = [row for row in rows if row["provider"] == "crashing"]
    assert {row["status"] for row in found} == {"failed"}
    assert found[0]["note"] == "RuntimeError: no such kernel"


def test_batched_mm_is_skipped_above_16_tokens(rows):
    for row in rows:
        if row["provider"] == "batched_mm":
            assert (row["status"] == "skipped") == (row["tokens"] > 16)
            assert row["status"] != "skipped" or "copies the weights" in row["note"]


def test_best_peer_is_the_fastest_of_transformers(rows):
    for case in report.cases(rows):
        peers = [row["p50_ms"] for row in case if row["provider"] in TRANSFORMERS and row["status"] == "ok"]
        ours = next(row for row in case if row["provider"] == OURS)
        assert ours["best_peer_over_this"] == pytest.approx(min(peers) / ours["p50_ms"], rel=1e-3)


@pytest.mark.parametrize("swap", ["silu", "gate_up", "weights", "norm"])
def test_check_notices(layer, swap):
    """Negative controls of the numeric check, on the block and the experts."""
    op = "block" if swap == "norm" else "experts"
    draw, proj = next(layer.draws("uniform", 9, 1)), layer.projection("uniform")
    picked = checks.sample(layer, draw)
    expected = checks.truth(op, layer, draw, proj, picked)
    (right,) = build(op, layer, (REFERENCE,))
    other = Layer(TINY, torch.bfloat16, CPU)
    (wrong,) = build(op, other, ("eager",))
    if swap == "gate_up":
        other.gate_up.copy_(torch.cat([layer.gate_up[:, TINY.I :], layer.gate_up[:, : TINY.I]], dim=1))
    elif swap == "norm":
        other.norm.fill_(1.0)
    changed = Draw(draw.hidden, draw.normed, draw.index, draw.weights.roll(1, 1)) if swap == "weights" else draw
    if swap == "silu":
        from omnigene_fast import reference

        output = reference.expert_mlp(
            draw.normed, layer.gate_up, layer.down, draw.index, draw.weights, activation="silu"
        )
    else:
        wrong.prepare(proj)
        output = wrong.call(changed)
    eager = checks.eager_errors(op, layer, draw, proj, expected, picked)
    right.prepare(proj)
    assert checks.passes(checks.errors(op, layer, right.call(draw), expected, picked), eager, torch.bfloat16)
    assert not checks.passes(checks.errors(op, layer, output, expected, picked), eager, torch.bfloat16)


def test_nan_and_wrong_shape_are_infinitely_wrong(layer):
    draw = next(layer.draws("uniform", 3, 1))
    picked = checks.sample(layer, draw)
    expected = checks.truth("experts", layer, draw, layer.projection("uniform"), picked)
    assert checks.errors("experts", layer, draw.normed * math.nan, expected, picked) == {"out": math.inf}
    assert checks.errors("experts", layer, draw.normed[:, 1:], expected, picked) == {"out": math.inf}


def test_floor_by_hand():
    shape = Shape(H=10, I=4, E=8, K=2)
    index = torch.tensor([[0, 1], [1, 2], [1, 0]])  # three experts hit
    draw = Draw(torch.zeros(3, 10), torch.zeros(3, 10), index, torch.zeros(3, 2))
    experts = work("experts", shape, draw, torch.bfloat16)
    assert (experts.bytes, experts.flops) == (3 * 3 * 10 * 4 * 2, 6 * 3 * 2 * 10 * 4)
    route = work("route", shape, draw, torch.bfloat16)
    assert (route.bytes, route.flops) == (8 * 10 * 2 + 3 * (10 * 2 + 8 * 4 + 2 * 12), 2 * 3 * 8 * 10)
    block = work("block", shape, draw, torch.bfloat16)
    assert (block.bytes, block.flops) == (experts.bytes + 8 * 10 * 2, experts.flops + route.flops)
    # 720 bytes at 1 GB/s are 720 ns; 1440 FLOPs at 1 GFLOP/s are 1440 ns.
    assert experts.floor_ms(bandwidth=1.0, peak=1.0) == pytest.approx(1440e-6)
    assert experts.floor_ms(bandwidth=1.0, peak=100.0) == pytest.approx(720e-6)
    assert (experts.bound(1.0, 1.0), experts.bound(1.0, 100.0)) == ("compute", "memory")


def test_true_shape_is_gemma4_26b():
    assert TRUE_SHAPE.layer_bytes(torch.bfloat16) == 1_522_532_352
    assert TRUE_SHAPE.expert_bytes(torch.bfloat16) == 11_894_784


def test_probe_uses_the_median():
    probe = Probe.__new__(Probe)
    probe.bandwidths, probe.peaks = [10.0, 30.0, 20.0], [1.0, 5.0]
    assert (probe.bandwidth, probe.peak) == (20.0, 3.0)


@pytest.mark.parametrize(("mode", "effective"), [("uniform", 128), ("natural", 62), ("protein", 12.6)])
def test_routing_modes_have_their_statistics(mode, effective):
    index = next(Layer(Shape(512, 1, 128, 8), torch.bfloat16, CPU).draws(mode, 4096, 1)).index
    assert effective_experts(index) == pytest.approx(effective, rel=0.06)
    visits = torch.bincount(index.flatten(), minlength=128).sort(descending=True).values / len(index)
    if mode == "protein":
        assert visits[:3].min() > 0.995
        assert visits[3] < 0.95
        assert (visits < 0.01).sum() > 100
    else:
        assert visits[0] < 0.6


@pytest.mark.parametrize("mode", MODES)
def test_router_produces_the_drawn_routing(layer, mode):
    draw = next(layer.draws(mode, 64, 1))
    (stock,) = build("route", layer, ("eager",))
    stock.prepare(layer.projection(mode))
    index = stock.call(draw)[2]
    assert torch.equal(index.sort(-1).values, draw.index.sort(-1).values)


def test_routing_is_redrawn_and_reproducible(layer):
    first, second = (list(layer.draws("uniform", 8, 2)) for _ in range(2))
    assert not torch.equal(first[0].index, first[1].index)
    assert all(torch.equal(one.hidden, other.hidden) for one, other in zip(first, second, strict=True))


def test_cheap_weights_are_random_and_centred():
    import numpy as np

    values = cheap_random(np.random.Generator(np.random.SFC64(0)), 100_001).float()
    assert values.shape == (100_001,)
    assert values.abs().min() >= 2**-7
    assert values.abs().max() < 2**-5
    assert abs(values.mean()) < 3e-4
    assert len(values.unique()) == 2 * 2 * 128


def test_rows_survive_a_file_and_become_tables(rows, tmp_path):
    report.save(rows, tmp_path / "cpu-a-test.json")
    assert report.load(tmp_path / "cpu-a-test.json") == rows
    text = report.markdown(tmp_path)
    for title in report.TITLES.values():
        assert title in text
    assert "| wrong |" not in text  # the wrong one is not of the named providers
    assert "Where we lose" in text
    plot.plot(rows, tmp_path / "cpu-a-test.png")
    assert (tmp_path / "cpu-a-test.png").stat().st_size > 10_000
    assert "cpu-a-test.png" in report.markdown(tmp_path)


def test_losses_name_what_is_lost():
    ours = {
        "op": "experts",
        "mode": "uniform",
        "tokens": 16,
        "provider": OURS,
        "status": "ok",
        "note": "",
        "p50_ms": 2.0,
    }
    ours |= {"best_peer_over_this": 0.5, "over_floor": 1.3, "error": 2e-3, "eager_error": 1e-3} | ENVIRONMENT
    ours |= {"dtype": "bfloat16", "shape": report.GOAL_SHAPE}
    peer = ours | {"provider": "grouped_mm", "p50_ms": 1.0, "best_peer_over_this": 1.0}
    lost = report.losses([ours, peer])
    assert lost == [
        "experts, uniform, T=16: 2.00x slower than grouped_mm",
        "experts, uniform, T=16: 1.30x the floor, the goal is 1.15x",
        "experts, uniform, T=16: error 2.0e-03, transformers' eager 1.0e-03",
    ]
    good = ours | {"best_peer_over_this": 3.0, "over_floor": 1.1, "error": 1e-3}
    assert report.losses([good, peer | {"p50_ms": 6.0}]) == []
    assert report.losses([ours | {"status": "wrong", "note": "why"}]) == ["experts, uniform, T=16: wrong (why)"]


def test_providers_that_need_a_gpu_are_left_out_on_a_cpu(layer):
    assert [provider.name for provider in build("experts", layer)] == [OURS, *TRANSFORMERS, REFERENCE]
    assert not any(isinstance(provider, Missing) for provider in build("block", layer))


def test_short_memory_is_one_sentence(monkeypatch):
    monkeypatch.setattr(runner, "available_memory", lambda device: 1 << 30)
    with pytest.raises(MemoryError, match=r"1.5 GB .* needs 4.1 GB of memory on cpu, 1.1 GB are available\.$"):
        runner.run(runner.Settings(ops=FORWARD_OPS), {})
    with pytest.raises(MemoryError, match=r"needs 8.7 GB"):
        runner.run(runner.Settings(), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": ("rout",)}, "op: expected some of route"),
        ({"modes": ()}, "mode: expected some of uniform"),
        ({"providers": ("nobody",)}, "provider: expected some of omnigene_fast"),
        ({"tokens": (0,)}, "tokens: expected numbers >= 1"),
        ({"training_tokens": ()}, "tokens: expected numbers >= 1"),
        ({"training_modes": ("skewed",)}, "mode: expected some of uniform"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_file_of_something_else_is_one_sentence(tmp_path):
    path = tmp_path / "x.json"
    for content in ("{", json.dumps([1, 2]), json.dumps({"a": 1})):
        path.write_text(content)
        with pytest.raises(ValueError, match="expected a JSON array of benchmark rows"):
            report.load(path)
