"""HumanEval: pass@k, what each protocol asks and takes, and that no wrapping of a correct answer makes it wrong."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gsil_bench.errors import UserError
from gsil_bench.tasks import humaneval
from gsil_bench.tasks.code_answers import complete, standalone
from gsil_bench.tasks.humaneval import (
    CHAT_V1,
    CHAT_V1_SAMPLED,
    EURUS_SCRIPT,
    HUMAN_EVAL,
    LM_EVAL_BASE,
    LM_EVAL_INSTRUCT,
    HumanEval,
    mean_pass_at_k,
    pass_at_k,
)
from gsil_bench.tasks.task import Item, ScoringResources, Task

CONSENT = ScoringResources(workers=2, allow_code_execution=True)
TASKS = (HUMAN_EVAL, LM_EVAL_BASE, LM_EVAL_INSTRUCT, EURUS_SCRIPT, CHAT_V1, CHAT_V1_SAMPLED)


# --- pass@k ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (5, 2, 1, 0.4),  # c / n
        (5, 2, 2, 0.7),  # 1 - C(3,2)/C(5,2) = 1 - 3/10
        (5, 2, 3, 0.9),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (5, 2, 4, 1.0),  # three wrong ones cannot fill four places
        (10, 3, 5, 11 / 12),  # 1 - C(7,5)/C(10,5) = 1 - 21/252
        (4, 0, 4, 0.0),
        (4, 4, 2, 1.0),
        (200, 1, 100, 0.5),  # the right one is among half of the answers
    ],
)
def test_pass_at_k(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_keeps_small_values() -> None:
    # 1 - C(9999,1)/C(10000,1) = 1/10000, to the last digit; a product of floats loses some.
    assert pass_at_k(10_000, 1, 1) == 1e-4


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0), (0, 0, 1)])
def test_pass_at_k_of_numbers_that_do_not_fit(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="cannot be estimated"):
        pass_at_k(n, c, k)


def test_mean_pass_at_k() -> None:
    assert mean_pass_at_k([(5, 2), (5, 0), (2, 2)], 2) == pytest.approx((0.7 + 0 + 1) / 3)
    with pytest.raises(ValueError, match="no problems"):
        mean_pass_at_k([], 1)


# --- the protocols, on a problem of our own --------------------------------------------------------------------------------

ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef add_all(xs: List[int]) -> int:\n    """ Sum.\n    >>> add_all([1])\n    """\n',
    "entry_point": "add_all",
    "canonical_solution": "    return sum(xs)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}


def test_questions() -> None:
    prompt = ROW["prompt"]
    assert LM_EVAL_BASE._item(ROW).turns == HUMAN_EVAL._item(ROW).turns == (prompt,)
    instruct = LM_EVAL_INSTRUCT._item(ROW)
    start = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
    assert instruct.turns == (start + prompt + "\n```\n",)
    assert instruct.opening == "Here is the completed function:\n```python\n" + prompt + "\n"
    eurus = EURUS_SCRIPT._item(ROW)
    assert eurus.turns == (
        "Write Python code to solve the task.\nWrite a Python function `add_all(xs: List[int]) -> int` to solve the following "
        "problem: Present code in ```python```\n```python\n" + prompt + "```\n",
    )
    assert eurus.opening == " ```python\ndef"
    assert prompt.rstrip() in CHAT_V1._item(ROW).turns[0]


def test_protocols_are_what_they_say() -> None:
    stops = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    for task in (LM_EVAL_BASE, LM_EVAL_INSTRUCT):
        assert (task.protocol.stops, task.protocol.max_new_tokens, task.protocol.temperature) == (stops, 1024, 0.0)
    assert LM_EVAL_BASE.protocol.form == "text" and LM_EVAL_INSTRUCT.protocol.form == "chat"
    assert (EURUS_SCRIPT.protocol.temperature, EURUS_SCRIPT.protocol.samples) == (0.2, 1)
    assert (CHAT_V1_SAMPLED.protocol.temperature, CHAT_V1_SAMPLED.protocol.samples) == (0.2, 20)
    for task in TASKS:
        assert isinstance(task, Task)
        assert task.name == task.protocol.name and task.runs_code
        assert task.protocol.data == {"humaneval/HumanEval.jsonl.gz": humaneval.HUMANEVAL_TEST.sha256}
        assert task.summary and task.protocol.prompt and task.protocol.extraction


def scores(task: HumanEval, *answers: str) -> list[float | None]:
    item = task._item(ROW)
    return [score.value for score in task.score([item] * len(answers), [(answer,) for answer in answers], CONSENT)]


def test_what_each_protocol_takes_from_an_answer() -> None:
    right, wrong = "    return sum(xs)\n", "    return 0\n"
    assert scores(HUMAN_EVAL, right, wrong, "", "return sum(xs)\n", f"```python\n{right}```") == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores(LM_EVAL_INSTRUCT, right + "```\nprose", right, wrong + "```", f"```\n{right}") == [1.0, 1.0, 0.0, 0.0]
    assert scores(EURUS_SCRIPT, " add_all(xs):\n    return sum(xs)\n```\n", "add_all(xs): return sum(xs)", right) == [
        1.0,
        1.0,
        0.0,
    ]
    assert scores(CHAT_V1, right, f"Sure:\n```python\n{right}```", wrong, "") == [1.0, 1.0, 0.0, 0.0]


def test_details() -> None:
    item = CHAT_V1._item(ROW)
    answers = [item.gold, ("",), ("I cannot.",), ("class A:\n    def __eq__(s, o): return True\ndef add_all(xs): return A()",)]
    good, empty, prose, cheat = CHAT_V1.score([item] * 4, answers, CONSENT)
    expected = {"passed": True, "format_ok": True, "empty": False, "timeout": False, "integrity_flag": False, "n": 1, "c": 1}
    assert good.details == expected
    assert empty.details == {**expected, "passed": False, "format_ok": False, "empty": True, "c": 0}
    assert prose.details["format_ok"] is False
    assert cheat.value == 0.0 and cheat.details["integrity_flag"] is True
    json.dumps(cheat.details)


def test_no_consent_no_run() -> None:
    item = CHAT_V1._item(ROW)
    with pytest.raises(UserError, match=r"task humaneval/chat-v1 runs generated code: .* --allow-code-execution"):
        CHAT_V1.score([item], [item.gold], ScoringResources())


def test_other_splits() -> None:
    with pytest.raises(UserError, match="HumanEval has no dev split"):
        CHAT_V1.items("dev", None)


# --- extraction ------------------------------------------------------------------------------------------------------------

WHOLE = "def f(x):\n    y = x\n    return y + 1\n"
PROMPT = 'import math\n\n\ndef f(x):\n    """ Add one. """\n'


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE,
        f"```python\n{WHOLE}```",
        f"```\n{WHOLE}```",
        f"```Python3\n{WHOLE}```",
        f"```{{.python}}\n{WHOLE}```".replace("{.python}", "python title=x"),
        f"~~~py\n{WHOLE}~~~",
        f"````python\n{WHOLE}````",
        f"```python\n{WHOLE}",
        f"{WHOLE}```\nThat is all.",
        f"Here:\n\n```python\n{WHOLE}```\n\nUse it:\n\n```python\nprint(f(int(input())))\n```\n",
        f"```bash\npip install numpy\n```\n```python\n{WHOLE}```",
        f"First try:\n```python\ndef f(x):\n    return x\n```\nThat is wrong. Better:\n```python\n{WHOLE}```",
        "```python\ndef one():\n    return 1\n```\nand\n```python\ndef f(x):\n    return x + one()\n```",
        "```python\nimport operator\n```\n```python\ndef f(x):\n    return operator.add(x, 1)\n```",
        textwrap.indent(f"```python\n{WHOLE}```", "   "),
        "1. Write it:\n\n" + textwrap.indent(f"```python\n{WHOLE}```\n", "    "),
        f"Sure! Here is the function:\n\n{WHOLE}\nIt adds one to x.",
        f"Sure! Here is the function:\n{WHOLE}It's done; don't worry.",
        f"{WHOLE}\nassert f(1) == 3, 'my own wrong test'\nprint(f(input()))",
        f"{WHOLE}\nif __name__ == '__main__':\n    print(f(int(input())))\n",
        f"from __future__ import annotations\n{WHOLE}",
        "f = lambda x: x + 1",
        "def f(x):\n\ty = x\n\treturn y + 1\n",
        "def f(x):\n    return math.floor(x) + 1",
        WHOLE.replace("\n", "\r\n"),
        WHOLE.replace("    ", "\u00a0\u00a0\u00a0\u00a0"),
        f"\ufeff{WHOLE}",
        "    return x + 1\n",
        "return x + 1",
        "   return x + 1\n",
        " return x + 1",
        "y = x\n    return y + 1\n",
        "y = x\nreturn y + 1\n",
        "  y = x\n  return y + 1\n",
        "y = x\n  return y + 1\n",
        "        y = x\n        return y + 1\n",
        "\ty = x\n\treturn y + 1\n",
        "if x:\n        return x + 1\n    return 1\n",
        "if x:\n    return x + 1\nreturn 1\n",
        "```python\n    return x + 1\n```",
        "```python\nreturn x + 1\n```",
        "    return x + 1\n\nThis adds one.\n",
        "    return x + 1\n```\nThis adds one.\n",
        "    def g(y):\n        return y + 1\n    return g(x)\n",
        "def g(y):\n        return y + 1\n    return g(x)\n",
        f"{PROMPT}    return x + 1\n",
        f">>> Answer\n```python\n{PROMPT}    return x + 1\n```",
        "> ```python\n> def f(x):\n>     return x + 1\n> ```",
    ],
)
def test_programs_are_found(answer: str) -> None:
    """Trusted texts, so they are executed here; the value is what `f` says of 1 and 5."""
    found = complete(answer, PROMPT, "f")
    space: dict[str, Any] = {"__name__": "answer"}
    exec(found.text, space)
    assert (space["f"](1), space["f"](5)) == (2, 6), found.text
    assert found.format_ok


@pytest.mark.parametrize(
    "answer", ["", "   \n", "I am sorry, I cannot do that.", "```python\n```", "def g(x): return 1", "```", "def f("]
)
def test_what_is_no_program_is_not_taken_for_one(answer: str) -> None:
    found = complete(answer, PROMPT, "f")
    assert not found.format_ok
    assert not standalone(answer, ["f"]).format_ok


@pytest.mark.parametrize(
    "piece", ["```\n", "~~~", "def f(x):\n", "(", "\n    x", "> ", "```python\ndef f(x):\n    pass\n", "\x00", "é"]
)
def test_long_answers_are_read(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    assert isinstance(complete(text, PROMPT, "f").text, str)


# --- the real problems -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Path:
    """The folder with the published file; nothing is downloaded."""
    beside = Path(__file__).resolve().parents[2] / "shared/data"
    for folder in (Path(os.environ.get("GSIL_BENCH_DATA") or beside), beside):
        if (folder / "humaneval/HumanEval.jsonl.gz").is_file():
            return folder
    pytest.skip("HumanEval is not at hand: set GSIL_BENCH_DATA to a folder with humaneval/HumanEval.jsonl.gz")


def parts(item: Item) -> tuple[str, str, str]:
    """Prompt, entry point and canonical body of a problem."""
    (gold,) = HUMAN_EVAL_GOLD[item.id]
    return item.reference["prompt"], item.reference["entry_point"], gold


HUMAN_EVAL_GOLD: dict[str, tuple[str, ...]] = {}


def _function(prompt: str, entry: str, body: str) -> str:
    """Only the function that is asked for: no imports and no helpers."""
    return prompt[prompt.index(f"def {entry}") :] + body


def _without_docstring(prompt: str, entry: str, body: str) -> str:
    signature = re.match(r"def[^\n]*\n", _function(prompt, entry, ""))
    assert signature is not None
    return signature.group() + body


def _strip_levels(body: str) -> str:
    return body.lstrip()


TRANSFORMATIONS: dict[str, Callable[[str, str, str], str]] = {
    "body": lambda p, e, b: b,
    "body, stripped": lambda p, e, b: b.strip(),
    "body, first indentation lost": lambda p, e, b: _strip_levels(b),
    "body, one leading space lost": lambda p, e, b: b[1:],
    "body, dedented": lambda p, e, b: textwrap.dedent(b),
    "body, indented by eight": lambda p, e, b: textwrap.indent(b, "    "),
    "body in a fence": lambda p, e, b: f"```python\n{b}```",
    "body in a fence, stripped": lambda p, e, b: f"```python\n{b.strip()}\n```",
    "body, then a closing fence and prose": lambda p, e, b: f"{b}```\n\nThis solves it, doesn't it?",
    "body, then prose": lambda p, e, b: f"{b}\n\nThis solves it, doesn't it?\n",
    "whole program": lambda p, e, b: p + b,
    "whole program in a fence": lambda p, e, b: f"```python\n{p}{b}```",
    "fence never closed": lambda p, e, b: f"Sure!\n```python\n{p}{b}",
    "fence py": lambda p, e, b: f"```py\n{p}{b}```",
    "fence of tildes": lambda p, e, b: f"~~~\n{p}{b}~~~",
    "only the function": _function,
    "only the function in a fence": lambda p, e, b: f"Here it is:\n\n```python\n{_function(p, e, b)}```\nHope it helps!",
    "without docstring": lambda p, e, b: f"```python\n{_without_docstring(p, e, b)}```",
    "prose without a fence": lambda p, e, b: f"Sure, here is the code:\n\n{_function(p, e, b)}\n\nIt runs in linear time.",
    "examples that read input": lambda p, e, b: f"```python\n{p}{b}\n\nprint({e}(input()))\nassert {e}() == 1\n```",
    "main block": lambda p, e, b: f"```python\n{p}{b}\n\nif __name__ == '__main__':\n    main()\n```",
    "usage in a second fence": lambda p, e, b: f"```python\n{p}{b}```\n\nUsage:\n\n```python\nprint({e}(1, 2))\n```\n",
    "output in a second fence": lambda p, e, b: f"```python\n{p}{b}```\n\nOutput:\n\n```\nTrue\n```\n",
    "a wrong first try": lambda p, e, b: f"```python\ndef {e}(*args):\n    pass\n```\nNo:\n```python\n{p}{b}```",
    "carriage returns": lambda p, e, b: f"```python\n{p}{b}```".replace("\n", "\r\n"),
    "in a list item": lambda p, e, b: "1. Code:\n\n" + textwrap.indent(f"```python\n{p}{b}```", "   "),
    "leading blank lines": lambda p, e, b: f"\n\n\n{p}{b}",
}


@pytest.fixture(scope="module")
def items(data: Path) -> list[Item]:
    found = list(HUMAN_EVAL.items("test", data))
    HUMAN_EVAL_GOLD.update({item.id: item.gold for item in found})
    return found


@pytest.mark.data
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations_of_correct_answers_pass(name: str, items: list[Item]) -> None:
    answers = [(TRANSFORMATIONS[name](*parts(item)),) for item in items]
    failed = {
        item.id: (score.reason, answer[0][-300:])
        for item, answer, score in zip(items, answers, CHAT_V1.score(items, answers, CONSENT), strict=True)
        if score.value != 1.0
    }
    assert len(items) == 164
    assert failed == {}


@pytest.mark.data
@pytest.mark.parametrize(
    "wrong", ["    return None\n", "def {entry}(*args):\n    return None\n", "```python\n    pass\n```", "    raise SystemExit\n"]
)
def test_wrong_answers_do_not_pass(wrong: str, items: list[Item]) -> None:
    answers = [(wrong.replace("{entry}", item.reference["entry_point"]),) for item in items]
    assert {score.value for score in CHAT_V1.score(items, answers, CONSENT)} == {0.0}


@pytest.mark.data
def test_objects_that_equal_everything_pass_nothing(items: list[Item]) -> None:
    """In human-eval's own runner 157 of the 164 pass."""
    cheat = "    class A:\n        def __eq__(self, other): return True\n    return A()\n"
    found = HUMAN_EVAL.score(items, [(cheat,)] * 164, CONSENT)
    assert {score.value for score in found} == {0.0}
    assert sum(score.details["integrity_flag"] for score in found) > 120


