"""How alike answers are to their prompt's demonstration, as a frozen model sees them: a reward without a reward model.

An answer's embedding is the mean of the last hidden states after its tokens, the end token included, given the prompt. The
similarity of two answers is the cosine of their embeddings. A language model's hidden states share a large common part, so the
cosines of two unrelated answers are far from 0: compare samples of one prompt, not numbers of different models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gsil_bench.models.packing import TokenTree, micro_batches
from gsil_bench.models.policy import Policy
from gsil_bench.training.batches import Tree
from gsil_bench.training.critics import FORWARD_TOKENS
from gsil_bench.training.pairs import followed


def similarities(model: Policy, trees: Sequence[Tree]) -> list[list[float]]:
    """Cosine, −1 to 1, of each generated side to the demonstration of its tree.

    Args:
        model: frozen.
        trees: every completion of which has a token.

    Returns:
        For each tree as many numbers as it has generated sides.
    """
    found = embeddings(model, [tree.tokens for tree in trees], FORWARD_TOKENS)
    return [cosine_similarity(of_tree[1:], of_tree[:1]).tolist() for of_tree in found]


def embeddings(model: Policy, trees: Sequence[TokenTree], tokens: int) -> list[Tensor]:
    """The mean of the last hidden states after a completion's tokens, for every completion.

    Args:
        tokens: positions of a forward pass.

    Returns:
        (completions, hidden) for each tree, fp64, on the CPU.
    """
    longer = followed(trees)
    kept: dict[int, Tensor] = {}
    for group in micro_batches(longer, model.layout, tokens):
        states = model.hidden_states([longer[index] for index in group]).double().cpu()  # (scored, hidden)
        parts = iter(torch.split_with_sizes(states, [len(ids) for index in group for ids in longer[index].completions]))
        # The first state of a completion is the prompt's last: the token behind the completion was put there for its own last.
        kept |= {index: torch.stack([next(parts)[1:].mean(0) for _ in longer[index].completions]) for index in group}
    return [kept[index] for index in range(len(longer))]
