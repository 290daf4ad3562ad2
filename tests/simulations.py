"""Methods that are simulated, so that the truth is known: how often each test finds what is not there, or misses what is.

    python tests/simulations.py        # the figures of docs/decisions/0009-which-test.md, in about five minutes on one core

Three kinds of scores. 0/1: an item's chance of being solved is Beta(½, ½), most are always or never solved. Ratings: 1 to 10 in
whole numbers. Losses: log-normal, so that a few items are most of the mean. A run shifts all its scores (seed_sd); with `taste`,
each method is better on some items and worse on others, and as good on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats  # type: ignore[import-untyped, unused-ignore]

from gsil_bench.evaluation.resampling import paired_bootstrap, sign_flip, two_level_bootstrap
from gsil_bench.evaluation.statistics import Array, paired_difference, welch

Draw = Callable[[np.random.Generator], tuple[Array, Array]]
"""Scores of two methods that are equally good, (seeds, items) each."""
Test = Callable[[Array, Array], float]
"""A p value of no difference."""
FEW = 399
"""Resamples of a bootstrap within a simulation."""


def zero_one(items: int, seeds: tuple[int, int] = (1, 1), seed_sd: float = 0.0, taste: float = 0.0) -> Draw:
    """0/1 scores with the mean ½."""

    def draw(rng: np.random.Generator) -> tuple[Array, Array]:
        abilities = np.clip(rng.beta(0.5, 0.5, items), taste, 1 - taste)
        return _runs(rng, abilities, seeds[0], seed_sd, taste), _runs(rng, abilities, seeds[1], seed_sd, taste)

    return draw


def _runs(rng: np.random.Generator, abilities: Array, seeds: int, seed_sd: float, taste: float) -> Array:
    own = abilities + rng.choice([-taste, taste], len(abilities))
    chances = np.clip(own + rng.normal(0, seed_sd, (seeds, 1)), 0, 1)
    return (rng.random((seeds, len(abilities))) < chances).astype(np.float64)


def equal_items(items: int, seeds: int, seed_sd: float, chance: float = 0.4) -> Draw:
    """0/1 scores of items that are all equally hard: nothing is won by pairing them."""

    def draw(rng: np.random.Generator) -> tuple[Array, Array]:
        abilities = np.full(items, chance)
        return _runs(rng, abilities, seeds, seed_sd, 0.0), _runs(rng, abilities, seeds, seed_sd, 0.0)

    return draw


def ratings(items: int, seeds: tuple[int, int] = (1, 1), seed_sd: float = 0.0, same: float = 0.0) -> Draw:
    """Whole numbers from 1 to 10; with the chance `same` the answers to an item are the same and get the same rating."""

    def draw(rng: np.random.Generator) -> tuple[Array, Array]:
        quality, alike = rng.normal(6.5, 2, items), rng.random(items) < same
        scores = [quality + rng.normal(0, seed_sd, (count, 1)) + rng.normal(0, 1.5, (count, items)) for count in seeds]
        first, second = (np.clip(np.round(each), 1, 10) for each in scores)
        return np.where(alike, np.round(np.clip(quality, 1, 10)), first), np.where(
            alike, np.round(np.clip(quality, 1, 10)), second
        )

    return draw


def losses(items: int, seeds: tuple[int, int] = (1, 1), seed_sd: float = 0.0) -> Draw:
    """Log-normal over items, and by a log-normal factor of each method and run."""

    def draw(rng: np.random.Generator) -> tuple[Array, Array]:
        level = rng.normal(-1, 1.2, items)
        first, second = (level + rng.normal(0, seed_sd, (count, 1)) + rng.normal(0, 0.3, (count, items)) for count in seeds)
        return np.exp(first), np.exp(second)

    return draw


def by_binary(a: Array, b: Array) -> float:
    """What a table says of 0/1 scores."""
    return paired_difference(a, b, binary=True, scale=1).p_value


def by_t(a: Array, b: Array) -> float:
    """What a table says of graded scores, or of several seeds."""
    return paired_difference(a, b).p_value


def by_sign_flips(a: Array, b: Array) -> float:
    return sign_flip(a, b, resamples=FEW).p_value


def by_bootstrap(a: Array, b: Array) -> float:
    return paired_bootstrap(a, b, resamples=FEW).p_value


def by_two_levels(a: Array, b: Array) -> float:
    return two_level_bootstrap(a, b, resamples=FEW).p_value


def by_welch(a: Array, b: Array) -> float:
    first, second = a.mean(axis=1), b.mean(axis=1)
    if len(first) == 1 or np.ptp(first) == np.ptp(second) == 0:
        return 1.0  # there is no test; counted as none found
    return welch(first, second).p_value


def by_satterthwaite(a: Array, b: Array) -> float:
    """What this suite did before: items' and seeds' terms added with the rest in both, Welch and Satterthwaite's degrees."""
    differences = a.mean(axis=0) - b.mean(axis=0)
    parts = [(differences.var(ddof=1) / len(differences), len(differences) - 1)]
    if len(a) == 1:
        own = b.mean(axis=1).var(ddof=1)
        parts += [(own * (1 + 1 / len(b)), len(b) - 1)]
    else:
        parts += [(runs.mean(axis=1).var(ddof=1) / len(runs), len(runs) - 1) for runs in (a, b)]
    variance = sum(value for value, _ in parts)
    df = variance**2 / sum(value**2 / df for value, df in parts)
    return float(2 * stats.t.sf(abs(differences.mean()) / math.sqrt(variance), df))


