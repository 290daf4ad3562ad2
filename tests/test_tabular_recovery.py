"""Does minimising a loss give the data's distribution? On five outcomes, with exact expectations, for every method.

The policy is a softmax of five logits, the reference a fixed distribution q, the data p; the objective is the
expectation over y ~ p and y' ~ q. What the optimum must be is derived by hand in each docstring; nothing here is taken
from the code under test.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from gsil_bench.methods import PairLogProbs, load_method

PROPER = ("gsil-logistic", "gsil-brier", "gsil-kliep", "gsil-lsif")
UNIFORM = torch.full((5,), 0.2, dtype=torch.float64)
SKEWED = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)


def _distributions(seed: int) -> tuple[Tensor, Tensor]:
    """(p, q) with full support; log-ratios up to about 3."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 5, generator=generator, dtype=torch.float64).softmax(dim=1)
    return p, q


def _optimum(name: str, p: Tensor, q: Tensor, settings: Mapping[str, float] | None = None) -> Tensor:
    """The policy that minimises E_{y~p, y'~q} loss, started from q."""
    method = load_method(name)
    assert method.loss is not None
    loss, keywords = method.loss, {**method.settings, **(settings or {})}
    real, generated = (index.flatten() for index in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    weights = p[real] * q[generated]  # (25,)
    ones = torch.ones(25, dtype=torch.float64)
    logits = q.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        policy = logits.log_softmax(dim=0)
        pair = PairLogProbs(policy[real], policy[generated], q.log()[real], q.log()[generated], ones, ones)
        value = (weights * loss(pair, **keywords)).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(objective)  # type: ignore[no-untyped-call]
    return logits.detach().softmax(dim=0)


def _kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p.log() - q.log())).sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", [*PROPER, "space"])
def test_proper_losses_recover_the_data(name: str, seed: int) -> None:
    """Their pointwise optimum is f = log(p/q); at scale 1, shift 0, f = log(π/q), so π = p, which sums to 1."""
    p, q = _distributions(seed)

    assert _kl(p, _optimum(name, p, q)) < 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_the_pairwise_logistic_loss_recovers_the_data_at_beta_1(seed: int) -> None:
    """The logit of (y, y') against (y', y) is log(p(y)q(y') / p(y')q(y)), so f = log(p/q) + c, and Σπ = 1 makes c = 0."""
    p, q = _distributions(seed)

    assert _kl(p, _optimum("spin", p, q, {"beta": 1.0})) < 1e-6


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_pairwise_at_another_beta_tempers_the_ratio(beta: float) -> None:
    """beta · log(π/q) = log(p/q) + c, so π ∝ q (p/q)^(1/beta) (SPIN, Theorem 5.4), which is p at beta 1 only."""
    p, q = _distributions(0)
    expected = q * (p / q) ** (1 / beta)

    found = _optimum("spin", p, q, {"beta": beta})

    assert _kl(expected / expected.sum(), found) < 1e-6
    assert _kl(p, found) > 0.01


@pytest.mark.parametrize("name", [*PROPER, "spin", "gsil-exponential", "gsil-hinge"])
def test_a_policy_that_is_the_data_stays(name: str) -> None:
    """p = q: log-ratio 0 everywhere is an optimum of all of them, by symmetry between outcomes."""
    assert _kl(SKEWED, _optimum(name, SKEWED, SKEWED)) < 1e-6


def test_hinge_does_not_recover_the_data() -> None:
    """p = (.4, .3, .15, .1, .05), q uniform. Where |f| < 1 the loss is Σ p + q − (p − q) f, with f = log(π/q).

    The three outcomes with p < q are pushed down to the kink f = −1, so π = 0.2/e = 0.0736 each (below it only p pulls,
    upwards). The rest, 1 − 0.6/e = 0.7793, goes to the two with p > q in proportion to p − q = 0.2 and 0.1: 0.5195 and 0.2598,
    with f = 0.954 and 0.261, inside the kink at 1. Against p = 0.4 and 0.3: KL = 0.057.
    """
    found = _optimum("gsil-hinge", SKEWED, UNIFORM)

    assert _kl(SKEWED, found) > 0.01
    # The kinks keep the optimiser from many digits.
    assert found.tolist() == pytest.approx([0.5195, 0.2598, 0.0736, 0.0736, 0.0736], abs=5e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_exponential_loss_goes_half_way(seed: int) -> None:
    """At scale 1 the loss is Σ p q/π + π = Σ p q/π + 1. Lagrange: p q/π² is constant, so π = √(pq) / Σ√(pq).

    Up to the normaliser that is half the log-ratio: log(π/q) = ½ log(p/q) + c.
    """
    p, q = _distributions(seed)
    expected = (p * q).sqrt() / (p * q).sqrt().sum()

    found = _optimum("gsil-exponential", p, q)

    assert _kl(expected, found) < 1e-6
    assert _kl(p, found) > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_the_exponential_loss_recovers_the_data_at_scale_one_half(seed: int) -> None:
    """f = ½ log(π/q) and its optimum is ½ log(p/q), so π = p."""
    p, q = _distributions(seed)

    assert _kl(p, _optimum("gsil-exponential", p, q, {"scale": 0.5})) < 1e-6


def test_a_shift_moves_every_proper_optimum_but_kliep() -> None:
    """KLIEP at scale 1: −Σ p log π + e^shift Σ π, and Σ π = 1, so π = p for every shift.

    The others want log(π/q) = log(p/q) − shift, which cannot sum to 1, and settle elsewhere.
    """
    p, q = _distributions(1)
    shifted = {name: _kl(p, _optimum(name, p, q, {"shift": 2.0})) for name in PROPER}

    assert shifted.pop("gsil-kliep") < 1e-6
    assert all(divergence > 0.01 for divergence in shifted.values()), shifted


def test_a_small_scale_overshoots() -> None:
    """At scale ½ the pointwise target q (p/q)² sums to Σ p²/q > 1, out of reach; the optimum overweighs high ratios."""
    found = _optimum("gsil-logistic", SKEWED, UNIFORM, {"scale": 0.5})

    assert _kl(SKEWED, found) > 0.01
    assert found[0] > SKEWED[0] and found[4] < SKEWED[4]
