"""What a comparison says, before anything is written: scores, differences to the control, verdicts, refusals.

`Comparison.of` decides everything; wording and renderers only lay it out, so terminal, Markdown, CSV and JSON cannot disagree.
Numbers stay in the task's own units and become percent only in text.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np

from gsil_bench.errors import UserError
from gsil_bench.evaluation.across_tasks import AcrossTasks, across_tasks
from gsil_bench.evaluation.letters import compact_letters
from gsil_bench.evaluation.statistics import (
    ALPHA,
    Array,
    Bounds,
    Interval,
    PairedDifference,
    changed_by_holm,
    default_margin,
    equivalence_p,
    holm,
    paired_difference,
    score_interval,
    verdict,
)
from gsil_bench.records import CellFailure, CellResult

Outcome = Literal["", "control", "no control", "refused", "better", "worse", "equivalent", "not resolved"]
"""A cell against the control: a verdict of `statistics`, or why there is none; "" for a cell without a score."""

NULLABLE = frozenset({"budget", "left_out"})
"""Keys of `comparable` that are null for a model that was not trained; null is comparable with everything."""


ZERO_OR_ONE = frozenset(
    {"accuracy", "pass@1", "acc", "acc_norm", "acc_bytes", "exact_match", "em", "mc1", "pass_at_1"}
    | {"prompt_level_strict_acc", "prompt_level_loose_acc"}
)
"""Metrics that give one answer 0 or 1 by their nature, as tasks and lm-eval name them. Any other is graded, whatever values its
scores happen to have: its column gets t, which is valid for 0/1 scores too."""


@dataclass(frozen=True)
class Unit:
    """How a metric is written."""

    factor: float
    decimals: int
    of_score: str
    """After a score: " %"."""
    of_difference: str
    """After a difference: " points"."""


FEWEST_LETTERED = 4

UNITS = {
    "accuracy": Unit(100, 1, " %", " points"),
    "pass@1": Unit(100, 1, " %", " points"),
    "rating": Unit(1, 2, "", " points"),
    "nll": Unit(1, 4, " nats/token", " nats/token"),
}
OTHER_UNIT = Unit(1, 3, "", "")


@dataclass(frozen=True)
class Against:
    """A cell compared with the control's cell on the same items."""

    outcome: Outcome
    difference: PairedDifference | None = None
    """Method minus control, in the task's units. None without two comparable scores."""
    p_holm: float = math.nan
    refused: tuple[str, ...] = ()
    """In what the two cells differ: "budget.tokens 1000 against 2000"."""
    p_equivalence: float = math.nan
    """Of two one-sided tests against the column's margin; not corrected for other comparisons."""

    @property
    def after_holm(self) -> bool:
        """The difference is significant alone (its interval excludes 0) but not in its family."""
        return self.difference is not None and changed_by_holm(self.difference, self.p_holm)


@dataclass(frozen=True)
class Cell:
    """A method on a task, over its seeds."""

    method: str
    task: str
    score: Interval | None
    """Mean over the items that all its seeds scored, in the task's units. None if no seed has a result."""
    seeds: tuple[int, ...] = ()
    """Those with a result."""
    n_items: int = 0
    n_unscored: int = 0
    """Missing scores, summed over the seeds."""
    failures: tuple[CellFailure, ...] = ()
    """Of the seeds without a result."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Diagnoses, summed over the seeds."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """Of training, summed over the seeds."""
    trained: bool = True
    against: Against = Against("")
    among_best: bool = False
    """Not significantly worse than the best cell of its column."""
    letters: str = ""
    """Cells of a column that share a letter are not significantly different (all pairs, Holm); "": not compared."""

    @property
    def status(self) -> Literal["scored", "partly failed", "failed", "not run"]:
        """Failed, unscored and zero are three different things."""
        if self.score is None:
            return "failed" if self.failures else "not run"
        return "partly failed" if self.failures else "scored"


@dataclass(frozen=True)
class Column:
    """A task and its cells, one per method in the table's order."""

    task: str
    metric: str
    best: float
    worst: float | None
    """None for a loss without an upper end."""
    n_items: int
    """Items of the task, scored or not."""
    margin: float
    """Differences below it are called equivalent, in the task's units; 0: never."""
    control: str
    """"" if the control has no score here."""
    cells: tuple[Cell, ...]
    items: tuple[str, ...] = ()
    """Their ids, sorted."""

    @property
    def higher_is_better(self) -> bool:
        """A metric without a worst score is a loss."""
        return _higher_is_better(self.best, self.worst)

    @property
    def unit(self) -> Unit:
        """How the metric is written."""
        return UNITS.get(self.metric, OTHER_UNIT)

    @property
    def family(self) -> int:
        """Number of methods compared with the control: the family of Holm's correction."""
        return sum(not math.isnan(cell.against.p_holm) for cell in self.cells)

    @property
    def letters_shown(self) -> bool:
        """Below four methods the verdicts and marks say what letters would."""
        return sum(bool(cell.letters) for cell in self.cells) >= FEWEST_LETTERED


