"""`omnigene-fast tune` with a cost model in place of a GPU: search, journal, table, and the lookup of what was written.

tests/kernels/test_tune_kernels.py runs the real kernels.
"""

import json
import os
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from omnigene_fast import info, tune, tune_kernels, tune_model
from omnigene_fast.cli import main
from omnigene_fast.kernels import tables, tiles
from omnigene_fast.kernels.tables import Tile
from omnigene_fast.tune_journal import Journal, write
from omnigene_fast.tune_model import Device, Work

GPU = Device("NVIDIA H100 80GB HBM3", 90, 132)
SHAPE = (2816, 704, 128, 8)
VERSIONS = {"torch": "2.11", "triton": "3.6"}


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path):
    """The user's table, of which there is none yet."""
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tables.user_file(GPU.name)
    forget()


def forget():
    tables.forget()
    tiles.expert_tiles.cache_clear()


def settings(**changes):
    return tune.Settings(GPU, SHAPE, **({"tokens": (64, 512, 4096)} | changes))


def present(tokens, **changes):
    return settings(**changes).present(tokens, GPU.name)


class Bench:
    """Workloads and measurements of a GPU whose times are `cost(tokens, kernel, tile)`; its clock runs by them."""

    def __init__(self, options, cost, output=None):
        self.options, self.cost, self.output = options, cost, output
        self.now, self.calls = 0.0, []

    def workload(self, tokens):
        bench = self

        class Load:
            def __init__(self):
                rows = tokens * 8 / 128
                gemm = {"up": (704, 2816, 2), "down": (2816, 704, 1), "down_bwd": (704, 2816, 1)}
                work = {n: Work(128, rows, c, k, 2, 2, operands) for n, (c, k, operands) in gemm.items()}
                work["gram"] = Work(128, 1408, 2816, rows, 2, 2, weighted=False)
                work["low_rank"] = Work(128, rows, 16, 2816, 2, 2, low_rank=True)
                work["low_rank_gram"] = Work(128, 1408, 16, rows, 2, 2, low_rank=True, weighted=False)
                self.tokens, self.work = tokens, {name: work[name] for name in bench.options.kernels}

            def outputs(self, kernel, tile):
                right = torch.linspace(-3, 3, 1000).bfloat16()
                return (bench.output(kernel, tile, right) if bench.output else right,)

        return Load()

    def measure(self, load, kernel, candidates, rounds):
        self.calls.append((load.tokens, kernel, tuple(candidates), rounds))
        self.now += len(candidates) * rounds
        return [self.cost(load.tokens, kernel, tile) for tile in candidates]

    def run(self, path, seconds=1e9, options=None):
        return tune.run(
            options or self.options,
            self.workload,
            self.measure,
            path,
            seconds=seconds,
            command="omnigene-fast tune",
            versions=VERSIONS,
            clock=lambda: self.now,
        )


def likes(**wanted):
    """A cost that is 100 µs less 10 for each field of a tile that is as wanted."""
    return lambda tokens, kernel, tile: 100 - 10 * sum(getattr(tile, name) == value for name, value in wanted.items())


# The search


def test_the_fastest_is_found_written_and_used_from_then_on(user):
    bench = Bench(settings(), likes(block_k=32, stages=3))
    said = bench.run(user)
    table = tables.read(user)
    assert (table.source, table.device, table.arch) == ("measured", GPU.name, (90,))
    assert table.header["shape"] == {"H": 2816, "I": 704, "E": 128, "K": 8}
    measured = [bucket for bucket in table.buckets if "microseconds" in bucket.note]
    assert [bucket.rows_per_expert for bucket in measured] == [4, 32, 256]
    for bucket in measured:
        found = {name: getattr(bucket.tiles, name) for name in ("up", "down", "down_bwd", "gram")}
        fastest = {
            name: min(
                likes(block_k=32, stages=3)(0, name, tile)
                for tokens, kernel, candidates, _ in bench.calls
                for tile in candidates
                if (tokens * 8 / 128, kernel) == (bucket.rows_per_expert, name)
            )
            for name in found
        }
        assert bucket.note["microseconds"] == pytest.approx(fastest)
        assert {name: likes(block_k=32, stages=3)(0, name, tile) for name, tile in found.items()} == fastest
        assert (
            tiles.expert_tiles(round(bucket.rows_per_expert), 704, torch.bfloat16, 90, device=GPU.name) == bucket.tiles
        )
    assert tiles.expert_tiles(4, 704, torch.bfloat16, 90, device="NVIDIA H200") != measured[0].tiles
    assert not user.with_name(user.name + ".part").exists()
    assert f"table: {user}" in said
    assert "It is used on NVIDIA H100 80GB HBM3 from now on" in said
    assert "+" in said.splitlines()[1]


