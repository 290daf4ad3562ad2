"""GSM8K: the scorers on right, wrong, empty and hostile answers, and the protocols on the real data, beside lm-eval itself where
it is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsil_bench.data import sources
from gsil_bench.errors import UserError
from gsil_bench.tasks import gsm8k, load_task
from gsil_bench.tasks.gsm8k import (
    CHAT_0SHOT,
    LM_EVAL_V1,
    LM_EVAL_V3,
    OPENLLM_V1,
    draw_shots,
    score_answer,
    score_as_openllm,
    score_as_v1,
    score_as_v3,
)
from gsil_bench.tasks.task import Score, ScoringResources, Task

ALL = [LM_EVAL_V3, LM_EVAL_V1, OPENLLM_V1, CHAT_0SHOT]

GOLD = "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs and makes 9 * 2 = $<<9*2=18>>18.\n#### 18"


@pytest.mark.parametrize(
    ("answer", "value", "extracted", "flexible"),
    [
        # right
        (GOLD, 1.0, "18", True),
        ("#### 18", 1.0, "18", True),
        ("#### 18.", 1.0, "18", True),
        ("#### 18.00", 1.0, "18.00", True),
        ("#### $18", 1.0, "18", True),
        ("#### $18.00.", 1.0, "18.00", True),
        ("#### 018", 1.0, "018", True),
        ("#### 18 eggs", 1.0, "18", True),
        ("#### 18\n#### 7", 1.0, "18", False),  # the first one counts
        ("#### 18\n\nQuestion: what is 2 + 2?\nAnswer: 4\n#### 4", 1.0, "18", False),
        # wrong number
        ("#### 17", 0.0, "17", False),
        ("#### -18", 0.0, "-18", False),
        ("#### 1,8.0", 1.0, "18.0", True),  # commas are dropped wherever they stand, as lm-eval does
        ("#### 180", 0.0, "180", False),
        ("#### 18.5", 0.0, "18.5", False),
        ("#### 7\n#### 18", 0.0, "7", True),
        ("18 is not it. #### 19", 0.0, "19", False),
        # wrong format
        ("The answer is 18.", 0.0, None, True),
        ("The answer is $18.00", 0.0, None, True),
        ("####18", 0.0, None, True),
        ("### 18", 0.0, None, True),
        ("####\n18", 0.0, None, True),
        ("#### eighteen", 0.0, None, False),
        ("#### 1.8.0", 0.0, None, False),
        ("#### .", 0.0, None, False),
        ("#### ,", 0.0, None, False),
        ("#### $", 0.0, None, False),
        ("#### --18", 0.0, None, False),
        ("####   18", 0.0, None, True),
        ("#### ... #### 18", 0.0, None, True),
        ("18 eggs, that is all (2 meals).", 0.0, None, False),
        ("so 16-18", 0.0, None, True),  # a range, not minus eighteen
        ("so (20)-18", 0.0, None, True),
        ("so 18...", 0.0, None, True),
        ("<<9*2=18>>", 0.0, None, True),
        # nothing
        ("", 0.0, None, False),
        (" \n\t", 0.0, None, False),
        ("####", 0.0, None, False),
        ("#### ", 0.0, None, False),
        # other scripts and strange characters
        ("#### \u0661\u0668", 0.0, None, False),  # Arabic-Indic digits
        ("#### \uff11\uff18", 0.0, None, False),  # full-width digits
        ("#### \u221218", 0.0, None, True),  # a minus sign that is not ASCII: no number in strict format
        ("#### 18\x00", 1.0, "18", True),
        ("\ud800 #### 18", 1.0, "18", True),
        ("#### 1e1", 0.0, "1", False),
        ("#### nan", 0.0, None, False),
        ("#### Infinity", 0.0, None, False),
    ],
)
def test_scores_against_eighteen(answer: str, value: float, extracted: str | None, flexible: bool) -> None:
    score = score_answer(answer, GOLD)
    assert score.value == value
    assert score.details == {"format_ok": extracted is not None, "extracted": extracted, "flexible": flexible}
    assert score.reason and "\n" not in score.reason
    json.dumps(score.details)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("#### 1,234,567", "#### 1234567"),
        ("#### 1234567", "#### 1,234,567"),
        ("#### -$5", "#### -5"),
        ("#### $-5", "#### -5"),
        ("#### -0", "#### 0"),
        ("#### 0.50", "#### .5"),
        ("#### 18", "18"),
        ("#### 18", " $18.00 "),
    ],
)
def test_equal_numbers(answer: str, gold: str) -> None:
    score = score_answer(answer, gold)
    assert score.value == 1.0
    assert score.details["flexible"] is True


def test_numbers_are_compared_exactly() -> None:
    assert score_answer("#### 9007199254740993", "#### 9007199254740992").value == 0.0  # equal as floats
    assert score_answer("#### 0.1", "#### 0.10000000000000000000000001").value == 0.0


def test_reasons_are_words() -> None:
    assert score_answer("#### 18", GOLD).reason == "18 is right"
    assert score_answer("#### 17", GOLD).reason == "17 is wrong, the gold answer is 18"
    assert score_answer("18", GOLD).reason == 'no "#### number" in the answer, though its last number is right'
    assert score_answer("", GOLD).reason == 'no "#### number" in the answer'
    assert len(score_answer("#### " + "1" * 1000, GOLD).reason) < 100


@pytest.mark.parametrize("gold", ["", "eighteen", "#### eighteen", "1.2.3"])
def test_gold_without_a_number_is_an_error(gold: str) -> None:
    with pytest.raises(UserError, match="the gold answer has no number"):
        score_answer("#### 18", gold)


@pytest.mark.parametrize("score_text", [score_answer, score_as_v3, score_as_v1, score_as_openllm])
@pytest.mark.parametrize("text", ["#### ", "1,", "-$", "18 ", "####", "$", "1.", "9", "."])
@pytest.mark.timeout(60)  # minutes if the time grew with the square of the length
def test_long_hostile_answers_are_read_in_linear_time(text: str, score_text: Callable[[str, str], Score]) -> None:
    assert score_text(text * (500_000 // len(text)), "#### 77").value == 0.0


@given(st.text())
def test_any_text_gets_a_score(answer: str) -> None:
    for score_text in (score_answer, score_as_v3, score_as_v1, score_as_openllm):
        assert score_text(answer, GOLD).value in (0.0, 1.0)


@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc .\n=+", max_size=20))
def test_any_integer_is_recognised(number: int, words: str) -> None:
    assert score_answer(f"{words}#### {number:,}", f"#### {number}").value == 1.0
    assert score_answer(f"{words}#### {number + 1:,}", f"#### {number}").value == 0.0


# --- as lm-eval reads them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "v3", "v1", "openllm", "extracted", "flexible", "last"),
    [
        (GOLD, 1.0, 1.0, 1.0, "18", True, "18"),
        ("#### 18", 1.0, 1.0, 1.0, "18", True, "18"),
        ("#### 18.", 1.0, 0.0, 0.0, "18.", True, "18."),  # only version 3 removes the full stop
        ("#### 18..", 0.0, 0.0, 0.0, "18..", False, "18.."),  # and only one of them
        ("#### 18.00", 0.0, 0.0, 0.0, "18.00", False, "18.00"),  # strings are compared
        ("#### 1,8", 1.0, 1.0, 1.0, "1,8", True, "1,8"),
        ("#### $18", 0.0, 0.0, 0.0, None, True, "$18"),  # the strict pattern has no dollar sign
        ("#### 18$", 1.0, 1.0, 1.0, "18", True, "18$"),
        ("#### 18 dollars for 2 days", 1.0, 1.0, 1.0, "18", False, "2"),
        ("#### -18", 0.0, 0.0, 0.0, "-18", False, "-18"),
        ("#### 7\n#### 18", 0.0, 0.0, 0.0, "7", True, "18"),
        ("#### 18\n#### 7", 1.0, 1.0, 1.0, "18", False, "7"),
        ("The answer is 18.", 0.0, 0.0, 0.0, None, True, "18."),
        ("18 (2 meals).", 0.0, 0.0, 0.0, None, False, "2"),  # one full stop is no run of two
        ("24...", 0.0, 0.0, 0.0, None, False, "24..."),
        ("16-18", 0.0, 0.0, 0.0, None, False, "-18"),  # to lm-eval that is minus eighteen
        ("#### .", 0.0, 0.0, 0.0, ".", False, None),
        ("####18", 0.0, 0.0, 0.0, None, True, "18"),
        ("#### \u0661\u0668", 0.0, 0.0, 0.0, None, False, None),
        ("", 0.0, 0.0, 0.0, None, False, None),
    ],
)
def test_strings_against_eighteen(
    answer: str, v3: float, v1: float, openllm: float, extracted: str | None, flexible: bool, last: str | None
) -> None:
    """Worked out from the two patterns: a run of two or more of "$0-9.,", else digits; the last such run of the text."""
    score = score_as_v3(answer, GOLD)
    assert (score.value, score_as_v1(answer, GOLD).value, score_as_openllm(answer, GOLD).value) == (v3, v1, openllm)
    details = {"format_ok": extracted is not None, "extracted": extracted, "flexible": flexible, "flexible_extracted": last}
    assert score.details == details
    assert score.reason and "\n" not in score.reason


# --- the task --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_task_record(task: gsm8k.Gsm8k) -> None:
    assert isinstance(task, Task)
    assert task.name == task.protocol.name
    assert (task.metric, task.best, task.worst, task.runs_code) == ("accuracy", 1.0, 0.0, False)
    assert (task.protocol.max_new_tokens, task.protocol.temperature, task.protocol.samples) == (256, 0.0, 1)
    assert task.summary and "\n" not in task.summary
    assert task.protocol.prompt and task.protocol.extraction and "gsm8k/test.jsonl" in task.protocol.data
    json.dumps(vars(task.protocol))


def test_protocols_differ_in_what_their_harnesses_do() -> None:
    assert load_task("gsm8k") is LM_EVAL_V3
    assert [task.protocol.stops for task in ALL] == [
        ("Question:", "</s>", "<|im_end|>"),
        ("\n\n", "Question:"),
        (":", "Question:", "Question"),
        (),
    ]
    assert [(task.protocol.form, task.protocol.shots, task.protocol.shot_seed) for task in ALL] == [
        ("text", 5, 1234),
        ("text", 5, 1234),
        ("text", 5, 42),
        ("chat", 0, None),
    ]
    assert "91.0 %" in OPENLLM_V1.summary


def test_no_torch() -> None:
    code = "import sys; import gsil_bench.tasks.gsm8k; print('torch' in sys.modules)"
    root = Path(gsm8k.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


ROWS = [{"question": f"What is {n} + {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"} for n in range(60)]


@pytest.fixture
def toy_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small files in place of the real ones."""
    rows = [*ROWS, {"question": "A line\u2028break?", "answer": "None.\n#### 1"}]
    for constant, name in (("GSM8K_TRAIN", "train"), ("GSM8K_TEST", "test")):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path = tmp_path / f"gsm8k/{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setattr(gsm8k, constant, sources.Source(name, f"gsm8k/{name}.jsonl", digest, (), "MIT"))
    return tmp_path


