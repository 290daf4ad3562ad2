"""What a task is: items to answer, a named protocol that fixes how they are asked, and a scorer of text.

A task never sees a model and never imports torch: text in, number out. Everything that decides an answer (prompt, decoding,
token limit) is in its protocol, so that two scores are comparable exactly when their protocols are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Item:
    """One question of a task: one user message per turn, and what the scorer needs to judge the answers."""

    id: str
    turns: tuple[str, ...]
    """The user's messages, in order. The answer to turn i is in the conversation when turn i + 1 is asked."""
    reference: Mapping[str, Any] = field(default_factory=dict)
    """What the scorer needs: the gold answer, the tests of a program, the rubric. JSON types only."""
    group: str = ""
    """Category, for tables by category."""
    gold: tuple[str, ...] = ()
    """Answers that must get full marks, one per turn: demonstrations on the train split, canaries on every split."""


@dataclass(frozen=True)
class AnswerProtocol:
    """How a task is asked: everything but the model that decides an answer."""

    name: str
    """Named and versioned: "mini-gsm8k/greedy-v1"."""
    max_new_tokens: int
    """Per turn. An answer that reaches it has finish_reason "length"."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    samples: int = 1
    """Answers per item; each is scored, the item's score is their mean."""
    seed: int = 0
    """Of the sampling. The same for every method, so that paired items share it."""
    system: str = ""
    """System message, if any."""


@dataclass(frozen=True)
class Score:
    """The score of one item's answers. Unscored (value None) is neither zero nor failed: it says why."""

    value: float | None
    reason: str
    """Why this score, for a person: the extracted number, the failing test, the judge's words."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Diagnoses that tables may count, such as {"format_ok": True} or {"ratings": [7, 4]}. JSON types only."""


@dataclass(frozen=True)
class ScoringResources:
    """What scoring may use besides the text."""

    workers: int = 2
    """Processes for sandboxed programs."""
    allow_code_execution: bool = False
    """Consent to run arbitrary generated code (HumanEval). The restricted language of mini-humaneval needs none."""


@runtime_checkable
class Task(Protocol):
    """The contract. Each task is a frozen record with these attributes and two methods."""

    @property
    def name(self) -> str:
        """As typed after --tasks and printed in tables."""

    @property
    def version(self) -> str:
        """Changes whenever the items or the scoring change; part of every fingerprint."""

    @property
    def summary(self) -> str:
        """One sentence for `gsil-bench tasks`."""

    @property
    def metric(self) -> str:
        """Name of what is averaged: "accuracy", "pass@1", "rating"."""

    @property
    def best(self) -> float:
        """The score of a perfect answer: 1.0 for accuracy, 10.0 for ratings. Canaries assert it."""

    @property
    def worst(self) -> float:
        """The score of an empty answer: 0.0 for accuracy, 1.0 for ratings. Canaries assert it."""

    @property
    def protocol(self) -> AnswerProtocol:
        """How it is asked."""

    @property
    def runs_code(self) -> bool:
        """True if scoring runs arbitrary generated code, which needs the user's consent before anything starts."""

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        """The items of a split, in a fixed order. Raises UserError if the data cannot be had or the split does not exist."""

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """Score answers: answers[i] holds one text per turn of items[i]. One Score per item, in order."""
