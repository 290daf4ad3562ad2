"""Tables from hand-made results; every expected number is worked out in a docstring or is the count it says."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from gsil_bench.errors import UserError
from gsil_bench.records import CellFailure, CellResult, ItemScore
from gsil_bench.reporting.comparison import Cell, Comparison
from gsil_bench.reporting.tables import render_csv, render_json, render_markdown
from gsil_bench.reporting.terminal import render_terminal
from gsil_bench.reporting.wording import footer, render_summary

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
