"""Imitation by divergences, where everything can be listed: rewards against gradients of divergences, and where each method ends.

What is compared with a method's gradient is autograd through the divergence itself, summed over all texts; or arithmetic in the
docstring. The formulas with their sources are in docs/divergences.md. β is the demonstrator, l the discriminator's logit, ρ an
occupancy: the probability that a text begins with this prefix and this token.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tabular import (
    ELSEWHERE,
    METHODS,
    MODES,
    TWO_MODES,
    Imitation,
    World,
    a_demonstrator,
    centred_js_reward,
    discrimination,
    divergence,
    fit_two_modes,
    imitate,
    js,
    js_reward,
    kl,
    likelihood_objective,
    mass_kl,
    modes_held,
    off_modes,
    policy_objective,
    returns_to_go,
    reverse_kl_reward,
    two_modes,
    two_modes_table,
)
from torch import Tensor
from torch.nn.functional import logsigmoid

from baselines import adversarial
from baselines.iq_learn import offline_iq
from baselines.occupancy import occupancy_likelihood
from gsil_bench.methods import Baseline, PairLogProbs, Rollouts, TokenLogProbs, load_method
from gsil_bench.training import critics
from gsil_bench.training.policy_gradient import advantages, clipped_policy_gradient

ROOT = Path(__file__).parent.parent
WORLD = World()
"""Three words and an end, at most three tokens: 13 prefixes and 40 texts of lengths 1, 2 and 3."""
EQUAL = World(ends=False)
"""27 texts of three words."""
SEEDS = range(3)
Reward = Callable[[TokenLogProbs], Tensor]


def _pair(world: World, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """log d^β and a policy: (log d^β, log ρ^β, table with gradient)."""
    demonstrations = a_demonstrator(world, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    table = torch.randn(world.zeros().shape, generator=generator, dtype=torch.float64).requires_grad_()
    return demonstrations.log(), world.occupancy(demonstrations).log(), table


def _gradient(value: Tensor, table: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value, table, retain_graph=True)
    return gradient


def _assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1e-2  # two zeros would agree too
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def _by_text(world: World, table: Tensor, rewards: Tensor) -> Tensor:
    """E_π[r(y) ∇log d^π(y)]."""
    return _gradient(policy_objective(world, table, rewards[:, None]), table)


def _by_token(world: World, table: Tensor, rewards: Tensor) -> Tensor:
    """E_π Σ_t (Σ_{k ≥ t} r(s_k, a_k)) ∇log π(a_t | s_t)."""
    return _gradient(policy_objective(world, table, returns_to_go(world.along(rewards))), table)


def _own(world: World, table: Tensor) -> tuple[Tensor, Tensor]:
    """(log d^π, ρ^π), with their graphs."""
    logps = world.logps(table)
    return logps, world.occupancy(logps.exp())


# The world.


def test_a_small_world_by_hand() -> None:
    """One word and an end, two tokens: "·", "w·" and "ww". π(w) = ¾ first and ½ then: ¼, ⅜, ⅜.

    ρ: first w ¾, first end ¼, then w ⅜ and end ⅜; in all 7/4, the mean length ¼ · 1 + ¾ · 2.
    """
    world = World(words=1, length=2)
    table = torch.tensor([[math.log(3), 0], [0, 0]], dtype=torch.float64)
    distribution = world.logps(table).exp()

    assert world.texts == [(1,), (0, 1), (0, 0)]
    assert distribution.tolist() == pytest.approx([1 / 4, 3 / 8, 3 / 8])
    assert world.occupancy(distribution).tolist() == pytest.approx([3 / 4, 1 / 4, 3 / 8, 3 / 8])
    assert world.token_logps(table).tolist()[0] == pytest.approx([math.log(1 / 4), 0])


@pytest.mark.parametrize(("world", "prefixes", "texts"), [(WORLD, 13, 40), (EQUAL, 13, 27)])
def test_every_text_is_there_once(world: World, prefixes: int, texts: int) -> None:
    """1 + 3 + 9 prefixes; a text ends after one of them, or has three words: 13 + 27, or 27 without an end."""
    distribution = a_demonstrator(world)

    assert (len(world.prefixes), len(set(world.texts)), len(world.texts)) == (prefixes, texts, texts)
    assert distribution.sum().item() == pytest.approx(1, abs=1e-12)
    assert world.occupancy(distribution).sum().item() == pytest.approx((distribution @ world.lengths.double()).item())
    torch.testing.assert_close(world.logps(world.conditionals(distribution)).exp(), distribution)


# Rewards of whole texts: l = log d^β − log d^π, fixed while the policy moves.


def test_rewards_by_hand() -> None:
    """Two texts, π = (½, ½), β = (¾, ¼): l = log 3/2 and log 1/2. E_π[r ∇] for the first's logit is π(1 − π)(r₁ − r₂).

    r = l: ¼ log 3. r = softplus(l) = log(1 + e^l): ¼ (log 5/2 − log 3/2) = ¼ log 5/3. With the middle (⅝, ⅜) the derivative of
    JS is ½ · ¼ (log(½ / ⅝) − log(½ / ⅜)) = −⅛ log 5/3: half of it.
    """
    world = World(words=2, length=1, ends=False)
    table = world.zeros().requires_grad_()
    beta = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    logits = beta - world.logps(table)

    assert _by_text(world, table, reverse_kl_reward(logits))[0, 0].item() == pytest.approx(math.log(3) / 4)
    assert _by_text(world, table, js_reward(logits))[0, 0].item() == pytest.approx(math.log(5 / 3) / 4)
    assert _gradient(js(beta, world.logps(table)), table)[0, 0].item() == pytest.approx(-math.log(5 / 3) / 8)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_logit_is_the_reward_of_the_reverse_kl(seed: int) -> None:
    """∇KL(π ‖ β) = Σ ∇d^π (log d^π − log d^β + 1), and Σ ∇d^π = 0."""
    beta, _, table = _pair(WORLD, seed)
    own = WORLD.logps(table)

    _assert_same(_by_text(WORLD, table, reverse_kl_reward(beta - own)), -_gradient(kl(own, beta), table))


@pytest.mark.parametrize("seed", SEEDS)
def test_softplus_is_the_reward_of_twice_jensen_shannon(seed: int) -> None:
    """2 JS = Σ β log(2β/(β + π)) + π log(2π/(β + π)); its derivative by π is log(2π/(β + π)) = log 2 − softplus(l)."""
    beta, _, table = _pair(WORLD, seed)
    own = WORLD.logps(table)

    _assert_same(_by_text(WORLD, table, js_reward(beta - own)), -2 * _gradient(js(beta, own), table))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_ratio_is_the_reward_of_the_forward_kl_which_is_sft(seed: int) -> None:
    """E_π[(d^β / d^π) ∇log d^π] = E_β ∇log d^π."""
    beta, _, table = _pair(WORLD, seed)
    own = WORLD.logps(table)
    found = _by_text(WORLD, table, (beta - own).exp())

    _assert_same(found, -_gradient(kl(beta, own), table))
    _assert_same(found, _gradient(likelihood_objective(WORLD, table, beta.exp(), torch.ones(3).double()), table))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_constant_added_to_the_reward_of_texts_changes_nothing(seed: int) -> None:
    beta, _, table = _pair(WORLD, seed)
    logits = beta - WORLD.logps(table)

    _assert_same(_by_text(WORLD, table, centred_js_reward(logits)), _by_text(WORLD, table, js_reward(logits)))


@pytest.mark.parametrize("seed", SEEDS)
def test_log_d_is_not_jensen_shannon_but_reverse_kl_minus_twice_it(seed: int) -> None:
    """log D = l − softplus(l), the difference of the two rewards above. It points elsewhere, so no factor mends it."""
    beta, _, table = _pair(WORLD, seed)
    own = WORLD.logps(table)
    found = _by_text(WORLD, table, logsigmoid(beta - own))
    of_js = -_gradient(js(beta, own), table)

    _assert_same(found, -_gradient(kl(own, beta) - 2 * js(beta, own), table))
    assert torch.cosine_similarity(found.flatten(), of_js.flatten(), dim=0) < 0.99


# Log-ratios of tokens.


@pytest.mark.parametrize("seed", SEEDS)
def test_log_ratios_of_tokens_add_up_to_the_logits_of_prefixes_and_texts(seed: int) -> None:
    """log β(a_t|s_t) − log π(a_t|s_t) summed over t ≤ k is the logit of (s_k, a_k), over all t that of the text.

    β is any distribution over the texts; its conditionals come from its occupancies. Both policies see the same transitions.
    """
    generator = torch.Generator().manual_seed(seed)
    beta = torch.rand(len(WORLD.texts), generator=generator, dtype=torch.float64)
    beta /= beta.sum()
    table = _pair(WORLD, seed)[2].detach()
    ratios = WORLD.token_logps(WORLD.conditionals(beta)) - WORLD.token_logps(table)
    own = WORLD.logps(table)

    torch.testing.assert_close(ratios.sum(1), beta.log() - own)
    logits = WORLD.occupancy(beta).log() - WORLD.occupancy(own.exp()).log()
    torch.testing.assert_close(ratios.cumsum(1) * WORLD.exists, WORLD.along(logits))


@pytest.mark.parametrize("seed", SEEDS)
def test_dense_log_ratios_have_the_gradient_of_their_sum(seed: int) -> None:
    """What was earned before a token does not depend on it: E_π[r_k ∇log π_t] = 0 for k < t."""
    beta, _, table = _pair(WORLD, seed)
    ratios = WORLD.token_logps(WORLD.conditionals(beta.exp())) - WORLD.token_logps(table)
    found = _gradient(policy_objective(WORLD, table, returns_to_go(ratios)), table)

    _assert_same(found, -_gradient(kl(WORLD.logps(table), beta), table))


# Rewards of tokens: l = log ρ^β − log ρ^π, and the rewards to go.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("world", [WORLD, EQUAL])
def test_logits_of_tokens_give_the_reverse_kl_between_occupancies(world: World, seed: int) -> None:
    """Rewards to go sum to Σ ∇ρ^π l. The derivative of Σ ρ^π log(ρ^π/ρ^β) − ρ^π + ρ^β by ρ^π is −l.

    Where all texts have three tokens, Σ ρ = 3 and this is 3 KL(ρ^π/3 ‖ ρ^β/3).
    """
    _, beta, table = _pair(world, seed)
    _, own = _own(world, table)
    found = _by_token(world, table, reverse_kl_reward(beta - own.log()))

    _assert_same(found, -_gradient(mass_kl(own, beta.exp()), table))
    if not world.ends:
        three = math.log(3)
        _assert_same(found, -3 * _gradient(kl(own.log() - three, beta - three), table))


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_of_normalised_occupancies_give_length_times_kl(seed: int) -> None:
    """A discriminator of single tokens, drawn evenly from each side, has l' = log ρ^β/m^β − log ρ^π/m^π, m = Σρ the mean length.

    Σ ∇ρ^π l' = −∇(m^π KL(ρ^π/m^π ‖ ρ^β/m^β)): still 0 only at the demonstrator's occupancies, but it pulls towards short texts
    on the way. Proof: ∇(m KL) = Σ ∇ρ log(p/q) + Σ ρ ∇log p, and the last is m Σ ∇p = 0.
    """
    _, beta, table = _pair(WORLD, seed)
    _, own = _own(WORLD, table)
    beta_logs, own_logs = beta - beta.exp().sum().log(), own.log() - own.sum().log()
    found = _by_token(WORLD, table, reverse_kl_reward(beta_logs - own_logs))

    _assert_same(found, -_gradient(own.sum() * kl(own_logs, beta_logs), table))


def _mass_js(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(2p/(p + q)) + q log(2q/(p + q)): the linear parts of the two `mass_kl` to the middle cancel."""
    middle = (p + q) / 2
    return mass_kl(p, middle) + mass_kl(q, middle)


