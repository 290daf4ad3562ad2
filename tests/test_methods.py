"""What must hold for every method of the registry, and how methods are found and changed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines import METHODS
from gsil_bench.errors import UserError
from gsil_bench.methods import OF_TOKENS, Method, PairLogProbs, SelfPlay, TokenLogProbs, load_method, with_settings
from gsil_bench.training.config import TrainConfig

TRAINED = [name for name in METHODS if load_method(name).loss is not None and load_method(name).rollouts is None]
"""What learns from pairs; tests/test_on_policy_methods.py has the others."""
TARGETED = ["ipo", "iq-learn"]
"""Squares with a finite target, which pull back beyond it: that is what they are for."""
RATIO_METHODS = [name for name in TRAINED if "reference" in load_method(name).needs]


def _pair(
    method: Method, real_log_ratios: list[float], generated_log_ratios: list[float], unread: float = float("nan")
) -> PairLogProbs:
    """Log-probs with these log-ratios, spread evenly over 40 and 60 tokens; what the method does not need is NaN, as in
    training.
    """
    count = len(real_log_ratios)
    reference_real, reference_generated = torch.linspace(-90, -30, count), torch.linspace(-20, -120, count)
    policy_generated = reference_generated + torch.tensor(generated_log_ratios)
    empty = torch.full((count,), unread)
    real = (reference_real + torch.tensor(real_log_ratios)).requires_grad_()
    generated = (policy_generated if "generated" in method.needs else empty.clone()).requires_grad_()
    views = (_tokens(method, real, 40), _tokens(method, generated, 60)) if method.needs & OF_TOKENS else None
    return PairLogProbs(
        policy_real_logps=real,
        policy_generated_logps=generated,
        reference_real_logps=reference_real if "reference" in method.needs else empty,
        reference_generated_logps=reference_generated if "reference" in method.needs else empty,
        real_tokens=torch.full((count,), 40.0),
        generated_tokens=torch.full((count,), 60.0),
        tokens=views,
        temperature=TrainConfig.of(method.training, where=method.name).likelihood_temperature,
        first_logps=generated if "first" in method.needs else None,  # as in the first round
    )


def _tokens(method: Method, sums: Tensor, length: int) -> TokenLogProbs:
    count = len(sums)
    logps = (sums / length).repeat_interleave(length)
    normalisers = torch.linspace(-2, 3, length).repeat(count) if "normalisers" in method.needs else logps.detach() * torch.nan
    pair, position = torch.arange(count).repeat_interleave(length), torch.arange(length).repeat(count)
    return TokenLogProbs(logps, normalisers, pair, position, torch.full_like(pair, length), count, length)


def _reordered(pair: PairLogProbs, order: list[int]) -> PairLogProbs:
    count = len(order)
    views = [
        dataclasses.replace(
            view, logps=view.logps.view(count, -1)[order].flatten(), normalisers=view.normalisers.view(count, -1)[order].flatten()
        )
        for view in pair.tokens or ()
    ]
    moved = {name: value[order] for name, value in pair.vectors.items()}
    return dataclasses.replace(pair, **moved, tokens=tuple(views) or None)


def _losses(method: Method, pair: PairLogProbs, **changes: float) -> Tensor:
    assert method.loss is not None
    return method.loss(pair, **{**method.settings, **changes})


def _gradients(losses: Tensor, pair: PairLogProbs) -> tuple[Tensor, Tensor]:
    """d(sum of losses)/d(policy's log-probs), zero where the loss does not read them."""
    vectors = (pair.policy_real_logps, pair.policy_generated_logps)
    real, generated = torch.autograd.grad(losses.sum(), vectors, allow_unused=True)
    return (
        torch.zeros_like(vectors[0]) if real is None else real,
        torch.zeros_like(vectors[1]) if generated is None else generated,
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_registry_and_the_record_agree_on_the_name(name: str) -> None:
    assert load_method(name).name == name


@pytest.mark.parametrize("name", METHODS)
def test_every_record_is_whole(name: str) -> None:
    """A sentence, a formula for what is trained, training settings that exist, and a description that is JSON."""
    method = load_method(name)

    assert method.summary.endswith(".") and "\n" not in method.summary
    assert bool(method.formula) == (method.loss is not None)
    assert TrainConfig.of(method.training, where=name).learning_rate > 0
    assert json.loads(json.dumps(method.describe()))["name"] == name
    assert method.trains == (method.loss is not None)


@pytest.mark.parametrize("name", TRAINED)
def test_a_loss_gives_one_value_per_example(name: str) -> None:
    method = load_method(name)
    pair = _pair(method, [0.3, -2.0, 5.0], [1.0, 0.0, -4.0])

    assert _losses(method, pair).shape == (3,)


@pytest.mark.parametrize("name", TRAINED)
@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)))
def test_the_order_of_examples_does_not_matter(name: str, order: list[int]) -> None:
    method = load_method(name)
    pair = _pair(method, [0.3, -2.0, 5.0, 0.0, 1.0], [1.0, 0.0, -4.0, 2.0, -0.5])

    assert torch.equal(_losses(method, _reordered(pair, order)), _losses(method, pair)[order])


