"""What the loop trains on: trees (a prompt, its demonstration, its self-generations) and the order in which steps take them.

The order is a function of seed and round only, so it does not change with micro-batches, memory or an interruption.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from gsil_bench.models.packing import TokenTree

if TYPE_CHECKING:
    from gsil_bench.models.policy import Policy


@dataclass(frozen=True)
class Branch:
    """A completion of a tree's prompt."""

    completion_ids: tuple[int, ...]
    reference_logp: float | None = None
    """Sum of the reference's log-probs over the completion, where a method needs it."""
    of_tokens: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Of a sample of the policy that is trained: its tokens' advantages, log-probs at sampling, …, named as in TokenLogProbs."""


@dataclass(frozen=True)
class Tree:
    """A prompt with its demonstration and, for pairwise methods, its self-generations (or the rejected answer)."""

    id: str
    prompt_ids: tuple[int, ...]
    real: Branch
    generated: tuple[Branch, ...] = ()
    first: tuple[Branch, ...] = ()
    """The first round's self-generations, as many as there are others, for a method that needs them."""

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All completions, the demonstration first."""
        return (self.real, *self.generated, *self.first)

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


def steps_of_run(demonstrations: int, epochs: float, batch_size: int) -> int:
    """Optimiser steps of so many epochs over the demonstrations, at least one."""
    return max(1, -int(-demonstrations * epochs // batch_size))


def steps_of_round(total: int, rounds: int, round_index: int) -> int:
    """Optimiser steps of one round: the run's steps split as evenly as whole numbers allow, and one at least."""
    total = max(rounds, total)
    return total * (round_index + 1) // rounds - total * round_index // rounds


class Steps(Protocol):
    """The batches of a round, in order; every iteration gives the same."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Tree]]: ...


@runtime_checkable
class LiveSteps(Protocol):
    """Batches that depend on the policy as it has become: samples of it. They have a state, which is saved with the policy's."""

    line: Mapping[str, float]
    """Numbers about the newest batch, for the metrics."""

    def __len__(self) -> int: ...

    def follow(self, policy: Policy, start: int) -> Iterator[list[Tree]]:
        """The batches from a step on; each is made when it is asked for, after the step before it was taken.

        Raises:
            TrainingError: nothing can be learned from what was sampled.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that the coming batches depend on besides the policy and the step."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""

    def finish(self, folder: Path) -> dict[str, Any]:
        """After the last step: keep in the folder what later rounds need; facts of the round."""


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
