"""The shortcut audit: AUCs worked out by hand, cross-fitting, what happens without any difference, and the odd inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from gsil_bench.records import canonical
from gsil_bench.training.shortcuts import FEWEST_PROMPTS, FeatureAuc, ShortcutAudit, audit_shortcuts, clustered_auc

END = 0
Tokens = tuple[int, ...]


def answers(*lengths: int, first: int = 5) -> list[Tokens]:
    """Finished completions of these lengths, that begin and end alike."""
    return [(first, *([7] * (length - 2)), END) if length > 1 else (END,) * length for length in lengths]


def audit(real: Sequence[Tokens], generated: Sequence[Tokens], **changes: int) -> ShortcutAudit:
    return audit_shortcuts(real, generated, ["stop"] * len(generated), **changes)


def scores(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)


def test_auc_with_ties_by_hand() -> None:
    """Demonstrations 1 2 3 against 1 1 2. Of nine comparisons: 0.5 0.5 0, 1 1 0.5, 1 1 1: 6.5 / 9.

    In 18ths, shares by demonstration are 6, 15, 18, by self-generation 15, 15, 9, the AUC 13. Deviations from it add up by prompt
    to −7 + 2, 2 + 2, 5 − 4, so the variance is (25 + 16 + 1) / 18² / (3 · 2).
    """
    auc, low, high = clustered_auc(scores(1, 2, 3), scores(1, 1, 2)[:, None])
    assert auc == pytest.approx(6.5 / 9)
    error = math.sqrt((25 + 16 + 1) / 324 / 6)
    half = 1.959964 * error / (auc * (1 - auc))
    centre = math.log(auc / (1 - auc))
    assert (low, high) == pytest.approx(tuple(1 / (1 + math.exp(-x)) for x in (centre - half, centre + half)))


def test_length_by_hand() -> None:
    """Five prompts 4 against 2 tokens, five 3 against 3: of 100 comparisons 25 + 25 + 25 · 1 are won and 25 tied: 0.875."""
    result = audit(answers(*[4] * 5, *[3] * 5), answers(*[2] * 5, *[3] * 5))
    assert result.length.auc == pytest.approx(0.875)
    assert result.length.direction == "self-generations are shorter, median 2.5 against 3.5 tokens"
    assert (result.median_real_tokens, result.median_generated_tokens) == (3.5, 2.5)
    assert result.identical == 5
    turned = audit(answers(*[2] * 5, *[3] * 5), answers(*[4] * 5, *[3] * 5))
    assert turned.length.auc == pytest.approx(0.875)
    assert (turned.length.low, turned.length.high) == pytest.approx((result.length.low, result.length.high))
    assert turned.length.direction.startswith("self-generations are longer")


def test_repeating_every_self_generation_changes_nothing() -> None:
    """Self-generations of a prompt are not independent: six equal ones say as much as one."""
    random = np.random.default_rng(3)
    real, generated = (answers(*random.integers(2, 9, 40).tolist(), first=1 + side) for side in (0, 1))
    generated = [(int(random.integers(1, 4)), *item[1:]) for item in generated]
    once, often = audit(real, generated), audit(real, [item for item in generated for _ in range(6)])
    for name in ("length", "finish_reason", "first_token", "last_token"):
        one, other = getattr(once, name), getattr(often, name)
        assert (other.auc, other.low, other.high) == pytest.approx((one.auc, one.low, one.high))
    assert (often.generations, often.identical) == (6 * once.generations, 6 * once.identical)


def test_two_self_generations_per_prompt_by_hand() -> None:
    """Demonstrations of 3 tokens; five prompts have self-generations of 2 and 4, as often above as below, five have two of 3."""
    real = answers(*[3] * 10)
    result = audit(real, answers(*[2, 4] * 5, *[3, 3] * 5))
    assert result.length.auc == 0.5
    assert result.identical == 10
    assert audit(real, answers(*[2, 3] * 10)).length.auc == pytest.approx(0.75)
    assert audit(real, answers(*[2, 3] * 10)).generations == 20


def test_tokens_that_occur_once_tell_nothing() -> None:
    """In sample each of them would be a perfect sign of its side."""
    real = [(n, END) for n in range(100, 200)]
    generated = [(n, END) for n in range(200, 300)]
    result = audit(real, generated)
    assert result.first_token.auc == pytest.approx(0.5)
    assert result.last_token.auc == pytest.approx(0.5)
    assert result.warnings() == []


def test_a_token_that_tells_the_sides_apart_by_hand() -> None:
    """Half of the demonstrations begin with a token that no self-generation has: 0.5 + 0.5 / 2, if every fold has the same half.

    Twenty prompts in folds of four: the share within a fold varies, its mean is the half.
    """
    real = [((8 if n % 2 else 5), 7, END) for n in range(20)]
    result = audit(real, answers(*[3] * 20))
    assert result.first_token.auc == pytest.approx(0.75)
    assert result.first_token.direction == "token 5 begins 50 % of demonstrations and 100 % of self-generations"
    assert result.last_token.auc == pytest.approx(0.5)


def test_many_self_generations_do_not_outvote_the_demonstrations() -> None:
    """Token 5 begins 30 of 100 demonstrations and 120 of 600 self-generations, the rest begins once: 0.5 + (0.3 − 0.2) / 2."""
    real = [(5 if n < 30 else 100 + n, END) for n in range(100)]
    generated = [(5 if n % 5 == 0 else 1000 + n, END) for n in range(600)]
    assert audit(real, generated).first_token.auc == pytest.approx(0.55)


def test_another_end_token_is_seen() -> None:
    real = answers(*[4] * 30)
    result = audit(real, [(*item[:-1], 99) for item in real])
    assert result.last_token.auc == pytest.approx(1.0)
    assert result.last_token.low == pytest.approx(0.05 ** (1 / 30))  # as no prompt says otherwise
    assert result.warnings()[0].startswith("last token alone tells demonstrations from self-generations (AUC 1.00, 95 % interval")


def test_a_side_that_was_cut_everywhere() -> None:
    real = answers(*[12] * 50)
    generated = [(5, *[7] * 11)] * 50
    result = audit_shortcuts(real, generated, ["length"] * 50)
    assert (result.finish_reason.auc, result.finish_reason.high) == (1.0, 1.0)
    assert result.truncated == 50
    assert result.length.auc == 0.5
    lines = result.warnings()
    assert [line.split(" alone")[0] for line in lines] == ["finish reason", "last token"]
    assert "100 % of self-generations were cut and have no end token" in lines[0]
    assert all("\n" not in line for line in lines)


def test_the_cut_share_decides_the_auc() -> None:
    """12 of 40 are cut, one of them by an error: 0.5 + 0.3 / 2."""
    real = answers(*[5] * 20)
    reasons = ["length"] * 11 + ["error"] + ["stop"] * 28
    result = audit_shortcuts(real, answers(*[5] * 40), reasons)
    assert result.finish_reason.auc == pytest.approx(0.65)
    assert (result.truncated, result.errors) == (11, 1)
    assert result.warnings() == []


def test_a_warning_is_a_sentence_with_its_numbers() -> None:
    random = np.random.default_rng(0)
    real = answers(*random.integers(40, 56, 200).tolist())
    generated = answers(*random.integers(4, 20, 198).tolist(), 60, 60)
    (line,) = audit(real, generated).warnings()
    assert line.startswith("length alone tells demonstrations from self-generations (AUC 0.99, 95 % interval 0.")
    assert "self-generations are shorter, median 1" in line and "against 4" in line


def test_a_large_auc_of_few_prompts_is_not_warned_about() -> None:
    """Where the interval holds 0.5, it can be chance."""
    assert FeatureAuc(0.81, 0.51, 0.96, "").warns
    assert not FeatureAuc(0.81, 0.49, 0.96, "").warns
    assert not FeatureAuc(0.8, 0.75, 0.85, "").warns
    assert not FeatureAuc(math.nan, math.nan, math.nan, "not known").warns


def drawn(random: np.random.Generator, count: int) -> list[Tokens]:
    lengths = 1 + random.geometric(0.1, count)
    return [tuple(random.zipf(1.3, length).clip(1, 12).tolist()) for length in lengths.tolist()]


@pytest.mark.parametrize("k", [1, 3])
def test_without_a_difference_the_interval_holds_one_half(k: int) -> None:
    """300 seeds: 95 % ± 2.5 for the length; cross-fitted intervals may be wider, not narrower. Mean AUC of tokens: one half."""
    inside, aucs = dict.fromkeys(("length", "first_token", "last_token"), 0), []
    for seed in range(300):
        random = np.random.default_rng([seed, k])
        result = audit(drawn(random, 60), drawn(random, 60 * k), seed=seed)
        for name in inside:
            feature = getattr(result, name)
            inside[name] += feature.low <= 0.5 <= feature.high
        aucs.append(result.first_token.auc)
        assert result.warnings() == []
    assert 0.925 <= inside["length"] / 300 <= 0.98
    assert min(inside["first_token"], inside["last_token"]) / 300 >= 0.925
    assert np.mean(aucs) == pytest.approx(0.5, abs=3 * np.std(aucs) / math.sqrt(300))


def test_with_a_difference_the_interval_holds_it() -> None:
    """Normal scores one apart have an AUC of Φ(1 / √2) = 0.7602; three correlated self-generations a prompt."""
    inside = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        prompt, noise = random.normal(size=80), random.normal(size=(80, 3))
        generated = 0.8 * prompt[:, None] + 0.6 * noise  # of variance 1
        _, low, high = clustered_auc(1 + random.normal(size=80), generated)
        inside += low <= 0.7602 <= high
    assert 0.92 <= inside / 300 <= 0.98


def test_empty_completions() -> None:
    """They have no first token, which is a first token of its own kind; and their length is 0."""
    result = audit_shortcuts(answers(*[3] * 20), [()] * 20, ["error"] * 20)
    assert result.first_token.auc == result.length.auc == result.finish_reason.auc == pytest.approx(1.0)
    assert result.first_token.direction == "nothing begins 0 % of demonstrations and 100 % of self-generations"
    assert result.errors == 20 and result.median_generated_tokens == 0


def test_identical_sides() -> None:
    real = answers(*range(2, 22))
    result = audit(real, real)
    assert result.identical == 20
    assert result.length.auc == 0.5 and result.length.low < 0.5 < result.length.high
    assert result.length.direction.startswith("self-generations are neither shorter nor longer")
    assert result.first_token.direction == "no token begins more of one side than of the other"


@pytest.mark.parametrize("prompts", [0, 1, FEWEST_PROMPTS - 1])
def test_too_few_prompts_are_said_to_be(prompts: int) -> None:
    result = audit(answers(*[5] * prompts), answers(*[2] * prompts))
    assert math.isnan(result.length.auc) and not result.length.known
    assert result.length.direction == f"not known: {prompts} prompts, at least 10 are needed"
    assert result.warnings() == []
    facts = result.as_facts()
    assert facts["length_auc"] == result.length.direction and "length_low" not in facts
    canonical(facts)  # no NaN


def test_no_self_generations() -> None:
    result = audit(answers(*[5] * 20), [])
    assert result.first_token.direction == "not known: there are no self-generations"
    canonical(result.as_facts())


def test_facts_are_flat_json() -> None:
    facts = audit(answers(*range(2, 32)), answers(*range(3, 33))).as_facts()
    assert '"first_token_auc":' in canonical(facts)
    assert facts["prompts"] == facts["generations"] == 30
    assert {type(value) for value in facts.values()} == {int, float, str}
    assert facts["length_low"] <= facts["length_auc"] <= facts["length_high"]  # type: ignore[operator]


def test_the_seed_decides_the_folds_and_nothing_else() -> None:
    random = np.random.default_rng(1)
    real, generated = drawn(random, 50), drawn(random, 50)
    assert audit(real, generated, seed=4) == audit(real, generated, seed=4)
    assert audit(real, generated, seed=4).first_token != audit(real, generated, seed=5).first_token
    assert audit(real, generated, seed=4).length == audit(real, generated, seed=5).length


@pytest.mark.parametrize(
    ("real", "generated", "reasons", "message"),
    [
        (20, 20, ["stop"] * 19, "20 self-generations, 19 finish reasons"),
        (20, 30, ["stop"] * 30, "not the same number for each of 20"),
        (0, 1, ["stop"], "not the same number for each of 0"),
        (20, 20, ["eos"] * 20, "unknown finish reasons: eos"),
    ],
)
def test_inputs_that_do_not_fit(real: int, generated: int, reasons: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit_shortcuts(answers(*[3] * real), answers(*[3] * generated), reasons)
