"""The state of a round between two steps: written so that a kill leaves the old one or the new one, and read back bit for bit.

It holds the trained weights, the optimiser with its fp32 masters, the random number generators, the step (from which schedule and
sampler follow, both functions of it) and every counter. Metrics lines after the saved step are cut off when a run goes on.
"""

from __future__ import annotations

import logging
import random
import zipfile
from pathlib import Path
from typing import Any

import torch

from gsil_bench.records import write_atomically
from gsil_bench.training.batches import LiveSteps, Steps
from gsil_bench.training.learner import Learner
from gsil_bench.training.metrics import FILE as METRICS
from gsil_bench.training.parallel import Team

logger = logging.getLogger(__name__)

FILE = "state.pt"


def save_state(team: Team, learner: Learner, folder: Path, steps: Steps | LiveSteps, step: int, facts: dict[str, Any]) -> None:
    """Everything the next step depends on."""
    weights, moments = team.gather(learner.policy, learner.optimizer)
    if team.rank == 0:
        live = steps.state_dict() if isinstance(steps, LiveSteps) else None
        state = {"live": live, "weights": weights, "optimizer": moments, "random": _random_state(), "step": step, "facts": facts}
        torch.save(state, folder / f"{FILE}.new")
        (folder / f"{FILE}.new").replace(folder / FILE)
    team.barrier()


def load_state(team: Team, learner: Learner, folder: Path, steps: Steps | LiveSteps) -> tuple[int, dict[str, Any]]:
    """The step to go on from and its counters; (0, {}) where no state was saved, or it cannot be read."""
    path, metrics = folder / FILE, folder / METRICS
    state: dict[str, Any] | None = None
    if path.exists():
        try:
            if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at checksums
                raise zipfile.BadZipFile(damaged)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)[: state["step"]] if metrics.exists() else []
            step, facts = int(state["step"]), dict(state["facts"])
        except (OSError, MemoryError):
            raise  # the file may be good: nothing is thrown away
        except Exception as error:  # whatever a damaged file makes the reader raise, the round starts again
            logger.warning("%s cannot be read (%s); the round starts again", path, type(error).__name__)
            state = None
    readers = float(team.total(torch.tensor(float(state is not None), device=team.device)))  # all look before anyone changes it
    if state is None or readers < team.size:
        if team.rank == 0:
            path.unlink(missing_ok=True)
            metrics.unlink(missing_ok=True)
        return 0, {}
    team.scatter(learner.policy, learner.optimizer, state["weights"], state["optimizer"])
    if isinstance(steps, LiveSteps):
        steps.load_state_dict(state["live"])
    _restore_random(state["random"])
    if team.rank == 0:
        write_atomically(metrics, "".join(lines))
    return step, facts


def _random_state() -> dict[str, Any]:
    version, numbers, following = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": [version, list(numbers), following], "torch": torch.get_rng_state(), "cuda": cuda}


def _restore_random(state: dict[str, Any]) -> None:
    version, numbers, following = state["python"]
    random.setstate((version, tuple(numbers), following))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
