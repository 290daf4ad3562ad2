"""A comparison as Markdown, LaTeX, CSV and JSON.

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

from gsil_bench.evaluation.across_tasks import AcrossRow, AcrossTasks
from gsil_bench.evaluation.statistics import Interval
from gsil_bench.reporting.comparison import Against, Cell, Column, Comparison
from gsil_bench.reporting.wording import (
    across_table,
    difference_text,
    footer,
    heading,
    letter_texts,
    one_line,
    outcome_text,
    p_digits,
    remarks,
    render_summary,
    row_names,
    score_texts,
)

Value = str | int | float | bool | None


def render_markdown(comparison: Comparison) -> str:
    """Two tables, scores and differences to the control; where there is one, the summary over tasks; the footer as a list."""
    names = [escape_markdown(name) for name in row_names(comparison)]
    heads = [f"{escape_markdown(column.task)}<br>{escape_markdown(heading(column))}" for column in comparison.columns]
    scores = [_markdown_scores(column) for column in comparison.columns]
    lines = _markdown_table(["method", *heads], [[name, *row] for name, *row in zip(names, *scores, strict=True)])
    if any(_compared(column) for column in comparison.columns):
        control = escape_markdown(one_line(comparison.control))
        outcomes = [[_markdown_outcome(cell, column) for cell in column.cells] for column in comparison.columns]
        rows = [[name, *row] for name, *row in zip(names, *outcomes, strict=True)]
        tasks = [escape_markdown(column.task) for column in comparison.columns]
        lines += ["", *_markdown_table([f"difference to {control}", *tasks], rows)]
    if across := across_table(comparison):
        head, *body = ([escape_markdown(text) for text in row] for row in across)
        lines += ["", *_markdown_table(head, body)]
    lines += ["", *(f"- **{escape_markdown(label)}**: {escape_markdown(text)}" for label, text in footer(comparison))]
    return "\n".join(lines) + "\n"


def _compared(column: Column) -> bool:
    return any(cell.against.outcome not in ("", "control", "no control") for cell in column.cells)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = [":---", *["---"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _markdown_scores(column: Column) -> list[str]:
    found = []
    for cell, score, letters in zip(column.cells, score_texts(column), letter_texts(column), strict=True):
        text = f"**{escape_markdown(score)}**" if cell.among_best else escape_markdown(score)
        text += f" {letters}" if letters else ""
        found.append("<br>".join(part for part in (text, *map(escape_markdown, remarks(cell, column))) if part))
    return found


def _markdown_outcome(cell: Cell, column: Column) -> str:
    outcome = escape_markdown(outcome_text(cell.against))
    difference = escape_markdown(difference_text(cell.against.difference, column.unit))
    return "<br>".join(part for part in (difference, outcome) if part)


def escape_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, also inside a table."""
    text = html.escape(one_line(text), quote=False)
    text = re.sub(r"([\\`*~|])", r"\\\1", text)
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)  # would make a link of [low, high](…)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # a_b is no emphasis, _a_ is


def render_latex(comparison: Comparison) -> str:
    r"""One booktabs `tabular`: a block per task with score, difference to the control, p after Holm and verdict.

    It wants \usepackage{booktabs} and nothing else. The footer is in comments above it, for the caption: what the numbers mean is
    not the table's to repeat. Bold is what the other tables mark: not significantly worse than the best.
    """
    lines = [f"% {label}: {text}" for label, text in footer(comparison)]
    head = ("method", "score", f"difference to {_latex(comparison.control)}", "$p$", "verdict")
    lines += [r"\begin{tabular}{lllll}", r"\toprule", _latex_row(head)]
    names = row_names(comparison)
    for column in comparison.columns:
        title = f"{_latex(column.task)} ({_latex(heading(column))})"
        lines += [r"\midrule", rf"\multicolumn{{5}}{{l}}{{\emph{{{title}}}}} \\"]
        lines += _latex_block(column, names)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *_latex_across(comparison)]) + "\n"


