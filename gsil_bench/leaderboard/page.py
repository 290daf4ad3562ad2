"""The leaderboard as one page that opens from disk: leaderboards/index.html, with style and script inside and nothing to fetch.

All rows are in the HTML; the script only searches, sorts and filters them. Every text is escaped, links lead to http(s) only, and
the page's own policy lets no other script or style run and nothing be loaded. Same entries, same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from gsil_bench.leaderboard import words
from gsil_bench.leaderboard.board import Board, order
from gsil_bench.leaderboard.entries import Entry
from gsil_bench.reporting.comparison import Cell, Column
from gsil_bench.reporting.wording import (
    across_table,
    difference_text,
    heading,
    letter_texts,
    one_line,
    outcome_text,
    remarks,
    score_texts,
)

SYMBOLS = {"better": "▲", "worse": "▼", "equivalent": "≈", "not resolved": "○", "control": "◆", "refused": "✕"}
"""Beside the words, so that neither colour nor shape is needed alone."""
KINDS = {"better": "better", "worse": "worse", "equivalent": "equivalent", "not resolved": "unresolved"}
"""Classes of the style sheet."""
SHORT_NAME = 24
"""Characters of a name that is never broken at its hyphens."""
WIDTH, HEIGHT, MARGIN = 160, 20, 6
"""Of the drawing of an interval, in its own units."""


@dataclass(frozen=True)
class Head:
    """A column of the table."""

    key: str
    label: str
    first: str
    """Direction of the first sort."""


def render_page(boards: Sequence[Board]) -> str:
    """The whole page."""
    cards = _cards(boards)
    numbers = {name: number for number, name in enumerate(cards, 1)}
    body = "\n".join(_section(board, numbers) for board in boards)
    style, script = _asset("page.css"), _asset("page.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>Leaderboard of gsil_bench</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#results">Skip to the results</a>
<header>
<h1>Leaderboard of gsil_bench</h1>
<p>{_text(words.ABOUT)}</p>
<p>{_text(words.NO_AVERAGE)}</p>
<details><summary>How to read a table</summary>{_pairs(words.HOW_TO_READ)}</details>
</header>
{_tools(boards)}
<main id="results">
<p id="nothing"{" hidden" if boards else ""}>{"No row fits." if boards else "No results yet."}</p>
{body}
{_methods(cards)}
</main>
<footer>
<p>Generated from the files below <code>results/</code> by <code>gsil-bench leaderboard build</code>.
<a href="README.md">The same as Markdown</a> · <a href="schema.json">schema of a result</a></p>
</footer>
<script>{script}</script>
</body>
</html>
"""


@cache
def _asset(name: str) -> str:
    return files("gsil_bench.leaderboard").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(text: object) -> str:
    """Escaped, without characters that move a cursor or turn the direction of what follows."""
    return html.escape(one_line(str(text)))


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(label)}</dt><dd>{_text(text)}</dd>' for label, text in pairs)}</dl>"


def _link(url: str, text: str) -> str:
    """A link if it leads to the web, else the text alone."""
    if not re.fullmatch(r"https?://[^\s<>\"']+", url):
        return _text(text)
    return f'<a href="{html.escape(url)}" rel="noopener noreferrer nofollow">{_text(text)}</a>'


def _linked(text: str) -> str:
    """A text in which web addresses are links."""
    parts = re.split(r"(https?://[^\s<>\"'),;]+)", one_line(text))
    return "".join(_link(part, part) if number % 2 else html.escape(part) for number, part in enumerate(parts))


def _tools(boards: Sequence[Board]) -> str:
    """Search, filters and the order of all tables; shown by the script, without which they would do nothing."""
    models = sorted({str(board.first.data["model"]["name"]) for board in boards})
    tasks = sorted({heading for board in boards for heading in board.tasks})
    protocols = sorted(
        {str(entry.data["protocol"]) for board in boards for entry in board.tasks.values() if entry.data["protocol"]}
    )
    methods = order(entry for board in boards for entry in board.entries)
    choices = "".join(
        _select(name, label, [("", "all"), *((value, value) for value in values)])
        for name, label, values in (
            ("model", "Model", models), ("task", "Task", tasks),
            ("protocol", "Protocol", protocols), ("method", "Method", methods),
        )
    )  # fmt: skip
    heads = [head for head in HEADS if head.key in SORTS]
    sorting = _select("sort", "Sort by", [(head.key, SORTS[head.key]) for head in heads])
    return f"""<form class="tools" role="search" aria-label="Search, filter and sort" hidden>
<label class="search">Search <input type="search" name="search" autocomplete="off" spellcheck="false" aria-keyshortcuts="/"
 placeholder="method, formula, task (press /)"></label>
{choices}{sorting}
<button type="reset">Reset</button>
<output aria-live="polite"></output>
</form>"""


