"""What the benchmark has for a GPU, on made-up rows and on the CPU: goals, tables, 8 bits, peers, LoRA by hand."""

import enum
import sys
import time
import types

import pytest
import torch

from omnigene_fast.bench import checks, goals, lowbit, providers, report, report_gpu, timing, training
from omnigene_fast.bench.floors import work
from omnigene_fast.bench.providers import FALLBACK, OURS, REFERENCE, Missing, Provider, build
from omnigene_fast.bench.timing import stopwatch
from omnigene_fast.bench.workloads import Draw, Layer, Shape, random_on_device

from .test_bench import CPU, TINY

H100 = {
    "device": "NVIDIA H100 80GB HBM3",
    "isa": None,
    "backend": "triton",
    "threads": 16,
    "versions": dict.fromkeys(("python", "torch", "transformers", "triton", "omnigene_fast"), "9.9"),
    "date": "2000-01-01",
    "dtype": "bfloat16",
    "shape": goals.SHAPE,
    "probe": "cuda",
    "bandwidth_gb_s": 3000.0,
    "peak_gflop_s": 7e5,
    "eager_error": 4e-3,
    "bound": "memory",
}


FOUND = types.SimpleNamespace(origin="somewhere/__init__.py")


def row(op, tokens, provider, us, mode="uniform", floor_us=20.0, gain=None, status="ok", **more):
    ms = None if us is None else us / 1e3
    figures = {"floor_ms": floor_us / 1e3, "p20_ms": ms, "p50_ms": ms, "p80_ms": ms, "rounds": 9, "error": 3e-3}
    figures |= {"over_floor": us and us / floor_us, "best_peer_over_this": gain, "note": "", "tflops": 1.5}
    case = {"op": op, "mode": mode, "tokens": tokens, "provider": provider, "status": status, "host_ms": 0.2}
    return H100 | case | figures | more


@pytest.fixture
def rows():
    """One goal is met, one missed, one was not reached; a peer is wrong and another faster than ours."""
    return [
        row("experts", 1, OURS, 40.0, gain=3.0),
        row("experts", 1, "eager", 900.0, gain=0.1),
        row("experts", 1, "grouped_mm", 120.0, gain=1.0),
        row("experts", 1, "vllm", None, status="wrong"),
        row("experts", 1, OURS, 46.0, mode="protein", gain=0.5),
        row("experts", 1, "grouped_mm", 23.0, mode="protein", gain=1.0),
        row("experts_frozen", 4096, OURS, None, status="wrong", peak_mb=None),
        row("experts_frozen", 4096, "grouped_mm", 5000.0, peak_mb=300.0),
        row("route", 1, OURS, 10.0),
        row("route_traced", 1, OURS, 10.4),
        row("decode", 8, OURS, 300.0, gain=1.5, layers=4),
        row("decode", 8, FALLBACK, 450.0, gain=1.0, layers=4),
    ]


def test_goals_are_met_missed_or_not_measured(rows):
    judged = {(each.goal, each.mode): each for each in goals.judge(rows)}
    met = judged["experts T=1 <= 45 us", "uniform"]
    assert (met.met, met.measured, met.over_floor, met.over_best_peer) == (True, "40 us", 2.0, 3.0)
    missed = judged["experts T=1 <= 45 us", "protein"]
    assert (missed.met, missed.measured) == (False, "46 us")
    assert judged["experts_frozen T=4096 <= 1,700 us", "uniform"].met is False  # wrong is not fast
    assert judged["experts T=8 <= 230 us", "uniform"].met is None
    assert judged["experts T=1 >= 2x transformers' best path", "uniform"].measured == "3.00x"
    assert judged["experts T=1 >= 2x transformers' best path", "protein"].met is False
    assert judged["route_traced T=1 <= 12 us", "uniform"].met is True
    trace = judged["trace T=1 <= 1 % of router and experts", "uniform"]
    assert (trace.met, trace.measured) == (True, "0.80 %")


def test_a_goal_is_met_at_its_limit_and_missed_past_it():
    for us, met in ((45.0, True), (45.01, False)):
        assert goals.judge([row("experts", 1, OURS, us)])[0].met is met


