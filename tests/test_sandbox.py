"""The sandbox: right programs pass, wrong ones fail with a reason, and hostile ones get nowhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gsil_bench.errors import UserError
from gsil_bench.tasks import sandbox
from gsil_bench.tasks.confinement import ROOT
from gsil_bench.tasks.sandbox import Limits, Program, ProgramResult, run_restricted

SHORT = Limits(seconds=0.3)


def outcome(answer: str, checks: str = "", limits: Limits = SHORT) -> str:
    """The reason of one program, after making sure that only "passed" passes."""
    (result,) = run_restricted([Program(answer, checks)], workers=1, limits=limits)
    assert result.passed == (result.reason == "passed")
    return result.reason


def outcomes(programs: list[str]) -> dict[str, str]:
    """The reason of each program."""
    results = run_restricted(programs, limits=SHORT)
    return {program: result.reason for program, result in zip(programs, results, strict=True)}


# --- programs that must pass -----------------------------------------------------------------------------------------------

RIGHT = [
    "def add(a, b):\n    return a + b\n\nassert add(1, 2) == 3\n",
    """
def f(xs: list[int], k: int = 2) -> list[int]:
    ys: list[int] = [x for x in xs if x % k == 0]
    return sorted(ys)[::-1]
assert f([3, 4, 2]) == [4, 2]
""",
    "def f(w):\n    return '-'.join(p.strip().upper() for p in w.split(',') if p)\nassert f('a, b,') == 'A-B'",
    """
def f(n):
    total = 0
    while n > 0:
        n, d = divmod(n, 10)
        total += d
    return total
assert f(472) == 13
""",
    """
def f(x):
    try:
        return int(x)
    except (ValueError, TypeError) as error:
        return str(error)[:7]
assert f('7') == 7
assert f('x') == 'invalid'
""",
    """
def f(n):
    def g():
        for i in range(n):
            yield i
    return list(g())
assert f(3) == [0, 1, 2]
""",
    """
def f(c):
    match c:
        case [1, *rest] if rest:
            return rest
        case {'a': x, **others}:
            return x, others
        case None | True:
            return 0
        case _:
            return -1
assert f([1, 2]) == [2] and f({'a': 1, 'b': 2}) == (1, {'b': 2}) and f(None) == 0 and f(5) == -1
""",
    """
def f(*xs, **named):
    print('debugging', xs)
    return sum(xs) + named.get('extra', 0)
