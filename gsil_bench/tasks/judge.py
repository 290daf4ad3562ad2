"""Judges: rate each turn of an answered question from 1 to 10, through one interface for rubrics and language models.

A judge is given a `JudgeRequest` and returns text that holds its rating in double brackets; `parse_rating` reads it. A rating
that cannot be read is *unscored*, never zero. The deterministic rubric judge of the embedded suite and an LLM judge differ only
in `Judge.reply`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gsil_bench.tasks.task import Score

RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


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


class Judge(Protocol):
    """Anything that rates answers."""

    @property
    def identity(self) -> str:
        """Name and version; part of the fingerprint of every score it gives."""

    def reply(self, request: JudgeRequest) -> str:
        """The judgment as text with the rating in double brackets, such as "Two facts are missing. Rating: [[7]]"."""


def parse_rating(reply: str) -> float | None:
    """The first rating in double brackets if it lies in 1..10, otherwise None."""
    match = RATING.search(reply)
    rating = float(match.group(1)) if match else None
    return rating if rating is not None and 1.0 <= rating <= 10.0 else None


def rate_turns(judge: Judge, requests: Sequence[JudgeRequest]) -> Score:
    """Rate every turn of one question; the score is the mean of the ratings, unscored if any turn could not be read."""
    replies = [judge.reply(request) for request in requests]
    ratings = [parse_rating(reply) for reply in replies]
    details = {"ratings": ratings, "judge": judge.identity, "replies": replies}
    if any(rating is None for rating in ratings):
        return Score(None, f"no rating could be read from the judgment of turn {ratings.index(None) + 1}", details)
    value = sum(rating for rating in ratings if rating is not None) / len(ratings)
    return Score(value, " | ".join(replies), details)
