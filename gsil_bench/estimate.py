"""What a plan will cost: from the speeds seen in this store where there are any, otherwise from the model's size and the
machine's.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gsil_bench.inputs import Model
from gsil_bench.plan import Plan, Stage
from gsil_bench.records import write_atomically
from gsil_bench.store import Artefact, Store

FLOPS_PER_PARAMETER_AND_TOKEN = {
    "training": 6.0, "training-on-samples": 18.0, "reward-model": 6.0, "reference": 2.0, "held-out": 2.0, "generations": 6.0,
    "answers": 6.0,
}  # fmt: skip
"""A forward pass costs 2, a backward pass 4. Decoding one token at a time reaches about a third of a forward pass's speed.
Training on samples of the policy decodes each (6), reads it under three models or so (6) and learns from it (6).
"""
CPU_FLOPS_PER_THREAD = 25e9
GPU_FLOPS = 5e13
SECONDS_PER_STAGE = 0.3
"""Loading, writing, hashing."""
SECONDS_PER_SCORING = 2.0


@dataclass
class Speeds:
    """Tokens per second by kind of stage and size of model, kept beside the artefacts."""

    path: Path
    seen: dict[str, float]

    @staticmethod
    def of(store: Store) -> Speeds:
        """What earlier runs in this store saw."""
        path = store.root / "speeds.json"
        try:
            seen = {str(key): float(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            seen = {}  # an estimate may start afresh; nothing else depends on this file
        return Speeds(path, seen)

    def observe(self, stage: Stage, model: Model, seconds: float) -> None:
        """Remember how fast a stage was."""
        if stage.tokens > 0 and seconds > 0:
            self.seen[_name(stage, model)] = round(stage.tokens / seconds, 1)
            with suppress(OSError):  # only an estimate
                write_atomically(self.path, json.dumps(self.seen, indent=1, sort_keys=True) + "\n")

    def seconds(self, stage: Stage, model: Model) -> float:
        """Expected duration of a stage."""
        if stage.kind == "scores":
            return SECONDS_PER_SCORING
        if stage.tokens == 0:
            return SECONDS_PER_STAGE
        speed = self.seen.get(_name(stage, model)) or _guess(_kind(stage), model.parameters, model.device)
        return SECONDS_PER_STAGE + stage.tokens / speed


def _name(stage: Stage, model: Model) -> str:
    return f"{_kind(stage)}/{model.parameters}/{model.device}"


def _kind(stage: Stage) -> str:
    """The stage's kind; training that samples as it goes has a speed of its own."""
    return f"{stage.kind}-on-samples" if _samples(stage) else stage.kind


def _samples(stage: Stage) -> bool:
    return bool(stage.inputs.get("method", {}).get("rollouts"))


def sampled_tokens(stage: Stage, length: float) -> tuple[float, float]:
    """Tokens that a training samples from the policy as it is being trained: about, and at most; (0, 0) for any other stage.

    Args:
        length: of an answer, about.
    """
    if not _samples(stage):
        return 0.0, 0.0
    protocol, updates = stage.inputs["method"]["protocol"], stage.inputs["method"]["rollouts"]["updates"]
    answers = -(-stage.inputs["steps"] // updates) * stage.inputs["batch_size"] * protocol["samples"]
    return answers * min(length, protocol["max_new_tokens"]), answers * protocol["max_new_tokens"]


def _guess(kind: str, parameters: int, device: str) -> float:
    """Tokens per second on a machine that has not been seen at work."""
    import torch

    flops = GPU_FLOPS if device == "cuda" else CPU_FLOPS_PER_THREAD * torch.get_num_threads()
    return flops / (FLOPS_PER_PARAMETER_AND_TOKEN[kind] * parameters)


@dataclass(frozen=True)
class StageForecast:
    """A stage before the run."""

    stage: Stage
    done: bool
    seconds: float


def forecast(plan: Plan, store: Store) -> list[StageForecast]:
    """Every stage with whether its artefact is there and how long it will take. What depends on weights that are not yet known
    counts as not there.
    """
    speeds, model = Speeds.of(store), plan.inputs.model
    made: dict[str, Artefact] = {}
    forecasts = []
    for stage in plan.stages:
        found = stage.given
        if found is None and all(need.key in made for need in stage.needs.values()):
            found = store.lookup(stage.kind, stage.fingerprint(made))
        if found is not None:
            made[stage.key] = found
        if stage.given is None:
            seconds = 0.0 if found else speeds.seconds(stage, model)
            forecasts.append(StageForecast(stage, found is not None, seconds))
    return forecasts
