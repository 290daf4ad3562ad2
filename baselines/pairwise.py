"""Pairwise logistic losses: SPIN (arXiv 2401.01335) and DPO on own samples or on preferences (arXiv 2305.18290).

Both are the same function of the same four log-probs. They differ in the protocol only: SPIN's opponent is the policy
of the round before and it plays two rounds; DPO's opponent stays the initial policy, it plays one round, and it takes
the rejected answers of the data where there are any.

How `spin` differs from the paper and its code (https://github.com/uclaml/SPIN):

1. Self-generations are drawn under the chat template that the training uses. The code generates under another than
   it trains under, so its negatives come from another distribution than the policy's.
2. They are samples at temperature 1, as the theory asks. The code's default generator is greedy.
3. An answer that was cut at the token limit gets no end token. The code appends one to both sides.
4. Each round trains on its own self-generations. The authors mix in those of the round before:
   `--set spin.mix_rounds=2`.
5. Two rounds instead of four, AdamW instead of RMSprop, and the same `beta` in all rounds (the authors' last one uses
   5.0).
6. The learning rate below; the authors use 5e-7, and 1e-7 from the third round on, for a model of 7 billion parameters.

How `dpo` differs from the paper: without preference data the rejected answers are own samples, so it is one round of
SPIN.

    python -m gsil_bench.compare --methods sft,spin,dpo
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from gsil_bench.methods import Method, PairLogProbs, SelfPlay


def pairwise_logistic(pair: PairLogProbs, beta: float) -> Tensor:
    """−log σ of beta times the margin between the two log-ratios.

    Args:
        pair: the log-probs; those of policy and reference, of both sides.
        beta: SPIN's λ and DPO's β, usually 0.1. Towards 0 the loss is linear in the margin, and nothing but early
            stopping holds the policy near the reference.
    """
    margin_real_is_high = pair.real_log_ratios - pair.generated_log_ratios  # (pairs,)
    return -logsigmoid(beta * margin_real_is_high)  # L_SPIN with ℓ(t) = log(1 + e^−t), https://arxiv.org/abs/2401.01335


# Five times below SFT's. The loss falls as well by lowering the self-generations without end as by raising the
# demonstrations, and Adam's step has no smaller size for a smaller gradient, so the rate alone limits how far a round
# goes. The papers' 5e-7 (SPIN, GSIL) is for RMSprop on 7 billion parameters and up to six epochs over 50,000 pairs;
# comparisons here have fewer steps.
_LEARNING_RATE = 2e-6

SPIN = Method(
    name="spin",
    summary="Self-play: demonstrations against the samples of the round before, by their margin.",
    loss=pairwise_logistic,
    settings={"beta": 0.1},
    needs=frozenset({"generated", "reference"}),
    protocol=SelfPlay(opponent="previous", rounds=2, mix_rounds=1, temperature=1.0),
    training={"learning_rate": _LEARNING_RATE},
    paper="Chen et al., ICML 2024, https://arxiv.org/abs/2401.01335, loss L_SPIN",
    formula="−log σ(beta · (real log-ratio − generated log-ratio))",
)

DPO = Method(
    name="dpo",
    summary="DPO: demonstrations against rejected answers, or the initial policy's samples where there are none.",
    loss=pairwise_logistic,
    settings={"beta": 0.1},
    needs=frozenset({"generated", "reference", "preferences"}),
    protocol=SelfPlay(opponent="initial", rounds=1, mix_rounds=1, temperature=1.0),
    training={"learning_rate": _LEARNING_RATE},
    paper="Rafailov et al., NeurIPS 2023, https://arxiv.org/abs/2305.18290",
    formula="−log σ(beta · (real log-ratio − generated log-ratio))",
)
