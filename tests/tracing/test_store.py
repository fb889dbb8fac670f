"""The writer: what it takes and refuses, how it opens, resumes and shares a directory."""

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from omnigene_fast.tracing import layout
from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import DOCS_PER_RANK, Writer

from . import children
from .synthetic import contents, documents, meta, records, same

ODD = {
    "quote": 'it\'s "quoted"; DROP TABLE documents; --',
    "html": "<script>alert(1)</script>&amp;",
    "path": "../../etc/passwd",
    "unicode": "α-Helix, 蛋白质, \N{DNA DOUBLE HELIX}, \u202eright to left",
    "empty": "",
    "null": "NULL",
    "blank": "  two  blanks ",
}


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("num_experts", [8, 128, 254, 255, 256, 257, 512])
def test_what_is_written_is_read(tmp_path, num_experts, top_k):
    shape = {"num_experts": num_experts, "top_k": top_k}
    given = documents({5: 7, 2: 1, 9: 12}, **shape)
    given.ids[0, 0, 0] = num_experts - 1 if top_k == 1 else given.ids[0, 0, 0]
    kinds = ("ids", "weights", "stats")
    with Writer(tmp_path / "run", meta(**shape), record=kinds, segment_tokens=10) as writer:
        writer.add(given)
    (found,) = open_trace(tmp_path / "run").batches(kinds=kinds)
    order = np.lexsort((given.pos, given.doc))
    assert same(found, given.take(order))
    assert found.ids.dtype == (np.uint8 if num_experts <= 254 else np.uint16)
    run = open_trace(tmp_path / "run")
    wanted = np.zeros((3, 3, num_experts), int)
    np.add.at(wanted, (np.searchsorted([2, 5, 9], given.doc)[None, :, None], np.arange(3)[:, None, None], given.ids), 1)
    assert np.array_equal(run.counts, wanted)
    assert np.array_equal(run.histogram(), wanted.sum(0))
    assert run.verify() == []
    assert [list(row) for row in run.tokens(layer=1).order("doc_id, pos").project("ids").fetchnumpy()["ids"]] == (
        found.ids[1].tolist()
    )


def test_unsorted_calls_are_sorted(tmp_path):
    steps = [records([3, 1], [step, step]) for step in range(5)]  # as decoding does: one token of each document
    with Writer(tmp_path, meta()) as writer:
        for step in steps:
            writer.add(step)
    (found,) = open_trace(tmp_path).batches()
    assert found.doc.tolist() == [1] * 5 + [3] * 5
    assert same(found, records(found.doc, found.pos), ("ids",))
    assert open_trace(tmp_path).verify() == []


def test_a_caller_may_reuse_its_memory(tmp_path):
    given = documents({0: 4})
    kept = documents({0: 4})
    with Writer(tmp_path, meta()) as writer:
        writer.add(given)
        given.ids[:] = 0
        given.doc[:] = 77
    (found,) = open_trace(tmp_path).batches()
    assert same(found, kept, ("ids",))


@pytest.mark.parametrize("record", [(), ("weights",), ("stats", "weights"), ("ids",)])
def test_counts_are_kept_whatever_is_recorded(tmp_path, record):
    given = documents({0: 3, 1: 5})
    with Writer(tmp_path, meta(), record=record) as writer:
        writer.add(given)
    run = open_trace(tmp_path)
    assert set(run.record) == set(record)
    assert np.array_equal(run.counts.sum((0, 1)), np.bincount(given.ids.ravel(), minlength=16))
    assert run.verify() == []
    for kind in {"ids", "weights", "stats"} - set(record):
        with pytest.raises(ValueError, match="kinds: expected some of those recorded"):
            run.batches(kinds=(kind,))
    (found,) = run.batches(kinds=record)
    assert same(found, given, record)


def spoil(change):
    given = documents({4: 3, 6: 5})
    change(given)
    return given


