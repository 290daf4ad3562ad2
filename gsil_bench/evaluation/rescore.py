"""Stored answers of a comparison, scored again under another protocol of their task. No model is asked.

An answer belongs to another protocol too if that protocol would have produced the same text: the same prompt, the same sampling,
and an end that follows from the text. What decides this of a whole cell is checked first (`differences`); what is a single
answer's, such as having been cut at the token limit, leaves that item unscored with the reason (`obstacle`).

Texts that spell an end token ("</s>", "<|im_end|>") are taken as the model's own end of its answer, under any protocol: what an
answer says after it is lost, and no protocol of this suite reads on.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gsil_bench.errors import UserError
from gsil_bench.evaluation import scoring
from gsil_bench.evaluation.stored import StoredAnswers, mean, read_results, read_stored_answers
from gsil_bench.records import CellResult, ItemAnswer, ItemScore, canonical, digest, write_atomically
from gsil_bench.tasks import TASKS, expand, load_task
from gsil_bench.tasks.task import AnswerProtocol, Item, ScoringResources, Split, Task, require_consent

END_MARKS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end|>")
NAMED = 3
"""Item ids and reasons that a message holds."""


@dataclass(frozen=True)
class Rescored:
    """One cell under another protocol, or why it cannot be."""

    cell: CellResult
    """As it was scored before."""
    task: Task
    """Whose protocol is the new one."""
    refusal: str = ""
    items: tuple[ItemScore, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    content: str = ""
    """Digest of the new task's items."""

    @property
    def old(self) -> float | None:
        """Mean score of the cell as it was."""
        return mean([item.score for item in self.cell.items])

    @property
    def new(self) -> float | None:
        """Mean score of the items that could be scored."""
        return mean([item.score for item in self.items])

    @property
    def unscored(self) -> int:
        """Items without a new score."""
        return sum(item.score is None for item in self.items)


def find_task(task: str | None, protocol: str | None, data_dir: Path | None = None) -> Task:
    """The task that has a protocol.

    Args:
        task: its name, with or without a protocol ("gsm8k", "gsm8k/lm-eval-v3", "module:ATTRIBUTE").
        protocol: "gsm8k/lm-eval-v1", or "lm-eval-v1" if the task is named; None: the task as it is named.
        data_dir: folder that may hold definitions for lm-eval.

    Raises:
        UserError: there is no such task or protocol, or the two do not belong together.
    """
    if protocol is None:
        if task is None:
            raise UserError("name a --task or a --protocol such as gsm8k/lm-eval-v3")
        return load_task(task, data_dir)
    if task is None or ":" in protocol:
        return load_task(protocol, data_dir)
    if task in TASKS or ":" in task:
        named = load_task(task, data_dir)
        if protocol in (named.name, named.protocol.name, named.protocol.name.rpartition("/")[2]):
            return named
    family, stated = task.partition("/")[0], protocol.partition("/")[0]
    if "/" in protocol and stated != family:
        raise UserError(f"--protocol {protocol}: a protocol of {stated}, not of {family}")
    return load_task(protocol if "/" in protocol else f"{family}/{protocol}", data_dir)


def load_asked(result: CellResult, data_dir: Path | None) -> Task:
    """The task that a cell was asked, by the name that was typed then: it may be a "module:ATTRIBUTE".

    Raises:
        UserError: there is no such task any more.
    """
    for typed in expand(list(result.provenance.get("configuration", {}).get("tasks", ()))):
        task = load_task(typed, data_dir)
        if task.name == result.task:
            return task
    return load_task(result.task, data_dir)


def asked_items(result: CellResult, stored: StoredAnswers, data_dir: Path | None) -> tuple[Item, ...]:
    """The items that a cell's answers belong to.

    Raises:
        UserError: the suite or the data has changed since.
    """
    from gsil_bench.inputs import TaskInput

    split, limit = asked_split(result)
    task = load_asked(result, data_dir)
    items = tuple(task.items(split, data_dir))[:limit]
    if TaskInput(task, items).content != stored.items:
        raise UserError(f"the items of {result.task} are not those that were asked: the suite or the data has changed since")
    return items


def asked_split(result: CellResult) -> tuple[Split, int | None]:
    """Which split a cell was asked, and how many of its items (None: all)."""
    configuration = result.provenance.get("configuration", {})
    return ("dev" if configuration.get("split") == "dev" else "test"), configuration.get("limit")


