"""The six density-ratio losses by hand, their guarded exponentials, and the weights that the released settings imply."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baselines.gsil import LINEAR_ABOVE, brier, exp_with_linear_tail, exponential, hinge, kliep, logistic, lsif
from gsil_bench.methods import PairLogProbs

LOG_2, LOG_3, LOG_4 = math.log(2), math.log(3), math.log(4)
Loss = Callable[[PairLogProbs, float, float], Tensor]


def _loss_and_gradients(
    loss: Loss, real_log_ratio: float, generated_log_ratio: float, scale: float, shift: float
) -> tuple[float, float, float]:
    """(loss, d/d policy_real, d/d policy_generated); the reference's log-probs are −11 and −7."""
    policy_real = torch.tensor([real_log_ratio - 11.0], dtype=torch.float64, requires_grad=True)
    policy_generated = torch.tensor([generated_log_ratio - 7.0], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([4.0])
    pair = PairLogProbs(policy_real, policy_generated, torch.tensor([-11.0]), torch.tensor([-7.0]), tokens, tokens)
    value = loss(pair, scale, shift)
    value.sum().backward()
    assert policy_real.grad is not None and policy_generated.grad is not None
    return value.item(), policy_real.grad.item(), policy_generated.grad.item()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (logistic, (math.log(5 / 3), -1 / 4, 1 / 5)),
        (brier, (0.1025, -3 / 32, 8 / 125)),
        (hinge, (0.0, 0.0, 0.0)),
        (kliep, (1 / 4 - LOG_3, -1.0, 1 / 4)),
        (lsif, (-2.96875, -3.0, 1 / 16)),
        (exponential, (7 / 12, -1 / 3, 1 / 4)),
    ],
)
def test_values_and_gradients_at_scale_1(loss: Loss, expected: tuple[float, float, float]) -> None:
    """f = log 3 for the demonstration (σ = 3/4, e^f = 3), f' = −log 4 for the self-generation (σ = 1/5, e^f' = 1/4).

    logistic: −log(3/4) − log(4/5) = log(4/3 · 5/4) = log(5/3); −(1 − 3/4), 1/5.
    brier: (1/4)² + (1/5)² = 0.0625 + 0.04; 2 · (−1/4) · (3/4 · 1/4) = −3/32, 2 · (1/5) · (1/5 · 4/5) = 8/125.
    hinge: both beyond the margin, 1.0986 > 1 and −1.3863 < −1.
    kliep: −log 3 + 1/4; −1, 1/4.
    lsif: −3 + ½ (1/4)² = −3 + 1/32; −3, (1/4)².
    exponential: 1/3 + 1/4; −1/3, 1/4.
    """
    assert _loss_and_gradients(loss, LOG_3, -LOG_4, scale=1.0, shift=0.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (logistic, (math.log(19 / 16), -2 / 19, 2 / 9)),
        (brier, (1 / 361 + 1 / 81, -72 / 6859, 32 / 729)),
        (hinge, (0.0, 0.0, 0.0)),
        (kliep, (1 / 8 - math.log(18), -2.0, 1 / 4)),
        (lsif, (-18 + 1 / 128, -36.0, 1 / 32)),
        (exponential, (1 / 18 + 1 / 8, -1 / 9, 1 / 4)),
    ],
)
def test_values_and_gradients_with_scale_2_and_shift_log_2(loss: Loss, expected: tuple[float, float, float]) -> None:
    """f = 2 log 3 + log 2 = log 18 (σ = 18/19), f' = −2 log 4 + log 2 = −log 8 (σ = 1/9); gradients have the factor 2.

    logistic: −log(18/19) − log(8/9) = log(19/18 · 9/8) = log(19/16); −2/19, 2/9.
    brier: (1/19)² + (1/9)²; 2 · 2 · (−1/19)(18/19 · 1/19) = −72/6859, 2 · 2 · (1/9)(1/9 · 8/9) = 32/729.
    hinge: 2.89 > 1 and −2.08 < −1.
    kliep: −log 18 + 1/8; −2, 2 · 1/8.
    lsif: −18 + ½ · 1/64; −2 · 18, 2 · 1/64.
    exponential: 1/18 + 1/8; −2/18, 2/8.
    """
    assert _loss_and_gradients(loss, LOG_3, -LOG_4, scale=2.0, shift=LOG_2) == pytest.approx(expected, rel=1e-12)


def test_hinge_inside_the_margin() -> None:
    """Scale ½: f = 0.54931, f' = −0.69315; (1 − f) + (1 + f') = 2 − ½ log 12 = 0.75755; gradients −½ and ½."""
    found = _loss_and_gradients(hinge, LOG_3, -LOG_4, scale=0.5, shift=0.0)

    assert found == pytest.approx((0.7575466751, -0.5, 0.5), rel=1e-9)


