"""The page of methods: equal to the committed file, in the terminal too, with costs that follow from the records."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import support
from typer.testing import CliRunner

from baselines import METHODS
from gsil_bench.cli import app
from gsil_bench.methods import Critic, Method, Rollouts, SelfPlay, load_method, with_settings
from gsil_bench.reporting.methods_page import (
    Cost,
    as_markdown,
    as_text,
    cost_text,
    defaults_of,
    group_of,
    grouped,
    told_apart,
)
from gsil_bench.training.critics import discrimination
from gsil_bench.training.policy_gradient import clipped_policy_gradient

ROOT = Path(__file__).parent.parent
RECORDS = [load_method(name) for name in METHODS]
BARE_PREFERENCES = dataclasses.replace(load_method("dpo"), name="bare-preferences", needs=frozenset({"generated", "preferences"}))
"""A pairwise loss without a reference."""


def test_the_committed_page_is_what_is_generated() -> None:
    """gsil-bench methods --markdown > docs/methods.md"""
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == as_markdown(RECORDS)


def test_the_command_prints_the_page() -> None:
    shown = CliRunner().invoke(app, ["methods", "--markdown"])
    assert shown.exit_code == 0
    assert shown.stdout == as_markdown(RECORDS)
    plain = CliRunner().invoke(app, ["methods"])
    assert plain.stdout == as_text(RECORDS) + "\n"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_there_with_its_formula_paper_and_settings(name: str) -> None:
    method = load_method(name)
    flat = " ".join(as_text(RECORDS).split())
    page = as_markdown(RECORDS)
    entry = page.split(f"\n### {name}\n")[1].split("\n##")[0]
    for text in (method.summary, method.formula, method.paper, *(f"{key}={value:g}" for key, value in method.settings.items())):
        assert " ".join(text.split()) in flat
        assert text in entry
    assert page.count(f"| [`{name}`](#{name}) |") == 1


def test_groups_by_hand() -> None:
    """Of records in another order; single tokens of a demonstration are no further need."""
    records = [BARE_PREFERENCES, *map(load_method, ("dpo", "spin", "sft-continued")), support.FORGETS_NORMALISERS]
    records += map(load_method, ("sft", "start"))
    assert [(group, [method.name for method in members]) for group, members in grouped(records).items()] == [
        ("nothing", ["start"]),
        ("demonstrations", ["forgets-normalisers", "sft"]),
        ("demonstrations and self-generations", ["sft-continued"]),
        ("demonstrations and rejected answers (or self-generations where the data has none)", ["bare-preferences"]),
        ("demonstrations and self-generations, compared with a reference", ["spin"]),
        ("demonstrations and rejected answers (or self-generations where the data has none), compared with a reference", ["dpo"]),
    ]
    assert sum(map(len, grouped(RECORDS).values())) == len(METHODS)


def test_costs_by_hand() -> None:
    """Two epochs, a forward pass a third of a sequence's forward and backward.

    SFT: 1. SPIN: 2 sequences; 2 rounds × 2 reference passes, 4/3 over 2 epochs = 2/3; a sample a round. DPO with 3 samples and
    one opponent: 4 sequences; 1 + 3 reference passes, 4/3 over 2 epochs. Without its reference: none of these. The control: as
    many tokens as pairs have.
    """
    found = {name: Cost.of(load_method(name)) for name in ("start", "sft", "spin", "sft-continued")}
    assert found["start"] == Cost(0, 0, 0, 2.0)
    assert (found["sft"], found["sft"].run) == (Cost(1, 0, 0, 2.0), 1.0)
    assert (found["spin"], found["spin"].run) == (Cost(2, 4, 2, 2.0), pytest.approx(2 + 2 / 3))
    assert Cost.of(BARE_PREFERENCES) == found["sft-continued"] == Cost(2, 0, 1, 2.0)
    many = Cost.of(with_settings(load_method("dpo"), {"samples": 3}))
    assert (many, many.run) == (Cost(4, 4, 3, 2.0), pytest.approx(4 + 2 / 3))
    assert Cost.of(load_method("irft")) == Cost(2, 2, 1, 2.0)  # five rounds, each demonstration in one of them
    assert Cost.of(load_method("t-spin")) == Cost(3, 0, 2, 2.0)  # the newest sample and the first round's
    thrice = Cost.of(with_settings(load_method("dpo"), {"rounds": 3}))
    assert thrice.reference == 1 + 3  # the demonstrations' once, under the initial policy


def test_a_method_from_outside_has_its_place() -> None:
    one = dataclasses.replace(support.MARGIN, formula="f' − f", protocol=SelfPlay(rounds=1, samples=2))
    assert group_of(one) == "demonstrations and self-generations, compared with a reference"
    assert cost_text(one) == "a step 3x SFT's, a run 3.50x with 3 reference passes and 2 samples a demonstration"
    assert "    f' − f" in as_text([one])


def sampler(rollouts: Rollouts, **changes: object) -> Method:
    """Four samples of each prompt, two epochs, from the model as given."""
    changes = {"needs": frozenset({"tokens"}), **changes}
    protocol = SelfPlay(opponent="initial", samples=4, max_new_tokens=16)
    values: dict[str, object] = {"protocol": protocol, "rollouts": rollouts, "settings": {"clip": 0.2}}
    return Method("sampler", "Samples.", clipped_policy_gradient, **values | changes)  # type: ignore[arg-type]


def reward(samples: object) -> None:
    """Stands for a reward; nothing is trained here."""


ALONGSIDE = Critic(discrimination, alongside=True, updates=2)


def test_costs_of_samplers_by_hand() -> None:
    """4 samples a prompt, 2 epochs, a forward pass 1/3. Nothing but the reward: 4 sequences, policy and reference 4 passes each,
    so a run 4 + 8/3; 2 · 4 samples. With a discriminator of 2 updates: it reads 4 samples twice, the demonstration once, 9, and
    learns from 2 · 5 sequences: 4 + 10 + 17/3. Two steps on the same samples halve all but the policy's own: 4 + 5 + 17/6.
    """
    bare = Cost.of(sampler(Rollouts(reward)))
    assert (bare.sequences, bare.forward, bare.samples, bare.run) == (4, 8, 8, pytest.approx(4 + 8 / 3))
    beside = Cost.of(sampler(Rollouts(reward, needs=frozenset({"scores"}), critic=ALONGSIDE)))
    assert (beside.passes["discriminator"], beside.critic, beside.run) == (9, 10, pytest.approx(4 + 10 + 17 / 3))
    twice = Cost.of(sampler(Rollouts(reward, needs=frozenset({"scores"}), critic=ALONGSIDE, updates=2)))
    assert (twice.run, twice.samples) == (pytest.approx(4 + 5 + 17 / 6), 4)
    encoded = Cost.of(sampler(Rollouts(reward, needs=frozenset({"similarity", "initial"}))))
    assert encoded.passes == {"policy": 4, "reference": 4, "initial model": 4, "encoder": 5}


def test_costs_of_reward_models_by_hand() -> None:
    """Two epochs of the reward model. Demonstrations against 4 samples: 2 · 5 sequences over 2 epochs, and 4 more samples;
    a second round trains another one. Samples against samples come in pairs: 2 · 2, and 8 more samples. Failures: nine classes,
    one of the policy's own and the demonstration, 2 · 11. sft for half of the epochs: ½ (4 + 12/3) + ½ + 10/2.
    """

    def cost(positives: str, negatives: str, **changes: object) -> Cost:
        critic = Critic(discrimination, positives=positives, negatives=negatives)  # type: ignore[arg-type]
        return Cost.of(sampler(Rollouts(reward, needs=frozenset({"scores"}), critic=critic), **changes))

    once = cost("demonstrations", "policy")
    assert (once.reward_model, once.samples, once.run) == (10, 8 + 4, pytest.approx(4 + 12 / 3 + 10 / 2))
    two_rounds = SelfPlay(opponent="initial", samples=4, rounds=2)
    assert cost("demonstrations", "policy", protocol=two_rounds).reward_model == 20
    assert (cost("policy", "initial").reward_model, cost("policy", "initial").samples) == (4, 8 + 8)
    assert cost("demonstrations", "failures").reward_model == 22
    half = cost("demonstrations", "policy", starts_from="sft")
    assert (half.samples, half.run) == (4 + 4, pytest.approx((4 + 12 / 3) / 2 + 1 / 2 + 10 / 2))


def test_samplers_are_grouped_by_what_rewards_them_after_all_others() -> None:
    """In the order of what they need; a list of them that is turned round comes out the same."""
    critic = Critic(discrimination)
    kinds = {
        "": Rollouts(reward),
        " and log-probs of the model as given": Rollouts(reward, needs=frozenset({"initial"})),
        " and similarity to the demonstration": Rollouts(reward, needs=frozenset({"similarity"})),
        " and a reward model": Rollouts(reward, needs=frozenset({"scores"}), critic=critic),
        " and a discriminator": Rollouts(reward, needs=frozenset({"scores"}), critic=ALONGSIDE),
    }
    methods = [sampler(rollouts) for rollouts in kinds.values()]
    assert [group_of(method) for method in methods] == [f"demonstrations and own samples{more}" for more in kinds]
    found = list(grouped([*reversed(methods), *RECORDS]))
    assert found[0] == "nothing" and set(found[-5:]) == {group_of(method) for method in methods}
    assert [found[-5], *found[-2:]] == [group_of(methods[0]), group_of(methods[3]), group_of(methods[4])]


def test_defaults_of_a_sampler_are_those_that_something_reads() -> None:
    plain = defaults_of(sampler(Rollouts(reward, settings={"limit": 3.0}), starts_from="sft"))
    assert plain == (
        "clip=0.2, starts_from=sft, start_share=0.5, samples=4, max_new_tokens=16, opponent=initial, rounds=1, limit=3, "
        "baseline=leave-one-out, kl=0.05, discount=1, updates=1, kl_limit=200"
    )
    critic = Critic(discrimination, alongside=True, training={"learning_rate": 1e-5})
    beside = defaults_of(sampler(Rollouts(reward, needs=frozenset({"scores"}), critic=critic, baseline="value")))
    assert "gae_lambda=0.95" in beside and "score_clip=10" in beside
    assert beside.endswith("critic_learning_rate=1e-05, critic_updates=1")


def test_what_a_critic_tells_apart_is_said() -> None:
    assert told_apart(ALONGSIDE) == "demonstrations against the newest samples"
    assert told_apart(Critic(discrimination, positives="policy", negatives="initial")) == (
        "samples of the policy against samples of the model as given"
    )
    assert "    reward model: demonstrations against constructed failures" in as_text(
        [sampler(Rollouts(reward, needs=frozenset({"scores"}), critic=Critic(discrimination, negatives="failures")))]
    )


def test_the_text_of_a_sampler_is_that_of_its_rewards_module() -> None:
    """Not that of the loss, which many of them share."""
    shown = as_markdown([sampler(Rollouts(reward))]).split("## From the sources")[1]
    assert "test_methods_page.py: `sampler`" in shown and "equal to the committed file" in shown and "clipped" not in shown


def test_the_page_has_no_lines_of_the_machine() -> None:
    """The same bytes everywhere."""
    assert not re.search(r"/tmp|/home|/root|0x[0-9a-f]{6}", as_markdown(RECORDS))
