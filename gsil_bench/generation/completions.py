"""Completions on disk: one line each, flushed batch by batch, so that a killed run computes only the batches it had not
finished.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gsil_bench.generation.engine import Completion, Engine, Request, Sampling
from gsil_bench.records import canonical


def complete_all(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    path: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """Every request's completion, in order, kept in `path` as they come.

    Args:
        path: JSON lines; what it already holds is kept, a line that was cut by a kill is dropped.
        advance: called with the number of requests that a batch added; may raise to stop between two batches.

    Raises:
        ValueError: two requests share an id.
    """
    if len({request.id for request in requests}) != len(requests):
        raise ValueError("two requests share an id")
    done = {completion.id: completion for completion in _kept(path)}
    advance(sum(request.id in done for request in requests))
    with path.open("a", encoding="utf-8") as file:
        for batch in engine.batches(requests, sampling):
            members = [requests[index] for index in batch]
            if all(member.id in done for member in members):
                continue
            missing = sum(member.id not in done for member in members)
            for completion in engine.complete(members, sampling):  # the whole batch: its composition decides the last bits
                if completion.id not in done:
                    file.write(canonical(dataclasses.asdict(completion)) + "\n")
                    done[completion.id] = completion
            file.flush()
            os.fsync(file.fileno())
            advance(missing)
    ordered = [done[request.id] for request in requests]
    _rewrite(path, ordered)
    return ordered


def _kept(path: Path) -> Iterator[Completion]:
    """Whole lines of an earlier run; the file is cut after the last one."""
    if not path.exists():
        return
    whole = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n"):
                    break
                record: dict[str, Any] = json.loads(line)
                completion = Completion(**{**record, "tokens": tuple(record["tokens"])})
            except (ValueError, TypeError, KeyError):
                break
            whole += len(line)
            yield completion
    os.truncate(path, whole)


def _rewrite(path: Path, completions: Sequence[Completion]) -> None:
    """Put the lines in the requests' order, so that the file does not tell whether the run was interrupted."""
    partial = path.with_suffix(".ordered")
    partial.write_text("".join(canonical(dataclasses.asdict(item)) + "\n" for item in completions), encoding="utf-8")
    partial.replace(path)
