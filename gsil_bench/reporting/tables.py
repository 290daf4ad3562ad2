"""A comparison as Markdown, CSV and JSON.

Names and reasons come from users and models: each format's own signs are neutralised.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gsil_bench.evaluation.statistics import (
    Interval,
)
from gsil_bench.reporting.comparison import Against, Cell, Column, Comparison
from gsil_bench.reporting.wording import (
    difference_text,
    footer,
    heading,
    one_line,
    outcome_text,
    remarks,
    render_summary,
    row_names,
    score_texts,
)

Value = str | int | float | bool | None


def render_markdown(comparison: Comparison) -> str:
    """Two tables, scores and differences to the control, then the footer as a list."""
    names = [_markdown(name) for name in row_names(comparison)]
    heads = [f"{_markdown(column.task)}<br>{_markdown(heading(column))}" for column in comparison.columns]
    scores = [_markdown_scores(column) for column in comparison.columns]
    lines = _markdown_table(["method", *heads], [[name, *row] for name, *row in zip(names, *scores, strict=True)])
    if any(_compared(column) for column in comparison.columns):
        control = _markdown(one_line(comparison.control))
        outcomes = [[_markdown_outcome(cell, column) for cell in column.cells] for column in comparison.columns]
        rows = [[name, *row] for name, *row in zip(names, *outcomes, strict=True)]
        tasks = [_markdown(column.task) for column in comparison.columns]
        lines += ["", *_markdown_table([f"difference to {control}", *tasks], rows)]
    lines += ["", *(f"- **{_markdown(label)}**: {_markdown(text)}" for label, text in footer(comparison))]
    return "\n".join(lines) + "\n"


def _compared(column: Column) -> bool:
    return any(cell.against.outcome not in ("", "control", "no control") for cell in column.cells)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = [":---", *["---"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _markdown_scores(column: Column) -> list[str]:
    found = []
    for cell, score in zip(column.cells, score_texts(column), strict=True):
        text = f"**{_markdown(score)}**" if cell.among_best else _markdown(score)
        found.append("<br>".join(part for part in (text, *map(_markdown, remarks(cell, column))) if part))
    return found


def _markdown_outcome(cell: Cell, column: Column) -> str:
    outcome = _markdown(outcome_text(cell.against))
    difference = _markdown(difference_text(cell.against.difference, column.unit))
    return "<br>".join(part for part in (difference, outcome) if part)


def _markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, also inside a table."""
    text = html.escape(one_line(text), quote=False)
    text = re.sub(r"([\\`*~|])", r"\\\1", text)
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)  # would make a link of [low, high](…)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # a_b is no emphasis, _a_ is


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
        "scored_tokens": cell.cost.get("scored_tokens"),
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
        text = one_line(value)
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
