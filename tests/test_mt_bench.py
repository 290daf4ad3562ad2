"""MT-Bench: FastChat's questions, prompts and parsing, what becomes of missing ratings, its files, and the reports."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gsil_bench.data.sources import MT_BENCH_JUDGE_PROMPTS, MT_BENCH_QUESTIONS, MT_BENCH_REFERENCES
from gsil_bench.errors import UserError
from gsil_bench.records import ItemScore, canonical
from gsil_bench.reporting.mt_bench import (
    CategoryRow,
    LengthBias,
    RatingBounds,
    RepeatVariance,
    TurnScore,
    category_rows,
    length_bias,
    rating_bounds,
    render_report,
    repeat_variance,
    turn_scores,
)
from gsil_bench.tasks.judge import JudgeRequest, NoReply, ReplayJudge, Reply, ScriptedJudge, parse_fastchat_rating
from gsil_bench.tasks.mt_bench import (
    CORRECTED_PATH,
    FASTCHAT_SINGLE,
    FASTCHAT_SINGLE_CORRECTED,
    judge_requests,
    read_fastchat_file,
    read_fastchat_judgments,
    score_judgments,
)
from gsil_bench.tasks.task import Item, Score, ScoringResources, Task

pytestmark = pytest.mark.data

FIRST, SECOND = "First answer.", "Second answer."


@pytest.fixture(scope="module")
def items(data_dir: Path) -> dict[str, Item]:
    return {item.id: item for item in FASTCHAT_SINGLE.items("test", data_dir)}


def judged(script: Any, *questions: Item, repeats: int = 1, answers: Sequence[str] = (FIRST, SECOND)) -> list[Score]:
    judge = ScriptedJudge(script, repeats=repeats)
    return FASTCHAT_SINGLE.score(questions, [answers] * len(questions), ScoringResources(judge=judge))


def says(judgments: dict[str, Reply]) -> Any:
    """A judge that says these things, by question and turn."""
    return lambda request: judgments[request.name]


# Questions


def test_eighty_questions_of_two_turns_in_blocks_of_ten(items: dict[str, Item]) -> None:
    assert list(items) == [str(number) for number in range(81, 161)]
    assert all(len(item.turns) == 2 and item.published_id == item.id for item in items.values())
    blocks = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
    assert [item.group for item in items.values()] == [category for category in blocks for _ in range(10)]
    assert items["81"].turns[1] == "Rewrite your previous response. Start every sentence with the letter A."


def test_temperatures_by_category_and_the_protocol(items: dict[str, Item]) -> None:
    found = {item.group: item.temperature for item in items.values()}
    warm = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    assert found == {**dict.fromkeys(("reasoning", "math", "coding", "extraction"), 0.0), **warm}
    protocol = FASTCHAT_SINGLE.protocol
    assert (protocol.name, protocol.max_new_tokens, protocol.form) == ("mt-bench/fastchat-single", 1024, "chat")
    assert protocol.data == {
        source.path: source.sha256 for source in (MT_BENCH_QUESTIONS, MT_BENCH_JUDGE_PROMPTS, MT_BENCH_REFERENCES)
    }
    assert isinstance(FASTCHAT_SINGLE, Task) and isinstance(FASTCHAT_SINGLE_CORRECTED, Task)


def test_there_is_only_a_test_split(data_dir: Path) -> None:
    with pytest.raises(UserError, match="unknown split of mt-bench/fastchat-single 'dev'"):
        FASTCHAT_SINGLE.items("dev", data_dir)


# What the judge is asked


def test_the_prompts_of_a_question_without_reference(items: dict[str, Item]) -> None:
    """The first turn's instructions are the user's, the second's the system message."""
    (first,), (second,) = judge_requests(items["81"], (FIRST, SECOND))
    one, two = items["81"].turns
    assert (first.name, first.system) == ("81/1", "You are a helpful assistant.")
    assert first.prompt.startswith("[Instruction]\nPlease act as an impartial judge and evaluate the quality")
    assert first.prompt.endswith(
        f"\n\n[Question]\n{one}\n\n[The Start of Assistant's Answer]\n{FIRST}\n[The End of Assistant's Answer]"
    )
    assert second.name == "81/2" and second.questions == (one, two) and second.answers == (FIRST, SECOND)
    assert second.system.startswith("Please act as an impartial judge") and "second user question" in second.system
    assert second.prompt == (
        f"<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{one}\n\n### Assistant A:\n{FIRST}\n\n"
        f"### User:\n{two}\n\n### Assistant A:\n{SECOND}\n\n<|The End of Assistant A's Conversation with User|>"
    )


