"""Rewards of adversarial imitation, the gradients that they give, and the discriminator of tokens, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.adversarial import js_reward, occupancy_discrimination
from gsil_bench.errors import UserError
from gsil_bench.methods import Critic, PairLogProbs, Rollouts, TokenLogProbs, load_method, with_settings
from gsil_bench.training.policy_gradient import advantages

THREE = math.log(3)
SEVEN = math.log((1 + math.exp(7)) / 2)
NAMES = ["airl-reverse-kl", "gail-js", "airl-reverse-kl-tokens", "gail-js-tokens"]


def tokens_of(*answers: list[float], **more: list[float]) -> TokenLogProbs:
    """Answers whose tokens have these scores; log-probs of −1 that want a gradient."""
    lengths = [len(answer) for answer in answers]
    pair = torch.arange(len(answers)).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    logps = torch.full((sum(lengths),), -1.0, requires_grad=True)
    given = {"scores": [score for answer in answers for score in answer], **more}
    vectors = {name: torch.tensor(values, requires_grad=True) for name, values in given.items()}
    return TokenLogProbs(
        logps, logps.detach() * math.nan, pair, position, torch.tensor(lengths)[pair], len(answers), max(lengths), vectors
    )


def rollouts_of(name: str) -> Rollouts:
    rollouts = load_method(name).rollouts
    assert rollouts is not None
    return rollouts


def rewards_of(name: str, samples: TokenLogProbs) -> list[float]:
    rollouts = rollouts_of(name)
    rewards = rollouts.reward(samples, **rollouts.settings).detach()
    assert rewards.shape == samples.logps.shape
    return [float(reward) for reward in rewards]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("airl-reverse-kl", [0, 0, THREE, 0]),
        ("gail-js", [0, 0, math.log(4), math.log(2)]),
        ("airl-reverse-kl-tokens", [-THREE, 8, THREE, 0]),
        ("gail-js-tokens", [math.log(2 / 3), math.log((1 + math.exp(8)) / 2), math.log(2), 0]),
    ],
)
def test_rewards_by_hand(name: str, expected: list[float]) -> None:
    """Scores −log 3, 8, log 3 and, of a second answer, 0.

    Of whole answers only the last token's score counts, and it is paid there: l, or log(1 + e^l) = log 4 and log 2. Of tokens
    each its own: l, or log((1 + e^l)/2): log(4/3 / 2) = log(2/3), log(4/2) = log 2, log(2/2) = 0.
    """
    assert rewards_of(name, tokens_of([-THREE, 8.0, THREE], [0.0])) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_softplus_is_the_log_of_what_a_discriminator_leaves() -> None:
    """−log(1 − D) at D = 0.9, whose logit is log 9, is log 10; a sure "no" pays 0, a sure "yes" its logit, both finite."""
    samples = tokens_of([math.log(9)], [-200.0], [200.0])
    assert js_reward(samples).tolist() == pytest.approx([math.log(10), 0.0, 200.0], abs=1e-6)


# What the policy is taught by them.


def pulls(name: str, samples: TokenLogProbs, kl: float = 0.0) -> list[float]:
    """The gradient of the policy's loss by each token's log-prob, at the policy that drew the samples."""
    method, rollouts = load_method(name), replace(rollouts_of(name), kl=kl)
    assert method.loss is not None
    with torch.no_grad():
        advantage, _ = advantages(samples, rollouts.reward(samples, **rollouts.settings), samples.pairs, rollouts)
    side = replace(samples, more={"advantages": advantage, "sampled_logps": samples.logps.detach()})
    unread = torch.full((samples.pairs,), math.nan)
    losses = method.loss(PairLogProbs(*[unread] * 6, tokens=(side, side)), **method.settings)
    assert losses.shape == (samples.pairs,)
    (gradient,) = torch.autograd.grad(losses.sum(), samples.logps)
    return [float(value) for value in gradient]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("airl-reverse-kl", [-2 * THREE, -2 * THREE, 2 * THREE]),
        ("gail-js", [-THREE, -THREE, THREE]),
        ("airl-reverse-kl-tokens", [-(7 + 2 * THREE), -2 * THREE, 7 + 2 * THREE]),
        (
            "gail-js-tokens",
            [-(math.log1p(math.exp(7)) - math.log(2) + THREE), -THREE, math.log1p(math.exp(7)) - math.log(2) + THREE],
        ),
    ],
)
def test_every_token_is_pulled_by_what_its_answer_earns_from_there_on(name: str, expected: list[float]) -> None:
    """Two samples of a prompt, scores (7, log 3) and (−log 3). The pull is minus the advantage, each against the other's return.

    Whole answers, every token of one alike: log 3 − (−log 3), or log 4 − log(4/3) = log 3. Tokens, by what is still to come: 7 +
    log 3 against −log 3, then log 3 against −log 3, which the shorter one holds; or, with s = log((1 + e^7)/2), s + log 2 against
    log(2/3), then log 2 against log(2/3).
    """
    assert pulls(name, tokens_of([7.0, THREE], [-THREE])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_discriminator_that_cannot_tell_teaches_nothing(name: str) -> None:
    """Logits of 0 everywhere: with softplus each answer earns the same, and each token nothing, however long the answers are."""
    assert pulls(name, tokens_of([0.0] * 5, [0.0], [0.0] * 2)) == pytest.approx([0.0] * 8, abs=1e-7)


# The discriminator of tokens.


def of_scores(real: list[list[float]], generated: list[list[float]]) -> PairLogProbs:
    count = len(real)
    lengths = [torch.tensor([float(len(answer)) for answer in side]) for side in (real, generated)]
    unread = torch.full((count,), math.nan)
    return PairLogProbs(*[unread] * 4, *lengths, tokens=(tokens_of(*real), tokens_of(*generated)))


def slopes(losses: Tensor, pair: PairLogProbs) -> tuple[list[float], list[float]]:
    real, generated = torch.autograd.grad(losses.sum(), (pair.real.scores, pair.generated.scores))
    return real.tolist(), generated.tolist()


def test_discrimination_of_tokens_by_hand() -> None:
    """Demonstration (0, log 3), sample (0, 0, −log 3), H = 4: (3 log 2 + 2 log(4/3)) / 4.

    Slopes −σ(−l)/4 = −1/8 and −1/16 on demonstrated tokens, σ(l)/4 = 1/8, 1/8 and 1/16 on sampled ones.
    """
    pair = of_scores([[0.0, THREE]], [[0.0, 0.0, -THREE]])
    losses = occupancy_discrimination(pair, horizon=4)
    assert losses.tolist() == pytest.approx([(3 * math.log(2) + 2 * math.log(4 / 3)) / 4], rel=1e-6)
    real, generated = slopes(losses, pair)
    assert real == pytest.approx([-1 / 8, -1 / 16], rel=1e-6)
    assert generated == pytest.approx([1 / 8, 1 / 8, 1 / 16], rel=1e-6)


def test_a_token_that_both_sides_always_begin_with_has_the_logit_0() -> None:
    """Every answer begins with the same token: ρ_β = ρ_π = 1 there, so 0 must be the best logit. Demonstrations of 1 and 3
    tokens, samples of 2 and 4.

    Slopes at 0: −½ twice, and ½ twice. Means over each answer's own tokens would have −½ − ⅙ and ¼ + ⅛ there.
    """
    pair = of_scores([[0.0], [0.0] * 3], [[0.0] * 2, [0.0] * 4])
    real, generated = slopes(occupancy_discrimination(pair, horizon=1), pair)
    assert [real[0], real[1], generated[0], generated[2]] == pytest.approx([-0.5, -0.5, 0.5, 0.5])


@pytest.mark.parametrize("horizon", [0.0, -1.0])
def test_a_horizon_must_be_positive(horizon: float) -> None:
    with pytest.raises(UserError, match=r"occupancy_discrimination cannot be computed with horizon=.*: horizon must be above 0"):
        with_settings(load_method("gail-js-tokens"), {"critic_horizon": horizon})


@pytest.mark.parametrize("name", NAMES)
def test_the_discriminator_judges_what_the_reward_reads(name: str) -> None:
    """Who pays the last token only has a discriminator that is taught there only; the others have one taught at every token."""
    critic, every_token = rollouts_of(name).critic, name.endswith("tokens")
    assert isinstance(critic, Critic) and critic.alongside
    pair = of_scores([[0.0, 0.0]], [[0.0, 0.0, 0.0]])
    real, generated = slopes(critic.loss(pair, **critic.settings), pair)
    assert [slope < 0 for slope in real] == [every_token, True]
    assert [slope > 0 for slope in generated] == [every_token, every_token, True]
