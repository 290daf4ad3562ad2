"""HumanEval: 164 Python functions to write from signature and docstring; an answer passes if all tests of its problem hold.

The protocols differ in how the model is asked and in what is taken out of its answer; tests and sandbox are the same for all.

- human-eval: the prompt as it is, the completion as it is. What the published harness does with a file of samples.
- lm-eval-base: the same prompt, with lm-eval's stops, greedy. Task `humaneval` version 1.0 of lm-eval 0.4.13.
- lm-eval-instruct-v4: a request in chat; the answer is made to begin with a fence and the prompt. `humaneval_instruct` 4.0.
- eurus: the script of Eurus that GSIL's numbers come from: chat, the answer begins with a fence and "def", one sample at T 0.2.
- chat-v1: ours. A plain request; the program is found in the answer however it is wrapped (`code_answers`).
- chat-v1-sampled: the same with 20 samples at temperature 0.2, for pass@k.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gsil_bench.data.sources import HUMANEVAL_TEST, locate
from gsil_bench.errors import UserError
from gsil_bench.tasks.code_answers import FoundProgram, complete
from gsil_bench.tasks.programs import CheckedProgram, CheckedResult, run_programs
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources, Split, require_consent

FENCE = "```"
LM_EVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
Row = Mapping[str, Any]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of the probability that at least one of k answers is right: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: how many answers there are (n).
        correct: how many of them are right (c).
        k: how many may be tried; at most n.

    Raises:
        ValueError: the numbers do not fit together.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} cannot be estimated from {correct} of {samples} answers")
    # Integers of any size and one division, so that nothing is lost and nothing overflows.
    return (math.comb(samples, k) - math.comb(samples - correct, k)) / math.comb(samples, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """The mean over problems of `pass_at_k`; counts are (samples, correct) per problem.

    Raises:
        ValueError: a problem has fewer than k samples, or there is none.
    """
    if not counts:
        raise ValueError("pass@k of no problems")
    return math.fsum(pass_at_k(samples, correct, k) for samples, correct in counts) / len(counts)


def score_of(found: FoundProgram, answer: str, result: CheckedResult) -> Score:
    """The score of one answer whose program was run. `n` and `c` are its part of the counts that pass@k is made of."""
    details = {
        "passed": result.passed,
        "format_ok": found.format_ok,
        "empty": not answer.strip(),
        "timeout": result.verdict == "timeout",
        "integrity_flag": result.integrity_flag,
        "n": 1,
        "c": int(result.passed),
    }
    return Score(float(result.passed), result.reason, details)


# ---------------------------------------------------------------------------------------------------------------------------
# How each protocol asks, and what it takes from the answer


@dataclass(frozen=True)
class Style:
    """How a problem becomes a question, and an answer a program."""

    question: Callable[[Row], str]
    program: Callable[[Row, str], FoundProgram]
    gold: Callable[[Row], str]
    opening: Callable[[Row], str] = lambda row: ""


def _as_it_is(row: Row, answer: str) -> FoundProgram:
    return FoundProgram(row["prompt"] + answer, bool(answer.strip()))


def _to_the_fence(row: Row, answer: str) -> FoundProgram:
    return _as_it_is(row, answer.partition(FENCE)[0])


def _after_def(row: Row, answer: str) -> FoundProgram:
    """As the script does: "def " before the answer, and human-eval's runner puts the prompt before that."""
    return FoundProgram(row["prompt"] + "def " + answer.partition(FENCE)[0], bool(answer.strip()))


def _found(row: Row, answer: str) -> FoundProgram:
    return complete(answer, row["prompt"], row["entry_point"])


def _instruct_question(row: Row) -> str:
    return f"Write a solution to the following problem and make sure that it passes the tests:\n```python\n{row['prompt']}\n```\n"


def _eurus_question(row: Row) -> str:
    match = re.search(rf"def\s+({row['entry_point']}.*?):\s*\n", row["prompt"])
    if match is None:
        raise UserError(f"the prompt of {row['task_id']} has no line that begins the function {row['entry_point']}")
    return (
        "Write Python code to solve the task.\n"
        f"Write a Python function `{match.group(1)}` to solve the following problem: Present code in ```python```\n"
        f"```python\n{row['prompt']}```\n"
    )


def _chat_question(row: Row) -> str:
    return (
        "Complete this Python function. Answer with one fenced code block that holds the whole function and everything it needs, "
        f"without tests and examples.\n\n```python\n{row['prompt'].rstrip()}\n```"
    )


def _whole(row: Row) -> str:
    return str(row["prompt"] + row["canonical_solution"])


RAW = Style(lambda row: str(row["prompt"]), _as_it_is, lambda row: str(row["canonical_solution"]))
INSTRUCT = Style(
    _instruct_question,
    _to_the_fence,
    lambda row: row["canonical_solution"] + FENCE,
    lambda row: f"Here is the completed function:\n```python\n{row['prompt']}\n",
)
EURUS = Style(
    _eurus_question,
    _after_def,
    lambda row: _whole(row)[row["prompt"].index(f"def {row['entry_point']}") + len("def") :] + FENCE,
    lambda row: " ```python\ndef",
)
CHAT = Style(_chat_question, _found, lambda row: f"```python\n{_whole(row)}```\n")


