"""The reader: documents, counts, SQL, batches and whole documents, and what it says of damaged runs."""

import dataclasses
import json
import multiprocessing
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnigene_fast.tracing import layout
from omnigene_fast.tracing.records import Records
from omnigene_fast.tracing.run import Run, open_trace
from omnigene_fast.tracing.store import Writer

from .synthetic import assert_equal_runs, documents, meta, records, same

ALL = ("ids", "weights", "stats")
LAYERS = (7, 2, 5)  # decoder indices, not in order: a position taken for an index is found out


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def write(path, *, lengths=(5, 1, 9, 4, 7, 3), segment_tokens=8, record=ALL, rank=0):
    """Documents with two labels, in several segments."""
    with Writer(path, meta(LAYERS), record=record, segment_tokens=segment_tokens, rank=rank) as writer:
        for doc, n in enumerate(lengths):
            labels = {doc: {"task": ("dna", "protein")[doc % 2], "source": f"s{doc // 2}"}}
            writer.add(documents({doc: n}), labels, {doc: f"{doc:04x}"})
    return open_trace(path)


def whole(lengths=(5, 1, 9, 4, 7, 3)) -> Records:
    return documents(dict(enumerate(lengths)))


def test_documents_and_counts(path):
    run = write(path)
    assert len(run.segments) > 2
    frame = run.documents
    assert list(frame.columns) == ["doc_id", "n_tokens", "text_hash", "source", "task"]
    assert frame["n_tokens"].tolist() == [5, 1, 9, 4, 7, 3]
    assert frame["task"].tolist() == ["dna", "protein"] * 3
    assert frame["text_hash"].tolist() == [f"{doc:04x}" for doc in range(6)]
    given = whole()
    for doc in range(6):
        for position in range(3):
            wanted = np.bincount(given.ids[position, given.doc == doc].ravel(), minlength=16)
            assert np.array_equal(run.counts[doc, position], wanted)
    assert run.counts.dtype == np.int64
    assert (run.layers, run.num_experts, run.top_k, run.record, run.name) == ([7, 2, 5], 16, 4, ALL, "run")
    assert "6 documents, 29 tokens, 3 layers" in repr(run)


def test_an_empty_run(path):
    Writer(path, meta(LAYERS), record=ALL).close()
    run = open_trace(path)
    assert (len(run.documents), run.counts.shape, list(run.batches())) == (0, (0, 3, 16), [])
    assert list(run.documents.columns) == ["doc_id", "n_tokens", "text_hash"]
    assert run.histogram().tolist() == np.zeros((3, 16)).tolist()
    assert run.verify() == list(run.iter_documents()) == []
    assert run.tokens(layer=2, where="pos > 1").fetchall() == run.sql("from counts").fetchall() == []
    assert run.tokens().columns == ["doc_id", "pos", "token_id", "phase", "layer", "ids", "weights", "stats"]


def test_what_is_no_run(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="run: expected a run directory, found nothing there"):
        open_trace(path)
    path.write_text("x")
    with pytest.raises(NotADirectoryError, match="expected a run directory, got a file"):
        open_trace(path)
    with pytest.raises(ValueError, match=r"expected a run directory, got one without meta\.json"):
        open_trace(tmp_path)
    assert path.read_text() == "x"


def test_batches(path):
    run, given = write(path), whole()
    batches = list(run.batches(kinds=ALL))
    assert len(batches) == len(run.segments)
    at = 0
    for found in batches:
        assert same(found, given.take(slice(at, at + len(found))))
        at += len(found)
    assert at == len(given)
    for layers, positions in (([5, 7], [2, 0]), ([2], [1])):
        (first, *_) = run.batches(layers=layers, kinds=("weights", "ids"))
        assert np.array_equal(first.ids, given.ids[positions, : len(first)])
        assert np.array_equal(first.weights, given.weights[positions, : len(first)])
        assert first.stats is None
    (first, *_) = run.batches(layers=[5], kinds=("stats",))
    assert first.ids.shape == (1, len(first), 0)
    assert np.array_equal(first.stats, given.stats[[2], : len(first)])
    with pytest.raises(ValueError, match=r"layers: expected decoder indices among \[7, 2, 5\], got 0"):
        run.batches(layers=[0])
    with pytest.raises(ValueError, match="kinds: expected some of those recorded"):
        run.batches(kinds=("logits",))