def _latex_block(column: Column, names: Sequence[str]) -> Iterable[str]:
    for name, cell, score, letters in zip(names, column.cells, score_texts(column), letter_texts(column), strict=True):
        shown = rf"\textbf{{{_latex_number(score)}}}" if cell.among_best else _latex_number(score)
        shown += rf"$^{{\mathrm{{{letters}}}}}$" if letters else ""
        notes = "; ".join(_latex(line) for line in remarks(cell, column))
        difference = _latex_number(difference_text(cell.against.difference, column.unit))
        p = "" if math.isnan(cell.against.p_holm) else _latex_p(cell.against.p_holm)
        shown = ", ".join(part for part in (shown, notes) if part)
        yield _latex_row((_latex(name), shown, difference, p, _latex(outcome_text(cell.against))))


def _latex_across(comparison: Comparison) -> list[str]:
    """The summary over tasks as a tabular of its own."""
    found = across_table(comparison)
    if not found:
        return []
    rows = [_latex_row([_latex(row[0]), *(_latex_number(text) for text in row[1:])]) for row in found[1:]]
    head = _latex_row([_latex(text) for text in found[0]])
    return ["", r"\begin{tabular}{llll}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]


def _latex_row(cells: Sequence[str]) -> str:
    """A row; "[" or "*" at its beginning would be read as an argument of the row before."""
    return f"{'{}' if cells[0].startswith(('[', '*')) else ''}{' & '.join(cells)} \\\\"


def _latex_p(p: float) -> str:
    return "$<0.001$" if p < 0.001 else p_digits(p)


def _latex_number(text: str) -> str:
    """Numbers with minus signs for hyphens."""
    return re.sub(r"-(?=[\d$])", "$-$", _latex(text))


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "±": r"$\pm$",
    "∞": r"$\infty$",
    "−": "$-$",
    "–": r"\textendash{}",
    "…": r"\ldots{}",
} | {sign: f"\\{sign}" for sign in "$&#_%"}


def _latex(text: str) -> str:
    """Text that LaTeX sets as it is. Letters that a plain pdflatex has no glyph for are named by their code point: U+6F22."""
    shown = (_LATEX.get(sign) or (sign if _in_latex_fonts(sign) else f"[U+{ord(sign):04X}]") for sign in one_line(text))
    return re.sub(r"-(?=-)", "-{}", "".join(shown))  # two hyphens would become a dash


def _in_latex_fonts(sign: str) -> bool:
    """ASCII and the accented letters of western Europe, without those that want another font encoding."""
    return " " <= sign <= "~" or ("À" <= sign <= "ÿ" and sign not in "ÐðÞþ×÷")


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
        "letters": cell.letters,
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
        "equivalence_low": values.get("equivalence_low"),
        "equivalence_high": values.get("equivalence_high"),
        "p_equivalence": against.p_equivalence,
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
    writer.writerows([escape_csv(value) for value in row.values()] for row in table)
    return out.getvalue()


def escape_csv(value: Value) -> str:
    """A value as one field: numbers in full, unknown ones empty, text that starts no formula of a spreadsheet."""
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
        "across_tasks": None if comparison.across is None else _across(comparison.across),
        "summary": render_summary(comparison),
        "footer": [{"label": label, "text": text} for label, text in footer(comparison)],
        "notes": list(comparison.notes),
        "failures": [
            dataclasses.asdict(each) for column in comparison.columns for cell in column.cells for each in cell.failures
        ],
    }


def _across(across: AcrossTasks) -> dict[str, Any]:
    left_out = list(across.left_out)
    rows = [_across_row(row) for row in across.rows]
    return {"control": across.control, "tasks": list(across.tasks), "left_out": left_out, "shown": across.shown, "rows": rows}


def _across_row(row: AcrossRow) -> dict[str, Any]:
    measures = {"iqm": row.iqm, "mean_rank": row.mean_rank, "improvement": row.improvement}
    found: dict[str, Any] = {"method": row.method, "trained": row.trained}
    for name, interval in measures.items():
        ends = (None, None, None) if interval is None else (interval.estimate, interval.low, interval.high)
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    return found | {"interval": row.iqm.method, "level": row.iqm.level}


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value
