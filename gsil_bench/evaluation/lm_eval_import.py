"""Results that lm-eval wrote, as this suite's records: results_DATE.json, and samples_TASK_DATE.jsonl beside it.

Only results with samples can be compared item by item, so a file without them is refused. What was read is checked: every task's
samples are there, once under each filter, and their mean is the figure that lm-eval printed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.records import NAME, CellResult, ItemScore, digest, write_atomically

TOLERANCE = 1e-6
"""Between lm-eval's figure and the mean of its samples."""


@dataclass(frozen=True)
class ImportedTask:
    """One task of an imported run."""

    task: str
    """As lm-eval names it."""
    key: str
    """The metric that the items' scores are: "exact_match,strict-match" (metric, filter)."""
    keys: tuple[str, ...]
    """Every metric that has a value for each item; all of them are in the items' details."""
    items: tuple[ItemScore, ...]
    """In the order of the documents; the id is the document's number. Details: "metrics", and lm-eval's hashes of "document",
    "prompt" and "target"."""
    documents: int
    """How many the task has; more than the items if the run was limited."""
    version: str
    shots: int
    model: str
    harness: str
    """Version of lm-eval."""
    template_sha256: str
    """Of the chat template; "" if none was applied."""

    def as_result(self, method: str, seed: int = 0) -> CellResult:
        """A cell of a comparison: comparable with another run of the same documents under the same definition."""
        comparable = {
            "task": f"{self.task} {self.version}",
            "protocol": f"{self.shots} shots, {self.key}, lm-eval {self.harness}",
            "chat": self.template_sha256,
            "items": digest([[item.id, item.details["document"], item.details["target"]] for item in self.items]),
        }
        counts = {"answers": len(self.items)}
        made_by = {"model": self.model, "harness": f"lm-eval {self.harness}"}
        cell = (method, seed, f"lm-eval/{self.task}", self.key, 1.0, 0.0)
        fingerprint = digest([*cell, comparable, [[item.id, item.score] for item in self.items]])
        return CellResult(*cell, comparable, self.items, counts, {}, {}, made_by, fingerprint)


def import_results(path: Path, metric: str | None = None) -> list[ImportedTask]:
    """The tasks of a run of lm-eval's with their items' scores.

    Args:
        path: the results file, or a folder that holds one (at any depth).
        metric: what the items' scores are, as "metric,filter" or "metric" (then under the first filter); by default each task's
            first metric under its first filter.

    Raises:
        UserError: no results or several, samples that are missing, repeated or another run's, or an unknown metric.
    """
    file = _results_file(path)
    results = _read_json(file)
    try:
        groups = {name for name, members in (results.get("group_subtasks") or {}).items() if members}
        names = [name for name in results["results"] if name not in groups]
        return [_task(file, results, name, metric) for name in names]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{file} is not a results file of lm-eval's: {type(error).__name__} {error}") from error


def write_imported(results: Sequence[CellResult], out: Path) -> None:
    """Write each as the file that a comparison writes of its cells.

    Raises:
        UserError: a name that cannot be part of a path.
    """
    for result in results:
        for part in (result.method, *result.task.split("/")):
            if not NAME.fullmatch(part):
                raise UserError(f"the name {part!r}: letters, digits, '.', '_' and '-' only (64 at most)")
    for result in results:
        text = json.dumps(dataclasses.asdict(result), indent=1, sort_keys=True, ensure_ascii=False)
        write_atomically(out / "results" / result.task / f"{result.method}-seed{result.seed}.json", text + "\n")


def _results_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.rglob("results_*.json"))
    if len(found) != 1:
        named = ", ".join(str(file.relative_to(path)) for file in found[:4])
        problem = f"{len(found)} runs ({named}); name one of these files" if found else "no results_DATE.json of lm-eval's"
        raise UserError(f"{path} holds {problem}")
    return found[0]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
        raise UserError(f"{file} is not a results file of lm-eval's: it has no results")
    return data


def _task(file: Path, results: Mapping[str, Any], name: str, metric: str | None) -> ImportedTask:
    config, printed = results["configs"][name], results["results"][name]
    documents = _documents(file, name)
    filters = [entry["name"] for entry in config.get("filter_list") or ()] or ["none"]
    expected = int(results["n-samples"][name]["effective"])
    if len(documents) != expected:
        raise UserError(f"{file.name}: {name} was scored on {expected} documents, but {len(documents)} are among the samples")
    keys = _keys(documents)
    key = _chosen(name, metric, keys, filters, config)
    _check_mean(file, name, key, printed, documents)
    return ImportedTask(
        task=name,
        key=key,
        keys=tuple(keys),
        items=tuple(_item(number, document, key) for number, document in sorted(documents.items())),
        documents=int(results["n-samples"][name]["original"]),
        version=str(results["versions"][name]),
        shots=int(results["n-shot"][name]),
        model=str(results.get("model_name") or results["config"]["model"]),
        harness=str(results.get("lm_eval_version") or "unknown"),
        template_sha256=str(results.get("chat_template_sha") or ""),
    )


