"""The frozen records that cross a stage boundary, and how they are read and written. Standard library only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class Demonstration:
    """A conversation up to the last user turn, and the answer that demonstrates what to do."""

    id: str
    """Hash of messages and answer, never a row number: prompts repeat and files are shuffled."""
    messages: tuple[Message, ...]
    answer: str
    rejected: str | None = None
    """A worse answer, where the data has preferences."""
    where: str = ""
    """File and line, for error messages."""


@dataclass(frozen=True)
class Encoded:
    """A prompt and a completion in tokens. Every token of the completion is scored, none of the prompt's is."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Of a finished answer: its tokens and one end token."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a sequence needs a prompt: the first token of a text has no log-prob")

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Generation:
    """A completion drawn from a policy for a demonstration's prompt."""

    id: str
    """Of the demonstration."""
    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    """"stop" (ends in the end token), "length" (cut: no end token) or "error"."""
    sample: int = 0
    """Which of the demonstration's self-generations."""


@dataclass(frozen=True)
class ItemAnswer:
    """A model's answers to all turns of one item, for one sample."""

    id: str
    sample: int
    texts: tuple[str, ...]
    """One per turn."""
    finish_reasons: tuple[str, ...]
    tokens: tuple[int, ...]
    """Number of generated tokens per turn."""
    error: str = ""
    cut: tuple[int, ...] = ()
    """Tokens that were left out at the beginning of each prompt, or context of a continuation, because it was too long."""


@dataclass(frozen=True)
class ItemScore:
    """The score of one item (mean over its samples), or None with a reason."""

    id: str
    score: float | None
    reason: str
    group: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def demonstration_id(messages: Iterable[Message], answer: str, rejected: str | None = None) -> str:
    """16 hex digits that name a demonstration by its content."""
    content: list[Any] = [[dict(message) for message in messages], answer]
    return digest(content if rejected is None else [*content, rejected])[:16]


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write dataclass records, one JSON object a line, atomically."""
    write_atomically(path, "".join(canonical(dataclasses.asdict(record)) + "\n" for record in records))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that this suite wrote."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a method may be called, and each part of a task's name between "/": it becomes part of a path."""

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class CellResult:
    """One cell: a method with a seed, scored on a task. Its file is written last, so its existence means the cell is complete."""

    method: str
    seed: int
    task: str
    metric: str
    """What is averaged: "accuracy", "pass@1", "rating", "nll"."""
    best: float
    """Score of a perfect answer (best < worst, or no worst: lower is better)."""
    worst: float | None
    """Score of an empty answer; None where there is none (a loss without an upper end)."""
    comparable: Mapping[str, Any]
    """Everything that must be equal for a difference to be the method's: model, demonstrations, template, budget, protocol,
    items."""
    items: tuple[ItemScore, ...]
    """Every item in the task's order; `details` are left in the run's store."""
    counts: Mapping[str, float]
    """Diagnoses: "truncated" and "errors" (answers), "format_ok", "generated_tokens", …"""
    record: Mapping[str, Any]
    """The resolved method: loss, settings, protocol, training."""
    cost: Mapping[str, float]
    """Of training this cell: "steps", "tokens", "seconds"."""
    provenance: Mapping[str, Any]
    """Command, commit, versions, hashes, hardware. Two runs of one configuration may differ here and in cost's seconds only."""
    fingerprint: str = ""
    """Of the stages that made it: the same fingerprint is the same cell."""
    warnings: tuple[str, ...] = ()
    """What a reader should know of how it was trained: shortcuts, demonstrations left out, a slower layout."""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class CellFailure:
    """A cell that has no score, and why."""

    method: str
    seed: int
    task: str
    reason: str


def result_from_json(data: Mapping[str, Any]) -> CellResult:
    """A result file's content as a record. Raises ValueError for another schema version."""
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"result schema {data.get('schema_version')}, this version reads {SCHEMA_VERSION}")
    return CellResult(
        **{**data, "items": tuple(ItemScore(**item) for item in data["items"]), "warnings": tuple(data.get("warnings", ()))}
    )
