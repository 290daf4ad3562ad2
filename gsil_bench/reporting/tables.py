"""From results to the table of methods × tasks that people read: one pure function, then renderers.

`Comparison.of` decides everything (scores, differences to the control, verdicts, refusals, what was not measured); the
renderers only lay it out, so terminal, Markdown, CSV and JSON cannot disagree. Numbers stay in the task's own units and
become percent only in text. Equal input gives equal bytes. Names and reasons come from users and models: each renderer
neutralises what its format would interpret.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gsil_bench.errors import UserError
from gsil_bench.evaluation.statistics import (
    ALPHA,
    Array,
    Bounds,
    Interval,
    PairedDifference,
    changed_by_holm,
    default_margin,
    holm,
    paired_difference,
    score_interval,
    verdict,
)
from gsil_bench.records import CellFailure, CellResult

Outcome = Literal["", "control", "no control", "refused", "better", "worse", "equivalent", "not resolved"]
"""A cell against the control: a verdict of `statistics`, or why there is none; "" for a cell without a score."""
Value = str | int | float | bool | None

NULLABLE = frozenset({"budget"})
"""Keys of `comparable` that are null for a model that was not trained; null is comparable with everything."""


# ---- what is compared --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """How a metric is written."""

    factor: float
    decimals: int
    of_score: str
    """After a score: " %"."""
    of_difference: str
    """After a difference: " points"."""


UNITS = {
    "accuracy": Unit(100, 1, " %", " points"),
    "pass@1": Unit(100, 1, " %", " points"),
    "rating": Unit(1, 2, "", " points"),
    "nll": Unit(1, 4, " nats", " nats"),
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
    items: frozenset[str] = frozenset()

    @property
    def higher_is_better(self) -> bool:
        return _higher_is_better(self.best, self.worst)

    @property
    def unit(self) -> Unit:
        return UNITS.get(self.metric, OTHER_UNIT)

    @property
    def family(self) -> int:
        """Number of methods compared with the control: the family of Holm's correction."""
        return sum(not math.isnan(cell.against.p_holm) for cell in self.cells)


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
        return cls(rows, control, columns, tuple(notes))


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
    best = _among_best([method for method in results if not frame.refusals(results[method])], results, frame)
    cells = tuple(
        _cell(method, task, results.get(method, []), failed[method], frame, against.get(method), method in best)
        for method in methods
    )
    first = base[0]
    present = control if control in results else ""
    return Column(
        task, first.metric, first.best, first.worst, len(frame.ids), frame.margin, present, cells, frozenset(frame.ids)
    )


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

    def matrix(self, results: Sequence[CellResult]) -> Array:
        """Scores of the frame's items, (seeds, items); NaN where unscored or absent."""
        tables = [{item.id: item.score for item in result.items} for result in results]
        rows = [[math.nan if table.get(key) is None else table[key] for key in self.ids] for table in tables]
        return np.array(rows, dtype=np.float64).reshape(len(results), len(self.ids))

    def binary(self, scores: Array) -> bool:
        """0/1 scores on a 0/1 scale."""
        return self.bounds == (0.0, 1.0) and bool(np.isin(scores[~np.isnan(scores)], (0.0, 1.0)).all())

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
    compared = {
        method: frame.difference(results[method], results[control]) for method in refusals if not refusals[method]
    }
    adjusted = dict(zip(compared, holm([difference.p_value for difference in compared.values()]), strict=True))
    found = {method: Against("refused", refused=lines) for method, lines in refusals.items() if lines}
    for method, difference in compared.items():
        p = adjusted[method]
        outcome = verdict(difference, frame.margin, higher_is_better=frame.higher_is_better, p_value=p)
        found[method] = Against(outcome, difference, p)
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
    """Sums by key, keys sorted."""
    total: dict[str, float] = {}
    for table in tables:
        for key, value in table.items():
            total[key] = total.get(key, 0) + value
    return dict(sorted(total.items()))


# ---- why two cells must not be compared --------------------------------------------------------------------


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
        _differences(f"{key}.{name}", mine.get(name, _ABSENT), theirs.get(name, _ABSENT))
        for name in sorted({*mine, *theirs})
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


