"""RFT: a reward model from demonstrations and own samples, then a policy step on it, round by round (arXiv 2405.17888).

The explicit half of "Getting More Juice Out of the SFT Data"; `irft` is the implicit one. Each of T rounds:

1. The policy answers every prompt.
2. A reward model is trained to score demonstrations above these answers, at every token from the first that differs on:
       −log σ(r_t(y) − r_t(y')), a mean over the positions
3. The policy maximises E_π[r(y')] − kl · KL(π ‖ π_ref), r the score after the last token.

How this differs from the paper and its code (https://github.com/JasonJiaxiangLi/Reward_learning_SFT):

1. The policy step is REINFORCE with the mean of the prompt's other samples as baseline. The code's configuration, called PPO,
   selects APA's square loss (coefficient 10, 2 inner epochs).
2. Each round trains a new reward model from the model as given, all of it, with a constant 0 at the start; it sees 4 samples of
   each prompt. The code goes on with the reward model of the round before, locks its first 20 layers, and sees one sample.
3. After its end, the shorter answer keeps its last score. The code scores the padding there.
4. Two rounds; the code's script has one, its loop over rounds is commented out. Each round uses all prompts, the script's loop a
   slice of them.
5. The penalty's coefficient is constant and the scores are kept within ± `score_clip`. The code adapts its 0.05 towards 6 nats.
6. Training goes on from `sft`, which gets half of the epochs. The code starts from a fine-tuned model. The reward models' steps
   come on top of the run's.

Known: all that is said of the code above, read there. Not known here: the tables (images), and the paper's exact statement of the
two-level problem.

    python -m gsil_bench.compare --methods sft,rft
"""

from __future__ import annotations

from torch import Tensor

from gsil_bench.methods import Critic, Method, Rollouts, SelfPlay, TokenLogProbs
from gsil_bench.training.critics import token_ranking
from gsil_bench.training.policy_gradient import clipped_policy_gradient


def score_reward(samples: TokenLogProbs) -> Tensor:
    """The reward model's score after the last token, there; (tokens,)."""
    return samples.at_end(samples.last(samples.scores))


RFT = Method(
    name="rft",
    summary="Rounds of a reward model, demonstrations above own samples at every token, and reinforcement learning on it.",
    loss=clipped_policy_gradient,
    settings={"clip": 0.2},
    needs=frozenset({"tokens"}),
    protocol=SelfPlay(opponent="initial", rounds=2, samples=4, max_new_tokens=128),
    rollouts=Rollouts(
        reward=score_reward,
        needs=frozenset({"scores"}),
        critic=Critic(token_ranking, positives="demonstrations", negatives="policy", training={"learning_rate": 1e-5}),
    ),
    starts_from="sft",
    training={"learning_rate": 1e-6},
    normalise="generated-tokens",
    paper="Li et al., NeurIPS 2024, https://arxiv.org/abs/2405.17888",
    formula="max E_π[r(y')] − kl · KL(π ‖ π_ref), r: min −log σ(r_t(y) − r_t(y'))",
)
