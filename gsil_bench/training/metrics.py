"""What is logged of a step: the loss, log-probs, log-ratios, and the shadow losses; read from the device every N steps.

Shadow losses are all pairwise losses on the log-probs that the step computed anyway: their value and their two gradient weights,
−∂L/∂log π(real) and ∂L/∂log π(generated), how hard each method would push the two sides up and down at this point of the
trajectory. They cost no forward pass, and nothing is trained on them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs

FILE = "metrics.jsonl"
DISPLACEMENT_STEPS = 10
"""Steps at the end of a round that the displacement is averaged over."""
PAIRWISE = frozenset({"generated", "reference"})
"""What a method needs whose loss can be computed on every pair."""


def concatenate(pairs: Sequence[PairLogProbs]) -> PairLogProbs:
    """The pairs of several micro-batches as one."""
    joined: dict[str, Any] = {name: torch.cat([pair.vectors[name] for pair in pairs]) for name in pairs[0].vectors}
    return PairLogProbs(**joined, temperature=pairs[0].temperature)


def step_sums(pair: PairLogProbs, weights: Tensor, losses: Tensor, shadows: Sequence[Method]) -> dict[str, Tensor]:
    """Weighted sums over a step's pairs, fp64 scalars on the device; a quantity that was not computed is NaN.

    Args:
        weights: (pairs,), one over the number of self-generations that the pair's demonstration has.
    """
    ratios = {"real_log_ratio": pair.real_log_ratios, "generated_log_ratio": pair.generated_log_ratios}
    values = {
        "loss": losses,
        "real_logps": pair.policy_real_logps,
        "generated_logps": pair.policy_generated_logps,
        **ratios,
        "margin": ratios["real_log_ratio"] - ratios["generated_log_ratio"],
    }
    for method in shadows:
        values |= {f"shadow/{method.name}/{name}": value for name, value in shadow(method, pair).items()}
    weights = weights.double()
    return {name: (value.detach().double() * weights).sum() for name, value in values.items()}


def shadow(method: Method, pair: PairLogProbs) -> dict[str, Tensor]:
    """A loss and its two gradient weights at given log-probs, (pairs,) each."""
    assert method.loss is not None, f"{method.name} has no loss"
    real, generated = (
        side.detach().requires_grad_() for side in (pair.policy_real_logps, pair.policy_generated_logps)
    )  # (pairs,) each
    with torch.enable_grad():
        losses = method.loss(replace(pair, policy_real_logps=real, policy_generated_logps=generated), **method.settings)
        gradients = torch.autograd.grad(losses.sum(), (real, generated), allow_unused=True)
    down, up = (torch.zeros_like(real) if gradient is None else gradient for gradient in gradients)
    return {"loss": losses, "real_weight": -down, "generated_weight": up}


@dataclass
class MetricsLog:
    """JSON lines, one a step. Values stay on the device until `every` steps have gathered."""

    path: Path
    every: int
    track: Callable[[Mapping[str, float], int], None] = lambda values, step: None
    """Also given each line: a tracker."""
    writes: bool = True
    """Of several ranks, one writes."""
    _waiting: list[dict[str, Tensor | float]] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Nothing that was added is lost when the block is left, however it is left."""
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def add(self, line: dict[str, Tensor | float]) -> None:
        """A step's numbers."""
        if self.writes:
            self._waiting.append(line)
        if len(self._waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Read what waits from the device, in one transfer, and write it."""
        tensors = [value.double() for line in self._waiting for value in line.values() if isinstance(value, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        lines = [
            {name: next(numbers) if isinstance(value, Tensor) else value for name, value in line.items()}
            for line in self._waiting
        ]
        self._waiting.clear()
        with self.path.open("a", encoding="utf-8") as file:
            for line in lines:
                finite = {name: value for name, value in line.items() if math.isfinite(value)}
                file.write(json.dumps(finite) + "\n")
                self.track(finite, int(finite["step"]))


def displacement(path: Path) -> dict[str, float]:
    """How far log-probs have moved from the reference's at the end: means over the last steps, nats per sequence.

    A pairwise loss falls as well by lowering both sides: demonstrations that became less likely are what to look out for.
    """
    lines = read_metrics(path)[-DISPLACEMENT_STEPS:]
    names = {"real_log_ratio": "real_displacement", "generated_log_ratio": "generated_displacement"}
    return {
        new: sum(line[name] for line in lines) / len(lines)
        for name, new in names.items()
        if lines and all(name in line for line in lines)
    }


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole lines."""
    return read_on(path, 0)[0]


def read_on(path: Path, start: int) -> tuple[list[dict[str, float]], int]:
    """The whole lines from a byte on (from the first, if the file has become shorter), and the byte where to go on."""
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        start = start if start <= file.seek(0, 2) else 0
        file.seek(start)
        whole = file.read().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()], start + len(whole) + bool(whole)
