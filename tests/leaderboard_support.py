"""Runs for the leaderboard's tests: result files as a comparison writes them, with scores drawn from a seed."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gsil_bench.methods import Method, load_method
from gsil_bench.records import CellResult, ItemScore, digest

TASKS = {"quiz": 40, "talk": 16, "held-out-nll": 12}
"""Name → items."""
BASE = {"sft": 0.6, "sft-continued": 0.6, "gsil-logistic": 0.8, "start": 0.2}
"""Share of items that a method answers well; 0.5 for the others."""
FRAME = {
    "model": digest("model"),
    "chat": digest("chat"),
    "precision": "fp32",
    "demonstrations": digest("demonstrations"),
    "engine": "transformers-5.19.0/v1",
}


def scores_of(task: str, share: float, count: int, rng: random.Random) -> list[float]:
    right = [float(rng.random() < share) for _ in range(count)]
    if task == "talk":
        return [1.0 + 8.5 * score for score in right]
    return [0.1 + 0.3 * (1 - score) + 0.01 * rng.random() for score in right] if task == "held-out-nll" else right


def cell(method: Method, seed: int, task: str, count: int, **changes: Any) -> CellResult:
    """One result as `compare` writes it, except that nothing was run."""
    rng = random.Random(f"{method.name} {seed} {task}")
    scores = scores_of(task, BASE.get(method.name, 0.5), count, rng)
    metric, best, worst = {
        "talk": ("rating", 10.0, 1.0), "held-out-nll": ("nll", 0.0, None),
    }.get(task, ("accuracy", 1.0, 0.0))  # fmt: skip
    of_task: dict[str, Any] = {"items": digest([task, count])}
    if task != "held-out-nll":
        of_task |= {"protocol": f"{task}/greedy-v1", "task": f"{task} 1", "judge": None}
    trained = (
        {"budget": "85 steps of 32 demonstrations", "left_out": "none"} if method.trains else {"budget": None, "left_out": None}
    )
    made = CellResult(
        method=method.name,
        seed=seed,
        task=task,
        metric=metric,
        best=best,
        worst=worst,
        comparable={**FRAME, **of_task, **trained},
        items=tuple(ItemScore(f"{task}/{number}", score, "why") for number, score in enumerate(scores)),
        counts={"answers": count, "truncated": 0, "errors": 0},
        record=method.describe(),
        cost={"steps": 85, "tokens": 366777, "seconds": 65.3} if method.trains else {"steps": 0, "tokens": 0, "seconds": 0.0},
        provenance=provenance(count if changes.pop("limited", False) else None),
        fingerprint=digest([method.name, seed, task]),
    )
    return dataclasses.replace(made, **changes)


def provenance(limit: int | None = None, **configuration: Any) -> dict[str, Any]:
    return {
        "created": "2026-11-21T00:31:16+00:00",
        "command": "compare.py --out /home/ada/runs",
        "suite": {"version": "0.1.0", "commit": "62439721fc11aac6b79aa01e849941612a7b4334", "dirty": False},
        "packages": {"torch": "2.13.0+cpu"},
        "python": "3.11.7",
        "hardware": {"cores": 4, "gpus": [], "machine": "x86_64", "memory_gib": 23.5, "threads": 1},
        "configuration": {"split": "test", "limit": limit, "out": "/home/ada/runs", **configuration},
        "inputs": {
            "model": {"name": "mini", "weights_sha256": FRAME["model"], "parameters": 935040},
            "demonstrations": {"source": "/home/ada/mine.jsonl", "trained on": 1350, "held out": 150},
        },
        "rounds": [{"weights_sha256": digest("trained")}],
        "scores": "ab8b175b26454e3718a241800ed69f5c",
    }  # fmt: skip


def run_of(methods: Sequence[str], seeds: Sequence[int] = (0, 1), tasks: dict[str, int] = TASKS) -> list[CellResult]:
    """Cells of a whole comparison; the model as given has one seed."""
    loaded = [load_method(name) for name in methods]
    return [
        cell(method, seed, task, count)
        for method in loaded
        for seed in (seeds if method.trains else seeds[:1])
        for task, count in tasks.items()
    ]


def write_run(out: Path, results: Sequence[CellResult], failures: Sequence[dict[str, str]] = ()) -> Path:
    """The folder that a comparison leaves: results, its recipe, its table."""
    for result in results:
        path = out / "results" / result.task / f"{result.method}-seed{result.seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
    seeds = sorted({result.seed for result in results})
    (out / "config.yaml").write_text(yaml.safe_dump({"seeds": seeds, "split": "test"}), encoding="utf-8")
    cells = [{"method": result.method, "task": result.task, "reason": ""} for result in results]
    (out / "table.json").write_text(json.dumps({"cells": [*cells, *failures]}), encoding="utf-8")
    return out
