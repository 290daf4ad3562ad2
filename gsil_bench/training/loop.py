"""The training loop: steps from a schedule, at a rate, with metrics and a state to resume from. It never asks a method's name.

Before the first step of a round that starts from its reference, every log-ratio must be 0 up to rounding (ten times
the measured noise floor, a thousandth of a nat at least); a larger one stops the run. State is saved at step boundaries; a
resumed run repeats the steps of an uninterrupted one exactly. What a step does is in learner.py; with several processes it reads
two more numbers, whether to stop or to save; metrics are read every `log_every` steps.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gsil_bench.methods import Method
from gsil_bench.training import metrics
from gsil_bench.training.batches import LiveSteps, Steps
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.critics import HEAD_FILE, load_head, save_head
from gsil_bench.training.learner import DIVERGED, Learner, TrainingError
from gsil_bench.training.metrics import MetricsLog
from gsil_bench.training.parallel import ALONE, Team
from gsil_bench.training.state import load_state, save_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVE_EVERY_SECONDS = 30.0
SAVING_SHARE = 20.0
"""A save is followed by at least so many times its own duration of training: large models are not saved all the time."""


@dataclass(frozen=True)
class Schedule:
    """What one round trains on, in order."""

    steps: Steps | LiveSteps
    """Iterated from the start each time: a resumed run skips what it had done. Live ones keep a state of their own."""
    noise_floor: float | None = None
    """Of the reference, in nats per sequence; None if the round does not start from its reference."""
    seed: int = 0
    """Of the generators, for a loss that draws noise."""
    start: Path | None = None
    """Where the round's starting point lies: a scalar head that the round before left there goes on."""


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
    team, steps = run.team, schedule.steps
    learner = Learner(model, method, schedule.seed, run.autocast, team, run.shadows)
    policy, config = learner.policy, learner.config
    if policy.scalar is not None and schedule.start is not None and (schedule.start / HEAD_FILE).exists():
        load_head(policy, schedule.start)
    save = functools.partial(save_state, team, learner, folder, steps)
    random.seed(schedule.seed)
    torch.manual_seed(schedule.seed)
    start, facts = load_state(team, learner, folder, steps)
    if start == 0:
        facts = {"step_zero": _step_zero(learner, schedule), "tokens": 0, "scored_tokens": 0, "flops": 0.0, "step_seconds": 0.0}
    log = MetricsLog(folder / metrics.FILE, config.log_every, run.track, writes=team.rank == 0)
    clock = _Clock(run.save_every_seconds)
    run.advance(start)
    with log:
        batches = steps.follow(policy, start) if isinstance(steps, LiveSteps) else islice(steps, start, None)
        for step in range(start, len(steps)):
            try:
                trees = next(batches)
            except TrainingError:  # samples or rewards that nothing can be learned from
                log.flush()
                save(step, facts)
                raise
            started = time.monotonic()
            rate = learning_rate(config, step, len(steps))
            line, finite = learner.update(trees, step, rate)
            if not finite:
                log.flush()  # first: a state must not be ahead of its metrics
                save(step, facts)
                raise TrainingError(learner.trouble(step))
            log.add({"step": step + 1, "learning_rate": rate, **line, **(steps.line if isinstance(steps, LiveSteps) else {})})
            facts["tokens"] += sum(tree.tokens.positions(policy.layout) for tree in trees)
            facts["scored_tokens"] += sum(tree.scored_tokens for tree in trees)
            facts["flops"] += sum(map(learner.flops, trees))
            facts["step_seconds"] += time.monotonic() - started
            interruption, due = _advance(run, team, clock.is_due())
            if interruption or due:
                log.flush()
                with clock:
                    save(step + 1, facts)
            if interruption:
                raise interruption
    if not team.all_finite(policy):
        raise TrainingError(f"weights are not finite after the last step; {DIVERGED}")
    if policy.scalar is not None and team.rank == 0:
        save_head(policy, folder)
    policy.restore()
    facts |= {"steps": len(steps), "layout": learner.layout, "notes": policy.notes, "mfu": learner.utilisation(facts)}
    facts |= steps.finish(folder) if isinstance(steps, LiveSteps) else {}
    return team.whole_weights(policy), facts | metrics.displacement(folder / metrics.FILE)


def _step_zero(learner: Learner, schedule: Schedule) -> float | None:
    """See Learner.step_zero; None where the round does not start from a reference."""
    steps = schedule.steps
    if schedule.noise_floor is None or "reference" not in learner.method.needs or isinstance(steps, LiveSteps) or not len(steps):
        return None
    return learner.step_zero(next(iter(steps)), schedule.noise_floor)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of a step (counted from 0): linear warm-up, then the schedule down to zero after the last step."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.peak_learning_rate * (step + 1) / (warmup + 1)
    left = (steps - step) / max(1, steps - warmup)  # 1 right after the warm-up, above 0 at the last step
    shapes = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return config.peak_learning_rate * shapes[config.schedule]


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
