"""Plots: what is where, by the drawing's own coordinates; names as text; equal bytes; nothing drawn at import."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="plots need matplotlib")

from test_tables import result, table

from gsil_bench.reporting import plots
from gsil_bench.reporting.comparison import Comparison
from gsil_bench.reporting.plots import Line, Plot

ROOT = Path(__file__).parent.parent
NASTY = "$\\alpha$ & % _<b>x</b>"


def texts(plot: Plot) -> list[str]:
    root = ElementTree.fromstring(plot.svg())
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def a_comparison(name: str = "gsil") -> Comparison:
    """8 : 0 discordant of 100 is better (p = 0.0078); the refused method was asked under another protocol."""
    first, second = table(40, 8, 0, 52)
    other = result("spin", second, comparable={"protocol": "another"})
    return Comparison.of([result("sft", second), result(name, first), other], control="sft")


def a_forest(name: str = "gsil") -> Plot:
    comparison = a_comparison(name)
    return plots.forest(comparison.columns[0], comparison.control, "forest-quiz")


def test_the_forest_has_each_difference_in_points_and_the_margin() -> None:
    """48 % against 40 %: the marker lies at +8 points, the band from −2 to 2 (2 % of the scale)."""
    axes = a_forest().figure.axes[0]
    markers = [line for line in axes.lines if line.get_marker() == "^"]
    assert [list(line.get_xdata()) for line in markers] == [[pytest.approx(8.0)]]
    band = axes.patches[0].get_bbox()
    assert (band.x0, band.x1) == pytest.approx((-2.0, 2.0))
    shown = texts(a_forest())
    assert "▲ better" in " ".join(shown) and "✕ refused" in " ".join(shown) and "difference to sft in points (better →)" in shown


def test_an_interval_without_end_is_an_arrow() -> None:
    """Two items of a loss without an upper end and without spread: nothing bounds the difference."""
    losses = [result(name, [value, value], metric="nll", best=0.0, worst=None) for name, value in (("sft", 1.0), ("gsil", 2.0))]
    comparison = Comparison.of(losses)
    difference = next(cell for cell in comparison.columns[0].cells if cell.method == "gsil").against.difference
    assert difference is not None and math.isinf(difference.high)
    axes = plots.forest(comparison.columns[0], "sft", "forest").figure.axes[0]
    assert {"<", ">"} <= {line.get_marker() for line in axes.lines}


def test_names_are_text_in_every_plot() -> None:
    series = {NASTY: {"a<b": 3.0, "$c$": 4.0, "d_e": None}}
    lines = {NASTY: [Line(NASTY, (1, 2), (0.5, 0.25))]}
    for plot in (
        a_forest(NASTY),
        plots.curves(lines, [NASTY], NASTY, NASTY, "curve"),
        plots.costs({"seconds": {NASTY: 3.0}}, [NASTY]),
        plots.radar(series),
    ):
        assert NASTY in texts(plot), plot.name
        assert "<b>x" not in plot.svg(themed=True)


def test_names_that_begin_with_an_underscore_are_in_the_legend() -> None:
    plot = plots.curves({"loss": [Line("_mine", (1, 2), (1, 2))]}, ["_mine"], "loss", "", "curve")
    assert "_mine" in texts(plot)


def test_control_characters_leave_valid_xml() -> None:
    for name in ("a\x00b", "a\u202eb", "a\ud800b", "a\uffffb"):
        ElementTree.fromstring(plots.radar({name: {"x": 1.0, "y": 2.0, "z": 3.0}}).svg())


def test_long_runs_are_thinned_to_means_within_rounds() -> None:
    """400 steps in two rounds of 200, value = step: groups of ⌈400/150⌉ = 3, 67 points a round; the first is the mean of 1, 2, 3,
    the last of a round that of its remaining two, and no group crosses the border.
    """
    line = Line("sft", tuple(range(1, 401)), tuple(range(1, 401)), (200,))
    steps, values, starts = plots._thinned(line)
    assert len(steps) == 134 and starts == [67] and steps == values
    assert steps[0] == 2 and steps[66] == 199.5 and steps[67] == 202


def test_a_moving_average_stays_within_its_round() -> None:
    """A step from 0 to 1 at the start of the second round is not smeared over the border."""
    values = [0.0] * 20 + [1.0] * 20
    assert plots._smoothed(values, [20]) == values
    assert plots._smoothed([0.0, 3.0, 0.0], []) == [1.5, 1.0, 1.5]


def test_rounds_are_marked() -> None:
    plot = plots.curves({"loss": [Line("sft", (1, 2, 3, 4), (1, 1, 5, 5), (2,))]}, ["sft"], "loss", "", "curve")
    dots = [line for line in plot.figure.axes[0].lines if line.get_marker() == "o"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in dots] == [([3], [5])]


def radar_points(means: dict[str, Any]) -> Any:
    return plots.radar({"sft": means}).figure.axes[0].lines[0].get_ydata()


def test_the_radar_has_a_point_at_each_rating_and_a_gap_at_none() -> None:
    """Closed: the first rating comes again. Ratings off the scale stay on its edge."""
    found = radar_points({"writing": 1000.0, "math": None, "coding": -1.0, "stem": float("nan"), "extraction": 3.0})
    assert [None if math.isnan(value) else value for value in found] == [10.0, None, 0.0, None, 3.0, 10.0]


def test_a_radar_of_nothing_is_still_a_drawing() -> None:
    for series in ({}, {"sft": {}}):
        assert ElementTree.fromstring(plots.radar(series).svg()).tag.endswith("svg")


def test_the_same_inputs_give_the_same_bytes() -> None:
    one, other = a_forest(), a_forest()
    assert one.svg() == other.svg() and one.png() == other.png()
    assert one.png().startswith(b"\x89PNG") and not re.search(r"20\d\d-\d\d-\d\d", one.svg())


def test_drawings_refer_to_nothing_outside_and_hold_no_second_id() -> None:
    """Two plots on one page: no id twice, no rule for the whole page, only namespaces as addresses."""
    both = a_forest().svg(themed=True) + plots.radar({"sft": {"a": 1.0, "b": 2.0, "c": 3.0}}).svg(themed=True)
    ids = re.findall(r' id="([^"]+)"', both)
    assert len(ids) == len(set(ids)) > 0 and "<style" not in both
    assert set(re.findall(r"https?://[^\"' ]+", both)) == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}


def test_the_pages_drawings_take_its_colours() -> None:
    themed = a_forest().svg(themed=True)
    assert "var(--plot-ink)" in themed and "var(--plot-grid)" in themed and not re.search(r"#[0-9a-f]{6}[;\"]", themed)
    style = (ROOT / "gsil_bench/reporting/assets/page.css").read_text(encoding="utf-8")
    for name in plots.VARIABLES.values():
        assert style.count(f"--plot-{name}:") == 3, name  # light, dark by the system, dark by the switch


def test_importing_the_suite_does_not_import_matplotlib() -> None:
    code = "import gsil_bench.cli, gsil_bench.reporting.page, sys; print('matplotlib' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.strip() == "False"


def test_sensitivity_shows_each_value_with_its_interval() -> None:
    def record(value: object, score: float | None, verdict: str, full: bool = False) -> dict[str, object]:
        ends = {"low": None if score is None else score - 1, "high": None if score is None else score + 1}
        return {"axis": "scale", "value": value, "task": "quiz $x$", "metric": "accuracy", "full": full, "score": score, **ends,
                "verdict": verdict}  # fmt: skip

    records = [record(0.5, 40.0, "worse"), record(1.0, 50.0, "full", full=True), record(None, None, "failed")]
    plot = plots.sensitivity(records, "m: scale", "sensitivity-scale")
    svg = plot.svg()
    assert plot.text == "Scores with 95 % intervals. quiz $x$, scale 0.5: 40, worse; quiz $x$, scale 1: 50, full."
    assert all(f">{label}</text>" in svg for label in ("0.5", "1", "all", "quiz $x$ (accuracy)", "m: scale"))
    assert svg == plots.sensitivity(records, "m: scale", "sensitivity-scale").svg()