@pytest.mark.parametrize("name", TRAINED)
def test_an_example_does_not_depend_on_its_neighbours(name: str) -> None:
    method = load_method(name)
    both = _losses(method, _pair(method, [0.3, 50.0], [1.0, 50.0]))
    other = _losses(method, _pair(method, [0.3, -50.0], [1.0, 0.0]))

    assert both[0] == other[0]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("size", [0.0, 50.0, 200.0])
def test_value_and_gradient_are_finite_at_any_log_ratio(name: str, size: float) -> None:
    """Vectors that the method does not need are NaN here, so this also says that it does not read them."""
    method = load_method(name)
    pair = _pair(method, [size, -size, size, -size], [size, size, -size, -size])

    losses = _losses(method, pair)

    assert bool(losses.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in _gradients(losses, pair))


@pytest.mark.parametrize("name", [name for name in RATIO_METHODS if {"beta", "scale"} & load_method(name).settings.keys()])
@pytest.mark.parametrize("size", [1e-3, 10.0, 100.0])
def test_squared_gradients_are_finite_at_any_scale(name: str, size: float) -> None:
    """Adam keeps squares in fp32 (largest 3.4e38): an infinite one would stop its parameter for good, without a word."""
    method = load_method(name)
    scale = "beta" if "beta" in method.settings else "scale"
    pair = _pair(method, [200.0, -200.0, 0.0], [200.0, -200.0, 0.0])

    losses = _losses(method, pair, **{scale: size})

    assert bool(losses.isfinite().all())
    assert all(bool(gradient.square().isfinite().all()) for gradient in _gradients(losses, pair))


@pytest.mark.parametrize("name", [name for name in METHODS if "shift" in load_method(name).settings])
@pytest.mark.parametrize("shift", [-100.0, -2.0, 2.0, 100.0])
def test_squared_gradients_are_finite_at_any_shift(name: str, shift: float) -> None:
    method = load_method(name)
    pair = _pair(method, [200.0, -200.0, 0.0], [200.0, -200.0, 0.0])

    losses = _losses(method, pair, shift=shift)

    assert bool(losses.isfinite().all())
    assert all(bool(gradient.square().isfinite().all()) for gradient in _gradients(losses, pair))


@pytest.mark.parametrize("name", TRAINED)
def test_the_first_step_raises_demonstrations_and_does_not_raise_self_generations(name: str) -> None:
    method = load_method(name)
    pair = _pair(method, [0.0, 0.0], [0.0, 0.0])

    real, generated = _gradients(_losses(method, pair), pair)

    assert bool((real < 0).all())
    assert bool((generated >= 0).all())


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from([name for name in TRAINED if name not in TARGETED]),
    real=st.floats(-300, 300, width=32),
    generated=st.floats(-300, 300, width=32),
)
def test_a_loss_never_pulls_the_wrong_way(name: str, real: float, generated: float) -> None:
    """At any log-ratios a higher demonstration never costs and a higher self-generation never pays.

    Where a hinge or a saturated sigmoid is flat the gradient may be 0, never of the other sign.
    """
    method = load_method(name)
    pair = _pair(method, [real], [generated])

    up, down = _gradients(_losses(method, pair), pair)

    assert up.item() <= 0
    assert down.item() >= 0


