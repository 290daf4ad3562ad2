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
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from gsil_bench.errors import StoreError
from gsil_bench.generation.engine import Completion, Engine, Request
from gsil_bench.records import canonical, digest

logger = logging.getLogger(__name__)

CHECK = 16
"""Hexadecimal digits of a line's checksum."""
NAMED_LINES = 5
"""Line numbers that a warning names at most."""


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
        self, engine: Callable[[], Engine], requests: Sequence[Request], advance: Callable[[int], None] = lambda done: None
    ) -> list[Completion]:
        """Every request's completion, in order; what is not kept yet is produced, each once, and kept.

        Errors are not kept: a larger context or a server that is back may have the answer.

        Args:
            engine: called only if something is missing.
            advance: called with the number of requests that became done; may raise to stop, what came before is kept.
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
        """What the file holds, after a torn last line was cut off. A file without a first line is given one."""
        with self._lock:
            self.path.touch()
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self.path, whole)
            if not whole:
                self._append(dict(self.frame))
        known: dict[str, Completion] = {}
        damaged: list[int] = []
        for number, line in enumerate(data[:whole].splitlines()[1:], 2):
            try:
                record: dict[str, Any] = json.loads(line)
                if record.pop("check") != digest(record)[:CHECK]:
                    raise ValueError("a bit has changed")
                key, logps = str(record.pop("key")), record.pop("logps")
                tokens = tuple(int(token) for token in record.pop("tokens"))
                known[key] = Completion(tokens, logps=None if logps is None else tuple(logps), **record)
            except (ValueError, TypeError, KeyError, AttributeError):
                damaged.append(number)
        if damaged:
            named = ", ".join(map(str, damaged[:NAMED_LINES])) + (", …" if len(damaged) > NAMED_LINES else "")
            logger.warning("%s: %d lines cannot be read (%s); their answers are made again", self.path, len(damaged), named)
        return known