def _higher_is_better(best: float, worst: float | None) -> bool:
    """A metric without a worst score is a loss."""
    return worst is not None and best > worst


@dataclass(frozen=True)
class Comparison:
    """All methods on all tasks."""

    methods: tuple[str, ...]
    control: str
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()
    across: AcrossTasks | None = None
    """The methods over all tasks that are independent evidence and have a scale; None where the control has none of them."""

    @classmethod
    def of(
        cls,
        results: Sequence[CellResult],
        failures: Sequence[CellFailure] = (),
        methods: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        control: str | None = None,
        notes: Sequence[str] = (),
        margins: Mapping[str, float] | None = None,
    ) -> Comparison:
        """Compare every method with the control on every task.

        Args:
            results: one per method, seed and task; their order does not matter if methods and tasks are given.
            failures: cells without a result; one that has a result after all is ignored.
            methods: rows in order; those of the results by default. Results of other methods are left out.
            tasks: columns in order, likewise.
            control: the row that all others are compared with; by default the first that was trained.
            notes: sentences for the footer.
            margins: task → largest difference that does not matter, in its units; 2 % of the scale by default, and none
                for a loss without an upper end.

        Raises:
            UserError: two results for the same cell, or a control that is not among the methods.
        """
        found = [(each.method, each.task) for group in (results, failures) for each in group]
        rows = tuple(dict.fromkeys(method for method, _ in found) if methods is None else methods)
        names = tuple(dict.fromkeys(task for _, task in found) if tasks is None else tasks)
        control = _control(results, rows) if control is None else control
        if control and control not in rows:
            raise UserError(f"the control {control!r} is not among the methods compared: {', '.join(rows)}")
        grouped = _grouped(results)
        columns = tuple(_column(task, rows, control, grouped, failures, (margins or {}).get(task)) for task in names)
        return cls(rows, control, columns, tuple(notes), _across(columns, rows, control, grouped))


def _control(results: Sequence[CellResult], rows: Sequence[str]) -> str:
    """The first method that was trained, else the first."""
    trained = {result.method for result in results if _trained(result)}
    return next((method for method in rows if method in trained), rows[0] if rows else "")


def _trained(result: CellResult) -> bool:
    """False for the starting model: its record says that it does not train, or has no rounds."""
    protocol = result.record.get("protocol")
    rounds = protocol.get("rounds") if isinstance(protocol, Mapping) else None
    return result.record.get("trains") is not False and rounds != 0


def _grouped(results: Iterable[CellResult]) -> dict[tuple[str, str], list[CellResult]]:
    """Results by method and task, by seed within."""
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        group = groups.setdefault((result.method, result.task), [])
        if group and group[-1].seed == result.seed:
            raise UserError(f"two results for {result.method}, seed {result.seed}, on {result.task}: keep one")
        group.append(result)
    return groups


