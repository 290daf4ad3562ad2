"""Stage 6: scores of answers. Needs no model, so stored answers can be scored again under another protocol."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from gsil_bench.records import ItemAnswer, ItemScore, read_jsonl, write_jsonl
from gsil_bench.tasks.humaneval import mean_pass_at_k
from gsil_bench.tasks.task import Item, Score, ScoringResources, Task

FILE = "scores.jsonl"

REFUSAL = re.compile(
    r"\W*(?:(?:i am |i'm )?(?:very |so )?sorry\b|i (?:really )?(?:can't|cannot|can not|won't|will not)\b"
    r"|(?:i am|i'm) (?:unable|not able) to\b|i (?:must|have to) decline\b|i apologi[sz]e\b|as an ai\b|unfortunately, i\b)",
    re.IGNORECASE,
)
"""How answers begin that refuse, in English. A count for diagnosis: no score depends on it."""
TOP_REASONS = 3
"""Reasons of unscored items that are counted by name."""


KS = (5, 10, 20, 50, 100)
"""Numbers of tries for which pass@k is reported, as far as there are samples."""


class CanaryError(RuntimeError):
    """A scorer that does not give gold answers full marks or empty answers the lowest: nothing it says can be trusted."""


def read_answers(folder: Path) -> list[ItemAnswer]:
    """The answers that stage 5 wrote."""
    records = read_jsonl(folder / "answers.jsonl")
    return [
        ItemAnswer(**{**record, **{key: tuple(record.get(key, ())) for key in ("texts", "finish_reasons", "tokens", "cut")}})
        for record in records
    ]


def score_answers(
    task: Task, items: Sequence[Item], answers: Sequence[ItemAnswer], resources: ScoringResources, folder: Path
) -> tuple[list[ItemScore], dict[str, float]]:
    """Score every answer, average an item's samples, and write one line per item in the items' order.

    An answer that ended in an error leaves its item unscored, with the error as the reason.

    Returns:
        The items' scores, and counts for diagnosis: see `_counts`.
    """
    by_id = {item.id: item for item in items}
    complete = [answer for answer in answers if not answer.error]
    texts = [list(answer.texts) for answer in complete]
    scored = dict(zip(map(_key, complete), task.score([by_id[answer.id] for answer in complete], texts, resources), strict=True))
    samples: dict[str, list[ItemAnswer]] = defaultdict(list)
    for answer in answers:
        samples[answer.id].append(answer)
    scores = [_item_score(item, samples[item.id], scored) for item in items]
    write_jsonl(folder / FILE, scores)
    asked = [answer for answer in answers if not by_id[answer.id].continuations]
    counts = _counts(answers, asked, list(scored.values())) | _unscored(scores)
    return scores, counts | (_pass_at_k(scores, task.protocol.samples) if task.metric == "pass@1" else {})


def _pass_at_k(scores: Sequence[ItemScore], samples: int) -> dict[str, float]:
    """pass@k for more than one try; an item's score is the share of its samples that passed. pass@1 is the score itself."""
    counts = [(samples, round(item.score * samples)) for item in scores if item.score is not None]
    return {f"pass@{k}": mean_pass_at_k(counts, k) for k in KS if counts and k <= samples}


def _key(answer: ItemAnswer) -> tuple[str, int]:
    return answer.id, answer.sample


def _item_score(item: Item, answers: Sequence[ItemAnswer], scored: Mapping[tuple[str, int], Score]) -> ItemScore:
    """Mean over the item's samples; unscored if any of them is."""
    errors = [answer.error for answer in answers if answer.error]
    if errors or not answers:
        return ItemScore(item.id, None, errors[0] if errors else "no answer", item.group)
    scores = [scored[_key(answer)] for answer in answers]
    missing = next((score.reason for score in scores if score.value is None), None)
    if missing is not None:
        return ItemScore(item.id, None, missing, item.group, scores[0].details)
    values = [score.value for score in scores if score.value is not None]
    return ItemScore(item.id, sum(values) / len(values), scores[0].reason, item.group, scores[0].details)


def _counts(answers: Sequence[ItemAnswer], asked: Sequence[ItemAnswer], scores: Sequence[Score]) -> dict[str, float]:
    """Answers that reached the token limit, failed, lost the beginning of their prompt, are empty or refuse; tokens; and how
    often each yes/no detail was yes, means of measures. A scorer that tells itself what is empty or refused is believed.

    Args:
        asked: those answers that are a model's text.
    """
    counts: dict[str, float] = {
        "answers": len(answers),
        "truncated": sum("length" in answer.finish_reasons for answer in answers),
        "errors": sum(bool(answer.error) for answer in answers),
        "prompts_cut": sum(any(answer.cut) for answer in answers),
        "generated_tokens": sum(sum(answer.tokens) for answer in answers),
    }
    texts = [answer.texts for answer in asked if not answer.error]
    found = {
        "empty": sum(any(not text.strip() for text in turns) for turns in texts),
        "refused": sum(any(map(_refuses, turns)) for turns in texts),
    }
    flags, measures = Counter[str](), defaultdict[str, list[float]](list)
    for score in scores:
        flags.update({key: int(value) for key, value in score.details.items() if isinstance(value, bool)})
        for key, value in score.details.items():
            if isinstance(value, float):
                measures[f"mean {key}"].append(value)
    means = {key: sum(values) / len(values) for key, values in measures.items()}
    return counts | found | flags | means


def _refuses(text: str) -> bool:
    return REFUSAL.match(text.replace("\u2019", "'")) is not None


def _unscored(scores: Sequence[ItemScore]) -> dict[str, float]:
    """Items without a score, and the most frequent reasons."""
    reasons = Counter(" ".join(score.reason.split())[:80] for score in scores if score.score is None)
    named = {f"unscored: {reason}": float(count) for reason, count in reasons.most_common(TOP_REASONS)}
    return {"unscored": float(reasons.total()), **named}


def check_canaries(task: Task, items: Sequence[Item], resources: ScoringResources, sample: int = 20) -> None:
    """Score gold and empty answers of some items before anything is generated. Likelihoods have no empty answer.

    Raises:
        CanaryError: a gold answer without full marks, or an empty one with more than the lowest score.
    """
    chosen = [item for item in items if item.gold][:: max(1, len(items) // sample)]
    asked = [item for item in chosen if not item.continuations]
    for name, some, texts, wanted in (
        ("gold", chosen, [item.gold for item in chosen], task.best),
        ("empty", asked, [("",) * len(item.turns) for item in asked], task.worst),
    ):
        for item, score in zip(some, task.score(some, texts, resources), strict=True):
            if score.value != wanted:
                raise CanaryError(
                    f"{task.name}: the {name} answer of item {item.id} scores {score.value}, not {wanted} ({score.reason}); "
                    "its scores cannot be trusted"
                )
