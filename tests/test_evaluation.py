"""Answers and scores: turns, samples, errors of single items, canaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import TASK, TWO_TURNS, LengthTask

from gsil_bench.data.chat import ChatFormat
from gsil_bench.evaluation import answers, scoring
from gsil_bench.evaluation.held_out import score_held_out
from gsil_bench.generation.engine import Completion, Request, Sampling
from gsil_bench.models.checkpoint import load_model, load_tokenizer
from gsil_bench.models.logprobs import completion_logps
from gsil_bench.records import Encoded, ItemAnswer
from gsil_bench.tasks.task import Item, Score, ScoringResources


class Echo:
    """Answers with the prompt's text, or with what `script` says for a request's id."""

    identity = "echo"

    def __init__(self, chat: ChatFormat, script: dict[str, Completion]) -> None:
        self.chat, self.script = chat, script
        self.seen: dict[str, str] = {}

    def batches(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        return [[index] for index in range(len(requests))]

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        for request in requests:
            self.seen[request.id] = str(self.chat.tokenizer.decode(list(request.prompt_ids)))
        return [self.script.get(item.id) or Completion(item.id, (1, 2), f"answer to {item.id}", "stop") for item in requests]


@pytest.fixture
def chat(mini_folder: Path) -> ChatFormat:
    return ChatFormat.of(load_tokenizer(mini_folder))


ITEMS = [Item(name, ("First?", "Second?")) for name in ("a", "b", "c")]


def test_the_second_turn_sees_the_first_answer(chat: ChatFormat, tmp_path: Path) -> None:
    engine = Echo(chat, {})
    protocol = dataclasses.replace(TASK.protocol, samples=2)
    given = answers.answer(engine, chat, ITEMS, protocol, tmp_path)
    assert [(item.id, item.sample) for item in given] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    assert given[1].texts == ("answer to a/1/0", "answer to a/1/1")
    second = engine.seen["a/1/1"]
    assert second.index("First?") < second.index("answer to a/1/0") < second.index("Second?")
    assert scoring.read_answers(tmp_path) == given


def test_an_error_ends_that_conversation_only(chat: ChatFormat, tmp_path: Path) -> None:
    engine = Echo(chat, {"b/0/0": Completion("b/0/0", (), "", "error", "too long")})
    given = answers.answer(engine, chat, ITEMS, TASK.protocol, tmp_path)
    assert [item.error for item in given] == ["", "too long", ""]
    assert "b/0/1" not in engine.seen
    scores, counts = scoring.score_answers(TWO_TURNS, ITEMS, given, ScoringResources(), tmp_path)
    assert [item.score for item in scores] == [1.0, None, 1.0]
    assert scores[1].reason == "too long"
    assert counts["errors"] == 1


def test_an_answer_that_forges_a_turn_is_an_error_of_that_item(chat: ChatFormat, tmp_path: Path) -> None:
    engine = Echo(chat, {"a/0/0": Completion("a/0/0", (1,), "sure <|end|> and more", "stop")})
    given = answers.answer(engine, chat, ITEMS, TASK.protocol, tmp_path)
    assert "<|end|>" in given[0].error
    assert given[1].error == ""


@dataclasses.dataclass(frozen=True)
class Half(LengthTask):
    """Scores answers by a table; None is unscored."""

    table: tuple[float | None, ...] = ()

    def score(self, items: Sequence[Item], texts: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        return [Score(value, "because", {"format_ok": value is not None}) for value in self.table]


def test_samples_are_averaged_and_unscored_is_not_zero(tmp_path: Path) -> None:
    items = [Item("a", ("?",)), Item("b", ("?",))]
    given = [ItemAnswer(id_, sample, ("x",), ("length",), (3,)) for id_ in "ab" for sample in (0, 1)]
    task = Half(table=(1.0, 0.0, 1.0, None))
    scores, counts = scoring.score_answers(task, items, given, ScoringResources(), tmp_path)
    assert [item.score for item in scores] == [0.5, None]
    assert counts == {"answers": 4, "truncated": 4, "errors": 0, "generated_tokens": 12, "format_ok": 3}


def test_canaries_stop_a_scorer_that_cannot_be_trusted() -> None:
    items = TASK.items("test", None)
    scoring.check_canaries(TASK, items, ScoringResources())
    with pytest.raises(scoring.CanaryError, match="the gold answer of item test-0 scores"):
        scoring.check_canaries(Half(table=(0.0,) * 12), items, ScoringResources())
    with pytest.raises(scoring.CanaryError, match="the empty answer"):
        scoring.check_canaries(Half(table=(1.0,) * 12), items, ScoringResources())


def test_held_out_loss_is_the_mean_over_scored_tokens(mini_folder: Path, tmp_path: Path) -> None:
    model = load_model(mini_folder)
    sequences = [Encoded((5, 6, 7), (8, 9)), Encoded((5,), (6, 7, 8, 9))]
    scores = score_held_out(model, ["a", "b"], sequences, 512, tmp_path)
    for score, logps in zip(scores, completion_logps(model.double(), sequences), strict=True):
        assert score.score == pytest.approx(-float(logps.sum()) / len(logps), abs=1e-5)
