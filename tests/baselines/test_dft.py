"""DFT's loss by hand, and its gradient in the logits."""

from __future__ import annotations

import pytest
import torch
from support import four_tokens, from_logits, token_pairs

from baselines.dft import weighted_by_probability


def test_value_and_gradient_by_hand() -> None:
    """p = 1/2, 1/4, 1 and 1/8: ½ log 2 + ¼ log 4 + 0 = log 2 = 0.693147; ⅛ log 8 = ⅜ log 2 = 0.259930.

    d/d log p = −p: the weight is held constant. A weight with a gradient would give −p (1 + log p), −0.153 for the first.
    """
    logps = torch.tensor([0.5, 0.25, 1.0, 0.125]).log().requires_grad_()
    losses = weighted_by_probability(token_pairs(logps))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.69314718, 0.25993019], rel=1e-6)
    assert logps.grad is not None and logps.grad.tolist() == pytest.approx([-0.5, -0.25, -1.0, -0.125])


def test_the_gradient_in_the_logits_is_sfts_times_the_probability() -> None:
    """π (softmax(z) − onehot), row by row."""
    z, targets = four_tokens()
    (found,) = torch.autograd.grad(weighted_by_probability(token_pairs(from_logits(z, targets)[0])).sum(), z)
    p = z.detach().softmax(1)
    wanted = p.gather(1, targets[:, None]) * (p - torch.nn.functional.one_hot(targets, 5))
    torch.testing.assert_close(found, wanted)