def test_items_of_the_chat_protocol(toy_data: Path) -> None:
    items = CHAT_0SHOT.items("test", toy_data)
    assert len(items) == 61
    first = items[0]
    assert first.turns == ("What is 0 + 0?",)
    assert first.gold == (ROWS[0]["answer"],)
    assert [item.published_id for item in items] == [str(number) for number in range(61)]
    assert first.reference == {"gold": ROWS[0]["answer"]}
    assert first.id == hashlib.sha256(f"{ROWS[0]['question']}\n{ROWS[0]['answer']}".encode()).hexdigest()[:16]
    assert items[-1].turns == ("A line\u2028break?",)
    assert items == CHAT_0SHOT.items("test", toy_data)


def test_few_shot_prompts(toy_data: Path) -> None:
    """Five shots and the question, as text; the toy train rows are "What is n + n?", so that each shot names its row."""
    items = LM_EVAL_V3.items("test", toy_data)
    *shots, question = items[3].turns[0].split("\n\n")
    assert question == "Question: What is 3 + 3?\nAnswer:"
    assert len(shots) == 5
    stream = random.Random(1234)
    rows = [stream.sample(range(61), 5) for _ in range(4)][3]
    train = [*ROWS, {"question": "A line\u2028break?", "answer": "None.\n#### 1"}]
    assert shots == [f"Question: {train[row]['question']}\nAnswer: {train[row]['answer']}" for row in rows]
    assert [item.turns for item in LM_EVAL_V1.items("test", toy_data)] == [item.turns for item in items]
    assert [item.id for item in items] == [item.id for item in CHAT_0SHOT.items("test", toy_data)]


