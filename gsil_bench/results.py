"""From a finished cell to its result file, and back. The file is written last: its existence means the cell is complete."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gsil_bench.evaluation.scoring import FILE
from gsil_bench.inputs import Inputs, describe
from gsil_bench.plan import Cell, Plan, Stage
from gsil_bench.provenance import provenance
from gsil_bench.records import CellResult, ItemScore, digest, read_jsonl, result_from_json, write_atomically
from gsil_bench.store import Artefact
from gsil_bench.variants import tuning_of

DISPLACEMENTS = ("real_displacement", "generated_displacement")
TOKENS_TOLERANCE = 0.05
"""Share by which the control's tokens may differ before the table says so."""


def result_path(out: Path, cell: Cell) -> Path:
    """Where a cell's result lies: a task's protocol is a folder in its own. Names were checked to be harmless in a path."""
    return out / "results" / cell.task / f"{cell.method.name}-seed{cell.seed}.json"


def write_result(out: Path, cell: Cell, inputs: Inputs, made: Mapping[str, Artefact]) -> CellResult:
    """Write a cell's result, unless the file already holds this very cell: then its provenance stays that of the run that made
    it.
    """
    path = result_path(out, cell)
    parts = [cell.method.describe(), cell.method.decides(), cell.seed, dict(cell.comparable)]
    tuning = tuning_of(inputs.config.tuning, cell.method)
    parts += [tuning] if tuning else []
    fingerprint = digest([*parts, made[cell.policy.key].content, made[cell.scores.key].content])
    existing = read_result(path)
    if existing is not None and existing.fingerprint == fingerprint:
        return existing
    result = _result(cell, inputs, made, fingerprint)
    text = json.dumps(dataclasses.asdict(result), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")
    return result


def remove_result(out: Path, cell: Cell) -> None:
    """Remove the result that another configuration left of a cell that failed in this one; its artefacts stay in the store."""
    result_path(out, cell).unlink(missing_ok=True)


def read_result(path: Path) -> CellResult | None:
    """The result in a file, or None if there is none that this version can read."""
    try:
        return result_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _result(cell: Cell, inputs: Inputs, made: Mapping[str, Artefact], fingerprint: str) -> CellResult:
    scores, rounds = made[cell.scores.key], [made[stage.key] for stage in cell.training]
    cost = {key: sum(artefact.facts[key] for artefact in rounds) for key in ("steps", "tokens", "scored_tokens", "flops")}
    cost = {key: value for key, value in cost.items() if math.isfinite(value)}  # FLOPs are not known of every family
    return CellResult(
        method=cell.method.name,
        seed=cell.seed,
        task=cell.task,
        metric=cell.metric,
        best=cell.best,
        worst=cell.worst,
        comparable={**cell.comparable, "left_out": _left_out(rounds)},
        items=tuple(
            ItemScore(record["id"], record["score"], record["reason"], record["group"])
            for record in read_jsonl(scores.folder / FILE)
        ),
        counts=dict(scores.facts["counts"]),
        record=cell.method.describe(),
        cost={**cost, "seconds": round(sum(artefact.seconds for artefact in rounds), 1), **_cost_of_rewards(cell, made)},
        provenance=_provenance(cell, inputs, scores, made),
        fingerprint=fingerprint,
        warnings=_warnings(cell, made),
    )


def _cost_of_rewards(cell: Cell, made: Mapping[str, Artefact]) -> dict[str, float]:
    """What comes on top of the policy's steps where it samples: tokens drawn, and the training of critics (positions, seconds of
    reward models; a discriminator's are in the policy's).
    """
    rounds = [made[stage.key].facts for stage in cell.training if "sampled_tokens" in made[stage.key].facts]
    if not rounds:
        return {}
    critics = {stage.needs["critic"].key for stage in cell.training if "critic" in stage.needs}
    tokens = sum(facts["critic_tokens"] for facts in rounds) + sum(made[key].facts["tokens"] for key in critics)
    seconds = round(sum(made[key].seconds for key in critics), 1)
    return {
        "sampled_tokens": sum(facts["sampled_tokens"] for facts in rounds),
        "critic_tokens": tokens,
        "critic_seconds": seconds,
    }


def _reward_model(stage: Stage, made: Mapping[str, Artefact]) -> dict[str, Any]:
    """Of a round with a reward model: its weights, and how well it tells the classes of answers apart."""
    if "critic" not in stage.needs:
        return {}
    critic = made[stage.needs["critic"].key]
    told = {name: value if math.isfinite(value) else None for name, value in critic.facts["auc"].items()}
    kept = {key: critic.facts[key] for key in ("classes", "missing", "held_out_contrasts") if key in critic.facts}
    return {"reward_model": {"weights_sha256": critic.content, "auc": told, **kept}}


def _left_out(rounds: Sequence[Artefact]) -> str | None:
    """Which demonstrations a method left out as too long; another set is another training set. None if it was not trained."""
    return "; ".join(dict.fromkeys(artefact.facts["left_out"] for artefact in rounds)) or None


def _warnings(cell: Cell, made: Mapping[str, Artefact]) -> tuple[str, ...]:
    """Of the cell's rounds and of the stages that they need, each once."""
    stages = [stage for training in cell.training for stage in (*training.needs.values(), training)]
    return tuple(dict.fromkeys(warning for stage in stages for warning in made[stage.key].facts.get("warnings", ())))


def warning_notes(results: Sequence[CellResult]) -> list[str]:
    """What results warn of, each line once, with the methods and seeds that it holds for."""
    cells: dict[str, list[str]] = {}
    for result in results:
        for warning in result.warnings:
            cells.setdefault(warning, []).append(f"{result.method} (seed {result.seed})")
    return [f"{', '.join(dict.fromkeys(names))}: {warning}" for warning, names in cells.items()]


def budget_notes(plan: Plan, results: Sequence[CellResult]) -> list[str]:
    """Where the control that is matched to the pairwise methods' tokens was trained on another number of them after all."""
    methods, control = {cell.method.name: cell.method for cell in plan.cells}, plan.inputs.control
    if methods[control].batches != "matched-demonstrations":
        return []
    tokens = {(result.method, result.seed): result.cost["scored_tokens"] for result in results}
    ratios: dict[str, float] = {}
    for (name, seed), count in tokens.items():
        if name != control and "generated" in methods[name].needs and tokens.get((control, seed)):
            ratio = count / tokens[control, seed]
            ratios[name] = max(ratios.get(name, 1.0), ratio, key=lambda value: abs(value - 1))
    return [
        f"{name} was trained on {ratio:.2f} times the tokens of {control}"
        for name, ratio in ratios.items()
        if abs(ratio - 1) > TOKENS_TOLERANCE
    ]


def _provenance(cell: Cell, inputs: Inputs, scores: Artefact, made: Mapping[str, Artefact]) -> dict[str, Any]:
    """Facts of the run, the resolved configuration, and which artefacts the numbers come from."""
    trained = [
        {
            "weights_sha256": artefact.content,
            "stage": artefact.folder.name,
            **{key: artefact.facts.get(key) for key in ("step_zero", "audit", "layout", "mfu", *DISPLACEMENTS)},
            "noise_floor": artefact.facts["noise_floor"],
            **_reward_model(stage, made),
        }
        for stage, artefact in ((stage, made[stage.key]) for stage in cell.training)
    ]
    return {
        **provenance(),
        "configuration": inputs.config.as_dict(),
        "inputs": describe(inputs),
        "rounds": trained,
        "scores": scores.fingerprint,
        "tuning": tuning_of(inputs.config.tuning, cell.method),
    }
