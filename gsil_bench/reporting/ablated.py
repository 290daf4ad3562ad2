"""An ablation as Markdown, CSV, JSON and text for a terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gsil_bench.ablate import DATA, Ablation, Row, Table, numbers
from gsil_bench.reporting.comparison import Unit
from gsil_bench.reporting.tables import escape_csv, escape_markdown
from gsil_bench.reporting.wording import difference_text, one_line

HEAD = ("variant", "changed", "score", "difference to {}", "p (BH)", "verdict", "what else differs")
NOTHING = "-"


def render_markdown(ablation: Ablation) -> str:
    """A table for each task, and one for the rounds of each method that shows them."""
    lines = [f"# Ablation of {escape_markdown(ablation.method)}"]
    for title, head, table in _titled(ablation):
        rows = [[escape_markdown(cell) for cell in cells] for cells in (head, *_rows(table))]
        rule = [":---", "---", *["---:"] * 3, "---", "---"]
        lines += ["", f"## {escape_markdown(title)}", "", *(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))]
    return "\n".join([*lines, "", *(f"- {escape_markdown(line)}" for line in _footer(ablation))]) + "\n"


def render_text(ablation: Ablation) -> str:
    """The same for a terminal."""
    lines = []
    for title, head, table in _titled(ablation):
        rows = [[one_line(cell) for cell in cells] for cells in (head, *_rows(table))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [one_line(title), *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), ""]
    return "\n".join([*lines, *map(one_line, _footer(ablation))]) + "\n"


def render_csv(ablation: Ablation) -> str:
    """One line per task and variant, the rounds below them; task units, empty where there is none."""
    records = list(_records(ablation))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(records[0] if records else [])
    flat = ({**record, "changed": _changed(record["changed"]), "notes": "; ".join(record["notes"])} for record in records)
    writer.writerows([escape_csv(value) for value in record.values()] for record in flat)
    return out.getvalue()


def render_json(ablation: Ablation) -> str:
    """Everything: axes, rows, rounds, and the data of a sensitivity plot for each axis."""
    axes = [{"key": axis.key, "values": list(axis.values), "full": axis.full} for axis in ablation.axes]
    record = {
        "method": ablation.method,
        "axes": axes,
        "rows": list(_records(ablation)),
        "sensitivity": {axis.key: ablation.sensitivity(axis.key) for axis in ablation.axes},
        "footer": _footer(ablation),
    }
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _titled(ablation: Ablation) -> Iterable[tuple[str, Sequence[str], Table]]:
    heads = [head.format("full") for head in HEAD]
    for table in ablation.tables if ablation.axes else ():
        yield _title(table), heads, table
    for table in ablation.rounds:
        title = f"{_title(table)}: did round k of {table.rows[-1].name} help?"
        yield title, [head.format("the round before") for head in HEAD], table


def _title(table: Table) -> str:
    column = table.column
    return f"{column.task} ({column.metric}{column.unit.of_score}{'' if column.higher_is_better else ', lower is better'})"


def _rows(table: Table) -> list[list[str]]:
    unit = table.column.unit
    return [
        [
            row.name,
            _changed(row.changes),
            _score(row, unit),
            difference_text(row.difference, unit),
            "" if math.isnan(row.p_adjusted) else f"{row.p_adjusted:.3f}",
            row.outcome,
            "; ".join(row.notes),
        ]
        for row in table.rows
    ]


def _score(row: Row, unit: Unit) -> str:
    if row.score is None or not math.isfinite(row.score.estimate):
        return NOTHING
    estimate, low, high = (
        f"{value * unit.factor:.{unit.decimals}f}" for value in (row.score.estimate, row.score.low, row.score.high)
    )
    return f"{estimate} [{low}, {high}]"


def _changed(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_value(key, value)}" for key, value in changes.items()) or NOTHING


def _value(key: str, value: Any) -> str:
    if value is None and key == DATA:
        return "all"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _records(ablation: Ablation) -> Iterable[dict[str, Any]]:
    for kind, tables in (("variant", ablation.tables), ("round", ablation.rounds)):
        for table in tables:
            for row in table.rows:
                yield _record(kind, row, table)


def _record(kind: str, row: Row, table: Table) -> dict[str, Any]:
    found = row.difference
    return {
        "kind": kind,
        "task": row.task,
        "metric": table.column.metric,
        "method": row.name,
        "changed": dict(row.changes),
        "verdict": row.outcome,
        **numbers(row),
        "p": _finite(found.p_value if found else math.nan),
        "p_bh": _finite(row.p_adjusted),
        "family": table.family,
        "margin": table.column.margin,
        "test": found.method if found else None,
        "resolvable": _finite(found.resolvable if found else math.nan),
        "seeds": " ".join(map(str, row.seeds)),
        "notes": list(row.notes),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _footer(ablation: Ablation) -> list[str]:
    columns = [table.column for table in (*ablation.tables, *ablation.rounds)]
    margins = {
        column.task: f"±{column.margin * column.unit.factor:g}{column.unit.of_difference}" if column.margin else "none"
        for column in columns
    }
    seeds = sorted({len(row.seeds) for table in ablation.tables for row in table.rows if row.seeds})
    lines = [
        "better/worse: p < 0.05 after Benjamini and Hochberg over the rows of a table: at most one in twenty such verdicts is "
        "expected to be false; equivalent: 90 % interval within the margin "
        f"({', '.join(f'{task} {margin}' for task, margin in margins.items())})",
        "intervals have 95 % confidence and are not corrected",
    ]
    return lines + (["training-seed variance was not measured (1 seed)"] if seeds[:1] == [1] else [])
