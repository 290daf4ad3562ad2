"""IPO: a squared loss with a finite target for the margin (arXiv 2310.12036), on own samples or on preferences.

    L = (h − 1 / (2 β))²,    h = log-ratio of the demonstration − log-ratio of the other answer

DPO's logistic loss pays for every further increase of the margin, so on pairs that always point one way only early stopping holds
the policy near the reference. Here the margin has a target, and beyond it the loss pulls back.

How this differs from the paper:

1. Without preference data the rejected answer is a sample of the initial policy, as for `dpo` here.
2. h is the difference of sums over tokens, as the paper has it. Some implementations take means over tokens.
3. β 0.1 puts the target at 5 nats. β (the paper's τ) was not tuned, and the learning rate is that of `dpo` here.

Known: the loss, which public implementations quote as eq. 17. Not read: the paper's experiments.

    python -m gsil_bench.compare --methods dpo,ipo --set ipo.beta=0.5
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs, SelfPlay


def squared_margin(pair: PairLogProbs, beta: float) -> Tensor:
    """(margin − 1 / (2 beta))², (pairs,)."""
    margin = pair.real_log_ratios - pair.generated_log_ratios
    return (margin - 1 / (2 * beta)).square()  # eq. 17, https://arxiv.org/abs/2310.12036


IPO = Method(
    name="ipo",
    summary="DPO's pairs with a squared loss: the margin has a target instead of growing without end.",
    loss=squared_margin,
    settings={"beta": 0.1},
    needs=frozenset({"generated", "reference", "preferences"}),
    protocol=SelfPlay(opponent="initial"),
    training={"learning_rate": 2e-6},
    paper="Azar et al., AISTATS 2024, https://arxiv.org/abs/2310.12036, eq. 17",
    formula="(real log-ratio − generated log-ratio − 1/(2 · beta))²",
)
