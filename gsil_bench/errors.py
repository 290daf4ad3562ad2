"""Errors that a user can mend: one line that says what, where and what to do, and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from typing import Any


class UserError(ValueError):
    """Bad input. The command prints the message as one line and exits with code 2."""


class UnavailableError(UserError):
    """What one task needs is not here or is not what it should be: a library, a data file. Other tasks can go on without it."""


class MissingLibraryError(UnavailableError):
    """A library is not installed, or does not work here."""


class StoreError(UserError):
    """The folder of results and artefacts cannot be written: nothing that follows could be kept."""


def library(name: str, what: str) -> Any:
    """A library that is not always there; `what` needs it.

    Raises:
        MissingLibraryError: it is not installed, or does not work here.
    """
    try:
        return import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # a build for another GPU fails with the latter two
        raise MissingLibraryError(f"{what} needs {name}: pip install {name} ({' '.join(str(error).split())[:200]})") from error


def unknown_name(what: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list, offering the nearest one.

    Args:
        what: what the name should be, for the message ("method", "task", "key in mini.yaml").
        name: the name that was given.
        known: the names that exist.
    """
    names = sorted(map(str, known))
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f": did you mean {nearest[0]!r}?" if nearest else "."
    return UserError(f"unknown {what} {name!r}{hint} Known: {', '.join(names) or 'none'}")