# ---- text of numbers and cells -----------------------------------------------------------------------------


def _number(value: float, unit: Unit, signed: bool = False) -> str:
    """In the unit's factor and decimals; "-0.0" and "+0.0" are "0.0"."""
    if not math.isfinite(value):
        return "?" if math.isnan(value) else ("-∞" if value < 0 else "∞")
    text = f"{value * unit.factor:{'+' if signed else ''}.{unit.decimals}f}"
    return text if float(text) else text.lstrip("+-")


def _range(low: float, high: float, unit: Unit) -> str:
    return f"[{_number(low, unit)}, {_number(high, unit)}]"


def _lopsided(score: Interval, unit: Unit) -> bool:
    """The halves of the interval differ in print and by a tenth: "±" would hide it."""
    below, above = score.estimate - score.low, score.high - score.estimate
    if not (math.isfinite(below) and math.isfinite(above)):
        return True
    return _number(below, unit) != _number(above, unit) and abs(above - below) > 0.05 * (above + below)


def _score_texts(column: Column) -> list[str]:
    """Each cell's score with its interval; brackets in the whole column if any is lopsided, "" without a score."""
    unit, scores = column.unit, [cell.score for cell in column.cells]
    brackets = any(score is not None and score.method != _NO_ITEMS and _lopsided(score, unit) for score in scores)
    return ["" if score is None else _score_text(score, unit, brackets) for score in scores]


_NO_ITEMS = "no scored items"


def _score_text(score: Interval, unit: Unit, brackets: bool) -> str:
    if score.method == _NO_ITEMS:
        return _NO_ITEMS
    if brackets:
        return f"{_number(score.estimate, unit)} {_range(score.low, score.high, unit)}"
    half = max(score.estimate - score.low, score.high - score.estimate)
    return f"{_number(score.estimate, unit)} ± {_number(half, unit)}"


def _difference_text(difference: PairedDifference | None, unit: Unit) -> str:
    """Estimate and interval; "" if no item was scored by both."""
    if difference is None or difference.n_items == 0:
        return ""
    return f"{_number(difference.estimate, unit, signed=True)} {_range(difference.low, difference.high, unit)}"


def _outcome_text(against: Against) -> str:
    """The verdict; says so where only Holm's correction stands between the difference and significance."""
    return f"{against.outcome} after Holm" if against.after_holm else against.outcome


def _remarks(cell: Cell, column: Column, limit: int = 72) -> list[str]:
    """What a reader must know about a cell besides its score: failures and missing scores."""
    if cell.status == "not run":
        return ["not run"]
    if cell.status == "failed":
        return list(dict.fromkeys(f"failed: {_cut(each.reason, limit)}" for each in cell.failures))
    lines = [f"seed {each.seed} failed: {_cut(each.reason, limit)}" for each in cell.failures]
    if cell.n_unscored:
        lines.append(f"n = {cell.n_items}, {cell.n_unscored} unscored")
    elif cell.n_items != column.n_items:
        lines.append(f"n = {cell.n_items}")
    return lines


def _cut(text: str, limit: int) -> str:
    return _one_line(text) if len(_one_line(text)) <= limit else _one_line(text)[: limit - 1].rstrip() + "…"


def _one_line(text: str) -> str:
    """Text on one line without control, format and escape characters, so that no name can move the cursor."""
    text = re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    return "".join(char for char in text if unicodedata.category(char) not in {"Cc", "Cf", "Cs"})


def _row_names(comparison: Comparison) -> list[str]:
    """Methods as printed; the starting model says that it was not trained."""
    untrained = {cell.method for column in comparison.columns for cell in column.cells if not cell.trained}
    return [_one_line(name) + (" (no training)" if name in untrained else "") for name in comparison.methods]


def _heading(column: Column) -> str:
    """The metric, its unit, the number of items, and the direction if it is not the usual one."""
    if not column.metric:
        return "no result"
    unit = f" in{column.unit.of_score}" if column.unit.of_score else ""
    direction = "" if column.higher_is_better else ", lower is better"
    return f"{_one_line(column.metric)}{unit}, n = {column.n_items}{direction}"


# ---- the footer --------------------------------------------------------------------------------------------


