"""Where the truth is known: intervals cover it, verdicts err no more than they say, designs have the power that they promise.

Each figure is a share of seeded repetitions; of 2000, a share of 5 % has a standard error of 0.5 %, so 6 % is two above it. The
longer tables are docs/decisions/0009-which-test.md's (`python tests/simulations.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped, unused-ignore]
from simulations import (
    Draw,
    by_binary,
    by_pooling,
    by_t,
    covered,
    equal_items,
    losses,
    ratings,
    rejections,
    zero_one,
)

from gsil_bench.evaluation.resampling import bca_interval, paired_bootstrap, sign_flip, two_level_bootstrap
from gsil_bench.evaluation.statistics import (
    Array,
    Interval,
    PairedDifference,
    clopper_pearson,
    clustered_interval,
    default_margin,
    holm,
    minimum_detectable_difference,
    paired_difference,
    score_interval,
    verdict,
    welch,
    wilson,
)

Rng = np.random.Generator
Ends = tuple[float, float]


def ends(found: Interval | PairedDifference) -> Ends:
    return found.low, found.high


# ---- 95 % intervals ------------------------------------------------------------------------------------------


def solved_by_one(rng: Rng) -> Array:
    return zero_one(164)(rng)[0]


def turns(rng: Rng) -> Ends:
    """60 questions of three turns."""
    values = rng.normal(0, 1, (60, 1)) + rng.normal(0, 1, (60, 3))
    return ends(clustered_interval(values.ravel(), np.repeat(np.arange(60), 3).tolist()))


SCORES: dict[str, tuple[Callable[[Rng], Ends], float]] = {
    "Wilson": (lambda rng: ends(wilson(int(rng.binomial(164, 0.35)), 164)), 0.35),
    "Clopper–Pearson": (lambda rng: ends(clopper_pearson(int(rng.binomial(1000, 0.4)), 1000)), 0.4),
    "Wilson of items of unequal difficulty": (lambda rng: ends(score_interval(solved_by_one(rng), binary=True)), 0.5),
    "t over items": (lambda rng: ends(score_interval(rng.normal(6, 2, (1, 40)), binary=False)), 6.0),
    "t over skewed items": (lambda rng: ends(score_interval(rng.gamma(2, 1, (1, 150)), binary=False)), 2.0),
    "t over clusters": (turns, 0.0),
    "t over items and 3 seeds": (lambda rng: ends(score_interval(zero_one(1000, (3, 1), 0.04)(rng)[0], True)), 0.5),
    "t over items and 5 seeds": (lambda rng: ends(score_interval(zero_one(164, (5, 1), 0.04, 0.2)(rng)[0], True)), 0.5),
    "BCa bootstrap": (lambda rng: ends(bca_interval(rng.gamma(2, 1, 100), resamples=499, seed=int(rng.integers(2**31)))), 2.0),
}


@pytest.mark.parametrize("name", SCORES)
def test_intervals_of_a_score_cover_the_truth(name: str) -> None:
    interval, truth = SCORES[name]
    assert 0.93 <= covered(interval, truth, 2000) <= 0.97


@pytest.mark.parametrize(("items", "seed_sd"), [(1000, 0.02), (1000, 0.04), (164, 0.04)])
def test_two_seeds_give_wide_intervals_and_never_short_ones(items: int, seed_sd: float) -> None:
    """One degree of freedom: how much runs scatter is hardly known, which makes the interval wide rather than wrong."""
    draw = zero_one(items, (2, 1), seed_sd)
    assert covered(lambda rng: ends(score_interval(draw(rng)[0], True)), 0.5, 2000) >= 0.93


def of(draw: Draw, interval: Callable[[Array, Array, int], Ends]) -> Callable[[Rng], Ends]:
    """An interval of a difference, with a seed for its own draws."""
    return lambda rng: interval(*draw(rng), int(rng.integers(2**31)))


DIFFERENCES: dict[str, Callable[[Rng], Ends]] = {
    "exact McNemar": of(zero_one(164), lambda a, b, _: ends(paired_difference(a, b, binary=True, scale=1))),
    "paired t": of(ratings(80), lambda a, b, _: ends(paired_difference(a, b))),
    "paired t of losses": of(losses(150), lambda a, b, _: ends(paired_difference(a, b))),
    "items and 3 seeds": of(zero_one(1000, (3, 3), 0.03), lambda a, b, _: ends(paired_difference(a, b))),
    "items and 5 seeds": of(zero_one(1000, (5, 5), 0.02), lambda a, b, _: ends(paired_difference(a, b))),
    "Welch on 5 seeds": of(zero_one(164, (5, 5), 0.04), lambda a, b, _: welch(a.mean(axis=1), b.mean(axis=1))[1:3]),
    "paired bootstrap": of(ratings(80), lambda a, b, seed: paired_bootstrap(a, b, resamples=499, seed=seed)[1:3]),
    "sign flips": of(ratings(80), lambda a, b, seed: sign_flip(a, b, resamples=499, seed=seed)[1:3]),
    "two-level bootstrap": of(
        zero_one(164, (3, 3), 0.05), lambda a, b, seed: two_level_bootstrap(a, b, resamples=299, seed=seed)[1:3]
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_intervals_of_a_difference_cover_the_truth(name: str) -> None:
    assert 0.93 <= covered(DIFFERENCES[name], 0.0, 2000) <= 0.97


# ---- verdicts where there is no difference -------------------------------------------------------------------

EQUALS: dict[str, tuple[Draw, bool]] = {
    "0/1, one seed": (zero_one(164), True),
    "0/1, one seed, 1000 items": (zero_one(1000), True),
    "ratings, one seed": (ratings(80), False),
    "losses, one seed": (losses(150), False),
    "0/1, 3 seeds": (zero_one(1000, (3, 3), 0.02), False),
    "0/1, 3 seeds without a variance": (zero_one(1000, (3, 3)), False),
    "0/1, 5 seeds": (zero_one(1000, (5, 5), 0.02), False),
    "0/1, 5 seeds, each method with items of its own": (zero_one(164, (5, 5), 0.04, 0.2), False),
    "ratings, 3 seeds": (ratings(80, (3, 3), 0.3), False),
    "0/1, 3 seeds against 5": (zero_one(164, (3, 5), 0.04), False),
    "0/1, 2 seeds": (zero_one(1000, (2, 2), 0.02), False),
    "0/1, one run against 3": (zero_one(164, (1, 3), 0.04), False),
}


@pytest.mark.parametrize("name", EQUALS)
def test_better_and_worse_are_rarely_said_of_equals(name: str) -> None:
    draw, binary = EQUALS[name]
    test = by_binary if binary else by_t
    assert rejections(draw, {"verdict": test}, 2000)["verdict"] <= 0.06


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (3, 0.02)])
def test_eight_equal_methods_are_rarely_told_from_the_control(seeds: int, seed_sd: float) -> None:
    """At least one better or worse among eight, Holm's correction in the family: at most 5 % (1000 repetitions: ± 0.7 %)."""
    rng, found, margin = np.random.default_rng(30), 0, default_margin(1.0, 0.0)
    for _ in range(1000):
        abilities = rng.beta(0.5, 0.5, 164)
        shifts = rng.normal(0, seed_sd, (9, seeds, 1))
        control, *others = (rng.random((9, seeds, 164)) < np.clip(abilities + shifts, 0, 1)).astype(np.float64)
        differences = [paired_difference(other, control, binary=seeds == 1, scale=1) for other in others]
        adjusted = holm([difference.p_value for difference in differences])
        verdicts = {verdict(each, margin, p_value=p) for each, p in zip(differences, adjusted, strict=True)}
        found += not verdicts.isdisjoint({"better", "worse"})
    assert found / 1000 <= 0.064


