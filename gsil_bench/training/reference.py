"""Per-token log-probs of a frozen policy, computed once and kept: they depend on weights, token ids and precision only.

Every loss, setting, seed and method that compares against the same policy reads the same file. The noise floor, the largest
change of a sequence's log-prob when its neighbours change, is measured at the same time: log-ratios below it mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

from gsil_bench.models.logprobs import completion_logps
from gsil_bench.records import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "logps.safetensors"
FLOOR_SAMPLE = 32
"""Sequences whose log-probs are recomputed one at a time to measure the noise floor."""

Logps = np.ndarray[tuple[int], np.dtype[np.float32]]


def write_reference(
    model: PreTrainedModel,
    sequences: Sequence[Encoded],
    tokens: int,
    folder: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> float:
    """Compute and keep the log-probs of every completion; returns the noise floor in nats per sequence.

    Args:
        tokens: padded tokens per forward pass.
    """
    logps = completion_logps(model, sequences, tokens, advance)
    flat = np.concatenate([item.numpy() for item in logps]).astype(np.float32)
    lengths = np.array([len(item) for item in logps], dtype=np.int64)
    save_file({"logps": flat, "lengths": lengths}, folder / FILE)
    sample = range(0, len(sequences), -(-len(sequences) // FLOOR_SAMPLE))
    alone = [completion_logps(model, [sequences[index]], tokens)[0].numpy() for index in sample]
    return _noise_floor([logps[index].numpy() for index in sample], alone)


def _noise_floor(together: Sequence[Logps], alone: Sequence[Logps]) -> float:
    """Largest change of a sequence's fp32 log-prob between two batches, and never less than the rounding of the largest one."""
    sums = [
        (np.float32(one.sum(dtype=np.float64)), np.float32(other.sum(dtype=np.float64)))
        for one, other in zip(together, alone, strict=True)
    ]
    rounding = max(np.spacing(abs(one)) for one, _ in sums)
    return float(max(abs(one - other) for one, other in sums) + rounding)


def read_reference(folder: Path, sequences: Sequence[Encoded]) -> list[Logps]:
    """The log-probs in the order they were written.

    Raises:
        ValueError: they belong to other sequences (count or lengths differ).
    """
    tensors = load_file(folder / FILE)
    lengths = tensors["lengths"].tolist()
    wanted = [len(sequence.completion_ids) for sequence in sequences]
    if lengths != wanted:
        raise ValueError(f"{folder}: reference log-probs of {len(lengths)} other sequences, expected {len(wanted)}")
    return np.split(tensors["logps"], np.cumsum(lengths)[:-1])
