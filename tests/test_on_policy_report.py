"""Rewards beside scores: which row is a point of which run, what is said, where it is drawn; AUCs by class; then a real run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_page import ATTACK, Reader
from test_tables import result

from gsil_bench import cli, compare
from gsil_bench.records import CellResult
from gsil_bench.reporting import on_policy, page, run_data
from gsil_bench.reporting.comparison import Column, Comparison
from gsil_bench.reporting.on_policy import Scored, Told, Trace, hint, sentence, told_apart, traces
from gsil_bench.reporting.run_data import Curve, RunData, collect

DISCRIMINATOR: Mapping[str, Any] = {"alongside": True}
REWARD_MODEL: Mapping[str, Any] = {"alongside": False}


def row(
    method: str,
    weights: Sequence[str],
    right: Sequence[float],
    *,
    seed: int = 0,
    rounds: int = 2,
    after: int = 0,
    critic: Mapping[str, Any] | None = DISCRIMINATOR,
    starts_from: str = "sft",
    told: Mapping[str, Any] | None = None,
) -> CellResult:
    """A row of a method that samples; `weights` name the policy after each round, the starting method's first."""
    record: dict[str, Any] = {"protocol": {"rounds": rounds}, "rollouts": {"critic": critic}, "starts_from": starts_from}
    record |= {"after_round": after} if after else {}
    made = [{"weights_sha256": name, **({"reward_model": told} if told else {})} for name in weights]
    return result(method, right, seed=seed, record=record, provenance={"rounds": made})


def plain(method: str, weights: Sequence[str], right: Sequence[float], seed: int = 0) -> CellResult:
    return result(method, right, seed=seed, provenance={"rounds": [{"weights_sha256": name} for name in weights]})


def curve(method: str, rewards: Sequence[float], seed: int = 0, start: int = 2, rounds: int = 2) -> Curve:
    """`start` steps of the starting method, then one for each reward, in rounds of equal length; KL is a tenth of the reward."""
    before = [{"step": float(at + 1), "loss": 1.0} for at in range(start)]
    own = [
        {"step": float(start + at + 1), "reward": value, "kl": value / 10, "discriminator_auc": 0.5 + value / 100}
        for at, value in enumerate(rewards)
    ]
    size = len(rewards) // rounds
    ends = tuple(float(start + size * (at + 1)) for at in range(rounds))
    return Curve(method, seed, (*before, *own), (), (float(start), *ends) if start else ends)


RIGHT = {0: [0.0, 0.0, 0.0, 0.0], 1: [1.0, 0.0, 0.0, 0.0], 2: [1.0, 1.0, 0.0, 0.0], 3: [1.0, 1.0, 1.0, 0.0]}


def hacked(seed: int = 0) -> list[CellResult]:
    """Three of four right where the method's samples start, two after its first round, one at the end."""
    a, b, c = f"a{seed}", f"b{seed}", f"c{seed}"
    return [
        plain("sft", [f"other{seed}"], RIGHT[3], seed),
        plain("half", [a], RIGHT[3], seed),
        row("airl--round-1", [a, b], RIGHT[2], seed=seed, after=1),
        row("airl", [a, b, c], RIGHT[1], seed=seed),
    ]


def column(results: Sequence[CellResult]) -> Column:
    return Comparison.of(results, control="sft").columns[0]


def only(results: Sequence[CellResult], curves: Sequence[Curve]) -> Trace:
    (found,) = traces(results, curves)
    return found


def test_points_are_found_by_their_weights() -> None:
    """`half` has the very policy that the samples start from, after 2 steps; `sft` has another one and is no point; the row after
    a round is one at the end of the first of two rounds of 2 steps.
    """
    found = only(hacked(), [curve("airl", [1, 2, 3, 4])])
    assert (found.method, found.start, found.before, found.starts_from) == ("airl", 2.0, 1, "sft")
    assert found.scores["quiz"] == (Scored(0, 2.0, 0, 0.75), Scored(1, 4.0, 0, 0.5), Scored(2, 6.0, 0, 0.25))


def test_a_method_that_does_not_sample_has_no_trace() -> None:
    assert traces([plain("sft", ["a"], RIGHT[1])], [curve("sft", [])]) == []


def test_the_untrained_model_is_a_point_only_where_the_samples_start_from_it() -> None:
    start = plain("start", [], RIGHT[2])
    direct = row("airl", ["b"], RIGHT[1], rounds=1, starts_from="")
    found = only([start, direct], [curve("airl", [1, 2], start=0, rounds=1)])
    assert found.scores["quiz"] == (Scored(0, 0.0, 0, 0.5), Scored(1, 2.0, 0, 0.25))
    later = row("airl", ["a", "b"], RIGHT[1], rounds=1)
    assert only([start, later], [curve("airl", [1, 2], rounds=1)]).scores["quiz"] == (Scored(1, 4.0, 0, 0.25),)


