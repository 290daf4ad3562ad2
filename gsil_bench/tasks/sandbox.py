"""Run untrusted programs: `run_restricted` runs a small subset of Python that needs no consent from the user.

Two walls stand around a program, and each is built to hold without the other. The first is known to leak: the interpreter has
bugs through which a program of the language can write over its memory. Two were found in review and their spellings are refused
(`_objection`, `_copying_reversed`); more surely exist. So containment rests on the second.

1. The language. A program is parsed and checked against lists of what is allowed (`NODES`, `METHODS`, `BUILTINS`); everything
   else is refused: imports, classes, decorators, names with a double underscore, attributes other than methods of plain values.
   It runs with `__builtins__` reduced to the same list, so a name that slips through the check still leads nowhere.
2. The process. Parsing and running happen in a process of the program's own: limits on processor time, memory, file size and
   processes, no descriptor to be opened, no environment, no standard streams, no network where the kernel allows dropping it, no
   root rights, no capabilities; an empty folder is its root directory where the kernel allows that (on Linux for root, and for
   others who may make user namespaces). It is killed with its process group when it is done or late. Elsewhere it keeps the
   user's view of the file system: it can open nothing, but what needs no descriptor (to delete, rename, look at) is the user's.

A program is an answer and its checks. They are parsed apart, so an answer cannot swallow a check with an open bracket or a
backslash, and they run in separate namespaces, so an answer cannot redefine a built-in function that a check calls. A program
has passed only if the process reports, after the last check, a random word made for this run, which the language cannot read.

What this does not do:

- An answer that recognises the checked arguments and returns the expected values passes.
- So does one that returns `True` or `1.0` for 1, because `==` says so.
- Checks must not name their entry point like a built-in function (`sum`): they would call that one. They must not compute what
  they expect from an object that they gave to the answer, which may have changed it.
- Checks must not use a name that nothing defines: the answer may define it, say an `isclose` that is always true.
- `all(map(f, xs))` passes if the answer raises StopIteration, which ends the map; `all(f(x) for x in xs)` does not.
- `!=` passes for whatever is different, even for values that the answer was never to return.
- `in` passes for an answer that yields everything without end.
- A program without checks passes if it runs to its end, and so does one that broke out of the language: it can find the word.
- The second wall is no filter of system calls: a program that broke out may signal other processes of the uid it has.
- From Python 3.12 on, dividing integers of more than about 8,000 digits fails, because the interpreter imports its helper through
  the reduced built-in functions.

How it is fast: each worker is one fresh interpreter that runs `serve` and forks once per program. The caller, which may hold
torch, threads and a GPU, is never forked. That interpreter has no folders of installed packages, so what this file imports needs
nothing but the standard library.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import itertools
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import CodeType
from typing import Any, NoReturn

from gsil_bench.errors import UserError
from gsil_bench.tasks.confinement import (
    ANSWER_FILE,
    CHECKS_FILE,
    MEBIBYTE,
    NOBODY,
    ROOT,
    START_SECONDS,
    Worker,
    c_library,
    chunks,
    describe,
    drop_capabilities,
    has_no_network,
    limit,
    printable,
    remove,
    run_all,
    send,
    silence_streams,
)

# The folder goes last: it may be one of installed packages, whose modules must not stand before the standard library's.
BOOT = "import sys; sys.path.append({root!r}); from gsil_bench.tasks.sandbox import serve; serve()"
LONGEST_PROGRAM = 100_000
LONGEST_REPORT = 4096
SANDBOX_FAILED = "the sandbox failed"
CONFINED = b"confined\n"
"""What a program's process sends before the program runs: only without it may the process blame the sandbox."""


@dataclass(frozen=True)
class Limits:
    """What a program may use, whatever language it is written in."""

    seconds: float = 3.0
    """Processor time, not waiting time: a busy machine must not change a score."""
    wall_seconds: float = 60.0
    """Waiting time. A program of the restricted language cannot sleep, so only a machine in trouble makes it meet this."""
    memory_bytes: int = 512 * MEBIBYTE
    """Address space, interpreter included."""
    open_files: int = 0
    """The lowest descriptor that cannot be opened. Those that are open keep working whatever this is; with 0 none can be opened,
    even after closing some."""


LIMITS = Limits()


