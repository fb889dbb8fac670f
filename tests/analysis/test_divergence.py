"""Divergences against scipy and the paper's own code, their tables, and what must not pass."""

import importlib
import itertools
import math
import time

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import false_discovery_control

from omnigene_fast import analysis
from omnigene_fast.analysis.groups import group
from omnigene_fast.analysis.null import null_mean

from .synthetic import Memory, dispersed, documents, skewed


def pairs_of_distributions(rng, sparse=0.3):
    for experts in (2, 8, 128, 512):
        for sharpness in (0.1, 1.0, 4.0):
            p, q = skewed(rng, 2, experts, sharpness=sharpness) * (rng.random((2, experts)) > sparse)
            if p.sum() and q.sum():
                yield p, q


def test_js_is_the_square_of_scipys_distance():
    for p, q in pairs_of_distributions(np.random.default_rng(0)):
        for base, logarithm in (("nats", math.e), ("bits", 2)):
            expected = jensenshannon(p, q, base=logarithm) ** 2
            assert analysis.js_divergence(p, q, base) == pytest.approx(expected, abs=1e-12)
            assert analysis.js_divergence(q, p, base) == pytest.approx(expected, abs=1e-12)
            root = math.sqrt(analysis.js_divergence(p, q, base))
            assert abs(root - expected) > 1e-3 or expected in (0, 1)  # control: the distance is another number


def test_js_of_disjoint_and_equal_distributions():
    assert analysis.js_divergence([1, 0], [0, 3]) == pytest.approx(math.log(2), abs=1e-15)
    assert analysis.js_divergence([1, 0], [0, 3], base="bits") == pytest.approx(1, abs=1e-15)
    assert analysis.js_divergence([1, 2, 0], [2, 4, 0]) == 0


def papers_js(p, q, eps=1e-10):
    """`js_div` of analysis/22-analyze_per_layer.py in maris205/omnigene4, restated."""
    p, q = (p + eps) / (p + eps).sum(), (q + eps) / (q + eps).sum()
    m = 0.5 * (p + q)
    return 0.5 * (np.sum(p * np.log(p / m)) + np.sum(q * np.log(q / m)))


def test_eps_gives_the_papers_formula():
    largest = 0.0
    for p, q in pairs_of_distributions(np.random.default_rng(1)):
        p, q = p / p.sum(), q / q.sum()
        assert analysis.js_divergence(p, q, eps=1e-10) == pytest.approx(papers_js(p, q), abs=1e-13)
        largest = max(largest, abs(analysis.js_divergence(p, q) - papers_js(p, q)))
    assert largest > 1e-10  # with unused experts the two differ


def test_generalized_js_of_two_is_js_and_is_bounded_by_ln_groups():
    rng = np.random.default_rng(2)
    p, q = skewed(rng, 2, 16)
    assert analysis.generalized_js([p, q]) == pytest.approx(analysis.js_divergence(p, q), abs=1e-14)
    assert analysis.generalized_js(np.eye(5)) == pytest.approx(math.log(5))
    w = np.array([0.2, 0.8])
    entropy = lambda x: -(x * np.log(x)).sum()  # noqa: E731
    expected = entropy(w @ [p, q]) - w @ [entropy(p), entropy(q)]
    assert analysis.generalized_js([p, q], weights=w) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("p", "q", "options", "message"),
    [
        ([0.5, 0.5], [1.0], {}, "shape"),
        ([0.5, -0.5], [1, 0], {}, "finite numbers"),
        ([0, 0], [1, 0], {}, "sum above 0"),
        ([math.nan, 1], [1, 0], {}, "finite"),
        ([[1, 0]], [1, 0], {}, "vector"),
        ([1, 0], [1, 0], {"base": "hartley"}, "nats"),
        ([1, 0], [1, 0], {"eps": -1}, "eps"),
    ],
)
def test_js_refuses(p, q, options, message):
    with pytest.raises(ValueError, match=message):
        analysis.js_divergence(p, q, **options)


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(3)
    shares = skewed(rng, 1, 3, 24) * np.exp(0.5 * rng.standard_normal((3, 3, 24)))
    made = dispersed(rng, shares / shares.sum(-1, keepdims=True), 9, 60, 4, 100)
    made.layers = [5, 6, 9]
    return made