def footer(comparison: Comparison) -> list[tuple[str, str]]:
    """What the numbers mean and what was not measured, as (label, text)."""
    columns = [column for column in comparison.columns if column.metric]
    lines = [
        ("Scores", _scores_line(columns)),
        ("Seeds", _seeds_line(columns)),
        ("Control", _control_line(comparison, columns)),
        ("Verdicts", _verdicts_line(columns)),
        ("Resolvable", _resolvable_line(columns)),
        ("Marked *", _marked_line(columns)),
        ("Answers", _answers_line(columns)),
        ("Same items", _shared_items_line(columns)),
        ("Refused", _refused_line(columns)),
        ("Failed", _failed_line(comparison.columns)),
        *(("Note", _one_line(note)) for note in comparison.notes),
    ]
    return [(label, text) for label, text in lines if text]


def _scores_line(columns: Sequence[Column]) -> str:
    scored = [
        (column.task, cell, cell.score) for column in columns for cell in column.cells if cell.n_items and cell.score
    ]
    if not scored:
        return ""
    level = " and ".join(f"{100 * level:g}" for level in sorted({score.level for _, _, score in scored}))
    trained = [(task, score.method) for task, cell, score in scored if cell.trained]
    others = [(task, score.method) for task, cell, score in scored if not cell.trained]
    kinds = [_by_task(trained, len(columns))] if trained else []
    if set(others) - set(trained):
        kinds.append(f"without training, {_by_task(others, len(columns))}")
    return f"mean over items ± half its {level} % interval, or [low, high] ({'; '.join(kinds)})"


def _by_task(pairs: Sequence[tuple[str, str]], n_tasks: int) -> str:
    """(task, text) pairs as "text" if the text is the same for all tasks, else "text: task, task; …"."""
    groups: dict[str, list[str]] = {}
    for task, text in dict.fromkeys(pairs):
        groups.setdefault(text, []).append(_one_line(task))
    if len(groups) == 1 and len(next(iter(groups.values()))) == n_tasks:
        return next(iter(groups))
    return "; ".join(f"{text}: {', '.join(tasks)}" for text, tasks in groups.items())


def _seeds_line(columns: Sequence[Column]) -> str:
    """Which seeds, and for which methods their variance is unknown."""
    trained = [cell for column in columns for cell in column.cells if cell.seeds and cell.trained]
    counts = {(cell.method, len(cell.seeds)) for cell in trained}
    if not counts:
        return ""
    if {count for _, count in counts} == {1}:
        return "training-seed variance was not measured (1 seed)"
    seeds = sorted({seed for cell in trained for seed in cell.seeds})
    text = f"intervals cover items and training seeds ({len(seeds)} seeds: {', '.join(map(str, seeds))})"
    single = sorted({_one_line(method) for method, count in counts if count == 1})
    if single:
        text += (
            f"; for {', '.join(single)} training-seed variance was not measured (1 seed): "
            "its score's interval covers items only, its differences use the other method's"
        )
    return text


def _control_line(comparison: Comparison, columns: Sequence[Column]) -> str:
    missing = [_one_line(column.task) for column in columns if not column.control]
    methods = [
        (column.task, cell.against.difference.method)
        for column in columns
        for cell in column.cells
        if cell.against.difference
    ]
    text = f"{_one_line(comparison.control)}; differences are method − control on the same items"
    if methods:
        text += f" ({_by_task(methods, len({task for task, _ in methods}))})"
    return text + (f"; no score, so no comparison, on {', '.join(missing)}" if missing else "")


def _verdicts_line(columns: Sequence[Column]) -> str:
    families = [(column.task, str(column.family)) for column in columns if column.family]
    if not families:
        return ""
    margins = [(column.task, _margin_text(column)) for column in columns if column.family]
    sizes = _by_task(families, len(families))
    number = f"{sizes} method{'' if sizes == '1' else 's'}" if sizes.isdigit() else f"methods ({sizes})"
    return (
        f"better/worse: p < {ALPHA:g} after Holm over the {number} compared with the control on a task; "
        f"equivalent: 90 % interval within the margin ({_by_task(margins, len(margins))})"
    )


def _margin_text(column: Column) -> str:
    return f"±{_number(column.margin, column.unit)}{column.unit.of_difference}" if column.margin else "none"


