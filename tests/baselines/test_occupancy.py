"""The occupancy-weighted likelihood by hand, and that its weights are those of the divergence."""

from __future__ import annotations

import pytest
import torch
from support import token_pairs

from baselines.occupancy import occupancy_likelihood
from gsil_bench.errors import UserError
from gsil_bench.methods import load_method, with_settings


def test_value_and_gradient_by_hand() -> None:
    """Horizon 3: weights 1, ⅔, ⅓, so 1·3 + ⅔·6 + ⅓·9 = 10; a single token has weight 1. Gradient: minus the weights."""
    logps = torch.tensor([-3.0, -6.0, -9.0, -4.0], requires_grad=True)
    losses = occupancy_likelihood(token_pairs(logps), horizon=3)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([10.0, 4.0])
    assert logps.grad is not None and logps.grad.tolist() == pytest.approx([-1, -2 / 3, -1 / 3, -1])


def test_the_weights_are_those_of_the_divergence() -> None:
    """The mean over steps k of minus the log-prob of all tokens up to k: 2, 2 + 3 = 5 and 2 + 3 + 4 = 9, mean 16/3."""
    losses = occupancy_likelihood(token_pairs(torch.tensor([-2.0, -3.0, -4.0, -7.0])), horizon=3)
    assert losses.tolist() == pytest.approx([16 / 3, 7.0])


def test_the_horizon_is_one_for_all_answers() -> None:
    """Horizon 6, longer than any: 1·3 + ⅚·6 + ⅔·9 = 14 for three tokens, and 4 for one."""
    logps = torch.tensor([-3.0, -6.0, -9.0, -4.0])
    assert occupancy_likelihood(token_pairs(logps), horizon=6).tolist() == pytest.approx([14.0, 4.0])


@pytest.mark.parametrize("horizon", [0.0, -5.0])
def test_a_horizon_must_be_positive(horizon: float) -> None:
    with pytest.raises(UserError, match="horizon must be above 0"):
        with_settings(load_method("sft-occupancy"), {"horizon": horizon})


def test_tokens_after_the_horizon_do_not_count() -> None:
    """Horizon 2: weights 1, ½, 0, so 1·3 + ½·6 = 6."""
    logps = torch.tensor([-3.0, -6.0, -9.0, -4.0])
    assert occupancy_likelihood(token_pairs(logps), horizon=2).tolist() == pytest.approx([6.0, 4.0])