def test_the_prompts_of_a_question_with_reference(items: dict[str, Item], data_dir: Path) -> None:
    """The first turn is shown one reference answer, the second both."""
    lines = (data_dir / "mt_bench/reference_answer/gpt-4.jsonl").read_text(encoding="utf-8").splitlines()
    row = next(row for row in map(json.loads, lines) if row["question_id"] == 111)
    known = row["choices"][0]["turns"]
    (first,), (second,) = judge_requests(items["111"], (FIRST, SECOND))
    one, two = items["111"].turns
    assert first.system == "You are a helpful assistant." and first.reference == known[0]
    assert first.prompt.endswith(
        f"\n\n[Question]\n{one}\n\n[The Start of Reference Answer]\n{known[0]}\n[The End of Reference Answer]\n\n"
        f"[The Start of Assistant's Answer]\n{FIRST}\n[The End of Assistant's Answer]"
    )
    assert second.system.startswith("Please act as an impartial judge") and "reference answer" in second.system
    assert second.prompt.startswith(
        f"<|The Start of Reference Answer|>\n\n### User:\n{one}\n\n### Reference answer:\n{known[0]}\n\n"
        f"### User:\n{two}\n\n### Reference answer:\n{known[1]}\n\n<|The End of Reference Answer|>\n\n\n"
    )
    assert second.reference == known[1]


def test_which_questions_have_which_prompts(items: dict[str, Item]) -> None:
    """Reasoning 101–110, math 111–120 and coding 121–130 are judged beside references."""
    for name, item in items.items():
        kind = "single-math-v1" if 101 <= int(name) <= 130 else "single-v1"
        assert [prompt["name"] for prompt in item.reference["judge"]] == [kind, f"{kind}-multi-turn"]
        assert bool(item.reference["answers"]) == (101 <= int(name) <= 130)


def test_answers_are_quoted_as_they_are(items: dict[str, Item]) -> None:
    """Braces in an answer are no fields, and a field's value is not filled in again."""
    hostile = "{question} {0} {{x}} %s \\1 {answer_2}"
    (first,), (second,) = judge_requests(items["121"], (hostile, SECOND))
    assert first.prompt.count(hostile) == 1 and second.prompt.count(hostile) == 1


def test_items_are_json(items: dict[str, Item]) -> None:
    assert all(canonical(dict(item.reference)) for item in items.values())


# Ratings


@pytest.mark.parametrize(
    ("judgment", "rating"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("[[7.]]", 7.0),  # \\d+\\.?\\d*
        ("[[3]] no, [[9]]", 3.0),  # the first
        ("as in [2], so [[9]]", 9.0),  # double brackets anywhere go before single ones
        ("Rating: [6]", 6.0),
        ("a[0] and b[1]", 0.0),  # single brackets of code are taken for ratings, as FastChat does
        ("[[0]]", 0.0),
        ("[[11]]", 11.0),  # no check of the range
        ("[[1000]]", 1000.0),
        ("[[ 7 ]]", None),
        ("[[7/10]]", None),
        ("[[-3]]", None),
        ("[[7", None),
        ("[[rating]]", None),
        ("Rating: 7", None),
        ("", None),
        ("$ERROR$", None),
        ("[[07]]", None),  # FastChat stops with a SyntaxError
        ("[[0.5]]", 0.5),
        ("[[٣]]", None),  # a digit to \\d, not to Python
        ("[[" + "9" * 400 + "]]", None),  # no float
        ("[[" + "9" * 5000 + "]]", None),  # no int that Python reads
        ("[[7,8]]", None),
        ("[[[5]]]", 5.0),
    ],
)  # fmt: skip
def test_ratings_as_fastchat_reads_them(judgment: str, rating: float | None) -> None:
    assert parse_fastchat_rating(judgment) == rating


