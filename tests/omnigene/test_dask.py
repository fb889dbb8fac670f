"""audit_dask.py: workers count what one process does; what is missing or wrong is said in one sentence."""

import importlib.util
import json
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest

import omnigene_fast
from omnigene_fast.tracing.store import Writer

from ..tracing.synthetic import documents, meta
from .helpers import FOLDER, load


@pytest.fixture(scope="module")
def script():
    return load("audit_dask")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A run of two writers, as of two ranks of DDP, in a dozen part files; documents lie across files and ranks."""
    path = tmp_path_factory.mktemp("dask") / "run"
    for rank in range(2):
        with Writer(path, meta(), record=("ids",), segment_tokens=100, rank=rank) as writer:
            for doc in range(20):
                number = 10 * rank + doc  # 10 to 19 are in both
                part = documents({number: 60}) if rank == 0 or doc >= 10 else later(documents({number: 40}), 60)
                writer.add(part, {number: {"task": ("dna", "protein")[number % 2]}}, {})
    return path


def later(records, start):
    records.pos += start
    return records


def rows(out, words):
    parts = json.loads((out / "result.json").read_text())["parts"]
    part = next(part for part in parts if words in part["title"])
    return [dict(zip(part["columns"], row, strict=True)) for row in part["rows"]]


def test_two_workers_count_what_one_process_counts(path, tmp_path):
    run = omnigene_fast.open_trace(path)
    assert run.verify() == []
    assert {segment.rank for segment in run.segments} == {0, 1}
    command = [sys.executable, str(FOLDER / "audit_dask.py"), str(path), "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{run.counts.sum():,} picks of 30 documents" in done.stdout
    here, there = rows(tmp_path, "picks")
    assert here["files"] == there["files"] == str(len(run.segments))
    assert there["counted by"] == "Dask, workers: 2"
    workers = rows(tmp_path, "which worker")
    assert len(workers) == 2
    assert all(int(row["files"]) > 0 for row in workers)
    assert sum(int(row["files"]) for row in workers) == len(run.segments)
    assert sum(int(row["tokens"]) for row in workers) == run.gathered.n_tokens.sum()


def test_a_running_scheduler_is_used_and_left_running(script, path, tmp_path, capsys):
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        script.main([str(path), "--scheduler", cluster.scheduler_address, "--out", str(tmp_path)])
        assert len(cluster.scheduler_info["workers"]) == 1
        assert cluster.status.name == "running"
    assert "Dask, workers: 1" in capsys.readouterr().out
    assert multiprocessing.active_children() == []


def test_other_counts_are_noticed(script, path):
    run, options = omnigene_fast.open_trace(path), script.arguments([])
    counts = run.recount()
    assert script.check(run, counts, [counts.copy()], options).endswith("and the divergence by task from them.")
    other = counts.copy()
    other[3, 1, 2] += 1
    with pytest.raises(RuntimeError, match="expected equal counts, got other ones"):
        script.check(run, counts, [counts, other], options)


def test_small_run_has_files_for_every_worker(script, tmp_path):
    options = script.arguments(["--texts", "4", "--threads", "1", "--out", str(tmp_path)])
    run = script.small_run(options)
    assert len(run.segments) >= 2
    assert np.array_equal(run.recount(), run.counts)


@pytest.mark.parametrize("missing", ["dask", "dask.distributed"])
def test_what_is_missing_is_named(script, monkeypatch, tmp_path, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ImportError, match=r"^dask.distributed is not installed; install it with: pip install 'dask\["):
        script.main(["--out", str(tmp_path / "out")])


def test_a_dotted_name_without_its_parent_is_missing():
    with pytest.raises(ImportError, match=r"no_such_package\.part is not installed"):
        load("shared").need("no_such_package.part")
