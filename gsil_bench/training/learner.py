"""A policy, or a critic, that learns: one step is forward and backward passes over micro-batches, then the suite's only
`optimizer.step()`.

A step's trees are packed into micro-batches under a token budget. The step's loss is the sum over its pairs divided by the
whole step's count (examples or tokens), so micro-batches, layout and the number of processes change memory and rounding, not
the result. Nothing is read from the device but one number a step, which says that loss and gradient are finite.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gsil_bench.methods import OF_SCALARS, Method, PairLogProbs
from gsil_bench.models.flops import mfu, model_flops, peak_flops, tree_flops
from gsil_bench.models.noise import EmbeddingNoise
from gsil_bench.models.packing import micro_batches
from gsil_bench.models.policy import Policy
from gsil_bench.training import metrics
from gsil_bench.training.batches import Tree
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.optimizers import build_optimizer, trained_parameters
from gsil_bench.training.pairs import Scored, of_pairs, pair_logps
from gsil_bench.training.parallel import ALONE, Team
from gsil_bench.training.reference import exceeds_noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

DIVERGED = "training diverged, a lower learning rate may help"
NAMED_IDS = 5
"""Demonstrations that an error names at most."""


class TrainingError(RuntimeError):
    """Training cannot go on: a loss that is not finite, or log-ratios that are not zero at step 0."""


class Learner:
    """A model with the method that it is trained by, and the optimiser."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        seed: int = 0,
        autocast: bool = False,
        team: Team = ALONE,
        shadows: Sequence[Method] = (),
    ) -> None:
        """Prepare to train the model in place.

        Args:
            model: in eval mode: dropout stays off, policy and reference must agree.
            seed: of the noise on embeddings.
            autocast: matrix products in bf16 over fp32 weights.
            shadows: pairwise methods whose losses are logged beside the trained one's.
        """
        self.config = config = TrainConfig.of(method.training, where=method.name)
        self.method, self.seed, self.team, self.shadows, self.autocast = method, seed, team, shadows, autocast
        self.policy = Policy(model, config.layout, autocast, config.likelihood_temperature, bool(method.needs & OF_SCALARS))
        self.wrapped = team.wrap(self.policy)
        """The policy as the team wraps it."""
        self.optimizer = build_optimizer(
            self.policy.parameters(),
            config.optimizer,
            config.peak_learning_rate,
            (config.beta1, config.beta2),
            config.weight_decay,
        )
        self.layout = self.policy.layout
        self._flops, _ = model_flops(model.config)
        self._scored = Scored.of(method, config.likelihood_temperature)
        self._done: list[tuple[list[Tree], PairLogProbs, Tensor, Tensor]] = []
        """Micro-batches of the newest step: trees, log-probs, weights and losses of the pairs."""
        if config.gradient_checkpointing == "on":
            self.policy.recompute_activations()

    def update(self, trees: Sequence[Tree], step: int, rate: float) -> tuple[dict[str, Tensor], bool]:
        """One optimiser step, unless loss or gradient is not finite.

        Args:
            step: counted from 0.
            rate: the learning rate.

        Returns:
            The step's metrics, on the device; whether loss and gradient are finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        line, finite = self.accumulate(trees, step)
        if finite:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return line, finite

    def accumulate(self, trees: Sequence[Tree], step: int) -> tuple[dict[str, Tensor], bool]:
        """Add the gradient of the step's mean loss to the parameters and clip it.

        Args:
            step: counted from 0.

        Returns:
            The step's metrics, on the device; whether loss and gradient are finite.
        """
        line = self._accumulate_or_run_out(trees, step)
        if line is None:  # here the failed pass and its activations are gone, as they are not while its error is handled
            logger.warning("out of memory: from here on, activations are recomputed in the backward pass")
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.policy.recompute_activations()
            line = self._accumulate(trees, step)
        line["grad_norm"] = _clip(trained_parameters(self.optimizer), self.config.max_grad_norm)
        return line, math.isfinite(float(line["grad_norm"] + 0 * line["loss"]))  # the one number that is read: 0 * inf is NaN

    def _accumulate_or_run_out(self, trees: Sequence[Tree], step: int) -> dict[str, Tensor] | None:
        """As `_accumulate`; None where memory ran out and can be saved."""
        try:
            return self._accumulate(trees, step)
        except torch.OutOfMemoryError:
            if self.policy.recomputes or self.config.gradient_checkpointing != "auto" or self.team.size > 1:
                raise
            return None

    def _accumulate(self, trees: Sequence[Tree], step: int) -> dict[str, Tensor]:
        team = self.team
        real_tokens = sum(len(tree.real.completion_ids) for tree in trees)
        normaliser = self._normaliser(trees)
        groups = self._groups(trees)
        turns = -(-len(groups) // team.size)
        self._done.clear()
        for turn in range(turns):
            number = turn * team.size + team.rank
            members = [trees[index] for index in groups[number % len(groups)]]
            with team.accumulate(self.wrapped, last=turn + 1 == turns):
                pair, weights = pair_logps(self.wrapped, members, self._scored, self._noise(members, step))
                losses = self._losses(pair)  # (pairs,)
                idle = number >= len(groups)  # a repeated micro-batch: collectives need everybody, the sum does not
                share = (losses * weights).sum() * (0.0 if idle else team.size / normaliser)
                share.backward()  # type: ignore[no-untyped-call]
            self._done.append((members, pair.detached(), weights * (not idle), losses.detach()))
        return self._line(len(trees), normaliser, real_tokens)

    def _normaliser(self, trees: Sequence[Tree]) -> float:
        """What the step's summed loss is divided by."""
        if self.method.normalise == "examples":
            return len(trees)
        if self.method.normalise == "tokens":
            return sum(len(tree.real.completion_ids) for tree in trees)
        return sum(len(branch.completion_ids) / len(tree.generated) for tree in trees for branch in tree.generated)

    def _noise(self, trees: Sequence[Tree], step: int) -> EmbeddingNoise | None:
        """What is added to the trees' embeddings in a step."""
        alpha = self.config.embedding_noise
        return EmbeddingNoise(alpha, self.seed, step, tuple(tree.id for tree in trees)) if alpha else None

    def _groups(self, trees: Sequence[Tree]) -> list[list[int]]:
        """Micro-batches, as indices of trees."""
        config = self.config
        return micro_batches([tree.tokens for tree in trees], self.layout, config.micro_batch_tokens, config.micro_batch_trees)

    def _losses(self, pair: PairLogProbs) -> Tensor:
        """The method's loss of each pair."""
        assert self.method.loss is not None, f"{self.method.name} does not train"
        losses = self.method.loss(pair, **self.method.settings)
        if losses.shape != pair.policy_real_logps.shape:
            raise TrainingError(
                f"the loss returned shape {tuple(losses.shape)} for {len(pair.real_tokens)} pairs, not one value each"
            )
        return losses

    def _line(self, count: int, normaliser: float, real_tokens: int) -> dict[str, Tensor]:
        """Means over the step's demonstrations, on all ranks."""
        pair = metrics.concatenate([done[1] for done in self._done])
        weights, losses = torch.cat([done[2] for done in self._done]), torch.cat([done[3] for done in self._done])
        shadows = self.shadows if self.method.needs >= metrics.PAIRWISE else ()
        sums = metrics.step_sums(pair, weights, losses, shadows)
        totals = self.team.total(torch.stack(list(sums.values()))).unbind()
        means = {name: total / count for name, total in zip(sums, totals, strict=True)}
        nll = -means["real_logps"] * count / max(1, real_tokens)
        return {**means, "loss": means["loss"] * count / normaliser, "real_nll_per_token": nll}

    def flops(self, tree: Tree) -> float:
        """Useful FLOPs of a tree's forward and backward pass; NaN for a family whose cost is not known."""
        lengths = [len(branch.completion_ids) for branch in tree.branches]
        frozen = self.config.lora_rank > 0
        return tree_flops(self._flops, len(tree.prompt_ids), lengths, True, frozen=frozen) if self._flops else math.nan

    def utilisation(self, facts: Mapping[str, Any]) -> float | None:
        """Model-FLOPs utilisation of the round, where the device's peak is known."""
        if not torch.cuda.is_available() or not math.isfinite(facts["flops"]) or not facts["step_seconds"]:
            return None
        weights = next(self.policy.parameters())
        quantised = getattr(self.policy.model, "is_loaded_in_4bit", False)  # multiplied in bf16, whatever the embeddings are
        lower = self.autocast or self.team.casts or quantised
        dtype = "fp32" if weights.dtype == torch.float32 and not lower else "bf16"
        peak = peak_flops(torch.cuda.get_device_name(), dtype) if weights.is_cuda else None
        return mfu(facts["flops"], facts["step_seconds"], peak and peak * self.team.size)

    def trouble(self, step: int) -> str:
        """What is not finite in the newest step, and where."""
        here = [
            tree.id
            for members, _, _, losses in self._done
            for tree, loss in zip(of_pairs(members), losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        bad = list(dict.fromkeys(self.team.together(here)))
        if not bad:
            return f"the gradient is not finite at step {step + 1}; {DIVERGED}"
        needs = ", ".join(sorted(self.method.needs)) or "nothing"
        why = f"it declares that it needs {needs}: is something missing?" if step == 0 else DIVERGED
        named = ", ".join(bad[:NAMED_IDS]) + (", …" if len(bad) > NAMED_IDS else "")
        return f"the loss is not finite at step {step + 1}; {why} (demonstrations {named})"

    @torch.no_grad()
    def step_zero(self, trees: Sequence[Tree], noise_floor: float) -> float:
        """Largest |log-ratio| of the first step's sequences: zero where policy and reference are the same weights.

        Raises:
            TrainingError: it is more than the noise floor, in nats per sequence, allows.
        """
        groups = self._groups(trees)
        pairs = [pair_logps(self.wrapped, [trees[index] for index in group])[0] for group in groups]
        ratios = torch.cat([torch.cat((pair.real_log_ratios, pair.generated_log_ratios)) for pair in pairs])
        # A method may compare its demonstrations alone with the reference: NaN is not there, and no loss may use it.
        worst = float(ratios[~ratios.isnan()].abs().max()) if not ratios.isnan().all() else math.nan
        if exceeds_noise(worst, noise_floor):
            raise TrainingError(
                f"step 0: a log-ratio of {worst:.3g} nats where policy and reference are the same weights "
                f"(noise floor {noise_floor:.1g}); the reference log-probs do not belong to this policy"
            )
        return worst


def _clip(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Gradient norm before clipping, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
