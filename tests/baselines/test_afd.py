"""AfD by hand: what is rewarded, what the classifiers are trained on, and the classifier that the closed form replaces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from baselines.afd import CLOSED_FORM, INIT_DEMO, INIT_SFT, SFT_DEMO, closed_form_reward, logit_reward
from gsil_bench.methods import PairLogProbs, TokenLogProbs
from gsil_bench.training.critics import discrimination

NAN = torch.full((1,), torch.nan, dtype=torch.float64)


def view(lengths: list[int], **more: Tensor) -> TokenLogProbs:
    """Samples of these lengths; `more` has a number for each token."""
    counts = torch.tensor(lengths)
    pair = torch.arange(len(lengths)).repeat_interleave(counts)
    position = torch.cat([torch.arange(length) for length in lengths])
    nothing = torch.full((int(counts.sum()),), torch.nan)
    return TokenLogProbs(nothing, nothing, pair, position, counts[pair], len(lengths), max(lengths), more)


def test_the_logit_after_the_last_token_is_the_reward() -> None:
    """Scores 5, −1, 2 of three tokens and 4 of one: 2 and 4, each at the last token; what was scored before does not count."""
    rewards = logit_reward(view([3, 1], scores=torch.tensor([5.0, -1.0, 2.0, 4.0])))
    assert rewards.tolist() == [0.0, 0.0, 2.0, 4.0]


def test_the_closed_form_is_the_whole_answers_log_ratio() -> None:
    """π_SFT 1/2, 1/4, 1 and 1/8, π_init 1/4, 1/4, 1/2 and 1/2: log(2 · 1 · 2) = 2 log 2 at the end; log(1/4) = −2 log 2."""
    reference = torch.tensor([0.5, 0.25, 1.0, 0.125]).log()
    initial = torch.tensor([0.25, 0.25, 0.5, 0.5]).log()
    rewards = closed_form_reward(view([3, 1], reference_logps=reference, initial_logps=initial))
    assert rewards.tolist() == pytest.approx([0.0, 0.0, 2 * math.log(2), -2 * math.log(2)])


def test_what_each_classifier_tells_apart() -> None:
    """The table of the paper: positives, negatives; the policy is what the round starts from, π_SFT."""
    sides = {}
    for method in (INIT_SFT, SFT_DEMO, INIT_DEMO):
        assert method.rollouts is not None and method.rollouts.critic is not None
        assert not method.rollouts.critic.alongside
        sides[method.name] = (method.rollouts.critic.positives, method.rollouts.critic.negatives)
    assert sides == {
        "afd-init-sft": ("policy", "initial"),
        "afd-sft-demo": ("demonstrations", "policy"),
        "afd-init-demo": ("demonstrations", "initial"),
    }


def test_the_closed_form_has_no_classifier_and_its_reference_is_what_fine_tuning_made() -> None:
    """ "initial" is the opponent of a round's start, which is π_SFT for a method that starts from sft."""
    assert CLOSED_FORM.rollouts is not None and CLOSED_FORM.rollouts.critic is None
    assert CLOSED_FORM.rollouts.needs == {"initial"}
    assert (CLOSED_FORM.starts_from, CLOSED_FORM.protocol.opponent, CLOSED_FORM.protocol.rounds) == ("sft", "initial", 1)


# The identity: with every text listed, the best classifier of samples of π_SFT against those of π_init is the closed form.

TEXTS = [(0, 0), (0, 1), (1, 0), (1, 1), (2,)]
"""Two words and an end: the end alone, or two words."""


def two_policies() -> tuple[Tensor, Tensor]:
    """Log-probs of every token of every text, one text after the other, under two tables: (9,) each, fp64."""
    random = torch.Generator().manual_seed(3)
    found = []
    for _ in range(2):
        first = torch.randn(3, generator=random, dtype=torch.float64).log_softmax(0)
        second = torch.randn(2, 2, generator=random, dtype=torch.float64).log_softmax(1)
        tokens = [[first[text[0]], *([second[text[0], text[1]]] if len(text) == 2 else [])] for text in TEXTS]
        found.append(torch.stack([token for text in tokens for token in text]))
    return found[0], found[1]


def expected_loss(scores: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """The loss that trains the classifiers, in expectation over independent pairs.

    Args:
        scores: after each text's last token, (texts,)
        positives: probabilities of the texts.
        negatives: likewise.
    """
    lengths = [len(text) for text in TEXTS]
    total = scores.new_zeros(())
    for high, p in enumerate(positives):
        for low, q in enumerate(negatives):
            sides = [view([lengths[at]], scores=scores[at].expand(lengths[at])) for at in (high, low)]
            total = total + p * q * discrimination(PairLogProbs(NAN, NAN, NAN, NAN, NAN, NAN, (sides[0], sides[1]))).sum()
    return total


def test_the_best_classifiers_logit_is_the_closed_form() -> None:
    """The loss is Σ_y p(y) log(1 + e^−l(y)) + q(y) log(1 + e^l(y)), p of π_SFT and q of π_init. Its derivative
    −p / (1 + e^l) + q / (1 + e^−l) is 0 where e^l = p / q, and it is convex in every l(y): there is no other minimum.
    """
    fine_tuned, initial = two_policies()
    samples = view([len(text) for text in TEXTS], reference_logps=fine_tuned, initial_logps=initial)
    logits = samples.last(closed_form_reward(samples)).requires_grad_()
    positives, negatives = (samples.sum(logps).exp() for logps in (fine_tuned, initial))
    assert float(positives.sum()) == pytest.approx(1, abs=1e-12)
    assert float((positives.log() - negatives.log()).abs().max()) > 0.5  # the policies differ
    (gradient,) = torch.autograd.grad(expected_loss(logits, positives, negatives), logits)
    assert float(gradient.abs().max()) < 1e-15
    # and descent from a classifier that knows nothing ends there
    free = torch.zeros(len(TEXTS), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(free, positives, negatives)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(free.detach(), logits.detach(), rtol=0, atol=1e-6)
