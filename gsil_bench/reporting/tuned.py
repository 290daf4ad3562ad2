"""Trials of a tuning as Markdown and as text for a terminal, from what tuning.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gsil_bench.reporting.tables import escape_markdown
from gsil_bench.reporting.wording import one_line

HEAD = ("trial", "settings", "dev score", "95 % interval", "difference to the chosen", "")


def tuning_markdown(record: Mapping[str, Any]) -> str:
    """A table for each method, the chosen trial in bold."""
    lines = ["# Tuning", "", *_introduction(record)]
    for name, tuned in record["methods"].items():
        lines += ["", f"## {escape_markdown(name)}", "", _row(HEAD), _row([":---", "---", *["---:"] * 3, "---"])]
        chosen = (tuned["chosen"] or {}).get("trial")
        for trial in tuned["trials"]:
            cells = [escape_markdown(cell) for cell in _cells(trial, chosen)]
            lines.append(_row([f"**{cell}**" if cell and trial["trial"] == chosen else cell for cell in cells]))
        lines += ["", *(f"Warning: {escape_markdown(warning)}." for warning in tuned["warnings"])]
    return "\n".join(lines).rstrip() + "\n"


def tuning_text(record: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    lines = _introduction(record)
    for name, tuned in record["methods"].items():
        chosen = (tuned["chosen"] or {}).get("trial")
        rows = [HEAD, *(tuple(one_line(cell) for cell in _cells(trial, chosen)) for trial in tuned["trials"])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += ["", one_line(name), *(f"  {line}" for line in table)]
        lines += [f"  warning: {one_line(warning)}" for warning in tuned["warnings"]]
    return "\n".join(lines)


def _introduction(record: Mapping[str, Any]) -> list[str]:
    tasks = ", ".join(f"{one_line(name)} ({facts['items']} items)" for name, facts in record["tasks"].items())
    seeds = f"seed{'s' * (len(record['seeds']) > 1)} {', '.join(map(str, record['seeds']))}"
    return [
        f"{record['trials']} trials of each method, {seeds}, split {record['split']}: {tasks}.",
        f"Objective: {record['objective']}. The best of several trials is flattered by the choice: report another split.",
        *(f"Note: {note}." for note in record["notes"]),
    ]


def _cells(trial: Mapping[str, Any], chosen: int | None) -> list[str]:
    settings = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in trial["settings"].items()
    )
    score, difference = trial["score"], trial["difference_to_chosen"]
    remark = "chosen" if trial["trial"] == chosen else ""
    unscored = f"{trial['unscored']} unscored" if trial["unscored"] else ""
    remarks = "; ".join(filter(None, [remark, f"failed: {trial['failure']}" if trial["failure"] else "", unscored]))
    return [
        str(trial["trial"]),
        settings,
        "-" if score is None else f"{score['estimate']:.4f}",
        "" if score is None else _ends(score),
        "" if difference is None else f"{difference['estimate']:+.4f} {_ends(difference)}",
        remarks,
    ]


def _ends(interval: Mapping[str, Any]) -> str:
    low, high = ("?" if interval[key] is None else f"{interval[key]:.4f}" for key in ("low", "high"))
    return f"[{low}, {high}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
