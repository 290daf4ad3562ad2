"""The choice of the next token: hand-made logits, the nucleus, what is too close, and the distribution that comes out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped, unused-ignore]
from tiny_models import CONTEXT, make_model
from transformers import PreTrainedModel

from gsil_bench.generation.engine import Request, Sampling
from gsil_bench.generation.sampling import choose, nucleus
from gsil_bench.generation.transformers_engine import TransformersEngine

GREEDY = Sampling(1)


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([[math.log(p) if p else -math.inf for p in probabilities]])


def test_greedy_takes_the_mode_and_says_when_another_is_close() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 4.99999], [3.0, 3.0, 0.0], [1.0, 0.999, 0.0]])
    choice = choose(logits, [GREEDY] * 4, [0.0] * 4)
    assert choice.tokens.tolist()[:2] == [1, 0]
    assert choice.close.tolist() == [False, True, True, False]


def test_an_answer_is_drawn_by_inversion() -> None:
    """Cumulative: 0.2, 0.7, 1. Each uniform number falls into the token whose interval holds it."""
    uniforms = [0.0, 0.1, 0.19, 0.21, 0.69, 0.71, 0.999]
    choice = choose(logits_of(0.2, 0.5, 0.3).repeat(7, 1), [Sampling(1, 1.0)] * 7, uniforms)
    assert choice.tokens.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert choice.close.tolist() == [True, *[False] * 6]


def test_a_draw_at_the_edge_of_an_interval_is_close() -> None:
    uniforms = [0.2 - 1e-6, 0.2 + 1e-6, 0.2 + 1e-4, 0.7 - 1e-6, 1 - 1e-6]
    choice = choose(logits_of(0.2, 0.5, 0.3).repeat(5, 1), [Sampling(1, 1.0)] * 5, uniforms)
    assert choice.tokens.tolist() == [0, 1, 1, 1, 2]
    assert choice.close.tolist() == [True, True, False, True, True]


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = logits_of(0.0, 0.5, 0.0, 0.5, 0.0)
    choice = choose(logits.repeat(4, 1), [Sampling(1, 1.0)] * 4, [0.0, 0.4, 0.6, 1 - 2**-53])
    assert choice.tokens.tolist() == [1, 1, 3, 3]


def test_temperature_sharpens() -> None:
    """At 0.5 probabilities 0.2 and 0.8 become 0.04 and 0.64 of 0.68: 1/17 and 16/17. At 2 they become 1/3 and 2/3."""
    logits = logits_of(0.2, 0.8)
    for temperature, edge in ((0.5, 1 / 17), (2.0, 1 / 3), (1.0, 0.2)):
        choice = choose(logits.repeat(2, 1), [Sampling(1, temperature)] * 2, [edge - 1e-3, edge + 1e-3])
        assert choice.tokens.tolist() == [0, 1]


def test_each_row_has_its_own_settings() -> None:
    samplings = [GREEDY, Sampling(1, 1.0), Sampling(1, 1.0, top_p=0.4), Sampling(1, 0.01)]
    choice = choose(logits_of(0.2, 0.5, 0.3).repeat(4, 1), samplings, [0.9] * 4)
    assert choice.tokens.tolist() == [1, 2, 1, 1]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1, 1.0), Sampling(1, 1.0, 0.9)])
def test_logits_that_are_not_numbers_are_an_error(sampling: Sampling) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, math.nan]])
    with pytest.raises(ArithmeticError, match="not numbers"):
        choose(logits, [sampling] * 2, [0.5] * 2)


# ---- the nucleus ------------------------------------------------------------------------------------------------------

NUCLEI = {
    # 0.5 + 0.3 reach 0.7, so the third token is out.
    "two reach it": ([0.2, 0.5, 0.3], 0.7, [0.0, 0.5, 0.3], False),
    "one is enough": ([0.2, 0.5, 0.3], 0.4, [0.0, 0.5, 0.0], False),
    "all are needed": ([0.2, 0.5, 0.3], 0.9, [0.2, 0.5, 0.3], False),
    "less than the mode": ([0.2, 0.5, 0.3], 0.001, [0.0, 0.5, 0.0], False),
    "no cut": ([0.2, 0.5, 0.3], 1.0, [0.2, 0.5, 0.3], False),
    # The first alone reaches 0.5 exactly; by rounding it might not.
    "exactly reached": ([0.25, 0.5, 0.25], 0.5, [0.0, 0.5, 0.0], True),
    # Of equals the first is kept; by rounding it might be another.
    "a tie at the edge": ([0.3, 0.4, 0.3], 0.6, [0.3, 0.4, 0.0], True),
    "a tie within": ([0.4, 0.2, 0.4], 0.7, [0.4, 0.0, 0.4], False),
    "a tie of all without a cut": ([0.25, 0.25, 0.25, 0.25], 1.0, [0.25, 0.25, 0.25, 0.25], False),
}


@pytest.mark.parametrize("name", NUCLEI)
def test_nucleus_is_the_smallest_set_that_holds_top_p(name: str) -> None:
    probabilities, top_p, kept, close = NUCLEI[name]
    got, flags = nucleus(torch.tensor([probabilities], dtype=torch.float64), torch.tensor([top_p], dtype=torch.float64))
    assert got[0].tolist() == kept
    assert flags.tolist() == [close]


def test_nuclei_of_random_distributions() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        probabilities = random.dirichlet(np.full(random.integers(2, 12), 0.7))
        top_p = random.uniform(0.05, 1.0)
        got, _ = nucleus(torch.tensor(probabilities)[None], torch.tensor([top_p], dtype=torch.float64))
        assert got[0].numpy() == pytest.approx(nucleus_by_hand(probabilities, top_p), abs=0)


def nucleus_by_hand(probabilities: np.ndarray[tuple[int], np.dtype[np.float64]], top_p: float) -> list[float]:
    """Tokens from the most probable on, until their sum has reached top_p."""
    kept, total = [0.0] * len(probabilities), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if total >= top_p:
            break
        kept[token] = float(probabilities[token])
        total += kept[token]
    return kept


# ---- what comes out ---------------------------------------------------------------------------------------------------


def plain_probabilities(
    model: PreTrainedModel, ids: tuple[int, ...], sampling: Sampling
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    kept = np.array(nucleus_by_hand(weights / weights.sum(), sampling.top_p))
    return kept / kept.sum()


def chi_square(tokens: list[int], probabilities: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """p-value of drawn tokens; the rarest are counted together, so that at least 5 of each kind are expected."""
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), probabilities * len(tokens)
    assert not counts[probabilities == 0].any()
    observed, wanted = [0.0], [0.0]
    for token in probabilities.argsort():
        observed[-1] += counts[token]
        wanted[-1] += expected[token]
        if wanted[-1] >= 5:
            observed.append(0.0)
            wanted.append(0.0)
    observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]  # what was left over
    assert len(wanted) >= 5
    return float(stats.chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize("sampling", [Sampling(2, 1.0), Sampling(2, 0.7), Sampling(2, 1.3, 0.8), Sampling(2, 0.9, 0.5)])
def test_samples_follow_the_models_distribution(sampling: Sampling) -> None:
    """First tokens of 4,000 samples, and second ones after the most frequent first: right ones fail one time in 10^5."""
    model, prompt = make_model("llama", std=0.2), (17, 18, 19)
    engine = TransformersEngine(model, [], CONTEXT, lambda ids: "")
    drawn = [completion.tokens for _, completion in engine.complete([Request(prompt, sampling, n) for n in range(4000)])]
    first = plain_probabilities(model, prompt, sampling)
    assert chi_square([tokens[0] for tokens in drawn], first) > 1e-5
    mode = int(first.argmax())
    second = [tokens[1] for tokens in drawn if tokens[0] == mode]
    assert len(second) > 100
    assert chi_square(second, plain_probabilities(model, (*prompt, mode), sampling)) > 1e-5


def test_the_chi_square_finds_a_wrong_temperature() -> None:
    """That the test above can fail."""
    model, prompt, sampling = make_model("llama", std=0.2), (17, 18, 19), Sampling(1, 0.8)
    engine = TransformersEngine(model, [], CONTEXT, lambda ids: "")
    drawn = [completion.tokens[0] for _, completion in engine.complete([Request(prompt, sampling, n) for n in range(4000)])]
    assert chi_square(drawn, plain_probabilities(model, prompt, Sampling(1, 1.0))) < 1e-5


def test_numbers_belong_to_prompt_sample_and_seed() -> None:
    base = Request((1, 2, 3), Sampling(20, 1.0, seed=5), 2)
    numbers = base.uniforms()
    assert numbers.shape == (20,)
    assert ((numbers >= 0) & (numbers < 1)).all()
    longer = Request((1, 2, 3), Sampling(30, 0.7, 0.9, seed=5), 2).uniforms()
    assert (longer[:20] == numbers).all()  # what is drawn does not depend on how much is asked for
    for other in (
        Request((1, 2, 3), Sampling(20, 1.0, seed=6), 2),
        Request((1, 2, 3), Sampling(20, 1.0, seed=5), 3),
        Request((1, 2, 4), Sampling(20, 1.0, seed=5), 2),
        Request((1, 2), Sampling(20, 1.0, seed=5), 2),
    ):
        assert not (other.uniforms() == numbers).any()


def test_numbers_are_uniform_over_requests() -> None:
    """The first and the last of 2,000 requests' numbers, and their products' mean: 1/4 if they are independent."""
    numbers = np.array([Request((1,), Sampling(3, 1.0), sample).uniforms() for sample in range(2000)])
    for position in (0, 2):
        assert stats.kstest(numbers[:, position], "uniform").pvalue > 1e-5
    # The product of two independent uniform numbers has variance 1/9 - 1/16 = 7/144.
    assert abs((numbers[:, 0] * numbers[:, 2]).mean() - 0.25) < 5 * math.sqrt(7 / 144 / 2000)
    assert len(np.unique(numbers)) == numbers.size