def test_kernels_over_rows_agree_on_the_rows_that_are_best_for_all():
    """`up` alone would take half the rows; the others lose more by that than it gains."""
    now = present(4096)

    def cost(tokens, kernel, tile):
        half = tile.block_m == now.block_m // 2
        return (90 if half else 100) if kernel == "up" else (120 if half else 100)

    def preferred(cost):
        bench = Bench(settings(tokens=(4096,)), cost)
        journal = type("Memory", (), {"found": {}, "add": lambda self, key, entry: self.found.update({key: entry})})()
        (outcome,) = tune.search(bench.options, bench.workload, bench.measure, tune.Budget(1e9), journal)
        return outcome.after.block_m

    assert preferred(cost) == now.block_m
    assert preferred(lambda t, kernel, tile: 90 if tile.block_m < now.block_m else 100) == now.block_m // 2


def test_a_gain_within_the_noise_changes_nothing(user):
    now = [tile for tokens in settings().tokens for tile in vars(present(tokens)).values()]
    before = {tokens: present(tokens) for tokens in settings().tokens}
    Bench(settings(), lambda t, kernel, tile: 100 if tile in now else 98.5).run(user)
    forget()
    assert {tokens: present(tokens) for tokens in settings().tokens} == before
    Bench(settings(), lambda t, kernel, tile: 100 if tile in now else 97.5).run(user)
    forget()
    assert {tokens: present(tokens) for tokens in settings().tokens} != before


# Candidates that are not to be trusted


def spoilt(tile, right):
    """One element of a thousand is off by a tenth."""
    return torch.cat([right[:-1], right[-1:] * 0.9]) if tile.block_k == 32 else right


def unsteady():
    state = {"n": 0}

    def output(kernel, tile, right):
        state["n"] += tile.block_k == 32
        return right * (1 + 2**-8) if tile.block_k == 32 and state["n"] % 2 else right

    return output


def raising(kernel, tile, right):
    if tile.block_k == 32:
        raise RuntimeError("out of resource: shared memory\nand more")
    return right


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (lambda kernel, tile, right: spoilt(tile, right), "output 0 is wrong: relative error"),
        (lambda kernel, tile, right: right * (-1 if tile.block_k == 32 else 1), "output 0 is wrong: relative error"),
        (lambda kernel, tile, right: right * (torch.nan if tile.block_k == 32 else 1), "output 0 is wrong"),
        (unsteady(), "output 0 is not the same in two runs"),
        (raising, "out of resource: shared memory"),
    ],
    ids=["an element", "the sign", "nan", "unsteady", "raises"],
)
def test_a_sabotaged_candidate_is_rejected_however_fast(user, output, reason):
    said = Bench(settings(tokens=(512,)), likes(block_k=32), output).run(user)
    bucket = next(bucket for bucket in tables.read(user).buckets if bucket.rows_per_expert == 32)
    assert all(tile.block_k != 32 for tile in vars(bucket.tiles).values())
    assert reason in said
    assert "candidates were rejected" in said


def test_an_honest_candidate_is_not_rejected(user):
    """The control: other tiles sum in another order, and round elsewhere."""
    bench = Bench(settings(tokens=(512,)), likes(block_k=32), lambda k, tile, right: right * (1 + 2**-9))
    assert "rejected" not in bench.run(user)
    bucket = next(bucket for bucket in tables.read(user).buckets if bucket.rows_per_expert == 32)
    assert any(tile.block_k == 32 for tile in vars(bucket.tiles).values())


