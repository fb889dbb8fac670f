"""Simulated documents with a known truth: coverage, bias, p-values."""

import numpy as np
import pytest
from scipy import stats

from omnigene_fast import analysis
from omnigene_fast.analysis.divergence import differentiation_estimate
from omnigene_fast.analysis.groups import group
from omnigene_fast.analysis.null import deleted_pairs, pair_values
from omnigene_fast.analysis.resampling import Jackknife, benjamini_hochberg, p_value, ratio

from .synthetic import Memory, dispersed, skewed

RUNS, LAYERS = 500, 4


@pytest.fixture(scope="module")
def simulated():
    """500 runs of 2 tasks x 50 documents of ~200 tokens x 8 picks in 4 layers, over-dispersed six-fold."""
    rng = np.random.default_rng(0)
    shares = skewed(rng, 1, LAYERS, 128) * np.exp(0.5 * rng.standard_normal((2, LAYERS, 128)))
    shares /= shares.sum(-1, keepdims=True)
    truth = np.array([analysis.js_divergence(p, q) for p, q in shares.transpose(1, 0, 2)])
    found = []
    for _ in range(RUNS):
        run = dispersed(rng, shares, docs=50, tokens=200, top_k=8, concentration=300)
        groups = group(run, "task")
        left = deleted_pairs(groups)
        estimate = Jackknife(pair_values(groups.probabilities)[0, 1]).stratum(left[0][:, 1]).stratum(left[1][:, 0])
        boot = percentiles(run, rng) if len(found) < 100 else np.full((2, LAYERS), np.nan)
        found.append([estimate.value, estimate.corrected, estimate.low, estimate.high, *boot])
    return truth, np.array(found).transpose(1, 0, 2)


def percentiles(run, rng, draws=60):
    """The percentile bootstrap over documents: what the interval must not be."""
    samples = np.empty((2, draws, LAYERS, run.num_experts))
    for g in range(2):
        weights = rng.multinomial(50, np.full(50, 1 / 50), draws).astype(float)
        samples[g] = np.tensordot(weights, run.counts[50 * g : 50 * g + 50], 1)
    p, q = samples / samples.sum(-1, keepdims=True)
    entropy = lambda x: -(x * np.log(np.maximum(x, 1e-300))).sum(-1)  # noqa: E731
    return np.quantile(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, [0.025, 0.975], axis=0)


def test_the_interval_covers_the_truth(simulated):
    truth, (_, _, low, high, boot_low, boot_high) = simulated
    covered = ((low <= truth) & (truth <= high)).mean()
    naive = ((boot_low <= truth) & (truth <= boot_high))[:100].mean()
    print(f"coverage of the 95 % interval {covered:.3f}, of the percentile bootstrap {naive:.3f}")
    assert 0.93 <= covered <= 0.97
    assert naive < 0.85


def test_the_correction_removes_the_bias(simulated):
    truth, (plain, corrected, *_) = simulated
    z = [(values.mean(0) - truth) / (values.std(0, ddof=1) / RUNS**0.5) for values in (plain, corrected)]
    for name, values, score in (("plug-in", plain, z[0]), ("corrected", corrected, z[1])):
        print(f"{name} {values.mean(0).round(5).tolist()} for {truth.round(5).tolist()}, z {score.round(1).tolist()}")
    assert (np.abs(z[1]) < 3).all()
    assert abs(z[1].mean()) < 1.5  # of four independent layers: three standard errors
    assert (z[0] > 10).all()


def test_the_mean_over_layers_has_its_own_interval():
    """Layers of one document go up and down together: intervals of independent layers would be too narrow."""
    rng = np.random.default_rng(1)
    shares = np.repeat(skewed(rng, 3, 1, 32), 4, 1)
    truth = pair_values(shares)[np.triu_indices(3, 1)].mean()
    hits, naive = [], []
    for _ in range(200):
        run = dispersed(rng, shares[:, :1], docs=20, tokens=100, top_k=4, concentration=60)
        run = Memory(np.repeat(run.counts, 4, 1), run.documents, run.top_k)  # four layers that agree
        estimate = differentiation_estimate(group(run, "task"))
        hits.append(estimate.low[-1] <= truth <= estimate.high[-1])
        naive.append(abs(estimate.corrected[-1] - truth) < estimate.margin[:-1].mean() / 2)
    assert 0.92 <= np.mean(hits) <= 0.98
    assert np.mean(naive) < 0.8


@pytest.mark.parametrize("measure", ["divergence", "differentiation", "specialty"])
def test_p_values_are_no_smaller_than_uniform_when_groups_are_routed_alike(measure):
    rng = np.random.default_rng(2)
    shares = np.repeat(skewed(rng, 1, 1, 24), 3, 0)
    found, permutations = [], 199
    for seed in range(300):
        run = dispersed(rng, shares, docs=8, tokens=40, top_k=4, concentration=50)
        if measure == "specialty":
            table = analysis.specialty(run)
            found.append(table["p_value"][rng.integers(len(table))])
        elif measure == "divergence":
            found.append(analysis.divergence(run, permutations=permutations, seed=seed)["p_value"][1])
        else:
            found.append(analysis.differentiation(run, permutations=permutations, seed=seed)["p_value"].iloc[-1])
    test = stats.kstest(found, "uniform", alternative="greater")  # than the uniform distribution function
    print(f"{measure}: KS statistic {test.statistic:.3f}, p {test.pvalue:.3f}")
    assert test.pvalue > 0.01
    assert stats.kstest(np.array(found) * 0.8, "uniform").pvalue < 0.01  # the test would see 25 % too many small ones


