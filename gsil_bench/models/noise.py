"""Uniform noise on the input embeddings while training (NEFTune, arXiv 2310.05914): the same numbers in every layout and after
every interruption.

A tree's noise is a function of the run's seed, the step and the tree's name. It is drawn once for each of the tree's tokens, the
prompt's first, then those of each completion, and handed to wherever the layout puts the token. So the noise of a prompt is
shared by its completions also where the prompt is computed once for each; it is scaled with the length of the first of them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gsil_bench.models.packing import Layout, TokenTree, to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EmbeddingNoise:
    """What is added to the embeddings of some trees in one step."""

    alpha: float
    """Noise is uniform within ± alpha / √(L d), for a sequence of L real tokens and d dimensions."""
    seed: int
    step: int
    names: tuple[str, ...]
    """Of the trees."""

    @contextmanager
    def on(self, model: PreTrainedModel, trees: Sequence[TokenTree], layout: Layout) -> Iterator[None]:
        """While the block runs, the model's embeddings of these trees have the noise added."""

        def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
            rows, width, size = embeddings.shape
            noise = torch.cat([self.of_tree(n, tree, size, embeddings.device) for n, tree in enumerate(trees)])
            places = to_device(torch.tensor(_places(trees, layout, width, rows)), embeddings.device)
            nothing = noise.new_zeros(1, size)  # at padding
            return embeddings + torch.cat((noise, nothing))[places].view(rows, width, size).to(embeddings.dtype)

        handle = model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def of_tree(self, number: int, tree: TokenTree, size: int, device: torch.device) -> Tensor:
        """The noise of a tree's inputs: its prompt, then each completion but for its last token. (inputs, size), fp32."""
        name = f"{self.seed}\0{self.step}\0{self.names[number]}".encode()
        random = torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
        counts = [len(tree.prompt_ids), *(max(0, len(completion) - 1) for completion in tree.completions)]
        lengths = [len(tree.prompt_ids) + len(completion) for completion in tree.completions]
        uniform = torch.rand(sum(counts), size, generator=random, device=device) * 2 - 1
        scales = [self.alpha / math.sqrt(length * size) for length in (lengths[0], *lengths)]
        parts = torch.split_with_sizes(uniform, counts)
        return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)])


def _places(trees: Sequence[TokenTree], layout: Layout, width: int, rows: int) -> list[int]:
    """Of each position in the layout: which of the trees' inputs lies there, −1 where none does. (rows · width)"""
    sequences: list[list[int]] = []
    start = 0
    for tree in trees:
        counts = [len(tree.prompt_ids), *(max(0, len(completion) - 1) for completion in tree.completions)]
        prompt, *completions = (
            list(range(start + begin, start + end)) for begin, end in itertools.pairwise([0, *itertools.accumulate(counts)])
        )
        alone = [prompt, *completions] if layout == "shared" else [prompt + completion for completion in completions]
        sequences += alone
        start += sum(counts)
    if layout != "padded":
        sequences = [list(itertools.chain.from_iterable(sequences))]
    assert len(sequences) == rows
    return [place for sequence in sequences for place in sequence + [-1] * (width - len(sequence))]