def test_batches_where(path):
    run, given = write(path), whole()
    found = list(run.batches(kinds=ALL, where="task = 'dna' and pos >= 2 and phase = 0 -- a comment"))
    rows = (given.doc % 2 == 0) & (given.pos >= 2) & (given.phase == 0)
    assert same(
        Records(
            *(np.concatenate(a) for a in zip(*((b.doc, b.pos, b.token, b.phase) for b in found), strict=True)),
            np.concatenate([b.ids for b in found], 1),
            np.concatenate([b.weights for b in found], 1),
            np.concatenate([b.stats for b in found], 1),
        ),
        given.take(rows),
    )


def test_tokens_by_sql(path):
    run, given = write(path), whole()
    for position, layer in enumerate(LAYERS):
        rows = run.tokens(layer=layer).order("doc_id, pos").fetchall()
        assert [row[0] for row in rows] == given.doc.tolist()
        assert [row[1:5] for row in rows] == [
            (pos, token, phase, layer) for pos, token, phase in zip(given.pos, given.token, given.phase, strict=True)
        ]
        assert [row[5] for row in rows] == given.ids[position].tolist()
        assert [row[6] for row in rows] == given.weights[position].tolist()
        assert [row[7] for row in rows] == given.stats[position].tolist()
    every = run.tokens()
    assert every.columns == ["doc_id", "pos", "token_id", "phase", "layer", "ids", "weights", "stats"]
    assert len(every.fetchall()) == 3 * len(given)
    some = run.tokens(where="task = 'protein' and layer = 5 and source <> 's1'").project("doc_id, ids").fetchall()
    assert sorted({row[0] for row in some}) == [1, 5]
    with pytest.raises(ValueError, match=r"layers: expected decoder indices"):
        run.tokens(layer=0)


def test_halves_are_decoded_exactly(tmp_path):
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    n = 65536 // 16
    given = documents({0: 1}, layers=1, num_experts=300, top_k=16)
    ids = np.tile(np.arange(284, 300, dtype=np.uint16), (1, n, 1))
    given = Records(
        np.zeros(n, np.int64),
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.int32),
        np.zeros(n, np.uint8),
        ids,
        halves.reshape(1, n, 16),
    )
    with Writer(tmp_path, meta([0], 300, 16), record=("ids", "weights")) as writer:
        writer.add(given)
    run = open_trace(tmp_path)
    rows = run.tokens(layer=0).order("pos").fetchall()
    assert np.array_equal(np.array([row[6] for row in rows]).ravel(), halves.astype(float), equal_nan=True)
    assert {tuple(row[5]) for row in rows} == {tuple(range(284, 300))}


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 1), (16, 7), (300, 3), (300, 4), (128, 11)])
def test_ids_of_any_width_are_decoded(tmp_path, num_experts, top_k):
    shape = {"num_experts": num_experts, "top_k": top_k}
    given = documents({0: 6}, **shape)
    with Writer(tmp_path, meta(**shape), record=ALL) as writer:
        writer.add(given)
    rows = open_trace(tmp_path).tokens(layer=1).order("pos").fetchall()
    assert [row[5] for row in rows] == given.ids[1].tolist()
    assert [row[6] for row in rows] == given.weights[1].tolist()


def test_counts_by_sql(path):
    run = write(path)
    rows = run.sql("select layer, expert, picks from counts where doc_id = 2 order by layer, expert").fetchall()
    wanted = [(layer, e, run.counts[2, LAYERS.index(layer), e]) for layer in sorted(LAYERS) for e in range(16)]
    assert rows == wanted
    (total,) = run.sql("select sum(picks) from counts join documents using (doc_id) where task = 'dna'").fetchall()[0]
    assert total == run.counts[::2].sum()


@pytest.mark.parametrize("name", ["it's", 'a "b"', "[x]*?.{a,b}", "r[12]", "doc_id=5", "ünï 蛋白", "a;drop table x;--"])
def test_directories_of_any_name(tmp_path, name):
    write(tmp_path / "r1", lengths=(2, 2))  # what the pattern r[12] means
    run = write(tmp_path / name)
    assert run.name == name
    assert run.tokens(layer=2).order("doc_id").project("doc_id").fetchnumpy()["doc_id"].tolist() == whole().doc.tolist()
    assert run.sql("select sum(picks) from counts where doc_id = 2").fetchall() == [(run.counts[2].sum(),)]
    assert run.verify() == []


def test_files_outside_of_the_manifest_do_not_exist(path):
    run = write(path)
    (path / "part-0-000099.parquet").write_bytes((path / "part-0-000000.parquet").read_bytes())
    (path / "docs-0-000099.parquet").write_bytes((path / "docs-0-000000.parquet").read_bytes())
    again = open_trace(path)
    assert_equal_runs(run, again)
    assert again.tokens(layer=2).count("*").fetchall() == [(29,)]


