"""MBPP: what is asked, what is checked, and the published solutions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gsil_bench.errors import UserError
from gsil_bench.tasks.mbpp import CHAT_V1, LM_EVAL_V1, SANITIZED_CHAT_V1, Mbpp, asked_names
from gsil_bench.tasks.task import ScoringResources, Split, Task

CONSENT = ScoringResources(workers=2, allow_code_execution=True)
ROW: dict[str, Any] = {
    "task_id": 700,
    "text": "Write a function to add one.",
    "code": "class Box:\r\n  def __init__(self, v): self.v = v\r\ndef inc(x):\r\n  return Box(x).v + 1",
    "test_list": ["assert inc(1) == 2", "assert inc(-1) == 0", "assert inc(Box(4).v) == 5"],
    "test_setup_code": "",
    "challenge_test_list": ["assert inc(10**30) == 10**30 + 1"],
}


def test_text_question() -> None:
    shot = {**ROW, "text": "Shot.", "code": "a\r\nb"}
    question = LM_EVAL_V1.question(ROW, [shot])
    tests = "assert inc(1) == 2\nassert inc(-1) == 0\nassert inc(Box(4).v) == 5"
    start = "You are an expert Python programmer, and here is your task: "
    assert question == (
        f"{start}Shot. Your code should pass these tests:\n\n{tests}\n[BEGIN]\na\r\nb\n[DONE]\n\n"
        f"{start}Write a function to add one. Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def test_protocols() -> None:
    for task in (LM_EVAL_V1, CHAT_V1):
        assert isinstance(task, Task) and task.runs_code and task.name == task.protocol.name
    assert (LM_EVAL_V1.protocol.form, LM_EVAL_V1.protocol.stops, LM_EVAL_V1.protocol.shots) == ("text", ("[DONE]",), 3)
    assert LM_EVAL_V1.protocol.max_new_tokens == 256  # lm-eval's default: its file names none


def test_names_that_an_answer_must_define() -> None:
    assert asked_names("def f(x): pass\ndef g(): pass", ["assert f(1) == set([2])"]) == ["f"]
    assert asked_names("def sum(a, b): pass", ["assert sum(1, 2) == 3"]) == ["sum"]


def test_scores() -> None:
    item = CHAT_V1._item(ROW, ())
    assert (item.id, item.published_id) == ("700", "700")
    box = "class Box:\n    def __init__(self, v):\n        self.v = v\n"
    answers = [
        f"Sure:\n```python\n{box}def inc(x):\n    return x + 1\n```",
        f"{box}def inc(x):\n    return x + 1 if x < 100 else 0",
        f"```python\n{box}```\n```python\ndef inc(x):\n    return x\n```",
        "",
    ]
    scores = CHAT_V1.score([item] * 4, [(answer,) for answer in answers], CONSENT)
    assert [score.value for score in scores] == [1.0, 1.0, 0.0, 0.0]
    assert [score.details.get("challenge") for score in scores] == [True, False, None, None]
    assert scores[2].reason == "AssertionError: line 1 of the checks: assert inc(1) == 2"


def test_the_text_protocol_takes_the_answer_as_it_is() -> None:
    item = LM_EVAL_V1._item(ROW, ())
    fenced = CHAT_V1._item(ROW, ()).gold
    assert [score.value for score in LM_EVAL_V1.score([item] * 2, [item.gold, fenced], CONSENT)] == [1.0, 0.0]


def test_no_consent_no_run() -> None:
    with pytest.raises(UserError, match="pass --allow-code-execution"):
        CHAT_V1.score([], [], ScoringResources())


def test_unknown_split() -> None:
    with pytest.raises(UserError, match="unknown split of MBPP 'tests': did you mean 'test'"):
        CHAT_V1.items("tests", None)  # type: ignore[arg-type]


def test_the_verified_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the published layout; the published bytes are not at hand. Imports of the tests are the checks' own."""
    rows = [
        {"source_file": "a.ipynb", "task_id": number, "prompt": "Write a function to halve.", "code": "def half(x): return x / 2",
         "test_imports": ["import math"], "test_list": ["assert math.isclose(half(3), 1.5)"]}
        for number in (2, 11, 510, 511, 601)
    ]  # fmt: skip
    path = tmp_path / "verified.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setattr("gsil_bench.tasks.mbpp.locate", lambda source, data_dir: path)
    assert [[item.id for item in SANITIZED_CHAT_V1.items(split, None)] for split in ("train", "dev", "test")] == [
        ["601"], ["511"], ["11", "510"],
    ]  # fmt: skip
    item = SANITIZED_CHAT_V1.items("test", None)[0]
    assert item.turns[0].startswith("Write a function to halve. Your code must pass these tests:\n\n```python\nassert math.")
    answers = [item.gold, ("def half(x): return x // 2",)]
    assert [score.value for score in SANITIZED_CHAT_V1.score([item] * 2, answers, CONSENT)] == [1.0, 0.0]


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "mbpp/sanitized-mbpp.json").write_text("[]")
    with pytest.raises(UserError, match="sha256"):
        SANITIZED_CHAT_V1.items("test", tmp_path)


