"""true_false.py: neither half of a statement gives the answer away, nothing crosses the split, both ways agree."""

import itertools
from collections import Counter

import pytest

from omnigene_fast.demo.model import load_texts

from .helpers import load
from .test_homology import parts

script, shared, alignment = load("true_false"), load("shared"), load("alignment")


@pytest.fixture(scope="module")
def definitions():
    """Definition by name, read again."""
    return dict(text.split(". ", 1) for text in load_texts(10**6)["text_biology"])


def piece(question):
    """The definition's part of the prompt."""
    start, end = f"{question.group}: ", "\nTrue or false?"
    assert question.prompt.startswith(start)
    assert question.prompt.endswith(end)
    return question.prompt[len(start) : -len(end)]


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("limit", [None, 2, 3, 7])
def test_neither_name_nor_definition_tells(part, masked, limit):
    asked = script.questions(part, masked, limit)
    for half in (lambda each: each.group, piece):
        counts = Counter((half(each), each.answer) for each in asked)
        for known in {half(each) for each in asked}:
            assert counts[known, "true"] == counts[known, "false"] > 0
    assert len({each.prompt for each in asked}) == len(asked)
    assert limit is None or len({each.group for each in asked}) == limit


def test_true_is_what_the_ontology_says(definitions):
    for each in script.questions("train") + script.questions("test"):
        assert (piece(each) in definitions[each.group]) == (each.answer == "true")


def test_no_term_and_no_definition_crosses_the_split():
    train, test = script.questions("train"), script.questions("test")
    assert not {each.group for each in train} & {each.group for each in test}
    assert not {piece(each) for each in train} & {piece(each) for each in test}
    assert len({each.group for each in train + test}) == 50
    assert len(test) == sum(2 * len(pieces) for pieces in script.terms("test").values())
    assert max(Counter(each.group for each in test).values()) > 2  # several statements a term


def test_masks_leave_no_overlap_and_little_else(definitions):
    for plain, masked in zip(script.questions("test"), script.questions("test", masked=True), strict=True):
        assert script.overlap(masked) == 0
        assert plain.answer == masked.answer
        kept = [word for word in piece(masked).split() if "[...]" not in word]
        assert set(kept) <= set(piece(plain).split())
    assert script.overlap(
        shared.Question("Lipid or fat: A lipid, not fatty.\nTrue or false?", "true", "Lipid or fat")
    ) == (pytest.approx(1 / 3))


def test_overlap_alone_beats_chance_unless_masked():
    for masked, expected in ((False, 0.7), (True, 0.5)):
        train, test = (script.questions(part, masked) for part in ("train", "test"))
        cut = alignment.threshold(list(map(script.overlap, train)), [each.answer == "true" for each in train])
        statements, whole = script.table("overlap", "", test, list(map(script.overlap, test)), cut)
        if masked:
            assert statements["accuracy"] == expected
            assert whole["accuracy"] == 0
        else:
            assert statements["low"] > expected
            assert whole["low"] > whole["chance"]


def test_a_term_is_right_if_all_its_statements_are():
    asked = script.questions("test")
    truth = [1.0 if each.answer == "true" else -1.0 for each in asked]
    terms = list(dict.fromkeys(each.group for each in asked))
    wrong = asked.index(next(each for each in asked if each.group == terms[3]))
    scores = [-score if at == wrong else score for at, score in enumerate(truth)]
    statements, whole = script.table("made up", "", asked, scores, 0.0)
    assert statements["accuracy"] == 1 - 1 / len(asked)
    assert whole["accuracy"] == 1 - 1 / len(terms)
    assert whole["n"] == len(terms)
    assert script.table("made up", "", asked, [-score for score in truth], 0.0)[1]["accuracy"] == 0
    # By chance: the share that random answers would reach, counted out over all answers of each term.
    reached = [1 / len(list(itertools.product((0, 1), repeat=n))) for n in Counter(e.group for e in asked).values()]
    assert whole["chance"] == pytest.approx(sum(reached) / len(reached))


def test_both_ways_agree(tmp_path):
    script.main(["--compare", "--steps", "2", "--limit", "2", "--batch", "2", "--out", str(tmp_path)])
    tables, notes = parts(tmp_path)
    apart = notes["Training on the answers"].split("differ by at most ")[1].split(" ")[0]
    assert float(apart) < 1e-5
    assert notes["8 questions, one prefill each"].startswith("Answers equal: 8 of 8;")
    rows = tables["True or false, 8 statements about 2 terms"]
    assert [(row["method"], row["of"], row["n"]) for row in rows] == [
        ("model", "statements", "8"),
        ("model", "terms", "2"),
        ("overlap of words", "statements", "8"),
        ("overlap of words", "terms", "2"),
    ]
    assert (tmp_path / "true_false.png").stat().st_size > 1000


def test_stock_never_calls_the_accelerator(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("accelerated")

    monkeypatch.setattr("omnigene_fast.accelerate", refuse)
    arguments = ["--steps", "1", "--limit", "2", "--batch", "2", "--out", str(tmp_path)]
    script.main([*arguments, "--stock"])
    assert [row["way"] for row in parts(tmp_path)[0]["Training on the answers"]] == ["stock"]
    with pytest.raises(AssertionError, match="accelerated"):
        script.main(arguments)


def test_one_term_has_no_distractor(tmp_path):
    with pytest.raises(ValueError, match=r"^--limit: expected at least 2 terms"):
        script.main(["--limit", "1", "--out", str(tmp_path)])
