"""DFT: supervised fine-tuning in which each token counts by its own probability (arXiv 2508.05629).

SFT's gradient is that of a policy gradient whose reward is 1 on the demonstrated token and whose importance weight is
1 / π. The factor π, held constant, cancels that weight:

    L = −Σ_t sg(π(y_t | x, y_<t)) log π(y_t | x, y_<t)        (eq. 9; sg: no gradient passes)

A token that the model finds unlikely therefore pulls little, and the model stays nearer to what it already does.

How this differs from the paper and its code (https://github.com/yongliang-wu/DFT):

1. A step's loss is divided by the scored tokens of the whole step, not of each micro-batch.
2. SFT's learning rate, so that the two differ in the weight alone. The authors use 5e-5 (2e-5 for the largest model),
   for SFT as well.

Known: the loss, the settings, and that it loses to SFT where one well-specified answer of low entropy is asked for (the
authors' README). Not known here: whether the gains that are reported on mathematics hold for other data.

    python -m gsil_bench.compare --methods sft,dft
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs


def weighted_by_probability(pair: PairLogProbs) -> Tensor:
    """−Σ_t sg(π_t) log π_t of the demonstrations, (pairs,)."""
    logps = pair.real.logps  # (tokens,)
    return -pair.real.sum(logps.detach().exp() * logps)  # eq. 9, https://arxiv.org/abs/2508.05629


DFT = Method(
    name="dft",
    summary="Maximum likelihood of the demonstrations with each token weighted by its probability.",
    loss=weighted_by_probability,
    needs=frozenset({"tokens"}),
    training={"learning_rate": 1e-5},
    normalise="tokens",
    paper="Wu et al., 2025, https://arxiv.org/abs/2508.05629, eq. 9",
    formula="−Σ_t sg(π_t) log π_t of the real tokens",
)
