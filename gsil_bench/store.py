"""Content-addressed artefacts: a folder per fingerprint, built in a partial folder, its manifest written last.

ROOT/KIND/FINGERPRINT/…            finished: manifest.json exists and lists every file
ROOT/partial/KIND-FINGERPRINT/…    being built, or left by a run that was killed: the next run continues there
ROOT/locks/…                       one lock per fingerprint, released by the operating system when its process dies
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gsil_bench.errors import UserError
from gsil_bench.records import digest, file_sha256, write_atomically

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artefact:
    """Something a stage made: where it lies, the digest of what it holds, and facts about it."""

    folder: Path
    content: str
    """Equal contents are interchangeable: dependants are keyed by this, never by a path or a name."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    fingerprint: str = ""


@dataclass(frozen=True)
class Produced:
    """What a stage reports about the folder that it filled."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    content: str | None = None
    """Digest of the content; None takes the digest of all files."""


class Store:
    """The artefacts below one folder. Safe for several processes on one file system that has locks."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def lookup(self, kind: str, fingerprint: str) -> Artefact | None:
        """The finished artefact, or None. One whose files are missing or cut is reported as absent, so that it is built again."""
        folder = self.root / kind / fingerprint
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            whole = all((folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
        except (OSError, ValueError, KeyError):
            return None
        if not whole:
            return None
        return Artefact(folder, manifest["content"], manifest["facts"], manifest["seconds"], fingerprint)

    def build(
        self,
        kind: str,
        fingerprint: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], Produced],
        waiting: Callable[[], None] = lambda: None,
    ) -> Artefact:
        """The finished artefact, made now unless another process finished it while this one waited for its lock.

        Args:
            kind: folder of the artefact.
            fingerprint: digest of everything that decides its content.
            inputs: the same in words, for the manifest.
            make: fills the folder it is given, which may hold what an interrupted run left, and reports.
            waiting: called once if another process holds the lock.
        """
        with self._lock(kind, fingerprint, waiting):
            done = self.lookup(kind, fingerprint)
            if done is not None:
                return done
            partial = self.root / "partial" / f"{kind}-{fingerprint}"
            partial.mkdir(parents=True, exist_ok=True)
            seconds_before = _read_seconds(partial)
            started = time.monotonic()
            try:
                produced = make(partial)
            finally:
                seconds = seconds_before + time.monotonic() - started
                write_atomically(partial / "seconds", str(seconds))
            (partial / "seconds").unlink()
            self._finish(partial, kind, fingerprint, inputs, produced, seconds)
        finished = self.lookup(kind, fingerprint)
        if finished is None:
            raise RuntimeError(f"{kind} {fingerprint} was written but cannot be read back from {self.root}")
        return finished

    def _finish(
        self, partial: Path, kind: str, fingerprint: str, inputs: Mapping[str, Any], produced: Produced, seconds: float
    ) -> None:
        files = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        manifest = {
            "kind": kind,
            "fingerprint": fingerprint,
            "inputs": inputs,
            "content": produced.content or digest({name: entry["sha256"] for name, entry in files.items()}),
            "facts": produced.facts,
            "files": files,
            "seconds": round(seconds, 3),
        }
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        final = self.root / kind / fingerprint
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # damaged, or lookup would have found it
            shutil.rmtree(final)
        partial.rename(final)

    @contextmanager
    def _lock(self, kind: str, fingerprint: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the artefact's lock."""
        path = self.root / "locks" / f"{kind}-{fingerprint}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                waiting()
                lock.acquire()
        except OSError as error:
            raise UserError(f"cannot write below {self.root}: {error.strerror}; choose another folder with --out") from error
        try:
            yield
        finally:
            lock.release()


def _read_seconds(partial: Path) -> float:
    """Seconds that interrupted runs already spent on a partial artefact."""
    try:
        return float((partial / "seconds").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0
