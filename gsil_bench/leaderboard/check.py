"""Whether a leaderboard may be believed: each file against the schema and against itself, all files against each other, and the
pages against the files.

What this cannot see: a run that never took place. Scores, digests and pages follow from the items, the items only from running
the command that the entry describes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gsil_bench.errors import UnavailableError, UserError, unknown_name
from gsil_bench.leaderboard.board import boards_of
from gsil_bench.leaderboard.build import generated
from gsil_bench.leaderboard.entries import RESULTS, Entry, item_id
from gsil_bench.methods import baseline_methods, load_method
from gsil_bench.records import canonical
from gsil_bench.reporting.comparison import ZERO_OR_ONE
from gsil_bench.tasks import TASKS, load_task
from gsil_bench.tasks.task import Task

DEFINES = ("loss", "needs", "batches", "normalise")
"""Fields of a record that its registered method decides; settings, training and protocol may be set by a user."""
EMBEDDED = "gsil_bench.tasks.mini"
"""Module of the tasks that bring their items along."""
WORDS_OF_RECORD = frozenset({"summary", "formula", "paper"})
"""Fields of a record that change no weight."""


def check_entries(entries: Sequence[Entry]) -> list[str]:
    """Unknown methods, items that are not the task's, doubles, and seeds of one row that were made differently."""
    alone = [line for entry in entries for line in (*check_method(entry), *check_task(entry))]
    return [*alone, *_doubles(entries), *_other_items(entries), *_uneven(entries), *_gaps(entries)]


def check_method(entry: Entry) -> Iterator[str]:
    """A method must be one of this repository, with its loss, or bring a link to its code."""
    method = entry.data["method"]
    record, base = method["record"], str(method["record"].get("method", entry.method))
    known = baseline_methods()
    if base not in known:
        if method["source"] is None:
            error = unknown_name("method", base, known)
            yield f"{entry.path}: method.name: {error}. A method from outside needs a link to its code: --source {base}=https://…"
        elif not (record["summary"] and (record["formula"] or record["loss"] is None)):
            yield f"{entry.path}: method.record: a method from outside needs a summary and a formula"
        return
    if method["source"] is not None:
        yield f"{entry.path}: method.source: {base} is in this repository; leave the link out or give the method another name"
    if entry.method in known and entry.method != base:
        yield f"{entry.path}: method.name: {entry.method} is the name of another method of this repository"
    registered = load_method(base).describe()
    for field in DEFINES:
        if field in record and record[field] != registered[field]:
            said, true = canonical(record[field]), canonical(registered[field])
            yield f"{entry.path}: method.record.{field}: says {said}, {base} of this repository has {true}"


def unchecked_tasks(entries: Iterable[Entry]) -> list[str]:
    """A line for each task whose scale and metric cannot be checked here, because a library is missing."""
    found = []
    for task in sorted({entry.task for entry in entries} & set(TASKS)):
        try:
            load_task(task)
        except UnavailableError as error:
            found.append(f"{task}: its scale and metric are not checked here: {error}")
    return found


def check_task(entry: Entry) -> Iterator[str]:
    """Scale, metric and scores must be those that the task gives; of the embedded tasks the items too, which need no data."""
    if entry.task not in TASKS:
        return
    try:
        task = load_task(entry.task)
    except UnavailableError:  # `unchecked_tasks` says so
        return
    for field in ("metric", "best", "worst"):
        if entry.data[field] != getattr(task, field):
            yield f"{entry.path}: {field}: says {canonical(entry.data[field])}, the task has {canonical(getattr(task, field))}"
    items = entry.data["items"]
    if task.metric in ZERO_OR_ONE and task.protocol.samples == 1:
        graded = next((score for score in items["scores"] if score not in (None, 0, 1)), None)
        if graded is not None:
            yield f"{entry.path}: items.scores: {graded}, but {task.metric} gives one answer 0 or 1"
    if type(task).__module__ == EMBEDDED:
        ids, content = _embedded_items(entry.task, entry.data["limit"])
        if (items["ids"], entry.data["comparable"]["items"]) != (ids, content):
            yield f"{entry.path}: items.ids: not the {len(ids)} items that the task asks"


