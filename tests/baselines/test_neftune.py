"""NEFTune's loss by hand, and that its record asks for the noise, which test_policy.py and test_loop.py look at."""

from __future__ import annotations

import torch
from support import token_pairs

from baselines.neftune import NEFTUNE, negative_log_likelihood
from baselines.sft import SFT


def test_value_and_gradient_by_hand() -> None:
    """Tokens of −1, −2, −3 and of −4: losses 1 + 2 + 3 = 6 and 4, by sums, not means. d(−x)/dx = −1 at every token."""
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    losses = negative_log_likelihood(token_pairs(logps))
    losses.sum().backward()
    assert losses.tolist() == [6.0, 4.0]
    assert logps.grad is not None and logps.grad.tolist() == [-1.0] * 4


def test_it_differs_from_sft_in_the_noise_only() -> None:
    assert dict(NEFTUNE.training) == {**SFT.training, "embedding_noise": 5.0}
    assert (NEFTUNE.normalise, NEFTUNE.needs, NEFTUNE.batches) == (SFT.normalise, SFT.needs, SFT.batches)