def test_e4m3_as_bits_is_measured_as_it_is_launched(user):
    """Below compute capability 8.9 the up GEMM's step is cut, in what is measured too; int8 is the control."""
    for weights in ("fp8", "int8"):
        options = tune.Settings(replace(GPU, arch=80), SHAPE, weights=weights, tokens=(4096,), training=False)
        bench = Bench(options, likes(block_k=64))
        bench.run(user.with_name(f"{weights}.json"))
        wide = {kernel for _, kernel, found, _ in bench.calls for t in found if t.block_m >= 64 and t.block_k > 32}
        assert wide == ({"down"} if weights == "fp8" else {"up", "down"})


def test_outputs_are_compared_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(tune, "_COMPARED_BYTES", 3 * 8 * 7)
    right = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    out = right + 1e-3 * right.flip(0)
    (largest, norm), (most, size) = tune._extent(out, right)
    difference = out.double() - right.double()
    assert (largest, most) == (difference.abs().max().item(), right.abs().max().item())
    assert (norm, size) == pytest.approx((difference.norm().item(), right.double().norm().item()), rel=1e-12)
    for row in (0, 25, 49):
        spoilt = right.clone()
        spoilt[row, 3] = torch.nan
        assert "is wrong" in tune.disagreement((right,), (spoilt,))
    assert tune.disagreement((right,), (right.clone(),)) is None


def test_too_little_memory_is_no_fault_of_a_candidate(user):
    def output(kernel, tile, right):
        if tile.block_k == 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return right

    with pytest.raises(torch.OutOfMemoryError, match=r"512 tokens, got: CUDA out .*; use fewer --tokens or --no-train"):
        Bench(settings(tokens=(512,)), likes(block_k=32), output).run(user)
    assert not user.exists()


# What is kept


def test_an_old_table_stays_if_nothing_is_faster(user):
    bench = Bench(settings(), likes(block_k=32))
    bench.run(user)
    before = user.read_bytes()
    os.utime(user, (1, 1))
    said = Bench(settings(), likes(block_k=32)).run(user)
    assert (user.read_bytes(), user.stat().st_mtime) == (before, 1)
    assert "nothing was faster by 2% or more" in said
    assert "as is" in said


def test_measurements_of_other_classes_stay(user):
    Bench(settings(), likes(block_k=32)).run(user)
    first = tables.read(user).buckets
    options = settings(tokens=(512,), weights="int8", training=False)
    Bench(options, likes(stages=2)).run(user, options=options)
    forget()
    both = tables.read(user).buckets
    assert [bucket for bucket in both if bucket.weights == "same"] == list(first)
    assert {bucket.rows_per_expert for bucket in both if bucket.weights == "8bit"} == {12, 32, 88}
    Bench(settings(tokens=(64,)), likes(block_k=128)).run(user)  # one bucket of three anew
    forget()
    again = tables.read(user).buckets
    assert [b for b in again if b.weights == "same" and b.rows_per_expert > 10] == [
        b for b in first if b.rows_per_expert > 10
    ]


def test_a_file_of_one_s_own_keeps_what_it_holds(user, tmp_path):
    """Not only the table in use: --out names one that nothing looks at."""
    path = tmp_path / "own.json"
    Bench(settings(), likes(block_k=32)).run(path)
    first = tables.read(path).buckets
    options = settings(tokens=(512,), weights="int8", training=False)
    Bench(options, likes(stages=2)).run(path, options=options)
    both = tables.read(path).buckets
    assert [bucket for bucket in both if bucket.weights == "same"] == list(first)
    assert any(bucket.weights == "8bit" for bucket in both)
    assert not user.exists()


@pytest.mark.parametrize("held", ["{", "another GPU's"])
def test_a_file_that_is_no_table_of_this_gpu_is_replaced(tmp_path, held):
    path = tmp_path / "own.json"
    if held != "{":
        Bench(settings(), likes(block_k=32)).run(path)
        held = path.read_text().replace(GPU.name, "NVIDIA H200")
    path.write_text(held)
    forget()
    options = settings(tokens=(512,), weights="int8", training=False)
    Bench(options, likes(stages=2)).run(path, options=options)
    assert tables.read(path).device == GPU.name
    assert {bucket.weights for bucket in tables.read(path).buckets} == {"8bit"}


