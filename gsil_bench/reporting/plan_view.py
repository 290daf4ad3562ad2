"""The plan as a person reads it before anything runs, and as JSON."""

from __future__ import annotations

from typing import Any

from gsil_bench.estimate import StageForecast, forecast, sampled_tokens
from gsil_bench.inputs import Inputs, describe
from gsil_bench.methods import Critic, Method, Rollouts
from gsil_bench.plan import Plan, Stage
from gsil_bench.reporting.methods_page import told_apart
from gsil_bench.reporting.progress import seconds_text
from gsil_bench.stages import VERSIONS
from gsil_bench.store import Store
from gsil_bench.training.config import LOSS_FIELDS, TrainConfig
from gsil_bench.training.critics import critic_of

QUIET = ("discount", "gae_lambda", "score_clip", "kl_limit")
"""Settings of sampling that are named only where they are not the default."""


def plan_text(plan: Plan, store: Store, every_stage: bool = False) -> str:
    """Inputs, methods with their settings, stages with what is already there, and the estimate.

    Args:
        every_stage: a line for each stage instead of one for each kind.
    """
    inputs, forecasts = plan.inputs, forecast(plan, store)
    lines = [*_input_lines(inputs), "methods"]
    lines += [f"  {_method_line(method)}{_sampled_text(plan, method)}" for method in inputs.methods]
    lines += [f"stages ({len(forecasts)}, of which {sum(item.done for item in forecasts)} are there)"]
    lines += [f"  {_stage_line(item)}" for item in forecasts] if every_stage else _kind_lines(forecasts)
    left = sum(item.seconds for item in forecasts)
    lines.append(f"estimate: about {seconds_text(left)} on this machine" if left else "nothing to do")
    return "\n".join(lines)


def _input_lines(inputs: Inputs) -> list[str]:
    model, data = inputs.model, inputs.demonstrations
    counts = ", ".join(f"{count} {what}" for what, count in data.counts.items() if count)
    items = ", ".join(f"{item.task.name} ({len(item.items)} items)" for item in inputs.tasks)
    return [
        f"model          {model.name}: {model.parameters:,} parameters, context {model.context_length}, {model.device}",
        f"demonstrations {data.source}: {counts}",
        f"tasks          {items}",
        f"seeds          {', '.join(map(str, inputs.config.seeds))}; differences are taken from {inputs.control}",
        *(f"note           {note}" for note in inputs.notes),
    ]


def _method_line(method: Method) -> str:
    if not method.trains:
        return f"{method.name}: {method.summary}"
    config, protocol = TrainConfig.of(method.training, where=method.name), method.protocol
    parts = [f"{key}={value:g}" for key, value in method.settings.items()]
    if method.starts_from:
        parts.append(f"starts from {method.starts_from}, which gets {method.start_share:.0%} of the epochs")
    elif method.rollouts is not None:
        parts.append("starts from the model as given")
    if method.rollouts is not None:
        parts += _rollout_parts(method, method.rollouts)
    elif "generated" in method.needs and method.batches == "pairs":
        sampling = "greedy" if protocol.temperature == 0 else f"T={protocol.temperature:g}"
        parts += [f"{protocol.rounds} round{'s' * (protocol.rounds > 1)} against the {protocol.opponent} policy ({sampling})"]
    parts += [f"{key}={vars(config)[key]:g}" for key in LOSS_FIELDS if vars(config)[key] != TrainConfig.defaults()[key]]
    parts += [f"lr {config.peak_learning_rate:g}", f"{config.epochs:g} epochs", f"batch {config.batch_size}"]
    return f"{method.name}: {', '.join(parts)}"