@pytest.mark.parametrize("seed", SEEDS)
def test_softplus_minus_log_2_gives_jensen_shannon_between_occupancies(seed: int) -> None:
    """The derivative of Σ ρ^β log(2ρ^β/(ρ^β + ρ^π)) + ρ^π log(2ρ^π/(ρ^β + ρ^π)) by ρ^π is log(2ρ^π/(ρ^β + ρ^π))."""
    _, beta, table = _pair(WORLD, seed)
    _, own = _own(WORLD, table)

    _assert_same(_by_token(WORLD, table, centred_js_reward(beta - own.log())), -_gradient(_mass_js(beta.exp(), own), table))


@pytest.mark.parametrize("seed", SEEDS)
def test_softplus_of_tokens_pays_for_length(seed: int) -> None:
    """At the demonstrator itself l = 0, each token earns log 2, and the gradient is log 2 · ∇E_π[length], not 0."""
    beta, _, _ = _pair(WORLD, seed)
    table = WORLD.conditionals(beta.exp()).requires_grad_()
    own, occupancy = _own(WORLD, table)
    of_length = _gradient((own.exp() * WORLD.lengths).sum(), table)
    logits = torch.zeros_like(occupancy)

    _assert_same(_by_token(WORLD, table, js_reward(logits)), math.log(2) * of_length)
    assert _by_token(WORLD, table, centred_js_reward(logits)).abs().max() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_softplus_of_tokens_is_exact_where_all_texts_are_equally_long(seed: int) -> None:
    """Then log 2 a token is a constant: 2 · 3 · JS(ρ^π/3, ρ^β/3)."""
    _, beta, table = _pair(EQUAL, seed)
    _, own = _own(EQUAL, table)
    three = math.log(3)

    _assert_same(_by_token(EQUAL, table, js_reward(beta - own.log())), -6 * _gradient(js(own.log() - three, beta - three), table))


