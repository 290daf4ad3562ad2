"""GSM8K: the scorer on right, wrong, empty and hostile answers, and the real gold answers where the data is at hand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsil_bench.data import sources
from gsil_bench.errors import UserError
from gsil_bench.tasks import gsm8k, load_task
from gsil_bench.tasks.gsm8k import GSM8K, score_answer
from gsil_bench.tasks.task import ScoringResources, Task

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


@pytest.mark.parametrize("text", ["#### ", "1,", "-$", "18 ", "####", "$", "1.", "9"])
def test_long_hostile_answers_are_read_in_linear_time(text: str) -> None:
    start = time.monotonic()
    score_answer(text * (500_000 // len(text)), GOLD)
    assert time.monotonic() - start < 2


@given(st.text())
def test_any_text_gets_a_score(answer: str) -> None:
    assert score_answer(answer, GOLD).value in (0.0, 1.0)


@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc .\n=+", max_size=20))
def test_any_integer_is_recognised(number: int, words: str) -> None:
    assert score_answer(f"{words}#### {number:,}", f"#### {number}").value == 1.0
    assert score_answer(f"{words}#### {number + 1:,}", f"#### {number}").value == 0.0


# --- the task --------------------------------------------------------------------------------------------------------------


def test_task_record() -> None:
    task = load_task("gsm8k")
    assert task is GSM8K
    assert isinstance(task, Task)
    assert (task.name, task.metric, task.best, task.worst, task.runs_code) == ("gsm8k", "accuracy", 1.0, 0.0, False)
    assert task.protocol.name == "gsm8k/chat-0shot-v1"
    assert (task.protocol.max_new_tokens, task.protocol.temperature, task.protocol.samples) == (256, 0.0, 1)
    assert task.summary and "\n" not in task.summary


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


def test_items(toy_data: Path) -> None:
    items = GSM8K.items("test", toy_data)
    assert len(items) == 61
    first = items[0]
    assert first.turns == ("What is 0 + 0?",)
    assert first.gold == (ROWS[0]["answer"],)
    assert first.reference == {"gold": ROWS[0]["answer"]}
    assert first.id == hashlib.sha256(f"{ROWS[0]['question']}\n{ROWS[0]['answer']}".encode()).hexdigest()[:16]
    assert items[-1].turns == ("A line\u2028break?",)
    assert items == GSM8K.items("test", toy_data)


def test_dev_is_held_out_of_train(toy_data: Path) -> None:
    train, dev = GSM8K.items("train", toy_data), GSM8K.items("dev", toy_data)
    both = {item.id for item in train} | {item.id for item in dev}
    assert len(both) == len(train) + len(dev) == 61
    assert all(int(item.id, 16) % 15 == 0 for item in dev)
    assert not any(int(item.id, 16) % 15 == 0 for item in train)


def test_canaries(toy_data: Path) -> None:
    items = GSM8K.items("test", toy_data)
    gold = GSM8K.score(items, [item.gold for item in items], ScoringResources())
    empty = GSM8K.score(items, [("",)] * len(items), ScoringResources())
    assert {score.value for score in gold} == {1.0}
    assert {score.value for score in empty} == {0.0}


def test_answers_must_match_the_items(toy_data: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        GSM8K.score(GSM8K.items("test", toy_data), [("#### 1",)], ScoringResources())


def test_unknown_split(toy_data: Path) -> None:
    with pytest.raises(UserError, match="unknown split of gsm8k 'tests': did you mean 'test'"):
        GSM8K.items("tests", toy_data)  # type: ignore[arg-type]


# --- the real data ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_data() -> Path:
    """The folder with the real files; nothing is downloaded."""
    beside = Path(__file__).resolve().parents[2] / "shared/data"
    for folder in (Path(os.environ.get("GSIL_BENCH_DATA") or beside), beside):
        if (folder / "gsm8k/test.jsonl").is_file() and (folder / "gsm8k/train.jsonl").is_file():
            return folder
    pytest.skip("GSM8K is not at hand: set GSIL_BENCH_DATA to a folder with gsm8k/test.jsonl and gsm8k/train.jsonl")


@pytest.mark.data
def test_real_gold_answers_are_all_right(real_data: Path) -> None:
    ids = []
    for split, count in (("test", 1319), ("train", 6935), ("dev", 538)):
        items = GSM8K.items(split, real_data)  # type: ignore[arg-type]
        scores = GSM8K.score(items, [item.gold for item in items], ScoringResources())
        assert len(items) == count
        assert {score.value for score in scores} == {1.0}
        assert all(score.details["format_ok"] and score.details["flexible"] for score in scores)
        ids += [item.id for item in items]
    assert len(set(ids)) == len(ids) == 1319 + 7473


@pytest.mark.data
def test_real_answers_to_other_questions_are_mostly_wrong(real_data: Path) -> None:
    items = GSM8K.items("test", real_data)
    shifted = [item.gold for item in [*items[1:], items[0]]]
    values = [score.value or 0.0 for score in GSM8K.score(items, shifted, ScoringResources())]
    assert sum(values) / len(values) < 0.05