def _resolvable_line(columns: Sequence[Column]) -> str:
    """The smallest true difference that would have been found, per task."""
    parts = [f"{_one_line(column.task)} {_resolvable(column)}" for column in columns if column.family]
    if not parts:
        return ""
    return f"smallest difference found with 80 % power at p < {ALPHA:g}, one comparison: {'; '.join(parts)}"


def _resolvable(column: Column) -> str:
    values = [cell.against.difference.resolvable for cell in column.cells if cell.against.difference]
    known = sorted(value for value in values if not math.isnan(value))
    if not known:
        return "unknown (no spread)"
    ends = list(dict.fromkeys(_resolvable_text(value, column) for value in (known[0], known[-1])))
    return "–".join(ends) + (column.unit.of_difference if ends[-1] != _NOTHING else "")


_NOTHING = "nothing"


def _resolvable_text(value: float, column: Column) -> str:
    scale = math.inf if column.worst is None else abs(column.best - column.worst)
    return _NOTHING if value > scale or math.isinf(value) else _number(value, column.unit)


def _marked_line(columns: Sequence[Column]) -> str:
    if not any(cell.among_best for column in columns for cell in column.cells):
        return ""
    return f"not significantly worse than the best of its column (paired, Holm, {ALPHA:g})"


def _answers_line(columns: Sequence[Column]) -> str:
    """Missing scores, cut answers and errors, of those who have any."""
    parts = []
    for column in columns:
        cells = [(cell, _defects(cell)) for cell in column.cells]
        texts = [f"{_one_line(cell.method)} {defects}" for cell, defects in cells if defects]
        if texts:
            parts.append(f"{_one_line(column.task)}: {', '.join(texts)}")
    return "; ".join(parts)


def _defects(cell: Cell) -> str:
    named = [
        (cell.n_unscored, "unscored"),
        (cell.counts.get("truncated", 0), "truncated"),
        (cell.counts.get("errors", 0), "with errors"),
    ]
    return " + ".join(f"{count:g} {name}" for count, name in named if count > 0)


def _shared_items_line(columns: Sequence[Column]) -> str:
    pairs = [
        f"{_one_line(first.task)} and {_one_line(second.task)}"
        for first, second in combinations(columns, 2)
        if first.items and first.items == second.items
    ]
    return f"{'; '.join(pairs)} ask the same items: not independent evidence" if pairs else ""


def _refused_line(columns: Sequence[Column]) -> str:
    return "; ".join(
        f"{_one_line(cell.method)} and {_one_line(column.control)} on {_one_line(column.task)} differ in "
        + ", ".join(_one_line(line) for line in cell.against.refused)
        for column in columns
        for cell in column.cells
        if cell.against.outcome == "refused"
    )


def _failed_line(columns: Sequence[Column]) -> str:
    """All reasons in full, each once."""
    where: dict[tuple[str, str], list[str]] = {}
    for each in (each for column in columns for cell in column.cells for each in cell.failures):
        run = f"{_one_line(each.method)} seed {each.seed}"
        where.setdefault((run, _one_line(each.reason)), []).append(_one_line(each.task))
    return "; ".join(f"{run} on {', '.join(tasks)}: {reason}" for (run, reason), tasks in where.items())


# ---- plain sentences ---------------------------------------------------------------------------------------


def render_summary(comparison: Comparison) -> list[str]:
    """One sentence per method and task, tasks first."""
    return [
        _sentence(cell, column, text)
        for column in comparison.columns
        for cell, text in zip(column.cells, _score_texts(column), strict=True)
    ]


def _sentence(cell: Cell, column: Column, score: str) -> str:
    method, task = _one_line(cell.method), _one_line(column.task)
    if cell.score is None:
        reasons = "; ".join(dict.fromkeys(f"seed {each.seed}: {_one_line(each.reason)}" for each in cell.failures))
        return f"{method} failed on {task}: {reasons}." if reasons else f"{method} was not run on {task}."
    where = f"{method} scores {score}{column.unit.of_score} on {task}" + _which_seeds(cell)
    if cell.against.outcome == "control":
        return f"{where}; it is the control."
    if cell.against.outcome == "no control":
        return f"{where}; the control has no score there."
    if cell.against.outcome == "refused":
        lines = ", ".join(_one_line(line) for line in cell.against.refused)
        return f"{method} cannot be compared with {_one_line(column.control)} on {task}: they differ in {lines}."
    return _verdict_sentence(cell, column, f"on {task}{_which_seeds(cell)}")


