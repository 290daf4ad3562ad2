"""The engine that runs everywhere: a transformers model, batches of similar length, finished rows dropped as they finish.

Sampling draws one uniform number per (seed, request id, position) and inverts the cumulative distribution, so an answer's
randomness belongs to its request and not to its place in a batch. A batch's composition depends on the requests only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from gsil_bench.generation.engine import Completion, Request, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 128
"""Sequences per batch at most."""
TOKENS = 32_768
"""Prompt and answer tokens per batch at most (memory of the key-value cache)."""
COMPACT_BELOW = 0.75
"""The batch is shrunk when fewer than this share of its rows are unfinished."""


class TransformersEngine:
    """Completes prompts with a model in this process."""

    def __init__(
        self,
        model: PreTrainedModel,
        end_token_ids: Sequence[int],
        context_length: int,
        decode: Callable[[Sequence[int]], str],
        autocast: bool = False,
    ) -> None:
        self.model = model
        self.autocast = autocast
        self.end_token_ids = torch.tensor(sorted(end_token_ids))
        self.context_length = context_length
        self.decode = decode

    IDENTITY = f"transformers-{transformers.__version__}/v1/rows{ROWS}-tokens{TOKENS}"

    @property
    def identity(self) -> str:
        """Engine, version and what decides a batch."""
        return self.IDENTITY

    def batches(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """Requests of similar prompt length together, shortest first."""
        order = sorted(range(len(requests)), key=lambda index: (len(requests[index].prompt_ids), index))
        plan: list[list[int]] = []
        for index in order:
            width = min(len(requests[index].prompt_ids) + sampling.max_new_tokens, self.context_length)
            if not plan or len(plan[-1]) == ROWS or width * (len(plan[-1]) + 1) > TOKENS:
                plan.append([])
            plan[-1].append(index)
        return plan

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Complete one batch; a prompt that leaves no room in the context is an error of that request alone."""
        rooms = {request.id: self.context_length - len(request.prompt_ids) for request in requests}
        fitting = [request for request in requests if rooms[request.id] > 0 and request.prompt_ids]
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            drawn = dict(zip((request.id for request in fitting), self._decode_batch(fitting, sampling), strict=True))
        return [self._completion(request, drawn.get(request.id)) for request in requests]

    def _completion(self, request: Request, tokens: list[int] | None) -> Completion:
        if tokens is None:
            length = len(request.prompt_ids)
            error = (
                f"a prompt of {length} tokens leaves no room in a context of {self.context_length}" if length else "empty prompt"
            )
            return Completion(request.id, (), "", "error", error)
        finished = bool(tokens) and tokens[-1] in self.end_token_ids.tolist()
        return Completion(request.id, tuple(tokens), self.decode(tokens), "stop" if finished else "length")

    @torch.no_grad()
    def _decode_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """New tokens of each request, the end token included."""
        if not requests:
            return []
        device = self.model.device
        end_tokens = self.end_token_ids.to(device)
        input_ids, attention_mask = (tensor.to(device) for tensor in _left_padded(requests))  # (rows, width)
        budgets = [min(sampling.max_new_tokens, self.context_length - len(request.prompt_ids)) for request in requests]
        remaining = torch.tensor(budgets, device=device)  # (rows,)
        uniforms = torch.tensor(np.stack([_uniforms(request.id, sampling) for request in requests]), device=device)
        rows = torch.arange(len(requests), device=device)  # which request each live row belongs to
        completions: list[list[int]] = [[] for _ in requests]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cache, step = DynamicCache(), 0
        while True:
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens = _choose(output.logits[:, -1].float(), sampling, uniforms[rows, step])  # (live rows,)
            step += 1
            live = (remaining[rows] >= step).tolist()
            for row, token, alive in zip(rows.tolist(), tokens.tolist(), live, strict=True):
                if alive:
                    completions[row].append(token)
            remaining[rows[torch.isin(tokens, end_tokens)]] = 0
            unfinished = remaining[rows] > step
            count = int(unfinished.sum())
            if count == 0:
                return completions
            positions = (positions[:, -1:] + 1).clamp(max=self.context_length - 1)  # only finished rows reach the limit
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
            if count < COMPACT_BELOW * len(rows):
                keep = unfinished.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, tokens, positions, attention_mask = rows[keep], tokens[keep], positions[keep], attention_mask[keep]
            input_ids = tokens.unsqueeze(1)


def _left_padded(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, width): generation appends on the right, so prompts are aligned there."""
    width = max(len(request.prompt_ids) for request in requests)
    input_ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros(len(requests), width, dtype=torch.long)
    for row, request in enumerate(requests):
        input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, width - len(request.prompt_ids) :] = 1
    return input_ids, mask


def _uniforms(request_id: str, sampling: Sampling) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The random numbers of one request: a function of the seed and its id. (max_new_tokens,)."""
    if sampling.temperature == 0:
        return np.zeros(sampling.max_new_tokens)
    key = hashlib.sha256(f"{sampling.seed}/{request_id}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(sampling.max_new_tokens)


def _choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The next token of each row: the mode at temperature 0, otherwise by inversion of the cumulative distribution.

    Args:
        logits: (rows, vocabulary) fp32.
        uniform: (rows,) fp64 in [0, 1).
    """
    if bool(logits.isnan().any()):
        raise ArithmeticError(
            "the model's logits are not numbers: the training diverged (a lower learning rate may help), or the model is broken"
        )
    if sampling.temperature == 0:
        return logits.argmax(1)
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(1)
    threshold = (uniform * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities with all but the smallest set of tokens that holds top_p set to zero. (rows, vocabulary)."""
    ordered, index = probabilities.sort(1, descending=True)
    outside = ordered.cumsum(1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(1, index, ordered.masked_fill(outside, 0.0))
