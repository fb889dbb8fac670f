"""The GPU suite without a GPU: tiny shapes, cut-offs, budgets, missing tools, failures, and its shell script."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from omnigene_fast.bench import report
from omnigene_fast.bench.gpu_suite import (
    __main__,
    capture,
    cases,
    correctness,
    environment,
    gpu_tests,
    model,
    predict,
    repeat,
    revision,
    sanitizer,
    status,
    summary,
    table,
    tuning,
)
from omnigene_fast.bench.providers import OURS, Provider, build
from omnigene_fast.bench.workloads import Layer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu_suite.sh"
CPU = torch.device("cpu")


def context(out, budget=60.0, **changes):
    return status.Context(out, CPU, tiny=True, budget=budget, **changes)


def step(name, out, *options):
    assert __main__.main([name, "--out", str(out), "--device", "cpu", "--tiny", "--budget", "120", *options]) == 0
    return status.read(out, name)


# One step's life.


def test_a_good_step_runs_once(tmp_path):
    calls = []
    for _ in range(2):
        found = status.run(context(tmp_path), "fine", lambda _: calls.append(1))
    assert (found.state, len(calls)) == ("ok", 1)
    assert json.loads((tmp_path / "status" / "fine.json").read_text())["state"] == "ok"


def test_what_a_step_found_or_misses_or_how_it_crashed_is_its_status(tmp_path):
    def missing(_):
        raise status.MissingTool("no such tool")

    def crash(_):
        raise ValueError("first line\nsecond line")

    assert status.run(context(tmp_path), "a", lambda _: "two are wrong").reason == "two are wrong"
    assert vars(status.run(context(tmp_path), "b", missing)) | {"seconds": 0, "budget": 0, "date": ""} == {
        "step": "b",
        "state": "missing",
        "reason": "no such tool",
        "seconds": 0,
        "cuts": 1,
        "budget": 0,
        "date": "",
    }
    found = status.run(context(tmp_path), "c", crash)
    assert (found.state, found.reason) == ("failed", "ValueError: first line")


def test_the_budget_holds_even_where_every_exception_is_caught(tmp_path):
    def stubborn(_):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    begin = time.monotonic()
    assert status.run(context(tmp_path, budget=0.3), "stubborn", stubborn).state == "out of time"
    assert 0.2 < time.monotonic() - begin < 5
    cut_short = context(tmp_path, budget=0.2, whole=False)
    assert status.run(cut_short, "other", stubborn).state == "partial"  # it was not given its time


def test_cases_are_kept_and_a_later_call_goes_on(tmp_path):
    worked = []

    def work(name):
        worked.append(name)
        if len(worked) == 2:
            time.sleep(30)
        return {"problem": ""}

    def run(context):
        return status.problems(status.each(context, tmp_path / "cases.json", "abc", work))

    assert status.run(context(tmp_path, budget=0.5), "cases", run).state == "partial"
    assert list(json.loads((tmp_path / "cases.json").read_text())) == ["a"]
    assert status.run(context(tmp_path), "cases", run).state == "ok"
    assert worked == ["a", "b", "b", "c"]


KILLED = """
import sys, time, torch
from pathlib import Path
from omnigene_fast.bench.gpu_suite import status
out = Path(sys.argv[1])
def work(name):
    if name == "b":
        print("in b", flush=True)
        time.sleep(600)
    return {"problem": ""}
