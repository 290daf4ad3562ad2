"""One round of training as a job: from a checkpoint folder and trees to a checkpoint folder, here or in several processes.

    python -m torch.distributed.run --nproc-per-node 2 -m gsil_bench.training.round FOLDER

is what `launch` runs after it has written the job to FOLDER/round.json. Ranks share a step's micro-batches, and with `sharded`
the weights too. A rank's failure, Ctrl-C and the launcher's own end reach all of them; the state in the folder is that of one
process. What they print goes to FOLDER/ranks.log.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from gsil_bench.errors import UserError
from gsil_bench.methods import Method, SelfPlay, load_method
from gsil_bench.models import checkpoint
from gsil_bench.models.adapters import add_lora, merge_lora, save_adapter
from gsil_bench.records import canonical, write_atomically
from gsil_bench.training import metrics
from gsil_bench.training.batches import Branch, MatchedDemonstrations, ShuffledSteps, Tree
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.learner import TrainingError
from gsil_bench.training.loop import Schedule, Surroundings, train
from gsil_bench.training.parallel import join_team
from gsil_bench.training.rollouts import Company

JOB, FACTS, FAILURE, PROGRESS, LOG = "round.json", "facts.json", "failure", "progress", "ranks.log"
POLL_SECONDS = 0.2
GRACE_SECONDS = 300
"""Time that ranks get to save their state after an interruption, before torchrun kills them."""
MARGIN_SECONDS = 30
LOG_CHARACTERS = 4000
"""Of the ranks' log that go to the failure's file, where no rank said why."""


@dataclass(frozen=True)
class Round:
    """What a round trains, from what, in which order."""

    folder: Path
    """Of the checkpoint that it starts from."""
    method: Method
    trees: tuple[Tree, ...]
    batch_size: int
    steps: int
    seed: tuple[int, int]
    """Of the run, and the round's number."""
    noise_floor: float | None
    """Of the reference, if the round starts from it."""
    base: str = ""
    """What an adapter names as its base; by default the folder."""
    device: str = "cpu"
    dtype: checkpoint.Dtype = "fp32"
    autocast: bool = False
    shadows: tuple[str, ...] = ()
    """Names of the methods whose losses are logged beside the trained one's."""
    company: Company | None = None
    """Of a method that samples from the policy as it trains it; in one process only."""

    def schedule(self, into: Path) -> Schedule:
        """Its steps, in order."""
        pairs = ShuffledSteps(self.trees, min(self.batch_size, len(self.trees)), self.steps, self.seed)
        if self.company is not None:
            live = self.company.steps(self.method, pairs, self.folder, into, self.seed)
            return Schedule(live, None, self.seed[0], self.folder)
        steps = MatchedDemonstrations(pairs) if self.method.batches == "matched-demonstrations" else pairs
        return Schedule(steps, self.noise_floor, self.seed[0])


def run_round(job: Round, into: Path, run: Surroundings) -> dict[str, Any]:
    """Train, and write the weights to `into`; returns the round's facts.

    Raises:
        TrainingError: training cannot go on.
    """
    config = TrainConfig.of(job.method.training, where=job.method.name)
    # Sharded weights stay in fp32 and are cast as they are gathered: each rank's part is its own master.
    model = checkpoint.load_model(job.folder, job.device, "fp32" if run.team.casts else job.dtype)
    adapter = add_lora(model, config.lora_rank, config.lora_alpha, seed=job.seed[0]) if config.lora_rank else None
    run = dataclasses.replace(run, autocast=job.autocast, shadows=tuple(map(load_method, job.shadows)))
    weights, facts = train(model, job.method, job.schedule(into), into, run)
    if run.team.rank == 0:
        if adapter is not None:
            save_adapter(adapter, into, base=job.base or str(job.folder.absolute()))
            model, weights = merge_lora(adapter), None
        model.save_pretrained(into, state_dict=weights)
    return facts


