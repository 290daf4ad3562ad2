"""mini-gsm8k: word problems of two to four steps whose worked solutions end in a line `#### n`, as in GSM8K.

A family is a question with numbered blanks and a chain of steps. Solutions are computed from the steps, so a wrong step
(which the noisy pretraining corpus needs) carries through to the final answer just as it does in real wrong solutions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lea", "Max", "Eva", "Tim", "Zoe", "Leo", "Ida")
THINGS = ("apples", "books", "coins", "pens", "cards", "eggs", "stamps", "shells", "cakes", "toys", "balls", "cups")
LARGEST = 250
"""No number in a solution exceeds this: carrying over two digits is what a model of a million parameters can learn."""


@dataclass(frozen=True)
class Step:
    """One line of a solution: `left operator right`, written into the blank `{}` of a sentence."""

    sentence: str
    left: str
    operator: str
    right: str


@dataclass(frozen=True)
class Family:
    """A kind of word problem. Letters a..e are given numbers, r0..r3 the results of the steps."""

    question: str
    ranges: Mapping[str, tuple[int, int]]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class WordProblem:
    """One problem: its family, its numbers and the words in its blanks."""

    family: str
    numbers: Mapping[str, int]
    words: Mapping[str, str]

    @property
    def key(self) -> str:
        """Family and numbers: the same sum with another name or thing is the same problem."""
        return f"gsm8k/{self.family}/" + ",".join(f"{k}={v}" for k, v in sorted(self.numbers.items()))

    @property
    def question(self) -> str:
        """The text of the problem."""
        return FAMILIES[self.family].question.format(**self.numbers, **self.words)

    @property
    def answer(self) -> int:
        """The correct number."""
        return solve(FAMILIES[self.family].steps, self.numbers)[-1]

    @property
    def solution(self) -> str:
        """The worked solution that a demonstration shows."""
        lines = solution_lines(self, FAMILIES[self.family].steps)
        return "\n".join([*lines, f"#### {self.answer}"])


def apply(operator: str, left: int, right: int) -> int:
    """One arithmetic operation; a division that leaves a remainder counts as impossible (-1)."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left // right if right and left % right == 0 else -1


def solve(steps: Sequence[Step], numbers: Mapping[str, int], slips: Mapping[int, int] | None = None) -> list[int]:
    """The result of each step; `slips` adds an error to the result of a step, which later steps then use."""
    values = dict(numbers)
    results: list[int] = []
    for index, step in enumerate(steps):
        result = apply(step.operator, _value(step.left, values), _value(step.right, values))
        result += (slips or {}).get(index, 0)
        values[f"r{index}"] = result
        results.append(result)
    return results


def solution_lines(problem: WordProblem, steps: Sequence[Step], slips: Mapping[int, int] | None = None) -> list[str]:
    """The sentences of a solution, without the line of the final answer."""
    results = solve(steps, problem.numbers, slips)
    values = {**problem.numbers, **{f"r{index}": result for index, result in enumerate(results)}}
    lines = []
    for step, result in zip(steps, results, strict=True):
        equation = f"{_value(step.left, values)}{step.operator}{_value(step.right, values)}={result}"
        lines.append(step.sentence.format(equation, **problem.words))
    return lines


def draw(family: str, rng: random.Random) -> WordProblem:
    """A random problem of a family whose results are all whole numbers from 1 to LARGEST."""
    kind = FAMILIES[family]
    while True:
        numbers = {letter: rng.randint(low, high) for letter, (low, high) in kind.ranges.items()}
        if all(1 <= result <= LARGEST for result in solve(kind.steps, numbers)):
            break
    first, second, third = rng.sample(NAMES, 3)
    words = {"N": first, "M": second, "K": third, "o": rng.choice(THINGS)}
    return WordProblem(family, numbers, words)


def _value(name: str, values: Mapping[str, int]) -> int:
    return int(name) if name.isdigit() else values[name]