assert f(*[1, 2], **{'extra': 3}) == 6
""",
    "input = 3\ntype = input + 1\nassert type == 4",  # odd names for variables, but harmless ones
    "x = f'{3.14159:.2f} {\"a\"!r:>4}' + '%03d' % 7 + '\\N{BULLET}'\nassert x == \"3.14  'a'007\\u2022\"",
    "fib = lambda n: n if n < 2 else fib(n - 1) + fib(n - 2)\nassert [fib(i) for i in range(6)] == [0, 1, 1, 2, 3, 5]",
    "def sum_all(xs):\n    sum = 0\n    for x in xs:\n        sum += x\n    return sum\nassert sum_all([1, 2]) == 3",
    "assert (n := 10) > 3 and n == 10",
    "s = 'caf\u00e9\u2028'\nassert len(s) == 5\r\nassert s[3] == '\u00e9'",
    "def f(x):\n    raise ValueError('no')\ntry:\n    f(1)\nexcept ValueError:\n    caught = True\nassert caught",
    "pass",  # nothing was asked of it
]


def test_right_programs_pass() -> None:
    assert outcomes(RIGHT) == dict.fromkeys(RIGHT, "passed")


# --- programs that must fail, with their reasons ---------------------------------------------------------------------------

REFUSED = "not in the restricted language: "
WRONG = {
    "def add(a, b):\n    return a - b\n\nassert add(1, 2) == 3": "AssertionError: line 4: assert add(1, 2) == 3",
    "assert 1 == 2, 'one is\\nnot two'": "AssertionError: line 1: one is not two",
    "assert solve([1]) == 1": "NameError: line 1: name 'solve' is not defined",
    "x = (": "SyntaxError: line 1: '(' was never closed",
    "if x:\nassert 1": "IndentationError: line 2: expected an indented block after 'if' statement on line 1",
    "return 5": "SyntaxError: line 1: 'return' outside function",
    "x = 1\0": "SyntaxError: source code string cannot contain null bytes",
    "x = '\ud800'": "SyntaxError: 'utf-8' codec can't encode character '\\ud800' in position 5: surrogates not allowed",
    "x = 1\n\ny = [1][2]": "IndexError: line 3: list index out of range",
    "raise ValueError('\\x1b[31m' + 'x' * 500)": "ValueError: line 1: ?[31m" + "x" * 174 + "…",
    "Here is the function:\n```python\nx = 1\n```": "SyntaxError: line 1: invalid syntax",
    # limits
    "while True:\n    pass": "timed out after 0.3 s",
    "x = 10**10**8": "timed out after 0.3 s",
    "x = 1 << 10**11": "out of memory",
    "x = 'a' * 10**10": "out of memory",
    "x = [0] * 10**10": "out of memory",
    "x = f'{1:>{10**10}}'": "out of memory",
    "x = '%*d' % (10**10, 1)": "out of memory",
    "def f(n):\n    return f(n + 1)\nf(0)": "RecursionError: line 2: maximum recursion depth exceeded",
    "x = list(iter(int, 1))": "timed out after 0.3 s",
    "try:\n    x = 'a' * 10**10\nexcept ValueError:\n    pass": "out of memory",
    "#" + "x" * 100_000: REFUSED + "longer than 100000 characters",
    # the language
    "x = 1\n\nimport os": REFUSED + "line 3: import",
    "from os import system": REFUSED + "line 1: import",
    "class A: pass": REFUSED + "line 1: class",
    "global x": REFUSED + "line 1: global",
    "def f():\n    x = 1\n    def g():\n        nonlocal x": REFUSED + "line 4: nonlocal",
    "async def f(): pass": REFUSED + "line 1: async",
    "f = (x async for x in [])": REFUSED + "line 1: async",
    "with open('x') as f: pass": REFUSED + "line 1: with",
    "@print\ndef f(): pass": REFUSED + "line 2: decorator",
    "try:\n    x = 1\nexcept:\n    x = 2": REFUSED + "line 3: except without a class",
    "try:\n    x = 1\nfinally:\n    x = 2": REFUSED + "line 1: finally",
    "try:\n    x = 1\nexcept Exception:\n    x = 2": REFUSED + "line 3: Exception",
    "try:\n    x = 1\nexcept* ValueError:\n    x = 2": REFUSED + "line 1: except*",
    "eval('1')": REFUSED + "line 1: eval",
    "x = [1]\nprint(open('/etc/passwd'))": REFUSED + "line 2: open",
    "exec('import os')": REFUSED + "line 1: exec",
    "getattr(1, 'real')": REFUSED + "line 1: getattr",
    "type('A', (int,), {})": REFUSED + "line 1: type",
    "raise SystemExit": REFUSED + "line 1: SystemExit",
    "raise BaseException": REFUSED + "line 1: BaseException",
    "__import__('os')": REFUSED + "line 1: name __import__ with a double underscore",
    "x = __builtins__": REFUSED + "line 1: name __builtins__ with a double underscore",
    "__debug__": REFUSED + "line 1: name __debug__ with a double underscore",
    "x = 1\n().__class__": REFUSED + "line 2: name __class__ with a double underscore",
    "try:\n    x = 1\nexcept print():\n    x = 2": REFUSED + "line 3: except with anything but names of built-in exceptions",
    "raise KeyError(hex(255))": "KeyError: line 1: '0x…'",
    "assert False, repr(lambda: 1)": "AssertionError: line 1: <function <lambda> at 0x…>",
    "reversed({1})": "TypeError: line 1: 'set' object is not reversible",
    "exit(0)": "NameError: line 1: name 'exit' is not defined",
}


def test_wrong_programs_fail_with_their_reasons() -> None:
    assert outcomes(list(WRONG)) == WRONG


# --- escapes ---------------------------------------------------------------------------------------------------------------

ESCAPES = [
    # dunder access in every place that can hold a name
    "().__class__.__base__.__subclasses__()",
    "x = f'{().__class__}'",
    "x = f'{1:{().__class__}}'",
    "x = lambda a=().__class__: a",
    "x = [c for c in [1] if c.__class__]",
    "x: int.__class__ = 1",
    "def f(x: ().__class__): pass",
    "def f(__class__): pass",
    "def __getattr__(x): pass",
    "dict(__class__=1)",
    "try:\n    x = 1\nexcept ValueError as __e:\n    pass",
    "match 1:\n    case __x: pass",
    "match [1]:\n    case [*__x]: pass",
    "match {}:\n    case {**__x}: pass",
    "(__x := 1)",
    "for __x in []: pass",
    "del __builtins__",
    "_\uff3fbuiltins_\uff3f",  # full-width low lines, which the parser turns into underscores
    "()._\uff3fclass_\uff3f",
    "\uff45val('1')",
    # attributes without a dunder that lead out
    "(x for x in [1]).gi_frame.f_back.f_builtins",
    "(lambda: 1).func_globals",
    "'{0.__class__}'.format(1)",
    "'{x.__class__}'.format_map({'x': 1})",
    "x = str.format",
    "x = map(str.format, ['{0.__class__}'], [1])",
    "try:\n    [].nothing\nexcept AttributeError as e:\n    x = e.obj",
    "try:\n    [].sort(1)\nexcept TypeError as e:\n    x = e.with_traceback",
    "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    x = e.args",
    "int.mro()",
    "match 1:\n    case int(real=x): pass",
    "match (lambda: 1):\n    case print(gi_frame=x): pass",
    "match 1:\n    case int.real: pass",
    "match 1:\n    case int(): pass",
    "print.count = 1",
    "[].append = print",
    "del [].append",
    "for [].append in [1]: pass",
    "with [1] as [].append: pass",
    # built-in functions by other ways
    "x = vars, dir, locals, globals",
    "hasattr(1, 'x')",
    "sorted([1], key=eval)",
    "x = lambda f=exec: f",
    "x = [open][0]",
    "print(*[compile])",
    "x = object()",
    "super().x",
    "x = property(print)",
    "x = memoryview",
    "x = breakpoint",
    "input()",
    "raise MemoryError",
    "raise KeyboardInterrupt",
    "raise GeneratorExit",
    "assert False, __name__",
    # slices with a step, in every place that can assign to one
    "x = [1]\nx[0:1:2] = [2]",
    "x = [1]\nx[::-1] += [2]",
    "x = {}\nx[0:1:2, 3] = 4",
    "x = [1]\n[y, x[::2]] = 1, [2]",
    "x = [1]\ny, *x[::2] = 1, 2",
    "x = [1]\nx[::2]: list = [2]",
    "x = [1]\nfor x[::2] in [[2]]: pass",
    "x = [[1] for x[::2] in [[2]]]",
    "x = slice(0, 1, 2)",
    # what would run code when a generator is thrown away
    "def f():\n    try:\n        yield 1\n    except g(): pass",
    "x = 1\ntry:\n    y = 1\nexcept x: pass",
    "def f(KeyError):\n    try:\n        yield 1\n    except (ValueError, KeyError): pass",
    "try:\n    y = 1\nexcept (ValueError, print): pass",
]


def test_escapes_are_refused() -> None:
    accepted = {program: reason for program, reason in outcomes(ESCAPES).items() if not reason.startswith(REFUSED + "line ")}
    assert accepted == {}


# CPython gh-120384: the interpreter writes past the end of a list whose values change it while they are assigned.
OVERWRITE = """
def peek(target):
    spray = [[None] * 60 for i in range(4000)]
    for i in range(2001, 2801, 2):
        spray[i] = None
    xs = [None] * 58
    def g():
        del xs[4:]
        yield target
    {assign}
    for row in spray:
        if row is not None and row[1] is not None:
            return row
