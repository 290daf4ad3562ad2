"""The training loop: the only `optimizer.step()` of the suite. It never asks a method's name.

A step's trees are packed into micro-batches under a token budget. The step's loss is the sum over its pairs divided by the
whole step's count (examples or tokens), so micro-batches, layout and the number of processes change memory and rounding, not
the result. Before the first step of a round that starts from its reference, every log-ratio must be 0 up to rounding (ten times
the measured noise floor, a thousandth of a nat at least); a larger one stops the run. State is saved at step boundaries; a
resumed run repeats the steps of an uninterrupted one exactly. Nothing is read from the device but one number a step, which says
that loss and gradient are finite (and with several processes two more, whether to stop or to save); metrics are read every
`log_every` steps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from gsil_bench.methods import OF_TOKENS, Method, PairLogProbs, TokenLogProbs
from gsil_bench.models.flops import mfu, model_flops, peak_flops, tree_flops
from gsil_bench.models.noise import EmbeddingNoise
from gsil_bench.models.packing import micro_batches, to_device
from gsil_bench.models.policy import Policy
from gsil_bench.training import metrics
from gsil_bench.training.batches import Steps, Tree
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.metrics import MetricsLog
from gsil_bench.training.optimizers import build_optimizer, trained_parameters
from gsil_bench.training.parallel import ALONE, Team
from gsil_bench.training.reference import exceeds_noise
from gsil_bench.training.state import load_state, save_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SAVE_EVERY_SECONDS = 30.0
SAVING_SHARE = 20.0
"""A save is followed by at least so many times its own duration of training: large models are not saved all the time."""
DIVERGED = "training diverged, a lower learning rate may help"
NAMED_IDS = 5
"""Demonstrations that an error names at most."""


class TrainingError(RuntimeError):
    """Training cannot go on: a loss that is not finite, or log-ratios that are not zero at step 0."""


@dataclass(frozen=True)
class Schedule:
    """What one round trains on, in order."""

    steps: Steps
    """Iterated from the start each time: a resumed run skips what it had done."""
    noise_floor: float | None = None
    """Of the reference, in nats per sequence; None if the round does not start from its reference."""
    seed: int = 0
    """Of the generators, for a loss that draws noise."""


@dataclass(frozen=True)
class Surroundings:
    """What a round is run with, besides what it trains: nothing here changes the weights beyond rounding."""

    advance: Callable[[int], None] = lambda done: None
    """Called with the steps done since the last call; may raise to stop, the state is saved first."""
    save_every_seconds: float = SAVE_EVERY_SECONDS
    autocast: bool = False
    """Matrix products in bf16 over fp32 weights."""
    shadows: tuple[Method, ...] = ()
    """Pairwise methods whose losses are logged beside the trained one's."""
    track: Callable[[Mapping[str, float], int], None] = lambda values, step: None
    """A tracker that is given every line of metrics."""
    team: Team = ALONE


