"""Measures of a summary: sentences, ROUGE, repetition, copying, and what may be done to a text before it is measured.

Words are runs of letters and digits, in lower case; punctuation and line breaks are none. Only ROUGE has words of its own: those
of rouge-score, which are ASCII only and stemmed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from gsil_bench.errors import library

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
CLOSERS = re.escape("\"'”’»)]}*_")
"""May stand between a stop and the space after it."""
OPENERS = re.escape("\"'“‘«([{*_¿¡")
"""May stand between the space and the first letter."""
# A run of stops with what closes after it, before a space or the end.
STOP = re.compile(rf"(?<![.!?…])(?P<mark>[.!?…]++)[{CLOSERS}]*+(?=\s|\Z)")
NEXT = re.compile(rf"\s*[{OPENERS}]*(?P<letter>.?)")
TOKEN = re.compile(rf"[{OPENERS}]*(?P<token>.*)")
WORD = re.compile(r"[^\W_]+")
ABBREVIATION = re.compile(
    r"e\.g|i\.e|cf|vs|viz|(?:et\.)?al|approx|resp|incl|w\.r\.t|a\.k\.a|i\.i\.d|ph\.d"
    r"|mr|mrs|ms|dr|prof|st|jr|sr|inc|ltd|dept|est",
    re.IGNORECASE,
)
"""Without its last stop, which never ends a sentence. "etc" is not among them: it often does."""
BEFORE_NUMBER = re.compile(r"nos?|figs?|eqs?|eqn|secs?|ch|tab|pp?|vol|art|refs?|thm", re.IGNORECASE)
"""An abbreviation where a digit follows, a word elsewhere: "No. 5", but "No. It is not."."""
INITIALS = re.compile(r"(?:[A-Za-z]\.-?)*[A-Z]")
"""Of a name or a country, without the last stop: "J. Smith", "U.S. trade"."""
LIST_NUMBER = re.compile(r"\W*[0-9]{1,3}")
END_MARKS = (
    "<|end|>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>",
    "<|user|>", "<|assistant|>", "<|im_start|>", "\nUser:", "\nHuman:", "\n### Instruction",
)  # fmt: skip
"""How the end of an answer, or the beginning of another turn, is spelled in text. A model's own end token is in no text."""
EMPTY_LINE = re.compile(r"\n[^\S\n]*\n")


