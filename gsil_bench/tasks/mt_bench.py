"""MT-Bench as FastChat's llm_judge runs it in its mode "single": 80 questions of two turns, each turn rated by a judge.

Questions, the judge's prompts and the reference answers are read from FastChat's pinned files. What is kept of FastChat: the
temperature of a question follows from its category; mathematics, reasoning and coding are judged beside a reference answer;
the second turn is judged with the whole conversation; the rating is the first [[x]], else the first [x], of whatever size.

What is not: the model is asked in its own chat template, not in one that its name suggests; a failed generation is no answer to
be judged; and a judgment without a rating leaves its turn unscored, in the open: FastChat drops it from the mean without a word.

Thirteen of the thirty reference answers are known to be wrong in a turn. Scores with corrected ones are another protocol
("…-corrected"), whose file the user gives. A judge is part of a score: only those of one judge may be compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gsil_bench.data.sources import (
    DATA_VARIABLE,
    MT_BENCH_JUDGE_PROMPTS,
    MT_BENCH_QUESTIONS,
    MT_BENCH_REFERENCES,
    locate,
)
from gsil_bench.errors import UserError, unknown_name
from gsil_bench.records import file_sha256
from gsil_bench.tasks.judge import Judge, JudgeRequest, NoReply, Reply, parse_fastchat_rating
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources, Split

References = Literal["original", "corrected"]

TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Category → temperature of the answers, in the order of the questions."""
WITH_REFERENCE = ("reasoning", "math", "coding")
"""Categories that are judged beside a reference answer."""
LOWEST, HIGHEST = 1.0, 10.0
"""Of the scale that a judge is asked to use."""
CORRECTED_PATH = "mt_bench/reference_answer/corrected.jsonl"
"""Below a data folder: the user's own file."""
NO_JUDGE = "needs a judge: add --judge endpoint --judge-set url=http://host:8000/v1 --judge-set model=NAME"


@dataclass(frozen=True)
class TurnRating:
    """What the judgments of one turn came to."""

    ratings: tuple[float | None, ...]
    """One per repeat; None where none could be read."""
    judgments: tuple[str | None, ...]
    """The judge's texts; None where it gave none."""
    reason: str = ""
    """Why the turn is unscored, if it is."""

    @property
    def rating(self) -> float | None:
        """Mean of the repeats that could be read."""
        read = [rating for rating in self.ratings if rating is not None]
        return sum(read) / len(read) if read else None

    def imputed(self, rating: float) -> float:
        """The turn's rating if each repeat without one had been given this one."""
        filled = [rating if found is None else found for found in self.ratings]
        return sum(filled) / len(filled) if filled else rating


