"""The transformers engine against `model.generate`, and what must not change an answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gsil_bench.generation import transformers_engine
from gsil_bench.generation.completions import complete_all
from gsil_bench.generation.engine import Completion, Request, Sampling
from gsil_bench.generation.transformers_engine import TransformersEngine
from gsil_bench.models.checkpoint import load_model


def engine_of(folder: Path, context: int = 256) -> TransformersEngine:
    model = load_model(folder)
    return TransformersEngine(model, [int(model.config.eos_token_id)], context, lambda ids: " ".join(map(str, ids)))


def requests(count: int, longest: int = 60) -> list[Request]:
    random = np.random.default_rng(0)
    return [Request(f"r{n}", tuple(random.integers(5, 400, random.integers(1, longest)).tolist())) for n in range(count)]


def complete(engine: TransformersEngine, given: list[Request], sampling: Sampling) -> dict[str, Completion]:
    return {
        completion.id: completion
        for batch in engine.batches(given, sampling)
        for completion in engine.complete([given[index] for index in batch], sampling)
    }


def test_greedy_equals_generate_one_at_a_time(mini_folder: Path) -> None:
    engine, given = engine_of(mini_folder), requests(48)
    completions = complete(engine, given, Sampling(max_new_tokens=24))
    for request in given:
        ids = torch.tensor([request.prompt_ids])
        generated = engine.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        assert completions[request.id].tokens == tuple(generated[0, ids.shape[1] :].tolist())


def test_finish_reason_says_whether_the_end_token_came(mini_folder: Path) -> None:
    engine = engine_of(mini_folder)
    end = set(engine.end_token_ids.tolist())
    completions = complete(engine, requests(40), Sampling(max_new_tokens=40, temperature=1.0)).values()
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert (completion.tokens[-1] in end) == (completion.finish_reason == "stop")
        assert not end & set(completion.tokens[:-1])
        assert completion.finish_reason == "stop" or len(completion.tokens) == 40


def test_sampling_depends_on_id_and_seed_not_on_order(tiny_model: Path) -> None:
    engine, given = engine_of(tiny_model), requests(20)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=3)
    whole, reversed_, part = (complete(engine, items, sampling) for items in (given, given[::-1], given[:3]))
    assert whole == reversed_
    assert all(part[request.id] == whole[request.id] for request in given[:3])
    assert complete(engine, given, Sampling(max_new_tokens=12, temperature=1.0, seed=4)) != whole


def test_samples_follow_the_models_distribution(tiny_model: Path) -> None:
    """1,500 first tokens after one prompt: each frequent token's count within 5 standard errors of its probability."""
    engine, prompt = engine_of(tiny_model), (7, 8, 9)
    with torch.no_grad():
        probabilities = torch.softmax(engine.model(input_ids=torch.tensor([prompt])).logits[0, -1].double(), 0).numpy()
    given = [Request(f"r{n}", prompt) for n in range(1500)]
    completions = complete(engine, given, Sampling(max_new_tokens=1, temperature=1.0))
    counts = np.bincount([completion.tokens[0] for completion in completions.values()], minlength=len(probabilities))
    for token in np.argsort(probabilities)[-5:]:
        p = probabilities[token]
        assert abs(counts[token] / 1500 - p) < 5 * np.sqrt(p * (1 - p) / 1500)


def test_nucleus_keeps_the_smallest_set_that_holds_top_p() -> None:
    """0.5 + 0.3 reach 0.7, so the third token is out; at 0.5 the first alone is enough."""
    probabilities = torch.tensor([[0.2, 0.5, 0.3]])
    nucleus = transformers_engine._nucleus
    assert nucleus(probabilities, 0.7)[0].tolist() == pytest.approx([0.0, 0.5, 0.3])
    assert nucleus(probabilities, 0.5)[0].tolist() == pytest.approx([0.0, 0.5, 0.0])


def test_a_prompt_at_the_limit_is_an_error_of_its_own(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, context=20)
    given = [Request("fits", (5,) * 18), Request("full", (5,) * 20), Request("long", (5,) * 40), Request("none", ())]
    completions = complete(engine, given, Sampling(max_new_tokens=8))
    assert len(completions["fits"].tokens) <= 2
    assert "leaves no room" in completions["full"].error
    assert "40 tokens" in completions["long"].error
    assert completions["none"].error == "empty prompt"


class Stopped(Exception):
    pass


def test_a_killed_run_gives_the_same_file(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "ROWS", 4)
    engine, given = engine_of(tiny_model), requests(18)
    sampling = Sampling(max_new_tokens=10, temperature=1.0)
    whole = complete_all(engine, given, sampling, tmp_path / "whole.jsonl")
    calls = []

    def stop(done: int) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        complete_all(engine, given, sampling, tmp_path / "killed.jsonl", stop)
    kept = (tmp_path / "killed.jsonl").read_bytes()
    assert kept.count(b"\n") == 8
    (tmp_path / "killed.jsonl").write_bytes(kept[:-15])  # a torn last line
    progress: list[int] = []
    assert complete_all(engine, given, sampling, tmp_path / "killed.jsonl", progress.append) == whole
    assert progress[0] == 7
    assert sum(progress) == 18
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_two_requests_with_one_id_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share an id"):
        complete_all(engine_of(tiny_model), [Request("a", (1,)), Request("a", (2,))], Sampling(4), tmp_path / "x.jsonl")
