"""GSIL: imitation by estimating the density ratio of demonstrations to self-generations (arXiv 2410.10093).

A classifier with logit f = scale · (log π_θ − log π_ref) + shift is trained to tell demonstrations from samples of
π_ref. For a proper loss its optimum is f = log(p_data / π_ref), so at scale 1 and shift 0 the policy itself is p_data:
no reward, no pairs.

| method | loss of a demonstration | loss of a self-generation | optimum of f |
|---|---|---|---|
| gsil-logistic | −log σ(f) | −log σ(−f) | log r |
| gsil-brier | (σ(f) − 1)² | σ(f)² | log r |
| gsil-hinge | max(0, 1 − f) | max(0, 1 + f) | its sign only |
| gsil-kliep | −f | e^f | log r |
| gsil-lsif | −e^f | ½ e^2f | log r |
| gsil-exponential | e^−f | e^f | ½ log r |

How this differs from the paper and its code (https://github.com/tengxiao1/GSIL):

1. The paper's β is `scale`; the code calls it alpha and calls the shift beta. Their released run has scale 0.01 and
   shift 2: `--set gsil-logistic.scale=0.01 --set gsil-logistic.shift=2`. The defaults here are those for which the
   optimum is p_data.
2. Self-generations are samples at temperature 1 under the training's chat template. The code takes greedy answers
   under another template, for which the optimum above does not hold.
3. An answer that was cut at the token limit gets no end token. The code appends one to both sides, and the ratio
   learns that.
4. Exponentials go on along their tangent above an exponent of 20, LSIF's above a log-ratio of 10
   (docs/decisions/0002-guarded-exponentials.md). The code's overflow.
5. AdamW instead of RMSprop, and the learning rates below; theirs is 5e-7 for a model of 7 billion parameters.
6. `gsil-exponential` is the textbook's and not in the code. At scale 0.5 its optimum is p_data, at scale 1 halfway.
7. One round, as their scripts; `--set gsil-logistic.rounds=2` plays on from the policy of the round before.

    python -m gsil_bench.compare --methods sft,gsil-logistic
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gsil_bench.methods import Method, Need, PairLogProbs

LINEAR_ABOVE = 20.0
"""Exponents above which e^x goes on along its tangent. Why 20: docs/decisions/0002-guarded-exponentials.md."""


def exp_with_linear_tail(x: Tensor, linear_above: float = LINEAR_ABOVE) -> Tensor:
    """e^x, and its tangent above a threshold: convex and smooth, its gradient there neither infinite nor lost."""
    tail = torch.relu(x - linear_above)  # relu's gradient at 0 is 0, so the two parts do not add up at the threshold
    return torch.exp(x.clamp(max=linear_above)) * (1 + tail)


def logistic(pair: PairLogProbs, scale: float, shift: float) -> Tensor:
    """Binary cross-entropy of real against generated."""
    real, generated = _log_density_ratios(pair, scale, shift)  # (pairs,) each
    return -logsigmoid(real) - logsigmoid(-generated)  # −log σ(f) − log σ(−f'), "Bernoulli" in the authors' code


def brier(pair: PairLogProbs, scale: float, shift: float) -> Tensor:
    """Squared error of the classifier's probability: bounded, so a few extreme pairs cannot rule a step."""
    real, generated = _log_density_ratios(pair, scale, shift)  # (pairs,) each
    return torch.sigmoid(-real).square() + torch.sigmoid(generated).square()  # (σ(f) − 1)² + σ(f')²


def hinge(pair: PairLogProbs, scale: float, shift: float) -> Tensor:
    """Large margin. No proper loss: its optimum knows the sign of the log-ratio only, and is not p_data."""
    real, generated = _log_density_ratios(pair, scale, shift)  # (pairs,) each
    return torch.relu(1 - real) + torch.relu(1 + generated)  # max(0, 1 − f) + max(0, 1 + f')


def kliep(pair: PairLogProbs, scale: float, shift: float) -> Tensor:
    """Unnormalised KL divergence: maximum likelihood of the real side, held by the generated side's mean ratio."""
    real, generated = _log_density_ratios(pair, scale, shift)  # (pairs,) each
    return exp_with_linear_tail(generated) - real  # −f + e^f'


