"""A comparison in words: numbers with their units, the footer that says what was not measured, one sentence per verdict."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from itertools import combinations

from gsil_bench.evaluation.statistics import (
    ALPHA,
    Interval,
    PairedDifference,
)
from gsil_bench.reporting.comparison import Against, Cell, Column, Comparison, Unit


def _number(value: float, unit: Unit, signed: bool = False) -> str:
    """In the unit's factor and decimals; "-0.0" and "+0.0" are "0.0"."""
    if not math.isfinite(value):
        return "?" if math.isnan(value) else ("-∞" if value < 0 else "∞")
    text = f"{value * unit.factor:{'+' if signed else ''}.{unit.decimals}f}"
    return text if float(text) else text.lstrip("+-")


def value_text(value: float, unit: Unit, signed: bool = False) -> str:
    """A score with its unit; signed: a difference of two."""
    return _number(value, unit, signed) + (unit.of_difference if signed else unit.of_score)


def _range(low: float, high: float, unit: Unit) -> str:
    return f"[{_number(low, unit)}, {_number(high, unit)}]"


def _lopsided(score: Interval, unit: Unit) -> bool:
    """The halves of the interval differ in print and by a tenth: "±" would hide it."""
    below, above = score.estimate - score.low, score.high - score.estimate
    if not (math.isfinite(below) and math.isfinite(above)):
        return True
    return _number(below, unit) != _number(above, unit) and abs(above - below) > 0.05 * (above + below)


def score_texts(column: Column) -> list[str]:
    """Each cell's score with its interval; brackets in the whole column if any is lopsided, "" without a score."""
    unit, scores = column.unit, [cell.score for cell in column.cells]
    brackets = any(score is not None and score.method != NO_ITEMS and _lopsided(score, unit) for score in scores)
    return ["" if score is None else _score_text(score, unit, brackets) for score in scores]


def letter_texts(column: Column) -> list[str]:
    """Each cell's compact letters; all "" where the column has too few methods for them."""
    return [cell.letters if column.letters_shown else "" for cell in column.cells]


def across_table(comparison: Comparison) -> list[list[str]]:
    """The summary over tasks with its head; empty below three tasks or three trained methods (`AcrossTasks.shown`)."""
    across = comparison.across
    if across is None or not across.shown:
        return []
    count, names = len(across.tasks), dict(zip(comparison.methods, row_names(comparison), strict=True))
    head = [f"over {count} tasks", "IQM of normalised scores", "mean rank", f"P(better than {one_line(across.control)})"]
    rows = [[names[row.method], *(_bracketed(each) for each in (row.iqm, row.mean_rank, row.improvement))] for row in across.rows]
    return [head, *rows]


def _bracketed(interval: Interval | None) -> str:
    if interval is None:
        return "control"
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


NO_ITEMS = "no scored items"


def _score_text(score: Interval, unit: Unit, brackets: bool) -> str:
    if score.method == NO_ITEMS:
        return NO_ITEMS
    if brackets:
        return f"{_number(score.estimate, unit)} {_range(score.low, score.high, unit)}"
    half = max(score.estimate - score.low, score.high - score.estimate)
    return f"{_number(score.estimate, unit)} ± {_number(half, unit)}"


def difference_text(difference: PairedDifference | None, unit: Unit) -> str:
    """Estimate and interval; "" if no item was scored by both."""
    if difference is None or difference.n_items == 0:
        return ""
    return f"{_number(difference.estimate, unit, signed=True)} {_range(difference.low, difference.high, unit)}"


def outcome_text(against: Against) -> str:
    """The verdict; says so where only Holm's correction stands between the difference and significance."""
    return f"{against.outcome} after Holm" if against.after_holm else against.outcome


def remarks(cell: Cell, column: Column, limit: int = 72) -> list[str]:
    """What a reader must know about a cell besides its score: failures and missing scores."""
    if cell.status == "not run":
        return ["not run"]
    if cell.status == "failed":
        return list(dict.fromkeys(f"failed: {cut(each.reason, limit)}" for each in cell.failures))
    lines = [f"seed {each.seed} failed: {cut(each.reason, limit)}" for each in cell.failures]
    if cell.n_unscored:
        lines.append(f"n = {cell.n_items}, {cell.n_unscored} unscored")
    elif cell.n_items != column.n_items:
        lines.append(f"n = {cell.n_items}")
    return lines


def cut(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    return one_line(text) if len(one_line(text)) <= limit else one_line(text)[: limit - 1].rstrip() + "…"


def one_line(text: str) -> str:
    """Text on one line without control, format and escape characters, so that no name can move the cursor."""
    text = re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    return "".join(char for char in text if unicodedata.category(char) not in {"Cc", "Cf", "Cs"})


def row_names(comparison: Comparison) -> list[str]:
    """Methods as printed; the starting model says that it was not trained."""
    untrained = {cell.method for column in comparison.columns for cell in column.cells if not cell.trained}
    return [one_line(name) + (" (no training)" if name in untrained else "") for name in comparison.methods]


def heading(column: Column) -> str:
    """The metric, its unit, the number of items, and the direction if it is not the usual one."""
    if not column.metric:
        return "no result"
    unit = f" in{column.unit.of_score}" if column.unit.of_score else ""
    direction = "" if column.higher_is_better else ", lower is better"
    return f"{one_line(column.metric)}{unit}, n = {column.n_items}{direction}"


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
        ("Letters", _letters_line(columns)),
        ("Across tasks", _across_line(comparison)),
        ("Answers", _answers_line(columns)),
        ("Same items", _shared_items_line(columns)),
        ("Refused", _refused_line(columns)),
        ("Failed", _failed_line(comparison.columns)),
        *(("Note", one_line(note)) for note in comparison.notes),
    ]
    return [(label, text) for label, text in lines if text]


