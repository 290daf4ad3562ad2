"""Tuning: the same number of trials for each method, on dev, chosen by one objective, and never run twice."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import support
import yaml

from gsil_bench import cli, compare
from gsil_bench.config import Config
from gsil_bench.errors import UserError
from gsil_bench.evaluation import held_out
from gsil_bench.execution import local
from gsil_bench.methods import Method, load_method, with_settings
from gsil_bench.records import CellFailure, CellResult, ItemScore
from gsil_bench.tasks.task import Item, Split
from gsil_bench.tune import (
    Space,
    check_dev,
    edge_warnings,
    factors,
    judge,
    objective,
    read_space,
    recipe,
    trial_config,
    tuned_methods,
)

SFT = with_settings(load_method("sft"), {"learning_rate": 1e-5})
LOGISTIC = with_settings(load_method("gsil-logistic"), {"learning_rate": 4e-6})


def space_file(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


# The space.


def test_the_default_space_is_a_log_grid_of_learning_rates_around_each_methods_own() -> None:
    assert factors(5) == [0.25, 0.5, 1, 2, 4]
    assert factors(4) == [0.5, 1, 2, 4]
    assert factors(1) == [1]
    space = read_space(None, [SFT, LOGISTIC], 3)
    assert space.grids == {"sft": {"learning_rate": [5e-6, 1e-5, 2e-5]}, "gsil-logistic": {"learning_rate": [2e-6, 4e-6, 8e-6]}}
    assert [trial.name for trial in space.trials][2:4] == ["sft--trial-3", "gsil-logistic--trial-1"]
    assert read_space(None, [SFT], None).budget == 5


def test_the_default_space_ends_before_rates_that_train_nothing() -> None:
    method = load_method("sft")
    assert read_space(None, [method], 15).budget == 15
    with pytest.raises(UserError, match="--trials 16: the default space doubles the learning rate with each"):
        read_space(None, [method], 16)


def test_every_method_gets_the_same_number_of_trials_from_its_own_space(tmp_path: Path) -> None:
    path = space_file(tmp_path, "all: {learning_rate: {factors: [0.5, 1, 2]}}\ngsil-logistic: {scale: [0.1, 0.5, 1]}\n")
    space = read_space(path, [SFT, LOGISTIC], 3)
    assert Counter(trial.method for trial in space.trials) == {"sft": 3, "gsil-logistic": 3}
    drawn = [tuple(trial.settings.values()) for trial in space.trials if trial.method == "gsil-logistic"]
    assert len(set(drawn)) == 3  # of nine combinations, none twice
    assert all(rate in (2e-6, 4e-6, 8e-6) and scale in (0.1, 0.5, 1) for rate, scale in drawn)
    again = read_space(path, [SFT, LOGISTIC], 3)
    assert [trial.settings for trial in again.trials] == [trial.settings for trial in space.trials]
    assert again.sha256 == space.sha256
    assert read_space(path, [SFT, LOGISTIC], 2).sha256 != space.sha256


def test_without_a_number_a_file_gives_all_its_combinations(tmp_path: Path) -> None:
    path = space_file(tmp_path, "gsil-logistic: {scale: [0.1, 1], shift: [0, 1, 2]}\nsft: {epochs: [1, 2, 3, 4, 5, 6]}\n")
    space = read_space(path, [SFT, LOGISTIC], None)
    assert space.budget == 6
    assert space.trials[-1].settings == {"scale": 1.0, "shift": 2.0}
    assert space.trials[0].settings == {"epochs": 1.0}


def test_a_file_may_name_methods_that_are_not_tuned(tmp_path: Path) -> None:
    """One file serves several searches; the search is the same as without them."""
    alone = read_space(space_file(tmp_path, "all: {epochs: [1, 2]}"), [SFT, LOGISTIC], None)
    both = read_space(space_file(tmp_path, "all: {epochs: [1, 2]}\nspin: {beta: [1]}"), [SFT, LOGISTIC], None)
    assert (both.sha256, both.budget) == (alone.sha256, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all: {learning_rat: [1]}", "setting of sft 'learning_rat': did you mean 'learning_rate'"),
        ("sftt: {learning_rate: [1]}", "method in --space .*'sftt': did you mean 'sft'"),
        ("gsil-brier: {learning_rate: [1]}", "nothing is searched for sft"),
        ("all: {learning_rate: []}", "expected a list of values"),
        ("all: {learning_rate: 1}", "expected a list of values"),
        ("all: {learning_rate: {factor: [1]}}", "expected a list of values"),
        ("all: {learning_rate: [fast]}", "sft.learning_rate=fast: expected a number"),
        ("all: {learning_rate: [-1]}", "out of range"),
        ("all: {learning_rate: {factors: [1, 1.0, 2]}}", "1e-05 is there twice"),
        ("all: {learning_rate: [1e-5, 1.0e-5]}", "1e-05 is there twice"),
        ("all: {learning_rate: {factors: [a]}}", "factors multiply numbers"),
        ("all: {schedule: {factors: [2]}}", "factors multiply numbers"),
        ("sft: {learning_rate: [1e-5]}", "nothing is searched for gsil-logistic"),
        ("all: {learning_rate: [1e-5]}\nsft: {epochs: [1, 2]}", r"different numbers of combinations \(sft 2, gsil-logistic 1\)"),
        ("- 1", "expected METHOD: "),
        ("all: [1", "not YAML"),
        ("all: {learning_rate: [1e-5]}\nall: {epochs: [1]}", "'all' stands twice"),
        ("", "expected METHOD: "),
    ],
)
def test_a_wrong_space_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_space(space_file(tmp_path, text), [SFT, LOGISTIC], None)
    assert "\n" not in str(caught.value)


def test_a_space_that_is_missing_or_too_small(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_space(str(tmp_path / "none.yaml"), [SFT], None)
    path = space_file(tmp_path, "all: {learning_rate: [1e-5, 2e-5]}")
    with pytest.raises(UserError, match="sft has 2 combinations, fewer than --trials 3"):
        read_space(path, [SFT], 3)


def test_the_trials_are_variants_in_one_comparison_on_dev() -> None:
    config = Config(methods=("sft", "gsil-logistic"), split="test", control="sft", every_round=True, seeds=(3, 4))
    space = read_space(None, tuned_methods(config), 2)
    asked = trial_config(config, space)
    assert (asked.split, asked.control, asked.every_round, asked.seeds) == ("dev", None, False, (3, 4))
    assert asked.methods == ("sft--trial-1", "sft--trial-2", "gsil-logistic--trial-1", "gsil-logistic--trial-2")
    assert asked.variants["gsil-logistic--trial-2"] == {"method": "gsil-logistic", "learning_rate": 4e-6}


def test_a_variant_is_tuned_from_its_own_settings() -> None:
    variants = {"soft": {"method": "gsil-logistic", "scale": 0.1}}
    config = Config(methods=("soft",), variants=variants, set={"soft": {"shift": 2}})
    asked = trial_config(config, read_space(None, tuned_methods(config), 1))
    record = {"method": "gsil-logistic", "scale": 0.1, "shift": 2, "learning_rate": 2e-6}
    assert asked.variants == {**variants, "soft--trial-1": record}


# The choice.


def cell(method: str, scores: Sequence[float | None], task: str = "t", seed: int = 0, **changes: Any) -> CellResult:
    """A result with these scores on a scale of 0 to 1."""
    items = tuple(ItemScore(f"i{n}", score, "" if score is not None else "no answer") for n, score in enumerate(scores))
    fields: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "task": task,
        "metric": "accuracy",
        "best": 1.0,
        "worst": 0.0,
        "comparable": {},
        "items": items,
        "counts": {},
        "record": {},
        "cost": {"steps": 7, "tokens": 100},
        "provenance": {},
    } | changes
    return CellResult(**fields)


def three_rates() -> Space:
    return read_space(None, [SFT], 3)


def test_the_chosen_trial_has_the_best_mean_over_tasks_of_normalised_scores() -> None:
    """Task t from 0 to 1, task r from 1 to 10.

    Trial 1: (0.5 + (4 − 1)/9) / 2 = 5/12. Trial 2: (0.75 + (2.5 − 1)/9) / 2 = 11/24. Trial 3: (0.25 + (5.5 − 1)/9) / 2 = 3/8. The
    raw mean would choose trial 3 (2.875), and so would the ratings alone; the held-out loss would choose trial 1.
    """
    results = []
    for number, (scores, ratings, loss) in enumerate(
        [([1, 1, 0, 0], [4, 4], 1.0), ([1, 1, 1, 0], [2, 3], 9.0), ([1, 0, 0, 0], [5, 6], 2.0)], start=1
    ):
        name = f"sft--trial-{number}"
        rated = cell(name, ratings, "r", metric="rating", best=10.0, worst=1.0)
        lost = cell(name, [loss], held_out.NAME, metric="nll", best=0.0, worst=None)
        results += [cell(name, scores), rated, lost]
    (tuned,) = judge(three_rates(), results, [])
    found = [each.score.estimate for each in tuned.tried if each.score is not None]
    assert found == pytest.approx([5 / 12, 11 / 24, 3 / 8])
    assert tuned.chosen is not None
    assert (tuned.chosen.number, tuned.chosen.settings) == (2, {"learning_rate": 1e-5})
    assert tuned.warnings == ()
    assert tuned.tried[0].by_task == pytest.approx({"t": 0.5, "r": 1 / 3})
    assert tuned.tried[0].from_chosen is not None
    assert tuned.tried[0].from_chosen.estimate == pytest.approx(-1 / 24)
    assert tuned.tried[1].from_chosen is None
    assert tuned.tried[0].cost == {"steps": 7, "tokens": 100}  # of the run, not once for each task


def test_equal_trials_leave_the_first() -> None:
    results = [cell(f"sft--trial-{number}", [1, 0]) for number in (3, 2, 1)]
    (tuned,) = judge(three_rates(), results, [])
    assert tuned.chosen is not None
    assert tuned.chosen.number == 1


def test_a_failed_trial_counts_and_is_never_chosen() -> None:
    """Trial 3 would be best by the one task that it finished."""
    results = [cell("sft--trial-1", [0, 0]), cell("sft--trial-2", [1, 0]), cell("sft--trial-3", [1, 1])]
    failures = [CellFailure("sft--trial-3", 0, "r", "training: TrainingError: the loss is not finite")]
    (tuned,) = judge(three_rates(), results, failures)
    assert tuned.chosen is not None
    assert tuned.chosen.number == 2
    assert len(tuned.tried) == 3
    assert (tuned.tried[2].score, tuned.tried[2].failure) == (None, "training: TrainingError: the loss is not finite")


def test_a_method_of_which_every_trial_failed_has_no_choice() -> None:
    failures = [CellFailure(f"sft--trial-{number}", 0, "t", "out of memory") for number in (1, 2, 3)]
    (tuned,) = judge(three_rates(), [], failures)
    assert (tuned.chosen, tuned.warnings) == (None, ("sft: every trial failed; nothing is chosen",))


def test_a_trial_without_a_scored_item_is_a_failed_one() -> None:
    results = [cell("sft--trial-1", [None, None]), cell("sft--trial-2", [0, 0]), cell("sft--trial-3", [0, None])]
    (tuned,) = judge(three_rates(), results, [])
    assert tuned.tried[0].failure == "no task has a scored item"
    assert tuned.chosen is not None
    assert tuned.chosen.number == 2
    assert [each.unscored for each in tuned.tried] == [2, 0, 1]


@pytest.mark.parametrize(("number", "which"), [(1, "smallest"), (3, "largest")])
def test_a_choice_at_the_edge_is_said(number: int, which: str) -> None:
    space = three_rates()
    (warning,) = edge_warnings("sft", space.grids["sft"], space.trials[number - 1])
    value = f"{space.trials[number - 1].settings['learning_rate']:g}"
    assert f"edge of the space: learning_rate {value} is the {which} tried" in warning


def test_an_edge_is_one_of_numbers_of_which_there_are_several(tmp_path: Path) -> None:
    path = space_file(tmp_path, "all: {learning_rate: [1e-5], schedule: [linear, cosine], epochs: [3, 1, 2]}")
    space = read_space(path, [SFT], None)
    middle = next(trial for trial in space.trials if trial.settings["epochs"] == 2)
    assert edge_warnings("sft", space.grids["sft"], middle) == []
    assert len(edge_warnings("sft", space.grids["sft"], space.trials[0])) == 1


# The objective's interval.


def test_one_task_and_seed_is_students_interval() -> None:
    scores = np.array([0.1, 0.5, 0.4, 0.9, 0.2, 0.6])
    found = objective([scores[None, :]])
    mean, error = scores.mean(), scores.std(ddof=1) / math.sqrt(6)
    low, high = scipy.stats.t.interval(0.95, 5, loc=mean, scale=error)
    assert (found.estimate, found.low, found.high) == pytest.approx((mean, low, high))


def test_tasks_and_seeds_add_their_variances() -> None:
    """Items [0, 1] and [0, 0, 1, 1] of two tasks: (1/2 / 2 + 1/3 / 4) / 2² = 1/12, with df (1/12)² / ((1/16)²/1 + (1/48)²/3)."""
    first, second = np.array([[0.0, 1.0]]), np.array([[0.0, 0.0, 1.0, 1.0]])
    df = (1 / 12) ** 2 / ((1 / 16) ** 2 + (1 / 48) ** 2 / 3)
    half = scipy.stats.t.ppf(0.975, df) * math.sqrt(1 / 12)
    found = objective([first, second], (-9.0, 9.0))
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))
    # two seeds of which the second scores one item of two worse: objectives 1 and 1/2, so 1/8 / 2 more
    items = np.array([[1.0, 1.0], [0.0, 1.0]])
    df = (1 / 16 + 1 / 16) ** 2 / (2 * (1 / 16) ** 2)
    half = scipy.stats.t.ppf(0.975, df) * math.sqrt(1 / 8)
    found = objective([items], (-9.0, 9.0))
    assert (found.estimate, found.high) == pytest.approx((0.75, 0.75 + half))


def test_an_item_that_one_seed_did_not_score_counts_for_none() -> None:
    found = objective([np.array([[1.0, 0.0, math.nan], [1.0, 1.0, 0.0]])])
    assert found.estimate == 0.75


# The command, on an untrained model.


@dataclasses.dataclass(frozen=True)
class SplitTask(support.LengthTask):
    """Its splits ask different questions, except the last `shared` of `count`."""

    name: str = "split-letters"
    shared: int = 0
    count: int = 12

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        ids = [f"{'any' if n >= self.count - self.shared else split}-{n}" for n in range(self.count)]
        return [Item(f"{split}-{name}", (f"Say {name}.",), gold=("a",)) for name in ids]


@dataclasses.dataclass(frozen=True)
class NoDev(SplitTask):
    """Has no dev split."""

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        return [] if split == "dev" else super().items(split, data_dir)


TASK = SplitTask()
LEAKY = SplitTask(name="leaky", shared=1)
ALMOST_CLEAN = SplitTask(name="almost-clean", shared=1, count=100)
NO_DEV = NoDev(name="no-dev")


def _exact(pair: Any, strength: float) -> Any:
    if strength > 1:
        raise RuntimeError("diverged")
    return -strength * pair.policy_real_logps


SOMETIMES = Method("sometimes", "Fails above a strength.", _exact, settings={"strength": 1.0}, formula="x")


@pytest.fixture
def command(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a small tuning."""

    def arguments(*more: str, methods: str = "sft,gsil-logistic", tasks: str = "test_tune:TASK", out: str = "out") -> list[str]:
        words = ["--model", str(tiny_model), "--demonstrations", str(demonstrations_file), "--tasks", tasks, "--no-start"]
        logistic = ["--set", "gsil-logistic.max_new_tokens=8"] if "gsil-logistic" in methods else []
        return ["tune", "--methods", methods, *words, "--out", str(tmp_path / out), *logistic, *more]

    return arguments


