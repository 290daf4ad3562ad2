"""The four tasks of the embedded suite, the deterministic rubric judge of mini-mt-bench, and mini-summarization.

mini-gsm8k is scored as GSM8K is. mini-humaneval runs the programs in a restricted language, so it needs no consent to
run code. mini-mt-bench is rated turn by turn by a judge that follows a rubric: rating = 1 + round(9 x weighted share of
fulfilled checks).

mini-summarization is asked by name only, with demonstrations of its own (--demonstrations mini-summarization). It is scored by
ROUGE-L. Two protocols share one sampled answer: raw scores all that the model said up to the token limit, post-processed what is
left after the usual mending of a text whose author does not know when to stop. A third, greedy, tells a model whose ends became
clean from one that merely became surer of itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gsil_bench.data import mini
from gsil_bench.data.mini import articles
from gsil_bench.errors import UserError
from gsil_bench.tasks.gsm8k import score_answer
from gsil_bench.tasks.judge import Judge, JudgeRequest, rate_turns
from gsil_bench.tasks.sandbox import Program, run_restricted
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources, Split
from gsil_bench.tasks.text_measures import as_it_is, described, post_processed, rouge_l

FENCE = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
Check = Mapping[str, Any]


def unwrap_code(answer: str) -> str:
    """The code in the first fenced block, or the whole answer if it has none."""
    match = FENCE.search(answer)
    return match.group(1) if match else answer


def has_text(text: str, wanted: str) -> bool:
    """Whether `wanted` occurs as whole words: "5" is not in "57", "cat" not in "cattle"."""
    before = r"(?<!\w)" if re.match(r"\w", wanted) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", wanted) else ""
    return re.search(before + re.escape(wanted) + after, text) is not None


def has_in_order(text: str, words: Sequence[str]) -> bool:
    """Whether the words occur as whole words in this order; others may stand between them."""
    remaining = iter(re.findall(r"\w+", text))
    return all(word in remaining for word in words)


def repeats_itself(text: str) -> bool:
    """Whether any three words in a row occur twice."""
    words = re.findall(r"\w+", text.lower())
    return any(count > 1 for count in Counter(zip(words, words[1:], words[2:], strict=False)).values())


CHECKS: dict[str, Callable[[str, Check], bool]] = {
    "contains": lambda text, check: has_text(text, check["text"]),
    "excludes": lambda text, check: not has_text(text, check["text"]),
    "exact": lambda text, check: text == check["text"],
    "starts_with": lambda text, check: text.startswith(check["text"]),
    "ends_with": lambda text, check: text.endswith(check["text"]),
    "words_in_order": lambda text, check: has_in_order(text, check["words"]),
    "lines": lambda text, check: len(text.splitlines()) == check["count"],
    "sentences": lambda text, check: len(SENTENCE_END.findall(text)) == check["count"],
    "max_words": lambda text, check: len(text.split()) <= check["count"],
    "no_repetition": lambda text, check: not repeats_itself(text),
}
"""What each kind of check asks of the answer, whose surrounding white space has been removed."""


def describe(check: Check) -> str:
    """A check in a few words, for the judgment."""
    arguments = [str(value) for key, value in check.items() if key not in ("check", "weight")]
    return " ".join([check["check"].replace("_", " "), *map(repr, arguments)])


@dataclass(frozen=True)
class RubricJudge:
    """Rates an answer by its rubric. Deterministic; an empty answer fails every check, also those that forbid
    something.
    """

    identity: str = "mini-rubric-v1"
    repeats: int = 1

    def replies(self, requests: Sequence[JudgeRequest]) -> list[str]:
        """The judgment of each request."""
        return [self.reply(request) for request in requests]

    def reply(self, request: JudgeRequest) -> str:
        """The failed checks in words and the rating in double brackets."""
        text = request.answers[-1].strip()
        failed = [check for check in request.rubric if not text or not CHECKS[check["check"]](text, check)]
        total = sum(check["weight"] for check in request.rubric)
        lost = sum(check["weight"] for check in failed)
        rating = 1 + round(9 * (total - lost) / total)
        words = "Failed: " + "; ".join(describe(check) for check in failed) + "." if failed else "All checks hold."
        return f"{words} Rating: [[{rating}]]"


@dataclass(frozen=True)
class ArithmeticTask:
    """Word problems; the first line `#### n` of the answer must hold the right number."""

    name: str
    summary: str
    protocol: AnswerProtocol
    version: str = f"{mini.VERSION}"
    metric: str = "accuracy"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False

    def items(self, split: Split, data_dir: Path | None = None) -> Sequence[Item]:
        """The items of a split; nothing is read from `data_dir`."""
        return mini.items("mini-gsm8k", split)

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """One score per item, as GSM8K scores it."""
        pairs = zip(items, answers, strict=True)
        return [score_answer(answer[0], item.reference["answer"]) for item, answer in pairs]


@dataclass(frozen=True)
class FunctionTask:
    """Functions to write; an answer passes if all assert lines of its item hold."""

    name: str
    summary: str
    protocol: AnswerProtocol
    version: str = f"{mini.VERSION}"
    metric: str = "pass@1"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False

    def items(self, split: Split, data_dir: Path | None = None) -> Sequence[Item]:
        """The items of a split; nothing is read from `data_dir`."""
        return mini.items("mini-humaneval", split)

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """One score per item, after running all programs in the restricted language."""
        programs = [
            Program(unwrap_code(answer[0]), "\n".join(item.reference["tests"]))
            for item, answer in zip(items, answers, strict=True)
        ]
        results = run_restricted(programs, resources.workers)
        return [Score(float(result.passed), result.reason, {"passed": result.passed}) for result in results]


@dataclass(frozen=True)
class DialogueTask:
    """Two-turn instructions; the score is the mean of the ratings of both turns."""

    name: str
    summary: str
    protocol: AnswerProtocol
    judge: Judge
    version: str = f"{mini.VERSION}"
    metric: str = "rating"
    best: float = 10.0
    worst: float = 1.0
    runs_code: bool = False

    def items(self, split: Split, data_dir: Path | None = None) -> Sequence[Item]:
        """The items of a split; nothing is read from `data_dir`."""
        return mini.items("mini-mt-bench", split)

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """One score per item; a missing second answer counts as an empty one."""
        return [self._rate(item, answer) for item, answer in zip(items, answers, strict=True)]

    def _rate(self, item: Item, answers: Sequence[str]) -> Score:
        if len(answers) != len(item.turns):
            raise UserError(f"item {item.id} has {len(item.turns)} turns but {len(answers)} answers")
        requests = [
            JudgeRequest(
                questions=item.turns[: turn + 1],
                answers=tuple(answers[: turn + 1]),
                rubric=item.reference["rubrics"][turn],
                reference=item.gold[turn],
            )
            for turn in range(len(item.turns))
        ]
        return rate_turns(self.judge, requests)


@dataclass(frozen=True)
class SummaryTask:
    """Articles to be summarised in a sentence; the score is ROUGE-L's F1 without a stemmer."""

    name: str
    summary: str
    protocol: AnswerProtocol
    apply: Callable[[str], str]
    """What is done to an answer before it is scored."""
    version: str = f"{articles.VERSION}"
    metric: str = "ROUGE-L"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False

    def items(self, split: Split, data_dir: Path | None = None) -> Sequence[Item]:
        """The items of a split; nothing is read from `data_dir`."""
        return [self._kept(item) for item in mini.items("mini-summarization", split)]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """One score per item; the details are those of `text_measures.described`, and whether the answer was changed."""
        return [self._score(answer[0], **item.reference) for item, answer in zip(items, answers, strict=True)]

    def _kept(self, item: Item) -> Item:
        """The item; without its gold answer if this protocol would change that."""
        return item if self.apply(item.gold[0]).split() == item.gold[0].split() else replace(item, gold=())

    def _score(self, answer: str, document: str, summaries: Sequence[str]) -> Score:
        text = self.apply(answer)
        value = rouge_l(text, summaries[0])
        changed = text.split() != answer.split()
        return Score(value, f"ROUGE-L {value:.3f}", {**described(text, document, summaries[0]), "changed": changed})