keep = []
row = peek(int)
keep.append(row)
meta = row[1]
always = meta('A', (), {{'__eq__': lambda a, b: True}})()
def solve(*args):
    return always
"""
ASSIGNMENTS = {
    "xs[13:14:2] = g()": "assignment to a slice with a step",
    "xs[slice(13, 14, 2)] = g()": "slice",
    "dd = {}; dd[13:14:2] = 1; xs[list(dd)[0]] = g()": "assignment to a slice with a step",
    "dd = {}; dd[13:14:2, 0] = 1; xs[list(dd)[0][0]] = g()": "assignment to a slice with a step",
    "for xs[13:14:2] in [g()]: pass": "assignment to a slice with a step",
}


@pytest.mark.parametrize("assign", ASSIGNMENTS)
def test_the_overwriting_of_memory_is_refused(assign: str) -> None:
    reason = outcome(OVERWRITE.format(assign=assign), "assert solve(1) == 3\nassert solve(2) == [1]")
    assert reason == REFUSED + "line 10: " + ASSIGNMENTS[assign]


def test_reading_and_assigning_slices_is_still_allowed() -> None:
    assert outcome("x = [1, 2, 3, 4]\nx[1:3] = x[::-2]\nx[:1] += [9]\nassert x == [1, 9, 4, 2, 4]") == "passed"


def test_reversed_dictionary_that_changes_is_not_read_past_its_end() -> None:
    # CPython gh-154709: the true `reversed` would go on from the place of the last entry of the larger dictionary.
    start = "d = {i: i for i in range(1000000)}\nfor i in range(999990):\n    d.pop(i)\nr = reversed(d)\nd.clear()\n"
    program = start + "for i in range(10):\n    d[i] = -i\nassert [*r] == [*range(999999, 999989, -1)]"
    assert outcome(program, limits=Limits()) == "passed"
    assert outcome("assert next(reversed(range(10**12))) == 10**12 - 1 and [*reversed('ab')] == ['b', 'a']") == "passed"


def test_reasons_hold_no_paths() -> None:
    # The text of a codec that is not loaded makes the interpreter look for a file.
    for codec in ("cp037", "idna", "hex"):
        assert "/" not in outcome(f"x = str(b'abc', '{codec}')")


def test_a_name_that_slips_through_the_check_leads_nowhere() -> None:
    # `eval` counts as the program's own name because a function has an argument of that name; the true one is still not there.
    assert outcome("def f(eval): pass\neval('1')") == "NameError: line 2: name 'eval' is not defined"


def test_memory_that_grows_bit_by_bit_runs_out() -> None:
    program = "x = []\nwhile True:\n    x.append('y' * 10**6 + str(len(x)))"
    assert outcome(program, limits=Limits(memory_bytes=100 << 20)) == "out of memory"


def test_crash_of_one_program_does_not_fail_the_others() -> None:
    # Deeply nested iterators overflow the C stack of most interpreters; some raise instead. Either way only this one fails.
    deep = "x = iter([1])\nfor i in range(10**6):\n    x = map(abs, x)\nnext(x)\nassert False"
    results = run_restricted([RIGHT[0], deep, RIGHT[0]], limits=Limits(seconds=2))
    assert [result.passed for result in results] == [True, False, True]
    assert results[1].reason.startswith(("crashed (signal", "RecursionError", "timed out"))


@pytest.mark.parametrize("text", ["(" * 90_000, "-" * 90_000 + "1", "x" + "[0]" * 30_000, "1" + "+1" * 45_000, "not " * 20_000])
def test_text_that_overflows_the_parser_only_fails(text: str) -> None:
    assert outcome(text, limits=Limits(seconds=2)) != "passed"


# --- an answer cannot turn its checks into passes --------------------------------------------------------------------------

CHECKS = "assert order([2, 1]) == sorted([1, 2])\nassert order([]) == []"
FIRST_CHECK_FAILS = "AssertionError: line 1 of the checks: assert order([2, 1]) == sorted([1, 2])"
CHEATS = {
    "def order(xs): return 0\ndef sorted(xs): return 0": FIRST_CHECK_FAILS,
    "order = sorted = lambda xs: 0": FIRST_CHECK_FAILS,
    "def order(xs): return 0\n(sorted := order)": FIRST_CHECK_FAILS,
    "def order(xs): return xs\nif 0: \\": "SyntaxError: line 2: unexpected EOF while parsing",
    'def order(xs): return xs\nx = """': "SyntaxError: line 2: unterminated triple-quoted string literal (detected at line 2)",
    "def order(xs): return xs\nx = (": "SyntaxError: line 2: '(' was never closed",
    "def order(xs): return xs\nif 1:": "IndentationError: line 2: expected an indented block after 'if' statement on line 2",
    "def order(xs): return xs\nraise StopIteration": "StopIteration: line 2",
    "def order(xs): raise StopIteration": "StopIteration: line 1",
    "def order(xs): raise AssertionError": REFUSED + "line 1: AssertionError",
    "def order(xs): yield xs": FIRST_CHECK_FAILS,
    "def order(xs): return float('nan')": FIRST_CHECK_FAILS,
    "def order(xs): return ...": FIRST_CHECK_FAILS,
    "def order(xs): return sorted": FIRST_CHECK_FAILS,
    "": "NameError: line 1 of the checks: name 'order' is not defined",
    "def order(xs):\n    while True: pass": "timed out after 0.3 s",
    "def order(xs):\n    return xs[5]": "IndexError: line 2: list index out of range",
}