def launch(job: Round, into: Path, processes: int, sharded: bool, run: Surroundings) -> dict[str, Any]:
    """Run a round in several processes of this machine; as `run_round`, with progress and metrics as the ranks write them."""
    write_atomically(into / JOB, canonical({"sharded": sharded, "pause": run.save_every_seconds, **_to_json(job)}))
    for path in (into / FACTS, into / PROGRESS, *into.glob(f"{FAILURE}*")):
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_SECONDS),
    }
    with (into / LOG).open("wb") as log:
        ranks = subprocess.Popen(
            [*command, "-m", __spec__.name, str(into)],
            env=environment,
            stdin=subprocess.PIPE,  # see _end_with_launcher
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    report = _Report(into, run, tracked=len(metrics.read_metrics(into / metrics.FILE)))
    try:
        while ranks.poll() is None:
            time.sleep(POLL_SECONDS)
            report.update()
    finally:
        _stop(ranks)
    report.update()
    if ranks.returncode or not (into / FACTS).exists():
        reason, trace = _reason(into)
        raise TrainingError(reason or f"a process ended with exit code {ranks.returncode}") from RankError(trace)
    facts: dict[str, Any] = json.loads((into / FACTS).read_text(encoding="utf-8"))
    return facts


def _stop(ranks: subprocess.Popen[bytes]) -> None:
    """End what still runs, whatever the reason. The ranks have sessions of their own: torchrun passes the signal on, and kills
    those that take too long.
    """
    while ranks.poll() is None:
        ranks.send_signal(signal.SIGTERM)
        try:
            ranks.wait(GRACE_SECONDS + MARGIN_SECONDS)
        except KeyboardInterrupt:  # again: they are already stopping, and must not be left behind
            continue


TEMPORARY = (JOB, FACTS, PROGRESS, LOG)
"""Files of a launched round that only the round itself needs."""


@dataclass
class _Report:
    """What the ranks have written so far, handed on."""

    into: Path
    run: Surroundings
    tracked: int
    """Steps whose metrics a tracker has been given."""
    done: int = 0
    read: int = 0
    """Bytes of the metrics that were read."""

    def update(self) -> None:
        try:
            now = int((self.into / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            now = self.done
        lines, self.read = metrics.read_on(self.into / metrics.FILE, self.read)
        for line in lines:
            if line["step"] > self.tracked:
                self.tracked = int(line["step"])
                self.run.track(line, self.tracked)
        self.done, new = now, now - self.done
        self.run.advance(new)


class RankError(Exception):
    """A rank's traceback, or the end of what the ranks printed: the cause of a launched round's failure."""


def _reason(into: Path) -> tuple[str, str]:
    """What the first rank that failed by itself said, and its traceback; the others fail because it is gone."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(into.glob(f"{FAILURE}*"), key=_written)]
    first = next(iter(sorted(found, key=lambda failure: bool(failure["because_of_another"]))), None)
    if first is None:
        return "", (into / LOG).read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
    return first["reason"], first["traceback"]


def _failure(error: Exception) -> str:
    """A rank's failure as it is written."""
    text = " ".join(str(error).split())
    reason = text if isinstance(error, TrainingError | UserError) else f"{type(error).__name__}: {text}"
    distributed = isinstance(error, torch.distributed.DistError) or "gloo" in text.lower()
    return json.dumps({"reason": reason, "because_of_another": distributed, "traceback": traceback.format_exc()})


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def _work(into: Path) -> None:
    """What each rank does."""
    _end_with_launcher()
    data = json.loads((into / JOB).read_text(encoding="utf-8"))
    pause = data.pop("pause")
    team = join_team(data["device"], data.pop("sharded"), data["dtype"] == "bf16")
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: stop.append(number))
    done = 0

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        if team.rank == 0:
            write_atomically(into / PROGRESS, str(done))
        if stop:
            raise KeyboardInterrupt

    try:
        facts = run_round(_from_json(data), into, Surroundings(advance, pause, team=team))
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        write_atomically(into / f"{FAILURE}.{team.rank}", _failure(error))
        raise
    if team.rank == 0:
        write_atomically(into / FACTS, json.dumps(facts))
    team.close()
    _leave(0)


def _leave(code: int) -> NoReturn:
    """End this rank at once. Gloo's threads may still hold tensors, and giving those back to an interpreter that is being taken
    down aborts the process now and then: a failure of a round that is done (pytorch pull request 179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_launcher() -> None:
    """Exit at once when the launcher's end of the pipe closes: however it ended, the same command may already be going on from
    the last state with new ranks, and two groups must not write to one folder.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _to_json(job: Round) -> dict[str, Any]:
    assert job.method.loss is not None, f"{job.method.name} does not train"
    record = {item.name: getattr(job, item.name) for item in dataclasses.fields(job) if item.name not in ("trees", "method")}
    loss = f"{job.method.loss.__module__}:{job.method.loss.__qualname__}"
    trees = [
        [tree.id, tree.prompt_ids, len(tree.generated), *([each.completion_ids, each.reference_logp] for each in tree.branches)]
        for tree in job.trees
    ]
    method = dataclasses.asdict(job.method) | {"loss": loss, "needs": sorted(job.method.needs)}
    return {**record, "folder": str(job.folder.absolute()), "method": method, "trees": trees}


def _from_json(data: Mapping[str, Any]) -> Round:
    record = dict(data["method"])
    module, _, name = record["loss"].partition(":")
    loss = getattr(importlib.import_module(module), name)
    fields = {**record, "loss": loss, "needs": frozenset(record["needs"]), "protocol": SelfPlay(**record["protocol"])}
    trees = []
    for name_of_tree, prompt, count, *branches in data["trees"]:
        real, *others = (Branch(tuple(ids), logp) for ids, logp in branches)
        trees.append(Tree(name_of_tree, tuple(prompt), real, tuple(others[:count]), tuple(others[count:])))
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    given |= {"folder": Path(data["folder"]), "method": Method(**fields), "trees": tuple(trees)}
    return Round(**given)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
