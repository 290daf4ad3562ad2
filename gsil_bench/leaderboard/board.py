"""Tables of comparable cells only: entries that share model, demonstrations, template, precision, engine and budget.

A board is one such group. Its columns are tasks, each in one frame (protocol, version, items, judge, metric); a task that was
asked in two ways is two columns. The model as given has no budget and stands on every board of its setting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gsil_bench.leaderboard.entries import Entry
from gsil_bench.methods import baseline_methods
from gsil_bench.records import canonical, digest
from gsil_bench.reporting.comparison import Cell, Column, Comparison

MATCHED = "matched-demonstrations"
"""`batches` of the control that is given a pairwise method's tokens."""


DIGITS = 12
"""Decimals that scores are ranked by: sums differ in their last bits between machines."""


@dataclass(frozen=True)
class Board:
    """Entries that may be ranked against each other, and what the statistics say of them."""

    entries: tuple[Entry, ...]
    """Of all its tasks, by path."""
    tasks: Mapping[str, Entry]
    """Heading of each column → one of its entries, in the tables' order."""
    comparison: Comparison

    @property
    def first(self) -> Entry:
        """One that was trained, if any was: it tells the budget."""
        return next((entry for entry in self.entries if entry.trained), self.entries[0])

    @cached_property
    def key(self) -> str:
        """Eight digits that stand for the setting and the budget."""
        return digest([self.first.setting, self.first.budget])[:8]

    @cached_property
    def facts(self) -> list[tuple[str, str]]:
        """What all rows share, for a reader."""
        data, setting, budget = self.first.data, self.first.setting, self.first.budget or {}
        demonstrations = data["demonstrations"]
        facts = [
            ("Model", f"{data['model']['name']} ({_parameters(data)}weights {data['model']['weights_sha256'][:12]})"),
            (
                "Demonstrations",
                f"{demonstrations['trained_on']} trained on, {demonstrations['held_out']} held out, from "
                f"{demonstrations['source']} ({demonstrations['sha256'][:12]})",
            ),
            ("Budget", budget.get("budget") or "no training"),
            ("Left out", "" if budget.get("left_out") in (None, "", "none") else str(budget["left_out"])),
            ("Chat template", str(data["chat_sha256"])[:12]),
            ("Precision", str(setting.get("precision", ""))),
            ("Engine", str(setting.get("engine", ""))),
            ("Made with", _made_with(self.entries)),
            ("Hardware", _hardware(self.entries)),
        ]
        return [(label, text) for label, text in facts if text]

    def entry(self, cell: Cell) -> Entry | None:
        """Of a row's first seed."""
        frame = canonical(self.tasks[cell.task].frame)
        found = (each for each in self.entries if each.method == cell.method and canonical(each.frame) == frame)
        return min(found, key=lambda each: each.seed, default=None)

    def ranked(self, column: Column) -> list[Cell]:
        """The cells that have a score, best first; equal scores in the order of the methods."""
        scored = [cell for cell in column.cells if cell.score is not None and cell.n_items]
        sign = -1 if column.higher_is_better else 1
        return sorted(scored, key=lambda cell: sign * round(cell.score.estimate, DIGITS) if cell.score else 0.0)


def boards_of(entries: Sequence[Entry]) -> list[Board]:
    """All boards, those with the most entries first."""
    groups: dict[str, list[Entry]] = {}
    for entry in (entry for entry in entries if entry.trained):
        groups.setdefault(canonical([entry.setting, entry.budget]), []).append(entry)
    given = [entry for entry in entries if not entry.trained]
    for entry in given:
        same = [found for found in groups.values() if found[0].trained and found[0].setting == entry.setting]
        for group in same or [groups.setdefault(canonical([entry.setting, None]), [])]:
            group.append(entry)
    boards = [_board(sorted(group, key=lambda entry: entry.path)) for group in groups.values()]
    return sorted(boards, key=lambda board: (-len(board.entries), board.first.data["model"]["name"], board.key))


def _board(entries: Sequence[Entry]) -> Board:
    tasks = _columns(entries)
    headings = {canonical(entry.frame): heading for heading, entry in tasks.items()}
    methods = order(entries)
    results = [dataclasses.replace(entry.result(), task=headings[canonical(entry.frame)]) for entry in entries]
    comparison = Comparison.of(results, methods=methods, tasks=list(tasks), control=_control(entries, methods))
    return Board(tuple(entries), tasks, comparison)


def _columns(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Heading → an entry, in the order of the tasks' names; a task in two frames has two headings."""
    frames: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        frames.setdefault(entry.task, {}).setdefault(canonical(entry.frame), entry)
    found = [(task, len(same), entry) for task, same in frames.items() for _, entry in sorted(same.items())]
    found.sort(key=lambda each: (each[2].data["worst"] is None, each[0]))  # losses last
    return {task if count == 1 else f"{task} ({digest(entry.frame)[:6]})": entry for task, count, entry in found}


def order(entries: Iterable[Entry]) -> list[str]:
    """Methods in the order of the registry, then the others by name."""
    names, known = {entry.method for entry in entries}, list(baseline_methods())
    return [name for name in known if name in names] + sorted(names - set(known))


def _control(entries: Sequence[Entry], methods: Sequence[str]) -> str:
    """As a comparison chooses it: the method matched to the pairwise methods' tokens, else the first that trains."""
    records = {entry.method: entry for entry in entries}
    matched = [name for name in methods if records[name].data["method"]["record"].get("batches") == MATCHED]
    trained = [name for name in methods if records[name].trained]
    return [*matched, *trained, *methods][0]


def _parameters(data: Mapping[str, Any]) -> str:
    count = data["model"]["parameters"]
    return f"{count:,} parameters, " if count else ""


def _made_with(entries: Iterable[Entry]) -> str:
    """Versions and commits of the suite, each once."""
    found = {
        f"gsil_bench {origin['suite_version']}"
        + (f" at {origin['commit'][:7]}" if origin["commit"] else "")
        + (" with uncommitted changes" if origin["dirty"] else "")
        for origin in (entry.data["provenance"] for entry in entries)
    }
    return "; ".join(sorted(found))


def _hardware(entries: Iterable[Entry]) -> str:
    """Machines, each kind once."""
    found = set()
    for hardware in (entry.data["provenance"]["hardware"] for entry in entries):
        gpus = hardware.get("gpus") or []
        found.add(", ".join(map(str, gpus)) or f"{hardware.get('cores', '?')} cores of {hardware.get('machine', 'unknown')}")
    return "; ".join(sorted(found))
