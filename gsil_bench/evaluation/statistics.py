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
from scipy.special import bdtr, betaincinv, nctdtrinc, ndtr, ndtri, stdtr, stdtridf, stdtrit  # type: ignore[import-untyped, unused-ignore]

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
    centre: float = math.nan
    """Of the interval: the estimate, or for McNemar's test Bonett and Price's adjusted one."""
    standard_error: float = math.nan
    """0: no spread, the interval is a bound."""
    df: float = math.nan
    """Degrees of freedom; inf: normal."""


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


def clopper_pearson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Clopper and Pearson's exact interval (1934): never below its level, for few items far above; [0, 1] when n = 0."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, "no scored items", level)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return Interval(successes / n, low, high, "Clopper–Pearson", level)


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


def clustered_interval(
    values: Sequence[float] | Array, clusters: Sequence[object], bounds: Bounds = UNBOUNDED, level: float = LEVEL
) -> Interval:
    """t interval of a mean whose values are not independent within clusters: turns of a question, samples of a problem.

    With G clusters and residuals e, the variance of the mean is G/(G − 1) · Σ_g (Σ_{i in g} e_i)² / n², and t has G − 1
    degrees of freedom (Liang and Zeger 1986; Miller 2024, arXiv 2411.00640, eq. 4). The suite's own item scores are already
    means over turns and samples, so that a table's items are its clusters.

    Args:
        values: shape (n,); NaN is left out.
        clusters: of each value, in the same order; equal ones belong together.
        bounds: ends of the scale, if it has any.
    """
    scored = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(scored)
    if not known.any():
        return bound_without_spread(math.nan, 0, bounds, level)
    codes = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    groups = np.array([codes[name] for name in clusters])[known]
    estimate, n, count = float(scored[known].mean()), int(known.sum()), len(np.unique(groups))
    sums = np.bincount(groups, weights=scored[known] - estimate)
    if count == 1 or float(np.abs(sums).max()) <= _TINY * max(1.0, abs(estimate)):
        return bound_without_spread(estimate, count, bounds, level)
    se = math.sqrt(count / (count - 1) * float((sums**2).sum())) / n
    return _within(estimate, float(stdtrit(count - 1, (1 + level) / 2)) * se, bounds, f"t over {count} clusters", level)


def score_interval(scores: Array, binary: bool, bounds: Bounds | None = None, level: float = LEVEL) -> Interval:
    """The mean score of a method, with the interval for new items and, with several seeds, for new training runs.

    One seed: Wilson for 0/1 scores, t over items otherwise. Several seeds: with score = μ + item + seed + rest, the variance
    of the mean is σ²_item/n + σ²_seed/S + σ²_rest/(nS), of which the two-way analysis of variance has the unbiased estimate

        s²(item means over seeds) / n  +  s²(seed means over items) / S  −  s²(rest) / (nS)

    with a t quantile whose degrees of freedom lie between those of the items and of the seeds (see `_standard_error`).

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
    se, df = _standard_error(_part(complete.mean(axis=0)), [_part(complete.mean(axis=1))], [_rest(complete)])
    if n == 1 or se == 0:
        return bound_without_spread(estimate, n, bounds, level)
    name = "t over items" if seeds == 1 else "t over items and seeds"
    return _within(estimate, float(stdtrit(df, (1 + level) / 2)) * se, bounds, name, level)


def _within(estimate: float, half: float, bounds: Bounds, method: str, level: float) -> Interval:
    """estimate ± half, cut at the scale's ends."""
    low, high = max(estimate - half, min(bounds[0], estimate)), min(estimate + half, max(bounds[1], estimate))
    return Interval(estimate, low, high, method, level)


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
    * Otherwise the variance is s²(item differences of seed means)/n + s²_a/S_a + s²_b/S_b − r²_a/(n S_a) − r²_b/(n S_b),
      where s² of a method is that of its seed means and r² what neither items nor seeds explain, which both other terms
      contain (see `score_interval`). One seed each: the paired t test. Seeds are not paired.
    * One trained run against several: its seed variance and its rest are taken to be the other method's.
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
        test = _t_test(differences, *_seed_parts(first, second, a_trained, b_trained), scale)
    estimate = float(differences.mean())
    (low, high), (low90, high90) = (_cut(bounds, scale) for bounds in (test.interval, test.equivalence))
    dropped, resolvable = len(kept) - n, test.resolvable
    found = (estimate, low, high, test.p, test.method, n, dropped, better, worse, resolvable, low90, high90)
    return PairedDifference(*found, LEVEL, test.centre, test.standard_error, test.df)


