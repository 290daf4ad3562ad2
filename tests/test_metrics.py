"""Metrics by hand: a step's sums, shadow losses, the log that reads every N steps, displacement, and trackers."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from pathlib import Path

import accelerate
import pytest
import torch
import typer
from accelerate import tracking as accelerate_tracking
from test_backend import bushes, lines_of, method_for
from test_trajectory import logp

import baselines
from gsil_bench import compare, stages
from gsil_bench.methods import PairLogProbs, load_method, with_settings
from gsil_bench.models.checkpoint import load_model
from gsil_bench.training import metrics, tracking
from gsil_bench.training.loop import Schedule, Surroundings, train
from gsil_bench.training.metrics import MetricsLog
from gsil_bench.training.round import Round, run_round


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair_of(real: list[float], generated: list[float]) -> PairLogProbs:
    """Policy log-probs whose log-ratios are these."""
    shift = torch.tensor([-10.0 - n for n in range(len(real))])
    ratios = torch.tensor(real), torch.tensor(generated)
    tokens = torch.full_like(shift, 4.0)
    return PairLogProbs(ratios[0] + shift, ratios[1] + 2 * shift, shift, 2 * shift, tokens, tokens)


# ---- a step's numbers -------------------------------------------------------------------------------------------------


def test_shadow_of_the_logistic_loss_by_hand() -> None:
    """f = 2 r + 0.5; −∂L/∂log π(real) = 2 σ(−f), ∂L/∂log π(generated) = 2 σ(f')."""
    method = with_settings(load_method("gsil-logistic"), {"scale": 2.0, "shift": 0.5})
    real, generated = [0.0, 1.5, -3.0], [0.25, -2.0, 4.0]
    shadow = metrics.shadow(method, pair_of(real, generated))
    f, g = ([2 * ratio + 0.5 for ratio in side] for side in (real, generated))
    wanted = [math.log1p(math.exp(-a)) + math.log1p(math.exp(b)) for a, b in zip(f, g, strict=True)]
    assert shadow["loss"].tolist() == pytest.approx(wanted, rel=1e-5)
    assert shadow["real_weight"].tolist() == pytest.approx([2 * sigmoid(-a) for a in f], rel=1e-5)
    assert shadow["generated_weight"].tolist() == pytest.approx([2 * sigmoid(b) for b in g], rel=1e-5)


def test_shadow_of_a_loss_that_leaves_a_side_alone() -> None:
    """−log π(real): the generated side has weight 0, not an error."""
    shadow = metrics.shadow(load_method("sft"), pair_of([1.0, 2.0], [3.0, 4.0]))
    assert shadow["real_weight"].tolist() == [1.0, 1.0]
    assert shadow["generated_weight"].tolist() == [0.0, 0.0]


def test_sums_of_a_step_by_hand() -> None:
    """Three pairs, the last two of one demonstration: weights 1, 1/2, 1/2."""
    pair, weights = pair_of([1.0, 2.0, 2.0], [-1.0, 0.5, 1.5]), torch.tensor([1.0, 0.5, 0.5])
    sums = metrics.step_sums(pair, weights, torch.tensor([3.0, 10.0, 20.0]), (load_method("gsil-logistic"),))
    assert sums["loss"] == 3 + 5 + 10
    assert sums["real_log_ratio"] == pytest.approx(1 + 1 + 1)
    assert sums["generated_log_ratio"] == pytest.approx(-1 + 0.25 + 0.75)
    assert sums["margin"] == pytest.approx(2 + 0.75 + 0.25)
    assert sums["real_logps"] == pytest.approx((1 - 10) + (2 - 11) / 2 + (2 - 12) / 2)
    assert sums["generated_logps"] == pytest.approx((-1 - 20) + (0.5 - 22) / 2 + (1.5 - 24) / 2)
    assert sums["shadow/gsil-logistic/real_weight"] == pytest.approx(sigmoid(-1) + sigmoid(-2), rel=1e-6)
    wanted = sigmoid(-1) + sigmoid(0.5) / 2 + sigmoid(1.5) / 2
    assert sums["shadow/gsil-logistic/generated_weight"] == pytest.approx(wanted, rel=1e-6)
    assert all(value.dtype == torch.float64 for value in sums.values())


def test_the_first_line_of_a_run_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """Means over demonstrations, nats per token over the step's real tokens, and the rate of the warm-up."""
    trees, model = bushes(tiny_model, [1, 2, 3]), load_model(tiny_model)
    with torch.no_grad():
        rows = [[logp(model, tree.prompt_ids, branch.completion_ids).item() for branch in tree.branches] for tree in trees]
    known = [[branch.reference_logp or 0.0 for branch in tree.branches] for tree in trees]
    tokens = sum(len(tree.real.completion_ids) for tree in trees)
    generated = sum(sum(row[1:]) / len(row[1:]) for row in rows) / 3
    before = sum(sum(row[1:]) / len(row[1:]) for row in known) / 3
    real, real_before = (sum(row[0] for row in side) / 3 for side in (rows, known))
    method = method_for("spin", learning_rate=1e-3, warmup=0.5)
    train(model, method, Schedule([trees] * 4), tmp_path)
    line = lines_of(tmp_path)[0]
    assert line["step"] == 1
    assert line["learning_rate"] == pytest.approx(1e-3 / 3)  # two steps of warm-up: a third, two thirds
    assert line["real_logps"] == pytest.approx(real, abs=1e-4)
    assert line["generated_logps"] == pytest.approx(generated, abs=1e-4)
    assert line["real_nll_per_token"] == pytest.approx(-3 * real / tokens, abs=1e-5)
    assert line["real_log_ratio"] == pytest.approx(real - real_before, abs=1e-4)
    assert line["generated_log_ratio"] == pytest.approx(generated - before, abs=1e-4)
    assert line["margin"] == pytest.approx(real - real_before - generated + before, abs=1e-4)


# ---- shadow losses in a run -------------------------------------------------------------------------------------------


def run_with_shadows(folder: Path, name: str, into: Path) -> list[dict[str, float]]:
    trees = tuple(bushes(folder, [2] * 6))
    job = Round(folder, method_for(name), trees, 3, 4, (0, 0), None, shadows=stages.shadow_methods())
    run_round(job, into, Surroundings())
    return lines_of(into)


def test_a_registered_method_is_a_shadow(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare margin pushes both sides with weight 1, and its loss is minus the logged margin."""
    monkeypatch.setitem(baselines.METHODS, "margin", "support:MARGIN")  # type: ignore[index]
    lines = run_with_shadows(tiny_model, "gsil-brier", tmp_path)
    assert len(lines) == 4
    for line in lines:
        assert line["shadow/margin/real_weight"] == pytest.approx(1.0)
        assert line["shadow/margin/generated_weight"] == pytest.approx(1.0)
        assert line["shadow/margin/loss"] == pytest.approx(-line["margin"], rel=1e-9)


@pytest.mark.parametrize("name", ["spin", "gsil-logistic", "gsil-lsif"])
def test_a_methods_shadow_is_its_loss(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """At its default settings; and shadows do not touch what is trained."""
    lines = run_with_shadows(tiny_model, name, tmp_path)
    assert [line["loss"] for line in lines] == pytest.approx([line[f"shadow/{name}/loss"] for line in lines], rel=1e-6)
    assert len({line["loss"] for line in lines}) == 4
    (tmp_path / "without").mkdir()
    job = Round(tiny_model, method_for(name), tuple(bushes(tiny_model, [2] * 6)), 3, 4, (0, 0), None)
    run_round(job, tmp_path / "without", Surroundings())
    assert [line["loss"] for line in lines_of(tmp_path / "without")] == [line["loss"] for line in lines]


def test_shadows_are_the_pairwise_formulas_each_once() -> None:
    """All that compare log-ratios of whole answers, but SPIN for DPO and IRFT too, whose formula is the same; SFT is none."""
    names = stages.shadow_methods()
    needs = {name: load_method(name).needs for name in baselines.METHODS}
    compared = [
        name for name in needs if {"generated", "reference"} <= needs[name] and not {"tokens", "normalisers"} & needs[name]
    ]
    assert sorted(names) == sorted(name for name in compared if name not in ("dpo", "irft"))
    assert {"spin", "gsil-logistic", "gsil-exponential"} <= set(names)


def test_a_loss_of_tokens_is_no_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shadows are computed from sums, after the tokens are gone."""
    monkeypatch.setitem(baselines.METHODS, "token-margin", "support:TOKEN_MARGIN")
    assert "token-margin" not in stages.shadow_methods()


def test_a_method_without_self_generations_has_no_shadows(tiny_model: Path, tmp_path: Path) -> None:
    """And what was not computed is left out of the lines, not written as NaN."""
    trees = [tree.demonstration_only() for tree in bushes(tiny_model, [1] * 4)]
    trees = [dataclasses.replace(tree, real=dataclasses.replace(tree.real, reference_logp=None)) for tree in trees]
    run = Surroundings(shadows=(load_method("gsil-logistic"),))
    train(load_model(tiny_model), method_for("sft"), Schedule([trees]), tmp_path, run)
    text = (tmp_path / metrics.FILE).read_text()
    assert "NaN" not in text
    assert set(json.loads(text)) == {"step", "learning_rate", "loss", "real_logps", "real_nll_per_token", "grad_norm"}


# ---- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_reads_every_n_steps(tmp_path: Path) -> None:
    """Nothing is written before the third line; the rest at the flush; NaN and infinity are left out; a tracker gets the same."""
    tracked: list[tuple[dict[str, float], int]] = []
    log = MetricsLog(tmp_path / "m.jsonl", 3, lambda values, step: tracked.append((dict(values), step)))
    for step in range(1, 8):
        loss = math.nan if step == 2 else math.inf if step == 5 else step / 4
        log.add({"step": step, "loss": torch.tensor(loss), "rate": 0.5, "half": torch.tensor(step / 2, dtype=torch.bfloat16)})
        assert len(metrics.read_metrics(tmp_path / "m.jsonl")) == step // 3 * 3
    log.flush()
    log.flush()  # nothing waits: nothing is written twice
    wanted = [{"step": step, "loss": step / 4, "rate": 0.5, "half": step / 2} for step in range(1, 8)]
    del wanted[1]["loss"], wanted[4]["loss"]
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == wanted
    assert tracked == [(line, n) for n, line in enumerate(wanted, 1)]


def test_ranks_that_do_not_write_do_not(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", 1, writes=False)
    log.add({"step": 1, "loss": torch.tensor(1.0)})
    log.flush()
    assert metrics.read_metrics(tmp_path / "m.jsonl") == []


@pytest.mark.parametrize("every", [1, 4, 100])
def test_stopped_runs_lose_no_line_and_write_none_twice(tiny_model: Path, tmp_path: Path, every: int) -> None:
    """Seven steps, stopped after 3 and after 5, whatever the interval."""
    trees, left = bushes(tiny_model, [1] * 4), [3, 2, 100]
    tracked: list[int] = []

    def advance(done: int) -> None:
        left[0] -= done
        if left[0] <= 0:
            raise KeyboardInterrupt

    method = method_for("gsil-logistic", log_every=every)
    for part in range(3):
        run = Surroundings(advance if part < 2 else lambda done: None, track=lambda values, step: tracked.append(step))
        try:
            train(load_model(tiny_model), method, Schedule([trees] * 7), tmp_path, run)
        except KeyboardInterrupt:
            left.pop(0)
            left[0] += len(lines_of(tmp_path))  # a resumed run reports the steps done before
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, 8))
    assert tracked == list(range(1, 8))


def test_displacement_by_hand(tmp_path: Path) -> None:
    """Means over the last ten of twelve lines: of 3 … 12 it is 7.5; a quantity that was not logged in all of them has none."""
    path = tmp_path / "m.jsonl"
    assert metrics.displacement(path) == {}
    lines = [{"step": n, "real_log_ratio": n, "generated_log_ratio": -2 * n} for n in range(1, 13)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert metrics.displacement(path) == {"real_displacement": 7.5, "generated_displacement": -15.0}
    del lines[5]["generated_log_ratio"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert metrics.displacement(path) == {"real_displacement": 7.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]) + '{"torn')
    assert metrics.displacement(path) == {"real_displacement": 1.5, "generated_displacement": -3.0}


def test_a_round_reports_the_displacement_of_its_last_steps(tiny_model: Path, tmp_path: Path) -> None:
    _, facts = train(load_model(tiny_model), method_for("gsil-logistic"), Schedule([bushes(tiny_model, [2] * 4)] * 12), tmp_path)
    ratios = [line["real_log_ratio"] for line in lines_of(tmp_path)[2:]]
    assert facts["real_displacement"] == pytest.approx(sum(ratios) / 10, rel=1e-12)


# ---- trackers ---------------------------------------------------------------------------------------------------------


def call(words: list[str]) -> int:
    app = typer.Typer()
    app.command()(compare.compare)
    return compare.call(app, words)


@pytest.fixture
def words(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> list[str]:
    options = {"model": tiny_model, "demonstrations": demonstrations_file, "tasks": "support:TASK", "out": tmp_path / "out"}
    settings = ["--set", "gsil-logistic.max_new_tokens=4", "--methods", "sft,gsil-logistic", "--no-start"]
    return [*(str(word) for name, value in options.items() for word in (f"--{name}", value)), *settings]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tensorbord", "unknown tracker 'tensorbord': did you mean 'tensorboard'?"),
        ("wandb,mlfow", "unknown tracker 'mlfow': did you mean 'mlflow'?"),
        ("mlflow", "--trackers mlflow: mlflow is not installed: pip install mlflow"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, wanted: str
) -> None:
    """Before anything is done, although accelerate itself would leave it out silently."""
    monkeypatch.setattr(tracking, "find_spec", lambda package: None if package == "mlflow" else object())
    assert call([*words, "--trackers", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert wanted in captured.err
    assert not (tmp_path / "out").exists()


class FakeTracker(accelerate_tracking.GeneralTracker):
    """What accelerate makes of a name, keeping what it is given."""

    name, requires_logging_directory = "trackio", False
    runs: list[FakeTracker]

    def __init__(self, run_name: str, **kwargs: object) -> None:
        super().__init__()
        self.run, self.config, self.lines, self.finished = kwargs.get("name"), {}, [], False  # type: ignore[var-annotated]
        FakeTracker.runs.append(self)

    @property
    def tracker(self) -> FakeTracker:
        return self

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None, **kwargs: object) -> None:
        self.lines.append((dict(values), step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake_tracker(monkeypatch: pytest.MonkeyPatch) -> type[FakeTracker]:
    FakeTracker.runs = []
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "trackio", FakeTracker)
    monkeypatch.setattr(accelerate_tracking, "get_available_trackers", lambda: [accelerate.utils.LoggerType.TRACKIO])
    monkeypatch.setattr(tracking, "find_spec", lambda package: types.SimpleNamespace(name=package))
    return FakeTracker


def test_a_tracker_is_given_every_line_with_its_step(words: list[str], tmp_path: Path, fake_tracker: type[FakeTracker]) -> None:
    """Through accelerate: a run a round, named after method, seed and round, with its settings, closed at the end."""
    assert call([*words, "--trackers", "trackio"]) == 0
    files = {path.parent.name: lines_of(path.parent) for path in (tmp_path / "out" / "store").rglob(metrics.FILE)}
    assert [run.run for run in fake_tracker.runs] == ["sft-seed0-round0", "gsil-logistic-seed0-round0"]
    assert sorted(([line for line, _ in run.lines] for run in fake_tracker.runs), key=str) == sorted(files.values(), key=str)
    for run in fake_tracker.runs:
        assert [step for _, step in run.lines] == [1, 2, 3]  # 36 demonstrations, 2 epochs, batches of 32
        assert all(line["step"] == step for line, step in run.lines)
        assert run.finished and run.config["seed"] == 0
    assert fake_tracker.runs[1].config["scale"] == 1.0


def test_a_tracker_is_closed_when_training_fails(words: list[str], fake_tracker: type[FakeTracker]) -> None:
    assert call([*words, "--trackers", "trackio", "--set", "sft.learning_rate=1e14"]) == 1
    assert [run.finished for run in fake_tracker.runs] == [True, True]


def test_reading_on_takes_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert metrics.read_on(path, 0) == ([], 0)
    path.write_text('{"step": 1}\n{"st')
    assert metrics.read_on(path, 0) == ([{"step": 1}], 12)
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert metrics.read_on(path, 12) == ([{"step": 2}], 24)
    assert metrics.read_on(path, 24) == ([], 24)
    path.write_text('{"step": 1}\n')  # a resumed round cuts off what its state does not know
    assert metrics.read_on(path, 24) == ([{"step": 1}], 12)