# ---------------------------------------------------------------------------------------------------------------------------
# The task


@dataclass(frozen=True)
class HumanEval:
    """HumanEval under one protocol, on the published file."""

    name: str
    summary: str
    protocol: AnswerProtocol
    style: Style
    version: str = "1"
    metric: str = "pass@1"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = True

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        """The 164 problems, in the order of the published file. There is only a test split."""
        if split == "train":
            return ()
        if split != "test":
            raise UserError(f"HumanEval has no {split} split: use test, or MBPP for developing")
        with gzip.open(locate(HUMANEVAL_TEST, data_dir), "rt", encoding="utf-8") as lines:
            return [self._item(json.loads(line)) for line in lines]

    def _item(self, row: Row) -> Item:
        return Item(
            id=row["task_id"],
            published_id=row["task_id"],
            turns=(self.style.question(row),),
            opening=self.style.opening(row),
            reference={key: row[key] for key in ("prompt", "entry_point", "test")},
            gold=(self.style.gold(row),),
        )

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """One score per item, after running all programs.

        Raises:
            UserError: the user did not consent to running generated code, or it cannot be confined here.
        """
        require_consent(self, resources.allow_code_execution)
        pairs = list(zip(items, answers, strict=True))
        found = [self.style.program(item.reference, answer[0]) for item, answer in pairs]
        programs = [_checked(item.reference, program.text) for item, program in zip(items, found, strict=True)]
        results = run_programs(programs, resources.workers)
        return [score_of(one, answer[0], result) for one, (_, answer), result in zip(found, pairs, results, strict=True)]


def _checked(row: Row, program: str) -> CheckedProgram:
    entry_point = row["entry_point"]
    return CheckedProgram(program, f"{row['test']}\ncheck({entry_point})", exports=(entry_point,))


DATA = {HUMANEVAL_TEST.path: HUMANEVAL_TEST.sha256}

HUMAN_EVAL = HumanEval(
    name="humaneval/human-eval",
    summary="164 functions, completed from the bare prompt, nothing cut: human-eval's own scoring of samples",
    protocol=AnswerProtocol(
        name="humaneval/human-eval",
        max_new_tokens=1024,
        form="text",
        prompt="the problem's prompt as it is",
        extraction="none: prompt + answer",
        data=DATA,
    ),
    style=RAW,
)

LM_EVAL_BASE = HumanEval(
    name="humaneval/lm-eval-base",
    summary="164 functions, completed from the bare prompt as lm-eval's task humaneval 1.0 does",
    protocol=AnswerProtocol(
        name="humaneval/lm-eval-base",
        max_new_tokens=1024,
        form="text",
        stops=LM_EVAL_STOPS,
        prompt="the problem's prompt as it is",
        extraction="none: prompt + answer up to the first stop",
        data=DATA,
    ),
    style=RAW,
)

LM_EVAL_INSTRUCT = HumanEval(
    name="humaneval/lm-eval-instruct-v4",
    summary="164 functions, asked for in chat with the beginning of the answer given, as lm-eval's humaneval_instruct 4.0 does",
    protocol=AnswerProtocol(
        name="humaneval/lm-eval-instruct-v4",
        max_new_tokens=1024,
        stops=LM_EVAL_STOPS,
        prompt=_instruct_question({"prompt": "{prompt}"}),
        extraction="the answer begins after a fence and the prompt; prompt + answer up to the first ```",
        data=DATA,
    ),
    style=INSTRUCT,
)

EURUS_SCRIPT = HumanEval(
    name="humaneval/eurus",
    summary="164 functions, asked for as the Eurus script behind GSIL's numbers does: one sample at temperature 0.2",
    protocol=AnswerProtocol(
        name="humaneval/eurus",
        max_new_tokens=1024,
        temperature=0.2,
        stops=("<|eot_id|>",),
        prompt=_eurus_question({"prompt": "def f(…):\n…\n", "entry_point": "f", "task_id": "example"}),
        extraction='the answer begins after " ```python\\ndef"; prompt + "def " + answer up to the first ```',
        data=DATA,
    ),
    style=EURUS,
)

CHAT_V1 = HumanEval(
    name="humaneval/chat-v1",
    summary="164 functions, asked for plainly in chat; the program is found in the answer however it is wrapped",
    protocol=AnswerProtocol(
        name="humaneval/chat-v1",
        max_new_tokens=1024,
        prompt=_chat_question({"prompt": "{prompt}"}),
        extraction="code_answers.complete, version 1: last fenced block that defines the function, under the prompt; or a body",
        data=DATA,
    ),
    style=CHAT,
)

CHAT_V1_SAMPLED = replace(
    CHAT_V1,
    name="humaneval/chat-v1-sampled",
    summary="The same functions and request, 20 samples each at temperature 0.2: for pass@k",
    protocol=replace(CHAT_V1.protocol, name="humaneval/chat-v1-sampled", temperature=0.2, top_p=0.95, samples=20),
)
