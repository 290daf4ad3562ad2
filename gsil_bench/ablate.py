"""Ablation: what each setting of a method is worth, against the unchanged method on the same items.

    gsil-bench ablate gsil-logistic --grid scale=0.1,0.5,2 --grid temperature=0,1 --grid loss=gsil-brier,gsil-kliep
    gsil-bench ablate gsil-logistic --grid limit_demonstrations=100,300,1000
    gsil-bench ablate gsil-logistic --set gsil-logistic.rounds=3 --every-round

Every point of the grid is a variant of the method in an ordinary comparison. Unlike in a comparison, a point may differ from the
full method in its budget and its demonstrations: that is what some grids ask about. Each row says in what it differs besides its
settings. The p values of a task are corrected together (Benjamini and Hochberg): the grid is a search, not a family of claims.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsil_bench.config import Config, whole_number
from gsil_bench.errors import UserError, unknown_name
from gsil_bench.evaluation.statistics import Interval, PairedDifference, benjamini_hochberg, verdict
from gsil_bench.inputs import read_inputs, resolve_methods
from gsil_bench.methods import Method, with_settings
from gsil_bench.plan import Plan, Planner
from gsil_bench.records import NAME, CellFailure, CellResult
from gsil_bench.reporting.comparison import Cell, Column, Comparison
from gsil_bench.training.config import TrainConfig
from gsil_bench.variants import BASE, ROUND, all_settings, setting, spelt_out

FOLDER = "ablation"
"""Below --out: results of the variants, so that a comparison in the same folder keeps its own. They share the store."""
LOSS = "loss"
"""The axis of other methods' losses, under the full method's protocol and training."""
DATA = "limit_demonstrations"
"""The axis of data size."""
MAY_DIFFER = ("budget", "demonstrations", "left_out")
"""Keys of `comparable` that rows of an ablation may differ in; they are said instead of refused."""
TOKENS_TOLERANCE = 0.05
"""Share by which the training tokens may differ before a row says so."""


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes."""

    key: str
    values: tuple[Any, ...]
    full: Any
    """The unchanged method's own value; None: all demonstrations."""


@dataclass(frozen=True, eq=False)
class Point:
    """A variant of the method."""

    name: str
    changes: Mapping[str, Any]
    """Axis → value; in a full grid also axes on which it has the full method's value."""
    record: Mapping[str, Any]
    """Its entry among the variants of a configuration."""
    limit: int | None
    """Demonstrations read."""


@dataclass(frozen=True)
class Row:
    """A point on a task, against the full method; or a round against the round before."""

    name: str
    task: str
    changes: Mapping[str, Any]
    outcome: str
    """A verdict, "full", "same weights" (nothing was changed, so nothing is tested), "failed", "not run" or "refused"."""
    score: Interval | None = None
    difference: PairedDifference | None = None
    p_adjusted: float = math.nan
    """By Benjamini and Hochberg, over the rows of the task."""
    notes: tuple[str, ...] = ()
    """In what else it differs, why it failed or is refused."""
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """The rows of one task."""

    column: Column
    rows: tuple[Row, ...]

    @property
    def family(self) -> int:
        """Number of p values that were corrected together."""
        return sum(not math.isnan(row.p_adjusted) for row in self.rows)


@dataclass(frozen=True)
class Ablation:
    """A grid and what it showed."""

    method: str
    axes: tuple[Axis, ...]
    tables: tuple[Table, ...]
    """The full method first, then the points in the grid's order."""
    rounds: tuple[Table, ...] = ()
    """Round k against round k − 1; round 1 against the untrained model."""

    def sensitivity(self, key: str) -> list[dict[str, Any]]:
        """A record for each task and value of an axis, the other settings being the full method's own: data of a plot.

        Keys: axis, value (None: all demonstrations), task, metric, method, full (whether it is the unchanged method), score, low,
        high, difference, difference_low, difference_high, verdict; task units, None where there is none. Numbers come in order.
        """
        own = {axis.key: axis.full for axis in self.axes}
        if key not in own:
            raise unknown_name("axis", key, own)
        found = []
        for table in self.tables:
            rows = [
                row for row in table.rows if all(row.changes.get(name, own[name]) == own[name] for name in own if name != key)
            ]
            records = [_record_of(row, table.column, key, row.changes.get(key, own[key])) for row in rows]
            found += sorted(records, key=lambda each: _order(each["value"]))
        return found