class LearnedMetric(Protocol):
    """A measure that a trained model computes from two texts."""

    @property
    def identity(self) -> str:
        """Name, weights and settings: scores are comparable exactly where these are equal."""

    def score(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """One number per candidate, against the references that suit it best.

        Args:
            candidates: the texts to measure.
            references: references[i] are the acceptable texts for candidates[i], one or more.
        """


@dataclass(frozen=True)
class Rouge:
    """F1 of the four measures, from 0 to 1."""

    rouge1: float
    rouge2: float
    rougeL: float
    rougeLsum: float
    best: int
    """Index of the reference with the highest ROUGE-L; the first of equals."""


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, in lower case."""
    return WORD.findall(text.lower())


# --- sentences -----------------------------------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without the white space around them.

    A sentence ends at a line break, and at ".", "!", "?" or "…" before white space (quotes and brackets may close in between),
    unless a lower-case letter follows, or the full stop belongs to an abbreviation, an initial or a number that opens a line.
    Where a stop may be either ("in the U.S. The law"), there is no end: a sentence too long is better than a torn one.
    """
    return [sentence for line in text.splitlines() for sentence in _split_line(line.strip()) if sentence]


def _split_line(line: str) -> list[str]:
    found, start = [], 0
    for stop in STOP.finditer(line):
        if _ends_sentence(line, start, stop):
            found.append(line[start : stop.end()].strip())
            start = stop.end()
    return [*found, line[start:].strip()]


def _ends_sentence(line: str, start: int, stop: re.Match[str]) -> bool:
    """Whether a stop ends the sentence that begins at `start`. Only the word before it and the letter after it are looked at."""
    following = NEXT.match(line, stop.end())
    letter = following["letter"] if following else ""
    if letter.islower():
        return False
    if stop["mark"] != ".":
        return True
    found = TOKEN.match(line, max(start, line.rfind(" ", start, stop.start()) + 1), stop.start())
    token = found["token"] if found else ""
    numbered = BEFORE_NUMBER.fullmatch(token) is not None and letter.isdecimal()
    initial = bool(letter) and INITIALS.fullmatch(token) is not None
    opens_line = LIST_NUMBER.fullmatch(line, 0, stop.start()) is not None
    return not (ABBREVIATION.fullmatch(token) or numbered or initial or opens_line)


def is_finished(text: str) -> bool:
    """Whether a text ends where a sentence ends: in a stop that is not an abbreviation's. An empty text does not."""
    line = "".join(text.rstrip().splitlines()[-1:]).strip()
    stop = next((stop for stop in STOP.finditer(line) if stop.end() == len(line)), None)
    return stop is not None and _ends_sentence(line, 0, stop)


# --- what may be done to a text before it is measured --------------------------------------------------------------------------


def as_it_is(text: str) -> str:
    """The text, without the white space around it."""
    return text.strip()


def cut_at_first_stop(text: str) -> str:
    """The first sentence of the first line: what a model says before its first stop or line break."""
    return next(iter(sentences(text)), "")


def drop_repeats(text: str) -> str:
    """Without the sentences that have the same words as an earlier one; one sentence per line.

    A loop inside a sentence stays, for it has no stop.
    """
    kept: dict[tuple[str, ...], str] = {}
    for sentence in sentences(text):
        kept.setdefault(tuple(words(sentence)), sentence)
    return "\n".join(kept.values())


def drop_unfinished(text: str) -> str:
    """Without a last sentence that has no end; one sentence per line. A text of one sentence stays: nothing would be left."""
    found = sentences(text)
    return "\n".join(found if len(found) < 2 or is_finished(found[-1]) else found[:-1])


def first_paragraph(text: str) -> str:
    """What stands before the first empty line or spelled end of an answer (END_MARKS)."""
    text = text.strip()
    ends = [place for mark in END_MARKS if (place := text.find(mark)) >= 0]
    line = EMPTY_LINE.search(text)
    return text[: min([*ends, line.start() if line else len(text)])].strip()


def post_processed(text: str) -> str:
    """The first paragraph without repeated sentences, and then without a last sentence that is not finished."""
    return drop_unfinished(drop_repeats(first_paragraph(text)))


# --- measures ------------------------------------------------------------------------------------------------------------------


def rouge(text: str, references: Sequence[str]) -> Rouge:
    """ROUGE of a text by rouge-score: its words (a-z and 0-9, others separate them), Porter's stemmer on.

    Each measure is the highest F1 over the references, as `RougeScorer.score_multi` does it: two measures of one text may be
    against different references. For ROUGE-Lsum the sentences of both sides are those of `sentences`, one per line; the others
    do not see line breaks.

    Raises:
        UserError: rouge-score is not installed.
    """
    candidate = "\n".join(sentences(text))
    scores = [_scorer().score("\n".join(sentences(reference)), candidate) for reference in references]
    f1 = {name: [float(score[name].fmeasure) for score in scores] for name in ROUGE_TYPES}
    return Rouge(**{name: max(values) for name, values in f1.items()}, best=f1["rougeL"].index(max(f1["rougeL"])))


def rouge_l(text: str, reference: str) -> float:
    """F1 of ROUGE-L over the words of two texts, without a stemmer: 2 · (their longest common subsequence) / (words of both).

    The measure of the embedded suite, which needs no library. 0 if either has no words.
    """
    one, two = words(text), words(reference)
    lengths = [0] * (len(two) + 1)  # of the common subsequence of what was read of `one` and the first words of `two`
    for word in one:
        diagonal = 0
        for place, other in enumerate(two, start=1):
            longest = diagonal + 1 if word == other else max(lengths[place], lengths[place - 1])
            diagonal, lengths[place] = lengths[place], longest
    return 2 * lengths[-1] / (len(one) + len(two)) if one and two else 0.0


@cache
def _scorer() -> Any:
    library("rouge_score", "ROUGE")
    return library("rouge_score.rouge_scorer", "ROUGE").RougeScorer(list(ROUGE_TYPES), use_stemmer=True)


def has_rouge_words(text: str) -> bool:
    """Whether ROUGE finds a word in a text; without one it is 0 for every answer."""
    return re.search("[a-z0-9]", text.lower()) is not None


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def repeated_share(text: str, n: int) -> float:
    """Share of a text's n-grams of words that stood in it before: 0 if all differ. 0 for a text of fewer than n words."""
    found = _ngrams(words(text), n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def copied_share(text: str, document: str, n: int) -> float:
    """Share of a text's n-grams of words that the document has. 0 for a text of fewer than n words."""
    found, known = _ngrams(words(text), n), set(_ngrams(words(document), n))
    return sum(ngram in known for ngram in found) / len(found) if found else 0.0


def longest_copy(text: str, document: str) -> int:
    """Number of words of the longest run that text and document share."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, word in enumerate(words(document)):
        places[word].append(place)
    longest, runs = 0, dict[int, int]()  # place in the document → length of the shared run that ends there
    for word in words(text):
        runs = {place: runs.get(place - 1, 0) + 1 for place in places.get(word, ())}
        longest = max(longest, max(runs.values(), default=0))
    return longest


def described(text: str, document: str, summary: str) -> dict[str, Any]:
    """What may be wrong with a summary, in numbers.

    Returns:
        length_ratio (words per word of `summary`); repeated_n and copied_n (shares of its n-grams that it said before, or that
        the document has; n is 3 and 4); longest_copy (words of the longest run it shares with the document); finished (it ends
        where a sentence ends); empty.
    """
    found: dict[str, Any] = {"length_ratio": len(words(text)) / len(words(summary))}
    for n in (3, 4):
        found |= {f"repeated_{n}": repeated_share(text, n), f"copied_{n}": copied_share(text, document, n)}
    return found | {"longest_copy": longest_copy(text, document), "finished": is_finished(text), "empty": not text.strip()}