def test_every_goal_of_the_design_is_judged():
    judged = goals.judge([])
    assert len(judged) == 10 + 6 + 2
    assert {each.met for each in judged} == {None}
    text = "\n".join(each.goal for each in judged)
    for goal in ("T=8 <= 230", "T=64 <= 520", "T=512 <= 560", "T=4096 <= 850", "T=16384 <= 3,100"):
        assert f"experts {goal}" in text
    for goal in ("experts_frozen T=4096 <= 1,700", "experts_full T=16384 <= 11,000", "route_traced T=16384 <= 60"):
        assert goal in text


def test_where_we_lose(rows):
    lost = report.losses(rows)
    assert lost == [
        "experts, protein, T=1: 2.00x slower than grouped_mm",
        "experts_frozen, uniform, T=4096: wrong ()",
        "goal missed: experts T=1 <= 45 us, protein: 46 us",
        "goal missed: experts_frozen T=4096 <= 1,700 us, uniform: wrong",
        "goal missed: experts T=1 >= 2x transformers' best path, protein: 0.50x",
    ]
    heavy = [row("experts_full", 4096, OURS, 10.0, peak_mb=20.0), row("experts_full", 4096, "eager", 10.0, peak_mb=5.0)]
    assert "experts_full, uniform, T=4096: 20 MB at its peak, eager 5 MB" in report.losses(heavy)
    inexact = [row("experts", 512, OURS, 500.0, error=5e-3)]
    assert report.losses(inexact) == ["experts, uniform, T=512: error 5.0e-03, transformers' eager 4.0e-03"]


def test_goals_stand_beside_what_was_predicted(rows):
    lines = report_gpu.goals_table(rows).splitlines()
    assert lines[0].split("|")[3].strip() == "predicted"
    assert any(line.startswith("| experts T=1 <= 45 us | uniform | 39.64 us |") for line in lines)
    assert all(line.split("|")[3].strip() == "-" for line in lines if " >= 2x " in line or "| trace " in line)


def test_goals_are_not_held_against_another_device(rows):
    others = [each | {"device": "NVIDIA A100"} for each in rows]
    assert not any("goal missed" in line for line in report.losses(others))


def test_a_gpus_section_in_the_readme(rows, tmp_path):
    models = [
        row("model_decode", 1, OURS, 9000.0, mode="random", gain=2.0, layers=4, tokens_per_s=111.0, peak_mb=5.0),
        row("model_decode", 1, "eager", 18000.0, mode="random", gain=1.0, layers=4, tokens_per_s=55.0, peak_mb=5.0),
    ]
    report.save(rows + models, tmp_path / "gpu-nvidia-h100.json")
    text = report.markdown(tmp_path)
    assert "### NVIDIA H100 80GB HBM3, triton kernels" in text
    assert "Measured 2000-01-01 with torch 9.9, Triton 9.9, transformers 9.9, Python 9.9" in text
    assert "3,000 GB/s and 700 TFLOP/s" in text
    lines = text.splitlines()
    assert "| uniform | 1 | 20 | 40 | 50 % | 1.50 | 200 | 900 | 120 | wrong | **3.00x** | 3.0e-03 | 4.0e-03 |" in lines
    assert "| experts T=1 <= 45 us | protein | 39.64 us | 46 us | **no** | 2.30 | 0.50 |" in lines
    assert "| experts T=8 <= 230 us | uniform | 235 us | - | not measured | - | - |" in lines
    assert "| decode | 1 | 111 | 55 | **2.00x** | 5 | 5 |" in lines
    assert "- goal missed: experts T=1 <= 45 us, protein: 46 us" in lines
    assert "Decode: blocks of several layers in one CUDA graph" in text
    assert report_gpu.is_gpu(rows)
    assert not report_gpu.is_gpu([each | {"probe": "native"} for each in rows])


def test_rows_of_all_steps_are_put_in_order(rows):
    mixed = report.merged(rows[6:], rows[:6])
    assert [each["op"] for each in mixed][:3] == ["route", "experts", "experts"]
    assert mixed[-1]["op"] == "decode"
    assert len(mixed) == len(rows)
    assert "decode · uniform · T=8" in report.console(mixed)


