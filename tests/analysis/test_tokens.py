"""Measures of tokens against brute force, on runs cut into shards at every place."""

import gc
import importlib
import tracemalloc
from collections import Counter
from itertools import combinations, pairwise, permutations

import numpy as np
import pandas as pd
import pytest

from omnigene_fast import analysis
from omnigene_fast.analysis.tokens import whole_documents

from .synthetic import Memory, from_records, routed


@pytest.fixture(scope="module", params=[10**9, 17])
def run(request):
    made = routed(np.random.default_rng(0), docs=7, layers=3)
    made.layers, made.shard = [2, 3, 11], request.param
    return made


def tokens_of(run, layer):
    """Per token: (document, position, token id, list of experts)."""
    part, at = run.records, run.layers.index(layer)
    return [
        (int(d), int(p), int(t), ids.tolist())
        for d, p, t, ids in zip(part.doc, part.pos, part.token, part.ids[at], strict=True)
    ]


def test_bug_32_coactivation_counts_every_pair(run):
    """OLMoE's script went over neighbouring picks only, 7 of the 28 pairs of a token.

    https://github.com/allenai/OLMoE/blob/main/scripts/run_moe_analysis.py (`do_correlation_analysis`)
    """
    counts = analysis.coactivation_counts(run)
    for at, layer in enumerate(run.layers):
        brute, neighbours = np.zeros((2, run.num_experts, run.num_experts), int)
        for _, _, _, ids in tokens_of(run, layer):
            for a, b in permutations(ids, 2):
                brute[a, b] += 1
            for a in ids:
                brute[a, a] += 1
            for a, b in pairwise(ids):
                neighbours[a, b] += 1
                neighbours[b, a] += 1
        assert (counts[at] == brute).all()
        off = ~np.eye(run.num_experts, dtype=bool)
        assert counts[at][off].sum() == len(run.records) * 6  # K (K - 1) ordered pairs of K = 3
        assert (counts[at][off] != neighbours[off]).any()


def test_coactivation_table(run):
    table = analysis.coactivation(run, top=None)
    n, counts = len(run.records), analysis.coactivation_counts(run)
    assert len(table) == 3 * 12 * 11 // 2
    for row in table.itertuples():
        both = counts[run.layers.index(row.layer)]
        assert row.tokens == both[row.a, row.b]
        assert row.coactivation_ab == pytest.approx(both[row.a, row.b] / both[row.a, row.a])
        assert row.coactivation_ba == pytest.approx(both[row.a, row.b] / both[row.b, row.b])
        assert row.lift == pytest.approx(both[row.a, row.b] * n / (both[row.a, row.a] * both[row.b, row.b]))
    few = analysis.coactivation(run, top=4)
    assert (few.groupby("layer").size() == 4).all()
    assert (few["lift_choice"] > few["lift_uniform"]).all()


def test_lift_of_even_independent_routing_is_as_stated():
    rng = np.random.default_rng(1)
    even = routed(rng, docs=20, tokens=200, layers=1, experts=8, skew=0.0)
    table = analysis.coactivation(even, top=None)
    assert table["lift_uniform"].iloc[0] == pytest.approx(2 * 8 / (3 * 7))
    assert table["lift"].mean() == pytest.approx(table["lift_uniform"].iloc[0], rel=0.01)
    inside = ((table["lift_low"] <= table["lift_uniform"]) & (table["lift_uniform"] <= table["lift_high"])).mean()
    assert inside > 0.8


