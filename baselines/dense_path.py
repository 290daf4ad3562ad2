"""Dense-Path REINFORCE: SFT's own log-probs as a reward for every token of the policy's samples (arXiv 2510.02493).

SFT is inverse soft Q-learning with γ = 1: Σ_t [Q(s_t, a_t) − V(s_{t+1})] − V(s_0) = Σ_t log π(a_t|s_t). So log π_SFT is a
reward of tokens, up to a potential, and taking a weaker policy's off leaves what training has added:

    r_t = log π_SFT(a_t|s_t) − log π_ref(a_t|s_t)
    ∇ E_π Σ_t log π(a_t|s_t) (Σ_{s ≥ t} r_s − baseline)  −  kl · KL(π ‖ π_SFT)

π_SFT is where the reinforcement learning starts, π_ref the model as given. The optimum is π ∝ π_SFT (π_SFT / π_ref)^{1/kl}: the
step that SFT has made is made again, 1/kl times, hence the default of 1. (Derived: it is the closed form of reward maximisation
with a KL penalty.) The same sum paid at the end of the answer is `afd-closed-form`; here a token is credited with what follows
it.

The reward has no bound and grows with the number of tokens. With a lower penalty and a higher rate, the embedded suite's policy
finds long answers that π_ref finds unlikely: the reward rises tenfold while task scores fall. Look at both.

How this differs from the paper:

1. π_ref is the model as given. The paper takes an earlier checkpoint of SFT, best the one after half of the samples: a second
   policy that this suite would have to keep.
2. The baseline is the mean return of the prompt's other samples at the same token. Which estimator the paper uses was not read;
   it has no critic. `--set dense-path-reinforce.baseline=none` is plain REINFORCE.
3. π_SFT has half of the epochs, so that the whole run has the optimiser steps of `sft`; `sft-continued` is the control to look
   at.
4. `reward_limit` keeps r_t within ± a limit; 0, the default, leaves it. The paper has none.

Known, second-hand from its reviews: the reward, γ = 1 best, critic-free REINFORCE of tokens with a penalty towards π_SFT, gains
of a few per cent in judged win rates. Not known here: the penalty's coefficient, the learning rate, every number.

    python -m gsil_bench.compare --methods sft,sft-continued,dense-path-reinforce
"""

from __future__ import annotations

import math

from torch import Tensor

from gsil_bench.methods import Method, Rollouts, SelfPlay, TokenLogProbs
from gsil_bench.training.policy_gradient import clipped_policy_gradient


def path_reward(samples: TokenLogProbs, reward_limit: float) -> Tensor:
    """log π_SFT(a_t|s_t) − log π_ref(a_t|s_t) of every token, (tokens,).

    Args:
        reward_limit: nats; 0 is none.
    """
    if reward_limit < 0:
        raise ValueError("reward_limit must be 0 (none) or more")
    limit = reward_limit or math.inf
    return (samples.reference_logps - samples.initial_logps).clamp(-limit, limit)  # the start is the paper's π_SFT


DENSE_PATH = Method(
    name="dense-path-reinforce",
    summary="REINFORCE with what SFT has added to each token's log-prob as that token's reward.",
    loss=clipped_policy_gradient,
    settings={"clip": 0.2},
    needs=frozenset({"tokens"}),
    protocol=SelfPlay(opponent="initial", samples=4, max_new_tokens=128),
    rollouts=Rollouts(reward=path_reward, settings={"reward_limit": 0.0}, needs=frozenset({"initial"}), kl=1.0),
    starts_from="sft",
    training={"learning_rate": 1e-6},
    normalise="generated-tokens",
    paper="2510.02493, https://arxiv.org/abs/2510.02493 (from its reviews)",
    formula="max E_π[Σ_t log π_SFT(a_t|s_t) − log π_start(a_t|s_t)] − kl · KL(π ‖ π_SFT)",
)