@pytest.mark.parametrize(
    ("loss", "plain", "released"),
    [
        (logistic, (0.5, 0.5), (0.0012, 0.0088)),
        (brier, (0.25, 0.25), (0.00025, 0.00185)),
        (hinge, (1.0, 1.0), (0.0, 0.01)),
        (kliep, (1.0, 1.0), (0.01, 0.0739)),
        (lsif, (1.0, 1.0), (0.0739, 0.546)),
    ],
)
def test_weights_before_the_first_step(loss: Loss, plain: tuple[float, float], released: tuple[float, float]) -> None:
    """Log-ratios 0, so f = shift. At scale 0.01 and shift 2, the settings that GSIL released, with σ(2) = 0.8808:

    logistic 0.01 · 0.1192 and 0.01 · 0.8808; brier 0.01 · 2 · 0.1192² · 0.8808 and 0.01 · 2 · 0.8808² · 0.1192;
    hinge: 1 − 2 < 0, so only the self-generation pulls; kliep 0.01 and 0.01 · e²; lsif 0.01 · e² and 0.01 · e⁴.
    """
    _, up, down = _loss_and_gradients(loss, 0.0, 0.0, scale=1.0, shift=0.0)
    assert (-up, down) == pytest.approx(plain, rel=1e-12)

    _, up, down = _loss_and_gradients(loss, 0.0, 0.0, scale=0.01, shift=2.0)
    assert (-up, down) == pytest.approx(released, rel=0.03)


def test_below_the_threshold_the_guarded_exponential_is_the_exponential() -> None:
    x = torch.linspace(-120, LINEAR_ABOVE, 1000, dtype=torch.float64)

    assert torch.equal(exp_with_linear_tail(x), torch.exp(x))


def test_above_the_threshold_it_is_the_tangent() -> None:
    """At 20 + 3: e^20 · (1 + 3) = 4 · 485165195.41 = 1940660781.64, with the slope e^20 everywhere above."""
    x = torch.tensor([20.0, 23.0, 1e4], dtype=torch.float64, requires_grad=True)

    value = exp_with_linear_tail(x)
    value.sum().backward()

    assert value[1].item() == pytest.approx(1940660781.64, rel=1e-11)
    assert x.grad is not None and x.grad.tolist() == pytest.approx([485165195.41] * 3, rel=1e-11)


def test_its_slope_never_falls_nor_jumps() -> None:
    """Convex and once differentiable: slopes rise with x, and on both sides of the threshold they agree to e^±0.001."""
    x = torch.linspace(LINEAR_ABOVE - 1, LINEAR_ABOVE + 1, 2001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(exp_with_linear_tail(x).sum(), x)

    assert bool((slope.diff() >= 0).all())
    assert float((slope[1:] / slope[:-1]).max()) < math.exp(0.0011)


def test_in_single_precision_its_square_stays_finite() -> None:
    """Adam squares gradients: (e^20)² = 2.4e17, far below the largest fp32, 3.4e38."""
    x = torch.tensor([200.0, 1e6], requires_grad=True)
    (slope,) = torch.autograd.grad(exp_with_linear_tail(x).sum(), x)

    assert bool(slope.square().isfinite().all())
    assert slope.square().max().item() == pytest.approx(2.3538527e17, rel=1e-5)


def _slope_per_outcome(loss: Loss, f: float, log_ratio: float) -> float:
    """d/df of p ℓ₁(f) + q ℓ₋₁(f) for an outcome with p = e^log_ratio and q = 1."""
    _, real, generated = _loss_and_gradients(loss, f, f, scale=1.0, shift=0.0)
    return math.exp(log_ratio) * real + generated


@pytest.mark.parametrize("log_ratio", [-15.0, -3.0, 0.0, 3.0, 9.9])
@pytest.mark.parametrize(("loss", "share"), [(kliep, 1.0), (lsif, 1.0), (exponential, 0.5)])
def test_the_guard_does_not_move_an_optimum_below_the_threshold(loss: Loss, share: float, log_ratio: float) -> None:
    """The loss of one outcome falls until f = log r (the exponential: ½ log r) and rises after it, as without the guard."""
    optimum = share * log_ratio

    assert _slope_per_outcome(loss, optimum - 0.05, log_ratio) < 0
    assert _slope_per_outcome(loss, optimum + 0.05, log_ratio) > 0


@pytest.mark.parametrize(("loss", "log_ratio", "optimum"), [(kliep, 19.9, 19.9), (exponential, 39.8, 19.9), (lsif, 9.9, 9.9)])
def test_the_last_optimum_before_the_threshold_is_unmoved(loss: Loss, log_ratio: float, optimum: float) -> None:
    assert _slope_per_outcome(loss, optimum - 0.05, log_ratio) < 0 < _slope_per_outcome(loss, optimum + 0.05, log_ratio)


def test_beyond_the_threshold_lsif_and_the_exponential_keep_a_finite_optimum() -> None:
    """LSIF at log r = 12: h(f) = e^10 (1 + f − 10) = e^12 gives f = 9 + e² = 16.389. The guard moved it up from 12.

    Exponential at log r = 50: −e^50 e^−f + e^20 = 0 gives f = 30; without the guard it is 25.
    """
    assert _slope_per_outcome(lsif, 16.38, 12.0) < 0 < _slope_per_outcome(lsif, 16.40, 12.0)
    assert _slope_per_outcome(exponential, 29.99, 50.0) < 0 < _slope_per_outcome(exponential, 30.01, 50.0)


def test_beyond_the_threshold_kliep_rises_without_end_as_without_the_guard_for_outcomes_never_generated() -> None:
    """At log r = 21 the slope is −e^21 + e^20 < 0 for every f > 20: the stated limit of the tangent."""
    assert all(_slope_per_outcome(kliep, f, 21.0) < 0 for f in (20.5, 30.0, 300.0))
