"""Best of N as Markdown and as text for a terminal, from what best_of.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gsil_bench.reporting.comparison import OTHER_UNIT, UNITS, Unit
from gsil_bench.reporting.tables import escape_markdown
from gsil_bench.reporting.wording import one_line

NOTHING = "-"


def render_markdown(record: Mapping[str, Any]) -> str:
    """For each task a table of scores and one of rewards."""
    lines = ["# Best of N", "", *map(escape_markdown, _introduction(record))]
    for name, task in record["tasks"].items():
        for title, rows in ((_title(name, task), _scores(task, True)), ("Rewards", _rewards(task))):
            escaped = [[escape_markdown(cell) for cell in cells] for cells in rows]
            rule = [":---", *["---:"] * (len(rows[0]) - 1)]
            level = "##" if title != "Rewards" else "###"
            lines += ["", f"{level} {escape_markdown(title)}", ""]
            lines += [f"| {' | '.join(cells)} |" for cells in (escaped[0], rule, *escaped[1:])]
        lines += ["", *(f"- {escape_markdown(line)}" for line in _remarks(task))]
    return (
        "\n".join([*lines, *(["", *(f"- {escape_markdown(line)}" for line in _footer(record))] if _footer(record) else [])])
        + "\n"
    )


def render_text(record: Mapping[str, Any]) -> str:
    """The same; of the differences only that of the largest N."""
    lines = [*map(one_line, _introduction(record)), ""]
    for name, task in record["tasks"].items():
        for title, rows in ((_title(name, task), _scores(task, False)), ("Rewards", _rewards(task))):
            shown = [[one_line(cell) for cell in cells] for cells in rows]
            widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
            lines += [one_line(title), *("  ".join(map(str.ljust, row, widths)).rstrip() for row in shown), ""]
        lines += [*map(one_line, _remarks(task)), ""]
    return "\n".join([*lines, *map(one_line, _footer(record))]).rstrip() + "\n"


def _introduction(record: Mapping[str, Any]) -> list[str]:
    seeds, kl = record["seeds"], ", ".join(f"{value:.2f} (N = {n})" for n, value in record["kl"].items())
    return [
        f"{record['samples']} samples of each item at temperature 1 from the policy that the methods start from "
        f"({record['policy']}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}), split {record['split']}. A cell is "
        "the expected score of the first-ranked of N samples; a difference is to any sample of the same items, with "
        f"its 95 % interval. Nats that choosing goes from the policy at most: {kl}.",
    ]


def _title(name: str, task: Mapping[str, Any]) -> str:
    lower = "" if task["best"] > task["worst"] else ", lower is better"
    return f"{name} ({task['metric']}{_unit(task).of_score}{lower}), {task['items']} items"


def _unit(task: Mapping[str, Any]) -> Unit:
    return UNITS.get(task["metric"], OTHER_UNIT)


def _scores(task: Mapping[str, Any], every_difference: bool) -> list[list[str]]:
    """Head and rows: who chooses, a score for each N, and for the largest N the differences to what needs no reward."""
    unit, last = _unit(task), task["rows"][0]["cells"][-1]["n"]
    head = ["chosen by", *(f"N = {cell['n']}" for cell in task["rows"][0]["cells"])]
    rows = [[*head, *([] if every_difference else [f"N = {last} less any sample"]), f"N = {last} less any distinct sample"]]
    for row in task["rows"]:
        cells = [_score(cell["score"], unit) for cell in row["cells"]]
        differences = [_difference(cell["difference"], unit) for cell in row["cells"]]
        if every_difference:
            cells = [f"{score} ({change})" if change else score for score, change in zip(cells, differences, strict=True)]
        more = [] if every_difference else [differences[-1] or NOTHING]
        rows.append([row["choice"], *cells, *more, _difference(row["cells"][-1].get("over_distinct"), unit) or NOTHING])
    return rows


def _rewards(task: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows: mean reward of what is chosen for each N, and what the reward goes together with."""
    rows = [row for row in task["rows"] if "reward" in row]
    head = ["reward of the chosen", *(f"N = {cell['n']}" for cell in rows[0]["cells"]), "spread in an item"]
    table = [[*head, "Spearman with the score", "with the length"]]
    for row in rows:
        means = [f"{each['mean']:.3g}" for each in row["reward"]] or [NOTHING] * len(row["cells"])
        spread = NOTHING if row["spread"] is None else f"{row['spread']:.3g}"
        table.append([row["choice"], *means, spread, _correlation(row["spearman"]), _correlation(row["spearman_length"])])
    return table


def _score(found: Mapping[str, Any], unit: Unit) -> str:
    return NOTHING if found["estimate"] is None else f"{found['estimate'] * unit.factor:.{unit.decimals}f}"


def _difference(found: Mapping[str, Any] | None, unit: Unit) -> str:
    if found is None or found["estimate"] is None:
        return ""
    return f"{_signed(found['estimate'], unit)} [{_signed(found['low'], unit)}, {_signed(found['high'], unit)}]"


def _signed(value: float | None, unit: Unit) -> str:
    return "?" if value is None else f"{value * unit.factor:+.{unit.decimals}f}".replace("-", "−")


def _correlation(found: Mapping[str, Any]) -> str:
    if found["estimate"] is None:
        return NOTHING
    ends = ", ".join("?" if end is None else f"{end:+.2f}" for end in (found["low"], found["high"]))
    return f"{found['estimate']:+.2f} [{ends}]".replace("-", "−")


def _remarks(task: Mapping[str, Any]) -> list[str]:
    """What a reader should know of a task's samples, and which rewards were followed too far."""
    unit, lines = _unit(task), []
    if task["nothing_to_choose"] is not None:
        share = f"{task['nothing_to_choose']:.0%}"
        lines.append(f"{share} of the items have {task['samples']} samples of one and the same score: no reward matters there.")
        lines.append(f"{task['distinct']:.1f} of an item's {task['samples']} samples are distinct texts, in the mean.")
    if task["left_out"]:
        lines.append(f"{task['left_out']} items are left out: a sample of theirs is empty or has no score.")
    for row in task["rows"]:
        fall = row.get("fall")
        if fall is not None:
            change = _difference(fall, unit)
            lines.append(
                f"{row['choice']} is followed too far: from N = {fall['from']} to N = {fall['to']} the score changes by {change}."
            )
    return lines


def _footer(record: Mapping[str, Any]) -> Sequence[str]:
    failed = [f"{each['method']}, seed {each['seed']}, {each['task']}: {each['reason']}" for each in record["failures"]]
    return [*failed, *record["warnings"]]