def _absorbed(world: World, distribution: Tensor) -> Tensor:
    """Occupancies if a text that is over stays as it is until step `length`, summing to 1; counted with a dictionary."""
    visits: dict[tuple[int, ...], Tensor] = defaultdict(lambda: distribution.new_zeros(()))
    for text, probability in zip(world.texts, distribution, strict=True):
        for step in range(1, world.length + 1):
            visits[text[:step]] = visits[text[:step]] + probability / world.length
    return torch.stack([visits[prefix] for prefix in sorted(visits)])


@pytest.mark.parametrize("seed", SEEDS)
def test_softplus_of_tokens_is_exact_with_absorbing_steps(seed: int) -> None:
    """The other remedy: the last token's reward is paid again for each of the 3 − length steps behind it."""
    beta, of_pairs, table = _pair(WORLD, seed)
    own, occupancy = _own(WORLD, table)
    rewards = WORLD.along(js_reward(of_pairs - occupancy.log()))
    last = rewards.gather(1, WORLD.lengths[:, None] - 1)
    found = _gradient(policy_objective(WORLD, table, returns_to_go(rewards) + (3 - WORLD.lengths[:, None]) * last), table)

    expected = js(_absorbed(WORLD, own.exp()).log(), _absorbed(WORLD, beta.exp()).log())
    _assert_same(found, -6 * _gradient(expected, table))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_ratio_of_tokens_minus_1_gives_the_forward_kl_between_occupancies(seed: int) -> None:
    """The derivative of Σ ρ^β log(ρ^β/ρ^π) − ρ^β + ρ^π by ρ^π is 1 − exp(l)."""
    _, beta, table = _pair(WORLD, seed)
    _, own = _own(WORLD, table)

    _assert_same(_by_token(WORLD, table, (beta - own.log()).exp() - 1), -_gradient(mass_kl(beta.exp(), own), table))