def test_predictions_fill_what_is_far_from_any_measurement(user):
    """A table with one bucket would give a prompt the tiles of a single token."""
    options = settings(tokens=(16,))
    Bench(options, likes(block_k=64)).run(user, options=options)
    buckets = {bucket.rows_per_expert: bucket for bucket in tables.read(user).buckets}
    assert set(buckets) == {1, 12, 22, 47, 88}
    forget()
    assert {rows for rows, bucket in buckets.items() if (bucket.note or {}).get("source") == "predicted"} == {
        12,
        22,
        47,
        88,
    }
    predicted = tiles.expert_tiles(1024, 704, torch.bfloat16, 90)
    assert tiles.expert_tiles(1024, 704, torch.bfloat16, 90, device=GPU.name, lora=False) == predicted


def test_a_failed_write_leaves_the_old_file(monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    write(path, "old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


# Budget and journal


def test_a_run_that_was_stopped_goes_on(user, tmp_path):
    whole = Bench(settings(), likes(block_k=32))
    whole.run(tmp_path / "whole.json")
    half = Bench(settings(), likes(block_k=32))
    said = half.run(user, seconds=whole.now / 2)
    assert "The budget sufficed for 1 of 3 token counts" in said
    assert [b.rows_per_expert for b in tables.read(user).buckets if "microseconds" in b.note] == [4]
    rest = Bench(settings(), likes(block_k=32))
    assert "sufficed" not in rest.run(user)
    assert half.calls + rest.calls == whole.calls  # nothing twice
    forget()
    assert user.read_text() == (tmp_path / "whole.json").read_text()


def test_no_time_at_all(user):
    said = Bench(settings(), likes(block_k=32)).run(user, seconds=0)
    assert "no bucket was finished" in said
    assert not user.exists()


def test_a_journal_survives_a_kill_and_belongs_to_one_setting(tmp_path):
    path = tmp_path / "table.json.part"
    journal = Journal(path, {"device": "A"})
    journal.add("one", {"times": [1]})
    journal.add("two", {"times": [2]})
    with open(path, "a") as file:
        file.write('{"key": "thr')
    assert list(Journal(path, {"device": "A"}).found) == ["one", "two"]
    Journal(path, {"device": "A"}).add("three", {"times": []})
    assert list(Journal(path, {"device": "A"}).found) == ["one", "two", "three"]
    assert not Journal(path, {"device": "B"}).found
    assert not Journal(path, {"device": "A"}).found  # B's run began anew


# The model


def test_candidates_fit_and_are_around_the_present_tile():
    work = Work(128, 32, 704, 2816, 2, 2, operands=2)
    now = Tile(64, 64, 64, 4, 4)
    for block_m in (32, 64, 128):
        found = tune_model.sizes(work, now, block_m, GPU, 9)
        columns = {(tile.block_n, tile.block_k) for tile in found}
        assert len(found) == len(columns) > 4
        assert columns <= set(product((32, 64, 128), repeat=2))
        costs = [tune_model.predict(work, tile, GPU) for tile in found]
        assert all(a <= b for a, b in pairwise(costs))
        assert tune_model.sizes(work, now, block_m, GPU, 3) == found[:3]
        for tile in found:
            deeper = tune_model.depths(work, tile, 90)
            assert {t.stages for t in deeper} <= {tile.stages - 1, tile.stages, tile.stages + 1}
            for each in (tile, *deeper):
                assert each.block_m == block_m
                assert each.stages * (each.block_m + 2 * each.block_n) * each.block_k * 2 <= tiles.shared_limit(90)
                assert each.block_m * each.block_n * 2 / (each.warps * 32) <= 128
    assert [tile.tma for tile in tune_model.switches(work, now, 90)] == [False, True]
    assert not any(tile.tma for tile in tune_model.switches(work, now, 80))
    assert tune_model.switches(replace(work, weighted=False), now, 90) == [now]


def test_the_model_knows_what_bounds_a_kernel():
    """Few rows: the weights' bytes, which need bytes in flight. Many: large tiles, which read operands less often."""
    few, many = (Work(128, rows, 704, 2816, 2, 2, operands=2) for rows in (4, 1024))
    small, large = Tile(16, 32, 128, 4, 4), Tile(128, 128, 64, 8, 4)
    assert tune_model.predict(few, small, GPU) < tune_model.predict(few, large, GPU)
    assert tune_model.predict(many, large, GPU) < tune_model.predict(many, small, GPU)
    shallow = replace(small, block_k=32, stages=2)
    assert tune_model.predict(few, small, GPU) < tune_model.predict(few, shallow, GPU)
    floor = 128 * 2 * 704 * 2816 * 2 / 3.3e12
    assert floor <= tune_model.predict(few, small, GPU) < 2 * floor
    bits = replace(few, weight_size=1)
    assert tune_model.predict(bits, small, GPU) < 0.6 * tune_model.predict(few, small, GPU)


# The timer


def test_tiles_take_turns_and_each_call_finds_a_cold_cache(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = len(log)
            log.append("event")

        def elapsed_time(self, end):
            return log[self.at + 1]["ms"] + (end.at - self.at - 2)

    class Load:
        def outputs(self, kernel, tile):
            log.append({"tile": tile, "ms": [3.0, 1.0, 2.0][len(log) // 4 // 2 % 3] * tile})

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = object.__new__(tune_kernels.CudaTimer)
    timer._flushed = type("Buffer", (), {"zero_": lambda self: log.append("flush")})()
    assert timer(Load(), "up", [1, 10], 3) == [2e3, 20e3]  # medians, in microseconds
    assert log[0::4] == ["flush"] * 6
    assert [entry["tile"] for entry in log[2::4]] == [1, 10, 10, 1, 1, 10]


# The command


def test_info_says_which_table_is_used(user):
    assert "sm_90.json, predicted for sm_90; `omnigene-fast tune` measures this GPU" in info.tiles_in_use(90, GPU.name)
    assert "sm_80.json, predicted for sm_80, no table is for sm_120;" in info.tiles_in_use(120, "RTX 5090")
    Bench(settings(), likes(block_k=32)).run(user)
    forget()
    assert info.tiles_in_use(90, GPU.name).startswith(f"{user}, measured on this kind of GPU (20")
    assert "tiles " in info.report()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tune: expected an NVIDIA GPU to measure on, and torch finds none here; run it on the machine that runs"),
        (["--device", "cuda:99"], "--device: torch sees"),
        (["--device", "tpu"], "--device: expected auto, cpu or cuda[:N], got 'tpu'."),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tune_says_so(arguments, message):
    result = CliRunner().invoke(main, ["tune", *arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_without_triton_tune_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["tune"])
    assert result.exit_code == 1
    assert "tune: expected the package triton, which is not installed; install it with" in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (40, 64, 4, 2)}, "shape: expected H, I multiples of 16 and 1 <= K <= E, got 40,64,4,2."),
        ({"shape": (64, 64, 4, 5)}, "shape: expected H, I multiples of 16"),
        ({"tokens": (0,)}, r"tokens: expected numbers >= 1, got \[0\]."),
        ({"tokens": (1, 16, 64)}, r"tokens: expected no two with as many rows per expert, .* have \[1, 1, 4\]."),
        ({"weights": "int4"}, "weights: expected same, int8 or fp8, got 'int4'."),
    ],
)
def test_bad_settings_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        tune.Settings(GPU, **({"shape": SHAPE} | changes))


def test_kernels_that_are_measured():
    assert settings().kernels == ("up", "down", "down_bwd", "gram")
    assert settings(training=False).kernels == ("up", "down")
    assert settings(weights="fp8").kernels == ("up", "down", "down_bwd")
    assert settings(rank=16).kernels == ("up", "down", "down_bwd", "low_rank", "low_rank_gram")


def test_the_table_reads_as_json_with_a_line_per_tile(user):
    Bench(settings(), likes(block_k=32)).run(user)
    content = json.loads(user.read_text())
    assert (content["command"], content["versions"]) == ("omnigene-fast tune", VERSIONS)
    lines = [line for line in user.read_text().splitlines() if '"block_m"' in line]
    assert len(lines) == 6 * len(content["buckets"])