def test_cheats() -> None:
    results = run_restricted([Program(answer, CHECKS) for answer in CHEATS], limits=SHORT)
    assert {answer: result.reason for answer, result in zip(CHEATS, results, strict=True)} == CHEATS


def test_final_asserts_of_a_text_are_its_checks() -> None:
    # In one text too, the asserts at the end see the true `sorted`.
    text = "def order(xs): return 0\nsorted = order\n" + CHECKS
    assert outcome(text) == "AssertionError: line 3: assert order([2, 1]) == sorted([1, 2])"


def test_answer_that_uses_a_builtin_name_of_its_own_still_works() -> None:
    assert outcome("def max(a, b):\n    return b\ndef last(a, b):\n    return max(a, b)", "assert last(2, 1) == 1") == "passed"


def test_checks_may_hold_functions_of_their_own() -> None:
    checks = "def check(f):\n    assert f(2) == 4\n    assert f(3) == 9\ncheck(square)"
    assert outcome("def square(x): return x * x\ndef check(f): pass", checks) == "passed"
    assert (
        outcome("def square(x): return x + x\ndef check(f): pass", checks)
        == "AssertionError: line 3 of the checks: assert f(3) == 9"
    )


def test_checks_outside_the_language_are_refused() -> None:
    assert outcome("x = 1", "import os\nassert x == 1") == REFUSED + "line 1 of the checks: import"
    assert outcome("x = 1", "assert x ==") == "SyntaxError: line 1 of the checks: invalid syntax"


