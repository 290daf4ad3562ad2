"""The embedded model leaves room in both directions on every mini task: a start near 0 or 100 % could not tell methods apart.

Its scores are published as between 30 and 70 %. 100 items have a standard error of 5 points, hence the wider bounds here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gsil_bench.data.chat import ChatFormat
from gsil_bench.evaluation import answers, scoring
from gsil_bench.generation.engine import Completion, Request
from gsil_bench.generation.transformers_engine import TransformersEngine
from gsil_bench.models import checkpoint
from gsil_bench.tasks import SUITES, load_task
from gsil_bench.tasks.task import ScoringResources

ITEMS = 100


@pytest.mark.parametrize("name", SUITES["mini"])
def test_start_is_between_floor_and_ceiling(name: str, mini_folder: Path, tmp_path: Path) -> None:
    task, chat = load_task(name), ChatFormat.of(checkpoint.load_tokenizer(mini_folder))
    model = checkpoint.load_model(mini_folder)
    engine = TransformersEngine(model, chat.end_token_ids, checkpoint.context_length(mini_folder), chat.decode)
    items = task.items("dev", None)[:ITEMS]

    def complete(requests: Sequence[Request]) -> list[Completion]:
        completions = dict(engine.complete(requests))
        return [completions[index] for index in range(len(requests))]

    given = answers.answer(answers.Asked(complete, chat, engine.context_length, engine.context_length), items, task.protocol)
    scores, counts = scoring.score_answers(task, items, given, ScoringResources(), tmp_path)
    values = [item.score for item in scores if item.score is not None]
    assert len(values) == len(items)
    share = (sum(values) / len(values) - task.worst) / (task.best - task.worst)
    assert 0.15 < share < 0.85
    assert counts["errors"] == 0
