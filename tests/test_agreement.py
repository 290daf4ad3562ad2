"""The statistics against independent implementations on fixed inputs: scipy, statsmodels, and a bootstrap written here.

Tolerances: closed forms agree to 1e-9 (1e-6 where the other side iterates); two bootstraps with their own draws to three Monte
Carlo standard errors of a p value, and to 5 % of an interval's width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped, unused-ignore]

from gsil_bench.evaluation.across_tasks import iqm, mean_ranks, probability_of_improvement
from gsil_bench.evaluation.resampling import bca_interval, paired_bootstrap, sign_flip
from gsil_bench.evaluation.statistics import (
    Array,
    benjamini_hochberg,
    clopper_pearson,
    clustered_interval,
    equivalence_p,
    holm,
    paired_difference,
    score_interval,
    welch,
    wilson,
)

P_VALUES = [0.001, 0.2, 0.013, 0.04, 0.04, 0.9, 0.0004, 0.03]
COUNTS = [(0, 7), (3, 20), (82, 164), (1000, 1319), (20, 20), (1, 1)]
EXACT = 1e-9


def rated(seed: int = 5, items: int = 80) -> tuple[Array, Array]:
    """Ratings of two methods, one run each: (1, items)."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(6, 2, items)
    first, second = (np.clip(np.round(quality + rng.normal(shift, 1.5, (1, items))), 1, 10) for shift in (0.4, 0.0))
    return first, second