def test_shots_of_shuffled_questions() -> None:
    """The harness shuffles the questions, then draws for one after the other; the drawing continues the shuffle's stream."""
    stream, order = random.Random(42), list(range(4))
    stream.shuffle(order)
    taken = [(question, stream.sample(list("abcdefghij"), 5)) for question in order]
    drawn = draw_shots(42, 4, 10, shuffled=True)
    assert order != [0, 1, 2, 3]
    for question, letters in taken:
        assert ["abcdefghij"[row] for row in drawn[question]] == letters


def test_demonstrations_are_questions_alone(toy_data: Path) -> None:
    assert {task.items("train", toy_data)[0].turns for task in ALL} == {("What is 0 + 0?",)}
    assert len({tuple(item.id for item in task.items("train", toy_data)) for task in ALL}) == 1


def test_no_dev_question_is_among_the_shots_of_dev(toy_data: Path) -> None:
    held_out = [item.turns[0] for item in CHAT_0SHOT.items("dev", toy_data)]
    assert held_out
    for item in LM_EVAL_V3.items("dev", toy_data):
        *shots, question = item.turns[0].split("\n\n")
        assert any(text in question for text in held_out)
        assert not any(text in shot for text in held_out for shot in shots)


def test_dev_is_held_out_of_train(toy_data: Path) -> None:
    train, dev = LM_EVAL_V3.items("train", toy_data), LM_EVAL_V3.items("dev", toy_data)
    both = {item.id for item in train} | {item.id for item in dev}
    assert len(both) == len(train) + len(dev) == 61
    assert all(int(item.id, 16) % 15 == 0 for item in dev)
    assert not any(int(item.id, 16) % 15 == 0 for item in train)


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_canaries(task: gsm8k.Gsm8k, toy_data: Path) -> None:
    items = task.items("test", toy_data)
    gold = task.score(items, [item.gold for item in items], ScoringResources())
    empty = task.score(items, [("",)] * len(items), ScoringResources())
    assert {score.value for score in gold} == {1.0}
    assert {score.value for score in empty} == {0.0}