def plain(run, a, b, layer, without=()):
    rows = [row for row in range(len(run.documents)) if row not in without]
    task = run.documents["task"].to_numpy()
    sums = [run.counts[[row for row in rows if task[row] == name], layer].sum(0) for name in (a, b)]
    return jensenshannon(*(s / s.sum() for s in sums)) ** 2


def test_divergence_against_scipy_and_a_written_out_jackknife(run):
    table = analysis.divergence(run, permutations=20)
    assert list(table["layer"].unique()) == [5, 6, 9]
    assert len(table) == 9
    for row in table.itertuples():
        layer = run.layers.index(row.layer)
        value = plain(run, row.a, row.b, layer)
        assert row.js == pytest.approx(value, abs=1e-12)
        bias, variance = 0.0, 0.0
        for name in (row.a, row.b):
            members = np.flatnonzero(run.documents["task"] == name)
            left = np.array([plain(run, row.a, row.b, layer, {m}) for m in members])
            bias += (len(members) - 1) * (left.mean() - value)
            variance += (len(members) - 1) / len(members) * ((left - left.mean()) ** 2).sum()
        assert row.corrected == pytest.approx(value - bias, abs=1e-10)
        assert 2.0 < (row.high - row.low) / 2 / math.sqrt(variance) < 2.4  # Student's t of 8 to 16 degrees of freedom
    assert (
        table["tokens_a"] == [run.documents["n_tokens"][run.documents["task"] == a].sum() for a in table["a"]]
    ).all()
    assert table["q_value"].to_numpy() == pytest.approx(false_discovery_control(table["p_value"]))


def test_units_scale_every_number(run):
    nats, bits = (analysis.divergence(run, permutations=30, base=base) for base in ("nats", "bits"))
    for column in ("js", "corrected", "low", "high", "floor", "floor_95"):
        assert bits[column].to_numpy() == pytest.approx(nats[column].to_numpy() / math.log(2))
    assert (bits["p_value"] == nats["p_value"]).all()
    assert set(bits["unit"]) == {"bits"}


def test_summary_and_differentiation_are_means_of_values(run):
    table = analysis.divergence(run, permutations=40)
    summary = analysis.divergence_summary(run, permutations=40).set_index(["a", "b"])
    for pair, part in table.groupby(["a", "b"]):
        for column in ("js", "corrected", "floor"):
            assert summary.loc[pair, column] == pytest.approx(part[column].mean())
    whole = analysis.differentiation(run, permutations=40).set_index("layer")
    assert list(whole.index) == [5, 6, 9, "mean"]
    for layer, part in table.groupby("layer"):
        assert whole.loc[layer, "js"] == pytest.approx(part["js"].mean())
        assert whole.loc[layer, "corrected"] == pytest.approx(part["corrected"].mean())
    for column in ("js", "corrected", "floor", "generalized_js"):
        assert whole.loc["mean", column] == pytest.approx(whole.loc[[5, 6, 9], column].mean())
    sums = np.stack(
        [run.counts[run.documents["task"] == name, 0].sum(0) for name in sorted(run.documents["task"].unique())]
    )
    assert whole.loc[5, "generalized_js"] == pytest.approx(analysis.generalized_js(sums))


