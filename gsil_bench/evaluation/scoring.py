"""Stage 6: scores of answers. Needs no model, so stored answers can be scored again under another protocol."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from gsil_bench.records import ItemAnswer, ItemScore, read_jsonl, write_jsonl
from gsil_bench.tasks.task import Item, Score, ScoringResources, Task

FILE = "scores.jsonl"


class CanaryError(RuntimeError):
    """A scorer that does not give gold answers full marks or empty answers the lowest: nothing it says can be trusted."""


def read_answers(folder: Path) -> list[ItemAnswer]:
    """The answers that stage 5 wrote."""
    records = read_jsonl(folder / "answers.jsonl")
    return [
        ItemAnswer(**{**record, **{key: tuple(record[key]) for key in ("texts", "finish_reasons", "tokens")}})
        for record in records
    ]


def score_answers(
    task: Task, items: Sequence[Item], answers: Sequence[ItemAnswer], resources: ScoringResources, folder: Path
) -> tuple[list[ItemScore], dict[str, float]]:
    """Score every answer, average an item's samples, and write one line per item in the items' order.

    An answer that ended in an error leaves its item unscored, with the error as the reason.

    Returns:
        The items' scores and counts for the table's footer: truncated and errored answers, shares of what `details` flags.
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
    return scores, _counts(answers, list(scored.values()))


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


def _counts(answers: Sequence[ItemAnswer], scores: Sequence[Score]) -> dict[str, float]:
    """How many answers were cut or failed, how many tokens there are, and how often each yes/no detail was yes."""
    counts: dict[str, float] = {
        "answers": len(answers),
        "truncated": sum("length" in answer.finish_reasons for answer in answers),
        "errors": sum(bool(answer.error) for answer in answers),
        "generated_tokens": sum(sum(answer.tokens) for answer in answers),
    }
    for score in scores:
        for key, value in score.details.items():
            if isinstance(value, bool):
                counts[key] = counts.get(key, 0) + value
    return counts


def check_canaries(task: Task, items: Sequence[Item], resources: ScoringResources, sample: int = 20) -> None:
    """Score gold and empty answers of some items before anything is generated.

    Raises:
        CanaryError: a gold answer without full marks, or an empty one with more than the lowest score.
    """
    chosen = [item for item in items if item.gold][:: max(1, len(items) // sample)]
    for name, texts, wanted in (
        ("gold", [item.gold for item in chosen], task.best),
        ("empty", [("",) * len(item.turns) for item in chosen], task.worst),
    ):
        for item, score in zip(chosen, task.score(chosen, texts, resources), strict=True):
            if score.value != wanted:
                raise CanaryError(
                    f"{task.name}: the {name} answer of item {item.id} scores {score.value}, not {wanted} ({score.reason}); "
                    "its scores cannot be trusted"
                )