def test_a_score_is_the_mean_of_both_turns(items: dict[str, Item]) -> None:
    (score,) = judged(says({"81/1": "Fine. [[8]]", "81/2": "Poor. [[3]]"}), items["81"])
    assert (score.value, score.reason) == (5.5, "turn 1: 8; turn 2: 3")
    assert score.details["ratings"] == [8.0, 3.0] and score.details["bounds"] == [5.5, 5.5]
    assert score.details["judgments"] == [["Fine. [[8]]"], ["Poor. [[3]]"]]
    assert score.details["lengths"] == [len(FIRST), len(SECOND)]
    assert score.details["judge"] == "scripted" and score.details["references"] == "original"
    assert not any(score.details[flag] for flag in ("empty", "unparsed", "no_judgment", "out_of_range"))
    assert canonical(dict(score.details))


def test_a_turn_without_a_rating_leaves_the_question_unscored(items: dict[str, Item]) -> None:
    """Turn 1 is 8; with 1 or 10 for turn 2 the score would be 4.5 or 9."""
    (score,) = judged(says({"81/1": "[[8]]", "81/2": "I cannot say."}), items["81"])
    assert (score.value, score.reason) == (None, "turn 2: no rating in the judgment")
    assert score.details["ratings"] == [8.0, None] and score.details["bounds"] == [4.5, 9.0]
    assert score.details["unparsed"] and not score.details["no_judgment"]


def test_a_turn_that_the_judge_failed_on_says_why(items: dict[str, Item]) -> None:
    """The number in the reason is no rating."""
    (score,) = judged(says({"81/1": NoReply("500: row [[9]]"), "81/2": "[[4]]"}), items["81"])
    assert (score.value, score.reason) == (None, "turn 1: 500: row [[9]]")
    assert score.details["ratings"] == [None, 4.0] and score.details["judgments"] == [[None], ["[[4]]"]]
    assert score.details["no_judgment"] and not score.details["unparsed"]


def test_a_rating_off_the_scale_counts_and_is_counted(items: dict[str, Item]) -> None:
    (score,) = judged(says({"81/1": "[[0]]", "81/2": "[[12]]"}), items["81"])
    assert score.value == 6.0 and score.details["out_of_range"]
    (score,) = judged(says({"81/1": "[[1]]", "81/2": "[[10]]"}), items["81"])
    assert not score.details["out_of_range"]


def test_repeats_are_averaged_and_those_without_a_rating_are_bounded(items: dict[str, Item]) -> None:
    """Turn 1: 4, 6 and nothing: 5, between (4 + 6 + 1) / 3 and (4 + 6 + 10) / 3. Turn 2: 7 three times."""
    texts = iter(["[[4]]", "?", "[[6]]", "[[7]]", "[[7]]", "[[7]]"])
    (score,) = judged(lambda request: next(texts), items["81"], repeats=3)
    assert score.value == 6.0 and score.details["repeats"] == [[4.0, None, 6.0], [7.0, 7.0, 7.0]]
    assert score.details["bounds"] == pytest.approx([(11 / 3 + 7) / 2, (20 / 3 + 7) / 2])
    assert score.details["unparsed"]


def test_all_questions_are_judged_in_one_call(items: dict[str, Item]) -> None:
    calls: list[int] = []

    @dataclasses.dataclass
    class Counting(ScriptedJudge):
        def replies(self, requests: Sequence[JudgeRequest]) -> list[Reply]:
            calls.append(len(requests))
            return super().replies(requests)

    judge = Counting(lambda request: f"[[{1 + int(request.name[-1])}]]", repeats=2)
    scores = FASTCHAT_SINGLE.score(list(items.values()), [(FIRST, SECOND)] * 80, ScoringResources(judge=judge))
    assert calls == [320] and {score.value for score in scores} == {2.5}
    assert len({request.key for request in judge.asked}) == 320


