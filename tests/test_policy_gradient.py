"""Advantages and the clipped loss, on numbers small enough to be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gsil_bench.methods import Baseline, PairLogProbs, Rollouts, TokenLogProbs
from gsil_bench.training.policy_gradient import actor_critic, advantages, clipped_policy_gradient, discounted_sums

LENGTHS = (3, 1)
"""Tokens of the two samples of a prompt."""


def view(logps: list[float], lengths: tuple[int, ...] = LENGTHS, **more: list[float]) -> TokenLogProbs:
    """Samples one after the other."""
    pair = [number for number, length in enumerate(lengths) for _ in range(length)]
    position = [place for length in lengths for place in range(length)]
    length = [length for length in lengths for _ in range(length)]
    numbers = torch.tensor(logps, requires_grad=True)
    given = {name: torch.tensor(values) for name, values in more.items()}
    index = [torch.tensor(values) for values in (pair, position, length)]
    return TokenLogProbs(numbers, torch.full_like(numbers, math.nan), *index, len(lengths), max(lengths), given)


def pair_of(samples: TokenLogProbs) -> PairLogProbs:
    sums = samples.sum(samples.logps)
    nothing = torch.full_like(sums, math.nan)
    return PairLogProbs(nothing, sums, nothing, nothing, nothing, nothing, (TokenLogProbs.unknown(sums), samples))


def settings(baseline: Baseline, **changes: float) -> Rollouts:
    return Rollouts(reward=_nothing, baseline=baseline, **changes)  # type: ignore[arg-type]


def _nothing(samples: TokenLogProbs) -> Tensor:
    return 0 * samples.logps


def test_discounted_sums_by_hand() -> None:
    """Rewards 1, 2, 4 at discount 1/2: 1 + 2/2 + 4/4 = 3, 2 + 4/2 = 4, 4."""
    assert discounted_sums(torch.tensor([[1.0, 2.0, 4.0]]), 0.5).tolist() == [[3.0, 4.0, 4.0]]


def test_no_baseline_leaves_the_returns() -> None:
    """Rewards 1, 2, 4 and 5: returns 7, 6, 4 and 5."""
    advantage, returns = advantages(view([0.0] * 4), torch.tensor([1.0, 2.0, 4.0, 5.0]), 2, settings("none"))
    assert advantage.tolist() == returns.tolist() == [7.0, 6.0, 4.0, 5.0]


def test_leave_one_out_of_a_reward_at_the_end_is_the_difference_to_the_others_mean() -> None:
    """Rewards at the end 2, 5, 11 of three samples: 2 − (5 + 11)/2 = −6, 5 − 6.5 = −1.5, 11 − 3.5 = 7.5, at each token."""
    samples = view([0.0] * 4, (2, 1, 1))
    advantage, _ = advantages(samples, torch.tensor([0.0, 2.0, 5.0, 11.0]), 3, settings("leave-one-out"))
    assert advantage.tolist() == [-6.0, -6.0, -1.5, 7.5]


def test_leave_one_out_compares_returns_at_the_same_token() -> None:
    """Returns 7, 6, 4 against 5: the short sample is over at tokens 1 and 2 and counts with 5 there."""
    advantage, _ = advantages(view([0.0] * 4), torch.tensor([1.0, 2.0, 4.0, 5.0]), 2, settings("leave-one-out"))
    assert advantage.tolist() == [2.0, 1.0, -1.0, -2.0]


def test_samples_of_another_prompt_do_not_matter() -> None:
    samples = view([0.0] * 4, (1, 1, 1, 1))
    for baseline in ("leave-one-out", "group"):
        one, _ = advantages(samples, torch.tensor([1.0, 3.0, 0.0, 8.0]), 2, settings(baseline))  # type: ignore[arg-type]
        other, _ = advantages(samples, torch.tensor([1.0, 3.0, 50.0, -9.0]), 2, settings(baseline))  # type: ignore[arg-type]
        assert one[:2].tolist() == other[:2].tolist() == ([-2.0, 2.0] if baseline == "leave-one-out" else [-1.0, 1.0])


def test_group_divides_by_the_standard_deviation() -> None:
    """Totals 7 and 5: mean 6, standard deviation of the population 1: +1 at the first one's three tokens, −1."""
    advantage, _ = advantages(view([0.0] * 4), torch.tensor([1.0, 2.0, 4.0, 5.0]), 2, settings("group"))
    assert advantage.tolist() == [1.0, 1.0, 1.0, -1.0]


