"""Compact letters: methods that share a letter are not significantly different."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def compact_letters(count: int, different: Collection[tuple[int, int]]) -> list[str]:
    """Letters of `count` things so that two of them share one exactly where they are not in `different`.

    Piepho 2004: start with one group of all; every significant pair splits the groups that hold both into one without either;
    groups within another are absorbed. Groups are lettered by their first members, so that things in descending order read
    "a", "ab", "b".

    Args:
        count: number of things, named 0 … count − 1.
        different: pairs that are significantly different, in any order.

    Returns:
        A text of letters for each thing; after "z" come "aa", "ab", … which are set off by dots ("a.z.aa").
    """
    groups = [frozenset(range(count))]
    for one, other in sorted((min(pair), max(pair)) for pair in different):
        groups = [part for group in groups for part in _split(group, one, other)]
        groups = _absorbed(groups)
    ordered = sorted(groups, key=sorted)
    names = [_letter(index) for index in range(len(ordered))]
    separator = "" if len(ordered) <= 26 else "."
    return [separator.join(name for name, group in zip(names, ordered, strict=True) if index in group) for index in range(count)]


def _split(group: frozenset[int], one: int, other: int) -> list[frozenset[int]]:
    return [group - {one}, group - {other}] if {one, other} <= group else [group]


def _absorbed(groups: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Without those that lie within another; each once."""
    distinct = list(dict.fromkeys(groups))
    return [group for group in distinct if not any(group < other for other in distinct)]


def _letter(index: int) -> str:
    """0 → "a", 25 → "z", 26 → "aa"."""
    rest, last = divmod(index, 26)
    return (_letter(rest - 1) if rest else "") + chr(ord("a") + last)