def _record_of(row: Row, column: Column, key: str, value: Any) -> dict[str, Any]:
    return {
        "axis": key,
        "value": value,
        "task": row.task,
        "metric": column.metric,
        "method": row.name,
        "full": row.outcome == FULL,
        **numbers(row),
        "verdict": row.outcome,
    }


def numbers(row: Row) -> dict[str, float | None]:
    """Score and difference with their intervals; None where there is none."""
    found: dict[str, float | None] = dict.fromkeys(("score", "low", "high", "difference", "difference_low", "difference_high"))
    if row.score is not None:
        found |= {"score": row.score.estimate, "low": row.score.low, "high": row.score.high}
    if row.difference is not None:
        ends = {"difference_low": row.difference.low, "difference_high": row.difference.high}
        found |= {"difference": row.difference.estimate, **ends}
    return {key: None if value is None or not math.isfinite(value) else value for key, value in found.items()}


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then words, then everything there is."""
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (2, 0.0, "") if value is None else (1, 0.0, str(value))


FULL = "full"
SAME = "same weights"


def parse_grids(texts: Sequence[str]) -> dict[str, list[str]]:
    """KEY=V1,V2,…, several times.

    Raises:
        UserError: another form, no values, or an axis twice.
    """
    grids: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        listed = [value.strip() for value in values.split(",") if value.strip()]
        if not (key and equals and listed):
            raise UserError(f"--grid {text}: expected SETTING=VALUE,VALUE,…, such as scale=0.1,0.5")
        if key in grids:
            raise UserError(f"--grid {text}: {key} has a grid already; give all its values in one")
        grids[key] = listed
    return grids


def axes_of(grids: Mapping[str, Sequence[str]], method: Method, config: Config) -> tuple[Axis, ...]:
    """The grids with typed values.

    Raises:
        UserError: a setting that the method does not have, a wrong value, a value twice.
    """
    known = [*all_settings(method), LOSS, DATA]
    for key in grids:
        if key not in known:
            raise unknown_name(f"setting of {method.name} in --grid", key, known)
    axes = [Axis(key, tuple(_typed(key, text, method, config) for text in texts), _own(key, method, config)) for key, texts in
            grids.items()]  # fmt: skip
    for axis in axes:
        repeated = [value for index, value in enumerate(axis.values) if value in axis.values[:index]]
        if repeated:
            raise UserError(f"--grid {axis.key}: {repeated[0]} is there twice")
    return tuple(axes)


def _typed(key: str, text: str, method: Method, config: Config) -> Any:
    if key == LOSS:
        return _other(text, config).name
    if key == DATA:
        return whole_number(text, f"--grid {DATA}")
    return setting(with_settings(method, {key: text}), key)


def _own(key: str, method: Method, config: Config) -> Any:
    return {LOSS: method.name, DATA: config.limit_demonstrations}[key] if key in (LOSS, DATA) else setting(method, key)


def _other(word: str, config: Config) -> Method:
    """Another method with its settings in this comparison."""
    other = resolve_methods(dataclasses.replace(config, methods=(word,), start=False, every_round=False))[0]
    if not other.trains:
        raise UserError(f"--grid {LOSS}={word}: {other.name} does not train")
    return other


def points_of(axes: Sequence[Axis], typed: str, method: Method, config: Config, full_grid: bool) -> list[Point]:
    """The variants of a grid; the full method is none of them.

    Args:
        axes: what is varied.
        typed: the method as the user named it.
        method: with its settings.
        config: of the command.
        full_grid: all values with all others, instead of one at a time.
    """
    if full_grid:
        combinations = [
            dict(zip([axis.key for axis in axes], values, strict=True)) for values in itertools.product(*(a.values for a in axes))
        ]
    else:
        combinations = [{axis.key: value} for axis in axes for value in axis.values]
    own = {axis.key: axis.full for axis in axes}
    changed = [each for each in combinations if any(value != own[key] for key, value in each.items())]
    if axes and not changed:
        listed = ", ".join(f"{key}={value}" for key, value in own.items())
        raise UserError(f"--grid: {method.name} has these values already ({listed}); there is nothing to compare it with")
    names = _names(method.name, changed, own)
    return [_point(name, changes, own, typed, method, config) for name, changes in zip(names, changed, strict=True)]


def _names(method: str, combinations: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> list[str]:
    """By what they change, or by number where a name would be too long or no name."""
    names = []
    for number, changes in enumerate(combinations, start=1):
        parts = [f"{key}-{_word(value)}" for key, value in changes.items() if value != own[key]]
        name = "--".join([method, *parts])
        names.append(name if NAME.fullmatch(name) and not ROUND.search(name) else f"{method}--point-{number}")
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(f"ablate: {method!r} is too long a name for variants; shorten it")
    return names


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _point(name: str, changes: Mapping[str, Any], own: Mapping[str, Any], typed: str, method: Method, config: Config) -> Point:
    changed = {key: value for key, value in changes.items() if value != own[key]}
    limit = changed.pop(DATA, config.limit_demonstrations)
    loss = changed.pop(LOSS, None)
    record = spelt_out(typed, config) if loss is None else _under_our_settings(loss, method, config)
    return Point(name, dict(changes), {**record, **changed}, limit)


def _under_our_settings(word: str, method: Method, config: Config) -> dict[str, Any]:
    """A variant of another method that has all settings of ours that it knows: only the loss is another."""
    ours, theirs = all_settings(method), all_settings(_other(word, config))
    return {BASE: word, **{key: ours[key] for key in theirs if key in ours and ours[key] != theirs[key]}}


def prepare(config: Config, grids: Sequence[str], full_grid: bool) -> tuple[tuple[Axis, ...], list[Point], list[Plan]]:
    """What is varied, and the comparisons that show it: one for each data size, that of the full method last.

    Raises:
        UserError: whatever is wrong with method, grid or inputs.
    """
    if len(config.methods) != 1:
        raise UserError(f"ablate: name one method, not {len(config.methods)}")
    typed = config.methods[0]
    method = resolve_methods(dataclasses.replace(config, start=False))[0]
    if not method.trains:
        raise UserError(f"ablate: {method.name} does not train, so it has nothing to take away")
    if not grids and not (config.every_round and method.protocol.rounds > 1):
        raise UserError(
            "ablate: say what to vary with --grid SETTING=VALUE,…, or show a method of several rounds by --every-round"
        )
    axes = axes_of(parse_grids(grids), method, config)
    points = points_of(axes, typed, method, config, full_grid)
    return axes, points, [Planner(read_inputs(each)).plan() for each in _configs(config, typed, method.name, points)]


def _configs(config: Config, typed: str, full: str, points: Sequence[Point]) -> list[Config]:
    limits = list(dict.fromkeys(point.limit for point in points if point.limit != config.limit_demonstrations))
    found = []
    for limit in [*limits, config.limit_demonstrations]:
        members = {point.name: dict(point.record) for point in points if point.limit == limit}
        main = limit == config.limit_demonstrations
        names = (*((typed,) if main else ()), *members)
        changes: dict[str, Any] = {"methods": names, "variants": {**config.variants, **members}, "limit_demonstrations": limit}
        found.append(dataclasses.replace(config, **changes, start=config.start and main, control=full if main else names[0]))
    return found


def conclude(
    method: str,
    axes: Sequence[Axis],
    points: Sequence[Point],
    results: Sequence[CellResult],
    failures: Sequence[CellFailure],
) -> Ablation:
    """Every point against the full method, and every round against the one before.

    Args:
        method: name of the full method.
        axes: what was varied.
        points: in the table's order.
        results: of all comparisons, with the rows of rounds if there are any.
        failures: likewise.
    """
    changes = {method: {}, **{point.name: point.changes for point in points}}
    relaxed = [_relaxed(result) for result in results]
    comparison = Comparison.of(relaxed, failures, methods=list(changes), control=method)
    tables = [_table(column, changes, results) for column in comparison.columns]
    return Ablation(method, tuple(axes), tuple(tables), tuple(_rounds(list(changes), results, relaxed, failures)))


def _relaxed(result: CellResult) -> CellResult:
    """Without what rows of an ablation may differ in."""
    kept = {key: value for key, value in result.comparable.items() if key not in MAY_DIFFER}
    return dataclasses.replace(result, comparable=kept)


def _table(column: Column, changes: Mapping[str, Mapping[str, Any]], results: Sequence[CellResult]) -> Table:
    """One task's rows."""
    cells = {cell.method: cell for cell in column.cells}
    own = {name: [each for each in results if (each.method, each.task) == (name, column.task)] for name in cells}
    full = own.get(column.control, [])
    trained = _weights(full)
    same = {name for name in cells if name != column.control and any(trained.values()) and _weights(own[name]) == trained}
    corrected = _corrected([cell for cell in column.cells if cell.method not in same])
    rows = []
    for name, cell in cells.items():
        if name in same:
            note = "this setting changes nothing here"
            rows.append(Row(name, column.task, dict(changes[name]), SAME, cell.score, notes=(note,), seeds=cell.seeds))
        else:
            compared = own[name] and full and name != column.control
            notes = differences(own[name][0], full[0], changes[name]) if compared else []
            rows.append(_row(cell, column, changes[name], corrected.get(name, math.nan), notes))
    return Table(column, tuple(rows))