# 8-bit experts.


@pytest.fixture(scope="module")
def layer():
    return Layer(TINY, torch.bfloat16, CPU)


@pytest.mark.parametrize("op", lowbit.LOW_BIT_OPS)
def test_8_bit_experts_are_checked_against_what_the_bits_stand_for(layer, op):
    draw, proj = next(layer.draws("uniform", 9, 1)), layer.projection("uniform")
    picked = checks.sample(layer, draw)
    expected = checks.truth(op, layer, draw, proj, picked)
    eager = checks.eager_errors(op, layer, draw, proj, expected, picked)
    built = {each.name: each for each in build(op, layer, (REFERENCE, "grouped_mm"))}
    assert built["grouped_mm"].note == "on torch.bfloat16 weights"
    for provider in built.values():
        assert checks.passes(checks.errors(op, layer, provider.call(draw), expected, picked), eager, torch.bfloat16)
    low = lowbit.low_bit(layer, op)
    low.gate_up_scale[:, TINY.I :] *= 1.02
    try:
        error = checks.errors(op, layer, built[REFERENCE].call(draw), expected, picked)
    finally:
        low.gate_up_scale[:, TINY.I :] /= 1.02
    assert not checks.passes(error, eager, torch.bfloat16)
    plain = checks.truth("experts", layer, draw, proj, picked)["out"]
    assert (plain - expected["out"]).norm() > 1e-3 * plain.norm()  # the quantisation itself is not called an error


def test_floors_of_8_bits_and_traces_by_hand():
    shape = Shape(H=10, I=4, E=8, K=2)
    draw = Draw(torch.zeros(3, 10), torch.zeros(3, 10), torch.tensor([[0, 1], [1, 2], [1, 0]]), torch.zeros(3, 2))
    assert work("experts_int8", shape, draw, torch.bfloat16).bytes == 3 * (3 * 10 * 4 + 4 * (8 + 10))
    route, traced = (work(op, shape, draw, torch.bfloat16).bytes for op in ("route", "route_traced"))
    assert traced - route == 3 * (2 * 1 + 2 * 2 + 3 * 2)


# Peers, timing, random numbers.


def test_a_known_wrong_activation_is_wrong_without_being_run(layer, monkeypatch):
    fused = types.ModuleType("vllm.model_executor.layers.fused_moe")
    fused.fused_experts = lambda *_, **__: pytest.fail("was run")
    names = "vllm", "vllm.model_executor", "vllm.model_executor.layers", fused.__name__
    for name in names[:-1]:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fused.__name__, fused)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: FOUND)
    provider = providers._gpu("experts", layer, "vllm")
    assert isinstance(provider, Provider)
    assert "GELU with erf" in provider.wrong
    tanh = types.ModuleType(f"{fused.__name__}.activation")
    tanh.MoEActivation = enum.Enum("MoEActivation", {"GELU": "gelu", "GELU_TANH": "gelu_tanh"})
    monkeypatch.setitem(sys.modules, tanh.__name__, tanh)
    given = {}

    def right(hidden, gate_up, down, weights, index, activation):
        given["activation"] = activation
        return hidden

    fused.fused_experts = right
    provider = providers._gpu("experts", layer, "vllm")
    assert provider.wrong == ""
    provider.call(next(layer.draws("uniform", 2, 1)))
    assert given["activation"].value == "gelu_tanh"


def test_a_peer_whose_import_breaks_is_missing(layer, monkeypatch):
    def broken(layer):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(providers, "_liger", broken)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: FOUND)
    found = providers._gpu("experts", layer, "liger")
    assert isinstance(found, Missing)
    assert found.reason == "OSError: libcudart.so.13: cannot open shared object file"


def test_transformers_fallback_is_its_own_provider(layer):
    from transformers.integrations import moe

    provider = providers._fallback("experts", layer)
    draw = next(layer.draws("uniform", 5, 1))
    (plain,) = build("experts", layer, ("grouped_mm",))
    before = moe._can_use_grouped_mm
    assert (provider.call(draw) - plain.call(draw)).norm() < 1e-2 * draw.normed.norm()
    assert provider.name == FALLBACK
    assert moe._can_use_grouped_mm is before


