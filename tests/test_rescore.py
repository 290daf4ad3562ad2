"""Stored answers under another protocol, files of answers, and wins: small tasks whose scores are counted by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gsil_bench import compare
from gsil_bench.cli import app
from gsil_bench.errors import UserError
from gsil_bench.evaluation import answers as stage
from gsil_bench.evaluation.answer_files import FileError, read_lines, score_lines
from gsil_bench.evaluation.rescore import differences, find_task, obstacle
from gsil_bench.evaluation.scoring import score_answers
from gsil_bench.evaluation.stored import read_results, read_stored_answers
from gsil_bench.evaluation.wins import shorten
from gsil_bench.inputs import TaskInput
from gsil_bench.records import CellResult, ItemAnswer, result_from_json, write_atomically, write_jsonl
from gsil_bench.store import Produced, Store
from gsil_bench.tasks import gsm8k
from gsil_bench.tasks.task import AnswerProtocol, Continuation, Item, Score, ScoringResources, Split


@dataclasses.dataclass(frozen=True)
class Sums:
    """0 + 0, 1 + 1, 2 + 2: right if the answer's last word is the sum."""

    name: str
    protocol: AnswerProtocol
    words: str = "What is"
    version: str = "1"
    summary: str = "Sums."
    metric: str = "accuracy"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        return [
            Item(
                f"sum-{n}", (f"{self.words} {n} + {n}?",), published_id=str(n), reference={"sum": str(2 * n)}, gold=(str(2 * n),)
            )
            for n in range(3)
        ]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        last = [(texts[0].split() or [""])[-1] for texts in answers]
        return [
            Score(None, "undecided") if word == "?" else Score(float(word == item.reference["sum"]), f"last is {word}")
            for item, word in zip(items, last, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Talks(Sums):
    """Two turns; a replayed judge rates each."""

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        return [Item(name, ("Hello?", "And?"), published_id=name) for name in ("81", "82")]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        scores = []
        for item, texts in zip(items, answers, strict=True):
            said = [resources.judge.judgments.get(f"{item.id}/{turn}") for turn in (1, 2)[: len(texts)]]
            ratings = [None if text is None or not text.isdigit() else float(text) for text in (*said, None)[:2]]
            read = [rating for rating in ratings if rating is not None]
            value = sum(read) / 2 if len(read) == 2 else None
            unscored = ["" if rating is not None else "no rating" for rating in ratings]
            scores.append(Score(value, "; ".join(unscored), {"ratings": ratings, "unscored": unscored}))
        return scores


def sums(name: str, words: str = "What is", **protocol: Any) -> Sums:
    return Sums(f"sums/{name}", AnswerProtocol(**{"name": f"sums/{name}", "max_new_tokens": 8, **protocol}), words)


PLAIN = sums("plain")
SHORT = sums("short", stops=(".",))
LONG = sums("long", max_new_tokens=16)
TIGHT = sums("tight", max_new_tokens=2)
TEXT = sums("text", form="text", shots=5, shot_seed=42, words="Say")
WARM = sums("warm", temperature=0.5)
TWICE = sums("twice", samples=2)
CODE = dataclasses.replace(PLAIN, name="sums/code", runs_code=True, metric="pass@1")
BROKEN = dataclasses.replace(PLAIN, name="sums/broken", best=2.0)
TALKS = Talks("talks/judged", AnswerProtocol("talks/judged", 8))
THERE = "test_rescore:"


def run_command(*words: object) -> int:
    return compare.call(app, [str(word) for word in words])


def answer(item: int, text: str, reason: str = "stop", tokens: int = 4, sample: int = 0) -> ItemAnswer:
    return ItemAnswer(f"sum-{item}", sample, (text,), (reason,), (tokens,))


def store_cell(out: Path, task: Sums, method: str, given: Sequence[ItemAnswer], seed: int = 0, target: str = "PLAIN") -> None:
    """Write what a comparison keeps of one cell."""
    store, items = Store(out / "store"), tuple(task.items("test", None))
    content = TaskInput(task, items).content

    def write_answers(folder: Path) -> Produced:
        write_jsonl(folder / stage.FILE, given)
        return Produced()

    inputs = {"task": task.name, "items": content, "protocol": dataclasses.asdict(task.protocol)}
    kept = store.build("answers", f"a-{method}-{seed}", {**inputs, "needs": {}}, write_answers)
    scored: list[Any] = []

    def write_scores(folder: Path) -> Produced:
        scored.append(score_answers(task, items, given, ScoringResources(), folder))
        return Produced()

    store.build("scores", f"s-{method}-{seed}", {**inputs, "needs": {"answers": kept.content}}, write_scores)
    ((scores, counts),) = scored
    provenance = {"scores": f"s-{method}-{seed}", "configuration": {"tasks": [THERE + target], "split": "test", "limit": None}}
    result = CellResult(
        method, seed, task.name, task.metric, task.best, task.worst,
        {"protocol": task.protocol.name, "items": content, "model": "m"},
        tuple(dataclasses.replace(score, details={}) for score in scores),
        counts, {}, {"steps": 3}, provenance, fingerprint=f"{method}-{seed}",
    )  # fmt: skip
    write_atomically(out / "results" / task.name / f"{method}-seed{seed}.json", json.dumps(dataclasses.asdict(result)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """sft says 4 for 0 + 0 after a full stop, the others are right; dpo misses 1 + 1 and ran out of tokens there."""
    out = tmp_path / "run"
    store_cell(out, PLAIN, "sft", [answer(0, "It is 0. No, 4"), answer(1, "2"), answer(2, "4", tokens=1)])
    store_cell(out, PLAIN, "dpo", [answer(0, "0"), answer(1, "It is 3", "length", 8), answer(2, "\x1b[2J 4")])
    return out


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a run -----------------------------------------------------------------------------------------------------------------


def test_a_run_under_another_protocol(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut at the full stop, sft's first answer is "It is 0", which is right: 2/3 becomes 1. dpo has no full stop: 2/3 stays."""
    before = snapshot(run)
    assert run_command("rescore", run, "--protocol", THERE + "SHORT", "--json") == 0
    cells = {cell["method"]: cell for cell in json.loads(capsys.readouterr().out)["cells"]}
    assert (cells["sft"]["old"], cells["sft"]["new"]) == (pytest.approx(2 / 3), 1.0)
    assert (cells["dpo"]["old"], cells["dpo"]["new"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert {(cell["task"], cell["protocol"], cell["items"], cell["unscored"]) for cell in cells.values()} == {
        ("sums/plain", "sums/short", 3, 0)
    }
    assert snapshot(run) == before


def test_the_same_run_in_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("rescore", run, "--protocol", THERE + "SHORT") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["dpo", "0", "sums/plain", "0.6667", "sums/short", "0.6667", "3", "0"]
    assert lines[2] == ["sft", "0", "sums/plain", "0.6667", "sums/short", "1.0000", "3", "0"]


def test_answers_that_reached_a_lower_limit_are_unscored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """dpo's second answer ended at 8 tokens; 16 might have made it right. The two others are: 2 of 2."""
    assert run_command("rescore", run, "--protocol", THERE + "LONG", "--json") == 0
    dpo, sft = json.loads(capsys.readouterr().out)["cells"]
    assert (dpo["method"], dpo["new"], dpo["unscored"]) == ("dpo", 1.0, 1)
    assert dpo["unscored_reasons"] == ["cut at 8 tokens, sums/long allows 16"]
    assert (sft["new"], sft["unscored"]) == (sft["old"], 0)


def test_answers_above_a_lower_limit_are_unscored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only sft's last answer has no more than 2 tokens."""
    assert run_command("rescore", run, "--protocol", THERE + "TIGHT") == 0
    out = capsys.readouterr().out
    assert "sft (seed 0): 2 unscored: 4 tokens, sums/tight allows 2" in out
    assert "dpo (seed 0): 1 unscored: 8 tokens, sums/tight allows 2" in out


@pytest.mark.parametrize(
    ("protocol", "why"),
    [
        (
            "TEXT",
            "other form: asked as chat, sums/text asks as text; another prompt for 3 of 3 items (0 shots there, 5 shots",
        ),
        ("WARM", "other sampling: temperature 0, not 0.5"),
        ("TWICE", "1 answers to each item, sums/twice wants 2"),
    ],
)
def test_a_protocol_that_does_not_fit_says_why(protocol: str, why: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("rescore", run, "--protocol", THERE + protocol) == 2
    out = capsys.readouterr().out
    assert out.count(f"cannot be scored as sums/{protocol.lower()}: {why}") == 2


def test_one_cell_that_does_not_fit_leaves_the_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run / "store" / "answers" / "a-dpo-0").iterdir():
        path.unlink()
    assert run_command("rescore", run, "--protocol", THERE + "SHORT") == 1
    out = capsys.readouterr().out
    assert "dpo (seed 0): cannot be scored as sums/short: dpo (seed 0) on sums/plain: its answers are not in" in out
    assert "1.0000" in out


def test_new_results_go_into_another_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run)
    assert run_command("rescore", run, "--protocol", THERE + "SHORT", "--out", tmp_path / "new") == 0
    path = tmp_path / "new" / "results" / "sums" / "short" / "sft-seed0.json"
    assert f"wrote {path}" in capsys.readouterr().err
    result = result_from_json(json.loads(path.read_text()))
    assert (result.task, result.comparable["protocol"], result.comparable["model"]) == ("sums/short", "sums/short", "m")
    assert [item.score for item in result.items] == [1.0, 1.0, 1.0]
    assert result.provenance["rescored_from"] == {"task": "sums/plain", "fingerprint": "sft-0"}
    assert result.fingerprint not in ("", "sft-0")
    assert snapshot(run) == before
    assert run_command("rescore", run, "--protocol", THERE + "SHORT", "--out", run) == 2
    assert "the run's own folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "wants a run's folder or --answers FILE"),
        (["RUN"], "rescore wants a --protocol"),
        (["nowhere", "--protocol", THERE + "SHORT"], "no results of tasks below nowhere/results"),
        (["RUN", "--protocol", "gsm8k/lm-eval-v1"], "no results of task gsm8k; there are sums/plain"),
        (["RUN", "--protocol", "lm-eval-v1"], "--protocol lm-eval-v1: no protocol of sums/plain"),
        (["RUN", "--protocol", "gsm8k/lm-eval-v2"], "unknown protocol of gsm8k 'lm-eval-v2': did you mean 'lm-eval-v"),
        (["RUN", "--task", "gsm8k", "--protocol", "mt-bench/fastchat-single"], "a protocol of mt-bench, not of gsm8k"),
        (["RUN", "--protocol", THERE + "CODE"], "task sums/code runs generated code"),
        (["RUN", "--protocol", THERE + "SHORT", "--judge-set", "model=x"], "name the judge with --judge"),
        (["RUN", "--protocol", THERE + "SHORT", "--answers", "x"], "and not both"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("rescore", *[str(run) if word == "RUN" else word for word in words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_scorer_that_fails_its_canaries_scores_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("rescore", run, "--protocol", THERE + "BROKEN") == 1
    captured = capsys.readouterr()
    assert "the gold answer of item sum-0 scores 1.0, not 2.0" in captured.err
    assert captured.out == ""


def test_items_that_changed_since_are_refused(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("test_rescore.PLAIN", dataclasses.replace(PLAIN, words="How much is"))
    assert run_command("rescore", run, "--protocol", THERE + "SHORT") == 2
    assert "the items of sums/plain are not those that were asked" in capsys.readouterr().out


def test_a_real_comparison_can_be_rescored(
    tiny_model: Path, demonstrations_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a comparison really writes is found again: its own protocol gives its own scores, and nothing in it changes."""
    out = tmp_path / "out"
    words = ["--model", tiny_model, "--demonstrations", demonstrations_file, "--methods", "start", "--out", out]
    assert run_command("compare", *words, "--tasks", "support:TASK") == 0
    capsys.readouterr()
    before = snapshot(out)
    assert run_command("rescore", out, "--protocol", "support:TASK", "--json") == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["method"], cell["task"], cell["items"], cell["unscored"]) == ("start", "letters", 12, 0)
    assert cell["new"] == cell["old"]
    assert snapshot(out) == before
    (result,) = read_results(out)
    stored = read_stored_answers(out, result)
    assert len(stored.answers) == 12
    assert stored.protocol["max_new_tokens"] == 6


# --- what stands in the way ------------------------------------------------------------------------------------------------


def asked(task: Sums) -> Mapping[str, Any]:
    """A protocol as it is stored: JSON."""
    record: Mapping[str, Any] = json.loads(json.dumps(dataclasses.asdict(task.protocol)))
    return record


@pytest.mark.parametrize(
    ("stops", "wanted", "text", "reason", "expected"),
    [
        ((), (), "a", "stop", ""),
        ((".",), (".",), "a", "stop", ""),
        ((".",), (), "a", "stop", "may have been cut at '.', where"),
        ((".",), (), "a", "length", ""),  # it was the limit, which is the same
        ((".",), ("b",), "ab", "stop", ""),  # what the new protocol needs is all there
        (("Question:",), ("Question",), "a", "stop", ""),  # where the one stands, the other does
        (("Question",), ("Question:",), "a", "stop", "may have been cut at 'Question', where"),
        (("</s>", "Question:"), ("\n\n", "Question:"), "a", "stop", ""),  # a spelled-out end token is an end
        (("\n\n",), ("Question:", "</s>"), "a", "stop", r"may have been cut at '\n\n', where"),
    ],
)
def test_stops_that_may_have_cut_too_much(
    stops: tuple[str, ...], wanted: tuple[str, ...], text: str, reason: str, expected: str
) -> None:
    found = obstacle(answer(0, text, reason), asked(sums("one", stops=stops)), sums("two", stops=wanted).protocol)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


def test_a_second_turn_belongs_to_the_first_answer() -> None:
    two_turns = ItemAnswer("x", 0, ("one. two", "three."), ("stop", "stop"), (3, 3))
    assert obstacle(two_turns, asked(PLAIN), SHORT.protocol) == "turn 2 was asked after an answer that sums/short ends earlier"
    two_turns = dataclasses.replace(two_turns, texts=("one", "three. four"))
    assert obstacle(two_turns, asked(PLAIN), SHORT.protocol) == ""


def test_seeds_matter_only_to_samples() -> None:
    items = [(item, item) for item in PLAIN.items("test", None)]
    assert differences(asked(PLAIN), sums("other", seed=7).protocol, items, 3) == []
    found = differences(asked(WARM), sums("other", seed=7, temperature=0.5).protocol, items, 3)
    assert found == ["other sampling: seed 0, not 7"]
    assert differences(asked(PLAIN), PLAIN.protocol, items, 4) == ["1 of the 4 items asked are none of sums/plain's"]
    assert differences(asked(PLAIN), sums("x", system="Be brief.").protocol, items, 3) == ["another prompt for 3 of 3 items"]


@pytest.mark.parametrize(
    ("task", "protocol", "expected"),
    [
        ("gsm8k", "lm-eval-v1", "gsm8k/lm-eval-v1"),
        ("gsm8k", "gsm8k/openllm-v1", "gsm8k/openllm-v1"),
        ("gsm8k/lm-eval-v3", "chat-0shot-v1", "gsm8k/chat-0shot-v1"),
        (None, "gsm8k/lm-eval-v1", "gsm8k/lm-eval-v1"),
        ("gsm8k", None, "gsm8k/lm-eval-v3"),
        ("mini-gsm8k", "greedy-v1", "mini-gsm8k"),
        ("mini-gsm8k", "mini-gsm8k/greedy-v1", "mini-gsm8k"),
        (THERE + "PLAIN", "plain", "sums/plain"),
    ],
)
def test_names_of_protocols(task: str | None, protocol: str | None, expected: str) -> None:
    assert find_task(task, protocol).name == expected


def test_gsm8k_v3_fits_v1_but_not_openllm() -> None:
    """The same prompts and limit, and stops that v1 covers; the leaderboard's commit draws other shots."""
    items = [(Item("a", ("the same prompt",)),) * 2]
    v3 = json.loads(json.dumps(dataclasses.asdict(gsm8k.LM_EVAL_V3.protocol)))
    assert differences(v3, gsm8k.LM_EVAL_V1.protocol, items, 1) == []
    assert obstacle(answer(0, "#### 18"), v3, gsm8k.LM_EVAL_V1.protocol) == ""
    other = [(Item("a", ("one prompt",)), Item("a", ("another",)))]
    found = differences(v3, gsm8k.OPENLLM_V1.protocol, other, 1)
    assert found == ["another prompt for 1 of 1 items (5 shots with seed 1234 there, 5 shots with seed 42 here)"]


# --- files of answers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: object) -> Path:
        path = tmp_path / "answers.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def test_a_file_of_answers(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Item 1 has two samples, one of them right: 1/2; item 0 is cut at the full stop and right; item 2 is not there: 3/4."""
    path = file({"item": "1", "completion": "2"}, {"item": 0, "completion": "It is 0. No, 4"}, {"item": 1, "completion": "3"}, "")
    assert run_command("rescore", "--answers", path, "--task", THERE + "SHORT", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["items"] == [
        {"item": "1", "score": 1.0, "unscored_reason": None},
        {"item": "0", "score": 1.0, "unscored_reason": None},
        {"item": "1", "score": 0.0, "unscored_reason": None},
    ]
    aggregate = printed["aggregate"]
    assert (aggregate["score"], aggregate["lowest"], aggregate["highest"]) == (0.75, 0.75, 0.75)
    assert {key: aggregate[key] for key in ("lines", "items", "scored", "unscored", "missing_items", "missing_turns")} == {
        "lines": 3, "items": 2, "scored": 3, "unscored": 0, "missing_items": 1, "missing_turns": 0,
    }  # fmt: skip
    assert (aggregate["task"], aggregate["protocol"], aggregate["metric"]) == ("sums/short", "sums/short", "accuracy")


def test_unscored_lines_are_neither_zero_nor_lost(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """0 is right, 1 is undecided, 2 is wrong: 1/2; were it wrong 1/3, were it right 2/3."""
    path = file({"item": "0", "completion": "0"}, {"item": "1", "completion": "?"}, {"item": "2", "completion": "5"})
    assert run_command("rescore", "--answers", path, "--task", THERE + "PLAIN") == 0
    out = capsys.readouterr().out
    assert "accuracy under sums/plain                   0.5000" in out
    assert "0.3333 to 0.6667" in out
    assert "1 unscored: undecided" in out


def test_pass_at_k_of_several_samples(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Item 0: 2 of 4 right, so pass@2 = 1 - 1/6; item 1: 1 of 2 right, pass@2 = 1. pass@1 is 1/2; nobody has 5 samples."""
    rows = [("0", "0"), ("0", "0"), ("0", "7"), ("0", "7"), ("1", "2"), ("1", "7")]
    path = file(*[{"item": item, "completion": text} for item, text in rows])
    assert run_command("rescore", "--answers", path, "--task", THERE + "CODE", "--allow-code-execution", "--json") == 0
    aggregate = json.loads(capsys.readouterr().out)["aggregate"]
    assert aggregate["score"] == 0.5
    assert {key: value for key, value in aggregate.items() if "pass@" in key} == {"pass@1": 0.5, "pass@2": pytest.approx(11 / 12)}
    assert run_command("rescore", "--answers", path, "--task", THERE + "PLAIN") == 0
    assert "pass@" not in capsys.readouterr().out


def test_a_failed_canary_of_a_file(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = file({"item": "0", "completion": "0"})
    assert run_command("rescore", "--answers", path, "--task", THERE + "BROKEN") == 1
    assert "its scores cannot be trusted" in capsys.readouterr().err


def test_turns_and_their_judgments(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Turns are rated 7, 4 and 9; one judgment has no rating. The mean over the three is 20/3, as FastChat has it."""
    rows = [("82/1", "9"), ("81/2", "4"), ("81/1", "7"), ("82/2", "good")]
    path = file(*[{"item": item, "completion": "Well.", "judgment": judgment} for item, judgment in rows])
    assert run_command("rescore", "--answers", path, "--task", THERE + "TALKS", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["items"] == [
        {"item": "82/1", "score": 9.0, "unscored_reason": None},
        {"item": "81/2", "score": 4.0, "unscored_reason": None},
        {"item": "81/1", "score": 7.0, "unscored_reason": None},
        {"item": "82/2", "score": None, "unscored_reason": "no rating"},
    ]
    assert printed["aggregate"]["score"] == pytest.approx(20 / 3)
    assert printed["aggregate"]["highest"] == pytest.approx(21 / 4)  # Talks.best is 1


def test_a_turn_that_is_not_in_the_file(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = file({"item": "81/1", "completion": "Well.", "judgment": "7"})
    assert run_command("rescore", "--answers", path, "--task", THERE + "TALKS") == 0
    out = capsys.readouterr().out
    assert "turns that are not in the file              1" in out
    assert "rating" not in out.replace("1 unscored: no rating", "")


def test_every_bad_line_is_named(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = file('{"item": "0"', "[1]", {"completion": "x"}, {"item": True, "completion": "x"}, {"item": "0"},
                {"item": "0", "completion": 3}, {"item": "0", "completion": "x", "judgment": None}, "",
                {"item": "0", "completion": "0"})  # fmt: skip
    assert run_command("rescore", "--answers", path, "--task", THERE + "PLAIN") == 2
    captured = capsys.readouterr()
    found = [line.removeprefix(f"error: {path}:").partition(" (")[0] for line in captured.err.splitlines()]
    assert found == [
        "1: not JSON",
        '2: not an object such as {"item": ID, "completion": TEXT}',
        '3: no "item"',
        '4: no "item" that is a text or a number',
        '5: no "completion"',
        '6: "completion" is not a text',
        '7: "judgment" is not a text',
    ]
    assert captured.out == ""


def test_unknown_items_and_second_turns_are_named(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"item": item, "completion": "x", "judgment": "1"} for item in ("81/1", "81/3", "81", "81/1", "99/1")]
    path = file(*rows)
    assert run_command("rescore", "--answers", path, "--task", THERE + "TALKS") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (its")[0] for line in lines] == [
        f"error: {path}:2: talks/judged has no item '81/3'",
        f"error: {path}:3: talks/judged has no item '81'",
        f"error: {path}:4: a second line of '81/1', the first is line 1",
        f"error: {path}:5: talks/judged has no item '99/1'",
    ]
    assert "its items are named 81/1 … 82/1" in lines[0]


def test_a_hostile_name_is_shown_harmlessly(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = file({"item": "\x1b[2J" + "x" * 5000, "completion": "x"})
    assert run_command("rescore", "--answers", path, "--task", THERE + "PLAIN") == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert f"error: {path}:1: sums/plain has no item" in err  # a long path does not hide the line's number
    assert len(err) < len(str(path)) + 200


def test_many_bad_lines_are_counted(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = file(*[{"item": n, "completion": "x"} for n in range(3, 40)])
    assert run_command("rescore", "--answers", path, "--task", THERE + "PLAIN") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "error: … and 17 more lines"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--answers", "FILE"], "name a --task or a --protocol"),
        (["--answers", "nowhere.jsonl", "--task", THERE + "PLAIN"], "--answers nowhere.jsonl cannot be read"),
        (["--answers", "FILE", "--task", "gsm8k", "--protocol", "lm-eval-v9"], "unknown protocol of gsm8k 'lm-eval-v9'"),
        (["--answers", "FILE", "--task", "gsm9k"], "unknown task 'gsm9k': did you mean 'gsm8k'"),
        (["--answers", "FILE", "--task", THERE + "CODE"], "pass --allow-code-execution"),
        (["--answers", "FILE", "--task", THERE + "PLAIN", "--split", "train"], "unknown split 'train'"),
        (["--answers", "FILE", "--task", THERE + "PLAIN"], "FILE is empty"),
    ],
)
def test_bad_input_beside_a_file(
    words: list[str], message: str, file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = file()
    assert run_command("rescore", *[str(path) if word == "FILE" else word for word in words]) == 2
    err = capsys.readouterr().err
    assert message.replace("FILE", str(path)) in err
    assert err.count("\n") == 1


def test_consent_is_enough_for_code(file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = file({"item": "0", "completion": "0"})
    assert run_command("rescore", "--answers", path, "--task", THERE + "CODE", "--allow-code-execution") == 0
    assert "1.0000" in capsys.readouterr().out


@dataclasses.dataclass(frozen=True)
class Choices(Sums):
    """Two continuations; the first should be likelier."""

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        return [Item("c", continuations=(Continuation("A", " b"), Continuation("A", " c")))]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        logps = [[json.loads(text)["logp"] for text in texts] for texts in answers]
        return [Score(float(first > second), "") for first, second in logps]


def test_likelihoods_in_a_file(file: Callable[..., Path]) -> None:
    task = Choices("choices/x", AnswerProtocol("choices/x", 1))
    rows = [{"item": f"c/{n}", "completion": json.dumps({"logp": -n, "tokens": 1})} for n in (2, 1)]
    items = task.items("test", None)
    lines, aggregate = score_lines(task, items, read_lines(file(*rows)), ScoringResources(), "f")
    assert [(line.item, line.score) for line in lines] == [("c/2", 1.0), ("c/1", 1.0)]
    assert aggregate["score"] == 1.0
    with pytest.raises(FileError, match="f: not all of the 2 lines of c/1"):
        score_lines(task, items, read_lines(file(rows[0])), ScoringResources(), "f")


@pytest.mark.data
def test_gsm8k_answers_by_row_number(file: Callable[..., Path], data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 0's gold is 18, row 1's 3. A full stop at the end is right only to version 3; ":" ends an answer of openllm-v1."""
    path = file(
        {"item": "0", "completion": "She sells eggs: 9.\n#### 18"}, {"item": "1", "completion": "#### 3."},
        {"item": "1", "completion": "It takes 2/2=1\n\n#### 3"},
    )  # fmt: skip
    for protocol, expected in (("lm-eval-v3", [1.0, 1.0, 1.0]), ("lm-eval-v1", [1.0, 0.0, 0.0]), ("openllm-v1", [0.0, 0.0, 1.0])):
        words = ["--answers", path, "--task", "gsm8k", "--protocol", protocol, "--data-dir", data_dir, "--json"]
        assert run_command("rescore", *words) == 0
        printed = json.loads(capsys.readouterr().out)
        assert [line["score"] for line in printed["items"]] == expected
        assert printed["aggregate"]["missing_items"] == 1317


# --- wins ------------------------------------------------------------------------------------------------------------------


def test_wins_are_listed_with_both_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sft misses 0 + 0, dpo misses 1 + 1, both know 2 + 2."""
    assert run_command("wins", run, "--task", "sums", "--methods", "sft,dpo") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "sums/plain: sft (seed 0) against dpo (seed 0); 1 items with equal scores, 0 unscored",
        "sft is better on 1 items",
        "sum-1",
        "sft: 1, last is 2",
        "2",
        "dpo: 0, last is 3",
        "It is 3",
        "dpo is better on 1 items",
        "sum-0",
        "dpo: 1, last is 0",
        "0",
        "sft: 0, last is 4",
        "It is 0. No, 4",
    ]


def test_wins_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("wins", run, "--task", "sums/plain", "--methods", "dpo,sft", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["methods"], found["same"]) == (["dpo", "sft"], 1)
    assert [(win["item"], win["better"]["method"], win["worse"]["answers"]) for win in found["wins"]] == [
        ("sum-0", "dpo", ["It is 0. No, 4"]),
        ("sum-1", "sft", ["It is 3"]),
    ]


def test_seeds_of_wins(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sft has seeds 0 and 2, dpo 0 only: with --seed 2 there is nothing to compare with."""
    store_cell(run, PLAIN, "sft", [answer(n, str(2 * n)) for n in range(3)], seed=2)
    assert run_command("wins", run, "--task", "sums", "--methods", "sft,dpo", "--seed", 2) == 2
    assert "dpo has no result with seed 2; there are 0" in capsys.readouterr().err
    store_cell(run, PLAIN, "dpo", [answer(n, "7") for n in range(3)], seed=2)
    assert run_command("wins", run, "--task", "sums", "--methods", "sft,dpo", "--seed", 2, "--show", 2) == 0
    out = capsys.readouterr().out
    assert "sft is better on 3 items" in out
    assert "… 1 more (--show 3)" in out


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("sft", "name two different methods"),
        ("sft,sft", "name two different methods"),
        ("sft,dqo", "unknown method of sums/plain 'dqo': did you mean 'dpo'"),
    ],
)
def test_wins_of_wrong_methods(methods: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("wins", run, "--task", "sums", "--methods", methods) == 2
    assert message in capsys.readouterr().err


def test_other_items_are_no_wins(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "results" / "sums" / "plain" / "dpo-seed0.json"
    record = json.loads(path.read_text())
    record["comparable"]["items"] = "others"
    path.write_text(json.dumps(record))
    assert run_command("wins", run, "--task", "sums", "--methods", "sft,dpo") == 2
    assert "were not asked the same items" in capsys.readouterr().err


def test_a_damaged_result_is_named(run: Path) -> None:
    path = run / "results" / "sums" / "plain" / "dpo-seed0.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"dpo-seed0\.json is not a result that this version reads"):
        read_results(run)


def test_answers_are_harmless_to_a_terminal() -> None:
    assert shorten("a\n\tb") == "a b"
    assert shorten("\x1b[2Jhi\x07") == "\\x1b[2Jhi\\x07"
    assert shorten("\u202edrawkcab") == "\\u202edrawkcab"
    assert shorten("naïve 日本") == "naïve 日本"
    text = shorten("x" * 500 + "y" * 70)
    assert text == "x" * 110 + " … " + "y" * 70


# --- protocols in words ----------------------------------------------------------------------------------------------------


def test_a_protocol_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("tasks", "gsm8k/openllm-v1") == 0
    facts = {line[:15].strip(): line[16:] for line in capsys.readouterr().out.splitlines()}
    assert facts["stops"] == '[":", "Question:", "Question"]'
    assert (facts["shots"], facts["shot seed"], facts["max new tokens"], facts["form"]) == ("5", "42", "256", "text")
    assert facts["data"].startswith("gsm8k/train.jsonl (sha256 17f347dc")
    assert facts["scores"] == "0 (empty answer) to 1 (perfect)"
    assert run_command("tasks", "gsm8k/openllm") == 2
    assert "did you mean 'openllm-v1'" in capsys.readouterr().err
