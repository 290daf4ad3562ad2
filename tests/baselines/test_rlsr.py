"""RLSR by hand: the cosine is paid once, and only differences between a prompt's samples count."""

from __future__ import annotations

import math

import pytest
import torch

from baselines.rlsr import RLSR, similarity_reward
from gsil_bench.methods import TokenLogProbs
from gsil_bench.training.policy_gradient import advantages


def samples_of(similarity: list[float]) -> TokenLogProbs:
    """Samples of two tokens each."""
    count = len(similarity)
    numbers, pair = torch.tensor(similarity).repeat_interleave(2), torch.arange(count).repeat_interleave(2)
    logps, position = torch.zeros(2 * count), torch.arange(2).repeat(count)
    return TokenLogProbs(logps, logps, pair, position, torch.full_like(pair, 2), count, 2, {"similarity": numbers})


def test_the_similarity_is_paid_at_the_last_token() -> None:
    assert similarity_reward(samples_of([0.5, -1.0])).tolist() == [0.0, 0.5, 0.0, -1.0]


@pytest.mark.parametrize("level", [0.0, 0.9])
def test_advantages_are_those_of_the_group(level: float) -> None:
    """Cosines c and c + 0.08: mean c + 0.04, standard deviation 0.04, so −1 and +1 at both tokens, whatever c is."""
    assert RLSR.rollouts is not None and math.isclose(RLSR.rollouts.discount, 1.0)
    samples = samples_of([level, level + 0.08])
    found, _ = advantages(samples, similarity_reward(samples), 2, RLSR.rollouts)
    assert found.tolist() == pytest.approx([-1.0, -1.0, 1.0, 1.0], rel=1e-4)