def _which_seeds(cell: Cell) -> str:
    if not cell.failures:
        return ""
    failed = ", ".join(str(each.seed) for each in cell.failures)
    return f" (without seed {failed}, which failed)"


def _verdict_sentence(cell: Cell, column: Column, where: str) -> str:
    difference, unit = cell.against.difference, column.unit
    assert difference is not None
    relation = {
        "better": "better than",
        "worse": "worse than",
        "equivalent": "equivalent to",
        "not resolved": "not resolved from",
    }[cell.against.outcome]
    size = _number(difference.estimate, unit, signed=True) + unit.of_difference
    text = f"{_one_line(cell.method)} is {relation} {_one_line(column.control)} {where}"
    text += " after Holm" if cell.against.after_holm else ""
    lower = "" if column.higher_is_better else " (lower is better)"
    return f"{text}: {size} {_range(difference.low, difference.high, unit)}{lower}; {_grounds(cell, column)}."


def _grounds(cell: Cell, column: Column) -> str:
    """Why the verdict is what it is."""
    difference, unit, p = cell.against.difference, column.unit, cell.against.p_holm
    assert difference is not None
    if difference.n_items == 0:
        return "no item was scored by both"
    margin = f"±{_number(column.margin, unit)}"
    within = -column.margin < difference.equivalence_low and difference.equivalence_high < column.margin
    if cell.against.outcome == "equivalent":
        return f"its 90 % interval lies within {margin}"
    if cell.against.outcome != "not resolved":
        family = f" after Holm over {column.family}" if column.family > 1 else ""
        return f"{_p(p)}{family}, {difference.n_items} items" + (f", yet within {margin}" if within else "")
    if cell.against.after_holm:
        return f"{_p(difference.p_value)} alone, {_p(p)} among {column.family} comparisons"
    if math.isnan(difference.resolvable):
        return "without spread it is unknown what this design could have resolved"
    return f"this design could have resolved {_resolvable_text(difference.resolvable, column)}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


# ---- terminal ------------------------------------------------------------------------------------------------

COLOURS = {"better": "green", "worse": "red", "equivalent": "cyan", "not resolved": "yellow", "refused": "magenta"}
NAME_WIDTH = 24
REMARK_WIDTH = 20


def render_terminal(comparison: Comparison, width: int = 100, colour: bool = False) -> str:
    """The table as text for a terminal of that width; with escape codes only if `colour`."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        legacy_windows=False,
        _environ={},
    )
    console.print(terminal_renderable(comparison, width))
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n"))


def terminal_renderable(comparison: Comparison, width: int) -> RenderableType:
    """For rich: one grid of methods × tasks if it fits the width, else a block per task; then the footer."""
    grid = _grid(comparison)
    if len(comparison.columns) > 1 and _width(grid) <= width:
        return Group(grid, Text(), _footer_table(comparison))
    blocks = [part for column in comparison.columns for part in _block(comparison, column, width)]
    return Group(*blocks, _footer_table(comparison))


def _width(table: Table) -> int:
    """Columns of the terminal that a table wants."""
    console = Console(width=10_000, file=io.StringIO(), _environ={})
    return Measurement.get(console, console.options, table).maximum


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")


def _grid(comparison: Comparison) -> Table:
    """Each cell is a small stack: score, difference to the control, verdict, remarks."""
    table = _table()
    table.leading = 1
    table.add_column("")
    for column in comparison.columns:
        head = Text(_wrapped(_one_line(column.task), NAME_WIDTH), "not dim bold")
        table.add_column(head.append("\n" + _heading(column).replace(", lower", "\nlower"), "not bold dim"))
    stacks = [_stacks(column) for column in comparison.columns]
    for index, name in enumerate(_row_names(comparison)):
        table.add_row(Text(_wrapped(name, NAME_WIDTH), "bold"), *(stack[index] for stack in stacks))
    return table


def _block(comparison: Comparison, column: Column, width: int) -> list[RenderableType]:
    """One task's heading and its table, with method names folded as far as the width asks for."""
    tables = [_block_table(comparison, column, names) for names in (NAME_WIDTH, 16, 10)]
    table = next((table for table in tables if _width(table) <= width), tables[-1])
    return [Text(_one_line(column.task), "bold").append(f"  {_heading(column)}", "not bold dim"), table, Text()]


