"""The shortcut audit: can something trivial tell demonstrations from self-generations, before a pairwise loss is trained on them?

A pairwise loss pays for any difference between the two sides. If length, the missing end token of a cut answer or the first token
alone tells them apart, the loss can fall without an answer getting better. Each feature is judged alone by its AUC: the
probability that a random demonstration scores higher than a random self-generation, ties counting one half; 0.5 tells nothing.

What a token says about the side it comes from has to be learned from data, so its score comes from other prompts than those it is
judged on (cross-fitting). Judged on the same ones, tokens that occur once would make any two samples look separable.

Intervals: DeLong's (DeLong, DeLong, Clarke-Pearson 1988) with prompts as clusters (Obuchowski 1997), on the logit scale, 95 %;
those of cross-fitted AUCs are wider (FITTED). A prompt's demonstration and its self-generations are not independent; Hanley and
McNeil's formula would take them for that. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WARNING_AUC = 0.8
"""A feature that alone reaches more than this is warned about."""
FOLDS = 5
FEWEST_PROMPTS = 2 * FOLDS
"""Two prompts a fold, so that each has a variance of its own: with fewer, every AUC is NaN."""
FITTED = 1 + FOLDS / (FOLDS - 1)
"""By how much the variance of a cross-fitted AUC grows because its folds' scores share prompts (Nadeau and Bengio 2003: folds'
variance times 1/K + test/training size). Without it, the interval misses 0.5 for 15 % of samples without any difference."""
LEVEL = 0.95
QUANTILE = 1.959963984540054
"""Of the normal distribution, for LEVEL."""
NOTHING = -1
"""Stands for the first or last token of a completion that has none."""
FEATURES = ("length", "finish_reason", "first_token", "last_token")

Tokens = tuple[int, ...]
Array = NDArray[np.float64]
Codes = NDArray[np.int64]


@dataclass(frozen=True)
class FeatureAuc:
    """How well one feature alone tells demonstrations from self-generations."""

    auc: float
    """NaN when it is not known. Of the length never below 0.5; of a token it can be, by chance."""
    low: float
    high: float
    direction: str
    """How the two sides differ, in words; when the AUC is not known, why."""

    @property
    def known(self) -> bool:
        """Whether there was enough data."""
        return not math.isnan(self.auc)

    @property
    def warns(self) -> bool:
        """Above the threshold, and not by chance alone."""
        return self.auc > WARNING_AUC and self.low > 0.5


@dataclass(frozen=True)
class ShortcutAudit:
    """What trivial features say about which side a completion comes from."""

    prompts: int
    generations: int
    identical: int
    """Self-generations that equal their demonstration: pairs that teach nothing."""
    truncated: int
    errors: int
    median_real_tokens: float
    """NaN without demonstrations, as the next without self-generations."""
    median_generated_tokens: float
    length: FeatureAuc
    finish_reason: FeatureAuc
    first_token: FeatureAuc
    last_token: FeatureAuc
    """The end token of a finished answer: also sees another end token than the demonstrations'."""

    def warnings(self) -> list[str]:
        """One line for each feature above the threshold; empty when there is nothing to warn of."""
        lines = []
        for name in FEATURES:
            feature: FeatureAuc = getattr(self, name)
            if feature.warns:
                auc = f"AUC {feature.auc:.2f}, 95 % interval {feature.low:.2f} to {feature.high:.2f}"
                lines.append(
                    f"{name.replace('_', ' ')} alone tells demonstrations from self-generations ({auc}): {feature.direction}; "
                    "a loss that sets them against each other, or a critic of them, can do well by this alone"
                )
        return lines

    def as_facts(self) -> dict[str, float | str]:
        """Flat JSON: no NaN; an AUC that is not known is the reason, in words."""
        facts: dict[str, float | str] = {
            "prompts": self.prompts,
            "generations": self.generations,
            "identical": self.identical,
            "truncated": self.truncated,
            "errors": self.errors,
        }
        medians = {"median_real_tokens": self.median_real_tokens, "median_generated_tokens": self.median_generated_tokens}
        facts |= {name: value for name, value in medians.items() if not math.isnan(value)}
        for name in FEATURES:
            feature: FeatureAuc = getattr(self, name)
            if feature.known:
                facts |= {f"{name}_auc": feature.auc, f"{name}_low": feature.low, f"{name}_high": feature.high}
                facts[f"{name}_direction"] = feature.direction
            else:
                facts[f"{name}_auc"] = feature.direction
        return facts