def test_whole_documents_across_segments_and_ranks(path):
    """Two documents decoded together over many segments, one of them continued by another rank."""
    with Writer(path, meta(LAYERS), record=ALL, segment_tokens=6) as writer:
        for step in range(0, 20, 2):
            writer.add(records([4, 4, 2, 2], [step, step + 1] * 2), {4: {"task": "x"}})
    with Writer(path, meta(LAYERS), record=ALL, rank=1) as writer:
        writer.add(records([2] * 5, range(20, 25)))
        writer.add(documents({3: 4}))
    run = open_trace(path)
    assert len(run.segments) == 11
    found = list(run.iter_documents(kinds=ALL))
    assert [row["doc_id"] for row, _ in found] == [2, 4, 3]
    assert found[1][0] == {"doc_id": 4, "n_tokens": 20, "text_hash": None, "task": "x"}
    for (row, got), n in zip(found, (25, 20, 4), strict=True):
        assert same(got, records([row["doc_id"]] * n, range(n)))
        assert row["n_tokens"] == n
    (only,) = run.iter_documents(layers=[5], where="task = 'x'")
    assert np.array_equal(only[1].ids, found[1][1].ids[[2]])
    assert run.verify() == []


def test_whole_documents_in_bounded_memory(path, monkeypatch):
    """A document of many row groups, and no more of them read again than the documents need."""
    from omnigene_fast.tracing import segment, store

    monkeypatch.setattr(store, "ROW_GROUP", 4)
    monkeypatch.setattr(segment, "DOCUMENT_ROWS", 2)
    run = write(path, lengths=(3, 11, 2, 2, 6), segment_tokens=100)
    reads = []
    read = Run.read_group
    monkeypatch.setattr(Run, "read_group", lambda self, *args: reads.append(args[1]) or read(self, *args))
    assert run.verify() == []
    assert reads == sorted(reads)
    reads.clear()
    given = whole((3, 11, 2, 2, 6))
    for row, found in run.iter_documents(kinds=ALL):
        assert same(found, given.take(given.doc == row["doc_id"]))
    assert reads == list(range(6))


def test_labels_of_later_segments_win_and_are_noted(path):
    with Writer(path, meta(), segment_tokens=3) as writer:
        writer.add(documents({0: 3}), {0: {"task": "dna", "a": "x"}}, {0: "h"})
        writer.add(records([0] * 3, range(3, 6)), {0: {"task": "rna"}})
        writer.add(records([0] * 3, range(6, 9)))
    run = open_trace(path)
    assert run.documents[["n_tokens", "text_hash", "a", "task"]].values.tolist() == [[9, "h", "x", "rna"]]
    (note,) = run.verify()
    assert "docs-0-000001.parquet: document 0 has task 'rna', but 'dna' in docs-0-000000.parquet" in note


def damage(file, how):
    data = bytearray(file.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    elif how == "flipped":
        data[len(data) // 3] ^= 4
    elif how == "zeroed":
        data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["part", "docs"])
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "zeroed"])
def test_a_damaged_file_is_named(path, kind, how):
    run = write(path, segment_tokens=1000)
    file = path / f"{kind}-0-000000.parquet"
    file.unlink() if how == "missing" else damage(file, how)
    faults = open_trace(path).verify()
    assert len(faults) == 1
    assert faults[0].startswith(f"{file}: expected ")
    run = open_trace(path)
    with pytest.raises(ValueError, match=f"{file.name}: expected"):
        run.counts if kind == "docs" else list(run.batches(kinds=ALL))
    if kind == "docs":
        with pytest.raises(ValueError, match=f"{file.name}: expected"):
            Writer(path, meta(LAYERS), record=ALL)
    elif how != "flipped" and how != "zeroed":  # DuckDB reads no page checksums
        with pytest.raises(ValueError, match=f"{file.name}: expected"):
            run.tokens(layer=2)


def test_every_flipped_byte_of_the_pages_is_noticed(path):
    write(path, lengths=(2, 3), record=("ids",))
    file = path / "part-0-000000.parquet"
    sound = file.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(sound), 60).tolist():
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        (fault,) = open_trace(path).verify()
        assert "expected checksum" in fault
    file.write_bytes(sound)
    assert open_trace(path).verify() == []


