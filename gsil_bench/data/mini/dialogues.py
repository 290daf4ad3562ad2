"""mini-mt-bench: two-turn instructions in eight categories, each turn with a rubric of checks that a program can make.

The second turn always builds on the first. Everything an answer needs is in the prompt: facts come from small made-up
tables. Besides the good answers every dialogue carries careless ones, the typical way to get this kind of instruction
half right, for the noisy pretraining corpus.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Check = dict[str, Any]

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lea", "Max", "Eva", "Tim", "Zoe", "Leo", "Ida")
CITIES = ("Rome", "Oslo", "Paris", "Cairo", "Lima", "Bonn", "Delhi", "Kyoto")
ANIMALS = ("cat", "dog", "fox", "goat", "hen", "bear", "frog", "wolf", "duck", "horse")
PLACES = ("garden", "forest", "house", "river", "city", "field", "barn", "valley")
ADJECTIVES = ("old", "small", "quick", "quiet", "brave", "lazy", "happy", "proud")
VERBS = ("runs", "sleeps", "sings", "waits", "jumps", "hides")
OBJECTS = (
    "lamp", "ball", "song", "book", "boat", "bread", "stone", "apple", "drum", "kite", "map", "ring", "coin", "pen",
    "cup", "shell",
)  # fmt: skip
WORDS = (
    "apple", "ball", "boat", "cat", "cloud", "dog", "drum", "egg", "fox", "goat", "hat", "ice", "jam", "kite", "lamp",
    "map", "nest", "owl", "pan", "queen", "ring", "song", "stone", "tea",
)  # fmt: skip
ROLES = (
    ("pirate", "Ahoy"), ("robot", "Beep"), ("cowboy", "Howdy"), ("king", "Hear me"), ("wizard", "Behold"),
    ("knight", "Hail"), ("baker", "Good morning"), ("captain", "Welcome"),
)  # fmt: skip
ORDERS = (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"))
MATTERS = ("zorb", "mib", "tal", "quil", "nex", "drom", "vish", "pel", "korn", "lume")
COLORS = ("red", "blue", "green", "black", "white", "brown")


@dataclass(frozen=True)
class Dialogue:
    """One two-turn instruction with its rubrics, its good answers and its careless ones."""

    family: str
    content: tuple[Any, ...]
    """What the first turn is about."""
    turns: tuple[str, str]
    gold: tuple[str, str]
    rubrics: tuple[tuple[Check, ...], tuple[Check, ...]]
    careless: tuple[str, str]

    @property
    def key(self) -> str:
        """Category and content of the first turn: with another second turn it is the same problem, half of it already seen."""
        return f"mt/{self.family}/" + "/".join(str(part) for part in self.content)


def check(kind: str, weight: int = 1, **arguments: Any) -> Check:
    """One check of a rubric; `gsil_bench.tasks.mini` holds what each kind means."""
    return {"check": kind, "weight": weight, **arguments}


def draw(family: str, rng: random.Random) -> Dialogue:
    """A random dialogue of a category."""
    return CATEGORIES[family](rng)


def _writing(rng: random.Random) -> Dialogue:
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    thing, other = rng.sample(OBJECTS, 2)
    opening = rng.choice(("Today", "Every day", "At night", "In winter", "Soon"))
    return Dialogue(
        "writing",
        (animal, place, thing),
        (
            f"Write two sentences about a {animal} in the {place}. Use the word {thing}.",
            f"Now write one sentence that starts with {opening} and ends with {other}.",
        ),
        (f"A {animal} lives in the {place}. It likes the {thing}.", f"{opening} the {animal} sees the {other}."),
        (
            (
                check("contains", 2, text=animal),
                check("contains", 2, text=place),
                check("contains", 3, text=thing),
                check("sentences", 2, count=2),
                check("ends_with", text="."),
                check("no_repetition"),
            ),
            (
                check("starts_with", 3, text=opening),
                check("ends_with", 3, text=f"{other}."),
                check("contains", 2, text=animal),
                check("sentences", count=1),
                check("no_repetition"),
            ),
        ),
        (f"The {animal} is nice", f"A {animal} is in the {place}"),
    )


def _extraction(rng: random.Random) -> Dialogue:
    people, cities = rng.sample(NAMES, 3), rng.sample(CITIES, 3)
    facts = " ".join(f"{name} lives in {city}." for name, city in zip(people, cities, strict=True))
    fields = {"names": people, "cities": cities}
    first, second = rng.sample(sorted(fields), 2)
    return Dialogue(
        "extraction",
        (*people, *cities),
        (f"{facts} List the {first}, one per line.", f"Now list the {second}, separated by commas."),
        ("\n".join(fields[first]), ", ".join(fields[second])),
        (
            (
                *(check("contains", 2, text=word) for word in fields[first]),
                *(check("excludes", text=word) for word in fields[second][:1]),
                check("lines", 3, count=3),
            ),
            (
                *(check("contains", 2, text=word) for word in fields[second]),
                *(check("excludes", text=word) for word in fields[first][:1]),
                check("exact", 3, text=", ".join(fields[second])),
            ),
        ),
        (f"{people[0]} and {cities[0]}", f"{people[1]} and {cities[1]}"),
    )


def _sorting(rng: random.Random) -> Dialogue:
    words = rng.sample(WORDS, 4)
    ordered = sorted(words)
    return Dialogue(
        "sorting",
        tuple(ordered),
        (
            f"Sort these words from A to Z: {', '.join(words)}.",
            "Now sort them from Z to A, one per line.",
        ),
        (", ".join(ordered), "\n".join(reversed(ordered))),
        (
            (
                *(check("contains", text=word) for word in words),
                check("words_in_order", 5, words=ordered),
                check("lines", count=1),
            ),
            (
                *(check("contains", text=word) for word in words),
                check("words_in_order", 5, words=ordered[::-1]),
                check("lines", 2, count=4),
            ),
        ),
        (", ".join(words[:3]), ", ".join(words[:3])),
    )


def _rewriting(rng: random.Random) -> Dialogue:
    animal, other_animal = rng.sample(ANIMALS, 2)
    adjective, other_adjective = rng.sample(ADJECTIVES, 2)
    verb, place = rng.choice(VERBS), rng.choice(PLACES)
    return Dialogue(
        "rewriting",
        (animal, adjective, other_adjective, verb, place),
        (
            f"The {adjective} {animal} {verb} in the {place}. Rewrite this with {other_adjective} for {adjective}.",
            f"Now put {other_animal} for {animal} and end with an exclamation mark.",
        ),
        (
            f"The {other_adjective} {animal} {verb} in the {place}.",
            f"The {other_adjective} {other_animal} {verb} in the {place}!",
        ),
        (
            (
                check("contains", 3, text=other_adjective),
                check("excludes", 2, text=adjective),
                check("words_in_order", 3, words=["The", animal, verb, "in", "the", place]),
                check("ends_with", text="."),
            ),
            (
                check("contains", 3, text=other_animal),
                check("excludes", 2, text=animal),
                check("words_in_order", 2, words=["The", other_adjective, verb, "in", "the", place]),
                check("ends_with", 2, text="!"),
            ),
        ),
        (f"The {adjective} {animal} {verb}", f"The {adjective} {animal} {verb}"),
    )


def _reasoning(rng: random.Random) -> Dialogue:
    first, second, third = rng.sample(NAMES, 3)
    more, most, least = rng.choice(ORDERS)
    facts = [f"{first} is {more} than {second}.", f"{second} is {more} than {third}."]
    swapped = rng.random() < 0.5
    shown = " ".join(reversed(facts) if swapped else facts)
    wrong = second
    return Dialogue(
        "reasoning",
        (first, second, third, more),
        (f"{shown} Who is the {most}?", f"And who is the {least}? Name all three from {least} to {most} too."),
        (f"{first} is the {most}.", f"{third} is the {least}.\n{third}, {second}, {first}"),
        (
            (
                check("starts_with", 6, text=first),
                check("contains", 2, text=most),
                check("max_words", count=6),
                check("ends_with", text="."),
            ),
            (
                check("starts_with", 4, text=third),
                check("contains", 2, text=least),
                check("words_in_order", 3, words=[third, second, first]),
                check("lines", count=2),
            ),
        ),
        (f"I think {wrong} is the {most}.", f"I think {wrong} is the {least}."),
    )


def _math(rng: random.Random) -> Dialogue:
    a, b, c = rng.randint(5, 60), rng.randint(3, 40), rng.randint(2, 30)
    while c >= a + b:
        c = rng.randint(2, 30)
    total, rest = a + b, a + b - c
    return Dialogue(
        "math",
        (a, b),
        (f"Add {a} and {b}. Show the equation.", f"Now take {c} away from the result."),
        (f"{a}+{b}={total}.", f"{total}-{c}={rest}."),
        (
            (
                check("contains", 2, text=f"{a}+{b}"),
                check("contains", 6, text=f"={total}."),
                check("max_words", count=4),
                check("ends_with", text="."),
            ),
            (
                check("contains", 2, text=f"-{c}"),
                check("contains", 6, text=f"={rest}."),
                check("max_words", count=4),
                check("ends_with", text="."),
            ),
        ),
        (f"{a}+{b} is {total + 10}.", f"{a}-{c} is {rest + 10}."),
    )


def _roleplay(rng: random.Random) -> Dialogue:
    role, opening = rng.choice(ROLES)
    name, (thing, other) = rng.choice(NAMES), rng.sample(OBJECTS, 2)
    return Dialogue(
        "roleplay",
        (role, name, thing),
        (
            f"You are a {role}. Start with {opening}, greet {name} and offer the {thing}.",
            f"Now say goodbye in at most eight words and ask for the {other}.",
        ),
        (
            f"{opening}, {name}! I am a {role}. Take the {thing}.",
            f"Goodbye, {name}! May I have the {other}?",
        ),
        (
            (
                check("starts_with", 3, text=opening),
                check("contains", 2, text=name),
                check("contains", 2, text=thing),
                check("contains", 2, text=role),
                check("no_repetition"),
            ),
            (
                check("starts_with", 2, text="Goodbye"),
                check("contains", 2, text=name),
                check("contains", 3, text=other),
                check("ends_with", 2, text="?"),
                check("max_words", count=8),
            ),
        ),
        (f"Hello, I am a {role}.", f"I am a {role}."),
    )


def _facts(rng: random.Random) -> Dialogue:
    matters, colors = rng.sample(MATTERS, 3), rng.sample(COLORS, 3)
    masses = rng.sample(range(2, 60), 3)
    table = " ".join(f"{matter}: mass {mass}, {color}." for matter, mass, color in zip(matters, masses, colors, strict=True))
    asked = rng.randrange(3)
    heaviest = masses.index(max(masses))
    wrong = (asked + 1) % 3
    return Dialogue(
        "facts",
        (*matters, *masses, *colors),
        (
            f"{table} What color and mass has {matters[asked]}?",
            "Which one has the largest mass? Give its mass too.",
        ),
        (
            f"{matters[asked]} is {colors[asked]} and has mass {masses[asked]}.",
            f"{matters[heaviest]} has the largest mass, {masses[heaviest]}.",
        ),
        (
            (
                check("contains", 3, text=colors[asked]),
                check("contains", 3, text=f"mass {masses[asked]}"),
                check("starts_with", 2, text=matters[asked]),
                check("ends_with", text="."),
                check("max_words", count=8),
            ),
            (
                check("starts_with", 4, text=matters[heaviest]),
                check("contains", 3, text=f"{masses[heaviest]}"),
                check("contains", text="largest mass"),
                check("max_words", count=8),
            ),
        ),
        (
            f"It is {colors[wrong]} and has mass {masses[wrong]}.",
            f"It is {matters[(heaviest + 1) % 3]} with the largest mass",
        ),
    )


CATEGORIES: dict[str, Callable[[random.Random], Dialogue]] = {
    "writing": _writing,
    "extraction": _extraction,
    "sorting": _sorting,
    "rewriting": _rewriting,
    "reasoning": _reasoning,
    "math": _math,
    "roleplay": _roleplay,
    "facts": _facts,
}
