"""What runs inside the process of an untrusted answer: it defines the answer's names and calls them for the checker.

The checker (see `gsil_bench.tasks.programs`) is another process. It sends a marshalled wish over descriptor 3, after its length
in eight bytes, and gets one line of JSON back: what it reads must not be able to harm it. Values cross as plain data: an object
of the answer's own class stays here and the checker gets a number for it, so no method of the answer ever runs in the process
that decides. Nothing secret is here: not the checks, not the expected values.

This file is passed to a bare interpreter, compiled, so it imports only the standard library, and of that only what is built in:
every program pays for it. Its arguments are a folder (or "") that it enters when its first wish arrives (before, it may
hold another answer's files), and the folders of installed packages.
"""

from __future__ import annotations

import marshal
import os
import sys
from _json import encode_basestring_ascii

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CHANNEL = 3
ANSWER_FILE = "<answer>"
ATOMS = (type(None), bool, float, str)
CONTAINERS: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
TYPES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, type(None))
# Only those that the checker may make from its own standard library, and whose text says everything.
BY_TEXT = {("fractions", "Fraction"), ("decimal", "Decimal")}


class _Mirror:
    """Turns values into JSON and back; keeps what has no plain form, by number."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def encode(self, value: Any) -> Any:
        """A value as JSON: itself if JSON has it, else a list whose first entry names the kind."""
        kind = type(value)
        if kind in ATOMS:
            return value
        if kind is int:
            return value if value.bit_length() < 64 else ["int", hex(value)]
        if kind in CONTAINERS:
            return [CONTAINERS[kind], [self.encode(entry) for entry in value]]
        if kind is dict:
            return ["dict", [[self.encode(key), self.encode(entry)] for key, entry in value.items()]]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is range:
            return ["range", *map(self.encode, (value.start, value.stop, value.step))]
        return self._encode_other(value, kind)

    def _encode_other(self, value: Any, kind: type) -> Any:
        if kind is type and any(value is known for known in TYPES):
            return ["type", value.__name__]
        if _equality_is_the_answers(kind):
            return self._keep(value, own_equality=True)
        if (kind.__module__, kind.__name__) in BY_TEXT:
            return ["text", kind.__module__, kind.__name__, str(value)]
        if kind.__module__ == "numpy" and hasattr(value, "item") and not hasattr(value, "__len__"):
            return self.encode(value.item())
        # A Counter equals a dict, a named tuple a tuple, an IntEnum an int: what crosses is the plain value.
        for base in (bool, int, float, str, bytes, complex, list, tuple, set, frozenset, dict):
            if isinstance(value, base):
                return self.encode(_plain(base, value))
        return self._keep(value, own_equality=False)

    def _keep(self, value: Any, own_equality: bool) -> Any:
        for number, known in enumerate(self.kept):
            if known is value:
                return ["object", number, type(value).__name__, own_equality]
        self.kept.append(value)
        return ["object", len(self.kept) - 1, type(value).__name__, own_equality]

    def decode(self, data: Any) -> Any:
        """The value of what `encode` or the checker made."""
        if not isinstance(data, list):
            return data
        kind, *rest = data
        if kind == "object":
            return self.kept[rest[0]]
        if kind == "dict":
            return {self.decode(key): self.decode(entry) for key, entry in rest[0]}
        for container, name in CONTAINERS.items():
            if kind == name:
                return container([self.decode(entry) for entry in rest[0]])
        return self._decode_atom(kind, rest)

    def _decode_atom(self, kind: str, rest: list[Any]) -> Any:
        if kind == "int":
            return int(rest[0], 16)
        if kind == "bytes":
            return bytes.fromhex(rest[0])
        if kind == "complex":
            return complex(*rest)
        if kind == "range":
            return range(*map(self.decode, rest))
        if kind == "text":
            return getattr(__import__(rest[0]), rest[1])(rest[2])
        return next(known for known in TYPES if known.__name__ == rest[0])


def _plain(base: Any, value: Any) -> Any:
    """The part of an object that its built-in base holds, whatever methods its class has put over it."""
    if base in (list, tuple, set, frozenset):
        return base(base.__iter__(value))
    if base is dict:
        return dict(dict.items(value))
    return {int: int.__index__, float: float.__float__, str: str.__str__, bytes: bytes.__bytes__}.get(base, base)(value)


def _equality_is_the_answers(kind: type) -> bool:
    """Whether == on such an object runs code that neither the interpreter nor an installed library brought."""
    for base in type.__dict__["__mro__"].__get__(kind):
        method = type.__dict__["__dict__"].__get__(base).get("__eq__")
        if method is not None:
            code = getattr(method, "__code__", None)
            return code is not None and not (os.path.isabs(code.co_filename) or code.co_filename.startswith("<frozen "))
    return False


def _line(error: BaseException) -> int:
    """The last line of the answer that an exception came through; 0 if none."""
    line, traceback = getattr(error, "lineno", None) or 0, error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename == ANSWER_FILE:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line if isinstance(line, int) else 0


def _error(error: BaseException) -> dict[str, Any]:
    """What the checker is told of an exception. Errors of the system speak of this machine's paths, so they lose their words."""
    words = ""
    if isinstance(error, SyntaxError):
        words = str(error.msg)
    elif not isinstance(error, (OSError, ImportError)) or isinstance(error, ModuleNotFoundError):
        try:
            words = str(error)[:500]
        except BaseException:  # an exception may hold values whose text is too long or too deep to make
            words = ""
    return {"error": type(error).__name__, "words": words, "line": _line(error)}


