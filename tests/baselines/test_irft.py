"""IRFT by hand, and the parts of the demonstrations that its stages have."""

from __future__ import annotations

import math

import pytest
import torch

from baselines.irft import IRFT, stage_logistic
from gsil_bench.methods import PairLogProbs


def test_irft_by_hand() -> None:
    """Log-ratios 3 and 1 at β = ½ log 3: the logit is log 3, the loss log(4/3); slopes ∓ ¼ · ½ log 3."""
    ones = torch.ones(1)
    real, generated = torch.tensor([-7.0]).requires_grad_(), torch.tensor([-19.0]).requires_grad_()
    pair = PairLogProbs(real, generated, -10 * ones, -20 * ones, ones, ones)
    beta = 0.5 * math.log(3)
    losses = stage_logistic(pair, beta=beta)
    assert losses.tolist() == pytest.approx([math.log(4 / 3)], rel=1e-5)
    slopes = torch.autograd.grad(losses.sum(), (real, generated))
    assert [float(slope) for slope in slopes] == pytest.approx([-beta / 4, beta / 4], rel=1e-5)


def test_its_stages_share_the_demonstrations_out() -> None:
    assert (IRFT.protocol.opponent, IRFT.protocol.rounds, IRFT.protocol.demonstrations) == ("previous", 5, "disjoint")
    assert IRFT.describe()["protocol"]["demonstrations"] == "disjoint"
