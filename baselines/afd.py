"""AfD: a reward from demonstrations by telling two kinds of answers apart (arXiv 2405.15624).

A classifier learns which of two kinds an answer is, by binary cross-entropy on whole answers; its logit is the reward. π_init is
the model as given, π_SFT what supervised fine-tuning makes of it. What is told apart names the method (the paper's table of the
choices of data):

    afd-init-sft    samples of π_SFT (high)   against samples of π_init (low)
    afd-sft-demo    demonstrations            against samples of π_SFT
    afd-init-demo   demonstrations            against samples of π_init

The paper proposes the first: both sides come from one class of models, so that the classifier cannot go by what only tells a
model's wording from the demonstrator's. Its best logit is known without any classifier, log π_SFT(y|x) − log π_init(y|x):

    afd-closed-form   that difference itself, of the whole answer

The paper ranks samples of π_SFT by the reward and takes the best of N; it trains no policy on the reward, its reviews say.
`gsil-bench best-of` does that. The methods here go on from π_SFT by reinforcement learning with the same rewards.

How this differs from the paper:

1. The reinforcement learning is ours: REINFORCE with the mean of the prompt's other samples as baseline, a penalty for leaving
   π_SFT, the reward at the answer's last token.
2. π_SFT is trained for half of the epochs, so that the whole run has the optimiser steps of `sft`.
3. The classifier is the model as given with a scalar head, trained on 4 samples of each training prompt. The paper's classifier,
   numbers of samples and rates are not known here; those of its author's later code belong to another design.
4. In reinforcement learning the logit is kept within ± 10 (`score_clip`). The best of N is chosen by the logit as it is.
5. The closed form is not in the paper: a reviewer noted that it is the best classifier's logit.

Known: the table of what is told apart, that the logit is the reward, that the best of N is drawn from π_SFT. Not known here: any
number of the paper's figures and tables, so nothing is compared with them.

    gsil-bench best-of --methods afd-init-sft,afd-sft-demo,afd-init-demo,afd-closed-form --tasks mini-gsm8k
    python -m gsil_bench.compare --methods sft,afd-init-sft,afd-closed-form
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Answers, Critic, Method, Rollouts, SelfPlay, TokenLogProbs
from gsil_bench.training.critics import discrimination
from gsil_bench.training.policy_gradient import clipped_policy_gradient

PAPER = "Sun and van der Schaar, 2024, https://arxiv.org/abs/2405.15624"
PROTOCOL = SelfPlay(opponent="initial", samples=4, max_new_tokens=128)
CLASSIFIER = {"learning_rate": 1e-5}


def logit_reward(samples: TokenLogProbs) -> Tensor:
    """The classifier's logit of the whole answer, at its last token; (tokens,)."""
    return samples.at_end(samples.last(samples.scores))


def closed_form_reward(samples: TokenLogProbs) -> Tensor:
    """log π_SFT(y'|x) − log π_init(y'|x) of the whole answer, at its last token; π_SFT is the reference; (tokens,)."""
    return samples.at_end(samples.sum(samples.reference_logps - samples.initial_logps))


def _classified(name: str, positives: Answers, negatives: Answers, high: str, low: str, formula: str) -> Method:
    return Method(
        name=name,
        summary=f"Reward: a classifier's logit, of {high} against {low}.",
        loss=clipped_policy_gradient,
        settings={"clip": 0.2},
        needs=frozenset({"tokens"}),
        protocol=PROTOCOL,
        rollouts=Rollouts(
            reward=logit_reward,
            needs=frozenset({"scores"}),
            critic=Critic(discrimination, positives=positives, negatives=negatives, training=CLASSIFIER),
        ),
        starts_from="sft",
        training={"learning_rate": 1e-6},
        normalise="generated-tokens",
        paper=PAPER,
        formula=f"max E_π[l(y')] − kl · KL(π ‖ π_SFT), l the logit of {formula}",
    )


TUNED, GIVEN = "the fine-tuned policy's samples", "the initial model's"
INIT_SFT = _classified("afd-init-sft", "policy", "initial", TUNED, GIVEN, "samples of π_SFT against those of π_init")
SFT_DEMO = _classified(
    "afd-sft-demo", "demonstrations", "policy", "demonstrations", TUNED, "demonstrations against samples of π_SFT"
)
INIT_DEMO = _classified(
    "afd-init-demo", "demonstrations", "initial", "demonstrations", f"{GIVEN} samples", "demonstrations against samples of π_init"
)

CLOSED_FORM = Method(
    name="afd-closed-form",
    summary="Reward: the log-ratio of the fine-tuned policy to the initial model, which is the best classifier's logit.",
    loss=clipped_policy_gradient,
    settings={"clip": 0.2},
    needs=frozenset({"tokens"}),
    protocol=PROTOCOL,
    rollouts=Rollouts(reward=closed_form_reward, needs=frozenset({"initial"})),
    starts_from="sft",
    training={"learning_rate": 1e-6},
    normalise="generated-tokens",
    paper=f"{PAPER}; the closed form is a reviewer's remark",
    formula="max E_π[log π_SFT(y') − log π_init(y')] − kl · KL(π ‖ π_SFT)",
)
