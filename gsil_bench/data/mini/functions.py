"""mini-humaneval: small Python functions to write from a signature and a docstring, tested by running them.

Problems are composed: a filter, a map and a reduction over a list of numbers or words, a choice between two formulas,
or a loop with a total. Every part carries its words, its code and its meaning (a Python function), so expected values
come from the meaning and never from the code that is shown as the solution; the canaries then check that the two agree.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FAMILIES = ("numbers", "words", "choice", "loop")
ENTRY_POINTS = tuple("solve build pick work make run change collect scan gather select find".split())  # noqa: SIM905
LIST_NAMES = ("xs", "values", "items", "data")
NUMBER_NAMES = ("n", "k", "m", "num")
# For every letter in LETTERS several words start with it, end with it, contain it and lack it, so that tests tell
# mistakes apart.
VOCABULARY = tuple(
    """
    a to at go ace hat ice jam owl pan rain sun tea apple bread cloud dance eagle flower garden honey banana level tent
    lantern orange oasis octopus radio piano echo hero club crab web music comic attic cabin candle dream desert dragon
    egg elephant evening gate grass goat dog frog song house harbor earth month fish lamp lion letter animal pearl moon
    nest night noon robot rabbit river sand stone silver bus ticket tiger table sofa panda
    """.split()  # noqa: SIM905
)
LETTERS = "abcdeghlnorst"
RARE_RATE = 0.1
"""How often a part is one of the rare ones."""


@dataclass(frozen=True)
class Part:
    """One building block: how the docstring says it, how the code writes it, and what it means.

    `careless` is the code of a typical mistake, which only the noisy pretraining corpus uses; empty if the part is too
    easy to get wrong.
    """

    name: str
    """Kind, then the constant if it has one: "least 4"."""
    words: str
    code: str
    meaning: Callable[..., Any]
    careless: str = ""
    rare: bool = False
    """Drawn seldom, and never met in the pretraining corpus: only demonstrations teach it."""

    @property
    def kind(self) -> str:
        """The name without its constant."""
        return self.name.split()[0]


Write = Callable[[Part], str]
"""How a part is written: correctly (its code) or with its typical mistake."""


@dataclass(frozen=True)
class FunctionProblem:
    """One function to write."""

    family: str
    parts: tuple[Part, ...]
    entry_point: str
    argument: str
    docstring: str
    body: Callable[[Write], str]
    """The lines below the signature, given how each part is written."""
    meaning: Callable[[Any], Any]

    @property
    def key(self) -> str:
        """The composition; the names of the function and its argument do not make another problem."""
        return f"humaneval/{self.family}/" + ",".join(part.name for part in self.parts)

    @property
    def signature(self) -> str:
        """The line that starts the function."""
        return f"def {self.entry_point}({self.argument}):"

    @property
    def question(self) -> str:
        """Signature and docstring, as the user shows them."""
        return f'Write this function.\n{self.signature}\n    """{self.docstring}"""'

    @property
    def solution(self) -> str:
        """The function, as a demonstration shows it."""
        return self.written(lambda part: part.code)

    def written(self, write: Write) -> str:
        """The function with its parts written in a way of one's own, such as carelessly."""
        return f"{self.signature}\n{self.body(write)}"

    def tests(self) -> list[str]:
        """Assert lines; the arguments depend on the composition alone and include the edges of every comparison."""
        rng = random.Random(self.key)
        arguments = _number_arguments(rng) if self.family in ("choice", "loop") else _list_arguments(self.family, rng)
        return [f"assert {self.entry_point}({value!r}) == {self.meaning(value)!r}" for value in arguments]


def draw(family: str, rng: random.Random) -> FunctionProblem:
    """A random problem of a family."""
    makers = {"numbers": _draw_numbers, "words": _draw_words, "choice": _draw_choice, "loop": _draw_loop}
    return makers[family](rng)


