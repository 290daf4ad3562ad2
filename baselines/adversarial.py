"""Adversarial imitation: demonstrations are matched in reverse KL or Jensen-Shannon divergence (arXiv 2403.12017).

Fitting demonstrations is bringing the policy's distribution of answers d_π to the demonstrator's d_β; which divergence is used
decides what happens where the policy cannot get there. The forward KL(d_β ‖ d_π) is maximum likelihood (`sft`); `sft-occupancy`
is that of occupancies. The others need d_β / d_π at the policy's own samples. A discriminator D = σ(l) estimates it: trained on
demonstrations against samples, its logit l tends to log d_β − log d_π. With l held fixed while the policy moves,

    airl-reverse-kl   r = l                          climbs minus KL(d_π ‖ d_β), which seeks modes
    gail-js           r = softplus(l) = −log(1 − D)  climbs minus twice the Jensen-Shannon divergence

The variants `-tokens` do the same with occupancies: ρ(s, a) is the probability that an answer begins with the prefix s and the
token a. Their discriminator judges each token after what is before it, so l tends to log ρ_β − log ρ_π; each token is paid by its
own logit and taught by all that is paid from there on:

    airl-reverse-kl-tokens   r_t = l_t                    climbs minus Σ ρ_π log(ρ_π / ρ_β) − ρ_π + ρ_β
    gail-js-tokens           r_t = softplus(l_t) − log 2  climbs minus twice Jensen-Shannon of occupancies

Alternation: answers to a batch of prompts are sampled; the discriminator scores them, then takes `critic_updates` steps on them
against the demonstrations; the policy takes `updates` steps. One and one are the defaults. The metrics of each step hold the AUC
of the scores, of whole answers (`discriminator_auc`) and of all tokens (`discriminator_token_auc`): 0.5 tells nothing, and
neither does 1, which a warning names if it was so most of the time. Rewards of two steps are not comparable, their discriminators
differ.

How this differs from the paper:

1. Training starts from SFT, which gets the first half of the epochs (`start_share`), so the whole has as many steps as `sft`. A
   ratio can be estimated only where both have mass. `--set NAME.starts_from=` starts from the model as given instead, as the
   embedded suite's recipe does for whole answers: there the discriminator has more to find.
2. A penalty kl · KL(d_π ‖ d_ref) holds the policy at that start. No such term is in the objectives that are known. With the exact
   l, the optimum of airl-reverse-kl is then d_β^(1/(1+kl)) d_ref^(kl/(1+kl)), up to a factor; kl = 0.05 is small on purpose.
3. The discriminator has the policy's weights at the start and a new scalar head that begins at 0. It takes one step where its
   optimum is meant, at a constant rate of ten times the policy's. Scores are of samples that it has not learnt from, so that it
   cannot pay for what it knows by heart; the first step's are 0.
4. Logits are kept within ± `score_clip` before they become rewards. That bounds what a sure discriminator pays; for clipped
   logits the identities above do not hold.
5. Advantages are taken against the prompt's other samples (leave-one-out), and the surrogate is clipped; with `updates=1` neither
   changes the expected gradient. A step's loss is divided by all sampled tokens.
6. Answers are cut at 128 tokens. A cut one has no end token, and the discriminator sees that.
7. Without − log 2, gail-js-tokens would pay log 2 for every token where nothing can be told apart, a price on short answers.
8. The loss of the discriminator of tokens is a sum over each answer's tokens, divided by a constant (`critic_horizon`, which only
   scales it). Divided by the length of either answer, the best logit is one of weighted occupancies, and pays for short answers.

Known: that the paper treats these divergences; the discriminator's objective and the reward l, through a later work of its author
(2405.15624). Derived: the reward of Jensen-Shannon and everything about tokens (docs/divergences.md, tested against exact
gradients). Unknown: the paper's own formulas for occupancies, whether it has experiments, and every setting here.

    python -m gsil_bench.compare --methods sft,airl-reverse-kl,gail-js
    python -m gsil_bench.compare --methods sft,sft-occupancy,airl-reverse-kl-tokens,gail-js-tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import softplus

from gsil_bench.methods import Critic, Method, PairLogProbs, Rollouts, SelfPlay, TokenLogProbs
from gsil_bench.training.critics import discrimination
from gsil_bench.training.policy_gradient import clipped_policy_gradient


def reverse_kl_reward(samples: TokenLogProbs) -> Tensor:
    """The discriminator's logit of the whole answer, at its last token; (tokens,)."""
    return samples.at_end(samples.last(samples.scores))


def js_reward(samples: TokenLogProbs) -> Tensor:
    """softplus(logit) = −log(1 − D) of the whole answer, at its last token; (tokens,)."""
    return samples.at_end(softplus(samples.last(samples.scores)))


def token_reverse_kl_reward(samples: TokenLogProbs) -> Tensor:
    """The discriminator's logit of each token; (tokens,)."""
    return samples.scores


def token_js_reward(samples: TokenLogProbs) -> Tensor:
    """softplus(logit) − log 2 of each token, 0 where the discriminator cannot tell; (tokens,)."""
    return softplus(samples.scores) - math.log(2)


def occupancy_discrimination(pair: PairLogProbs, horizon: float) -> Tensor:
    """(−Σ_t log σ(score) of the demonstration − Σ_t log σ(−score) of the sample) / horizon, (pairs,)."""
    if not horizon > 0:
        raise ValueError("horizon must be above 0")
    demonstrated, sampled = pair.real.sum(softplus(-pair.real.scores)), pair.generated.sum(softplus(pair.generated.scores))
    return (demonstrated + sampled) / horizon


CRITIC = Critic(discrimination, alongside=True, training={"learning_rate": 1e-5})
OF_TOKENS = replace(CRITIC, loss=occupancy_discrimination, settings={"horizon": 128.0})


def _method(name: str, what: str, formula: str, reward: Callable[..., Tensor], critic: Critic = CRITIC) -> Method:
    return Method(
        name=name,
        summary=f"Adversarial imitation: {what}, by policy gradient.",
        loss=clipped_policy_gradient,
        settings={"clip": 0.2},
        needs=frozenset({"tokens"}),
        protocol=SelfPlay(opponent="initial", samples=4, max_new_tokens=128),
        rollouts=Rollouts(reward=reward, needs=frozenset({"scores"}), critic=critic),
        starts_from="sft",
        training={"learning_rate": 1e-6},
        normalise="generated-tokens",
        paper="after Sun, 2024, https://arxiv.org/abs/2403.12017, and Sun and van der Schaar, https://arxiv.org/abs/2405.15624",
        formula=f"max E_π[{formula}] − kl · KL(π ‖ π_ref), l the discriminator's logit",
    )


AIRL = _method("airl-reverse-kl", "reverse KL, a discriminator's logit as reward", "l(y')", reverse_kl_reward)
GAIL = _method("gail-js", "Jensen-Shannon, softplus of a discriminator's logit as reward", "softplus(l(y'))", js_reward)
AIRL_TOKENS = _method(
    "airl-reverse-kl-tokens",
    "reverse KL between occupancies, each token paid by its logit",
    "Σ_t l(y'_t)",
    token_reverse_kl_reward,
    OF_TOKENS,
)
GAIL_TOKENS = _method(
    "gail-js-tokens",
    "Jensen-Shannon between occupancies, each token paid by softplus of its logit",
    "Σ_t softplus(l(y'_t)) − log 2",
    token_js_reward,
    OF_TOKENS,
)