# How methods are found.


def test_a_method_is_found_by_module_and_attribute() -> None:
    assert load_method("baselines.gsil:LOGISTIC") is load_method("gsil-logistic")


def test_another_registry_can_be_given() -> None:
    assert load_method("mine", {"mine": "baselines.pairwise:SPIN"}).name == "spin"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsil-logistics", "did you mean 'gsil-logistic'"),
        ("zzz", f"Known: {', '.join(sorted(METHODS))}"),
        ("no_such_module:METHOD", "no_such_module"),
        ("baselines.gsil:NOTHING", "NOTHING"),
        ("baselines.gsil:logistic", "is a function, not a gsil_bench.methods.Method"),
    ],
)
def test_a_name_that_is_none_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_method(name)

    assert "\n" not in str(caught.value)


# How methods are changed.


def test_settings_reach_the_loss_the_protocol_and_the_training() -> None:
    changed = with_settings(load_method("spin"), {"beta": "0.5", "rounds": "3", "learning_rate": "3e-6"})

    assert changed.settings == {"beta": 0.5}
    assert changed.protocol.rounds == 3
    assert changed.training["learning_rate"] == 3e-6
    assert load_method("spin").settings == {"beta": 0.1}


def test_the_changed_setting_is_what_the_loss_gets() -> None:
    """Margin 2 at beta (log 3)/2: the logit is log 3, the loss log(4/3) = 0.28768."""
    method = with_settings(load_method("dpo"), {"beta": math.log(3) / 2})

    assert _losses(method, _pair(method, [1.0], [-1.0])).tolist() == pytest.approx([0.28768207], rel=1e-5)


def test_values_take_the_type_of_the_default() -> None:
    changed = with_settings(load_method("gsil-logistic"), {"scale": 2, "rounds": "2", "schedule": "cosine"})

    assert (changed.settings["scale"], type(changed.settings["scale"])) == (2.0, float)
    assert (changed.protocol.rounds, type(changed.protocol.rounds)) == (2, int)
    assert changed.training["schedule"] == "cosine"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scal", 1.0, "did you mean 'scale'"),
        ("scale", "high", r"gsil-logistic\.scale=high: expected a number"),
        ("scale", True, "expected a number"),
        ("rounds", "1.5", "expected a whole number"),
        ("rounds", "0", "must be at least 1"),
        ("opponent", "nobody", "initial or previous"),
        ("mix_rounds", 0, "at least 1"),
        ("temperature", -1, "0 .greedy. or more"),
        ("max_new_tokens", 0, "at least 1"),
        ("learning_rate", -1, "out of range"),
        ("likelihood_temperature", 0, "out of range"),
        ("likelihood_temperature", 0.5, "the reference's log-probs are at temperature 1"),
        ("embedding_noise", -1, "out of range"),
        ("schedule", "sawtooth", "Known: constant, cosine, linear"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(key: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        with_settings(load_method("gsil-logistic"), {key: value})

    assert "\n" not in str(caught.value)


# What a record says about itself.


def test_the_start_is_the_only_method_that_does_not_train() -> None:
    assert [name for name in METHODS if not load_method(name).trains] == ["start"]
    assert load_method("start").protocol == SelfPlay(rounds=0)


def test_the_source_digest_is_that_of_the_module_of_the_loss() -> None:
    digests = {name: load_method(name).source_sha256 for name in METHODS}

    assert digests["spin"] == digests["dpo"]
    assert digests["gsil-lsif"] == digests["gsil-kliep"]
    assert len({digests["start"], digests["sft"], digests["spin"], digests["gsil-lsif"]}) == 4
