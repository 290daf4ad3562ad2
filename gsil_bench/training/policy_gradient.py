"""From the rewards of samples to advantages, and from advantages to the loss of a policy gradient.

A sample's tokens are steps of an episode: the state is everything before the token, the action the token. With r_t the token's
reward, the return is G_t = Σ_{s ≥ t} γ^{s−t} r_s. Advantages compare it with a baseline, which takes out most of the gradient's
noise. It leaves the expectation as it is, but for a value head with λ < 1 and for a group's standard deviation:

    value           Σ_{s ≥ t} (γλ)^{s−t} (r_s + γ V_{s+1} − V_s), V = 0 after the last token   (PPO with GAE, 1506.02438)
    leave-one-out   G_t − the mean of the returns of the prompt's other samples at the same token   (RLOO, 2402.14740)
    group           (G_0 − mean) / (standard deviation), over the prompt's samples, at every token  (GRPO, 2402.03300)
    none            G_t

A sample that is over at a token counts with its last token's return there, so for a reward at the end (γ = 1) leave-one-out is
R − mean of the others' R at every token.

The loss is PPO's clipped surrogate (1707.06347, eq. 7), summed over a sample's tokens; the step divides it by the tokens of all
samples, so a long answer weighs as much as its tokens do.

How this differs from the papers:

1. RLOO's paper treats an answer as one action; here each token is one. While the policy is that of the sampling, the gradient is
   the same for a reward at the end, and in expectation for the penalty, which is paid token by token. Afterwards the ratio of
   each token alone is clipped.
2. GRPO divides each answer's sum by its own length; here all tokens of the step count alike. Its standard deviation is the
   population's; a prompt whose samples all have the same return gets advantages 0.
3. The penalty for leaving the reference is part of the reward in all of them, as in PPO for language models; GRPO's paper adds an
   estimate of it to the loss.
4. Advantages are not whitened over the batch; the value loss is not clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsil_bench.methods import PairLogProbs, Rollouts, TokenLogProbs


def clipped_policy_gradient(pair: PairLogProbs, clip: float) -> Tensor:
    """−Σ_t min(ρ_t A_t, clip(ρ_t, 1 ± clip) A_t) over a sample's tokens, ρ = π / π_sampling, (pairs,)."""
    if not clip > 0:
        raise ValueError("clip must be above 0")
    tokens = pair.generated
    ratio = (tokens.logps - tokens.sampled_logps).exp()  # (tokens,)
    gain = torch.minimum(ratio * tokens.advantages, ratio.clamp(1 - clip, 1 + clip) * tokens.advantages)
    return -tokens.sum(gain)


def actor_critic(pair: PairLogProbs, clip: float, value_coefficient: float) -> Tensor:
    """The same, plus value_coefficient · ½ Σ_t (V(s_t) − G_t)², with G the advantage plus the value at sampling, (pairs,)."""
    tokens = pair.generated
    return clipped_policy_gradient(pair, clip) + value_coefficient * tokens.sum((tokens.values - tokens.returns) ** 2) / 2


def advantages(samples: TokenLogProbs, rewards: Tensor, per_prompt: int, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token.

    Args:
        samples: the first prompt's samples, then the second's; with `values` for the baseline "value".
        rewards: (tokens,)
        per_prompt: samples of each prompt.

    Returns:
        (tokens,) each; the returns are what a value head is trained on, or γ-discounted sums of rewards without one.
    """
    inside, table = samples.table(torch.ones_like(rewards)) > 0, samples.table(rewards)  # (samples, longest)
    if rollouts.baseline == "value":
        values = samples.table(samples.values.detach())
        following = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), 1)  # 0 after the last token
        advantage = discounted_sums(table + rollouts.discount * following - values, rollouts.discount * rollouts.gae_lambda)
        return advantage[inside], (advantage + values)[inside]
    returns = discounted_sums(table, rollouts.discount)
    if rollouts.baseline == "group":
        totals = returns[:, :1].reshape(-1, per_prompt, 1)
        spread = totals.std(1, correction=0, keepdim=True)
        scaled = torch.where(spread > 1e-6, (totals - totals.mean(1, keepdim=True)) / spread.clamp(min=1e-6), 0.0)
        return scaled.reshape(-1, 1).expand_as(returns)[inside], returns[inside]
    if rollouts.baseline == "leave-one-out":
        return (returns - _of_others(returns, inside, per_prompt))[inside], returns[inside]
    return returns[inside], returns[inside]


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """Σ_{s ≥ t} discount^{s−t} values_s in every row, (rows, steps)."""
    sums, ahead = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for step in reversed(range(values.shape[1])):
        ahead = values[:, step] + discount * ahead
        sums[:, step] = ahead
    return sums


def _of_others(returns: Tensor, inside: Tensor, per_prompt: int) -> Tensor:
    """Mean return of the prompt's other samples at each token, of those that are over at their last one; (samples, longest)."""
    last = (inside.sum(1, keepdim=True) - 1).clamp(min=0)  # (samples, 1)
    steps = torch.arange(returns.shape[1], device=returns.device)[None]
    held = returns.gather(1, torch.minimum(steps, last))  # (samples, longest): the last return goes on
    grouped = held.view(-1, per_prompt, held.shape[1])
    others = (grouped.sum(1, keepdim=True) - grouped) / (per_prompt - 1)
    return others.reshape_as(held)
