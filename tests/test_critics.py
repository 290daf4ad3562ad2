"""Critics: what the scalar head sees, the losses by hand, and AUCs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gsil_bench.methods import Critic, Method, PairLogProbs, Rollouts, TokenLogProbs
from gsil_bench.models.checkpoint import load_model
from gsil_bench.models.packing import TokenTree
from gsil_bench.models.policy import Policy
from gsil_bench.training import loop
from gsil_bench.training.batches import Branch, ShuffledSteps, Tree
from gsil_bench.training.critics import (
    auc,
    class_aucs,
    critic_of,
    discrimination,
    load_critic,
    token_scores,
)
from gsil_bench.training.pairs import Scored, pair_logps

TREES = [TokenTree((20, 21, 22), ((5, 6, 7, 8), (9,))), TokenTree((30,), ((10, 11), (12, 13, 14)))]


def with_head(folder: Path) -> Policy:
    policy = Policy(load_model(folder), scalar=True)
    assert policy.scalar is not None
    torch.nn.init.normal_(policy.scalar.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(policy.scalar.bias, 0.5)
    return policy


def plain_scalars(policy: Policy, folder: Path, sequence: tuple[int, ...]) -> Tensor:
    """w · h + b at every position, from transformers' own forward pass over the sequence alone."""
    assert policy.scalar is not None
    hidden = load_model(folder).model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
    return hidden @ policy.scalar.weight + policy.scalar.bias


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@torch.no_grad()
def test_scores_are_the_head_after_each_token(tiny_model: Path, layout: str) -> None:
    policy = with_head(tiny_model)
    if layout != policy.layout:
        policy.restore()
        policy = Policy(load_model(tiny_model), layout, scalar=True)
        assert policy.scalar is not None
        torch.nn.init.normal_(policy.scalar.weight, generator=torch.Generator().manual_seed(1))
        torch.nn.init.constant_(policy.scalar.bias, 0.5)
    found = iter(token_scores(policy, TREES, 4096))
    for tree in TREES:
        for ids in tree.completions:
            wanted = plain_scalars(policy, tiny_model, (*tree.prompt_ids, *ids))[len(tree.prompt_ids) :]
            torch.testing.assert_close(next(found), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_values_are_the_head_before_each_token(tiny_model: Path) -> None:
    policy = with_head(tiny_model)
    trees = [Tree("t", tree.prompt_ids, Branch(()), tuple(Branch(ids) for ids in tree.completions)) for tree in TREES]
    pair, _ = pair_logps(policy, trees, Scored(tokens=True, values=True))
    wanted = [
        plain_scalars(policy, tiny_model, (*tree.prompt_ids, *ids))[len(tree.prompt_ids) - 1 : -1]
        for tree in TREES
        for ids in tree.completions
    ]
    torch.testing.assert_close(pair.generated.values, torch.cat(wanted), rtol=0, atol=1e-5)
    assert bool(pair.generated.scores.isnan().all())


def view(scores: list[float], lengths: tuple[int, ...]) -> TokenLogProbs:
    pair = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])
    position = torch.tensor([place for length in lengths for place in range(length)])
    numbers = torch.tensor(scores, requires_grad=True)
    nothing = torch.full_like(numbers, math.nan)
    counts = torch.tensor(lengths)[pair]
    return TokenLogProbs(nothing, nothing, pair, position, counts, len(lengths), max(lengths), {"scores": numbers})


def pair_of(real: TokenLogProbs, generated: TokenLogProbs) -> PairLogProbs:
    nothing = torch.full((real.pairs,), math.nan)
    return PairLogProbs(*[nothing] * 6, (real, generated))


def test_discrimination_reads_the_last_scores_alone() -> None:
    """Scores 0 and log 3 at the ends: −log σ(0) − log σ(−log 3) = log 2 + log 4 = log 8; the other way log 2 − log ¾ = log 8/3.
    Slopes: −(1 − σ(0)) = −½ and σ(log 3) = ¾, and 0 at tokens before the end.
    """
    real, generated = view([7.0, 0.0, math.log(3)], (2, 1)), view([math.log(3), -5.0, 0.0], (1, 2))
    losses = discrimination(pair_of(real, generated))
    assert losses.tolist() == pytest.approx([math.log(8), math.log(4 / 3) + math.log(2)])
    up, down = torch.autograd.grad(losses.sum(), (real.scores, generated.scores))
    assert up.tolist() == pytest.approx([0.0, -0.5, -0.25])
    assert down.tolist() == pytest.approx([0.75, 0.0, 0.5])


def test_auc_by_hand() -> None:
    """Of the pairs (2, 1), (2, 3), (4, 1), (4, 3) three are in order; a tie counts half; one side alone is unknown."""
    assert auc([2.0, 4.0], [1.0, 3.0]) == 0.75
    assert auc([2.0], [2.0, 1.0]) == 0.75
    assert math.isnan(auc([], [1.0]))
    told = class_aucs([2.0, 4.0], {"short": [1.0], "long": [3.0]})
    assert told == {"short": 1.0, "long": 0.5, "all": 0.75}


def _no_reward(samples: TokenLogProbs) -> Tensor:
    return samples.scores


def test_a_critic_takes_over_sizes_and_the_rates_factor_but_not_the_rate() -> None:
    method = Method(
        "m", "", None, training={"learning_rate": 3.0, "learning_rate_factor": 50, "batch_size": 7, "epochs": 9},
        rollouts=Rollouts(_no_reward, critic=Critic(discrimination, training={"epochs": 2})),
    )  # fmt: skip
    training = critic_of(method).training
    assert (training["learning_rate_factor"], training["batch_size"], training["epochs"]) == (50, 7, 2)
    assert "learning_rate" not in training


def test_a_trained_critic_tells_answers_apart_and_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    """Positives end in token 5, negatives in 6: found in a few steps, and again from the files that the loop leaves."""
    trees = [Tree(f"t{n}", (20 + n, 21), Branch((30 + n, 5)), (Branch((40 + n, 6)),)) for n in range(16)]
    training = {"learning_rate": 1e-2, "batch_size": 8, "schedule": "constant", "warmup": 0.0}
    method = Method("critic", "", discrimination, needs=frozenset({"generated", "scores"}), training=training)
    model = load_model(tiny_model)
    loop.train(model, method, loop.Schedule(ShuffledSteps(trees, 8, 30, (0, 0))), tmp_path)
    model.save_pretrained(tmp_path)
    policy = load_critic(tmp_path, "cpu", "fp32")
    others = [TokenTree((50 + n, 21), ((60 + n, 5), (70 + n, 6))) for n in range(8)]
    scores = [float(each[-1]) for each in token_scores(policy, others, 4096)]
    assert auc(scores[::2], scores[1::2]) == 1.0
