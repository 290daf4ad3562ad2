"""One file of the leaderboard: how it is made of a cell's result, read back, and recomputed from its own items."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from gsil_bench.errors import UserError
from gsil_bench.leaderboard.schema import VERSION, problems
from gsil_bench.records import CellResult, ItemScore, canonical, digest

RESULTS, SCHEMA_FILE = "results", "schema.json"
ID_DIGITS = 12
OF_TASK = frozenset({"protocol", "task", "items", "judge"})
"""Keys of `comparable` that belong to the task; the others are the setting, which all tasks of a run share."""
OF_METHOD = frozenset({"budget", "left_out"})
"""Keys of `comparable` that are null for a model that was not trained; it stands beside every budget."""
PATH = re.compile(r"(?<![\w:/.~])(?:~/|[A-Za-z]:\\|/)(?:[^\s/\\\"']+[/\\])+([^\s/\\\"',;)]*)")
"""A path of some machine, whose last part is its name; what stands behind "https:" is none."""


@dataclass(frozen=True)
class Entry:
    """A file of the leaderboard that fulfils the schema."""

    path: str
    """Below the leaderboard's folder, with "/"."""
    data: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Its method's name."""
        return str(self.data["method"]["name"])

    @property
    def seed(self) -> int:
        """Of the training."""
        return int(self.data["seed"])

    @property
    def task(self) -> str:
        """Its task's name."""
        return str(self.data["task"])

    @property
    def trained(self) -> bool:
        """False for the model as given."""
        return self.data["method"]["record"]["loss"] is not None

    @cached_property
    def setting(self) -> dict[str, Any]:
        """What a table shares besides the task and the budget."""
        return {key: value for key, value in self.data["comparable"].items() if key not in OF_TASK | OF_METHOD}

    @cached_property
    def budget(self) -> dict[str, Any] | None:
        """Budget and what was left out of it; None for the model as given."""
        found = {key: self.data["comparable"].get(key) for key in sorted(OF_METHOD)}
        return found if self.trained else None

    @cached_property
    def frame(self) -> dict[str, Any]:
        """Of its task: protocol, version, items, judge, metric and scale."""
        found = {key: value for key, value in self.data["comparable"].items() if key in OF_TASK}
        return found | {key: self.data[key] for key in ("task", "metric", "best", "worst")}

    def result(self) -> CellResult:
        """As the statistics want it."""
        data = self.data
        pairs = zip(data["items"]["ids"], data["items"]["scores"], strict=True)
        return CellResult(
            method=self.method,
            seed=self.seed,
            task=self.task,
            metric=data["metric"],
            best=data["best"],
            worst=data["worst"],
            comparable=data["comparable"],
            items=tuple(ItemScore(id_, score, "") for id_, score in pairs),
            counts=data["counts"],
            record={**data["method"]["record"], "trains": self.trained},
            cost=data["cost"],
            provenance=data["provenance"],
            fingerprint=data["fingerprint"],
            warnings=tuple(data["warnings"]),
        )


@dataclass(frozen=True)
class Said:
    """What a submitter adds to a run's results."""

    tuning: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Method → search_space, trials, split."""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Method → link to its code, for methods that are not in this repository."""
    link: str | None = None


def entry_of(result: CellResult, said: Said = Said()) -> Entry:
    """The leaderboard's file of a finished cell: no answers, no reasons, no paths.

    Raises:
        UserError: what the result is, or says, does not fit the schema.
    """
    data = without_paths(_data_of(result, said))
    entry = Entry(entry_path(data), data)
    found = [*problems(data), *inconsistencies(data)]
    if found:
        raise UserError(f"{result.method}, seed {result.seed}, on {result.task} cannot be an entry: {found[0]}")
    return entry


def _data_of(result: CellResult, said: Said) -> dict[str, Any]:
    inputs, configuration = result.provenance.get("inputs", {}), result.provenance.get("configuration", {})
    demonstrations, model = inputs.get("demonstrations", {}), inputs.get("model", {})
    ids, scores = [item_id(item.id) for item in result.items], [_short(item.score) for item in result.items]
    return {
        "schema_version": VERSION,
        "fingerprint": result.fingerprint,
        "model": {
            "name": str(model.get("name")),
            "weights_sha256": result.comparable.get("model"),
            "parameters": model.get("parameters"),
        },
        "demonstrations": {
            "sha256": result.comparable.get("demonstrations"),
            "source": str(demonstrations.get("source")),
            "trained_on": demonstrations.get("trained on"),
            "held_out": demonstrations.get("held out"),
        },
        "chat_sha256": result.comparable.get("chat"),
        "method": {
            "name": result.method,
            "record": {**result.record, "name": result.method},
            "source": said.sources.get(result.method),
        },
        "seed": result.seed,
        "task": result.task,
        "protocol": result.comparable.get("protocol"),
        "metric": result.metric,
        "best": result.best,
        "worst": result.worst,
        "limit": configuration.get("limit")
        if "protocol" in result.comparable
        else None,  # the held-out loss has no items to limit
        "comparable": dict(result.comparable),
        "score": mean_score(scores),
        "unscored": sum(score is None for score in scores),
        "items": {"ids": ids, "scores": scores, "sha256": items_sha256(ids, scores)},
        "counts": dict(result.counts),
        "cost": dict(result.cost),
        "tuning": said.tuning.get(result.method),
        "warnings": list(result.warnings),
        "link": said.link,
        "provenance": _provenance(result.provenance),
    }


