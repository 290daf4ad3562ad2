"""SimPO's loss by hand, and that it reads no reference."""

from __future__ import annotations

import math

import pytest
import torch
from support import policy_gradients, ratio_pairs

from baselines.simpo import mean_margin
from gsil_bench.methods import PairLogProbs


def test_value_and_gradient_by_hand() -> None:
    """log π = 2 − 10 = −8 over 4 tokens, mean −2, and −20 over 5, mean −4. β = 2, γ = 4 − log 3: the logit is 2 · 2 − γ = log 3.

    Loss −log(3/4) = log(4/3). d/dlogit = −¼, times β / length: −¼ · 2/4 = −⅛, and +¼ · 2/5 = 0.1.
    """
    pair = ratio_pairs([2.0], [0.0])
    losses = mean_margin(pair, beta=2.0, gamma=4 - math.log(3))
    assert losses.tolist() == pytest.approx([math.log(4 / 3)], rel=1e-5)
    assert policy_gradients(losses, pair) == pytest.approx([-0.125, 0.1], rel=1e-5)


def test_it_does_not_read_the_reference() -> None:
    """The pair of the test above, with a reference that is not known."""
    nan = torch.tensor([math.nan])
    one = PairLogProbs(torch.tensor([-8.0]), torch.tensor([-20.0]), nan, nan, torch.tensor([4.0]), torch.tensor([5.0]))
    assert mean_margin(one, beta=2.0, gamma=4 - math.log(3)).tolist() == pytest.approx([math.log(4 / 3)], rel=1e-5)


def test_an_empty_answer_has_a_finite_loss_and_gradient() -> None:
    """Its mean is 0: the logit is 2 · (−2 − 0) = −4, the loss log(1 + e⁴); d/dlogit = −σ(4), times 2/4 and −2/1."""
    zero = torch.zeros(1)
    sides = torch.tensor([-8.0], requires_grad=True), torch.zeros(1, requires_grad=True)
    one = PairLogProbs(*sides, zero, zero, torch.tensor([4.0]), zero)
    losses = mean_margin(one, beta=2.0, gamma=0.0)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(4))], rel=1e-5)
    slope = 1 / (1 + math.exp(-4))
    assert policy_gradients(losses, one) == pytest.approx([-slope / 2, 2 * slope], rel=1e-5)