def _json(data: Any) -> str:
    """JSON of lists, dictionaries with texts as keys, and atoms. The module json would cost more than most programs."""
    if data is None or data is True or data is False:
        return {None: "null", True: "true", False: "false"}[data]
    if isinstance(data, str):
        return encode_basestring_ascii(data)
    if isinstance(data, list):
        return "[" + ",".join([_json(entry) for entry in data]) + "]"
    if isinstance(data, dict):
        return "{" + ",".join([f"{encode_basestring_ascii(key)}:{_json(entry)}" for key, entry in data.items()]) + "}"
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(repr(data), repr(data))


def _read(count: int) -> bytes:
    """So many bytes from the checker; fewer if it is gone."""
    parts = []
    while count and (part := os.read(CHANNEL, min(count, 1 << 20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class _Answer:
    """The answer's module and what the checker may ask of it."""

    def __init__(self) -> None:
        self.mirror = _Mirror()
        # A module of its own in sys.modules: dataclasses and pickle look there. Its name is not "__main__", as in human-eval.
        self.module = type(os)("answer")
        sys.modules["answer"] = self.module
        self.space = self.module.__dict__

    def run(self, source: str) -> None:
        """Execute text in the answer's namespace."""
        exec(compile(source, ANSWER_FILE, "exec", dont_inherit=True, optimize=0), self.space)

    def names(self, wanted: list[str]) -> dict[str, Any]:
        """The values of those names that the answer has. Of a module only its name crosses."""
        found = {}
        for name in wanted:
            if name in self.space:
                value = self.space[name]
                found[name] = ["module", value.__name__] if isinstance(value, type(os)) else self.mirror.encode(value)
        return found

    def operate(self, what: str, target: Any, values: list[Any], options: Any) -> Any:
        """One operation on a value of the answer: call it, iterate over it, read an attribute. Then its result, and the
        arguments as they are afterwards if they can have changed.
        """
        thing, given = self.mirror.decode(target), [self.mirror.decode(value) for value in values]
        operations: dict[str, Callable[[], Any]] = {
            "call": lambda: thing(*given, **self.mirror.decode(options)),
            "list": lambda: list(thing),
            "next": lambda: next(thing),
            "len": lambda: len(thing),
            "bool": lambda: bool(thing),
            "str": lambda: str(thing),
            "item": lambda: thing[given[0]],
            "in": lambda: given[0] in thing,
            "attribute": lambda: getattr(thing, given[0]),
        }
        result = self.mirror.encode(operations[what]())
        after = [self.mirror.encode(value) if isinstance(value, (list, dict, set)) else None for value in given]
        return [result, [None if new == old else new for new, old in zip(after, values, strict=True)]]


def main() -> None:
    """Serve the checker until it closes the channel."""
    os.set_inheritable(CHANNEL, False)
    os.environ.clear()
    folder = sys.argv[1]
    sys.path += sys.argv[2:]
    sys.argv[:] = [""]
    answer, text, read, loads, write, end = _Answer(), _json, _read, marshal.loads, os.write, os._exit
    while len(length := read(8)) == 8:
        if folder:
            os.chdir(folder)
            folder = ""
        try:
            what, values = loads(read(int.from_bytes(length, "big")))
            reply = text({"value": getattr(answer, what)(*values)})
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: whatever the answer raises is its failure
            reply = text(_error(error))
        rest = reply.encode() + b"\n"
        while rest:
            rest = rest[write(CHANNEL, rest) :]
    end(0)


if __name__ == "__main__":
    main()
