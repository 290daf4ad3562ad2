"""GEM's loss by hand, its gradient against the game that the paper states, and the optimum."""

from __future__ import annotations

import math

import pytest
import torch
from support import four_tokens, from_logits, token_pairs
from torch import Tensor

from baselines.gem import GEM, tempered_likelihood
from gsil_bench.methods import PairLogProbs


def test_value_and_gradient_by_hand() -> None:
    """Logits (0, log 4), the second word, β = 1/2: softmax(z / β) = softmax(0, log 16) = (1, 16)/17.

    Loss −β log(16/17) = ½ log(17/16) = 0.0303123. Gradient softmax(z / β) − onehot = (1/17, −1/17); without the factor β it
    would be twice that.
    """
    z = torch.tensor([[0.0, math.log(4)]], requires_grad=True)
    nan = torch.full((1,), torch.nan)
    logps, _ = from_logits(z / 0.5, torch.tensor([1]))
    loss = tempered_likelihood(PairLogProbs(logps, nan, nan, nan, nan, nan, temperature=0.5))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.5 * math.log(17 / 16)], rel=1e-5)
    assert z.grad is not None and z.grad[0].tolist() == pytest.approx([1 / 17, -1 / 17], rel=1e-5)


@pytest.mark.parametrize("beta", [0.3, 0.7, 1.0])
def test_the_gradient_is_that_of_the_game_with_q_held_constant(beta: float) -> None:
    """−Σ_v q_v (log p_y − log p_v) with q = softmax(z / β): in its gradient, q − onehot(y), p's normaliser cancels."""
    z, targets = four_tokens()
    logps, _ = from_logits(z / beta, targets)
    (found,) = torch.autograd.grad(tempered_likelihood(token_pairs(logps, temperature=beta)).sum(), z)
    q, onehot = (z.detach() / beta).softmax(1), torch.nn.functional.one_hot(targets, 5)
    torch.testing.assert_close(found, q - onehot)
    game = -(q * (from_logits(z, targets)[0][:, None] - z.log_softmax(1))).sum()
    torch.testing.assert_close(torch.autograd.grad(game, z)[0], found)


def test_at_temperature_one_it_is_sft() -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    assert tempered_likelihood(token_pairs(logps)).tolist() == [6.0, 4.0]


def test_the_optimum_is_the_data_at_its_temperature() -> None:
    """softmax(z / β) = p, so π = softmax(z) ∝ p^β. p = (.81, .18, .01) at β = ½: (.9, .4243, .1) / 1.4243."""
    p = torch.tensor([0.81, 0.18, 0.01], dtype=torch.float64)
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    nan = torch.full((3,), torch.nan)
    optimiser = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        logps = (z / 0.5).log_softmax(0)
        value = (p * tempered_likelihood(PairLogProbs(logps, nan, nan, nan, nan, nan, temperature=0.5))).sum()
        value.backward()
        return value

    optimiser.step(objective)
    assert z.detach().softmax(0).tolist() == pytest.approx([0.9 / 1.424264, 0.424264 / 1.424264, 0.1 / 1.424264], abs=1e-5)


def test_the_temperature_is_said_in_one_place() -> None:
    """The loss has no setting of its own that could differ from the one that the log-probs were computed at."""
    assert GEM.training["likelihood_temperature"] == 0.7
    assert not GEM.settings and not GEM.needs
