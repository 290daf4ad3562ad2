"""The on-policy source of batches: sample with the policy as it is, reward the samples, turn rewards into advantages.

    prompts → samples (the shared engine) → log-probs at sampling, under the reference, … → rewards → advantages → trees

A batch is made when the loop asks for it, every `updates` steps. All randomness of the samples follows from the run's seed, the
round and the step, so a resumed run draws what an uninterrupted one draws; the newest samples and a discriminator that learns
alongside are part of the saved state.

What is checked at every sampling: that the engine's log-probs are those that training computes (in fp32; `sampling_gap` in the
metrics is the largest difference of a sample, in nats), that rewards are finite, that the policy is not further from the
reference than `kl_limit`. What is flagged at the end: rewards that were all equal, a discriminator that told everything apart.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gsil_bench.generation.engine import Completion, Request, Sampling
from gsil_bench.generation.engines import Options, Served
from gsil_bench.methods import Method, TokenLogProbs
from gsil_bench.models import checkpoint
from gsil_bench.models.adapters import add_lora, merge_lora
from gsil_bench.models.packing import TokenTree, micro_batches
from gsil_bench.models.policy import Policy
from gsil_bench.training.batches import Branch, ShuffledSteps, Tree
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.critics import FORWARD_TOKENS, auc, critic_of, load_critic, load_head, save_head, token_scores
from gsil_bench.training.learner import Learner, TrainingError
from gsil_bench.training.policy_gradient import advantages
from gsil_bench.training.reference import exceeds_noise
from gsil_bench.training.sampler import Sampler
from gsil_bench.training.similarity import similarities

if TYPE_CHECKING:
    pass

CERTAIN = 0.999
"""A discriminator whose AUC on the newest samples is above it before it has seen them tells everything apart."""
CRITIC_FOLDER, SAMPLED_FOLDER = "critic", "sampled"
SEEDS_OF_RUN, SEEDS_OF_ROUND = 10**9, 10**6
"""Distance between the sampling seeds of two runs, and of two rounds: more than a round has steps. The first run's begin at one
such distance, above those of self-generations: a reward model was trained on these."""
EMPTY = Branch(())


@dataclass(frozen=True)
class Judges:
    """What rewards are made from, besides the policy."""

    reference: Policy | None = None
    """The policy that the round's reference is, frozen."""
    initial: Policy | None = None
    """The model that the whole run starts from, frozen."""
    critic: Policy | None = None
    """A reward model that was trained before."""
    discriminator: Learner | None = None
    """A critic that learns alongside."""
    adapter: Any = None
    """The discriminator's, where it is trained by one."""
    similarity: Callable[[Sequence[Tree]], list[list[float]]] | None = None
    """Of each sample to its tree's demonstration."""


