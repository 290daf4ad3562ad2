"""Learning from samples of the policy when something is wrong: rewards that are NaN or all equal, a discriminator that wins at
once, a policy that runs away. What stops keeps its state, and goes on from it as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from gsil_bench.data.chat import ChatFormat
from gsil_bench.generation.engine import Request, Sampling
from gsil_bench.generation.engines import Served
from gsil_bench.generation.transformers_engine import TransformersOptions
from gsil_bench.methods import Method, PairLogProbs, Rollouts, SelfPlay, TokenLogProbs, load_method, with_settings
from gsil_bench.models.checkpoint import load_model
from gsil_bench.training import loop, metrics, state
from gsil_bench.training.batches import Branch, ShuffledSteps, Tree
from gsil_bench.training.learner import TrainingError
from gsil_bench.training.policy_gradient import clipped_policy_gradient
from gsil_bench.training.rollouts import Company

STEPS, NEW_TOKENS = 6, 6
COUNTS = ("samplings", "sampled_tokens", "critic_tokens")


def first_tokens(samples: TokenLogProbs) -> Tensor:
    """A reward that samples differ in, without a critic: the log-prob of an answer's first token under the reference."""
    return samples.at_end(samples.sum(samples.reference_logps.masked_fill(samples.position > 0, 0.0)))


def the_same(samples: TokenLogProbs) -> Tensor:
    return samples.at_end(torch.full((samples.pairs,), 3.0))


def paid(reward: Callable[..., Tensor], **changes: object) -> Method:
    """A method that climbs a reward, two samples of each prompt."""
    method = Method(
        name="climber",
        summary="Climbs a reward.",
        loss=clipped_policy_gradient,
        settings={"clip": 0.2},
        needs=frozenset({"tokens"}),
        protocol=SelfPlay(opponent="initial", samples=2, max_new_tokens=NEW_TOKENS),
        rollouts=Rollouts(reward=reward, kl=0.0),
        training={"learning_rate": 1e-3, "batch_size": 4, "log_every": 1},
        normalise="generated-tokens",
    )
    return with_settings(method, changes)


def spoilt(method: Method, sampling: int) -> Method:
    """The method, but the first time that it is asked for the rewards of this sampling, one sample's reward is NaN."""
    assert method.rollouts is not None
    reward, asked = method.rollouts.reward, list[int]()

    def sometimes_nan(samples: TokenLogProbs) -> Tensor:
        asked.append(1)
        rewards = reward(samples)
        return rewards.masked_fill(samples.pair == 5, math.nan) if len(asked) == sampling else rewards

    return dataclasses.replace(method, rollouts=dataclasses.replace(method.rollouts, reward=sometimes_nan))


def spoilt_once(method: Method, step: int) -> Method:
    """The same with a policy's loss that is NaN at one step (counted from 1), and only the first time that it is taken."""
    loss, asked = method.loss, list[int]()
    assert loss is not None

    def sometimes_nan(pair: PairLogProbs, **settings: float) -> Tensor:
        asked.append(1)
        losses: Tensor = loss(pair, **settings)
        return losses * math.nan if len(asked) == step else losses

    return dataclasses.replace(method, loss=sometimes_nan)


def prompts(answers: Sequence[tuple[int, ...]]) -> list[Tree]:
    return [Tree(f"t{n}", (10 + n, 40 + n, 90 + n), Branch(answer)) for n, answer in enumerate(answers)]


SHORTCUT = prompts([(7,) * 5] * 8)
"""Demonstrations that any look tells from what an untrained model says."""


def train(folder: Path, method: Method, trees: Sequence[Tree], into: Path) -> tuple[Tensor, dict[str, object]]:
    """A round from the model as it is; its weights and its facts."""
    into.mkdir(exist_ok=True)
    chat, model = ChatFormat.of(AutoTokenizer.from_pretrained(folder)), load_model(folder)
    served = Served(
        folder, lambda: model, chat.end_token_ids, 256, chat.decode, "cpu", "fp32", False, chat.tokens, chat.spell
    )  # fmt: skip
    batches = ShuffledSteps(trees, 4, STEPS, (0, 0))
    steps = Company(TransformersOptions(), served, folder).steps(method, batches, folder, into, (0, 0))
    _, facts = loop.train(model, method, loop.Schedule(steps), into)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), facts


