"""GSM8K: grade-school word problems whose answer is one number after "#### ".

The protocol here, gsm8k/chat-0shot-v1, asks the question alone as one user message and decodes greedily: it measures what a
model learned from demonstrations in this format. It is not comparable with published few-shot figures; the named protocols of
lm-eval (gsm8k/lm-eval-v3 and older ones, with their shots and stop sequences) come in a later part of the project.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
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
# One train row in DEV_BUCKETS is held out as dev, chosen by its hash so that the choice depends on nothing else.
DEV_BUCKETS = 15
CHAT_0SHOT = AnswerProtocol(name="gsm8k/chat-0shot-v1", max_new_tokens=256)


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
    if number is None:
        reason = 'no "#### number" in the answer' + (", though its last number is right" if flexible else "")
    elif number == expected:
        reason = f"{_short(extracted)} is right"
    else:
        reason = f"{_short(extracted)} is wrong, the gold answer is {expected}"
    details = {"format_ok": number is not None, "extracted": extracted if number is not None else None}
    return Score(float(number == expected), reason, {**details, "flexible": flexible})


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
class Gsm8k:
    """The GSM8K task on the published files. The dev split is a slice of train that train does not hold."""

    name: str = "gsm8k"
    version: str = "1"
    summary: str = "1,319 grade-school word problems; the number after #### must be right"
    metric: str = "accuracy"
    best: float = 1.0
    worst: float = 0.0
    protocol: AnswerProtocol = CHAT_0SHOT
    runs_code: bool = False

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        """The items of a split, in the order of the published file."""
        if split not in ("train", "dev", "test"):
            raise unknown_name("split of gsm8k", split, ("train", "dev", "test"))
        path = locate(GSM8K_TEST if split == "test" else GSM8K_TRAIN, data_dir)
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        items = [_item(row["question"], row["answer"]) for row in rows]
        return items if split == "test" else [item for item in items if _held_out(item) == (split == "dev")]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """One score per item; see `score_answer`."""
        return [score_answer(turns[0], item.reference["gold"]) for item, turns in zip(items, answers, strict=True)]


def _item(question: str, answer: str) -> Item:
    digest = hashlib.sha256(f"{question}\n{answer}".encode()).hexdigest()
    return Item(id=digest[:16], turns=(question,), reference={"gold": answer}, gold=(answer,))


def _held_out(item: Item) -> bool:
    """Whether a train row belongs to dev."""
    return int(item.id, 16) % DEV_BUCKETS == 0


GSM8K = Gsm8k()