class OnPolicySteps:
    """A round's batches; see the module."""

    def __init__(self, method: Method, prompts: ShuffledSteps, steps: int, sampler: Sampler, judges: Judges, seed: int) -> None:
        """Prepare.

        Args:
            prompts: which demonstrations are sampled from, one batch for each sampling.
            steps: optimiser steps of the round.
            seed: of the samples; another one in every round.
        """
        assert method.rollouts is not None, f"{method.name} does not sample"
        self.method, self.rollouts = method, method.rollouts
        self.line: Mapping[str, float] = {}
        self._prompts, self._steps, self._sampler, self._judges, self._seed = prompts, steps, sampler, judges, seed
        self._trees: list[Tree] = []
        self._batch: int | None = None
        """Index of the batch of prompts that the newest samples answer."""
        self._facts: dict[str, float] = {
            "sampling_seconds": 0.0, "reward_seconds": 0.0, "samplings": 0, "sampled_tokens": 0, "critic_tokens": 0,
            "equal_rewards": 0, "certain": 0, "gap": 0.0, "measured": 0,
        }  # fmt: skip

    def __len__(self) -> int:
        return self._steps

    def follow(self, policy: Policy, start: int) -> Iterator[list[Tree]]:
        """See LiveSteps."""
        every = self.rollouts.updates
        batches = list(self._prompts)  # a few lists of the same trees
        with closing(self._sampler):
            for step in range(start, self._steps):
                if self._batch != step // every:  # after a step that failed its samples are there: a critic has learnt from them
                    began = time.monotonic()
                    self._trees, self.line = self._sample(policy, batches[step // every], step)
                    self._batch = step // every
                    self._facts["reward_seconds"] += time.monotonic() - began
                    self._facts["samplings"] += 1
                yield self._trees

    def state_dict(self) -> dict[str, Any]:
        """The newest samples, the counters and the discriminator."""
        trees = [
            [tree.id, tree.prompt_ids, [[branch.completion_ids, dict(branch.of_tokens)] for branch in tree.generated]]
            for tree in self._trees
        ]
        learner = self._judges.discriminator
        critic = learner and learner.team.gather(learner.policy, learner.optimizer)
        return {"trees": trees, "batch": self._batch, "line": dict(self.line), "facts": self._facts, "critic": critic}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._trees = [
            Tree(name, tuple(prompt), EMPTY, tuple(Branch(tuple(ids), of_tokens=numbers) for ids, numbers in samples))
            for name, prompt, samples in state["trees"]
        ]
        self._batch, self.line, self._facts = state["batch"], state["line"], state["facts"]
        if learner := self._judges.discriminator:
            learner.team.scatter(learner.policy, learner.optimizer, *state["critic"])

    def finish(self, folder: Path) -> dict[str, Any]:
        """Keep the discriminator; facts and warnings of the round."""
        self._sampler.close()
        if learner := self._judges.discriminator:
            learner.policy.restore()
            model = merge_lora(self._judges.adapter) if self._judges.adapter is not None else learner.policy.model
            (folder / CRITIC_FOLDER).mkdir(exist_ok=True)
            model.save_pretrained(folder / CRITIC_FOLDER)
            save_head(learner.policy, folder / CRITIC_FOLDER)
        samplings = int(self._facts["samplings"])
        warnings = []
        if self._facts["equal_rewards"] == samplings:
            first = "; a discriminator's first scores are 0, so more steps are needed" if learner and samplings == 1 else ""
            warnings.append(f"every prompt's samples had equal rewards at every sampling: none was shown to be better{first}")
        if self._facts["certain"] > samplings / 2:
            warnings.append(
                f"the discriminator told samples from demonstrations without error at {int(self._facts['certain'])} "
                f"of {samplings} samplings: its scores then say that, not how to improve"
            )
        known = ("sampling_seconds", "reward_seconds", "samplings", "sampled_tokens", "critic_tokens")
        gap = self._facts["gap"] if self._facts["measured"] else None
        return {**{key: self._facts[key] for key in known}, "sampling_gap": gap, "sampling_warnings": warnings}

    def _sample(self, policy: Policy, prompts: Sequence[Tree], step: int) -> tuple[list[Tree], dict[str, float]]:
        """Samples of the policy with their advantages, and what there is to say about them."""
        k = self.method.protocol.samples
        requests = self._requests(prompts, step)
        began = time.monotonic()
        with policy.lent() as model:
            completions = self._sampler.complete(model, requests)
        taken = time.monotonic() - began
        self._facts["sampling_seconds"] += taken
        self._facts["reward_seconds"] -= taken
        for request, completion in zip(requests, completions, strict=True):
            if completion.finish_reason == "error" or not completion.tokens:
                raise TrainingError(
                    f"step {step + 1}: no answer was sampled: {completion.error or 'it is empty'} ({request.key[:8]})"
                )
        self._facts["sampled_tokens"] += sum(len(completion.tokens) for completion in completions)
        groups = [completions[start : start + k] for start in range(0, len(completions), k)]
        trees = [
            dataclasses.replace(tree, generated=tuple(Branch(completion.tokens) for completion in group))
            for tree, group in zip(prompts, groups, strict=True)
        ]
        samples, line = self._look(policy, trees, completions, step)
        rewards = self.rollouts.reward(samples, **self.rollouts.settings)  # (tokens,)
        self._check_rewards(rewards, samples, prompts, step)
        if self._judges.discriminator is not None:  # after the checks: a state that is kept has not learnt from what stopped it
            line |= self._teach(self._judges.discriminator, trees, step)
        self._facts["certain"] += max(line.get("discriminator_auc", 0), line.get("discriminator_token_auc", 0)) > CERTAIN
        self._facts["equal_rewards"] += _all_equal(samples.sum(rewards).view(-1, k))
        penalty = self.rollouts.kl * (samples.sampled_logps - samples.reference_logps) if self.rollouts.kl else 0.0
        advantage, returns = advantages(samples, rewards - penalty, k, self.rollouts)
        given = {
            "sampled_logps": samples.sampled_logps, "reference_logps": samples.reference_logps,
            "advantages": advantage, "returns": returns,
        }  # fmt: skip
        return self._with_numbers(trees, given), {**line, **self._rewards_line(rewards, samples)}

    def _requests(self, prompts: Sequence[Tree], step: int) -> list[Request]:
        """Samples of each prompt; one that several demonstrations of the batch share gets other ones for each."""
        k = self.method.protocol.samples
        sampling = Sampling(self.method.protocol.max_new_tokens, 1.0, seed=self._seed + step)
        drawn: Counter[tuple[int, ...]] = Counter()
        requests = []
        for prompt in (tree.prompt_ids for tree in prompts):
            requests += [Request(prompt, sampling, drawn[prompt] + sample, logps=True) for sample in range(k)]
            drawn[prompt] += k
        return requests

    def _look(
        self, policy: Policy, trees: Sequence[Tree], completions: Sequence[Completion], step: int
    ) -> tuple[TokenLogProbs, dict[str, float]]:
        """The samples as a reward sees them, and numbers about them for the metrics."""
        sampled = [TokenTree(tree.prompt_ids, tuple(branch.completion_ids for branch in tree.generated)) for tree in trees]
        logps, values = _numbers(policy, sampled, "values" in self.method.needs)
        engine = torch.tensor([number for completion in completions for number in completion.logps or ()])
        samples = _view([len(completion.tokens) for completion in completions], logps)
        ids = torch.tensor([token for completion in completions for token in completion.tokens])
        more: dict[str, Tensor] = {"ids": ids, "sampled_logps": logps, "values": values}
        gap = float(samples.sum(engine - logps).abs().max()) if len(engine) == len(logps) else math.nan
        self._check_gap(gap, step)
        judges, line = self._judges, {"sampling_gap": gap}
        if judges.reference is not None:
            more["reference_logps"] = _numbers(judges.reference, sampled)[0]
            line["kl"] = float(samples.sum(logps - more["reference_logps"]).mean())
            self._check_kl(line["kl"], step)
        if judges.initial is not None:
            more["initial_logps"] = _numbers(judges.initial, sampled)[0]
        if judges.critic is not None:
            more["scores"] = torch.cat(token_scores(judges.critic, sampled, FORWARD_TOKENS))
        if judges.discriminator is not None:
            more["scores"], seen = self._judge(judges.discriminator, trees, sampled)
            line |= seen
        if clip := self.rollouts.score_clip if "scores" in more else 0.0:
            more["scores"] = more["scores"].clamp(-clip, clip)
        per_sample = {
            "real_length": [float(len(tree.real.completion_ids)) for tree in trees for _ in tree.generated],
            "finished": [float(completion.finish_reason == "stop") for completion in completions],
        }
        if judges.similarity is not None:
            per_sample["similarity"] = [number for numbers in judges.similarity(trees) for number in numbers]
        more |= {name: torch.tensor(numbers)[samples.pair] for name, numbers in per_sample.items()}
        line |= {
            "sample_tokens": len(logps) / len(completions),
            "finished": sum(per_sample["finished"]) / len(completions),
            "sample_nll_per_token": -float(logps.mean()),
        }
        return dataclasses.replace(samples, more=more), line

    def _judge(self, learner: Learner, trees: Sequence[Tree], sampled: Sequence[TokenTree]) -> tuple[Tensor, dict[str, float]]:
        """The discriminator's scores of the samples, (tokens,), before it learns from them, and how well it tells them apart."""
        real = [TokenTree(tree.prompt_ids, (tree.real.completion_ids,)) for tree in trees]
        sides = [token_scores(learner.policy, side, FORWARD_TOKENS) for side in (real, sampled)]
        answers, tokens = ([[float(each[-1]) for each in side] for side in sides], [torch.cat(side).tolist() for side in sides])
        return torch.cat(sides[1]), {"discriminator_auc": auc(*answers), "discriminator_token_auc": auc(*tokens)}

    def _teach(self, learner: Learner, trees: Sequence[Tree], step: int) -> dict[str, float]:
        """Let the discriminator learn from the newest samples: for the rewards of the next ones."""
        updates = self.rollouts.critic.updates if self.rollouts.critic else 0
        losses = []
        for update in range(updates):
            line, finite = learner.update(trees, step * updates + update, learner.config.peak_learning_rate)
            if not finite:
                raise TrainingError(f"step {step + 1}: discriminator: {learner.trouble(step)}")
            losses.append(float(line["loss"]))
            self._facts["critic_tokens"] += sum(tree.tokens.positions(learner.layout) for tree in trees)
        return {"discriminator_loss": sum(losses) / max(1, len(losses))}

    def _check_gap(self, gap: float, step: int) -> None:
        if not math.isnan(gap):  # an engine may say nothing about some token
            self._facts["gap"], self._facts["measured"] = max(self._facts["gap"], gap), 1
        if self._sampler.is_exact and exceeds_noise(gap, 0.0):
            raise TrainingError(
                f"step {step + 1}: a sample's log-prob differs by {gap:.3g} nats between the engine that drew it and training: "
                "they do not compute the same policy"
            )

    def _check_kl(self, kl: float, step: int) -> None:
        limit = self.rollouts.kl_limit
        if not kl <= limit:
            raise TrainingError(
                f"step {step + 1}: the policy left its reference: {kl:.3g} nats per answer, kl_limit is {limit:g}; "
                f"raise kl (now {self.rollouts.kl:g}) or lower the learning rate"
            )

    def _check_rewards(self, rewards: Tensor, samples: TokenLogProbs, prompts: Sequence[Tree], step: int) -> None:
        k = self.method.protocol.samples
        if not isinstance(rewards, Tensor) or rewards.shape != samples.logps.shape or not rewards.is_floating_point():
            said = f"shape {tuple(rewards.shape)}, {rewards.dtype}" if isinstance(rewards, Tensor) else type(rewards).__name__
            raise TrainingError(f"the reward returned {said} for {len(samples.logps)} tokens, not a number for each")
        bad = samples.pair[~rewards.isfinite()].tolist()
        if bad:
            named = ", ".join(dict.fromkeys(prompts[sample // k].id for sample in bad[:5]))
            needs = ", ".join(sorted(self.rollouts.needs)) or "nothing"
            why = f"; it declares that it needs {needs}: is something missing?" if len(set(bad)) == samples.pairs else ""
            raise TrainingError(
                f"step {step + 1}: the reward is not finite for {len(set(bad))} samples (demonstrations {named}){why}"
            )

    def _rewards_line(self, rewards: Tensor, samples: TokenLogProbs) -> dict[str, float]:
        totals = samples.sum(rewards)
        return {"reward": float(totals.mean()), "reward_std": float(totals.std(correction=0))}

    def _with_numbers(self, trees: Sequence[Tree], given: Mapping[str, Tensor]) -> list[Tree]:
        """The samples as the loss takes them, without the demonstrations."""
        lengths = [len(branch.completion_ids) for tree in trees for branch in tree.generated]
        parts = {name: iter(torch.split_with_sizes(numbers, lengths)) for name, numbers in given.items()}
        return [
            Tree(
                tree.id,
                tree.prompt_ids,
                EMPTY,
                tuple(
                    Branch(branch.completion_ids, of_tokens={name: tuple(next(part).tolist()) for name, part in parts.items()})
                    for branch in tree.generated
                ),
            )
            for tree in trees
        ]


def _all_equal(totals: Tensor) -> bool:
    """Whether each prompt's samples have the same total, or where a prompt has but one, all prompts'; (prompts, samples)."""
    others = totals[:, :1] if totals.shape[1] > 1 else totals[:1]
    return bool((totals - others).abs().max() <= 1e-9)


@torch.no_grad()
def _numbers(policy: Policy, trees: Sequence[TokenTree], values: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probs of every token, and the scalar head before it (NaN if not asked for), on the CPU, (tokens,) each."""
    kept: dict[int, Tensor] = {}
    for group in micro_batches(trees, policy.layout, FORWARD_TOKENS):
        members = [trees[index] for index in group]
        found = policy(members, ("logps", "scalars") if values else ("logps",)).cpu().view(1 + values, -1)
        parts = torch.split_with_sizes(found, [tree.scored_tokens for tree in members], 1)
        kept |= dict(zip(group, parts, strict=True))
    table = torch.cat([kept[index] for index in range(len(trees))], 1)
    return table[0], table[1] if values else torch.full_like(table[0], math.nan)


def _view(lengths: Sequence[int], logps: Tensor) -> TokenLogProbs:
    """All samples as a loss's or reward's view of them."""
    counts = torch.tensor(lengths)
    pair = torch.arange(len(lengths)).repeat_interleave(counts)
    position = torch.arange(len(logps)) - (counts.cumsum(0) - counts)[pair]
    return TokenLogProbs(logps, torch.full_like(logps, math.nan), pair, position, counts[pair], len(lengths), max(lengths))


@dataclass(frozen=True)
class Company:
    """What a round of rollouts needs besides its own starting point, as folders and options."""

    engine: Options
    served: Served
    reference: Path
    """Of the round's reference."""
    initial: Path | None = None
    critic: Path | None = None
    """Of a reward model that was trained before."""

    def steps(self, method: Method, prompts: ShuffledSteps, start: Path, into: Path, seed: tuple[int, int]) -> OnPolicySteps:
        """A round's batches.

        Args:
            prompts: `steps` of it are optimiser steps of the round.
            start: of the checkpoint that the round starts from.
            into: the round's folder.
            seed: of the run, and the round's number.
        """
        rollouts, served = method.rollouts, self.served
        assert rollouts is not None, f"{method.name} does not sample"
        alongside = rollouts.critic is not None and rollouts.critic.alongside
        initial = self._frozen(self.initial) if self.initial else None
        discriminator, adapter = self._discriminator(method, start, seed[0]) if alongside else (None, None)
        judges = Judges(
            reference=self._frozen(self.reference),
            initial=initial if "initial" in rollouts.needs else None,
            similarity=partial(similarities, initial) if initial and "similarity" in rollouts.needs else None,
            critic=load_critic(self.critic, served.device, served.dtype, served.autocast) if self.critic else None,
            discriminator=discriminator,
            adapter=adapter,
        )
        batches = dataclasses.replace(prompts, steps=-(-prompts.steps // rollouts.updates))
        sampler = Sampler(self.engine, served, into / SAMPLED_FOLDER)
        return OnPolicySteps(
            method, batches, prompts.steps, sampler, judges, (seed[0] + 1) * SEEDS_OF_RUN + seed[1] * SEEDS_OF_ROUND
        )

    def _frozen(self, folder: Path) -> Policy:
        return Policy(checkpoint.load_model(folder, self.served.device, self.served.dtype), autocast=self.served.autocast)

    def _discriminator(self, method: Method, start: Path, seed: int) -> tuple[Learner, Any]:
        """A critic that learns alongside, from the round's starting point or from where the last round left it; its adapter."""
        kept, critic = start / CRITIC_FOLDER, critic_of(method)
        config = TrainConfig.of(critic.training, where=critic.name)
        model = checkpoint.load_model(kept if kept.is_dir() else start, self.served.device, self.served.dtype)
        adapter = add_lora(model, config.lora_rank, config.lora_alpha, seed=seed) if config.lora_rank else None
        learner = Learner(model, critic, seed, self.served.autocast)
        if kept.is_dir():
            load_head(learner.policy, kept)
        return learner, adapter
