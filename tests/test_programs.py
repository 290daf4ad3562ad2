"""The sandbox of arbitrary Python: every hostile answer of the list gets its verdict and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from gsil_bench.errors import UserError
from gsil_bench.tasks import programs
from gsil_bench.tasks.programs import (
    PROGRAM_LIMITS,
    CheckedProgram,
    CheckedResult,
    ProgramLimits,
    Walls,
    free_names,
    run_programs,
    walls,
)

SHORT = ProgramLimits(seconds=1.0, wall_seconds=6.0, memory_bytes=256 << 20, processes=8)
RIGHT = "def f(x):\n    return x + 1"
WRONG = "def f(x):\n    return x"
CHECKS = "assert f(1) == 2"


def run(answer: str, checks: str = CHECKS, limits: ProgramLimits = SHORT, exports: tuple[str, ...] = ()) -> CheckedResult:
    (result,) = run_programs([CheckedProgram(answer, checks, exports)], workers=1, limits=limits)
    return result


@pytest.fixture(scope="module")
def here() -> Walls:
    return walls()


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for temporary files that must be empty afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def processes_with(mark: str) -> list[str]:
    """Processes whose command line holds a mark. An answer may leave one behind only if it could start it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(folder.name)
        except OSError:
            continue
    return found


def processes_below(parent: int) -> list[int]:
    """The descendants of a process."""
    try:
        children = [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []
    return [pid for child in children for pid in (child, *processes_below(child))]


# --- what must pass and fail -----------------------------------------------------------------------------------------------


def test_right_and_wrong() -> None:
    assert run(RIGHT) == CheckedResult("passed", "passed")
    assert run(WRONG) == CheckedResult("failed", "AssertionError: line 1 of the checks: assert f(1) == 2")
    assert run("def f(x:\n").reason == "SyntaxError: line 1: '(' was never closed"
    assert run("def f(x):\n    return [][x]").reason == "IndexError: line 2: list index out of range"
    assert run("").reason == "NameError: line 1 of the checks: name 'f' is not defined"


VALUES = {
    "[1, (2, 3), {4}, {5: [6]}]": "[1, (2, 3), {4}, {5: [6]}]",
    "1 << 200": "1 << 200",
    "10 ** 6000": "10 ** 6000",
    "-(1 << 63)": "-9223372036854775808",
    "float('inf')": "float('inf')",
    "0.1 + 0.2": "0.30000000000000004",
    "b'\\x00\\xff'": "b'\\x00\\xff'",
    "'\\ud800\\u2028\\n\"'": "'\\ud800\\u2028\\n\"'",
    "frozenset([1])": "frozenset([1])",
    "complex(1, -2)": "1 - 2j",
    "range(3)": "range(3)",
    "True": "True",
    "None": "None",
    "int": "int",
    "__import__('collections').Counter('aab')": "{'a': 2, 'b': 1}",
    "__import__('collections').namedtuple('P', 'x y')(1, 2)": "(1, 2)",
    "__import__('fractions').Fraction(1, 3)": "__import__('fractions').Fraction(2, 6)",
    "__import__('decimal').Decimal('0.10')": "__import__('decimal').Decimal('0.1')",
}


def test_values_cross_the_channel_as_they_are() -> None:
    same = [CheckedProgram(f"def f(): return {made}", f"assert f() == {text}") for made, text in VALUES.items()]
    back = [CheckedProgram("def f(x): return x", f"x = {text}\nassert f(x) == x") for text in VALUES.values()]
    other = [CheckedProgram(f"def f(): return {made}", "assert f() == 'other'") for made in VALUES]
    assert {result.reason for result in run_programs(same + back)} == {"passed"}
    assert {result.verdict for result in run_programs(other)} == {"failed"}


def test_types_are_kept() -> None:
    assert run(
        "def f(): return [1, True, 1.0, '1', (), []]", "assert [type(v) for v in f()] == [int, bool, float, str, tuple, list]"
    ).passed
    assert not run("def f(): return (1, 2)", "assert f() == [1, 2]").passed


def test_arguments_that_the_answer_changes() -> None:
    assert run("def f(xs): xs.append(3)", "xs = [1]\nf(xs)\nassert xs == [1, 3]").passed
    assert run("def f(d): d['a'] = 1", "d = {}\nf(d)\nassert d == {'a': 1}").passed
    assert run("def f(s): s.add(1)", "s = {2}\nf(s)\nassert s == {1, 2}").passed


def test_objects_of_the_answers_classes() -> None:
    answer = (
        "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\ndef f(pairs): return sum(p.a for p in pairs)"
    )
    assert run(answer, "assert f([Pair(1, 2), Pair(3, 4)]) == 4 and Pair(5, 6).b == 6").passed
    assert run("def f():\n    yield from (1, 2)", "assert list(f()) == [1, 2] and sum(f()) == 3").passed
    assert run("def f(n): return lambda x: x + n", "assert f(1)(2) == 3").passed


def test_setup_runs_in_the_answers_namespace() -> None:
    program = CheckedProgram(
        "class Node: pass\ndef f(node): return node.x", "assert f(root) == 7", setup="root = Node()\nroot.x = 7"
    )
    assert run_programs([program])[0].passed


def test_exceptions_cross_by_their_class() -> None:
    answer = "def f(x):\n    if x: raise KeyError('k')\n    raise type('Own', (Exception,), {})('mine')"
    checks = "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False\nf(0)"
    assert run(answer, checks).reason == "Own: line 3: mine"


def test_names_of_the_checks() -> None:
    assert free_names("import math\nfor i in range(3):\n    assert f(i) == math.pi") == ["f"]
    assert free_names("assert sum(1, 2) == 3", exports=("sum",)) == ["sum"]
    assert run("def sum(a, b): return a * b", "assert sum(2, 3) == 6", exports=("sum",)).passed
    assert run("import sys\ndef f(): return sys.maxsize", "assert f() == sys.maxsize").passed  # an import that checks rely on


def test_results_are_in_order_and_programs_do_not_see_each_other() -> None:
    some = [CheckedProgram(RIGHT if i % 3 else WRONG, CHECKS) for i in range(12)]
    assert [result.passed for result in run_programs(some, workers=3)] == [bool(i % 3) for i in range(12)]
    pair = [
        CheckedProgram("x = 1\nopen('left', 'w').close()", ""),
        CheckedProgram("import os\nassert not os.listdir('.')\nx", ""),
    ]
    assert run_programs(pair, workers=1)[1].reason == "NameError: line 3: name 'x' is not defined"
    assert run_programs([]) == []


def test_an_interpreter_that_started_early_meets_nothing_of_the_answer_before(here: Walls) -> None:
    """The next interpreter waits while an answer runs: what that one does to its folder and its user must not reach it."""
    hostile = """
import os, time
for name in ('os.py', 'marshal.py', 'left'):
    open(name, 'w').close()
os.chmod('.', 0)
while True:
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError:
        break
"""
    clean = """
import os
def f():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    before = os.listdir('.')
    open('mine', 'w').close()
    return before, os.listdir('.'), oct(os.stat('.').st_mode & 0o777), os.stat('.').st_uid == os.getuid()
"""
    if not here.files or not here.user:
        pytest.skip("answers have no folder and no user of their own here")
    programs_ = [
        CheckedProgram(hostile + RIGHT, CHECKS),
        CheckedProgram(clean, "assert f() == ([], ['mine'], '0o755', True)"),
    ] * 3
    assert {result.reason for result in run_programs(programs_, workers=1, limits=SHORT)} == {"passed"}


def test_the_waiting_interpreter_ends_with_its_worker(nothing_left: Path) -> None:
    with programs._Worker(SHORT) as worker:
        for _ in range(3):
            assert worker.run(CheckedProgram(RIGHT, CHECKS)).passed
        server = worker._process.pid
        inside = processes_below(server)
        if worker.walls.missing():
            pytest.skip("no interpreter waits here")
        assert inside
    assert not [pid for pid in inside if Path(f"/proc/{pid}").exists()]
    assert list(nothing_left.iterdir()) == []


def test_a_waiting_interpreter_that_was_killed_is_replaced() -> None:
    with programs._Worker(SHORT) as worker:
        for _ in range(3):
            assert worker.run(CheckedProgram(RIGHT, CHECKS)).passed
            for pid in processes_below(worker._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


def test_order_of_sets_is_the_same_in_every_run() -> None:
    answer = "def f(): return ''.join({'apple', 'bee', 'cat', 'dog', 'egg'})"
    assert len({run(answer, "assert False, f()").reason for _ in range(3)}) == 1


# --- the list that must be survived ----------------------------------------------------------------------------------------


def test_infinite_loop() -> None:
    assert run("while True: pass") == CheckedResult("timeout", "timed out after 1 s")
    assert run("def f(x):\n    while True: pass") == CheckedResult("timeout", "timed out after 1 s")


def test_sleeping() -> None:
    result = run("import time\ntime.sleep(1000)", limits=replace(SHORT, wall_seconds=1.0))
    assert result == CheckedResult("timeout", "timed out after 1 s of waiting")


def test_number_of_processes_is_bounded(here: Walls) -> None:
    """Before any fork bomb: the limit is a limit, tried with forty children that only sleep."""
    answer = """
import os, time
def f():
    count = 0
    for _ in range(40):
        try:
            if os.fork() == 0:
                time.sleep(5)
                os._exit(0)
            count += 1
        except OSError:
            break
    return count
"""
    assert run(answer, f"assert 0 <= f() <= {SHORT.processes + 4}", limits=replace(SHORT, wall_seconds=20)).passed


def test_fork_bomb(here: Walls, nothing_left: Path) -> None:
    if not here.user:
        pytest.skip("no limit on processes binds here: neither root nor user namespaces")
    mark = uuid.uuid4().hex
    answer = f"import os\nmark = {mark!r}\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    result = run(answer, limits=replace(SHORT, wall_seconds=3.0))
    assert result.verdict == "timeout"
    assert list(nothing_left.iterdir()) == []
    assert run(RIGHT).passed


def test_daemon_does_not_outlive_its_program(here: Walls) -> None:
    mark = uuid.uuid4().hex
    answer = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(60)', {mark!r}])
    os._exit(0)
time.sleep(0.3)
"""
    assert run(answer + RIGHT).passed
    assert processes_with(mark) == []


def test_ten_gigabytes() -> None:
    assert run("x = bytearray(10 * 2**30)").reason == "out of memory"
    assert run("x = []\nwhile True:\n    x.append(bytearray(2**20))").reason == "out of memory"


def test_a_gigabyte_of_output() -> None:
    noisy = "import sys\nfor _ in range(1024):\n    sys.stdout.write('x' * 2**20)\n    sys.stderr.write('y')\n"
    assert run(noisy + RIGHT, limits=replace(SHORT, seconds=20, wall_seconds=60)).passed


def test_full_disk(here: Walls) -> None:
    answer = "data = b'x' * 2**20\nwith open('big', 'wb') as file:\n    for _ in range(1024):\n        file.write(data)"
    assert not run(answer).passed
    if here.files:
        many = "import os\nfor i in range(100):\n    open(str(i), 'wb').write(b'x' * 2**20 * 8)"
        assert run(many).reason.startswith("OSError")


@pytest.mark.parametrize("leave", ["import os; os._exit(0)", "raise SystemExit", "import sys; sys.exit(0)", "quit()", "exit(0)"])
def test_leaving_early_is_not_passing(leave: str) -> None:
    assert run(leave).verdict == "failed"
    assert run(f"def f(x):\n    {leave}").verdict == "failed"


def test_exit_is_named() -> None:
    words = "the answer ended its process (exit code 0) before its checks were through"
    assert run("import os; os._exit(0)").reason == words


@pytest.mark.parametrize("target", ["os.getppid()", "0", "-1", "-os.getpgid(0)", "1"])
def test_killing_the_parent(here: Walls, target: str) -> None:
    if not here.processes and target == "-1":
        pytest.skip("without a namespace of processes, -1 is every process of the user")
    answer = f"import os, signal\ntry:\n    os.kill({target}, signal.SIGKILL)\nexcept OSError:\n    pass\n"
    results = run_programs([CheckedProgram(answer, CHECKS), CheckedProgram(RIGHT, CHECKS)], workers=1, limits=SHORT)
    assert [result.passed for result in results] == [False, True]


def test_writing_outside_its_folder(here: Walls, tmp_path: Path) -> None:
    if not here.files:
        pytest.skip("the kernel allows no private view of the file system here")
    tmp_path.chmod(0o777)
    places = [str(tmp_path / "x"), "/tmp/x", "/x", "/dev/shm/x", "/usr/x", "../x", str(Path(programs.__file__).parent / "x")]
    answer = """
def f(place):
    try:
        open(place, 'w').close()
    except OSError:
        return 'refused'
    return 'written'
"""
    checks = f"assert [f(place) for place in {places!r}] == ['refused'] * {len(places)}\nassert f('mine') == 'written'"
    assert run(answer, checks).passed
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_the_users(here: Walls, tmp_path: Path) -> None:
    if not here.files:
        pytest.skip("the kernel allows no private view of the file system here")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    places = [str(secret), "/etc/passwd", f"/proc/{os.getpid()}/environ", "/proc/self/environ", str(Path.home() / ".bashrc")]
    answer = "def f(p):\n    try:\n        return len(open(p).read())\n    except OSError:\n        return -1"
    assert run(answer, f"assert [f(p) for p in {places!r}] == [-1] * {len(places)}").passed


def test_reading_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    answer = """
import os
def f():
    try:
        raw = open('/proc/self/environ').read()
    except OSError:
        raw = ''
    return dict(os.environ), 'hunter2' in raw or 'SECRET' in raw
"""
    assert run(answer, "assert f() == ({}, False)").passed


def test_opening_a_socket(here: Walls) -> None:
    if not here.network:
        pytest.skip("the kernel does not allow dropping the network here")
    answer = """
import socket
def f(family, address):
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect((address, 9))
    except OSError:
        return 'refused'
    return 'reached'
"""
    assert run(answer, "assert f(2, '192.0.2.1') == f(2, '127.0.0.1') == f(10, '2001:db8::1') == 'refused'").passed


MONKEYS = [
    "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.abs = builtins.all = lambda *a: 0",
    "import sys\nsys.modules['__main__'].__dict__.clear()",
    "import math\nmath.isclose = math.fabs = lambda *a, **k: 0.0",
    "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)",
    "import os\nos.write(3, b'{\"value\": null}\\n' * 50)",
    "import os\nos.write(1, b'passed')\nos.close(3)",
    "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"passed\": true}')\n    except OSError: pass",
    "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, dict):\n        thing['check'] = thing['passed'] = True",
    "import atexit, os\natexit.register(os._exit, 0)",
    "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()",
    "import sys\nf = sys._getframe()\nwhile f:\n    f.f_globals['_error'] = lambda e: {'value': None}\n    f = f.f_back",
    "def check(candidate): pass",
    "import ctypes\nctypes.string_at(0)",
]


@pytest.mark.parametrize("patch", MONKEYS)
def test_monkey_patching_the_checker(patch: str) -> None:
    checks = (
        "import math\ndef check(c):\n    assert abs(c(1) - 2) < 1e-9 and math.isclose(c(2), 3) and all([c(3) == 4])\ncheck(f)"
    )
    assert run(RIGHT, checks).passed
    assert run(f"{patch}\n{WRONG}", checks).verdict != "passed"


ALWAYS = (
    "class A{base}:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n"
)


@pytest.mark.parametrize("base", ["", "(int)", "(list)", "(str)", "(dict)", "(float)"])
def test_equality_that_is_always_true_is_flagged(base: str) -> None:
    result = run(ALWAYS.format(base=base) + "def f(x): return A()", "assert f(1) == 2")
    assert (result.verdict, result.integrity_flag) == ("failed", True)
    assert "its own __eq__" in result.reason
    assert not run(ALWAYS.format(base=base) + "def f(x): return [A()]", "assert f(1) == [2]").passed


def test_other_operators_do_not_help() -> None:
    answer = (
        "class A(float):\n    __sub__ = __rsub__ = __abs__ = lambda *a: 0.0\n    __lt__ = lambda *a: True\ndef f(x): return A(50)"
    )
    assert not run(answer, "assert abs(f(1) - 2) < 1e-6").passed


def test_a_class_with_equality_that_stays_inside_is_not_flagged() -> None:
    assert run(ALWAYS.format(base="") + RIGHT) == CheckedResult("passed", "passed", False)


def test_deep_recursion() -> None:
    assert run("def f(x): return f(x)").reason == "RecursionError: line 1: maximum recursion depth exceeded"
    assert not run("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return max(f(x), key=f)").passed
    deep = "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y"
    assert not run(deep).passed


def test_output_that_is_not_utf8() -> None:
    assert run("import sys, os\nsys.stdout.buffer.write(b'\\xff\\xfe')\nos.write(2, b'\\x80')\n" + RIGHT).passed
    result = run("raise ValueError(b'\\xff'.decode('latin-1') + '\\ud800\\x1b[31m')")
    assert result.reason.isprintable() or "\ud800" not in result.reason


def test_threads_that_outlive_main() -> None:
    answer = "import threading, time\nfor _ in range(3):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n"
    assert run(answer + RIGHT).passed


def test_folders_are_removed(nothing_left: Path) -> None:
    answer = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nos.chmod('a/b', 0)\n"
    assert run(answer + RIGHT).passed
    assert list(nothing_left.iterdir()) == []


# --- the sandbox itself ----------------------------------------------------------------------------------------------------


def test_an_interpreter_that_does_not_start_is_no_answers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking = "import gsil_bench.tasks.answer_server as p; p._compiled = lambda source: 'raise SystemExit(3)'; "
    monkeypatch.setattr(programs, "BOOT", programs.BOOT.replace("from gsil_bench", breaking + "from gsil_bench"))
    with pytest.raises(UserError, match=r"no program can be run in the sandbox with .*: the answer ended its process"):
        run_programs([CheckedProgram("", "")])


def test_walls_say_what_is_missing() -> None:
    assert Walls(True, False, True, False).missing() == ["processes", "user"]


def test_without_namespaces_the_limits_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where the kernel allows none: the parts that build them are made to fail in the server."""
    boot = programs.BOOT.replace(
        "from gsil_bench",
        "import gsil_bench.tasks.answer_server as p; p._new_namespaces = lambda libc: ''; "
        "p._unused_user = lambda: None; from gsil_bench",
    )
    monkeypatch.setattr(programs, "BOOT", boot)
    assert {"processes", "files"} <= set(walls().missing())
    assert run(RIGHT).passed
    assert run("while True: pass").verdict == "timeout"
    assert run("import os; os._exit(0)").verdict == "failed"
    mark = uuid.uuid4().hex
    daemon = (
        "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n"
        f"    os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(60)', {mark!r}])\ntime.sleep(0.3)\n"
    )
    assert run(daemon + RIGHT).passed
    assert processes_with(mark) == []


def test_an_unprivileged_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else; as anybody else all the other tests do this one's work")
    code = (
        "import os\nos.setgid(65534); os.setuid(65534)\nfrom gsil_bench.tasks.programs import *\n"
        "print(run_programs([CheckedProgram('x = 1', 'assert x == 1')])[0].reason, walls())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=programs.ROOT, capture_output=True, text=True, env={"TMPDIR": "/tmp"})
    if "Permission" in done.stderr or "ModuleNotFound" in done.stderr or "no program can be run" in done.stderr:
        pytest.skip("the interpreter is in a folder that others may not read")
    assert done.stdout.startswith("passed"), done.stderr


def test_container_without_a_runtime() -> None:
    with pytest.raises(UserError, match="container runtime 'no-such-runtime' is not installed"):
        run_programs([CheckedProgram(RIGHT, CHECKS)], container="no-such-runtime")


def test_container_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for docker that notes its options and runs the command after the image here."""
    notes = tmp_path / "notes"
    fake = tmp_path / "docker"
    fake.write_text(
        f"#!{sys.executable}\nimport os, sys\nopen({str(notes)!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        f"rest = sys.argv[sys.argv.index({programs.CONTAINER_IMAGE!r}) + 2:]\n"
        f"rest = [text.replace('/suite', {str(programs.ROOT)!r}) for text in rest]\n"
        "os.execv(sys.executable, [sys.executable, *rest])\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    results = run_programs([CheckedProgram(RIGHT, CHECKS), CheckedProgram(WRONG, CHECKS)], workers=1, container=str(fake))
    assert [result.passed for result in results] == [True, False]
    options = notes.read_text()
    for wanted in ("--network none", "--read-only", "--pids-limit", "--memory", "--cap-drop ALL", "no-new-privileges"):
        assert wanted in options


def test_interpreter_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match="the sandbox cannot start with"):
        run(RIGHT)
    assert list(tmp_path.iterdir()) == []


def test_default_limits() -> None:
    assert (PROGRAM_LIMITS.seconds, PROGRAM_LIMITS.memory_bytes) == (3.0, 1 << 30)
