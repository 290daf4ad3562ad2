"""SFT as imitation of state-action occupancies: maximum likelihood in which earlier tokens count more (after arXiv 2403.12017).

The forward KL divergence between the demonstrator's and the policy's *trajectories* is SFT. Between their *state-action
occupancies* it is a sum over prefixes: the pair (prefix, token) at step k of tokens 0 … K has the probability of all tokens up to
k, so token t is in the log of steps t … K. The mean over the K + 1 steps is

    L = −Σ_t w_t log π(y_t | x, y_<t),    w_t = (K + 1 − t) / (K + 1)

The first token has weight 1, the last 1 / (K + 1). Both divergences have the same minimum where the family of policies contains
the demonstrator; this weights the errors of one that does not.

How this differs from the paper:

1. The formula is derived from the paper's definition of occupancies without discount, not read in it. That it contains a
   position-weighted variant is second-hand, its exact weights are not known here.
2. The step's loss is divided by the scored tokens, not by the weights' sum: it pulls half as hard as SFT's at the same rate.

    python -m gsil_bench.compare --methods sft,sft-occupancy
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs


def occupancy_likelihood(pair: PairLogProbs) -> Tensor:
    """−Σ_t (K + 1 − t)/(K + 1) log π_t of the demonstrations, (pairs,)."""
    tokens = pair.real
    weights = (tokens.length - tokens.position) / tokens.length  # (tokens,), length = K + 1
    return -tokens.sum(weights * tokens.logps)


SFT_OCCUPANCY = Method(
    name="sft-occupancy",
    summary="Maximum likelihood with earlier tokens weighted more: forward KL between state-action occupancies.",
    loss=occupancy_likelihood,
    needs=frozenset({"tokens"}),
    training={"learning_rate": 1e-5},
    normalise="tokens",
    paper="derived from Sun, 2024, https://arxiv.org/abs/2403.12017",
    formula="−Σ_t w_t log π(real token t), w_t = (K + 1 − t)/(K + 1), t = 0 … K",
)
