"""GSM8K: grade-school word problems whose answer is one number after "#### ".

Four protocols ask and score it; their scores of one model differ by tens of points, so none is comparable with another.

| name                | a question is asked               | an answer ends at                 | right is the gold          |
|---------------------|-----------------------------------|-----------------------------------|----------------------------|
| gsm8k/lm-eval-v3    | as text, after 5 shots of its own | "Question:", "</s>", "<|im_end|>" | text, less "," "$" and "." |
| gsm8k/lm-eval-v1    | with the same prompts             | a blank line, "Question:"         | text, less "," and "$"     |
| gsm8k/openllm-v1    | in the same form, other shots     | ":", "Question:", "Question"      | text, less ","             |
| gsm8k/chat-0shot-v1 | alone, as a user message          | the model's end token             | number                     |

lm-eval draws the shots of all questions from one random stream, question after question in the order of the test file. The stream
of task version 3 (lm-eval 0.4.2 to 0.4.13) and of version 1 (0.4.0) is the same, so their prompts are equal. The commit of the
Open LLM Leaderboard v1 shuffles the questions first, with the same stream that then draws the shots. Items keep the file's order
here; each has the shots of its shuffled place. Those of dev are drawn in the same way, from the rows that are not in dev.

The train split serves as demonstrations: its turns are questions alone, under every protocol.

Canaries are the gold answers that the stop texts leave whole: all 1,319 of lm-eval-v3, 1,317 of lm-eval-v1, 1,200 of openllm-v1,
where a perfect imitator gets 91.0 %, for a ":" ends 119 gold answers early. An item without one has no `gold`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from gsil_bench.data.sources import GSM8K_TEST, GSM8K_TRAIN, locate
from gsil_bench.errors import UserError, unknown_name
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources, Split

# As lm-eval's strict filter of task version 3, with a dollar sign allowed: "#### 1,800", "#### -5", "#### $18.00".
STRICT = re.compile(r"#### ([-$]{0,2}[0-9.,]+)")
# A minus sign right after a digit, a letter or a bracket is a subtraction or a hyphen, not a sign: "16-18" ends in 18.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$-?)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
# The two filters of lm-eval, to the letter.
LM_EVAL_STRICT = re.compile(r"#### (-?[0-9.,]+)")
LM_EVAL_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
# One train row in DEV_BUCKETS is held out as dev, chosen by its hash so that the choice depends on nothing else.
DEV_BUCKETS = 15
SHOTS = 5
DATA = {source.path: source.sha256 for source in (GSM8K_TEST, GSM8K_TRAIN)}


def score_answer(answer: str, gold: str) -> Score:
    """Score one answer: 1.0 if the number after its first "#### " equals the gold number, otherwise 0.0.

    Numbers are compared as numbers: "$1,800.00." equals "1800". The details say whether the format was kept, what was extracted,
    and whether the last number of the text would have been right ("flexible"), so that tables can tell a wrong answer from a
    wrong format.

    Args:
        answer: the model's text.
        gold: the gold answer, ending in "#### number", or the number alone.

    Raises:
        UserError: the gold answer holds no number.
    """
    expected = _gold_number(gold)
    match = STRICT.search(answer)
    extracted = _clean(match.group(1)) if match else None
    number = _number(extracted) if extracted is not None else None
    last = NUMBER.findall(answer)[-1:]
    flexible = bool(last) and _number(_clean(last[0])) == expected
    reason = _reason(extracted if number is not None else None, number == expected, flexible, str(expected))
    details = {"format_ok": number is not None, "extracted": extracted if number is not None else None}
    return Score(float(number == expected), reason, {**details, "flexible": flexible})


def score_as_v3(answer: str, gold: str) -> Score:
    """Score one answer as lm-eval's task version 3 does: the score is that of "strict-match", `flexible` that of
    "flexible-extract".

    Strings are compared, without commas, dollar signs and one full stop at the end: "18.00" is not "18", "$18" is not found. The
    details hold what each filter extracted (None: nothing), before anything is removed from it.
    """
    return _score_strings(answer, gold, lambda text: re.sub(r"\.$", "", re.sub(r"[,$]", "", text)).lower())


def score_as_v1(answer: str, gold: str) -> Score:
    """Score one answer as lm-eval 0.4.0 does: as version 3, but "18." is not "18". `flexible` is a diagnosis it did not have."""
    return _score_strings(answer, gold, lambda text: re.sub(r"[,$]", "", text).lower())


def score_as_openllm(answer: str, gold: str) -> Score:
    """Score one answer as the commit of the Open LLM Leaderboard v1 does: only commas are removed. `flexible` is a diagnosis it
    did not have.
    """
    return _score_strings(answer, gold, lambda text: text.replace(",", ""))


def _score_strings(answer: str, gold: str, reduced: Callable[[str], str]) -> Score:
    """Compare the first number after "#### ", and the last number of the text, with the gold string, all `reduced`."""
    expected = reduced(gold.rpartition("#### ")[2])
    strict, last = LM_EVAL_STRICT.search(answer), LM_EVAL_FLEXIBLE.findall(answer)[-1:]
    extracted = strict.group(1) if strict else None
    right = extracted is not None and reduced(extracted) == expected
    flexible = bool(last) and reduced(last[0]) == expected
    details = {"format_ok": strict is not None, "extracted": extracted}
    details |= {"flexible": flexible, "flexible_extracted": last[0] if last else None}
    return Score(float(right), _reason(extracted, right, flexible, expected), details)


def _reason(extracted: str | None, right: bool, flexible: bool, expected: str) -> str:
    if extracted is None:
        return 'no "#### number" in the answer' + (", though its last number is right" if flexible else "")
    return f"{_short(extracted)} is right" if right else f"{_short(extracted)} is wrong, the gold answer is {expected}"


def _gold_number(gold: str) -> Decimal:
    match = STRICT.search(gold)
    number = _number(_clean(match.group(1) if match else gold))
    if number is None:
        raise UserError(f"the gold answer has no number: {_short(gold)!r}")
    return number


def _clean(text: str) -> str:
    """A number without thousands separators, dollar signs and the full stop of its sentence."""
    return text.strip().replace(",", "").replace("$", "").rstrip(".")


def _number(text: str) -> Decimal | None:
    """The exact value of plain decimal digits, or None: "1.2.3", "" and "1e5" are not numbers here."""
    if not re.fullmatch(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)", text):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:  # more digits than a Decimal holds
        return None


def _short(text: str | None) -> str:
    text = " ".join((text or "").split())
    return text if len(text) <= 40 else text[:40] + "…"


@dataclass(frozen=True)
class Row:
    """One row of a published file."""

    number: int
    """From 0."""
    question: str
    answer: str

    @property
    def id(self) -> str:
        """16 hex digits that name the row by its content."""
        return hashlib.sha256(f"{self.question}\n{self.answer}".encode()).hexdigest()[:16]

    @property
    def held_out(self) -> bool:
        """Whether a train row belongs to dev."""
        return int(self.id, 16) % DEV_BUCKETS == 0


def draw_shots(seed: int, questions: int, pool: int, shuffled: bool) -> list[list[int]]:
    """Which rows of the pool precede each question, as lm-eval draws them: one stream for all questions.

    Args:
        seed: of the stream.
        questions: how many there are.
        pool: number of rows that shots are drawn from.
        shuffled: draw in the order of the shuffled questions, as the commit of the Open LLM Leaderboard v1 does.
    """
    stream, order = random.Random(seed), list(range(questions))
    if shuffled:
        stream.shuffle(order)
    drawn = {question: stream.sample(range(pool), SHOTS) for question in order}
    return [drawn[question] for question in range(questions)]


@dataclass(frozen=True)
class Gsm8k:
    """The GSM8K task on the published files, under one protocol. The dev split is a slice of train that train does not hold."""

    name: str
    summary: str
    protocol: AnswerProtocol
    score_text: Callable[[str, str], Score]
    """(answer, gold answer) → score."""
    shuffled: bool = False
    """See `draw_shots`."""
    version: str = "1"
    metric: str = "accuracy"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        """The items of a split, in the order of the published file."""
        if split not in ("train", "dev", "test"):
            raise unknown_name("split of gsm8k", split, ("train", "dev", "test"))
        train = _rows(locate(GSM8K_TRAIN, data_dir)) if split != "test" or self.protocol.shots else []
        if split == "test":
            return self._asked(_rows(locate(GSM8K_TEST, data_dir)), train)
        kept = [row for row in train if not row.held_out]
        if split == "dev":
            return self._asked([row for row in train if row.held_out], kept)
        return [self._item(row, row.question, (row.answer,)) for row in kept]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """One score per item, by `score_text`."""
        return [self.score_text(turns[0], item.reference["gold"]) for item, turns in zip(items, answers, strict=True)]

    def _asked(self, rows: Sequence[Row], pool: Sequence[Row]) -> list[Item]:
        """Rows as they are asked, with the shots of each from the pool."""
        prompts = [row.question for row in rows]
        if self.protocol.shot_seed is not None:
            drawn = draw_shots(self.protocol.shot_seed, len(rows), len(pool), self.shuffled)
            prompts = [_prompt(row, [pool[shot] for shot in shots]) for row, shots in zip(rows, drawn, strict=True)]
        return [
            self._item(row, prompt, (row.answer,) if self._survives(row.answer) else ())
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def _item(self, row: Row, prompt: str, gold: tuple[str, ...]) -> Item:
        return Item(id=row.id, turns=(prompt,), published_id=str(row.number), reference={"gold": row.answer}, gold=gold)

    def _survives(self, answer: str) -> bool:
        """Whether a gold answer is still right when the stop texts have cut it."""
        whole = answer
        for stop in self.protocol.stops:
            answer = answer.partition(stop)[0]
        return self.score_text(answer, whole).value == self.best


def _rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        records = map(json.loads, lines)
        return [Row(number, record["question"], record["answer"]) for number, record in enumerate(records)]


def _prompt(row: Row, shots: Sequence[Row]) -> str:
    examples = [f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots]
    return "".join(examples) + f"Question: {row.question}\nAnswer:"


_FEW_SHOT = "{shots as 'Question: … Answer: …' between blank lines}Question: {question}\\nAnswer:"
_STRICT_TEXT = f"first match of {LM_EVAL_STRICT.pattern}"

LM_EVAL_V3 = Gsm8k(
    name="gsm8k/lm-eval-v3",
    summary="1,319 grade-school word problems after 5 shots, as lm-eval 0.4.2 to 0.4.13 ask them (strict-match)",
    protocol=AnswerProtocol(
        name="gsm8k/lm-eval-v3",
        max_new_tokens=256,
        form="text",
        stops=("Question:", "</s>", "<|im_end|>"),
        prompt=_FEW_SHOT,
        shots=SHOTS,
        shot_seed=1234,
        extraction=f"strict-match: {_STRICT_TEXT}; flexible-extract: last match of {LM_EVAL_FLEXIBLE.pattern}; compared as "
        "strings without ',', '$' and a final '.'",
        data=DATA,
    ),
    score_text=score_as_v3,
)

LM_EVAL_V1 = Gsm8k(
    name="gsm8k/lm-eval-v1",
    summary="the same prompts as lm-eval 0.4.0 cut and scored the answers (SPIN's harness): a blank line ends an answer",
    protocol=AnswerProtocol(
        name="gsm8k/lm-eval-v1",
        max_new_tokens=256,
        form="text",
        stops=("\n\n", "Question:"),
        prompt=_FEW_SHOT,
        shots=SHOTS,
        shot_seed=1234,
        extraction=f"{_STRICT_TEXT}; compared as strings without ',' and '$'",
        data=DATA,
    ),
    score_text=score_as_v1,
)

OPENLLM_V1 = Gsm8k(
    name="gsm8k/openllm-v1",
    summary="as the Open LLM Leaderboard v1 (GSIL's harness, b281b092); ':' ends an answer, so a perfect imitator gets 91.0 %",
    protocol=AnswerProtocol(
        name="gsm8k/openllm-v1",
        max_new_tokens=256,
        form="text",
        stops=(":", "Question:", "Question"),
        prompt=_FEW_SHOT,
        shots=SHOTS,
        shot_seed=42,
        extraction=f"{_STRICT_TEXT}; compared as strings without ','",
        data=DATA,
    ),
    score_text=score_as_openllm,
    shuffled=True,
)

CHAT_0SHOT = Gsm8k(
    name="gsm8k/chat-0shot-v1",
    summary="1,319 grade-school word problems, each one user message; the number after #### must be right, as a number",
    protocol=AnswerProtocol(
        name="gsm8k/chat-0shot-v1",
        max_new_tokens=256,
        prompt="{question}",
        extraction=f"first match of {STRICT.pattern}; compared as numbers without ',', '$' and final '.'",
        data={GSM8K_TEST.path: GSM8K_TEST.sha256},
    ),
    score_text=score_answer,
)
