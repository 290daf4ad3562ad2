"""Log-probs of given tokens in the form of completions, so that they are kept, found again and counted as those are.

A request for a continuation's log-probs has a key of its own (digest of prompt and continuation); its completion holds the
continuation as tokens and their log-probs. An `AnswerStore` then needs to know nothing about them.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from gsil_bench.generation.engine import Completion, Engine, Request, Sampling
from gsil_bench.models.packing import TokenTree
from gsil_bench.records import digest

POSITIONS = 65_536
"""Positions after which log-probs are handed out to be kept: what a kill loses at most."""
TREE = 8192
"""Tokens of the continuations of one tree at most: a tree is never divided among forward passes."""


@dataclass(frozen=True)
class Given(Request):
    """Asks for the log-probs of tokens that are given instead of drawn."""

    continuation: tuple[int, ...] = ()

    @staticmethod
    def after(prompt_ids: tuple[int, ...], continuation: tuple[int, ...]) -> Given:
        """The request for a continuation of a prompt; neither may be empty."""
        return Given(prompt_ids, Sampling(0), logps=True, continuation=continuation)

    @cached_property
    def key(self) -> str:
        """Of prompt and continuation."""
        return digest(["given", self.prompt_ids, self.continuation])


@dataclass(frozen=True)
class Likelihoods:
    """An engine that completes a `Given` with its own continuation. Continuations of one prompt share a tree."""

    engine: Engine

    def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        """See Engine.

        Raises:
            EngineError: the engine cannot tell log-probs of given tokens.
            ArithmeticError: a log-prob is not finite.
        """
        for members in _portions([_given(request) for request in requests]):
            trees = [TokenTree(prompt, tuple(continuations)) for prompt, continuations in members.items()]
            for found, continuations in zip(self.engine.logps(trees), members.values(), strict=True):
                for logps, (continuation, indices) in zip(found, continuations.items(), strict=True):
                    if not all(map(math.isfinite, logps)):
                        raise ArithmeticError("the model's log-probs are not finite: its training diverged, or it is broken")
                    for index in indices:
                        yield index, Completion(continuation, "", "stop", logps=logps)


def _given(request: Request) -> Given:
    if not isinstance(request, Given):
        raise TypeError("only given tokens have likelihoods here")
    return request


def _portions(requests: Sequence[Given]) -> Iterator[dict[tuple[int, ...], dict[tuple[int, ...], list[int]]]]:
    """Prompt → continuation → indices of its requests, in portions of so many positions; a prompt is counted once in each."""
    portion: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    positions = 0
    for index, request in enumerate(requests):
        continuations = portion.setdefault(request.prompt_ids, {})
        positions += len(request.continuation) + (0 if continuations else len(request.prompt_ids))
        continuations.setdefault(request.continuation, []).append(index)
        if positions >= POSITIONS or sum(map(len, continuations)) >= TREE:
            yield portion
            portion, positions = {}, 0
    if portion:
        yield portion