# Position-weighted maximum likelihood.


@pytest.mark.parametrize("seed", SEEDS)
def test_position_weights_give_the_forward_kl_between_occupancies(seed: int) -> None:
    """With absorbing steps up to K + 1 = 3, token t is in the log of steps t … K of 3: weights 1, ⅔, ⅓, whatever the length."""
    beta, _, table = _pair(WORLD, seed)
    weights = torch.tensor([1, 2 / 3, 1 / 3], dtype=torch.float64)
    own = WORLD.logps(table).exp()

    expected = kl(_absorbed(WORLD, beta.exp()).log(), _absorbed(WORLD, own).log())
    _assert_same(
        _gradient(likelihood_objective(WORLD, table, beta.exp(), weights), table), -_gradient(expected, table)
    )  # fmt: skip


def _view(world: World, table: Tensor, rows: Tensor | None = None, **of_tokens: Tensor) -> PairLogProbs:
    """Texts on both sides, all of them once by default, with their tokens' log-probs and normalisers.

    Args:
        rows: which texts, in order; one may be there more than once.
        of_tokens: further vectors of single tokens, (texts, length) of the world.
    """
    rows = torch.arange(len(world.texts)) if rows is None else rows
    exists = world.exists[rows].bool()

    def flat(values: Tensor) -> Tensor:
        return values.expand_as(world.chosen)[rows][exists]

    tokens = TokenLogProbs(
        logps=flat(world.token_logps(table)),
        normalisers=flat(world.along(table.logsumexp(1)[:, None].expand_as(table).flatten())),
        pair=torch.arange(len(rows))[:, None].expand_as(exists)[exists],
        position=flat(torch.arange(world.length)),
        length=flat(world.lengths.double()[:, None]),  # weights made of it are fp64 too
        pairs=len(rows),
        longest=world.length,
        more={name: flat(values) for name, values in of_tokens.items()},
    )
    nan = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    return PairLogProbs(world.logps(table)[rows], nan, nan, nan, world.lengths[rows], nan, (tokens, tokens))