class Welch(NamedTuple):
    """Welch's t test on seed means."""

    estimate: float
    low: float
    high: float
    p_value: float
    df: float


def welch(a: Sequence[float] | Array, b: Sequence[float] | Array, level: float = LEVEL) -> Welch:
    """Mean of a minus mean of b over training runs, the items taken as given (Welch 1947).

    It answers for these items only: where methods do better on different items, a verdict about new items needs
    `paired_difference`, which `docs/decisions/0009-which-test.md` shows.

    Args:
        a: a score per run, shape (runs of a,).
        b: likewise.

    Raises:
        ValueError: a method with fewer than two runs, or no spread in both.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if min(len(first), len(second)) < 2:
        raise ValueError(f"Welch's test needs two runs of each method, not {len(first)} and {len(second)}")
    estimate = float(first.mean() - second.mean())
    se, df = _standard_error(_NOTHING, [_part(first), _part(second)], [])
    if se == 0:
        raise ValueError("Welch's test needs spread: the runs of each method have one and the same score")
    half = float(stdtrit(df, (1 + level) / 2)) * se
    return Welch(estimate, estimate - half, estimate + half, 2 * float(stdtr(df, -abs(estimate) / se)), df)


def equivalence_p(difference: PairedDifference, margin: float, scale: float = math.inf) -> float:
    """p value of two one-sided tests (Schuirmann 1987): of the difference being ±margin or more. Below 0.05 exactly where the
    90 % interval lies within ±margin. NaN if no item was scored by both.

    Args:
        difference: of two methods.
        margin: largest difference that does not matter, task units; not above 0 gives 1.
        scale: |best − worst|, which bounds differences without spread.
    """
    if difference.n_items == 0:
        return math.nan
    if margin <= 0:
        return 1.0
    if difference.standard_error == 0:
        return _bounded_equivalence_p(difference.estimate, difference.n_items, margin, scale)
    gaps = (margin - difference.centre, margin + difference.centre)
    return max(_upper_tail(gap / difference.standard_error, difference.df) for gap in gaps)


def _bounded_equivalence_p(value: float, n: int, margin: float, scale: float) -> float:
    """Equal differences: half the α at which the bound reaches the margin, (1 − u)ⁿ / 2 for the share u that does."""
    if abs(value) >= margin or not scale > 0:
        return 1.0 if abs(value) >= margin else 0.0
    share = (margin - abs(value)) / (scale - abs(value)) if margin < scale else 1.0
    return (1 - share) ** n / 2


def minimum_detectable_difference(
    sd: float,
    n: int,
    correlation: float,
    seeds: int = 1,
    seed_sd: float = 0.0,
    seed_correlation: float | None = None,
    power: float = POWER,
) -> float:
    """The smallest true difference of two methods that a design finds at p < 0.05 with that power; inf where nothing is tested.

    An item's difference of seed means has the variance d² = 2 sd² ((ρ_s − ρ) + (1 − ρ_s) / S), where ρ is the correlation of
    two methods' scores of an item and ρ_s that of two runs of one method; the mean over n items adds its seeds' 2 seed_sd² / S.
    The difference is c · √(d²/n + 2 seed_sd²/S), where c is the noncentrality at which t reaches its quantile with that power
    (near t₀.₉₇₅ + t_power: Miller 2024, arXiv 2411.00640, sec. 5). One seed: no test sees the seeds, seed_sd does not count.
    Several: the degrees of freedom are those of `paired_difference` on such data; for its two separately estimated variances of
    k + 1 runs they are 2k (k + 1)/(k + 2), because Σv²/(Σv)² is on average (k + 2)/(2 (k + 1)) for χ² of k degrees.

    Args:
        sd: of one run's scores over items, task units: √(p (1 − p)) for 0/1 scores.
        n: items.
        correlation: ρ, at most ρ_s; 0 is the unpaired design.
        seeds: S, runs of each method.
        seed_sd: standard deviation of a run's mean score, beyond what its items explain.
        seed_correlation: ρ_s; by default ρ: methods differ from each other on an item as their own runs do.

    Raises:
        ValueError: fewer than one item or seed, or a correlation that is not in −1 … ρ_s … 1.
    """
    same = correlation if seed_correlation is None else seed_correlation
    if n < 1 or seeds < 1 or not -1 <= correlation <= same <= 1:
        raise ValueError(f"no design: {n} items, {seeds} seeds, correlations {correlation} between methods, {same} within")
    if n < 2:
        return math.inf
    items = _Part(2 * sd**2 * ((same - correlation) + (1 - same) / seeds) / n, n - 1)
    runs, rests, k = list[_Part](), list[_Part](), seeds - 1
    if k:
        rests = [_Part(2 * sd**2 * (1 - same) / seeds / n, 2 * k * (n - 1))]
        runs = [_Part(2 * seed_sd**2 / seeds + rests[0].variance, 2 * k * (k + 1) / (k + 2))]
    se, df = _standard_error(items, runs, rests)
    return 0.0 if se == 0 else float(nctdtrinc(df, 1 - power, stdtrit(df, 1 - ALPHA / 2))) * se


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


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's step-up adjusted p values (1995), in the order given: below q, the expected share of false
    discoveries is at most q. For grids of ablations, where a family's every single error is not the question. NaN (no test)
    stays NaN and is not counted.
    """
    adjusted = [math.nan] * len(p_values)
    tested = sorted(((p, index) for index, p in enumerate(p_values) if not math.isnan(p)), reverse=True)
    smallest = 1.0
    for above, (p, index) in enumerate(tested):
        smallest = min(smallest, p * len(tested) / (len(tested) - above))
        adjusted[index] = smallest
    return adjusted


