"""The next token of each row, and whether rounding could have made it another one.

Greedy rows take the mode. Sampled ones invert the cumulative distribution of softmax(logits / temperature), cut to the smallest
set of tokens that holds top_p, at a number in [0, 1) that belongs to the request (`Request.uniforms`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gsil_bench.generation.engine import Sampling

LOGIT_MARGIN = 1e-4
"""Logits of an fp32 model differ between batches by some 1e-6 of their size, which is below 100."""
MASS_MARGIN = 2e-5
"""The same for sums of probabilities."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for each row."""

    tokens: Tensor
    """(rows,)"""
    close: Tensor
    """(rows,), bool: another token was so near that rounding decides."""


def choose(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Choice:
    """The next token of each row.

    Args:
        logits: (rows, vocabulary), fp32.
        uniforms: in [0, 1), one for each row.

    Raises:
        ArithmeticError: logits that are not numbers.
    """
    top, tokens = logits.max(1)
    if bool(top.isnan().any()):  # max carries NaN on
        raise ArithmeticError(
            "the model's logits are not numbers: training diverged (a lower learning rate may help), or the model is broken"
        )
    close = (logits >= top[:, None] - LOGIT_MARGIN).sum(1) > 1
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen = _draw(logits[rows], [samplings[row] for row in drawn], [uniforms[row] for row in drawn])
        tokens, close = tokens.index_copy(0, rows, chosen.tokens), close.index_copy(0, rows, chosen.close)
    return Choice(tokens, close)


def _draw(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Choice:
    """Inversion of the cumulative distribution."""
    column = torch.tensor(
        [(sampling.temperature, sampling.top_p, uniform) for sampling, uniform in zip(samplings, uniforms, strict=True)],
        dtype=torch.float64,
    ).to(logits.device)
    temperature, top_p, uniform = column.unbind(1)
    probabilities = torch.softmax(logits.double() / temperature[:, None], 1)
    close = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if any(sampling.top_p < 1 for sampling in samplings):
        probabilities, close = nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(1)
    threshold = (uniform * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[1] - 1)
    after = cumulative.gather(1, tokens)
    before = after - probabilities.gather(1, tokens)
    near = torch.minimum((after - threshold).abs(), (before - threshold).abs()) < MASS_MARGIN
    return Choice(tokens.squeeze(1), close | near.squeeze(1))


def nucleus(probabilities: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities with all but the smallest set of tokens that holds top_p set to zero, (rows, vocabulary).

    Returns:
        Also whether rounding decides about the set, (rows,): a sum that almost is top_p, or two tokens at its edge that almost
        are equally probable.
    """
    ordered, index = probabilities.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered
    outside = before >= top_p[:, None]
    kept = (~outside).sum(1, keepdim=True)  # at least 1
    last, first_out = ordered.gather(1, kept - 1), ordered.gather(1, kept.clamp(max=ordered.shape[1] - 1))
    edge = (kept < ordered.shape[1]) & (last - first_out < MASS_MARGIN * last) & (top_p[:, None] < 1)
    close = ((before - top_p[:, None]).abs().amin(1) < MASS_MARGIN) & (top_p < 1)
    return torch.zeros_like(probabilities).scatter(1, index, ordered.masked_fill(outside, 0.0)), close | edge.squeeze(1)