def untrained(folder: Path) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in load_model(folder).parameters()])


def lines_of(folder: Path) -> list[dict[str, float]]:
    return metrics.read_metrics(folder / metrics.FILE)


# Stopped, with the reason, and the state is kept.


def test_a_reward_that_is_not_finite_stops_with_the_reason_and_keeps_the_state(tiny_model: Path, tmp_path: Path) -> None:
    """It is NaN at the third sampling, of sample 5: the second one of the step's third demonstration. Two steps are done and
    kept; the same command goes on from there and ends where a run without the NaN ends.
    """
    whole, _ = train(tiny_model, paid(first_tokens), SHORTCUT, tmp_path / "whole")
    stopped, method = tmp_path / "stopped", spoilt(paid(first_tokens), 3)
    third = list(ShuffledSteps(SHORTCUT, 4, STEPS, (0, 0)))[2][2].id
    with pytest.raises(TrainingError, match=rf"step 3: the reward is not finite for 1 samples \(demonstrations {third}\)"):
        train(tiny_model, method, SHORTCUT, stopped)
    assert torch.load(stopped / state.FILE, weights_only=True)["step"] == 2
    assert [line["step"] for line in lines_of(stopped)] == [1, 2]

    resumed, _ = train(tiny_model, method, SHORTCUT, stopped)
    assert not torch.equal(resumed, untrained(tiny_model))
    assert torch.equal(resumed, whole)
    assert (stopped / metrics.FILE).read_text() == (tmp_path / "whole" / metrics.FILE).read_text()


