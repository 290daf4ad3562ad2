"""Every plot of the suite: paired differences, training curves, rewards beside scores, costs, ratings by category. Drawn by
matplotlib, as SVG and PNG.

One way of drawing: the page shows the same SVG that is written to a file, with its colours replaced by the page's variables, so
that it follows light and dark. Text stays text. Colours are Okabe and Ito's, which colour-blind readers can tell apart; dashes
and markers repeat the distinction in print. The same inputs give the same bytes.

matplotlib is imported when something is drawn, and by nothing else of the suite.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from gsil_bench.errors import library
from gsil_bench.reporting.comparison import Cell, Column
from gsil_bench.reporting.wording import cut, difference_text, one_line, outcome_text

INK, MUTED, GRID, BAND, PAPER = "#1b1c1e", "#5c5f66", "#d7d9de", "#e8eaee", "#ffffff"
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE, INK)
"""Okabe and Ito's, without the yellow, which no white paper shows."""
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", BAND: "band", PAPER: "paper", BLUE: "blue", VERMILLION: "vermillion",
    GREEN: "green", PURPLE: "purple", SKY: "sky", ORANGE: "orange",
}  # fmt: skip
"""Colour → its name in the page's style sheet."""
VERDICTS = {
    "better": (BLUE, "^", "▲"),
    "worse": (VERMILLION, "v", "▼"),
    "equivalent": (GREEN, "s", "■"),
    "not resolved": (MUTED, "o", "○"),
    "refused": (MUTED, "x", "✕"),
    "no control": (MUTED, "x", "✕"),
    "control": (MUTED, "|", "–"),
}
"""Outcome → colour, marker of the plot, sign of the text: never a colour alone."""

WIDTH, WIDE = 5.6, 10.5
"""Inches: of a plot, and of one with many panels."""
CHARACTER = 0.083
"""Inches that a character takes, about."""
NAME = 22
"""Characters of a name that a plot shows."""
POINTS = 150
"""Of a line at most: more steps are averaged in groups."""
SMOOTHED = 0.1
"""Share of a line's points that a smoothed one averages around each."""
HIGHEST_RATING = 10.0

STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "text.usetex": False, "font.size": 9.5, "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"], "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK,
    "axes.facecolor": "none", "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID, "grid.linewidth": 0.7, "axes.grid": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "legend.frameon": False, "axes.unicode_minus": True, "axes.formatter.useoffset": False,
}  # fmt: skip
FONT = "'DejaVu Sans', Verdana, system-ui, sans-serif"


@dataclass(frozen=True)
class Look:
    """How one method is drawn, everywhere the same."""

    colour: str
    dash: Any
    marker: str


@dataclass(frozen=True)
class Line:
    """One training run's values of one quantity."""

    method: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    round_starts: tuple[int, ...] = ()
    """Positions in `steps` at which a round other than the first begins."""


@dataclass(frozen=True)
class Panel:
    """One quantity of one method over its steps."""

    label: str
    """Of its axis."""
    runs: tuple[Line, ...]
    """A seed each, pale."""
    mean: Line
    points: bool = False
    """A value at few steps: marked, and not smoothed."""


@dataclass(frozen=True)
class Strip:
    """Panels of one method above each other, which share the axis of steps."""

    method: str
    panels: tuple[Panel, ...]
    ends: tuple[float, ...]
    """Steps done after each round."""
    shaded: float
    """Steps of the method that it starts from."""
    starts_from: str


