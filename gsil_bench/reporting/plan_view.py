"""The plan as a person reads it before anything runs, and as JSON."""

from __future__ import annotations

from typing import Any

from gsil_bench.estimate import StageForecast, forecast
from gsil_bench.inputs import Inputs, describe
from gsil_bench.methods import Method
from gsil_bench.plan import Plan
from gsil_bench.reporting.progress import seconds_text
from gsil_bench.stages import VERSIONS
from gsil_bench.store import Store
from gsil_bench.training.config import LOSS_FIELDS, TrainConfig


def plan_text(plan: Plan, store: Store, every_stage: bool = False) -> str:
    """Inputs, methods with their settings, stages with what is already there, and the estimate.

    Args:
        every_stage: a line for each stage instead of one for each kind.
    """
    inputs, forecasts = plan.inputs, forecast(plan, store)
    lines = [*_input_lines(inputs), "methods"]
    lines += [f"  {_method_line(method)}" for method in inputs.methods]
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
    if "generated" in method.needs and method.batches == "pairs":
        sampling = "greedy" if protocol.temperature == 0 else f"T={protocol.temperature:g}"
        parts += [f"{protocol.rounds} round{'s' * (protocol.rounds > 1)} against the {protocol.opponent} policy ({sampling})"]
    parts += [f"{key}={vars(config)[key]:g}" for key in LOSS_FIELDS if vars(config)[key] != TrainConfig.defaults()[key]]
    parts += [f"lr {config.peak_learning_rate:g}", f"{config.epochs:g} epochs", f"batch {config.batch_size}"]
    return f"{method.name}: {', '.join(parts)}"


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
        "stages": [
            {"kind": item.stage.kind, "label": item.stage.label, "done": item.done, "estimated_seconds": round(item.seconds, 1)}
            for item in forecasts
        ],
        "estimated_seconds": round(sum(item.seconds for item in forecasts), 1),
        "notes": list(plan.inputs.notes),
    }
