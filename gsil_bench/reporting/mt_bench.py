"""What the ratings of a two-turn benchmark say besides their mean: by category and turn, how much of it is the answers' length
or the judge's mood, and what the missing ratings could change. Pure functions of the items' scores.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsil_bench.evaluation.statistics import Interval, t_interval
from gsil_bench.records import ItemScore

LOWEST, HIGHEST = 1.0, 10.0
"""Of the scale that a judge is asked to use."""
TURNS = 2

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TurnScore:
    """One turn of one question."""

    item: str
    group: str
    """Category."""
    turn: int
    """From 1."""
    rating: float | None
    """Mean of the repeats that could be read."""
    repeats: tuple[float | None, ...]
    """None where no rating could be read."""
    length: int | None
    """Characters of the answer."""


@dataclass(frozen=True)
class CategoryRow:
    """A line of the table."""

    category: str
    by_turn: tuple[float, ...]
    """Mean of each turn's ratings; NaN where there is none."""
    score: Interval
    """Mean over questions of which every turn was rated, the task's own score; the interval is for new questions."""
    questions: int
    unscored_turns: int


@dataclass(frozen=True)
class RatingBounds:
    """What the ratings that are missing leave open."""

    mean: float
    """Over the turns that were rated, as FastChat prints it; NaN without any."""
    low: float
    """Over all turns, if every missing rating were the lowest of the scale."""
    high: float
    """… the highest."""
    turns: int
    unscored: int
    """Turns without a rating."""


@dataclass(frozen=True)
class LengthBias:
    """How ratings go with the length of answers. NaN where one of the two does not vary."""

    pearson: float
    spearman: float
    """Of ranks: one very long answer does not decide it."""
    within: float
    """Pearson's, after the mean of each category and turn was taken from both: some categories are both longer and better."""
    n: int
    """Turns."""


@dataclass(frozen=True)
class RepeatVariance:
    """The variance of single judgments, split in two (one-way analysis of variance, equal numbers of repeats)."""

    questions: float
    """Between turns: what is left when the judge's own noise is taken away. Not below 0."""
    repeats: float
    """Between judgments of the same turn."""
    turns: int
    """With all repeats read."""
    per_turn: int
    """Repeats."""

    @property
    def noise(self) -> float:
        """Standard deviation of the mean score that comes from the judge alone."""
        return math.sqrt(self.repeats / (self.turns * self.per_turn))


def turn_scores(scores: Sequence[ItemScore]) -> list[TurnScore]:
    """The turns of all items. Of an item without details (its answer ended in an error) all turns are unscored."""
    found = []
    for item in scores:
        ratings = item.details.get("ratings", [None] * TURNS)
        lengths = list(item.details.get("lengths", ()))
        for index, rating in enumerate(ratings):
            repeats = tuple(item.details["repeats"][index]) if "repeats" in item.details else (rating,)
            length = lengths[index] if index < len(lengths) else None
            found.append(TurnScore(item.id, item.group, index + 1, rating, repeats, length))
    return found


def category_rows(turns: Sequence[TurnScore]) -> list[CategoryRow]:
    """A row for each category in the order of the items, then one for all of them."""
    groups = list(dict.fromkeys(turn.group for turn in turns))
    rows = [_row(group, [turn for turn in turns if turn.group == group]) for group in groups]
    return [*rows, _row("all", turns)]


def category_means(scores: Sequence[ItemScore]) -> dict[str, float | None]:
    """Mean rating of each category, in the order of the items; None where no turn was rated."""
    rows = category_rows(turn_scores(scores))[:-1]
    return {row.category: None if math.isnan(row.score.estimate) else row.score.estimate for row in rows}


def _row(category: str, turns: Sequence[TurnScore]) -> CategoryRow:
    numbers = sorted({turn.turn for turn in turns})
    by_turn = tuple(_mean([turn.rating for turn in turns if turn.turn == number]) for number in numbers)
    questions: dict[str, list[float | None]] = {}
    for turn in turns:
        questions.setdefault(turn.item, []).append(turn.rating)
    complete = [_mean(ratings) for ratings in questions.values() if None not in ratings]
    unscored = sum(turn.rating is None for turn in turns)
    return CategoryRow(category, by_turn, t_interval(complete, (LOWEST, HIGHEST)), len(questions), unscored)


def _mean(ratings: Sequence[float | None]) -> float:
    read = [rating for rating in ratings if rating is not None]
    return sum(read) / len(read) if read else math.nan


def rating_bounds(turns: Sequence[TurnScore]) -> RatingBounds:
    """The mean over turns, and both ends of what it could have been."""

    def imputed(end: float) -> float:
        filled = [_mean([end if rating is None else rating for rating in turn.repeats or (None,)]) for turn in turns]
        return _mean(filled)

    ratings = [turn.rating for turn in turns]
    return RatingBounds(_mean(ratings), imputed(LOWEST), imputed(HIGHEST), len(turns), sum(rating is None for rating in ratings))


