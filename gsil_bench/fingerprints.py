"""sha256 of large files, remembered: a model's shards are read once, not on every run.

$XDG_CACHE_HOME/gsil_bench/sha256/<digest of the path>.json

What is remembered holds as long as the file's size, inode and times of modification and change are the same, to the nanosecond.
A file that changed in the last seconds is not remembered: it could change again within its clock's tick.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from gsil_bench.records import digest, file_sha256, write_atomically

SMALL = 2**24
"""Bytes that are read faster than asking is worth."""
SETTLED_SECONDS = 5.0
"""Since the last change; file systems round their times, to 2 s at worst."""


def remembered_sha256(path: Path) -> str:
    """sha256 of a file's bytes, from memory if the file is what it was."""
    found = path.stat()
    if found.st_size < SMALL:
        return file_sha256(path)
    state = [found.st_size, found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns]
    note = _folder() / f"{digest(str(path.resolve()))[:32]}.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["state"] == state:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing is known
    sha256 = file_sha256(path)
    if time.time() - max(found.st_mtime, found.st_ctime) > SETTLED_SECONDS:
        _remember(note, json.dumps({"state": state, "sha256": sha256}))
    return sha256


def _remember(note: Path, text: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, text)
    except OSError:
        pass  # no cache folder: the file is read again next time


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gsil_bench" / "sha256"
