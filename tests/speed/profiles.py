"""Length profiles: how long prompts, demonstrations and self-generations are. The tokens themselves are random ids.

| profile | lengths |
|---|---|
| `ultrafeedback` | log-normal, means 175 (prompt), 258 (real), 190 (generated) after a cap of 512 tokens each |
| `mini` | the embedded suite's 1200 demonstrations, in its own chat format and tokenizer |
| `instructions` | the demonstrations of `instructions/instruction-data.json` in the same chat format, in GPT-2's byte-level BPE |

The spreads of `ultrafeedback` are chosen so that padding costs what it cost in the study that set the targets (padded over
real tokens at 1, 2, 4, 8, 16 pairs in a micro-batch: 1.20, 1.47, 1.72, 1.94, 2.14 here; 1.18, 1.45, 1.71, 1.94, 2.15 there).
`mini` and `instructions` hold no self-generations: a permutation of the demonstrations' lengths stands for theirs, as of a policy
that imitates well but not the demonstration beside it. Prompts are capped at 512 tokens, completions of these two at 256.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gsil_bench.models.packing import TokenTree

LONGEST_PROMPT, LONGEST_COMPLETION = 512, 256
INSTRUCTIONS, GPT2 = "instructions/instruction-data.json", "tokenizers/gpt2"
POOL = 8192
"""Pairs of which a synthetic profile draws the lengths."""
LOG_NORMAL = {"prompt": (4.863, 0.9), "real": (5.418, 0.7), "generated": (5.047, 0.7)}
"""Location and spread of the logarithm, such that the means after the cap are 175, 258 and 190."""
FIRST_ID = 3
"""Ids below it are often special."""


class ProfileError(RuntimeError):
    """The profile is unknown, or its data is not here."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a pair's parts, end tokens included."""

    prompt: int
    real: int
    generated: int


def pairs(profile: str, count: int, vocabulary: int, seed: int = 0, data_dir: Path | None = None) -> list[TokenTree]:
    """So many pairs in shuffled order: the same for every variant of a run, and each before any comes twice.

    Raises:
        ProfileError: see the class.
    """
    if profile not in PROFILES:
        raise ProfileError(f"unknown profile {profile!r}; there are {', '.join(PROFILES)}")
    random = np.random.default_rng(seed)
    pool = PROFILES[profile](random, data_dir)
    passes = -(-count // len(pool))
    order = [int(index) for _ in range(passes) for index in random.permutation(len(pool))][:count]

    def ids(length: int) -> tuple[int, ...]:
        return tuple(random.integers(FIRST_ID, vocabulary, length).tolist())

    return [TokenTree(ids(one.prompt), (ids(one.real), ids(one.generated))) for one in (pool[index] for index in order)]


def ultrafeedback(random: np.random.Generator, data_dir: Path | None) -> list[Lengths]:
    """Independent log-normal lengths."""
    columns = [
        np.exp(random.normal(location, spread, POOL)).round().clip(1, LONGEST_PROMPT).astype(int)
        for location, spread in LOG_NORMAL.values()
    ]
    return [Lengths(*map(int, row)) for row in zip(*columns, strict=True)]


def mini(random: np.random.Generator, data_dir: Path | None) -> list[Lengths]:
    """Demonstrations of all tasks of the embedded suite."""
    from gsil_bench.data import mini as suite
    from gsil_bench.data.chat import ChatFormat
    from gsil_bench.data.demonstrations import from_items
    from gsil_bench.models.checkpoint import load_tokenizer

    chat = ChatFormat.of(load_tokenizer(suite.MODEL_DIR))
    demonstrations = [one for task in suite.TASKS for one in from_items(suite.items(task, "train"))]
    encoded = chat.encode_many([(one.messages, one.answer) for one in demonstrations])
    return _with_permuted([(len(one.prompt_ids), len(one.completion_ids)) for one in encoded], random)


def instructions(random: np.random.Generator, data_dir: Path | None) -> list[Lengths]:
    """Public instructions with curated answers."""
    from gsil_bench.data.chat import TEMPLATES, ChatFormat
    from gsil_bench.data.demonstrations import read_demonstrations

    folder = _data_dir(data_dir)
    demonstrations, _ = read_demonstrations(str(folder / INSTRUCTIONS))
    chat = ChatFormat.of(_gpt2(folder / GPT2), TEMPLATES["plain"])
    encoded = chat.encode_many([(one.messages, one.answer) for one in demonstrations])
    return _with_permuted([(len(one.prompt_ids), len(one.completion_ids)) for one in encoded], random)


PROFILES: dict[str, Callable[[np.random.Generator, Path | None], list[Lengths]]] = {
    "ultrafeedback": ultrafeedback,
    "mini": mini,
    "instructions": instructions,
}


def _with_permuted(lengths: list[tuple[int, int]], random: np.random.Generator) -> list[Lengths]:
    """(prompt, real) with somebody else's answer's length as the self-generation's."""
    others = random.permutation([real for _, real in lengths])
    return [
        Lengths(min(prompt, LONGEST_PROMPT), min(real, LONGEST_COMPLETION), min(int(other), LONGEST_COMPLETION))
        for (prompt, real), other in zip(lengths, others, strict=True)
    ]


def _data_dir(given: Path | None) -> Path:
    """The folder with public data: the one that is given, GSIL_BENCH_DATA, or shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = given or Path(os.environ.get("GSIL_BENCH_DATA", beside))
    if not (folder / INSTRUCTIONS).is_file():
        raise ProfileError(f"profile instructions: no {INSTRUCTIONS} in {folder}; give --data-dir or set GSIL_BENCH_DATA")
    return folder


def _gpt2(folder: Path) -> object:
    """GPT-2's tokenizer from its two files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    bpe = Tokenizer(models.BPE(vocabulary, [tuple(line.split(" ")) for line in lines if line]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