def test_p_values_follow_the_plus_one_rule():
    null = np.array([[0.1], [0.2], [0.3], [0.4]])
    assert p_value(null, [0.3])[0] == pytest.approx(3 / 5)
    assert p_value(null, [9.0])[0] == pytest.approx(1 / 5)  # never 0
    assert p_value(null, [0.0])[0] == 1


def test_tokens_as_units_would_give_intervals_too_narrow():
    """Splitting documents into single tokens loses the over-dispersion: the control for the unit of resampling."""
    rng = np.random.default_rng(3)
    shares = skewed(rng, 2, 1, 32)
    run = dispersed(rng, shares, docs=20, tokens=100, top_k=4, concentration=30)
    pieces, names = [], []
    for counts, name in zip(run.counts, run.documents["task"], strict=True):
        rest = counts[0].copy()
        while rest.sum():
            piece = rng.multivariate_hypergeometric(rest, min(4, rest.sum()))
            rest -= piece
            pieces.append(piece)
            names.append(name)
    tokens = Memory(np.array(pieces)[:, None], run.documents.iloc[[0] * len(names)].assign(task=names), run.top_k)
    widths = [
        float((t["high"] - t["low"]).iloc[0]) for t in (analysis.divergence(r, permutations=0) for r in (run, tokens))
    ]
    assert widths[0] > 1.5 * widths[1]


def test_benjamini_hochberg_is_scipys():
    rng = np.random.default_rng(4)
    for shape in ((1,), (50,), (30, 128)):
        p = rng.random(shape) ** 3
        assert benjamini_hochberg(p).ravel() == pytest.approx(stats.false_discovery_control(p.ravel()), abs=1e-15)
    p[0, :5] = np.nan
    known = ~np.isnan(p)
    q = benjamini_hochberg(p)
    assert q[known] == pytest.approx(stats.false_discovery_control(p[known]), abs=1e-15)
    assert np.isnan(q[~known]).all()
    with pytest.raises(ValueError, match="p_values"):
        benjamini_hochberg([0.5, 1.5])


def test_jackknife_of_a_mean_is_the_textbook_interval():
    x = np.random.default_rng(5).standard_normal(12)
    estimate = Jackknife(np.asarray(x.mean())).stratum((x.sum() - x) / 11)
    low, high = stats.t.interval(0.95, 11, x.mean(), stats.sem(x))
    assert (float(estimate.low), float(estimate.high)) == (pytest.approx(low), pytest.approx(high))
    assert float(estimate.corrected) == pytest.approx(x.mean())


def test_jackknife_of_two_samples_is_welchs_interval():
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal(8), 3 * rng.standard_normal(15)
    estimate = Jackknife(np.asarray(x.mean() - y.mean()))
    estimate.stratum((x.sum() - x) / 7 - y.mean()).stratum(x.mean() - (y.sum() - y) / 14)
    interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval()
    assert float(estimate.low) == pytest.approx(interval.low)
    assert float(estimate.high) == pytest.approx(interval.high)


def test_ratio_is_the_ratio_of_sums():
    rng = np.random.default_rng(7)
    above, below = rng.random((9, 2)), rng.random(9) + 1
    estimate = ratio(above, below)
    assert estimate.value == pytest.approx(above.sum(0) / below.sum())
    left = Jackknife(estimate.value)
    left.stratum(np.stack([above[np.arange(9) != i].sum(0) / below[np.arange(9) != i].sum() for i in range(9)]), below)
    assert estimate.low == pytest.approx(left.low)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_that_never_varied_is_not_known_exactly(value):
    """Three documents of which none, or all, did something: up to 63 % of documents may do the other."""
    tokens = np.array([60, 50, 70])
    estimate = ratio(value * tokens, tokens)
    ends = sorted([value, abs(value - (1 - 0.05 ** (1 / 3)))])
    assert [float(estimate.low), float(estimate.high)] == pytest.approx(ends)
    assert float(ratio(np.array([1.0, 20, 30]), tokens).low) >= 0


def test_a_long_document_leaves_fewer_degrees_of_freedom():
    rng = np.random.default_rng(3)
    values = rng.random((10, 1))
    even, uneven = (Jackknife(np.array([0.5])).stratum(values, sizes) for sizes in (np.ones(10), [1000] + [10] * 9))
    assert even.margin == pytest.approx(Jackknife(np.array([0.5])).stratum(values).margin)
    assert uneven.margin > 2 * even.margin