def _scores_line(columns: Sequence[Column]) -> str:
    scored = [(column.task, cell, cell.score) for column in columns for cell in column.cells if cell.n_items and cell.score]
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
        groups.setdefault(text, []).append(one_line(task))
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
    single = sorted({one_line(method) for method, count in counts if count == 1})
    if single:
        text += (
            f"; for {', '.join(single)} training-seed variance was not measured (1 seed): "
            "its score's interval covers items only, its differences use the other method's"
        )
    return text


def _control_line(comparison: Comparison, columns: Sequence[Column]) -> str:
    missing = [one_line(column.task) for column in columns if not column.control]
    methods = [
        (column.task, cell.against.difference.method) for column in columns for cell in column.cells if cell.against.difference
    ]
    text = f"{one_line(comparison.control)}; differences are method − control on the same items"
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
    parts = [f"{one_line(column.task)} {_resolvable(column)}" for column in columns if column.family]
    if not parts:
        return ""
    several = any(len(cell.seeds) > 1 for column in columns for cell in column.cells)
    power = "80 % power (nearer 70 % with a few seeds, whose variance is a guess)" if several else "80 % power"
    return f"smallest difference found with {power} at p < {ALPHA:g}, one comparison: {'; '.join(parts)}"


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


def _letters_line(columns: Sequence[Column]) -> str:
    if not any(column.letters_shown for column in columns):
        return ""
    return f"methods that share a letter are not significantly different (Holm over all pairs of a column, {ALPHA:g})"


def _across_line(comparison: Comparison) -> str:
    """What the summary over tasks is, and what it leaves out."""
    across = comparison.across
    if across is None or not across.shown:
        return ""
    text = (
        f"{', '.join(map(one_line, across.tasks))}; scores as shares of the way from worst to best, interquartile mean over runs "
        "and tasks; rank 1 is the best; P: of a run's score above a run of the control's on a task drawn at random, ties half; "
        "95 % bootstrap intervals over items and seeds within tasks; the tasks' own columns come first"
    )
    return text + (f"; without {'; '.join(map(one_line, across.left_out))}" if across.left_out else "")


def _answers_line(columns: Sequence[Column]) -> str:
    """Missing scores, cut answers and errors, of those who have any."""
    parts = []
    for column in columns:
        cells = [(cell, _defects(cell)) for cell in column.cells]
        texts = [f"{one_line(cell.method)} {defects}" for cell, defects in cells if defects]
        if texts:
            parts.append(f"{one_line(column.task)}: {', '.join(texts)}")
    return "; ".join(parts)


def _defects(cell: Cell) -> str:
    named = [
        (cell.n_unscored, "unscored"),
        (cell.counts.get("truncated", 0), "truncated"),
        (cell.counts.get("errors", 0), "with errors"),
        (cell.counts.get("out_of_range", 0), "rated outside the scale"),
        (cell.counts.get("integrity_flag", 0), "flagged for their equality"),
    ]
    return " + ".join(f"{count:g} {name}" for count, name in named if count > 0)


def _shared_items_line(columns: Sequence[Column]) -> str:
    pairs = [
        f"{one_line(first.task)} and {one_line(second.task)}"
        for first, second in combinations(columns, 2)
        if first.items and first.items == second.items
    ]
    return f"{'; '.join(pairs)} ask the same items: not independent evidence" if pairs else ""


def _refused_line(columns: Sequence[Column]) -> str:
    return "; ".join(
        f"{one_line(cell.method)} and {one_line(column.control)} on {one_line(column.task)} differ in "
        + ", ".join(one_line(line) for line in cell.against.refused)
        for column in columns
        for cell in column.cells
        if cell.against.outcome == "refused"
    )


def _failed_line(columns: Sequence[Column]) -> str:
    """All reasons in full, each once."""
    where: dict[tuple[str, str], list[str]] = {}
    for each in (each for column in columns for cell in column.cells for each in cell.failures):
        run = f"{one_line(each.method)} seed {each.seed}"
        where.setdefault((run, one_line(each.reason)), []).append(one_line(each.task))
    return "; ".join(f"{run} on {', '.join(tasks)}: {reason}" for (run, reason), tasks in where.items())


def render_summary(comparison: Comparison) -> list[str]:
    """One sentence per method and task, tasks first."""
    return [
        _sentence(cell, column, text)
        for column in comparison.columns
        for cell, text in zip(column.cells, score_texts(column), strict=True)
    ]


def _sentence(cell: Cell, column: Column, score: str) -> str:
    method, task = one_line(cell.method), one_line(column.task)
    if cell.score is None:
        reasons = "; ".join(dict.fromkeys(f"seed {each.seed}: {one_line(each.reason)}" for each in cell.failures))
        return f"{method} failed on {task}: {reasons}." if reasons else f"{method} was not run on {task}."
    said = f"has {NO_ITEMS}" if score == NO_ITEMS else f"scores {score}{column.unit.of_score}"
    where = f"{method} {said} on {task}" + _which_seeds(cell)
    if cell.against.outcome == "control":
        return f"{where}; it is the control."
    if cell.against.outcome == "no control":
        return f"{where}; the control has no score there."
    if cell.against.outcome == "refused":
        lines = ", ".join(one_line(line) for line in cell.against.refused)
        return f"{method} cannot be compared with {one_line(column.control)} on {task}: they differ in {lines}."
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
    text = f"{one_line(cell.method)} is {relation} {one_line(column.control)} {where}"
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
    return "p < 0.001" if value < 0.001 else f"p = {p_digits(value)}"


def p_digits(value: float) -> str:
    """A p value; in three digits where two would hide on which side of 0.05 it lies."""
    return f"{value:.3g}" if 0.045 <= value < 0.055 else f"{value:.2g}"
