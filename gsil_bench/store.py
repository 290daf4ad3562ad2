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

from gsil_bench.errors import StoreError
from gsil_bench.records import digest, file_sha256, write_atomically

MANIFEST = "manifest.json"
POLL_SECONDS = 0.5
VERIFIED_BYTES = 64 * 2**20
"""Larger files are believed by their size: hashing gigabytes at every start would cost more than it finds."""
UNFINISHED = (".new", ".ordered")
"""Endings of files that are renamed when they are whole; a kill may leave them."""


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
    temporary: tuple[str, ...] = ()
    """Files that only an interrupted build needs: no part of the artefact, removed when it is safe."""


class Store:
    """The artefacts below one folder. Safe for several processes on one file system that has locks."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def lookup(self, kind: str, fingerprint: str) -> Artefact | None:
        """The finished artefact, or None. One whose files are missing or damaged counts as absent, so that it is built again."""
        return _read(self.root / kind / fingerprint)

    def build(
        self,
        kind: str,
        fingerprint: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], Produced],
        waiting: Callable[[], None] = lambda: None,
        poll: Callable[[], None] = lambda: None,
    ) -> Artefact:
        """The finished artefact, made now unless another process finished it while this one waited for its lock.

        Args:
            kind: folder of the artefact.
            fingerprint: digest of everything that decides its content.
            inputs: the same in words, for the manifest.
            make: fills the folder it is given, which may hold what an interrupted run left, and reports.
            waiting: called once if another process holds the lock.
            poll: called again and again while it does; may raise to give up.
        """
        with self._lock(kind, fingerprint, waiting, poll):
            done = self.lookup(kind, fingerprint)
            if done is not None:
                return done
            partial = self.root / "partial" / f"{kind}-{fingerprint}"
            if _read(partial) is not None:  # killed between the manifest and the renaming
                self._publish(partial, kind, fingerprint)
                return self._finished(kind, fingerprint)
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
        return self._finished(kind, fingerprint)

    def _finished(self, kind: str, fingerprint: str) -> Artefact:
        finished = self.lookup(kind, fingerprint)
        if finished is None:
            raise RuntimeError(f"{kind} {fingerprint} was written but cannot be read back from {self.root}")
        return finished

    def _finish(
        self, partial: Path, kind: str, fingerprint: str, inputs: Mapping[str, Any], produced: Produced, seconds: float
    ) -> None:
        for path in partial.rglob("*"):
            if path.is_file() and (path.name.startswith(".") or path.suffix in UNFINISHED):
                path.unlink()
        files = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file() and path.name not in (MANIFEST, *produced.temporary)
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
        for name in produced.temporary:
            (partial / name).unlink(missing_ok=True)
        self._publish(partial, kind, fingerprint)

    def _publish(self, partial: Path, kind: str, fingerprint: str) -> None:
        final = self.root / kind / fingerprint
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # damaged, or lookup would have found it
            shutil.rmtree(final)
        partial.rename(final)

    @contextmanager
    def _lock(self, kind: str, fingerprint: str, waiting: Callable[[], None], poll: Callable[[], None]) -> Iterator[None]:
        """Hold the artefact's lock."""
        path = self.root / "locks" / f"{kind}-{fingerprint}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            if not _acquire(lock, 0.0):
                waiting()
                while not _acquire(lock, POLL_SECONDS):
                    poll()
        except OSError as error:
            raise StoreError(f"cannot write below {self.root}: {error.strerror}; choose another folder with --out") from error
        try:
            yield
        finally:
            lock.release()


def _acquire(lock: FileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def _read(folder: Path) -> Artefact | None:
    """The artefact in a folder, or None if it has no manifest or is not what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all(_is_whole(folder / name, entry) for name, entry in manifest["files"].items())
        artefact = Artefact(folder, manifest["content"], manifest["facts"], manifest["seconds"], manifest["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return artefact if whole else None


def _is_whole(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is what its manifest says: by its size, and by its bytes where reading them costs little."""
    size = path.stat().st_size
    return size == entry["bytes"] and (size > VERIFIED_BYTES or file_sha256(path) == entry["sha256"])


def _read_seconds(partial: Path) -> float:
    """Seconds that interrupted runs already spent on a partial artefact."""
    try:
        return float((partial / "seconds").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0
