"""What a run's folder keeps, collected for its page: the comparison, training curves, costs, every item's answers, provenance.

Everything is read from files, so a page can be made again at any time and is the same each time. What is not there any more
(answers of a store that was cleaned, prompts of a data set that has moved) is said in its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gsil_bench.errors import UserError
from gsil_bench.evaluation.stored import StoredAnswers, read_stored_answers
from gsil_bench.records import CellFailure, CellResult, read_jsonl, result_from_json
from gsil_bench.reporting.comparison import Comparison
from gsil_bench.store import MANIFEST
from gsil_bench.tasks.task import Item
from gsil_bench.variants import ROUND

METRICS = "metrics.jsonl"
"""Of a training artefact: one JSON object of numbers a step."""
COSTS = ("seconds", "steps", "tokens", "scored_tokens", "flops")
MIN_GROUPS = 3
"""Categories that a radar needs."""


@dataclass(frozen=True)
class Curve:
    """One training run, all its rounds in a row."""

    method: str
    seed: int
    rows: tuple[Mapping[str, float], ...]
    """Numbers of each step; "step" goes on counting through the rounds."""
    round_starts: tuple[int, ...]
    """Indices of `rows` at which a round other than the first begins."""
    ends: tuple[float, ...] = ()
    """Steps done after each round, those of a method that it starts from first."""


@dataclass(frozen=True)
class ShownCell:
    """One method's answers to the items of a task, in the items' order."""

    method: str
    seed: int
    scores: tuple[float | None, ...]
    reasons: tuple[str, ...]
    answers: tuple[tuple[tuple[str, ...], ...], ...]
    """Per item and sample the text of each turn; () for an item without an answer."""
    why: str = ""
    """Why there are no answers."""


@dataclass(frozen=True)
class ShownTask:
    """The items of a task with all methods' answers, of the lowest seed that each method has."""

    name: str
    metric: str
    best: float
    """Score of a right answer."""
    higher_is_better: bool
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    prompts: tuple[tuple[tuple[str, str], ...], ...]
    """Per item (who, text) pairs; empty where the items cannot be had."""
    golds: tuple[tuple[str, ...], ...]
    """A right answer of each item, where the task has one; one text per turn."""
    cells: tuple[ShownCell, ...]
    why: str = ""
    """Why there are no prompts."""


