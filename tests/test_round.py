"""A round in several processes: what one rank knows the caller learns, and an interruption loses nothing.

Each launch starts two interpreters, some seconds each, so there is one test for each way to end.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from test_loop import make_trees

from gsil_bench import compare
from gsil_bench.methods import Method, PairLogProbs, load_method, with_settings
from gsil_bench.training import metrics, state
from gsil_bench.training.batches import Tree
from gsil_bench.training.learner import TrainingError
from gsil_bench.training.loop import Surroundings, _advance
from gsil_bench.training.parallel import Team
from gsil_bench.training.round import PROGRESS, TEMPORARY, Round, _from_json, _to_json, launch, run_round

STEPS = 6


def unwell_on_rank_one(pair: PairLogProbs, **settings: float) -> torch.Tensor:
    """A loss that raises on one rank only."""
    if os.environ.get("RANK") == "1":
        raise ArithmeticError("rank one is unwell")
    return -pair.policy_real_logps


def not_a_number_on_rank_one(pair: PairLogProbs, **settings: float) -> torch.Tensor:
    """A loss that is NaN on one rank only."""
    return -pair.policy_real_logps * (math.nan if os.environ.get("RANK") == "1" else 1.0)


def aborting_at_exit(pair: PairLogProbs, **settings: float) -> torch.Tensor:
    """A loss after which rank one cannot be taken down in order, as gloo's threads make it now and then."""
    if os.environ.get("RANK") == "1":
        atexit.register(os.abort)
    return -pair.policy_real_logps


def job(folder: Path, method: Method, **changes: object) -> Round:
    given = Round(folder, method, tuple(make_trees(folder, 12)), 4, STEPS, (5, 0), None)
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]


def method_for(name: str = "gsil-logistic", **changes: object) -> Method:
    return with_settings(load_method(name), {"learning_rate": 1e-3, **changes})


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics.read_metrics(folder / metrics.FILE)]


def weights_of(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / "model.safetensors").items())])


@pytest.mark.parametrize("name", ["sft", "spin", "gsil-lsif"])
def test_a_job_survives_the_way_to_another_process(tiny_model: Path, name: str) -> None:
    sent = job(tiny_model, method_for(name), noise_floor=1e-6, shadows=("dpo", "spin"), dtype="bf16", autocast=True)
    got = _from_json(json.loads(json.dumps(_to_json(sent))))
    assert got == sent
    assert isinstance(got.trees[0], Tree) and got.method.loss is sent.method.loss


def test_two_processes_with_work_for_one(tiny_model: Path, tmp_path: Path) -> None:
    """All of a step fits into one micro-batch: the other rank repeats it and adds nothing. A tracker is given every line once."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    tracked: list[tuple[int, float]] = []
    done: list[int] = []
    run_round(job(tiny_model, method_for()), one, Surroundings())
    run = Surroundings(done.append, track=lambda values, step: tracked.append((step, values["loss"])))
    facts = launch(job(tiny_model, method_for()), two, 2, False, run)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-5)
    assert float((weights_of(two) - weights_of(one)).abs().max()) < 1e-5
    assert tracked == list(zip(range(1, STEPS + 1), losses_of(two), strict=True))
    assert sum(done) == facts["steps"] == STEPS
    assert facts["tokens"] > 0 and not list(two.glob("failure*"))


def test_the_rank_that_fails_is_the_one_that_is_heard(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its neighbour only sees that the connection is gone. Where it failed is told too, but not printed."""
    broken = dataclasses.replace(method_for(), loss=unwell_on_rank_one)
    with pytest.raises(TrainingError, match=r"^ArithmeticError: rank one is unwell$") as error:
        launch(job(tiny_model, broken), tmp_path, 2, False, Surroundings())
    assert "in unwell_on_rank_one" in str(error.value.__cause__)
    assert not capfd.readouterr().err