def test_flow_against_brute_force(run):
    counts = analysis.flow_counts(run)
    table = analysis.flow(run, top=None)
    n = len(run.records)
    for at, (first, second) in enumerate(zip(run.layers[:-1], run.layers[1:], strict=True)):
        brute = np.zeros((run.num_experts, run.num_experts), int)
        before, after = np.zeros((2, run.num_experts))
        for one, other in zip(tokens_of(run, first), tokens_of(run, second), strict=True):
            for a in one[3]:
                before[a] += 1
                for b in other[3]:
                    brute[a, b] += 1
            for b in other[3]:
                after[b] += 1
        assert (counts[at] == brute).all()
        part = table[table["layer"] == first]
        assert set(part["next_layer"]) == {second}
        grid = np.full(brute.shape, np.nan)
        grid[part["expert"], part["next_expert"]] = part["probability"]
        assert grid == pytest.approx(brute / before[:, None])
        assert np.nansum(grid, 1)[before > 0] == pytest.approx(run.top_k)
        assert part["expected"].to_numpy() == pytest.approx((after / n)[part["next_expert"]])
        assert part["lift"].to_numpy() == pytest.approx((part["probability"] / part["expected"]).to_numpy())
    with pytest.raises(ValueError, match="at least two"):
        analysis.flow(run, layers=[3])


@pytest.mark.parametrize("measure", [analysis.flow, analysis.coactivation])
def test_the_largest_of_many_are_measured_where_they_were_not_chosen(measure):
    """Even, independent picks: the half that chose says otherwise, the other half does not."""
    table = measure(routed(np.random.default_rng(3), docs=40, tokens=100, experts=32, skew=0.0))
    null = table.get("lift_uniform", 1.0)
    assert (table["lift_choice"] > 1.1 * null).mean() > 0.95
    assert ((table["lift_low"] <= null) & (null <= table["lift_high"])).mean() > 0.9
    assert abs((table["lift"] / null).mean() - 1) < 0.05


def test_copies_of_a_text_choose_nothing_for_each_other():
    run = routed(np.random.default_rng(4), docs=12, experts=32, skew=0.0)
    run.documents["text_hash"] = ["a", "b"] + ["c"] * 10
    module = importlib.import_module("omnigene_fast.analysis.coactivation")
    assert len(np.unique(module._originals(run))) == 3
    few = analysis.flow(routed(np.random.default_rng(4), docs=3))
    assert few["lift_low"].isna().all()
    assert few["p_value"].isna().all()


def test_layers_out_of_order_give_another_flow(run):
    records = run.records.take(slice(None))
    records.ids = records.ids[[1, 0, 2]]
    swapped = Memory(run.counts[:, [1, 0, 2]], run.documents, run.top_k, records, layers=[3, 2, 11])
    assert (analysis.flow_counts(swapped)[0] == analysis.flow_counts(run)[0].T).all()
    assert (analysis.flow_counts(swapped)[0] != analysis.flow_counts(run)[0]).any()


def test_locality_against_brute_force(run):
    table = analysis.locality(run).set_index(["layer", "measure"])
    for layer in run.layers:
        by_document = {}
        for doc, pos, _, ids in tokens_of(run, layer):
            by_document.setdefault(doc, {})[pos] = ids
        seen, shuffled, pairs = Counter(), Counter(), 0
        for tokens in by_document.values():
            ordered = [tokens[pos] for pos in sorted(tokens)]
            n = len(ordered)
            pairs += n - 1
            for measure, alike in {
                "first": lambda a, b: a[0] == b[0],
                "any": lambda a, b: bool(set(a) & set(b)),
                "overlap": lambda a, b: len(set(a) & set(b)) / len(a),
            }.items():
                seen[measure] += sum(alike(a, b) for a, b in pairwise(ordered))
                shuffled[measure] += (n - 1) * np.mean([alike(a, b) for a, b in permutations(ordered, 2)])
        for measure in seen:
            row = table.loc[(layer, measure)]
            assert row["value"] == pytest.approx(seen[measure] / pairs)
            assert row["expected"] == pytest.approx(shuffled[measure] / pairs)
            assert row["excess"] == pytest.approx(row["value"] - row["expected"])
            assert row["pairs"] == pairs


