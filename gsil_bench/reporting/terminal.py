"""A comparison for a terminal: one grid if it fits, otherwise a block per task. Names and reasons are never read as markup."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gsil_bench.reporting.comparison import Cell, Column, Comparison
from gsil_bench.reporting.wording import (
    NO_ITEMS,
    across_table,
    cut,
    difference_text,
    footer,
    heading,
    letter_texts,
    one_line,
    outcome_text,
    remarks,
    row_names,
    score_texts,
)

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
        return Group(grid, Text(), *_across(comparison, width), _footer_table(comparison))
    blocks = [part for column in comparison.columns for part in _block(comparison, column, width)]
    return Group(*blocks, *_across(comparison, width), _footer_table(comparison))


def _across(comparison: Comparison, width: int) -> list[RenderableType]:
    """The summary over tasks, its names and heads folded as far as the width asks for."""
    found = across_table(comparison)
    if not found:
        return []
    tables = [_across_table(found, *folds) for folds in ((NAME_WIDTH, 30), (NAME_WIDTH, 17), (16, 17), (10, 12))]
    return [next((table for table in tables if _width(table) <= width), tables[-1]), Text()]


def _across_table(found: Sequence[Sequence[str]], name_width: int, head_width: int) -> Table:
    table = _table()
    for head in found[0]:
        table.add_column(Text(_wrapped(head, head_width)), overflow="fold")
    for name, *values in found[1:]:
        table.add_row(Text(_wrapped(name, name_width)), *map(Text, values))
    return table


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
    legend = f"score\nvs {cut(comparison.control, NAME_WIDTH)}\nverdict" if comparison.control else "score"
    table.add_column(Text(legend, "dim"))
    for column in comparison.columns:
        head = Text(_wrapped(one_line(column.task), NAME_WIDTH), "not dim bold")
        table.add_column(head.append("\n" + heading(column).replace(", lower", "\nlower"), "not bold dim"))
    stacks = [_stacks(column) for column in comparison.columns]
    for index, name in enumerate(row_names(comparison)):
        table.add_row(Text(_wrapped(name, NAME_WIDTH), "bold"), *(stack[index] for stack in stacks))
    return table


def _block(comparison: Comparison, column: Column, width: int) -> list[RenderableType]:
    """One task's heading and its table, with method names folded as far as the width asks for."""
    tables = [_block_table(comparison, column, names) for names in (NAME_WIDTH, 16, 10)]
    table = next((table for table in tables if _width(table) <= width), tables[-1])
    return [Text(one_line(column.task), "bold").append(f"  {heading(column)}", "not bold dim"), table, Text()]


def _block_table(comparison: Comparison, column: Column, name_width: int) -> Table:
    """Method, score, difference, verdict."""
    table = _table()
    heads = ("score", f"vs {one_line(column.control)}", "verdict") if column.control else ("score", "", "")
    for head in ("method", *heads):
        table.add_column(Text(_wrapped(head, 20)), overflow="fold")
    names = [Text(_wrapped(name, name_width)) for name in row_names(comparison)]
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
    for cell, score, letters in zip(column.cells, _aligned(score_texts(column)), letter_texts(column), strict=True):
        text = Text(score + " *", "bold") if cell.among_best else Text(score)
        text.append(f"{'' if cell.among_best else '  '} {letters}" if letters else "", "not bold dim")
        parts = [text, *(_remark_texts(cell, column) if remarks else [])]
        texts.append(Text("\n").join(part for part in parts if part.plain))
    return texts


def _differences_to_control(column: Column) -> list[Text]:
    texts = [difference_text(cell.against.difference, column.unit) for cell in column.cells]
    return [Text(text) for text in _aligned(texts)]


def _outcomes(column: Column) -> list[Text]:
    styles = [COLOURS.get(cell.against.outcome, "dim") for cell in column.cells]
    texts = [outcome_text(cell.against).replace(" after", "\nafter") for cell in column.cells]
    return [Text(text, style) for text, style in zip(texts, styles, strict=True)]


def _remark_texts(cell: Cell, column: Column) -> list[Text]:
    return [Text(_wrapped(line, REMARK_WIDTH), "red" if "failed" in line else "dim") for line in remarks(cell, column)]


def _aligned(texts: Sequence[str]) -> list[str]:
    """Texts that begin with a number, their first words flush right."""
    numbers = [text for text in texts if text and text != NO_ITEMS]
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
