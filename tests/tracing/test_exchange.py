"""Other formats: what is exported comes back exactly, and files of others are read as their schemas say."""

import zipfile

import datasets
import numpy as np
import pytest

from omnigene_fast.tracing.exchange import (
    FORMATS,
    export_run,
    from_dataset,
    import_run,
    to_dataset,
    to_routed_experts,
)
from omnigene_fast.tracing.records import text_hash
from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import Writer

from .synthetic import assert_equal_runs, documents, meta

SHAPES = [(8, 1, (0, 1, 2)), (8, 8, (4,)), (128, 8, (1, 2, 5)), (256, 2, (7, 3)), (512, 8, (10, 11))]
ODD = [
    "dna",
    "a/b",
    "..",
    "../../etc",
    "x__counts",
    "end_",
    "__",
    "_",
    "",
    "%2F",
    "α-Helix, 蛋白质",
    'it\'s "<b>"',
    " ",
]
TOKENS = ("datasets", "sglang", "vllm", "megatron")  # formats that hold the decision of each token
NUMPY = ("npz", "eplb")


def ids_of(run) -> list[np.ndarray]:
    """[n, L, K] of every document."""
    return [array for _, _, array in to_routed_experts(run)]


def write_run(path, num_experts=128, top_k=8, layers=(1, 2, 5), record=("ids",), labels=None, lengths=None):
    """A run of some documents in several segments, one of them without tokens, ids and positions not in a row."""
    lengths = lengths or {3: 7, 0: 1, 12: 20}
    shape = {"num_experts": num_experts, "top_k": top_k, "layers": layers}
    given = documents(lengths, num_experts=num_experts, top_k=top_k, layers=len(layers))
    labels = labels or {3: {"task": "dna"}, 0: {"task": "a/b", "family": "α"}, 12: {"task": "dna"}}
    hashes = {doc: text_hash(given.token[given.doc == doc]) for doc in lengths}
    with Writer(path, meta(**shape, config_hash="c0ffee"), record=record, segment_tokens=9) as writer:
        writer.add(given.take(given.doc != 12), labels, hashes)
        for start in (0, 10):
            writer.add(given.take(np.flatnonzero(given.doc == 12)[start : start + 10]))
        writer.add(given.take([]), {40: {"task": "no tokens"}})
    return open_trace(path)


def same_meta(left, right) -> bool:
    drop = ("imported", "record")
    return {k: v for k, v in left.meta.items() if k not in drop} == {
        k: v for k, v in right.meta.items() if k not in drop
    }


@pytest.mark.parametrize(("num_experts", "top_k", "layers"), SHAPES)
@pytest.mark.parametrize("format", TOKENS)
def test_what_is_exported_comes_back(tmp_path, format, num_experts, top_k, layers):
    run = write_run(tmp_path / "run", num_experts, top_k, layers)
    assert export_run(run, tmp_path / "out", format) == []
    again = import_run(tmp_path / "out", tmp_path / "again", format)
    assert_equal_runs(run, again)
    assert same_meta(run, again)
    assert again.layers == list(layers)
    assert again.verify() == []


def test_weights_and_statistics_survive_in_a_dataset_and_are_named_elsewhere(tmp_path):
    run = write_run(tmp_path / "run", record=("ids", "weights", "stats"))
    assert export_run(run, tmp_path / "out", "datasets") == []
    assert_equal_runs(run, import_run(tmp_path / "out", tmp_path / "again", "datasets"))
    for format in ("sglang", "vllm", "megatron"):
        assert export_run(run, tmp_path / format, format) == ["the tokens' weights and stats"]


def test_a_dataset_is_loaded_streamed_and_read_back(tmp_path):
    run = write_run(tmp_path / "run", num_experts=512, record=("ids", "weights"))
    export_run(run, tmp_path / "out", "datasets")
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert set(loaded["doc_id"]) == {0, 3, 12, 40}
    row = loaded.filter(lambda row: row["doc_id"] == 12)[0]
    (_, records), *_ = [pair for pair in run.iter_documents(kinds=run.record) if pair[0]["doc_id"] == 12]
    assert np.array_equal(row["routed_experts"], records.ids.transpose(1, 0, 2))
    assert np.array_equal(np.array(row["router_weights"], np.float16), records.weights.transpose(1, 0, 2))
    assert row["input_ids"] == records.token.tolist()
    assert (row["task"], row["layers"], row["num_experts"]) == ("dna", [1, 2, 5], 512)
    streamed = datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True)
    for number, source in enumerate((loaded, streamed, to_dataset(run))):
        again = from_dataset(source, tmp_path / f"again{number}", meta={"model": "synthetic"})
        assert_equal_runs(run, again)
    with pytest.raises(ValueError, match="expected layers \\[1, 2, 5\\], as Dataset says, got \\[5, 2, 1\\]"):
        import_run(loaded, tmp_path / "no", "datasets", meta={"layers": [5, 2, 1]})


