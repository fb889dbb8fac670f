"""Single documents, pair by pair."""

import importlib

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from omnigene_fast import analysis
from omnigene_fast.bench.simulations.world import World
from omnigene_fast.tracing.records import Records

from .synthetic import Memory, doc_ids, documents, from_records, skewed


def with_ids(ids, table, **more):
    """The run of documents of n tokens each, ids [D, n, L, K]."""
    D, n, L, K = ids.shape
    doc, pos = np.repeat(doc_ids(D), n).astype(np.int64), np.tile(np.arange(n), D).astype(np.int32)
    flat = ids.transpose(2, 0, 1, 3).reshape(L, D * n, K).astype(np.uint8)
    records = Records(doc, pos, np.zeros(D * n, np.int32), np.zeros(D * n, np.uint8), flat)
    run = from_records(records, table["task"].tolist(), more.pop("experts"))
    run.documents = table
    return run


def paired(rng, pairs=40, tokens=30, experts=16, top_k=2, like=1.0, apart=0.0, tasks=2):
    """Two documents a pair with experts of a common direction; `like`: its strength; `apart`: that of the task."""
    base = skewed(rng, 1, 1, experts)
    task = np.repeat(rng.standard_normal((tasks, 1, 1, experts)), pairs // tasks, 0)
    own = like * rng.standard_normal((pairs, 1, 1, experts))
    p = np.repeat(base * np.exp(apart * task + own), 2, 1).reshape(2 * pairs, 1, experts)
    p /= p.sum(-1, keepdims=True)
    # picks of a token are distinct: Gumbel top-k
    scores = np.log(p)[:, None] + rng.gumbel(size=(2 * pairs, tokens, 1, experts))
    ids = np.argsort(-scores, -1)[..., :top_k]
    table = documents(np.repeat([f"t{t}" for t in range(tasks)], 2 * pairs // tasks), [tokens] * (2 * pairs))
    return with_ids(ids, table.assign(pair=np.repeat([f"p{i}" for i in range(pairs)], 2)), experts=experts)


def test_mean_over_pairs_is_scipys():
    run = paired(np.random.default_rng(0))
    table = analysis.pairwise(run, permutations=50, cross=10**6).set_index("kind")
    share = run.counts[:, 0] / run.counts[:, 0].sum(-1, keepdims=True)
    assert table.loc["pair", "js"] == pytest.approx(np.mean(jensenshannon(share[::2], share[1::2], axis=1) ** 2))
    cross = [jensenshannon(a, b) ** 2 for a in share[:40] for b in share[40:]]
    assert table.loc["cross", "js"] == pytest.approx(np.mean(cross))
    assert (table.loc["pair", "pairs"], table.loc["cross", "pairs"]) == (40, 1600)
    assert set(table["unit"]) == {"nats"}


def test_a_pair_of_equal_routing_is_at_the_floor_and_others_are_not():
    rng = np.random.default_rng(1)
    table = analysis.pairwise(paired(rng, pairs=200), permutations=200).set_index("kind")
    pair, cross = table.loc["pair"], table.loc["cross"]
    assert pair["js"] > 0.02  # of noise alone
    assert pair["low"] < 0 < pair["high"]
    assert pair["p_value"] < 0.02  # pairs are alike
    assert pair["js"] < 0.5 * pair["repaired"]
    assert cross["low"] > 0.05


def test_average_over_layers_goes_through_the_values_of_a_pair():
    """The interval is that of each pair's mean: layers of one document vary together."""
    rng = np.random.default_rng(11)
    run = paired(rng, pairs=30)
    twice = Memory(np.concatenate([run.counts, run.counts], 1), run.documents, run.top_k, run.records)
    twice.records.ids = np.concatenate([twice.records.ids] * 2)
    table = analysis.pairwise(twice, permutations=50, average=True)
    assert table["layer"].tolist() == [0, 0, 1, 1, "mean", "mean"]
    plain = analysis.pairwise(twice, permutations=50)
    assert plain.equals(table[table["layer"] != "mean"].astype({"layer": int}))
    for kind, rows in table.groupby("kind"):
        first, mean = rows.iloc[0], rows.iloc[-1]
        assert mean["js"] == pytest.approx(rows["js"][:-1].mean()), kind
        assert mean["corrected"] == pytest.approx(rows["corrected"][:-1].mean())
        wide = [row["high"] - row["low"] for row in (first, mean)]
        assert wide[1] == pytest.approx(wide[0], rel=0.05)  # independent layers would give 0.71 of it
    assert mean["repaired"] == pytest.approx(rows["repaired"][:-1].mean())


def permuted_tokens(rng, experts, top_k, tokens, pairs):
    """Pairs of documents of one distribution, and their mean divergence when tokens are dealt out anew."""
    scores = rng.standard_normal(experts) + rng.gumbel(size=(pairs, 2 * tokens, experts))
    hot, ids = np.zeros(scores.shape, np.int32), np.argsort(-scores, -1)[..., :top_k]
    np.put_along_axis(hot, ids, 1, -1)
    dealt = []
    for _ in range(8):
        order = np.argsort(rng.random((pairs, 2 * tokens)), 1)
        moved = np.take_along_axis(hot, order[..., None], 1)
        p, q = (part.sum(1) / (top_k * tokens) for part in (moved[:, :tokens], moved[:, tokens:]))
        dealt.append(np.mean(jensenshannon(p, q, axis=1) ** 2))
    table = documents(["t"] * (2 * pairs), [tokens] * (2 * pairs))
    pair = np.repeat([f"p{i}" for i in range(pairs)], 2)
    run = with_ids(ids.reshape(2 * pairs, tokens, 1, top_k), table.assign(pair=pair), experts=experts)
    return run, np.mean(dealt)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(4, 1, 20), (4, 2, 20), (8, 2, 20), (16, 2, 30), (64, 8, 30)])
def test_the_floor_is_that_of_permuted_tokens(experts, top_k, tokens):
    run, truth = permuted_tokens(np.random.default_rng(5), experts, top_k, tokens, 2000)
    row = analysis.pairwise(run, by=None, permutations=0).iloc[0]
    assert (row["floor_of"], row["floor"]) == ("stretches", pytest.approx(truth, rel=0.04))
    run.record = ()
    row = analysis.pairwise(run, by=None, permutations=0).iloc[0]
    assert (row["floor_of"], row["floor"]) == ("tokens", pytest.approx(truth, rel=0.025))


def test_intervals_of_nothing_hold_zero():
    """1,000 pairs of documents of the same distribution over 6 experts: a floor too low shows up here."""
    hits = []
    for seed in range(40):
        run, _ = permuted_tokens(np.random.default_rng([6, seed]), 6, 2, 20, 1000)
        row = analysis.pairwise(run, by=None, permutations=0, seed=seed).iloc[0]
        hits.append(row["low"] < 0 < row["high"])
    assert np.mean(hits) >= 0.85  # of 0.95, three standard errors


def test_more_pairs_than_permutations_are_re_paired_as_drawn(monkeypatch):
    """The cost is that of the pairs drawn, not of all pairs of documents, and the numbers are the same."""
    module, run = importlib.import_module("omnigene_fast.analysis.pairwise"), paired(np.random.default_rng(7), pairs=60)
    first, second = np.arange(0, 120, 2), np.arange(1, 120, 2)
    value, sizes, entropy = module._values(run, first, second), [], module.entropy
    pairs = module._Pairs("pair", first, second, first, first, ["all"] * 60, value)
    monkeypatch.setattr(module, "entropy", lambda p: sizes.append(len(p)) or entropy(p))
    monkeypatch.setattr(module, "chunk_rows", lambda elements: 7)

    def repaired(permutations):
        sizes.clear()
        found = module._repaired(run, pairs, permutations, np.random.default_rng(0))
        return found, sum(sizes)

    (few, cost), (many, every) = repaired(5), repaired(80)
    assert few == pytest.approx(many[:5])
    assert (cost, every) == (6 * 60, 61 * 60)
    assert max(sizes) == 7
    share = run.counts[:, 0] / run.counts[:, 0].sum(-1, keepdims=True)
    order = np.random.default_rng(0).permutation(60)
    assert few[0, 0] == pytest.approx(np.mean(jensenshannon(share[first], share[second][order], axis=1) ** 2))


def test_re_pairing_is_uniform_when_pairs_mean_nothing():
    rng = np.random.default_rng(2)
    found = [
        analysis.pairwise(paired(rng, pairs=20, like=0.0), by=None, permutations=99, seed=seed)["p_value"][0]
        for seed in range(200)
    ]
    assert 0.02 <= np.mean(np.array(found) <= 0.1) <= 0.17
    assert abs(np.mean(found) - 0.5) < 0.08


def test_fewer_tokens_raise_js_and_floor_together():
    rng = np.random.default_rng(3)
    few, many = (analysis.pairwise(paired(rng, 100, tokens), permutations=0, by=None).iloc[0] for tokens in (15, 150))
    assert few["js"] > 4 * many["js"]
    assert few["floor"] > 4 * many["floor"]
    assert abs(few["corrected"]) < 0.2 * few["js"]


def test_pairs_of_other_sizes_are_refused():
    run = paired(np.random.default_rng(4))
    run.documents.loc[0, "pair"] = "p1"
    with pytest.raises(ValueError, match="exactly two documents"):
        analysis.pairwise(run)
    run.documents["pair"] = None
    with pytest.raises(ValueError, match="got none"):
        analysis.pairwise(run)


def streams(rng, pairs, lengths, stays, alike=True):
    """A world of documents of token types, each of which repeats the one before with the probability `stays`."""
    world = World()
    tasks = [world.task(number, 0.0 if alike else 1.0) for number in range(2)]
    docs = []
    for number in range(2 * pairs):
        n = int(np.exp(rng.uniform(*np.log(lengths))))
        drawn = rng.choice(len(world.base), n, p=tasks[number % 2])
        last = np.maximum.accumulate(np.where(rng.random(n) < stays, 0, np.arange(n)))
        docs.append(drawn[last])
    return world.written(docs, pair=[f"p{number // 2}" for number in range(2 * pairs)], task=["t"] * (2 * pairs))


@pytest.mark.parametrize("stays", [0.0, 0.5, 0.9])
def test_stretches_of_one_stream_do_not_differ(stays):
    """Tokens that hang together are no difference of routing, with ids or without."""
    rng, above, alone = np.random.default_rng(12), [], []
    for _ in range(12):
        run = streams(rng, 40, (50, 800), stays)
        row = analysis.pairwise(run, by=None, permutations=0, average=True).iloc[-1]
        above.append(row["low"] > 0)
        run.record = ()
        row = analysis.pairwise(run, by=None, permutations=0, average=True).iloc[-1]
        alone.append(row["low"] > 0)
    assert np.mean(above) <= 0.2
    assert np.mean(alone) <= 0.2
    assert row["corrected"] > 0.02 or stays == 0  # of counts alone: too high


def test_streams_that_differ_are_told():
    row = analysis.pairwise(streams(np.random.default_rng(13), 40, (50, 800), 0.5, alike=False), by=None).iloc[-1]
    assert row["low"] > 0