def _rollout_parts(method: Method, rollouts: Rollouts) -> list[str]:
    """How a method samples, rewards and compares."""
    protocol, critic = method.protocol, rollouts.critic
    every = "each step" if rollouts.updates == 1 else f"every {rollouts.updates} steps"
    parts = [f"{protocol.samples} sample{'s' * (protocol.samples > 1)} a prompt at {every}"]
    if critic is not None:
        learns = f", {critic.updates} step{'s' * (critic.updates > 1)} at each sampling" if critic.alongside else ""
        parts.append(f"a {'discriminator' if critic.alongside else 'reward model'} of {told_apart(critic)}{learns}")
        parts += _critic_parts(method, critic)
    parts += [f"{key}={value:g}" for key, value in rollouts.settings.items()]
    reference = "the policy that it starts from" if protocol.opponent == "initial" else "that of the round before"
    parts += [f"baseline {rollouts.baseline}", f"kl={rollouts.kl:g} to {reference}"]
    parts += [f"{key}={getattr(rollouts, key):g}" for key in QUIET if getattr(rollouts, key) != getattr(Rollouts, key)]
    return [*parts, *([f"{protocol.rounds} rounds"] if protocol.rounds > 1 else [])]


def _critic_parts(method: Method, critic: Critic) -> list[str]:
    """What its training was told; its rate as it is used."""
    said = {f"critic_{key}": value for key, value in {**critic.settings, **critic.training}.items() if key != "learning_rate"}
    rate = TrainConfig.of(critic_of(method).training, where=method.name).peak_learning_rate
    return [*(f"{key}={value}" for key, value in said.items()), f"critic lr {rate:g}"]


def _sampled_text(plan: Plan, method: Method) -> str:
    """How much a method samples while it trains, over all seeds; "" for one that does not."""
    about, most = sampled_in_training(plan, method)
    return f"; about {_count(about)} tokens sampled in training, {_count(most)} at most" if most else ""


def sampled_in_training(plan: Plan, method: Method) -> tuple[float, float]:
    """Tokens sampled by a method's training, about and at most, its stages once each; an answer is as long as a demonstration."""
    stages: dict[str, Stage] = {
        stage.key: stage for cell in plan.cells if cell.method.name == method.name for stage in cell.training
    }
    encoded = plan.inputs.demonstrations.train_encoded
    length = sum(len(each.completion_ids) for each in encoded) / max(1, len(encoded))
    found = [sampled_tokens(stage, length) for stage in stages.values()]
    return sum(about for about, _ in found), sum(most for _, most in found)


def _count(number: float) -> str:
    return f"{number / 1e6:.2g} million" if number >= 1e6 else f"{round(number, -3):,.0f}" if number >= 1e4 else f"{number:,.0f}"


def _stage_line(item: StageForecast) -> str:
    return f"{'done' if item.done else seconds_text(item.seconds):>10}  {item.stage.label}"


def _kind_lines(forecasts: list[StageForecast]) -> list[str]:
    """A line for each kind of stage, in the order of the data's path."""
    kinds = [kind for kind in VERSIONS if any(item.stage.kind == kind for item in forecasts)]
    lines = []
    for kind in kinds:
        members = [item for item in forecasts if item.stage.kind == kind]
        there = sum(item.done for item in members)
        left = sum(item.seconds for item in members)
        state = f"{there} there" if there else ""
        lines.append(f"  {kind:<15}{len(members):>4}  {seconds_text(left) if left else '':<12}{state}".rstrip())
    return lines


def plan_record(plan: Plan, store: Store) -> dict[str, Any]:
    """The same as JSON."""
    forecasts = forecast(plan, store)
    return {
        "configuration": plan.inputs.config.as_dict(),
        "inputs": describe(plan.inputs),
        "methods": [method.describe() for method in plan.inputs.methods],
        "control": plan.inputs.control,
        "sampled_in_training": {
            method.name: {"about": round(about), "at_most": round(most)}
            for method, (about, most) in ((method, sampled_in_training(plan, method)) for method in plan.inputs.methods)
            if most
        },
        "stages": [
            {"kind": item.stage.kind, "label": item.stage.label, "done": item.done, "estimated_seconds": round(item.seconds, 1)}
            for item in forecasts
        ],
        "estimated_seconds": round(sum(item.seconds for item in forecasts), 1),
        "notes": list(plan.inputs.notes),
    }