def number_tests(constant: int) -> list[Part]:
    """Conditions on a number, written for the variable x."""
    c = constant
    return [
        Part(f"above {c}", f"above {c}", f"x > {c}", lambda x: x > c),
        Part(f"below {c}", f"below {c}", f"x < {c}", lambda x: x < c),
        Part(f"least {c}", f"at least {c}", f"x >= {c}", lambda x: x >= c, f"x > {c}"),
        Part(f"most {c}", f"at most {c}", f"x <= {c}", lambda x: x <= c, f"x < {c}"),
        Part(f"multiple {c}", f"divisible by {c}", f"x % {c} == 0", lambda x: x % c == 0),
        Part(f"nomultiple {c}", f"not divisible by {c}", f"x % {c} != 0", lambda x: x % c != 0, f"x % {c} == 0"),
        Part(f"not {c}", f"other than {c}", f"x != {c}", lambda x: x != c),
        Part("even", "even", "x % 2 == 0", lambda x: x % 2 == 0, rare=True),
        Part("odd", "odd", "x % 2 == 1", lambda x: x % 2 == 1, rare=True),
        Part(f"digit {c}", f"ending in {c}", f"abs(x) % 10 == {c}", lambda x: abs(x) % 10 == c, rare=True),
        Part(f"near {c}", f"within 3 of {c}", f"abs(x - {c}) <= 3", lambda x: abs(x - c) <= 3, rare=True),
        Part(f"range {c}", f"from 1 to {c}", f"1 <= x <= {c}", lambda x: 1 <= x <= c, rare=True),
    ]


