"""Seeded streams of distinct problems, and the rule that gives every possible problem to exactly one split.

A problem belongs to a split by the hash of its content, not by the order in which it is drawn. Test, dev, train and the
pretraining corpus can therefore never share a problem, whatever a later version draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, TypeVar

Part = Literal["train", "dev", "test", "corpus"]

# Upper bounds of each part's share of the hash space, in percent.
PARTS: tuple[tuple[Part, int], ...] = (("test", 15), ("dev", 25), ("train", 60), ("corpus", 100))


class Keyed(Protocol):
    """Anything with a canonical content key."""

    @property
    def key(self) -> str:
        """Equal for two problems exactly when they are the same problem."""


Problem = TypeVar("Problem", bound=Keyed)


def digest(text: str) -> str:
    """The sha256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def part_of(key: str) -> Part:
    """The part that owns the problem with this key."""
    percent = int(digest("mini:" + key)[:12], 16) % 100
    return next(part for part, bound in PARTS if percent < bound)


def problem_stream(
    families: Sequence[str], draw: Callable[[str, random.Random], Problem], part: Part, seed: str
) -> Iterator[Problem]:
    """Endless distinct problems of one part, one family after the other in turn; equal seeds give equal streams.

    Args:
        families: names that `draw` understands; each is visited equally often.
        draw: makes one random problem of a family.
        part: only problems that belong to it are returned.
        seed: of the stream. A string, because Random hashes strings the same way in every process.
    """
    rng = random.Random(f"{part}/{seed}")
    seen: set[str] = set()
    while True:
        for family in families:
            yield _next_problem(family, draw, part, rng, seen)


def _next_problem(
    family: str, draw: Callable[[str, random.Random], Problem], part: Part, rng: random.Random, seen: set[str]
) -> Problem:
    for _ in range(100_000):
        problem = draw(family, rng)
        if problem.key not in seen and part_of(problem.key) == part:
            seen.add(problem.key)
            return problem
    raise RuntimeError(f"family {family!r} has no unseen problem left in part {part!r}")