@pytest.mark.parametrize("name", ["airl-reverse-kl", "gail-js-tokens"])
def test_a_discriminator_goes_on_from_a_kept_state_too(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """As above, with a discriminator that has learnt for two steps. It has seen the third step's samples when their reward is
    NaN: the step is taken again from the start, and the discriminator must not have learnt from them twice.
    """
    method = adversarial(name, critic_learning_rate=1e-3)
    whole, _ = train(tiny_model, method, SHORTCUT, tmp_path / "whole")
    stopping = spoilt(method, 3)
    with pytest.raises(TrainingError, match="step 3: the reward is not finite"):
        train(tiny_model, stopping, SHORTCUT, tmp_path / "stopped")
    resumed, _ = train(tiny_model, stopping, SHORTCUT, tmp_path / "stopped")
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", ["airl-reverse-kl", "gail-js-tokens"])
def test_a_policy_whose_loss_is_not_finite_goes_on_with_the_samples_that_it_had(
    tiny_model: Path, tmp_path: Path, name: str, updates: int
) -> None:
    """The discriminator has learnt from the third step's samples when the policy's loss is NaN. Taken again, the step has the
    same samples with the scores of before: neither is the discriminator taught twice, nor is anything counted twice.
    """
    method = adversarial(name, critic_learning_rate=1e-3, critic_updates=2, updates=updates)
    whole, expected = train(tiny_model, method, SHORTCUT, tmp_path / "whole")
    stopping = spoilt_once(method, 3)
    with pytest.raises(TrainingError, match="not finite at step 3"):
        train(tiny_model, stopping, SHORTCUT, tmp_path / "stopped")
    resumed, facts = train(tiny_model, stopping, SHORTCUT, tmp_path / "stopped")
    assert torch.equal(resumed, whole)
    assert [facts[key] for key in COUNTS] == [expected[key] for key in COUNTS]
    assert (tmp_path / "stopped" / metrics.FILE).read_text() == (tmp_path / "whole" / metrics.FILE).read_text()


def test_a_policy_that_leaves_its_reference_is_stopped(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing holds it, its rate is high: before the answers are 2 nats away it stops, and says what to change. A run whose limit
    is higher goes on from the state.
    """
    method = paid(first_tokens, learning_rate=3e-2, kl_limit=2)
    with pytest.raises(
        TrainingError, match=r"step \d: the policy left its reference: .* nats per answer, kl_limit is 2; raise kl"
    ):
        train(tiny_model, method, SHORTCUT, tmp_path)
    done = lines_of(tmp_path)
    assert 1 <= len(done) < STEPS
    assert max(line["kl"] for line in done) <= 2
    assert torch.load(tmp_path / state.FILE, weights_only=True)["step"] == len(done)

    train(tiny_model, with_settings(method, {"kl_limit": 1e6}), SHORTCUT, tmp_path)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert lines_of(tmp_path)[len(done)]["kl"] > 2


# Flagged in the result.


def test_equal_rewards_teach_nothing_and_are_flagged(tiny_model: Path, tmp_path: Path) -> None:
    """Every advantage against the prompt's other sample is 0: the weights stay as they are, to the bit."""
    weights, facts = train(tiny_model, paid(the_same), SHORTCUT, tmp_path / "same")
    assert torch.equal(weights, untrained(tiny_model))
    assert facts["sampling_warnings"] == [
        "every prompt's samples had equal rewards at every sampling: none was shown to be better"
    ]
    _, facts = train(tiny_model, paid(first_tokens), SHORTCUT, tmp_path / "other")
    assert facts["sampling_warnings"] == []


def adversarial(name: str, **changes: object) -> Method:
    own = {"samples": 2, "max_new_tokens": NEW_TOKENS, "batch_size": 4, "log_every": 1, "learning_rate": 1e-5}
    return with_settings(load_method(name), {**own, **changes})


@pytest.mark.parametrize("name", ["airl-reverse-kl", "gail-js", "airl-reverse-kl-tokens", "gail-js-tokens"])
def test_a_discriminator_that_wins_at_once_is_flagged(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """Demonstrations say one word five times. The discriminator knows nothing at first (all scores 0, AUC ½) and everything after
    some updates, while the policy hardly moves: from then on its AUC before each update is 1.
    """
    _, facts = train(tiny_model, adversarial(name, critic_learning_rate=1e-2, critic_updates=10), SHORTCUT, tmp_path)
    told = [line["discriminator_auc"] for line in lines_of(tmp_path)]
    assert told[0] == 0.5
    certain = sum(value > 0.999 for value in told)
    assert certain > STEPS / 2
    assert facts["sampling_warnings"] == [
        f"the discriminator told samples from demonstrations without error at {certain} of {STEPS} samplings: "
        "its scores then say that, not how to improve"
    ]


def test_a_discriminator_that_has_nothing_to_find_is_not_flagged(tiny_model: Path, tmp_path: Path) -> None:
    """Demonstrations that are samples of the model itself."""
    chat, model = ChatFormat.of(AutoTokenizer.from_pretrained(tiny_model)), load_model(tiny_model)
    served = Served(
        tiny_model, lambda: model, chat.end_token_ids, 256, chat.decode, "cpu", "fp32", False, chat.tokens, chat.spell
    )  # fmt: skip
    requests = [Request(tree.prompt_ids, Sampling(NEW_TOKENS, 1.0, seed=99)) for tree in SHORTCUT]
    answers = dict(TransformersOptions().make(served).complete(requests))
    own = prompts([answers[n].tokens for n in range(len(SHORTCUT))])
    _, facts = train(tiny_model, adversarial("airl-reverse-kl", critic_learning_rate=1e-3), own, tmp_path)
    assert facts["sampling_warnings"] == []
    assert max(line["discriminator_auc"] for line in lines_of(tmp_path)) < 0.95


def test_scores_are_clipped_before_they_are_rewards(tiny_model: Path, tmp_path: Path) -> None:
    """With a sure discriminator and a clip of 0.25, whole answers are paid −0.25 to 0.25 and no more; without, more."""
    rewards = {}
    for clip in (0.25, 0):
        method = adversarial("airl-reverse-kl", critic_learning_rate=1e-2, critic_updates=10, score_clip=clip)
        train(tiny_model, method, SHORTCUT, tmp_path / str(clip))
        rewards[clip] = [line["reward"] for line in lines_of(tmp_path / str(clip))]
    assert min(rewards[0.25]) == -0.25
    assert min(rewards[0]) < -1


def test_a_stop_leaves_no_metrics_ahead_of_the_state(tiny_model: Path, tmp_path: Path) -> None:
    """NaN at the very first sampling: no step is done, the state says so, and the same command trains all of it."""
    method = spoilt(paid(first_tokens), 1)
    with pytest.raises(TrainingError, match="step 1: the reward is not finite"):
        train(tiny_model, method, SHORTCUT, tmp_path)
    assert torch.load(tmp_path / state.FILE, weights_only=True)["step"] == 0
    train(tiny_model, method, SHORTCUT, tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path / metrics.FILE).read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