def _select(name: str, label: str, options: Iterable[tuple[str, str]]) -> str:
    chosen = "".join(f'<option value="{_text(value)}">{_text(text)}</option>' for value, text in options)
    return f'<label>{_text(label)} <select name="{name}">{chosen}</select></label>'


HEADS = (
    Head("score", "Score", "descending"),
    Head("method", "Method", "ascending"),
    Head("letters", "Letters", "ascending"),
    Head("difference", "Difference", "descending"),
    Head("verdict", "Verdict", "ascending"),
    Head("seeds", "Seeds", "descending"),
    Head("tuned", "Tuned", "descending"),
    Head("cost", "Cost of a seed", "ascending"),
)
SORTS = {"score": "score, best first", "method": "method", "difference": "difference to the control", "cost": "cost"}
"""Heads that all tables can be sorted by at once, and what that is called."""
COLUMNS = ("method", "score", "letters", "difference", "verdict", "seeds", "tuned", "cost")


def _section(board: Board, numbers: Mapping[str, int]) -> str:
    data = board.first.data
    demonstrations = f"{data['demonstrations']['trained_on']:,} demonstrations"
    budget = (board.first.budget or {}).get("budget") or "no training"
    tasks = "\n".join(_task(board, column, numbers) for column in board.comparison.columns)
    return f"""<section class="board" data-model="{_text(data["model"]["name"])}" id="board-{board.key}">
<h2>{_text(data["model"]["name"])} <small>{_text(demonstrations)} · {_text(budget)}</small></h2>
<details><summary>What all rows share</summary>{_pairs(board.facts)}</details>
{tasks}
{_across(board)}
<details><summary>What the numbers mean here, and what was not measured</summary>{_pairs(words.notes(board))}</details>
</section>"""


