"""IQ-Learn for language models, offline: maximum likelihood with a penalty on temporal differences (arXiv 2409.01369).

The logits are read as Q-values of a token MDP with known transitions. With v(s) = log Σ_a exp Q(s, a), log π(a|s) = Q(s, a) −
v(s), and the loss on demonstrations is (eq. 14)

    L = Σ_t λ (v(s_t) + log π(a_t|s_t) − γ v(s_{t+1}))² − log π(a_t|s_t)
      = Σ_t λ (Q(s_t, a_t) − γ v(s_{t+1}))² − log π(a_t|s_t),    v = 0 after the last token

The bracket is the reward that the Q-values imply; the penalty keeps it small, and with it ties the logits' level, which maximum
likelihood leaves free, to the value of the rest of the answer. At λ = 0 this is SFT.

How this differs from the paper:

1. Demonstrations only. The paper also mixes in a tenth of own samples (its eq. 16, not found).
2. λ (`penalty`) 0.1 and γ 1 are those of a public reimplementation (https://github.com/sankyde/IRL); the paper's tables were not
   found. That code counts padding in its means; here no position but scored tokens enters, and v is 0 right after them.
3. A pre-trained model's logits have an arbitrary level, so the penalty is large at first and moves it.
4. The sum over tokens is not discounted, though γ is a setting; at the default of 1 that is the same.
5. AdamW and SFT's learning rate.

Known: eq. 14, second-hand (a digest of the paper), and the identity of its two forms (derived, tested). The normaliser v comes
from the tiled head, which takes the place of a fused kernel on a GPU.

    python -m gsil_bench.compare --methods sft,iq-learn --set iq-learn.penalty=0.01
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs


def offline_iq(pair: PairLogProbs, penalty: float, gamma: float) -> Tensor:
    """Σ_t penalty (Q_t − gamma v_{t+1})² − log π_t of the demonstrations, (pairs,)."""
    tokens = pair.real
    q = tokens.logps + tokens.normalisers  # (tokens,): the logit of the demonstrated token
    implied_reward = q - gamma * tokens.following(tokens.normalisers)  # v = 0 after the last token
    return tokens.sum(penalty * implied_reward.square() - tokens.logps)  # eq. 14, https://arxiv.org/abs/2409.01369


IQ_LEARN = Method(
    name="iq-learn",
    summary="Maximum likelihood with a penalty on temporal differences of the logits, read as Q-values.",
    loss=offline_iq,
    settings={"penalty": 0.1, "gamma": 1.0},
    needs=frozenset({"tokens", "normalisers"}),
    training={"learning_rate": 1e-5},
    normalise="tokens",
    paper="Wulfmeier et al., NeurIPS 2024, https://arxiv.org/abs/2409.01369, eq. 14",
    formula="Σ_t penalty · (Q_t − gamma · v_{t+1})² − log π_t, Q the real token's logit, v = log Σ exp of the logits",
)