def _column(
    task: str,
    methods: Sequence[str],
    control: str,
    grouped: Mapping[tuple[str, str], list[CellResult]],
    failures: Sequence[CellFailure],
    margin: float | None,
) -> Column:
    """Score, compare and mark one task's cells."""
    results = {method: grouped[method, task] for method in methods if (method, task) in grouped}
    failed = {method: [each for each in failures if (each.method, each.task) == (method, task)] for method in methods}
    if not results:
        cells = tuple(Cell(method, task, None, failures=tuple(failed[method])) for method in methods)
        return Column(task, "", 1.0, 0.0, 0, 0.0, "", cells)
    base = results.get(control) or next(iter(results.values()))
    frame = _Frame(base, margin)
    against = _against(results, control, frame)
    alike = [method for method in results if not frame.refusals(results[method])]
    best, letters = _among_best(alike, results, frame), _letters(alike, results, frame)
    cells = tuple(
        dataclasses.replace(
            _cell(method, task, results.get(method, []), failed[method], frame, against.get(method), method in best),
            letters=letters.get(method, ""),
        )
        for method in methods
    )
    first, items = base[0], tuple(sorted(frame.ids))
    present = control if control in results else ""
    return Column(task, first.metric, first.best, first.worst, len(items), frame.margin, present, cells, items)


class _Frame:
    """What all cells of a column are measured against: the control's items and everything that must be equal."""

    def __init__(self, base: list[CellResult], margin: float | None = None) -> None:
        self.base = base[0]
        self.base_seeds = base
        self.ids = [item.id for item in self.base.items]
        best, worst = self.base.best, self.base.worst
        self.higher_is_better = _higher_is_better(best, worst)
        end = math.inf if worst is None else worst
        self.scale = abs(best - end)
        self.bounds: Bounds = (min(best, end), max(best, end))
        self.margin = default_margin(best, worst) if margin is None else margin
        self._matrices: dict[tuple[str, ...], Array] = {}

    def matrix(self, results: Sequence[CellResult]) -> Array:
        """Scores of the frame's items, (seeds, items); NaN where unscored or absent. Kept: a column asks for each many times."""
        key = tuple(f"{result.method} {result.seed}" for result in results)
        if key not in self._matrices:
            self._matrices[key] = self._matrix(results)
        return self._matrices[key]

    def _matrix(self, results: Sequence[CellResult]) -> Array:
        tables = [{item.id: item.score for item in result.items} for result in results]
        rows = [[math.nan if table.get(key) is None else table[key] for key in self.ids] for table in tables]
        return np.array(rows, dtype=np.float64).reshape(len(results), len(self.ids))

    @property
    def gives_zero_or_one(self) -> bool:
        """The task says so, not the scores: by its metric, and by one answer per item. A mean of several answers is graded also
        where all of them happened to agree.
        """
        by_nature = self.base.metric.partition(",")[0] in ZERO_OR_ONE  # lm-eval adds its filter: "exact_match,strict-match"
        return by_nature and self.bounds == (0.0, 1.0) and self.base.counts.get("answers", 0) <= len(self.ids)

    def binary(self, scores: Array) -> bool:
        """0/1 scores of a task that gives such scores. Others contradict the metric's name, and are taken as they are."""
        return self.gives_zero_or_one and bool(np.isin(scores[~np.isnan(scores)], (0.0, 1.0)).all())

    def normalised(self, results: Sequence[CellResult]) -> Array:
        """(seeds, items) with 0 for the worst score and 1 for the best, of a metric that has both."""
        assert self.base.worst is not None
        return (self.matrix(results) - self.base.worst) / (self.base.best - self.base.worst)

    def refusals(self, results: Sequence[CellResult]) -> tuple[str, ...]:
        """In what these results, or the frame's own seeds, differ from the frame though they must not."""
        found = [_unlike(result, self.base) for result in (*results, *self.base_seeds)]
        return tuple(dict.fromkeys(line for lines in found for line in lines))

    def difference(self, a: Sequence[CellResult], b: Sequence[CellResult]) -> PairedDifference:
        """a minus b on the frame's items."""
        first, second = self.matrix(a), self.matrix(b)
        return paired_difference(
            first,
            second,
            binary=self.binary(first) and self.binary(second),
            scale=self.scale,
            higher_is_better=self.higher_is_better,
            a_trained=_trained(a[0]),
            b_trained=_trained(b[0]),
        )