def test_ranks_end_with_their_launcher(tiny_model: Path, tmp_path: Path) -> None:
    """A killed run goes on in new ranks: old ones must not write beside them."""
    others = children()
    script = "import sys; from pathlib import Path; from test_round import *\n"
    script += "launch(job(Path(sys.argv[1]), method_for(), steps=10**6), Path(sys.argv[2]), 2, False, Surroundings())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    launcher = subprocess.Popen([sys.executable, "-c", script, tiny_model, tmp_path], env=environment)
    while not (tmp_path / PROGRESS).exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    processes = sorted(set(children()) - set(others))
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while alive(processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(processes) >= 4 and not alive(processes)  # the launcher, torchrun and two ranks


def alive(processes: Sequence[int]) -> list[int]:
    """Those that still run; one that nobody has buried does not."""
    found = []
    for pid in processes:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def test_a_tracker_that_raises_leaves_no_rank_behind(tiny_model: Path, tmp_path: Path) -> None:
    """The ranks are stopped before the error goes on; they save what they did."""
    ranks: list[int] = []
    others = children()  # of an earlier test: a resource tracker lives as long as this process

    def fail(values: Mapping[str, float], step: int) -> None:
        ranks.extend(set(children()) - set(others))
        raise ConnectionError("the tracker is gone")

    with pytest.raises(ConnectionError):
        launch(job(tiny_model, method_for(), steps=2000), tmp_path, 2, False, Surroundings(track=fail))
    assert ranks and not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    assert len(losses_of(tmp_path)) < 2000 and (tmp_path / state.FILE).exists()


def children() -> list[int]:
    """Processes that this one has started, and theirs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    mine = {os.getpid()}
    for _ in range(4):
        mine |= {pid for pid, parent in parents.items() if parent in mine}
    return sorted(mine - {os.getpid()})


def test_ranks_save_together(tiny_model: Path, tmp_path: Path) -> None:
    """Saving divided weights needs everybody."""
    launch(job(tiny_model, method_for()), tmp_path, 2, True, Surroundings(save_every_seconds=0.0))
    assert len(losses_of(tmp_path)) == STEPS and (tmp_path / state.FILE).exists()


def test_a_rank_that_is_done_cannot_fail_the_round(tiny_model: Path, tmp_path: Path) -> None:
    done = dataclasses.replace(method_for(), loss=aborting_at_exit)
    facts = launch(job(tiny_model, done), tmp_path, 2, False, Surroundings())
    assert facts["steps"] == STEPS and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("mine", [0.0, 1.0])
@pytest.mark.parametrize("others", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_what_one_rank_wants_all_do(mine: float, others: tuple[float, float]) -> None:
    """A rank whose own clock is not due saves with the others: alone, they would wait for it for ever."""

    class Two(Team):
        def total(self, values: torch.Tensor) -> torch.Tensor:
            return values + torch.tensor(others)

    interruption, due = _advance(Surroundings(), Two(size=2), due=bool(mine))
    assert due == bool(mine + others[1])
    assert (interruption is not None) == bool(others[0])


def test_what_is_not_finite_on_another_rank_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """Four demonstrations of a step, a micro-batch each: the second and the fourth are rank one's."""
    broken = dataclasses.replace(method_for(micro_batch_trees=1), loss=not_a_number_on_rank_one)
    with pytest.raises(TrainingError, match="the loss is not finite at step 1") as error:
        launch(job(tiny_model, broken), tmp_path, 2, False, Surroundings())
    named = str(error.value).split("(demonstrations ")[1].rstrip(")").split(", ")
    first = next(iter(job(tiny_model, broken).schedule(tiny_model).steps))
    assert len(named) == 2 and set(named) < {tree.id for tree in first}


def test_an_interrupted_round_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    """As after one Ctrl-C: the ranks save, the second launch does the rest, and the weights are those of an unbroken round."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    broken.mkdir(), whole.mkdir()
    long = job(tiny_model, method_for(), steps=60)
    run_round(long, whole, Surroundings())

    def interrupt(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(long, broken, 2, False, Surroundings(interrupt))
    before = len(losses_of(broken))
    assert 0 < before < 60 and not (broken / "model.safetensors").exists()
    reported: list[int] = []
    launch(long, broken, 2, False, Surroundings(reported.append))
    assert next(done for done in reported if done) >= before
    assert sum(reported) == 60
    assert losses_of(broken) == pytest.approx(losses_of(whole), abs=1e-4)
    assert float((weights_of(broken) - weights_of(whole)).abs().max()) < 1e-4


def test_a_comparison_in_two_processes(
    tiny_model: Path, demonstrations_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same table as in one, and nothing left behind that only the ranks needed."""
    app = typer.Typer()
    app.command()(compare.compare)
    words = ["--methods", "gsil-logistic", "--model", str(tiny_model), "--demonstrations", str(demonstrations_file)]
    words += ["--tasks", "support:TASK", "--no-start", "--set", "gsil-logistic.max_new_tokens=4"]
    assert compare.call(app, [*words, "--out", str(tmp_path / "one")]) == 0
    assert compare.call(app, [*words, "--processes", "2", "--out", str(tmp_path / "two")]) == 0
    (folder,) = {path.parent for path in (tmp_path / "two" / "store" / "training").rglob("model.safetensors")}
    assert not [name for name in TEMPORARY if (folder / name).exists()]
    (other,) = {path.parent for path in (tmp_path / "one" / "store" / "training").rglob("model.safetensors")}
    assert losses_of(folder) == pytest.approx(losses_of(other), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--sharded"], "add --processes"),
        (["--sharded", "--processes", "2", "--set", "gsil-logistic.lora_rank=4"], "leave it out with lora_rank"),
        (["--processes", "2", "--precision", "bf16"], "no common fp32 masters"),
        (["--set", "gsil-logistic.lora_rank=1000"], "gsil-logistic.lora_rank=1000 is above the model's width of 32"),
        (["--set", "gsil-logistic.optimizer=adamw-8bit"], "needs bitsandbytes: pip install bitsandbytes"),
        (["--precision", "nf4", "--set", "gsil-logistic.lora_rank=2"], "needs bitsandbytes: pip install bitsandbytes"),
    ],
)
def test_what_processes_cannot_do_is_refused_before_anything_is_done(
    tiny_model: Path,
    demonstrations_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    wanted: str,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    app = typer.Typer()
    app.command()(compare.compare)
    words = ["--methods", "gsil-logistic", "--model", str(tiny_model), "--demonstrations", str(demonstrations_file)]
    assert compare.call(app, [*words, "--tasks", "support:TASK", "--out", str(tmp_path / "out"), *flags]) == 2
    assert wanted in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