def test_answers_must_match_the_items(toy_data: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        LM_EVAL_V3.score(LM_EVAL_V3.items("test", toy_data), [("#### 1",)], ScoringResources())


def test_unknown_split(toy_data: Path) -> None:
    with pytest.raises(UserError, match="unknown split of gsm8k 'tests': did you mean 'test'"):
        LM_EVAL_V3.items("tests", toy_data)  # type: ignore[arg-type]


# --- the real data ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_data() -> Path:
    """The folder with the real files; nothing is downloaded."""
    beside = Path(__file__).resolve().parents[2] / "shared/data"
    for folder in (Path(os.environ.get("GSIL_BENCH_DATA") or beside), beside):
        if (folder / "gsm8k/test.jsonl").is_file() and (folder / "gsm8k/train.jsonl").is_file():
            return folder
    pytest.skip("GSM8K is not at hand: set GSIL_BENCH_DATA to a folder with gsm8k/test.jsonl and gsm8k/train.jsonl")


def cut(text: str, stops: tuple[str, ...]) -> str:
    """What comes before the first of the stop texts."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


@pytest.mark.data
@pytest.mark.parametrize(("task", "survivors"), [(LM_EVAL_V3, 1319), (LM_EVAL_V1, 1317), (OPENLLM_V1, 1200), (CHAT_0SHOT, 1319)])
def test_what_a_perfect_imitator_gets(task: gsm8k.Gsm8k, survivors: int, real_data: Path) -> None:
    """Measured on the published harnesses: their stop texts leave so many of the 1,319 gold answers right."""
    items = task.items("test", real_data)
    imitated = [(cut(item.reference["gold"], task.protocol.stops),) for item in items]
    right = [score.value == 1.0 for score in task.score(items, imitated, ScoringResources())]
    assert sum(right) == survivors
    assert [bool(item.gold) for item in items] == right  # the canaries are these


@pytest.mark.data
def test_real_gold_answers_are_all_right(real_data: Path) -> None:
    ids = []
    for split, count in (("test", 1319), ("train", 6935), ("dev", 538)):
        for task in ALL:
            items = task.items(split, real_data)  # type: ignore[arg-type]
            scores = task.score(items, [(item.reference["gold"],) for item in items], ScoringResources())
            assert len(items) == count
            assert {score.value for score in scores} == {1.0}
            assert all(score.details["format_ok"] and score.details["flexible"] for score in scores)
        ids += [item.id for item in items]
    assert len(set(ids)) == len(ids) == 1319 + 7473


@pytest.mark.data
def test_real_answers_to_other_questions_are_mostly_wrong(real_data: Path) -> None:
    items = LM_EVAL_V3.items("test", real_data)
    shifted = [item.gold for item in [*items[1:], items[0]]]
    values = [score.value or 0.0 for score in LM_EVAL_V3.score(items, shifted, ScoringResources())]
    assert sum(values) / len(values) < 0.05


# --- beside lm-eval --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's own task object on the local files, with its requests built."""
    lm_eval = pytest.importorskip("lm_eval", reason="parity needs lm-eval: pip install lm-eval==0.4.13")
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("lm-eval")
    (folder / "task.yaml").write_text(
        f"include: {Path(lm_eval.__file__).parent}/tasks/gsm8k/gsm8k.yaml\n"
        "task: gsm8k_local\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{train: {real_data}/gsm8k/train.jsonl, test: {real_data}/gsm8k/test.jsonl}}, "
        f"cache_dir: {folder}/cache}}\n"
    )
    task = TaskManager(include_path=str(folder), include_defaults=False).load(["gsm8k_local"])["tasks"]["gsm8k_local"]
    task.set_fewshot_seed(1234)  # as simple_evaluate does
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return task


@pytest.mark.data
def test_all_prompts_are_those_of_lm_eval(published: Any, real_data: Path) -> None:
    items = LM_EVAL_V3.items("test", real_data)
    assert published.VERSION == 3.0
    assert [item.turns[0] for item in items] == [request.args[0] for request in published.instances]
    assert published.instances[0].args[1]["until"] == list(LM_EVAL_V3.protocol.stops)


def write_answers(golds: list[str]) -> list[str]:
    """An answer to each question: gold answers damaged in many ways, and random strings of what the patterns look at."""
    stream = random.Random(0)
    damage: list[Callable[[str], str]] = [
        lambda gold: gold,
        lambda gold: gold + ".",
        lambda gold: gold.replace("#### ", "####"),
        lambda gold: gold.replace("#### ", "#### $"),
        lambda gold: gold + ".00",
        lambda gold: gold + "\n\nQuestion: How many are 2 and 2?\nAnswer: 4\n#### 4",
        lambda gold: gold + "</s> 12",
        lambda gold: "#### 5\n" + gold,
        lambda gold: f"The answer is {gold.rpartition(' ')[2]}.",
        lambda gold: f"{gold.rpartition(' ')[2]} meals (for 2 days).",
        lambda gold: gold[: len(gold) // 2],
        lambda gold: "",
        lambda gold: "".join(stream.choices(["#### ", "#", " ", "1", "8", ",", ".", "$", "-", "\n", "x", "Question:"], k=20)),
        lambda gold: gold.replace("#### ", "#### -"),
    ]
    return [damage[number % len(damage)](gold) for number, gold in enumerate(golds)]


@pytest.mark.data
def test_both_filters_are_those_of_lm_eval(published: Any, real_data: Path) -> None:
    from lm_eval.models.utils import postprocess_generated_text

    items = LM_EVAL_V3.items("test", real_data)
    written = write_answers([item.reference["gold"] for item in items])
    for request, answer in zip(published.instances, written, strict=True):
        request.resps = [postprocess_generated_text(answer, request.args[1]["until"], None)]
    published.apply_filters()
    answers = [(cut(answer, LM_EVAL_V3.protocol.stops),) for answer in written]
    scores = LM_EVAL_V3.score(items, answers, ScoringResources())
    for name, ours in (
        ("strict-match", [(score.details["extracted"], score.value) for score in scores]),
        ("flexible-extract", [(score.details["flexible_extracted"], float(score.details["flexible"])) for score in scores]),
    ):
        theirs = []
        for request in published.instances:
            found = request.filtered_resps[name]
            verdict = published.process_results(request.doc, [found])["exact_match"]
            theirs.append((None if found == "[invalid]" else found, float(verdict)))
        assert ours == theirs
        assert 0.2 < sum(verdict for _, verdict in theirs) / len(theirs) < 0.8  # both verdicts were tried