def test_locality_sees_repetition_and_only_that():
    rng = np.random.default_rng(2)
    made = routed(rng, docs=30, tokens=60, skew=0.0)
    plain = analysis.locality(made, by="task")
    assert set(plain["group"]) == {"task0", "task1"}
    assert ((plain["excess_low"] < 0) & (plain["excess_high"] > 0)).mean() > 0.7
    order = np.lexsort((made.records.ids[0, :, 0], made.records.doc))  # like tokens beside each other
    records = made.records.take(order)
    records.pos = made.records.pos
    sticky = analysis.locality(from_records(records, list(made.documents["task"]), made.num_experts))
    first = sticky[(sticky["layer"] == 0) & (sticky["measure"] == "first")].iloc[0]
    assert first["excess_low"] > 0.3


def test_long_documents_are_sampled_closely():
    made = routed(np.random.default_rng(3), docs=2, tokens=3000, layers=1)
    table = analysis.locality(made).set_index("measure")
    ids = made.records.ids[0]
    exact = []
    for doc in made.documents["doc_id"]:
        sets = np.zeros((int((made.records.doc == doc).sum()), made.num_experts), np.float32)
        np.put_along_axis(sets, ids[made.records.doc == doc].astype(int), 1, 1)
        n = len(sets)
        exact.append((((sets @ sets.T > 0).sum() - n) / (n * (n - 1)), n - 1))
    assert table.loc["any", "expected"] == pytest.approx(
        np.average([share for share, _ in exact], weights=[n for _, n in exact]), abs=0.01
    )


def test_vocabulary_against_brute_force(run):
    for k in (1, 3):
        table = analysis.vocabulary(run, k=k, min_count=20)
        summary = analysis.vocabulary_summary(run, k=k, min_count=20).set_index("layer")
        for layer in run.layers:
            picks, occurrences, docs = {}, Counter(), {}
            for doc, _, token, ids in tokens_of(run, layer):
                picks.setdefault(token, Counter()).update(ids[:k])
                occurrences[token] += 1
                docs.setdefault(token, set()).add(doc)
            part = table[table["layer"] == layer].set_index("token_id")
            often = [token for token, n in occurrences.items() if n >= 20]
            assert sorted(part.index) == sorted(often)
            for token in often:
                row, best = part.loc[token], max(picks[token].values())
                assert row["specialisation"] == pytest.approx(best / occurrences[token])
                assert picks[token][row["expert"]] == best
                assert (row["count"], row["docs"]) == (occurrences[token], len(docs[token]))
            assert summary.loc[layer, "specialisation"] == pytest.approx(part["specialisation"].mean())
            agree, chance = brute_agreement(tokens_of(run, layer), k)
            assert summary.loc[layer, "agreement"] == pytest.approx(agree)
            assert summary.loc[layer, "chance"] == pytest.approx(chance)


def test_agreement_of_nothing_is_unknown():
    """One document, and documents without a token id in common: no pair of occurrences to compare."""
    alone = routed(np.random.default_rng(6), docs=1, tasks=1)
    row = analysis.vocabulary_summary(alone, min_count=1).iloc[0]
    assert row[["agreement", "low", "high", "chance"]].astype(float).isna().all()
    assert 0 < row["specialisation"] <= 1
    apart = routed(np.random.default_rng(7), docs=3)
    apart.records.token = apart.records.token + (100 * apart.records.doc).astype(np.int32)
    row = analysis.vocabulary_summary(apart, min_count=1).iloc[0]
    assert row[["agreement", "low", "high"]].astype(float).isna().all()
    assert 0 < row["chance"] < 1


def brute_agreement(tokens, k):
    same, pairs, any_same, any_pairs = 0, 0, 0, 0
    for one, other in combinations(tokens, 2):
        if one[0] != other[0]:
            equal = sum(a == b for a in one[3][:k] for b in other[3][:k])
            any_same, any_pairs = any_same + equal, any_pairs + k * k
            if one[2] == other[2]:
                same, pairs = same + equal, pairs + k * k
    return same / pairs, any_same / any_pairs


