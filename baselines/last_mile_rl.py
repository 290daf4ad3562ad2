"""RL for the last mile: a reward model from demonstrations and constructed failures, then PPO (after arXiv 2408.16753).

Maximum likelihood says what to do where demonstrations go, and nothing about what not to do. Here a reward model learns to tell
demonstrations from answers that fail in known ways, and the policy of `sft` is trained on its own samples to score high:

    R(y) = r(y) − length_penalty · max(0, |y| / |y*| − 1)          at the last token, y* the demonstration of the prompt

with r the logit of the reward model, kept within ± `score_clip`. The classes of failures, one of each for every demonstration,
all counting alike (gsil_bench/data/degradations.py, gsil_bench/training/contrasts.py):

| class | answer | its end |
|---|---|---|
| run-on | the demonstration, then sentences of the prompt | none |
| missing-end | the demonstration | none |
| truncated | its first words | end token |
| without-end | without its last stop | end token |
| repeated | one sentence said two to four times more | end token |
| copied | sentences of the prompt | end token |
| off-topic | an answer to another prompt | end token |
| shuffled | its words in another order | end token |
| empty | nothing | end token |
| own | a sample of the policy that fails a rule: cut, empty, unfinished, repeats or copies a sentence, a new paragraph | any |

The paper's, as far as it is known here: PPO for a single task without human preferences; a reward model trained on positive
outputs and diverse negative failure modes; a length penalty; compared with post-processed maximum likelihood. Ours:

1. The classes above, one each. The paper's are not known.
2. The reward model: the starting model with a scalar head on an answer's last token, binary cross-entropy, a mean over classes.
3. The penalty's formula. Shorter answers than the demonstration cost nothing; |y*| is used in training only.
4. PPO's numbers: clip 0.2, value coefficient 0.1, λ 0.95, KL coefficient 0.05 and 4 updates on the same samples are those of
   public code for summaries of posts (Hong-Lab-UMN-ECE/IRLAlignment). Here an update takes the whole batch, 4 samples of each
   prompt.
5. The value head starts at 0 and learns at the policy's rate. Until it has learned, a reward that is mostly positive makes all
   samples more probable. `last-mile-rloo` has no such phase: its baseline is the mean of the prompt's other samples.
6. The policy starts from `sft`, which gets half of the epochs (`start_share`) and is the reference of the KL penalty; so all
   methods here have the steps of one `sft`. The reward model's own steps come on top.

Not known here: the paper's data sets, models, classes of failures, reward model, penalty, settings, post-processing, and every
number. It can be tested for its direction only.

`--set last-mile-rloo.baseline=group` is GRPO's baseline. The experiment: docs/experiments/last-mile.md.

    python -m gsil_bench.compare --recipe last-mile
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from gsil_bench.methods import Critic, Method, Rollouts, SelfPlay, TokenLogProbs
from gsil_bench.training.critics import discrimination
from gsil_bench.training.policy_gradient import actor_critic, clipped_policy_gradient


def score_less_excess(samples: TokenLogProbs, length_penalty: float) -> Tensor:
    """The reward model's logit of the answer − length_penalty · max(0, |y| / |y*| − 1), at its last token; (tokens,).

    Lengths are tokens, end token included.
    """
    excess = (samples.length / samples.real_length - 1).clamp(min=0)  # (tokens,)
    return samples.at_end(samples.last(samples.scores - length_penalty * excess))


FAILURES = Critic(discrimination, positives="demonstrations", negatives="failures", training={"learning_rate": 1e-5})
ROLLOUTS = Rollouts(
    reward=score_less_excess,
    settings={"length_penalty": 1.0},
    needs=frozenset({"scores"}),
    critic=FAILURES,
    baseline="value",
    updates=4,
)

LAST_MILE_RL = Method(
    name="last-mile-rl",
    summary="Reward model of demonstrations against constructed failures, then PPO with a length penalty.",
    loss=actor_critic,
    settings={"clip": 0.2, "value_coefficient": 0.1},
    needs=frozenset({"tokens", "values"}),
    protocol=SelfPlay(opponent="initial", samples=4, max_new_tokens=128),
    rollouts=ROLLOUTS,
    starts_from="sft",
    training={"learning_rate": 3e-6},
    normalise="generated-tokens",
    paper="after Solway, 2024, https://arxiv.org/abs/2408.16753 (classes, reward and settings are ours)",
    formula="max E_π[r(y') − length_penalty · max(0, |y'|/|y| − 1)] − kl · KL(π ‖ π_sft), by PPO",
)

LAST_MILE_RLOO = replace(
    LAST_MILE_RL,
    name="last-mile-rloo",
    summary="The same reward, compared with that of the prompt's other samples instead of a value head's prediction.",
    loss=clipped_policy_gradient,
    settings={"clip": 0.2},
    needs=frozenset({"tokens"}),
    rollouts=replace(ROLLOUTS, baseline="leave-one-out"),
    paper="Ahmadian et al., ACL 2024, https://arxiv.org/abs/2402.14740; reward as last-mile-rl",
    formula="max E_π[r(y') − length_penalty · max(0, |y'|/|y| − 1)] − kl · KL(π ‖ π_sft), by RLOO",
)