def _weights(results: Sequence[CellResult]) -> dict[int, list[str]]:
    """Seed → digests of the weights after each round; results of other seeds are never the same."""
    return {each.seed: [done["weights_sha256"] for done in each.provenance.get("rounds", [])] for each in results}


def _corrected(cells: Sequence[Cell]) -> dict[str, float]:
    """Method → p after Benjamini and Hochberg, of those that were compared."""
    tested = {cell.method: cell.against.difference.p_value for cell in cells if cell.against.difference is not None}
    return dict(zip(tested, benjamini_hochberg(list(tested.values())), strict=True))


def _row(cell: Cell, column: Column, changes: Mapping[str, Any], p: float, notes: Sequence[str]) -> Row:
    difference = cell.against.difference
    outcome: str = {"control": FULL, "": "failed" if cell.failures else "not run"}.get(cell.against.outcome, cell.against.outcome)
    if difference is not None:
        outcome = verdict(difference, column.margin, higher_is_better=column.higher_is_better, p_value=p)
    reasons = [f"seed {each.seed} failed: {each.reason}" for each in cell.failures]
    more = (*notes, *(f"cannot be compared: {line}" for line in cell.against.refused), *reasons)
    return Row(cell.method, cell.task, dict(changes), outcome, cell.score, difference, p, more, cell.seeds)