GSM8K = ArithmeticTask(
    name="mini-gsm8k",
    summary="Word problems of two to four steps, answered greedily.",
    protocol=AnswerProtocol("mini-gsm8k/greedy-v1", max_new_tokens=80),
)

GSM8K_SAMPLED = replace(
    GSM8K,
    name="mini-gsm8k-sampled",
    summary="The same word problems, answered with one sample at temperature 1: the distribution, not only its mode.",
    protocol=AnswerProtocol("mini-gsm8k/sampled-v1", max_new_tokens=80, temperature=1.0, samples=1, seed=1234),
)

HUMANEVAL = FunctionTask(
    name="mini-humaneval",
    summary="Small functions from a docstring, run against tests in a restricted language.",
    protocol=AnswerProtocol("mini-humaneval/greedy-v1", max_new_tokens=64),
)

MT_BENCH = DialogueTask(
    name="mini-mt-bench",
    summary="Two-turn instructions in eight categories, rated 1 to 10 by a deterministic rubric.",
    protocol=AnswerProtocol("mini-mt-bench/greedy-v1", max_new_tokens=32),
    judge=RubricJudge(),
)

SUMMARIZATION = SummaryTask(
    name="mini-summarization/raw",
    summary="Articles of a few sentences to be said in one: one sample at temperature 1, of which all is scored.",
    protocol=AnswerProtocol(
        "mini-summarization/raw-v1", max_new_tokens=64, temperature=1.0, samples=1, seed=1234, prompt=articles.PROMPT
    ),
    apply=as_it_is,
)

SUMMARIZATION_GREEDY = replace(
    SUMMARIZATION,
    name="mini-summarization/greedy",
    summary="The same articles, answered greedily: the mode of the distribution; all of it is scored.",
    protocol=AnswerProtocol("mini-summarization/greedy-v1", max_new_tokens=64, prompt=articles.PROMPT),
)

SUMMARIZATION_POST_PROCESSED = replace(
    SUMMARIZATION,
    name="mini-summarization/post-processed",
    summary="The same answers, scored up to their first empty line, without repeated and unfinished sentences.",
    protocol=replace(
        SUMMARIZATION.protocol,
        name="mini-summarization/post-processed-v1",
        extraction="the first paragraph, without repeated sentences, without an unfinished last sentence if another is before it",
    ),
    apply=post_processed,
)