def test_unscored_items_are_no_zeros() -> None:
    own = row("airl", ["a", "b", "c"], [1.0, None, None, 0.0])  # type: ignore[list-item]
    assert only([own], [curve("airl", [1, 2])]).scores["quiz"][0].score == 0.5


def test_the_sentence_by_hand() -> None:
    """20 steps: a tenth are 2. First (1 + 2) / 2 = 1.5, last (19 + 20) / 2 = 19.5, so +18; KL 1.95. 75 % to 25 %: −50 points."""
    results = hacked()
    found = only(results, [curve("airl", list(range(1, 21)))])
    assert sentence(found, column(results)) == (
        "airl on quiz: reward 1.5 → 19.5 (+18; first and last tenth of 20 steps); "
        "accuracy 75.0 % → 25.0 % (-50.0 points; after 2 and after 22 steps); "
        "KL from the reference 1.95 nats per answer at the end; seed 0."
    )


def test_seeds_are_averaged_and_one_that_failed_is_left_out_of_what_is_said() -> None:
    """Seed 2 did its first round only: its row is that after the round. Of seeds 0 and 1 the last rewards are 4 and 8."""
    failed = row("airl--round-1", ["a2", "b2"], RIGHT[0], seed=2, after=1)
    results = [*hacked(0), *hacked(1), failed]
    shortened = dataclasses.replace(curve("airl--round-1", [100], 2, rounds=1), ends=(2.0, 3.0))
    found = only(results, [curve("airl", [1, 2, 3, 4], 0), curve("airl", [3, 4, 7, 8], 1), shortened])
    assert sorted(found.curves) == [0, 1, 2] and found.seeds("quiz") == [0, 1]
    assert found.change("quiz") == [(2.0, 0.75), (6.0, 0.25)]
    said = sentence(found, column(results))
    assert "reward 2 → 6 (+4; first and last tenth of 4 steps)" in said and said.endswith("means over seeds 0, 1.")
    assert found.mean("reward").values == (pytest.approx((1 + 3 + 100) / 3), 3.0, 5.0, 6.0)
    assert found.mean("reward", [0, 1]).values == (2.0, 3.0, 5.0, 6.0)


def test_a_point_that_only_some_seeds_have_is_no_first_point() -> None:
    """Seed 1 has no row at the start of the sampling: the change is said from the first round on, for both."""
    results = [*hacked(0), *[each for each in hacked(1) if each.method != "half"]]
    found = only(results, [curve("airl", [1, 2], 0), curve("airl", [1, 2], 1)])
    assert found.change("quiz") == [(3.0, 0.5), (4.0, 0.25)]


@pytest.mark.parametrize(
    ("kept", "rounds", "said"),
    [
        (["airl"], 1, " Only its end is scored; --set airl.rounds=4 --every-round scores it on the way."),
        (["half", "airl"], 1, " Only its ends are scored; --set airl.rounds=4 --every-round scores it on the way."),
        (["half", "airl"], 2, " Only its ends are scored; --every-round scores it on the way."),
        (["airl--round-1", "airl"], 2, ""),
    ],
)
def test_what_would_show_more(kept: Sequence[str], rounds: int, said: str) -> None:
    weights = ["a", "b", "c"][: 1 + rounds]
    rows = {
        "half": plain("half", ["a"], RIGHT[3]),
        "airl--round-1": row("airl--round-1", ["a", "b"], RIGHT[2], after=1),
        "airl": row("airl", weights, RIGHT[1], rounds=rounds),
    }
    assert hint(only([rows[name] for name in kept], [curve("airl", [1, 2], rounds=rounds)]), "quiz") == said


def test_one_point_has_no_change() -> None:
    results = [plain("sft", ["x"], RIGHT[3]), row("airl", ["a", "b", "c"], RIGHT[1])]
    said = sentence(only(results, [curve("airl", [1, 2])]), column(results))
    assert "; accuracy 25.0 % after 4 steps; " in said


def test_a_task_without_a_score_says_so() -> None:
    results = [plain("sft", ["x"], RIGHT[3]), row("airl", ["a", "b", "c"], RIGHT[1])]
    other = dataclasses.replace(column(results), task="other")
    assert "; no accuracy; " in sentence(only(results, [curve("airl", [1, 2])]), other)