_TINY = 1e-12
"""Rounding of means over seeds: smaller differences are none."""


class _Part(NamedTuple):
    """A term of a variance: its estimate and degrees of freedom."""

    variance: float
    df: float


_NOTHING = _Part(0.0, 0)


class _Test(NamedTuple):
    p: float
    interval: Bounds
    equivalence: Bounds
    resolvable: float
    method: str
    centre: float
    standard_error: float
    df: float


def _upper_tail(t: float, df: float) -> float:
    """P(T > t); normal for infinite degrees of freedom."""
    return float(ndtr(-t)) if math.isinf(df) else float(stdtr(df, -t))


def _complete(scores: Array) -> Array:
    """The items that all seeds scored, (seeds, n)."""
    return scores[:, ~np.isnan(scores).any(axis=0)]


def _part(means: Array) -> _Part:
    """The variance of a mean of means, shape (k,); 0 with 0 degrees of freedom for fewer than two."""
    if len(means) < 2 or float(np.ptp(means)) <= _TINY * max(1.0, float(np.abs(means).max())):
        return _Part(0.0, len(means) - 1)
    return _Part(float(means.var(ddof=1)) / len(means), len(means) - 1)


def _rest(scores: Array) -> _Part:
    """What neither items nor seeds explain, as a variance of the mean: s²(rest) / (nS). scores: (seeds, items)."""
    seeds, n = scores.shape
    df = (seeds - 1) * (n - 1)
    if df == 0:
        return _NOTHING
    residuals = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    return _Part(float((residuals**2).sum()) / df / scores.size, df)