@dataclass(frozen=True)
class Plot:
    """A finished drawing."""

    name: str
    """Of its file: letters, digits, "-"."""
    title: str
    text: str
    """What it shows, for those who do not see it and as its caption."""
    figure: Any

    @property
    def is_wide(self) -> bool:
        """It has many panels."""
        return bool(self.figure.get_figwidth() > WIDTH)

    def svg(self, themed: bool = False) -> str:
        """A self-contained drawing; themed: for a page that defines --plot-… colours, as wide as its place."""
        out = io.StringIO()
        with _style({"svg.hashsalt": self.name}), _quiet():
            self.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return _cleaned(out.getvalue(), f"{self.title}. {self.text}", themed)

    def png(self) -> bytes:
        """300 dpi, for print."""
        out = io.BytesIO()
        with _style({}), _quiet():
            self.figure.savefig(out, format="png", dpi=300, metadata={"Software": None})
        return out.getvalue()


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A colour, a dash and a marker for each method; 28 methods have different lines."""
    return {
        method: Look(
            COLOURS[at % len(COLOURS)], DASHES[(at % len(COLOURS) + at // len(COLOURS)) % len(DASHES)], MARKERS[at % len(MARKERS)]
        )
        for at, method in enumerate(methods)
    }


def forest(column: Column, control: str, name: str) -> Plot:
    """Differences of one task's methods to the control with 95 % intervals; the band is the margin of equivalence."""
    cells = [cell for cell in column.cells if cell.against.outcome not in ("", "control", "no control")]
    unit, shown = column.unit, [_short(cell.method) for cell in cells]
    words = [_verdict_words(cell, column) for cell in cells]
    left = 0.3 + CHARACTER * max(map(len, [*shown, "method"]))
    right = 0.25 + 0.9 * CHARACTER * max(len(line) for text in [*words, "○ not resolved"] for line in text.split("\n"))
    height = 1.15 + 0.36 * max(1, len(cells))
    with _style({}), _quiet():
        figure = _figure(height)
        axes = figure.add_axes((left / WIDTH, 0.62 / height, (WIDTH - left - right) / WIDTH, 1 - 1.0 / height))
        low, high = _limits(column, cells)
        if column.margin:
            margin = column.margin * unit.factor
            axes.axvspan(-margin, margin, color=BAND, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        for row, cell in enumerate(cells):
            _interval(axes, row, cell, unit.factor, (low, high))
            axes.text(1.03, row, words[row], transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, linespacing=1.1)
        axes.set_xlim(low, high)
        axes.set_ylim(len(cells) - 0.4, -0.6)
        axes.set_yticks(range(len(cells)), shown)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(library("matplotlib.ticker", "plots").MaxNLocator(4))
        direction = "(better →)" if column.higher_is_better else "(← better)"
        label = f"difference to {_short(control)}{_in(unit.of_difference)} {direction}"
        figure.text(min(left, WIDTH - 0.1 - CHARACTER * len(label)) / WIDTH, 0.15 / height, label, va="center")
        _title(figure, f"{column.task} ({column.metric})")
    return Plot(name, f"Differences on {one_line(column.task)}", _forest_text(column, cells, control), figure)


def _verdict_words(cell: Cell, column: Column) -> str:
    """The verdict with its sign, and the difference below it."""
    words = f"{VERDICTS[cell.against.outcome][2]} {outcome_text(cell.against)}"
    difference = difference_text(cell.against.difference, column.unit)
    return f"{words}\n{difference}" if difference else words


def _in(unit: str) -> str:
    return f" in{unit}" if unit else ""


def _forest_text(column: Column, cells: Sequence[Cell], control: str) -> str:
    said = [
        f"{one_line(cell.method)} {difference_text(cell.against.difference, column.unit)} {outcome_text(cell.against)}".replace(
            "  ", " "
        )
        for cell in cells
    ]
    return f"Method minus {one_line(control)}, with 95 % intervals: {'; '.join(said)}."


def _limits(column: Column, cells: Sequence[Cell]) -> tuple[float, float]:
    """Of the axis: all finite ends, zero and the margin."""
    ends = [column.margin, -column.margin, 0.0]
    for cell in cells:
        if cell.against.difference is not None:
            ends += [cell.against.difference.low, cell.against.difference.high, cell.against.difference.estimate]
    finite = [end * column.unit.factor for end in ends if math.isfinite(end)]
    space = 0.06 * (max(finite) - min(finite)) or 1.0
    return min(finite) - space, max(finite) + space


def _interval(axes: Any, row: int, cell: Cell, factor: float, limits: tuple[float, float]) -> None:
    """A cell's interval, thick where its 90 % part is; an end without a limit is an arrow at the plot's edge."""
    difference = cell.against.difference
    if difference is None or not math.isfinite(difference.estimate):
        return
    colour, marker, _ = VERDICTS[cell.against.outcome]
    low, high = (min(max(end * factor, limits[0]), limits[1]) for end in (difference.low, difference.high))
    axes.plot([low, high], [row, row], color=colour, linewidth=1.3, solid_capstyle="butt")
    inner = [min(max(end * factor, low), high) for end in (difference.equivalence_low, difference.equivalence_high)]
    if all(map(math.isfinite, inner)):
        axes.plot(inner, [row, row], color=colour, linewidth=3.2, solid_capstyle="butt")
    for end, sign in ((difference.low, "<"), (difference.high, ">")):
        if not math.isfinite(end):
            axes.plot([limits[sign == ">"]], [row], marker=sign, color=colour, markersize=6, clip_on=False)
    axes.plot([difference.estimate * factor], [row], marker=marker, color=colour, markersize=7, markeredgecolor=PAPER)


def curves(panels: Mapping[str, Sequence[Line]], methods: Sequence[str], title: str, text: str, name: str) -> Plot:
    """Lines against training steps, one panel for each quantity: pale each run, strong its moving average. A dot marks the start
    of a round.

    Args:
        panels: quantity → lines.
        methods: all of the comparison, which decides colours; those without a line are left out of the legend.
    """
    columns = 1 if len(panels) == 1 else min(4, len(panels))
    rows, width = math.ceil(len(panels) / columns), WIDTH if columns == 1 else WIDE
    drawn = [method for method in methods if any(line.method == method for lines in panels.values() for line in lines)]
    top = 0.45 + _legend_height(drawn, width) + (0.0 if columns == 1 else 0.3)
    height = 0.5 + top + 1.95 * rows
    with _style({}), _quiet():
        figure, look = _figure(height, width), looks(methods)
        grid = figure.add_gridspec(
            rows, columns, left=0.65 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - top / height,
            hspace=0.45, wspace=0.36,
        )  # fmt: skip
        for at, (quantity, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(grid[at // columns, at % columns])
            axes.set_title("" if columns == 1 else cut(quantity, 30), fontsize=9.5)
            for line in lines:
                _draw_line(axes, line, look[line.method])
            axes.yaxis.set_major_formatter(library("matplotlib.ticker", "plots").FuncFormatter(_tick))
            axes.grid(axis="y")
            axes.margins(x=0.02)
            if at + columns >= len(panels):
                axes.set_xlabel("training step")
        _title(figure, title)
        _legend(figure, drawn, look)
    return Plot(name, title, text, figure)


def _tick(value: float, place: int) -> str:
    """Short: "-1.25e5"."""
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:.3g}").replace("-", "−")


def _draw_line(axes: Any, line: Line, look: Look) -> None:
    steps, values, starts = _thinned(line)
    smooth = _smoothed(values, starts)
    axes.plot(steps, values, color=look.colour, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smooth, color=look.colour, linestyle=look.dash, linewidth=1.7)
    axes.plot([steps[at] for at in starts], [smooth[at] for at in starts], color=look.colour, marker="o", linestyle="none",
              markersize=5, markeredgecolor=PAPER)  # fmt: skip


def _smoothed(values: Sequence[float], starts: Sequence[int]) -> list[float]:
    """Means around each point, within its round."""
    half = max(1, round(SMOOTHED * len(values) / 2))
    found = []
    for begin, end in zip([0, *starts], [*starts, len(values)], strict=True):
        found += [_mean(values[max(begin, at - half) : min(end, at + half + 1)]) for at in range(begin, end)]
    return found


def _thinned(line: Line) -> tuple[list[float], list[float], list[int]]:
    """At most about `POINTS` points: means of equally many steps, never across the start of a round."""
    size = max(1, math.ceil(len(line.steps) / POINTS))
    edges = [0, *line.round_starts, len(line.steps)]
    steps, values, starts = list[float](), list[float](), list[int]()
    for number, (begin, end) in enumerate(pairwise(edges)):
        if number:
            starts.append(len(steps))
        for at in range(begin, end, size):
            piece = slice(at, min(at + size, end))
            steps.append(_mean(line.steps[piece]))
            values.append(_mean(line.values[piece]))
    return steps, values, [at for at in starts if at < len(steps)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


STRIPS = 3
"""Beside each other at most."""
PANEL_HEIGHTS = (1.35, 1.2, 0.8)
"""Inches."""
LABELLED = 0.85
"""Inches that an axis takes with its numbers and its label."""
BEFORE = 0.12
"""Of a strip's own steps: so much is shown of those before them."""


def strips(shown: Sequence[Strip], methods: Sequence[str], title: str, text: str, name: str) -> Plot:
    """A strip of panels for each method; panels of points have one scale in all of them.

    Args:
        shown: one method each, with equally many panels.
        methods: all of the comparison, which decides colours.
    """
    columns = min(STRIPS, max(1, len(shown)))
    rows, width = math.ceil(len(shown) / columns), WIDTH if columns == 1 else WIDE
    block = sum(PANEL_HEIGHTS) + 0.75
    height = 0.85 + block * rows
    with _style({}), _quiet():
        figure, look = _figure(height, width), looks(methods)
        grid = figure.add_gridspec(
            rows, columns, left=LABELLED / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.65 / height,
            hspace=0.75 / (block - 0.75), wspace=0.36,
        )  # fmt: skip
        limits = _limits_of_points(shown)
        for at, strip in enumerate(shown):
            inner = grid[at // columns, at % columns].subgridspec(len(strip.panels), 1, hspace=0.16, height_ratios=PANEL_HEIGHTS)
            _draw_strip(figure, inner, strip, look[strip.method], limits)
        _title(figure, title)
    return Plot(name, title, text, figure)


def _limits_of_points(shown: Sequence[Strip]) -> tuple[float, float] | None:
    """Of the axis of all panels of points."""
    panels = [panel for strip in shown for panel in strip.panels if panel.points]
    values = [value for panel in panels for line in (*panel.runs, panel.mean) for value in line.values]
    space = 0.12 * (max(values) - min(values)) or 0.02 * abs(values[0]) or 1.0 if values else 1.0
    return (min(values) - space, max(values) + space) if values else None


def _draw_strip(figure: Any, grid: Any, strip: Strip, look: Look, limits: tuple[float, float] | None) -> None:
    ticker = library("matplotlib.ticker", "plots")
    for at, panel in enumerate(strip.panels):
        axes = figure.add_subplot(grid[at])
        own = strip.ends[-1] - strip.shaded
        axes.axvspan(strip.shaded - own, strip.shaded, color=BAND if strip.shaded else "none", linewidth=0)
        for end in strip.ends[:-1]:
            axes.axvline(end, color=GRID, linewidth=0.9)
        _draw_points(axes, panel, look) if panel.points else _draw_mean(axes, panel, look)
        axes.set_xlim(strip.shaded - (BEFORE if strip.shaded else 0.02) * own, strip.ends[-1] + 0.02 * own)
        if panel.points and limits:
            axes.set_ylim(*limits)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(_tick))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_ylabel(cut(panel.label, 20), fontsize=8.5)
        axes.yaxis.set_label_coords(-(LABELLED - 0.2) / (axes.get_position().width * figure.get_figwidth()), 0.5)
        axes.tick_params(axis="x", labelbottom=at + 1 == len(strip.panels))
        if at == 0:
            axes.set_title(_short(strip.method), fontsize=9.5)
            words = f"{cut(strip.starts_from, 12)}, {strip.shaded:g} steps" if strip.shaded else ""
            axes.text(strip.shaded - BEFORE * own / 2, 0.5, words, transform=axes.get_xaxis_transform(), ha="center",
                      va="center", rotation=90, color=MUTED, fontsize=8)  # fmt: skip
        if at + 1 == len(strip.panels):
            axes.set_xlabel("training step")


def _draw_mean(axes: Any, panel: Panel, look: Look) -> None:
    """Pale the seeds, strong the moving average of their mean."""
    for line in panel.runs:
        steps, values, _ = _thinned(line)
        axes.plot(steps, values, color=look.colour, linewidth=0.8, alpha=0.4)
    if panel.mean.steps:
        steps, values, starts = _thinned(panel.mean)
        axes.plot(steps, _smoothed(values, starts), color=look.colour, linewidth=1.8)


def _draw_points(axes: Any, panel: Panel, look: Look) -> None:
    """Pale the seeds, strong their mean with a marker at each step that has one."""
    for line in panel.runs:
        axes.plot(line.steps, line.values, color=look.colour, linewidth=0.8, alpha=0.4, marker=".", markersize=4)
    axes.plot(panel.mean.steps, panel.mean.values, color=look.colour, linewidth=1.8, marker=look.marker, markersize=6.5,
              markeredgecolor=PAPER, clip_on=False, zorder=3)  # fmt: skip


def costs(table: Mapping[str, Mapping[str, float]], methods: Sequence[str], name: str = "cost") -> Plot:
    """Bars of what training took: a panel for each measure, a bar for each method.

    Args:
        table: measure → method → amount; a method without one has no bar.
    """
    shown = [method for method in methods if any(method in amounts for amounts in table.values())]
    left = 0.25 + CHARACTER * min(NAME, max(map(len, shown), default=4))
    height = 0.85 + 0.24 * max(1, len(shown))
    look = looks(methods)
    with _style({}), _quiet():
        figure = _figure(height)
        grid = figure.add_gridspec(1, max(1, len(table)), left=left / WIDTH, right=0.975, bottom=0.5 / height,
                                   top=1 - 0.35 / height, wspace=0.22)  # fmt: skip
        for at, (measure, amounts) in enumerate(table.items()):
            axes = figure.add_subplot(grid[0, at])
            for row, method in enumerate(shown):
                axes.barh(row, amounts.get(method, 0.0), color=look[method].colour, height=0.62)
            axes.set_yticks(range(len(shown)), [_short(method) for method in shown] if at == 0 else [""] * len(shown))
            axes.set_ylim(len(shown) - 0.45, -0.55)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(library("matplotlib.ticker", "plots").MaxNLocator(2))
            axes.xaxis.set_major_formatter(library("matplotlib.ticker", "plots").EngFormatter(sep=""))
            axes.set_title(cut(measure, 30), fontsize=9)
            axes.grid(axis="x")
            axes.set_axisbelow(True)
    said = [f"{measure}: {', '.join(f'{one_line(m)} {a:.3g}' for m, a in amounts.items())}" for measure, amounts in table.items()]
    return Plot(name, "Cost of training", f"Summed over seeds. {'; '.join(said)}.", figure)


def sensitivity(records: Sequence[Mapping[str, Any]], title: str, name: str) -> Plot:
    """Scores over the values of one setting, a panel for each task: the full method's is a filled diamond, the others bear the
    sign of their verdict.

    Args:
        records: of `Ablation.sensitivity`, in the order of the values.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    columns = min(2, max(1, len(tasks)))
    rows, width = math.ceil(len(tasks) / columns), WIDTH if columns == 1 else WIDE
    height = 0.95 + 2.2 * rows
    with _style({}), _quiet():
        figure = _figure(height, width)
        grid = figure.add_gridspec(
            rows, columns, left=0.7 / width, right=1 - 0.15 / width, bottom=0.55 / height, top=1 - 0.7 / height,
            hspace=0.55, wspace=0.2,
        )  # fmt: skip
        for at, task in enumerate(tasks):
            own = [record for record in records if record["task"] == task]
            axes = figure.add_subplot(grid[at // columns, at % columns])
            axes.set_title(cut(f"{task} ({own[0]['metric']})", 50), fontsize=9.5)
            for place, record in enumerate(own):
                _draw_value(axes, place, record)
            axes.set_xticks(range(len(own)), [_value_name(record["value"]) for record in own])
            axes.set_xlim(-0.5, len(own) - 0.5)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        _title(figure, title)
    return Plot(name, one_line(title), _sensitivity_text(records), figure)


def _value_name(value: Any) -> str:
    """A setting's value below an axis; without one, all demonstrations."""
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else cut(str(value), 12)


def _draw_value(axes: Any, place: int, record: Mapping[str, Any]) -> None:
    """One value's score with its interval; none of one that cannot be compared."""
    if record["score"] is None or record["verdict"] == "refused":
        return
    colour, marker, _ = VERDICTS.get(record["verdict"], (INK, "D", ""))
    ends = [end for end in (record["low"], record["high"]) if end is not None]
    if len(ends) == 2:
        axes.plot([place, place], ends, color=colour, linewidth=1.3, solid_capstyle="butt")
    axes.plot([place], [record["score"]], marker="D" if record["full"] else marker, color=INK if record["full"] else colour,
              markersize=7, markeredgecolor=PAPER)  # fmt: skip


def _sensitivity_text(records: Sequence[Mapping[str, Any]]) -> str:
    said = [
        f"{one_line(record['task'])}, {one_line(str(record['axis']))} {_value_name(record['value'])}: {record['score']:.3g}, "
        f"{one_line(record['verdict'])}"
        for record in records
        if record["score"] is not None and record["verdict"] != "refused"
    ]
    return f"Scores with 95 % intervals. {'; '.join(said)}."


def best_of(record: Mapping[str, Any], name: str = "best-of") -> Plot:
    """What the first-ranked of N samples scores, above, and how far its reward is from the mean reward, below: a panel each for
    every task. The reward is in standard deviations among an item's samples.

    Args:
        record: of `gsil_bench.best_of.conclude`.
    """
    tasks, numbers = record["tasks"], record["n"]
    rows = {row["choice"]: row["is_reward"] for task in tasks.values() for row in task["rows"]}
    choices = [name for name, is_reward in rows.items() if is_reward] + [
        name for name, is_reward in rows.items() if not is_reward
    ]
    width = WIDTH if len(tasks) == 1 else WIDE
    top = 0.75 + _legend_height(choices, width)
    height = top + 4.3
    with _style({}), _quiet():
        figure, look = _figure(height, width), looks(choices)
        look |= {name: replace(look[name], colour=MUTED) for name in choices if not rows[name]}
        grid = figure.add_gridspec(
            2, len(tasks), left=0.75 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - top / height,
            hspace=0.3, wspace=0.25,
        )  # fmt: skip
        for at, (task_name, task) in enumerate(tasks.items()):
            above, below = figure.add_subplot(grid[0, at]), figure.add_subplot(grid[1, at])
            above.set_title(cut(f"{task_name} ({task['metric']})", 50), fontsize=9.5)
            for row in task["rows"]:
                _draw_choice(above, below, row, look[row["choice"]])
            below.set_xlabel("N")
            for axes in (above, below):
                axes.set_xscale("log", base=2)
                axes.set_xticks(numbers, [str(n) for n in numbers])
                axes.minorticks_off()
                axes.grid(axis="y")
                axes.set_axisbelow(True)
            if at == 0:
                above.set_ylabel("score of the chosen")
                below.set_ylabel("its reward (SD)")
        _title(figure, "Best of N")
        _legend(figure, choices, look, markers=True)
    return Plot(name, "Best of N", _best_of_text(record), figure)


def _draw_choice(above: Any, below: Any, row: Mapping[str, Any], look: Look) -> None:
    """One way of choosing: its scores, the interval of the last one's difference to a random sample, and its rewards."""
    known = [cell for cell in row["cells"] if cell["score"]["estimate"] is not None]
    line = {"color": look.colour, "linestyle": look.dash, "marker": look.marker, "markersize": 4, "linewidth": 1.6}
    above.plot([cell["n"] for cell in known], [cell["score"]["estimate"] for cell in known], **line)
    if known and known[-1]["difference"] is not None and row["is_reward"]:
        last = known[-1]
        base = last["score"]["estimate"] - last["difference"]["estimate"]
        ends = [base + last["difference"][end] for end in ("low", "high") if last["difference"][end] is not None]
        above.plot([last["n"]] * len(ends), ends, color=look.colour, linewidth=1.0)
    rewards, spread = row.get("reward", ()), row.get("spread")
    if rewards and spread:
        mean = row["mean_reward"]
        below.plot([each["n"] for each in rewards], [(each["mean"] - mean) / spread for each in rewards], **line)


def _best_of_text(record: Mapping[str, Any]) -> str:
    said = []
    for name, task in record["tasks"].items():
        for row in task["rows"]:
            last = row["cells"][-1]
            if last["score"]["estimate"] is not None:
                said.append(f"{one_line(name)}, {one_line(row['choice'])}, N = {last['n']}: {last['score']['estimate']:.3g}")
    bars = "a bar at the largest N is the 95 % interval of the difference to any sample"
    return f"Expected score of the first-ranked of N samples; {bars}. {'; '.join(said)}."


def radar(
    series: Mapping[str, Mapping[str, float | None]],
    title: str = "Mean rating by category",
    name: str = "radar",
    methods: Sequence[str] | None = None,
) -> Plot:
    """A closed line for each method over the categories. The centre is 0, the outer ring the highest rating; a category without
    a rating leaves a gap.

    Args:
        series: method → category → mean rating; the first method's categories are the axes, and the others' are added.
        methods: all of the comparison, which decides colours; the series' own by default.
    """
    categories = list(dict.fromkeys(category for means in series.values() for category in means))
    top = 0.85 + _legend_height(list(series), WIDTH)
    count, height = len(categories), top + 3.5
    angles = [2 * math.pi * at / count for at in range(count)]
    with _style({}), _quiet():
        figure, look = _figure(height), looks(methods or list(series))
        axes = figure.add_axes((1.1 / WIDTH, 0.45 / height, 1 - 2.2 / WIDTH, 3.05 / height), projection="polar")
        _radar_axes(axes, angles, categories)
        for method, means in series.items():
            ratings = [_rating(means.get(category)) for category in categories]
            if ratings:
                axes.plot([*angles, 2 * math.pi], [*ratings, ratings[0]], color=look[method].colour, linestyle=look[method].dash,
                          marker=look[method].marker, markersize=4, linewidth=1.6, clip_on=False)  # fmt: skip
        _title(figure, title)
        _legend(figure, list(series), look, markers=True)
    return Plot(name, one_line(title), _radar_text(series), figure)


def _radar_axes(axes: Any, angles: Sequence[float], categories: Sequence[str]) -> None:
    """The first category at the top, the others clockwise; names outside of the ring."""
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_rlim(0, HIGHEST_RATING)
    axes.set_rticks([2, 4, 6, 8, 10])
    axes.set_rlabel_position(180 / max(1, len(angles)))
    axes.tick_params(axis="y", labelsize=7.5, labelcolor=MUTED)
    axes.set_xticks(angles, [""] * len(angles))
    for angle, category in zip(angles, categories, strict=True):
        side = math.sin(angle)
        axes.text(angle, 1.1 * HIGHEST_RATING, cut(category, 18), va="center",
                  ha="center" if abs(side) < 0.1 else "left" if side > 0 else "right")  # fmt: skip
    axes.spines["polar"].set_color(GRID)
    axes.grid(visible=True)


def _rating(value: float | None) -> float:
    return math.nan if value is None or math.isnan(value) else min(max(value, 0.0), HIGHEST_RATING)


def _radar_text(series: Mapping[str, Mapping[str, float | None]]) -> str:
    def means(table: Mapping[str, float | None]) -> str:
        known = {key: value for key, value in table.items() if value is not None and not math.isnan(value)}
        return ", ".join(f"{one_line(key)} {value:.1f}" for key, value in known.items()) or "no ratings"

    return "; ".join(f"{one_line(method)}: {means(table)}" for method, table in series.items()) + "."


def _figure(height: float, width: float = WIDTH) -> Any:
    figure = library("matplotlib.figure", "plots").Figure(figsize=(width, height))
    library("matplotlib.backends.backend_agg", "plots").FigureCanvasAgg(figure)
    return figure


def _short(name: str) -> str:
    """A method's name that a plot has room for: its beginning and its end, where variants differ."""
    name = one_line(name)
    return name if len(name) <= NAME else f"{name[: NAME - 11].rstrip()}…{name[-10:].lstrip()}"


def _title(figure: Any, title: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.08 / width, 1 - 0.2 / height, cut(title, 80), weight="bold", va="center")


def _legend_columns(names: Sequence[str], width: float) -> int:
    return max(1, int((width - 0.4) / (0.65 + CHARACTER * min(NAME, max(map(len, names), default=1)))))


def _legend_height(names: Sequence[str], width: float) -> float:
    """Inches of the rows that names take below a plot's title."""
    return 0.2 * math.ceil(len(names) / _legend_columns(names, width))


def _legend(figure: Any, names: Sequence[str], look: Mapping[str, Look], markers: bool = False) -> None:
    """Names beside their lines, below the title, where a narrow screen shows them too.

    They are set after the legend is made: it leaves out what begins with "_".
    """
    line2d, (width, height) = library("matplotlib.lines", "plots").Line2D, figure.get_size_inches()
    handles = [
        line2d([], [], color=look[name].colour, linestyle=look[name].dash, marker=look[name].marker if markers else "",
               markersize=4, linewidth=1.8)
        for name in names
    ]  # fmt: skip
    if not handles:
        return
    legend = figure.legend(handles, ["name"] * len(names), loc="upper left", bbox_to_anchor=(0.08 / width, 1 - 0.36 / height),
                           borderaxespad=0, borderpad=0, handlelength=1.9, fontsize=9, labelspacing=0.4, columnspacing=1.4,
                           ncols=_legend_columns(names, width))  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(_short(name))


@contextmanager
def _style(more: Mapping[str, Any]) -> Iterator[None]:
    matplotlib = library("matplotlib", "plots")
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, **more}):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """A sign that the font lacks is still text in the SVG; matplotlib's warning about it helps nobody."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _cleaned(svg: str, label: str, themed: bool) -> str:
    """matplotlib's SVG without what a page must not hold twice (ids, styles for everything) and with a text alternative."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, count=1, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^\"]*?sans-serif", lambda found: f"font: {found[1]}{FONT}", svg)
    head, rest = svg.split(">", 1)
    if themed:
        head = re.sub(r' (?:width|height)="[^"]*"', "", head)
        for colour, variable in VARIABLES.items():
            rest = rest.replace(colour, f"var(--plot-{variable})")
    alternative = html.escape(one_line(label))
    head += f' role="img" aria-label="{alternative}" style="stroke-linejoin: round; stroke-linecap: butt"'
    return re.sub("[\ufffe\uffff]", "", f"{head}>{rest}").strip() + "\n"  # no XML may hold these two
