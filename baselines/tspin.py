"""T-SPIN: self-play on triplets, without a reference (arXiv 2601.08198).

Each demonstration y stands beside a sample y' of the policy of the round before and a sample y₀ of the policy that training
started from. They are to be likely in this order:

    −log σ(α (log π(y|x) − log π(y'|x)))  −  β log σ(α (log π(y'|x) − log π(y₀|x)))

The first term is the current advantage, which fades as the samples come to resemble the demonstrations; the second, the
historical one, stays. The reward α log π(z|x) follows from an entropy bonus of weight α for the opponent, and is what decides
generation: no reference is needed, and none holds the policy.

How this differs from the paper:

1. In the first round y₀ is the very sample y', so the second term is a constant there. The paper sets β to 0 in that round.
2. Two rounds as `spin` here; the paper plays five. AdamW and the learning rate below instead of RMSprop.
3. Answers are sampled at temperature 1 under the training's chat template, 256 tokens at most; the end token counts. The paper
   generates under a template of its own, and does not say how it samples.

Known: the loss (its formula second-hand; the text that it follows from, eq. 4 and 6 put together, was read), ℓ(x) = −log σ(x),
α 1.0 and β 0.1, and its tables, on which it gains from round to round where SPIN wavers: 43.47 against 40.62 on average over
ten tasks after five rounds of a model of 7 billion parameters. Not known here: its learning rate and epochs; error bars are not
reported.

    python -m gsil_bench.compare --methods sft,spin,t-spin
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from gsil_bench.methods import Method, PairLogProbs, SelfPlay


def triplet_logistic(pair: PairLogProbs, alpha: float, beta: float) -> Tensor:
    """−log σ of the current advantage − beta · log σ of the historical one, (pairs,).

    Args:
        alpha: factor of the log-probs, the paper's entropy weight.
        beta: weight of the historical advantage; 0 is SPIN without a reference.
    """
    current = pair.policy_real_logps - pair.policy_generated_logps  # (pairs,)
    historical = pair.policy_generated_logps - pair.policy_first_logps
    return -logsigmoid(alpha * current) - beta * logsigmoid(alpha * historical)


T_SPIN = Method(
    name="t-spin",
    summary="Self-play on triplets: demonstration above newest sample above the first round's, without a reference.",
    loss=triplet_logistic,
    settings={"alpha": 1.0, "beta": 0.1},
    needs=frozenset({"generated", "first"}),
    protocol=SelfPlay(opponent="previous", rounds=2),
    training={"learning_rate": 2e-6},
    paper="Wang et al., NeurIPS 2025, https://arxiv.org/abs/2601.08198",
    formula="−log σ(alpha · (log π(y) − log π(y'))) − beta · log σ(alpha · (log π(y') − log π(y₀)))",
)
