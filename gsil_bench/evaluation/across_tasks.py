"""Methods over several tasks: interquartile mean, mean rank, probability of improvement, with bootstrap intervals.

The three are rliable's (Agarwal et al. 2021, arXiv 2108.13264, sec. 4), of scores that are normalised to 0 … 1. Departure from
rliable: its stratified bootstrap draws runs within each task, which has no spread with one run. Here runs and items are drawn
within each task, the same items for all methods, so that the intervals cover items always and training runs where there are
several. The tasks themselves are taken as given. No average stands for the tasks' own columns: it is printed beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, trim_mean  # type: ignore[import-untyped, unused-ignore]

from gsil_bench.evaluation.statistics import LEVEL, Array, Interval

RESAMPLES = 2000
FEWEST_TASKS = 3
FEWEST_TRAINED = 3
DIGITS = 12
"""Means are rounded to so many decimals before they are ranked or printed: sums differ in their last bits between machines."""

TaskScores = Mapping[str, Array]
"""Method → normalised scores (seeds, items), 1 the best; NaN where unscored. Items are in the same order for all methods."""


@dataclass(frozen=True)
class AcrossRow:
    """A method over all tasks of the summary."""

    method: str
    trained: bool
    iqm: Interval
    """Interquartile mean of the normalised scores of all runs on all tasks."""
    mean_rank: Interval
    """1 is the best of the methods in the summary; ties share their mean rank."""
    improvement: Interval | None
    """Probability that a run of the method scores above a run of the control on a task drawn at random; None for the control."""


@dataclass(frozen=True)
class AcrossTasks:
    """The summary of a comparison over its tasks."""

    control: str
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    """Tasks and methods that do not count, each with the reason."""
    rows: tuple[AcrossRow, ...]
    """In the order of the methods."""

    @property
    def shown(self) -> bool:
        """Below three tasks or three trained methods a summary says less than the columns do."""
        return len(self.tasks) >= FEWEST_TASKS and sum(row.trained for row in self.rows) >= FEWEST_TRAINED


def iqm(scores: Sequence[float] | Array) -> float:
    """Interquartile mean: of what is left when a quarter of the scores, rounded down, is cut at either end.

    Args:
        scores: of all runs on all tasks, any shape. Fewer than four: their mean.
    """
    return float(trim_mean(np.asarray(scores, dtype=np.float64).ravel(), 0.25))


def probability_of_improvement(a: Sequence[Array], b: Sequence[Array]) -> float:
    """Mean over tasks of the share of pairs of runs (one of a, one of b) in which a is better; ties count half.

    Args:
        a: for each task the scores of a's runs, (runs,).
        b: likewise, the same tasks in the same order.
    """
    return float(np.mean([_wins(np.asarray(x)[None], np.asarray(y)[None])[0] for x, y in zip(a, b, strict=True)]))


def mean_ranks(scores: Array) -> Array:
    """Each method's rank on each task, averaged: (methods,). scores: (methods, tasks); 1 is the rank of the highest."""
    ranks: Array = rankdata(-np.asarray(scores, dtype=np.float64), axis=0).mean(axis=1)
    return ranks


def across_tasks(
    scores: Mapping[str, TaskScores],
    methods: Mapping[str, bool],
    control: str,
    left_out: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> AcrossTasks:
    """Summarise methods over tasks.

    Args:
        scores: task → method → scores; every task has all methods. Items that a run did not score count for no method.
        methods: in the table's order; whether each was trained.
        control: one of the methods.
        left_out: what the caller left out, with the reasons.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    means: list[dict[str, Array]] = []  # task → method → means of runs: (1, runs), then of resamples (resamples, runs)
    drawn: list[dict[str, Array]] = []
    for number, table in enumerate(scores.values()):
        complete = ~np.isnan(np.concatenate([table[method] for method in methods])).any(axis=0)
        kept = {method: table[method][:, complete] for method in methods}
        means.append({method: np.round(runs.mean(axis=1), DIGITS)[None] for method, runs in kept.items()})
        drawn.append(_resampled(kept, resamples, np.random.default_rng([seed, number])))
    estimates, spreads = _measures(means, methods, control), _measures(drawn, methods, control)
    rows = []
    for method, trained in methods.items():
        iqm_, rank, better = (_interval(estimates[method][key], spreads[method][key]) for key in _KEYS)
        rows.append(AcrossRow(method, trained, iqm_, rank, None if method == control else better))
    return AcrossTasks(control, tuple(scores), tuple(left_out), tuple(rows))


_KEYS = ("iqm", "rank", "improvement")


def _resampled(scores: TaskScores, resamples: int, rng: np.random.Generator) -> dict[str, Array]:
    """Means of drawn runs over drawn items, (resamples, runs); all methods get the same items."""
    n = next(iter(scores.values())).shape[1]
    items = rng.multinomial(n, np.full(n, 1 / n), resamples) / n
    found = {}
    for method, runs in scores.items():
        chosen = rng.integers(0, len(runs), (resamples, len(runs)))
        found[method] = np.round(np.take_along_axis(items @ runs.T, chosen, axis=1), DIGITS)
    return found


def _measures(means: Sequence[Mapping[str, Array]], methods: Mapping[str, bool], control: str) -> dict[str, dict[str, Array]]:
    """The three measures of each method, (resamples,) each."""
    ranks = np.mean(
        [rankdata(-np.stack([task[method].mean(axis=1).round(DIGITS) for method in methods]), axis=0) for task in means], axis=0
    )  # (methods, resamples)
    return {
        method: {
            "iqm": trim_mean(np.concatenate([task[method] for task in means], axis=1), 0.25, axis=1),
            "rank": ranks[number],
            "improvement": np.mean([_wins(task[method], task[control]) for task in means], axis=0),
        }
        for number, method in enumerate(methods)
    }


def _wins(a: Array, b: Array) -> Array:
    """Share of pairs of runs in which a is higher, ties half: (…, runs of a), (…, runs of b) → (…)."""
    above, equal = a[..., :, None] > b[..., None, :], a[..., :, None] == b[..., None, :]
    shares: Array = (above + 0.5 * equal).mean(axis=(-2, -1))
    return shares


def _interval(estimate: Array, drawn: Array) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    middle, low, high = (round(float(value), DIGITS) for value in (estimate[0], low, high))
    return Interval(middle, low, high, "stratified bootstrap over items and seeds", LEVEL)
