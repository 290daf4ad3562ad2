"""The checker's process: it runs the trusted checks against the values of an untrusted answer.

The server (`answer_server`) forks it once per program. It never executes a line of the answer: it asks the answer's process
(`answer_process`) over a socket, and what it reads there becomes plain values, or numbers that stand for the answer's objects.
"""

from __future__ import annotations

import builtins
import contextlib
import decimal
import fractions
import importlib
import json
import marshal
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from gsil_bench.tasks.confinement import CHECKS_FILE, MEBIBYTE, describe, die_with_parent, limit, printable
from gsil_bench.tasks.programs import CheckedProgram, free_names

LONGEST_MESSAGE = 32 * MEBIBYTE
CHECKER_SECONDS = 30


def run_checker(stream: socket.socket, program: CheckedProgram, report: int) -> NoReturn:
    """The whole life of the checker's process.

    Args:
        stream: the channel to the answer's process.
        program: what to run.
        report: descriptor for the outcome, one JSON text.
    """
    message: dict[str, Any] = {"reason": "the checker failed"}
    try:
        die_with_parent()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        # The checks are trusted, but an answer may send values that take for ever to compare.
        signal.setitimer(signal.ITIMER_PROF, CHECKER_SECONDS)
        limit("RLIMIT_AS", 4096 * MEBIBYTE)
        message = _check(stream, program)
    except BaseException as error:
        message = {"reason": f"the checker failed: {type(error).__name__}"}
    finally:
        with contextlib.suppress(BaseException):
            text = {**message, "reason": printable(str(message.get("reason", "")))}
            os.write(report, json.dumps(text).encode())
        os._exit(0)


def _check(stream: socket.socket, program: CheckedProgram) -> dict[str, Any]:
    """Run an answer and its checks; what to report."""
    channel = _Channel(stream)
    part = "answer"
    try:
        channel.ask("run", program.answer)
        part = "setup"
        if program.setup:
            channel.ask("run", program.setup)
        part = "checks"
        code = compile(program.checks, CHECKS_FILE, "exec", dont_inherit=True, optimize=0)
        exec(code, _space(channel, program))
    except _AnswerEnded:
        return {"ended": True}
    except BaseException as error:
        said = channel.raised.get(id(error))
        reason = _describe_remote(said, part) if said else describe(error, "", program.checks)
        if channel.own_equality:
            reason = f"an object of the answer's class {channel.own_equality} with its own __eq__ was compared; {reason}"
        return {"reason": reason, "integrity_flag": bool(channel.own_equality)}
    return {"passed": True, "integrity_flag": bool(channel.own_equality)}


def _space(channel: _Channel, program: CheckedProgram) -> dict[str, Any]:
    """The namespace of the checks: the answer's names, as far as they ask for them."""
    space: dict[str, Any] = {"__name__": "checks"}
    for name, data in channel.ask("names", free_names(program.checks, program.exports)).items():
        if isinstance(data, list) and data[0] == "module":
            if data[1] in sys.stdlib_module_names:  # the checks rely on an import of the answer; theirs is their own
                space[name] = importlib.import_module(data[1])
        else:
            space[name] = channel.decode(data)
    return space


def _describe_remote(said: Mapping[str, Any], part: str) -> str:
    """An exception of the answer in words."""
    if said["error"] == "MemoryError":
        return "out of memory"
    words = f": {said['words']}" if said["words"] else ""
    place = f": line {said['line']}" + (" of the setup" if part == "setup" else "") if said["line"] else ""
    return f"{said['error']}{place}{words}"


class _AnswerEnded(Exception):
    """The answer's process has closed its end of the channel."""


class _Foreign(Exception):
    """An exception of the answer, of a class that Python does not have."""