def test_equal_rewards_give_no_advantage() -> None:
    for baseline in ("leave-one-out", "group"):
        advantage, _ = advantages(view([0.0] * 4), torch.tensor([0.0, 0.0, 5.0, 5.0]), 2, settings(baseline))  # type: ignore[arg-type]
        assert advantage.abs().max() == 0, baseline


def test_generalised_advantages_by_hand() -> None:
    """γ = 1/2, λ = 1/2; rewards 1, 2, 4, values 2, 4, 8; errors 1 + 4/2 − 2 = 1, 2 + 8/2 − 4 = 2, 4 − 8 = −4 (nothing follows).
    Advantages: −4; 2 − 4/4 = 1; 1 + 1/4 = 1.25. Returns are advantages plus values: 3.25, 5, 4. The other sample: reward 5,
    value 1, so 4 and 5.
    """
    samples = view([0.0] * 4, values=[2.0, 4.0, 8.0, 1.0])
    rewards = torch.tensor([1.0, 2.0, 4.0, 5.0])
    advantage, returns = advantages(samples, rewards, 2, settings("value", discount=0.5, gae_lambda=0.5))
    assert advantage.tolist() == [1.25, 1.0, -4.0, 4.0]
    assert returns.tolist() == [3.25, 5.0, 4.0, 5.0]


def test_without_a_baseline_advantages_are_returns() -> None:
    advantage, _ = advantages(view([0.0] * 4), torch.tensor([1.0, 2.0, 4.0, 5.0]), 1, settings("none"))
    assert advantage.tolist() == [7.0, 6.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # clipped at 1.2: the sample is likely enough
        (0.5, 2.0, -1.0, -1.0),  # not clipped: it became too unlikely
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_clipped_loss_and_its_gradient(ratio: float, advantage: float, loss: float, slope: float) -> None:
    """−min(ρA, clip(ρ, 0.8, 1.2) A); its slope in log π is −ρA where it is not clipped."""
    samples = view([math.log(ratio) - 3.0], (1,), sampled_logps=[-3.0], advantages=[advantage])
    value = clipped_policy_gradient(pair_of(samples), clip=0.2)
    (gradient,) = torch.autograd.grad(value.sum(), samples.logps)
    assert value.tolist() == pytest.approx([loss])
    assert gradient.tolist() == pytest.approx([slope], abs=1e-6)


def test_a_samples_tokens_add_up() -> None:
    """Ratios 1, so the losses are the negated sums of the advantages: −(1 + 2 + 3) and −4."""
    samples = view([-1.0, -2.0, -3.0, -4.0], sampled_logps=[-1.0, -2.0, -3.0, -4.0], advantages=[1.0, 2.0, 3.0, 4.0])
    assert clipped_policy_gradient(pair_of(samples), clip=0.2).tolist() == [-6.0, -4.0]


def test_the_value_loss_is_half_the_squared_error() -> None:
    """Values 1 and 3, returns 2 and 7: 0.1 · ½ · 1 and 0.1 · ½ · 16, with no advantage; slopes 0.1 (V − G) = −0.1 and −0.4."""
    samples = view([-1.0, -1.0], (1, 1), sampled_logps=[-1.0, -1.0], advantages=[0.0, 0.0], returns=[2.0, 7.0])
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    samples = TokenLogProbs(
        samples.logps,
        samples.normalisers,
        samples.pair,
        samples.position,
        samples.length,
        2,
        1,
        {**samples.more, "values": values},
    )
    losses = actor_critic(pair_of(samples), clip=0.2, value_coefficient=0.1)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    assert losses.tolist() == pytest.approx([0.05, 0.8])
    assert gradient.tolist() == pytest.approx([-0.1, -0.4])


def test_the_estimator_is_unbiased_for_every_baseline() -> None:
    """One prompt, one token, three answers of probabilities softmax(z), rewards 1, 2, 6. Over all ordered pairs of samples the
    mean of A ∇log π is the exact gradient of E[r], p_i (r_i − E r), without a baseline and with the others' mean. The group's
    standard deviation changes it, so "group" is not here.
    """
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    p, rewards = torch.softmax(logits, 0), torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    exact = p * (rewards - (p * rewards).sum())
    for baseline in ("leave-one-out", "none"):
        mean = torch.zeros(3, dtype=torch.float64)
        for one in range(3):
            for other in range(3):
                samples = view([0.0, 0.0], (1, 1))
                advantage, _ = advantages(samples, rewards[[one, other]], 2, settings(baseline))  # type: ignore[arg-type]
                scores = torch.eye(3, dtype=torch.float64)[[one, other]] - p  # ∇log π of each
                mean += p[one] * p[other] * (advantage[:, None] * scores).mean(0)
        torch.testing.assert_close(mean, exact, rtol=0, atol=1e-12)
