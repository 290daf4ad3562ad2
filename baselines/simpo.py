"""SimPO: a pairwise loss on mean log-probs without a reference (arXiv 2405.14734), on own samples or on preferences.

    L = −log σ(β / |y| · log π(y|x) − β / |y'| · log π(y'|x) − γ)

The reward is what decides generation, the log-prob per token, and the margin must reach γ. There is no reference to compute, and
none to hold the policy.

How this differs from the paper:

1. Without preference data the rejected answer is a sample of the initial policy, as for `dpo` here.
2. Lengths count the end token, and nothing is truncated.
3. β 2.0 and γ 0.5 are the defaults of torchtune's implementation; the authors choose both for each model. The learning rate is
   that of the pairwise losses here; theirs are near 5e-7 for 7 billion parameters.

Known: the loss. Not known here: the paper's tables.

    python -m gsil_bench.compare --methods dpo,simpo --set simpo.gamma=1.0
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from gsil_bench.methods import Method, PairLogProbs, SelfPlay


def mean_margin(pair: PairLogProbs, beta: float, gamma: float) -> Tensor:
    """−log σ(beta · (mean log-prob − the other's) − gamma), (pairs,); an empty answer has the mean 0."""
    real = pair.policy_real_logps / pair.real_tokens
    generated = pair.policy_generated_logps / pair.generated_tokens.clamp(min=1)
    return -logsigmoid(beta * (real - generated) - gamma)


SIMPO = Method(
    name="simpo",
    summary="Demonstrations against other answers by their mean log-probs, without a reference.",
    loss=mean_margin,
    settings={"beta": 2.0, "gamma": 0.5},
    needs=frozenset({"generated", "preferences"}),
    protocol=SelfPlay(opponent="initial"),
    training={"learning_rate": 2e-6},
    paper="Meng et al., NeurIPS 2024, https://arxiv.org/abs/2405.14734",
    formula="−log σ(beta · (log π(real)/|real| − log π(generated)/|generated|) − gamma)",
)