def test_pooling_seeds_and_items_finds_what_is_not_there() -> None:
    """The counterexample: 3 runs each of SD 2 points on 1319 items, unpaired, seeds × items as one sample.

    A mean of 3 · 1319 answers at 40 % has an SE of 0.78 points by that count, of √(0.78² + 2²/3) = 1.39 in truth: the test's
    1.96 are 1.1 standard errors, which 27 % exceed. The seeds' term holds the error on the very same data.
    """
    found = rejections(equal_items(1319, 3, 0.02), {"pooled": by_pooling, "components": by_t}, 1000)
    print(f"called different though equal: pooled {found['pooled']:.1%}, items and seeds {found['components']:.1%}")
    assert found["pooled"] > 0.15
    assert found["components"] <= 0.064


# ---- power ---------------------------------------------------------------------------------------------------


def power(draw: Callable[[Rng], tuple[Array, Array]], repeats: int = 1500, **kind: bool) -> float:
    rng = np.random.default_rng(40)
    return sum(paired_difference(*draw(rng), scale=math.inf, **kind).p_value < 0.05 for _ in range(repeats)) / repeats


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_power_of_graded_scores_is_as_designed(correlation: float) -> None:
    """Normal scores of SD 2 on 80 items: the minimum detectable difference is found in 80 % of cases."""
    difference = minimum_detectable_difference(2.0, 80, correlation)

    def draw(rng: Rng) -> tuple[Array, Array]:
        shared = rng.normal(0, 2 * math.sqrt(correlation), (1, 80))
        first, second = (shared + rng.normal(mean, 2 * math.sqrt(1 - correlation), (1, 80)) for mean in (difference, 0))
        return first, second

    assert power(draw) == pytest.approx(0.8, abs=0.035)


