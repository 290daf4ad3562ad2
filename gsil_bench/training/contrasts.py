"""What a reward model is trained on: answers to one prompt, some that are to score high and some that are to score low.

Each answer that is to score low has a class: samples of which policy, or a way to fail. A tenth of the prompts is kept back, and
the AUC of the positives against each class is measured there.

Failures come in two kinds. Those of the text (cut short, repeated, copied, …) are texts that end as answers do, with the end
token. Those of the end are token ids: after run-on text, and after the answer itself in `missing-end`, no end token follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gsil_bench.data.degradations import Failure, failed_rules, failures
from gsil_bench.records import Demonstration, Encoded, digest
from gsil_bench.training.batches import Branch, Tree
from gsil_bench.training.critics import FORWARD_TOKENS, class_aucs, token_scores

if TYPE_CHECKING:
    from gsil_bench.data.chat import ChatFormat
    from gsil_bench.models.policy import Policy

KEPT = 10
"""One prompt of so many is kept back."""
UNCLEAR = 0.6
"""Below this AUC a class is as good as not told apart."""
OWN = "own"
"""The class of the policy's own samples that fail a rule."""
OTHERS = 8
"""Answers to other prompts that an off-topic one is drawn from."""


@dataclass(frozen=True)
class Contrast:
    """A tree whose real side is the positive, and the classes of its generated sides."""

    tree: Tree
    classes: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """Classes of which this prompt has no answer, although one was asked for."""


def against_samples(ids: Sequence[str], positives: Sequence[Encoded], negatives: Sequence[Encoded], name: str) -> list[Contrast]:
    """Positives against samples.

    Args:
        ids: of the demonstrations.
        positives: one for each demonstration, or as many as there are negatives, which lie one after the other.
        negatives: samples, those of the first demonstration first.
        name: of the negatives' class.
    """
    k = len(negatives) // len(ids)
    own = len(positives) // len(ids)
    contrasts = []
    for number, identity in enumerate(ids):
        low = [Branch(sequence.completion_ids) for sequence in negatives[number * k : (number + 1) * k]]
        for sample, high in enumerate(positives[number * own : (number + 1) * own]):
            chosen = tuple(low) if own == 1 else (low[sample],)
            tree = Tree(identity, high.prompt_ids, Branch(high.completion_ids), chosen)
            contrasts.append(Contrast(tree, (name,) * len(chosen)))
    return contrasts


def against_failures(
    demonstrations: Sequence[Demonstration],
    encoded: Sequence[Encoded],
    samples: Sequence[Encoded],
    chat: ChatFormat,
    seed: int,
    limit: int,
    context_length: int,
) -> list[Contrast]:
    """Demonstrations against one answer of every class: those that fail in a known way, and a sample that fails a rule ("own").

    A class that a demonstration has no answer of is named in `missing`; the others of its prompt then weigh more.

    Args:
        demonstrations: whose answers score high.
        encoded: the same in tokens.
        samples: of the policy, as many for each demonstration, those of the first one first. One that passes all rules is no
            negative.
        chat: how answers become tokens.
        seed: of the draws, with the demonstration.
        limit: tokens at which the policy is cut, so no failure is longer: what is cut there loses its end token.
        context_length: tokens of prompt and answer together, which no failure exceeds either.
    """
    k, contrasts = len(samples) // len(demonstrations), []
    for number, (item, good) in enumerate(zip(demonstrations, encoded, strict=True)):
        made = failures(item.answer, _asked(item), _others(demonstrations, number, seed), seed)
        room = min(limit, context_length - len(good.prompt_ids))
        own = _failing(samples[number * k : (number + 1) * k], good, item, chat)
        low = {**_tokens_of(made, item, chat, room), **({OWN: own} if own is not None else {})}
        tree = Tree(item.id, good.prompt_ids, Branch(good.completion_ids), tuple(Branch(ids) for ids in low.values()))
        contrasts.append(Contrast(tree, tuple(low), tuple(name for name in (*made, OWN) if name not in low)))
    return contrasts


