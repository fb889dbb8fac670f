"""The benchmark of forward and backward: gradients checked, memory measured, wrong ones shown as wrong."""

import functools
import subprocess
import sys

import pytest
import torch
from transformers.integrations import moe

from omnigene_fast.bench import checks, memory, plot, report, runner
from omnigene_fast.bench.floors import work
from omnigene_fast.bench.providers import OURS, OURS_INPUT, Provider, build
from omnigene_fast.bench.training import FALLBACK, RANKS, TRAINING_OPS, Gradients, adapted, eager_limit
from omnigene_fast.bench.workloads import TRUE_SHAPE, Draw, Layer, Shape

from .test_bench import ENVIRONMENT, TINY, ConstantProbe

CPU = torch.device("cpu")
PROVIDERS = [OURS, OURS_INPUT, "eager", "grouped_mm", FALLBACK]
TOKENS = (1, 17)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(TINY, torch.bfloat16, CPU)


@pytest.fixture(scope="module")
def rows() -> list[runner.Row]:
    def forgetful(op: str, layer: Layer) -> list[Provider]:
        """grouped_mm without the gradient of the weights of the picks: fast, and wrong."""
        (stock,) = build(op, layer, ("grouped_mm",))

        def call(draw: Draw) -> Gradients:
            output = stock.call(draw)
            return output | {"d_weights": torch.zeros_like(output["d_weights"])}

        return [Provider("forgetful", call, stock.prepare, note="no gradient of the weights")]

    settings = runner.Settings(
        ops=TRAINING_OPS, shape=TINY, training_tokens=TOKENS, training_modes=("uniform",), seconds=0.0, min_rounds=3
    )
    return runner.run(settings, ENVIRONMENT, extra=forgetful, probe=ConstantProbe())


def test_every_provider_is_checked_timed_and_weighed(rows):
    assert len(report.cases(rows)) == len(TRAINING_OPS) * len(TOKENS)
    for case in report.cases(rows):
        assert [row["provider"] for row in case] == [*PROVIDERS, "forgetful"]
        for row in case[:-1]:
            assert row["status"] == "ok", row
            assert 0 < row["error"] < 2e-2
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["peak_mb"] >= 0  # a few pages at this size


def test_wrong_gradient_is_wrong_not_fast(rows):
    found = [row for row in rows if row["provider"] == "forgetful"]
    for row in found:
        assert (row["status"], row["p50_ms"], row["peak_mb"]) == ("wrong", None, None)
        assert row["error"] == pytest.approx(1.0)


def test_ours_is_no_peer(rows):
    for case in report.cases(rows):
        peers = [row["p50_ms"] for row in case if row["provider"] in ("eager", "grouped_mm", FALLBACK)]
        assert case[0]["best_peer_over_this"] == pytest.approx(min(peers) / case[0]["p50_ms"], rel=1e-3)


def _swapped(gradient):
    return torch.cat(gradient.chunk(2, dim=1)[::-1], dim=1)