def rescore_run(
    run: Path, task: str | None, protocol: str | None, resources: ScoringResources, data_dir: Path | None
) -> list[Rescored]:
    """Score the answers of a comparison's cells again.

    Args:
        run: the comparison's folder.
        task: whose cells, by its full name or without its protocol; None: those of the protocol's task.
        protocol: as `find_task` takes it.
        resources: what scoring may use.
        data_dir: folder searched for data files first.

    Raises:
        UserError: there are no such cells, no such protocol, or no consent to run code.
        CanaryError: the new task's scorer cannot be trusted.
    """
    if protocol is None:
        raise UserError("rescore wants a --protocol, such as gsm8k/lm-eval-v1")
    named = find_task(task, protocol, data_dir) if task or "/" in protocol or ":" in protocol else None
    results = read_results(run, task or (named.name.partition("/")[0] if named else None))
    wanted = {name: named or _task_with(name, protocol, data_dir) for name in {result.task: 0 for result in results}}
    found = {new.name: new for new in wanted.values() if new is not None}
    if not found:
        raise UserError(f"--protocol {protocol}: no protocol of {', '.join(wanted)}, whose answers are in {run}")
    for target in found.values():
        require_consent(target, resources.allow_code_execution)
        if resources.judge is None:
            scoring.check_canaries(target, target.items(asked_split(results[0])[0], data_dir), resources)
    with tempfile.TemporaryDirectory() as folder:
        read = partial(read_stored_answers, run)
        cells = [(result, new) for result in results if (new := wanted[result.task]) is not None]
        return [rescore_cell(result, new, read, resources, data_dir, Path(folder)) for result, new in cells]


def _task_with(name: str, protocol: str, data_dir: Path | None) -> Task | None:
    """A task of the same kind with this protocol, if there is one."""
    try:
        return find_task(name, protocol, data_dir)
    except UserError:
        return None


def rescore_cell(
    result: CellResult,
    task: Task,
    read: Callable[[CellResult], StoredAnswers],
    resources: ScoringResources,
    data_dir: Path | None,
    folder: Path,
) -> Rescored:
    """Score one cell's answers as another task's protocol does.

    Args:
        result: the cell as it was scored.
        task: whose protocol is the new one.
        read: finds a cell's answers.
        resources: what scoring may use.
        data_dir: folder searched for data files first.
        folder: where scores.jsonl is written, with the details.
    """
    from gsil_bench.inputs import TaskInput

    try:
        stored = read(result)
        before = {item.id: item for item in asked_items(result, stored, data_dir)}
        items = [item for item in task.items(asked_split(result)[0], data_dir) if item.id in before]
        found = differences(stored.protocol, task.protocol, [(before[item.id], item) for item in items], len(before))
        if found:
            return Rescored(result, task, "; ".join(found))
        answers = [_as_asked(answer, stored.protocol, task.protocol) for answer in stored.answers]
        answers = [answer for answer in answers if answer.sample < task.protocol.samples]
        scores, counts = scoring.score_answers(task, items, answers, resources, folder)
    except UserError as error:
        return Rescored(result, task, str(error))
    return Rescored(result, task, "", tuple(scores), counts, TaskInput(task, tuple(items)).content)


def differences(asked: Mapping[str, Any], wanted: AnswerProtocol, items: Sequence[tuple[Item, Item]], count: int) -> list[str]:
    """Why no answer to one protocol can be one to another; empty if nothing stands in the way.

    Args:
        asked: the protocol of the answers, as it was recorded.
        wanted: the other one.
        items: each item as it was asked, and as the other protocol asks it.
        count: how many were asked.
    """
    found = [f"{count - len(items)} of the {count} items asked are none of {wanted.name}'s"] if len(items) < count else []
    if asked["form"] != wanted.form:
        found.append(f"other form: asked as {asked['form']}, {wanted.name} asks as {wanted.form}")
    other = sum(_prompt(one) != _prompt(two) for one, two in items) if asked["system"] == wanted.system else len(items)
    if other:
        shots = (asked["shots"], asked["shot_seed"]) != (wanted.shots, wanted.shot_seed)
        words = f" ({_shots(asked['shots'], asked['shot_seed'])} there, {_shots(wanted.shots, wanted.shot_seed)} here)"
        found.append(f"another prompt for {other} of {len(items)} items" + (words if shots else ""))
    return found + _sampling_differences(asked, wanted)