@pytest.mark.parametrize("seed", SEEDS)
def test_sft_occupancy_is_the_forward_kl_between_occupancies_of_equally_long_texts(seed: int) -> None:
    _, beta, table = _pair(EQUAL, seed)
    _, own = _own(EQUAL, table)
    demonstrations = a_demonstrator(EQUAL, seed)
    found = _gradient((demonstrations * occupancy_likelihood(_view(EQUAL, table), horizon=3)).sum(), table)

    three = math.log(3)
    _assert_same(found, _gradient(kl(beta - three, own.log() - three), table))


def _halves() -> Tensor:
    """The demonstrator that ends with ½ after each token, and takes each word with ⅙: (texts,)."""
    table = torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2], dtype=torch.float64).log().expand(13, 4)
    return WORLD.logps(table).exp()


def test_weights_by_each_texts_own_length_put_off_the_end() -> None:
    """With w_t = (n − t)/n for a text of n tokens, what is learnt after one word is not the demonstrator's ½.

    The end there makes n = 2 and weighs ½; another word makes n = 3 and weighs ⅔. So π(end) = ½·½ / (½·½ + ½·⅔) = 3/7. First
    tokens weigh 1 and third ones ⅓, whatever follows: ½ there. In general the end at position t weighs 1/(t + 1), a word that
    leads to n tokens 1 − t/n: at t = 99 of texts with 200, one to fifty.
    """
    weights = (WORLD.lengths[:, None] - torch.arange(3)) / WORLD.lengths[:, None]
    counts = WORLD.occupancy(_halves()).new_zeros(13 * 4)
    counts = counts.index_add(0, WORLD.chosen.flatten(), (_halves()[:, None] * weights * WORLD.exists).flatten()).reshape(13, 4)
    learnt = counts[:, 3] / counts.sum(1)  # Σ_a c_a log π_a is highest at π_a = c_a / Σ c

    assert learnt.tolist() == pytest.approx([1 / 2] + 3 * [3 / 7] + 9 * [1 / 2])