@dataclass(frozen=True)
class MtBench:
    """MT-Bench with one set of reference answers."""

    name: str
    protocol: AnswerProtocol
    references: References = "original"
    version: str = "1"
    summary: str = "80 questions of two turns in eight categories, each turn rated 1 to 10 by a judge"
    metric: str = "rating"
    best: float = HIGHEST
    worst: float = LOWEST
    runs_code: bool = False
    needs_judge: bool = True
    """Its scores are those of `ScoringResources.judge`."""

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        """The questions in the order of the published file; each knows the prompts of its judge."""
        if split == "train":
            return ()
        if split != "test":
            raise unknown_name(f"split of {self.name}", split, ("test",))
        prompts = {row["name"]: row for row in _rows(locate(MT_BENCH_JUDGE_PROMPTS, data_dir))}
        answers, sha256 = self._reference_answers(data_dir)
        questions = _rows(locate(MT_BENCH_QUESTIONS, data_dir))
        return [self._item(row, prompts, answers, sha256) for row in questions]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """The mean rating of each question's turns, from one call of the judge for all of them.

        A question with an unscored turn is unscored; its details hold the other turn's rating, and what its score would be if
        every missing rating were the lowest or the highest. An answer that is missing leaves its turn unscored.

        Raises:
            UserError: there is no judge, or it gave no judgment at all.
        """
        judge: Judge | None = resources.judge
        if judge is None:
            raise UserError(f"{self.name} {NO_JUDGE}")
        asked = [judge_requests(item, texts, judge.repeats) for item, texts in zip(items, answers, strict=True)]
        requests = [request for turns in asked for turn in turns for request in turn]
        replies = list(judge.replies(requests)) if requests else []
        if requests and all(isinstance(reply, NoReply) for reply in replies):
            first = next(reply.reason for reply in replies if isinstance(reply, NoReply))
            raise UserError(f"{self.name}: the judge ({judge.identity}) gave none of {len(requests)} judgments: {first}")
        given = iter(replies)
        rated = [[rate([next(given) for _ in turn]) for turn in turns] for turns in asked]
        return [self._score(*each, judge.identity) for each in zip(items, answers, rated, strict=True)]

    def _score(self, item: Item, texts: Sequence[str], turns: Sequence[TurnRating], judge: str) -> Score:
        details = {
            "ratings": [turn.rating for turn in turns],
            "repeats": [list(turn.ratings) for turn in turns],
            "judgments": [list(turn.judgments) for turn in turns],
            "unscored": [turn.reason for turn in turns],
            "bounds": [sum(turn.imputed(end) for turn in turns) / len(turns) for end in (LOWEST, HIGHEST)],
            "lengths": [len(text) for text in texts],
            "prompts": [prompt["name"] for prompt in item.reference["judge"]],
            "references": item.reference["references"],
            "judge": judge,
            "empty": any(not text.strip() for text in texts),
            "unparsed": any(_is_unparsed(turn) for turn in turns),
            "no_judgment": any(None in turn.judgments for turn in turns),
            "out_of_range": any(_is_out_of_range(turn) for turn in turns),
        }
        ratings = [turn.rating for turn in turns if turn.rating is not None]
        if len(ratings) < len(turns):
            reasons = [f"turn {number}: {turn.reason}" for number, turn in enumerate(turns, 1) if turn.reason]
            return Score(None, "; ".join(reasons), details)
        words = "; ".join(f"turn {number}: {rating:g}" for number, rating in enumerate(ratings, 1))
        return Score(sum(ratings) / len(ratings), words, details)

    def _reference_answers(self, data_dir: Path | None) -> tuple[dict[int, tuple[str, ...]], str]:
        """Question → the reference answers of its turns, and the sha256 of their file."""
        original = locate(MT_BENCH_REFERENCES, data_dir)
        path = original if self.references == "original" else _corrected(self.name, data_dir)
        answers = dict(_reference_rows(path))
        sha256 = file_sha256(path)
        if self.references == "corrected":
            _check_corrected(path, answers, dict(_reference_rows(original)))
        return answers, sha256

    def _item(
        self, row: Mapping[str, Any], prompts: Mapping[str, Any], answers: Mapping[int, tuple[str, ...]], sha256: str
    ) -> Item:
        category, name = row["category"], str(row["question_id"])
        references = list(answers[row["question_id"]]) if category in WITH_REFERENCE else []
        names = ("single-math-v1", "single-math-v1-multi-turn") if references else ("single-v1", "single-v1-multi-turn")
        judge = [{"name": key, "system": prompts[key]["system_prompt"], "user": prompts[key]["prompt_template"]} for key in names]
        reference = {"judge": judge, "answers": references, "references": self.references, "references_sha256": sha256}
        return Item(
            id=name,
            published_id=name,
            turns=tuple(row["turns"]),
            temperature=TEMPERATURES[category],
            group=category,
            reference=reference,
        )


