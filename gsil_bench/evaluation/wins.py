"""Items that one method answers better than another, with both answers: what is behind a difference of two scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.evaluation.stored import StoredAnswers
from gsil_bench.records import CellResult, ItemAnswer, ItemScore

SHOWN = (110, 70)
"""Characters of an answer's beginning and end that are shown."""


@dataclass(frozen=True)
class Side:
    """One method's score and answers of an item."""

    method: str
    score: float
    reason: str
    answers: tuple[str, ...]
    """One per sample, its turns joined by " / "; shortened, and harmless to a terminal."""


@dataclass(frozen=True)
class Win:
    """An item that one side answered better."""

    item: str
    group: str
    better: Side
    worse: Side


@dataclass(frozen=True)
class Wins:
    """All items that two methods differ in."""

    task: str
    methods: tuple[str, str]
    seeds: tuple[int, int]
    wins: tuple[Win, ...]
    same: int
    """Items with equal scores."""
    unscored: int
    """Items that at least one has no score of."""

    def of(self, method: str) -> list[Win]:
        """The items that this method answered better."""
        return [win for win in self.wins if win.better.method == method]


def choose_cells(results: Sequence[CellResult], methods: Sequence[str], seed: int | None) -> tuple[CellResult, CellResult]:
    """The cells of two methods on one task: with the given seed, or with the lowest that both have.

    A method that has one seed only (the untrained model) is compared by that.

    Raises:
        UserError: not two methods, more than one task, or a method or seed without a result.
    """
    if len(methods) != 2 or methods[0] == methods[1]:
        raise UserError(f"--methods {','.join(methods)}: name two different methods, as in --methods sft,dpo")
    tasks = sorted({result.task for result in results})
    if len(tasks) != 1:
        raise UserError(f"results of {len(tasks)} tasks: name one with --task ({', '.join(tasks)})")
    seeds = {method: {result.seed: result for result in results if result.method == method} for method in methods}
    for method, cells in seeds.items():
        if not cells:
            raise unknown_name(f"method of {tasks[0]}", method, {result.method for result in results})
    common = set.intersection(*map(set, seeds.values()))
    wanted = seed if seed is not None else min(common, default=None)
    chosen = [_cell(cells, wanted, method) for method, cells in seeds.items()]
    return chosen[0], chosen[1]


def _cell(cells: dict[int, CellResult], seed: int | None, method: str) -> CellResult:
    if len(cells) == 1:
        ((only, result),) = cells.items()
        if seed in (None, only) or not result.cost.get("steps"):  # the untrained model has no seed of its own
            return result
    if seed not in cells:
        raise UserError(f"{method} has no result with seed {seed}; there are {', '.join(map(str, sorted(cells)))}")
    return cells[seed]


def find_wins(one: CellResult, two: CellResult, read: Callable[[CellResult], StoredAnswers]) -> Wins:
    """Compare two cells item by item.

    Raises:
        UserError: they were not asked the same items, or their answers are gone.
    """
    if one.comparable.get("items") != two.comparable.get("items"):
        raise UserError(f"{one.method} and {two.method} were not asked the same items of {one.task}")
    given = [_answers(read(cell)) for cell in (one, two)]
    wins: list[Win] = []
    same = unscored = 0
    for first, second in zip(one.items, two.items, strict=True):
        if first.score is None or second.score is None:
            unscored += 1
        elif first.score == second.score:
            same += 1
        else:
            sides = [_side(cell, item, texts) for cell, item, texts in zip((one, two), (first, second), given, strict=True)]
            higher_is_better = one.worst is None or one.best > one.worst
            better, worse = sides if (first.score > second.score) == higher_is_better else sides[::-1]
            wins.append(Win(first.id, first.group, better, worse))
    return Wins(one.task, (one.method, two.method), (one.seed, two.seed), tuple(wins), same, unscored)


def _answers(stored: StoredAnswers) -> dict[str, list[ItemAnswer]]:
    by_item: dict[str, list[ItemAnswer]] = {}
    for answer in stored.answers:
        by_item.setdefault(answer.id, []).append(answer)
    return by_item


def _side(cell: CellResult, item: ItemScore, answers: dict[str, list[ItemAnswer]]) -> Side:
    texts = tuple(" / ".join(map(shorten, answer.texts)) for answer in answers.get(item.id, []))
    return Side(cell.method, item.score or 0.0, shorten(item.reason), texts)


def shorten(text: str) -> str:
    """The beginning and the end of a text, where answers stand, as `harmless` shows it."""
    words = " ".join(text.split())
    begin, end = SHOWN
    return harmless(words if len(words) <= begin + end else f"{words[:begin]} … {words[-end:]}")


def harmless(text: str) -> str:
    """A text on one line, without what could move a terminal's cursor."""
    words = " ".join(text.split())
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in words)