def _learn(name: str, demonstrations: Tensor) -> Tensor:
    """Where a method of the suite that needs demonstrations only ends, exactly: its table."""
    method, table = load_method(name), WORLD.zeros().requires_grad_()
    loss, settings = method.loss, method.settings
    assert loss is not None
    optimiser = torch.optim.LBFGS(
        [table], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        value = (demonstrations * loss(_view(WORLD, table), **settings)).sum()
        value.backward()
        return value

    optimiser.step(objective)
    return table.detach()


@pytest.mark.parametrize(
    "name",
    [
        "sft",
        "sft-occupancy",
    ],
)
def test_likelihoods_of_the_suite_learn_when_to_end(name: str) -> None:
    assert _learn(name, _halves()).softmax(1)[:, 3].tolist() == pytest.approx(13 * [0.5], abs=1e-5)


# Discriminators.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("unit", ["text", "token"])
def test_a_trained_discriminator_is_the_log_ratio(unit: str, seed: int) -> None:
    """Of texts; of tokens where each text counts with all its tokens. The loss that is left for texts is 2 log 2 − 2 JS."""
    beta, of_pairs, table = _pair(WORLD, seed)
    own, occupancy = (value.detach() for value in _own(WORLD, table))
    demonstrated, played = (beta.exp(), own.exp()) if unit == "text" else (of_pairs.exp(), occupancy)
    logits, left = _train(demonstrated, played)

    torch.testing.assert_close(logits, demonstrated.log() - played.log(), rtol=0, atol=1e-5)
    if unit == "text":
        assert left == pytest.approx(2 * math.log(2) - 2 * js(beta, own).item(), abs=1e-9)


def test_a_discriminator_of_evenly_drawn_tokens_is_shifted() -> None:
    """With the mean over tokens on each side, l' = l + log(m^π / m^β), m the mean lengths."""
    _, beta, table = _pair(WORLD, 0)
    occupancy = _own(WORLD, table)[1].detach()
    shift = (occupancy.sum() / beta.exp().sum()).log()
    logits, _ = _train(beta.exp() / beta.exp().sum(), occupancy / occupancy.sum())

    assert shift.abs() > 0.01
    torch.testing.assert_close(logits, beta - occupancy.log() + shift, rtol=0, atol=1e-5)


def _train(demonstrated: Tensor, played: Tensor) -> tuple[Tensor, float]:
    """The discriminator with the lowest loss, and that loss."""
    logits = torch.zeros_like(played).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=3000, tolerance_grad=1e-11, tolerance_change=1e-18, history_size=40, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        value = discrimination(logits, demonstrated, played)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(objective)  # type: ignore[no-untyped-call]
    return logits.detach(), discrimination(logits, demonstrated, played).item()


# The suite's own rewards, policy gradient and discriminators, with every text as a sample.


@pytest.mark.parametrize("reward", [adversarial.reverse_kl_reward, adversarial.js_reward, adversarial.token_reverse_kl_reward])
@pytest.mark.parametrize("baseline", ["none", "value", "leave-one-out"])
def test_the_suites_policy_gradient_is_exact_in_expectation(baseline: Baseline, reward: Reward) -> None:
    """−∇ of reverse KL, of 2 JS, and of reverse KL of occupancies, over all 1600 pairs of texts as one prompt's two samples.

    A pair has the probability of its texts' product. Any value function takes nothing from the expectation at λ = 1. The score of
    a text is that at its last token; before it, a critic of texts may say anything, here 7.
    """
    beta, of_pairs, table = _pair(WORLD, 0)
    own, occupancy = _own(WORLD, table)
    is_last = WORLD.lengths[:, None] - 1 == torch.arange(3)
    of_texts, of_tokens = torch.where(is_last, (beta - own)[:, None], 7.0), WORLD.along(of_pairs - occupancy.log())
    descended, scores = {
        "reverse_kl_reward": (kl(own, beta), of_texts),
        "js_reward": (2 * js(beta, own), of_texts),
        "token_reverse_kl_reward": (mass_kl(occupancy, of_pairs.exp()), of_tokens),
    }[reward.__name__]

    rows = torch.cartesian_prod(torch.arange(40), torch.arange(40)).flatten()  # (3200,)
    values = WORLD.along(torch.linspace(-3, 3, 13, dtype=torch.float64).repeat_interleave(4))
    samples = _view(WORLD, table, rows, values=values, scores=scores.detach()).generated
    rollouts = Rollouts(reward=reward, baseline=baseline, gae_lambda=1.0)
    advantage, _ = advantages(samples, rollouts.reward(samples), 2, rollouts)
    side = replace(samples, more={"sampled_logps": samples.logps.detach(), "advantages": advantage})
    losses = clipped_policy_gradient(replace(_view(WORLD, table, rows), tokens=(side, side)), clip=0.2)  # at ratio 1: no clipping
    weights = own.detach()[rows].exp().view(-1, 2).prod(1).repeat_interleave(2) / 2
    _assert_same(_gradient((weights * losses).sum(), table), _gradient(descended, table))


def test_the_suites_discriminators_see_texts_or_each_texts_mean_token() -> None:
    """Every text is a pair with itself, its weight its probability, so each side is summed as in `discrimination`.

    The mean over a text's tokens makes a visit of (s, a) count 1/length: ρ of d/length, not the ρ of the identities.
    """
    beta, _, table = _pair(WORLD, 0)
    beta, own = beta.exp(), WORLD.logps(table).detach().exp()
    of_texts = torch.linspace(-2, 2, 40, dtype=torch.float64)

    def loss(critic: Callable[[PairLogProbs], Tensor], scores: Tensor) -> Tensor:
        """Both expectations; the other side's scores are so certain that they add nothing."""
        seen, high, low = (_view(WORLD, WORLD.zeros(), scores=each).real for each in (scores, scores + 99, scores - 99))
        pair = _view(WORLD, WORLD.zeros())
        positive, negative = (critic(replace(pair, tokens=sides)) for sides in ((seen, low), (high, seen)))
        return (beta * positive + own * negative).sum()

    found = loss(critics.discrimination, of_texts[:, None].expand(40, 3))
    torch.testing.assert_close(found, discrimination(of_texts, beta, own))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["airl-reverse-kl-tokens", "gail-js-tokens"])
