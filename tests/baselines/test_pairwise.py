"""The pairwise logistic loss by hand, and that only the protocol separates SPIN from DPO."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from baselines.pairwise import DPO, SPIN, pairwise_logistic
from gsil_bench.methods import PairLogProbs

TOKENS = torch.tensor([5.0])


def _pair(policy_real: float, policy_generated: float, reference_real: float, reference_generated: float) -> PairLogProbs:
    values = (policy_real, policy_generated, reference_real, reference_generated)
    return PairLogProbs(*(torch.tensor([float(value)], requires_grad=True) for value in values), TOKENS, TOKENS)


def _gradients(pair: PairLogProbs) -> list[float]:
    vectors = (
        pair.policy_real_logps,
        pair.policy_generated_logps,
        pair.reference_real_logps,
        pair.reference_generated_logps,
    )
    return [float(vector.grad) for vector in vectors if vector.grad is not None]


def test_value_and_gradients_at_a_margin_of_4() -> None:
    """Log-ratios −2 − (−5) = 3 and −4 − (−3) = −1, margin 4. With beta = (log 3)/4 the logit is log 3, σ(log 3) = 3/4.

    Loss −log(3/4) = log(4/3) = 0.28768. d/dlogit = −(1 − 3/4) = −1/4, times beta = 0.27465: ∓0.068663, negative where a
    log-prob raises the margin (policy real, reference generated).
    """
    pair = _pair(-2, -4, -5, -3)

    loss = pairwise_logistic(pair, beta=math.log(3) / 4)
    loss.backward()

    assert loss.tolist() == pytest.approx([0.28768207], rel=1e-6)
    assert _gradients(pair) == pytest.approx([-0.0686633, 0.0686633, 0.0686633, -0.0686633], rel=1e-5)


def test_before_the_first_step_the_loss_is_log_2_and_pulls_with_half_of_beta() -> None:
    """Policy = reference: margin 0, σ(0) = 1/2, loss log 2 = 0.693147, gradients ∓beta/2 = ∓0.05 for beta 0.1."""
    pair = _pair(-7, -9, -7, -9)

    loss = pairwise_logistic(pair, beta=0.1)
    loss.backward()

    assert loss.tolist() == pytest.approx([0.69314718], rel=1e-6)
    assert _gradients(pair) == pytest.approx([-0.05, 0.05, 0.05, -0.05], rel=1e-6)


def test_a_hopeless_pair_has_a_finite_loss_and_the_full_pull() -> None:
    """Margin −1000 at beta 1: −log σ(−1000) = 1000 + log(1 + e^−1000) = 1000; gradients −1 and 1."""
    pair = _pair(-1000, 0, 0, 0)

    loss = pairwise_logistic(pair, beta=1.0)
    loss.backward()

    assert loss.tolist() == [1000.0]
    assert _gradients(pair)[:2] == [-1.0, 1.0]


def test_one_value_per_pair() -> None:
    """Logits log 3 and 0: losses log(4/3) and log 2, unaveraged."""
    zeros = torch.zeros(2)
    pair = PairLogProbs(torch.tensor([math.log(3), 0.0]), zeros, zeros, zeros, zeros, zeros)

    assert pairwise_logistic(pair, beta=1.0).tolist() == pytest.approx([0.28768207, 0.69314718], rel=1e-6)


def test_spin_and_dpo_have_one_loss_and_differ_in_protocol_and_needs() -> None:
    differences = {field.name for field in dataclasses.fields(SPIN) if getattr(SPIN, field.name) != getattr(DPO, field.name)}

    assert differences == {"name", "summary", "needs", "protocol", "paper"}
    assert (SPIN.protocol.opponent, SPIN.protocol.rounds) == ("previous", 2)
    assert (DPO.protocol.opponent, DPO.protocol.rounds) == ("initial", 1)
    assert DPO.needs - SPIN.needs == {"preferences"}
