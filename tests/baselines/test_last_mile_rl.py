"""The reward of last-mile RL by hand, and what its records ask for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from baselines.last_mile_rl import LAST_MILE_RL, LAST_MILE_RLOO, score_less_excess
from gsil_bench.errors import UserError
from gsil_bench.methods import TokenLogProbs, load_method, with_settings


def samples(scores: list[list[float]], real_lengths: list[float]) -> TokenLogProbs:
    """Scores of each sample's tokens, and the length of each one's demonstration."""
    lengths = torch.tensor([len(one) for one in scores])
    pair = torch.arange(len(scores)).repeat_interleave(lengths)
    position = torch.cat([torch.arange(len(one)) for one in scores])
    flat = torch.tensor([score for one in scores for score in one])
    more = {"scores": flat, "real_length": torch.tensor(real_lengths)[pair]}
    nan = torch.full_like(flat, torch.nan)
    return TokenLogProbs(nan, nan, pair, position, lengths[pair], len(scores), int(lengths.max()), more)


def test_the_reward_is_the_last_score_less_the_excess_length() -> None:
    """3 tokens against 2: 1.5 − ½ (3/2 − 1) = 1.25. 2 against 4 are shorter: −2. 4 against 1: 8 − ½ · 3 = 6.5; else 0."""
    seen = samples([[9.0, 9.0, 1.5], [9.0, -2.0], [9.0, 9.0, 9.0, 8.0]], [2.0, 4.0, 1.0])
    assert score_less_excess(seen, length_penalty=0.5).tolist() == [0, 0, 1.25, 0, -2, 0, 0, 0, 6.5]


def test_without_a_penalty_length_does_not_count() -> None:
    seen = samples([[0.0, 3.0]], [1.0])
    assert score_less_excess(seen, length_penalty=0.0).tolist() == [0, 3]


def test_an_answer_as_long_as_the_demonstration_costs_nothing_and_one_token_more_its_share() -> None:
    """|y| = 4 against 4: 0. 5 against 4: 2 (5/4 − 1) = ½."""
    seen = samples([[0.0] * 4, [0.0] * 5], [4.0, 4.0])
    assert score_less_excess(seen, length_penalty=2.0).tolist() == [0] * 8 + [-0.5]


def test_both_methods_have_one_reward_and_one_reward_model() -> None:
    """So that the reward model is trained once for both, and their difference is that of the baselines."""
    ppo, rloo = (load_method(name) for name in ("last-mile-rl", "last-mile-rloo"))
    assert (ppo, rloo) == (LAST_MILE_RL, LAST_MILE_RLOO)
    assert ppo.rollouts is not None
    assert dataclasses.replace(ppo.rollouts, baseline="leave-one-out") == rloo.rollouts
    assert (ppo.protocol, ppo.training, ppo.starts_from) == (rloo.protocol, rloo.training, rloo.starts_from)


def test_grpo_is_a_setting_and_the_value_head_belongs_to_ppo() -> None:
    assert with_settings(LAST_MILE_RLOO, {"baseline": "group"}).rollouts.baseline == "group"  # type: ignore[union-attr]
    for method, baseline in ((LAST_MILE_RL, "group"), (LAST_MILE_RLOO, "value")):
        with pytest.raises(UserError, match="value head"):
            with_settings(method, {"baseline": baseline})


def test_a_length_penalty_is_set_by_its_name() -> None:
    changed = with_settings(LAST_MILE_RL, {"length_penalty": "0.25"})
    assert changed.rollouts is not None
    assert changed.rollouts.settings == {"length_penalty": 0.25}