FAMILIES: dict[str, Family] = {
    "give": Family(
        "{N} has {a} {o}. {N} buys {b} more and gives {c} to {M}. How many {o} does {N} have now?",
        {"a": (5, 60), "b": (3, 40), "c": (2, 30)},
        (Step("After buying {N} has {} {o}.", "a", "+", "b"), Step("Then {N} has {} {o}.", "r0", "-", "c")),
    ),
    "boxes": Family(
        "{N} packs {a} boxes with {b} {o} each. {c} {o} are broken. How many {o} are good?",
        {"a": (2, 12), "b": (3, 12), "c": (2, 30)},
        (Step("The boxes hold {} {o}.", "a", "*", "b"), Step("Good are {} {o}.", "r0", "-", "c")),
    ),
    "shop": Family(
        "{N} buys {a} {o} for {b} dollars each and a bag for {c} dollars. How many dollars does {N} pay?",
        {"a": (2, 12), "b": (2, 12), "c": (3, 40)},
        (Step("The {o} cost {} dollars.", "a", "*", "b"), Step("{N} pays {} dollars.", "r0", "+", "c")),
    ),
    "change": Family(
        "{N} has {c} dollars and buys {a} {o} for {b} dollars each. How much money is left?",
        {"a": (2, 12), "b": (2, 12), "c": (20, 99)},
        (Step("The {o} cost {} dollars.", "a", "*", "b"), Step("There are {} dollars left.", "c", "-", "r0")),
    ),
    "share": Family(
        "{N} fills {a} bags with {b} {o} each. {c} friends share all {o} and get {d} more each. How many {o} has each friend?",
        {"a": (2, 12), "b": (2, 12), "c": (2, 9), "d": (2, 20)},
        (
            Step("The bags hold {} {o}.", "a", "*", "b"),
            Step("Each gets {} {o}.", "r0", "/", "c"),
            Step("Each has {} {o}.", "r1", "+", "d"),
        ),
    ),
    "reading": Family(
        "{N} reads {a} pages on Monday, {b} more on Tuesday than on Monday, and {c} on Sunday. How many pages in all?",
        {"a": (5, 50), "b": (2, 30), "c": (3, 40)},
        (
            Step("On Tuesday {N} reads {} pages.", "a", "+", "b"),
            Step("In two days {} pages.", "a", "+", "r0"),
            Step("In all {} pages.", "r1", "+", "c"),
        ),
    ),
    "bus": Family(
        "A bus has {a} people. {b} get off and {c} get on. Then {d} get off. How many people are on the bus?",
        {"a": (15, 60), "b": (2, 20), "c": (2, 30), "d": (2, 20)},
        (
            Step("First {} people.", "a", "-", "b"),
            Step("Then {} people.", "r0", "+", "c"),
            Step("At last {} people.", "r1", "-", "d"),
        ),
    ),
    "savings": Family(
        "{N} saves {a} dollars a week for {b} weeks, spends {c} dollars and gets {d} from {M}. How many dollars has {N}?",
        {"a": (3, 12), "b": (2, 12), "c": (2, 30), "d": (2, 30)},
        (
            Step("{N} saves {} dollars.", "a", "*", "b"),
            Step("After spending {} dollars.", "r0", "-", "c"),
            Step("{N} has {} dollars.", "r1", "+", "d"),
        ),
    ),
    "half": Family(
        "{N} bakes {a} cakes. Half are sold in the morning and {b} at noon. {M} brings {c}. How many cakes are there?",
        {"a": (10, 98), "b": (2, 30), "c": (2, 30)},
        (
            Step("In the morning {} are sold.", "a", "/", "2"),
            Step("After noon {} are left.", "r0", "-", "b"),
            Step("There are {} cakes.", "r1", "+", "c"),
        ),
    ),
    "age": Family(
        "{N} is {a} years old. {M} is {b} years older. How old will both be together in {c} years?",
        {"a": (3, 45), "b": (2, 30), "c": (2, 15)},
        (
            Step("{M} is {}.", "a", "+", "b"),
            Step("Together {}.", "a", "+", "r0"),
            Step("Both age {} years.", "2", "*", "c"),
            Step("Later {}.", "r1", "+", "r2"),
        ),
    ),
    "garden": Family(
        "A garden has {a} rows of {b} roses and {c} rows of {d} tulips. {e} flowers die. How many are left?",
        {"a": (2, 9), "b": (2, 12), "c": (2, 9), "d": (2, 12), "e": (2, 20)},
        (
            Step("Roses: {}.", "a", "*", "b"),
            Step("Tulips: {}.", "c", "*", "d"),
            Step("Flowers: {}.", "r0", "+", "r1"),
            Step("Left: {}.", "r2", "-", "e"),
        ),
    ),
    "team": Family(
        "{N} has {a} {o}. {M} has {b} times as many. {K} has {c} fewer than {M}. How many {o} have they together?",
        {"a": (2, 20), "b": (2, 6), "c": (2, 20)},
        (
            Step("{M} has {}.", "a", "*", "b"),
            Step("{K} has {}.", "r0", "-", "c"),
            Step("{N} and {M} have {}.", "a", "+", "r0"),
            Step("Together {} {o}.", "r2", "+", "r1"),
        ),
    ),
}