def test_rewards_that_are_not_on_one_scale_say_so() -> None:
    """A discriminator learns on; a reward model is trained anew for each round; other rewards stay what they are."""
    found = {
        name: only([row("airl", ["a", "b"], RIGHT[1], rounds=rounds, critic=critic)], [curve("airl", [1, 2])]).caveat
        for name, critic, rounds in (("d", DISCRIMINATOR, 1), ("r1", REWARD_MODEL, 1), ("r2", REWARD_MODEL, 2), ("none", None, 2))
    }
    assert "discriminator learns on" in found["d"] and "each round has a reward model" in found["r2"]
    assert found["r1"] == found["none"] == ""


def test_a_reference_that_moves_is_said() -> None:
    own = row("airl", ["a", "b", "c"], RIGHT[1], critic=None)
    moving = dataclasses.replace(own, record={**own.record, "protocol": {"rounds": 2, "opponent": "previous"}})
    assert only([moving], [curve("airl", [1, 2])]).caveat.endswith("so each round starts at a KL of 0")
    fixed = dataclasses.replace(own, record={**own.record, "protocol": {"rounds": 2, "opponent": "initial"}})
    assert only([fixed], [curve("airl", [1, 2])]).caveat == ""


def test_where_it_is_drawn() -> None:
    """Reward 1 to 4 at steps 3 to 6, the scores in percent at 2, 4 and 6; the band ends where the sampling begins."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    results = hacked()
    data = RunData(Comparison.of(results, control="sft"), tuple(results), (), (curve("airl", [1, 2, 3, 4]),), (), "")
    (plot,) = page._reward_plots(data)
    reward, score, distance = plot.figure.axes
    assert [list(line.get_xdata()) for line in reward.lines if len(line.get_xdata()) == 4] == [[3.0, 4.0, 5.0, 6.0]] * 2
    strong = score.lines[-1]
    assert (list(strong.get_xdata()), list(strong.get_ydata())) == ([2.0, 4.0, 6.0], [75.0, 50.0, 25.0])
    assert [axes.get_ylabel() for axes in plot.figure.axes] == ["reward", "accuracy in %", "KL (nats)"]
    assert reward.patches[0].get_bbox().x1 == 2.0 and distance.get_xlim() == reward.get_xlim()
    low, high = reward.get_xlim()
    assert low < 2.0 and high > 6.0 and score.get_ylim()[0] < 25.0 < 75.0 < score.get_ylim()[1]


def test_many_methods_and_none_with_a_score() -> None:
    """Four strips in two rows; a task that failed everywhere is drawn all the same."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    names = [f"airl-{number}" for number in range(4)]
    results = [row(name, [name, f"{name}-b", f"{name}-c"], []) for name in names]
    curves = tuple(curve(name, [1, 2, 3, 4]) for name in names)
    data = RunData(Comparison.of(results), tuple(results), (), curves, (), "")
    (plot,) = page._reward_plots(data)
    assert len(plot.figure.axes) == 12 and plot.is_wide and plot.svg().startswith("<svg")


def test_auc_by_class_and_of_a_discriminator() -> None:
    """The reward model of round 1 (not of the starting method's round); the discriminator's AUCs are 0.5 + r / 100 for rewards 0
    to 19: in each round of 10 steps the first and the last.
    """
    told = {"auc": {"empty": 1.0, "own": None, "all": 0.9}, "classes": {"empty": 4, "own": 2}, "missing": {"own": 3}}
    own = row("last", ["a", "b"], RIGHT[1], rounds=1, critic=REWARD_MODEL, told=told)
    without = Curve("last", 0, ({"step": 1.0, "reward": 1.0},), (), (0.0, 1.0))
    assert told_apart([own], [without]) == [
        Told("last", 0, 1, "reward model", "empty", 4, 1.0),
        Told("last", 0, 1, "reward model", "own", 2, None, missing=3),
        Told("last", 0, 1, "reward model", "all", 6, 0.9),
    ]
    beside = row("airl", ["a", "b", "c"], RIGHT[1])
    found = told_apart([beside], [curve("airl", list(range(20)))])
    assert [(each.round, each.first_auc, each.auc) for each in found] == [
        (1, pytest.approx(0.5), pytest.approx(0.59)),
        (2, pytest.approx(0.6), pytest.approx(0.69)),
    ]


