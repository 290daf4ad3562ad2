"""Critics: a trunk with a scalar head that scores answers, after every token. Reward models and discriminators alike.

The score of an answer is that after its last token, its end token if it has one: a critic sees whether an answer ended. Scores
are logits: σ(score) is the probability that the answer is one of the positives, if both kinds are equally likely.

A critic is trained by the loop that trains policies, on trees whose real side is the positive and whose generated sides are the
negatives, with one of the losses here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import pad, softplus

from gsil_bench.methods import Method, PairLogProbs, TokenLogProbs
from gsil_bench.models import checkpoint
from gsil_bench.models.packing import TokenTree, micro_batches
from gsil_bench.models.policy import Policy
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.pairs import Scored, token_outputs

if TYPE_CHECKING:
    from gsil_bench.models.checkpoint import Dtype

HEAD_FILE = "scalar_head.safetensors"
FORWARD_TOKENS = 8192
"""Positions of a forward pass without gradients."""


def discrimination(pair: PairLogProbs) -> Tensor:
    """−log σ(score of the positive) − log σ(−score of the negative), of whole answers, (pairs,)."""
    positive, negative = (side.last(side.scores) for side in (pair.real, pair.generated))
    return softplus(-positive) + softplus(negative)


def token_ranking(pair: PairLogProbs) -> Tensor:
    """−log σ(score of the positive − score of the negative) at every token from the first that differs to the longer one's end, a
    mean over these positions, (pairs,); after its end an answer keeps its last score. Equal answers give 0.
    """
    sides, width = (pair.real, pair.generated), max(pair.real.longest, pair.generated.longest, 1)
    ids = [pad(side.table(side.ids + 1), (0, width - max(1, side.longest))) for side in sides]  # (pairs, width), 0 after the end
    compared = ((ids[0] != ids[1]).cumsum(1) > 0) & (ids[0] + ids[1] > 0)
    positive, negative = (_held(side, width) for side in sides)
    return (softplus(negative - positive) * compared).sum(1) / compared.sum(1).clamp(min=1)  # 2405.17888, the authors' code


def _held(side: TokenLogProbs, width: int) -> Tensor:
    """Scores at every position, after a completion's end its last one, (pairs, width)."""
    last = side.sum(torch.ones_like(side.scores)).long()[:, None] - 1  # (pairs, 1)
    steps = torch.arange(width, device=last.device)
    return side.table(side.scores).gather(1, torch.minimum(steps, last.clamp(min=0)))


INHERITED = (
    "learning_rate_factor", "batch_size", "micro_batch_tokens", "micro_batch_trees", "layout", "gradient_checkpointing",
    "optimizer",
)  # fmt: skip
"""Training settings that a critic takes over from its method, unless it has its own."""


def critic_of(method: Method) -> Method:
    """A method's critic as what the loop trains."""
    assert method.rollouts is not None and method.rollouts.critic is not None, f"{method.name} has no critic"
    critic, own = method.rollouts.critic, TrainConfig.of(method.training, where=method.name)
    return Method(
        name=f"{method.name}.critic",
        summary="Scores answers.",
        loss=critic.loss,
        settings=critic.settings,
        needs=frozenset({"generated", "scores"}),
        training={**{key: getattr(own, key) for key in INHERITED}, **critic.training},
    )


@torch.no_grad()
def token_scores(policy: Policy, trees: Sequence[TokenTree], tokens: int) -> list[Tensor]:
    """Scores after every token of every completion, tree by tree, on the CPU; the last is the answer's.

    Args:
        policy: with a scalar head.
        tokens: positions of a forward pass.
    """
    kept: dict[int, list[Tensor]] = {}
    for group in micro_batches(trees, policy.layout, tokens):
        members = [trees[index] for index in group]
        lengths = [len(completion) for tree in members for completion in tree.completions]
        scores = token_outputs(policy, members, Scored(tokens=True, scores=True))["scores"].cpu()
        parts = iter(torch.split_with_sizes(scores, lengths))
        kept |= {index: [next(parts).clone() for _ in trees[index].completions] for index in group}
    return [scores for index in range(len(trees)) for scores in kept[index]]


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Probability that a positive scores higher than a negative, ties counting half; NaN without one of them."""
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(np.concatenate((positives, negatives)))[: len(positives)]
    n, m = len(positives), len(negatives)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def save_head(policy: Policy, folder: Path) -> None:
    """Keep the scalar head beside the trunk's weights."""
    assert policy.scalar is not None, "a critic has a scalar head"
    save_file({name: value.detach().cpu().contiguous() for name, value in policy.scalar.state_dict().items()}, folder / HEAD_FILE)


def load_critic(folder: Path, device: str, dtype: Dtype, autocast: bool = False) -> Policy:
    """A critic that was kept: trunk and head."""
    policy = Policy(checkpoint.load_model(folder, device, dtype), autocast=autocast, scalar=True)
    load_head(policy, folder)
    return policy


def load_head(policy: Policy, folder: Path) -> None:
    """Take a scalar head that was kept."""
    assert policy.scalar is not None, "a critic has a scalar head"
    policy.scalar.load_state_dict(load_file(folder / HEAD_FILE))


def class_aucs(positives: Sequence[float], negatives: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """AUC of the positives against each class of negatives, and against all of them ("all")."""
    everything = [score for scores in negatives.values() for score in scores]
    return {**{name: auc(positives, scores) for name, scores in negatives.items()}, "all": auc(positives, everything)}