def _block_table(comparison: Comparison, column: Column, name_width: int) -> Table:
    """Method, score, difference, verdict."""
    table = _table()
    heads = ("score", f"vs {_one_line(column.control)}", "verdict") if column.control else ("score", "", "")
    for head in ("method", *heads):
        table.add_column(Text(_wrapped(head, 20)), overflow="fold")
    names = [Text(_wrapped(name, name_width)) for name in _row_names(comparison)]
    for cells in zip(names, _scores(column), _differences_to_control(column), _outcomes(column), strict=True):
        table.add_row(*cells)
    return table


def _stacks(column: Column) -> list[Text]:
    """One text per method: the columns of a block on top of each other."""
    columns = zip(_scores(column, remarks=False), _differences_to_control(column), _outcomes(column), strict=True)
    return [
        Text("\n").join(part for part in (*parts, *_remark_texts(cell, column)) if part.plain)
        for cell, parts in zip(column.cells, columns, strict=True)
    ]


def _scores(column: Column, remarks: bool = True) -> list[Text]:
    """Scores with the mark, estimates aligned at the point, and the remarks below."""
    texts = []
    for cell, score in zip(column.cells, _aligned(_score_texts(column)), strict=True):
        text = Text(score + " *", "bold") if cell.among_best else Text(score)
        parts = [text, *(_remark_texts(cell, column) if remarks else [])]
        texts.append(Text("\n").join(part for part in parts if part.plain))
    return texts


def _differences_to_control(column: Column) -> list[Text]:
    texts = [_difference_text(cell.against.difference, column.unit) for cell in column.cells]
    return [Text(text) for text in _aligned(texts)]


def _outcomes(column: Column) -> list[Text]:
    styles = [COLOURS.get(cell.against.outcome, "dim") for cell in column.cells]
    texts = [_outcome_text(cell.against).replace(" after", "\nafter") for cell in column.cells]
    return [Text(text, style) for text, style in zip(texts, styles, strict=True)]


def _remark_texts(cell: Cell, column: Column) -> list[Text]:
    return [Text(_wrapped(line, REMARK_WIDTH), "red" if "failed" in line else "dim") for line in _remarks(cell, column)]


def _aligned(texts: Sequence[str]) -> list[str]:
    """Texts that begin with a number, their first words flush right."""
    numbers = [text for text in texts if text and text != _NO_ITEMS]
    width = max((len(text.split(" ")[0]) for text in numbers), default=0)
    return [" " * (width - len(text.split(" ")[0])) + text if text in numbers else text for text in texts]


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _footer_table(comparison: Comparison) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in footer(comparison):
        table.add_row(Text(label), Text(text))
    return table


# ---- Markdown ----------------------------------------------------------------------------------------------


def render_markdown(comparison: Comparison) -> str:
    """Two tables, scores and differences to the control, then the footer as a list."""
    names = [_markdown(name) for name in _row_names(comparison)]
    heads = [f"{_markdown(column.task)}<br>{_markdown(_heading(column))}" for column in comparison.columns]
    scores = [_markdown_scores(column) for column in comparison.columns]
    lines = _markdown_table(["method", *heads], [[name, *row] for name, *row in zip(names, *scores, strict=True)])
    if any(column.family or _refusing(column) for column in comparison.columns):
        control = _markdown(_one_line(comparison.control))
        outcomes = [[_markdown_outcome(cell, column) for cell in column.cells] for column in comparison.columns]
        rows = [[name, *row] for name, *row in zip(names, *outcomes, strict=True)]
        tasks = [_markdown(column.task) for column in comparison.columns]
        lines += ["", *_markdown_table([f"difference to {control}", *tasks], rows)]
    lines += ["", *(f"- **{_markdown(label)}**: {_markdown(text)}" for label, text in footer(comparison))]
    return "\n".join(lines) + "\n"