@dataclass(frozen=True)
class Program:
    """An answer and what it must satisfy, both in the restricted language."""

    answer: str
    checks: str = ""
    """Statements, usually asserts. Empty: the asserts at the end of the answer are the checks."""


@dataclass(frozen=True)
class ProgramResult:
    """What became of one program."""

    passed: bool
    reason: str
    """One printable line: "passed", "AssertionError: line 7: assert f(1) == 2", "timed out after 3 s", "out of memory"…"""


def run_restricted(programs: Sequence[str | Program], workers: int = 2, limits: Limits = LIMITS) -> list[ProgramResult]:
    """Run programs of the restricted language, each in its own process; one result per program, in order.

    Args:
        programs: programs with their checks. A plain text is a program whose last statements, as far as they are asserts, are its
            checks; whoever joins an untrusted answer with checks should rather keep them apart in a `Program`.
        workers: how many run at the same time.
        limits: of each program.

    Raises:
        UserError: the sandbox itself cannot run here. A program can only fail.
    """
    jobs = [program if isinstance(program, Program) else Program(program) for program in programs]
    return run_all(jobs, workers, lambda: _Worker(limits))


def network_is_dropped() -> bool:
    """Whether programs run here without any network: tried in a fresh worker, not assumed."""
    with _Worker(LIMITS) as worker:
        return worker.network_is_dropped


# ---------------------------------------------------------------------------------------------------------------------------
# The language


def _empty_print() -> Any:
    """A `print` that does nothing, made where there is nothing: its globals do not lead to this module."""
    space: dict[str, Any] = {"__builtins__": {}}
    exec("def print(*values, **options): return None", space)
    return space["print"]


def _copying_reversed() -> Any:
    """A `reversed` that copies first: the true one, over a dictionary that changes, reads past its end (CPython gh-154709)."""
    space: dict[str, Any] = {"__builtins__": {"iter": iter, "isinstance": isinstance, "range": range, "true": reversed}}
    source = """
def reversed(sequence, /):
    true(sequence)  # objects to what cannot be reversed
    return iter(sequence[::-1] if isinstance(sequence, range) else [*sequence][::-1])
"""
    exec(source, space)
    return space["reversed"]


# Left out on purpose: type (makes classes), slice (see `_objection`), object, getattr and its kin, format strings as methods, and
# every exception that is a parent of MemoryError, RecursionError or AssertionError, so that no handler can swallow those.
_BUILTIN_NAMES = """
    abs all any bin bool chr dict divmod enumerate filter float format frozenset hex int isinstance iter len list map max min next
    oct ord pow range repr round set sorted str sum tuple zip
    ArithmeticError AttributeError IndexError KeyError LookupError NotImplementedError OverflowError StopIteration TypeError
    ValueError ZeroDivisionError
"""
BUILTINS: Mapping[str, Any] = {
    **{name: getattr(builtins, name) for name in _BUILTIN_NAMES.split()},
    "print": _empty_print(),
    "reversed": _copying_reversed(),
}
EXCEPTIONS = frozenset(name for name, value in BUILTINS.items() if isinstance(value, type) and issubclass(value, Exception))

_METHOD_NAMES = """
    capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit isidentifier islower
    isnumeric isprintable isspace istitle isupper join ljust lower lstrip maketrans partition removeprefix removesuffix replace
    rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title translate upper zfill
    append clear copy extend insert pop remove reverse sort
    fromkeys get items keys popitem setdefault update values
    add difference difference_update discard intersection intersection_update isdisjoint issubset issuperset symmetric_difference
    symmetric_difference_update union
    bit_count bit_length is_integer
"""
METHODS = frozenset(_METHOD_NAMES.split())

NODES: tuple[type[ast.AST], ...] = (
    *(ast.Module, ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete, ast.Pass, ast.Assert, ast.Raise),
    *(ast.If, ast.For, ast.While, ast.Break, ast.Continue, ast.Try, ast.ExceptHandler),
    *(ast.FunctionDef, ast.Lambda, ast.arguments, ast.arg, ast.Return, ast.Yield, ast.YieldFrom),
    *(ast.Call, ast.keyword, ast.Starred, ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.NamedExpr),
    *(ast.Constant, ast.JoinedStr, ast.FormattedValue, ast.List, ast.Tuple, ast.Set, ast.Dict),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension),
    # Not MatchClass: its patterns read attributes by name.
    *(ast.Match, ast.match_case, ast.MatchValue, ast.MatchSingleton, ast.MatchSequence, ast.MatchMapping),
    *(ast.MatchStar, ast.MatchAs, ast.MatchOr),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)