@pytest.mark.data
@pytest.mark.parametrize("task", TASKS[:5], ids=lambda task: task.name)
def test_canaries(task: HumanEval, data: Path) -> None:
    some = task.items("test", data)
    assert [item.published_id for item in some] == [f"HumanEval/{i}" for i in range(164)]
    assert {score.value for score in task.score(some, [item.gold for item in some], CONSENT)} == {1.0}
    assert {score.value for score in task.score(some, [("",)] * 164, CONSENT)} == {0.0}
    assert not any(stop in item.gold[0] for item in some for stop in task.protocol.stops)


@pytest.mark.data
def test_prompts_are_lm_evals(data: Path) -> None:
    """Rendered by lm-eval's own template engine from its own files."""
    lm_eval = pytest.importorskip("lm_eval")
    yaml = pytest.importorskip("yaml")
    from lm_eval.utils import apply_template

    folder = Path(lm_eval.__file__).parent / "tasks/humaneval"

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    base = yaml.load((folder / "humaneval.yaml").read_text(), Loader)
    instruct = yaml.load((folder / "humaneval_instruct.yaml").read_text(), Loader)
    assert (base["metadata"]["version"], instruct["metadata"]["version"]) == (1.0, 4.0)
    settings = base["generation_kwargs"]
    for task, source in ((LM_EVAL_BASE, base), (LM_EVAL_INSTRUCT, base | instruct)):
        assert list(task.protocol.stops) == settings["until"] and task.protocol.max_new_tokens == settings["max_gen_toks"]
        for item in task.items("test", data):
            assert item.turns[0] == apply_template(source["doc_to_text"], item.reference)
            assert item.opening == apply_template(source.get("gen_prefix", ""), item.reference)