# --- order, determinism, resources -----------------------------------------------------------------------------------------


def test_results_are_in_order_whatever_the_number_of_workers() -> None:
    programs = [f"assert {i} % 3 == 0" for i in range(20)]
    expected = [
        ProgramResult(i % 3 == 0, "passed" if i % 3 == 0 else f"AssertionError: line 1: assert {i} % 3 == 0") for i in range(20)
    ]
    assert run_restricted(programs, workers=1) == run_restricted(programs, workers=3) == expected
    assert run_restricted(programs[:1], workers=50) == expected[:1]
    assert run_restricted([], workers=2) == []


def test_order_of_sets_is_the_same_in_every_run() -> None:
    program = "assert False, ''.join({'apple', 'bee', 'cat', 'dog', 'egg', 'fox'})"
    assert outcome(program) == outcome(program) == outcome(program)


def test_a_program_that_only_waits_is_killed_too() -> None:
    start = time.monotonic()
    assert outcome("while True: pass", limits=Limits(seconds=20, wall_seconds=0.3)) == "timed out after 0.3 s of waiting"
    assert time.monotonic() - start < 10


def test_programs_do_not_see_each_other() -> None:
    results = run_restricted(["x = 1", "assert x == 1"], workers=1)
    assert results[1].reason == "NameError: line 1: name 'x' is not defined"


def test_three_hundred_programs_are_fast() -> None:
    start = time.monotonic()
    results = run_restricted([RIGHT[0]] * 300, workers=2)
    assert all(result.passed for result in results)
    assert time.monotonic() - start < 10  # measured: 1 s on two cores


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = threading.active_count()
    run_restricted([RIGHT[0], "while True: pass"], limits=SHORT)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_works_with_threads_and_many_open_files_in_the_caller() -> None:
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(8)]
    with contextlib.ExitStack() as stack:
        stack.callback(stop.set)
        for _ in range(300):
            stack.enter_context(tempfile.TemporaryFile())
        for thread in threads:
            thread.start()
        assert outcome(RIGHT[0]) == "passed"


