"""GEM: fine-tuning that keeps diversity, by a likelihood at a lower temperature (arXiv 2408.16673).

The paper states a game between the model f and a q = argmax_q E_q[log f] + β H(q), which is softmax(z / β) for logits z. With a
linear h the gradient of its loss in the logits is softmax(z / β) − onehot(y). That is the gradient of

    L = −β Σ_t log softmax(z_t / β)[y_t]

which is what is computed here: the log-probs come from logits that are divided by β (`likelihood_temperature`), and the factor β
takes the division out of the gradient again. At β = 1 this is SFT. Below, the optimum is π ∝ p_data^β: flatter than the data.

How this differs from the paper and its code (https://github.com/liziniu/GEM):

1. h is linear. Their scripts use the log-sigmoid: each v of the sum −Σ_v sg(q_v) w_v (log p_y − log p_v) has a weight
   w_v = σ(0.01 (z_v − z_y)), about ½; here it is 1, and so the gradient about twice theirs.
2. The value of the loss is another than theirs, in which q is held constant; the gradient is the same.
3. SFT's learning rate; theirs is 2e-5, for three epochs. AdamW's beta2 is 0.999, theirs 0.95.

Known: the token loss and its settings, from the code. The statement of the game is second-hand. Logged log-probs of this method
are those at temperature β; evaluation is at temperature 1.

    python -m gsil_bench.compare --methods sft,gem
    python -m gsil_bench.compare --methods sft,gem --set gem.likelihood_temperature=0.5
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs


def tempered_likelihood(pair: PairLogProbs) -> Tensor:
    """−β Σ_t log softmax(z_t / β)[y_t] of the demonstrations, (pairs,); β is the temperature of the given log-probs."""
    return -pair.temperature * pair.policy_real_logps


GEM = Method(
    name="gem",
    summary="Likelihood at a lower temperature, which leaves the model flatter than maximum likelihood does.",
    loss=tempered_likelihood,
    training={"learning_rate": 1e-5, "likelihood_temperature": 0.7},
    normalise="tokens",
    paper="Li et al., ICLR 2025, https://arxiv.org/abs/2408.16673",
    formula="−β Σ_t log softmax(z_t / β)[real token], β = likelihood_temperature",
)