@pytest.fixture(scope="module")
def data() -> Path:
    """The folder with the published file; nothing is downloaded."""
    beside = Path(__file__).resolve().parents[2] / "shared/data"
    for folder in (Path(os.environ.get("GSIL_BENCH_DATA") or beside), beside):
        if (folder / "mbpp/mbpp.jsonl").is_file():
            return folder
    pytest.skip("MBPP is not at hand: set GSIL_BENCH_DATA to a folder with mbpp/mbpp.jsonl")


@pytest.mark.data
@pytest.mark.parametrize("task", [LM_EVAL_V1, CHAT_V1], ids=lambda task: task.name)
@pytest.mark.parametrize(("split", "count"), [("test", 500), ("dev", 90), ("train", 374)])
def test_published_solutions_pass(task: Mbpp, split: Split, count: int, data: Path) -> None:
    items = task.items(split, data)
    with_gold = [item for item in items if item.gold]
    unpassable = [item.id for item in items if not item.gold]
    assert len(items) == count
    assert unpassable == ([] if task is CHAT_V1 else {"test": ["367"], "dev": [], "train": ["927"]}[split])
    assert {score.value for score in task.score(with_gold, [item.gold for item in with_gold], CONSENT)} == {1.0}


@pytest.mark.data
@pytest.mark.parametrize("task", [LM_EVAL_V1, CHAT_V1], ids=lambda task: task.name)
def test_empty_answers_fail(task: Mbpp, data: Path) -> None:
    items = task.items("dev", data)
    assert {score.value for score in task.score(items, [("",)] * len(items), CONSENT)} == {0.0}


@pytest.mark.data
def test_prompts_are_lm_evals(data: Path) -> None:
    """Rendered by lm-eval's own template engine from its own files."""
    lm_eval = pytest.importorskip("lm_eval")
    import ast
    import re

    from lm_eval.utils import apply_template

    folder = Path(lm_eval.__file__).parent / "tasks/mbpp"
    text = (folder / "mbpp.yaml").read_text()
    template = json.loads(re.search(r"^doc_to_text: (\".*\")$", text, re.M).group(1))  # type: ignore[union-attr]
    target = json.loads(re.search(r"^doc_to_target: (\".*\")$", text, re.M).group(1))  # type: ignore[union-attr]
    tree = ast.parse((folder / "utils.py").read_text())
    space: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            exec(compile(ast.Module([node], []), "utils", "exec"), space)
    shots = "".join(
        apply_template(template, shot) + apply_template(target, shot) + "\n\n" for shot in space["list_fewshot_samples"]()
    )
    rows = {row["task_id"]: row for row in map(json.loads, (data / "mbpp/mbpp.jsonl").open(encoding="utf-8"))}
    for item in LM_EVAL_V1.items("test", data):
        assert item.turns[0] == shots + apply_template(template, rows[int(item.id)])