BAD = {
    "twice": (lambda r: r.ids[1, 4].__setitem__(slice(None), [3, 5, 7, 3]), r"\(an expert twice\) in layer 1, token 4"),
    "neighbours": (lambda r: r.ids[2, 7].__setitem__(slice(None), [1, 2, 9, 9]), r"layer 2, token 7 \(document 6, pos"),
    "unused": (lambda r: r.ids[0, 0].__setitem__(3, 255), r"\(unused slots\) in layer 0, token 0 \(document 4, "),
    "range": (lambda r: r.ids[2, 1].__setitem__(0, 16), r"\(no such expert\) in layer 2, token 1"),
    "lengths": (lambda r: setattr(r, "pos", r.pos[:-1]), r"pos: expected shape \[8\], got \[7\]"),
    "layers": (lambda r: setattr(r, "ids", r.ids[:2]), r"ids: expected shape \[3, 8, 4\], got \[2, 8, 4\]"),
    "weights": (lambda r: setattr(r, "weights", None), "weights: expected an array, since the run records weights"),
    "negative": (lambda r: r.doc.__setitem__(2, -1), "doc: expected numbers >= 0, got -1 at token 2"),
    "phase": (lambda r: r.phase.__setitem__(2, 9), "phase: expected numbers < 3, got 9"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_refused_and_leave_nothing(tmp_path, name):
    change, message = BAD[name]
    writer = Writer(tmp_path, meta(), record=("ids", "weights"))
    with pytest.raises(ValueError, match=message):
        writer.add(spoil(change), labels={4: {"task": "dna"}})
    assert writer.documents() == {}
    writer.close()
    assert open_trace(tmp_path).segments == []


def test_bad_ids_are_found_anywhere_and_nothing_else_is(tmp_path):
    with Writer(tmp_path, meta(layers=range(2), num_experts=300, top_k=8)) as writer:
        rng = np.random.default_rng(0)
        ids = np.argsort(rng.random((2, 20_000, 300)), axis=2)[..., :8].astype(np.uint16)
        given = records([], [], 2, 300, 8)
        given.doc, given.pos = np.zeros(20_000, np.int64), np.arange(20_000, dtype=np.int32)
        given.token, given.phase = np.zeros(20_000, np.int32), np.zeros(20_000, np.uint8)
        given.ids = ids
        writer.add(given)
        for layer, token, a, b in [(0, 0, 0, 7), (0, 16_383, 0, 1), (0, 16_384, 6, 7), (1, 19_999, 2, 5), (1, 7, 3, 4)]:
            given.ids = ids.copy()
            given.ids[layer, token, a] = given.ids[layer, token, b]
            with pytest.raises(ValueError, match=rf"an expert twice.* in layer {layer}, token {token} "):
                writer.add(given)
        given.ids = ids.copy()
        given.ids[1, 18_000, 5] = 65535
        with pytest.raises(ValueError, match=r"unused slots.* in layer 1, token 18000 "):
            writer.add(given)
        given.ids = ids.astype(np.uint8)
        with pytest.raises(TypeError, match="ids: expected dtype uint16, got uint8"):
            writer.add(given)


def test_odd_labels_come_back_verbatim(tmp_path):
    with Writer(tmp_path, meta()) as writer:
        for doc, value in enumerate(ODD.values()):
            writer.add(documents({doc: 2}), labels={doc: {"task": value, "_x1": "y"}}, hashes={doc: f"h{doc}"})
        writer.add(documents({50: 2}))
    run = open_trace(tmp_path)
    assert run.documents["task"].tolist() == [*ODD.values(), None]
    assert run.documents["text_hash"].tolist() == [*(f"h{doc}" for doc in range(len(ODD))), None]
    assert run.sql("select task from documents order by doc_id").fetchall() == [(v,) for v in [*ODD.values(), None]]
    for value in ODD.values():
        condition = "task = '" + value.replace("'", "''") + "'"
        assert len(run.tokens(layer=0, where=condition).fetchall()) == 2


@pytest.mark.parametrize("value", ["two\nlines", "tab\t", "nul\0", "c1\x85", "lone \ud800 surrogate"])
def test_control_characters_are_refused(tmp_path, value):
    with Writer(tmp_path, meta()) as writer:
        with pytest.raises(ValueError, match="'task' to be free of control characters and lone surrogates"):
            writer.add(documents({0: 2}), labels={0: {"task": value}})
        with pytest.raises(ValueError, match="text hash to be free of control"):
            writer.add(documents({0: 2}), hashes={0: value})
        assert writer.documents() == {}


@pytest.mark.parametrize("name", ["", "1st", "a b", "x;--", "tâche", "a\n", "doc_id", "IDS", "counts", "Layer"])
def test_label_names_are_identifiers_and_not_reserved(tmp_path, name):
    with Writer(tmp_path, meta()) as writer, pytest.raises(ValueError, match="labels: expected a name"):
        writer.add(documents({0: 2}), labels={0: {name: "x"}})


def test_label_names_keep_one_spelling_and_values_are_text(tmp_path):
    with Writer(tmp_path, meta()) as writer:
        writer.add(documents({0: 2}), labels={0: {"task": "x"}})
    with Writer(tmp_path, meta()) as writer:
        with pytest.raises(ValueError, match="one spelling, got 'Task' beside 'task'"):
            writer.add(documents({1: 2}), labels={1: {"Task": "x"}})
        with pytest.raises(TypeError, match="the value of 'task' to be text, got int"):
            writer.add(documents({1: 2}), labels={1: {"task": 3}})


def test_a_document_without_tokens_is_known(tmp_path):
    with Writer(tmp_path, meta()) as writer:
        writer.add(documents({1: 2}), labels={7: {"task": "empty"}})
        writer.commit()
        writer.add(documents({}), hashes={8: "h"})
    run = open_trace(tmp_path)
    assert run.documents[["doc_id", "n_tokens"]].values.tolist() == [[1, 2], [7, 0], [8, 0]]
    assert run.verify() == []
    assert [row["doc_id"] for row, _ in run.iter_documents()] == [1]
    assert Writer(tmp_path, meta()).documents() == {1: 2, 7: 0, 8: 0}


def test_foreign_directories_and_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"a run or an empty directory, got one without meta.json .*'notes.txt'"):
        Writer(tmp_path, meta())
    assert os.listdir(tmp_path) == ["notes.txt"]
    for path in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "run"):
        with pytest.raises(FileExistsError, match="expected a directory for the run, got a file"):
            Writer(path, meta())
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"layers": [0, 2, 1]}, "layers"),
        ({"num_experts": 17}, "num_experts"),
        ({"top_k": 3}, "top_k"),
        ({"model": "another"}, "model"),
        ({"config_hash": "1"}, "config_hash"),
    ],
)
def test_another_run_is_not_appended_to(tmp_path, change, key):
    with Writer(tmp_path, meta(config_hash="0", versions={"torch": "1"})) as writer:
        writer.add(documents({0: 3}))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"expected to append to a run with {key} "):
        Writer(tmp_path, meta(config_hash="0") | change)
    with pytest.raises(ValueError, match="expected to append to a run with record "):
        Writer(tmp_path, meta(config_hash="0"), record=("ids", "weights"))
    assert contents(tmp_path) == before
    Writer(tmp_path, meta(config_hash="0", versions={"torch": "2"})).close()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("meta.json", '{"format": 2}', r"meta.json: expected format 1 or older, got 2; a newer omnigene-fast reads it"),
        ("meta.json", '{"format": ', r"meta.json: expected JSON, got "),
        ("meta.json", "[]", r"meta.json: expected a JSON object, got list"),
        ("meta.json", '{"format": 1, "layers": []}', r"meta.json: expected layers to be a list of decoder indices"),
        ("manifest.jsonl", '{"format": 2, "new": 1}\n', r"manifest.jsonl, line 1: expected format 1 or older, got 2"),
        ("manifest.jsonl", "junk\n", r"manifest.jsonl, line 1: expected a committed segment as JSON"),
        ("manifest.jsonl", '{"format": 1}\n', r"manifest.jsonl, line 1: expected the fields of a segment"),
    ],
)
def test_newer_or_damaged_bookkeeping_is_neither_read_nor_overwritten(tmp_path, file, text, message):
    with Writer(tmp_path, meta()) as writer:
        writer.add(documents({0: 3}))
    (tmp_path / file).write_text(text)
    before = contents(tmp_path)
    for opening in (lambda: Writer(tmp_path, meta()), lambda: open_trace(tmp_path)):
        with pytest.raises(ValueError, match=message):
            opening()
    assert contents(tmp_path) == before


