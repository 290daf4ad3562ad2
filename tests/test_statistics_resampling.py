"""Bootstraps, sign flips and the summary over tasks against values worked out by hand, and their determinism."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsil_bench.evaluation.across_tasks import across_tasks, iqm, mean_ranks, probability_of_improvement
from gsil_bench.evaluation.resampling import bca_interval, paired_bootstrap, sign_flip, two_level_bootstrap
from gsil_bench.evaluation.statistics import Array, paired_difference

NAN = math.nan


def array(*rows: list[float]) -> Array:
    return np.array(rows, dtype=np.float64)


ZEROS = array([0.0] * 6)


def test_six_differences_of_one_sign_flip_to_two_in_sixty_four() -> None:
    """Only no flip and all flips reach the sum of six positive differences: p = 2/2⁶. Means over nonempty subsets of 1 … 6 lie in
    [1, 6]; two subsets, the empty one among them, may lie beyond an end at α = 0.05 (2 · 1/64 < 0.05 ≤ 2 · 2/64), so the ends
    are the smallest and the largest of the 63 means.
    """
    found = sign_flip(array([1, 2, 3, 4, 5, 6]), ZEROS)
    assert found.p_value == pytest.approx(2 / 64)
    assert (found.estimate, found.low, found.high) == pytest.approx((3.5, 1, 6))


def test_five_differences_exclude_nothing() -> None:
    """2/2⁵ = 0.0625: even the most extreme δ keeps p above 0.05, so the interval has the scale's ends."""
    found = sign_flip(array([1, 2, 3, 4, 5]), ZEROS[:, :5], bounds=(-9, 9))
    assert (found.p_value, found.low, found.high) == pytest.approx((0.0625, -9, 9))


def test_flips_of_one_and_minus_one() -> None:
    """Differences 3, −1: subset sums 0, 3, −1, 2; two of four (0, −1) are at most 0, three at least 0: p = min(1, 2 · 2/4)."""
    assert sign_flip(array([3, -1]), ZEROS[:, :2]).p_value == 1.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=40), st.integers(0, 3))
def test_sign_flips_and_their_interval_never_disagree(differences: list[int], seed: int) -> None:
    found = sign_flip(array([float(d) for d in differences]), np.zeros((1, len(differences))), resamples=499, seed=seed)
    assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    mirrored = sign_flip(np.zeros((1, len(differences))), array([float(d) for d in differences]), resamples=499, seed=seed)
    assert (mirrored.low, mirrored.high, mirrored.p_value) == pytest.approx((-found.high, -found.low, found.p_value))


def test_a_bootstrap_has_the_spread_of_its_sample() -> None:
    """Of two differences 0 and 2 the resampled means are 0, 1, 2 with the chances 1/4, 1/2, 1/4: percentiles 0
    and 2; half of them are as far from the observed 1 as that is from 0.
    """
    found = paired_bootstrap(array([0, 2]), ZEROS[:, :2])
    assert (found.estimate, found.low, found.high) == (1, 0, 2)
    assert found.p_value == pytest.approx(0.5, abs=0.02)


def test_two_levels_draw_runs_and_items() -> None:
    """Runs 0 and 4 on equal items: only runs scatter, means 0, 2, 4 with the chances 1/4, 1/2, 1/4. One run: only items do."""
    runs = two_level_bootstrap(array([0, 0, 0], [4, 4, 4]), array([1, 1, 1]))
    assert (runs.estimate, runs.low, runs.high) == (1, -1, 3)
    items = two_level_bootstrap(array([0, 2]), ZEROS[:, :2])
    assert (items.low, items.high) == (0, 2)
    assert items.p_value == pytest.approx(0.5, abs=0.02)


def test_items_are_drawn_alike_for_both_methods() -> None:
    """Equal scores on every item: whatever is drawn, the difference is 0."""
    scores = np.random.default_rng(0).normal(size=(1, 30))
    for found in (two_level_bootstrap(scores, scores), paired_bootstrap(scores, scores)):
        assert (found.estimate, found.low, found.high, found.p_value) == pytest.approx((0, 0, 0, 1), abs=1e-12)


def test_bca_of_a_symmetric_sample_is_the_percentile_interval() -> None:
    """−1 and 1: means −1, 0, 1 with the chances 1/4, 1/2, 1/4; no bias, no acceleration."""
    interval = bca_interval(np.array([-1.0, NAN, 1.0]))
    assert (interval.estimate, interval.low, interval.high) == (0, -1, 1)
    assert interval.method == "BCa bootstrap over items"


def test_bca_of_too_little() -> None:
    assert bca_interval(np.array([2.0, 2.0])).method == "no spread"
    assert bca_interval(np.array([NAN])).method == "no scored items"


