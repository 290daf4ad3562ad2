"""What every generation engine offers: token ids in, token ids out, each completion as soon as it is there.

A completion is a function of the weights, the prompt's tokens, the sample's index and the sampling, so that it may be kept and
found again under a key made of these. Neighbours, order and batch size must not matter; where an engine cannot promise that to
the last bit, its identity says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np

from gsil_bench.errors import UserError
from gsil_bench.models.packing import TokenTree
from gsil_bench.records import digest

FinishReason = Literal["stop", "length", "error"]


class EngineError(UserError):
    """An engine cannot serve at all: it is not installed, not reachable, or ended. What came before it is kept."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    """Texts that end a completion. An engine may stop once the text of the new tokens holds one, or go on: whoever asks cuts."""


@dataclass(frozen=True)
class Request:
    """One completion of one prompt."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    sample: int = 0
    """Which of several completions: it seeds the randomness together with the prompt and `sampling.seed`."""
    logps: bool = False
    """Whether the log-probs of the new tokens are wanted."""

    @cached_property
    def key(self) -> str:
        """Of everything about a completion that the request decides. Greedy requests have no seed and one sample."""
        return digest([self.prompt_ids, asdict(self._decisive.sampling), self._decisive.sample, self.logps])

    @cached_property
    def seed(self) -> int:
        """128 bits that seed this completion's randomness, and no other's."""
        named = digest([self.sampling.seed, self.sample, self.prompt_ids])
        return int.from_bytes(hashlib.sha256(named.encode()).digest()[:16], "little")

    @property
    def _decisive(self) -> Self:
        """The request without what cannot change its completion."""
        if self.sampling.temperature > 0:
            return self
        return replace(self, sampling=replace(self.sampling, seed=0, top_p=1.0), sample=0)

    def uniforms(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """A number in [0, 1) for each new token: what an engine of ours draws by. (max_new_tokens,)."""
        if self.sampling.temperature == 0:
            return np.zeros(self.sampling.max_new_tokens)
        return np.random.Generator(np.random.Philox(key=self.seed)).random(self.sampling.max_new_tokens)


@dataclass(frozen=True)
class Completion:
    """What came back for one request."""

    tokens: tuple[int, ...]
    """With the end token, or up to the one that completes a stop text, if and only if finish_reason is "stop"."""
    text: str
    """Without special tokens."""
    finish_reason: FinishReason
    error: str = ""
    """Why there is no completion: of this request alone."""
    logps: tuple[float, ...] | None = None
    """log π(token | everything before it) at temperature 1 over the whole vocabulary, for each of `tokens`, if asked for."""
    passing: bool = False
    """Whether the same request may be served another time: its error is a server's, not that of a prompt that is too long."""


class Engine(Protocol):
    """Anything that completes prompts."""

    @property
    def identity(self) -> str:
        """Engine, version and settings: all that decides an answer besides the weights, the tokenizer and the request."""

    def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        """Every request's completion beside its index, as it is finished: in any order, none twice.

        A request that cannot be served gets finish_reason "error"; the others are not affected. Leaving the iterator early
        gives up what is in flight.

        Raises:
            EngineError: nothing can be served.
        """

    def logps(self, trees: Sequence[TokenTree]) -> list[list[tuple[float, ...]]]:
        """Log-probs of given continuations: for each tree and each of its completions, one for each token.

        Raises:
            EngineError: the engine cannot tell them.
        """

    def close(self) -> None:
        """Free what it holds: memory, processes, connections. It cannot be used afterwards."""


@runtime_checkable
class Reloadable(Protocol):
    """What an engine may offer besides: other weights while it runs."""

    @property
    def reloads(self) -> bool:
        """Whether it was told to; it keeps its memory from one reload to the next."""

    def reload(self, folder: Path) -> None:
        """Serve the weights of another checkpoint of the same architecture; what it kept of the old ones' computations is gone.

        The folder is not needed afterwards.

        Raises:
            EngineError: it could not. Which weights it holds is not known, and only `close` is left.
        """


def too_long(prompt_ids: Sequence[int], context_length: int) -> Completion | None:
    """The error of a prompt that leaves no room for an answer, or None."""
    if prompt_ids and len(prompt_ids) < context_length:
        return None
    reason = f"a prompt of {len(prompt_ids)} tokens leaves no room in a context of {context_length}"
    return Completion((), "", "error", reason if prompt_ids else "empty prompt")


def unknown_tokens(ids: Sequence[int], vocabulary: int) -> Completion | None:
    """The error of a prompt with tokens that the model's embedding of `vocabulary` rows does not have, or None."""
    if not ids or (min(ids) >= 0 and max(ids) < vocabulary):
        return None
    return Completion((), "", "error", f"token ids {min(ids)} to {max(ids)} do not fit a vocabulary of {vocabulary}")
