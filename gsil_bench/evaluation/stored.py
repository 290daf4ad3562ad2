"""What a comparison's folder keeps of its cells: results, and the answers that their scores were computed from. No model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsil_bench.errors import UserError
from gsil_bench.evaluation.scoring import FILE, read_answers
from gsil_bench.records import CellResult, ItemAnswer, ItemScore, read_jsonl, result_from_json
from gsil_bench.store import MANIFEST, Artefact, Store


@dataclass(frozen=True)
class StoredAnswers:
    """The answers of one cell, and how they were asked for."""

    answers: tuple[ItemAnswer, ...]
    protocol: Mapping[str, Any]
    """As it was recorded: JSON."""
    items: str
    """Digest of the items that were asked."""


def read_results(out: Path, task: str | None = None) -> list[CellResult]:
    """The results below a comparison's folder, in the order of their files; the held-out loss is none of them.

    Args:
        out: what was given as --out.
        task: only those of this task, by its full name or without its protocol.

    Raises:
        UserError: there are none.
    """
    results = [result for result in map(_read_result, sorted((out / "results").rglob("*.json"))) if _is_of_task(result)]
    if not results:
        raise UserError(f"{out}: no results of tasks below {out / 'results'}; name the --out folder of a comparison")
    names = sorted({result.task for result in results})
    chosen = [result for result in results if task in (None, result.task, result.task.partition("/")[0])]
    if not chosen:
        raise UserError(f"{out}: no results of task {task}; there are {', '.join(names)}")
    return chosen


def read_stored_answers(out: Path, result: CellResult) -> StoredAnswers:
    """The answers that a result was computed from.

    Raises:
        UserError: they are no longer in the folder's store, or are damaged.
    """
    store, where = Store(out / "store"), f"{result.method} (seed {result.seed}) on {result.task}"
    scores = store.lookup("scores", str(result.provenance.get("scores")))
    if scores is None:
        raise UserError(f"{where}: its scores are not in {out / 'store'} (removed or damaged); run the comparison again")
    answers = _answers_of(store, _inputs(scores))
    if answers is None:
        raise UserError(f"{where}: its answers are not in {out / 'store'} (removed or damaged); run the comparison again")
    inputs = _inputs(answers)
    return StoredAnswers(tuple(read_answers(answers.folder)), inputs["protocol"], inputs["items"])


def read_item_scores(out: Path, result: CellResult) -> tuple[ItemScore, ...]:
    """A result's item scores with their details, which the result file leaves out.

    Raises:
        UserError: they are no longer in the folder's store, or are damaged.
    """
    scores = Store(out / "store").lookup("scores", str(result.provenance.get("scores")))
    if scores is None:
        where = f"{result.method} (seed {result.seed}) on {result.task}"
        raise UserError(f"{where}: its scores are not in {out / 'store'} (removed or damaged); run the comparison again")
    return tuple(ItemScore(**record) for record in read_jsonl(scores.folder / FILE))


def mean(scores: Sequence[float | None]) -> float | None:
    """Mean of those that are scored; None if none is."""
    scored = [score for score in scores if score is not None]
    return sum(scored) / len(scored) if scored else None


def _read_result(path: Path) -> CellResult:
    try:
        return result_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is not a result that this version reads ({error}); remove it or run its comparison again"
        ) from error


def _is_of_task(result: CellResult) -> bool:
    return isinstance(result.provenance.get("scores"), str) and "protocol" in result.comparable


def _inputs(artefact: Artefact) -> Mapping[str, Any]:
    """What a finished artefact was made from, in words and digests."""
    inputs: Mapping[str, Any] = json.loads((artefact.folder / MANIFEST).read_text(encoding="utf-8"))["inputs"]
    return inputs


def _answers_of(store: Store, scores: Mapping[str, Any]) -> Artefact | None:
    """The finished answers that scores were made from: with their content, to the same items under the same protocol."""
    for manifest in sorted((store.root / "answers").glob(f"*/{MANIFEST}")):
        artefact = store.lookup("answers", manifest.parent.name)
        if artefact is not None and artefact.content == scores["needs"]["answers"]:
            made_from = _inputs(artefact)
            if all(made_from[key] == scores[key] for key in ("task", "items", "protocol")):
                return artefact
    return None