def test_the_page_shows_it_and_text_stays_text() -> None:
    results = [plain("sft", ["x"], RIGHT[3]), row(f"airl{ATTACK}", ["a", "b", "c"], RIGHT[1])]
    results[1] = dataclasses.replace(results[1], record={**results[1].record, "starts_from": ATTACK})
    curves = (curve(f"airl{ATTACK}", [1, 2, 3, 4]),)
    data = RunData(Comparison.of(results, control="sft"), tuple(results), (), curves, (), "")
    text = page.render_page(data, *page.draw(data))
    read = Reader(text)
    words = " ".join(read.words)
    assert 'id="plot-reward-quiz"' in text and 'href="#rewards"' in text
    assert f"airl{ATTACK} on quiz: reward 1 → 4 (+3;" in words and "learns on, so rewards of different steps" in words
    assert read.tags.count("script") == 2 and "img" not in read.tags
    missing = page.render_page(data, [], "no matplotlib")
    assert 'id="plot-reward-quiz"' not in missing and "on quiz: reward 1 → 4" in " ".join(Reader(missing).words)


def test_a_run_without_such_methods_has_no_section() -> None:
    results = [plain("sft", ["x"], RIGHT[3])]
    text = page.render_page(RunData(Comparison.of(results), tuple(results), (), (), (), ""), [])
    assert "rewards-title" not in text


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small comparison of a method with a discriminator in two rounds and one with a reward model."""
    out = tmp_path_factory.mktemp("run") / "out"
    both = [f"{name}.{key}" for name in ("airl-reverse-kl", "afd-sft-demo") for key in ("samples=2", "max_new_tokens=24")]
    arguments = ["compare", "--methods", "airl-reverse-kl,afd-sft-demo", "--every-round", "--no-start", "--out", str(out)]
    arguments += ["--tasks", "mini-gsm8k", "--limit", "2", "--limit-demonstrations", "24"]
    arguments += [
        word for change in ("airl-reverse-kl.starts_from=sft", "airl-reverse-kl.rounds=2", *both) for word in ("--set", change)
    ]
    assert compare.call(cli.app, arguments) == 0
    return out


def test_a_real_run(run_folder: Path) -> None:
    data = collect(run_folder)
    assert [each.method for each in data.curves] == ["airl-reverse-kl", "afd-sft-demo"]  # the round's row has none of its own
    first, second = traces(data.results, data.curves)
    assert [each.rounds for each in first.scores["mini-gsm8k"]] == [1, 2] and first.start >= 1
    assert [each.step for each in first.scores["mini-gsm8k"]] == list(first.ends[1:])
    assert [each.rounds for each in second.scores["held-out-nll"]] == [1]
    told = told_apart(data.results, data.curves)
    assert [(each.method, each.critic, each.against) for each in told] == [
        ("airl-reverse-kl", "discriminator", "samples of the policy"),
        ("airl-reverse-kl", "discriminator", "samples of the policy"),
        ("afd-sft-demo", "reward model", "policy"),
        ("afd-sft-demo", "reward model", "all"),
    ]
    assert told[2].answers and told[2].auc is not None and 0 <= told[2].auc <= 1


def test_report_keeps_it_as_data(run_folder: Path, tmp_path: Path) -> None:
    page.write_report(run_folder, tmp_path)
    kept = json.loads((tmp_path / "on-policy.json").read_text(encoding="utf-8"))
    data = collect(run_folder)
    found = traces(data.results, data.curves)
    assert [each["method"] for each in kept["methods"]] == [trace.method for trace in found]
    rewards = [step["reward"] for step in kept["methods"][0]["steps"]]
    assert rewards == list(found[0].line("reward", 0).values) and len(rewards) >= 2
    assert kept["critics"][2]["against"] == "policy"
    assert (tmp_path / "plots" / "reward-mini-gsm8k.png").exists()
    assert on_policy.record(found, [])["critics"] == []


def test_trainings_that_made_the_same_weights_keep_their_own_metrics(tmp_path: Path) -> None:
    """Two folders with one digest: a result that names its own is drawn from it, an old one from the first."""
    for number, name in enumerate(("aaa", "bbb")):
        folder = tmp_path / "store" / "training" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"content": "same"}))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": float(number)}) + "\n")
    rows = []
    named: dict[str, dict[str, str]] = {"one": {"stage": "aaa"}, "two": {"stage": "bbb"}, "old": {}}
    for method, stage in named.items():
        rows.append(result(method, [1.0], provenance={"rounds": [{"weights_sha256": "same", **stage}]}))
    drawn = {curve.method: curve.rows[0]["reward"] for curve in run_data._curves(tmp_path, rows, [])}
    assert drawn == {"one": 0.0, "two": 1.0, "old": 0.0}
