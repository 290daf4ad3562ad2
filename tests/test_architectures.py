"""Engine and log-probs on other families of models, untrained: learned positions, sliding windows, soft-capped logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gsil_bench.generation.engine import Request, Sampling
from gsil_bench.generation.transformers_engine import TransformersEngine
from gsil_bench.models.logprobs import completion_logps
from gsil_bench.records import Encoded

CONTEXT, END = 128, 7
LLAMA_LIKE = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": END,
}
GPT2 = GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=1, eos_token_id=END)
MODELS = {
    "learned positions": lambda: GPT2LMHeadModel(GPT2),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**LLAMA_LIKE, sliding_window=16)),
    "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA_LIKE, head_dim=8, sliding_window=16)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = MODELS[request.param]().eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # far from uniform, so that a wrong mask or position shows
    return made


def random_ids(random: np.random.Generator, length: int) -> tuple[int, ...]:
    return tuple(random.integers(8, 200, length).tolist())


def test_greedy_equals_generate(model: PreTrainedModel) -> None:
    random = np.random.default_rng(0)
    given = [Request(str(n), random_ids(random, random.integers(1, 60))) for n in range(16)]
    given.append(Request("near the limit", random_ids(random, CONTEXT - 5)))
    engine, sampling = TransformersEngine(model, [END], CONTEXT, lambda ids: ""), Sampling(30)
    for batch in engine.batches(given, sampling):
        for index, completion in zip(batch, engine.complete([given[index] for index in batch], sampling), strict=True):
            ids = torch.tensor([given[index].prompt_ids])
            new = min(30, CONTEXT - ids.shape[1])
            options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": END}
            whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            assert completion.tokens == tuple(whole[0, ids.shape[1] :].tolist())


def test_padded_log_probs_equal_the_plain_forward(model: PreTrainedModel) -> None:
    random, exact = np.random.default_rng(1), model.double()
    given = [Encoded(random_ids(random, prompt), random_ids(random, answer)) for prompt, answer in ((3, 40), (30, 5), (1, 1))]
    for sequence, logps in zip(given, completion_logps(exact, given), strict=True):
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.completion_ids]])
        with torch.no_grad():
            plain = torch.log_softmax(exact(input_ids=ids).logits[0], dim=-1)
        start = len(sequence.prompt_ids)
        expected = torch.stack([plain[start + n - 1, token] for n, token in enumerate(sequence.completion_ids)])
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-12)
