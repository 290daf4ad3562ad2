"""Held-out demonstrations: the negative log-likelihood per token of answers that no method trained on.

The one number that shows displacement: a pairwise loss can push self-generations down so hard that demonstrations fall with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gsil_bench.evaluation.scoring import FILE
from gsil_bench.models.logprobs import completion_logps
from gsil_bench.records import Encoded, ItemScore, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "held-out-nll"
METRIC = "nll"


def score_held_out(
    model: PreTrainedModel,
    ids: Sequence[str],
    sequences: Sequence[Encoded],
    tokens: int,
    folder: Path,
    advance: Callable[[int], None] = lambda done: None,
    autocast: bool = False,
) -> list[ItemScore]:
    """Mean −log π per scored token (nats) of each held-out demonstration, one line each; lower is better.

    Raises:
        ArithmeticError: a log-prob is not finite; the training that made this model diverged.
    """
    logps = completion_logps(model, sequences, tokens, advance, autocast=autocast)
    if not all(bool(logp.isfinite().all()) for logp in logps):
        raise ArithmeticError(
            "the model's log-probs are not finite: the training diverged (a lower learning rate may help), or the model is broken"
        )
    scores = [ItemScore(id_, float(-logp.double().mean()), f"{len(logp)} tokens") for id_, logp in zip(ids, logps, strict=True)]
    write_jsonl(folder / FILE, scores)
    return scores
