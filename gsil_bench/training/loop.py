"""The training loop: the only `optimizer.step()` of the suite. It never asks a method's name.

A step's loss is the sum over its examples divided by the whole step's count (examples or tokens), so micro-batches change
memory and rounding, not the result. Before the first step of a round that starts from its reference, every log-ratio must be 0
up to rounding (ten times the measured noise floor, a thousandth of a nat at least); a larger one stops the run. State is saved
at step boundaries; a resumed run repeats the steps of an uninterrupted one exactly.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs
from gsil_bench.models.logprobs import PaddedBatch, micro_batches, token_logps
from gsil_bench.records import Encoded, write_atomically
from gsil_bench.training.batches import Steps, Tree
from gsil_bench.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

STATE = "state.pt"
METRICS = "metrics.jsonl"
SAVE_EVERY_SECONDS = 30.0
SAVING_SHARE = 20.0
"""A save is followed by at least so many times its own duration of training: large models are not saved all the time."""
DIVERGED = "training diverged, a lower learning rate may help"
STEP_ZERO_TOLERANCE = 1e-3
"""Nats per sequence: a step-0 log-ratio is wrong when it exceeds both this and ten times the measured noise floor."""


class TrainingError(RuntimeError):
    """Training cannot go on: a loss that is not finite, or log-ratios that are not zero at step 0."""


@dataclass(frozen=True)
class Schedule:
    """What one round trains on, in order."""

    steps: Steps
    """Iterated from the start each time: a resumed run skips what it had done."""
    noise_floor: float | None = None
    """Of the reference, in nats per sequence; None if the round does not start from its reference."""


def train(
    model: PreTrainedModel,
    method: Method,
    schedule: Schedule,
    folder: Path,
    advance: Callable[[int], None] = lambda done: None,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
) -> dict[str, Any]:
    """Train the model in place for one round; `folder` keeps metrics and the state to resume from, which the caller removes when
    the weights are safe.

    Args:
        model: the round's starting point, in eval mode: dropout stays off, policy and reference must agree.
        advance: called with the steps done since the last call; may raise to stop, the state is saved first.

    Returns:
        Facts of the round: steps, tokens (processed, padding excluded), step-0 log-ratio.

    Raises:
        TrainingError: see the class.
    """
    config = TrainConfig.of(method.training, where=method.name)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.peak_learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    start, facts = _resume(model, optimizer, folder)
    if start == 0:
        facts = {"step_zero": _step_zero(model, method, schedule, config), "tokens": 0, "scored_tokens": 0}
    advance(start)
    saved_at = time.monotonic()
    for step, trees in enumerate(islice(schedule.steps, start, None), start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, len(schedule.steps))
        metrics = _accumulate(model, method, config, trees, step)
        metrics["grad_norm"] = _clip(model, config.max_grad_norm)
        if not math.isfinite(metrics["grad_norm"]):
            raise TrainingError(f"the gradient is not finite at step {step + 1}; {DIVERGED}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        facts["tokens"] += sum(len(sequence) for tree in trees for sequence in tree.sequences())
        facts["scored_tokens"] += sum(tree.scored_tokens for tree in trees)
        _log(folder, {"step": step + 1, "learning_rate": optimizer.param_groups[0]["lr"], **metrics})
        try:
            advance(1)
        except KeyboardInterrupt:
            _save(model, optimizer, folder, step + 1, facts)
            raise
        if time.monotonic() - saved_at > save_every_seconds:
            started = time.monotonic()
            _save(model, optimizer, folder, step + 1, facts)
            saved_at = time.monotonic()
            save_every_seconds = max(save_every_seconds, SAVING_SHARE * (saved_at - started))
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise TrainingError(f"weights are not finite after the last step; {DIVERGED}")
    return {**facts, "steps": len(schedule.steps)}


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of a step (counted from 0): linear warm-up, then the schedule down to zero after the last step."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.peak_learning_rate * (step + 1) / (warmup + 1)
    left = (steps - step) / max(1, steps - warmup)  # 1 right after the warm-up, above 0 at the last step
    shapes = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return config.peak_learning_rate * shapes[config.schedule]


def _accumulate(
    model: PreTrainedModel, method: Method, config: TrainConfig, trees: Sequence[Tree], step: int
) -> dict[str, float]:
    """Add the gradient of the step's mean loss to the parameters; returns the step's metrics."""
    real_tokens = sum(len(tree.real.completion_ids) for tree in trees)
    normaliser = len(trees) if method.normalise == "examples" else real_tokens
    totals: dict[str, float] = {}
    for group in tree_batches(trees, config.micro_batch_tokens):
        pair = pair_logps(model, group)
        losses = _losses(method, pair, step)  # (pairs,)
        (losses.sum() / normaliser).backward()  # type: ignore[no-untyped-call]
        for key, value in _metrics(pair, losses).items():
            totals[key] = totals.get(key, 0.0) + value
    means = {key: value / len(trees) for key, value in totals.items() if math.isfinite(value)}
    return {**means, "loss": totals["loss"] / normaliser, "real_nll_per_token": -totals["real_logps"] / real_tokens}


def tree_batches(trees: Sequence[Tree], tokens: int) -> list[list[Tree]]:
    """Trees in groups whose padded sequences stay within a token budget."""
    widths = [max(len(sequence) for sequence in tree.sequences()) for tree in trees]
    branches = max(len(tree.sequences()) for tree in trees)
    return [[trees[index] for index in group] for group in micro_batches(widths, max(1, tokens // branches))]


def pair_logps(model: PreTrainedModel, trees: Sequence[Tree]) -> PairLogProbs:
    """Policy log-probs of the trees' branches in one forward pass, beside the reference's; (trees,) each."""
    reals = [Encoded(tree.prompt_ids, tree.real.completion_ids) for tree in trees]
    generated = [Encoded(tree.prompt_ids, tree.generated.completion_ids) for tree in trees if tree.generated]
    if len(generated) not in (0, len(trees)):
        raise ValueError("either every tree of a step has a self-generation or none")
    logps = token_logps(model, PaddedBatch.of([*reals, *generated], model.device))  # (rows, width)
    sums = logps.double().sum(1).to(logps.dtype)  # (rows,): rounded once, as the reference's are
    missing = sums.new_full((len(trees),), math.nan)
    return PairLogProbs(
        policy_real_logps=sums[: len(trees)],
        policy_generated_logps=sums[len(trees) :] if generated else missing,
        reference_real_logps=_vector(sums, [tree.real.reference_logp for tree in trees]),
        reference_generated_logps=_vector(sums, [tree.generated.reference_logp if tree.generated else None for tree in trees]),
        real_tokens=_vector(sums, [len(sequence.completion_ids) for sequence in reals]),
        generated_tokens=_vector(sums, [len(sequence.completion_ids) for sequence in generated]) if generated else missing,
    )


def _vector(like: Tensor, values: Sequence[float | None]) -> Tensor:
    """Values as (pairs,); one that is not there is NaN, so that a loss that was not promised it shows at once."""
    return like.new_tensor([math.nan if value is None else value for value in values])


def _losses(method: Method, pair: PairLogProbs, step: int) -> Tensor:
    """The method's loss of each example, checked."""
    assert method.loss is not None, f"{method.name} does not train"
    losses = method.loss(pair, **method.settings)
    if losses.shape != pair.policy_real_logps.shape:
        raise TrainingError(
            f"the loss returned shape {tuple(losses.shape)} for {len(pair.real_tokens)} pairs, not one value each"
        )
    if not torch.isfinite(losses).all():
        needs = ", ".join(sorted(method.needs)) or "nothing"
        why = f"it declares that it needs {needs}: is something missing?" if step == 0 else DIVERGED
        raise TrainingError(f"the loss is not finite at step {step + 1}; {why}")
    return losses