def judge_requests(item: Item, answers: Sequence[str], repeats: int = 1) -> list[list[JudgeRequest]]:
    """What the judge is asked of one question, in the words of FastChat's prompts: for each turn `repeats` requests.

    The first turn's prompts say {question} and {answer}, the second turn's {question_1}, {answer_1}, {question_2}, {answer_2};
    reference answers are {ref_answer_1} and {ref_answer_2}. Of a turn without an answer nothing is asked.
    """
    numbered = {
        **{f"question_{number}": text for number, text in enumerate(item.turns, 1)},
        **{f"answer_{number}": text for number, text in enumerate(answers, 1)},
        **{f"ref_answer_{number}": text for number, text in enumerate(item.reference["answers"], 1)},
    }
    turns: list[list[JudgeRequest]] = [[] for _ in item.turns]
    for turn, answer in enumerate(answers[: len(turns)]):
        template = item.reference["judge"][turn]
        request = JudgeRequest(
            questions=item.turns[: turn + 1],
            answers=tuple(answers[: turn + 1]),
            reference=item.reference["answers"][turn] if item.reference["answers"] else "",
            name=f"{item.id}/{turn + 1}",
            system=template["system"],
            prompt=template["user"].format(question=item.turns[turn], answer=answer, **numbered),
        )
        turns[turn] = [replace(request, repeat=repeat) for repeat in range(repeats)]
    return turns


def rate(replies: Sequence[Reply]) -> TurnRating:
    """The judgments of one turn, all of its repeats."""
    texts = tuple(None if isinstance(reply, NoReply) else reply for reply in replies)
    ratings = tuple(None if text is None else parse_fastchat_rating(text) for text in texts)
    if not replies:
        return TurnRating((), (), "no answer to judge")
    if any(rating is not None for rating in ratings):
        return TurnRating(ratings, texts)
    failure = next((reply.reason for reply in replies if isinstance(reply, NoReply)), "no rating in the judgment")
    return TurnRating(ratings, texts, failure)


def score_judgments(judgments: Mapping[str, str]) -> dict[str, Score]:
    """The rating in each of some judgments that were given elsewhere, by question and turn; nothing is asked.

    Args:
        judgments: "question_id/turn" → the judge's text, as `read_fastchat_judgments` reads them.
    """
    return {name: _turn_score(rate([text])) for name, text in judgments.items()}


def _turn_score(turn: TurnRating) -> Score:
    details = {"ratings": [turn.rating], "unparsed": _is_unparsed(turn), "out_of_range": _is_out_of_range(turn)}
    return Score(turn.rating, turn.reason or f"rating {turn.rating:g}", details)


def _is_unparsed(turn: TurnRating) -> bool:
    """Whether a judgment is there without a rating."""
    return any(text is not None and rating is None for text, rating in zip(turn.judgments, turn.ratings, strict=True))


def _is_out_of_range(turn: TurnRating) -> bool:
    return any(rating is not None and not LOWEST <= rating <= HIGHEST for rating in turn.ratings)


# FastChat's files


@dataclass(frozen=True)
class FastChatJudgment:
    """A line of FastChat's judgment file, mode "single"."""

    question_id: int
    turn: int
    """1 or 2."""
    model: str
    """Whose answer was judged."""
    judge: tuple[str, ...]
    """The judge's model and the name of its prompt."""
    judgment: str
    score: float | None
    """As published: None for FastChat's −1, "no rating"."""
    line: int
    """In the file, from 1."""

    @property
    def name(self) -> str:
        """ "question_id/turn"."""
        return f"{self.question_id}/{self.turn}"


def read_fastchat_file(path: Path) -> list[FastChatJudgment]:
    """All lines of a judgment file that FastChat's gen_judgment.py wrote in mode "single".

    Raises:
        UserError: the file cannot be read, or a line is not such a judgment.
    """
    return [_fastchat_judgment(path, number, row) for number, row in numbered_rows(path)]


