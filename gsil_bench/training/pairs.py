"""From trees to what a loss is given: one forward pass, and its numbers as pairs of a demonstration and another answer."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gsil_bench.methods import OF_TOKENS, Method, PairLogProbs, TokenLogProbs
from gsil_bench.models.noise import EmbeddingNoise
from gsil_bench.models.packing import TokenTree, to_device
from gsil_bench.models.policy import Output
from gsil_bench.training.batches import Branch, Tree

AFTERWARDS = 0
"""A token that is put behind a completion whose every token is to be looked at: the last one is no input otherwise."""


@dataclass(frozen=True)
class Scored:
    """What a loss is given of the scored tokens besides the sums of their log-probs."""

    tokens: bool = False
    normalisers: bool = False
    """With the tokens."""
    temperature: float = 1.0
    """Of the policy's likelihood."""
    values: bool = False
    """The scalar head before each token, with the tokens."""
    scores: bool = False
    """The scalar head after each token, with the tokens and instead of log-probs."""

    @staticmethod
    def of(method: Method, temperature: float = 1.0) -> Scored:
        """What the method's loss needs."""
        needs = method.needs
        return Scored(bool(needs & OF_TOKENS), "normalisers" in needs, temperature, "values" in needs, "scores" in needs)

    @property
    def outputs(self) -> list[Output]:
        """Of the policy."""
        wanted: dict[Output, bool] = {
            "logps": not self.scores,
            "normalisers": self.normalisers,
            "scalars": self.values or self.scores,
        }
        return [name for name, asked in wanted.items() if asked]


SUMS = Scored()


def pair_logps(
    policy: torch.nn.Module, trees: Sequence[Tree], wanted: Scored = SUMS, noise: EmbeddingNoise | None = None
) -> tuple[PairLogProbs, Tensor]:
    """Policy log-probs of the trees' pairs in one forward pass, beside the reference's.

    A tree with k self-generations gives k pairs of weight 1/k, one without any a pair whose generated side is NaN.

    Args:
        wanted: what the pairs carry besides sums.
        noise: added to the embeddings.

    Returns:
        The log-probs, (pairs,) each, and the pairs' weights, (pairs,).
    """
    branches = [branch for tree in trees for branch in tree.branches]
    lengths = [len(branch.completion_ids) for branch in branches]
    found = token_outputs(policy, [tree.tokens for tree in trees], wanted, noise)
    logps = found["logps"]
    parts = torch.split_with_sizes(logps, lengths)
    sums = (
        pad_sequence(list(parts), batch_first=True).double().sum(1).float()
    )  # (branches,), rounded once, as the reference's are
    first = list(itertools.accumulate((len(tree.branches) for tree in trees), initial=0))
    pairs = [(first[n], first[n] + k + 1 if tree.generated else None) for n, tree in enumerate(trees) for k in _pairs_of(tree)]
    known = [math.nan if branch.reference_logp is None else branch.reference_logp for branch in branches]
    here = functools.partial(to_device, device=sums.device)
    table = torch.stack((sums, here(torch.tensor(known)), here(torch.tensor(lengths, dtype=sums.dtype))))  # (3, branches)
    real = table.index_select(1, here(torch.tensor([real for real, _ in pairs])))  # (3, pairs)
    # A prompt with samples alone has no demonstration: no loss may use it.
    real = torch.cat((real[:2].masked_fill(real[2] == 0, math.nan), real[2:]))
    others = [other for _, other in pairs if other is not None]
    if len(others) not in (0, len(pairs)):
        raise ValueError("either every tree of a step has a self-generation or none")
    generated = table.index_select(1, here(torch.tensor(others))) if others else torch.full_like(real, math.nan)
    weights = here(torch.tensor([1 / max(1, len(tree.generated)) for tree in of_pairs(trees)]))
    pair = PairLogProbs(real[0], generated[0], real[1], generated[1], real[2], generated[2], temperature=wanted.temperature)
    if earlier := [first[n] + 1 + len(tree.generated) + k for n, tree in enumerate(trees) if tree.first for k in _pairs_of(tree)]:
        pair = replace(pair, first_logps=sums.index_select(0, here(torch.tensor(earlier))))
    if wanted.tokens:
        views = [_token_view(branches, chosen, found) for chosen in ([real for real, _ in pairs], others)]
        pair = replace(pair, tokens=(views[0], views[1] if others else TokenLogProbs.unknown(real[0])))
    return pair, weights


def token_outputs(
    policy: torch.nn.Module, trees: Sequence[TokenTree], wanted: Scored, noise: EmbeddingNoise | None = None
) -> dict[str, Tensor]:
    """What one forward pass says of every token of the completions, (tokens,) each; log-probs that were not wanted are NaN."""
    lengths = [len(completion) for tree in trees for completion in tree.completions]
    if not wanted.scores:
        found = policy(trees, wanted.outputs, noise)
        names = ["values" if name == "scalars" else name for name in wanted.outputs]
        return dict(zip(names, found if len(names) > 1 else [found], strict=True))
    found = policy(followed(trees), wanted.outputs, noise)
    parts = torch.split_with_sizes(found, [length + 1 for length in lengths])
    scores = torch.cat([part[1:] for part in parts])  # the first is before the first token
    return {"scores": scores, "logps": torch.full_like(scores, math.nan)}


def followed(trees: Sequence[TokenTree]) -> list[TokenTree]:
    """The trees with a token behind every completion, whose last own token is then an input too."""
    return [TokenTree(tree.prompt_ids, tuple((*ids, AFTERWARDS) for ids in tree.completions)) for tree in trees]


def _token_view(branches: Sequence[Branch], chosen: Sequence[int], found: Mapping[str, Tensor]) -> TokenLogProbs:
    """The scored tokens of one branch of each pair.

    Args:
        branches: all, whose tokens lie one after the other in what was found.
        chosen: one for each pair.
        found: (tokens,) each.
    """
    logps, lengths = found["logps"], [len(branch.completion_ids) for branch in branches]
    starts = list(itertools.accumulate(lengths, initial=0))
    rows = [
        (starts[branch] + position, number, position, lengths[branch], token)
        for number, branch in enumerate(chosen)
        for position, token in enumerate(branches[branch].completion_ids)
    ]
    columns = torch.tensor(rows, dtype=torch.long).view(-1, 5).T.contiguous()
    source, pair, position, length, ids = to_device(columns, logps.device)
    taken = {"ids": ids, **{name: values.index_select(0, source) for name, values in found.items()}}
    normalisers = taken.pop("normalisers", torch.full_like(logps, math.nan).index_select(0, source))
    for name in {name for branch in chosen for name in branches[branch].of_tokens}:
        numbers = [number for branch in chosen for number in branches[branch].of_tokens[name]]
        taken[name] = to_device(torch.tensor(numbers, dtype=torch.float32), logps.device)
    longest = max((lengths[branch] for branch in chosen), default=0)
    return TokenLogProbs(taken.pop("logps"), normalisers, pair, position, length, len(chosen), longest, taken)


def _pairs_of(tree: Tree) -> range:
    return range(max(1, len(tree.generated)))


def of_pairs(trees: Sequence[Tree]) -> list[Tree]:
    """The tree of every pair."""
    return [tree for tree in trees for _ in _pairs_of(tree)]