def differences(mine: CellResult, full: CellResult, changes: Mapping[str, Any]) -> list[str]:
    """In what two rows differ besides the settings that were varied, in words."""
    lines = []
    if mine.comparable.get("budget") != full.comparable.get("budget"):
        lines.append(f"{mine.comparable.get('budget')} instead of {full.comparable.get('budget')}")
    if mine.comparable.get("demonstrations") != full.comparable.get("demonstrations"):
        counts = [each.provenance["inputs"]["demonstrations"]["trained on"] for each in (mine, full)]
        lines.append(f"trained on {counts[0]} demonstrations instead of {counts[1]}")
    if mine.comparable.get("left_out") != full.comparable.get("left_out"):
        lines.append(f"left out as too long: {mine.comparable.get('left_out')} instead of {full.comparable.get('left_out')}")
    lines += _other_settings(mine.record, full.record, changes)
    if full.cost.get("tokens"):
        ratio = mine.cost.get("tokens", 0) / full.cost["tokens"]
        lines += [f"{ratio:.2f} times the training tokens"] if abs(ratio - 1) > TOKENS_TOLERANCE else []
    return lines


def _other_settings(mine: Mapping[str, Any], full: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    a, b = _flat(mine), _flat(full)
    keys = [key for key in dict.fromkeys([*b, *a]) if key not in changes and a.get(key) != b.get(key)]
    return [f"{key} {a.get(key, 'none')} instead of {b.get(key, 'none')}" for key in keys]


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in a method's record that decides its weights."""
    parts = {key: record[key] for key in ("loss", "needs", "normalise", "batches")}
    return {**parts, **record["protocol"], **record["settings"], **TrainConfig.defaults(), **record["training"]}


def _rounds(
    names: Sequence[str], results: Sequence[CellResult], relaxed: Sequence[CellResult], failures: Sequence[CellFailure]
) -> list[Table]:
    """For each method with rows after its rounds: round k against round k − 1, corrected over the rounds of a task."""
    rows = list(dict.fromkeys(each.method for group in (results, failures) for each in group))
    untrained = [result.method for result in results if not result.provenance.get("rounds")][:1]
    found = []
    for name in names:
        earlier = sorted((row for row in rows if ROUND.sub("", row) == name != row), key=lambda row: int(row.rpartition("-")[2]))
        steps = [*untrained, *earlier, name] if earlier else []
        pairs = [Comparison.of(relaxed, failures, methods=pair, control=pair[0]) for pair in itertools.pairwise(steps)]
        for columns in zip(*(pair.columns for pair in pairs), strict=True):
            found.append(_round_table(columns, len(steps) - len(earlier) - 1))
    return found


def _round_table(columns: Sequence[Column], first: int) -> Table:
    """One task's rounds; each column holds a round and the one before.

    Args:
        columns: oldest pair first.
        first: 1 if the first pair holds the untrained model and round 1; 0 if it holds rounds 1 and 2.
    """
    later = [column.cells[1] for column in columns]
    corrected = _corrected(later)
    rows = []
    for number, (column, cell) in enumerate(zip(columns, later, strict=True), start=2 - first):
        changes = {"round": number, "against": column.cells[0].method}
        rows.append(_row(cell, column, changes, corrected.get(cell.method, math.nan), ()))
    return Table(columns[0], tuple(rows))


def write(ablation: Ablation, out: Path) -> list[Path]:
    """Write ablation.md, .csv and .json below a folder, and a plot of each setting's values as SVG and PNG below plots/.

    Raises:
        MissingLibraryError: no plots without matplotlib; the tables are written.
    """
    from gsil_bench.records import write_atomically
    from gsil_bench.reporting import ablated, plots

    files = {
        out / "ablation.md": ablated.render_markdown(ablation),
        out / "ablation.csv": ablated.render_csv(ablation),
        out / "ablation.json": ablated.render_json(ablation),
    }
    for path, text in files.items():
        write_atomically(path, text)
    for axis in ablation.axes:
        name = f"sensitivity-{re.sub('[^a-z0-9]+', '-', axis.key.lower())}"
        plot = plots.sensitivity(ablation.sensitivity(axis.key), f"{ablation.method}: {axis.key}", name)
        write_atomically(out / "plots" / f"{name}.svg", plot.svg())
        (out / "plots" / f"{name}.png").write_bytes(plot.png())
        files |= {out / "plots" / f"{name}{ending}": "" for ending in (".svg", ".png")}
    return list(files)
