"""A world of texts small enough to list: exact divergences, exact policy gradients, and imitation by them.

A text is a few words and an end; every text of the world is a row. A policy is a table of logits, a row for each prefix. What
training meets as samples is a sum over all texts here, in fp64, so that an identity holds to rounding or does not hold.

Used by test_tabular_divergences.py and by figures/divergences.py; what the identities are is in docs/divergences.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

Unit = Literal["text", "token", "mean token"]
Family = Callable[[Tensor], Tensor]
"""Parameters → table of logits."""


@dataclass(frozen=True)
class World:
    """All texts of one prompt."""

    words: int = 3
    length: int = 3
    """Tokens of the longest text; one that has this many is over, with or without an end."""
    ends: bool = True
    """False: there is no end token and all texts are equally long."""

    @property
    def actions(self) -> int:
        return self.words + self.ends

    @cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        """Where a token is chosen, short ones first; the words are 0, 1, …"""
        lengths = range(self.length)
        return [prefix for length in lengths for prefix in itertools.product(range(self.words), repeat=length)]

    @cached_property
    def texts(self) -> list[tuple[int, ...]]:
        """Short ones first; the end is the token `words`."""
        ended = [(*prefix, self.words) for prefix in self.prefixes if self.ends]
        return ended + list(itertools.product(range(self.words), repeat=self.length))

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each text, its end included, (texts,)."""
        return torch.tensor([len(text) for text in self.texts])

    @cached_property
    def chosen(self) -> Tensor:
        """Index in a flattened table of each text's tokens, (texts, length); 0 behind a text's last."""
        row = {prefix: at * self.actions for at, prefix in enumerate(self.prefixes)}
        pairs = [[row[text[:t]] + text[t] for t in range(len(text))] for text in self.texts]
        return torch.tensor([line + [0] * (self.length - len(line)) for line in pairs])

    @cached_property
    def exists(self) -> Tensor:
        """1 for a token of the text, 0 behind its last, (texts, length)."""
        return (torch.arange(self.length) < self.lengths[:, None]).double()

    def zeros(self) -> Tensor:
        """The uniform policy's logits, (prefixes, actions)."""
        return torch.zeros(len(self.prefixes), self.actions, dtype=torch.float64)

    def along(self, of_pairs: Tensor) -> Tensor:
        """A value of each (prefix, token), read along each text: (prefixes · actions,) → (texts, length), 0 behind its last."""
        return of_pairs[self.chosen] * self.exists

    def token_logps(self, table: Tensor) -> Tensor:
        """log π(token | prefix), (texts, length)."""
        return self.along(table.log_softmax(1).flatten())

    def logps(self, table: Tensor) -> Tensor:
        """log d^π(text), (texts,)."""
        return self.token_logps(table).sum(1)

    def occupancy(self, distribution: Tensor) -> Tensor:
        """ρ(prefix, token), the probability that a text begins so: (texts,) → (prefixes · actions,). Sums to the mean length."""
        visits = distribution[:, None] * self.exists
        empty = distribution.new_zeros(len(self.prefixes) * self.actions)
        return empty.index_add(0, self.chosen.flatten(), visits.flatten())

    def conditionals(self, distribution: Tensor) -> Tensor:
        """The table of the policy with this distribution over texts: ρ(s, a) / Σ_a ρ(s, a), as logits."""
        return self.occupancy(distribution).log().reshape(-1, self.actions).log_softmax(1)


def kl(p_logps: Tensor, q_logps: Tensor) -> Tensor:
    """Σ p log(p / q)."""
    return (p_logps.exp() * (p_logps - q_logps)).sum()


def js(p_logps: Tensor, q_logps: Tensor) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2: 0 to log 2."""
    middle = torch.logaddexp(p_logps, q_logps) - math.log(2)
    return (kl(p_logps, middle) + kl(q_logps, middle)) / 2


def mass_kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p / q) − p + q, KL for measures that need not have the same sum: never negative, 0 only where p = q."""
    return (p * (p / q).log() - p + q).sum()


def reverse_kl_reward(logits: Tensor) -> Tensor:
    return logits