def test_agreement_does_not_grow_when_occurrences_get_fewer():
    """OLMoE's mean of largest shares does, on routing that the token id has nothing to do with."""
    rng = np.random.default_rng(4)
    made = routed(rng, docs=20, tokens=40, layers=1, vocabulary=200, skew=0.0)
    row = analysis.vocabulary_summary(made, min_count=2).iloc[0]
    assert row["specialisation"] > 3 / 12
    assert row["agreement"] == pytest.approx(row["chance"], abs=0.02)
    assert row["low"] < row["chance"] < row["high"]
    with pytest.raises(ValueError, match="k: expected"):
        analysis.vocabulary(made, k=4)


def replayed(run, change):
    """The same tokens with altered ids."""
    records = run.records.take(slice(None))
    records.ids = records.ids.copy()
    change(records.ids)
    return from_records(records, list(run.documents["task"]), run.num_experts, layers=run.layers, shard=run.shard)


def test_replay_distance_of_known_changes(run):
    n = len(run.records)

    def change(ids):
        ids[0, :10] = ids[0, :10, ::-1]  # another order
        for token in range(5):  # one other expert in layer 1
            ids[1, token, 2] = next(e for e in range(12) if e not in ids[1, token])

    table = analysis.replay_distance(run, replayed(run, change)).set_index("layer")
    assert list(table["differing"]) == pytest.approx([0, 5 / n, 0])
    assert list(table["reordered"]) == pytest.approx([10 / n, 0, 0])
    assert table.loc[3, "jaccard"] == pytest.approx(1 - 5 / n * (1 - 2 / 4))
    assert table.loc[2, "jaccard"] == 1


def test_replay_matches_by_document_and_position(run):
    """The same tokens stored in another order are the same run; shifted by one position they are not."""
    order = np.random.default_rng(5).permutation(len(run.records))
    stored = Memory(run.counts, run.documents, run.top_k, run.records.take(order), layers=run.layers, shard=run.shard)
    assert (analysis.replay_distance(run, stored)["differing"] == 0).all()
    shifted = replayed(run, lambda ids: ids.__setitem__(slice(None), np.roll(ids, 1, axis=1)))
    assert (analysis.replay_distance(run, shifted)["differing"] > 0.5).all()


def test_saturation_against_brute_force(run):
    other = replayed(run, lambda ids: ids.__setitem__(slice(None), np.roll(ids, 3, axis=1)))
    table = analysis.saturation(run, other).set_index("layer")
    for layer in run.layers:
        pairs = list(zip(tokens_of(run, layer), tokens_of(other, layer), strict=True))
        shares = [len(set(a[3]) & set(b[3])) / 3 for a, b in pairs]
        assert table.loc[layer, "saturation"] == pytest.approx(np.mean(shares))
        assert table.loc[layer, "top1"] == pytest.approx(np.mean([a[3][0] == b[3][0] for a, b in pairs]))
        independent = np.mean([len(set(a[3]) & set(b[3])) / 3 for a, _ in pairs for _, b in pairs])
        assert table.loc[layer, "expected"] == pytest.approx(independent)
    assert (analysis.saturation(run, run)["saturation"] == 1).all()


def test_runs_of_other_tokens_are_refused(run):
    fewer = from_records(run.records.take(slice(0, -1)), list(run.documents["task"]), 12, layers=run.layers)
    with pytest.raises(ValueError, match="by doc_id and position"):
        analysis.replay_distance(run, fewer)
    renamed = replayed(run, lambda ids: None)
    renamed.records.token = renamed.records.token + 1
    with pytest.raises(ValueError, match="token ids"):
        analysis.saturation(run, renamed)
    with pytest.raises(ValueError, match="layers: expected"):
        analysis.saturation(run, Memory(run.counts, run.documents, 3, run.records, layers=[1, 2, 3]))


