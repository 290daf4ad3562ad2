"""MBPP: short Python functions to write from a sentence and three asserts, which the answer must satisfy.

- lm-eval-v1: three worked problems and the question as plain text, greedy, until "[DONE]". Task `mbpp` version 1.0 of lm-eval
  0.4.13. It leaves out the published set-up code, without which one test problem (367) cannot be passed. An answer has ten
  seconds here, three there.
- chat-v1: ours. A plain request; the program is found in the answer however it is wrapped, and the set-up code is run.
- sanitized-chat-v1: the same on the 427 problems that the authors verified by hand, whose texts and tests differ.

The splits are those of the paper, in both files: test is 11 to 510, dev 511 to 600, train 601 to 974; 2, 3 and 4 are the worked
problems.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsil_bench.data.sources import MBPP_FULL, MBPP_SANITIZED, Source, locate
from gsil_bench.errors import unknown_name
from gsil_bench.tasks.code_answers import FoundProgram, standalone
from gsil_bench.tasks.humaneval import score_of
from gsil_bench.tasks.programs import CheckedProgram, ProgramLimits, free_names, run_programs
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources, Split, require_consent

SPLITS: Mapping[str, range] = {"test": range(11, 511), "dev": range(511, 601), "train": range(601, 975)}
SHOTS = (2, 3, 4)
LIMITS = ProgramLimits(seconds=10.0, wall_seconds=30.0)
"""The published solution of problem 123 alone takes two seconds of processor time, and more on a busy machine."""
Row = Mapping[str, Any]


def _question(row: Row) -> str:
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _text_question(row: Row, shots: Sequence[Row]) -> str:
    worked = [f"{_question(shot)}{shot['code']}\n[DONE]\n\n" for shot in shots]
    return "".join(worked) + _question(row)


def _chat_question(row: Row, shots: Sequence[Row]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"{row['text'].strip()} Your code must pass these tests:\n\n```python\n{tests}\n```\n\n"
        "Answer with one fenced code block that holds the function and everything it needs, without the tests."
    )


def _as_it_is(row: Row, answer: str) -> FoundProgram:
    return FoundProgram(answer, bool(answer.strip()))


def _found(row: Row, answer: str) -> FoundProgram:
    return standalone(answer, row["names"])


def asked_names(code: str, tests: Sequence[str]) -> list[str]:
    """The names that tests call and the published solution defines: what an answer must define.

    Args:
        code: the published solution.
        tests: assert lines.
    """
    with warnings.catch_warnings():  # some solutions write "\d" without an r
        warnings.simplefilter("ignore")
        tree = ast.parse(code)
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return free_names("\n".join(tests), exports=sorted(defined)) if defined else []


@dataclass(frozen=True)
class Mbpp:
    """MBPP under one protocol, on the published file."""

    name: str
    summary: str
    protocol: AnswerProtocol
    question: Callable[[Row, Sequence[Row]], str]
    program: Callable[[Row, str], FoundProgram]
    sets_up: bool
    """Whether the published set-up code is run."""
    source: Source = MBPP_FULL
    version: str = "1"
    metric: str = "pass@1"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = True

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        """The problems of a split, in the order of the published file."""
        if split not in SPLITS:
            raise unknown_name("split of MBPP", split, SPLITS)
        rows = {row["task_id"]: row for row in _rows(self.source, data_dir)}
        shots = [rows[number] for number in SHOTS] if self.protocol.shots else []
        return [self._item(rows[number], shots) for number in SPLITS[split] if number in rows]

    def _item(self, row: Row, shots: Sequence[Row]) -> Item:
        code = row["code"].replace("\r\n", "\n")
        names = [name for name in asked_names(code, row["test_list"]) if f"{name}(" in "".join(row["test_list"])]
        setup = row["test_setup_code"].replace("\r\n", "\n") if self.sets_up else ""
        gold = f"```python\n{code}\n```" if self.protocol.form == "chat" else code
        return Item(
            id=str(row["task_id"]),
            published_id=str(row["task_id"]),
            turns=(self.question(row, shots),),
            reference={
                "names": names,
                "tests": list(row["test_list"]),
                "challenge_tests": list(row["challenge_test_list"]),
                "imports": list(row.get("test_imports", ())),
                "setup": setup,
            },
            gold=() if row["test_setup_code"] and not self.sets_up else (gold,),
        )

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """One score per item, after running all programs. `challenge` in the details: whether the harder tests hold too.

        Raises:
            UserError: the user did not consent to running generated code, or it cannot be confined here.
        """
        require_consent(self, resources.allow_code_execution)
        texts = [answer[0] for _, answer in zip(items, answers, strict=True)]
        found = [self.program(item.reference, text) for item, text in zip(items, texts, strict=True)]
        pairs = list(zip(items, found, strict=True))
        results = run_programs([_checked(item.reference, one, "tests") for item, one in pairs], resources.workers, LIMITS)
        scores = [score_of(one, text, result) for one, text, result in zip(found, texts, results, strict=True)]
        harder = [i for i, (item, _) in enumerate(pairs) if results[i].passed and item.reference["challenge_tests"]]
        challenged = [_checked(pairs[i][0].reference, pairs[i][1], "challenge_tests") for i in harder]
        for i, result in zip(harder, run_programs(challenged, resources.workers, LIMITS), strict=True):
            scores[i] = Score(scores[i].value, scores[i].reason, {**scores[i].details, "challenge": result.passed})
        return scores


def _checked(reference: Row, found: FoundProgram, tests: str) -> CheckedProgram:
    checks = "\n".join([*reference["imports"], *reference[tests]])
    return CheckedProgram(found.text, checks, tuple(reference["names"]), reference["setup"])


def _rows(source: Source, data_dir: Path | None) -> list[Row]:
    """The problems of a file, those of the verified one in the fields of the full one."""
    text = locate(source, data_dir).read_text(encoding="utf-8")
    if source is not MBPP_SANITIZED:
        return [json.loads(line) for line in text.split("\n") if line]
    return [{"text": row["prompt"], "test_setup_code": "", "challenge_test_list": (), **row} for row in json.loads(text)]


LM_EVAL_V1 = Mbpp(
    name="mbpp/lm-eval-v1",
    summary="500 short functions after three worked problems, as lm-eval's task mbpp 1.0 does",
    protocol=AnswerProtocol(
        name="mbpp/lm-eval-v1",
        max_new_tokens=256,
        form="text",
        stops=("[DONE]",),
        shots=3,
        prompt=_question({"text": "{text}", "test_list": ["{test 1}", "{test 2}", "{test 3}"]}),
        extraction="none: the answer up to [DONE]",
        data={MBPP_FULL.path: MBPP_FULL.sha256},
    ),
    question=_text_question,
    program=_as_it_is,
    sets_up=False,
)


def _chat(name: str, summary: str, source: Source) -> Mbpp:
    protocol = AnswerProtocol(
        name=name,
        max_new_tokens=1024,
        prompt=_chat_question({"text": "{text}", "test_list": ["{tests}"]}, ()),
        extraction="code_answers.standalone, version 1: the last fenced block that defines what the tests call",
        data={source.path: source.sha256},
    )
    return Mbpp(name, summary, protocol, question=_chat_question, program=_found, sets_up=True, source=source)


_ASKED = "asked for plainly in chat with their tests; the program is found however it is wrapped"
CHAT_V1 = _chat("mbpp/chat-v1", f"500 short functions, {_ASKED}", MBPP_FULL)
SANITIZED_CHAT_V1 = _chat("mbpp/sanitized-chat-v1", f"257 short functions that were verified by hand, {_ASKED}", MBPP_SANITIZED)