context = status.Context(out, torch.device("cpu"), budget=600)
status.run(context, "killed", lambda context: status.problems(status.each(context, out / "killed.json", "ab", work)))
"""


def test_a_killed_process_is_gone_on_from_and_given_up_in_the_end(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout.readline() == "in b\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert status.read(tmp_path, "killed").state == "running"
    worked = []

    def run(context):
        def work(name):
            worked.append(name)
            return {"problem": ""}

        return status.problems(status.each(context, tmp_path / "killed.json", "ab", work))

    assert status.run(context(tmp_path), "killed", run).state == "ok"
    assert worked == ["b"]
    status.write(tmp_path, status.Status("hopeless", cuts=status.MAX_CUTS))
    found = status.run(context(tmp_path), "hopeless", lambda _: pytest.fail("was run"))
    assert found.state == "out of time"
    assert "cut off 2 times" in found.reason


def test_a_lost_device_asks_for_a_new_process(tmp_path, monkeypatch):
    def broken(_):
        raise status.DeviceLost("CUDA error: an illegal memory access")

    monkeypatch.setattr(status, "check_device", broken)
    lost = context(tmp_path)
    found = status.run(lost, "lost", lambda each: status.each(each, tmp_path / "x.json", "ab", lambda name: {}))
    assert (found.state, lost.lost) == ("partial", True)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": {}}  # the case that broke it is over


def test_a_case_that_ends_the_process_again_is_a_problem(tmp_path):
    again = context(tmp_path, step="x")
    for _ in range(status.MAX_CUTS):
        assert again.tries("a") < status.MAX_CUTS
    done = status.each(again, tmp_path / "x.json", "a", lambda name: pytest.fail("was worked on"))
    assert done == {"a": {"problem": "ended the process 2 times"}}


# The steps.


FEW = [("experts", "uniform", 1), ("experts_frozen", "protein", 8), ("route_traced", "uniform", 1)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What the steps leave behind, with few cases."""
    path = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "table", lambda: FEW)
        patch.setattr(cases, "decode", lambda: [("decode", "uniform", 8)])
        patch.setattr(model, "WANTED", (("model_decode", "random", 1), ("model_frozen", "random", 8)))
        patch.setattr(correctness, "OPS", ("experts", "route", "route_traced", "experts_frozen"))
        patch.setattr(repeat, "CASES", repeat.CASES[:1] + repeat.CASES[6:7])
        patch.setattr(environment, "tool", lambda name: None)
        for name in (
            "environment",
            "correctness",
            "table",
            "decode",
            "repeat",
            "capture",
            "model",
            "sanitizer",
            "tune",
        ):
            step(name, path)
        step("summary", path)
    return path


@pytest.mark.parametrize("name", ["environment", "correctness", "table", "decode", "repeat", "capture", "model"])
def test_steps_end_well_without_a_gpu(out, name):
    found = status.read(out, name)
    assert (found.state, found.reason) == ("ok", "")


def test_what_is_missing_is_recorded(out):
    assert status.read(out, "sanitizer").reason.startswith("compute-sanitizer is not installed")
    assert status.read(out, "tune").state == "missing"
    text = (out / "summary.md").read_text()
    assert "| sanitizer | missing |" in text
    assert "- No `compute-sanitizer`." in text
    assert f"- Decode: {environment.info._decode()}." in text


def test_without_a_gpu_the_steps_say_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    __main__.main(["table", "--out", str(tmp_path)])
    assert vars(status.read(tmp_path, "table"))["reason"] == "torch finds no CUDA GPU"


def test_a_deadline_shortens_a_step_that_can_then_go_on(tmp_path, monkeypatch):
    def slow(context):
        time.sleep(30)

    monkeypatch.setattr(__main__, "step", lambda name: slow)
    begin = time.monotonic()
    assert step("repeat", tmp_path, "--deadline", "0.3").state == "partial"
    assert time.monotonic() - begin < 5
    assert step("repeat", tmp_path, "--budget", "0.3", "--deadline", "9").state == "out of time"


def test_rows_have_the_schema_of_the_benchmark(out):
    rows = report.load(out / "results.json")
    assert {row["op"] for row in rows} == {"experts", "experts_frozen", "route_traced", "decode", *model.OPS[1:3]}
    for row in rows:
        assert {"device", "versions", "date", "dtype", "shape", "probe", "bandwidth_gb_s", "status"} <= set(row)
        assert row["status"] in ("ok", "skipped", "missing"), row
        if row["status"] == "ok":
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    (decode,) = [row for row in rows if row["op"] == "decode" and row["provider"] == OURS]
    assert decode["note"] == "without a graph: not on a GPU"
    (frozen,) = [row for row in rows if row["op"] == "model_frozen" and row["provider"] == OURS]
    assert frozen["tokens_per_s"] == pytest.approx(frozen["tokens"] / frozen["p50_ms"] * 1e3, rel=1e-3)


