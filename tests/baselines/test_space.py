"""SPACE's loss by hand, and that its optimum is the data at every prior ratio."""

from __future__ import annotations

import math

import pytest
import torch
from support import policy_gradients, ratio_pairs

from baselines.gsil import logistic
from baselines.space import SPACE, noise_contrastive
from gsil_bench.methods import PairLogProbs


def test_value_and_gradient_by_hand() -> None:
    """μ = 3, r = log 3, r' = 0: −log σ(log 3 − log 3) = log 2; −3 log σ(log 3) = 3 log(4/3), for σ(log 3) = 3/4.

    Gradients: −σ(0) = −½, and 3 σ(−log 3) = 3 · ¼ = ¾.
    """
    pair = ratio_pairs([math.log(3)], [0.0])
    losses = noise_contrastive(pair, prior_ratio=3.0)
    assert losses.tolist() == pytest.approx([math.log(2) + 3 * math.log(4 / 3)], rel=1e-5)
    assert policy_gradients(losses, pair) == pytest.approx([-0.5, 0.75], rel=1e-5)


def test_at_prior_ratio_one_it_is_gsils_logistic_loss() -> None:
    pair = ratio_pairs([0.5, -3.0, 40.0], [2.0, 0.0, -7.0])
    assert torch.equal(noise_contrastive(pair, prior_ratio=1.0), logistic(pair, scale=1.0, shift=0.0))


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_the_optimum_is_the_data_at_every_prior_ratio(ratio: float) -> None:
    """p log(1 + μ e^−r) + μ q log(1 + e^r / μ) is least where p (1 − s) = μ q s, s = σ(r − log μ): e^r = p/q. One outcome."""
    p, q = 0.3, 0.1
    grid = torch.linspace(-3, 5, 80001, dtype=torch.float64)
    zeros = torch.zeros_like(grid)
    pair = PairLogProbs(grid, grid, zeros, zeros, zeros, zeros)
    far = PairLogProbs(zeros + 1e9, grid, zeros, zeros, zeros, zeros)  # its real term is 0
    of_generated = noise_contrastive(far, ratio)
    objective = p * (noise_contrastive(pair, ratio) - of_generated) + q * of_generated
    assert float(grid[objective.argmin()]) == pytest.approx(math.log(p / q), abs=1e-3)


def test_it_plays_rounds_against_the_round_before() -> None:
    assert (SPACE.protocol.opponent, SPACE.protocol.rounds, SPACE.protocol.temperature) == ("previous", 2, 1.0)
