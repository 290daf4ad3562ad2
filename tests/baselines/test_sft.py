"""SFT's loss by hand, and what its records ask for."""

from __future__ import annotations

import torch

from baselines.sft import SFT, SFT_CONTINUED, START, negative_log_likelihood
from gsil_bench.methods import PairLogProbs

NAN = torch.full((2,), float("nan"))


def test_loss_is_minus_the_log_prob_of_the_demonstration_and_reads_nothing_else() -> None:
    """log π = −3 and −0.5: losses 3 and 0.5, one each, not their mean. d(−x)/dx = −1."""
    policy_real = torch.tensor([-3.0, -0.5], requires_grad=True)

    losses = negative_log_likelihood(PairLogProbs(policy_real, NAN, NAN, NAN, NAN, NAN))
    losses.sum().backward()

    assert losses.tolist() == [3.0, 0.5]
    assert policy_real.grad is not None and policy_real.grad.tolist() == [-1.0, -1.0]


def test_only_the_start_does_not_train() -> None:
    assert not START.trains
    assert SFT.trains and SFT_CONTINUED.trains


def test_sft_needs_no_self_generations_and_its_control_needs_them_to_match_their_tokens() -> None:
    assert SFT.needs == frozenset()
    assert SFT_CONTINUED.needs == {"generated"}
    assert (SFT.batches, SFT_CONTINUED.batches) == ("pairs", "matched-demonstrations")


def test_the_control_differs_from_sft_in_its_batches_only() -> None:
    assert SFT_CONTINUED.loss is SFT.loss
    assert (SFT_CONTINUED.normalise, dict(SFT_CONTINUED.training)) == (SFT.normalise, dict(SFT.training))
