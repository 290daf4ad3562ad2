"""From a finished cell to its result file, and back. The file is written last: its existence means the cell is complete."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsil_bench.evaluation.scoring import FILE
from gsil_bench.inputs import Inputs, describe
from gsil_bench.plan import Cell
from gsil_bench.provenance import provenance
from gsil_bench.records import CellResult, ItemScore, digest, read_jsonl, result_from_json, write_atomically
from gsil_bench.store import Artefact


def result_path(out: Path, cell: Cell) -> Path:
    """Where a cell's result lies. Names were checked to be harmless in a path."""
    return out / "results" / cell.task / f"{cell.method.name}-seed{cell.seed}.json"


def write_result(out: Path, cell: Cell, inputs: Inputs, made: Mapping[str, Artefact]) -> CellResult:
    """Write a cell's result, unless the file already holds this very cell: then its provenance stays that of the run that made
    it.
    """
    path = result_path(out, cell)
    fingerprint = digest([cell.method.describe(), cell.seed, cell.task, dict(cell.comparable), made[cell.scores.key].content])
    existing = read_result(path)
    if existing is not None and existing.fingerprint == fingerprint:
        return existing
    result = _result(cell, inputs, made, fingerprint)
    text = json.dumps(dataclasses.asdict(result), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")
    return result


def read_result(path: Path) -> CellResult | None:
    """The result in a file, or None if there is none that this version can read."""
    try:
        return result_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _result(cell: Cell, inputs: Inputs, made: Mapping[str, Artefact], fingerprint: str) -> CellResult:
    scores, rounds = made[cell.scores.key], [made[stage.key] for stage in cell.training]
    cost = {key: sum(artefact.facts[key] for artefact in rounds) for key in ("steps", "tokens", "scored_tokens")}
    return CellResult(
        method=cell.method.name,
        seed=cell.seed,
        task=cell.task,
        metric=cell.metric,
        best=cell.best,
        worst=cell.worst,
        comparable=dict(cell.comparable),
        items=tuple(
            ItemScore(record["id"], record["score"], record["reason"], record["group"])
            for record in read_jsonl(scores.folder / FILE)
        ),
        counts=dict(scores.facts["counts"]),
        record=cell.method.describe(),
        cost={**cost, "seconds": round(sum(artefact.seconds for artefact in rounds), 1)},
        provenance=_provenance(cell, inputs, scores, rounds),
        fingerprint=fingerprint,
    )


def _provenance(cell: Cell, inputs: Inputs, scores: Artefact, rounds: list[Artefact]) -> dict[str, Any]:
    """Facts of the run, the resolved configuration, and which artefacts the numbers come from."""
    trained = [
        {
            "weights_sha256": artefact.content,
            "step_zero": artefact.facts["step_zero"],
            "noise_floor": artefact.facts["noise_floor"],
        }
        for artefact in rounds
    ]
    return {
        **provenance(),
        "configuration": inputs.config.as_dict(),
        "inputs": describe(inputs),
        "rounds": trained,
        "scores": scores.fingerprint,
    }