def test_missing_scores_and_items() -> None:
    first, second = array([1, 2, NAN, 4]), array([NAN, 1, 1, 1])
    for test in (paired_bootstrap, two_level_bootstrap, sign_flip):
        assert test(first, second).n_items == 2
        assert test(first, second).estimate == 2
        assert math.isnan(test(array([NAN]), array([1])).p_value)
        with pytest.raises(ValueError, match="same items: 4 against 3"):
            test(first, second[:, :3])


def test_the_seed_decides_everything() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(3, 50)), rng.normal(size=(3, 50))
    for test in (paired_bootstrap, two_level_bootstrap, sign_flip):
        assert test(a, b, seed=7) == test(a, b, seed=7)
        assert test(a, b, seed=7) != test(a, b, seed=8)
    assert bca_interval(a[0], seed=7) == bca_interval(a[0], seed=7)


def test_large_samples_are_drawn_in_parts() -> None:
    """200,000 items take 20 draws at a time: the parts are one bootstrap, with the spread 1/√n of the mean."""
    values = np.random.default_rng(5).normal(size=(1, 200_000))
    found = paired_bootstrap(values, np.zeros_like(values), resamples=60)
    plain = paired_difference(values, np.zeros_like(values))
    assert found.high - found.low == pytest.approx(plain.high - plain.low, rel=0.35)


# ---- over tasks ----------------------------------------------------------------------------------------------


def test_interquartile_mean() -> None:
    """Of eight scores two are cut at either end: (3 + 4 + 5 + 6) / 4 = 4.5. Of three none is cut: 2."""
    assert iqm([[100, 2, 3, 4], [5, 6, 7, -100]]) == 4.5
    assert iqm([1, 2, 3]) == 2


def test_probability_of_improvement() -> None:
    """Task 1: runs 1, 3 against 2, 3: wins 0, 0, 1, ½ of four pairs = 3/8. Task 2: 5 against 1 and 1: 1. Mean 11/16."""
    assert probability_of_improvement([np.array([1, 3.0]), np.array([5.0])], [np.array([2, 3.0]), np.array([1, 1.0])]) == 11 / 16


def test_mean_ranks_share_ties() -> None:
    """Task 1: 3 > 2 > 1; task 2: 1 = 1 > 0, ranks 1½, 1½, 3; task 3: 0 < 5 < 9."""
    scores = array([3, 1, 0], [2, 1, 5], [1, 0, 9])
    assert mean_ranks(scores).tolist() == pytest.approx([(1 + 1.5 + 3) / 3, (2 + 1.5 + 2) / 3, (3 + 3 + 1) / 3])


def test_a_summary_over_tasks() -> None:
    """On each of two tasks gsil solves what sft solves and one item more of two: ½ against 0. Rank 1 in resamples in which the
    solved item is drawn (¾ of them for a task), else a tie.
    """
    one = {"sft": array([0, 0]), "gsil": array([1, 0])}
    found = across_tasks({"x": one, "y": one}, {"sft": True, "gsil": True}, "sft", ["loss (no scale)"])
    sft, gsil = found.rows
    assert (sft.iqm.estimate, gsil.iqm.estimate) == (0, 0.5)
    assert (sft.mean_rank.estimate, gsil.mean_rank.estimate) == (2, 1)
    assert gsil.improvement is not None
    assert (gsil.improvement.estimate, gsil.improvement.low, gsil.improvement.high) == (1, 0.5, 1)
    assert (gsil.iqm.low, gsil.iqm.high) == (0, 1)
    assert sft.improvement is None
    assert not found.shown
    assert (found.tasks, found.left_out) == (("x", "y"), ("loss (no scale)",))


def test_a_summary_leaves_out_items_that_someone_did_not_score() -> None:
    table = {"sft": array([0, 1, NAN]), "gsil": array([1, NAN, 1], [0, 1, 1])}
    found = across_tasks({"x": table}, {"sft": True, "gsil": True}, "sft")
    assert [row.iqm.estimate for row in found.rows] == [0, 0.5]


def test_three_tasks_and_three_trained_methods_are_a_summary() -> None:
    table = {name: array([0, 1.0]) for name in ("start", "a", "b", "c")}
    trained = {"start": False, "a": True, "b": True, "c": True}
    assert across_tasks(dict.fromkeys("xyz", table), trained, "a").shown
    assert not across_tasks(dict.fromkeys("xy", table), trained, "a").shown
    assert not across_tasks(dict.fromkeys("xyz", table), trained | {"c": False}, "a").shown


def test_a_summary_repeats_itself() -> None:
    rng = np.random.default_rng(1)
    scores = {task: {method: rng.random((2, 40)) for method in ("a", "b", "c")} for task in ("x", "y", "z")}
    methods = dict.fromkeys(("a", "b", "c"), True)
    assert across_tasks(scores, methods, "a") == across_tasks(scores, methods, "a")
    assert across_tasks(scores, methods, "a") != across_tasks(scores, methods, "a", seed=1)
