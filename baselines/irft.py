"""IRFT: self-play in stages, each on a part of the demonstrations of its own (arXiv 2405.17888, the implicit half).

`rft` is the explicit half. The demonstrations are dealt out to T stages. In each, the policy as it has become answers the
prompts of that stage, and the demonstrations are set against these answers by the loss of SPIN, with the policy at the stage's
start as reference:

    −log σ(beta · ((log π_θ(y|x) − log π_ref(y|x)) − (log π_θ(y'|x) − log π_ref(y'|x))))

The log-ratio is the reward that this policy is the best for, so reward and policy are learned in one. With one stage it is
SPIN's first iteration; SPIN as played here (`spin`) uses all demonstrations in every round. However many stages there are, each
demonstration is answered once.

How this differs from the paper and its code (https://github.com/JasonJiaxiangLi/Reward_learning_SFT):

1. A stage's part is every T-th demonstration, the code's a contiguous piece of its file: here a file may be sorted.
2. Answers are samples at temperature 1 under the training's chat template, 256 tokens at most.
3. AdamW on all weights and the learning rate below. The code trains LoRA of rank 64 with RMSProp at 5e-7, one epoch a stage.
4. The run's epochs are split evenly: each stage goes over its part as often as `sft` goes over all.

Known: the loss, β 0.1 and the 5 stages of 10,000, from the code; an Open LLM average of 61.03 from 59.48 for a model of 7 billion
parameters, second-hand. Not known here: its tables (images).

    python -m gsil_bench.compare --methods sft,spin,irft
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from gsil_bench.methods import Method, PairLogProbs, SelfPlay


def stage_logistic(pair: PairLogProbs, beta: float) -> Tensor:
    """−log σ of beta times the margin between the two log-ratios, (pairs,)."""
    return -logsigmoid(beta * (pair.real_log_ratios - pair.generated_log_ratios))


IRFT = Method(
    name="irft",
    summary="Self-play in stages: each on demonstrations of its own, against the samples of the stage before.",
    loss=stage_logistic,
    settings={"beta": 0.1},
    needs=frozenset({"generated", "reference"}),
    protocol=SelfPlay(opponent="previous", rounds=5, demonstrations="disjoint"),
    training={"learning_rate": 2e-6},
    paper="Li et al., NeurIPS 2024, https://arxiv.org/abs/2405.17888",
    formula="−log σ(beta · (real log-ratio − generated log-ratio))",
)
