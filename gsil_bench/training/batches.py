"""What the loop trains on: trees (a prompt, its demonstration, its self-generations) and the order in which steps take them.

The order is a function of seed and round only, so it does not change with micro-batches, memory or an interruption.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gsil_bench.models.packing import TokenTree


@dataclass(frozen=True)
class Branch:
    """A completion of a tree's prompt."""

    completion_ids: tuple[int, ...]
    reference_logp: float | None = None
    """Sum of the reference's log-probs over the completion, where a method needs it."""


@dataclass(frozen=True)
class Tree:
    """A prompt with its demonstration and, for pairwise methods, its self-generations (or the rejected answer)."""

    id: str
    prompt_ids: tuple[int, ...]
    real: Branch
    generated: tuple[Branch, ...] = ()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All completions, the demonstration first."""
        return (self.real, *self.generated)

    @property
    def tokens(self) -> TokenTree:
        """The tree as a forward pass takes it."""
        return TokenTree(self.prompt_ids, tuple(branch.completion_ids for branch in self.branches))

    @property
    def scored_tokens(self) -> int:
        """Tokens of all completions: those that have a log-prob."""
        return sum(len(branch.completion_ids) for branch in self.branches)

    def demonstration_only(self) -> Tree:
        """The tree without its self-generations."""
        return Tree(self.id, self.prompt_ids, self.real)


def steps_of_round(demonstrations: int, epochs: float, batch_size: int, rounds: int, round_index: int) -> int:
    """Optimiser steps of one round: the run's steps (epochs over the demonstrations) split as evenly as whole numbers allow."""
    total = max(rounds, -int(-demonstrations * epochs // batch_size))
    return total * (round_index + 1) // rounds - total * round_index // rounds


class Steps(Protocol):
    """The batches of a round, in order; every iteration gives the same."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Tree]]: ...


@dataclass(frozen=True)
class ShuffledSteps:
    """Full batches from successive seeded permutations: no short last batch, every tree once before any comes twice."""

    trees: Sequence[Tree]
    batch_size: int
    steps: int
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Tree]]:
        random = np.random.default_rng([*self.seed, 0])
        order = itertools.chain.from_iterable(random.permutation(len(self.trees)).tolist() for _ in itertools.count())
        for _ in range(self.steps):
            yield [self.trees[index] for index in itertools.islice(order, self.batch_size)]


@dataclass(frozen=True)
class MatchedDemonstrations:
    """The control's batches: each step's demonstrations, then further ones until the scored tokens so far match the pairs'.

    The further demonstrations come from their own seeded permutations; one is taken if that brings the count nearer.
    """

    pairs: ShuffledSteps

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[list[Tree]]:
        trees, random = self.pairs.trees, np.random.default_rng([*self.pairs.seed, 1])
        queue: list[int] = []
        missing = 0  # carried from step to step: what a long demonstration took too much, the next steps take less
        for step in self.pairs:
            batch = [tree.demonstration_only() for tree in step]
            missing += sum(tree.scored_tokens for tree in step) - sum(tree.scored_tokens for tree in batch)
            while missing > 0:
                queue = queue or random.permutation(len(trees)).tolist()
                extra = trees[queue[-1]].demonstration_only()
                if extra.scored_tokens > 2 * missing:
                    break
                queue.pop()
                batch.append(extra)
                missing -= extra.scored_tokens
            yield batch