_WORDS: Mapping[str, str] = {
    "Import": "import",
    "ImportFrom": "import",
    "ClassDef": "class",
    "With": "with",
    "AsyncFunctionDef": "async",
    "MatchClass": "class pattern",
    "TryStar": "except*",
}


class _NotAllowed(Exception):
    """A program is outside the language; the message says where and with what."""


def _check(tree: ast.Module, bound: set[str], where: str = "") -> None:
    """Raise unless the tree is within the language.

    Args:
        tree: what to check.
        bound: names that the program defines anywhere: a variable may be called `input`, and reading it is harmless.
        where: added to the line number.
    """
    found = []
    # Nodes without a line (arguments, comprehensions) stand in the line of the node that holds them.
    stack: list[tuple[ast.AST, int]] = [(tree, 1)]
    while stack:
        node, line = stack.pop()
        line = getattr(node, "lineno", line)
        if objection := _objection(node, bound):
            found.append((line, objection))  # once per subtree: what an import holds needs no second objection
        else:
            stack.extend((child, line) for child in ast.iter_child_nodes(node))
    if found:
        line, objection = min(found)
        raise _NotAllowed(f"line {line}{where}: {objection}")


def _objection(node: ast.AST, bound: set[str]) -> str:
    """What is wrong with one node, its children apart; "" if nothing."""
    kind = type(node).__name__
    if not isinstance(node, NODES):
        return _WORDS.get(kind, kind.lower())
    for name in _identifiers(node):
        if "__" in name:
            return f"name {name} with a double underscore"
    match node:
        case ast.Attribute(attr=name, ctx=context):
            if name not in METHODS:
                return f"attribute .{name}"
            if not isinstance(context, ast.Load):
                return f"change of attribute .{name}"
        case ast.Name(id=name) if name not in BUILTINS and name not in bound and hasattr(builtins, name):
            return name
        case ast.Subscript(slice=index, ctx=ast.Store()):
            # In a list it writes out of bounds if the new values change the list (CPython gh-120384). In a dictionary it leaves
            # the slice as a key, to be used in a list: so in no place, and not as a part of a key either.
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
            if any(isinstance(part, ast.Slice) and part.step for part in parts):
                return "assignment to a slice with a step"
        case ast.comprehension(is_async=1):
            return "async"
        case ast.FunctionDef(decorator_list=[_, *_]):
            return "decorator"
        case ast.ExceptHandler(type=None):
            return "except without a class"
        case ast.ExceptHandler(type=ast.expr() as caught) if not _is_plain_handler(caught, bound):
            # Evaluated when a generator is thrown away, anything else would run code at that moment: a destructor.
            return "except with anything but names of built-in exceptions"
        case ast.Try(finalbody=[_, *_]):
            return "finally"
    return ""


def _is_plain_handler(caught: ast.expr, bound: set[str]) -> bool:
    """Whether an except clause names built-in exceptions only. Names that are not allowed at all are objected to elsewhere."""
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return all(
        isinstance(name, ast.Name)
        and name.id not in bound
        and (name.id in EXCEPTIONS or (name.id not in BUILTINS and hasattr(builtins, name.id)))
        for name in names
    )


def _identifiers(node: ast.AST) -> Iterator[str]:
    """Every name that a node itself mentions, whichever field holds it."""
    if isinstance(node, ast.Constant):
        return
    for _, value in ast.iter_fields(node):
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str):
                yield entry


