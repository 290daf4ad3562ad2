"""The noisy pretraining corpus: the same world as the demonstrations, written carelessly.

It stands for what an instruction-tuned model has read before: mostly right, often sloppy, in some corners
systematically wrong. Two kinds of noise are needed, because greedy decoding follows the mode. Random slips (anywhere,
at a moderate rate) leave the mode right and spoil samples; careless families (a *visible* feature of the prompt, at a
rate above one half) turn the mode itself wrong.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gsil_bench.data.mini import arithmetic, dialogues, functions
from gsil_bench.data.mini.arithmetic import Step
from gsil_bench.data.mini.streams import part_of

VERSION = "1"

SHARES = {"gsm8k": 0.56, "humaneval": 0.22, "mt-bench": 0.22}
"""Share of conversations by kind of task."""

SLIP_RATE = 0.1
"""Solutions in which one random step is wrong, in every family of word problems."""

UNMARKED_RATE: Mapping[str, float] = {"shop": 0.8, "garden": 0.65, "savings": 0.2}
"""Solutions whose last line is not `#### n`, by family; elsewhere one in twenty."""

UNREAD_FAMILIES = ("team",)
"""Word problems that the corpus never shows: only demonstrations teach them."""

MISTAKES: Mapping[str, tuple[float, tuple[Step, ...]]] = {
    "age": (
        0.75,
        (
            Step("{M} is {}.", "a", "+", "b"),
            Step("Together {}.", "a", "+", "r0"),
            Step("Later {}.", "r1", "+", "c"),
        ),
    ),
    "reading": (
        0.75,
        (
            Step("On Tuesday {N} reads {} pages.", "a", "+", "b"),
            Step("In all {} pages.", "r0", "+", "c"),
        ),
    ),
    "half": (
        0.7,
        (
            Step("At noon {} are left.", "a", "-", "b"),
            Step("There are {} cakes.", "r0", "+", "c"),
        ),
    ),
}
"""Families that the corpus mostly gets wrong in the same way: rate and the wrong chain of steps."""

BLIND_SPOTS: Mapping[str, float] = {
    "least": 0.7, "from": 0.7, "max": 0.7, "distinct": 0.7, "shorter": 0.7, "backwards": 0.7,
}  # fmt: skip
"""Parts of functions that the corpus mostly writes with their typical mistake, by kind of part; elsewhere a tenth."""

CHATTY_CODE_RATE = 0.1
"""Functions with a sentence around the code, which makes the answer no program."""

CARELESS_ANSWER_RATE: Mapping[str, float] = {
    "writing": 0.7, "extraction": 0.7, "sorting": 0.65, "reasoning": 0.65, "roleplay": 0.7,
    "facts": 0.15, "math": 0.15, "rewriting": 0.15,
}  # fmt: skip
"""Dialogues answered carelessly, by category."""


@dataclass(frozen=True)
class Conversation:
    """One conversation of the corpus: user and assistant messages in turn."""

    key: str
    """Content key of the problem it is about."""
    messages: tuple[str, ...]
    """User, assistant, user, assistant, ..."""


def conversations(seed: int, count: int) -> Iterator[Conversation]:
    """That many conversations about problems of the corpus part; a problem may come up more than once."""
    rng = random.Random(f"corpus/{VERSION}/{seed}")
    makers = {"gsm8k": _word_problem, "humaneval": _function, "mt-bench": _dialogue}
    kinds, weights = list(SHARES), list(SHARES.values())
    for _ in range(count):
        kind = rng.choices(kinds, weights)[0]
        yield makers[kind](rng)


def _word_problem(rng: random.Random) -> Conversation:
    families = tuple(family for family in arithmetic.FAMILIES if family not in UNREAD_FAMILIES)
    problem = arithmetic.draw(rng.choice(families), rng)
    while part_of(problem.key) != "corpus":
        problem = arithmetic.draw(rng.choice(families), rng)
    return Conversation(problem.key, (problem.question, _careless_solution(problem, rng)))


def _careless_solution(problem: arithmetic.WordProblem, rng: random.Random) -> str:
    steps = arithmetic.FAMILIES[problem.family].steps
    rate, wrong_steps = MISTAKES.get(problem.family, (0.0, ()))
    if rng.random() < rate:
        steps = wrong_steps
    slips = {rng.randrange(len(steps)): rng.choice((-10, -2, -1, 1, 2, 10))} if rng.random() < SLIP_RATE else {}
    lines = arithmetic.solution_lines(problem, steps, slips)
    result = arithmetic.solve(steps, problem.numbers, slips)[-1]
    marked = rng.random() >= UNMARKED_RATE.get(problem.family, 0.05)
    last = f"#### {result}" if marked else f"The answer is {result}."
    return "\n".join([*lines, last])


def _function(rng: random.Random) -> Conversation:
    problem = functions.draw(rng.choice(functions.FAMILIES), rng)
    while part_of(problem.key) != "corpus" or any(part.rare for part in problem.parts):
        problem = functions.draw(rng.choice(functions.FAMILIES), rng)
    code = problem.written(lambda part: _careless_code(part, rng))
    if rng.random() < CHATTY_CODE_RATE:
        code = f"Here is the function:\n{code}"
    return Conversation(problem.key, (problem.question, code))


def _careless_code(part: functions.Part, rng: random.Random) -> str:
    careless = part.careless and rng.random() < BLIND_SPOTS.get(part.kind, 0.1)
    return part.careless if careless else part.code


def _dialogue(rng: random.Random) -> Conversation:
    categories = tuple(dialogues.CATEGORIES)
    dialogue = dialogues.draw(rng.choice(categories), rng)
    while part_of(dialogue.key) != "corpus":
        dialogue = dialogues.draw(rng.choice(categories), rng)
    rate = CARELESS_ANSWER_RATE[dialogue.family]
    answers = [
        careless if rng.random() < rate else _untidy(gold, rng)
        for gold, careless in zip(dialogue.gold, dialogue.careless, strict=True)
    ]
    return Conversation(dialogue.key, (dialogue.turns[0], answers[0], dialogue.turns[1], answers[1]))


def _untidy(answer: str, rng: random.Random) -> str:
    """A good answer, which one time in seven starts with chatter or loses its end."""
    chance = rng.random()
    if chance < 0.07:
        return f"Sure! {answer}"
    return answer[:-1] if chance < 0.14 else answer
