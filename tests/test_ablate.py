"""Ablations: grids become variants, rows are paired with the full method and corrected together, rounds with the round before."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from gsil_bench import cli, compare
from gsil_bench.ablate import Ablation, Axis, Point, Row, axes_of, conclude, parse_grids, points_of, prepare
from gsil_bench.config import Config
from gsil_bench.errors import UserError
from gsil_bench.execution import local
from gsil_bench.inputs import resolve_methods
from gsil_bench.records import CellFailure, CellResult, ItemScore
from gsil_bench.reporting import ablated

CONFIG = Config(methods=("gsil-logistic",), set={"gsil-logistic": {"scale": 0.5}, "gsil-brier": {"learning_rate": 7e-5}})


def points(*grids: str, full_grid: bool = False, config: Config = CONFIG) -> list[Point]:
    """The variants of grids."""
    method = resolve_methods(config)[1]
    axes = axes_of(parse_grids(grids), method, config)
    return points_of(axes, config.methods[0], method, config, full_grid)


# The grid.


def test_one_setting_at_a_time_without_the_methods_own_value() -> None:
    found = points("scale=0.1,0.5,2", "rounds=2", "temperature=0")
    assert [dict(point.changes) for point in found] == [{"scale": 0.1}, {"scale": 2.0}, {"rounds": 2}, {"temperature": 0.0}]
    assert found[0].record == {"method": "gsil-logistic", "scale": 0.1}
    names = ["scale-0.1", "scale-2", "rounds-2", "temperature-0"]
    assert [point.name for point in found] == [f"gsil-logistic--{name}" for name in names]


def test_a_full_grid_has_all_combinations_but_the_full_method() -> None:
    found = points("scale=0.5,1", "shift=0,2", full_grid=True)
    assert [tuple(point.changes.values()) for point in found] == [(0.5, 2), (1, 0), (1, 2)]
    assert [point.name.removeprefix("gsil-logistic--") for point in found] == ["shift-2", "scale-1", "scale-1--shift-2"]


def test_another_loss_gets_the_full_methods_settings() -> None:
    """Brier's own rate (from the recipe) gives way to logistic's 2e-6; its scale to logistic's 0.5."""
    (brier, spin) = points("loss=gsil-brier,spin")
    assert brier.record == {"method": "gsil-brier", "learning_rate": 2e-6, "scale": 0.5}
    assert spin.record["method"] == "spin"
    assert spin.record["rounds"] == 1  # as the full method, not spin's own two
    assert "beta" not in spin.record and "scale" not in spin.record
    variants = {point.name: point.record for point in (brier, spin)}
    changed = resolve_methods(Config(methods=tuple(variants), set=CONFIG.set, variants=variants, start=False))
    full = resolve_methods(CONFIG)[1]
    assert [method.protocol for method in changed] == [full.protocol] * 2
    assert changed[0].settings == full.settings
    assert [method.loss.__name__ for method in changed if method.loss] == ["brier", "pairwise_logistic"]


def test_data_size_is_an_axis() -> None:
    found = points("limit_demonstrations=10,100")
    assert [(point.limit, point.record) for point in found] == [(n, {"method": "gsil-logistic"}) for n in (10, 100)]


