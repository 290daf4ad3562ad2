"""How far a layout's numbers lie from the plain layout's, beside how far the plain layout lies from itself.

    python tests/speed/precision.py [--trees 64] [--json FILE]

The embedded model on trees of a prompt, its demonstration and the demonstration of another prompt. In fp32 and in bf16: log-probs
(nats, mean and maximum of the absolute difference) and gradients of their mean (norm of the difference over the norm) of the
layouts, against "padded, 8 trees a pass"; "padded, 1 tree a pass" is the plain layout with itself. The last column is the
distance to fp32, which all bf16 rows share.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsil_bench.config import Config
from gsil_bench.inputs import read_inputs
from gsil_bench.models import checkpoint
from gsil_bench.models.packing import TokenTree
from gsil_bench.models.policy import Policy
from gsil_bench.provenance import provenance

PLAIN = "padded, 8 trees a pass"
ROWS = {PLAIN: ("padded", 8), "padded, 1 tree a pass": ("padded", 1), "packed": ("packed", 8), "shared": ("shared", 8)}


def measure(folder: Path, dtype: checkpoint.Dtype, layout: str, size: int, trees: Sequence[TokenTree]) -> tuple[Tensor, Tensor]:
    """Log-probs of all scored tokens, and the gradient of their mean, both flat and in fp32."""
    model = checkpoint.load_model(folder, "cpu", dtype)
    scored = sum(tree.scored_tokens for tree in trees)
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in model.parameters()]
    parts = []
    with Policy(model, layout) as policy:
        for start in range(0, len(trees), size):
            logps = policy(trees[start : start + size])
            (logps.sum() / scored).backward()
            parts.append(logps.detach().float())
            for total, parameter in zip(sums, model.parameters(), strict=True):
                total += 0 if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        assert policy.layout == layout, f"{layout} was not used: {policy.notes}"
    return torch.cat(parts), torch.cat([total.flatten() for total in sums])


def compare(folder: Path, dtype: checkpoint.Dtype, trees: Sequence[TokenTree], exact: Tensor) -> dict[str, dict[str, float]]:
    """Every row against the plain one."""
    found = {name: measure(folder, dtype, layout, size, trees) for name, (layout, size) in ROWS.items()}
    logps, gradient = found[PLAIN]
    return {
        name: {
            "mean": float((mine - logps).abs().mean()),
            "max": float((mine - logps).abs().max()),
            "gradient": float((slope - gradient).norm() / gradient.norm()),
            "from_fp32": float((mine - exact).abs().mean()),
        }
        for name, (mine, slope) in found.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    inputs = read_inputs(Config(limit_demonstrations=2 * given.trees, limit=1))
    encoded = inputs.demonstrations.train_encoded[: given.trees]
    others = [*encoded[1:], encoded[0]]
    trees = [
        TokenTree(mine.prompt_ids, (mine.completion_ids, other.completion_ids))
        for mine, other in zip(encoded, others, strict=True)
    ]
    folder = inputs.model.folder
    exact, _ = measure(folder, "fp32", *ROWS[PLAIN], trees)
    results: dict[str, Any] = {dtype: compare(folder, dtype, trees, exact) for dtype in ("fp32", "bf16")}
    print("| | log-probs, mean | maximum | gradient | from fp32, mean |\n|---|---|---|---|---|")
    for dtype, rows in results.items():
        for name, row in rows.items():
            print(f"| {dtype}, {name} | " + " | ".join(f"{value:.1e}" for value in row.values()) + " |")
    if given.json:
        given.json.write_text(json.dumps({**results, "provenance": provenance()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
