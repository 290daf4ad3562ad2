"""Summaries that fail in a known way, made from good ones: what a measure or a reward must see, and a policy must unlearn.

Each degradation takes a summary, its document, summaries of other documents and a seeded generator, and returns a text that is
not the summary. The same arguments give the same text. `failures` makes one of each class, and adds what no text can show:
whether the model's end token follows. `failed_rules` says which of them a model's own answer shows, where a rule can tell.

The classes are ours: what is known here of RL without human feedback for last-mile fine-tuning (arXiv 2408.16753) says "diverse
negative failure modes", and not which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gsil_bench.records import digest
from gsil_bench.tasks.text_measures import drop_repeats, first_paragraph, is_finished, sentences, words

STOPS = " .!?…\"'”’»)]}"
"""What is taken off an end so that no sentence ends there."""


class Inapplicable(ValueError):
    """The summary cannot be made to fail in this way: the caller leaves it out and counts it."""


class Degradation(Protocol):
    """A way to fail."""

    def __call__(self, summary: str, document: str, others: Sequence[str], rng: np.random.Generator) -> str:
        """The summary made worse. Raises Inapplicable where that cannot be."""


def run_on(summary: str, document: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """The summary, then sentences of the document from a random one on, until the text has twice the summary's words."""
    wanted = len(words(summary))
    return f"{summary.strip()} {' '.join(_passage(document, wanted, rng))}"


def truncated(summary: str, document: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """The first words of the summary, at least one and not all, as when the token limit was reached."""
    tokens = summary.split()
    if len(tokens) < 2:
        raise Inapplicable("a summary of one word cannot be cut")
    kept = " ".join(tokens[: int(rng.integers(1, len(tokens)))]).rstrip(STOPS)
    return _changed(kept, summary, "nothing is left of it before the cut")


def without_end(summary: str, document: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """The summary without its last stop, as when its last token was not learned."""
    if not is_finished(summary):
        raise Inapplicable("it has no stop at its end")
    return _changed(summary.strip().rstrip(STOPS), summary, "it is nothing but stops")


def repeated(summary: str, document: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """The summary with one of its sentences, drawn at random, said two to four times more in a row."""
    found = _sentences(summary)
    place, times = int(rng.integers(len(found))), int(rng.integers(2, 5))
    return " ".join([*found[: place + 1], *[found[place]] * times, *found[place + 1 :]])


def copied(summary: str, document: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """Sentences of the document from a random one on, with at least as many words as the summary where the document has them."""
    passage = " ".join(_passage(document, len(words(summary)), rng))
    return _changed(passage, summary, "it is itself the document's text")


def off_topic(summary: str, document: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """The summary of another document."""
    different = [other for other in others if words(other) and words(other) != words(summary)]
    if not different:
        raise Inapplicable("there is no other summary")
    return different[int(rng.integers(len(different)))].strip()


def shuffled(summary: str, document: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """The summary's words, with their punctuation, in a random other order."""
    tokens = summary.split()
    if len(set(tokens)) < 2:
        raise Inapplicable("it has no two different words")
    order = tokens
    while order == tokens:  # at least half of the orders of two different words differ, more of more words
        order = [tokens[place] for place in rng.permutation(len(tokens))]
    return " ".join(order)


def empty(summary: str, document: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """No text."""
    if not summary.strip():
        raise Inapplicable("it is empty")
    return ""


def _passage(document: str, wanted: int, rng: np.random.Generator) -> list[str]:
    """Consecutive sentences from a random one on, until they have `wanted` words; the document's end is followed by its start."""
    found = [sentence for sentence in sentences(document) if words(sentence)]
    if not found:
        raise Inapplicable("the document has no words")
    start, passage = int(rng.integers(len(found))), list[str]()
    for sentence in [*found[start:], *found[:start]]:
        passage.append(sentence)
        if sum(len(words(sentence)) for sentence in passage) >= wanted:
            break
    return passage


def _sentences(summary: str) -> list[str]:
    found = sentences(summary)
    if not found:
        raise Inapplicable("it is empty")
    return found


def _changed(text: str, summary: str, reason: str) -> str:
    """The text, if it is one and another than the summary, whatever the white space."""
    if not text or text.split() == summary.split():
        raise Inapplicable(reason)
    return text


DEGRADATIONS: Mapping[str, Degradation] = {
    "run-on": run_on,
    "truncated": truncated,
    "without-end": without_end,
    "repeated": repeated,
    "copied": copied,
    "off-topic": off_topic,
    "shuffled": shuffled,
    "empty": empty,
}

MISSING_END = "missing-end"
"""The class whose text is the summary itself, after which the model goes on."""
ENDLESS = frozenset({"run-on", MISSING_END})
"""Classes after which no end token follows: the model would go on up to the limit."""
CLASSES = (*DEGRADATIONS, MISSING_END)


@dataclass(frozen=True)
class Failure:
    """An answer that fails."""

    text: str
    ended: bool
    """Whether the end token follows. Of missing-end this is all that differs from the summary."""


def failures(summary: str, document: str, others: Sequence[str], seed: int) -> dict[str, Failure | None]:
    """One failure of every class, in the order of CLASSES; None where there is none of this summary: `unavailable` counts them.

    The draws of a class depend on the seed, the class, the summary and the document only: neither a further class nor a further
    example changes them.

    Args:
        summary: a good answer.
        document: what it is about, or the prompt.
        others: good answers to other prompts; the summary itself may be among them.
        seed: of the draws.
    """
    return {name: _failure(name, summary, document, others, seed) for name in CLASSES}


def _failure(name: str, summary: str, document: str, others: Sequence[str], seed: int) -> Failure | None:
    if name == MISSING_END:
        return Failure(summary, ended=False)
    rng = np.random.default_rng(int(digest([seed, name, summary, document])[:16], 16))
    try:
        return Failure(DEGRADATIONS[name](summary, document, others, rng), name not in ENDLESS)
    except Inapplicable:
        return None


def unavailable(made: Iterable[Mapping[str, Failure | None]]) -> dict[str, int]:
    """How many summaries have no failure of a class; every class that was tried, in order."""
    missing = Counter[str]()
    for one in made:
        missing.update({name: int(failure is None) for name, failure in one.items()})
    return dict(missing)


def failed_rules(answer: str, ended: bool, document: str) -> tuple[str, ...]:
    """The classes that a model's own answer shows, where a rule can tell, in the order of CLASSES; "markup" for one that has
    another paragraph or spells an end mark.

    A sentence counts as copied if the document has it word for word. Run-on, truncated, off-topic and shuffled cannot be told
    without the summary.

    Args:
        answer: the text that was sampled.
        ended: whether the model ended it; False: the token limit did.
        document: what it was to be about.
    """
    text, known = answer.strip(), {tuple(words(sentence)) for sentence in sentences(document)} - {()}
    said = sentences(text)
    shown = {
        "without-end": bool(text) and not is_finished(text),
        "repeated": len(sentences(drop_repeats(text))) < len(said),
        "copied": any(tuple(words(sentence)) in known for sentence in said),
        "empty": not text,
        MISSING_END: not ended,
        "markup": first_paragraph(text) != text,
    }
    return tuple(name for name, found in shown.items() if found)
