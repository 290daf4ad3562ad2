"""RLSR: a sample is rewarded for being like the demonstration, by the cosine of two embeddings (arXiv 2510.14200).

    r(y') = cos(E(y'), E(y)),    maximised with a penalty for leaving the reference, kl · KL(π ‖ π_ref)

There is no reward model to train. E is the mean of the last hidden states after an answer's tokens, of the frozen model that
the run starts from (gsil_bench/training/similarity.py). The prompt's samples are compared with one another (GRPO), so only
differences between their cosines count, not their level.

How this differs from the paper:

1. E. The paper's abstract says semantic embeddings; its best-known row is marked "SB". Here E is the starting model itself, so
   that nothing has to be downloaded. Its common part is not taken out.
2. Training goes on from `sft`, which gets half of the epochs: the paper's "SFT + RLSR", its best row.
   `--set rlsr.starts_from=` is RLSR from the model as given.
3. The reference of the penalty is where the reinforcement learning starts. The paper's is called the base model.

Known (from the abstract and a digest): the reward, PPO or GRPO with a penalty, and AlpacaEval win rates of Qwen-7B, 21.01 for
SFT, 26.34 for RLSR and 30.73 for both. Not known here: the number of samples, β, learning rates, whether the reward is scaled.

    python -m gsil_bench.compare --methods sft,rlsr
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Method, Rollouts, SelfPlay, TokenLogProbs
from gsil_bench.training.policy_gradient import clipped_policy_gradient


def similarity_reward(samples: TokenLogProbs) -> Tensor:
    """The cosine of sample and demonstration, at the sample's last token; (tokens,)."""
    return samples.at_end(samples.last(samples.similarity))


RLSR = Method(
    name="rlsr",
    summary="Reinforcement learning on how alike a sample and the demonstration are to the frozen starting model.",
    loss=clipped_policy_gradient,
    settings={"clip": 0.2},
    needs=frozenset({"tokens"}),
    protocol=SelfPlay(opponent="initial", samples=4, max_new_tokens=128),
    rollouts=Rollouts(reward=similarity_reward, needs=frozenset({"similarity"}), baseline="group", kl=0.01),
    starts_from="sft",
    training={"learning_rate": 1e-6},
    normalise="generated-tokens",
    paper="Wang et al., 2025, https://arxiv.org/abs/2510.14200 (the abstract)",
    formula="max E_π[cos(E(y'), E(y))] − kl · KL(π ‖ π_ref)",
)