def number_maps(constant: int) -> list[Part]:
    """Formulas of a number, written for the variable x."""
    c = constant
    return [
        Part(f"add {c}", f"plus {c}", f"x + {c}", lambda x: x + c),
        Part(f"sub {c}", f"minus {c}", f"x - {c}", lambda x: x - c),
        Part(f"mul {c}", f"times {c}", f"x * {c}", lambda x: x * c),
        Part(f"rest {c}", f"modulo {c}", f"x % {c}", lambda x: x % c, f"x // {c}"),
        Part(f"from {c}", f"subtracted from {c}", f"{c} - x", lambda x: c - x, f"x - {c}"),
        Part(f"squareadd {c}", f"squared plus {c}", f"x * x + {c}", lambda x: x * x + c, f"x * 2 + {c}"),
        Part("halved", "halved", "x // 2", lambda x: x // 2, rare=True),
        Part("cubed", "cubed", "x * x * x", lambda x: x * x * x, rare=True),
        Part("absolute", "without its sign", "abs(x)", abs, rare=True),
        Part(f"capped {c}", f"capped at {c}", f"min(x, {c})", lambda x: min(x, c), rare=True),
        Part(f"distance {c}", f"as distance from {c}", f"abs(x - {c})", lambda x: abs(x - c), rare=True),
        Part(f"doubleadd {c}", f"doubled plus {c}", f"2 * x + {c}", lambda x: 2 * x + c, rare=True),
    ]


NUMBER_REDUCTIONS = (
    Part("list", "Return the list.", "ys", lambda ys: ys),
    Part("sum", "Return the sum.", "sum(ys)", sum),
    Part("sorted", "Return them sorted.", "sorted(ys)", sorted),
    Part("max", "Return the largest or 0.", "max(ys, default=0)", lambda ys: max(ys, default=0), "max(ys)"),
    Part("min", "Return the smallest or 0.", "min(ys, default=0)", lambda ys: min(ys, default=0), "min(ys)"),
    Part("reversed", "Return them in reverse order.", "ys[::-1]", lambda ys: ys[::-1], "sorted(ys)"),
    Part("distinct", "Return how many differ.", "len(set(ys))", lambda ys: len(set(ys)), "len(ys)"),
    Part("first", "Return the first or 0.", "ys[0] if ys else 0", lambda ys: ys[0] if ys else 0, rare=True),
    Part("last", "Return the last or 0.", "ys[-1] if ys else 0", lambda ys: ys[-1] if ys else 0, rare=True),
    Part("second", "Return every second one.", "ys[::2]", lambda ys: ys[::2], rare=True),
    Part("three", "Return the first three.", "ys[:3]", lambda ys: ys[:3], rare=True),
    Part("any", "Return whether any is left.", "len(ys) > 0", lambda ys: len(ys) > 0, rare=True),
)


def word_tests(constant: int, letter: str) -> list[Part]:
    """Conditions on a word, written for the variable w."""
    c = constant
    return [
        Part(f"longer {c}", f"longer than {c}", f"len(w) > {c}", lambda w: len(w) > c),
        Part(f"shorter {c}", f"shorter than {c}", f"len(w) < {c}", lambda w: len(w) < c, f"len(w) <= {c}"),
        Part(f"starts {letter}", f"starting with {letter}", f'w.startswith("{letter}")', lambda w: w.startswith(letter)),
        Part(f"ends {letter}", f"ending with {letter}", f'w.endswith("{letter}")', lambda w: w.endswith(letter)),
        Part(f"has {letter}", f"containing {letter}", f'"{letter}" in w', lambda w: letter in w),
        Part(
            f"lacks {letter}",
            f"without {letter}",
            f'"{letter}" not in w',
            lambda w: letter not in w,
            f'"{letter}" in w',
        ),
        Part(f"length {c}", f"of length {c}", f"len(w) == {c}", lambda w: len(w) == c, rare=True),
        Part("evenlength", "of even length", "len(w) % 2 == 0", lambda w: len(w) % 2 == 0, rare=True),
        Part(f"many {letter}", f"with two {letter}", f'w.count("{letter}") == 2', lambda w: w.count(letter) == 2, rare=True),
    ]


def word_maps(letter: str) -> list[Part]:
    """Changes of a word, written for the variable w."""
    return [
        Part("upper", "in capitals", "w.upper()", lambda w: w.upper()),
        Part("backwards", "backwards", "w[::-1]", lambda w: w[::-1], "w"),
        Part("first", "cut to the first letter", "w[0]", lambda w: w[0]),
        Part("last", "cut to the last letter", "w[-1]", lambda w: w[-1], "w[0]"),
        Part("twice", "doubled", "w + w", lambda w: w + w),
        Part(f"suffix {letter}", f"followed by {letter}", f'w + "{letter}"', lambda w: w + letter),
        Part(f"prefix {letter}", f"preceded by {letter}", f'"{letter}" + w', lambda w: letter + w, f'w + "{letter}"'),
        Part("tail", "without its first letter", "w[1:]", lambda w: w[1:], rare=True),
        Part("three", "cut to three letters", "w[:3]", lambda w: w[:3], rare=True),
        Part("thrice", "tripled", "w * 3", lambda w: w * 3, rare=True),
        Part(f"drop {letter}", f"rid of {letter}", f'w.replace("{letter}", "")', lambda w: w.replace(letter, ""), rare=True),
    ]


def word_reductions(separator: str) -> list[Part]:
    """What is made of the changed words."""
    s = separator
    return [
        Part("list", "Return the list.", "ys", lambda ys: ys),
        Part("sorted", "Return them sorted.", "sorted(ys)", sorted),
        Part(f"join {s}", f"Join them with {s}.", f'"{s}".join(ys)', lambda ys: s.join(ys)),
        Part("reversed", "Return them in reverse order.", "ys[::-1]", lambda ys: ys[::-1], "sorted(ys)"),
        Part("distinct", "Return how many differ.", "len(set(ys))", lambda ys: len(set(ys)), "len(ys)"),
        Part("second", "Return every second one.", "ys[::2]", lambda ys: ys[::2], rare=True),
        Part("three", "Return the first three.", "ys[:3]", lambda ys: ys[:3], rare=True),
        Part("letters", "Return the number of letters.", 'len("".join(ys))', lambda ys: len("".join(ys)), rare=True),
    ]


def _pick(parts: Sequence[Part], rng: random.Random) -> Part:
    rare = rng.random() < RARE_RATE
    return rng.choice([part for part in parts if part.rare == rare])


def _draw_numbers(rng: random.Random) -> FunctionProblem:
    test, change = _pick(number_tests(rng.randint(2, 9)), rng), _pick(number_maps(rng.randint(2, 9)), rng)
    end = _pick(NUMBER_REDUCTIONS, rng)
    argument = rng.choice(LIST_NAMES)
    docstring = f"Take the numbers {test.words}, each {change.words}. {end.words}"

    def body(write: Write) -> str:
        return f"    ys = [{write(change)} for x in {argument} if {write(test)}]\n    return {write(end)}"

    def meaning(values: list[int]) -> Any:
        return end.meaning([change.meaning(x) for x in values if test.meaning(x)])

    parts = (test, change, end)
    return FunctionProblem("numbers", parts, rng.choice(ENTRY_POINTS), argument, docstring, body, meaning)


def _draw_words(rng: random.Random) -> FunctionProblem:
    test = _pick(word_tests(rng.randint(2, 6), rng.choice(LETTERS)), rng)
    change = _pick(word_maps(rng.choice(LETTERS)), rng)
    end = _pick(word_reductions(rng.choice("-+_/")), rng)
    argument = rng.choice(LIST_NAMES)
    docstring = f"Take the words {test.words}, each {change.words}. {end.words}"

    def body(write: Write) -> str:
        return f"    ys = [{write(change)} for w in {argument} if {write(test)}]\n    return {write(end)}"

    def meaning(words: list[str]) -> Any:
        return end.meaning([change.meaning(w) for w in words if test.meaning(w)])

    parts = (test, change, end)
    return FunctionProblem("words", parts, rng.choice(ENTRY_POINTS), argument, docstring, body, meaning)


def _draw_choice(rng: random.Random) -> FunctionProblem:
    test = _pick(number_tests(rng.randint(2, 9)), rng)
    then, other = _pick(number_maps(rng.randint(2, 9)), rng), _pick(number_maps(rng.randint(2, 9)), rng)
    argument = rng.choice(NUMBER_NAMES)
    docstring = f"If {argument} is {test.words}, return {argument} {then.words}. Otherwise return {argument} {other.words}."

    def body(write: Write) -> str:
        condition, first, second = (re.sub(r"\bx\b", argument, write(part)) for part in (test, then, other))
        return f"    if {condition}:\n        return {first}\n    return {second}"

    def meaning(value: int) -> Any:
        return then.meaning(value) if test.meaning(value) else other.meaning(value)

    parts = (test, then, other)
    return FunctionProblem("choice", parts, rng.choice(ENTRY_POINTS), argument, docstring, body, meaning)


def _draw_loop(rng: random.Random) -> FunctionProblem:
    test, change = _pick(number_tests(rng.randint(2, 9)), rng), _pick(number_maps(rng.randint(2, 9)), rng)
    argument = rng.choice(NUMBER_NAMES)
    first, start = rng.randint(1, 3), rng.choice((0, 0, 10))
    span = Part(f"span {first}", f"from {first} to", f"{argument} + 1", int, argument)
    docstring = f"Start with {start}. For each x {span.words} {argument} that is {test.words}, add x {change.words}."

    def body(write: Write) -> str:
        return (
            f"    total = {start}\n    for x in range({first}, {write(span)}):\n"
            f"        if {write(test)}:\n            total += {write(change)}\n    return total"
        )

    def meaning(value: int) -> Any:
        return start + sum(change.meaning(x) for x in range(first, value + 1) if test.meaning(x))

    parts = (test, change, span, Part(f"start {start}", "", "", int))
    return FunctionProblem("loop", parts, rng.choice(ENTRY_POINTS), argument, docstring, body, meaning)


def _list_arguments(family: str, rng: random.Random) -> list[list[Any]]:
    if family == "words":
        return [[], *(rng.sample(VOCABULARY, 12) for _ in range(2)), rng.sample(VOCABULARY, len(VOCABULARY)) * 2]
    every_number = list(range(-4, 13))
    rng.shuffle(every_number)
    singles = [[number] for number in range(2, 10)]
    return [
        [],
        *singles,
        every_number + every_number[:5],
        *([rng.randint(-20, 40) for _ in range(8)] for _ in range(2)),
    ]


def _number_arguments(rng: random.Random) -> list[int]:
    return [0, *range(1, 13), rng.randint(13, 30), rng.randint(31, 60)]
