"""NEFTune: supervised fine-tuning with noise on the input embeddings (arXiv 2310.05914).

While training, a sequence's embeddings e (L tokens of d dimensions) become

    e + alpha / √(L d) · u,    u uniform in [−1, 1]^(L × d)

and the loss is SFT's. There is no noise when log-probs are evaluated or answers generated.

How this differs from the paper and its code (https://github.com/neelsjain/NEFTune):

1. L is the sequence's real length, as in the code of their experiments; the snippet in their README takes the padded one.
2. The noise is a function of the run's seed, the step and the demonstration, so a resumed run repeats it exactly. A prompt's
   noise is drawn once for all its completions; with demonstrations alone there is one.
3. SFT's learning rate; theirs is 5e-5.

Known: the noise and its settings (alpha 5 in the README's command). Not known here: which part of the published gain comes from
longer answers; compare lengths too.

    python -m gsil_bench.compare --methods sft,neftune
    python -m gsil_bench.compare --methods sft,neftune --set neftune.embedding_noise=10
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs


def negative_log_likelihood(pair: PairLogProbs) -> Tensor:
    """−log π_θ(y|x) of the demonstrations, (pairs,); the noise is in the log-probs."""
    return -pair.policy_real_logps


NEFTUNE = Method(
    name="neftune",
    summary="Maximum likelihood of the demonstrations with noise on the input embeddings.",
    loss=negative_log_likelihood,
    training={"learning_rate": 1e-5, "embedding_noise": 5.0},
    normalise="tokens",
    paper="Jain et al., ICLR 2024, https://arxiv.org/abs/2310.05914",
    formula="−log π(real | embeddings + alpha/√(L d) · U(−1, 1)), alpha = embedding_noise",
)
