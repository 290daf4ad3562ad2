"""Offline IQ-Learn by hand, and that both forms of its equation have one gradient."""

from __future__ import annotations

import pytest
import torch
from support import four_tokens, from_logits, token_pairs

from baselines.iq_learn import offline_iq


def test_value_and_gradient_by_hand() -> None:
    """log π = −1, −2, −3 and v = 2, 4, 6: Q = 1, 2, 3. γ = ½: Q − γ v' = 1 − 2, 2 − 3, 3 − 0 = −1, −1, 3, squares 1, 1, 9.

    λ = 0.1: 0.1 · 11 + 6 = 7.1. The single token: log π = −4, v = 1, Q = −3, v' = 0: 0.9 + 4 = 4.9.

    In log π: 2λ (Q − γ v') − 1 = −0.2 − 1, −0.2 − 1, 0.6 − 1, −0.6 − 1. In v: 2λ of its own bracket minus 2λγ of the bracket
    before it: −0.2, −0.2 + 0.1, 0.6 + 0.1, −0.6.
    """
    logps, v = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True), torch.tensor([2.0, 4.0, 6.0, 1.0], requires_grad=True)
    losses = offline_iq(token_pairs(logps, v), penalty=0.1, gamma=0.5)
    assert losses.tolist() == pytest.approx([7.1, 4.9])
    of_logps, of_v = torch.autograd.grad(losses.sum(), (logps, v))
    assert of_logps.tolist() == pytest.approx([-1.2, -1.2, -0.4, -1.6])
    assert of_v.tolist() == pytest.approx([-0.2, -0.1, 0.7, -0.6])


def test_without_penalty_it_is_sft_whatever_the_normalisers() -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    assert offline_iq(token_pairs(logps, 100 * logps), penalty=0.0, gamma=1.0).tolist() == [6.0, 4.0]


def test_both_forms_of_equation_14_have_one_gradient() -> None:
    """λ (v + log π − γ v')² − log π from the normalisers, against λ (z[a] − γ v')² − log π from the logits."""
    z, targets = four_tokens()
    (found,) = torch.autograd.grad(offline_iq(token_pairs(*from_logits(z, targets)), penalty=0.3, gamma=0.9).sum(), z)
    logps, v = from_logits(z, targets)
    following = torch.stack((v[1], v[2], torch.zeros_like(v[0]), torch.zeros_like(v[0])))
    loss = 0.3 * (z.gather(1, targets[:, None]).squeeze(1) - 0.9 * following).square() - logps
    torch.testing.assert_close(found, torch.autograd.grad(loss.sum(), z)[0])