def test_a_name_that_would_be_too_long_is_a_number() -> None:
    config = Config(methods=("gsil-exponential",))
    grids = ("learning_rate_factor=3", "max_grad_norm=0.123456", "micro_batch_tokens=4096")
    found = points(*grids, full_grid=True, config=config)
    assert [point.name for point in found] == ["gsil-exponential--point-1"]


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (["scale"], "--grid scale: expected SETTING=VALUE"),
        (["scale="], "--grid scale=: expected SETTING=VALUE"),
        (["scale=,"], "expected SETTING=VALUE"),
        (["=1"], "expected SETTING=VALUE"),
        (["scale=1", "scale=2"], "scale has a grid already"),
        (["scal=1"], "setting of gsil-logistic in --grid 'scal': did you mean 'scale'"),
        (["lss=spin"], "'lss': did you mean 'loss'"),
        (["scale=1,1.0"], "--grid scale: 1.0 is there twice"),
        (["scale=high"], "scale=high: expected a number"),
        (["rounds=0"], "must be at least 1"),
        (["limit_demonstrations=0"], "limit_demonstrations: expected a whole number of at least 1"),
        (["loss=gsil-brer"], "did you mean 'gsil-brier'"),
        (["loss=start"], "start does not train"),
        (["scale=0.5"], r"gsil-logistic has these values already \(scale=0.5\)"),
        (["loss=gsil-logistic"], "has these values already"),
    ],
)
def test_a_wrong_grid_is_one_line(grids: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        points(*grids)
    assert "\n" not in str(caught.value)


# What the rows say.


def cell(
    method: str,
    scores: Sequence[float | None],
    task: str = "t",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    weights: str = "",
    **comparable: Any,
) -> CellResult:
    """A result on a graded scale from 0 to 10, so that the test is Student's."""
    shared = {"model": "m", "budget": "84 steps of 32 demonstrations", "demonstrations": "all", "left_out": "none"}
    record = {"loss": "f", "needs": [], "normalise": "examples", "batches": "pairs", "protocol": {"rounds": 1}, "training": {}}
    counts = {"inputs": {"demonstrations": {"trained on": 90 if comparable.get("demonstrations") else 1350}}}
    return CellResult(
        method=method,
        seed=seed,
        task=task,
        metric="rating",
        best=10.0,
        worst=0.0,
        comparable={**shared, **comparable},
        items=tuple(ItemScore(f"i{n}", score, "") for n, score in enumerate(scores)),
        counts={},
        record={**record, "settings": {"scale": 1.0, **(settings or {})}},
        cost={"tokens": 50.0 if comparable.get("budget") else 100.0},
        provenance={"rounds": [] if method == "start" else [{"weights_sha256": weights or f"{method}{seed}"}], **counts},
    )


FULL_SCORES = [5.0, 4.0, 6.0, 5.0, 3.0, 7.0, 5.0, 4.0]
GAINS = {"a": [2, 3, 2, 3, 2, 3, 2, 3], "b": [1, -1, 2, 0, 1, 2, -1, 1], "c": [-1, 1, -2, 0, -1, 1, -1, 2]}


def shifted(gains: Sequence[float]) -> list[float]:
    return [score + gain for score, gain in zip(FULL_SCORES, gains, strict=True)]


def concluded(results: Sequence[CellResult], failures: Sequence[CellFailure] = (), names: Sequence[str] = "abc") -> Ablation:
    axis = Axis("scale", (0.1, 0.5, 2.0), 1.0)
    members = [Point(name, {"scale": value}, {}, None) for name, value in zip(names, axis.values, strict=True)]
    return conclude("full", [axis], members, results, failures)


def graded(**more: Any) -> list[CellResult]:
    rows = [cell(name, shifted(gains), settings={"scale": 9}, **more) for name, gains in GAINS.items()]
    return [cell("full", FULL_SCORES), *rows]


def rows_of(ablation: Ablation, task: str = "t") -> dict[str, Row]:
    return {row.name: row for table in ablation.tables if table.column.task == task for row in table.rows}


def test_differences_are_paired_with_the_full_method_and_corrected_by_hand() -> None:
    """p values of scipy's paired t test, largest first: p(3), min(p(3), p(2) · 3/2), min(that, p(1) · 3)."""
    rows = rows_of(concluded(graded()))
    raw = {name: float(scipy.stats.ttest_1samp(gains, 0).pvalue) for name, gains in GAINS.items()}
    first, second, third = sorted(raw, key=lambda name: raw[name])
    expected = {third: raw[third]}
    expected[second] = min(expected[third], raw[second] * 3 / 2)
    expected[first] = min(expected[second], raw[first] * 3)
    for name, row in ((name, rows[name]) for name in GAINS):
        assert row.difference is not None
        assert row.difference.estimate == pytest.approx(sum(GAINS[name]) / 8)
        assert row.difference.p_value == pytest.approx(raw[name])
        assert row.p_adjusted == pytest.approx(expected[name])
    assert {name: row.outcome for name, row in rows.items()} == {
        "full": "full",
        "a": "better",
        "b": "not resolved",
        "c": "not resolved",
    }
    assert rows["full"].difference is None


def test_each_task_is_a_family_of_its_own() -> None:
    more = [cell("full", FULL_SCORES, "u"), cell("a", shifted(GAINS["a"]), "u")]
    ablation = concluded([*graded(), *more])
    assert [table.family for table in ablation.tables] == [3, 1]
    alone = rows_of(ablation, "u")["a"]
    assert alone.difference is not None
    assert alone.p_adjusted == alone.difference.p_value
    assert rows_of(ablation, "u")["b"].outcome == "not run"


def test_what_else_differs_is_said_and_not_refused() -> None:
    changed = cell("a", shifted(GAINS["a"]), settings={"scale": 0.1}, budget="42 steps", demonstrations="few")
    rows = rows_of(concluded([cell("full", FULL_SCORES), changed]))
    assert rows["a"].outcome == "better"
    assert rows["a"].notes == (
        "42 steps instead of 84 steps of 32 demonstrations",
        "trained on 90 demonstrations instead of 1350",
        "0.50 times the training tokens",
    )
    other = cell("a", shifted(GAINS["a"]), settings={"scale": 0.1, "shift": 2.0})
    rows = rows_of(concluded([cell("full", FULL_SCORES), other]))
    assert rows["a"].notes == ("shift 2.0 instead of none",)  # scale is what was varied


def test_another_model_is_refused() -> None:
    rows = rows_of(concluded([cell("full", FULL_SCORES), cell("a", FULL_SCORES, model="n")]))
    assert (rows["a"].outcome, rows["a"].difference) == ("refused", None)
    assert any("cannot be compared: model" in note for note in rows["a"].notes)


def test_a_setting_that_changes_nothing_is_no_test() -> None:
    """The same weights give p = 1 for nothing, which would make the others' correction harder."""
    same = cell("c", FULL_SCORES, weights="full0")
    ablation = concluded([*graded()[:3], same])
    rows = rows_of(ablation)
    assert (rows["c"].outcome, rows["c"].notes) == ("same weights", ("this setting changes nothing here",))
    assert ablation.tables[0].family == 2


def test_a_failed_point_is_a_row() -> None:
    failures = [CellFailure("a", 0, "t", "train a: RuntimeError: diverged")]
    rows = rows_of(concluded([graded()[0], *graded()[2:]], failures))
    assert (rows["a"].outcome, rows["a"].score) == ("failed", None)
    assert rows["a"].notes == ("seed 0 failed: train a: RuntimeError: diverged",)


def test_without_the_full_method_nothing_is_claimed() -> None:
    failures = [CellFailure("full", 0, "t", "diverged")]
    rows = rows_of(concluded(graded()[1:], failures))
    assert rows["full"].outcome == "failed"
    assert {row.difference for row in rows.values()} == {None}
    assert {rows[name].outcome for name in "abc"} == {"no control"}


def test_sensitivity_is_the_data_of_a_plot() -> None:
    found = concluded(graded()).sensitivity("scale")
    assert [(each["value"], each["method"], each["full"]) for each in found] == [
        (0.1, "a", False),
        (0.5, "b", False),
        (1.0, "full", True),
        (2.0, "c", False),
    ]
    assert found[0]["difference"] == pytest.approx(2.5)
    assert (found[2]["score"], found[2]["difference"]) == (pytest.approx(4.875), None)
    with pytest.raises(UserError, match="unknown axis 'scal': did you mean 'scale'"):
        concluded(graded()).sensitivity("scal")


def test_sensitivity_of_a_full_grid_holds_the_other_settings_at_the_methods_own() -> None:
    axes = [Axis("scale", (0.1, 1.0), 1.0), Axis("shift", (0.0, 2.0), 0.0)]
    members = [
        Point("a", {"scale": 0.1, "shift": 0.0}, {}, None),
        Point("b", {"scale": 0.1, "shift": 2.0}, {}, None),
        Point("c", {"scale": 1.0, "shift": 2.0}, {}, None),
    ]
    ablation = conclude("full", axes, members, graded(), [])
    assert [each["method"] for each in ablation.sensitivity("scale")] == ["a", "full"]
    assert [each["method"] for each in ablation.sensitivity("shift")] == ["full", "c"]


def test_each_round_is_paired_with_the_round_before() -> None:
    """Round 1 against the untrained model, round 2 against round 1, round 3 (the method's own row) against round 2."""
    gains = {
        "start": [0] * 8,
        "full--round-1": [2, 3, 2, 3, 2, 3, 2, 3],
        "full--round-2": [2, 3, 2, 3, 3, 2, 2, 3],
        "full": [1] * 8,
    }
    results = [cell(name, shifted(each)) for name, each in gains.items()]
    ablation = conclude("full", [], [], results, [])
    (table,) = ablation.rounds
    found = [(row.name, row.changes["round"], row.changes["against"], row.outcome) for row in table.rows]
    assert found == [
        ("full--round-1", 1, "start", "better"),
        ("full--round-2", 2, "full--round-1", "not resolved"),
        ("full", 3, "full--round-2", "worse"),
    ]
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(gains.values())]
    raw = [float(scipy.stats.ttest_1samp(step, 0).pvalue) for step in steps]
    assert [row.difference.p_value for row in table.rows if row.difference] == pytest.approx(raw)
    small, large = sorted((raw[0], raw[2]))
    assert raw[1] == 1.0
    assert table.rows[1].p_adjusted == 1.0
    assert sorted(row.p_adjusted for row in table.rows)[:2] == pytest.approx([min(small * 3, large * 3 / 2), large * 3 / 2])