@cache
def _embedded_items(name: str, limit: int | None) -> tuple[list[str], str]:
    """The ids and the digest of an embedded task's items."""
    from gsil_bench.inputs import TaskInput

    task: Task = load_task(name)
    items = tuple(task.items("test", None))[:limit]
    return [item_id(item.id) for item in items], TaskInput(task, items).content


def _other_items(entries: Iterable[Entry]) -> Iterator[str]:
    """Cells that claim the same items of a task, and have others or another scale: leaving out wrong answers would go unseen."""
    first: dict[str, Entry] = {}
    for entry in entries:
        base = first.setdefault(canonical([entry.task, entry.data["comparable"]["items"]]), entry)
        for field in ("metric", "best", "worst", "limit"):
            if entry.data[field] != base.data[field]:
                mine, theirs = canonical(entry.data[field]), canonical(base.data[field])
                yield f"{entry.path}: {field}: {mine} against {theirs} of {base.path}, on the same items"
        if set(entry.data["items"]["ids"]) != set(base.data["items"]["ids"]):
            yield f"{entry.path}: items.ids: not the items of {base.path}, though both name the same digest of the task's items"


def _doubles(entries: Iterable[Entry]) -> Iterator[str]:
    """The same cell under two names. Two files for one name would lie in one place, so the path is checked instead."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        first = seen.setdefault(entry.data["fingerprint"], entry)
        if first is not entry:
            yield f"{entry.path}: fingerprint: the same cell as {first.path}"


def _uneven(entries: Iterable[Entry]) -> Iterator[str]:
    """Rows whose seeds are not runs of one method, and tasks whose runs are not."""
    first: dict[str, Entry] = {}
    for entry in entries:
        base = first.setdefault(canonical([entry.setting, entry.method]), entry)
        if base is entry:
            continue
        mine, theirs = _decides(entry), _decides(base)
        lines = [
            f"{key} {canonical(mine.get(key))} against {canonical(theirs.get(key))}"
            for key in sorted({*mine, *theirs})
            if mine.get(key) != theirs.get(key)
        ]
        if lines:
            yield f"{entry.path}: made otherwise than {base.path}: {'; '.join(lines[:3])}; give the variant another name"


def _decides(entry: Entry) -> dict[str, Any]:
    """What all cells of a row must share, flat: its record, where its code is, its tuning."""
    method: Mapping[str, Any] = entry.data["method"]
    record = {key: value for key, value in method["record"].items() if key not in WORDS_OF_RECORD}
    return dict(_flat("", {"record": record, "source": method["source"], "tuning": entry.data["tuning"]}))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, item in value.items():
        yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)


def _gaps(entries: Iterable[Entry]) -> Iterator[str]:
    """Seeds that some tasks of a row have and others lack: leaving out a bad run would go unseen."""
    rows: dict[str, dict[str, set[int]]] = {}
    for entry in entries:
        row = rows.setdefault(f"{entry.path.split('/')[1]}: {entry.method}", {})
        row.setdefault(entry.task, set()).add(entry.seed)
    for name, tasks in rows.items():
        seeds = set.union(*tasks.values())
        for task, there in tasks.items():
            if seeds - there:
                missing = ", ".join(map(str, sorted(seeds - there)))
                yield f"{RESULTS}/{name}: no result for seed {missing} on {task}, which other tasks have"


def stale(folder: Path, entries: Sequence[Entry]) -> Iterator[str]:
    """Generated files that are not what the entries give."""
    for name, text in generated(boards_of(entries)).items():
        try:
            there = (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            yield f"{name}: missing; run gsil-bench leaderboard build {folder}"
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / name}: {error}") from error
        if there != text:
            yield f"{name}: not what the results give; run gsil-bench leaderboard build {folder}"
