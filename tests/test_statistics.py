"""The statistics against values worked out by hand (arithmetic in the docstrings), invariants, error rates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats  # type: ignore[import-untyped, unused-ignore]

from gsil_bench.evaluation.letters import compact_letters
from gsil_bench.evaluation.statistics import (
    Array,
    PairedDifference,
    benjamini_hochberg,
    bound_without_spread,
    changed_by_holm,
    clopper_pearson,
    clustered_interval,
    default_margin,
    equivalence_p,
    holm,
    minimum_detectable_difference,
    paired_difference,
    score_interval,
    t_interval,
    verdict,
    welch,
    wilson,
)

NAN = math.nan


def array(*rows: list[float]) -> Array:
    return np.array(rows, dtype=np.float64)


def pairs(both: int, a_only: int, b_only: int, neither: int) -> tuple[Array, Array]:
    """0/1 scores of one seed each from the four counts of a McNemar table."""
    first = [1.0] * (both + a_only) + [0.0] * (b_only + neither)
    second = [1.0] * both + [0.0] * a_only + [1.0] * b_only + [0.0] * neither
    return array(first), array(second)


def t_quantile(p: float, df: float) -> float:
    return float(stats.t.ppf(p, df))


# ---- one score ---------------------------------------------------------------------------------------------


def test_wilson_of_five_in_ten() -> None:
    """z² = 3.841459. Centre 0.5; half = z / (1 + z²/10) · √(0.025 + z²/400) = 1.416010 · 0.186020 = 0.263406."""
    interval = wilson(5, 10)
    assert (interval.low, interval.high) == pytest.approx((0.236594, 0.763406), abs=1e-6)
    assert interval.method == "Wilson"


def test_wilson_at_the_ends_of_the_scale() -> None:
    """No success: [0, z² / (n + z²)] = [0, 3.841459 / 13.841459]. n successes: its mirror image."""
    assert (wilson(0, 10).low, wilson(0, 10).high) == pytest.approx((0, 0.277533), abs=1e-6)
    assert (wilson(10, 10).low, wilson(10, 10).high) == pytest.approx((0.722467, 1), abs=1e-6)
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0


def test_nothing_scored_is_unknown_and_not_zero() -> None:
    for interval in (wilson(0, 0), score_interval(array([NAN, NAN]), binary=True)):
        assert math.isnan(interval.estimate)
        assert (interval.low, interval.high, interval.method) == (0.0, 1.0, "no scored items")
    graded = score_interval(array([NAN], [NAN]), binary=False, bounds=(1, 10))
    assert math.isnan(graded.estimate)
    assert (graded.low, graded.high) == (1, 10)


def test_t_interval_of_one_to_five() -> None:
    """s² = 2.5, SE = √(2.5/5) = 0.707107, t(4) = 2.776445, half = 1.963243. The scale's ends cut it."""
    interval = t_interval([1, 2, 3, NAN, 4, 5])
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((3, 1.036757, 4.963243), abs=1e-6)
    assert t_interval([1, 2, 3, 4, 5], bounds=(2, 4.5)).low == 2
    assert t_interval([1, 2, 3, 4, 5], bounds=(2, 4.5)).high == 4.5


def test_equal_scores_leave_room_for_what_was_not_drawn() -> None:
    """20 tens on 1–10: at most u = 1 − 0.05^(1/20) = 1 − e^(−0.1497866) = 0.1391083 are lower; 10 − 9u = 8.748025."""
    interval = t_interval([10.0] * 20, bounds=(1, 10))
    assert (interval.low, interval.high) == pytest.approx((8.748025, 10), abs=1e-6)
    assert interval.method == "bound without spread"


def test_one_graded_item_says_next_to_nothing() -> None:
    """n = 1: u = 0.95, so [7 − 0.95 · 6, 7 + 0.95 · 3] = [1.3, 9.85]; without a scale, nothing at all."""
    interval = score_interval(array([7.0]), binary=False, bounds=(1, 10))
    assert (interval.low, interval.high) == pytest.approx((1.3, 9.85))
    assert (t_interval([7.0]).low, t_interval([7.0]).high) == (-math.inf, math.inf)


def test_a_hundred_zeros_give_the_rule_of_three() -> None:
    """100 zeros on 0–1: 1 − 0.05^(1/100) = 1 − e^(−0.02995732) = 0.029513, which the rule of three calls 3/100."""
    assert bound_without_spread(0.0, 100, (0, 1)).high == pytest.approx(0.029513, abs=1e-6)