def _against(results: Mapping[str, list[CellResult]], control: str, frame: _Frame) -> dict[str, Against]:
    """Every method with a score against the control; Holm's family is those that may be compared."""
    if control not in results:
        return dict.fromkeys(results, Against("no control"))
    refusals = {method: frame.refusals(own) for method, own in results.items() if method != control}
    compared = {method: frame.difference(results[method], results[control]) for method in refusals if not refusals[method]}
    adjusted = dict(zip(compared, holm([difference.p_value for difference in compared.values()]), strict=True))
    found = {method: Against("refused", refused=lines) for method, lines in refusals.items() if lines}
    for method, difference in compared.items():
        p = adjusted[method]
        outcome = verdict(difference, frame.margin, higher_is_better=frame.higher_is_better, p_value=p)
        found[method] = Against(outcome, difference, p, p_equivalence=equivalence_p(difference, frame.margin, frame.scale))
    return found | {control: Against("control")}


def _among_best(methods: Sequence[str], results: Mapping[str, list[CellResult]], frame: _Frame) -> set[str]:
    """The methods that are not significantly worse than the best one; none if there is nothing to choose from."""
    scores = {method: score_interval(frame.matrix(results[method]), binary=False).estimate for method in methods}
    scores = {method: score for method, score in scores.items() if not math.isnan(score)}
    if len(scores) < 2:
        return set()
    best = (max if frame.higher_is_better else min)(scores, key=lambda method: scores[method])
    others = [method for method in scores if method != best]
    p_values = holm([frame.difference(results[best], results[method]).p_value for method in others])
    return {best} | {method for method, p in zip(others, p_values, strict=True) if not p < ALPHA}


def _letters(methods: Sequence[str], results: Mapping[str, list[CellResult]], frame: _Frame) -> dict[str, str]:
    """Compact letters from all pairs, Holm among them, the best method first; none if there is nothing to choose from."""
    scores = {method: score_interval(frame.matrix(results[method]), binary=False).estimate for method in methods}
    known = [method for method in methods if not math.isnan(scores[method])]
    if len(known) < 2:
        return {}
    ordered = sorted(known, key=lambda method: scores[method], reverse=frame.higher_is_better)
    pairs = list(combinations(range(len(ordered)), 2))
    p_values = holm([frame.difference(results[ordered[one]], results[ordered[two]]).p_value for one, two in pairs])
    letters = compact_letters(len(ordered), {pair for pair, p in zip(pairs, p_values, strict=True) if p < ALPHA})
    return dict(zip(ordered, letters, strict=True))


def _across(
    columns: Sequence[Column], methods: Sequence[str], control: str, grouped: Mapping[tuple[str, str], list[CellResult]]
) -> AcrossTasks | None:
    """The summary over the tasks that have a scale and are no second asking of the same items, of the methods that have a
    comparable score on all of them.
    """
    chosen: list[Column] = []
    left_out: list[str] = []
    for column in columns:
        reason = _no_evidence(column, chosen)
        if reason:
            left_out.append(f"{column.task} ({reason})")
        else:
            chosen.append(column)
    rows = {method: _complete_row(method, chosen) for method in methods}
    left_out += [f"{method} (no comparable score on {', '.join(missing)})" for method, missing in rows.items() if missing]
    kept = {method: _is_trained(method, chosen) for method, missing in rows.items() if not missing}
    if not chosen or control not in kept:
        return None
    frames = {column.task: _Frame(grouped[control, column.task]) for column in chosen}
    scores = {task: {m: frame.normalised(grouped[m, task]) for m in kept} for task, frame in frames.items()}
    empty = [task for task, table in scores.items() if np.isnan(np.concatenate(list(table.values()))).any(axis=0).all()]
    left_out += [f"{task} (no item that all methods have a score for)" for task in empty]
    scores = {task: table for task, table in scores.items() if task not in empty}
    return across_tasks(scores, kept, control, left_out) if scores else None


def _no_evidence(column: Column, before: Sequence[Column]) -> str:
    """Why a task says nothing of its own about the methods; "" if it does."""
    if not column.control:
        return "the control has no score"
    if column.worst is None:
        return "no scale"
    twin = next((other.task for other in before if other.items == column.items), None)
    return f"the items of {twin} again" if twin else ""


