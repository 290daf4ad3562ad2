"""The only place where logits become log-probs: policy, reference and held-out loss all go through `token_logps`.

Sequences are padded on the right. A causal model cannot see what lies to the right, so no attention mask is needed and the
scored positions do not depend on padding, order or neighbours beyond rounding. A log-prob is computed in fp32 (in fp64 for an
fp64 model) from the logits of scored positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gsil_bench.records import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences side by side, padded on the right."""

    input_ids: Tensor
    """(rows, width), int64."""
    scored: Tensor
    """(rows, width), bool: True where the token belongs to the completion."""

    @staticmethod
    def of(sequences: Sequence[Encoded], device: torch.device | str = "cpu") -> PaddedBatch:
        """Pad with id 0, which is never attended to by a real token and never scored."""
        width = max(len(sequence) for sequence in sequences)
        input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
        scored = torch.zeros(len(sequences), width, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            input_ids[row, : len(sequence)] = torch.tensor([*sequence.prompt_ids, *sequence.completion_ids])
            scored[row, len(sequence.prompt_ids) : len(sequence)] = True
        return PaddedBatch(input_ids.to(device), scored.to(device))


def token_logps(model: PreTrainedModel, batch: PaddedBatch) -> Tensor:
    """log π(token | everything before it) of every scored token, 0 elsewhere. Differentiable.

    Returns:
        (rows, width), at least fp32.
    """
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]  # (rows, width - 1, vocabulary)
    targets, scored = batch.input_ids[:, 1:], batch.scored[:, 1:]
    chosen = logits[scored]  # (tokens, vocabulary)
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    logps = chosen.gather(1, targets[scored].unsqueeze(1)).squeeze(1) - chosen.logsumexp(1)  # (tokens,)
    return torch.zeros(batch.scored.shape, dtype=logps.dtype, device=logps.device).masked_scatter(batch.scored, logps)


def micro_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in groups whose padded size stays within a token budget (one sequence at least), shortest first."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if group and lengths[index] * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@torch.no_grad()
def completion_logps(
    model: PreTrainedModel,
    sequences: Sequence[Encoded],
    tokens: int = 8192,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """Per-token log-probs of every sequence's completion, on the CPU, in the given order.

    Args:
        model: policy or reference; its dtype decides the precision of the forward pass.
        sequences: a prompt may not be empty (the first token of a text has no log-prob).
        tokens: padded tokens per forward pass.
        advance: called with the number of sequences that a pass added; may raise to stop.
    """
    results: list[Tensor] = [torch.empty(0)] * len(sequences)
    for group in micro_batches([len(sequence) for sequence in sequences], tokens):
        batch = PaddedBatch.of([sequences[index] for index in group], model.device)
        logps = token_logps(model, batch).cpu()
        for row, index in enumerate(group):
            start = len(sequences[index].prompt_ids)
            results[index] = logps[row, start : len(sequences[index])].clone()
        advance(len(group))
    return results