def test_several_samples_of_a_question_are_kept_apart(items: dict[str, Item]) -> None:
    judge = ScriptedJudge(lambda request: "[[9]]" if "good" in request.answers[-1] else "[[2]]")
    scores = FASTCHAT_SINGLE.score([items["81"]] * 2, [("good", "good"), ("bad", "bad")], ScoringResources(judge=judge))
    assert [score.value for score in scores] == [9.0, 2.0]


def test_a_missing_answer_is_not_judged(items: dict[str, Item]) -> None:
    judge = ScriptedJudge(lambda request: "[[6]]")
    scores = FASTCHAT_SINGLE.score([items["81"], items["82"]], [(FIRST,), (FIRST, "")], ScoringResources(judge=judge))
    assert [request.name for request in judge.asked] == ["81/1", "82/1", "82/2"]
    assert (scores[0].value, scores[0].reason) == (None, "turn 2: no answer to judge")
    assert scores[0].details["bounds"] == [3.5, 8.0]
    assert scores[1].value == 6.0 and scores[1].details["empty"] and not scores[0].details["empty"]


def test_without_a_judge_it_says_what_to_do(items: dict[str, Item]) -> None:
    for questions in ([], [items["81"]]):
        with pytest.raises(UserError) as caught:
            FASTCHAT_SINGLE.score(questions, [(FIRST, SECOND)] * len(questions), ScoringResources())
        assert str(caught.value) == (
            "mt-bench/fastchat-single needs a judge: add --judge endpoint --judge-set url=http://host:8000/v1 "
            "--judge-set model=NAME"
        )


def test_a_judge_that_never_answers_is_one_error(items: dict[str, Item]) -> None:
    with pytest.raises(UserError) as caught:
        judged(lambda request: NoReply("no answer within 5 seconds"), items["81"], items["82"])
    assert str(caught.value) == (
        "mt-bench/fastchat-single: the judge (scripted) gave none of 4 judgments: no answer within 5 seconds"
    )


def test_replayed_judgments(items: dict[str, Item]) -> None:
    judge = ReplayJudge({"81/1": "[[7]]", "81/2": "[[4]]", "82/1": "[[5]]"}, "the judgments of a file")
    scores = FASTCHAT_SINGLE.score([items["81"], items["82"]], [(FIRST, SECOND)] * 2, ScoringResources(judge=judge))
    assert [score.value for score in scores] == [5.5, None]
    assert scores[1].reason == "turn 2: 82/2: not among the judgments of a file"
    assert judge.identity != ReplayJudge({"81/1": "[[8]]"}).identity
    assert judge.identity == ReplayJudge(dict(reversed(judge.judgments.items()))).identity


# Corrected reference answers


def corrected_folder(data_dir: Path, folder: Path, change: Any) -> Path:
    """The real data with a file of changed reference answers beside it."""
    for name in ("question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl"):
        target = folder / "mt_bench" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((data_dir / "mt_bench" / name).read_bytes())
    original = (data_dir / "mt_bench/reference_answer/gpt-4.jsonl").read_text(encoding="utf-8").splitlines()
    rows = change([json.loads(line) for line in original])
    (folder / CORRECTED_PATH).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def with_new_104(rows: list[Any]) -> list[Any]:
    row = next(row for row in rows if row["question_id"] == 104)
    row["choices"][0]["turns"] = ["new one", "new two"]
    return rows