def forge(path, kind, change, *, segment=0):
    """Rewrite a file of a run through `change(table)` and make the manifest believe it."""
    lines = (path / "manifest.jsonl").read_text().splitlines()
    entry = json.loads(lines[segment])
    file = path / entry[kind]["name"]
    table = change(pq.read_table(file))
    pq.write_table(table, file)
    entry[kind] |= {"size": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())}
    lines[segment] = json.dumps(layout.add_checksum(entry))
    (path / "manifest.jsonl").write_text("".join(line + "\n" for line in lines))


def replaced(table, name, change):
    """The table with a column changed as a numpy array, or as a list for what is no number."""
    at, kind = table.column_names.index(name), table.schema.field(name)
    values = table[name].to_pylist()
    change(values)
    return table.set_column(at, kind, pa.array(values, kind.type))


def set_item(row, value):
    return lambda values: values.__setitem__(row, value)


FORGERIES = {
    "counts": ("docs", lambda t: replaced(t, "counts", lambda v: v[1].__setitem__(17, v[1][17] + 1)), "layer 2"),
    "counts_moved": (
        "docs",
        lambda t: replaced(t, "counts", lambda v: v[0].__setitem__(slice(0, 32), v[0][16:32] + v[0][:16])),
        "expected counts equal to those of the tokens, found others in 1 documents, first document 0, layer 7",
    ),
    "counts_short": ("docs", lambda t: replaced(t, "counts", lambda v: v[0].pop()), "counts: expected 3 x 16 numbers"),
    "n_tokens": (
        "docs",
        lambda t: replaced(t, "n_tokens", set_item(0, 4)),
        "expected the 29 tokens of the manifest, 28",
    ),
    "n_tokens_moved": (
        "docs",
        lambda t: replaced(t, "n_tokens", lambda v: v.__setitem__(slice(0, 2), [4, 2])),
        "expected a token of document 1 as its docs file says, found one of 0",
    ),
    "documents": ("docs", lambda t: t.slice(0, 5), "expected 6 documents as the manifest says, found 5"),
    "document_twice": ("docs", lambda t: replaced(t, "doc_id", set_item(1, 0)), "expected documents ascending by id"),
    "another_document": (
        "part",
        lambda t: replaced(t, "doc_id", set_item(0, 9)),
        "expected a token of document 0 as its docs file says, found one of 9",
    ),
    "token_gone": (
        "part",
        lambda t: t.slice(0, 28),
        "expected the 29 tokens of the manifest, 29 by its documents, found 28",
    ),
    "twice": (
        "part",
        lambda t: replaced(t, "layer_05", set_item(6, bytes([1, 2, 3, 1]))),
        "[1, 2, 3, 1] in layer 5, docu",
    ),
    "unused": (
        "part",
        lambda t: replaced(t, "layer_02", set_item(6, bytes([1, 2, 255, 3]))),
        "[1, 2, 255, 3] in layer 2, d",
    ),
    "range": (
        "part",
        lambda t: replaced(t, "layer_07", set_item(0, bytes([16, 2, 5, 3]))),
        "layer 7, document 0, position 0",
    ),
    "other_id": (
        "part",
        lambda t: replaced(t, "layer_07", lambda v: v.__setitem__(0, v[7])),
        "first document 0, layer 7",
    ),
    "position_twice": ("part", lambda t: replaced(t, "pos", set_item(1, 0)), "found document 0, position 0 twice"),
    "order": ("part", lambda t: t.take([1, 0, *range(2, 29)]), "expected rows ascending by (doc_id, pos)"),
    "phase": ("part", lambda t: replaced(t, "phase", set_item(1, 7)), "expected positions >= 0 and phases < 3"),
    "column_gone": ("part", lambda t: t.drop_columns(["layer_02"]), "expected the columns that its meta.json asks for"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_verify_finds_each_fault(path, name):
    kind, change, message = FORGERIES[name]
    assert write(path, segment_tokens=1000).verify() == []
    forge(path, kind, lambda table: table)
    assert open_trace(path).verify() == [], "the forgery itself is not what is found"
    forge(path, kind, change)
    faults = open_trace(path).verify()
    assert faults
    assert all("-0-000000.parquet: " in fault for fault in faults)
    assert any(message in fault for fault in faults), faults


def test_verify_without_ids(path):
    assert write(path, segment_tokens=1000, record=("weights",)).verify() == []
    forge(path, "docs", FORGERIES["counts"][1])
    (fault,) = open_trace(path).verify()
    assert "expected counts equal" in fault


def test_verify_finds_positions_in_two_segments(path):
    with Writer(path, meta(LAYERS), segment_tokens=4) as writer:
        writer.add(records([0] * 4, [0, 1, 2, 5]))
        writer.add(records([0] * 4, [3, 4, 6, 7]))  # the gaps of the first: sound
        writer.add(documents({1: 4}))
    assert open_trace(path).verify() == []
    with Writer(path, meta(LAYERS), rank=1) as writer:
        writer.add(records([0, 0, 1], [6, 8, 9]))
    (fault,) = open_trace(path).verify()
    assert "expected each position once, found document 0, position 6 also in part-0-000001" in fault
    assert "part-1-000000" in fault


def test_verify_reports_what_a_crash_left(path):
    write(path)
    (path / "part-0-000777.parquet.new").write_bytes(b"half")
    (path / "part-3-000000.parquet").write_bytes(b"whole, but not committed")
    with open(path / "manifest.jsonl", "a") as file:
        file.write('{"format": 1, "rank"')
    faults = open_trace(path).verify()
    assert ["not in the manifest" in fault for fault in faults] == [True, True, False]
    assert "the last line is torn and was ignored" in faults[2]
    with Writer(path, meta(LAYERS), record=ALL, rank=3):
        assert not any("part-3" in fault or "torn" in fault for fault in open_trace(path).verify())
    Writer(path, meta(LAYERS), record=ALL).close()
    assert open_trace(path).verify() == []
    assert not list(path.glob("*777*"))


def test_verify_finds_a_segment_listed_twice(path):
    write(path)
    lines = (path / "manifest.jsonl").read_text().splitlines(keepends=True)
    (path / "manifest.jsonl").write_text("".join([*lines, lines[0]]))
    faults = open_trace(path).verify()
    assert "rank 0, seq 0 is listed 2 times" in faults[0]


def test_a_run_that_grows_is_read_as_it_was_opened(path):
    run = write(path)
    with Writer(path, meta(LAYERS), record=ALL) as writer:
        writer.add(documents({9: 3}))
    assert len(run.documents) == 6
    assert run.verify() == []
    assert len(open_trace(path).documents) == 7


def test_histogram_is_of_the_tokens(path):
    run = write(path)
    given = whole()
    wanted = [np.bincount(layer.ravel(), minlength=16).tolist() for layer in given.ids]
    assert run.histogram().tolist() == wanted
    run.__dict__["counts"] = np.zeros_like(run.counts)
    assert run.histogram().tolist() == wanted


def test_recount_is_of_the_tokens_with_any_map(path):
    """Two writers, documents across files; executors, pools, and maps that finish in another order."""
    with Writer(path, meta(LAYERS), record=ALL, segment_tokens=8, rank=1) as writer:
        writer.add(records([9] * 9 + [2] * 3, [*range(9), *range(9, 12)]), {}, {})  # 2 goes on in the other one
    run = write(path)
    assert len(run.segments) > 3
    wanted = run.counts
    run.__dict__["counts"] = None
    assert np.array_equal(run.recount(), wanted)
    assert np.array_equal(run.recount().sum(0), run.histogram())
    assert np.array_equal(run.recount(lambda count, files: [count(file) for file in reversed(files)]), wanted)
    with ThreadPoolExecutor(2) as pool:
        assert np.array_equal(run.recount(pool.map), wanted)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # nothing but what can be pickled, run elsewhere
        assert np.array_equal(run.recount(pool.imap_unordered), wanted)


def test_recount_wants_ids_of_listed_documents(path, tmp_path):
    with pytest.raises(ValueError, match="kinds: expected some of those recorded"):
        write(tmp_path / "other", record=()).recount()
    run = write(path)
    run.gathered.doc_ids[3] = 77
    with pytest.raises(ValueError, match="expected tokens of listed documents, got some of 3"):
        run.recount()


def test_segments_join_where_they_were_cut(path, tmp_path):
    """Where the commits fall changes nothing that is read."""
    runs = [write(tmp_path / str(tokens), segment_tokens=tokens) for tokens in (1, 9, 15, 1000)]
    assert len({len(run.segments) for run in runs}) == len(runs)
    for left, right in pairwise(runs):
        assert_equal_runs(left, right)
    shifted = dataclasses.replace(whole(), ids=np.roll(whole().ids, 1, axis=0))
    with Writer(path, meta(LAYERS), record=ALL) as writer:  # a permuted pair of layers is another run
        writer.add(
            shifted,
            {d: {"task": ("dna", "protein")[d % 2], "source": f"s{d // 2}"} for d in range(6)},
            {d: f"{d:04x}" for d in range(6)},
        )
    with pytest.raises(AssertionError):
        assert_equal_runs(runs[0], open_trace(path))