def test_two_seeds_add_their_own_variance() -> None:
    """Items' means 1.5 and 4.5: 4.5/2 = 2.25. Seeds' means 2 and 4: 2/2 = 1. Residuals ±1/2: 4 · 1/4 / 1 / 4 = 0.25.

    SE = √(2.25 + 1 − 0.25) = √3; both terms have one degree of freedom.
    """
    interval = score_interval(array([1, 3], [2, 6]), binary=False)
    half = t_quantile(0.975, 1) * math.sqrt(3)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-5)
    assert interval.method == "t over items and seeds"


def test_a_variance_is_never_below_what_either_of_its_terms_contains() -> None:
    """Item means 1, 2, 1/2: 7/12 / 3 = 7/36. Seed means 1 and 4/3: 1/18 / 2 = 1/36. Residuals ±5/6, ±1/6, ±4/6: 84/36 / 2 / 6
    = 7/36. The sum 7/36 + 1/36 − 7/36 is below 7/36, which stands. Quantile: (7 · 4.302653 + 1 · 12.706205) / 8 = 5.353097.
    """
    interval = score_interval(array([0, 2, 1], [2, 2, 0]), binary=False)
    half = 5.353097 * math.sqrt(7) / 6
    assert (interval.low, interval.high) == pytest.approx((7 / 6 - half, 7 / 6 + half), rel=1e-6)


def test_an_item_that_one_seed_did_not_score_is_left_out_for_all() -> None:
    assert score_interval(array([1, 0, NAN], [1, 1, 0]), binary=True).estimate == 0.75


# ---- differences of 0/1 scores -----------------------------------------------------------------------------


def test_mcnemar_of_eight_against_two() -> None:
    """p = 2 · (1 + 10 + 45) / 2¹⁰ = 0.109375.

    Bonett and Price: centre 6/102 = 0.058824, SE = √(12/102 − 0.058824²) / √102 = 0.337916 / 10.099505 = 0.033459,
    half = 1.959964 SE = 0.065578. Resolvable: 2.801585 SE = 0.093737.
    """
    found = paired_difference(*pairs(40, 8, 2, 50), binary=True, scale=1)
    assert found.p_value == pytest.approx(0.109375)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.06, -0.006754, 0.124402), abs=1e-6)
    assert found.resolvable == pytest.approx(0.093737, abs=1e-6)
    assert (found.n_items, found.n_dropped, found.a_better, found.b_better) == (100, 0, 8, 2)


def test_six_against_none_is_the_fewest_that_is_significant() -> None:
    """2 / 2⁶ = 0.03125, 2 / 2⁵ = 0.0625."""
    six, five = (paired_difference(*pairs(0, k, 0, 50), binary=True, scale=1) for k in (6, 5))
    assert six.p_value == pytest.approx(0.03125)
    assert six.low > 0
    assert five.p_value == pytest.approx(0.0625)
    assert five.low <= 0


def test_no_discordant_pair_is_no_certainty() -> None:
    """n = 10: SE = √(2/12) / √12 = 0.117851, half = 0.230983."""
    found = paired_difference(*pairs(7, 0, 0, 3), binary=True, scale=1)
    assert (found.estimate, found.low, found.high) == pytest.approx((0, -0.230983, 0.230983), abs=1e-6)
    assert found.p_value == 1.0


def test_the_exact_test_needs_six_discordant_pairs() -> None:
    """Six items: all six must differ, δ⁶ = 0.8, δ = 0.963492. Five items resolve nothing."""
    assert paired_difference(*pairs(3, 0, 0, 3), binary=True).resolvable == pytest.approx(0.963492, abs=1e-6)
    assert paired_difference(*pairs(3, 0, 0, 2), binary=True).resolvable == math.inf


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 200))
def test_interval_and_exact_p_never_disagree(a_only: int, b_only: int, same: int) -> None:
    if a_only + b_only + same == 0:
        return
    found = paired_difference(*pairs(0, a_only, b_only, same), binary=True, scale=1)
    assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    assert found.low < found.high
    assert found.p_value == pytest.approx(float(stats.binomtest(a_only, a_only + b_only).pvalue) if a_only + b_only else 1)