def test_without_the_untrained_model_the_first_round_is_only_compared_with() -> None:
    results = [cell("full--round-1", FULL_SCORES), cell("full", shifted(GAINS["a"]))]
    (table,) = conclude("full", [], [], results, []).rounds
    assert [(row.name, row.changes) for row in table.rows] == [("full", {"round": 2, "against": "full--round-1"})]


def test_names_and_reasons_appear_as_text() -> None:
    hostile = "train a: ValueError: <b>|x|</b> \x1b[31m"
    failures = [CellFailure("a", 0, "t", hostile)]
    ablation = concluded([graded()[0], *graded()[2:]], failures)
    markdown = ablated.render_markdown(ablation)
    assert "&lt;b&gt;\\|x\\|&lt;/b&gt;" in markdown
    assert "\x1b" not in markdown + ablated.render_text(ablation) + ablated.render_csv(ablation)


# The command, on an untrained model.


@pytest.fixture
def command(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a small ablation."""

    def arguments(*more: str, method: str = "gsil-logistic") -> list[str]:
        words = ["--model", str(tiny_model), "--demonstrations", str(demonstrations_file), "--tasks", "support:TASK"]
        return ["ablate", method, *words, "--out", str(tmp_path / "out"), "--set", "gsil-logistic.max_new_tokens=8", *more]

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


def test_an_ablation_ends_in_its_tables_and_is_resumed(
    command: Callable[..., list[str]], tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("--grid", "scale=0.1", "--grid", "loss=gsil-brier", "--grid", "limit_demonstrations=20")
    assert call(words) == 0
    captured = capsys.readouterr()
    assert "gsil-logistic--loss-gsil-brier" in captured.out
    assert captured.err.count("estimate: about") == 2  # one comparison for each data size
    assert len(trained) == 4
    names = [tmp_path / "out" / f"ablation.{kind}" for kind in ("md", "csv", "json")]
    before = [path.read_bytes() for path in names]
    table = list(csv.DictReader(names[1].read_text().splitlines()))
    rows = {row["method"]: row for row in table if row["task"] == "letters"}
    assert next(iter(rows.values()))["verdict"] == "full"
    assert "trained on 18 demonstrations instead of 36" in rows["gsil-logistic--limit_demonstrations-20"]["notes"]
    held_out = [row for row in table if row["task"] == "held-out-nll" and "limit" in row["method"]]
    assert [row["verdict"] for row in held_out] == ["refused"]  # other demonstrations hold out other ones
    record = json.loads(names[2].read_text())
    assert [each["value"] for each in record["sensitivity"]["scale"] if each["task"] == "letters"] == [0.1, 1.0]
    trained.clear()
    assert call(words) == 0
    assert trained == []
    assert [path.read_bytes() for path in names] == before


def test_rounds_are_reported_without_a_grid(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert call(command("--every-round", "--set", "gsil-logistic.rounds=2")) == 0
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "did round k of gsil-logistic help?" in text
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert (tmp_path / "out" / "ablation" / "results").is_dir()
    assert not (tmp_path / "out" / "results").exists()  # a comparison in the same folder keeps its own
    assert not (tmp_path / "out" / "config.yaml").exists()
    rounds = [(row["method"], row["changed"]) for row in record["rows"] if row["kind"] == "round" and row["task"] == "letters"]
    assert rounds == [
        ("gsil-logistic--round-1", {"round": 1, "against": "start"}),
        ("gsil-logistic", {"round": 2, "against": "gsil-logistic--round-1"}),
    ]


def test_settings_of_points_reach_the_training(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    config = Config(
        model=str(tiny_model),
        demonstrations=str(demonstrations_file),
        methods=("gsil-logistic",),
        tasks=("support:TASK",),
        out=str(tmp_path),
    )
    grids = ["shift=2", "learning_rate=3e-4", "samples=2", "temperature=0", "limit_demonstrations=20", "mix_rounds=2"]
    _, members, plans = prepare(config, grids, False)
    trainings = {cell.method.name: cell.training[-1] for plan in plans for cell in plan.cells if cell.training}
    assert set(trainings) == {"gsil-logistic", *(point.name for point in members)}
    inputs = {name.removeprefix("gsil-logistic--"): stage.inputs for name, stage in trainings.items()}
    assert inputs["shift-2"]["method"]["settings"] == {"scale": 1.0, "shift": 2.0}
    assert inputs["learning_rate-0.0003"]["training"]["learning_rate"] == 3e-4
    assert inputs["samples-2"]["method"]["protocol"]["samples"] == 2
    sampling = {name: stage.needs["generations/000"].inputs["sampling"] for name, stage in trainings.items()}
    assert sampling["gsil-logistic--temperature-0"]["temperature"] == 0
    assert sampling["gsil-logistic"]["temperature"] == 1
    assert (inputs["limit_demonstrations-20"]["batch_size"], inputs["gsil-logistic"]["batch_size"]) == (18, 32)
    assert [len(plan.inputs.demonstrations.train) for plan in plans] == [18, 36]
    assert plans[-1].inputs.control == "gsil-logistic"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "say what to vary with --grid"),
        (["--every-round"], "say what to vary with --grid"),  # of one round there is nothing to see
        (["--grid", "scale=1,2", "--one-at-a-time", "--full-grid"], "choose one of them"),
        (["--grid", "scal=1"], "did you mean 'scale'"),
        (["--methods", "sft"], "No such option: --methods"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert call(command(*more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["ablate", "gsil-logistik", "--grid", "scale=1"]) == 2
    assert "did you mean 'gsil-logistic'" in capsys.readouterr().err
    assert call(["ablate", "sft,spin", "--grid", "epochs=1"]) == 2
    assert "name one method, not 2" in capsys.readouterr().err
    assert call(["ablate", "start", "--grid", "epochs=1"]) == 2
    assert "start does not train" in capsys.readouterr().err
