"""Per-token log-probs of a frozen policy, computed once and kept: they depend on weights, token ids and precision only.

Every loss, setting, seed and method that compares against the same policy reads the same file. The noise floor, the largest
change of a sequence's log-prob when its neighbours change, is measured at the same time: log-ratios below it mean nothing. Before
they are trained on, a sample is recomputed: a file that lies is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from gsil_bench.models.logprobs import tree_logps, trees_of
from gsil_bench.models.packing import TokenTree
from gsil_bench.models.policy import Policy
from gsil_bench.records import Encoded
from gsil_bench.training.batches import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "logps.safetensors"
FLOOR_SAMPLE = 32
"""Sequences whose log-probs are recomputed one at a time to measure the noise floor."""
AUDIT_SAMPLE = 8
"""Trees that are recomputed when kept log-probs are about to be trained on."""
TOLERANCE = 1e-3
"""Nats per sequence."""


class StaleReferenceError(RuntimeError):
    """Kept log-probs are not those of the policy they are said to come from."""


Logps = np.ndarray[tuple[int], np.dtype[np.float32]]


def write_reference(
    model: PreTrainedModel,
    sequences: Sequence[Encoded],
    tokens: int,
    folder: Path,
    advance: Callable[[int], None] = lambda done: None,
    autocast: bool = False,
) -> float:
    """Compute and keep the log-probs of every completion; returns the noise floor in nats per sequence.

    Args:
        tokens: positions per forward pass.
        autocast: see `Policy`.
    """
    with Policy(model, autocast=autocast) as policy:
        logps = tree_logps(policy, trees_of(sequences), tokens, advance)
        flat = np.concatenate([item.numpy() for item in logps]).astype(np.float32)
        lengths = np.array([len(item) for item in logps], dtype=np.int64)
        save_file({"logps": flat, "lengths": lengths}, folder / FILE)
        sample = _sample(len(sequences), FLOOR_SAMPLE)
        alone = _alone(policy, [sequences[index] for index in sample])
    return _noise_floor([logps[index].numpy() for index in sample], alone)


def audit_reference(model: PreTrainedModel, trees: Sequence[Tree], floor: float, autocast: bool = False) -> float:
    """Recompute a sample of the trees' reference log-probs under the model they are said to come from.

    Args:
        floor: the noise floor that was measured when they were written, nats per sequence.

    Returns:
        The largest difference, nats per sequence.

    Raises:
        StaleReferenceError: it exceeds both a thousandth of a nat and ten times the floor.
    """
    sample = [trees[index] for index in _sample(len(trees), AUDIT_SAMPLE)]
    with Policy(model, autocast=autocast) as policy:
        again = tree_logps(policy, [tree.tokens for tree in sample], 1)
    kept = [branch.reference_logp for tree in sample for branch in tree.branches]
    changes = [
        abs(float(one.sum(dtype=torch.float64)) - known) for one, known in zip(again, kept, strict=True) if known is not None
    ]
    worst = float(np.max(changes))  # of Python's max, NaN would be the largest only where it comes first
    if exceeds_noise(worst, floor):
        raise StaleReferenceError(
            f"kept reference log-probs differ by {worst:.3g} nats from the policy they are said to come from "
            f"(noise floor {floor:.1g}): something that decides them has changed without changing their fingerprint"
        )
    return worst


def exceeds_noise(difference: float, floor: float) -> bool:
    """Whether two log-probs of one sequence that should be equal are not: more than TOLERANCE apart and more than ten times the
    noise floor, or NaN.
    """
    return not difference <= max(TOLERANCE, 10 * floor)


def _sample(count: int, size: int) -> range:
    """Evenly spread indices."""
    return range(0, count, -(-count // size))


def _alone(policy: Policy, sequences: Sequence[Encoded]) -> list[Logps]:
    """Log-probs of sequences that have no neighbours."""
    trees = [TokenTree(sequence.prompt_ids, (sequence.completion_ids,)) for sequence in sequences]
    return [tree_logps(policy, [tree], 1)[0].numpy() for tree in trees]


def _noise_floor(together: Sequence[Logps], alone: Sequence[Logps]) -> float:
    """Largest change of a sequence's fp32 log-prob between two batches, and never less than the rounding of the largest one."""
    one, other = (np.array([np.float32(logps.sum(dtype=np.float64)) for logps in side]) for side in (together, alone))
    return float(np.abs(one - other).max() + np.spacing(np.abs(one)).max())


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