# ---- differences of graded scores and of several seeds -----------------------------------------------------


def test_paired_t_of_one_to_five() -> None:
    """t = 3 / 0.707107 = √18 with 4 degrees of freedom, whose distribution function has a closed form:

    F(t) = 1/2 + 3/8 · t/√(1 + t²/4) · (1 − t² / (12 (1 + t²/4))). t/√5.5 = 1.809068 and 1 − 18/66 = 0.727273 give
    0.993382, so p = 0.013236. Resolvable: (2.776445 + 0.940965) · 0.707107 = 2.628606.
    """
    found = paired_difference(array([2, 4, 6, 8, 10, NAN]), array([1, 2, 3, 4, 5, 6]), scale=10)
    assert found.p_value == pytest.approx(0.013236, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((1.036757, 4.963243), abs=1e-6)
    assert found.resolvable == pytest.approx(2.628606, abs=1e-5)
    assert (found.n_items, found.n_dropped, found.method) == (5, 1, "paired t")


A = array([1, 3], [2, 6])
B = array([0, 1], [1, 2], [2, 3])


def test_seeds_and_items_both_count() -> None:
    """Item differences 0.5 and 2.5: 2/2 = 1. Seed means of a 2 and 4: 2/2 = 1; of b 0.5, 1.5, 2.5: 1/3. Residuals of a ±1/2:
    1 / 4 = 0.25; of b none.

    SE² = 7/3 − 1/4 = 25/12. Seeds: (4/3)² / (1²/1 + (1/3)²/2) = 1.777778 / 1.055556 = 1.684211 degrees of freedom. Quantile:
    (1 · t(1) + 4/3 · t(1.684211)) / (7/3), and the degrees of freedom are those that have it.
    """
    found = paired_difference(A, B, scale=100)
    quantile = (t_quantile(0.975, 1) + 4 / 3 * t_quantile(0.975, 1.684211)) / (7 / 3)
    se, df = math.sqrt(25 / 12), found.df
    half = quantile * se
    assert t_quantile(0.975, df) == pytest.approx(quantile, rel=1e-5)
    assert (found.estimate, found.low, found.high) == pytest.approx((1.5, 1.5 - half, 1.5 + half), rel=1e-5)
    assert found.p_value == pytest.approx(2 * stats.t.sf(1.5 / se, df), rel=1e-5)
    assert found.resolvable == pytest.approx((t_quantile(0.975, df) + t_quantile(0.8, df)) * se, rel=1e-5)
    assert found.method == "paired t over items and seeds"


def test_a_single_trained_run_borrows_the_other_methods_seed_variance() -> None:
    """Item differences 0 and 1: 0.5/2 = 0.25. s²_b = 1 serves both: 1 · (1/3 + 1/1) = 4/3 with 2 degrees of freedom.

    Quantile: (0.25 · 12.706205 + 4/3 · 4.302653) / (0.25 + 4/3) = 8.913422 / 1.583333 = 5.629529.
    """
    found = paired_difference(A[:1], B, scale=100)
    half = 5.629529 * math.sqrt(0.25 + 4 / 3)
    assert found.high - found.estimate == pytest.approx(half, rel=1e-5)


def test_the_untrained_model_has_no_seed_variance() -> None:
    """0.25 + 1/3; quantile (0.25 · 12.706205 + 1/3 · 4.302653) / 0.583333 = 4.610769 / 0.583333 = 7.904175."""
    found = paired_difference(A[:1], B, scale=100, a_trained=False)
    half = 7.904175 * math.sqrt(0.25 + 1 / 3)
    assert found.high - found.estimate == pytest.approx(half, rel=1e-5)


def test_equal_differences_are_bounded_by_the_scale() -> None:
    """Ten differences of 1 on a scale of 9: p = (9/10)¹⁰ = 0.348678. Of 9: p = (1/2)¹⁰ = 0.000977."""
    small = paired_difference(array([2.0] * 10), array([1.0] * 10), scale=9)
    large = paired_difference(array([10.0] * 10), array([1.0] * 10), scale=9)
    assert (small.p_value, large.p_value) == pytest.approx((0.348678, 0.000977), abs=1e-6)
    assert small.low < 0 < small.high
    assert large.low > 0
    assert math.isnan(small.resolvable)


def test_identical_graded_scores_without_a_scale_prove_nothing() -> None:
    found = paired_difference(array([1, 2, 3]), array([1, 2, 3]))
    assert (found.low, found.high, found.p_value) == (-math.inf, math.inf, 1.0)


def test_no_common_item() -> None:
    found = paired_difference(array([1, NAN]), array([NAN, 1]), binary=True, scale=1)
    assert (found.n_items, found.n_dropped) == (0, 2)
    assert math.isnan(found.estimate)
    assert math.isnan(found.p_value)
    assert verdict(found, 0.02) == "not resolved"


def test_better_follows_the_direction() -> None:
    first, second = array([1, 2, 5]), array([2, 3, 4])
    assert paired_difference(first, second).b_better == 2
    assert paired_difference(first, second, higher_is_better=False).a_better == 2


graded = st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=3)