def test_caller_that_ignores_the_timer_signal_still_times_out() -> None:
    code = (
        "import signal; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGPROF, signal.SIGXCPU)]\n"
        "from gsil_bench.tasks.sandbox import run_restricted, Limits\n"
        "print(run_restricted(['while True: pass'], limits=Limits(seconds=0.3))[0].reason)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "timed out after 0.3 s\n"


def test_a_dead_worker_is_replaced_and_its_program_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with sandbox._Worker(SHORT) as server:
        assert server._process is not None
        server._process.kill()
        server._process.wait()
        assert server.run(Program(RIGHT[0])).reason == "passed"
    assert list(tmp_path.iterdir()) == []


def test_an_interpreter_that_does_not_start_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="the sandbox cannot start with /bin/false"):
        run_restricted(["x = 1"])
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match="the sandbox cannot start with /nowhere/python"):
        run_restricted(["x = 1"])


# --- the second wall, without the first ------------------------------------------------------------------------------------

CONFINED = """
import os, sys
sys.path.append({root!r})
from gsil_bench.tasks import sandbox as module
path = {path!r}
module.confine(module.Limits(seconds={seconds}, memory_bytes=256 << 20, open_files={files}))
try:
    {action}
    os.write(1, b"done")
except BaseException as error:
    os.write(1, type(error).__name__.encode())
"""


def confined(action: str, folder: Path, seconds: float = 2, files: int = 64) -> tuple[str, int]:
    """What an arbitrary statement achieves in a confined process: what it printed, and the return code."""
    code = CONFINED.format(root=str(ROOT), path=str(folder / "file"), action=action, seconds=seconds, files=files)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, timeout=30, check=False, cwd=folder)
    return done.stdout.decode(), done.returncode


def test_confined_process_may_compute(tmp_path: Path) -> None:
    assert confined("sum(range(10))", tmp_path) == ("done", 0)


def test_confined_process_has_no_memory_to_waste(tmp_path: Path) -> None:
    assert confined("bytearray(1 << 30)", tmp_path) == ("MemoryError", 0)


def test_confined_process_cannot_start_processes(tmp_path: Path) -> None:
    assert confined("os.fork()", tmp_path) == ("BlockingIOError", 0)


def test_confined_process_cannot_write_files(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    told, _ = confined("open(path, 'wb', 0).write(b'x')", tmp_path)
    assert told in ("OSError", "PermissionError")
    file = tmp_path / "file"
    assert not file.exists() or file.stat().st_size == 0


def test_confined_process_cannot_open_files_when_told_so(tmp_path: Path) -> None:
    assert confined("os.open('/dev/null', 0)", tmp_path, files=3) == ("OSError", 0)


def test_confined_process_is_not_root(tmp_path: Path) -> None:
    assert confined("assert os.geteuid() != 0", tmp_path) == ("done", 0)


def test_confined_process_ends_when_its_time_is_up(tmp_path: Path) -> None:
    told, code = confined("exec('while True: pass')", tmp_path, seconds=0.2)
    assert told == "" and code < 0


def test_confined_process_cannot_take_its_time_back(tmp_path: Path) -> None:
    # Switching the exact timer off leaves the kernel's own limit.
    action = "import signal; signal.setitimer(signal.ITIMER_PROF, 0); exec('while True: pass')"
    told, code = confined(action, tmp_path, seconds=0.2)
    assert told == "" and code < 0


WALL = """
import json, os, sys
sys.path.append({root!r})
from gsil_bench.tasks import sandbox as module

status = os.open("/proc/self/status", os.O_RDONLY) if os.path.exists("/proc/self/status") else None


def fields():
    if status is None:
        return {{}}
    return dict(line.split(":", 1) for line in os.pread(status, 1 << 16, 0).decode().splitlines())


def attempt(function, *arguments):
    try:
        function(*arguments)
        return "done"
    except OSError as error:
        return type(error).__name__


def leave():
    os.mkdir("q")
    os.chroot("q")
    for _ in range(9):
        os.chdir("..")
    os.chroot(".")
    os.unlink({victim!r})


module._drop_network()
may_chroot = bool(int(fields().get("CapEff", "0"), 16) >> 18 & 1)
module.confine(module.Limits(open_files={files}), {folder!r})
after = fields()
told = {{
    "may_chroot": may_chroot,
    "capabilities": {{name: int(after[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb") if name in after}},
    "no_new_privileges": after.get("NoNewPrivs", "1").strip(),
    "uid": os.geteuid(),
    "open": attempt(os.open, "/etc/passwd", os.O_RDONLY),
    "become root": attempt(os.setuid, 0),
    "leave": attempt(leave),
    "unlink": attempt(os.unlink, {victim!r}),
}}
os.write(1, json.dumps(told).encode())
"""


ISOLATED = ["-I", "-S", "-B", "-c"]


def interpreter(identity: dict[str, Any]) -> str:
    """An interpreter that a user can run: ours may lie in a folder that is root's alone."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        command = [python, *ISOLATED, "import sys; assert sys.version_info >= (3, 11)"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(command, check=True, cwd="/", timeout=30, stderr=subprocess.DEVNULL, **identity)
            return python
    pytest.skip("no other user can run an interpreter here")


def copy_for_everybody(package: Path, root: Path) -> None:
    """Copy what the sandbox imports of a package to where every user can read it."""
    for file in [*package.glob("*.py"), *package.glob("tasks/*.py")]:
        copy = root / package.name / file.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755)


def wall(uid: int, files: int) -> tuple[dict[str, Any], bool]:
    """What a process of a user achieves once confined to a folder, and whether a file of that user outside is still there."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # not pytest's folder, which no other user can enter
        root, victim, inner = Path(name, "root"), Path(name, "victim"), Path(name, "inner")
        copy_for_everybody(ROOT / "gsil_bench", root)
        victim.write_text("x")
        inner.mkdir()
        code = WALL.format(root=str(root), victim=str(victim), folder=str(inner), files=files)
        identity: dict[str, Any] = {}
        if uid != os.geteuid():
            for path in (Path(name), victim, inner):
                os.chown(path, uid, uid)
            identity = {"user": uid, "group": uid, "extra_groups": []}
        command = [interpreter(identity), *ISOLATED, code]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd="/", timeout=30, **identity)
        return json.loads(done.stdout), victim.exists()


