"""Engine and log-probs on many families of models, untrained: learned positions, sliding windows, soft-caps, no attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, ENDS, IN_SINGLE_PRECISION, MODELS, ONE_AT_A_TIME, generate, make_model, random_ids
from transformers import PreTrainedModel

from gsil_bench.generation.engine import Request, Sampling
from gsil_bench.generation.transformers_engine import TransformersEngine
from gsil_bench.models.logprobs import completion_logps
from gsil_bench.models.packing import TokenTree
from gsil_bench.records import Encoded

NEW = 12


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate(name: str) -> None:
    """256 prompts of 1 to CONTEXT - 1 tokens; few rows, so that finished ones leave and others come in."""
    model, random = make_model(name), np.random.default_rng(0)
    lengths = [1, 1, CONTEXT - 1, CONTEXT - 1, CONTEXT - 2, *random.integers(1, CONTEXT, 251).tolist()]
    given = [Request(random_ids(random, length), Sampling(NEW)) for length in lengths]
    engine = TransformersEngine(model, ENDS, CONTEXT, lambda ids: "", memory_bytes=2**20)
    completions = dict(engine.complete(given))
    assert sorted(completions) == list(range(256))
    for index, request in enumerate(given):
        assert completions[index].tokens == generate(model, request.prompt_ids, NEW), (name, index)
    assert len(completions[2].tokens) == len(completions[3].tokens) == 1
    assert ONE_AT_A_TIME.get(name, "") in " ".join(engine.notes)
    assert bool(engine.notes) == (name in ONE_AT_A_TIME)


@pytest.mark.parametrize("name", MODELS)
def test_samples_do_not_depend_on_rows(name: str) -> None:
    """In few rows and many, with prompts that begin alike and several samples of each."""
    model, random = make_model(name), np.random.default_rng(1)
    header = random_ids(random, 40)
    prompts = [header + random_ids(random, length) for length in random.integers(1, 30, 6)] + [random_ids(random, 5)]
    given = [Request(prompt, Sampling(NEW, 0.8, 0.9, seed=1), sample) for prompt in prompts for sample in range(3)]
    few, many = (TransformersEngine(model, ENDS, CONTEXT, lambda ids: "", memory_bytes=memory) for memory in (2**17, 2**30))
    assert dict(few.complete(given)) == dict(many.complete(given))
    assert bool(many.notes) == (name in ONE_AT_A_TIME)


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_of_new_and_of_given_tokens_equal_the_plain_forward(name: str) -> None:
    model, random = make_model(name), np.random.default_rng(2)
    engine = TransformersEngine(model, ENDS, CONTEXT, lambda ids: "", memory_bytes=2**20)
    prompts = [random_ids(random, length) for length in (1, 30, 50)]
    given = [Request(prompt, Sampling(NEW, 1.0), sample, logps=True) for prompt in prompts for sample in (0, 1)]
    completions = dict(engine.complete(given))
    plain = {index: plain_logps(model, given[index].prompt_ids, completions[index].tokens) for index in completions}
    trees = [
        TokenTree(prompt, (completions[2 * number].tokens, completions[2 * number + 1].tokens))
        for number, prompt in enumerate(prompts)
    ]
    told = [logps for tree in engine.logps(trees) for logps in tree]
    for index, completion in completions.items():
        assert completion.logps == pytest.approx(plain[index], abs=1e-5)
        assert told[index] == pytest.approx(plain[index], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in IN_SINGLE_PRECISION])
def test_log_probs_in_double_precision_equal_the_plain_forward(name: str) -> None:
    random, exact = np.random.default_rng(1), make_model(name).double()
    given = [Encoded(random_ids(random, prompt), random_ids(random, answer)) for prompt, answer in ((3, 40), (30, 5), (1, 1))]
    for sequence, logps in zip(given, completion_logps(exact, given), strict=True):
        assert logps.tolist() == pytest.approx(plain_logps(exact, sequence.prompt_ids, sequence.completion_ids), abs=1e-12)


@torch.no_grad()
def plain_logps(model: PreTrainedModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    plain = torch.log_softmax(logits, dim=-1)
    return [float(plain[len(prompt) - 1 + n, token]) for n, token in enumerate(completion)]
