"""Formats of counts alone: OmniGene-4's npz and EPLB's load matrix."""

import base64
import io

import numpy as np
import pytest

from omnigene_fast.tracing.exchange import (
    decode_routed_experts,
    export_run,
    import_run,
)
from omnigene_fast.tracing.exchange.counts import key_task, task_key

from .test_exchange import ODD, write_run


@pytest.mark.parametrize("task", ODD)
def test_a_task_comes_back_from_its_key(task):
    key = task_key(task)
    assert key_task(key) == task
    assert f"{key}__counts".split("__")[0] == key  # what the paper's readers take for the task
    assert "/" not in key
    assert not key.startswith(".")


def test_npz_as_the_papers_scripts_read_and_write_it(tmp_path):
    labels = {doc: {"task": task} for doc, task in enumerate(ODD)}
    run = write_run(tmp_path / "run", labels=labels, lengths={doc: 1 + doc for doc in range(len(ODD))})
    left = export_run(run, tmp_path / "counts.npz", "npz")
    assert any("the tokens" in phrase for phrase in left)
    assert any("single documents" in phrase for phrase in left)
    with np.load(tmp_path / "counts.npz") as stored:
        tasks = sorted({key.split("__")[0] for key in stored.files})  # 23-three_way_compare.py
        assert len(tasks) == len(ODD) + 1
        for task in tasks:
            counts, tokens = stored[f"{task}__counts"], stored[f"{task}__tokens"]
            assert counts.dtype == tokens.dtype == np.int64
            assert counts.shape == (3, 128)
            assert tokens.shape == (1,)
            assert (counts.sum(axis=1) == 8 * tokens).all()
    again = import_run(tmp_path / "counts.npz", tmp_path / "again", "npz")
    assert again.record == ()
    assert again.layers == run.layers
    assert again.verify() == []
    for found in (run, again):
        order = np.argsort(found.documents["task"].to_numpy().astype(str))
        found.sorted = found.documents["task"].to_numpy()[order], found.documents["n_tokens"].to_numpy()[order], order
    assert run.sorted[0].tolist() == again.sorted[0].tolist()
    assert run.sorted[1].tolist() == again.sorted[1].tolist()
    assert np.array_equal(run.counts[run.sorted[2]], again.counts[again.sorted[2]])
    export_run(again, tmp_path / "twice.npz", "npz")
    with np.load(tmp_path / "counts.npz") as one, np.load(tmp_path / "twice.npz") as two:
        assert one.files == two.files
        assert all(np.array_equal(one[key], two[key]) for key in one.files)


def test_a_foreign_npz(tmp_path):
    rng = np.random.default_rng(0)
    counts = {task: rng.multinomial(8 * n, np.full(128, 1 / 128), size=30) for task, n in (("DNA", 50), ("NL", 70))}
    np.savez_compressed(
        tmp_path / "moe_counts_v3.npz",
        **{f"{task}__counts": values for task, values in counts.items()},
        DNA__tokens=np.array([50]),
        NL__tokens=np.array([70]),
    )
    run = import_run(tmp_path / "moe_counts_v3.npz", tmp_path / "run", "npz", meta={"model": "v3"})
    assert (run.layers, run.num_experts, run.top_k, run.meta["model"]) == (list(range(30)), 128, 8, "v3")
    assert run.documents[["task", "n_tokens"]].values.tolist() == [["DNA", 50], ["NL", 70]]
    assert np.array_equal(run.counts, np.stack([counts["DNA"], counts["NL"]]))
    assert list(run.iter_documents(kinds=())) == []
    assert run.sql("select count(*) from tokens").fetchall() == [(0,)]
    assert "2 documents, 120 tokens" in repr(run)


def test_eplb(tmp_path):
    run = write_run(tmp_path / "run")
    left = export_run(run, tmp_path / "load.npy", "eplb")
    assert "the rows are decoder layers [1, 2, 5]" in left[-1]
    weight = np.load(tmp_path / "load.npy")
    assert weight.dtype == np.int64
    assert np.array_equal(weight, run.counts.sum(axis=0))
    with pytest.raises(ValueError, match=r"expected top_k, which load\.npy does not say"):
        import_run(tmp_path / "load.npy", tmp_path / "again", "eplb")
    known = {"top_k": 8, "layers": (1, 2, 5)}
    again = import_run(tmp_path / "load.npy", tmp_path / "again", "eplb", meta=known, labels={"task": "all"})
    assert np.array_equal(again.counts[0], weight)
    assert again.layers == [1, 2, 5]
    assert again.documents[["n_tokens", "task"]].values.tolist() == [[28, "all"]]
    export_run(again, tmp_path / "twice.npy", "eplb")
    assert (tmp_path / "twice.npy").read_bytes() == (tmp_path / "load.npy").read_bytes()


def test_pickles_and_wrong_numbers_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    hostile = np.array([Bomb()], dtype=object)
    counts, tokens = np.full((2, 4), 2), np.array([4])

    def refused(error, format="npz", match=None, meta=None, **arrays):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with open(file, "wb") as stream:
            np.savez(stream, **arrays) if format == "npz" else np.save(stream, arrays["array"])
        with pytest.raises(error, match=match):
            import_run(file, tmp_path / "no", format.split()[-1], meta=meta)
        assert not (tmp_path / "no").exists()

    refused(ValueError, match="pickled objects", DNA__counts=hostile, DNA__tokens=tokens)
    refused(ValueError, match="one array", format="eplb as npz", array=counts)
    refused(ValueError, match="pickled objects", format="eplb", meta={"top_k": 2}, array=hostile)
    refused(ValueError, match="expected keys", counts=counts)
    refused(ValueError, match="expected keys", meta__layers=counts, DNA__counts=counts, DNA__tokens=tokens)
    refused(ValueError, match="DNA__tokens", DNA__counts=counts)
    refused(ValueError, match="from 0 to", DNA__counts=-counts, DNA__tokens=tokens)
    refused(ValueError, match="from 0 to", DNA__counts=counts << 40, DNA__tokens=tokens)
    refused(ValueError, match="fractions", DNA__counts=counts + 0.5, DNA__tokens=tokens)
    refused(TypeError, match="dtype bool", DNA__counts=counts > 0, DNA__tokens=tokens)
    refused(ValueError, match="8 picks in each layer", DNA__counts=counts + np.array([[0], [1]]), DNA__tokens=tokens)
    refused(ValueError, match="layers", meta={"layers": [0]}, DNA__counts=counts, DNA__tokens=tokens)
    refused(ValueError, match="picks in each layer", format="eplb", meta={"top_k": 3}, array=counts)
    with pytest.raises(ValueError, match="pickled"):
        decode_routed_experts(base64.b64encode(b"\x93NUMPY" + npz_member(hostile)[6:]).decode())
    with pytest.raises(ValueError, match="expected base64"):
        decode_routed_experts("not base64!")
    np.savez(tmp_path / "archive.npy.npz", counts)
    with pytest.raises(ValueError, match="an archive, not one array"):
        import_run(tmp_path / "archive.npy.npz", tmp_path / "no", "eplb", meta={"top_k": 2})
    (tmp_path / "text.npz").write_text("DNA 4")
    with pytest.raises(ValueError, match="no numpy file"):
        import_run(tmp_path / "text.npz", tmp_path / "no", "npz")


def npz_member(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