def _provenance(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run's provenance: the command and the configuration name folders and stay at home."""
    suite = found.get("suite", {})
    return {
        "created": found.get("created"),
        "suite_version": suite.get("version"),
        "commit": suite.get("commit"),
        "dirty": suite.get("dirty"),
        "packages": dict(found.get("packages", {})),
        "python": found.get("python"),
        "hardware": dict(found.get("hardware", {})),
        "weights_sha256": [each["weights_sha256"] for each in found.get("rounds", ())],
    }


def without_paths(value: Any) -> Any:
    """The same JSON with every path of a machine cut to its last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    return PATH.sub(r"\1", value) if isinstance(value, str) else value


def item_id(id_: str) -> str:
    """How an item is named here."""
    return hashlib.sha256(id_.encode()).hexdigest()[:ID_DIGITS]


def _short(score: float | None) -> float | None:
    """The same number in fewer digits: 1 for 1.0."""
    return int(score) if score is not None and float(score).is_integer() else score


def items_sha256(ids: Sequence[str], scores: Sequence[float | None]) -> str:
    """Digest of [[id, score], …]."""
    return digest([[id_, score] for id_, score in zip(ids, scores, strict=True)])


def mean_score(scores: Iterable[float | None]) -> float | None:
    """Exactly rounded, so that every machine finds the same; None if nothing is scored."""
    scored = [score for score in scores if score is not None]
    return math.fsum(scored) / len(scored) if scored else None


def setting_name(data: Mapping[str, Any]) -> str:
    """Folder of a setting: the model's name and eight digits that stand for everything else that is shared."""
    setting = {key: value for key, value in data["comparable"].items() if key not in OF_TASK | OF_METHOD}
    plain = re.sub(r"[^A-Za-z0-9._-]+", "--", str(data["model"]["name"])).strip("-.")[:80]
    return f"{plain or 'model'}-{digest(setting)[:8]}"


def entry_path(data: Mapping[str, Any]) -> str:
    """Where an entry lies: one place for each cell, so that a second one cannot hide."""
    method = f"{data['method']['name']}-seed{data['seed']}.json"
    return str(PurePosixPath(RESULTS, setting_name(data), *str(data["task"]).split("/"), method))


def entry_text(data: Mapping[str, Any]) -> str:
    """The file's bytes: sorted keys, and each array of items in a line of its own."""
    marks = {key: f"\u0000{key}" for key in ("ids", "scores")}
    text = json.dumps({**data, "items": {**data["items"], **marks}}, indent=1, sort_keys=True, ensure_ascii=False)
    for key, mark in marks.items():
        text = text.replace(json.dumps(mark), canonical(data["items"][key]))
    return text + "\n"


def read_entry(folder: Path, path: Path) -> tuple[Entry | None, list[str]]:
    """The entry in a file, or what is wrong with the file."""
    name = path.relative_to(folder).as_posix()
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=_no_constant)
        canonical(data).encode()  # half a character or a number without bounds could not be written again
    except (OSError, ValueError, RecursionError) as error:
        return None, [f"{name}: not JSON: {' '.join(str(error).split())}"]
    found = [f"{name}: {line}" for line in [*problems(data), *([] if any(problems(data)) else inconsistencies(data))]]
    if not found and entry_path(data) != name:
        found = [f"{name}: its content belongs into {entry_path(data)}"]
    if not found and entry_text(data) != text:
        found = [f"{name}: not as `gsil-bench submit` writes it; it is never edited by hand"]
    return (None, found) if found else (Entry(name, data), [])


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def read_entries(folder: Path) -> tuple[list[Entry], list[str]]:
    """All entries of a leaderboard by path, and what is wrong with the other files below results/.

    Raises:
        UserError: there is no such folder.
    """
    results = folder / RESULTS
    if not results.is_dir() and not (folder / SCHEMA_FILE).is_file():  # without results yet it is still a leaderboard
        raise UserError(f"{folder}: no folder {RESULTS} in it; name the leaderboard's folder, such as leaderboards")
    entries, found = [], []
    for path in sorted(path for path in results.rglob("*") if path.is_file()):
        if path.suffix != ".json":
            found.append(f"{path.relative_to(folder).as_posix()}: not a result; only .json files belong below {RESULTS}/")
            continue
        entry, lines = read_entry(folder, path)
        entries += [entry] if entry is not None else []
        found += lines
    return entries, found


def inconsistencies(data: Mapping[str, Any]) -> list[str]:
    """What a file that fulfils the schema says wrongly of itself: everything that can be recomputed is."""
    items, comparable = data["items"], data["comparable"]
    ids, scores = items["ids"], items["scores"]
    if len(ids) != len(scores):
        return [f"items.scores: {len(scores)} scores for {len(ids)} items"]
    found = [
        ("items.sha256", items["sha256"], items_sha256(ids, scores)),
        ("score", data["score"], mean_score(scores)),
        ("unscored", data["unscored"], sum(score is None for score in scores)),
        ("model.weights_sha256", data["model"]["weights_sha256"], comparable["model"]),
        ("demonstrations.sha256", data["demonstrations"]["sha256"], comparable["demonstrations"]),
        ("chat_sha256", data["chat_sha256"], comparable.get("chat")),
        ("protocol", data["protocol"], comparable.get("protocol")),
        ("method.record.name", data["method"]["record"].get("name"), data["method"]["name"]),
    ]
    lines = [
        f"{field}: says {_plain(said)}, its items and inputs say {_plain(true)}" for field, said, true in found if said != true
    ]
    if len(set(ids)) != len(ids):
        lines.append("items.ids: an item is there twice")
    low, high = sorted((data["best"], math.inf if data["worst"] is None else data["worst"]))
    outside = [score for score in scores if score is not None and not low <= score <= high and data["worst"] is not None]
    if outside:
        lines.append(f"items.scores: {outside[0]} is outside the scale of {low:g} to {high:g}")
    if without_paths(data) != data:
        lines.append("a text names a path of some machine; `gsil-bench submit` leaves it out")
    return lines


def _plain(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 24 else text[:23] + "…"