def solved(seed: int = 6, items: int = 164) -> tuple[Array, Array]:
    """0/1 scores of two methods, one run each."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(0.5, 0.5, items)
    first, second = ((rng.random((1, items)) < np.clip(chance + shift, 0, 1)).astype(float) for shift in (0.1, 0.0))
    return first, second


# ---- scipy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "n"), COUNTS)
def test_intervals_of_a_proportion(successes: int, n: int) -> None:
    result = stats.binomtest(successes, n)
    for mine, method in ((wilson(successes, n), "wilson"), (clopper_pearson(successes, n), "exact")):
        theirs = result.proportion_ci(method=method)
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_t_interval_and_paired_t() -> None:
    first, second = rated()
    mine, theirs = paired_difference(first, second), stats.ttest_rel(first[0], second[0])
    assert mine.p_value == pytest.approx(theirs.pvalue, rel=EXACT)
    ends = theirs.confidence_interval()
    assert (mine.low, mine.high) == pytest.approx((ends.low, ends.high), rel=EXACT)
    score, alone = score_interval(first, binary=False), stats.ttest_1samp(first[0], 0).confidence_interval()
    assert (score.low, score.high) == pytest.approx((alone.low, alone.high), rel=EXACT)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    first, second = solved()
    found = paired_difference(first, second, binary=True, scale=1)
    theirs = stats.binomtest(found.a_better, found.a_better + found.b_better)
    assert found.a_better + found.b_better > 10
    assert found.p_value == pytest.approx(theirs.pvalue, rel=EXACT)


def test_welch() -> None:
    a, b = [0.71, 0.74, 0.69, 0.75, 0.72], [0.70, 0.68, 0.71]
    mine, theirs = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    ends = theirs.confidence_interval()
    assert (mine.p_value, mine.df) == pytest.approx((theirs.pvalue, theirs.df), rel=EXACT)
    assert (mine.low, mine.high) == pytest.approx((ends.low, ends.high), rel=EXACT)


def test_bca_bootstrap() -> None:
    """The same draws from the same generator: the intervals are equal, not merely close."""
    values = np.random.default_rng(7).lognormal(size=60)
    mine = bca_interval(values, resamples=999, seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=999, method="BCa", rng=np.random.default_rng(3), vectorized=True
    ).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), rel=EXACT)
    assert mine.high - mine.estimate > mine.estimate - mine.low


def test_bca_of_another_statistic() -> None:
    values = np.random.default_rng(8).normal(size=45)

    def trimmed(sample: Array) -> Array:
        return np.asarray(stats.trim_mean(sample, 0.25, axis=-1))

    mine = bca_interval(values, trimmed, resamples=999, seed=3)
    theirs = stats.bootstrap(
        (values,), lambda x, axis: stats.trim_mean(x, 0.25, axis=axis), n_resamples=999, rng=np.random.default_rng(3)
    ).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), rel=EXACT)


def mean_difference(x: Array, y: Array, axis: int) -> Array:
    return np.asarray(np.mean(x - y, axis=axis))


@pytest.mark.parametrize("items", [4, 9, 13])
def test_sign_flips_of_few_items_are_exact(items: int) -> None:
    first, second = rated(items=items)
    theirs = stats.permutation_test((first[0], second[0]), mean_difference, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(first, second).p_value == pytest.approx(theirs.pvalue, rel=EXACT)


def test_sign_flips_of_many_items() -> None:
    first, second = rated(seed=12)
    rng = np.random.default_rng(1)
    theirs = stats.permutation_test((first[0], second[0]), mean_difference, permutation_type="samples", rng=rng)
    mine = sign_flip(first, second)
    assert 0.01 < theirs.pvalue < 0.99
    assert mine.p_value == pytest.approx(theirs.pvalue, abs=3 * math.sqrt(2 * 0.25 / 9999) * 2)


def test_false_discovery_control() -> None:
    assert benjamini_hochberg(P_VALUES) == pytest.approx(stats.false_discovery_control(P_VALUES).tolist(), rel=EXACT)


def test_two_way_variance_by_sums_of_squares() -> None:
    """Of two runs on items without a missing score: MS_items + MS_runs − MS_rest over n S, from textbook sums of squares."""
    rng = np.random.default_rng(12)
    scores = rng.normal(0, 1, 40) + rng.normal(0, 0.5, (4, 1)) + rng.normal(0, 1, (4, 40))
    seeds, n = scores.shape
    correction = scores.sum() ** 2 / scores.size
    of_items = (scores.sum(axis=0) ** 2).sum() / seeds - correction
    of_runs = (scores.sum(axis=1) ** 2).sum() / n - correction
    of_rest = (scores**2).sum() - correction - of_items - of_runs
    squares = np.array([of_items / (n - 1), of_runs / (seeds - 1), -of_rest / ((n - 1) * (seeds - 1))])
    quantile = np.average(stats.t.ppf(0.975, [n - 1, seeds - 1]), weights=squares[:2])  # Cochran 1964
    half = quantile * math.sqrt(squares.sum() / scores.size)
    mine = score_interval(scores, binary=False)
    assert (mine.low, mine.high) == pytest.approx((scores.mean() - half, scores.mean() + half), rel=1e-6)


def test_measures_over_tasks() -> None:
    rng = np.random.default_rng(13)
    a, b = rng.random((5, 4)), rng.random((3, 4))
    assert iqm(a) == pytest.approx(float(stats.trim_mean(a.ravel(), 0.25)), rel=EXACT)
    shares = [stats.mannwhitneyu(a[:, task], b[:, task]).statistic / 15 for task in range(4)]
    assert probability_of_improvement(list(a.T), list(b.T)) == pytest.approx(np.mean(shares), rel=EXACT)
    assert mean_ranks(a).tolist() == pytest.approx(stats.rankdata(-a, axis=0).mean(axis=1).tolist(), rel=EXACT)


# ---- statsmodels -------------------------------------------------------------------------------------------


def statsmodels(name: str) -> Any:
    return pytest.importorskip(f"statsmodels.{name}", reason="statsmodels is not installed (the test extra has it)")


@pytest.mark.parametrize(("successes", "n"), COUNTS)
def test_proportion_confint(successes: int, n: int) -> None:
    confint = statsmodels("stats.proportion").proportion_confint
    for mine, method in ((wilson(successes, n), "wilson"), (clopper_pearson(successes, n), "beta")):
        assert (mine.low, mine.high) == pytest.approx(confint(successes, n, method=method), abs=1e-9)


def test_mcnemar() -> None:
    first, second = solved()
    table = [[int(((first == x) & (second == y)).sum()) for y in (1, 0)] for x in (1, 0)]
    theirs = statsmodels("stats.contingency_tables").mcnemar(table, exact=True)
    assert paired_difference(first, second, binary=True, scale=1).p_value == pytest.approx(theirs.pvalue, rel=EXACT)


def test_corrections_for_several_tests() -> None:
    corrected = statsmodels("stats.multitest").multipletests
    assert holm(P_VALUES) == pytest.approx(corrected(P_VALUES, method="holm")[1].tolist(), rel=EXACT)
    assert benjamini_hochberg(P_VALUES) == pytest.approx(corrected(P_VALUES, method="fdr_bh")[1].tolist(), rel=EXACT)


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0, 2.0])
def test_two_one_sided_tests(margin: float) -> None:
    first, second = rated()
    theirs = statsmodels("stats.weightstats").ttost_paired(first[0], second[0], -margin, margin)[0]
    assert equivalence_p(paired_difference(first, second), margin) == pytest.approx(float(theirs), rel=1e-6)


def test_clustered_standard_error() -> None:
    """statsmodels' sandwich of a regression on a constant, with its correction G/(G − 1) · (n − 1)/(n − 1)."""
    rng = np.random.default_rng(9)
    questions = np.repeat(np.arange(30), rng.integers(1, 5, 30))
    values = rng.normal(0, 1, 30)[questions] + rng.normal(0, 0.5, len(questions))
    model = statsmodels("api").OLS(values, np.ones(len(values)))
    se = float(model.fit(cov_type="cluster", cov_kwds={"groups": questions}).bse[0])
    mine = clustered_interval(values, questions.tolist())
    assert (mine.high - mine.low) / 2 == pytest.approx(se * stats.t.ppf(0.975, 29), rel=EXACT)
    assert se > 1.3 * values.std(ddof=1) / math.sqrt(len(values))


# ---- written here ------------------------------------------------------------------------------------------


def test_paired_bootstrap_as_sacrebleu_counts() -> None:
    """Resample segments, both systems alike; p is the share of resamples whose difference, moved by the resamples' mean, is as
    large as the observed one, plus one in numerator and denominator (sacrebleu, paired bootstrap; Koehn 2004).
    """
    first, second = rated(seed=12)
    rng, n, count = np.random.default_rng(99), first.shape[1], 5000
    observed = first.mean() - second.mean()
    resampled = []
    for _ in range(count):
        chosen = rng.integers(0, n, n)
        resampled.append(float(first[0, chosen].mean() - second[0, chosen].mean()))
    moved = np.abs(np.array(resampled) - np.mean(resampled))
    p = (int((moved >= abs(observed)).sum()) + 1) / (count + 1)
    ends = np.sort(resampled)[[int(0.025 * count), int(0.975 * count)]]
    mine = paired_bootstrap(first, second)
    assert mine.p_value == pytest.approx(p, abs=3 * math.sqrt(p * (1 - p) * (1 / count + 1 / 10_000)))
    assert (mine.low, mine.high) == pytest.approx(ends.tolist(), abs=0.05 * (ends[1] - ends[0]))