# A mistake in each tensor that a backward returns: (operation, tensor, what is done to it).
MISTAKES = {
    "out of other experts": ("experts_frozen", "out", lambda x: x.roll(1, 0)),
    "hidden of one expert too few": ("experts_frozen", "d_hidden", lambda x: x * 0.9),
    "weights in another order": ("experts_frozen", "d_weights", lambda x: x.roll(1, 1)),
    "gate and up swapped": ("experts_full", "d_gate_up", _swapped),
    "another expert's": ("experts_full", "d_down", lambda x: x.roll(1, 0)),
    "not a number": ("experts_full", "d_down", lambda x: x * torch.nan),
    "a ghost in an empty expert": ("experts_full", "d_down", lambda x: x + (x == 0) * 1e-3),
    "expert-major B": ("experts_lora16", "d_gate_up_B", lambda x: x.view(len(x), TINY.E, -1).mT.reshape(x.shape)),
    "rank-major A": (
        "experts_lora64",
        "d_down_A",
        lambda x: x.view(-1, TINY.E, x.shape[1]).transpose(0, 1).reshape(x.shape),
    ),
    "without the scaling": ("experts_lora16", "d_gate_up_A", lambda x: x / 2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_notices(layer, mistake):
    """Negative controls: the right gradients pass, one that is mistaken does not."""
    op, name, change = MISTAKES[mistake]
    draw, proj = next(layer.draws("protein", 9, 1)), layer.projection("protein")
    picked = checks.sample(layer, draw)
    assert len(picked.empty)
    expected = checks.truth(op, layer, draw, proj, picked)
    eager = checks.eager_errors(op, layer, draw, proj, expected, picked)
    (ours,) = build(op, layer, (OURS,), backend="reference")
    ours.prepare(proj)
    output = ours.call(draw)
    passes = functools.partial(checks.passes, eager=eager, dtype=torch.bfloat16)
    assert passes(checks.errors(op, layer, output, expected, picked))
    assert not passes(checks.errors(op, layer, output | {name: change(output[name])}, expected, picked))


def test_truth_is_that_of_the_whole_layer():
    """Expert by expert gives what torch's autograd gives through all of the layer at once, LoRA and all."""
    wide = Layer(TINY, torch.float64, CPU)
    draw, proj = next(wide.draws("uniform", 9, 1)), wide.projection("uniform")
    picked = checks.sample(wide, draw)
    for op in TRAINING_OPS:
        (eager,) = build(op, wide, ("eager",))
        eager.prepare(proj)
        expected = checks.truth(op, wide, draw, proj, picked)
        found = checks.errors(op, wide, eager.call(draw), expected, picked)
        assert found.keys() >= {"out", "d_hidden", "d_weights"}
        narrow = ("d_weights", "_A", "_B")  # top_k_weights, lora_A and lora_B are float32, and so are their gradients
        assert all(error < (1e-6 if name.endswith(narrow) else 1e-12) for name, error in found.items()), found


def test_sampled_experts_are_busy_and_idle():
    index = torch.tensor([[0, 1], [0, 3], [0, 3]])
    experts, empty = checks.gradients.sample_experts(index, 8)
    assert experts.tolist() == [0, 1, 3]
    assert empty.tolist() == [2, 4, 5]


def test_lora_runs_under_peft(layer):
    adapter = adapted(layer, RANKS["experts_lora16"])
    assert type(adapter.experts).__name__ == "ParamWrapper"
    E, H, I = TINY.E, TINY.H, TINY.I  # noqa: E741
    assert {name: tuple(p.shape) for name, p in adapter.parameters.items()} == {
        "gate_up_A": (16 * E, H),
        "gate_up_B": (2 * I, 16 * E),
        "down_A": (16 * E, I),
        "down_B": (H, 16 * E),
    }
    assert adapted(layer, 16) is adapter  # one for all providers


def test_fallback_is_transformers_own_and_is_undone(layer, monkeypatch):
    called = []
    before = moe._can_use_grouped_mm
    original = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *args, **kwargs: called.append(1) or original(*args, **kwargs)
    )
    draw = next(layer.draws("uniform", 5, 1))
    for name, calls in (("grouped_mm", 2), (FALLBACK, 0)):
        called.clear()
        (provider,) = build("experts_frozen", layer, (name,))
        provider.prepare(layer.projection("uniform"))
        provider.call(draw)
        assert len(called) == calls, name
        assert moe._can_use_grouped_mm is before


def test_eager_is_not_run_where_it_fills_layers_with_zeros(layer):
    assert eager_limit("experts_full", layer) is None
    big = Layer.__new__(Layer)
    big.shape, big.dtype = TRUE_SHAPE, torch.bfloat16
    assert eager_limit("experts_full", big) == 0
    assert eager_limit("experts_frozen", big) is None
    big.shape = Shape(512, 256, 1024, 2)  # 0.8 GB
    assert eager_limit("experts_lora16", big) == 2


def test_floor_by_hand():
    shape = Shape(H=10, I=4, E=8, K=2)
    index = torch.tensor([[0, 1], [1, 2], [1, 0]])  # three experts hit
    draw = Draw(torch.zeros(3, 10), torch.zeros(3, 10), index, torch.zeros(3, 2))
    bytes_hit, flops = 3 * 3 * 10 * 4 * 2, 6 * 3 * 2 * 10 * 4
    frozen = work("experts_frozen", shape, draw, torch.bfloat16)
    assert (frozen.bytes, frozen.flops) == (2 * bytes_hit, 2 * flops)
    full = work("experts_full", shape, draw, torch.bfloat16)
    assert (full.bytes, full.flops) == (2 * bytes_hit + 8 * 3 * 10 * 4 * 2, 3 * flops)
    lora = work("experts_lora16", shape, draw, torch.bfloat16)
    # gate_up: 16 · (10 + 8), down: 16 · (4 + 10) elements per expert; read twice where hit, written for all.
    factors = 16 * (10 + 8) + 16 * (4 + 10)
    assert lora.bytes == 2 * bytes_hit + (2 * 3 + 8) * factors * 2
    # A row costs 2 FLOPs per element of the factors in the forward, as many for its input's gradient and for theirs.
    assert lora.flops == 2 * flops + 3 * 2 * 3 * 2 * factors


PEAK_OF_KNOWN_BLOCKS = """
import torch
from omnigene_fast.bench import memory

def temporaries():
    torch.ones(10_000_000, dtype=torch.float32)  # 40 MB, freed before the next
    return torch.ones(5_000_000, dtype=torch.float32)

cpu = torch.device("cpu")
calls = lambda: None, temporaries, lambda: [temporaries(), temporaries()]
print(*(memory.peak_bytes(call, cpu) for call in calls))
"""


def test_peak_memory_counts_what_is_touched():
    """In a process of its own: where malloc puts a block depends on all that was freed before, and holes count."""
    if memory.peak_bytes(lambda: None, CPU) is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    result = subprocess.run([sys.executable, "-c", PEAK_OF_KNOWN_BLOCKS], capture_output=True, text=True, check=True)
    nothing, freed_before, together = map(int, result.stdout.split())
    assert nothing < 2e6
    assert freed_before == pytest.approx(40e6, abs=3e6)
    assert together == pytest.approx(60e6, abs=3e6)


def test_peak_memory_of_a_backward():
    """Full training holds a gradient of the layer, frozen does not; PEFT's merged weight costs at least a layer."""
    if memory.peak_bytes(lambda: None, CPU) is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    layer = Layer(Shape(H=1024, I=512, E=16, K=2), torch.bfloat16, CPU)  # 50 MB
    draw = next(layer.draws("uniform", 4, 1))
    peaks = {}
    for op, name in (
        ("experts_frozen", "grouped_mm"),
        ("experts_full", "grouped_mm"),
        ("experts_lora16", "grouped_mm"),
    ):
        (provider,) = build(op, layer, (name,))
        provider.prepare(layer.projection("uniform"))
        provider.call(draw)
        peaks[op] = memory.peak_bytes(functools.partial(provider.call, draw), CPU)
    size = layer.shape.layer_bytes(torch.bfloat16)
    assert peaks["experts_frozen"] < 0.2 * size
    assert 0.98 * size < peaks["experts_full"] < 1.5 * size
    assert peaks["experts_lora16"] > 0.98 * size


def test_tables_and_pictures(rows, tmp_path):
    path = tmp_path / "cpu-a-test.json"
    report.save(rows, path)
    assert plot.plot(rows, path.with_suffix(".png")) == [tmp_path / "cpu-a-test-training.png"]
    text = report.markdown(tmp_path)
    assert report.TRAINING_TITLE in text
    assert "over the fallback" in text
    assert f"{FALLBACK} MB" in text
    for trained in report.TRAINED.values():
        assert f"| {trained} | uniform | 17 |" in text
    assert "cpu-a-test-training.png" in text
    assert "peak MB" in report.console(rows)


def test_losses_of_training():
    shared = {"op": "experts_frozen", "mode": "uniform", "tokens": 256, "status": "ok", "note": "", "over_floor": 1.2}
    shared |= {"error": 1e-3, "eager_error": 1e-3, "dtype": "bfloat16", "shape": report.GOAL_SHAPE} | ENVIRONMENT
    ours = shared | {"provider": OURS, "p50_ms": 10.0, "peak_mb": 50.0, "best_peer_over_this": 3.0}
    grouped = shared | {"provider": "grouped_mm", "p50_ms": 30.0, "peak_mb": 40.0}
    fallback = shared | {"provider": FALLBACK, "p50_ms": 50.0, "peak_mb": 900.0}
    assert report.losses([ours, grouped, fallback]) == [
        "experts_frozen, uniform, T=256: 5.00x the speed of grouped_mm_fallback, the goal is 6.0x",
        "experts_frozen, uniform, T=256: 50 MB at its peak, grouped_mm 40 MB",
    ]
    good = [ours | {"peak_mb": 30.0}, grouped, fallback | {"p50_ms": 61.0}]
    assert report.losses(good) == []
    lora = [row | {"op": "experts_lora16"} for row in (ours | {"best_peer_over_this": 5.0}, grouped, fallback)]
    lora[1]["peak_mb"] = 1500.0
    assert report.losses(lora[:2]) == [
        "experts_lora16, uniform, T=256: 1450 MB less than grouped_mm at its peak, the goal is 1523 MB"
    ]
    lora[1]["peak_mb"] = 1600.0
    assert report.losses(lora[:2]) == []


def test_merging_replaces_cases_and_keeps_the_others(rows):
    old = [row | {"p50_ms": -1.0} for row in rows]
    new = [row for row in rows if (row["op"], row["tokens"]) == ("experts_full", 17)]
    merged = report.merged(old, new)
    assert [report._case(row) for row in merged] == [report._case(row) for row in rows]
    for row in merged:
        assert (row["p50_ms"] != -1.0) == ((row["op"], row["tokens"]) == ("experts_full", 17))
    assert report.merged([], new) == new
    report.check_mergeable(old, rows[0])
    with pytest.raises(ValueError, match=r"expected rows of one shape, got \[96, 40, 16, 4\] in the file and \[1\]"):
        report.check_mergeable(old, rows[0] | {"shape": [1]})