def check_wall(uid: int, files: int) -> None:
    told, there = wall(uid, files)
    assert all(value == 0 for value in told["capabilities"].values())
    assert told["no_new_privileges"] == "1"
    assert told["uid"] != 0
    assert told["become root"] != "done"
    assert told["leave"] != "done"
    if files == 0 or told["may_chroot"]:
        assert told["open"] != "done"
    if uid == 0 or told["may_chroot"]:  # otherwise nothing stands between the program and the user's files: see the docstring
        assert told["unlink"] != "done"
        assert there


@pytest.mark.skipif(sys.platform != "linux", reason="the means are Linux's")
@pytest.mark.parametrize("files", [0, 64])
def test_confined_process_reaches_nothing_outside_its_folder(files: int) -> None:
    check_wall(os.geteuid(), files)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("files", [0, 64])
def test_confined_process_of_an_ordinary_user_reaches_nothing_outside_its_folder(files: int) -> None:
    check_wall(12345, files)


PROTOCOL = """
import json, os, sys, tempfile
sys.path.append({root!r})
from gsil_bench.tasks import sandbox as module


def broken_out(program):
    os.write(3, b"the sandbox failed: \\x1b[31m")
    os._exit(0)


def not_confined(limits, folder):
    raise PermissionError("no limits here")


module.{name} = {function}
with tempfile.TemporaryDirectory() as folder:
    print(json.dumps(module._run_job(module.Program("x = 1"), "word", module.Limits(), folder)))
"""


def served(name: str, function: str, monkeypatch: pytest.MonkeyPatch) -> ProgramResult:
    """The result of a program in whose process a function of the sandbox is replaced."""
    code = PROTOCOL.format(root=str(ROOT), name=name, function=function)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, timeout=30, check=True)
    server = sandbox._Worker(SHORT)
    monkeypatch.setattr(server, "ask", lambda line, seconds: json.loads(done.stdout))
    return server.run(Program("x = 1"))


def test_a_program_that_broke_out_cannot_blame_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    assert served("_outcome", "broken_out", monkeypatch) == ProgramResult(False, "the sandbox failed: ?[31m")


def test_a_process_that_cannot_be_confined_is_no_wrong_program(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"the sandbox failed: PermissionError.*cannot be confined on this machine"):
        served("confine", "not_confined", monkeypatch)


def test_whether_the_network_is_dropped_is_tried() -> None:
    dropped = sandbox.network_is_dropped()
    if sys.platform == "linux" and os.geteuid() == 0 and not dropped:
        pytest.skip("this machine does not let root drop the network")
    assert isinstance(dropped, bool)
