"""Intervals of scores, paired differences between methods, and the verdict on a difference. numpy and scipy only.

Conventions. Scores are arrays (seeds, items) in the task's own units, NaN where an item has no score. The unit of
repetition is the training run: items are shared by the seeds of a method, so seeds × items are never pooled as if they
were independent. An item counts only if every seed in the comparison scored it. Intervals have 95 % confidence and
tests are two-sided at 0.05, unless said.

Nothing here claims certainty without spread: where all values are equal, or there is only one, the interval is what n
equal draws leave open about the rest of the scale (`bound_without_spread`; about 3/n of the scale for large n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betaincinv, ndtri, stdtr, stdtrit  # type: ignore[import-untyped, unused-ignore]

LEVEL = 0.95
ALPHA = 0.05
POWER = 0.8
FEWEST_DISCORDANT = 6
"""Pairs that must differ, all one way, before the exact McNemar test reaches 0.05: 2 / 2⁵ = 0.0625, 2 / 2⁶ = 0.031."""

Array = NDArray[np.float64]
Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-math.inf, math.inf)
Verdict = Literal["better", "worse", "equivalent", "not resolved"]


@dataclass(frozen=True)
class Interval:
    """An estimate with the range that its data leave open."""

    estimate: float
    """NaN when nothing was scored."""
    low: float
    high: float
    method: str
    """For the reader: "Wilson", "t over items", …"""
    level: float = LEVEL


@dataclass(frozen=True)
class PairedDifference:
    """Method a minus method b on the same items, in the task's units."""

    estimate: float
    """Mean over items of (mean over a's seeds − mean over b's seeds). NaN when no item was scored by both."""
    low: float
    high: float
    p_value: float
    """Two-sided, of no difference; not corrected for other comparisons."""
    method: str
    n_items: int
    """Items that every seed of both scored."""
    n_dropped: int
    """Items left out because a seed of a or b has no score for them."""
    a_better: int
    """Items on which a's mean over seeds is the better one."""
    b_better: int
    resolvable: float
    """The smallest true difference that this design finds with 80 % power; inf: none, NaN: no spread to tell."""
    equivalence_low: float
    """The 90 % interval, whose inclusion in ±margin is the test of equivalence (two one-sided tests at 0.05)."""
    equivalence_high: float
    level: float = LEVEL


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a proportion; [0, 1] when n = 0. Wilson 1927; Brown, Cai, DasGupta 2001, eq. 4."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, "no scored items", level)
    z = float(ndtri((1 + level) / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # For no successes and for n of them the end is exactly 0 or 1; arithmetic would miss it by 1e-17.
    low, high = (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)
    return Interval(p, low, high, "Wilson", level)


def bound_without_spread(value: float, n: int, bounds: Bounds = UNBOUNDED, level: float = LEVEL) -> Interval:
    """What n equal values say about a mean on a bounded scale.

    If a share u of all items had another value, n draws would miss it with probability (1 − u)ⁿ. The largest u that is
    not rejected at α is 1 − α^(1/n), about 3/n, and at worst that share lies at an end of the scale.

    Args:
        value: the common value.
        n: number of items; 1 gives nearly the whole scale.
        bounds: the scale's ends; without them nothing is known and the interval is unbounded.
    """
    if n == 0:
        return Interval(math.nan, *bounds, "no scored items", level)
    unseen = 1 - (1 - level) ** (1 / n)
    bottom, top = min(bounds[0], value), max(bounds[1], value)
    low = value - unseen * (value - bottom)
    return Interval(value, low, value + unseen * (top - value), "bound without spread", level)


def t_interval(values: Sequence[float] | Array, bounds: Bounds = UNBOUNDED, level: float = LEVEL) -> Interval:
    """Student's t interval of a mean, cut at the scale's ends. Values without spread get `bound_without_spread`.

    Args:
        values: shape (n,); NaN is left out.
        bounds: ends of the scale, if it has any.
    """
    scored = np.asarray(values, dtype=np.float64)
    return score_interval(scored[None, :], binary=False, bounds=bounds, level=level)


def score_interval(scores: Array, binary: bool, bounds: Bounds | None = None, level: float = LEVEL) -> Interval:
    """The mean score of a method, with the interval for new items and, with several seeds, for new training runs.

    One seed: Wilson for 0/1 scores, t over items otherwise. Several seeds: the variance of the mean is estimated by

        s²(item means over seeds) / n  +  s²(seed means over items) / S

    with a t quantile at the Welch–Satterthwaite degrees of freedom. With score = μ + item + seed + rest, the variance
    of the mean is σ²_item/n + σ²_seed/S + σ²_rest/(nS). The first term estimates σ²_item/n + σ²_rest/(nS), the second
    σ²_seed/S + σ²_rest/(nS): because item means contain seed noise the sum counts σ²_rest/(nS) twice, which makes the
    interval slightly conservative.

    Args:
        scores: (seeds, items); an item that a seed did not score (NaN) is left out for all seeds.
        binary: scores are 0 or 1.
        bounds: ends of the scale (lower, upper); (0, 1) for binary scores if not given.
    """
    complete = _complete(np.asarray(scores, dtype=np.float64))
    seeds, n = complete.shape
    if seeds == 1 and binary:
        return wilson(int(complete.sum()), n, level)
    bounds = bounds or ((0.0, 1.0) if binary else UNBOUNDED)
    if n == 0:
        return bound_without_spread(math.nan, 0, bounds, level)
    estimate = float(complete.mean())
    se, df = _standard_error([_part(complete.mean(axis=0)), *([_part(complete.mean(axis=1))] if seeds > 1 else [])])
    if n == 1 or se == 0:
        return bound_without_spread(estimate, n, bounds, level)
    half = float(stdtrit(df, (1 + level) / 2)) * se
    low, high = max(estimate - half, min(bounds[0], estimate)), min(estimate + half, max(bounds[1], estimate))
    return Interval(estimate, low, high, "t over items" if seeds == 1 else "t over items and seeds", level)


def paired_difference(
    a: Array,
    b: Array,
    *,
    binary: bool = False,
    scale: float = math.inf,
    higher_is_better: bool = True,
    a_trained: bool = True,
    b_trained: bool = True,
) -> PairedDifference:
    """Method a minus method b on the same items: interval, p value, and what the design could have resolved.

    * One seed each, 0/1 scores: exact McNemar test (binomial on the discordant pairs) with the interval of Bonett and
      Price (2012): Wald's after adding one discordant pair each way. It has a closed form, keeps its width without
      discordant pairs, and at small counts excludes 0 when the exact test does. Where the exact test is the stricter
      one the interval is stretched to touch 0, so that interval and p never disagree.
    * Otherwise the variance is s²(item differences of seed means)/n + s²_a/S_a + s²_b/S_b, where s² of a method is that
      of its seed means, and t has the Welch–Satterthwaite degrees of freedom; one seed each: the paired t test. Item
      differences contain seed noise (see `score_interval`), so this is slightly conservative. Seeds are not paired.
    * One trained run against several: its seed variance is taken to be the other method's.
    * Differences without spread: the bound of `bound_without_spread`, and p as the level at which it reaches 0.

    Args:
        a: (seeds of a, items), NaN where unscored; an item counts only if all seeds of both scored it.
        b: (seeds of b, items), the same items in the same order.
        binary: all scores are 0 or 1.
        scale: |best − worst|, which bounds differences without spread.
        higher_is_better: decides only which count is `a_better`.
        a_trained: False for the starting model, whose single run has no training-seed variance.
        b_trained: likewise.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    kept = ~np.isnan(np.concatenate([first, second])).any(axis=0)
    first, second = first[:, kept], second[:, kept]
    n, sign = int(kept.sum()), 1 if higher_is_better else -1
    if n == 0:
        nothing = (math.nan, -scale, scale, math.nan, "no item scored by both", 0, len(kept), 0, 0, math.inf)
        return PairedDifference(*nothing, -scale, scale)
    differences = first.mean(axis=0) - second.mean(axis=0)
    better, worse = int((sign * differences > _TINY).sum()), int((sign * differences < -_TINY).sum())
    if binary and len(first) == len(second) == 1:
        test = _mcnemar(float(differences.sum()), better + worse, n)
    else:
        test = _t_test(differences, _seed_parts(first, second, a_trained, b_trained), scale)
    estimate = float(differences.mean())
    (low, high), (low90, high90) = (_cut(bounds, scale) for bounds in (test.interval, test.equivalence))
    return PairedDifference(
        estimate, low, high, test.p, test.method, n, len(kept) - n, better, worse, test.resolvable, low90, high90
    )


def default_margin(best: float, worst: float | None) -> float:
    """Differences smaller than 2 % of the scale are called equivalent. 0 (no such claim) where the scale has no end."""
    scale = math.inf if worst is None else abs(best - worst)
    return 0.02 * scale if math.isfinite(scale) else 0.0


def verdict(
    difference: PairedDifference, margin: float, *, higher_is_better: bool = True, p_value: float | None = None
) -> Verdict:
    """What the data say about a against b. Significance comes first: a small real difference is no equivalence.

    Args:
        difference: of a minus b.
        margin: largest difference that does not matter, task units; not above 0: equivalence is never claimed.
        higher_is_better: False for losses.
        p_value: corrected for the family of comparisons (`holm`); the difference's own by default.
    """
    p = difference.p_value if p_value is None else p_value
    if p < ALPHA:
        return "better" if (difference.estimate > 0) == higher_is_better else "worse"
    if -margin < difference.equivalence_low and difference.equivalence_high < margin:
        return "equivalent"
    return "not resolved"


def changed_by_holm(difference: PairedDifference, adjusted: float) -> bool:
    """True if the difference is significant alone (its interval excludes 0) and not within its family."""
    return difference.p_value < ALPHA <= adjusted


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (1979), in the order given. NaN (no test) stays NaN and is not counted."""
    adjusted = [math.nan] * len(p_values)
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted


_TINY = 1e-12
"""Rounding of means over seeds: smaller differences are none."""


class _Part(NamedTuple):
    """A term of a variance: its estimate and degrees of freedom."""

    variance: float
    df: int


class _Test(NamedTuple):
    p: float
    interval: Bounds
    equivalence: Bounds
    resolvable: float
    method: str


def _complete(scores: Array) -> Array:
    """The items that all seeds scored, (seeds, n)."""
    return scores[:, ~np.isnan(scores).any(axis=0)]


def _part(means: Array) -> _Part:
    """The variance of a mean of means, shape (k,); 0 with 0 degrees of freedom for fewer than two."""
    if len(means) < 2 or float(np.ptp(means)) <= _TINY * max(1.0, float(np.abs(means).max())):
        return _Part(0.0, len(means) - 1)
    return _Part(float(means.var(ddof=1)) / len(means), len(means) - 1)


def _standard_error(parts: Sequence[_Part]) -> tuple[float, float]:
    """Root of the summed variances and the Welch–Satterthwaite degrees of freedom (Σv)² / Σ(v²/df)."""
    total = sum(part.variance for part in parts)
    if total == 0:
        return 0.0, math.nan
    return math.sqrt(total), total**2 / sum(part.variance**2 / part.df for part in parts if part.variance > 0)


def _seed_parts(first: Array, second: Array, a_trained: bool, b_trained: bool) -> list[_Part]:
    """The training-seed terms of a difference's variance; none where no method has two seeds."""
    counts, parts = (len(first), len(second)), [_part(first.mean(axis=1)), _part(second.mean(axis=1))]
    if max(counts) < 2:
        return []
    for single, trained in enumerate((a_trained, b_trained)):
        if counts[single] == 1 and trained:
            other = parts[1 - single]
            return [_Part(other.variance * (1 + counts[1 - single]), other.df)]  # s² (1/S + 1/1) = s²/S · (1 + S)
    return [part for part, count in zip(parts, counts, strict=True) if count > 1]


def _t_test(differences: Array, seed_parts: Sequence[_Part], scale: float) -> _Test:
    """t test of a mean difference whose variance has an item term and seed terms."""
    n = len(differences)
    se, df = _standard_error([_part(differences), *seed_parts])
    estimate = float(differences.mean())
    if n == 1 or se == 0:
        return _without_spread(estimate, n, scale)
    p = 2 * float(stdtr(df, -abs(estimate) / se))
    wide, narrow, powered = (float(stdtrit(df, quantile)) * se for quantile in (1 - ALPHA / 2, 1 - ALPHA, POWER))
    method = "paired t over items and seeds" if seed_parts else "paired t"
    resolvable = wide + powered
    return _Test(p, (estimate - wide, estimate + wide), (estimate - narrow, estimate + narrow), resolvable, method)


def _without_spread(value: float, n: int, scale: float) -> _Test:
    """Equal differences: p is the α at which the bound α^(1/n) reaches 0, (scale / (scale + |value|))ⁿ."""
    wide = bound_without_spread(value, n, (-scale, scale))
    narrow = bound_without_spread(value, n, (-scale, scale), 1 - 2 * ALPHA)
    p = (scale / (scale + abs(value))) ** n if math.isfinite(scale) and scale > 0 else 1.0
    return _Test(p, (wide.low, wide.high), (narrow.low, narrow.high), math.nan, wide.method)


def _mcnemar(surplus: float, discordant: int, n: int) -> _Test:
    """Exact McNemar test with Bonett and Price's interval. surplus: pairs with a above b, less those with b above a."""
    losing = (discordant - abs(surplus)) / 2
    p = min(1.0, 2 * float(bdtr(round(losing), discordant, 0.5))) if discordant else 1.0
    centre = surplus / (n + 2)
    se = math.sqrt((discordant + 2) / (n + 2) - centre**2) / math.sqrt(n + 2)
    wide, narrow, powered = (float(ndtri(quantile)) * se for quantile in (1 - ALPHA / 2, 1 - ALPHA, POWER))
    interval = _cut((centre - wide, centre + wide), 1.0)
    if p >= ALPHA:
        interval = (min(interval[0], 0.0), max(interval[1], 0.0))
    equivalence = _cut((centre - narrow, centre + narrow), 1.0)
    resolvable = max(wide + powered, _fewest_resolvable(n))
    return _Test(p, interval, equivalence, resolvable, "exact McNemar, Bonett–Price interval")


def _cut(interval: Bounds, scale: float) -> Bounds:
    """No difference is larger than the scale."""
    return max(interval[0], -scale), min(interval[1], scale)


def _fewest_resolvable(n: int) -> float:
    """The difference at which n pairs hold six discordant ones with 80 % probability; the exact test needs as many."""
    if n < FEWEST_DISCORDANT:
        return math.inf
    return float(betaincinv(FEWEST_DISCORDANT, n - FEWEST_DISCORDANT + 1, POWER))