def test_the_suites_discriminator_of_tokens_is_best_at_the_log_ratio_of_occupancies(name: str, seed: int) -> None:
    """A demonstration and a sample are drawn apart, so the texts y and y' have the weight β(y) π(y'). At l = log ρ^β − log ρ^π
    nothing pulls at any (prefix, token), however long the texts are; at the demonstrator itself that is l = 0.
    """
    rollouts = load_method(name).rollouts
    assert rollouts is not None and rollouts.critic is not None
    critic = rollouts.critic
    beta, of_pairs, other = _pair(WORLD, seed)
    demonstrated, sampled = torch.cartesian_prod(torch.arange(40), torch.arange(40)).T

    def pull(table: Tensor, logits: Tensor) -> Tensor:
        logits.requires_grad_()
        sides = [_view(WORLD, table, rows, scores=WORLD.along(logits)).real for rows in (demonstrated, sampled)]
        pair = replace(_view(WORLD, table, demonstrated), tokens=(sides[0], sides[1]))
        weights = beta[demonstrated].exp() * WORLD.logps(table).exp()[sampled]
        return _gradient((weights * critic.loss(pair, **critic.settings)).sum(), logits)

    for table in (WORLD.conditionals(beta.exp()), other.detach()):
        best = of_pairs - _own(WORLD, table)[1].log()
        assert pull(table, best.clone()).abs().max() < 1e-9
        assert pull(table, best + 1).norm() > 1e-4  # and elsewhere something pulls
    assert pull(WORLD.conditionals(beta.exp()), torch.zeros_like(of_pairs)).abs().max() < 1e-9


# Logits as Q-values.