def read_fastchat_judgments(path: Path, model: str | None = None) -> dict[str, str]:
    """The judgments of one model's answers, "question_id/turn" → text.

    Args:
        path: FastChat's file, which may hold the judgments of many models.
        model: whose; may be left out if the file holds one.

    Raises:
        UserError: the file holds several models, not this one, or two different judgments of one turn (FastChat appends when it
            is run again).
    """
    rows = read_fastchat_file(path)
    models = sorted({row.model for row in rows})
    if model is None and len(models) > 1:
        raise UserError(f"{path} holds the judgments of {len(models)} models: name one of {', '.join(models)}")
    if model is not None and model not in models:
        raise unknown_name(f"model in {path}", model, models)
    kept: dict[str, FastChatJudgment] = {}
    for row in rows:
        if model in (None, row.model):
            first = kept.setdefault(row.name, row)
            if first.judgment != row.judgment:
                raise UserError(
                    f"{path}: two judgments of {row.name} (lines {first.line} and {row.line}); FastChat appends when it is run "
                    "again: keep the lines of one run"
                )
    return {name: row.judgment for name, row in kept.items()}


def _fastchat_judgment(path: Path, number: int, row: Mapping[str, Any]) -> FastChatJudgment:
    if "g1_judgment" in row:
        raise UserError(f"{path}:{number}: a judgment of a pair of answers; only those of FastChat's mode single are read")
    try:
        score = float(row["score"])
        question, turn, judge, text = int(row["question_id"]), int(row["turn"]), row["judge"], row["judgment"]
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path}:{number}: not a line of FastChat's judgments ({what}); expected question_id, turn, model, judge, judgment "
            "and score"
        ) from error
    names = (judge,) if isinstance(judge, str) else tuple(map(str, judge))
    return FastChatJudgment(question, turn, str(row.get("model", "")), names, str(text), None if score == -1 else score, number)


def _rows(path: Path) -> list[Any]:
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON objects of a file with their line numbers; empty lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object")
            yield number, row


def _reference_rows(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Question → the reference answers of its turns."""
    for number, row in numbered_rows(path):
        try:
            turns = tuple(row["choices"][0]["turns"])
            question = int(row["question_id"])
        except (KeyError, IndexError, TypeError, ValueError):
            turns, question = (), 0
        if len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
            raise UserError(f'{path}:{number}: expected {{"question_id": 101, "choices": [{{"turns": ["…", "…"]}}]}}')
        yield question, turns


def _corrected(task: str, data_dir: Path | None) -> Path:
    """The user's file of corrected reference answers."""
    folders = [folder for folder in (data_dir, os.environ.get(DATA_VARIABLE)) if folder]
    paths = [Path(folder).expanduser() / CORRECTED_PATH for folder in folders]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise UserError(
            f"{task} needs corrected reference answers, which have no public home: put a file in FastChat's format at "
            f"{CORRECTED_PATH} in a folder and name the folder with --data-dir"
        )
    return found


def _check_corrected(path: Path, answers: Mapping[int, tuple[str, ...]], original: Mapping[int, tuple[str, ...]]) -> None:
    """Raise UserError unless the file holds a reference answer for every question that has one, and they are not the old ones."""
    missing = [question for question in original if question not in answers]
    if missing:
        raise UserError(f"{path} lacks the reference answers of {len(missing)} questions: {', '.join(map(str, missing[:5]))}")
    if all(answers[question] == turns for question, turns in original.items()):
        raise UserError(f"{path} holds the original reference answers: take mt-bench/fastchat-single for those")


def _task(references: References, suffix: str = "") -> MtBench:
    name = f"mt-bench/fastchat-single{suffix}"
    files = [MT_BENCH_QUESTIONS, MT_BENCH_JUDGE_PROMPTS, *([MT_BENCH_REFERENCES] if references == "original" else [])]
    return MtBench(
        name=name,
        references=references,
        protocol=AnswerProtocol(
            name,
            max_new_tokens=1024,
            prompt="the question's two turns as user messages, no system message; temperature 0.7 for writing and roleplay, 0.1 "
            f"for stem and humanities, 0 otherwise; judged by FastChat's prompts single-*, {references} reference answers",
            extraction="of each judgment the first [[x]], else the first [x], any size; none: unscored",
            data={source.path: source.sha256 for source in files},
        ),
    )


FASTCHAT_SINGLE = _task("original")
FASTCHAT_SINGLE_CORRECTED = _task("corrected", "-corrected")