def train(
    model: PreTrainedModel, method: Method, schedule: Schedule, folder: Path, run: Surroundings = Surroundings()
) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Train the model in place for one round; `folder` keeps metrics and the state to resume from, which the caller removes when
    the weights are safe.

    Args:
        model: the round's starting point, in eval mode: dropout stays off, policy and reference must agree.

    Returns:
        The whole weights where the model holds a part of them only, otherwise None; and facts of the round: steps, tokens
        (positions computed), scored tokens, step-0 log-ratio, layout and why it is no faster one.

    Raises:
        TrainingError: see the class.
    """
    config, team = TrainConfig.of(method.training, where=method.name), run.team
    policy = Policy(model, config.layout, run.autocast, config.likelihood_temperature)
    wrapped = team.wrap(policy)
    optimizer = build_optimizer(
        policy.parameters(), config.optimizer, config.peak_learning_rate, (config.beta1, config.beta2), config.weight_decay
    )
    work = _Work(policy, wrapped, optimizer, method, config, run, schedule.seed)
    random.seed(schedule.seed)
    torch.manual_seed(schedule.seed)
    start, facts = load_state(team, policy, optimizer, folder)
    if start == 0:
        facts = {"step_zero": work.step_zero(schedule), "tokens": 0, "scored_tokens": 0, "flops": 0.0, "step_seconds": 0.0}
    log = MetricsLog(folder / metrics.FILE, config.log_every, run.track, writes=team.rank == 0)
    clock = _Clock(run.save_every_seconds)
    run.advance(start)
    with log:
        for step, trees in enumerate(islice(schedule.steps, start, None), start):
            started = time.monotonic()
            rate = learning_rate(config, step, len(schedule.steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            line, finite = work.accumulate(trees, step)
            if not finite:
                log.flush()  # first: a state must not be ahead of its metrics
                save_state(team, policy, optimizer, folder, step, facts)
                raise TrainingError(work.trouble(step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.add({"step": step + 1, "learning_rate": rate, **line})
            facts["tokens"] += sum(tree.tokens.positions(policy.layout) for tree in trees)
            facts["scored_tokens"] += sum(tree.scored_tokens for tree in trees)
            facts["flops"] += sum(map(work.flops, trees))
            facts["step_seconds"] += time.monotonic() - started
            interruption, due = _advance(run, team, clock.is_due())
            if interruption or due:
                log.flush()
                with clock:
                    save_state(team, policy, optimizer, folder, step + 1, facts)
            if interruption:
                raise interruption
    if not team.all_finite(policy):
        raise TrainingError(f"weights are not finite after the last step; {DIVERGED}")
    policy.restore()
    facts |= {"steps": len(schedule.steps), "layout": work.layout, "notes": policy.notes, "mfu": work.utilisation(facts)}
    return team.whole_weights(policy), facts | metrics.displacement(folder / metrics.FILE)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of a step (counted from 0): linear warm-up, then the schedule down to zero after the last step."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.peak_learning_rate * (step + 1) / (warmup + 1)
    left = (steps - step) / max(1, steps - warmup)  # 1 right after the warm-up, above 0 at the last step
    shapes = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return config.peak_learning_rate * shapes[config.schedule]


@dataclass
class _Work:
    """A step's forward and backward passes."""

    policy: Policy
    wrapped: torch.nn.Module
    """The policy as the team wraps it."""
    optimizer: Any
    method: Method
    config: TrainConfig
    run: Surroundings
    seed: int = 0
    """Of the noise on embeddings."""
    _done: list[tuple[list[Tree], PairLogProbs, Tensor, Tensor]] = field(default_factory=list)
    """Micro-batches of the newest step: trees, log-probs, weights and losses of the pairs."""

    def __post_init__(self) -> None:
        self.layout = self.policy.layout
        self._flops, _ = model_flops(self.policy.model.config)
        self._scored = Scored(
            bool(self.method.needs & OF_TOKENS), "normalisers" in self.method.needs, self.config.likelihood_temperature
        )
        if self.config.gradient_checkpointing == "on":
            self.policy.recompute_activations()

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
            if self.policy.recomputes or self.config.gradient_checkpointing != "auto" or self.run.team.size > 1:
                raise
            return None

    def _accumulate(self, trees: Sequence[Tree], step: int) -> dict[str, Tensor]:
        team = self.run.team
        real_tokens = sum(len(tree.real.completion_ids) for tree in trees)
        normaliser = len(trees) if self.method.normalise == "examples" else real_tokens
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

    def _line(self, count: int, normaliser: int, real_tokens: int) -> dict[str, Tensor]:
        """Means over the step's demonstrations, on all ranks."""
        pair = metrics.concatenate([done[1] for done in self._done])
        weights, losses = torch.cat([done[2] for done in self._done]), torch.cat([done[3] for done in self._done])
        shadows = self.run.shadows if self.method.needs >= metrics.PAIRWISE else ()
        sums = metrics.step_sums(pair, weights, losses, shadows)
        totals = self.run.team.total(torch.stack(list(sums.values()))).unbind()
        means = {name: total / count for name, total in zip(sums, totals, strict=True)}
        nll = -means["real_logps"] * count / real_tokens
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
        lower = self.run.autocast or self.run.team.casts or quantised
        dtype = "fp32" if weights.dtype == torch.float32 and not lower else "bf16"
        peak = peak_flops(torch.cuda.get_device_name(), dtype) if weights.is_cuda else None
        return mfu(facts["flops"], facts["step_seconds"], peak and peak * self.run.team.size)

    def trouble(self, step: int) -> str:
        """What is not finite in the newest step, and where."""
        here = [
            tree.id
            for members, _, _, losses in self._done
            for tree, loss in zip(_of_pairs(members), losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        bad = list(dict.fromkeys(self.run.team.together(here)))
        if not bad:
            return f"the gradient is not finite at step {step + 1}; {DIVERGED}"
        needs = ", ".join(sorted(self.method.needs)) or "nothing"
        why = f"it declares that it needs {needs}: is something missing?" if step == 0 else DIVERGED
        named = ", ".join(bad[:NAMED_IDS]) + (", …" if len(bad) > NAMED_IDS else "")
        return f"the loss is not finite at step {step + 1}; {why} (demonstrations {named})"

    @torch.no_grad()
    def step_zero(self, schedule: Schedule) -> float | None:
        """Largest |log-ratio| of the first step's sequences: zero where policy and reference are the same weights."""
        if schedule.noise_floor is None or "reference" not in self.method.needs or not len(schedule.steps):
            return None
        trees = next(iter(schedule.steps))
        groups = self._groups(trees)
        pairs = [pair_logps(self.wrapped, [trees[index] for index in group])[0] for group in groups]
        ratios = torch.cat([torch.cat((pair.real_log_ratios, pair.generated_log_ratios)) for pair in pairs])
        # A method may compare its demonstrations alone with the reference: NaN is not there, and no loss may use it.
        worst = float(ratios[~ratios.isnan()].abs().max()) if not ratios.isnan().all() else math.nan
        if exceeds_noise(worst, schedule.noise_floor):
            raise TrainingError(
                f"step 0: a log-ratio of {worst:.3g} nats where policy and reference are the same weights "
                f"(noise floor {schedule.noise_floor:.1g}); the reference log-probs do not belong to this policy"
            )
        return worst


@dataclass(frozen=True)
class Scored:
    """What a loss is given of the scored tokens besides the sums of their log-probs."""

    tokens: bool = False
    normalisers: bool = False
    """With the tokens."""
    temperature: float = 1.0
    """Of the policy's likelihood."""


SUMS = Scored()


def pair_logps(
    policy: torch.nn.Module, trees: Sequence[Tree], wanted: Scored = SUMS, noise: EmbeddingNoise | None = None
) -> tuple[PairLogProbs, Tensor]:
    """Policy log-probs of the trees' pairs in one forward pass, beside the reference's.

    A tree with k self-generations gives k pairs of weight 1/k, one without any a pair whose generated side is NaN.

    Args:
        wanted: what the pairs carry besides sums.
        noise: added to the embeddings.

    Returns:
        The log-probs, (pairs,) each, and the pairs' weights, (pairs,).
    """
    branches = [branch for tree in trees for branch in tree.branches]
    lengths = [len(branch.completion_ids) for branch in branches]
    scored = policy([tree.tokens for tree in trees], wanted.normalisers, noise)
    logps = scored[0] if wanted.normalisers else scored
    parts = logps.split(lengths)
    sums = (
        pad_sequence(list(parts), batch_first=True).double().sum(1).float()
    )  # (branches,), rounded once, as the reference's are
    first = list(itertools.accumulate((len(tree.branches) for tree in trees), initial=0))
    pairs = [(first[n], first[n] + k + 1 if tree.generated else None) for n, tree in enumerate(trees) for k in _pairs_of(tree)]
    known = [math.nan if branch.reference_logp is None else branch.reference_logp for branch in branches]
    here = functools.partial(to_device, device=sums.device)
    table = torch.stack((sums, here(torch.tensor(known)), here(torch.tensor(lengths, dtype=sums.dtype))))  # (3, branches)
    real = table.index_select(1, here(torch.tensor([real for real, _ in pairs])))  # (3, pairs)
    others = [other for _, other in pairs if other is not None]
    if len(others) not in (0, len(pairs)):
        raise ValueError("either every tree of a step has a self-generation or none")
    generated = table.index_select(1, here(torch.tensor(others))) if others else torch.full_like(real, math.nan)
    weights = here(torch.tensor([1 / max(1, len(tree.generated)) for tree in _of_pairs(trees)]))
    pair = PairLogProbs(real[0], generated[0], real[1], generated[1], real[2], generated[2], temperature=wanted.temperature)
    if wanted.tokens:
        normalisers = scored[1] if wanted.normalisers else None
        views = [_token_view(lengths, chosen, logps, normalisers) for chosen in ([real for real, _ in pairs], others)]
        pair = dataclasses.replace(pair, tokens=(views[0], views[1] if others else TokenLogProbs.unknown(real[0])))
    return pair, weights


def _token_view(lengths: Sequence[int], branches: Sequence[int], logps: Tensor, normalisers: Tensor | None) -> TokenLogProbs:
    """The scored tokens of one branch of each pair.

    Args:
        lengths: scored tokens of all branches, whose log-probs lie one after the other.
        branches: one for each pair.
        logps: (scored,)
        normalisers: (scored,), where they were computed.
    """
    starts = list(itertools.accumulate(lengths, initial=0))
    rows = [
        (starts[branch] + position, number, position, lengths[branch])
        for number, branch in enumerate(branches)
        for position in range(lengths[branch])
    ]
    source, pair, position, length = to_device(torch.tensor(rows, dtype=torch.long).view(-1, 4).T.contiguous(), logps.device)
    chosen = logps.index_select(0, source)
    known = torch.full_like(chosen, math.nan) if normalisers is None else normalisers.index_select(0, source)
    longest = max((lengths[branch] for branch in branches), default=0)
    return TokenLogProbs(chosen, known, pair, position, length, len(branches), longest)


def _pairs_of(tree: Tree) -> range:
    return range(max(1, len(tree.generated)))


def _of_pairs(trees: Sequence[Tree]) -> list[Tree]:
    """The tree of every pair."""
    return [tree for tree in trees for _ in _pairs_of(tree)]


def _clip(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Gradient norm before clipping, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _advance(run: Surroundings, team: Team, due: bool) -> tuple[KeyboardInterrupt | None, bool]:
    """Report a step; what asks a rank to stop, or to save, asks all of them, because saving needs everybody.

    Returns:
        What stops the run after its state is saved; whether a save is due.
    """
    asked: KeyboardInterrupt | None = None
    try:
        run.advance(1)
    except KeyboardInterrupt as interruption:
        asked = interruption
    if team.size == 1:
        return asked, due
    stops, saves = team.total(torch.tensor([float(asked is not None), float(due)], device=team.device)).tolist()
    return asked or (KeyboardInterrupt() if stops else None), saves > 0


@dataclass
class _Clock:
    """When to save: every so many seconds, and less often where saving takes long."""

    pause: float
    _since: float = field(default_factory=time.monotonic)
    _started: float = 0.0

    def is_due(self) -> bool:
        return time.monotonic() - self._since > self.pause

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._since = time.monotonic()
        self.pause = max(self.pause, SAVING_SHARE * (self._since - self._started))