def _bound_names(tree: ast.Module) -> set[str]:
    """The names that a program gives a value anywhere."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.arg(arg=name) | ast.FunctionDef(name=name):
                names.add(name)
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.MatchMapping(rest=str(name))
            ):
                names.add(name)
    return names


def _compile(program: Program) -> tuple[CodeType, CodeType]:
    """The code of the answer and of its checks, both checked. What was checked is what is compiled: the tree, not the text."""
    if max(len(program.answer), len(program.checks)) > LONGEST_PROGRAM:
        raise _NotAllowed(f"longer than {LONGEST_PROGRAM} characters")
    answer = ast.parse(program.answer, ANSWER_FILE)
    if program.checks:
        checks, file, where = ast.parse(program.checks, CHECKS_FILE), CHECKS_FILE, " of the checks"
    else:
        asserts = itertools.takewhile(lambda statement: isinstance(statement, ast.Assert), reversed(answer.body))
        split = len(answer.body) - len(list(asserts))
        checks, file, where = ast.Module(answer.body[split:], []), ANSWER_FILE, ""
        answer = ast.Module(answer.body[:split], [])
    bound = _bound_names(answer)
    _check(answer, bound)
    _check(checks, bound | _bound_names(checks), where)
    # optimize=0 keeps the asserts, however the interpreter was started.
    return (
        compile(answer, ANSWER_FILE, "exec", dont_inherit=True, optimize=0),
        compile(checks, file, "exec", dont_inherit=True, optimize=0),
    )


def _execute(answer: CodeType, checks: CodeType) -> None:
    """Run the answer, then its checks in a namespace that has the answer's names but the true built-in functions."""
    space: dict[str, Any] = {"__builtins__": dict(BUILTINS)}
    exec(answer, space)
    theirs = {name: value for name, value in space.items() if name not in BUILTINS and "__" not in name}
    exec(checks, {**theirs, "__builtins__": dict(BUILTINS)})


def _outcome(program: Program) -> str | None:
    """Check and run a program in this process: None if it passed, otherwise the reason. Call it only in a confined process."""
    try:
        answer, checks = _compile(program)
    except _NotAllowed as error:
        return f"not in the restricted language: {error}"
    except SyntaxError as error:
        place = " of the checks" if error.filename == CHECKS_FILE else ""
        line = f"line {error.lineno}{place}: " if error.lineno else ""
        return f"{type(error).__name__}: {line}{error.msg}"
    except ValueError as error:  # null characters, lone surrogates
        return f"SyntaxError: {error}"
    except (MemoryError, RecursionError):
        return "SyntaxError: too deeply nested"
    try:
        _execute(answer, checks)
    except MemoryError:
        return "out of memory"
    except BaseException as error:  # whatever a program raises is its failure
        return describe(error, program.answer, program.checks)
    return None


# ---------------------------------------------------------------------------------------------------------------------------
# The process of a program


def confine(limits: Limits, folder: str | None = None) -> None:
    """Take from this process, for good, what a program must not have. Nothing here depends on the language of the program.

    Args:
        limits: what it may use.
        folder: what it may see: its working directory, and its root directory where the system permits that.
    """
    c_library()
    if folder is not None:
        os.chdir(folder)
        with contextlib.suppress(OSError):  # nobody but root may, and others in a user namespace of their own
            os.chroot(".")
            os.chdir("/")
    if os.geteuid() == 0:
        # Root is exempt from the limit on processes and from file permissions, so a program must not be root.
        with contextlib.suppress(OSError):  # a container may have no such user
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    drop_capabilities()
    # A caller that ignores these signals hands that down, and nothing would end a busy loop.
    for name in ("SIGPROF", "SIGXCPU"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    seconds = math.ceil(limits.seconds) + 1  # the kernel counts whole seconds here; the timer below is the exact limit
    limit("RLIMIT_CPU", seconds, seconds + 1)
    limit("RLIMIT_AS", limits.memory_bytes)
    limit("RLIMIT_FSIZE", 0)
    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_NOFILE", limits.open_files)
    limit("RLIMIT_NPROC", 0)
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)


def _run_child(program: Program, sentinel: str, limits: Limits, folder: str, report: int) -> NoReturn:
    """The whole life of a program's process: detach, confine, run, report, end."""
    message = SANDBOX_FAILED
    try:
        os.setsid()
        silence_streams()
        report = os.dup2(report, 3)
        os.closerange(4, 256)  # the server holds fewer than ten; closing up to the system's limit may take long
        confine(limits, folder)
        os.write(report, CONFINED)
        message = "ended before its last statement"
        reason = _outcome(program)
        message = sentinel if reason is None else printable(reason)
    except BaseException as error:  # this process must end here, whatever happened
        if message == SANDBOX_FAILED:
            message += f": {error!r}"
    finally:
        # Never return into the server's loop, and run no clean-up that a program may have left behind.
        with contextlib.suppress(BaseException):
            os.write(report, message.encode("utf-8", "backslashreplace")[:LONGEST_REPORT])
        os._exit(0)