def _exception(name: str, words: str) -> Exception:
    """An exception of the built-in class of that name, if there is one that can be made of words alone."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError | ExceptionGroup):
        return kind(words)
    return _Foreign(words)


class _Channel:
    """The checker's side of the channel to an answer."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._lines = stream.makefile("rb")
        self.own_equality = ""
        """The class whose `__eq__` a comparison would have run; "" if none."""
        self.raised: dict[int, dict[str, Any]] = {}
        """Exception (by identity) → what the answer's process said of it."""

    def ask(self, what: str, *values: Any) -> Any:
        """One wish and its reply. An exception in the answer is raised here, of the same built-in class if it has one."""
        try:
            wish = marshal.dumps([what, list(values)])
            self._stream.sendall(len(wish).to_bytes(8, "big") + wish)
            line = self._lines.readline(LONGEST_MESSAGE)
        except OSError as error:
            raise _AnswerEnded from error
        if not line.endswith(b"\n"):
            raise _AnswerEnded
        reply = json.loads(line)
        if "error" not in reply:
            return reply["value"]
        failure = _exception(str(reply["error"]), str(reply["words"]))
        self.raised[id(failure)] = {**reply, "held": failure}  # held, so that no other exception gets its identity
        raise failure

    def operate(self, what: str, target: Any, values: Sequence[Any] = (), options: Mapping[str, Any] | None = None) -> Any:
        """An operation on a value of the answer; arguments that it changed are changed here too."""
        result, after = self.ask("operate", what, target, [_encode(v) for v in values], _encode(dict(options or {})))
        for value, new in zip(values, after, strict=True):
            if new is not None:
                changed = self.decode(new)
                value.clear()
                value.extend(changed) if isinstance(value, list) else value.update(changed)
        return self.decode(result)

    def decode(self, data: Any) -> Any:
        """A value that the answer sent."""
        if not isinstance(data, list):
            return data
        kind, *rest = data
        many: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
        if kind in many:
            return many[kind](self.decode(entry) for entry in rest[0])
        if kind == "dict":
            return {self.decode(key): self.decode(entry) for key, entry in rest[0]}
        simple: dict[str, Callable[..., Any]] = {
            "int": lambda text: int(text, 16),
            "bytes": bytes.fromhex,
            "complex": complex,
            "range": lambda *ends: range(*map(self.decode, ends)),
            "type": lambda name: TYPES[name],
            "text": lambda module, name, text: BY_TEXT[name](text),
            "object": lambda number, name, own: RemoteObject(self, number, str(name), bool(own)),
        }
        return simple[kind](*rest)


BY_TEXT: Mapping[str, Callable[[str], Any]] = {"Fraction": fractions.Fraction, "Decimal": decimal.Decimal}
TYPES: Mapping[str, type] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, type(None))
}


class RemoteObject:
    """An object that stays in the answer's process. What the checks do with it is done there; comparing it is not."""

    def __init__(self, channel: _Channel, number: int, name: str, own_equality: bool) -> None:
        self._channel, self._name, self._own_equality = channel, name, own_equality
        self._data = ["object", number]

    def __call__(self, *values: Any, **options: Any) -> Any:
        """What calling it gives."""
        return self._channel.operate("call", self._data, values, options)

    def __iter__(self) -> Iterator[Any]:
        values: list[Any] = self._channel.operate("list", self._data)
        return iter(values)

    def __next__(self) -> Any:
        return self._channel.operate("next", self._data)

    def __len__(self) -> int:
        return int(self._channel.operate("len", self._data))

    def __bool__(self) -> bool:
        return bool(self._channel.operate("bool", self._data))

    def __str__(self) -> str:
        return str(self._channel.operate("str", self._data))

    def __getitem__(self, key: Any) -> Any:
        return self._channel.operate("item", self._data, [key])

    def __contains__(self, value: Any) -> bool:
        return bool(self._channel.operate("in", self._data, [value]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._channel.operate("attribute", self._data, [name])

    def __eq__(self, other: object) -> bool:
        """Whether it is the same object: the answer's own idea of equality is not asked."""
        if isinstance(other, RemoteObject):
            return self._data == other._data
        if self._own_equality:
            self._channel.own_equality = self._name
        return False

    def __hash__(self) -> int:
        return hash(tuple(self._data))


def _encode(value: Any) -> Any:
    """A value of the checks as the answer's process reads it."""
    if isinstance(value, RemoteObject):
        return value._data
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if value.bit_length() < 64 else ["int", hex(value)]
    if kind in (list, tuple, set, frozenset):
        return [kind.__name__, [_encode(entry) for entry in value]]
    if isinstance(value, dict):
        return ["dict", [[_encode(key), _encode(entry)] for key, entry in value.items()]]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is range:
        return ["range", *map(_encode, (value.start, value.stop, value.step))]
    if kind is type and value.__name__ in TYPES:
        return ["type", value.__name__]
    if kind.__name__ in BY_TEXT:
        return ["text", kind.__module__, kind.__name__, str(value)]
    raise TypeError(f"the checks give the answer a {kind.__name__}, which cannot be sent to it")
