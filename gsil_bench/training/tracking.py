"""Trackers on request: the lines of metrics.jsonl are also sent to TensorBoard, W&B, MLflow or trackio, through accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gsil_bench.errors import UserError, unknown_name

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""Name → the package that it needs."""

Track = Callable[[Mapping[str, float], int], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a name that is not known or whose package is not installed: accelerate would leave it out silently."""
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        if find_spec(TRACKERS[name]) is None:
            raise UserError(f"--trackers {name}: {TRACKERS[name]} is not installed: pip install {TRACKERS[name]}")


@contextmanager
def tracking(names: Sequence[str], folder: Path, run: str, config: Mapping[str, Any]) -> Iterator[Track]:
    """Called with (metrics, step) inside the block; does nothing where no trackers are named.

    Args:
        folder: for trackers that write files.
        run: what the run is called.
        config: flat settings to be shown beside it.
    """
    if not names:
        yield lambda values, step: None
        return
    from accelerate import Accelerator

    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=str(folder))
    names_of_run: dict[str, dict[str, Any]] = {"wandb": {"name": run}, "mlflow": {"run_name": run}, "trackio": {"name": run}}
    flat = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
    accelerator.init_trackers("gsil_bench", flat, {name: names_of_run[name] for name in names if name in names_of_run})
    try:
        yield lambda values, step: accelerator.log(dict(values), step=step)
    finally:
        accelerator.end_training()