def test_power_of_solved_problems_is_as_designed() -> None:
    """Half of 400 problems are solved by both or by neither (ρ = 0.5), the methods differ on the others. The exact test is
    stricter than the design's t: 75 to 83 %.
    """
    difference = minimum_detectable_difference(0.5, 400, 0.5)

    def draw(rng: Rng) -> tuple[Array, Array]:
        alike, common, own = rng.random(400) < 0.5, rng.random(400) < 0.5, rng.random((2, 400))
        first, second = (np.where(alike, common, own[i] < 0.5 + sign * difference) for i, sign in ((0, 1), (1, -1)))
        return first[None].astype(float), second[None].astype(float)

    assert 0.75 <= power(draw, binary=True) <= 0.83


@pytest.mark.parametrize("seeds", [3, 5])
def test_power_with_seeds_is_as_designed(seeds: int) -> None:
    """ρ = ρ_s = 0.5 of SD 1 on 200 items, runs of SD 0.15."""
    difference = minimum_detectable_difference(1.0, 200, 0.5, seeds, 0.15)

    def draw(rng: Rng) -> tuple[Array, Array]:
        item, runs = rng.normal(0, math.sqrt(0.5), 200), rng.normal(0, 0.15, (2, seeds, 1))
        first, second = item + runs + rng.normal(0, math.sqrt(0.5), (2, seeds, 200))
        return first + difference, second

    assert power(draw) == pytest.approx(0.8, abs=0.035)


def test_equal_methods_are_called_equivalent_as_often_as_the_design_says() -> None:
    """Differences of SD 1 on 900 items, margin 0.1 = 3 SE: equivalent if |mean| < 3 − 1.645 = 1.355 SE, 82.5 % of cases."""
    rng, claims = np.random.default_rng(50), 0
    for _ in range(1500):
        found = paired_difference(rng.normal(0, 1, (1, 900)), np.zeros((1, 900)))
        claims += verdict(found, 0.1) == "equivalent"
    assert claims / 1500 == pytest.approx(2 * stats.norm.cdf(1.355) - 1, abs=0.04)
