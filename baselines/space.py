"""SPACE: self-play by noise-contrastive estimation (arXiv 2512.07175): GSIL's logistic loss with a prior ratio, over rounds.

A classifier tells demonstrations from samples of the policy of the round before, of which it expects μ (`prior_ratio`) for each
demonstration. With r = log π_θ − log π_ref and σ_μ(r) = 1 / (1 + μ e^−r) = σ(r − log μ),

    L = −log σ_μ(r(y)) − μ log(1 − σ_μ(r(y')))

Its optimum is r = log(p_data / π_ref), so π_θ = p_data, for every μ. At μ = 1 it is `gsil-logistic` at scale 1 and shift 0.

How this differs from the paper:

1. The reward r and σ_μ are the paper's (second-hand, from a digest). The factor μ of the second term is derived: it is
   noise-contrastive estimation's, and without it the optimum would be p_data · μ, against the paper's theorem.
2. The paper tries μ = 1, 3 and 7 over up to five rounds (second-hand). Its times grow with μ, so μ seems to be the number of
   samples too; its learning rates are not known here. Default 1, two rounds as `spin` here; to train on μ samples of each prompt
   set `samples` as well.
3. Each round trains on its own self-generations, with AdamW and the learning rate of `gsil-logistic`.

    python -m gsil_bench.compare --methods spin,gsil-logistic,space --set space.prior_ratio=2
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from gsil_bench.methods import Method, PairLogProbs, SelfPlay


def noise_contrastive(pair: PairLogProbs, prior_ratio: float) -> Tensor:
    """−log σ(r − log μ) − μ log σ(log μ − r'), (pairs,).

    Args:
        prior_ratio: μ > 0, samples that the classifier expects for each demonstration.
    """
    shift = math.log(prior_ratio)
    return -logsigmoid(pair.real_log_ratios - shift) - prior_ratio * logsigmoid(shift - pair.generated_log_ratios)


SPACE = Method(
    name="space",
    summary="Self-play by noise-contrastive estimation: the logistic density-ratio loss with a prior ratio, over rounds.",
    loss=noise_contrastive,
    settings={"prior_ratio": 1.0},
    needs=frozenset({"generated", "reference"}),
    protocol=SelfPlay(opponent="previous", rounds=2),
    training={"learning_rate": 2e-6},
    paper="Wang et al., NeurIPS 2025, https://arxiv.org/abs/2512.07175 (weights derived)",
    formula="−log σ(r − log μ) − μ log σ(log μ − r'), r = log-ratio, μ = prior_ratio",
)