def js_reward(logits: Tensor) -> Tensor:
    return softplus(logits)


def centred_js_reward(logits: Tensor) -> Tensor:
    """0 where the discriminator cannot tell."""
    return softplus(logits) - math.log(2)


def returns_to_go(rewards: Tensor) -> Tensor:
    """Σ_{k ≥ t} r_k, (texts, length)."""
    return rewards.flip(1).cumsum(1).flip(1)


def policy_objective(world: World, table: Tensor, returns: Tensor) -> Tensor:
    """A scalar whose gradient is E_π Σ_t returns_t ∇log π(token t).

    Args:
        returns: (texts, length), or (texts, 1) for one that all tokens of a text share; frozen here.
    """
    logps = world.token_logps(table)
    return (logps.sum(1).exp()[:, None].detach() * returns.detach() * logps).sum()


def likelihood_objective(world: World, table: Tensor, demonstrations: Tensor, weights: Tensor) -> Tensor:
    """E_β Σ_t w_t log π(token t): SFT where all weights are 1.

    Args:
        demonstrations: probabilities, (texts,)
        weights: (length,) or (texts, length)
    """
    return (demonstrations[:, None] * weights * world.token_logps(table)).sum()


def discrimination(logits: Tensor, demonstrated: Tensor, own: Tensor) -> Tensor:
    """−E_β log σ(l) − E_π log(1 − σ(l)), of texts' probabilities or of occupancies; to be minimised."""
    return (demonstrated * softplus(-logits) + own * softplus(logits)).sum()


@dataclass(frozen=True)
class Imitation:
    """What a policy step climbs."""

    name: str
    unit: Unit = "text"
    """What the discriminator looks at: texts; their tokens, each text with all it has; or those as a mean over each text."""
    reward: Callable[[Tensor], Tensor] | None = None
    """Of the discriminator's logit. None: weighted likelihood of the demonstrations, without a discriminator."""
    weighted: bool = False
    """Token t of a likelihood counts (length − t) / length."""

    def objective(self, world: World, table: Tensor, demonstrations: Tensor, logits: Tensor | None = None) -> Tensor:
        """A scalar to climb; the logits of the discriminator are the best ones unless given."""
        if self.reward is None:
            weights = 1 - torch.arange(world.length) / world.length if self.weighted else torch.ones(world.length)
            return likelihood_objective(world, table, demonstrations, weights.double())
        if logits is None:
            own = world.logps(table).detach().exp()
            logits = self._seen(world, demonstrations).log() - self._seen(world, own).log()
        rewards = self.reward(logits)
        return policy_objective(world, table, rewards[:, None] if self.unit == "text" else returns_to_go(world.along(rewards)))

    def _seen(self, world: World, distribution: Tensor) -> Tensor:
        if self.unit == "text":
            return distribution
        return world.occupancy(distribution if self.unit == "token" else distribution / world.lengths)

    def discrimination(self, world: World, logits: Tensor, demonstrations: Tensor, own: Tensor) -> Tensor:
        """The discriminator's loss."""
        return discrimination(logits, self._seen(world, demonstrations), self._seen(world, own))

    def first_logits(self, world: World) -> Tensor:
        """A discriminator that knows nothing."""
        return torch.zeros_like(self._seen(world, torch.ones(len(world.texts), dtype=torch.float64)))


METHODS: Mapping[str, Imitation] = {
    method.name: method
    for method in (
        Imitation("forward KL"),
        Imitation("forward KL, occupancies", weighted=True),
        Imitation("Jensen-Shannon", reward=js_reward),
        Imitation("Jensen-Shannon, occupancies", "token", centred_js_reward),
        Imitation("reverse KL", reward=reverse_kl_reward),
        Imitation("reverse KL, occupancies", "token", reverse_kl_reward),
    )
}


