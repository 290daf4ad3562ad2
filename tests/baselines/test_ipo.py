"""IPO's loss by hand, and that it pulls back beyond its target."""

from __future__ import annotations

import pytest
from support import policy_gradients, ratio_pairs

from baselines.ipo import IPO, squared_margin
from baselines.pairwise import DPO


def test_value_and_gradient_by_hand() -> None:
    """Margin 3 − (−1) = 4, target 1/(2 · 0.125) = 4 at β = 0.125 and 1/(2 · 0.25) = 2 at 0.25: 0² and 2² = 4.

    At β = 0.05 the target is 10: (4 − 10)² = 36. Gradients ±2 (margin − target): 2 · 2 = 4 and 2 · (−6) = −12.
    """
    pair = ratio_pairs([3.0], [-1.0])
    for beta, value, slope in ((0.125, 0.0, 0.0), (0.25, 4.0, 4.0), (0.05, 36.0, -12.0)):
        losses = squared_margin(pair, beta=beta)
        assert losses.tolist() == pytest.approx([value])
        assert policy_gradients(losses, pair) == pytest.approx([slope, -slope])


def test_it_is_least_at_its_target_and_pulls_back_beyond_it() -> None:
    """β = 0.1, target 5. Margins 2 + 3 = 5 and 7 + 3 = 10: gradients 0 and ±2 · 5."""
    at, beyond = ratio_pairs([2.0], [-3.0]), ratio_pairs([7.0], [-3.0])
    losses = squared_margin(at, beta=0.1)
    assert losses.tolist() == [0.0]
    assert policy_gradients(losses, at) == [0.0, 0.0]
    assert policy_gradients(squared_margin(beyond, beta=0.1), beyond) == [10.0, -10.0]


def test_it_differs_from_dpo_in_the_loss_only() -> None:
    assert (IPO.needs, IPO.protocol, dict(IPO.training)) == (DPO.needs, DPO.protocol, dict(DPO.training))
