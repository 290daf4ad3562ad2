"""Answers from elsewhere: one JSON object a line, {"item": ID, "completion": TEXT}, scored as a task scores its own.

ID is the item's name in the published data: HumanEval's or MBPP's task_id, GSM8K's row number from 0, MT-Bench's
"question_id/turn". Of a task with several turns or continuations each has its line, "ID/1" first. Several lines of another item
are several samples of it. A line may hold a judge's "judgment" of its answer, which is replayed instead of asking a judge.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsil_bench.errors import UserError
from gsil_bench.evaluation.scoring import check_canaries
from gsil_bench.evaluation.stored import mean
from gsil_bench.tasks.task import Item, Score, ScoringResources, Task

NAMED = 60
"""Characters of an unknown item's name that a message holds."""
PASSES = (1, 2, 5, 10, 20, 50, 100)
"""Which pass@k are shown, as far as there are samples."""


@dataclass(frozen=True)
class Line:
    """One line of a file of answers."""

    number: int
    """In the file, from 1."""
    item: str
    completion: str
    judgment: str | None = None


@dataclass(frozen=True)
class LineScore:
    """The score of one line, or why there is none."""

    item: str
    score: float | None
    unscored_reason: str | None


@dataclass(frozen=True)
class _Answer:
    """All turns of one sample of an item; None where the file has no line."""

    item: Item
    lines: tuple[Line | None, ...]

    @property
    def texts(self) -> list[str]:
        """What the scorer is given. A missing last turn is left out, an earlier one is empty."""
        given = max(number for number, line in enumerate(self.lines, 1) if line is not None)
        return [line.completion if line else "" for line in self.lines[:given]]


class FileError(UserError):
    """A file of answers with lines that cannot be used; `problems` has one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def read_lines(path: Path) -> list[Line]:
    """The lines of a file of answers; empty ones are passed over.

    Raises:
        UserError: the file cannot be read.
        FileError: lines that are no answer.
    """
    try:
        texts = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--answers {path} cannot be read: {error}") from error
    lines: list[Line] = []
    problems: list[str] = []
    for number, text in enumerate(texts, 1):
        if text.strip():
            try:
                lines.append(_line(number, text))
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
    if problems:
        raise FileError(problems)
    if not lines:
        raise UserError(f'--answers {path} is empty: write one {{"item": ID, "completion": TEXT}} a line')
    return lines


def _line(number: int, text: str) -> Line:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError('not an object such as {"item": ID, "completion": TEXT}')
    item = row.get("item")
    if isinstance(item, bool) or not isinstance(item, (str, int)):
        raise ValueError('no "item" that is a text or a number' if "item" in row else 'no "item"')
    for key in ("completion", "judgment"):
        if (key in row or key == "completion") and not isinstance(row.get(key), str):
            raise ValueError(f'"{key}" is not a text' if key in row else f'no "{key}"')
    return Line(number, str(item), row["completion"], row.get("judgment"))


def score_lines(
    task: Task, items: Sequence[Item], lines: Sequence[Line], resources: ScoringResources, where: str
) -> tuple[list[LineScore], dict[str, Any]]:
    """Score lines as answers to a task's items, after cutting them at the stops of its protocol.

    Args:
        task: whose scorer and protocol.
        items: all of the split.
        lines: of the file.
        resources: what scoring may use; a judge where the lines hold no judgments.
        where: the file's name, for messages.

    Returns:
        One score per line, in order, and the aggregate.

    Raises:
        FileError: lines of items that the task does not have, or two for the same turn.
        CanaryError: the scorer cannot be trusted.
    """
    answers = _gather(items, lines, task.name, where)
    if resources.judge is None:  # judgments that are replayed say nothing of gold answers
        check_canaries(task, items, resources)
    scores = task.score([answer.item for answer in answers], [_cut(task, answer.texts) for answer in answers], resources)
    by_number = {
        line.number: _line_score(line, turn, answer, score)
        for answer, score in zip(answers, scores, strict=True)
        for turn, line in enumerate(answer.lines)
        if line is not None
    }
    return [by_number[line.number] for line in lines], _aggregate(task, items, answers, scores, by_number)


def judgments_of(lines: Sequence[Line]) -> dict[str, str]:
    """The judgments in a file, by the name of their line."""
    return {line.item: line.judgment for line in lines if line.judgment is not None}


def _gather(items: Sequence[Item], lines: Sequence[Line], task: str, where: str) -> list[_Answer]:
    """Lines put together to answers: the turns of one item, or one sample each."""
    known = {name: (item, turn) for item in items for name, turn in _names(item)}
    problems: list[str] = []
    turns: dict[str, dict[int, Line]] = defaultdict(dict)
    answers: list[_Answer] = []
    for line in lines:
        if line.item not in known:
            problems.append(
                f"{where}:{line.number}: {task} has no item {line.item[:NAMED]!r} (its items are named {_examples(items)})"
            )
            continue
        item, turn = known[line.item]
        if item.asked == 1:
            answers.append(_Answer(item, (line,)))
        elif turn in turns[item.id]:
            first = turns[item.id][turn].number
            problems.append(f"{where}:{line.number}: a second line of {line.item!r}, the first is line {first}")
        else:
            turns[item.id][turn] = line
    whole = [_Answer(item, tuple(turns[item.id].get(turn) for turn in range(item.asked))) for item in items if item.id in turns]
    partial = [answer for answer in whole if answer.item.continuations and None in answer.lines]
    problems += [f"{where}: not all of the {answer.item.asked} lines of {_names(answer.item)[0][0]}" for answer in partial]
    if problems:
        raise FileError(problems)
    return answers + whole


def _names(item: Item) -> list[tuple[str, int]]:
    """What a file may call an item's turns, and which turn that is. An id of our own is known too."""
    names = dict.fromkeys([item.published_id or item.id, item.id])
    if item.asked == 1:
        return [(name, 0) for name in names]
    return [(f"{name}/{turn + 1}", turn) for name in names for turn in range(item.asked)]