def _standard_error(items: _Part, seeds: Sequence[_Part], rests: Sequence[_Part]) -> tuple[float, float]:
    """Root of items + Σ seeds − Σ rests, and its degrees of freedom.

    The items' term and the seeds' terms each contain the rest, so the truth is at least the larger of the two, and so is what
    is returned. The degrees of freedom are those whose 97.5 % quantile is Cochran's (1964): the quantiles of the items' term and
    of the seeds' terms (Welch–Satterthwaite among themselves), weighted by their variances. Welch and Satterthwaite's for all
    terms would take the few degrees of the seeds for many wherever two runs happen to agree, and find differences that are not
    there in up to 11 % of cases (docs/decisions/0009-which-test.md).
    """
    runs = sum(part.variance for part in seeds)
    total = max(items.variance + runs - sum(part.variance for part in rests), items.variance, runs)
    if total == 0:
        return 0.0, math.nan
    if runs == 0:
        return math.sqrt(total), items.df
    of_runs = runs**2 / sum(part.variance**2 / part.df for part in seeds if part.variance > 0)
    if items.variance == 0:
        return math.sqrt(total), of_runs
    quantiles = [float(stdtrit(df, 1 - ALPHA / 2)) for df in (items.df, of_runs)]
    weighted = (items.variance * quantiles[0] + runs * quantiles[1]) / (items.variance + runs)
    return math.sqrt(total), float(stdtridf(1 - ALPHA / 2, weighted))


def _seed_parts(first: Array, second: Array, a_trained: bool, b_trained: bool) -> tuple[list[_Part], list[_Part]]:
    """The training-seed terms of a difference's variance, and the rests that they and the items' term both contain; none where
    no method has two seeds.
    """
    counts, parts = (len(first), len(second)), [_part(first.mean(axis=1)), _part(second.mean(axis=1))]
    if max(counts) < 2:
        return [], []
    rests = [_rest(first), _rest(second)]
    for single, trained in enumerate((a_trained, b_trained)):
        if counts[single] == 1 and trained:
            # s² (1/S + 1/1) = s²/S · (1 + S), and so for the rest
            share = 1 + counts[1 - single]
            own, rest = ([_Part(each[1 - single].variance * share, each[1 - single].df)] for each in (parts, rests))
            return own, rest
    several = [index for index, count in enumerate(counts) if count > 1]
    return [parts[index] for index in several], [rests[index] for index in several]


def _t_test(differences: Array, seed_parts: Sequence[_Part], rests: Sequence[_Part], scale: float) -> _Test:
    """t test of a mean difference whose variance has an item term and seed terms."""
    n = len(differences)
    se, df = _standard_error(_part(differences), seed_parts, rests)
    estimate = float(differences.mean())
    if n == 1 or se == 0:
        return _without_spread(estimate, n, scale)
    p = 2 * float(stdtr(df, -abs(estimate) / se))
    wide, narrow, powered = (float(stdtrit(df, quantile)) * se for quantile in (1 - ALPHA / 2, 1 - ALPHA, POWER))
    method = "paired t over items and seeds" if seed_parts else "paired t"
    interval, equivalence = (estimate - wide, estimate + wide), (estimate - narrow, estimate + narrow)
    return _Test(p, interval, equivalence, wide + powered, method, estimate, se, df)


def _without_spread(value: float, n: int, scale: float) -> _Test:
    """Equal differences: p is the α at which the bound α^(1/n) reaches 0, (scale / (scale + |value|))ⁿ."""
    wide = bound_without_spread(value, n, (-scale, scale))
    narrow = bound_without_spread(value, n, (-scale, scale), 1 - 2 * ALPHA)
    p = (scale / (scale + abs(value))) ** n if math.isfinite(scale) and scale > 0 else 1.0
    return _Test(p, (wide.low, wide.high), (narrow.low, narrow.high), math.nan, wide.method, value, 0.0, math.nan)


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
    return _Test(p, interval, equivalence, resolvable, "exact McNemar, Bonett–Price interval", centre, se, math.inf)


def _cut(interval: Bounds, scale: float) -> Bounds:
    """No difference is larger than the scale."""
    return max(interval[0], -scale), min(interval[1], scale)


def _fewest_resolvable(n: int) -> float:
    """The difference at which n pairs hold six discordant ones with 80 % probability; the exact test needs as many."""
    if n < FEWEST_DISCORDANT:
        return math.inf
    return float(betaincinv(FEWEST_DISCORDANT, n - FEWEST_DISCORDANT + 1, POWER))