# ---------------------------------------------------------------------------------------------------------------------------
# The server: a fresh interpreter that forks once per program


def serve() -> None:
    """Answer jobs, one JSON line each, until the caller closes the pipe."""
    c_library()
    dropped = _drop_network()
    import unicodedata  # noqa: F401  "\N{BULLET}" in a program needs it, and a program cannot open files

    with tempfile.TemporaryDirectory(prefix="gsil-bench-") as folder:
        os.environ.clear()
        gc.freeze()  # the forks share these objects; the collector must not touch, and so copy, them
        send({"network_is_dropped": dropped, "folder": folder})
        for line in sys.stdin.buffer:
            job = json.loads(line)
            send(_run_job(Program(**job["program"]), job["word"], Limits(**job["limits"]), folder))


def _run_job(program: Program, sentinel: str, limits: Limits, folder: str) -> dict[str, Any]:
    """Fork, run one program, and leave nothing of it behind."""
    own = tempfile.mkdtemp(dir=folder)
    receive, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_child(program, sentinel, limits, own, report)
    os.close(report)
    message, late = b"", False
    try:
        for chunk in chunks(receive, limits.wall_seconds):
            message += chunk
            if len(message) > LONGEST_REPORT:
                break
    except TimeoutError:
        late = True
    finally:
        os.close(receive)
    for kill in (os.killpg, os.kill):  # the group does not exist yet if the process is late before its first step
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    # The process may have left folders without permissions; those go with the server's folder or stay empty.
    remove(own)
    confined = message.startswith(CONFINED)
    text = message.removeprefix(CONFINED)[:LONGEST_REPORT].decode("utf-8", "replace")
    return {"message": text, "confined": confined, "late": late, "status": status}


def _drop_network() -> bool:
    """Move this process into an empty network namespace if the kernel allows; say whether no network can be reached."""
    libc = c_library()
    with contextlib.suppress(AttributeError):  # no such library, or no such function in it
        new_user, new_network = 0x10000000, 0x40000000
        # Root may do it at once; anybody else only together with a user namespace, where the kernel has those enabled.
        if libc.unshare(new_network) != 0:
            libc.unshare(new_user | new_network)
    return has_no_network()


# ---------------------------------------------------------------------------------------------------------------------------
# The caller's side


class _Worker(Worker[Program, ProgramResult]):
    """The caller's side of one server."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits
        self.network_is_dropped = False

    def run(self, job: Program) -> ProgramResult:
        """Run one program."""
        wish = {"program": asdict(job), "limits": asdict(self.limits)}
        reply, word = self.request(wish, self.limits.wall_seconds + START_SECONDS)
        message = reply["message"]
        if reply["confined"] and message == word:
            return ProgramResult(True, "passed")
        if not reply["confined"] and message.startswith(SANDBOX_FAILED):
            raise UserError(f"{message}: programs cannot be confined on this machine")
        # Printable already, unless the program has broken out and written it.
        return ProgramResult(False, printable(message) or self._silence(reply["status"], reply["late"]))

    def _silence(self, status: int, late: bool) -> str:
        """Why a program's process ended without a report."""
        if late:
            return f"timed out after {self.limits.wall_seconds:g} s of waiting"
        if not os.WIFSIGNALED(status):
            return "ended before its last statement"
        number = os.WTERMSIG(status)
        if number in (signal.SIGPROF, signal.SIGXCPU):
            return f"timed out after {self.limits.seconds:g} s"
        return f"crashed (signal {number})"

    def start(self) -> None:
        """Start the server."""
        if not hasattr(os, "fork"):
            raise UserError("running programs needs Linux or macOS: this system cannot fork")
        # "-I", spelled out, but for one thing: the environment is ours, and its fixed hash seed must count.
        self.launch([sys.executable, "-s", "-S", "-P", "-W", "ignore", "-c", BOOT.format(root=str(ROOT))])
        hello = self.greet(b"", f"the sandbox cannot start with {sys.executable}")
        self.network_is_dropped, self._folder = hello["network_is_dropped"], hello["folder"]
