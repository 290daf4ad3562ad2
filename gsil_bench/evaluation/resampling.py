"""Bootstraps and sign flips: what the closed forms of `statistics` are checked against, and for measures that have none.

Everything is drawn with `numpy.random.default_rng(seed)`, so the same arguments give the same numbers. Scores are arrays
(seeds, items) as in `statistics`; an item that any seed of the comparison did not score (NaN) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri  # type: ignore[import-untyped, unused-ignore]

from gsil_bench.evaluation.statistics import LEVEL, UNBOUNDED, Array, Bounds, Interval

RESAMPLES = 10_000
EXACT_FLIPS = 14
"""Differences up to which all 2ⁿ signs are tried instead of drawn."""
BLOCK = 4_000_000
"""Numbers that are drawn at a time: 32 MB."""


class ResampledDifference(NamedTuple):
    """A difference of two means with its interval and p value."""

    estimate: float
    low: float
    high: float
    p_value: float
    """Two-sided, of no difference."""
    method: str
    n_items: int


def bca_interval(
    values: Array,
    statistic: Callable[[Array], Array] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Efron's bias-corrected and accelerated bootstrap interval (1987) of a statistic of independent values.

    Args:
        values: shape (n,); NaN is left out.
        statistic: reduces the last axis, (…, n) → (…); the mean by default.
        resamples: bootstrap samples.

    Returns:
        The interval; from the estimate to the estimate, named "no spread", if all values are equal.
    """
    reduce = statistic or _mean
    sample = np.asarray(values, dtype=np.float64)
    sample = sample[~np.isnan(sample)]
    n = len(sample)
    if n == 0:
        return Interval(math.nan, *UNBOUNDED, "no scored items", level)
    estimate = float(reduce(sample))
    if float(np.ptp(sample)) == 0:
        return Interval(estimate, estimate, estimate, "no spread", level)
    rng = np.random.default_rng(seed)
    draws = [reduce(sample[rng.integers(0, n, (count, n))]) for count in _blocks(resamples, n)]
    low, high = _bca_quantiles(np.concatenate(draws), estimate, _jackknife(sample, reduce), level)
    return Interval(estimate, low, high, "BCa bootstrap over items", level)


