"""What `rescore` and `wins` print, as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gsil_bench.evaluation.answer_files import LineScore
from gsil_bench.evaluation.rescore import Rescored
from gsil_bench.evaluation.wins import Side, Wins, shorten

REASONS = 5
"""Reasons of unscored lines or items that are named."""


def cells_text(cells: Sequence[Rescored]) -> str:
    """A line for each cell: old and new score, or why there is no new one; then the reasons of unscored items."""
    rows = [["method", "seed", "scored as", "was", "rescored as", "is", "items", "unscored"]]
    for cell in cells:
        old = cell.cell
        now = [_number(cell.new), str(len(cell.items)), str(cell.unscored)] if not cell.refusal else ["-", "-", "-"]
        was = [old.method, str(old.seed), str(old.comparable["protocol"]), _number(cell.old)]
        rows.append([*was, cell.task.protocol.name, *now])
    lines = [*_aligned(rows)]
    for cell in cells:
        where = f"{cell.cell.method} (seed {cell.cell.seed})"
        if cell.refusal:
            lines.append(f"{where}: cannot be scored as {cell.task.protocol.name}: {cell.refusal}")
        reasons = [item.reason for item in cell.items if item.score is None]
        lines += [f"{where}: {text}" for text in _reasons(reasons)]
    return "\n".join(lines)


def lines_text(lines: Sequence[LineScore], aggregate: Mapping[str, Any]) -> str:
    """The aggregate and counts of a file of answers."""
    rows = [
        [f"{aggregate['metric']} under {aggregate['protocol']}", _number(aggregate["score"])],
        ["lines", str(aggregate["lines"])],
        ["items", str(aggregate["items"])],
        ["unscored lines", str(aggregate["unscored"])],
        ["items of the task that are not in the file", str(aggregate["missing_items"])],
    ]
    if aggregate["unscored"]:
        bounds = f"{_number(aggregate['lowest'])} to {_number(aggregate['highest'])}"
        rows.insert(1, ["if unscored lines were worst or best", bounds])
    if aggregate["missing_turns"]:
        rows.append(["turns that are not in the file", str(aggregate["missing_turns"])])
    rows[1:1] = [[name, _number(value)] for name, value in aggregate.items() if name.startswith("pass@")]
    rows += [[f"answers with {name}", str(count)] for name, count in aggregate["counts"].items()]
    return "\n".join([*_aligned(rows), *_reasons([line.unscored_reason or "" for line in lines if line.score is None])])


def wins_text(wins: Wins, limit: int | None) -> str:
    """The items that each of two methods answered better, with both answers.

    Args:
        wins: what was found.
        limit: items shown of each method; None: all.
    """
    named = [f"{method} (seed {seed})" for method, seed in zip(wins.methods, wins.seeds, strict=True)]
    lines = [f"{wins.task}: {' against '.join(named)}; {wins.same} items with equal scores, {wins.unscored} unscored"]
    for method in wins.methods:
        found = wins.of(method)
        lines.append(f"\n{method} is better on {len(found)} items")
        for win in found[:limit]:
            group = f" ({win.group})" if win.group else ""
            lines += [f"  {win.item}{group}", *_side(win.better), *_side(win.worse)]
        left = len(found) - len(found[:limit])
        lines += [f"  … {left} more (--show {len(found)})"] if left else []
    return "\n".join(lines)


def wins_record(wins: Wins) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "task": wins.task,
        "methods": list(wins.methods),
        "seeds": list(wins.seeds),
        "same": wins.same,
        "unscored": wins.unscored,
        "wins": [
            {"item": win.item, "group": win.group, "better": vars(win.better), "worse": vars(win.worse)} for win in wins.wins
        ],
    }


def _side(side: Side) -> list[str]:
    answers = [f"      {answer or '(empty)'}" for answer in side.answers[:1]]
    more = len(side.answers) - len(answers)
    answers += [f"      and {more} more samples"] if more > 0 else []
    return [f"    {side.method}: {side.score:g}, {side.reason}", *answers]


def _reasons(reasons: Sequence[str]) -> list[str]:
    """The most frequent reasons, with their counts."""
    counted = Counter(shorten(reason) for reason in reasons)
    lines = [f"{count} unscored: {reason}" for reason, count in counted.most_common(REASONS)]
    return lines + ([f"… and {len(counted) - REASONS} other reasons"] if len(counted) > REASONS else [])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