def _across(board: Board) -> str:
    """The summary over tasks, behind a click: the tables come first."""
    table = across_table(board.comparison)
    if not table:
        return ""
    labels = table[0][1:]
    head = "".join(f'<th scope="col">{_text(text)}</th>' for text in ["method", *labels])
    rows = "".join(f'<tr><th scope="row">{_text(row[0])}</th>{_plain_cells(labels, row[1:])}</tr>' for row in table[1:])
    return (
        f'<details class="across"><summary>Summary {_text(table[0][0])}</summary>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _plain_cells(labels: Sequence[str], texts: Sequence[str]) -> str:
    pairs = zip(labels, texts, strict=True)
    return "".join(f'<td data-label="{_text(label)}">{_text(text)}</td>' for label, text in pairs)


def _task(board: Board, column: Column, numbers: Mapping[str, int]) -> str:
    entry = board.tasks[column.task]
    protocol = entry.data["protocol"] or ""
    meta = _text(heading(column)) + (f" · protocol <code>{_text(protocol)}</code>" if protocol else "")
    if entry.data["limit"] is not None:
        meta += f' · <span class="warn">only the first {entry.data["limit"]} items</span>'
    heads = {head.key: head for head in HEADS}
    best_first = "descending" if column.higher_is_better else "ascending"
    named = {"difference": f"Difference to {one_line(board.comparison.control)}"}
    columns = "".join(
        f'<th scope="col" data-key="{key}" data-first="{best_first if key in ("score", "difference") else heads[key].first}">'
        f'<button type="button">{_text(named.get(key, heads[key].label))}</button></th>'
        for key in _keys(column)
    )
    methods = [cell.method for cell in column.cells]
    texts = dict(zip(methods, zip(score_texts(column), letter_texts(column), strict=True), strict=True))
    scale = _scale(column)
    rows = "\n".join(
        _row(board, column, cell, texts[cell.method], scale, numbers[cell.method], rank)
        for rank, cell in enumerate(board.ranked(column), 1)
    )
    return f"""<section class="task" data-task="{_text(column.task)}" data-protocol="{_text(protocol)}">
<h3>{_text(column.task)}</h3>
<p class="meta">{meta}</p>
<table>
<caption class="unseen">{_text(column.task)}: methods by score, best first</caption>
<thead><tr>{columns}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</section>"""


def _row(
    board: Board, column: Column, cell: Cell, texts: tuple[str, str], scale: tuple[float, float], number: int, rank: int
) -> str:
    entry = board.entry(cell)
    assert entry is not None and cell.score is not None
    against, tuning = cell.against, entry.data["tuning"]
    difference = against.difference.estimate if against.difference is not None else math.nan
    kind = {"better": "better", "worse": "worse", "equivalent": "equivalent", "not resolved": "unresolved"}.get(
        against.outcome, ""
    )
    badges = _badge("best", "not significantly worse than the best of this table") if cell.among_best else ""
    badges += _badge("no training", "the model as given") if not cell.trained else ""
    badges += _badge("from outside", "a method that is not in this repository") if entry.data["method"]["source"] else ""
    extra = "".join(f'<div class="soft">{_text(line)}</div>' for line in remarks(cell, column))
    drawing = _drawing(cell, column, scale, _control_score(column), kind)
    mark = f'<span class="verdict {kind}">{SYMBOLS.get(against.outcome, "")} {_text(outcome_text(against))}</span>'
    score, letters = texts
    cells: dict[str, tuple[float | str, str, str]] = {
        "letters": (letters, _text(letters), ""),
        "score": (cell.score.estimate, f'<div class="score">{_nowrap(score)}{drawing}</div>{extra}', "wide"),
        "difference": (difference, _nowrap(difference_text(against.difference, column.unit)), ""),
        "verdict": (against.outcome, mark, ""),
        "seeds": (len(cell.seeds), str(len(cell.seeds)) if cell.trained else "", ""),
        "tuned": (tuning["trials"] if tuning else math.nan, _text(words.tuning_text(tuning)) if cell.trained else "", ""),
        "cost": (_seconds(cell), _text(words.cost_text(cell)) if cell.trained else "", ""),
    }  # fmt: skip
    rest = "".join(_cell(key, *cells[key], column, board.comparison.control) for key in _keys(column)[1:])
    best = ' class="best"' if cell.among_best else ""
    kept = ' class="nowrap"' if len(cell.method) <= SHORT_NAME else ""
    name = f'<a href="#method-{number}"{kept}>{_text(cell.method)}</a>{badges}'
    return (
        f'<tr{best} data-rank="{rank}" data-method="{_text(cell.method)}" data-text="{_search_text(board, column, entry)}">'
        f'<th scope="row" data-sort="{_text(cell.method)}">{name}</th>{rest}</tr>'
    )


def _keys(column: Column) -> list[str]:
    """Heads of a table: letters only where there are enough methods for them."""
    return [key for key in COLUMNS if key != "letters" or column.letters_shown]


def _cell(key: str, value: float | str, content: str, kind: str, column: Column, control: str) -> str:
    """A cell with what it sorts by and the label that it has where there is no room for a head."""
    label = next(head.label for head in HEADS if head.key == key)
    label = f"Difference to {one_line(control)}" if key == "difference" else label
    sort = value if isinstance(value, str) else _number(value)
    if not re.sub(r"<[^>]*>", "", content).strip():
        content = ""
    named = f' class="{kind}"' if kind else ""
    return f'<td data-label="{_text(label)}" data-sort="{_text(sort)}"{named}>{content}</td>'


def _number(value: float) -> str:
    """For sorting; "" without a value. Nine digits: sums differ in their last bits between machines."""
    return "" if math.isnan(value) else f"{value:.9g}" if math.isfinite(value) else ("1e999" if value > 0 else "-1e999")


def _nowrap(text: str) -> str:
    return f'<span class="nowrap">{_text(text)}</span>'


def _badge(text: str, title: str) -> str:
    return f'<span class="badge" title="{_text(title)}">{_text(text)}</span>'


def _seconds(cell: Cell) -> float:
    seconds = cell.cost.get("seconds", math.nan)
    return seconds / max(1, len(cell.seeds)) if cell.trained else 0.0


def _search_text(board: Board, column: Column, entry: Entry) -> str:
    """What the search looks in, in small letters."""
    record = entry.data["method"]["record"]
    parts = [
        entry.method,
        record["summary"],
        record["formula"],
        record.get("paper", ""),
        column.task,
        entry.data["protocol"] or "",
    ]
    return _text(" ".join(map(str, [*parts, column.metric, board.first.data["model"]["name"]])).lower())


def _control_score(column: Column) -> float:
    found = (cell.score.estimate for cell in column.cells if cell.method == column.control and cell.score is not None)
    return next(found, math.nan)


def _scale(column: Column) -> tuple[float, float]:
    """Ends of all drawings of a table: the widest interval's."""
    ends = [end for cell in column.cells if cell.score is not None for end in (cell.score.low, cell.score.high)]
    finite = [end for end in ends if math.isfinite(end)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _drawing(cell: Cell, column: Column, scale: tuple[float, float], control: float, kind: str) -> str:
    """Interval and mean on the table's scale, and where the control lies. The numbers beside it say the same."""
    assert cell.score is not None

    def place(value: float) -> str:
        inside = min(max(value, scale[0]), scale[1])
        return f"{MARGIN + (WIDTH - 2 * MARGIN) * (inside - scale[0]) / (scale[1] - scale[0]):.1f}"

    middle = HEIGHT / 2
    reference = "" if math.isnan(control) else _line("reference", place(control), place(control), 0, HEIGHT)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="{kind}" aria-hidden="true" focusable="false">'
        f"{_line('axis', '0', str(WIDTH), middle, middle)}{reference}"
        f"{_line('range', place(cell.score.low), place(cell.score.high), middle, middle)}"
        f'<circle class="dot" cx="{place(cell.score.estimate)}" cy="{middle:g}" r="3"/></svg>'
    )


def _line(kind: str, x1: str, x2: str, y1: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{y1:g}" y2="{y2:g}"/>'


def _cards(boards: Iterable[Board]) -> dict[str, list[Entry]]:
    """Method → its entries, in the order of the registry."""
    found: dict[str, list[Entry]] = {}
    for board in boards:
        for entry in board.entries:
            found.setdefault(entry.method, []).append(entry)
    return {name: found[name] for name in order(entry for entries in found.values() for entry in entries)}


def _methods(cards: Mapping[str, Sequence[Entry]]) -> str:
    if not cards:
        return ""
    content = "\n".join(_card(number, name, entries) for number, (name, entries) in enumerate(cards.items(), 1))
    return f'<section id="methods"><h2>Methods</h2>\n<div class="cards">\n{content}\n</div></section>'


def _card(number: int, name: str, entries: Sequence[Entry]) -> str:
    entry, record = entries[0], entries[0].data["method"]["record"]
    rows = "".join(f"<dt>{_text(label)}</dt><dd>{content}</dd>" for label, content in _card_rows(entry, entries) if content)
    text = " ".join(map(str, [name, record["summary"], record["formula"], record.get("paper", "")])).lower()
    badge = _badge("from outside", "a method that is not in this repository") if entry.data["method"]["source"] else ""
    return (
        f'<article class="card" id="method-{number}" data-method="{_text(name)}" data-text="{_text(text)}">'
        f"<h3>{_text(name)}{badge}</h3><p>{_text(record['summary'])}</p><dl>{rows}</dl></article>"
    )


def _card_rows(entry: Entry, entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """What is known of a method, as (label, HTML)."""
    method, record = entry.data["method"], entry.data["method"]["record"]
    base = words.variant_of(entry)
    yield "Variant of", _text(base)
    yield "Loss", f"<code>{_text(record['formula'])}</code>" if record["formula"] else ""
    yield "Needs", _text(", ".join(record["needs"]))
    yield "Settings", _text(words.pairs_text(record["settings"]))
    yield "Self-play", _text(words.pairs_text(record["protocol"])) if "generated" in record["needs"] else ""
    yield "Training", _text(words.pairs_text(record["training"]))
    for tuning in [each.data["tuning"] for each in entries if each.data["tuning"]][:1]:
        yield "Tuned", f"{_text(words.tuning_text(tuning))}: {_text(words.search_space_text(tuning))}"
    yield "Paper", _linked(record.get("paper", ""))
    yield "Code", _link(method["source"], method["source"]) if method["source"] else ""
    for link in dict.fromkeys(each.data["link"] for each in entries if each.data["link"]):
        yield "Submitted with", _link(link, link)
    warnings = dict.fromkeys(line for each in entries for line in each.data["warnings"])
    yield "Warnings", "<br>".join(_text(line) for line in warnings)