def by_pooling(a: Array, b: Array) -> float:
    """The trap: seeds × items as one sample of independent scores, unpaired."""
    return float(stats.ttest_ind(a.ravel(), b.ravel()).pvalue)


def rejections(draw: Draw, tests: Mapping[str, Test], repeats: int, seed: int = 0) -> dict[str, float]:
    """Share of comparisons of equally good methods that each test calls a difference (p < 0.05)."""
    rng, found = np.random.default_rng(seed), dict.fromkeys(tests, 0)
    for _ in range(repeats):
        first, second = draw(rng)
        for name, test in tests.items():
            found[name] += test(first, second) < 0.05
    return {name: count / repeats for name, count in found.items()}


def covered(interval: Callable[[np.random.Generator], tuple[float, float]], truth: float, repeats: int, seed: int = 0) -> float:
    """Share of intervals that hold the truth."""
    rng = np.random.default_rng(seed)
    ends = np.array([interval(rng) for _ in range(repeats)])
    return float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean())


ONE_SEED_BINARY: Mapping[str, Test] = {"exact McNemar": by_binary, "paired t": by_t, "bootstrap": by_bootstrap}
ONE_SEED_GRADED: Mapping[str, Test] = {"paired t": by_t, "sign flips": by_sign_flips, "bootstrap": by_bootstrap}
SEVERAL: Mapping[str, Test] = {
    "components": by_t,
    "before": by_satterthwaite,
    "two-level bootstrap": by_two_levels,
    "Welch on seeds": by_welch,
    "pooled": by_pooling,
}
DECISION: Mapping[str, tuple[Mapping[str, Test], Mapping[str, Draw]]] = {
    "0/1 scores, one seed": (
        ONE_SEED_BINARY,
        {
            **{f"{n} items": zero_one(n) for n in (20, 50, 164, 1000)},
            "164 items, runs of SD 2 points": zero_one(164, seed_sd=0.02),
            "1000 items, runs of SD 2 points": zero_one(1000, seed_sd=0.02),
        },
    ),
    "graded scores, one seed": (
        ONE_SEED_GRADED,
        {
            **{f"{n} ratings": ratings(n) for n in (10, 20, 80, 160)},
            "80 ratings, 95 % of the answers the same": ratings(80, same=0.95),
            **{f"{n} losses": losses(n) for n in (20, 150)},
        },
    ),
    "several seeds": (
        SEVERAL,
        {
            f"{n} items, {seeds[0]} against {seeds[1]} runs of SD {100 * sd:g} points{', tastes' if taste else ''}": zero_one(
                n, seeds, sd, taste
            )
            for n in (164, 1000)
            for seeds in ((1, 2), (1, 3), (2, 2), (3, 3), (5, 5))
            for sd, taste in ((0.0, 0.0), (0.02, 0.0), (0.04, 0.0), (0.02, 0.2))
        },
    ),
}


def main(repeats: int = 2000) -> None:
    """Print each group as a Markdown table of percentages."""
    for title, (tests, draws) in DECISION.items():
        print(f"\n| {title} | {' | '.join(tests)} |\n| :--- |{' ---: |' * len(tests)}")
        for name, draw in draws.items():
            found = rejections(draw, tests, repeats)
            print(f"| {name} | {' | '.join(f'{100 * found[test]:.1f}' for test in tests)} |", flush=True)


if __name__ == "__main__":
    main()
