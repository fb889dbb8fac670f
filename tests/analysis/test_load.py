"""Balance, specialty, domains and router entropy."""

import math

import numpy as np
import pytest
from scipy import stats

from omnigene_fast import analysis

from .synthetic import Memory, dispersed, documents, skewed


def test_load_of_known_counts():
    counts = np.array([[[4, 2, 2, 0]], [[4, 0, 0, 4]], [[8, 8, 8, 8]], [[1, 1, 1, 1]]], np.int32)
    run = Memory(counts, documents(["a", "a", "b", "b"], [4, 4, 16, 2]), 2, layers=[7])
    table = analysis.load(run).set_index("group")
    a, b = table.loc["a"], table.loc["b"]
    share = np.array([8, 2, 2, 4]) / 16
    assert (a["layer"], a["picks"], a["tokens"], a["docs"]) == (7, 16, 8, 2)
    assert a["cv"] == pytest.approx(share.std() / share.mean())
    assert a["max_vio"] == pytest.approx(0.5 / 0.25 - 1)
    assert a["gini"] == pytest.approx(np.abs(share[:, None] - share).sum() / (2 * 16 * share.mean()))
    assert a["entropy"] == pytest.approx(stats.entropy(share))
    assert a["effective_experts"] == pytest.approx(math.exp(stats.entropy(share)))
    assert a["entropy_floor"] == pytest.approx(math.log(2))
    assert a["dead"] == 0
    assert (b["cv"], b["max_vio"], b["gini"]) == (pytest.approx(0), pytest.approx(0), pytest.approx(0))
    assert b["effective_experts"] == pytest.approx(4)
    whole = analysis.load(run, by=None)
    assert list(whole["group"]) == ["all"]
    assert whole["picks"].iloc[0] == counts.sum()


def test_dead_experts_come_with_what_the_sample_can_say():
    counts = np.zeros((10, 1, 8), np.int32)
    counts[:, 0, :2] = 1
    row = analysis.load(Memory(counts, documents(["a"] * 10, [1] * 10), 2)).iloc[0]
    assert (row["dead"], row["dead_fraction"]) == (6, 0.75)
    assert row["dead_floor"] == pytest.approx(0.75**10)
    assert row["dead_bound"] == pytest.approx(1 - 0.05**0.1)
    assert row["entropy"] == pytest.approx(row["entropy_floor"])  # every token picks the same two


def test_entropy_is_corrected_upwards_and_covered():
    rng = np.random.default_rng(0)
    share = skewed(rng, 1, 1, 64)
    truth = stats.entropy(share[0, 0])
    plain, corrected, hits = [], [], []
    for _ in range(200):
        row = analysis.load(dispersed(rng, share, docs=30, tokens=50, top_k=4, concentration=60)).iloc[0]
        plain.append(row["entropy"])
        corrected.append(row["entropy_corrected"])
        hits.append(row["entropy_low"] <= truth <= row["entropy_high"])
    error = np.std(corrected) / len(corrected) ** 0.5
    assert abs(np.mean(corrected) - truth) < 3 * error
    assert np.mean(plain) < truth - 10 * error
    assert 0.91 <= np.mean(hits) <= 0.99


def test_corrected_values_stay_in_range():
    """Even routing and few tokens: the correction alone would give more experts than there are."""
    rng = np.random.default_rng(7)
    even = analysis.load(dispersed(rng, np.full((6, 4, 16), 1 / 16), docs=12, tokens=20, top_k=4, concentration=60))
    for name in ("", "_corrected", "_low", "_high"):
        assert (even[f"entropy{name}"] <= math.log(16)).all()
        assert (even[f"effective_experts{name}"] <= 16).all()
    assert (even["effective_experts_corrected"] == 16).any()


def test_specialty_is_the_papers_score_and_saturates():
    rng = np.random.default_rng(1)
    run = dispersed(rng, skewed(rng, 4, 2, 16), docs=10, tokens=200, top_k=4, concentration=80)
    run.counts[:, 0, 3] = np.where(run.documents["task"] == "task02", 5000, 0)  # an expert of one task alone
    table = analysis.specialty(run, pseudo_count=1e-10)
    names = sorted(run.documents["task"].unique())
    p = np.stack([run.counts[run.documents["task"] == name].sum(0) for name in names]).astype(float)
    p /= p.sum(-1, keepdims=True)
    paper = np.log((p + 1e-10) / (p.mean(0) + 1e-10))
    used = p > 0
    assert table["specialty"].to_numpy()[used.ravel()] == pytest.approx(paper[used], abs=1e-5)
    assert table["specialty"].max() <= math.log(4) + 1e-9
    alone = table[(table["layer"] == 0) & (table["expert"] == 3) & (table["group"] == "task02")].iloc[0]
    assert alone["specialty"] == pytest.approx(math.log(4), abs=1e-6)
    assert alone["ceiling"] == pytest.approx(math.log(4))
    for _, part in table.groupby("group"):
        assert part["q_value"].to_numpy() == pytest.approx(stats.false_discovery_control(part["p_value"]))
    with pytest.raises(ValueError, match="pseudo_count"):
        analysis.specialty(run, pseudo_count=0)