def lsif(pair: PairLogProbs, scale: float, shift: float) -> Tensor:
    """Least squares between the estimated ratio and the true one, up to a constant."""
    real, generated = _log_density_ratios(pair, scale, shift)  # (pairs,) each
    # One guarded ratio for both terms, linear from half the threshold on, where its square reaches e^LINEAR_ABOVE.
    # Guarding e^f and e^2f apart would take the tail's slope from one and not from the other, and leave the loss
    # without a minimum.
    half = LINEAR_ABOVE / 2
    real_ratio, generated_ratio = exp_with_linear_tail(real, half), exp_with_linear_tail(generated, half)
    return generated_ratio.square() / 2 - real_ratio  # −e^f + ½ e^2f'


def exponential(pair: PairLogProbs, scale: float, shift: float) -> Tensor:
    """Boosting's loss. Its optimum is half the log-ratio."""
    real, generated = _log_density_ratios(pair, scale, shift)  # (pairs,) each
    return exp_with_linear_tail(-real) + exp_with_linear_tail(generated)  # e^−f + e^f'


def _log_density_ratios(pair: PairLogProbs, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """f of the demonstrations and of the self-generations: the classifier's logit that a completion is real."""
    real, generated = pair.real_log_ratios, pair.generated_log_ratios  # (pairs,) each
    return scale * real + shift, scale * generated + shift  # f = scale · log-ratio + shift


_PAPER = "Xiao et al., EMNLP 2024, https://arxiv.org/abs/2410.10093"
_SETTINGS = {"scale": 1.0, "shift": 0.0}
_NEEDS: frozenset[Need] = frozenset({"generated", "reference"})

# Five and ten times below SFT's. All six fall as well by lowering the self-generations as by raising the
# demonstrations, and Adam's step has no smaller size for a smaller gradient, so the rate alone limits how far a round
# goes. The losses with exponentials weigh an example by its ratio: where few examples rule a step, its direction is
# noisier, hence the half. The paper's 5e-7 is for RMSprop on 7 billion parameters over 62,000 pairs; comparisons here
# have fewer steps.
_BOUNDED_WEIGHTS = {"learning_rate": 2e-6}
_UNBOUNDED_WEIGHTS = {"learning_rate": 1e-6}

LOGISTIC = Method(
    name="gsil-logistic",
    summary="Density-ratio imitation by binary cross-entropy (the authors' default).",
    loss=logistic,
    settings=_SETTINGS,
    needs=_NEEDS,
    training=_BOUNDED_WEIGHTS,
    paper=_PAPER,
    formula="−log σ(f) − log σ(−f'), f = scale · log-ratio + shift",
)

BRIER = Method(
    name="gsil-brier",
    summary="Density-ratio imitation by the Brier score.",
    loss=brier,
    settings=_SETTINGS,
    needs=_NEEDS,
    training=_BOUNDED_WEIGHTS,
    paper=_PAPER,
    formula="(σ(f) − 1)² + σ(f')², f = scale · log-ratio + shift",
)

HINGE = Method(
    name="gsil-hinge",
    summary="Density-ratio imitation by the hinge loss, whose optimum is not the data's distribution.",
    loss=hinge,
    settings=_SETTINGS,
    needs=_NEEDS,
    training=_BOUNDED_WEIGHTS,
    paper=_PAPER,
    formula="max(0, 1 − f) + max(0, 1 + f'), f = scale · log-ratio + shift",
)

KLIEP = Method(
    name="gsil-kliep",
    summary="Density-ratio imitation by unnormalised KL divergence (KLIEP, UKL).",
    loss=kliep,
    settings=_SETTINGS,
    needs=_NEEDS,
    training=_UNBOUNDED_WEIGHTS,
    paper=_PAPER,
    formula="−f + e^f', f = scale · log-ratio + shift",
)

LSIF = Method(
    name="gsil-lsif",
    summary="Density-ratio imitation by least squares on the ratio (LSIF).",
    loss=lsif,
    settings=_SETTINGS,
    needs=_NEEDS,
    training=_UNBOUNDED_WEIGHTS,
    paper=_PAPER,
    formula="−e^f + ½ e^2f', f = scale · log-ratio + shift",
)

EXPONENTIAL = Method(
    name="gsil-exponential",
    summary="Density-ratio imitation by the exponential loss, whose optimum is half the log-ratio.",
    loss=exponential,
    settings=_SETTINGS,
    needs=_NEEDS,
    training=_UNBOUNDED_WEIGHTS,
    paper="not in the GSIL paper's code; the textbook's exponential loss",
    formula="e^−f + e^f', f = scale · log-ratio + shift",
)