def _refusing(column: Column) -> bool:
    return any(cell.against.outcome == "refused" for cell in column.cells)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = [":---", *["---"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _markdown_scores(column: Column) -> list[str]:
    found = []
    for cell, score in zip(column.cells, _score_texts(column), strict=True):
        text = f"**{_markdown(score)}**" if cell.among_best else _markdown(score)
        found.append("<br>".join(part for part in (text, *map(_markdown, _remarks(cell, column))) if part))
    return found


def _markdown_outcome(cell: Cell, column: Column) -> str:
    outcome = _markdown(_outcome_text(cell.against))
    difference = _markdown(_difference_text(cell.against.difference, column.unit))
    return "<br>".join(part for part in (difference, outcome) if part)


def _markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, also inside a table."""
    text = html.escape(_one_line(text), quote=False)
    text = re.sub(r"([\\`*~|])", r"\\\1", text)
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)  # would make a link of [low, high](…)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # a_b is no emphasis, _a_ is


# ---- CSV and JSON ------------------------------------------------------------------------------------------


def rows(comparison: Comparison) -> list[dict[str, Value]]:
    """One flat record per task and method with all numbers, in the task's units; None where there is none."""
    return [_row(cell, column, comparison.control) for column in comparison.columns for cell in column.cells]


def _row(cell: Cell, column: Column, control: str) -> dict[str, Value]:
    score = cell.score or Interval(math.nan, math.nan, math.nan, "", math.nan)
    return {
        "task": column.task,
        "method": cell.method,
        "status": cell.status,
        "metric": column.metric,
        "best": column.best,
        "worst": column.worst,
        "score": score.estimate,
        "low": score.low,
        "high": score.high,
        "interval": score.method,
        "level": score.level,
        "trained": cell.trained if cell.score else None,
        "seeds": " ".join(map(str, cell.seeds)),
        "failed_seeds": " ".join(str(each.seed) for each in cell.failures),
        "items": cell.n_items,
        "unscored": cell.n_unscored,
        "among_best": cell.among_best,
        **_against_row(cell.against, control),
        "margin": column.margin,
        "family": column.family,
        "truncated": cell.counts.get("truncated"),
        "errors": cell.counts.get("errors"),
        "steps": cell.cost.get("steps"),
        "tokens": cell.cost.get("tokens"),
        "seconds": cell.cost.get("seconds"),
        "reason": "; ".join(dict.fromkeys([*(each.reason for each in cell.failures), *cell.against.refused])),
    }


def _against_row(against: Against, control: str) -> dict[str, Value]:
    found = against.difference
    values: Mapping[str, Value] = {} if found is None else dataclasses.asdict(found)
    return {
        "control": control,
        "verdict": against.outcome,
        "after_holm": against.after_holm,
        "difference": values.get("estimate"),
        "difference_low": values.get("low"),
        "difference_high": values.get("high"),
        "test": values.get("method"),
        "p": values.get("p_value"),
        "p_holm": against.p_holm,
        "resolvable": values.get("resolvable"),
        "paired_items": values.get("n_items"),
        "dropped_items": values.get("n_dropped"),
        "items_better": values.get("a_better"),
        "items_worse": values.get("b_better"),
    }


def render_csv(comparison: Comparison) -> str:
    """Tidy: one line per task and method. Empty fields are unknown; text cannot start a spreadsheet formula."""
    table = rows(comparison)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table[0] if table else [])
    writer.writerows([_csv(value) for value in row.values()] for row in table)
    return out.getvalue()


def _csv(value: Value) -> str:
    if isinstance(value, str):
        text = _one_line(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def render_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, as JSON types; null where a number is unknown or unbounded."""
    return {
        "control": comparison.control,
        "methods": list(comparison.methods),
        "tasks": [column.task for column in comparison.columns],
        "cells": [{key: _finite(value) for key, value in row.items()} for row in rows(comparison)],
        "summary": render_summary(comparison),
        "footer": [{"label": label, "text": text} for label, text in footer(comparison)],
        "notes": list(comparison.notes),
    }


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value
