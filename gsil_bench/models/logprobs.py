"""Log-probs of many completions under a frozen model: the reference's, and the held-out loss.

They go through the same `Policy` as training does, so that policy and reference differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gsil_bench.models.packing import TokenTree, micro_batches
from gsil_bench.models.policy import Policy
from gsil_bench.records import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 512
"""Trees that are packed at a time: enough to fill every forward pass, few enough to report progress."""


@torch.no_grad()
def completion_logps(
    model: PreTrainedModel,
    sequences: Sequence[Encoded],
    tokens: int = 8192,
    advance: Callable[[int], None] = lambda done: None,
    layout: str = "auto",
    autocast: bool = False,
) -> list[Tensor]:
    """Per-token log-probs of every sequence's completion, on the CPU, in the given order.

    Neighbours with the same prompt are computed as one tree.

    Args:
        model: policy or reference, in eval mode; its dtype decides the precision of the forward pass.
        sequences: a prompt may not be empty (the first token of a text has no log-prob).
        tokens: positions per forward pass.
        advance: called with the number of sequences that a pass added; may raise to stop.
        layout: see `Policy`.
        autocast: see `Policy`.
    """
    with Policy(model, layout, autocast) as policy:
        return tree_logps(policy, trees_of(sequences), tokens, advance)


@torch.no_grad()
def tree_logps(
    policy: Policy, trees: Sequence[TokenTree], tokens: int, advance: Callable[[int], None] = lambda done: None
) -> list[Tensor]:
    """Per-token log-probs of every completion, tree by tree, on the CPU."""
    results: list[Tensor] = []
    for start in range(0, len(trees), WINDOW):
        window = trees[start : start + WINDOW]
        kept: dict[int, list[Tensor]] = {}
        for group in micro_batches(window, policy.layout, tokens):
            members = [window[index] for index in group]
            lengths = [len(completion) for tree in members for completion in tree.completions]
            parts = iter(policy(members).cpu().split(lengths))
            kept |= {index: [next(parts).clone() for _ in window[index].completions] for index in group}
            advance(sum(len(tree.completions) for tree in members))
        results += [logps for index in range(len(window)) for logps in kept[index]]
    return results


def trees_of(sequences: Sequence[Encoded]) -> list[TokenTree]:
    """Neighbours with one prompt as one tree."""
    groups = groupby(sequences, key=lambda sequence: sequence.prompt_ids)
    return [TokenTree(prompt, tuple(sequence.completion_ids for sequence in members)) for prompt, members in groups]
