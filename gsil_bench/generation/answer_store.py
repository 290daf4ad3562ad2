"""Completions that were paid for once: append-only files of one line per completion, flushed as each is produced.

    FOLDER/<digest of what decides answers besides the request>.jsonl

The first line says in words what the others belong to: weights, tokenizer, engine, precision. Every other line holds a
completion and its request's key (prompt tokens, sampling, sample). Neither a path nor a name is part of either, so that a
checkpoint that was copied or renamed finds its answers, and another one written to the same place does not. A line that a kill
has torn is cut off; a line that cannot be read is reported with its number and its completion made again. Two processes may
append to one file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock

from gsil_bench.errors import StoreError
from gsil_bench.generation.engine import Completion, EngineError
from gsil_bench.records import canonical, digest

logger = logging.getLogger(__name__)

CHECK = 16
"""Hexadecimal digits of a line's checksum."""
NAMED_LINES = 5
"""Line numbers that a warning names at most."""


class Keyed(Protocol):
    """A request: of an engine, or of a judge."""

    @property
    def key(self) -> str:
        """Of everything that decides its completion besides the store's frame."""


Asked = TypeVar("Asked", bound=Keyed)
Asked_contra = TypeVar("Asked_contra", contravariant=True)


class Completes(Protocol[Asked_contra]):
    """An engine, as far as the store is concerned."""

    def complete(self, requests: Sequence[Asked_contra]) -> Generator[tuple[int, Completion], None, None]:
        """See Engine."""


@dataclass
class AnswerStore:
    """What one engine has answered with one model."""

    folder: Path
    frame: Mapping[str, Any]
    """All that decides an answer besides the request: JSON."""
    _known: dict[str, Completion] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = self.folder / f"{digest(self.frame)[:32]}.jsonl"
        self._lock = FileLock(self.path.with_suffix(".lock"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._known = self._read()
        except OSError as error:
            raise StoreError(f"cannot write {self.path}: {error.strerror}; choose another folder with --out") from error

    def complete(
        self,
        engine: Callable[[], Completes[Asked]],
        requests: Sequence[Asked],
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Completion]:
        """Every request's completion, in order; what is not kept yet is produced, each once, and kept.

        Errors are not kept: a larger context or a server that is back may have the answer.

        Args:
            engine: called only if something is missing.
            advance: called with the number of requests that became done; may raise to stop, what came before is kept.

        Raises:
            EngineError: a request was not served that may be another time; what was served is kept.
        """
        missing = {request.key: request for request in requests if request.key not in self._known}
        repeats = dict.fromkeys(missing, 0)
        for request in requests:
            if request.key in missing:
                repeats[request.key] += 1
        advance(len(requests) - sum(repeats.values()))
        made: dict[str, Completion] = {}
        wanted = list(missing.values())
        if not wanted:
            return [self._known[request.key] for request in requests]
        with closing(engine().complete(wanted)) as completions:
            for index, completion in completions:
                key = wanted[index].key
                made[key] = completion
                if completion.finish_reason != "error":
                    self._keep({"key": key, **asdict(completion)})
                    self._known[key] = completion
                advance(repeats[key])
        unserved = [completion.error for completion in made.values() if completion.passing]
        if unserved:
            raise EngineError(f"{len(unserved)} of {len(wanted)} prompts were not served ({unserved[0]}); the others are kept")
        return [self._known.get(request.key) or made[request.key] for request in requests]

    def _keep(self, record: Mapping[str, Any]) -> None:
        """Append a completion's record."""
        try:
            self._append({**record, "check": digest(record)[:CHECK]})
        except OSError as error:
            raise StoreError(f"cannot write {self.path}: {error.strerror}; what came before is kept") from error

    def _append(self, record: Mapping[str, Any]) -> None:
        """A whole line, written and flushed: what another process appends lies before or after it."""
        with self._lock, self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # another process was killed in the middle of its line
                    file.write(b"\n")
            file.write((canonical(record) + "\n").encode())

    def _read(self) -> dict[str, Completion]:
        """What the file holds. A torn last line is cut off, lines that cannot be read are moved to a file beside it, and a first
        line that is not what it should be is written again.
        """
        with self._lock:
            self.path.touch()
            whole, newline, torn = self.path.read_bytes().rpartition(b"\n")
            lines = whole.split(b"\n") if newline else []
            first = lines[:1] == [canonical(dict(self.frame)).encode()]
            known: dict[str, Completion] = {}
            damaged: dict[int, bytes] = {}
            for number, line in enumerate(lines[first:], 1 + first):
                try:
                    key, completion = _parse(line)
                    known[key] = completion
                except (ValueError, TypeError, KeyError, AttributeError):
                    damaged[number] = line
            if damaged or torn or not first:
                kept = [line for number, line in enumerate(lines, 1) if number not in damaged]
                self._rewrite(kept if first else [canonical(dict(self.frame)).encode(), *kept], list(damaged.values()))
        if damaged:
            named = ", ".join(map(str, list(damaged)[:NAMED_LINES])) + (", …" if len(damaged) > NAMED_LINES else "")
            moved = "they are moved to *.damaged, and what they held is made again"
            logger.warning("%s: %d lines cannot be read (%s); %s", self.path, len(damaged), named, moved)
        return known

    def _rewrite(self, lines: Sequence[bytes], damaged: Sequence[bytes]) -> None:
        """Replace the file at once; nothing that was in it is thrown away but a torn end."""
        if damaged:
            with self.path.with_suffix(".damaged").open("ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
        partial = self.path.with_suffix(".partial")
        partial.write_bytes(b"".join(line + b"\n" for line in lines))
        partial.replace(self.path)


def _parse(line: bytes) -> tuple[str, Completion]:
    """Key and completion of a line.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is not what was written.
    """
    record: dict[str, Any] = json.loads(line)
    if record.pop("check") != digest(record)[:CHECK]:
        raise ValueError("a bit has changed")
    key, logps = str(record.pop("key")), record.pop("logps")
    tokens = tuple(int(token) for token in record.pop("tokens"))
    return key, Completion(tokens, logps=None if logps is None else tuple(logps), **record)
