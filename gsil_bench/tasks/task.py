"""What a task is: items to answer, a named protocol that fixes how they are asked, and a scorer of text.

A task never sees a model and never imports torch: text in, number out. Everything that decides an answer (prompt, decoding,
token limit) is in its protocol, so that two scores are comparable exactly when their protocols are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from gsil_bench.errors import UserError

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Continuation:
    """A text whose log-likelihood after a context is asked for: a choice of a multiple-choice question."""

    context: str
    text: str


@dataclass(frozen=True)
class Item:
    """One question of a task, and what the scorer needs to judge the answers.

    It is answered in turns, or by the log-likelihoods of `continuations`: then the "answer" to each is the JSON text
    {"logp": sum of log-probs in nats, "tokens": their number}.
    """

    id: str
    turns: tuple[str, ...] = ()
    """The user's messages, in order. The answer to turn i is in the conversation when turn i + 1 is asked. Of a protocol in text
    form, the prompt as it is."""
    history: tuple[tuple[str, str], ...] = ()
    """Questions and answers that are shown before the first turn: shots, in chat form."""
    opening: str = ""
    """How the model's answer to the first turn is made to begin; the scorer does not see it."""
    temperature: float | None = None
    """Instead of the protocol's."""
    continuations: tuple[Continuation, ...] = ()
    published_id: str = ""
    """Its name in the published data ("HumanEval/0", "81", a row's number), if that is not `id`."""
    reference: Mapping[str, Any] = field(default_factory=dict)
    """What the scorer needs: the gold answer, the tests of a program, the rubric. JSON types only."""
    group: str = ""
    """Category, for tables by category."""
    gold: tuple[str, ...] = ()
    """Answers that must get full marks, one per turn: demonstrations on the train split, canaries on every split."""

    @property
    def asked(self) -> int:
        """Answers that it wants: of turns, or of continuations."""
        return len(self.continuations) or len(self.turns)


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
    form: Literal["chat", "text"] = "chat"
    """How a turn is asked: as a user message in the model's template, or "text": tokenised as it is, as base models are."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer; neither they nor what follows belong to it."""
    prompt: str = ""
    """How a turn is made of the data, for readers."""
    shots: int = 0
    shot_seed: int | None = None
    """Of the choice of shots from the train split; None: they are fixed."""
    extraction: str = ""
    """How the answer is found in the text, for readers."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Name of each data file → sha256."""


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
    judge: Any = None
    """A `Judge` (tasks/judge.py) for tasks whose answers are rated; None: such a task says what to do."""
    learned: Any = None
    """A `LearnedMetric` (tasks/text_measures.py) beside the measures of summaries; None: there is none."""


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
        """The items of a split, in a fixed order; of "train" none where there is no such split.

        Raises:
            UnavailableError: the data cannot be had. Other tasks go on.
            UserError: another split that does not exist.
        """

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """Score answers: answers[i] holds one text per turn of items[i]. One Score per item, in order."""


def require_consent(task: Task, allowed: bool) -> None:
    """Raise UserError if scoring would run generated code and the user has not agreed to that."""
    if task.runs_code and not allowed:
        raise UserError(
            f"task {task.name} runs generated code: read gsil_bench/tasks/programs.py, then pass --allow-code-execution"
        )
