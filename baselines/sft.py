"""Supervised fine-tuning, the model it starts from, and the control with the budget of a pairwise method.

How this differs from common practice:

1. A step's loss is divided by the scored tokens of the whole step, not of each micro-batch, so gradient accumulation
   does not change it. Only the answer and its end token are scored, never the prompt.
2. A pairwise method passes over a demonstration and a self-generation per example, so "one more epoch of SFT" is not
   its equal. `sft-continued` takes the same number of optimiser steps and trained tokens, filled with further
   demonstrations: what it gains over `sft` is the compute's, and what a pairwise method gains over `sft-continued` is
   the method's.
3. `start` is in the table as a method that does not train, so that every difference from the given model has an
   interval too.

    python -m gsil_bench.compare --methods start,sft,sft-continued
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs, SelfPlay


def negative_log_likelihood(pair: PairLogProbs) -> Tensor:
    """−log π_θ(y|x) of the demonstrations: forward KL from the data, up to the data's entropy."""
    return -pair.policy_real_logps  # (pairs,)


START = Method(
    name="start",
    summary="The model as given, without any training.",
    loss=None,
    protocol=SelfPlay(rounds=0),
)

SFT = Method(
    name="sft",
    summary="Maximum likelihood of the demonstrations.",
    loss=negative_log_likelihood,
    training={"learning_rate": 1e-5},
    normalise="tokens",
    formula="−log π(real)",
)

SFT_CONTINUED = Method(
    name="sft-continued",
    summary="The control: maximum likelihood with the optimiser steps and trained tokens of a pairwise method.",
    loss=negative_log_likelihood,
    # The loss reads no self-generation; the batches are matched to their number of tokens.
    needs=frozenset({"generated"}),
    training={"learning_rate": 1e-5},
    normalise="tokens",
    batches="matched-demonstrations",
    formula="−log π(real)",
)