def _examples(items: Sequence[Item]) -> str:
    names = [_names(item)[0][0] for item in (items[0], items[-1])] if items else []
    return " … ".join(dict.fromkeys(names)) or "nothing"


def _cut(task: Task, texts: Sequence[str]) -> list[str]:
    from gsil_bench.evaluation.answers import cut

    return [cut(text, task.protocol.stops) for text in texts]


def _line_score(line: Line, turn: int, answer: _Answer, score: Score) -> LineScore:
    """Of a rated turn its own rating, of any other answer the score."""
    ratings = score.details.get("ratings")
    if not isinstance(ratings, list) or len(ratings) != answer.item.asked:
        return LineScore(line.item, score.value, None if score.value is not None else score.reason)
    reasons = score.details.get("unscored") or [score.reason] * len(ratings)
    return LineScore(line.item, ratings[turn], None if ratings[turn] is not None else reasons[turn])


def _aggregate(
    task: Task, items: Sequence[Item], answers: Sequence[_Answer], scores: Sequence[Score], lines: Mapping[int, LineScore]
) -> dict[str, Any]:
    """The mean over items of the mean over their samples; over judged turns where turns are rated, as FastChat has it.

    `lowest` and `highest` are what the mean would be if every unscored line were the worst or the best possible.

    Args:
        lines: the scores by the numbers of their lines.
    """
    flags = Counter[str]()
    for score in scores:
        flags.update({key: int(value) for key, value in score.details.items() if isinstance(value, bool)})
    asked, given = {answer.item.id for answer in answers}, [line.score for line in lines.values()]
    return {
        "task": task.name,
        "protocol": task.protocol.name,
        "metric": task.metric,
        "score": _mean(answers, lines, None),
        "lowest": _mean(answers, lines, task.worst),
        "highest": _mean(answers, lines, task.best),
        **(_passes(answers, lines) if task.metric == "pass@1" else {}),
        "lines": len(given),
        "items": len(asked),
        "scored": sum(score is not None for score in given),
        "unscored": sum(score is None for score in given),
        "missing_items": sum(item.id not in asked for item in items),
        "missing_turns": sum(line is None for answer in answers for line in answer.lines),
        "counts": dict(sorted(flags.items())),
    }


def _passes(answers: Sequence[_Answer], lines: Mapping[int, LineScore]) -> dict[str, float]:
    """pass@k, unbiased, for those k that every item in the file has enough scored samples of."""
    from gsil_bench.tasks.humaneval import mean_pass_at_k

    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for answer in answers:
        score = lines[answer.lines[0].number].score if answer.lines[0] else None
        counts[answer.item.id][0] += score is not None
        counts[answer.item.id][1] += score == 1.0
    fewest = min(samples for samples, _ in counts.values())
    pairs = [(samples, correct) for samples, correct in counts.values()]
    return {f"pass@{k}": mean_pass_at_k(pairs, k) for k in PASSES if k <= fewest}


def _mean(answers: Sequence[_Answer], lines: Mapping[int, LineScore], missing: float | None) -> float | None:
    """Mean score; unscored lines are left out, or count as `missing`. Turns weigh the same, and so do items whatever their
    samples.
    """
    groups: dict[tuple[str, int], list[float | None]] = defaultdict(list)
    for answer in answers:
        for turn, line in enumerate(answer.lines):
            if line is not None:
                score = lines[line.number].score
                groups[answer.item.id, turn].append(missing if score is None else score)
    return mean([mean(scores) for scores in groups.values()])


def as_json(lines: Sequence[LineScore], aggregate: Mapping[str, Any]) -> dict[str, Any]:
    """What `rescore --json` prints."""
    return {"items": [dataclasses.asdict(line) for line in lines], "aggregate": dict(aggregate)}