def _tokens_of(
    made: Mapping[str, Failure | None], item: Demonstration, chat: ChatFormat, limit: int
) -> dict[str, tuple[int, ...]]:
    """The failures that there are in tokens, with an end token where they ended before the limit."""
    there = {name: failure for name, failure in made.items() if failure is not None}
    written = chat.encode_many([(item.messages, failure.text) for failure in there.values()])
    found = {}
    for (name, failure), encoded in zip(there.items(), written, strict=True):
        body = encoded.completion_ids[:-1] if failure.text else ()  # nothing is not even a template's space before answers
        found[name] = (*body, *([chat.end_token_id] if failure.ended else []))[:limit]
    return found


def _failing(samples: Sequence[Encoded], good: Encoded, item: Demonstration, chat: ChatFormat) -> tuple[int, ...] | None:
    """The first sample that fails a rule and is not the demonstration itself, which may fail one too."""
    for ids in (sample.completion_ids for sample in samples):
        ended = bool(ids) and ids[-1] in chat.end_token_ids
        if ids != good.completion_ids and failed_rules(chat.decode(ids), ended, _asked(item)):
            return ids
    return None


def _asked(item: Demonstration) -> str:
    """The last user message: what an answer is about, and could copy."""
    return next((message["content"] for message in reversed(item.messages) if message["role"] == "user"), "")


def _others(demonstrations: Sequence[Demonstration], number: int, seed: int) -> list[str]:
    """Some answers to other prompts; few, since looking through all of them for each would take their number squared."""
    item = demonstrations[number]
    drawn = np.random.default_rng(int(digest([seed, item.id])[:16], 16)).integers(len(demonstrations), size=OTHERS)
    return [demonstrations[other].answer for other in drawn.tolist() if demonstrations[other].messages != item.messages]


def split(contrasts: Sequence[Contrast]) -> tuple[list[Contrast], list[Contrast]]:
    """Those that are trained on and those that are kept back, by prompt: every tenth one.

    With fewer than ten prompts nothing is kept back.
    """
    prompts = list(dict.fromkeys(contrast.tree.prompt_ids for contrast in contrasts))
    kept = set(prompts[KEPT - 1 :: KEPT])
    sides: tuple[list[Contrast], list[Contrast]] = ([], [])
    for contrast in contrasts:
        sides[contrast.tree.prompt_ids in kept].append(contrast)
    return sides


def told_apart(critic: Policy, contrasts: Sequence[Contrast]) -> dict[str, float]:
    """AUC of the positives against each class, and against all ("all")."""
    scores = iter(token_scores(critic, [contrast.tree.tokens for contrast in contrasts], FORWARD_TOKENS))
    positives: list[float] = []
    negatives: dict[str, list[float]] = {}
    for contrast in contrasts:
        positives.append(float(next(scores)[-1]))
        for name in contrast.classes:
            negatives.setdefault(name, []).append(float(next(scores)[-1]))
    return class_aucs(positives, negatives) if contrasts else {}


def counts_of(contrasts: Sequence[Contrast]) -> dict[str, int]:
    """Answers of each class."""
    return dict(Counter(name for contrast in contrasts for name in contrast.classes))


def missing_of(contrasts: Sequence[Contrast]) -> dict[str, int]:
    """Prompts without an answer of a class, for classes of which some prompt has none."""
    return dict(Counter(name for contrast in contrasts for name in contrast.missing))


def unclear(aucs: dict[str, float]) -> list[str]:
    """Warnings of classes that the reward model does not tell from the positives, or that nothing was kept back to tell."""
    if not aucs:
        return [f"fewer than {KEPT} prompts: none was kept back to see what the reward model tells apart"]
    names = [f"{name} ({value:.2f})" for name, value in aucs.items() if name != "all" and not value >= UNCLEAR]
    return [f"the reward model does not tell these from good answers (AUC): {', '.join(names)}"] if names else []
