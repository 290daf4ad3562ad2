"""Tables from hand-made results; every expected number is worked out in a docstring or is the count it says."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gsil_bench.compare import show_comparison
from gsil_bench.errors import UserError
from gsil_bench.records import CellFailure, CellResult, ItemScore, result_from_json
from gsil_bench.reporting.comparison import Cell, Comparison
from gsil_bench.reporting.tables import render_csv, render_json, render_latex, render_markdown
from gsil_bench.reporting.terminal import render_terminal
from gsil_bench.reporting.wording import footer, p_digits, render_summary

COMPARABLE = {"model": "tiny", "template": "t1", "budget": {"tokens": 1000, "epochs": 2}, "protocol": "greedy-v1"}


def result(method: str, scores: Sequence[float | None], task: str = "quiz", seed: int = 0, **changes: Any) -> CellResult:
    items = tuple(ItemScore(f"q{i}", score, "right" if score else "no number found") for i, score in enumerate(scores))
    values: dict[str, Any] = {
        "metric": "accuracy",
        "best": 1.0,
        "worst": 0.0,
        "comparable": COMPARABLE,
        "counts": {},
        "record": {"protocol": {"rounds": 1}},
        "cost": {"steps": 10, "tokens": 500, "seconds": 2.0},
        "provenance": {},
    }
    return CellResult(method, seed, task, items=items, **values | changes)


def table(both: int, first: int, second: int, neither: int) -> tuple[list[float], list[float]]:
    """0/1 scores of two methods from the four counts of their McNemar table."""
    return (
        [1.0] * (both + first) + [0.0] * (second + neither),
        [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither,
    )


def cell(comparison: Comparison, method: str, task: str = "quiz") -> Cell:
    return next(c for column in comparison.columns for c in column.cells if (c.method, c.task) == (method, task))


def notes(comparison: Comparison) -> Mapping[str, str]:
    return dict(footer(comparison))


GSIL, SFT = table(40, 8, 2, 50)
TWO = [result("sft", SFT), result("gsil", GSIL)]


def test_markdown_of_two_methods() -> None:
    """sft 42 of 100: Wilson [0.327985, 0.517935], halves 9.2 and 9.8; gsil 48: [0.384645, 0.576833], 9.5 and 9.7.

    Difference: exact p = 0.109375, [-0.006754, 0.124402], resolvable 0.093737 (all three in test_statistics.py), so
    gsil is the best and sft not significantly worse: both are marked. Margin: 2 % of the scale.
    """
    assert render_markdown(Comparison.of(TWO, notes=["a note"])).splitlines() == [
        "| method | quiz<br>accuracy in %, n = 100 |",
        "| :--- | --- |",
        "| sft | **42.0 ± 9.8** |",
        "| gsil | **48.0 ± 9.7** |",
        "",
        "| difference to sft | quiz |",
        "| :--- | --- |",
        "| sft | control |",
        "| gsil | +6.0 [-0.7, 12.4]<br>not resolved |",
        "",
        "- **Scores**: mean over items ± half its 95 % interval, or [low, high] (Wilson)",
        "- **Seeds**: training-seed variance was not measured (1 seed)",
        "- **Control**: sft; differences are method − control on the same items (exact McNemar, Bonett–Price interval)",
        "- **Verdicts**: better/worse: p &lt; 0.05 after Holm over the 1 method compared with the control on a task; "
        "equivalent: 90 % interval within the margin (±2.0 points)",
        "- **Resolvable**: smallest difference found with 80 % power at p &lt; 0.05, one comparison: quiz 9.4 points",
        "- **Marked \\***: not significantly worse than the best of its column (paired, Holm, 0.05)",
        "- **Note**: a note",
    ]


def test_terminal_of_two_methods() -> None:
    assert render_terminal(Comparison.of(TWO), 80).splitlines()[:5] == [
        "quiz  accuracy in %, n = 100",
        "method  score         vs sft             verdict",
        "─" * 53,
        "sft     42.0 ± 9.8 *                     control",
        "gsil    48.0 ± 9.7 *  +6.0 [-0.7, 12.4]  not resolved",
    ]


def test_sentences() -> None:
    assert render_summary(Comparison.of(TWO)) == [
        "sft scores 42.0 ± 9.8 % on quiz; it is the control.",
        "gsil is not resolved from sft on quiz: +6.0 points [-0.7, 12.4]; this design could have resolved 9.4.",
    ]


def test_lopsided_intervals_are_written_out() -> None:
    """0 of 10: [0, 0.277533]; 5 of 10: [0.236594, 0.763406], in brackets too so that the column reads alike."""
    markdown = render_markdown(Comparison.of([result("sft", [0.0] * 10), result("gsil", [1.0] * 5 + [0.0] * 5)]))
    assert "0.0 [0.0, 27.8]" in markdown
    assert "50.0 [23.7, 76.3]" in markdown


def test_significant_differences_and_marks() -> None:
    """8 : 0 has p = 2/2⁸ = 0.0078, still 0.0156 after Holm over two; the control is then worse than the best."""
    first, second = table(40, 8, 0, 52)
    comparison = Comparison.of([result("sft", second), result("gsil", first), result("spin", second)])
    assert cell(comparison, "gsil").against.outcome == "better"
    assert [c.among_best for c in comparison.columns[0].cells] == [False, True, False]
    worse = Comparison.of([result("gsil", first), result("sft", second)])
    assert cell(worse, "sft").against.outcome == "worse"
    assert render_summary(worse)[1].startswith("sft is worse than gsil on quiz: -8.0 points [")
    assert render_summary(worse)[1].endswith("; p = 0.0078, 100 items.")


def test_the_verdict_says_where_holm_made_it() -> None:
    """6 : 0 has p = 0.03125, twice that over two comparisons.

    Interval alone: 6/102 ± 1.959964 · √(8/102 − (6/102)²) / √102 = 0.058824 ± 0.053137.
    """
    first, second = table(40, 6, 0, 54)
    comparison = Comparison.of([result("sft", second), result("gsil", first), result("spin", second)])
    assert cell(comparison, "gsil").against.p_holm == pytest.approx(0.0625)
    assert cell(comparison, "gsil").against.after_holm
    assert "+6.0 [0.6, 11.2]<br>not resolved after Holm" in render_markdown(comparison)
    assert "p = 0.031 alone, p = 0.062 among 2 comparisons" in render_summary(comparison)[1]
    assert "not resolved from sft on quiz after Holm" in render_summary(comparison)[1]


def test_the_first_trained_method_is_the_control_unless_one_is_named() -> None:
    start = result("start", SFT, record={"trains": False}, comparable=COMPARABLE | {"budget": None})
    assert Comparison.of([start, *TWO]).control == "sft"
    assert Comparison.of([start, *TWO], control="gsil").control == "gsil"
    assert Comparison.of([start]).control == "start"
    with pytest.raises(UserError, match="spin"):
        Comparison.of(TWO, control="spin")


def test_the_starting_model_is_a_reference_row_without_a_budget() -> None:
    for record in ({"trains": False}, {"protocol": {"rounds": 0}}):
        start = result("start", SFT, record=record, comparable=COMPARABLE | {"budget": None})
        comparison = Comparison.of([start, *TWO])
        assert cell(comparison, "start").against.outcome != "refused"
        assert "| start (no training) |" in render_markdown(comparison)


def test_unlike_cells_are_refused_with_what_differs() -> None:
    longer = COMPARABLE | {"budget": {"tokens": 2000, "epochs": 2}, "protocol": "greedy-v2"}
    comparison = Comparison.of([*TWO, result("spin", GSIL, comparable=longer)])
    against = cell(comparison, "spin").against
    assert against.outcome == "refused"
    assert against.difference is None
    assert against.refused == ("budget.tokens 2000 against 1000", "protocol greedy-v2 against greedy-v1")
    assert comparison.columns[0].family == 1
    assert not cell(comparison, "spin").among_best
    assert notes(comparison)["Refused"] == (
        "spin and sft on quiz differ in budget.tokens 2000 against 1000, protocol greedy-v2 against greedy-v1"
    )
    assert "spin cannot be compared with sft on quiz: they differ in budget.tokens" in render_summary(comparison)[2]


def test_other_items_a_missing_key_and_another_metric_are_refused() -> None:
    fewer = result("spin", GSIL[:90])
    lacking = result("spin", GSIL, comparable={k: v for k, v in COMPARABLE.items() if k != "template"})
    assert cell(Comparison.of([*TWO, fewer]), "spin").against.refused == ("items 90 against 100, 90 shared, 0 repeated",)
    assert cell(Comparison.of([*TWO, fewer]), "spin").n_items == 90
    assert cell(Comparison.of([*TWO, lacking]), "spin").against.refused == ("template (absent) against t1",)
    rated = result("spin", GSIL, metric="rating", best=10.0)
    assert cell(Comparison.of([*TWO, rated]), "spin").against.refused == (
        "metric rating against accuracy",
        "best 10.0 against 1.0",
    )


def test_long_values_are_cut_but_never_look_equal() -> None:
    one, two = (COMPARABLE | {"model": "f" * 60 + end} for end in "ab")
    comparison = Comparison.of([result("sft", SFT, comparable=one), result("gsil", GSIL, comparable=two)])
    assert cell(comparison, "gsil").against.refused == ("model …ffffb against …ffffa",)


def test_seeds_that_differ_among_themselves_are_refused() -> None:
    other = result("gsil", GSIL, seed=1, comparable=COMPARABLE | {"template": "t2"})
    assert cell(Comparison.of([*TWO, other]), "gsil").against.refused == ("template t2 against t1",)


def test_failed_partly_failed_and_not_run_are_three_things() -> None:
    failures = [CellFailure("gsil", 1, "quiz", "out of memory"), CellFailure("spin", 0, "quiz", "no |end| token")]
    comparison = Comparison.of([*TWO, result("sft", SFT, seed=1)], failures, ["sft", "gsil", "spin", "afd"])
    assert [c.status for c in comparison.columns[0].cells] == ["scored", "partly failed", "failed", "not run"]
    markdown = render_markdown(comparison)
    assert "<br>seed 1 failed: out of memory |" in markdown
    assert "| spin | failed: no \\|end\\| token |" in markdown
    assert "| afd | not run |" in markdown
    assert render_summary(comparison)[2:] == [
        "spin failed on quiz: seed 0: no |end| token.",
        "afd was not run on quiz.",
    ]
    assert "(without seed 1, which failed)" in render_summary(comparison)[1]
    assert notes(comparison)["Failed"] == "gsil seed 1 on quiz: out of memory; spin seed 0 on quiz: no |end| token"
    terminal = render_terminal(comparison, 80)
    assert "failed: no |end|" in terminal
    assert "not run" in terminal


def test_a_result_outweighs_an_older_failure() -> None:
    comparison = Comparison.of(TWO, [CellFailure("gsil", 0, "quiz", "interrupted")])
    assert cell(comparison, "gsil").status == "scored"


def test_a_task_where_everything_or_the_control_failed() -> None:
    failures = [CellFailure("sft", 0, "exam", "boom"), CellFailure("gsil", 0, "exam", "boom")]
    nothing = Comparison.of(TWO, failures, tasks=["quiz", "exam"])
    assert "| quiz<br>accuracy in %, n = 100 | exam<br>no result |" in render_markdown(nothing)
    assert render_summary(nothing)[2] == "sft failed on exam: seed 0: boom."
    headless = Comparison.of([*TWO, result("gsil", GSIL, task="exam")], failures[:1])
    assert cell(headless, "gsil", "exam").against.outcome == "no control"
    assert render_summary(headless)[3].endswith("on exam; the control has no score there.")
    assert notes(headless)["Control"].endswith("no score, so no comparison, on exam")


def test_three_seeds() -> None:
    """Two methods, 3 seeds, 4 items; all seeds of a method agree, so only items scatter.

    gsil 1 1 1 0 and sft 1 0 0 0: differences 0 1 1 0, mean 0.5, s² = 1/3, SE = √(1/12) = 0.288675, t(3) = 3.182446,
    half 0.918693: [-0.418693, 1] cut at the scale. gsil: mean 0.75, s² = 1/4, SE 0.25, half 0.795612, so [0, 1].
    """
    results = [result(m, s, seed=k) for k in range(3) for m, s in (("sft", [1.0, 0, 0, 0]), ("gsil", [1.0, 1, 1, 0]))]
    comparison = Comparison.of(results)
    gsil = cell(comparison, "gsil")
    assert gsil.seeds == (0, 1, 2)
    assert gsil.against.difference is not None
    assert gsil.against.difference.low == pytest.approx(-0.418693, abs=1e-6)
    assert "75.0 [0.0, 100.0]" in render_markdown(comparison)
    assert "+50.0 [-41.9, 100.0]" in render_markdown(comparison)
    assert notes(comparison)["Seeds"] == "intervals cover items and training seeds (3 seeds: 0, 1, 2)"
    assert "80 % power (nearer 70 % with a few seeds" in notes(comparison)["Resolvable"]
    assert gsil.cost == {"seconds": 6.0, "steps": 30, "tokens": 1500}


def test_one_seed_beside_three_is_told() -> None:
    results = [result("sft", SFT, seed=k) for k in range(3)] + [result("gsil", GSIL)]
    assert "for gsil training-seed variance was not measured (1 seed)" in notes(Comparison.of(results))["Seeds"]


def losses(method: str, values: Sequence[float]) -> CellResult:
    return result(method, values, task="loss", metric="nll", best=0.0, worst=None)


def test_lower_is_better_and_has_no_margin() -> None:
    """Differences −0.1, −0.2, −0.3: mean −0.2, SE = 0.1/√3 = 0.057735, t(2) = 4.302653, half 0.248413; t = 3.4641.

    With 2 degrees of freedom p = 1 − t/√(2 + t²) = 1 − 3.464102/3.741657 = 0.074180. Resolvable: (4.302653 + 1.060660)
    SE = 0.309651. A loss has no worst score, hence no scale to take 2 % of.
    """
    comparison = Comparison.of([losses("sft", [1.0, 2.0, 3.0]), losses("gsil", [0.9, 1.8, 2.7])])
    gsil = cell(comparison, "gsil", "loss")
    assert gsil.against.difference is not None
    assert gsil.against.difference.p_value == pytest.approx(0.074180, abs=1e-6)
    assert gsil.against.difference.a_better == 3
    assert render_summary(comparison)[1] == (
        "gsil is not resolved from sft on loss: -0.2000 nats/token [-0.4484, 0.0484] (lower is better); "
        "this design could have resolved 0.3097."
    )
    assert "nll in nats/token, n = 3, lower is better" in render_markdown(comparison)
    assert "within the margin (none)" in notes(comparison)["Verdicts"]
    wide = Comparison.of([losses("sft", [1.0, 2.0, 3.0]), losses("gsil", [0.9, 1.8, 2.7])], margins={"loss": 0.5})
    assert cell(wide, "gsil", "loss").against.outcome == "equivalent"


def test_a_significantly_lower_loss_is_better() -> None:
    first = [1.0 + 0.1 * (i % 3) for i in range(30)]
    comparison = Comparison.of([losses("sft", [x + 0.2 + 0.01 * (i % 2) for i, x in enumerate(first)]), losses("gsil", first)])
    assert cell(comparison, "gsil", "loss").against.outcome == "better"
    assert [c.among_best for c in comparison.columns[0].cells] == [False, True]


def test_unscored_truncated_and_errors_are_counted() -> None:
    unscored = result("gsil", [None, None, *GSIL[2:]], counts={"truncated": 3, "errors": 1, "format_ok": 90})
    comparison = Comparison.of([TWO[0], unscored])
    gsil = cell(comparison, "gsil")
    assert (gsil.n_items, gsil.n_unscored) == (98, 2)
    assert gsil.against.difference is not None
    assert (gsil.against.difference.n_items, gsil.against.difference.n_dropped) == (98, 2)
    assert "<br>n = 98, 2 unscored |" in render_markdown(comparison)
    assert notes(comparison)["Answers"] == "quiz: gsil 2 unscored + 3 truncated + 1 with errors"


def test_nothing_scored_is_not_zero() -> None:
    comparison = Comparison.of([TWO[0], result("gsil", [None] * 100)])
    assert "| gsil | no scored items<br>n = 0, 100 unscored |" in render_markdown(comparison)
    assert "| gsil | not resolved |" in render_markdown(comparison)
    assert not cell(comparison, "gsil").among_best
    assert json.dumps(render_json(comparison), allow_nan=False)
    assert "no item was scored by both" in render_summary(comparison)[1]
    assert render_terminal(comparison, 80)


def test_a_single_item() -> None:
    """1 of 1: Wilson [1 / (1 + 3.841459), 1] = [0.206549, 1]. One pair cannot be significant: nothing is resolvable."""
    comparison = Comparison.of([result("sft", [0.0]), result("gsil", [1.0])])
    assert "100.0 [20.7, 100.0]" in render_markdown(comparison)
    assert render_summary(comparison)[1].endswith("this design could have resolved nothing.")
    assert notes(comparison)["Resolvable"].endswith("quiz nothing")


def test_ratings_have_two_decimals() -> None:
    """4 5 6 7: mean 5.5, s² = 5/3, SE = 0.645497, t(3) = 3.182446, half 2.054260."""
    results = [result(m, [4.0, 5.0, 6.0, 7.0], metric="rating", best=10.0, worst=1.0) for m in ("sft", "gsil")]
    assert "5.50 ± 2.05" in render_markdown(Comparison.of(results))
    assert "unknown (no spread)" in notes(Comparison.of(results))["Resolvable"]


def test_columns_that_ask_the_same_items_are_named() -> None:
    more = [result(m, s, task="quiz-sampled") for m, s in (("sft", SFT), ("gsil", GSIL))]
    assert notes(Comparison.of([*TWO, *more]))["Same items"] == (
        "quiz and quiz-sampled ask the same items: not independent evidence"
    )


def test_two_results_for_one_cell_are_an_error() -> None:
    with pytest.raises(UserError, match="two results for sft, seed 0, on quiz"):
        Comparison.of([TWO[0], TWO[0]])


HOSTILE = "=1+1|<b>x</b>[bold]\x1b[31m`_y_`\nz\u202e"


def hostile() -> Comparison:
    failures = [CellFailure("spin", 0, "quiz", "@cmd|<script>\x1b]0;title\x07[red]\r\n")]
    return Comparison.of([TWO[0], result(HOSTILE, GSIL)], failures)


def test_markdown_shows_hostile_names_as_they_are() -> None:
    markdown = render_markdown(hostile())
    assert "=1+1\\|&lt;b&gt;x&lt;/b&gt;[bold]\\`\\_y\\_\\` z" in markdown
    assert "failed: @cmd\\|&lt;script&gt;[red]" in markdown
    assert "<script>" not in markdown
    assert all(line.replace("\\|", "").count("|") in (0, 3) for line in markdown.splitlines())
    linked = render_markdown(Comparison.of([TWO[0], result("[a](http://b) *c*", GSIL)]))
    assert "[a\\](http://b) \\*c\\*" in linked


@pytest.mark.parametrize("colour", [False, True])
def test_the_terminal_interprets_nothing(colour: bool) -> None:
    text = render_terminal(hostile(), 120, colour)
    assert "=1+1|<b>x</b>[bold]" in text
    assert "[31m`" not in text
    assert "title" not in text
    assert "\u202e" not in text
    assert ("\x1b" in text) == colour


def test_csv_is_tidy_and_starts_no_formula() -> None:
    lines = list(csv.DictReader(io.StringIO(render_csv(hostile()))))
    assert [line["method"] for line in lines] == ["sft", "'=1+1|<b>x</b>[bold]`_y_` z", "spin"]
    assert lines[2]["reason"] == "'@cmd|<script>[red]"
    assert (lines[2]["status"], lines[2]["score"]) == ("failed", "")
    assert (lines[1]["score"], lines[1]["verdict"], lines[1]["items_better"]) == ("0.48", "not resolved", "8")
    assert float(lines[1]["p"]) == pytest.approx(0.109375)
    assert (lines[0]["verdict"], lines[0]["after_holm"], lines[0]["trained"]) == ("control", "false", "true")


def test_json_has_all_numbers_and_no_nan() -> None:
    failures = [CellFailure("spin", 0, "quiz", "boom")]
    data = json.loads(json.dumps(render_json(Comparison.of(TWO, failures)), allow_nan=False))
    assert data["control"] == "sft"
    assert data["cells"][1]["difference"] == pytest.approx(0.06)
    assert data["cells"][2]["score"] is None
    assert data["summary"][2] == "spin failed on quiz: seed 0: boom."


def test_equal_input_in_any_order_gives_equal_bytes() -> None:
    results = [result(m, s, t, k) for m, s in (("sft", SFT), ("gsil", GSIL)) for t in ("quiz", "exam") for k in (0, 1)]
    shuffled = random.Random(0).sample(results, len(results))
    one, two = (Comparison.of(group, (), ["sft", "gsil"], ["quiz", "exam"], "sft") for group in (results, shuffled))
    for render in (render_markdown, render_csv, render_terminal):
        assert render(one) == render(two)
    assert render_json(one) == render_json(two)


def many() -> Comparison:
    """Six methods on four tasks, with every kind of cell."""
    draw = random.Random(1)
    methods = ("start", "sft", "sft-continued", "spin", "gsil-logistic", "my_lab.module:METHOD")
    accuracies = [
        result(m, [float(draw.random() < 0.5) for _ in range(100)], t) for t in ("mini-gsm8k", "mini-humaneval") for m in methods
    ]
    ratings = [
        result(m, [draw.uniform(1, 10) for _ in range(40)], "mini-mt-bench", metric="rating", best=10.0, worst=1.0)
        for m in methods[1:]
    ]
    nlls = [losses(m, [draw.uniform(1, 2) for _ in range(40)]) for m in methods]
    failures = [CellFailure("start", 0, "mini-mt-bench", "CUDA out of memory: tried to allocate 2.00 GiB of 80 GiB")]
    return Comparison.of([*accuracies, *ratings, *nlls], failures, methods, control="sft-continued")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_no_line_is_longer_than_the_terminal_and_nothing_is_cut(width: int) -> None:
    text = render_terminal(many(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert text.count("not resolved") >= render_markdown(many()).count("not resolved")
    for name in ("mini-gsm8k", "mini-humaneval", "mini-mt-bench", "loss"):
        assert name in text
    assert "of 80 GiB" in " ".join(text.split())


def test_the_grid_needs_room() -> None:
    """All tasks side by side where they fit, else a block per task."""
    narrow, wide = (render_terminal(many(), width).splitlines() for width in (80, 120))
    assert sum(line.startswith("method ") for line in narrow) == 4
    assert not any(line.startswith("method ") for line in wide)
    assert any(all(task in line for task in ("mini-gsm8k", "mini-humaneval", "mini-mt-bench")) for line in wide)


# ---- what a task's scores are ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "interval", "test"),
    [
        ({}, "Wilson", "exact McNemar, Bonett–Price interval"),
        ({"counts": {"answers": 100}}, "Wilson", "exact McNemar, Bonett–Price interval"),
        ({"metric": "exact_match,strict-match"}, "Wilson", "exact McNemar, Bonett–Price interval"),
        ({"counts": {"answers": 400}}, "t over items", "paired t"),  # means of four answers that happened to agree
        ({"metric": "rouge-l"}, "t over items", "paired t"),
        ({"metric": "mc2"}, "t over items", "paired t"),
    ],
)
def test_the_task_and_not_the_data_says_that_scores_are_zero_or_one(changes: dict[str, Any], interval: str, test: str) -> None:
    comparison = Comparison.of([result("sft", SFT, **changes), result("gsil", GSIL, **changes)])
    gsil = cell(comparison, "gsil")
    assert gsil.score is not None
    assert gsil.against.difference is not None
    assert (gsil.score.method, gsil.against.difference.method) == (interval, test)


def test_an_accuracy_that_is_no_zero_or_one_is_graded() -> None:
    comparison = Comparison.of([result("sft", [0.5, *SFT[1:]]), result("gsil", GSIL)])
    assert [c.score and c.score.method for c in comparison.columns[0].cells] == ["t over items", "Wilson"]
    difference = cell(comparison, "gsil").against.difference
    assert difference is not None
    assert difference.method == "paired t"


# ---- letters, equivalence, the summary over tasks ----------------------------------------------------------


def four() -> Comparison:
    """sft and start solve 40 of 100, spin these and 6 more, gsil these and 14 more: p = 1, 2/2⁶ = 0.031, 2/2¹⁴ and less, each
    times what is left of six pairs.
    """
    solved = {"sft": 40, "start": 40, "spin": 46, "gsil": 60}
    return Comparison.of([result(method, [1.0] * count + [0.0] * (100 - count)) for method, count in solved.items()])


def test_letters_are_of_all_pairs() -> None:
    """After Holm over six, gsil differs from all (p ≤ 4 · 2/2¹⁴), the others from nobody (3 · 0.031)."""
    assert [c.letters for c in four().columns[0].cells] == ["b", "b", "b", "a"]
    assert "**60.0 ± 9.8** a" in render_markdown(four())
    assert "46.0 ± 9.7   b" in render_terminal(four(), 100)
    assert "60.0 ± 9.8 * a" in render_terminal(four(), 100)
    assert "methods that share a letter" in notes(four())["Letters"]


def test_letters_of_two_methods_are_in_the_files_only() -> None:
    comparison = Comparison.of(TWO)
    assert [c.letters for c in comparison.columns[0].cells] == ["a", "a"]
    assert "Letters" not in notes(comparison)
    assert "**42.0 ± 9.8** |" in render_markdown(comparison)
    assert [row["letters"] for row in render_json(comparison)["cells"]] == ["a", "a"]
    refused = Comparison.of([*TWO, result("spin", GSIL[:90])])
    assert cell(refused, "spin").letters == ""


def test_the_test_of_equivalence_is_in_the_files() -> None:
    """Bonett and Price's centre 0.058824, SE 0.033459 (test_statistics.py), margin 0.02: z = (0.02 − 0.058824)/0.033459
    = −1.160338, whose upper tail is 0.877046. 90 % interval: 0.058824 ± 1.644854 SE = [0.003789, 0.113859].
    """
    row = render_json(Comparison.of(TWO))["cells"][1]
    assert row["p_equivalence"] == pytest.approx(0.877046, abs=1e-5)
    assert (row["equivalence_low"], row["equivalence_high"]) == pytest.approx((0.003789, 0.113859), abs=1e-5)


def over(tasks: Sequence[str], methods: Sequence[str] = ("sft", "spin", "gsil")) -> list[CellResult]:
    """On each task its own ten items, of which sft solves two, spin four and gsil six."""
    return [
        dataclasses.replace(found, items=tuple(dataclasses.replace(item, id=f"{task}-{item.id}") for item in found.items))
        for task in tasks
        for count, method in ((2, "sft"), (4, "spin"), (6, "gsil"), (1, "start"))
        if method in methods
        for found in [result(method, [1.0] * count + [0.0] * (10 - count), task, record={"trains": method != "start"})]
    ]


def test_three_tasks_and_three_trained_methods_are_summarised() -> None:
    """IQM of 0.2, 0.2, 0.2 and so on; ranks 3, 2, 1 on each task; gsil is above sft on each: P = 1."""
    comparison = Comparison.of(over(["x", "y", "z"], ("start", "sft", "spin", "gsil")), control="sft")
    across = comparison.across
    assert across is not None
    estimates = {row.method: (row.iqm.estimate, row.mean_rank.estimate) for row in across.rows}
    assert estimates == {"sft": (0.2, 3), "spin": (0.4, 2), "gsil": (0.6, 1), "start": (0.1, 4)}
    markdown = render_markdown(comparison)
    assert "| over 3 tasks | IQM of normalised scores | mean rank | P(better than sft) |" in markdown
    assert "| start (no training) | 0.10 [" in markdown
    assert markdown.index("difference to sft") < markdown.index("over 3 tasks")
    for width in (60, 100):
        text = render_terminal(comparison, width)
        assert "IQM of" in text
        assert max(len(line) for line in text.splitlines()) <= width
    assert render_latex(comparison).count(r"\end{tabular}") == 2
    row = render_json(comparison)["across_tasks"]["rows"][2]
    assert (row["method"], row["improvement"], row["improvement_high"]) == ("gsil", 1, 1)


def test_a_summary_counts_no_task_twice_and_no_loss() -> None:
    twice = [dataclasses.replace(found, task="x-sampled") for found in over(["x"])]
    nlls = [losses(method, [1.0, 2.0]) for method in ("sft", "spin", "gsil")]
    comparison = Comparison.of([*over(["x", "y", "z"]), *twice, *nlls], control="sft")
    assert comparison.across is not None
    assert comparison.across.tasks == ("x", "y", "z")
    assert comparison.across.left_out == ("x-sampled (the items of x again)", "loss (no scale)")
    assert "without x-sampled (the items of x again); loss (no scale)" in notes(comparison)["Across tasks"]


def test_a_method_that_failed_somewhere_is_no_row_of_the_summary() -> None:
    results = [found for found in over(["x", "y", "z"]) if (found.method, found.task) != ("spin", "y")]
    comparison = Comparison.of(results, [CellFailure("spin", 0, "y", "boom")], control="sft")
    assert comparison.across is not None
    assert [row.method for row in comparison.across.rows] == ["sft", "gsil"]
    assert comparison.across.left_out == ("spin (no comparable score on y)",)
    assert "over 3 tasks" not in render_markdown(comparison)
    assert render_json(comparison)["across_tasks"]["shown"] is False


def test_without_a_control_there_is_no_summary() -> None:
    comparison = Comparison.of([losses("sft", [1.0, 2.0]), losses("gsil", [1.0, 2.0])])
    assert comparison.across is None
    assert render_json(comparison)["across_tasks"] is None


# ---- LaTeX ---------------------------------------------------------------------------------------------------


def test_latex_of_two_methods() -> None:
    """The figures of `test_markdown_of_two_methods`."""
    lines = [line for line in render_latex(Comparison.of(TWO)).splitlines() if not line.startswith("%")]
    assert lines == [
        r"\begin{tabular}{lllll}",
        r"\toprule",
        r"method & score & difference to sft & $p$ & verdict \\",
        r"\midrule",
        r"\multicolumn{5}{l}{\emph{quiz (accuracy in \%, n = 100)}} \\",
        r"sft & \textbf{42.0 $\pm$ 9.8} &  &  & control \\",
        r"gsil & \textbf{48.0 $\pm$ 9.7} & +6.0 [$-$0.7, 12.4] & 0.11 & not resolved \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


TEX = r"[a]*b\input{/etc/passwd} $x^2$ ~50 % #1 & {c} _d_ --e 漢é'q' `r` <|>" + '"'


def nasty() -> Comparison:
    failures = [CellFailure("*spin", 0, "quiz", r"\end{tabular} % & # é – … ± 🙂")]
    return Comparison.of([result("sft", SFT), result(TEX, GSIL), *over(["x", "y", "z"])], failures)


def test_latex_shows_hostile_names_as_they_are() -> None:
    latex = render_latex(nasty())
    table = "\n".join(line for line in latex.splitlines() if not line.startswith("%"))
    for part in (
        r"{}[a]*b\textbackslash{}input\{/etc/passwd\} \$x\textasciicircum{}2\$",
        r"\textasciitilde{}50 \% \#1 \& \{c\} \_d\_ -{}-e",
    ):
        assert part in table
    assert "[U+6F22]é" in table
    assert "{}*spin & failed: \\textbackslash{}end\\{tabular\\}" in table
    assert table.count(r"\end{tabular}") == 1
    rows = [line for line in table.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(line.replace(r"\&", "").split(" & ")) for line in rows} == {5}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(tmp_path: Path) -> None:
    pages = [
        render_latex(each)
        for each in (Comparison.of(TWO), many(), hostile(), nasty(), four(), Comparison.of(over(["x", "y", "z"])))
    ]
    body = "\n\\clearpage\n".join(pages)
    (tmp_path / "t.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + body + "\\end{document}\n", encoding="utf-8"
    )
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "t.log").read_text(errors="replace")


# ---- from the files of a run to its tables -------------------------------------------------------------------


def stored() -> list[CellResult]:
    """Five methods on five tasks, three seeds, unscored items, another protocol."""
    draw = random.Random(2)
    found = []
    for task, metric, best, worst in (("x", "accuracy", 1.0, 0.0), ("y", "rating", 10.0, 1.0), ("z", "pass@1", 1.0, 0.0)):
        for method in ("start", "sft", "spin", "gsil", "kliep"):
            for seed in range(1 if method == "start" else 3):
                high = 0.4 + 0.1 * len(method) / 5
                scores = [
                    None if draw.random() < 0.02 else (float(draw.random() < high) if best == 1 else float(draw.randint(1, 10)))
                    for _ in range(60)
                ]
                scale = {"metric": metric, "best": best, "worst": worst}
                one = result(method, scores, task, seed, record={"trains": method != "start"}, **scale)
                items = tuple(dataclasses.replace(item, id=f"{task}{item.id}") for item in one.items)
                protocol = "greedy-v2" if (method, task) == ("kliep", "z") else "greedy-v1"
                found.append(dataclasses.replace(one, items=items, comparable={**COMPARABLE, "protocol": protocol}))
    return found


FILES = ("table.md", "table.csv", "table.tex", "table.txt", "table.json")


def test_tables_are_rebuilt_from_the_result_files_byte_for_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = stored()
    rows, tasks = ["start", "sft", "spin", "gsil", "kliep"], ["x", "y", "z"]
    for number, each in enumerate(results):
        path = tmp_path / "results" / f"{number:02}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(each), sort_keys=True), encoding="utf-8")
    files = sorted((tmp_path / "results").glob("*.json"), reverse=True)
    again = [result_from_json(json.loads(path.read_text(encoding="utf-8"))) for path in files]
    for folder, group in (("first", results), ("again", again)):
        show_comparison(Comparison.of(group, (), rows, tasks, "sft"), tmp_path / folder, as_json=True)
    assert capsys.readouterr().out
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_every_score_is_the_mean_of_its_items() -> None:
    """Computed here from the items alone: those that all seeds scored, then those that both methods' seeds did."""
    results = stored()
    comparison = Comparison.of(results, control="sft")
    tables = {(each.method, each.task, each.seed): {item.id: item.score for item in each.items} for each in results}
    seen = 0
    for column in comparison.columns:
        for one in column.cells:
            own = [tables[one.method, column.task, seed] for seed in one.seeds]
            control = [tables["sft", column.task, seed] for seed in range(3)]
            complete = [key for key in own[0] if all(table[key] is not None for table in own)]
            assert one.score is not None
            assert one.score.estimate == pytest.approx(mean(own, complete), rel=1e-12)
            if (found := one.against.difference) is not None:
                both = [key for key in complete if all(table[key] is not None for table in control)]
                assert found.estimate == pytest.approx(mean(own, both) - mean(control, both), abs=1e-12)
                assert (found.n_items, found.n_dropped) == (len(both), 60 - len(both))
                seen += 1
    assert seen == 11  # of five methods on three tasks: not the control, not the refused one


def mean(tables: Sequence[Mapping[str, float | None]], keys: Sequence[str]) -> float:
    values = [score for table in tables for key in keys if (score := table[key]) is not None]
    return sum(values) / len(values)


def test_a_p_value_shows_on_which_side_of_the_level_it_lies() -> None:
    assert [p_digits(value) for value in (0.0498, 0.0502, 0.044, 0.0012)] == ["0.0498", "0.0502", "0.044", "0.0012"]