def imitate(
    method: Imitation,
    world: World,
    demonstrations: Tensor,
    parameters: Tensor,
    family: Family = lambda table: table,
    steps: int = 400,
    rate: float = 0.05,
    discriminator_steps: int = 0,
) -> Iterator[Tensor]:
    """The policy's table before each step and after the last.

    Args:
        demonstrations: the demonstrator's probabilities, (texts,).
        parameters: where the policy starts.
        family: the policies that can be reached.
        discriminator_steps: Of a trained discriminator before each policy step; 0: it is the best one at once.
    """
    parameters = parameters.clone().requires_grad_()
    learned = method.first_logits(world).requires_grad_()
    policy, critic = torch.optim.Adam([parameters], lr=rate), torch.optim.Adam([learned], lr=rate)
    for _ in range(steps):
        table = family(parameters)
        yield table.detach().clone()  # the optimiser moves the parameters in place
        own = world.logps(table).detach().exp()
        for _ in range(discriminator_steps if method.reward is not None else 0):
            _descend(critic, method.discrimination(world, learned, demonstrations, own))
        _descend(policy, -method.objective(world, table, demonstrations, learned.detach() if discriminator_steps else None))
    yield family(parameters).detach()


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def a_demonstrator(world: World, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Probabilities of a policy with random logits, (texts,)."""
    generator = torch.Generator().manual_seed(seed)
    table = scale * torch.randn(world.zeros().shape, generator=generator, dtype=torch.float64)
    return world.logps(table).exp()


# The restricted family: every token is drawn alike, whatever is before it.

TWO_MODES = World(words=3, length=3, ends=False)
MODES = ((0, 0, 0), (1, 1, 1))
ELSEWHERE = 0.2
"""What the demonstrator leaves for the 25 texts that are no mode, in equal parts."""


def two_modes() -> Tensor:
    """aaa and bbb with 0.4 each, each other text with 0.2 / 25 = 0.008."""
    texts = TWO_MODES.texts
    elsewhere = ELSEWHERE / (len(texts) - len(MODES))
    return torch.tensor([(1 - ELSEWHERE) / 2 if text in MODES else elsewhere for text in texts], dtype=torch.float64)


def alike(logits: Tensor) -> Tensor:
    """The same logits after every prefix: (actions,) → (prefixes, actions)."""
    return logits.expand(len(TWO_MODES.prefixes), -1)


TILT = 0.1
"""The logit of `a` at the start; without it both modes are equally near and no gradient leaves the line between them."""
HELD = 0.1
"""A mode is held by a policy that gives it this share of the demonstrator's probability."""


def fit_two_modes(method: Imitation, tilt: float = TILT) -> Tensor:
    """log-probs of the texts, (texts,), where the method ends in the restricted family."""
    start = torch.tensor([tilt, 0.0, 0.0], dtype=torch.float64)
    *_, table = imitate(method, TWO_MODES, two_modes(), start, alike, steps=600)
    return TWO_MODES.logps(table)


def off_modes(logps: Tensor) -> float:
    """Probability of the texts that are no mode."""
    return 1 - sum(logps[TWO_MODES.texts.index(mode)].exp().item() for mode in MODES)


def modes_held(logps: Tensor) -> int:
    least = HELD * (1 - ELSEWHERE) / len(MODES)
    return sum(logps[TWO_MODES.texts.index(mode)].exp().item() >= least for mode in MODES)


def divergence(name: str, logps: Tensor) -> float:
    """The divergence that the method of this name is after, of the demonstrator with two modes and a policy, in nats."""
    beta = two_modes().log()
    if name.endswith("occupancies"):
        beta, logps = ((TWO_MODES.occupancy(each.exp()) / TWO_MODES.length).log() for each in (beta, logps))
    if name.startswith("reverse"):
        return kl(logps, beta).item()
    return (kl(beta, logps) if name.startswith("forward") else js(beta, logps)).item()


def two_modes_table(fits: Mapping[str, Tensor]) -> str:
    """Markdown: a row for each fit; its divergences from the demonstrator, its mass off the modes and the modes that it holds."""
    head = ["fitted by", *METHODS, "off the modes", "modes held"]
    rows = [head, ["---", *["---:" for _ in head[1:]]]]
    for name, logps in {"(demonstrator)": two_modes().log(), **fits}.items():
        numbers = [*(divergence(column, logps) for column in METHODS), off_modes(logps)]
        rows.append([name, *(f"{abs(number):.3f}" for number in numbers), str(modes_held(logps))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