def test_measured_cases_are_not_measured_again(out, tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    rows = report.load(out / "rows" / "table.json")
    report.save([row for row in rows if row["op"] != "experts"], tmp_path / "rows" / "table.json")
    measured = []
    again = context(tmp_path, step="table")
    monkeypatch.setattr(table.report, "console", lambda rows: "")

    def measure(case):
        measured.append(case)
        return [row for row in rows if row["op"] == case[0]]

    assert table.each(again, "table", FEW, measure) is None
    assert measured == FEW[:1]
    assert len(report.load(tmp_path / "rows" / "table.json")) == len(rows)


def test_a_case_that_crashes_stops_no_other(tmp_path, monkeypatch):
    def measure(case):
        if case == FEW[0]:
            raise RuntimeError("out of memory")
        return [{"op": case[0], "mode": case[1], "tokens": 1, "provider": OURS, "status": "wrong"}]

    monkeypatch.setattr(table.report, "console", lambda rows: "")
    problem = table.each(context(tmp_path, step="table"), "table", [FEW[0], FEW[2]], measure)
    assert "experts uniform T=1: RuntimeError: out of memory" in problem
    assert "omnigene_fast route_traced uniform T=1 wrong" in problem


def test_a_retry_measures_again_what_was_wrong_and_keeps_the_rest(tmp_path, monkeypatch):
    def row(case, found):
        return {
            "op": case[0],
            "mode": case[1],
            "tokens": cases.tokens_of(case[2], True),
            "provider": OURS,
            "status": found,
        }

    monkeypatch.setattr(table.report, "console", lambda rows: "")
    rows = tmp_path / "rows" / "table.json"
    report.save([row(FEW[0], "ok"), row(FEW[1], "wrong")], rows)
    status.save_json(rows.with_suffix(".problems.json"), {"route_traced uniform T=1": "RuntimeError: no memory"})
    measured = []

    def measure(case):
        measured.append(case)
        return [row(case, "ok")]

    assert "wrong" in table.each(context(tmp_path, step="table"), "table", FEW, measure)
    assert measured == []
    assert table.each(context(tmp_path, step="table", retry=True), "table", FEW, measure) is None
    assert measured == FEW[1:]
    assert [each["status"] for each in report.load(rows)] == ["ok"] * 3

    worked = []

    def work(name):
        worked.append(name)
        return {"problem": ""}

    status.save_json(tmp_path / "each.json", {"a": {"problem": ""}, "b": {"problem": "other bits"}})
    assert status.each(context(tmp_path, step="e"), tmp_path / "each.json", "ab", work)["b"]["problem"] == "other bits"
    done = status.each(context(tmp_path, step="e", retry=True), tmp_path / "each.json", "ab", work)
    assert (worked, done["b"]) == (["b"], {"problem": ""})


@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize(("grows", "left", "state"), [(1, 1, "partial"), (0, 1, "out of time"), (0, 0, "ok")])
def test_tuning_is_over_when_its_journal_is_gone(tmp_path, monkeypatch, grows, left, state, raised):
    if raised and not left:
        pytest.skip("a command that was cut off leaves its journal")
    on_gpu = context(tmp_path)
    on_gpu.device = torch.device("cuda")
    monkeypatch.setattr(tuning, "installed", lambda name: True)
    monkeypatch.setattr(tuning.info, "slug", lambda device: "card")
    journal = tmp_path / "tuned" / "card.json.part"
    journal.parent.mkdir()
    journal.write_text("one\n")
    lines = []

    def command(line, variables):
        lines.append(line)
        journal.write_text("one\n" * (1 + grows)) if left else journal.unlink()
        if raised:
            raise status.OutOfTime
        return 0

    monkeypatch.setattr(tuning.gpu_tests, "run_group", command)
    assert status.run(on_gpu, "tune", tuning.run).state == state
    assert lines[0][lines[0].index("--tokens") + 1] == "512,4096"
    assert "--no-training" in lines[0]


def test_rows_of_two_commits_are_said_to_be(tmp_path, monkeypatch):
    for name, ran in (("a" * 40, ("table", "decode")), ("b" * 40, ("decode",))):
        monkeypatch.setattr(revision, "commit", lambda name=name: {"commit": name, "dirty": name[0] == "b"})
        assert revision.mixture(tmp_path) == ""
        for each in ran:
            revision.record(tmp_path, each)
    sentence = revision.mixture(tmp_path)
    assert f"({'a' * 12}: table, decode; {'b' * 12}, with changes: decode)" in sentence
    assert summary.page([], {}, [], sentence).splitlines()[2] == sentence
    monkeypatch.undo()
    assert revision.commit(tmp_path) is None


def test_nvidia_smi_is_asked_for_this_gpu(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$3, 1"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    properties = type("Properties", (), {"uuid": "01-23"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert environment.nvidia_smi(torch.device("cuda"))["name"] == "--id=GPU-01-23"
    assert environment.nvidia_smi(CPU)["name"] == ""
    tool.write_text("#!/bin/sh\nexit 0\n")
    assert "names no GPU" in environment.nvidia_smi(CPU)


@pytest.fixture(scope="module")
def layer():
    return Layer(cases.TINY_SHAPE, torch.bfloat16, CPU)


@pytest.mark.parametrize("op", ["experts", "route", "experts_full", "experts_lora16"])
def test_correctness_notices_what_is_wrong(layer, monkeypatch, op):
    with torch.no_grad():
        assert correctness.check(op, layer, "protein", 9)["problem"] == ""

    def wrong(*arguments):
        right = build(*arguments)[0]
        return [Provider(OURS, lambda draw: correctness.spoiled(op, right.call(draw)), right.prepare)]

    monkeypatch.setattr(correctness, "build", wrong)
    with torch.no_grad():
        assert OURS in correctness.check(op, layer, "protein", 9)["problem"]
    monkeypatch.setattr(correctness, "build", build)
    monkeypatch.setattr(correctness, "spoiled", lambda op, output: output)
    with torch.no_grad():
        assert "wrong on purpose" in correctness.check(op, layer, "protein", 9)["problem"]


def test_other_bits_are_noticed():
    drift = iter(range(100))
    value = torch.tensor([1.0, float("nan"), 2.0])
    assert repeat.changed(lambda: value.clone()) == ""  # the same NaN is the same

    def call():
        return {"out": value.clone(), "grad": torch.tensor([0.0, 1.0 + (next(drift) == 7) * 2**-20])}

    assert repeat.changed(call) == "grad differs in run 8, first at element 1"


def test_compiled_blocks_are_compared(layer, monkeypatch):
    right = capture.block
    turns = iter(range(100))

    def other(*arguments):
        return tuple(out + next(turns) for out in right(*arguments))

    assert capture.compiles(layer, "eager", train=False) == ""
    draw = next(layer.draws("uniform", 2, 1))
    plain, stored = (
        capture.block(layer, layer.projection("uniform"), draw.hidden, False, op)[0] for op in ("", "experts_int8")
    )
    assert 0 < (stored - plain).norm() / plain.norm() < 2e-2  # the same experts, rounded to 8 bits
    monkeypatch.setattr(capture, "block", other)
    assert "is not that of a plain call" in capture.compiles(layer, "eager", train=False)


def test_the_sanitizers_target_runs():
    sanitizer.exercise(CPU)


def test_sanitizers_findings_are_the_problem(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --log-file ]; do [ "$1" = --tool ] && kind=$2; shift; done\n'
        'echo "========= ERROR SUMMARY: 3 errors" >"$2"\n'
        '[ "$kind" = racecheck ] && exit 99\nexit 0\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(environment, "tool", lambda name: str(tool))
    problem = sanitizer.run(context(tmp_path, step="sanitizer"))
    assert problem == "1 of 2 cases: racecheck: ERROR SUMMARY: 3 errors"


SLOW_TESTS = """
import time
import pytest

def test_a(): pass
def test_b(): assert 1 == 2
@pytest.mark.skip
def test_c(): pass
class TestSlow:
    @pytest.mark.parametrize("seconds", [0, 0.001])
    def test_d(self, seconds): time.sleep({seconds})
"""


def beside(monkeypatch, file):
    """Let the step run `file` instead of this checkout's tests."""
    given = gpu_tests.variables()
    monkeypatch.setattr(gpu_tests, "ROOT", file.parent)
    monkeypatch.setattr(gpu_tests, "variables", lambda: given)
    monkeypatch.setattr(gpu_tests, "test_files", lambda tiny: [file])


def test_tests_that_were_cut_off_go_on_where_they_were(tmp_path, monkeypatch):
    file = tmp_path / "checkout" / "test_slow.py"
    file.parent.mkdir()
    file.write_text(SLOW_TESTS.format(seconds=60))
    beside(monkeypatch, file)
    out = tmp_path / "out"
    assert status.run(context(out, budget=12), "tests", gpu_tests.run).state == "partial"
    (found,) = json.loads((out / "tests.json").read_text()).values()
    known = {"test_a": "passed", "test_b": "assert 1 == 2", "test_c": "skipped"}
    assert found["outcomes"] == {f"test_slow.py::{name}": outcome for name, outcome in known.items()}
    file.write_text(SLOW_TESTS.format(seconds=0).replace("def test_a(): pass", "def test_a(): assert False"))
    done = status.run(context(out), "tests", gpu_tests.run)
    assert (done.state, done.reason) == ("failed", "1 failed, 3 passed: test_slow.py::test_b: assert 1 == 2")
    (found,) = json.loads((out / "tests.json").read_text()).values()
    assert found["outcomes"]["test_slow.py::TestSlow::test_d[0.001]"] == "passed"


def test_a_file_that_cannot_be_collected_has_failed(tmp_path, monkeypatch):
    file = tmp_path / "test_broken.py"
    file.write_text("import no_such_package\n")
    beside(monkeypatch, file)
    found = status.run(context(tmp_path / "out"), "tests", gpu_tests.run)
    assert found.state == "failed"
    assert "cannot be collected: " in found.reason
    assert "no_such_package" in found.reason
    file.write_text("import os\ndef test_a(): os.abort()\n")
    found = status.run(context(tmp_path / "again"), "tests", gpu_tests.run)
    assert found.reason == "1 failed, 0 passed: test_broken.py: pytest ended with status -6"


def test_a_retry_runs_the_tests_that_failed(tmp_path, monkeypatch):
    file = tmp_path / "checkout" / "test_two.py"
    file.parent.mkdir()
    file.write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    beside(monkeypatch, file)
    out = tmp_path / "out"
    assert status.run(context(out), "tests", gpu_tests.run).state == "failed"
    (out / "status" / "tests.json").unlink()
    file.write_text("def test_a(): assert False\ndef test_b(): pass\n")  # test_a has passed: it is not run again
    assert status.run(context(out), "tests", gpu_tests.run).state == "failed"
    (out / "status" / "tests.json").unlink()
    assert status.run(context(out, retry=True), "tests", gpu_tests.run).state == "ok"


def test_gpu_tests_are_found():
    files = gpu_tests.test_files(tiny=False)
    assert ROOT / "tests" / "kernels" / "test_forward_gpu.py" in files
    assert Path(__file__) not in files


# Predictions.


def test_predictions_are_committed_for_every_case():
    rows = json.loads(predict.PREDICTIONS.read_text())
    found = [(row["op"], row["mode"], row["tokens"]) for row in rows]
    assert found == [*cases.table(), *cases.decode()]
    for row in rows:
        assert row["expected_us"] > row["floor_us"]
        if row["tokens"] <= 64 or row["op"].startswith("route"):
            floor, expected = predict.predict(row["op"], row["mode"], row["tokens"])
            assert (floor, expected) == pytest.approx((row["floor_us"], row["expected_us"]), rel=2e-2)


def test_predictions_need_no_triton():
    code = "import sys; sys.modules['triton'] = None; from omnigene_fast.bench.gpu_suite import predict as p; "
    code += "print(p.predict('experts', 'uniform', 1)[1])"
    given = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(predict.predict("experts", "uniform", 1)[1])


def test_floors_are_those_of_the_design():
    """By hand: 8, 127 and all of 128 experts of 11.9 MB at 3.35 TB/s, and 95.16 MFLOP per token at 800 TFLOP/s."""
    for tokens, floor in ((1, 28.4), (64, 450), (16384, 1949)):
        assert predict.predict("experts", "uniform", tokens)[0] == pytest.approx(floor, rel=1e-2)


# The script.


STUB = """#!{python}
import json, os, sys
from pathlib import Path
step, out = sys.argv[3], Path(sys.argv[sys.argv.index("--out") + 1])
with open(out / "calls", "a") as calls:
    print(step, *sys.argv[4:], file=calls)
(out / "visible").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
if step == os.environ.get("CRASHING"):
    sys.exit(3)
state = "partial" if step == os.environ.get("PARTIAL") else "failed" if step == os.environ.get("FAILING") else "ok"
(out / "status" / f"{{step}}.json").write_text(json.dumps({{"step": step, "state": state}}, indent=1))
print(step, state)
"""


def script(out, *options, **variables):
    stub = out.parent / "python-stub"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    calls = out / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(SCRIPT), "--out", str(out), *options],
        env=os.environ | {"PYTHON": str(stub)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


def names(calls):
    return [line.split()[0] for line in calls]


def listed():
    (line,) = re.findall(r'^STEPS="(.*)"$', SCRIPT.read_text(), re.MULTILINE)
    return {entry.split(":")[0]: int(entry.split(":")[1]) for entry in line.split()}


def test_the_script_lists_every_step_and_fits_in_nine_minutes():
    assert {*listed(), "summary"} == set(__main__.STEPS)
    assert sum(listed().values()) + 25 <= 540 - 70  # ten processes import torch
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0


def test_the_script_runs_all_and_then_nothing_but_the_summary(tmp_path):
    done, calls = script(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert names(calls) == [*listed(), "summary"]
    assert names(script(tmp_path / "out")[1]) == ["summary"]


def test_the_script_goes_on_after_a_crash_and_comes_back_to_it(tmp_path):
    done, calls = script(tmp_path / "out", CRASHING="tests", FAILING="decode", PARTIAL="table")
    assert len(calls) == len(__main__.STEPS)
    assert "tests: ended with status 3" in done.stdout
    _, calls = script(tmp_path / "out")
    assert names(calls) == ["tests", "table", "summary"]  # the failed one is over
    _, calls = script(tmp_path / "out", "--retry")
    assert names(calls) == ["decode", "summary"]
    assert "--retry" in calls[0].split()
    assert "--retry" not in calls[1].split()


def test_a_retry_keeps_rows_and_what_is_partial(tmp_path):
    out = tmp_path / "out"
    script(out, FAILING="table", PARTIAL="tune")
    kept = [out / "rows" / "table.json", out / "rows" / "table.problems.json", out / "table.json"]
    for path in (*kept, out / "status" / "table.tries.json", out / "status" / "tune.tries.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    _, calls = script(out, "--retry")
    assert [("--retry" in line.split(), line.split()[0]) for line in calls][:2] == [(True, "table"), (False, "tune")]
    assert all(path.exists() for path in kept)
    assert not (out / "status" / "table.tries.json").exists()
    assert (out / "status" / "tune.tries.json").exists()


@pytest.mark.parametrize(("visible", "number"), [(None, "1"), ("4,GPU-5", "GPU-5")])
def test_one_of_several_gpus_is_all_that_the_steps_see(tmp_path, monkeypatch, visible, number):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    _, calls = script(tmp_path / "out", "--steps", "table", "--device", "cuda:1", **variables)
    words = calls[0].split()
    assert words[words.index("--device") + 1] == "cuda"
    assert (tmp_path / "out" / "visible").read_text() == number


def test_the_script_passes_its_options_on_and_cuts_short(tmp_path):
    _, calls = script(tmp_path / "out", "--steps", "table", "--device", "cpu", "--tiny", "--total", "60")
    assert names(calls) == ["table", "summary"]
    words = calls[0].split()
    assert words[words.index("--device") + 1] == "cpu"
    assert "--tiny" in words
    assert words[words.index("--budget") + 1] == "120"
    assert 20 <= int(words[words.index("--deadline") + 1]) <= 35
    done, calls = script(tmp_path / "other", "--total", "30")
    assert names(calls) == ["summary"]
    assert "call again to go on with environment" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "1"), "expected --out"),
        (("--total", "x"), "expected seconds, got 'x'"),
        (("--out",), "--out: expected a value behind it"),
        (("--steps", "--tiny"), "--steps: expected a value behind it, got '--tiny'"),
        (("--steps", "table tabel"), "environment correctness tests table decode"),
        (("--device", "gpu"), "expected cpu, cuda or cuda:N, got 'gpu'"),
        (("--device", "cuda:1x"), "expected cpu, cuda or cuda:N, got 'cuda:1x'"),
        (("--device", "cuda:7"), "CUDA_VISIBLE_DEVICES lists 1 GPUs, got 'cuda:7'"),
    ],
)
def test_the_script_refuses_what_it_does_not_know(tmp_path, options, message):
    (tmp_path / "out").mkdir()
    done, calls = script(tmp_path / "out", *options, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 2
    assert message in done.stderr
    assert not calls