def _complete_row(method: str, columns: Sequence[Column]) -> list[str]:
    """The tasks on which a method has no score that may be compared with the control's."""
    cells = [cell for column in columns for cell in column.cells if cell.method == method]
    return [cell.task for cell in cells if cell.score is None or cell.n_items == 0 or cell.against.outcome == "refused"]


def _is_trained(method: str, columns: Sequence[Column]) -> bool:
    return any(cell.trained for column in columns for cell in column.cells if cell.method == method)


def _cell(
    method: str,
    task: str,
    results: Sequence[CellResult],
    failures: Sequence[CellFailure],
    frame: _Frame,
    against: Against | None,
    among_best: bool,
) -> Cell:
    seeds = tuple(result.seed for result in results)
    failed = tuple(sorted((each for each in failures if each.seed not in seeds), key=lambda each: each.seed))
    if not results:
        return Cell(method, task, None, failures=failed)
    # A cell with other items is refused a comparison, but its score is that of its own items.
    own = frame if {item.id for item in results[0].items} == set(frame.ids) else _Frame(list(results))
    scores = own.matrix(results)
    n_items = int((~np.isnan(scores).any(axis=0)).sum())
    return Cell(
        method,
        task,
        score_interval(scores, own.binary(scores), own.bounds),
        seeds,
        n_items,
        int(np.isnan(scores).sum()),
        failed,
        _summed(result.counts for result in results),
        _summed(result.cost for result in results),
        _trained(results[0]),
        against or Against(""),
        among_best,
    )


def _summed(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums by key, of measures means; keys sorted."""
    found: dict[str, list[float]] = {}
    for table in tables:
        for key, value in table.items():
            found.setdefault(key, []).append(value)
    return {key: sum(each) / (len(each) if key.startswith(MEASURES) else 1) for key, each in sorted(found.items())}


MEASURES = ("mean ", "pass@")
"""How counts begin that are means already."""


def _unlike(mine: CellResult, theirs: CellResult) -> list[str]:
    """One line per thing that differs although only the method may: "budget.tokens 1000 against 2000"."""
    lines = []
    for name in ("metric", "best", "worst"):
        if getattr(mine, name) != getattr(theirs, name):
            lines.append(_contrast(name, getattr(mine, name), getattr(theirs, name)))
    for key in sorted({*mine.comparable, *theirs.comparable}):
        first, second = mine.comparable.get(key, _ABSENT), theirs.comparable.get(key, _ABSENT)
        if not (key in NULLABLE and (first is None or second is None)):
            lines += _differences(key, first, second)
    return lines or _other_items(mine, theirs)


_ABSENT = "(absent)"


def _differences(key: str, mine: Any, theirs: Any) -> list[str]:
    """The innermost keys at which two JSON values differ."""
    if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
        return [] if mine == theirs else [_contrast(key, mine, theirs)]
    inner = [
        _differences(f"{key}.{name}", mine.get(name, _ABSENT), theirs.get(name, _ABSENT)) for name in sorted({*mine, *theirs})
    ]
    return [line for lines in inner for line in lines]


def _other_items(mine: CellResult, theirs: CellResult) -> list[str]:
    """Scores pair by item, so other items are other measurements."""
    first, second = Counter(item.id for item in mine.items), Counter(item.id for item in theirs.items)
    if first == second and max(first.values(), default=1) == 1:
        return []
    repeated = sum(count - 1 for count in first.values())
    shared = len(first.keys() & second.keys())
    return [f"items {len(mine.items)} against {len(theirs.items)}, {shared} shared, {repeated} repeated"]


def _contrast(key: str, mine: Any, theirs: Any, width: int = 24) -> str:
    """Both values, cut where they are long, but never so that they look equal."""
    first, second = _plain(mine), _plain(theirs)
    unequal = (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    common = next(unequal, min(len(first), len(second)))
    start = max(0, common - 4) if common >= width - 2 else 0
    return f"{key} {_excerpt(first, start, width)} against {_excerpt(second, start, width)}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _excerpt(text: str, start: int, width: int) -> str:
    piece = ("…" if start else "") + text[start:]
    return piece if len(piece) <= width else piece[: width - 1] + "…"
