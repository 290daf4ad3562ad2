"""SFT as imitation of state-action occupancies: maximum likelihood in which earlier tokens count more (after arXiv 2403.12017).

The forward KL divergence between the demonstrator's and the policy's *trajectories* is SFT. Between their *state-action
occupancies* over H steps it is a sum over prefixes: the pair (prefix, token) at step k has the probability of all tokens up to k,
so token t is in the log of steps t … H − 1; after its end an answer stays where it is. The mean over the H steps is

    L = −Σ_t w_t log π(y_t | x, y_<t),    w_t = max(0, 1 − t / H)

Both divergences have the same minimum where the family of policies contains the demonstrator and no answer is longer than H; this
weights the errors of one that does not. H must be one for all answers: with each answer's own length an end would weigh less than
going on, and the policy would learn to put it off (docs/divergences.md has the example).

How this differs from the paper:

1. The formula is derived from the paper's definition of occupancies without discount, not read in it. That it contains a
   position-weighted variant is second-hand, its exact weights are not known here.
2. Tokens from the H-th on are not learned from: set `horizon` to the longest answer's tokens or more. A long horizon is SFT.
3. The step's loss is divided by the scored tokens, not by the weights' sum: it pulls less hard than SFT's at the same rate.

    python -m gsil_bench.compare --methods sft,sft-occupancy
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Method, PairLogProbs


def occupancy_likelihood(pair: PairLogProbs, horizon: float) -> Tensor:
    """−Σ_t max(0, 1 − t / horizon) log π_t of the demonstrations, (pairs,)."""
    if not horizon > 0:
        raise ValueError("horizon must be above 0")
    tokens = pair.real
    weights = (1 - tokens.position.to(tokens.logps) / horizon).clamp(min=0)  # (tokens,)
    return -tokens.sum(weights * tokens.logps)


SFT_OCCUPANCY = Method(
    name="sft-occupancy",
    summary="Maximum likelihood with earlier tokens weighted more: forward KL between state-action occupancies.",
    loss=occupancy_likelihood,
    settings={"horizon": 256.0},
    needs=frozenset({"tokens"}),
    training={"learning_rate": 1e-5},
    normalise="tokens",
    paper="derived from Sun, 2024, https://arxiv.org/abs/2403.12017",
    formula="−Σ_t w_t log π(real token t), w_t = max(0, 1 − t / horizon)",
)
