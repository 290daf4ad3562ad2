"""The leaderboard in the shared schema of Every Eval Ever (EvalEval Coalition), version 0.3.0.

One aggregate file for each trained checkpoint (method and seed), with a result for each task:
OUT/data/gsil-bench/DEVELOPER/MODEL/UUID.json. Written from the field names of github.com/evaleval/every_eval_ever
(every_eval_ever/eval_types.py and validator/validation_core.py as of version 0.3.0), whose path rules, bounds and two axes of
deployment it keeps. It has no place for how a model was trained: that is in model_info.additional_details, as texts. The schema's
item-level files want prompts and answers, which the leaderboard does not hold; none are written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gsil_bench.errors import UserError
from gsil_bench.leaderboard.entries import Entry
from gsil_bench.records import canonical, write_atomically
from gsil_bench.reporting.comparison import Comparison

FORMAT = "every-eval-ever"
SCHEMA_VERSION = "0.3.0"
COLLECTION = "gsil-bench"
UNBOUNDED = "Infinity"
"""How the schema writes an end that there is none of."""
KINDS = {"accuracy": "accuracy", "pass@1": "pass_rate", "rating": "judge_score", "nll": "negative_log_likelihood"}


def export(entries: Sequence[Entry], out: Path) -> list[Path]:
    """Write one file a checkpoint, and say where. The same entries give the same bytes.

    Raises:
        UserError: there is nothing to export.
    """
    if not entries:
        raise UserError("the leaderboard has no entries to export")
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(canonical([entry.setting, entry.budget, entry.method, entry.seed]), []).append(entry)
    paths = []
    for key, group in groups.items():
        record = aggregate(group)
        developer, model = record["model_info"]["id"].split("/", 1)
        path = out / "data" / COLLECTION / developer / model / f"{_uuid(key)}.json"
        write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        paths.append(path)
    return paths


def aggregate(entries: Sequence[Entry]) -> dict[str, Any]:
    """The record of one checkpoint: entries of one method and seed, one for each task."""
    first = entries[0].data
    created = max(_seconds(entry.data["provenance"]["created"]) for entry in entries)
    id_ = f"{COLLECTION}/{_plain(first['model']['name'])}--{entries[0].method}-seed{entries[0].seed}"
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{COLLECTION}/{id_.replace('/', '_')}/{created}",
        "evaluation_timestamp": created,
        "retrieved_timestamp": created,
        "source_metadata": {
            "source_name": "gsil_bench leaderboard",
            "source_type": "evaluation_run",
            "source_organization_name": "gsil_bench",
            "evaluator_relationship": "first_party",
            "additional_details": {"link": first["link"]} if first["link"] else {},
        },
        "eval_library": {"name": "gsil_bench", "version": first["provenance"]["suite_version"] or "unknown"},
        "model_info": _model(id_, entries),
        "evaluation_results": [_result(entry) for entry in sorted(entries, key=lambda entry: entry.path)],
    }


def _model(id_: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """The checkpoint, and how it was trained."""
    data, entry = entries[0].data, entries[0]
    name, _, version = str(data["comparable"].get("engine", "")).partition("/")[0].rpartition("-")
    details = {
        "deployment_type": "self_deployed",
        "model_availability": "unknown",
        "base_model": data["model"]["name"],
        "base_model_weights_sha256": data["model"]["weights_sha256"],
        "training_method": entry.method,
        "training_record": canonical(data["method"]["record"]),
        "training_seed": str(entry.seed),
        "training_cost": canonical(data["cost"]),
        "training_budget": str((entry.budget or {}).get("budget") or "no training"),
        "training_tuning": canonical(data["tuning"]),
        "demonstrations": data["demonstrations"]["source"],
        "demonstrations_sha256": data["demonstrations"]["sha256"],
        "weights_sha256": " ".join(data["provenance"]["weights_sha256"]),
        "commit": data["provenance"]["commit"] or "unknown",
    }
    found: dict[str, Any] = {"name": id_.split("/", 1)[1], "id": id_, "developer": COLLECTION}
    if name and version:
        found["inference_engine"] = {"name": name, "version": version}
    return {**found, "additional_details": details}


def _result(entry: Entry) -> dict[str, Any]:
    """One task's score with its interval."""
    data = entry.data
    higher = data["worst"] is not None and data["best"] > data["worst"]
    low, high = sorted([data["best"], data["worst"]]) if data["worst"] is not None else (data["best"], UNBOUNDED)
    return {
        "evaluation_result_id": data["fingerprint"],
        "evaluation_name": entry.task,
        "source_data": {
            "dataset_name": str(data["comparable"].get("task", entry.task)),
            "source_type": "other",
            "additional_details": {"items_sha256": data["comparable"]["items"], "limit": str(data["limit"])},
        },
        "evaluation_timestamp": _seconds(data["provenance"]["created"]),
        "metric_config": {
            "evaluation_description": f"mean {data['metric']} over items, protocol {data['protocol'] or 'none'}",
            "metric_id": f"gsil-bench.{_plain(entry.task)}.{_plain(data['metric'])}",
            "metric_name": data["metric"],
            "metric_kind": KINDS.get(data["metric"], data["metric"]),
            "lower_is_better": not higher,
            "score_type": "continuous",
            "min_score": low,
            "max_score": high,
            "additional_details": {"protocol": data["protocol"] or "none"},
        },
        "score_details": _score(entry),
    }  # fmt: skip


def _score(entry: Entry) -> dict[str, Any]:
    """The mean with the interval that the tables give one seed."""
    data = entry.data
    cell = Comparison.of([entry.result()]).columns[0].cells[0]
    assert cell.score is not None
    if data["score"] is None:
        raise UserError(f"{entry.path}: no item is scored, which the schema cannot say; leave it out")
    interval = {
        "lower": cell.score.low,
        "upper": cell.score.high,
        "confidence_level": cell.score.level,
        "method": cell.score.method,
    }
    return {
        "score": data["score"],
        "details": {"unscored": str(data["unscored"]), "items_digest": data["items"]["sha256"]},
        "uncertainty": {"confidence_interval": interval, "num_samples": cell.n_items},
    }


def _seconds(created: str) -> str:
    """Unix time of an ISO 8601 date."""
    try:
        return str(int(datetime.fromisoformat(created).timestamp()))
    except ValueError as error:
        raise UserError(f"provenance.created: {created!r} is no date") from error


def _plain(text: str) -> str:
    """As part of a portable path: letters, digits, dots inside, '-' and '_'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "unknown"


def _uuid(key: str) -> str:
    """A UUID of version 4's form that follows from the content, so that a second export makes the same files."""
    digits = hashlib.sha256(key.encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:32]}"