def test_specialty_finds_what_was_planted_and_nothing_else():
    """Under the null at most 5 % of families may have a discovery, and of all discoveries 5 % be false."""
    found, inside, false, q_values = 0, 0, [], []
    for seed in range(50):
        rng = np.random.default_rng([2, seed])
        shares = np.repeat(skewed(rng, 1, 2, 32, sharpness=0.3), 3, 0)
        null = analysis.specialty(dispersed(rng, shares, docs=20, tokens=100, top_k=4, concentration=100))
        found += (null.groupby("group")["q_value"].min() < 0.05).sum()
        shares[1, 0, 7] *= 3
        shares /= shares.sum(-1, keepdims=True)
        table = analysis.specialty(dispersed(rng, shares, docs=20, tokens=100, top_k=4, concentration=100))
        mine = table[table["group"] == "task01"]
        planted = mine[(mine["layer"] == 0) & (mine["expert"] == 7)].iloc[0]
        truth = math.log(shares[1, 0, 7] / shares[:, 0, 7].mean())
        q_values.append(planted["q_value"])
        inside += planted["low"] < truth < planted["high"]
        discoveries = mine[mine["q_value"] < 0.05]
        false.append((discoveries["layer"] == 1).sum() / max(len(discoveries), 1))
    print(f"families with a discovery {found} of 150, planted covered {inside} of 50, false {np.mean(false):.3f}")
    assert found <= 15  # 7.5 expected, three standard deviations
    assert np.mean(np.array(q_values) < 0.05) >= 0.95
    assert np.median(q_values) < 1e-3
    assert inside >= 43
    assert np.mean(false) <= 0.09


def test_specialty_p_values_of_groups_of_two_and_of_one_document():
    """Two documents hardly vary by chance in some of 64 cells; one says nothing of how documents differ."""
    worlds, false = 60, 0
    for seed in range(worlds):
        rng = np.random.default_rng([5, seed])
        run = dispersed(rng, np.repeat(skewed(rng, 1, 1, 64), 2, 0), docs=2, tokens=100, top_k=4, concentration=100)
        false += (analysis.specialty(run)["q_value"] < 0.05).any()
    assert false <= 6  # 3 expected at most
    run.documents.loc[0, "task"] = None
    assert analysis.specialty(run)["p_value"].isna().all()


def test_specialty_intervals_cover():
    rng = np.random.default_rng(3)
    shares = skewed(rng, 3, 1, 16)
    truth = np.log(shares / shares.mean(0)).ravel()
    hits = []
    for _ in range(100):
        table = analysis.specialty(dispersed(rng, shares, docs=25, tokens=100, top_k=4, concentration=60))
        hits.append((table["low"] <= truth) & (truth <= table["high"]))
    assert 0.92 <= np.mean(hits) <= 0.97


def test_an_expert_of_one_document_has_no_interval():
    rng = np.random.default_rng(4)
    run = dispersed(rng, skewed(rng, 2, 1, 8), docs=6, tokens=50, top_k=2, concentration=80)
    run.counts[:6, 0, 5] = [0, 0, 9, 0, 0, 0]
    cell = analysis.specialty(run).query("group == 'task00' and expert == 5").iloc[0]
    assert cell["docs"] == 1
    assert np.isnan(cell[["low", "high"]].astype(float)).all()


def test_domain_is_the_share_of_a_domains_tokens():
    rng = np.random.default_rng(5)
    run = dispersed(rng, skewed(rng, 2, 2, 8), docs=7, tokens=50, top_k=2, concentration=80)
    table = analysis.domain(run)
    for name, part in table.groupby("group"):
        rows = run.documents["task"] == name
        tokens = run.documents["n_tokens"][rows].sum()
        assert part["specialisation"].to_numpy() == pytest.approx((run.counts[rows].sum(0) / tokens).ravel())
        assert part.groupby("layer")["specialisation"].sum().to_numpy() == pytest.approx(2)  # K picks a token
    assert (table["uniform"] == 2 / 8).all()
    assert (table["low"] <= table["high"]).all()


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_bug_22_entropy_of_true_probabilities():
    """moewatch took a softmax of Gemma-4's probabilities, which transformers returns as logits: 3.98 bits for 2.4."""
    rng = np.random.default_rng(6)
    logits = 9 * rng.standard_normal((50, 16))
    p = softmax(logits)
    true = stats.entropy(p, base=2, axis=-1)
    assert analysis.router_entropy(logits, base="bits") == pytest.approx(true)
    assert analysis.router_entropy(p, base="bits") == pytest.approx(true)
    assert analysis.router_entropy(p.astype(np.float16), base="nats") == pytest.approx(true * math.log(2), abs=1e-2)
    twice = stats.entropy(softmax(p), base=2, axis=-1)
    assert (twice > 3.8).all()  # near log2(16) whatever the router does
    assert true.mean() < 2.4
    with pytest.raises(ValueError, match="rows"):
        analysis.router_entropy(np.concatenate([p[:1], logits[:1]]))
    with pytest.raises(ValueError, match="finite"):
        analysis.router_entropy([math.inf, 1.0])


def test_domain_of_an_expert_that_was_never_picked_has_an_upper_end():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(240, [0] + [1 / 7] * 7, (6, 1))
    run = Memory(counts.astype(np.int32), documents(["a"] * 3 + ["b"] * 3, 60), 4)
    never = analysis.domain(run).query("expert == 0")
    assert (never["low"] == 0).all()
    assert never["high"].between(0.05, 1 - 0.05 ** (1 / 3) + 1e-9).all()
    many = Memory(np.repeat(counts, 20, 0).astype(np.int32), documents(["a"] * 60 + ["b"] * 60, 60), 4)
    assert (analysis.domain(many).query("expert == 0")["high"] < 0.05).all()
