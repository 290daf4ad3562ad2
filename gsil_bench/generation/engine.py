"""What every generation engine offers: token ids in, token ids out, batch by batch, so that a killed run keeps what it had.

An engine plans its batches from all requests before it starts. The plan depends on the requests only, so a run that was killed
asks for the same plan again and computes the batches that are missing: its answers equal those of a run that was never killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Request:
    """One prompt to be completed."""

    id: str
    """Seeds the sampling together with `Sampling.seed`: the same id gets the same randomness under every method."""
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What came back for one request."""

    id: str
    tokens: tuple[int, ...]
    """With the end token if and only if finish_reason is "stop"."""
    text: str
    """Without special tokens."""
    finish_reason: Literal["stop", "length", "error"]
    error: str = ""


class Engine(Protocol):
    """Anything that completes prompts."""

    @property
    def identity(self) -> str:
        """Engine and its version: part of every answer's fingerprint."""

    def batches(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """The plan: indices into `requests`, batch by batch; every index once. A function of its arguments only."""

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Complete one batch. A request that cannot be served gets finish_reason "error"; the others are not affected."""