def paired_bootstrap(a: Array, b: Array, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> ResampledDifference:
    """Resample items, the same ones for both methods: percentile interval, and p as the share of resamples that are as far from
    the observed difference as that is from 0 (Koehn 2004; sacrebleu measures from the resamples' mean, which is the observed
    difference but for the draws).

    Args:
        a: (seeds of a, items) or (items,).
        b: likewise, the same items in the same order.
    """
    first, second = _complete_pair(a, b)
    differences = first.mean(axis=0) - second.mean(axis=0)
    rng, n = np.random.default_rng(seed), len(differences)
    if n == 0:
        return _no_difference("paired bootstrap over items")
    drawn = np.concatenate([_mean(differences[rng.integers(0, n, (count, n))]) for count in _blocks(resamples, n)])
    return _summary(float(differences.mean()), drawn, level, "paired bootstrap over items", n)


def two_level_bootstrap(
    a: Array, b: Array, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> ResampledDifference:
    """Resample the runs of each method and then items, the same ones for both methods; interval and p as in `paired_bootstrap`.

    With two or three runs its percentiles are too narrow where runs scatter, and too wide where they do not: see
    docs/decisions/0009-which-test.md before using it for a verdict.

    Args:
        a: (seeds of a, items).
        b: (seeds of b, items), the same items in the same order.
    """
    first, second = _complete_pair(a, b)
    rng, n = np.random.default_rng(seed), first.shape[1]
    if n == 0:
        return _no_difference("two-level bootstrap over seeds and items")
    drawn = []
    for count in _blocks(resamples, n):
        items = _shares(rng, n, count)  # (count, n)
        means = [((items @ scores.T) * _shares(rng, len(scores), count)).sum(axis=1) for scores in (first, second)]
        drawn.append(means[0] - means[1])
    estimate = float(first.mean() - second.mean())
    return _summary(estimate, np.concatenate(drawn), level, "two-level bootstrap over seeds and items", n)


def sign_flip(
    a: Array, b: Array, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0, bounds: Bounds = UNBOUNDED
) -> ResampledDifference:
    """Fisher's test by flipping the signs of item differences, and the interval that inverts it: p < 1 − level exactly where the
    interval excludes 0.

    Flipping a set F of items lowers the sum by 2 Σ_F d, so that a flipped mean of d − δ is at least the observed one exactly
    where the mean of d over F is at most δ: the interval's ends are order statistics of means over random subsets (Hartigan
    1969). Up to `EXACT_FLIPS` items all subsets are taken. p is twice the smaller tail, the observed signs included.

    Args:
        a: (seeds of a, items) or (items,).
        b: likewise, the same items in the same order.
        bounds: of a difference; the ends where the test excludes nothing.
    """
    first, second = _complete_pair(a, b)
    differences = first.mean(axis=0) - second.mean(axis=0)
    n = len(differences)
    if n == 0:
        return _no_difference("sign flips")
    means, total = _subset_means(differences, resamples, seed)
    tails = [int((sign * means <= 1e-12).sum()) + total - len(means) for sign in (1, -1)]
    p = min(1.0, 2 * min(tails) / total)
    # c of the total + 1 subsets lie on one side of an end; it is excluded while 2 c / total < α.
    rank = math.ceil(round((1 - level) / 2 * total, 9)) - (total - len(means))
    ordered = np.sort(means)
    low = float(ordered[rank - 1]) if rank >= 1 else bounds[0]
    high = float(ordered[-rank]) if rank >= 1 else bounds[1]
    return ResampledDifference(float(differences.mean()), low, high, p, "sign flips over items", n)


def _subset_means(differences: Array, resamples: int, seed: int) -> tuple[Array, int]:
    """Means over nonempty subsets of items, and how many subsets were taken with the empty one (which stands for the observed
    signs).
    """
    n = len(differences)
    if n <= EXACT_FLIPS:
        flips = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
        return (flips @ differences) / flips.sum(axis=1), 2**n
    rng, means = np.random.default_rng(seed), []
    for count in _blocks(resamples, n):
        drawn = rng.integers(0, 2, (count, n), dtype=np.int8).astype(np.float64)
        drawn = drawn[drawn.any(axis=1)]
        means.append((drawn @ differences) / drawn.sum(axis=1))
    return np.concatenate(means), resamples + 1


def _summary(estimate: float, drawn: Array, level: float, method: str, n: int) -> ResampledDifference:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    extreme = int((np.abs(drawn - estimate) >= abs(estimate) - 1e-12).sum())
    return ResampledDifference(estimate, float(low), float(high), (extreme + 1) / (len(drawn) + 1), method, n)


def _no_difference(method: str) -> ResampledDifference:
    return ResampledDifference(math.nan, *UNBOUNDED, math.nan, f"{method}: no item was scored by both", 0)


def _complete_pair(a: Array, b: Array) -> tuple[Array, Array]:
    """Both as (seeds, items), with the items that every seed of both scored."""
    first, second = np.atleast_2d(np.asarray(a, dtype=np.float64)), np.atleast_2d(np.asarray(b, dtype=np.float64))
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"paired scores need the same items: {first.shape[1]} against {second.shape[1]}")
    kept = ~np.isnan(np.concatenate([first, second])).any(axis=0)
    return first[:, kept], second[:, kept]


def _shares(rng: np.random.Generator, n: int, count: int) -> Array:
    """How much of a resample each of n things is, (count, n)."""
    shares: Array = rng.multinomial(n, np.full(n, 1 / n), count) / n
    return shares


def _blocks(resamples: int, n: int) -> list[int]:
    """Resamples in parts whose arrays fit `BLOCK`."""
    size = max(1, BLOCK // max(1, n))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _mean(values: Array) -> Array:
    mean: Array = np.asarray(values.mean(axis=-1))
    return mean


def _jackknife(sample: Array, reduce: Callable[[Array], Array]) -> Array:
    """The statistic without each value, (n,)."""
    return np.array([float(reduce(np.delete(sample, index))) for index in range(len(sample))])


def _bca_quantiles(drawn: Array, estimate: float, jackknife: Array, level: float) -> Bounds:
    """Efron 1987, eq. 2.3: percentiles moved for the bootstrap's bias z₀ and the acceleration a."""
    bias = float(ndtri(((drawn < estimate).sum() + (drawn <= estimate).sum()) / (2 * len(drawn))))
    gaps = jackknife.mean() - jackknife
    spread = float((gaps**2).sum())
    acceleration = float((gaps**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    ends = []
    for z in (float(ndtri((1 - level) / 2)), float(ndtri((1 + level) / 2))):
        ends.append(float(ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))))
    low, high = np.quantile(drawn, ends)
    return float(low), float(high)
