"""Documents of which nothing but the counts is known: what the writer takes, and what readers make of them."""

import numpy as np
import pytest

from omnigene_fast.tracing.counting import count_picks
from omnigene_fast.tracing.merge import merge
from omnigene_fast.tracing.run import open_trace
from omnigene_fast.tracing.store import Writer

from .synthetic import contents, documents, meta


def counts_of(lengths) -> np.ndarray:
    given = documents(lengths)
    return count_picks(given.ids, np.searchsorted(list(lengths), given.doc), len(lengths), 16)


def write(path, lengths, labels=None) -> None:
    with Writer(path, meta(), record=()) as writer:
        doc_ids, n_tokens = np.array(list(lengths)), np.array(list(lengths.values()))
        writer.add_counts(doc_ids, counts_of(lengths), n_tokens, labels)


def test_counts_alone_equal_those_of_the_tokens(tmp_path):
    lengths = {2: 5, 3: 1, 7: 12}
    labels = {2: {"task": "dna"}, 7: {"task": "a/b", "family": "α"}}
    write(tmp_path / "alone", lengths, labels)
    with Writer(tmp_path / "tokens", meta(), record=()) as writer:
        writer.add(documents(lengths), labels)
    alone, tokens = open_trace(tmp_path / "alone"), open_trace(tmp_path / "tokens")
    assert alone.documents.equals(tokens.documents)
    assert np.array_equal(alone.counts, tokens.counts)
    picks = "select * from counts order by doc_id, layer, expert"
    assert alone.sql(picks).fetchall() == tokens.sql(picks).fetchall()
    assert list(alone.iter_documents(kinds=())) == list(alone.batches(kinds=())) == []
    assert len(list(tokens.iter_documents(kinds=()))) == 3
    assert alone.verify() == tokens.verify() == []
    joined = merge([alone, tokens], tmp_path / "joined")
    assert joined.verify() == []
    assert np.array_equal(joined.counts, np.concatenate([alone.counts, tokens.counts]))
    assert joined.documents["n_tokens"].tolist() == [5, 1, 12] * 2


def test_counts_and_tokens_in_one_run(tmp_path):
    with Writer(tmp_path / "run", meta(), record=()) as writer:
        writer.add(documents({0: 4}))
        writer.add_counts(np.array([5]), counts_of({5: 3}), np.array([3]))
        writer.add(documents({writer.next_doc: 2}))
        doc_ids, counts, _ = writer.snapshot()
        assert writer.documents() == {0: 4, 5: 3, 6: 2}
    run = open_trace(tmp_path / "run")
    assert run.documents["doc_id"].tolist() == doc_ids.tolist() == [0, 5, 6]
    assert np.array_equal(run.counts, counts)
    assert np.array_equal(run.counts, counts_of({0: 4, 5: 3, 6: 2}))
    assert [row["doc_id"] for row, _ in run.iter_documents(kinds=())] == [0, 6]
    assert run.verify() == []


def test_many_documents_and_reopening(tmp_path):
    write(tmp_path / "run", dict.fromkeys(range(600), 1), {i: {"task": str(i % 7)} for i in range(600)})
    write(tmp_path / "run", {600: 2})
    run = open_trace(tmp_path / "run")
    assert len(run.segments) == 2
    assert np.array_equal(run.counts, counts_of({**dict.fromkeys(range(600), 1), 600: 2}))
    assert run.documents["task"].tolist() == [*(str(i % 7) for i in range(600)), None]


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
    good = counts_of({0: 4, 1: 2})
    ids, tokens = np.array([0, 1]), np.array([4, 2])
    one_more, wide = good.copy(), good.astype(np.int64)
    one_more[1, 2, 0] += 1
    with Writer(tmp_path / "run", meta(), record=()) as writer:
        before = contents(tmp_path / "run")
        for error, match, arguments in (
            (ValueError, "expected 8 picks in each layer .2 tokens, top 4., got 9 in layer 2", (ids, one_more, tokens)),
            (ValueError, "picks in each layer", (ids, good, tokens[::-1])),
            (ValueError, "ascend", (ids[::-1], good, tokens)),
            (ValueError, "n_tokens: expected shape", (ids, good, tokens[:1])),
            (ValueError, "counts: expected shape", (ids, good[:, :2], tokens)),
            (ValueError, "numbers >= 0", (ids - 1, good, tokens)),
            (TypeError, "int32", (ids, wide, tokens)),
            (ValueError, "among doc_ids", (ids, good, tokens, {2: {"task": "dna"}})),
            (ValueError, "no column of the store", (ids, good, tokens, {0: {"pos": "dna"}})),
        ):
            with pytest.raises(error, match=match):
                writer.add_counts(*arguments)
        writer.add_counts(ids[:0], good[:0], tokens[:0])
        assert contents(tmp_path / "run") == before
    with (
        Writer(tmp_path / "tokens", meta()) as writer,
        pytest.raises(ValueError, match="expected a run that records no tokens"),
    ):
        writer.add_counts(ids, good, tokens)


def test_counts_of_a_document_in_several_segments_add_up_beyond_32_bits(tmp_path):
    shape = {"layers": [0], "num_experts": 4, "top_k": 1, "model": "x"}
    half = np.array([[[1_600_000_000, 100, 100, 100]]], np.int32)
    with Writer(tmp_path / "run", shape, record=()) as writer:
        for _ in range(2):
            writer.add_counts(np.array([5]), half, np.array([1_600_000_300]))
        assert writer.snapshot()[1].tolist() == [[[3_200_000_000, 200, 200, 200]]]
    run = open_trace(tmp_path / "run")
    assert run.counts.tolist() == [[[3_200_000_000, 200, 200, 200]]]
    assert run.verify() == []