@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_implied_by_logits_telescope(seed: int) -> None:
    """Σ_t [Q(s_t, a_t) − V(s_{t+1})] − V(s_0) = Σ_t log π(a_t|s_t), V = log Σ exp Q and 0 after the last token."""
    table = _pair(WORLD, seed)[2].detach()
    v = dict(zip(WORLD.prefixes, table.logsumexp(1).tolist(), strict=True))
    row = {prefix: at for at, prefix in enumerate(WORLD.prefixes)}
    for text, logps in zip(WORLD.texts, WORLD.logps(table).tolist(), strict=True):
        implied = [
            table[row[text[:t]], token].item() - (v[text[: t + 1]] if t + 1 < len(text) else 0) for t, token in enumerate(text)
        ]
        assert sum(implied) - v[()] == pytest.approx(logps, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_iq_learn_finds_the_rewards_that_soft_q_values_were_made_of(seed: int) -> None:
    """Q(s, a) = r(s, a) + V(s'), made backwards from any rewards, is the policy with d^π(y) = exp(Σ r) / Z, and V(s_0) = log Z.

    Of it IQ-Learn's loss is λ Σ r_t² − Σ r_t + log Z for each text: the TD form gives back the rewards.
    """
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(13, 4, generator=generator, dtype=torch.float64)
    row = {prefix: at for at, prefix in enumerate(WORLD.prefixes)}
    table = rewards.clone()
    for prefix in reversed(WORLD.prefixes):  # long ones first
        for word in range(3):
            if (*prefix, word) in row:
                table[row[prefix], word] += table[row[(*prefix, word)]].logsumexp(0)
    earned = WORLD.along(rewards.flatten())
    log_z = earned.sum(1).logsumexp(0)

    torch.testing.assert_close(WORLD.logps(table), earned.sum(1) - log_z)
    torch.testing.assert_close(table[0].logsumexp(0), log_z)
    found = offline_iq(_view(WORLD, table), penalty=0.3, gamma=1.0)
    torch.testing.assert_close(found, 0.3 * earned.square().sum(1) - earned.sum(1) + log_z)


# Where the methods end: a family that contains the demonstrator.

MEANS = (
    Imitation("reverse KL, mean token", "mean token", reverse_kl_reward),
    Imitation("Jensen-Shannon, mean token", "mean token", centred_js_reward),
)
"""With a discriminator of means over each text's tokens: no divergence's gradient, as far as we know, and yet they end there."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("discriminator_steps", [0, 5], ids=["best discriminator", "trained discriminator"])
@pytest.mark.parametrize("method", [*METHODS.values(), *MEANS], ids=lambda method: method.name)
def test_every_divergence_converges_to_the_demonstrator(method: Imitation, discriminator_steps: int, seed: int) -> None:
    """From the uniform policy, which supports everything; KL < 1e-2 is the issue's bar."""
    demonstrations = a_demonstrator(WORLD, seed)
    tables = list(imitate(method, WORLD, demonstrations, WORLD.zeros(), discriminator_steps=discriminator_steps))
    first, last = (kl(demonstrations.log(), WORLD.logps(table)).item() for table in (tables[0], tables[-1]))

    assert first > 0.2
    assert last < 1e-2


@pytest.mark.parametrize("seed", SEEDS)
def test_softplus_of_tokens_alone_ends_with_longer_texts(seed: int) -> None:
    """What `test_softplus_of_tokens_pays_for_length` says of the gradient, at the end of training."""
    demonstrations = a_demonstrator(WORLD, seed)
    *_, table = imitate(Imitation("uncentred", "token", js_reward), WORLD, demonstrations, WORLD.zeros())
    own = WORLD.logps(table)

    assert kl(demonstrations.log(), own) > 0.05
    assert (own.exp() - demonstrations) @ WORLD.lengths.double() > 0.3


# A family that does not: every token drawn alike, and a demonstrator with two modes.


@cache
def _fit(name: str) -> Tensor:
    return fit_two_modes(METHODS[name])


@pytest.mark.parametrize("name", ["forward KL", "forward KL, occupancies"])
def test_forward_kl_covers_both_modes_and_what_is_between(name: str) -> None:
    """The tied family's optimum is the mean frequency of each token, at every position the same, so weights change nothing.

    a: 0.4 of aaa, and 0.2 of the other 25 texts, which hold 27 − 3 = 24 of their 75 places: 0.4 + 0.2 · 0.32 = 0.464. b alike,
    c 0.2 · 0.36 = 0.072. aaa and bbb get 0.464³ = 0.09990 each, 0.80021 is elsewhere; the demonstrator has 0.2 there.
    """
    fit = _fit(name)

    assert fit[TWO_MODES.texts.index((2, 2, 2))].exp().item() == pytest.approx(0.072**3, rel=1e-4)
    assert [fit[TWO_MODES.texts.index(mode)].exp().item() for mode in MODES] == pytest.approx([0.09990, 0.09990], abs=1e-5)
    assert off_modes(fit) == pytest.approx(0.80021, abs=1e-4)
    assert modes_held(fit) == 2


def test_reverse_kl_keeps_to_one_mode() -> None:
    """It gives up b, and puts less elsewhere than the demonstrator does; which mode it keeps is the start's choice."""
    fit = _fit("reverse KL")

    assert modes_held(fit) == 1
    assert off_modes(fit) < ELSEWHERE
    mirrored = fit_two_modes(METHODS["reverse KL"], tilt=-0.1)
    aaa, bbb = (TWO_MODES.texts.index(mode) for mode in MODES)
    assert (mirrored[bbb] - fit[aaa]).abs() < 1e-6
    assert mirrored[aaa] < math.log(1e-3)


def test_jensen_shannon_is_between() -> None:
    """Between the two in what it puts off the modes, and in both Kullback-Leibler divergences."""
    beta = two_modes().log()
    forward, between, reverse = (_fit(name) for name in ("forward KL", "Jensen-Shannon", "reverse KL"))

    assert off_modes(forward) > off_modes(between) + 0.1 > off_modes(reverse) + 0.2
    assert kl(beta, forward) < kl(beta, between) < kl(beta, reverse)
    assert kl(reverse, beta) < kl(between, beta) < kl(forward, beta)


@pytest.mark.parametrize("name", METHODS)
def test_each_fit_is_the_families_lowest_in_its_own_divergence(name: str) -> None:
    """Against 5151 policies of the family, (i, j, 100 − i − j)/100: none is lower, and the nearest of them is not much higher."""
    i, j = (index.flatten() for index in torch.meshgrid(torch.arange(101), torch.arange(101), indexing="ij"))
    shares = torch.stack((i, j, 100 - i - j), 1)[i + j <= 100].double().clamp(min=1e-6)
    counts = torch.tensor([[text.count(word) for word in range(3)] for text in TWO_MODES.texts], dtype=torch.float64)
    policies = (shares / shares.sum(1, keepdim=True)).log() @ counts.T
    best = min(divergence(name, policy) for policy in policies)
    found = divergence(name, _fit(name))

    assert len(policies) == 5151
    assert best - 2e-3 < found < best + 1e-6


# The page and its figures.


def _figures() -> ModuleType:
    """figures/divergences.py as a module."""
    spec = importlib.util.spec_from_file_location("divergence_figures", ROOT / "tests" / "figures" / "divergences.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_table_is_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "divergences.md").read_text(encoding="utf-8")

    assert two_modes_table({name: _fit(name) for name in METHODS}) in page


def test_the_figures_are_drawn_from_the_same_numbers_and_the_same_bytes_twice() -> None:
    """The committed files say in words what they show; bytes may differ with the version of matplotlib, words may not."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    figures = _figures()
    for draw in (lambda: figures.modes({name: _fit(name) for name in figures.SHOWN}), figures.convergence):
        plot = draw()
        kept = (ROOT / "docs" / "figures" / f"{plot.name}.svg").read_text(encoding="utf-8")
        said = re.compile(r'aria-label="([^"]*)"')
        assert said.findall(kept) == said.findall(plot.svg()) != []
        assert draw().svg() == plot.svg()
