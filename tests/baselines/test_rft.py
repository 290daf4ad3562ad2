"""RFT by hand: the reward model's loss at every token from the first that differs, and the reward of the policy step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from baselines.rft import RFT, score_reward
from gsil_bench.methods import PairLogProbs, TokenLogProbs
from gsil_bench.training.critics import token_ranking


def side_of(scores: Tensor, ids: list[list[int]]) -> TokenLogProbs:
    """Completions of these token ids, with the score after each token."""
    lengths = torch.tensor([len(each) for each in ids])
    pair = torch.arange(len(ids)).repeat_interleave(lengths)
    position = torch.cat([torch.arange(int(length)) for length in lengths])
    more = {"scores": scores, "ids": torch.tensor([token for each in ids for token in each])}
    nothing = scores.detach() * math.nan
    return TokenLogProbs(nothing, nothing, pair, position, lengths[pair], len(ids), int(lengths.max()), more)


def pair_of(real: TokenLogProbs, generated: TokenLogProbs) -> PairLogProbs:
    nan = torch.full((real.pairs,), math.nan)
    return PairLogProbs(nan, nan, nan, nan, nan, nan, (real, generated))


LOG3 = math.log(3)


def test_the_loss_of_the_reward_model_by_hand() -> None:
    """First pair: tokens (7, 5, 9) against (7, 6). The first token is the same and does not count, whatever its scores. At the
    second log 3 − 0: −log σ(log 3) = log(4/3). At the third 0 against the last score of the shorter one, which is 0: log 2. The
    mean is (log 4/3 + log 2) / 2 = ½ log(8/3) = 0.490415. Slopes: −¼ · ½ and −½ · ½; of the other side's last ¼ · ½ + ½ · ½.
    Second pair: (4) against (8, 8), scores log 3 against 0 and then 2 log 3: log(4/3) and −log σ(−log 3) = log 4; mean
    ½ log(16/3) = 0.836988. Slopes: −⅛ − ⅜ of the one score that is held, and ⅛ and ⅜.
    """
    real = torch.tensor([50.0, LOG3, 0.0, LOG3]).requires_grad_()
    generated = torch.tensor([-50.0, 0.0, 0.0, 2 * LOG3]).requires_grad_()
    losses = token_ranking(pair_of(side_of(real, [[7, 5, 9], [4]]), side_of(generated, [[7, 6], [8, 8]])))
    assert losses.tolist() == pytest.approx([0.5 * math.log(8 / 3), 0.5 * math.log(16 / 3)], rel=1e-5)
    of_real, of_generated = torch.autograd.grad(losses.sum(), (real, generated))
    assert of_real.tolist() == pytest.approx([0.0, -1 / 8, -1 / 4, -1 / 2], abs=1e-6)
    assert of_generated.tolist() == pytest.approx([0.0, 3 / 8, 1 / 8, 3 / 8], abs=1e-6)


def test_an_answer_that_goes_on_differs_where_the_other_has_ended() -> None:
    """(1, 0) against (1): the second position counts although its id is 0: 0 − log 3, −log σ(−log 3) = log 4."""
    losses = token_ranking(pair_of(side_of(torch.tensor([5.0, 0.0]), [[1, 0]]), side_of(torch.tensor([LOG3]), [[1]])))
    assert losses.tolist() == pytest.approx([math.log(4)], rel=1e-6)


def test_equal_answers_cost_nothing() -> None:
    scores = torch.tensor([1.0, 2.0]).requires_grad_()
    losses = token_ranking(pair_of(side_of(scores, [[3, 4]]), side_of(torch.zeros(2), [[3, 4]])))
    assert losses.tolist() == [0.0]
    assert torch.autograd.grad(losses.sum(), scores)[0].tolist() == [0.0, 0.0]


def test_the_policy_is_paid_the_score_after_its_last_token() -> None:
    samples = side_of(torch.tensor([9.0, 0.5, -2.0]), [[1, 2], [3]])
    assert score_reward(samples).tolist() == [0.0, 0.5, -2.0]


def test_a_new_reward_model_each_round_against_the_policy_of_that_round() -> None:
    assert RFT.rollouts is not None and RFT.rollouts.critic is not None
    critic = RFT.rollouts.critic
    assert (critic.alongside, critic.positives, critic.negatives, critic.loss) == (
        False,
        "demonstrations",
        "policy",
        token_ranking,
    )
    assert RFT.protocol.rounds > 1
