"""Runs seen with other weights: documents that count the same, groups that have the same tokens."""

import numpy as np
import pytest
from click.testing import CliRunner

from omnigene_fast import analysis

from .synthetic import Memory, documents, from_records, routed


def worlds(rng, docs=20, apart=1.0, moved=0.0, vocabulary=40):
    """Two groups with other token frequencies (`apart`); in the second a share of the tokens has other experts."""
    run = routed(rng, docs=docs, tokens=60, layers=2, vocabulary=vocabulary, skew=2.0)
    records, rows = run.records, (run.records.doc - 1000) // 7
    task = rows % 2
    frequency = np.exp(apart * np.random.default_rng(9).standard_normal((2, vocabulary)))
    frequency /= frequency.sum(-1, keepdims=True)
    taste = 2.0 * np.random.default_rng(10).standard_normal((vocabulary, 2, run.num_experts))
    other = 2.0 * np.random.default_rng(11).standard_normal(taste.shape)
    for group in range(2):
        mine = np.flatnonzero(task == group)
        records.token[mine] = rng.choice(vocabulary, len(mine), p=frequency[group])
    score = taste[records.token]
    changed = (task == 1) & (records.token < moved * vocabulary)
    score[changed] = other[records.token[changed]]
    score = score.transpose(1, 0, 2) + rng.gumbel(size=(2, len(records), run.num_experts))
    records.ids = np.argsort(-score, -1)[..., : run.top_k].astype(np.uint8)
    return from_records(records, [f"task{row % 2}" for row in range(docs)], run.num_experts)


def test_documents_of_equal_weight_have_the_mean_of_their_shares():
    counts = np.array([[[30, 10]], [[0, 4]], [[3, 1]], [[1, 1]]], np.int32)
    run = Memory(counts, documents(["a", "a", "b", "b"], [40, 4, 4, 2]), 1)
    equal = analysis.equal_weights(run)
    share = analysis.specialty(equal).query("group == 'a'")["share"].tolist()
    assert share == pytest.approx([0.375, 0.625])
    assert analysis.specialty(run).query("group == 'a'")["share"].tolist() == pytest.approx([30 / 44, 14 / 44])
    assert analysis.load(equal)["picks"].tolist() == [44, 6]
    js = analysis.divergence(equal, permutations=0)["js"][0]
    assert js == pytest.approx(analysis.js_divergence([0.375, 0.625], [0.625, 0.375]))


def test_the_report_says_what_gives_a_document_its_weight(tmp_path):
    from .test_report import audited

    run, few = audited(), {"permutations": 9, "progress": False}
    pooled = analysis.report(run, tmp_path / "a.html", **few).read_text()
    equal = analysis.report(analysis.equal_weights(run), tmp_path / "b.html", **few).read_text()
    assert "pooled by their tokens" in pooled
    assert "equal weights" not in pooled
    assert "have equal weights, however long" in equal
    with pytest.raises(ValueError, match="equal_weights of all runs or of none"):
        analysis.report([run, analysis.equal_weights(run)], tmp_path / "c.html", **few)


def test_given_the_token_is_a_mean_over_tokens_with_the_same_weights():
    run = worlds(np.random.default_rng(0))
    view = analysis.given_tokens(run)
    token, task = run.records.token, (run.records.doc - 1000) // 7 % 2
    docs = (run.records.doc - 1000) // 7
    shared = [v for v in range(40) if all(len(set(docs[(token == v) & (task == g)])) >= 2 for g in range(2))]
    every = [np.isin(token, shared) & (task == g) for g in range(2)]
    weight = np.mean([[(token[one] == v).mean() for v in shared] for one in every], 0)
    for layer in range(2):
        expected = []
        for one in every:
            rows = [np.bincount(run.records.ids[layer][one & (token == v)].ravel(), minlength=12) for v in shared]
            expected.append(weight @ np.array([row / row.sum() for row in rows]))
        shares = analysis.specialty(view).query(f"layer == {layer}")["share"].to_numpy().reshape(2, -1)
        assert shares == pytest.approx(np.array(expected))
    assert view.kept == pytest.approx(np.isin(token, shared).mean())


def test_other_tokens_make_no_difference_given_the_token_and_another_router_does():
    alike, plain, found = [], [], []
    for seed in range(30):
        rng = np.random.default_rng([1, seed])
        run = worlds(rng, docs=16)
        plain.append(analysis.differentiation(run, permutations=99).iloc[-1]["p_value"])
        row = analysis.differentiation(analysis.given_tokens(run), permutations=99).iloc[-1]
        alike.append((row["p_value"] <= 0.05, row["low"] <= 0 <= row["high"]))
        moved = worlds(rng, docs=16, moved=0.5)
        found.append(analysis.differentiation(analysis.given_tokens(moved), permutations=99).iloc[-1]["p_value"])
    assert np.mean(plain) <= 0.05
    level, inside = np.mean(alike, 0)
    assert level <= 0.17  # of 0.05, three standard errors
    assert inside >= 0.8
    assert np.mean(np.array(found) <= 0.05) > 0.9


def test_routing_that_the_token_decides_leaves_nothing():
    run = worlds(np.random.default_rng(2))
    run.records.ids[:] = (run.records.token[None, :, None] + np.arange(3)) % 12
    run = from_records(run.records, run.documents["task"].tolist(), 12)
    row = analysis.differentiation(analysis.given_tokens(run), permutations=19).iloc[-1]
    assert row["js"] == pytest.approx(0, abs=1e-12)
    assert row["p_value"] == 1
    assert analysis.differentiation(run, permutations=0)["js"].iloc[-1] > 0.01


def test_given_position_too():
    run = worlds(np.random.default_rng(3), docs=40, vocabulary=5)
    run.records.token[:] = 0
    run.records.ids[:] = np.where(run.records.pos[None, :, None] < 4, np.arange(3), 3 + np.arange(3))
    late = ((run.records.doc - 1000) // 7 % 2 == 1) & (run.records.pos < 4)
    run.records = run.records.take(~late | (run.records.pos == 3))
    run = from_records(run.records, run.documents["task"].tolist(), 12)
    for position, low, high in ((False, 0.001, 1), (True, -1e-9, 1e-9)):
        view = analysis.given_tokens(run, position=position)
        assert low <= analysis.differentiation(view, permutations=0)["js"].iloc[-1] <= high


def test_what_given_tokens_refuses():
    run = worlds(np.random.default_rng(4))
    view = analysis.given_tokens(run)
    with pytest.raises(ValueError, match="the label 'task' of given_tokens, got None"):
        analysis.load(view, by=None)
    for other in (view, analysis.equal_weights(run)):
        with pytest.raises(ValueError, match="a view of it"):
            analysis.given_tokens(other)
    run.records.token[:] = (run.records.doc - 1000) // 7 % 2
    with pytest.raises(ValueError, match="no tokens in common"):
        analysis.given_tokens(run)
    run.records.token[:] = -1
    with pytest.raises(ValueError, match="expected tokens"):
        analysis.given_tokens(run)


def test_the_command_line_takes_weights(tmp_path):
    from omnigene_fast.cli import main

    for verb in ("report", "decompose"):
        assert "--weights" in CliRunner().invoke(main, [verb, "--help"]).output