@settings(deadline=None)
@given(graded, graded)
def test_swapping_the_methods_mirrors_the_result(first: list[list[float]], second: list[list[float]]) -> None:
    one = paired_difference(array(*first), array(*second), scale=10)
    other = paired_difference(array(*second), array(*first), scale=10)
    assert one.estimate == pytest.approx(-other.estimate, abs=1e-9)
    assert one.low == pytest.approx(-other.high, abs=1e-9)
    assert one.p_value == pytest.approx(other.p_value, abs=1e-9)
    assert (one.a_better, one.b_better) == (other.b_better, other.a_better)
    assert one.low <= one.estimate <= one.high
    assert one.low < one.high


# ---- verdicts ----------------------------------------------------------------------------------------------


def difference(estimate: float, half: float, p: float, half90: float) -> PairedDifference:
    low, high = estimate - half, estimate + half
    return PairedDifference(estimate, low, high, p, "t", 9, 0, 0, 0, 1.0, estimate - half90, estimate + half90)


@pytest.mark.parametrize(
    ("found", "margin", "higher", "expected"),
    [
        (difference(0.05, 0.03, 0.01, 0.025), 0.02, True, "better"),
        (difference(0.05, 0.03, 0.01, 0.025), 0.02, False, "worse"),
        (difference(-0.05, 0.03, 0.01, 0.025), 0.02, True, "worse"),
        (difference(0.001, 0.015, 0.9, 0.012), 0.02, True, "equivalent"),
        (difference(0.001, 0.015, 0.9, 0.012), 0.0, True, "not resolved"),
        (difference(0.01, 0.015, 0.3, 0.012), 0.02, True, "not resolved"),
        (difference(0.01, 0.005, 0.001, 0.004), 0.02, True, "better"),
    ],
)
def test_verdicts(found: PairedDifference, margin: float, higher: bool, expected: str) -> None:
    assert verdict(found, margin, higher_is_better=higher) == expected


def test_the_verdict_follows_holm() -> None:
    found = difference(0.05, 0.045, 0.03, 0.04)
    assert verdict(found, 0.02, p_value=0.06) == "not resolved"
    assert changed_by_holm(found, 0.06)
    assert not changed_by_holm(found, 0.04)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1 = 0.03, 0.06, 0.04; never falling: 0.03, 0.06, 0.06. NaN is no test."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    with_nan = holm([NAN, 0.02])
    assert math.isnan(with_nan[0])
    assert with_nan[1] == 0.02
    assert holm([]) == []


def test_margin_is_two_percent_of_a_scale_that_has_ends() -> None:
    assert default_margin(10.0, 1.0) == pytest.approx(0.18)
    assert default_margin(0.0, None) == default_margin(0.0, math.inf) == 0.0


# ---- error rates, simulated --------------------------------------------------------------------------------


def runs(rng: np.random.Generator, abilities: Array, seeds: int, seed_sd: float) -> Array:
    """0/1 scores of training runs whose accuracies scatter, (seeds, items)."""
    chances = np.clip(abilities + rng.normal(0, seed_sd, size=(seeds, 1)), 0, 1)
    return (rng.random((seeds, len(abilities))) < chances).astype(np.float64)


def rejections(repeats: int, items: int, seeds: tuple[int, int], seed_sd: float, **settings: Any) -> float:
    """Share of comparisons of a method with itself that are called a difference."""
    rng = np.random.default_rng(20)
    found = 0
    for _ in range(repeats):
        abilities = rng.beta(0.5, 0.5, size=items)
        first, second = (runs(rng, abilities, count, seed_sd) for count in seeds)
        found += paired_difference(first, second, binary=True, scale=1, **settings).p_value < 0.05
    return found / repeats