@dataclass(frozen=True)
class _Sample:
    """A document's metrics under all filters."""

    metrics: Mapping[str, float]
    hashes: Mapping[str, str]
    answer: str


def _documents(file: Path, name: str) -> dict[int, _Sample]:
    """Number of each document → its sample."""
    by_filter: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    samples = file.with_name(f"samples_{name}_{file.stem.removeprefix('results_')}.jsonl")
    for line in _lines(samples, name):
        found = by_filter[line["filter"]]
        if line["doc_id"] in found:
            raise UserError(f"{samples.name}: document {line['doc_id']} is there twice under filter {line['filter']}")
        found[line["doc_id"]] = line
    first = next(iter(by_filter.values()))
    for other, lines in by_filter.items():
        if lines.keys() != first.keys():
            missing = sorted(lines.keys() ^ first.keys())[:4]
            raise UserError(f"{samples.name}: documents {missing} are not there under every filter, such as {other}")
    return {number: _sample({name: lines[number] for name, lines in by_filter.items()}) for number in first}


def _lines(samples: Path, name: str) -> Iterator[dict[str, Any]]:
    if not samples.is_file():
        raise UserError(f"{samples} is missing: the samples of {name} are needed item by item; run lm-eval with --log_samples")
    number = 0
    with samples.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{samples}, line {number}: {error}") from error
            if not isinstance(record, dict) or not {"doc_id", "filter", "metrics"} <= record.keys():
                raise UserError(f"{samples}, line {number}: not a sample of lm-eval's (no doc_id, filter or metrics)")
            yield record
    if not number:
        raise UserError(f"{samples} is empty")


def _sample(lines: Mapping[str, Mapping[str, Any]]) -> _Sample:
    """A document's lines, by filter, as one."""
    metrics = {
        f"{metric},{name}": float(line[metric])
        for name, line in lines.items()
        for metric in line["metrics"]
        if isinstance(line.get(metric), int | float)
    }
    first = next(iter(lines.values()))
    hashes = {
        key: str(first.get(f"{name}_hash", "")) for key, name in (("document", "doc"), ("prompt", "prompt"), ("target", "target"))
    }
    return _Sample(metrics, hashes, json.dumps(first.get("filtered_resps"), ensure_ascii=False)[:200])


def _keys(documents: Mapping[int, _Sample]) -> list[str]:
    """Metrics that every document has a number for. Others (F1, BLEU, perplexity) exist for a set of documents only."""
    first = next(iter(documents.values())).metrics
    return [key for key in first if all(key in document.metrics for document in documents.values())]


def _chosen(name: str, metric: str | None, keys: Sequence[str], filters: Sequence[str], config: Mapping[str, Any]) -> str:
    listed = [str(entry["metric"]) for entry in config.get("metric_list") or ()]
    wanted = [f"{each},{filters[0]}" for each in listed] or list(keys)
    if metric is not None:
        wanted = [metric if "," in metric else f"{metric},{filters[0]}"]
        if wanted[0] not in keys:
            raise unknown_name(f"metric of {name}'s items", metric, keys)
    found = next((key for key in wanted if key in keys), None)
    if found is None:
        raise UserError(f"{name}: none of its metrics ({', '.join(listed)}) has a value for each document")
    return found


def _check_mean(file: Path, name: str, key: str, printed: Mapping[str, Any], documents: Mapping[int, _Sample]) -> None:
    """Samples of another run would have another mean."""
    mean = math.fsum(document.metrics[key] for document in documents.values()) / len(documents)
    if not isinstance(printed.get(key), int | float) or not abs(float(printed[key]) - mean) <= TOLERANCE:
        raise UserError(
            f"{file.name}: {name} has {key} {printed.get(key)}, but its samples' mean is {mean:.6f}; they are of another run, or "
            "the metric is not a mean"
        )


def _item(number: int, sample: _Sample, key: str) -> ItemScore:
    value = sample.metrics[key]
    details = {"metrics": dict(sample.metrics), **sample.hashes}
    if not math.isfinite(value):
        return ItemScore(str(number), None, f"lm-eval's {key} is {value}", details={**details, "metrics": {}})
    return ItemScore(str(number), value, f"lm-eval's {key} is {value:g} for {sample.answer}", details=details)
