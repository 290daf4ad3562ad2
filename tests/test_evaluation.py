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
from gsil_bench.records import Encoded, ItemAnswer, ItemScore, write_jsonl
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources


class Echo:
    """Answers with "answer" and a number that counts up, or with what `script` says for that number."""

    def __init__(self, chat: ChatFormat, script: dict[int, Completion]) -> None:
        self.chat, self.script = chat, script
        self.seen: list[tuple[str, int]] = []
        """Of each request: the prompt's text, and which sample."""

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        completions = []
        for request in requests:
            number = len(self.seen)
            self.seen.append((str(self.chat.tokenizer.decode(list(request.prompt_ids))), request.sample))
            completions.append(self.script.get(number) or Completion((1, 2), f"answer {number}", "stop"))
        return completions


@pytest.fixture
def chat(mini_folder: Path) -> ChatFormat:
    return ChatFormat.of(load_tokenizer(mini_folder))


def ask(complete: answers.Complete, chat: ChatFormat, items: Sequence[Item], protocol: AnswerProtocol) -> list[ItemAnswer]:
    return answers.answer(answers.Asked(complete, chat, 512, 513), items, protocol)


ITEMS = [Item(name, ("First?", "Second?")) for name in ("a", "b", "c")]


def test_the_second_turn_sees_the_first_answer(chat: ChatFormat) -> None:
    """Six first turns, 0 to 5, then six second ones: that of ("a", 1) is the eighth, and follows answer 1."""
    complete = Echo(chat, {})
    given = ask(complete, chat, ITEMS, dataclasses.replace(TASK.protocol, samples=2))
    assert [(item.id, item.sample) for item in given] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    assert given[1].texts == ("answer 1", "answer 7")
    assert given[1].tokens == (2, 2)
    second, sample = complete.seen[7]
    assert second.index("First?") < second.index("answer 1") < second.index("Second?")
    assert sample == 1


def test_requests_say_what_the_protocol_says(chat: ChatFormat) -> None:
    asked: list[Request] = []

    def complete(requests: Sequence[Request]) -> list[Completion]:
        asked.extend(requests)
        return [Completion((1,), "fine", "length") for _ in requests]

    protocol = AnswerProtocol("p/v1", 9, temperature=0.5, top_p=0.8, samples=2, seed=4)
    given = ask(complete, chat, ITEMS[:1], protocol)
    assert [request.sampling for request in asked] == [Sampling(9, 0.5, 0.8, 4)] * 4
    assert [request.sample for request in asked] == [0, 1, 0, 1]
    assert [item.finish_reasons for item in given] == [("length", "length")] * 2


def test_an_error_ends_that_conversation_only(chat: ChatFormat, tmp_path: Path) -> None:
    complete = Echo(chat, {1: Completion((), "", "error", "too long")})
    given = ask(complete, chat, ITEMS, TASK.protocol)
    assert [item.error for item in given] == ["", "too long", ""]
    assert [len(item.texts) for item in given] == [2, 1, 2]
    assert len(complete.seen) == 5
    scores, counts = scoring.score_answers(TWO_TURNS, ITEMS, given, ScoringResources(), tmp_path)
    assert [item.score for item in scores] == [1.0, None, 1.0]
    assert scores[1].reason == "too long"
    assert counts["errors"] == 1


def test_an_answer_that_forges_a_turn_is_an_error_of_that_item(chat: ChatFormat) -> None:
    complete = Echo(chat, {0: Completion((1,), "sure <|end|> and more", "stop")})
    given = ask(complete, chat, ITEMS, TASK.protocol)
    assert "<|end|>" in given[0].error
    assert given[1].error == ""


def test_answers_are_read_as_they_were_written(chat: ChatFormat, tmp_path: Path) -> None:
    given = ask(Echo(chat, {1: Completion((), "", "error", "too long")}), chat, ITEMS, TASK.protocol)
    write_jsonl(tmp_path / answers.FILE, given)
    assert scoring.read_answers(tmp_path) == given


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
    assert counts == {
        "answers": 4,
        "truncated": 4,
        "errors": 0,
        "prompts_cut": 0,
        "generated_tokens": 12,
        "empty": 0,
        "refused": 0,
        "format_ok": 3,
        "unscored": 1,
        "unscored: because": 1,
    }


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


def test_pass_at_k_of_sampled_answers() -> None:
    """Of 10 samples 1 passes on one item and none on the other: pass@5 is 1 - C(9, 5) / C(10, 5) = 1/2 there, 1/4 on average."""
    scores = [ItemScore("a", 0.1, ""), ItemScore("b", 0.0, ""), ItemScore("c", None, "no answer")]
    assert scoring._pass_at_k(scores, 10) == {"pass@5": 0.25, "pass@10": 0.5}
    assert scoring._pass_at_k(scores, 1) == {}