@dataclass(frozen=True)
class RunData:
    """All that a page shows."""

    comparison: Comparison
    results: tuple[CellResult, ...]
    failures: tuple[CellFailure, ...]
    curves: tuple[Curve, ...]
    tasks: tuple[ShownTask, ...]
    configuration: str
    """Of the run, as YAML; "" if it has none (results of another harness)."""
    remarks: tuple[str, ...] = field(default=())
    """What could not be read."""

    @cached_property
    def costs(self) -> dict[str, dict[str, float]]:
        """Method → measure → amount, summed over seeds; of methods that were trained."""
        found: dict[str, dict[str, float]] = {}
        runs = {(result.method, result.seed): result.cost for result in self.results}
        for (method, _), cost in runs.items():
            for measure in COSTS:
                if cost.get(measure):
                    row = found.setdefault(method, {})
                    row[measure] = row.get(measure, 0.0) + cost[measure]
        return {method: found[method] for method in self.comparison.methods if method in found}

    @cached_property
    def warnings(self) -> dict[str, list[str]]:
        """Warning → the runs that it holds for."""
        found: dict[str, list[str]] = {}
        for result in self.results:
            for warning in result.warnings:
                found.setdefault(warning, []).append(f"{result.method}, seed {result.seed}")
        return {warning: list(dict.fromkeys(runs)) for warning, runs in found.items()}

    def ratings(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Task → method → category → mean score over items and seeds, of rated tasks with at least three categories."""
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for result in self.results:
            groups = list(dict.fromkeys(item.group for item in result.items if item.group))
            if result.metric == "rating" and len(groups) >= MIN_GROUPS and result.task not in found:
                same = [other for other in self.results if other.task == result.task]
                methods = [method for method in self.comparison.methods if any(other.method == method for other in same)]
                found[result.task] = {
                    method: {group: _group_mean([other for other in same if other.method == method], group) for group in groups}
                    for method in methods
                }
        return found


def _group_mean(results: Sequence[CellResult], group: str) -> float | None:
    scores = [item.score for result in results for item in result.items if item.group == group and item.score is not None]
    return sum(scores) / len(scores) if scores else None


def collect(run: Path) -> RunData:
    """Read a run's folder.

    Args:
        run: what was given as --out.

    Raises:
        UserError: it holds no comparison, or one of another version.
    """
    table = _read_table(run)
    results = tuple(_results(run, table))
    failures = tuple(CellFailure(**each) for each in table["failures"])
    comparison = Comparison.of(
        results,
        failures,
        methods=table["methods"],
        tasks=table["tasks"],
        control=table["control"],
        notes=table["notes"],
    )
    remarks: list[str] = []
    curves = tuple(_curves(run, results, remarks))
    tasks = tuple(_task(run, name, results, table["methods"]) for name in _asked(results, table["tasks"]))
    return RunData(comparison, results, failures, curves, tasks, _configuration(run), tuple(remarks))


def _read_table(run: Path) -> dict[str, Any]:
    path = run / "table.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("methods", "tasks", "control", "notes", "cells", "failures") if key not in table]
    except FileNotFoundError as error:
        raise UserError(f"{run}: no table.json; name the --out folder of a finished comparison") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the comparison again") from error
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)}: another version wrote it; run the comparison again")
    return dict(table)


def _results(run: Path, table: Mapping[str, Any]) -> Iterator[CellResult]:
    """Results of the table's cells, in its order. Others that lie in the folder are of other comparisons."""
    wanted = [(cell["task"], cell["method"], int(seed)) for cell in table["cells"] for seed in str(cell["seeds"] or "").split()]
    found = {}
    for path in sorted((run / "results").rglob("*.json")):
        result = _read_result(path)
        found[result.task, result.method, result.seed] = result
    for key in wanted:
        if key not in found:
            raise UserError(f"{run}: table.json has {key[1]}, seed {key[2]}, on {key[0]}, but results/ has not; run it again")
        yield found[key]


def _read_result(path: Path) -> CellResult:
    try:
        return result_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a result that this version reads ({error}); run its comparison again") from error


def _configuration(run: Path) -> str:
    path = run / "config.yaml"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _curves(run: Path, results: Sequence[CellResult], remarks: list[str]) -> Iterator[Curve]:
    """The metrics of every training run. A row that shows a run before its end has none of
    its own where the whole run has a row: they are the beginning of that one's.
    """
    folders = _training_folders(run)
    runs = {(result.method, result.seed): result for result in results}
    longer = {
        (method_of(result), result.seed, rounds[:done])
        for result in runs.values()
        for rounds in (weights_of(result),)
        for done in range(len(rounds))
    }
    for (method, seed), result in runs.items():
        rounds = weights_of(result)
        if (method_of(result), seed, rounds) in longer:
            continue
        found = [folders.get(str(each.get("stage")), folders.get(str(each["weights_sha256"]))) for each in _rounds_of(result)]
        there = [folder for folder in found if folder is not None]
        if len(there) < len(found):
            remarks.append(f"no training curves of {method}, seed {seed}: its training is no longer in the store")
        elif found:
            yield _curve(method, seed, [list(read_jsonl(folder / METRICS)) for folder in there])


def _curve(method: str, seed: int, rounds: Sequence[Sequence[Mapping[str, float]]]) -> Curve:
    rows, starts, ends = list[Mapping[str, float]](), list[int](), list[float]()
    for lines in rounds:
        before = rows[-1]["step"] if rows else 0
        if rows and lines:
            starts.append(len(rows))
        rows += [{**line, "step": line["step"] + before} for line in lines]
        ends.append(rows[-1]["step"] if rows else 0)
    return Curve(method, seed, tuple(rows), tuple(starts), tuple(ends))


def weights_of(result: CellResult) -> tuple[str, ...]:
    """Digests of the weights after each round, those of a method that it starts from first; () of an untrained model."""
    return tuple(str(each["weights_sha256"]) for each in _rounds_of(result))


def _rounds_of(result: CellResult) -> Sequence[Mapping[str, Any]]:
    rounds: Sequence[Mapping[str, Any]] = result.provenance.get("rounds", ())
    return rounds


def method_of(result: CellResult) -> str:
    """The method whose row it is, also of a row that shows it before its last round."""
    return ROUND.sub("", result.method) if result.record.get("after_round") else result.method


def _training_folders(run: Path) -> dict[str, Path]:
    """Name of the training's folder → folder; also by the digest of the weights that it made, for results that do not name it.

    Two trainings may make the same weights, where one of them had nothing to learn from.
    """
    found: dict[str, Path] = {}
    for manifest in sorted((run / "store" / "training").glob(f"*/{MANIFEST}")):
        if (manifest.parent / METRICS).exists():
            found[manifest.parent.name] = manifest.parent
            found.setdefault(str(json.loads(manifest.read_text(encoding="utf-8"))["content"]), manifest.parent)
    return found


def _asked(results: Sequence[CellResult], tasks: Sequence[str]) -> list[str]:
    """Tasks that are answered in text, in the table's order; the held-out loss has no answers."""
    asked = {result.task for result in results if "protocol" in result.comparable}
    return [task for task in tasks if task in asked]


def _task(run: Path, name: str, results: Sequence[CellResult], methods: Sequence[str]) -> ShownTask:
    """One task's items with the answers of each method's lowest seed."""
    chosen: dict[str, CellResult] = {}
    for result in sorted((each for each in results if each.task == name), key=lambda each: each.seed):
        chosen.setdefault(result.method, result)
    ordered = [chosen[method] for method in methods if method in chosen]
    base, (items, why) = ordered[0], _items(run, ordered)
    ids = tuple(item.id for item in base.items)
    return ShownTask(
        name,
        base.metric,
        base.best,
        base.worst is not None and base.best > base.worst,
        ids,
        tuple(item.group for item in base.items),
        tuple(_prompt(items[key]) if key in items else () for key in ids),
        tuple(items[key].gold if key in items else () for key in ids),
        tuple(_cell(run, result, ids) for result in ordered),
        why,
    )


def _items(run: Path, results: Sequence[CellResult]) -> tuple[dict[str, Item], str]:
    """The items that were asked, by id, or why they cannot be had."""
    from gsil_bench.evaluation.rescore import asked_items

    why = "no results"
    for result in results:
        data_dir = result.provenance.get("configuration", {}).get("data_dir")
        try:
            stored = read_stored_answers(run, result)
            return {item.id: item for item in asked_items(result, stored, Path(data_dir) if data_dir else None)}, ""
        except (UserError, OSError) as error:
            why = str(error)
    return {}, why


def _prompt(item: Item) -> tuple[tuple[str, str], ...]:
    """What was asked: shots, the turns and how the answer was begun; of a multiple choice, its contexts and choices."""
    shots = [(who, text) for pair in item.history for who, text in zip(("shot: question", "shot: answer"), pair, strict=True)]
    turns = [("user" if len(item.turns) == 1 else f"turn {number + 1}", text) for number, text in enumerate(item.turns)]
    opening = [("the answer begins", item.opening)] if item.opening else []
    contexts = [("context", context) for context in dict.fromkeys(given.context for given in item.continuations)]
    choices = [(f"choice {number + 1}", given.text) for number, given in enumerate(item.continuations)]
    return (*shots, *turns, *opening, *contexts, *choices)


def _cell(run: Path, result: CellResult, ids: Sequence[str]) -> ShownCell:
    """A result's scores and answers in the order of `ids`; an item that it was not asked is unscored."""
    scored = {item.id: item for item in result.items}
    answers: dict[str, list[tuple[str, ...]]] = {}
    why, stored = "", None
    try:
        stored = read_stored_answers(run, result)
    except (UserError, OSError) as error:
        why = str(error)
    for answer in _in_order(stored):
        answers.setdefault(answer[0], []).append(answer[1])
    return ShownCell(
        result.method,
        result.seed,
        tuple(scored[key].score if key in scored else None for key in ids),
        tuple(scored[key].reason if key in scored else "not asked" for key in ids),
        tuple(tuple(answers.get(key, ())) for key in ids),
        why,
    )


def _in_order(stored: StoredAnswers | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(item, turns) of every answer, samples in order; an error stands in the place of the text."""
    for answer in sorted(stored.answers if stored else (), key=lambda each: (each.id, each.sample)):
        yield answer.id, (f"[error: {answer.error}]",) if answer.error else answer.texts