def test_both_tables_come_of_one_set_of_worlds(run, monkeypatch):
    expected = [measure(run, permutations=30, seed=4) for measure in (analysis.divergence, analysis.divergence_summary)]
    module, drawn, deleted = importlib.import_module("omnigene_fast.analysis.divergence"), [], []
    null, left = module.null_mean, module.deleted_pairs
    monkeypatch.setattr(module, "null_mean", lambda groups, *more: drawn.append(more[0]) or null(groups, *more))
    monkeypatch.setattr(module, "deleted_pairs", lambda groups: deleted.append(1) or left(groups))
    for one, other in zip(expected, analysis.divergence_tables(run, permutations=30, seed=4), strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert drawn == [(0, 1), (0, 2), (1, 2)]
    assert len(deleted) == 1
    analysis.decompose(run, run, run, permutations=0)
    assert len(deleted) == 4  # once for each run, in both conventions


def test_a_mean_of_distributions_is_another_number(run):
    """Expert ids of different layers are not comparable: averaging distributions over layers first must not agree."""
    averaged = Memory(run.counts.sum(1, keepdims=True), run.documents, run.top_k)
    wrong = analysis.divergence_summary(averaged, permutations=0)["js"]
    assert (abs(wrong - analysis.divergence_summary(run, permutations=0)["js"]) > 1e-3).all()


def test_permuted_labels_give_another_result(run):
    shuffled = Memory(run.counts, run.documents.copy(), run.top_k, layers=run.layers)
    shuffled.documents["task"] = np.random.default_rng(4).permutation(run.documents["task"].to_numpy())
    true, false = (analysis.differentiation(one, permutations=200).iloc[-1] for one in (run, shuffled))
    assert true["corrected"] > 3 * false["corrected"]
    assert true["p_value"] < 0.01 < false["p_value"]


def test_order_of_documents_does_not_matter(run):
    order = np.random.default_rng(5).permutation(len(run.documents))
    moved = Memory(run.counts[order], run.documents.iloc[order].reset_index(drop=True), run.top_k, layers=run.layers)
    columns = ["js", "corrected", "low", "high"]
    one, other = (analysis.divergence(r, permutations=0)[columns].to_numpy() for r in (run, moved))
    assert one == pytest.approx(other, abs=1e-12)


def test_a_group_of_one_document_has_no_interval(run):
    few = run.documents.copy()
    few.loc[few.index[1:9], "task"] = None
    table = analysis.divergence(Memory(run.counts, few, run.top_k, layers=run.layers), permutations=10)
    alone = table["docs_a"] == 1
    assert alone.any()
    assert table[alone][["corrected", "low", "high"]].isna().all(axis=None)
    assert table[~alone][["corrected", "low", "high"]].notna().all(axis=None)
    assert table["js"].notna().all()


def test_what_divergence_refuses(run):
    with pytest.raises(ValueError, match=r"labels \['task'\]"):
        analysis.divergence(run, by="family")
    with pytest.raises(ValueError, match="at least 2 values"):
        analysis.divergence(Memory(run.counts, run.documents.assign(task="one"), run.top_k))
    with pytest.raises(ValueError, match="permutations"):
        analysis.divergence(run, permutations=-1)
    empty = run.counts.copy()
    empty[run.documents["task"] == "task01", 1] = 0
    with pytest.raises(ValueError, match=r"none of 'task01' in layer 6"):
        analysis.divergence(Memory(empty, run.documents, run.top_k, layers=run.layers))


@pytest.mark.parametrize("scale", [1, 1 << 22])
def test_the_null_against_one_written_out(scale):
    """Every document departs from the pooled shares as it did, to either side; also beyond float32's integers."""
    counts = np.array([[[40, 8, 2]], [[18, 5, 7]], [[30, 20, 10]], [[9, 1, 0]], [[50, 3, 7]]]) * scale
    run = Memory(counts, documents(list("aabbb"), counts.sum((1, 2))), 1)
    groups = group(run, "task", minimum=2)
    null = null_mean(groups, (0, 1), 4000, [3])[:, 0]
    total, pooled = counts.sum(), counts.sum(0)[0] / counts.sum()
    values = []
    for sides in itertools.product((-1, 1), repeat=5):
        shares = []
        for rows in ((0, 1), (2, 3, 4)):
            share = pooled.copy()
            for d in rows:
                n = counts[d].sum()
                departure = (counts[d, 0] - n * pooled) / (1 - n / total) ** 0.25
                share += sides[d] * departure / counts[list(rows)].sum()
            shares.append(np.maximum(share, 0))
        values.append(analysis.js_divergence(*shares))
    assert null.mean() == pytest.approx(np.mean(values), rel=0.05)
    seen = np.unique(null.round(12))
    assert all(np.abs(seen - value).min() < 1e-9 for value in values)
    assert all(np.abs(np.array(values) - value).min() < 1e-9 for value in seen)


def test_documents_of_other_lengths_and_dispersions_are_no_difference():
    """Groups of one expected routing: 8 worlds of 60 may be called different at 0.05, and a permutation of labels would
    call most of them so."""
    rng = np.random.default_rng(8)
    shares = np.repeat(skewed(rng, 1, 2, 32), 2, 0)
    different = permuted = 0
    for seed in range(60):
        parts = [
            dispersed(np.random.default_rng([seed, g]), shares[:1], docs, tokens, 4, 2000)
            for g, (docs, tokens) in enumerate(((5, 20), (60, 900)))
        ]
        counts = np.concatenate([part.counts for part in parts])
        run = Memory(counts, documents(["a"] * 5 + ["b"] * 60, counts.sum((1, 2)) // 8), 4)
        summary = analysis.divergence_summary(run, permutations=99, seed=seed).iloc[0]
        different += summary["p_value"] <= 0.05
        draw = np.random.default_rng(seed)
        drawn = [_mean_js(counts, draw.permutation(65)[:5]) for _ in range(99)]
        permuted += (1 + np.sum(np.array(drawn) >= summary["js"] - 1e-12)) / 100 <= 0.05
    print(f"called different: {different} of 60, by permutations {permuted}")
    assert different <= 8
    assert permuted > 30


def _mean_js(counts, chosen):
    first = counts[chosen].sum(0)
    return np.mean([analysis.js_divergence(p, q) for p, q in zip(first, counts.sum(0) - first, strict=True)])


def test_full_size_takes_seconds():
    rng = np.random.default_rng(6)
    shares = skewed(rng, 12, 30, 128)
    run = dispersed(rng, shares, 50, 200, 8, 300)
    start = time.process_time()
    table = analysis.divergence(run)
    spent = time.process_time() - start
    print(f"30 layers x 66 pairs x 1,000 permutations of 600 documents: {spent:.1f} s of CPU")
    assert len(table) == 30 * 66
    assert spent < 60


def test_copies_of_a_text_are_one_document(caplog):
    rng = np.random.default_rng(9)
    run = dispersed(rng, skewed(rng, 2, 2, 16), 6, 60, 4, 60)
    run.documents["text_hash"] = [f"{row:016x}" for row in range(12)]
    copied = Memory(np.repeat(run.counts, 5, 0), run.documents.loc[np.repeat(np.arange(12), 5)], run.top_k)
    copied.documents = copied.documents.reset_index(drop=True).assign(doc_id=np.arange(60))
    columns = ["js", "corrected", "low", "high", "docs_a", "floor", "p_value"]
    once, five = (analysis.divergence(one, permutations=50)[columns] for one in (run, copied))
    assert five.to_numpy(float) == pytest.approx(once.to_numpy(float))
    assert "48 documents of run 'memory' are copies of a text" in caplog.text
    copied.documents["text_hash"] = None  # nothing says that they are copies
    apart = analysis.divergence(copied, permutations=0)
    assert ((apart["high"] - apart["low"]) < 0.6 * (once["high"] - once["low"])).all()
    assert (analysis.load(copied)["docs"] == 30).all()