def test_a_manifest_names_no_file_elsewhere(tmp_path):
    with Writer(tmp_path, meta()) as writer:
        writer.add(documents({0: 3}))
    entry = json.loads((tmp_path / "manifest.jsonl").read_text())
    entry["part"]["name"] = "../../secret.parquet"
    (tmp_path / "manifest.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match="line 1: expected counts and the file names of its rank and seq"):
        open_trace(tmp_path)


def test_meta_is_checked():
    for change, message in [
        ({"layers": (1, 1)}, "layers without repeats"),
        ({"num_experts": 0}, "num_experts in"),
        ({"num_experts": 70_000}, "num_experts in"),
        ({"top_k": 17}, r"top_k in \[1, 16\]"),
        ({"model": object()}, "meta: expected what JSON can hold"),
        ({"extra": float("nan")}, "meta: expected what JSON can hold"),
    ]:
        with pytest.raises(ValueError, match=message):
            Writer("never-made", meta() | change)
    for arguments in ({"record": ("logits",)}, {"record": "ids"}, {"rank": -1}, {"segment_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Writer("never-made", meta(), **arguments)
    assert not Path("never-made").exists()


def refused(path) -> None:
    with pytest.raises(RuntimeError, match="only writer of rank 0"):
        Writer(path, meta())


def test_two_writers_of_a_rank(tmp_path):
    writer = Writer(tmp_path, meta())
    with pytest.raises(RuntimeError, match="expected to be the only writer of rank 0, but another one is open"):
        Writer(tmp_path, meta())
    other = Writer(tmp_path, meta(), rank=1)

    assert children.exit_code(children.start(refused, tmp_path)) == 0
    writer.add(documents({0: 3}))
    other.add(documents({1: 3}))
    writer.close()
    writer.close()
    other.close()
    with pytest.raises(RuntimeError, match="expected an open writer, but it was closed"):
        writer.add(documents({2: 3}))
    assert Writer(tmp_path, meta()).documents() == {0: 3, 1: 3}


def hold(path, told) -> None:
    writer = Writer(path, meta())
    if os.fork() == 0:  # such as a data loader's worker
        told.send(os.getpid())
    signal.pause()
    writer.close()


def test_a_killed_writer_holds_no_lock_though_its_worker_lives_on(tmp_path):
    ready, told = children.pipe()
    holder = children.start(hold, tmp_path, told)
    worker = ready.recv()
    try:
        with pytest.raises(RuntimeError, match="only writer"):
            Writer(tmp_path, meta())
        holder.kill()
        assert children.exit_code(holder) == -signal.SIGKILL
        Writer(tmp_path, meta()).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_closed_writer_holds_no_lock_though_a_child_was_just_forked(tmp_path):
    for _ in range(5):
        writer = Writer(tmp_path, meta())
        worker = os.fork()
        if worker == 0:
            signal.pause()
        try:
            writer.close()
            Writer(tmp_path, meta()).close()
        finally:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)


def write_as_rank(path, rank: int, started) -> None:
    started.poll(None)  # returns for all of them when the other end is closed
    with Writer(path, meta(), rank=rank, segment_tokens=8) as writer:
        for doc in range(writer.next_doc, writer.next_doc + 6):
            writer.add(documents({doc: 5}), labels={doc: {"rank": str(rank)}})


def test_ranks_that_start_at_once(tmp_path):
    path = tmp_path / "deep" / "run"
    started, go = children.pipe()
    ranks = [children.start(write_as_rank, path, rank, started) for rank in range(4)]
    go.close()
    assert [children.exit_code(rank) for rank in ranks] == [0] * 4
    run = open_trace(path)
    assert run.verify() == []
    assert run.documents["doc_id"].tolist() == [rank * DOCS_PER_RANK + doc for rank in range(4) for doc in range(6)]
    assert run.documents["rank"].tolist() == [str(rank) for rank in range(4) for _ in range(6)]
    assert not list(path.glob("*.new"))


def test_reopening_appends_and_numbers_on(tmp_path):
    for session in range(3):
        with Writer(tmp_path, meta(), rank=2, segment_tokens=6) as writer:
            assert writer.next_doc == 2 * DOCS_PER_RANK + 2 * session
            first = writer.next_doc
            writer.add(documents({first: 4, first + 1: 4, 17: 1} if session == 0 else {first: 4, first + 1: 4}))
            assert writer.next_doc == first + 2
    run = open_trace(tmp_path)
    assert [(s.rank, s.seq) for s in run.segments] == [(2, 0), (2, 1), (2, 2)]
    assert run.documents["n_tokens"].tolist() == [1, *[4] * 6]
    with Writer(tmp_path, meta()) as writer:
        assert writer.next_doc == 18


def test_snapshot_has_what_is_open_and_what_is_committed(tmp_path):
    writer = Writer(tmp_path, meta(), segment_tokens=8)
    writer.add(documents({3: 9}), labels={3: {"task": "dna"}})  # committed
    writer.add(records([3, 1], [9, 0]), labels={3: {"task": "rna"}})  # open
    ids, counts, labels = writer.snapshot()
    assert (ids.tolist(), labels) == ([1, 3], [{}, {"task": "rna"}])
    assert writer.documents() == {1: 1, 3: 10}
    whole = records([1, *[3] * 10], [0, *range(10)])
    for row, doc in enumerate([1, 3]):
        for layer in range(3):
            wanted = np.bincount(whole.ids[layer, whole.doc == doc].ravel(), minlength=16)
            assert np.array_equal(counts[row, layer], wanted)
    writer.close()
    assert np.array_equal(open_trace(tmp_path).counts, counts)
    assert open_trace(tmp_path).documents["task"].tolist() == [None, "rna"]


def test_snapshot_beside_a_writing_thread(tmp_path):
    writer = Writer(tmp_path, meta(), segment_tokens=16)
    errors = []

    def write():
        try:
            for doc in range(60):
                writer.add(documents({doc: 5}))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        ids, counts, _ = writer.snapshot()
        assert (counts.sum(2) == 5 * 4).all()
        assert ids.tolist() == list(range(len(ids)))
    thread.join()
    assert not errors
    writer.close()
    assert open_trace(tmp_path).verify() == []


@pytest.mark.parametrize("step", range(4))
def test_a_full_disk_loses_and_doubles_nothing(tmp_path, monkeypatch, step):
    writer = Writer(tmp_path, meta(), segment_tokens=6)
    calls = []

    def full(handle, sync=os.fsync):
        calls.append(handle)
        if len(calls) == step + 1:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(layout.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.add(documents({0: 7}))
    assert open_trace(tmp_path).segments == []
    assert not list(tmp_path.glob("*.new"))
    writer.add(documents({1: 3}))  # commits what had stayed open first
    writer.close()
    run = open_trace(tmp_path)
    assert run.verify() == []
    assert run.documents["n_tokens"].tolist() == [7, 3]


def test_memory_is_flat_over_ten_thousand_steps(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    shape = {"num_experts": 128, "top_k": 8}
    given = documents({0: 2, 1: 2}, **shape)
    # Kept per document, the counts of the steps measured would be 16,000 x 3 x 128 x 4 bytes: 25 MB; the ids 0.8 MB.
    with Writer(tmp_path, meta(**shape), segment_tokens=2048) as writer:
        for step in range(10_000):
            if step == 2_000:
                before = resident()
            given.doc[:] = np.repeat([2 * step, 2 * step + 1], 2)
            writer.add(given, labels={2 * step: {"task": "x"}})
        grown = resident() - before
    assert grown < 8e6, f"{grown / 1e6:.1f} MB"
    assert len(open_trace(tmp_path).documents) == 20_000