@pytest.mark.parametrize(
    ("items", "seeds", "seed_sd"),
    [(200, (1, 1), 0.0), (1000, (3, 3), 0.02), (1000, (3, 3), 0.0), (164, (3, 3), 0.04), (1000, (2, 3), 0.02)],
)
def test_type_one_error_is_held(items: int, seeds: tuple[int, int], seed_sd: float) -> None:
    assert rejections(2000, items, seeds, seed_sd) <= 0.065


def test_pooling_seeds_and_items_would_not_hold_it() -> None:
    """The trap that the seed part avoids: 3 seeds of SD 2 points, items × seeds as one sample, reject far too often."""
    rng = np.random.default_rng(21)
    found = 0
    for _ in range(300):
        abilities = rng.beta(0.5, 0.5, size=1000)
        first, second = runs(rng, abilities, 3, 0.02), runs(rng, abilities, 3, 0.02)
        found += paired_difference(first.reshape(1, -1), second.reshape(1, -1), binary=True).p_value < 0.05
    assert found / 300 > 0.15


def test_power_at_the_resolvable_difference_is_as_promised() -> None:
    """50 items, differences of SD 1, SE 1/√50: (2.009575 + 0.848880) / √50 = 0.404246 is found in 80 % of cases."""
    rng = np.random.default_rng(22)
    zeros = np.zeros((1, 50))
    samples = [paired_difference(rng.normal(0.404246, 1, (1, 50)), zeros) for _ in range(3000)]
    assert np.mean([found.p_value < 0.05 for found in samples]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([found.resolvable for found in samples]) == pytest.approx(0.404, abs=0.01)


def test_equivalence_is_rarely_claimed_at_the_margin() -> None:
    """A true difference of exactly the margin is called equivalent in at most 5 % of cases."""
    rng = np.random.default_rng(23)
    claims = 0
    for _ in range(2000):
        found = paired_difference(rng.normal(0.5, 1, (1, 60)), np.zeros((1, 60)))
        claims += found.equivalence_high < 0.5
    assert claims / 2000 <= 0.065


# ---- exact and clustered intervals, families, equivalence, design -------------------------------------------


def test_clopper_pearson_at_the_ends_of_the_scale() -> None:
    """No success in 10: (1 − p)¹⁰ = 0.025 gives p = 1 − 0.025^0.1 = 1 − e^(−0.3688879) = 0.308497; ten: its mirror image."""
    assert (clopper_pearson(0, 10).low, clopper_pearson(0, 10).high) == pytest.approx((0, 0.308497), abs=1e-6)
    assert (clopper_pearson(10, 10).low, clopper_pearson(10, 10).high) == pytest.approx((0.691503, 1), abs=1e-6)
    assert clopper_pearson(0, 0).method == "no scored items"


def test_one_success_of_two_exactly() -> None:
    """P(X ≥ 1) = 1 − (1 − p)² = 0.025 at p = 1 − √0.975 = 0.012579; the upper end mirrors it."""
    assert (clopper_pearson(1, 2).low, clopper_pearson(1, 2).high) == pytest.approx((0.012579, 0.987421), abs=1e-6)


def test_two_turns_of_a_question_are_no_two_questions() -> None:
    """Clusters (1, 3), (2, 2), (6, 4): mean 3, residual sums −2, −2, 4. SE² = 3/2 · (4 + 4 + 16) / 36 = 1, t(2) = 4.302653."""
    interval = clustered_interval([1, 3, 2, 2, 6, 4], ["a", "a", "b", "b", "c", "c"])
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((3, -1.302653, 7.302653), abs=1e-6)
    assert interval.method == "t over 3 clusters"
    assert clustered_interval([1, 3, NAN, 2, 2, 6, 4], ["a", "a", "a", "b", "b", "c", "c"]) == interval


def test_clusters_of_one_are_the_t_interval() -> None:
    plain, clustered = t_interval([1, 2, 3, 4, 5]), clustered_interval([1, 2, 3, 4, 5], range(5))
    assert (clustered.low, clustered.high) == pytest.approx((plain.low, plain.high))


def test_one_cluster_or_equal_clusters_leave_the_bound() -> None:
    """One question on 0–1: u = 0.95 of the scale is open. Two equal ones: 1 − √0.05 = 0.776393."""
    assert clustered_interval([0.0, 0.0], ["a", "a"], bounds=(0, 1)).high == pytest.approx(0.95)
    assert clustered_interval([0.0, 0.0], ["a", "b"], bounds=(0, 1)).high == pytest.approx(0.776393, abs=1e-6)
    assert clustered_interval([NAN], ["a"], bounds=(0, 1)).method == "no scored items"


def test_benjamini_hochberg_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04 times 3/1, 3/2, 3/3 = 0.03, 0.045, 0.04; never above a later one: 0.03, 0.04, 0.04."""
    assert benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert benjamini_hochberg([0.5, 0.9]) == pytest.approx([0.9, 0.9])
    with_nan = benjamini_hochberg([NAN, 0.02])
    assert math.isnan(with_nan[0])
    assert with_nan[1] == 0.02
    assert benjamini_hochberg([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_false_discoveries_are_the_weaker_promise(p_values: list[float]) -> None:
    for p, weak, strong in zip(p_values, benjamini_hochberg(p_values), holm(p_values), strict=True):
        assert p <= weak + 1e-12
        assert weak <= strong + 1e-12


def test_welch_by_hand() -> None:
    """Means 2 and 5; s²/n of (1, 2, 3) is 1/3, of (3, 7) 8/2 = 4. SE² = 13/3,

    df = (13/3)² / ((1/3)²/2 + 4²/1) = 18.777778 / 16.055556 = 1.169550.
    """
    found = welch([1, 2, 3], [3, 7])
    assert (found.estimate, found.df) == pytest.approx((-3, 1.169550), abs=1e-6)
    assert found.p_value == pytest.approx(2 * stats.t.sf(3 / math.sqrt(13 / 3), 1.169550), rel=1e-5)


@pytest.mark.parametrize("runs", [([1.0], [1.0, 2.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_welch_needs_runs_that_differ(runs: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="Welch's test needs"):
        welch(*runs)


def test_equivalence_of_one_to_five() -> None:
    """Differences 1 … 5: mean 3, SE √0.5, 4 degrees of freedom. Margin 5: t = (5 − 3)/√0.5 = √8, and with
    F(t) of `test_paired_t_of_one_to_five`, t² = 8: √(8/3) = 1.632993, 1 − 8/36 = 7/9, F = 1/2 + 3/8 · 1.632993 · 7/9 = 0.976290.
    """
    found = paired_difference(array([2, 4, 6, 8, 10]), array([1, 2, 3, 4, 5]))
    assert equivalence_p(found, 5) == pytest.approx(0.023710, abs=1e-6)
    assert equivalence_p(found, 0) == 1.0
    assert equivalence_p(found, 3) == pytest.approx(0.5)


def test_equivalence_without_spread_is_what_the_bound_leaves() -> None:
    """100 equal scores on 0–1, margin 0.02: (1 − 0.02)¹⁰⁰ / 2 = 0.066310; 200: 0.008794. At a difference of the margin: 1."""
    for n, p in ((100, 0.066310), (200, 0.008794)):
        found = paired_difference(array([0.5] * n), array([0.5] * n), scale=1)
        assert equivalence_p(found, 0.02, 1) == pytest.approx(p, abs=1e-6)
    assert equivalence_p(paired_difference(array([0.5] * 9), array([0.375] * 9), scale=1), 0.125, 1) == 1.0
    assert math.isnan(equivalence_p(paired_difference(array([NAN]), array([1])), 0.1, 1))


@settings(deadline=None)
@given(graded, graded, st.floats(0.01, 9.9), st.booleans())
def test_equivalence_and_its_interval_never_disagree(
    first: list[list[float]], second: list[list[float]], margin: float, binary: bool
) -> None:
    scale = 1.0 if binary else 10.0
    scores = [np.round(array(*rows) / 10) if binary else array(*rows) for rows in (first, second)]
    found = paired_difference(scores[0], scores[1], binary=binary, scale=scale)
    margin *= scale / 10
    gap = margin - max(-found.equivalence_low, found.equivalence_high)
    if abs(gap) > 1e-9:
        assert (equivalence_p(found, margin, scale) < 0.05) == (gap > 0)


@pytest.mark.parametrize(
    ("chance", "n", "unpaired", "half", "most"),
    [(0.35, 164, 14.7, 10.4, 6.6), (0.40, 1319, 5.3, 3.8, 2.4), (0.60, 1172, 5.7, 4.0, 2.5)],
)
def test_minimum_detectable_differences_of_known_benchmarks(
    chance: float, n: int, unpaired: float, half: float, most: float
) -> None:
    """√(2 p (1 − p) (1 − ρ) / n) · (t₀.₉₇₅ + t₀.₈), in points: HumanEval 2 · 0.2275 / 164 → 0.0527 · 2.81 = 14.8 for ρ = 0, with
    the normal's 2.80 14.7; and so on, for ρ = 0.5 and 0.8.
    """
    sd = math.sqrt(chance * (1 - chance))
    found = [100 * minimum_detectable_difference(sd, n, rho) for rho in (0.0, 0.5, 0.8)]
    assert found == pytest.approx([unpaired, half, most], abs=0.15)


def test_minimum_detectable_difference_with_seeds() -> None:
    """d² = 2 · ((0.8 − 0.5) + 0.2/4) = 0.7, over 100 items 0.007; the rest of it 2 · 0.2/4/100 = 0.001, 594 degrees of freedom;
    seeds 2 · 0.01/4 = 0.005, their term 0.006, with 2 · 3 · 4/5 = 4.8. SE² = 0.012; quantile
    (7 t(99) + 6 t(4.8)) / 13, at the noncentrality with 80 % beyond it.
    """
    found = minimum_detectable_difference(1.0, 100, 0.5, seeds=4, seed_sd=0.1, seed_correlation=0.8)
    quantile = (7 * t_quantile(0.975, 99) + 6 * t_quantile(0.975, 4.8)) / 13
    df = float(optimize.brentq(lambda freedom: t_quantile(0.975, freedom) - quantile, 4, 99))
    assert stats.nct.sf(t_quantile(0.975, df), df, found / math.sqrt(0.012)) == pytest.approx(0.8, abs=1e-6)
    assert minimum_detectable_difference(1.0, 100, 0.5, seed_sd=0.1) == minimum_detectable_difference(1.0, 100, 0.5)
    assert minimum_detectable_difference(1.0, 1, 0.5) == math.inf
    assert minimum_detectable_difference(1.0, 100, 1.0) == 0.0


@pytest.mark.parametrize("design", [(0, 0.5, 1, None), (9, 0.5, 0, None), (9, 1.5, 1, None), (9, 0.5, 2, 0.4)])
def test_no_design_is_an_error(design: tuple[int, float, int, float | None]) -> None:
    n, correlation, seeds, within = design
    with pytest.raises(ValueError, match="no design"):
        minimum_detectable_difference(1.0, n, correlation, seeds, seed_correlation=within)


def test_the_resolvable_difference_is_the_minimum_detectable_one_of_its_design() -> None:
    """50 item differences of ±1 have the variance 50/49, which is 2 sd² (1 − ρ) for ρ = 0 and sd² = 50/98; t₀.₉₇₅ + t₀.₈ is
    the noncentrality but for a thousandth.
    """
    signs = np.resize([1.0, -1.0], 50)
    found = paired_difference(signs[None], np.zeros((1, 50)))
    assert found.resolvable == pytest.approx(minimum_detectable_difference(math.sqrt(50 / 49 / 2), 50, 0.0), rel=1e-3)


# ---- compact letters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "different", "letters"),
    [
        (3, set(), ["a", "a", "a"]),
        (3, {(0, 1), (0, 2), (1, 2)}, ["a", "b", "c"]),
        (3, {(0, 2)}, ["a", "ab", "b"]),
        (4, {(0, 2), (0, 3), (1, 3)}, ["a", "ab", "bc", "c"]),
        (3, {(0, 1)}, ["a", "b", "ab"]),
        (0, set(), []),
    ],
)
def test_letters(count: int, different: set[tuple[int, int]], letters: list[str]) -> None:
    assert compact_letters(count, different) == letters


@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))))
)
def test_letters_are_shared_exactly_by_what_is_not_different(drawn: tuple[int, set[tuple[int, int]]]) -> None:
    count, found = drawn
    different = {pair for pair in found if pair[0] != pair[1]}
    letters = compact_letters(count, different)
    for one in range(count):
        assert letters[one]
        for other in range(one):
            assert bool(set(letters[one]) & set(letters[other])) == (not {(one, other), (other, one)} & different)
