"""T-SPIN by hand: the two advantages, their weights on the three answers, and the first round, where two of them are one."""

from __future__ import annotations

import math

import pytest
import torch

from baselines.tspin import triplet_logistic
from gsil_bench.methods import PairLogProbs


def pair_of(real: float, generated: float, first: float | None) -> PairLogProbs:
    nan = torch.tensor([math.nan])
    sides = [None if value is None else torch.tensor([value]).requires_grad_() for value in (real, generated, first)]
    assert sides[0] is not None and sides[1] is not None
    return PairLogProbs(sides[0], sides[1], nan, nan, nan, nan, first_logps=sides[2])


def test_t_spin_by_hand() -> None:
    """α = ½, β = 3; log-probs −8, −8 − 2 log 3 and −8: current 2 log 3, historical −2 log 3, so the logits are ± log 3.
    log(4/3) + 3 log 4. Slopes: −½ · ¼ on the demonstration, ½ · ¼ − 3 · ½ · ¾ on the sample, 3 · ½ · ¾ on the first one.
    """
    pair = pair_of(-8.0, -8.0 - 2 * math.log(3), -8.0)
    losses = triplet_logistic(pair, alpha=0.5, beta=3.0)
    assert losses.tolist() == pytest.approx([math.log(4 / 3) + 3 * math.log(4)], rel=1e-5)
    answers = (pair.policy_real_logps, pair.policy_generated_logps, pair.policy_first_logps)
    slopes = torch.autograd.grad(losses.sum(), answers)
    assert [float(slope) for slope in slopes] == pytest.approx([-1 / 8, 1 / 8 - 9 / 8, 9 / 8], rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_in_the_first_round_the_second_term_moves_nothing(beta: float) -> None:
    """y₀ is y': β log 2 more, and the gradient of β = 0."""
    same = torch.tensor([-11.0]).requires_grad_()
    nan = torch.tensor([math.nan])
    real = torch.tensor([-10.0]).requires_grad_()
    pair = PairLogProbs(real, same, nan, nan, nan, nan, first_logps=same)
    with_it, without = (triplet_logistic(pair, alpha=1.0, beta=weight) for weight in (beta, 0.0))
    assert float((with_it - without).detach()) == pytest.approx(beta * math.log(2), rel=1e-5)
    slopes = [torch.autograd.grad(losses.sum(), (real, same), retain_graph=True) for losses in (with_it, without)]
    assert [float(slope) for slope in slopes[0]] == pytest.approx([float(slope) for slope in slopes[1]], rel=1e-6)


def test_without_a_first_rounds_sample_the_loss_is_nan() -> None:
    assert triplet_logistic(pair_of(-8.0, -9.0, None), alpha=1.0, beta=0.1).isnan().all()
