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

from gsil_bench.errors import UnavailableError, UserError

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

_FASTCHAT_URL = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/"

# Pinned from lm-sys/FastChat at commit 0e6d3e4beaab.
MT_BENCH_QUESTIONS = Source(
    name="mt-bench-questions",
    path="mt_bench/question.jsonl",
    sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    urls=(_FASTCHAT_URL + "mt_bench/question.jsonl",),
    licence="Apache-2.0",
)
MT_BENCH_JUDGE_PROMPTS = Source(
    name="mt-bench-judge-prompts",
    path="mt_bench/judge_prompts.jsonl",
    sha256="fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    urls=(_FASTCHAT_URL + "judge_prompts.jsonl",),
    licence="Apache-2.0",
)
MT_BENCH_REFERENCES = Source(
    name="mt-bench-references",
    path="mt_bench/reference_answer/gpt-4.jsonl",
    sha256="f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    urls=(_FASTCHAT_URL + "mt_bench/reference_answer/gpt-4.jsonl",),
    licence="Apache-2.0",
)


_SCITLDR_URL = "https://raw.githubusercontent.com/allenai/scitldr/HEAD/SciTLDR-Data/SciTLDR-A/"

# Pinned from allenai/scitldr at commit 5ccad9c00a60: abstracts only.
SCITLDR_TRAIN = Source(
    name="scitldr-train",
    path="scitldr/train.jsonl",
    sha256="b222771d387be585cfdf5ae957b36757138415a352e0a3e3b23f73f87c3b1119",
    urls=(_SCITLDR_URL + "train.jsonl",),
    licence="Apache-2.0",
)
SCITLDR_DEV = Source(
    name="scitldr-dev",
    path="scitldr/dev.jsonl",
    sha256="3191fa98ccc09521332b7a1cd63b1930be4e8df125a235ccd31e40329709525e",
    urls=(_SCITLDR_URL + "dev.jsonl",),
    licence="Apache-2.0",
)
SCITLDR_TEST = Source(
    name="scitldr-test",
    path="scitldr/test.jsonl",
    sha256="fb42dd6cd4f4a1928ae8a01a189456fbfe994a07e938bd49f68653933f6503c9",
    urls=(_SCITLDR_URL + "test.jsonl",),
    licence="Apache-2.0",
)


# Pinned from openai/human-eval at commit 6d43fb980f9f.
HUMANEVAL_TEST = Source(
    name="humaneval-test",
    path="humaneval/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    urls=("https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",),
    licence="MIT",
)
# google-research/google-research, folder mbpp, as mirrored by FormulaMonks/llm-benchmarker-suite at commit 5d3c8009ab8f.
MBPP_FULL = Source(
    name="mbpp-full",
    path="mbpp/mbpp.jsonl",
    sha256="0b5e07b5b40fedd01c57b7c9177b79f8b2eebd72c304c928605d91a7237d2f33",
    urls=(
        "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl",
        "https://raw.githubusercontent.com/FormulaMonks/llm-benchmarker-suite/HEAD/data/mbpp/mbpp.jsonl",
    ),
    licence="CC-BY-4.0",
)

# The sha256 is the one that two independent public projects pin; these bytes have not been opened where this was written.
MBPP_SANITIZED = Source(
    name="mbpp-sanitized",
    path="mbpp/sanitized-mbpp.json",
    sha256="ca95deaa9a01ef0a6f439f88bcf0dd3db3563d22f22aad6cae04ebb9a8d8c8e9",
    urls=("https://raw.githubusercontent.com/google-research/google-research/master/mbpp/sanitized-mbpp.json",),
    licence="CC-BY-4.0",
)

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        GSM8K_TEST,
        GSM8K_TRAIN,
        MT_BENCH_QUESTIONS,
        MT_BENCH_JUDGE_PROMPTS,
        MT_BENCH_REFERENCES,
        SCITLDR_TRAIN,
        SCITLDR_DEV,
        SCITLDR_TEST,
        HUMANEVAL_TEST,
        MBPP_FULL,
        MBPP_SANITIZED,
    )
}


def locate(source: Source, data_dir: Path | None = None) -> Path:
    """The local file of a source, downloaded into the user's cache if it is nowhere else.

    Args:
        source: what to find.
        data_dir: a folder to look in first, laid out as in `Source.path`.

    Raises:
        UnavailableError: the file cannot be had, or a file the user supplied is not the pinned one.
    """
    found = find_local(source, data_dir)
    if found is not None:
        return found
    try:
        return _download(source, cache_folder() / source.path)
    except UserError as error:
        looked = ", ".join(str(folder / source.path) for folder in [*_user_folders(data_dir), cache_folder()])
        raise UnavailableError(
            f"data file {source.name} is missing: looked for {looked}; {error}. "
            f"Put the file (sha256 {source.sha256}) at {source.path} in a folder and set {DATA_VARIABLE} to that folder"
        ) from error


def find_local(source: Source, data_dir: Path | None = None) -> Path | None:
    """The local file of a source, or None where it would have to be downloaded.

    Raises:
        UnavailableError: a file that the user supplied is not the pinned one.
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
        raise UnavailableError(
            f"{path} is not the pinned {source.name}: its sha256 is {found}, expected {source.sha256}. "
            "Replace the file, or remove it so that the pinned one is downloaded"
        )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error.strerror or error}") from error


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
    raise UnavailableError("; ".join(failures) or "it has no public address")


def _fetch(url: str, handle: int) -> None:
    """Write what an address serves to an open file descriptor, and close it."""
    with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