def test_corrected_references_are_another_protocol(items: dict[str, Item], data_dir: Path, tmp_path: Path) -> None:
    folder = corrected_folder(data_dir, tmp_path, with_new_104)
    corrected = {item.id: item for item in FASTCHAT_SINGLE_CORRECTED.items("test", folder)}
    assert corrected["104"].reference["answers"] == ["new one", "new two"]
    assert corrected["105"].reference["answers"] == items["105"].reference["answers"]
    assert {item.reference["references"] for item in corrected.values()} == {"corrected"}
    assert corrected["105"].reference["references_sha256"] != items["105"].reference["references_sha256"]
    original = {item.id: item for item in FASTCHAT_SINGLE.items("test", folder)}
    assert original == items
    assert FASTCHAT_SINGLE_CORRECTED.protocol.name == "mt-bench/fastchat-single-corrected" == FASTCHAT_SINGLE_CORRECTED.name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows, "holds the original reference answers: take mt-bench/fastchat-single"),
        (lambda rows: with_new_104(rows)[:-2], "lacks the reference answers of 2 questions: 129, 130"),
        (lambda rows: [{"question_id": 101, "choices": [{"turns": ["one"]}]}], "corrected.jsonl:1: expected"),
    ],
)
def test_wrong_corrected_references(data_dir: Path, tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        FASTCHAT_SINGLE_CORRECTED.items("test", corrected_folder(data_dir, tmp_path, change))


def test_without_corrected_references(data_dir: Path) -> None:
    with pytest.raises(UserError) as caught:
        FASTCHAT_SINGLE_CORRECTED.items("test", data_dir)
    assert str(caught.value) == (
        "mt-bench/fastchat-single-corrected needs corrected reference answers, which have no public home: put a file in "
        "FastChat's format at mt_bench/reference_answer/corrected.jsonl in a folder and name the folder with --data-dir"
    )


# FastChat's judgment files


def line(question: int, turn: int, judgment: str, score: float, model: str = "m", **more: Any) -> dict[str, Any]:
    """As gen_judgment.py writes it."""
    return {
        "question_id": question,
        "model": model,
        "judge": ["gpt-4", "single-v1" if turn == 1 else "single-v1-multi-turn"],
        "user_prompt": "…",
        "judgment": judgment,
        "score": score,
        "turn": turn,
        "tstamp": 1687222830.5,
        **more,
    }


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


PUBLISHED = (
    line(81, 1, "Well done. Rating: [[10]]", 10),
    line(81, 2, "Not every sentence starts with A.\u2028Rating: [[2]]", 2),
    line(82, 1, "Rating: [[7.5]] rather than [[8]]", 7.5),
    line(82, 2, "$ERROR$", -1),
    line(83, 1, "The response deserves [4].", 4),
    line(83, 2, "I would rate it 5.", -1),
)


def test_the_published_score_of_each_line(tmp_path: Path) -> None:
    path = write(tmp_path / "gpt-4_single.jsonl", *PUBLISHED)
    rows, judgments = read_fastchat_file(path), read_fastchat_judgments(path)
    assert [row.score for row in rows] == [10.0, 2.0, 7.5, None, 4.0, None]
    assert list(judgments) == ["81/1", "81/2", "82/1", "82/2", "83/1", "83/2"]
    scores = score_judgments(judgments)
    assert [scores[row.name].value for row in rows] == [row.score for row in rows]
    assert scores["83/2"].reason == "no rating in the judgment" and scores["83/2"].details["unparsed"]
    assert rows[1].judge == ("gpt-4", "single-v1-multi-turn") and rows[2].line == 3


def test_judgments_of_one_of_several_models(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", line(81, 1, "[[3]]", 3, "vicuna"), line(81, 1, "[[9]]", 9, "gpt-4"))
    assert read_fastchat_judgments(path, "gpt-4") == {"81/1": "[[9]]"}
    with pytest.raises(UserError, match=r"holds the judgments of 2 models: name one of gpt-4, vicuna"):
        read_fastchat_judgments(path)
    with pytest.raises(UserError, match=r"unknown model in .*'vicunna': did you mean 'vicuna'\?"):
        read_fastchat_judgments(path, "vicunna")


def test_a_file_that_was_appended_to(tmp_path: Path) -> None:
    twice = write(tmp_path / "f.jsonl", line(81, 1, "[[3]]", 3), line(81, 1, "[[3]]", 3))
    assert read_fastchat_judgments(twice) == {"81/1": "[[3]]"}
    other = write(tmp_path / "g.jsonl", line(81, 1, "[[3]]", 3), line(81, 1, "[[4]]", 4))
    with pytest.raises(UserError, match=r"two judgments of 81/1 \(lines 1 and 2\); FastChat appends"):
        read_fastchat_judgments(other)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question_id": 81, "turn": 1}, r"f\.jsonl:2: not a line of FastChat's judgments \(no 'score'\)"),
        ({**line(81, 2, "", 1), "turn": "two"}, r"f\.jsonl:2: not a line of FastChat's judgments \(invalid literal"),
        ({**line(81, 2, "", 1), "g1_judgment": ""}, r"f\.jsonl:2: a judgment of a pair"),
        ([1], r"f\.jsonl:2: not a JSON object"),
    ],
)
def test_lines_that_are_not_judgments(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_fastchat_judgments(write(tmp_path / "f.jsonl", line(81, 1, "[[3]]", 3), row))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        read_fastchat_file(tmp_path / "none.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"question_id": 8', encoding="utf-8")
    with pytest.raises(UserError, match=r"torn\.jsonl:1: not JSON"):
        read_fastchat_file(tmp_path / "torn.jsonl")


# Reports


def scored(item: str, group: str, ratings: Sequence[float | None], lengths: Sequence[int], repeats: Any = None) -> ItemScore:
    details = {"ratings": list(ratings), "lengths": list(lengths), "repeats": repeats or [[rating] for rating in ratings]}
    value = None if None in ratings else sum(rating for rating in ratings if rating is not None) / len(ratings)
    return ItemScore(item, value, "", group, details)


SCORES = (
    scored("81", "writing", (8.0, 6.0), (100, 300)),
    scored("82", "writing", (4.0, 2.0), (50, 100)),
    scored("111", "math", (3.0, None), (10, 20)),
)


def test_the_table_by_category_and_turn() -> None:
    """Writing: turns (8 + 4) / 2 and (6 + 2) / 2, questions 7 and 3; t(0.975, 1) = 12.7062, s/√2 = 2: ±25.4, cut at the scale.
    Math has no question with both turns.
    """
    writing, math_row, both = category_rows(turn_scores(SCORES))
    assert (writing.category, writing.by_turn, writing.questions, writing.unscored_turns) == ("writing", (6.0, 4.0), 2, 0)
    assert (writing.score.estimate, writing.score.low, writing.score.high) == (5.0, 1.0, 10.0)
    assert math_row.by_turn[0] == 3.0 and math.isnan(math_row.by_turn[1]) and math.isnan(math_row.score.estimate)
    assert (math_row.questions, math_row.unscored_turns) == (1, 1)
    assert isinstance(both, CategoryRow)
    assert (both.category, both.by_turn, both.score.estimate, both.unscored_turns) == ("all", (5.0, 4.0), 5.0, 1)


def test_bounds_of_the_mean() -> None:
    """Five ratings add up to 23; with 1 or 10 for the sixth the mean is 4 or 5.5."""
    assert rating_bounds(turn_scores(SCORES)) == RatingBounds(mean=4.6, low=4.0, high=5.5, turns=6, unscored=1)


def test_an_item_that_was_never_judged_counts_as_two_turns() -> None:
    turns = turn_scores([*SCORES, ItemScore("112", None, "the prompt is too long", "math")])
    assert [turn.turn for turn in turns[-2:]] == [1, 2]
    # 23 + 3 × 1 and 23 + 3 × 10, of 8 turns
    assert rating_bounds(turns) == RatingBounds(4.6, 26 / 8, 53 / 8, 8, 3)


def test_bounds_take_single_repeats() -> None:
    """One turn, 4 and nothing: 4; at worst (4 + 1) / 2, at best (4 + 10) / 2."""
    turns = [TurnScore("81", "writing", 1, 4.0, (4.0, None), 9)]
    assert rating_bounds(turns) == RatingBounds(4.0, 2.5, 7.0, 1, 0)


def turns_of(*pairs: tuple[float, int], group: str = "writing", turn: int = 1) -> list[TurnScore]:
    return [TurnScore(str(n), group, turn, rating, (rating,), length) for n, (rating, length) in enumerate(pairs)]


def test_length_bias_by_hand() -> None:
    """Ratings 1, 2, 3 and lengths 10, 30, 20: Σ(−1, 0, 1)(−10, 10, 0) = 10, / √(2 · 200) = 0.5; the ranks are the same."""
    bias = length_bias(turns_of((1.0, 10), (2.0, 30), (3.0, 20)))
    assert (bias.pearson, bias.spearman, bias.within, bias.n) == pytest.approx((0.5, 0.5, 0.5, 3))


def test_length_bias_of_ranks_is_not_moved_by_one_long_answer() -> None:
    """Ranks of 5, 5, 9, 7 are 0.5, 0.5, 3, 2, those of the lengths 0, 1, 3, 2; less their means (−1, −1, 1.5, 0.5) and
    (−1.5, −0.5, 1.5, 0.5): 4.5 / √(4.5 · 5).
    """
    near = length_bias(turns_of((5.0, 10), (5.0, 20), (9.0, 40), (7.0, 30)))
    far = length_bias(turns_of((5.0, 10), (5.0, 20), (9.0, 40_000), (7.0, 30)))
    assert near.spearman == pytest.approx(4.5 / math.sqrt(22.5)) and far.spearman == pytest.approx(near.spearman)
    assert far.pearson < near.pearson


def test_length_bias_within_categories() -> None:
    """Writing is longer and better than math; within each the longer answer is the worse one: −1, though overall it is +."""
    turns = [*turns_of((8.0, 210), (9.0, 200)), *turns_of((2.0, 20), (3.0, 10), group="math")]
    bias = length_bias(turns)
    assert bias.within == pytest.approx(-1.0) and bias.pearson > 0.9


def test_length_bias_without_spread_or_ratings() -> None:
    flat = length_bias(turns_of((5.0, 10), (5.0, 20)))
    assert math.isnan(flat.pearson) and math.isnan(flat.spearman) and math.isnan(flat.within) and flat.n == 2
    none = length_bias([TurnScore("81", "writing", 1, None, (None,), 10), TurnScore("82", "writing", 1, 5.0, (5.0,), None)])
    assert isinstance(none, LengthBias) and none.n == 0 and math.isnan(none.pearson)


def test_repeat_variance_by_hand() -> None:
    """4, 6 and 8, 8: within (2 + 0) / 2 = 1; means 5 and 8, variance 4.5, times 2 = 9; between (9 − 1) / 2 = 4. The noise of the
    mean of four judgments is √(1 / 4). The turn without a rating is left out.
    """
    repeats = ((4.0, 6.0), (8.0, 8.0), (3.0, None))
    turns = [TurnScore(str(n), "", 1, 5.0, values, 1) for n, values in enumerate(repeats)]
    split = repeat_variance(turns)
    assert split == RepeatVariance(questions=4.0, repeats=1.0, turns=2, per_turn=2)
    assert split.noise == 0.5


def test_repeat_variance_is_never_negative_and_may_be_unknown() -> None:
    noisy = [TurnScore(str(n), "", 1, 5.0, (3.0, 7.0), 1) for n in range(3)]
    assert repeat_variance(noisy) == RepeatVariance(0.0, 8.0, 3, 2)
    assert repeat_variance(turn_scores(SCORES)) is None and repeat_variance([]) is None


def test_the_report() -> None:
    report = render_report([*SCORES, scored("9", "a|b <i>", (5.0, 5.0), (10, 10))])
    assert "| writing | 6.00 | 4.00 | 5.00 [1.00, 10.00] | 2 | 0 |" in report
    assert "| math | 3.00 | ? | ? [1.00, 10.00] | 1 | 1 |" in report
    assert "| a\\|b &lt;i&gt; |" in report
    assert "mean of 7 ratings: 4.71; 1 of 8 turns are unscored: with them the mean lies between 4.25 and 5.38" in report
    assert "the judge's own noise was not measured" in report


def test_the_report_of_real_scores(items: dict[str, Item]) -> None:
    """Two repeats, 6 and 8, of every turn: everything is 7, the judge's variance 2, its noise √(2 / (2 · 4))."""
    texts = {0: "[[6]]", 1: "[[8]]"}
    questions = [items["81"], items["111"]]
    scores = judged(lambda request: texts[request.repeat], *questions, repeats=2)
    kept = [ItemScore(q.id, s.value, s.reason, q.group, s.details) for q, s in zip(questions, scores, strict=True)]
    report = render_report(kept)
    assert "mean of 4 ratings: 7.00; every turn was rated" in report
    assert "0.00 between turns, 2.00 between 2 repeats of 4 turns; the judge's noise in the mean is ±0.50" in report
