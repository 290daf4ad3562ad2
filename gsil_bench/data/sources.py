"""Pinned data files: where each one is found, and the sha256 that says it is the right one.

A file is looked for in the folder the user gave, then in $GSIL_BENCH_DATA, then in the user's cache, and is downloaded into the
cache otherwise. Whatever the way, it is used only if its sha256 is the pinned one: everybody's scores are on the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gsil_bench.errors import UserError

DATA_VARIABLE = "GSIL_BENCH_DATA"
DOWNLOAD_SECONDS = 60
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One pinned data file."""

    name: str
    """As printed in messages: "gsm8k-test"."""
    path: str
    """Below a data folder: "gsm8k/test.jsonl"."""
    sha256: str
    urls: tuple[str, ...]
    """Public homes, tried in order. A branch may move on; the sha256 decides."""
    licence: str


_GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"

# Pinned from openai/grade-school-math at commit 3101c7d50724.
GSM8K_TEST = Source(
    name="gsm8k-test",
    path="gsm8k/test.jsonl",
    sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    urls=(_GSM8K_URL + "test.jsonl",),
    licence="MIT",
)
GSM8K_TRAIN = Source(
    name="gsm8k-train",
    path="gsm8k/train.jsonl",
    sha256="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    urls=(_GSM8K_URL + "train.jsonl",),
    licence="MIT",
)

SOURCES: dict[str, Source] = {source.name: source for source in (GSM8K_TEST, GSM8K_TRAIN)}


def locate(source: Source, data_dir: Path | None = None) -> Path:
    """The local file of a source, downloaded into the user's cache if it is nowhere else.

    Args:
        source: what to find.
        data_dir: a folder to look in first, laid out as in `Source.path`.

    Raises:
        UserError: the file cannot be had, or a file the user supplied is not the pinned one.
    """
    found = find_local(source, data_dir)
    if found is not None:
        return found
    try:
        return _download(source, cache_folder() / source.path)
    except UserError as error:
        looked = ", ".join(str(folder / source.path) for folder in [*_user_folders(data_dir), cache_folder()])
        raise UserError(
            f"data file {source.name} is missing: looked for {looked}; {error}. "
            f"Put the file (sha256 {source.sha256}) at {source.path} in a folder and set {DATA_VARIABLE} to that folder"
        ) from error


def find_local(source: Source, data_dir: Path | None = None) -> Path | None:
    """The local file of a source, or None where it would have to be downloaded.

    Raises:
        UserError: a file that the user supplied is not the pinned one.
    """
    for folder in _user_folders(data_dir):
        path = folder / source.path
        if path.is_file():
            # A file that the user put there is never passed over in silence: they would believe it was used.
            _require(source, path)
            return path
    cached = cache_folder() / source.path
    return cached if cached.is_file() and _sha256(cached) == source.sha256 else None


def cache_folder() -> Path:
    """Where downloads are kept: below $XDG_CACHE_HOME, or ~/.cache."""
    # The XDG specification says that a relative path there is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "gsil_bench"


def _user_folders(data_dir: Path | None) -> Iterator[Path]:
    """The folders that the user named, in the order they are looked in."""
    if data_dir is not None:
        yield Path(data_dir).expanduser()
    if os.environ.get(DATA_VARIABLE):
        yield Path(os.environ[DATA_VARIABLE]).expanduser()


def _require(source: Source, path: Path) -> None:
    """Raise unless the file is the pinned one."""
    found = _sha256(path)
    if found != source.sha256:
        raise UserError(
            f"{path} is not the pinned {source.name}: its sha256 is {found}, expected {source.sha256}. "
            "Replace the file, or remove it so that the pinned one is downloaded"
        )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _download(source: Source, target: Path) -> Path:
    """Fetch a source into the cache. The file appears under its name only when it is whole and verified."""
    failures = []
    for url in source.urls:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # A temporary name of its own: two processes may download at once, and each replaces with the same bytes.
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".", suffix=".part")
            temporary = Path(name)
            try:
                _fetch(url, handle)
                found = _sha256(temporary)
                if found == source.sha256:
                    temporary.replace(target)
                    return target
                failures.append(f"{url} gave another file (sha256 {found})")
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, ValueError) as error:  # URLError is an OSError; ValueError is a malformed address
            failures.append(f"{url} could not be downloaded to {target.parent} ({_one_line(error)})")
    raise UserError("; ".join(failures) or "it has no public address")


def _fetch(url: str, handle: int) -> None:
    """Write what an address serves to an open file descriptor, and close it."""
    with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