def audit_shortcuts(
    real: Sequence[Tokens], generated: Sequence[Tokens], finish_reasons: Sequence[str], seed: int = 0
) -> ShortcutAudit:
    """Judge every trivial feature alone.

    Args:
        real: completions of the demonstrations, a prompt each, every prompt once; they end in their end token.
        generated: k self-generations for each prompt: all of the first prompt's, then the second's. Empty ones and those that
            ended in an error count like the others, since they are trained on like the others.
        finish_reasons: of `generated`: "stop", "length" or "error".
        seed: of the assignment of prompts to folds.

    Raises:
        ValueError: the numbers do not fit together, or a finish reason is none of the three.
    """
    _check(real, generated, finish_reasons)
    lengths = [np.array([len(item) for item in side], dtype=np.float64) for side in (real, generated)]
    medians = [float(np.median(side)) if len(side) else math.nan for side in lengths]
    k = len(generated) // max(1, len(real))
    unknown = _why_unknown(len(real), k)
    features = dict.fromkeys(FEATURES, FeatureAuc(math.nan, math.nan, math.nan, unknown))
    if not unknown:
        folds = _folds(len(real), seed)
        features = {
            "length": _length(lengths[0], lengths[1].reshape(-1, k), medians),
            "finish_reason": _finish_reason(len(real), finish_reasons),
            "first_token": _token(real, generated, lambda item: item[0], "begins", folds),
            "last_token": _token(real, generated, lambda item: item[-1], "ends", folds),
        }
    return ShortcutAudit(
        len(real),
        len(generated),
        sum(tuple(item) == tuple(real[index // k]) for index, item in enumerate(generated)),
        sum(reason == "length" for reason in finish_reasons),
        sum(reason == "error" for reason in finish_reasons),
        medians[0],
        medians[1],
        *(features[name] for name in FEATURES),
    )


def _check(real: Sequence[Tokens], generated: Sequence[Tokens], finish_reasons: Sequence[str]) -> None:
    """Raises ValueError."""
    if len(generated) != len(finish_reasons):
        raise ValueError(f"{len(generated)} self-generations, {len(finish_reasons)} finish reasons")
    if len(generated) % max(1, len(real)) or (generated and not real):
        raise ValueError(f"{len(generated)} self-generations are not the same number for each of {len(real)} demonstrations")
    strange = set(finish_reasons) - {"stop", "length", "error"}
    if strange:
        raise ValueError(f"unknown finish reasons: {', '.join(sorted(strange))}")


def _why_unknown(prompts: int, k: int) -> str:
    """Why nothing can be said; empty when something can."""
    if prompts < FEWEST_PROMPTS:
        return f"not known: {prompts} prompts, at least {FEWEST_PROMPTS} are needed"
    return "" if k else "not known: there are no self-generations"


def _length(real: Array, generated: Array, medians: Sequence[float]) -> FeatureAuc:
    """AUC of the number of tokens, in the direction in which it tells more.

    Args:
        real: (prompts,)
        generated: (prompts, k)
    """
    auc, low, high = clustered_auc(real, generated)
    if auc < 0.5:
        auc, low, high = 1 - auc, 1 - high, 1 - low
        words = "longer"
    else:
        words = "shorter" if auc > 0.5 else "neither shorter nor longer"
    return FeatureAuc(auc, low, high, f"self-generations are {words}, median {medians[1]:g} against {medians[0]:g} tokens")


def _finish_reason(prompts: int, finish_reasons: Sequence[str]) -> FeatureAuc:
    """AUC of having ended: 0.5 + cut share / 2. Demonstrations always have, so there is no direction to learn from data."""
    finished = np.array([reason == "stop" for reason in finish_reasons], dtype=np.float64)
    auc, low, high = clustered_auc(np.ones(prompts), finished.reshape(prompts, -1))
    cut = 100 * (1 - float(finished.mean()))
    return FeatureAuc(auc, low, high, f"{cut:.0f} % of self-generations were cut and have no end token, no demonstration was")


def _token(
    real: Sequence[Tokens], generated: Sequence[Tokens], pick: Callable[[Tokens], int], verb: str, folds: Sequence[Codes]
) -> FeatureAuc:
    """AUC of the token at one place, scored by how often it stands there on either side in other prompts."""
    tokens = [pick(item) if item else NOTHING for side in (real, generated) for item in side]
    names, codes = np.unique(np.array(tokens, dtype=np.int64), return_inverse=True)
    real_codes, generated_codes = codes[: len(real)], codes[len(real) :].reshape(len(real), -1)
    auc, low, high = clustered_auc(*_cross_fitted(real_codes, generated_codes, folds), folds)
    shares = [np.bincount(side.ravel(), minlength=len(names)) / side.size for side in (real_codes, generated_codes)]
    most = int(np.argmax(np.abs(shares[0] - shares[1])))
    name = "nothing" if names[most] == NOTHING else f"token {names[most]}"
    words = f"{name} {verb} {100 * shares[0][most]:.0f} % of demonstrations and {100 * shares[1][most]:.0f} % of self-generations"
    if shares[0][most] == shares[1][most]:
        words = f"no token {verb} more of one side than of the other"
    return FeatureAuc(auc, low, high, words)


def _folds(prompts: int, seed: int) -> list[Codes]:
    """Prompts dealt into folds; both sides of a prompt are in the same one."""
    return np.array_split(np.random.default_rng(seed).permutation(prompts), FOLDS)


def _cross_fitted(real: Codes, generated: Codes, folds: Sequence[Codes]) -> tuple[Array, Array]:
    """Scores log((real + 1) / (generated + 1)), with the token's counts in the other folds' prompts; shapes as the codes'.

    With k self-generations per prompt their counts are divided by k, so that a token nobody has seen is one that tells nothing.

    Args:
        real: (prompts,), tokens numbered from 0.
        generated: (prompts, k)
    """
    kinds, k = 1 + int(max(real.max(), generated.max())), generated.shape[1]
    real_score, generated_score = np.empty(real.shape), np.empty(generated.shape)
    for fold in folds:
        others = np.ones(len(real), dtype=bool)
        others[fold] = False
        reals = np.bincount(real[others], minlength=kinds)
        generations = np.bincount(generated[others].ravel(), minlength=kinds) / k
        score = np.log((reals + 1) / (generations + 1))
        real_score[fold], generated_score[fold] = score[real[fold]], score[generated[fold]]
    return real_score, generated_score


def clustered_auc(real: Array, generated: Array, folds: Sequence[Codes] = ()) -> tuple[float, float, float]:
    """AUC with the low and high end of its 95 % interval: the mean of the folds', weighted by their prompts.

    Scores are compared within a fold only: those of two folds were fitted on each other's prompts, which pushes their comparison
    below 0.5.

    Args:
        real: scores, (prompts,).
        generated: scores, (prompts, k).
        folds: indices of prompts, at least two each; none: scores were not fitted, and all are compared.
    """
    auc = variance = 0.0
    for fold in folds or [np.arange(len(real))]:
        weight, n = len(fold) / len(real), len(fold)
        above, below = _placements(real[fold], generated[fold])
        mean = float(above.mean())
        influence = (above - mean) + (below - mean)  # of a prompt, through its demonstration and through its self-generations
        auc += weight * mean
        variance += weight**2 * float(influence @ influence) / (n * (n - 1))
    auc = round(auc, 12)  # a mean of shares: one half is to be one half
    return (auc, *_interval(auc, math.sqrt(variance * (FITTED if folds else 1.0)), len(real)))


def _placements(real: Array, generated: Array) -> tuple[Array, Array]:
    """By prompt: the share of all self-generations that its demonstration is above, and the share of all demonstrations that are
    above its self-generations (mean over them); ties count one half. Both (prompts,), both with the AUC as their mean.
    """
    flat, ranked = np.sort(generated, axis=None), np.sort(real)
    above = (np.searchsorted(flat, real, "left") + np.searchsorted(flat, real, "right")) / (2 * flat.size)
    under = (np.searchsorted(ranked, generated, "left") + np.searchsorted(ranked, generated, "right")) / (2 * ranked.size)
    return above, 1 - under.mean(axis=1)


def _interval(auc: float, error: float, prompts: int) -> tuple[float, float]:
    """95 % interval of an AUC from its standard error, on the logit scale, which cannot leave [0, 1].

    Where all prompts say the same there is no standard error, and the interval is what prompts nobody has seen could change: a
    share of them that `prompts` draws miss with probability 1 − level is 1 − (1 − level)^(1/prompts).
    """
    if error < 1e-12 or not 0 < auc < 1:  # rounding leaves 1e-17 where the error is none
        unseen = 1 - (1 - LEVEL) ** (1 / prompts)
        return max(0.0, auc - unseen), min(1.0, auc + unseen)
    centre, half = math.log(auc / (1 - auc)), QUANTILE * error / (auc * (1 - auc))
    return _logistic(centre - half), _logistic(centre + half)


def _logistic(x: float) -> float:
    """Its exponent never overflows."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))