def call(words: Sequence[str]) -> int:
    return compare.call(cli.app, words)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the trainings that were run."""
    labels: list[str] = []
    build = local.LocalRun._build

    def watched(self: local.LocalRun, stage: local.Stage) -> object:
        made = build(self, stage)
        labels.extend([stage.label] if stage.kind == "training" else [])
        return made

    monkeypatch.setattr(local.LocalRun, "_build", watched)
    return labels


def test_a_tuning_ends_in_a_recipe_that_compare_reads(
    command: Callable[..., list[str]], tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command("--trials", "2")) == 0
    captured = capsys.readouterr()
    assert "estimate: about" in captured.err
    assert "2 trials of each method, seed 0, split dev: split-letters (12 items)." in captured.out
    assert Counter(label.split("--")[0] for label in trained) == {"train sft": 2, "train gsil-logistic": 2}
    out = tmp_path / "out"
    found = json.loads((out / "tuning.json").read_text())
    assert (found["split"], found["trials"], found["seeds"]) == ("dev", 2, [0])
    for method in found["methods"].values():
        assert len(method["trials"]) == 2
        best = max(trial["score"]["estimate"] for trial in method["trials"])
        assert method["trials"][method["chosen"]["trial"] - 1]["score"]["estimate"] == best
    assert str(tmp_path) not in (out / "tuning.json").read_text()
    chosen = yaml.safe_load((out / "tuned.yaml").read_text())
    assert str(tmp_path) not in json.dumps(chosen["tuning"])

    # the recipe finds the chosen checkpoints in the same store, and its results carry the budget
    trained.clear()
    assert call(["compare", "--recipe", str(out / "tuned.yaml"), "--out", str(out)]) == 0
    assert trained == []
    result = json.loads((out / "results" / "split-letters" / "gsil-logistic-seed0.json").read_text())
    rate = found["methods"]["gsil-logistic"]["chosen"]["settings"]["learning_rate"]
    assert result["record"]["training"]["learning_rate"] == rate
    tuning = result["provenance"]["tuning"]
    assert (tuning["trials"], tuning["split"], tuning["settings"]) == (2, "dev", {"learning_rate": rate})
    assert tuning["space_sha256"] == found["space_sha256"]
    assert result["items"][0]["id"] == "test-test-0"


def test_a_finished_tuning_runs_nothing_and_writes_the_same(
    command: Callable[..., list[str]], tmp_path: Path, trained: list[str]
) -> None:
    assert call(command("--trials", "1", methods="sft")) == 0
    names = ("tuning.json", "tuning.md", "tuned.yaml")
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    trained.clear()
    assert call(command("--trials", "1", methods="sft")) == 0
    assert trained == []
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == before
    assert call(command("--trials", "2", methods="sft")) == 0
    assert trained == ["train sft--trial-2, seed 0"]  # a wider space runs only what is new


def test_an_interrupted_tuning_continues(
    command: Callable[..., list[str]], tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = local.LocalRun._build

    def interrupted(self: local.LocalRun, stage: local.Stage) -> object:
        if len(trained) == 1 and stage.kind == "training":
            raise KeyboardInterrupt
        return watched(self, stage)

    monkeypatch.setattr(local.LocalRun, "_build", interrupted)
    assert call(command("--trials", "2", methods="sft")) == 130
    assert not (tmp_path / "out" / "tuning.json").exists()
    monkeypatch.setattr(local.LocalRun, "_build", watched)
    assert call(command("--trials", "2", methods="sft")) == 0
    assert trained == ["train sft--trial-1, seed 0", "train sft--trial-2, seed 0"]


def test_a_diverged_trial_is_shown(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = space_file(tmp_path, "all: {strength: [0.5, 1, 2]}")
    assert call(command("--space", path, methods="test_tune:SOMETIMES")) == 0
    assert "RuntimeError: diverged" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "tuning.json").read_text())["methods"]["sometimes"]
    assert [bool(trial["failure"]) for trial in found["trials"]] == [False, False, True]
    assert "| 3 | strength=2 | - |" in (tmp_path / "out" / "tuning.md").read_text()
    assert yaml.safe_load((tmp_path / "out" / "tuned.yaml").read_text())["methods"] == ["test_tune:SOMETIMES"]


def test_all_trials_failed(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = space_file(tmp_path, "all: {strength: [2, 3]}")
    assert call(command("--space", path, methods="test_tune:SOMETIMES")) == 1
    assert "every trial failed" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "tuning.json").read_text())["methods"]["sometimes"]["chosen"] is None
    assert not (tmp_path / "out" / "tuned.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, ["--split", "test"], "never sees test"),
        ({}, ["--trials", "0"], "--trials: expected a whole number of at least 1"),
        ({}, ["--trials", "x"], "--trials: expected a whole number"),
        ({"methods": "sft,start"}, [], "start does not train"),
        ({"methods": "sft,gsil-logistik"}, [], "did you mean 'gsil-logistic'"),
        ({"tasks": "test_tune:LEAKY"}, [], "1 of 12 dev items of task leaky are test items"),
        ({"tasks": "test_tune:NO_DEV"}, [], "task no-dev has no items in its dev split"),
        ({}, ["--control", "sft"], "No such option: --control"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    more: list[str],
    message: str,
) -> None:
    assert call(command(*more, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command("--dry-run", "--trials", "2")) == 0
    assert "train gsil-logistic--trial-2, seed 0" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_recipe_leaves_the_report_to_the_comparison(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    """Seeds, split and number of items are the report's; what was trained on, and under which settings, is not."""
    from gsil_bench.inputs import read_inputs

    config = Config(
        model=str(tiny_model),
        demonstrations=str(demonstrations_file),
        methods=("sft",),
        tasks=("test_tune:ALMOST_CLEAN",),
        out=str(tmp_path),
        seeds=(7,),
        limit=99,
        limit_demonstrations=20,
        set={"sft": {"epochs": 3}},
    )
    space = read_space(None, tuned_methods(config), 1)
    inputs = read_inputs(trial_config(config, space))
    tuned = judge(space, [cell("sft--trial-1", [1, 0])], [])
    found = recipe(config, space, tuned, inputs)
    assert {"seeds", "limit", "split", "out"} & set(found) == set()
    assert (found["limit_demonstrations"], found["set"]["sft"]) == (20, {"epochs": 3, "learning_rate": 1e-5})
    assert found["tuning"]["seeds"] == [7]
    assert check_dev(inputs) == []  # the shared question is beyond --limit


def test_a_repeated_question_is_noted(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    from gsil_bench.inputs import read_inputs

    config = Config(
        model=str(tiny_model),
        demonstrations=str(demonstrations_file),
        methods=("sft",),
        tasks=("test_tune:ALMOST_CLEAN",),
        split="dev",
        out=str(tmp_path),
    )
    assert check_dev(read_inputs(config)) == ["1 of 100 dev items of task almost-clean also stand in its test split"]
