"""What the loop trains on: trees (a prompt, its demonstration, a self-generation) and the order in which steps take them.

The order is a function of seed and round only, so it does not change with micro-batches, memory or an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gsil_bench.records import Encoded


@dataclass(frozen=True)
class Branch:
    """A completion of a tree's prompt."""

    completion_ids: tuple[int, ...]
    reference_logp: float | None = None
    """Sum of the reference's log-probs over the completion, where a method needs it."""


@dataclass(frozen=True)
class Tree:
    """A prompt with its demonstration and, for pairwise methods, one self-generation (or rejected answer)."""

    id: str
    prompt_ids: tuple[int, ...]
    real: Branch
    generated: Branch | None = None

    def sequences(self) -> list[Encoded]:
        """The branches as prompt and completion, the demonstration first."""
        branches = [self.real] if self.generated is None else [self.real, self.generated]
        return [Encoded(self.prompt_ids, branch.completion_ids) for branch in branches]

    @property
    def scored_tokens(self) -> int:
        """Tokens of all branches that have a log-prob."""
        return sum(len(sequence.completion_ids) for sequence in self.sequences())

    def demonstration_only(self) -> Tree:
        """The tree without its self-generation."""
        return Tree(self.id, self.prompt_ids, self.real)


def steps_of_round(demonstrations: int, epochs: float, batch_size: int, rounds: int, round_index: int) -> int:
    """Optimiser steps of one round: the run's steps (epochs over the demonstrations) split as evenly as whole numbers allow."""
    total = max(rounds, -int(-demonstrations * epochs // batch_size))
    return total * (round_index + 1) // rounds - total * round_index // rounds


def shuffled_steps(trees: Sequence[Tree], batch_size: int, steps: int, seed: Sequence[int]) -> list[list[Tree]]:
    """Full batches from successive seeded permutations: no short last batch, every tree once before any comes twice."""
    random = np.random.default_rng([*seed, 0])
    order: list[int] = []
    while len(order) < steps * batch_size:
        order.extend(random.permutation(len(trees)).tolist())
    return [[trees[index] for index in order[step * batch_size : (step + 1) * batch_size]] for step in range(steps)]


def matched_demonstrations(steps: Sequence[Sequence[Tree]], trees: Sequence[Tree], seed: Sequence[int]) -> list[list[Tree]]:
    """The control's batches: each step's demonstrations, then further ones until its scored tokens match the pairs'.

    The further demonstrations come from their own seeded permutations; the last one is taken if that brings the count nearer.
    """
    random = np.random.default_rng([*seed, 1])
    queue: list[int] = []
    matched = []
    for pairs in steps:
        batch = [tree.demonstration_only() for tree in pairs]
        missing = sum(tree.scored_tokens for tree in pairs) - sum(tree.scored_tokens for tree in batch)
        while missing > 0:
            queue = queue or random.permutation(len(trees)).tolist()
            extra = trees[queue[-1]].demonstration_only()
            if extra.scored_tokens > 2 * missing:
                break
            queue.pop()
            batch.append(extra)
            missing -= extra.scored_tokens
        matched.append(batch)
    return matched
