"""Dense-Path REINFORCE by hand: the reward of each token, what it is credited with, and where it leads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from baselines.dense_path import DENSE_PATH, path_reward
from gsil_bench.errors import UserError
from gsil_bench.methods import PairLogProbs, TokenLogProbs, with_settings
from gsil_bench.training.policy_gradient import advantages


def samples_of(start: list[float], given: list[float], lengths: tuple[int, ...]) -> TokenLogProbs:
    """Samples one after the other, with log-probs under π_SFT and under the model as given; −1½ under the policy."""
    counts = torch.tensor(lengths)
    pair = torch.arange(len(lengths)).repeat_interleave(counts)
    position = torch.cat([torch.arange(length) for length in lengths])
    own, nothing = torch.full((len(start),), -1.5), torch.full((len(start),), torch.nan)
    more = {"reference_logps": torch.tensor(start), "initial_logps": torch.tensor(given), "sampled_logps": own}
    return TokenLogProbs(own, nothing, pair, position, counts[pair], len(lengths), max(lengths), more)


def test_the_reward_is_what_sft_has_added_to_each_token() -> None:
    """−1 − (−3) = 2, −2 − (−1) = −1, −½ − (−1) = ½."""
    samples = samples_of([-1.0, -2.0, -0.5], [-3.0, -1.0, -1.0], (2, 1))
    assert path_reward(samples, reward_limit=0.0).tolist() == [2.0, -1.0, 0.5]
    assert path_reward(samples, reward_limit=0.75).tolist() == [0.75, -0.75, 0.5]


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"reward_limit must be 0 \(none\) or more"):
        with_settings(DENSE_PATH, {"reward_limit": -1.0})


def test_a_token_is_credited_with_what_follows_less_the_other_sample_there() -> None:
    """Rewards (2, −1) and (½): returns (1, −1) and (½), which is held at the second token. Leave-one-out of two samples:
    1 − ½ = ½, −1 − ½ = −3/2, and ½ − 1 = −½. The gradient of the loss in log π is minus that.
    """
    samples = samples_of([-1.0, -2.0, -0.5], [-3.0, -1.0, -1.0], (2, 1))
    assert DENSE_PATH.rollouts is not None and DENSE_PATH.loss is not None
    found, returns = advantages(samples, path_reward(samples, 0.0), 2, DENSE_PATH.rollouts)
    assert found.tolist() == [0.5, -1.5, -0.5]
    assert returns.tolist() == [1.0, -1.0, 0.5]
    logps = samples.logps.clone().requires_grad_()
    nan = torch.full((2,), torch.nan)
    seen = dataclasses.replace(samples, logps=logps, more={**samples.more, "advantages": found})
    pair = PairLogProbs(nan, nan, nan, nan, nan, nan, (TokenLogProbs.unknown(nan), seen))
    (gradient,) = torch.autograd.grad(DENSE_PATH.loss(pair, **DENSE_PATH.settings).sum(), logps)
    assert gradient.tolist() == [-0.5, 1.5, 0.5]


@pytest.mark.parametrize("kl", [0.5, 2.0])
def test_the_optimum_makes_the_step_of_sft_again(kl: float) -> None:
    """Σ_a π (log π_SFT − log π_ref) − kl · KL(π ‖ π_SFT) over three answers is greatest at π ∝ π_SFT (π_SFT / π_ref)^{1/kl}."""
    sft, given = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.5])
    wanted = sft * (sft / given) ** (1 / kl)
    wanted = wanted / wanted.sum()
    samples = samples_of(sft.log().tolist(), given.log().tolist(), (1, 1, 1))
    rewards = path_reward(samples, 0.0)

    def objective(logits: Tensor) -> Tensor:
        policy = logits.softmax(0)
        return (policy * rewards).sum() - kl * (policy * (policy.log() - sft.log())).sum()

    logits = wanted.log().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(logits), logits)
    assert float(gradient.abs().max()) < 1e-6
    assert float(objective(wanted.log())) > max(float(objective(wanted.log() + 0.1 * step)) for step in torch.eye(3))
    assert (torch.autograd.grad(objective(start := sft.log().requires_grad_()), start)[0].abs() > 1e-3).all()
