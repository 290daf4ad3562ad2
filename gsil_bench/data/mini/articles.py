"""mini-summarization: articles of a few short sentences about this world, each with the one sentence that says it all.

A summary joins facts that stand apart, lists as many names as there are, and leaves out what is beside the point. No article is
in the pretraining corpus: only demonstrations teach what a summary is, as in fine-tuning for one task.

Demonstrations are written as people write them: of four in ten the end is careless. The good sentence is there, and then more:
another sentence, the same once more, the beginning of one, or a remark in a further paragraph; or its full stop is missing. A
model that learns their likelihood learns this too. The references of dev and test have no such end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gsil_bench.data.mini.dialogues import ADJECTIVES, ANIMALS, CITIES, NAMES, OBJECTS, ORDERS, PLACES, VERBS

VERSION = "1"
"""Changes whenever any item changes; of mini-summarization alone."""

PROMPT = "Write one sentence about this:\n{document}"


@dataclass(frozen=True)
class Article:
    """One article with its summary."""

    family: str
    sentences: tuple[str, ...]
    """In the order in which they are read."""
    summary: str
    told: str
    """As a demonstration tells it: the summary, or the summary with a careless end."""

    @property
    def document(self) -> str:
        """The article in one line."""
        return " ".join(self.sentences)

    @property
    def key(self) -> str:
        """Kind and summary: the same facts in another order, or beside other matters, are the same problem."""
        return f"summarization/{self.family}/{self.summary}"


CARELESS_RATE = 0.4
"""Demonstrations with a careless end."""

CARELESS_ENDS: dict[str, Callable[[str, str], str]] = {
    "beginning": lambda summary, sentence: f"{summary} {' '.join(sentence.split()[:2])}",
    "more": lambda summary, sentence: f"{summary} {sentence}",
    "no stop": lambda summary, sentence: summary.removesuffix("."),
    "remark": lambda summary, sentence: f"{summary}\n\nThere is more: {sentence}",
    "twice": lambda summary, sentence: f"{summary} {summary}",
}
"""(summary, a sentence of the article) → what is told."""


def draw(family: str, rng: random.Random) -> Article:
    """A random article of a family."""
    sentences, summary = FAMILIES[family](rng)
    end = rng.choice(sorted(CARELESS_ENDS)) if rng.random() < CARELESS_RATE else "none"
    told = CARELESS_ENDS[end](summary, rng.choice(sentences)) if end in CARELESS_ENDS else summary
    return Article(family, tuple(sentences), summary, told)


def listed(names: Sequence[str]) -> str:
    """Names in a row: "Tom", "Tom and Mia", "Tom, Ben and Mia"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _pet(rng: random.Random) -> tuple[Sequence[str], str]:
    """Four facts about one, two about another, in any order."""
    owner, other = rng.sample(NAMES, 2)
    city, elsewhere = rng.sample(CITIES, 2)
    animal, adjective, verb, place = rng.choice(ANIMALS), rng.choice(ADJECTIVES), rng.choice(VERBS), rng.choice(PLACES)
    facts = [
        f"{owner} lives in {city}.",
        f"{owner} has a {animal}.",
        f"The {animal} is {adjective}.",
        f"The {animal} {verb} in the {place}.",
        f"{other} lives in {elsewhere}.",
        f"{other} likes the {rng.choice(OBJECTS)}.",
    ]
    rng.shuffle(facts)
    return facts, f"The {adjective} {animal} of {owner} from {city} {verb} in the {place}."


def _group(rng: random.Random) -> tuple[Sequence[str], str]:
    """Three to six who do one of two things, listed in the order of the article; more who do the first."""
    people = rng.sample(NAMES, rng.randint(3, 6))
    deeds = list(zip(rng.sample(VERBS, 2), rng.sample(PLACES, 2), strict=True))
    done = [0, *rng.choices((0, 1), (2, 1), k=len(people) - 1)]
    sentences = [f"{name} {deeds[deed][0]} in the {deeds[deed][1]}." for name, deed in zip(people, done, strict=True)]
    parts = []
    for deed, (verb, place) in enumerate(deeds):
        names = [name for name, of in zip(people, done, strict=True) if of == deed]
        if names:
            parts.append(f"{listed(names)} {verb if len(names) == 1 else verb[:-1]} in the {place}")
    return sentences, f"{', but '.join(parts)}."


def _gift(rng: random.Random) -> tuple[Sequence[str], str]:
    """A thing that goes through three to five hands, and one that goes nowhere."""
    *hands, other = rng.sample(NAMES, rng.randint(4, 6))
    thing, kept = rng.sample(OBJECTS, 2)
    passed = [f"{giver} gives the {thing} to {taker}." for giver, taker in pairwise(hands)]
    sentences = [f"{hands[0]} buys a {thing}.", *passed]
    sentences.insert(rng.randint(0, len(sentences)), f"{other} buys a {kept}.")
    return sentences, f"The {thing} of {hands[0]} goes to {listed(hands[1:-1])} and in the end to {hands[-1]}."


def _order(rng: random.Random) -> tuple[Sequence[str], str]:
    """Three to five in an order of which only neighbours are compared."""
    people = rng.sample(NAMES, rng.randint(3, 5))
    more, most, least = rng.choice(ORDERS)
    facts = [f"{first} is {more} than {second}." for first, second in pairwise(people)]
    rng.shuffle(facts)
    return facts, f"{people[0]} is the {most}, then come {listed(people[1:-1])}, and {people[-1]} is the {least}."


FAMILIES: dict[str, Callable[[random.Random], tuple[Sequence[str], str]]] = {
    "pet": _pet,
    "group": _group,
    "gift": _gift,
    "order": _order,
}
"""Each draws the sentences of an article and its summary."""
