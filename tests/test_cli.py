"""The command line: help with an example for each command, bad input as one sentence, rows and plot on disk."""

import json

import pytest
from click.testing import CliRunner

from omnigene_fast import info
from omnigene_fast.bench.floors import Probe
from omnigene_fast.cli import main


def invoke(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize(
    "command", [[], *([name] for name in sorted(main.commands))], ids=lambda c: " ".join(c) or "main"
)
def test_help_has_an_example(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    omnigene-fast {command[0] if command else ''}".rstrip() in result.output


def test_info_names_every_backend_and_version():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    for word in ("cpu", "triton", "reference", "torch", "transformers", "python", "OMNIGENE_FAST_CPU_ISA"):
        assert word in result.output


def test_info_says_what_is_missing(monkeypatch):
    from omnigene_fast import backends

    class Absent:
        @staticmethod
        def unavailable(device):
            return "the C++ module was not built; install a C++ compiler and reinstall."

    monkeypatch.setattr(backends, "load", lambda name: Absent)
    assert "not available: the C++ module was not built; install a C++ compiler and reinstall." in info.report()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--op", "rout"], "op: expected some of route, experts, block, experts_frozen"),
        (["bench", "--tokens", "1,x"], "--tokens: expected comma-separated integers, got '1,x'."),
        (["bench", "--tokens", "0"], "tokens: expected numbers >= 1, got [0]."),
        (["bench", "--modes", "skewed"], "mode: expected some of uniform, natural, protein, got 'skewed'."),
        (["bench", "--providers", "tensorrt"], "provider: expected some of"),
        (["bench", "--shape", "1,2"], "--shape: expected 4 comma-separated integers, got '1,2'."),
        (["bench", "--shape", "8,8,4,5"], "shape: expected H, I, E, K >= 1 and K <= E, got 8,8,4,5."),
        (["bench", "--device", "tpu"], "--device: expected auto, cpu or cuda[:N], got 'tpu'."),
        (["bench", "--device", "cuda:99"], "--device: torch sees"),
        (["bench", "--backend", "cuda_rtc"], "backend: expected one of"),
        (["bench", "--out", "no/such/folder/x.json"], "--out: expected a file in an existing directory"),
        (["demo", "--device", "mps"], "--device: expected auto, cpu or cuda[:N], got 'mps'."),
        (["demo", "--model", "no/such/model"], "--model: expected a checkpoint directory with a config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["bench", "--dtype", "int8"], ["demo", "--threads", "0"], ["bnech"]])
def test_bad_options_are_usage_errors(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.output


@pytest.fixture
def constant_probe(monkeypatch):
    """The probes of memory and arithmetic take seconds; one test in test_bench.py runs them."""
    monkeypatch.setattr(Probe, "sample", lambda self: (self.bandwidths.append(10.0), self.peaks.append(100.0)))


@pytest.mark.usefixtures("constant_probe")
def test_bench_writes_rows_and_plot(tmp_path):
    out = tmp_path / "rows.json"
    shape = ["--shape", "64,24,16,4", "--seconds", "0", "--tokens", "1,3", "--modes", "natural"]
    result = invoke("bench", "--quick", *shape, "--op", "forward", "--out", str(out))
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert {row["op"] for row in rows} == {"route", "experts", "block"}
    assert {row["tokens"] for row in rows} == {1, 3}
    assert all(row["status"] == "ok" for row in rows)
    for field in ("device", "isa", "backend", "threads", "versions", "date", "bandwidth_gb_s", "peak_gflop_s", "error"):
        assert field in rows[0]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "where we lose" in result.output


@pytest.mark.usefixtures("constant_probe")
def test_bench_merges_into_a_file(tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["bench", "--seconds", "0", "--tokens", "2", "--modes", "uniform", "--threads", "1", "--out", str(out)]
    shape = ["--shape", "64,24,16,4"]
    assert invoke(*arguments, *shape, "--op", "route").exit_code == 0
    result = invoke(*arguments, *shape, "--op", "experts_frozen", "--merge")
    assert result.exit_code == 0, result.output
    assert {row["op"] for row in json.loads(out.read_text())} == {"route", "experts_frozen"}
    assert "rows-training.png" in result.output
    before = out.read_text()
    result = invoke(*arguments, "--shape", "32,24,16,4", "--op", "route", "--merge")
    assert result.exit_code == 1
    assert "--merge: expected rows of one shape" in result.output
    assert out.read_text() == before
    assert invoke(*arguments, *shape, "--op", "route").exit_code == 0  # without --merge: a new file
    assert {row["op"] for row in json.loads(out.read_text())} == {"route"}


@pytest.mark.usefixtures("constant_probe")
def test_bench_out_may_be_a_folder(tmp_path):
    arguments = ["--shape", "64,24,16,4", "--seconds", "0", "--tokens", "1", "--modes", "uniform", "--op", "route"]
    result = invoke("bench", *arguments, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    assert path.stem.startswith(("cpu-", "gpu-"))


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (7.3, True), (None, False)])
def test_a_busy_machine_is_remarked(monkeypatch, load, said):
    def average():
        if load is None:
            raise OSError("no /proc")
        return load, 0.0, 0.0

    monkeypatch.setattr(info.os, "getloadavg", average)
    assert (info.busy() is not None) == said
    assert not said or "load 7.3 on" in info.busy()
