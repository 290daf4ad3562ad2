"""Remembered sha256: of the file as it is, whatever happened to it, and read only once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gsil_bench import fingerprints
from gsil_bench.fingerprints import remembered_sha256


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, with a cache of the test's own and every size and age remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "SMALL", 0)
    monkeypatch.setattr(fingerprints, "SETTLED_SECONDS", -1.0)
    read: list[Path] = []
    digest_file = fingerprints.file_sha256
    monkeypatch.setattr(fingerprints, "file_sha256", lambda path: (read.append(path), digest_file(path))[1])
    return read


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    assert [remembered_sha256(path) for _ in range(3)] == [hashlib.sha256(b"one").hexdigest()] * 3
    assert reads == [path]
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # its size and mtime are those of before; ctime is not
    assert remembered_sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_another_file_at_the_same_path(tmp_path: Path, reads: list[Path]) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    path.write_bytes(b"one")
    remembered_sha256(path)
    other.write_bytes(b"two")
    other.replace(path)
    assert remembered_sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_a_note_that_cannot_be_read_or_written(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    remembered_sha256(path)
    (note,) = (tmp_path / "cache").rglob("*.json")
    note.write_text("{")
    assert remembered_sha256(path) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file: no folder can be made in it
    assert remembered_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert reads == [path] * 3


def test_a_file_that_just_changed_is_not_remembered(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_SECONDS", 3600.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    remembered_sha256(path), remembered_sha256(path)
    assert reads == [path, path]
