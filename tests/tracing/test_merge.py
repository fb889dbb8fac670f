"""Runs joined into one."""

import os

import numpy as np
import pytest

from omnigene_fast.tracing.manifest import data_name
from omnigene_fast.tracing.merge import merge
from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import Writer

from .synthetic import contents, documents, meta, same

ALL = ("ids", "weights", "stats")


def write(path, lengths, *, record=ALL, label="task", seed=0, **changes):
    with Writer(path, meta(**changes), record=record, segment_tokens=7) as writer:
        for doc, n in lengths.items():
            writer.add(documents({doc: n}, seed=seed), {doc: {label: f"{path.name} {doc}"}})
    return open_trace(path)


def test_merge(tmp_path):
    base = write(tmp_path / "base", {9: 4, 3: 5, 12: 2}, model="m-base", dtype="bfloat16", versions=1)
    other = write(tmp_path / "it's", {3: 6, 0: 1}, label="other", seed=1, model="m-cpt", dtype="bfloat16", versions=2)
    before = contents(base.path), contents(other.path)
    run = merge([base, other.path], tmp_path / "deep" / "merged")
    assert run.verify() == []
    assert (contents(base.path), contents(other.path)) == before
    assert os.listdir(tmp_path / "deep") == ["merged"]
    frame = run.documents
    assert frame["doc_id"].tolist() == [0, 1, 2, 3, 4]
    assert frame["n_tokens"].tolist() == [5, 4, 2, 1, 6]
    assert frame["run"].tolist() == ["base"] * 3 + ["it's"] * 2
    assert frame["task"].tolist() == ["base 3", "base 9", "base 12", None, None]
    assert frame["other"].tolist() == [None, None, None, "it's 0", "it's 3"]
    assert np.array_equal(run.counts, np.concatenate([base.counts, other.counts]))
    sources = {0: (base, 3), 1: (base, 9), 2: (base, 12), 3: (other, 0), 4: (other, 3)}
    for row, found in run.iter_documents(kinds=ALL):
        source, doc = sources[row["doc_id"]]
        ((_, wanted),) = source.iter_documents(kinds=ALL, where=f"doc_id = {doc}")
        wanted.doc[:] = row["doc_id"]
        assert same(found, wanted)
    assert run.meta["model"] == "m-base + m-cpt"
    assert run.meta["dtype"] == "bfloat16"
    assert "versions" not in run.meta
    assert [entry["meta"]["versions"] for entry in run.meta["merged"]] == [1, 2]


def test_merged_runs_merge_again_and_are_appended_to(tmp_path):
    a, b = write(tmp_path / "a", {0: 3}), write(tmp_path / "b", {0: 3})
    ab = merge([a, b], tmp_path / "ab")
    abc = merge([ab, write(tmp_path / "c", {5: 2})], tmp_path / "abc")
    assert abc.documents["run"].tolist() == ["a", "b", "c"]
    with Writer(tmp_path / "abc", abc.meta, record=abc.record) as writer:
        assert writer.next_doc == 3
        writer.add(documents({3: 2}))
    assert open_trace(tmp_path / "abc").documents["run"].tolist() == ["a", "b", "c", None]


def test_runs_without_ids_keep_their_counts(tmp_path):
    a, b = write(tmp_path / "a", {0: 3}, record=()), write(tmp_path / "b", {0: 4, 1: 2}, record=())
    run = merge([a, b], tmp_path / "merged")
    assert np.array_equal(run.counts, np.concatenate([a.counts, b.counts]))
    assert run.verify() == []


def test_runs_that_do_not_fit_are_refused(tmp_path):
    a = write(tmp_path / "a", {0: 3})
    others = {
        "layers": write(tmp_path / "b", {0: 3}, layers=(0, 2, 1)),
        "record": write(tmp_path / "c", {0: 3}, record=("ids",)),
    }
    target = tmp_path / "merged"
    for key, other in others.items():
        with pytest.raises(ValueError, match=f"runs: expected the same {key}, got "):
            merge([a, other], target)
    with pytest.raises(ValueError, match="runs: expected at least one"):
        merge([], target)
    same_name = write(tmp_path / "sub" / "a", {0: 3})
    with pytest.raises(ValueError, match="pass names= to tell the runs apart"):
        merge([a, same_name], target)
    assert merge([a, same_name], target, names=["x", "y"]).documents["run"].tolist() == ["x", "y"]
    before = contents(target)
    with pytest.raises(FileExistsError, match="merged: expected nothing there, found something"):
        merge([a], target)
    assert contents(target) == before


def test_a_failed_merge_leaves_nothing(tmp_path):
    a, b = write(tmp_path / "a", {0: 3}), write(tmp_path / "b", {0: 9, 1: 9})
    file = b.path / data_name("part", 0, 1)
    file.write_bytes(file.read_bytes()[:-9])
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"part-0-000001\.parquet: expected .* bytes as the manifest says"):
        merge([a, b], tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == before
