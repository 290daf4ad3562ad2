"""Judges: rate each turn of an answered question, through one interface for rubrics, language models and stored judgments.

A judge is given `JudgeRequest`s, all at once, and returns texts that hold a rating in brackets. A rating that cannot be read is
*unscored*, never zero, and so is a turn that the judge gave no text for (`NoReply`). The deterministic rubric judge of the
embedded suite and a language model differ only in `Judge.replies`. Judges that need an engine or a server are in
evaluation/judging.py.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from gsil_bench.records import digest
from gsil_bench.tasks.task import Score

RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
FASTCHAT_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
"""What FastChat looks for: a number in double brackets; only if there is none anywhere, one in single brackets."""


@dataclass(frozen=True)
class JudgeRequest:
    """One turn to be rated, with the conversation up to it."""

    questions: tuple[str, ...]
    """User messages up to and including the rated turn."""
    answers: tuple[str, ...]
    """The model's answers up to and including the rated turn; the last one is rated."""
    rubric: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Checks of the rated turn, for judges that follow a rubric."""
    reference: str = ""
    """A reference answer of the rated turn, for judges that compare."""
    name: str = ""
    """Question and turn, "81/2", for judgments that are kept elsewhere."""
    system: str = ""
    """System message to a language model."""
    prompt: str = ""
    """User message to a language model: instructions, conversation, reference, as the task's protocol has them."""
    repeat: int = 0
    """Which of several judgments of the same turn."""

    @cached_property
    def key(self) -> str:
        """Of everything that a language model is told. The prompt's whole text is in it, so a changed prompt is a new request."""
        return digest([self.system, self.prompt, self.repeat])


@dataclass(frozen=True)
class NoReply:
    """Why a judge gave no text for one request."""

    reason: str


Reply = str | NoReply


class Judge(Protocol):
    """Anything that rates answers."""

    @property
    def identity(self) -> str:
        """Name, version and settings; part of the fingerprint of every score it gives."""

    @property
    def repeats(self) -> int:
        """Judgments that it gives of each turn."""

    def replies(self, requests: Sequence[JudgeRequest]) -> Sequence[Reply]:
        """The judgments in the requests' order, as text with the rating in brackets: "Two facts are missing. Rating: [[7]]".

        Raises:
            UserError: no request at all can be served.
        """


@dataclass
class ScriptedJudge:
    """Says what a function says, and remembers what it was asked. For tests."""

    script: Callable[[JudgeRequest], Reply]
    identity: str = "scripted"
    repeats: int = 1
    asked: list[JudgeRequest] = field(default_factory=list)

    def replies(self, requests: Sequence[JudgeRequest]) -> list[Reply]:
        """What the function says of each request."""
        self.asked += requests
        return [self.script(request) for request in requests]


@dataclass(frozen=True)
class ReplayJudge:
    """Repeats judgments that were given elsewhere."""

    judgments: Mapping[str, str]
    """"question_id/turn" → text."""
    where: str = "the given judgments"
    """For messages."""
    repeats: int = 1

    @cached_property
    def identity(self) -> str:
        """A digest of the judgments: two files are two judges."""
        return f"replay {digest(dict(self.judgments))[:16]}"

    def replies(self, requests: Sequence[JudgeRequest]) -> list[Reply]:
        """The judgment of each request's question and turn."""
        missing = f"not among {self.where}"
        return [self.judgments.get(request.name, NoReply(f"{request.name}: {missing}")) for request in requests]


def parse_rating(reply: str) -> float | None:
    """The first rating in double brackets if it lies in 1..10, otherwise None."""
    match = RATING.search(reply)
    rating = float(match.group(1)) if match else None
    return rating if rating is not None and 1.0 <= rating <= 10.0 else None


def parse_fastchat_rating(judgment: str) -> float | None:
    """The rating as FastChat reads it: the first [[x]], else the first [x], whatever its size; None where it finds none.

    FastChat reads x as a Python literal, so it stops with an error at "[[07]]"; here that is no rating either.
    """
    match = next((found for pattern in FASTCHAT_RATINGS if (found := pattern.search(judgment))), None)
    if match is None:
        return None
    try:
        rating = float(ast.literal_eval(match.group(1)))
    except (SyntaxError, ValueError, OverflowError):
        return None
    return rating if math.isfinite(rating) else None


def rate_turns(judge: Judge, requests: Sequence[JudgeRequest]) -> Score:
    """Rate every turn of one question; the score is the mean of the ratings, unscored if any turn could not be read."""
    replies = judge.replies(requests)
    ratings = [None if isinstance(reply, NoReply) else parse_rating(reply) for reply in replies]
    texts = [reply.reason if isinstance(reply, NoReply) else reply for reply in replies]
    details = {"ratings": ratings, "judge": judge.identity, "replies": texts}
    if any(rating is None for rating in ratings):
        return Score(None, f"no rating could be read from the judgment of turn {ratings.index(None) + 1}", details)
    value = sum(rating for rating in ratings if rating is not None) / len(ratings)
    return Score(value, " | ".join(texts), details)