def test_lora_without_peft_has_the_same_truth(monkeypatch):
    """Its factors, its scaling and its merged weight are those that PEFT makes."""
    outputs = {}
    for installed in (True, False):
        monkeypatch.setattr(training, "uses_peft", lambda installed=installed: installed)
        monkeypatch.setattr(providers, "uses_peft", lambda installed=installed: installed)
        layer = Layer(TINY, torch.float32, CPU)
        draw, proj = next(layer.draws("uniform", 9, 1)), layer.projection("uniform")
        picked = checks.sample(layer, draw)
        expected = checks.truth("experts_lora16", layer, draw, proj, picked)
        eager = checks.eager_errors("experts_lora16", layer, draw, proj, expected, picked)
        outputs[installed] = {}
        for provider in build("experts_lora16", layer, (OURS, "grouped_mm", "eager")):
            assert ("PEFT is not installed" in provider.note) is not installed
            provider.prepare(proj)
            output = provider.call(draw)
            outputs[installed][provider.name] = output
            assert checks.passes(checks.errors("experts_lora16", layer, output, expected, picked), eager, layer.dtype)
    assert outputs[True]["grouped_mm"].keys() == outputs[False]["grouped_mm"].keys()
    for name, tensor in outputs[True]["grouped_mm"].items():
        assert torch.allclose(tensor, outputs[False]["grouped_mm"][name], rtol=1e-4, atol=1e-4), name


def test_time_on_the_cpu_is_the_clocks():
    watch = stopwatch(CPU)
    elapsed = watch("sleep", lambda: time.sleep(0.02))
    assert 20 <= elapsed.ms < 2000
    assert elapsed.host_ms is None


def test_weights_made_on_a_device_are_of_the_same_kind():
    values = random_on_device(torch.Size([300, 333]), torch.Generator().manual_seed(0)).float()
    assert values.abs().min() >= 2**-7
    assert values.abs().max() < 2**-5
    assert abs(values.mean()) < 3e-4
    assert len(values.unique()) == 2 * 2 * 128


def test_a_gpus_call_is_timed_behind_a_flush_and_a_spin(monkeypatch):
    """The order on the stream, with a pretended driver; the spin outlasts the launch."""
    done, clock = [], iter(range(0, 1000, 7))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")
            self.at = next(clock)

        def elapsed_time(self, end):
            return float(end.at - self.at)

    fakes = {
        "Event": Event,
        "_sleep": lambda cycles: done.append(("spin", cycles)),
        "synchronize": lambda device: done.append("wait"),
        "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=1000),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 4096)
    watch = timing.CudaStopwatch(CPU)
    plain = torch.sum
    monkeypatch.setattr(torch, "sum", lambda *given, **named: (done.append("flush"), plain(*given, **named))[1])
    done.clear()
    elapsed = watch("op", lambda: (done.append("call"), time.sleep(0.01)))
    assert [each[0] if isinstance(each, tuple) else each for each in done] == [
        *("wait", "flush", "spin", "event", "call", "event", "wait")
    ]
    assert elapsed.ms == 7
    assert elapsed.host_ms >= 10
    first, cycles_per_ms = done[2][1], timing._SPIN_CYCLES / 7
    assert first == pytest.approx(1.55 * cycles_per_ms, rel=1e-3)
    done.clear()
    watch("op", lambda: None)
    assert done[2][1] == pytest.approx(5.0 * cycles_per_ms, rel=1e-3)  # 15 ms would hide it; there is a limit
    done.clear()
    watch("op", lambda: None)
    assert done[2][1] < first


def test_a_directory_is_no_installed_package(monkeypatch, tmp_path):
    """`kernels/` of a checkout is not the PyPI package through which transformers loads SonicMoE."""
    (tmp_path / "a_directory").mkdir()
    (tmp_path / "a_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert providers.installed("a_module")
    assert not providers.installed("a_directory")
    assert not providers.installed("no_such.submodule")
