"""Untrained models of many families with 200 tokens and a context of 128, made in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CONTEXT, VOCABULARY = 128, 200
ENDS = tuple(range(8, 16))
"""Several end tokens, so that untrained models end some of their answers."""
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": ENDS[0]}
LLAMA_LIKE = SPECIAL | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
GPT2_LIKE = SPECIAL | {"n_embd": 32, "n_layer": 2, "n_head": 4}
OPT_LIKE = {name: value for name, value in LLAMA_LIKE.items() if name not in ("intermediate_size", "num_key_value_heads")}
NEOX_LIKE = {name: value for name, value in LLAMA_LIKE.items() if name != "num_key_value_heads"}
SOFT_CAPPED = LLAMA_LIKE | {"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"}
"""transformers' SDPA leaves the soft-cap of the scores out without a word."""
STATE_SPACE = SPECIAL | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE)),
    "learned positions": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_LIKE, n_positions=CONTEXT)),
    "learned positions with an offset": lambda: OPTForCausalLM(OPTConfig(**OPT_LIKE, ffn_dim=64, word_embed_proj_dim=32)),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE)),
    "partly rotated": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX_LIKE)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**LLAMA_LIKE, sliding_window=16)),
    "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SOFT_CAPPED)),
    "attention sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**LLAMA_LIKE, head_dim=8, sliding_window=16, num_local_experts=2, num_experts_per_tok=1)
    ),
    "position biases": lambda: BloomForCausalLM(BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4)),
    "state space": lambda: MambaForCausalLM(MambaConfig(**STATE_SPACE)),
}

ONE_AT_A_TIME = {
    "attention sinks": "s_aux",
    "position biases": "does not use transformers' attention interface",
    "state space": "differ",
}
"""Those that cannot be run over slots, and a part of the reason that is given."""


IN_SINGLE_PRECISION = ("attention sinks", "state space")
"""Those whose own code computes in fp32 whatever the weights are."""


def make_model(name: str, std: float = 0.3) -> PreTrainedModel:
    """The model; its weights are far from 0, so that its logits are far from uniform and a wrong mask or position shows."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


def random_ids(random: np.random.Generator, length: int) -> tuple[int, ...]:
    return tuple(random.integers(16, VOCABULARY, length).tolist())


def generate(
    model: PreTrainedModel, prompt: Sequence[int], new: int, context: int = CONTEXT, ends: Sequence[int] = ENDS
) -> tuple[int, ...]:
    """What transformers itself completes a single prompt with."""
    ids = torch.tensor([list(prompt)])
    options = {"do_sample": False, "max_new_tokens": min(new, context - len(prompt)), "pad_token_id": 0}
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=list(ends), **options)
    return tuple(whole[0, len(prompt) :].tolist())