def _metrics(pair: PairLogProbs, losses: Tensor) -> dict[str, float]:
    """Sums over the examples; a NaN (not computed) stays NaN."""
    rows = torch.stack(
        [
            losses,
            pair.policy_real_logps,
            pair.policy_generated_logps,
            pair.real_log_ratios,
            pair.generated_log_ratios,
            pair.real_log_ratios - pair.generated_log_ratios,
        ]
    )
    names = ("loss", "real_logps", "generated_logps", "real_log_ratio", "generated_log_ratio", "margin")
    return dict(zip(names, rows.detach().double().sum(1).tolist(), strict=True))


@torch.no_grad()
def _step_zero(model: PreTrainedModel, method: Method, schedule: Schedule, config: TrainConfig) -> float | None:
    """Largest |log-ratio| of the first step's sequences, which must be zero where policy and reference are the same weights."""
    if schedule.noise_floor is None or "reference" not in method.needs or not len(schedule.steps):
        return None
    pairs = [pair_logps(model, group) for group in tree_batches(next(iter(schedule.steps)), config.micro_batch_tokens)]
    ratios = torch.cat([pair.real_log_ratios for pair in pairs])
    if not pairs[0].generated_tokens.isnan().all():  # a method may compare its demonstrations alone with the reference
        ratios = torch.cat([ratios, *(pair.generated_log_ratios for pair in pairs)])
    worst = float(ratios.abs().max())
    if not worst <= max(STEP_ZERO_TOLERANCE, 10 * schedule.noise_floor):
        raise TrainingError(
            f"step 0: a log-ratio of {worst:.3g} nats where policy and reference are the same weights "
            f"(noise floor {schedule.noise_floor:.1g}); the reference log-probs do not belong to this policy"
        )
    return worst


def _clip(model: PreTrainedModel, max_norm: float) -> float:
    """Gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm > 0 else math.inf)
    return float(norm)


def _log(folder: Path, record: dict[str, float]) -> None:
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _save(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path, step: int, facts: dict[str, Any]) -> None:
    """Everything the next step depends on, written so that a kill leaves the old state or the new one."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "facts": facts}
    torch.save(state, folder / f"{STATE}.new")
    (folder / f"{STATE}.new").replace(folder / STATE)


def _resume(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> tuple[int, dict[str, Any]]:
    """Load the state of an interrupted run, if there is one, and cut the metrics back to its step."""
    path, metrics = folder / STATE, folder / METRICS
    if not path.exists():
        metrics.unlink(missing_ok=True)
        return 0, {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)[: state["step"]] if metrics.exists() else []
        step, facts = int(state["step"]), dict(state["facts"])
    except Exception as error:  # whatever a damaged file makes the reader raise, the round starts again
        logger.warning("%s cannot be read (%s); the round starts again", path, type(error).__name__)
        path.unlink()
        return _resume(model, optimizer, folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    write_atomically(metrics, "".join(lines))
    return step, facts