def length_bias(turns: Sequence[TurnScore]) -> LengthBias:
    """The correlation of ratings with the lengths of the rated answers."""
    rated = [turn for turn in turns if turn.rating is not None and turn.length is not None]
    ratings = np.array([turn.rating for turn in rated], dtype=np.float64)
    lengths = np.array([turn.length for turn in rated], dtype=np.float64)
    cells = [(turn.group, turn.turn) for turn in rated]
    within = _correlation(_centred(ratings, cells), _centred(lengths, cells))
    return LengthBias(_correlation(ratings, lengths), _correlation(_ranks(ratings), _ranks(lengths)), within, len(rated))


def _centred(values: Array, cells: Sequence[tuple[str, int]]) -> Array:
    """Values less the mean of their cell."""
    codes = np.unique([f"{turn} {group}" for group, turn in cells], return_inverse=True)[1] if cells else np.zeros(0, dtype=int)
    means = np.bincount(codes, values) / np.bincount(codes) if cells else values
    centred: Array = values - means[codes]
    return centred


def _ranks(values: Array) -> Array:
    """From 0; equal values share the mean of theirs."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts + 1) / 2)[codes]
    return ranks


def _correlation(first: Array, second: Array) -> float:
    if len(first) < 2 or np.ptp(first) < 1e-9 or np.ptp(second) < 1e-9:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def repeat_variance(turns: Sequence[TurnScore]) -> RepeatVariance | None:
    """How much of the spread of judgments is the judge's own noise; None where no two turns have two judgments each."""
    most = max((len(turn.repeats) for turn in turns), default=0)
    complete = [turn.repeats for turn in turns if len(turn.repeats) == most and None not in turn.repeats]
    if most < 2 or len(complete) < 2:
        return None
    ratings = np.array(complete, dtype=np.float64)  # (turns, repeats)
    within = float(ratings.var(axis=1, ddof=1).mean())
    between = most * float(ratings.mean(axis=1).var(ddof=1))
    return RepeatVariance(max(0.0, (between - within) / most), within, len(complete), most)


def render_report(scores: Sequence[ItemScore]) -> str:
    """All of it as Markdown."""
    turns = turn_scores(scores)
    lines = [
        *_table(category_rows(turns)),
        "",
        f"- {_bounds_text(rating_bounds(turns))}",
        f"- {_length_text(length_bias(turns))}",
    ]
    return "\n".join([*lines, f"- {_repeat_text(repeat_variance(turns))}"]) + "\n"


def _table(rows: Sequence[CategoryRow]) -> list[str]:
    count = max(len(row.by_turn) for row in rows)
    head = [
        "category",
        *(f"turn {number}" for number in range(1, count + 1)),
        "complete questions (95 %)",
        "questions",
        "unscored turns",
    ]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join([':---', *['---:'] * (len(head) - 1)])} |"]
    for row in rows:
        low, high = _number(row.score.low), _number(row.score.high)
        score = f"{_number(row.score.estimate)} [{low}, {high}]"
        means = [_number(mean) for mean in (*row.by_turn, *[math.nan] * (count - len(row.by_turn)))]
        lines.append(f"| {' | '.join([_cell(row.category), *means, score, str(row.questions), str(row.unscored_turns)])} |")
    return lines


def _bounds_text(bounds: RatingBounds) -> str:
    if not bounds.unscored:
        return f"mean of {bounds.turns} ratings: {_number(bounds.mean)}; every turn was rated"
    missing = f"{bounds.unscored} of {bounds.turns} turns are unscored"
    between = f"with them the mean lies between {_number(bounds.low)} and {_number(bounds.high)}"
    return f"mean of {bounds.turns - bounds.unscored} ratings: {_number(bounds.mean)}; {missing}: {between}"


def _length_text(bias: LengthBias) -> str:
    return (
        f"rating and length of the answer: r = {_number(bias.pearson)}, of ranks {_number(bias.spearman)}, within category and "
        f"turn {_number(bias.within)} (n = {bias.n} turns)"
    )


def _repeat_text(split: RepeatVariance | None) -> str:
    if split is None:
        return "the judge's own noise was not measured: one judgment of each turn (--judge-set repeats=3)"
    return (
        f"variance of a judgment: {_number(split.questions)} between turns, {_number(split.repeats)} between {split.per_turn} "
        f"repeats of {split.turns} turns; the judge's noise in the mean is ±{_number(split.noise)}"
    )


def _number(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.2f}"


def _cell(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("\\", "\\\\").replace("|", "\\|")