def test_replay_sorts_once_and_compares_in_slices(run, monkeypatch):
    """However many passes the layers take, documents and positions are read and sorted once for each run."""
    module = importlib.import_module("omnigene_fast.analysis.replay")
    other = replayed(run, lambda ids: ids.__setitem__(slice(None), np.roll(ids, 3, axis=1)))
    expected = [measure(run, other) for measure in (analysis.replay_distance, analysis.saturation)]
    sizes, orders, shared, lexsort = [], [], module.shared, np.lexsort
    monkeypatch.setattr(module, "shared", lambda a, b: sizes.append(len(a)) or shared(a, b))
    monkeypatch.setattr(module.np, "lexsort", lambda keys: orders.append(len(keys[0])) or lexsort(keys))
    monkeypatch.setattr(module, "BATCH", 50)
    monkeypatch.setattr("omnigene_fast.analysis.tokens._BYTES", 1)
    monkeypatch.setattr(Memory, "batches", Memory.unsorted)
    found = [measure(run, other) for measure in (analysis.replay_distance, analysis.saturation)]
    for one, table in zip(expected, found, strict=True):
        pd.testing.assert_frame_equal(one, table)
    assert max(sizes) == 50
    assert orders == 4 * [len(run.records)]  # two measures of two runs


def test_replay_holds_what_its_budget_says(monkeypatch):
    """With room for one layer, no more than its ids and a few numbers a token are held at once."""
    made = routed(np.random.default_rng(8), docs=20, tokens=1000, layers=12, top_k=8, shard=1000)
    n = len(made.records)
    monkeypatch.setattr("omnigene_fast.analysis.tokens._BYTES", 1)
    monkeypatch.setattr("omnigene_fast.analysis.replay.BATCH", 1000)
    gc.collect()
    tracemalloc.start()
    analysis.replay_distance(made, made)
    peak = tracemalloc.get_traced_memory()[1] / n
    tracemalloc.stop()
    print(f"peak {peak:.0f} bytes a token")
    assert peak < 12 * 8  # what the ids of the twelve layers would take for one of the runs


def test_documents_in_pieces_come_whole(run):
    seen = []
    for batch in whole_documents(run, run.layers):
        for doc in np.unique(batch.doc):
            assert (batch.pos[batch.doc == doc] == np.arange(run.documents["n_tokens"][doc])).all()
            seen.append(doc)
    assert sorted(seen) == list(range(len(run.documents)))
    short = Memory(run.counts, run.documents, 3, run.records.take(slice(0, -1)), layers=run.layers)
    with pytest.raises(ValueError, match="tokens of document"):
        analysis.locality(short)


def test_small_memory_gives_the_same_tables(run, monkeypatch):
    """One layer at a time, one document or permutation at a time."""
    run.documents["pair"] = ["a", "a", "b", "b", "c", "c", None]

    def tables():
        yield analysis.divergence(run, permutations=20)
        yield analysis.differentiation(run, permutations=20)
        yield analysis.decompose(run, run, run, permutations=20)[["before", "after"]]
        yield analysis.specialty(run)
        yield analysis.load(run)
        for measure in (analysis.coactivation, analysis.flow, analysis.locality, analysis.vocabulary):
            yield measure(run)
        yield analysis.replay_distance(run, run)
        yield analysis.pairwise(run, permutations=20)[["js", "pairs"]]

    expected = list(tables())
    monkeypatch.setattr("omnigene_fast.analysis.tokens._BYTES", 1)
    monkeypatch.setattr("omnigene_fast.analysis.groups._CHUNK", 1)
    for name in ("tokens", "locality", "replay"):
        monkeypatch.setattr(importlib.import_module(f"omnigene_fast.analysis.{name}"), "BATCH", 1)
    for one, other in zip(expected, tables(), strict=True):
        pd.testing.assert_frame_equal(one, other)