def _sampling_differences(asked: Mapping[str, Any], wanted: AnswerProtocol) -> list[str]:
    if asked["temperature"] != wanted.temperature:
        return [f"other sampling: temperature {asked['temperature']:g}, not {wanted.temperature:g}"]
    drawn = {key: (asked[key], getattr(wanted, key)) for key in ("top_p", "seed")} if wanted.temperature > 0 else {}
    found = [f"other sampling: {key} {was:g}, not {now:g}" for key, (was, now) in drawn.items() if was != now]
    if asked["samples"] < wanted.samples:
        found.append(f"{asked['samples']} answers to each item, {wanted.name} wants {wanted.samples}")
    return found


def _prompt(item: Item) -> tuple[object, ...]:
    """All of an item that the model sees."""
    return item.turns, item.history, item.opening, item.temperature, item.continuations


def _shots(count: int, seed: int | None) -> str:
    return f"{count} shots" + (f" with seed {seed}" if seed is not None else "")


def _as_asked(answer: ItemAnswer, asked: Mapping[str, Any], wanted: AnswerProtocol) -> ItemAnswer:
    """An answer as the other protocol would have it; with an error if that cannot be known."""
    from gsil_bench.evaluation.answers import cut

    error = answer.error or obstacle(answer, asked, wanted)
    return dataclasses.replace(answer, texts=tuple(cut(text, wanted.stops) for text in answer.texts), error=error)


def obstacle(answer: ItemAnswer, asked: Mapping[str, Any], wanted: AnswerProtocol) -> str:
    """Why one answer cannot be taken as one to another protocol, or "".

    Args:
        answer: cut at the stops of its own protocol.
        asked: that protocol, as it was recorded.
        wanted: the other one.
    """
    from gsil_bench.evaluation.answers import cut

    lost = [stop for stop in asked["stops"] if stop not in END_MARKS and not stop.startswith(wanted.stops)]
    for turn, (text, reason, tokens) in enumerate(zip(answer.texts, answer.finish_reasons, answer.tokens, strict=True), 1):
        ends = cut(text, wanted.stops) != text
        if tokens > wanted.max_new_tokens:
            return f"{tokens} tokens, {wanted.name} allows {wanted.max_new_tokens}"
        if ends and turn < len(answer.texts):
            return f"turn {turn + 1} was asked after an answer that {wanted.name} ends earlier"
        if not ends and reason == "length" and wanted.max_new_tokens > asked["max_new_tokens"]:
            return f"cut at {asked['max_new_tokens']} tokens, {wanted.name} allows {wanted.max_new_tokens}"
        if not ends and reason == "stop" and lost:
            return f"may have been cut at {' or '.join(map(repr, lost))}, where {wanted.name} reads on"
    return ""


def write_rescored(rescored: Rescored, out: Path) -> Path:
    """Write a cell's new result where a comparison would, below another folder; the file."""
    old, task = rescored.cell, rescored.task
    comparable = {**old.comparable, "protocol": task.protocol.name, "task": f"{task.name} {task.version}"}
    comparable["items"] = rescored.content
    result = dataclasses.replace(
        old,
        task=task.name,
        metric=task.metric,
        best=task.best,
        worst=task.worst,
        items=tuple(dataclasses.replace(item, details={}) for item in rescored.items),
        counts=dict(rescored.counts),
        comparable=comparable,
        provenance={**old.provenance, "rescored_from": {"task": old.task, "fingerprint": old.fingerprint}},
        fingerprint=digest([old.fingerprint, comparable, [dataclasses.asdict(item) for item in rescored.items]]),
    )
    path = out / "results" / task.name / f"{old.method}-seed{old.seed}.json"
    write_atomically(path, canonical(dataclasses.asdict(result)) + "\n")
    return path


def record(rescored: Rescored) -> dict[str, Any]:
    """A rescored cell as JSON."""
    cell, unscored = rescored.cell, [item for item in rescored.items if item.score is None]
    return {
        "method": cell.method,
        "seed": cell.seed,
        "task": cell.task,
        "protocol": rescored.task.protocol.name,
        "old": rescored.old,
        "new": rescored.new,
        "items": len(rescored.items),
        "unscored": rescored.unscored,
        "unscored_reasons": list(dict.fromkeys(item.reason for item in unscored))[:NAMED],
        "refusal": rescored.refusal or None,
    }