def test_a_foreign_dataset(tmp_path):
    rows = {"routed_experts": [[[[1, 0]], [[3, 2]]], [[[7, 5]]]], "task": ["dna", None], "score": [0.5, 1.0]}
    known = {"num_experts": 8, "layers": [4]}
    run = import_run(datasets.Dataset.from_dict(rows), tmp_path / "run", "datasets", meta=known)
    assert [ids.tolist() for ids in ids_of(run)] == rows["routed_experts"]
    assert run.documents["task"].tolist() == ["dna", None]
    assert list(run.documents.columns) == ["doc_id", "n_tokens", "text_hash", "task"]
    rows["text"] = ["one\ntwo", "three"]
    with pytest.raises(ValueError, match="row 0: labels: expected the value of 'text' to be free of control"):
        import_run(datasets.Dataset.from_dict(rows), tmp_path / "no", "datasets", meta=known)
    run = import_run(datasets.Dataset.from_dict(rows), tmp_path / "some", "datasets", meta=known, columns=["task"])
    assert "text" not in run.documents
    rows["routed_experts"][0][1] = [[3, 2], [1, 0]]
    with pytest.raises(ValueError, match="ragged"):
        import_run(datasets.Dataset.from_dict(rows), tmp_path / "no", "datasets", meta=known)


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten_and_what_fails_leaves_nothing(tmp_path, format):
    run = write_run(tmp_path / "run")
    export_run(run, tmp_path / "out", format)
    known = {"top_k": 8, "layers": [1, 2, 5]}
    import_run(tmp_path / "out", tmp_path / "again", format, meta=known)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="choose another path"):
        export_run(run, tmp_path / "out", format)
    with pytest.raises(FileExistsError, match="choose another path"):
        import_run(tmp_path / "out", tmp_path / "again", format, meta=known)
    with pytest.raises(FileNotFoundError, match="found nothing there"):
        import_run(tmp_path / "nowhere", tmp_path / "no", format, meta=known)
    with pytest.raises(ValueError, match="expected num_experts 128"):
        import_run(tmp_path / "out", tmp_path / "no", format, meta={**known, "num_experts": 64})
    with pytest.raises(ValueError, match="layers"):
        import_run(tmp_path / "out", tmp_path / "no", format, meta={**known, "layers": [1, 2, 5, 6]})
    with pytest.raises(ValueError, match="options: expected those of"):
        export_run(run, tmp_path / "no", format, strange=1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("keep", [0.5, 0.97])
def test_a_truncated_file(tmp_path, format, keep):
    run = write_run(tmp_path / "run", lengths={3: 30, 0: 20, 12: 20})
    export_run(run, tmp_path / "out", format)
    files = [file for file in [tmp_path / "out", *(tmp_path / "out").rglob("*")] if file.is_file()]
    for file in files:
        if file.suffix != ".md":
            file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"expected") as caught:
        import_run(tmp_path / "out", tmp_path / "no", format, meta={"top_k": 8, "layers": [1, 2, 5]})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "no").exists()


def test_labels_of_the_caller(tmp_path):
    run = write_run(tmp_path / "run", lengths={0: 3, 1: 4}, labels={0: {"task": "dna"}, 1: {"task": "rna"}})
    export_run(run, tmp_path / "out", "vllm")
    every = import_run(tmp_path / "out", tmp_path / "every", "vllm", labels={"stage": "cpt"})
    assert every.documents["stage"].tolist() == ["cpt"] * 3
    each = import_run(tmp_path / "out", tmp_path / "each", "vllm", labels=[{"task": "a"}, {}, {"task": "c"}])
    assert each.documents["task"].tolist() == ["a", "rna", "c"]
    for labels in ([{}], [{}] * 4):
        with pytest.raises(ValueError, match="labels: expected"):
            import_run(tmp_path / "out", tmp_path / "no", "vllm", labels=labels)
    with pytest.raises(ValueError, match="no column of the store"):
        import_run(tmp_path / "out", tmp_path / "no", "vllm", labels={"doc_id": "1"})
    with pytest.raises(ValueError, match=r"by: expected a label of run, one of \['task'\], got 'family'"):
        export_run(run, tmp_path / "no", "npz", by="family")


def test_formats_are_described_and_others_refused(tmp_path):
    assert list(FORMATS) == [*NUMPY[:1], "datasets", "eplb", "sglang", "vllm", "megatron"]
    run = import_run_of_counts(tmp_path)
    for format in TOKENS:
        with pytest.raises(ValueError, match="expected"):
            export_run(run, tmp_path / "no", format)
    with pytest.raises(ValueError, match="format: expected one of npz, datasets"):
        export_run(run, tmp_path / "no", "csv")
    assert not (tmp_path / "no").exists()
    with zipfile.ZipFile(tmp_path / "counts.npz") as archive:
        assert archive.testzip() is None


def import_run_of_counts(tmp_path):
    export_run(write_run(tmp_path / "run"), tmp_path / "counts.npz", "npz")
    return import_run(tmp_path / "counts.npz", tmp_path / "counts", "npz")
