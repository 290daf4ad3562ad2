"""Run arbitrary Python answers against their checks: `run_programs`. Needs the user's consent; the caller asks for it.

An answer and its checks never meet in one process.

1. The answer runs in a fresh interpreter (`answer_process.py`) without environment, streams and network, with limits on processor
   time, memory, file size, processes and descriptors, as the init's child of a process namespace of its own, on a read-only view
   of the interpreter's folders with one small writable folder that is thrown away. It never sees the checks.
2. The checks run in another process, which calls the answer's functions over a pipe and gets plain values back: numbers, texts,
   lists. What an answer patches, prints, exits or forges stays with it; it can only return values. An object of a class of the
   answer's own crosses as a number, and equals nothing, so an `__eq__` that is always true fails, and is flagged.

Who runs what: this file is the caller's side. It starts one server per worker (`answer_server.py`), which builds the walls and
forks for every program; `checker.py` is the process of the checks.

The walls need namespaces of the kernel: root has them, others where user namespaces are enabled. `walls` tries what works here.
Without them an answer still has the limits, but sees the user's files and network: then use `container`, which runs all this in
docker or podman without network. Nothing here is a filter of system calls: a hole in the kernel is a hole in the wall.

Differences from human-eval's runner, which shares one process: time is processor time, so a busy machine changes no score, and
an answer that sleeps fails after `wall_seconds`; a mutable argument that an answer changes is copied back only when it is the
argument itself and not a part of one; `is` between arguments and results does not hold.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gsil_bench.errors import UserError
from gsil_bench.tasks.confinement import MEBIBYTE, ROOT, START_SECONDS, Worker, run_all

Verdict = Literal["passed", "failed", "timeout"]
BOOT = "import sys; sys.path.insert(0, {root!r}); from gsil_bench.tasks.answer_server import serve; serve({folder!r})"
CONTAINER_IMAGE = "python:3.11-slim"


@dataclass(frozen=True)
class ProgramLimits:
    """What an answer may use."""

    seconds: float = 3.0
    """Processor time of its process, as human-eval's 3 seconds on an idle machine."""
    wall_seconds: float = 10.0
    """Waiting time of the whole program: an answer that sleeps meets this."""
    memory_bytes: int = 1024 * MEBIBYTE
    """Address space of each process."""
    file_bytes: int = 16 * MEBIBYTE
    """The largest file."""
    folder_bytes: int = 64 * MEBIBYTE
    """Everything in its folder, where the folder is of memory."""
    processes: int = 16
    """Processes and threads at the same time."""
    open_files: int = 64


PROGRAM_LIMITS = ProgramLimits()


@dataclass(frozen=True)
class CheckedProgram:
    """An untrusted answer and the trusted text that decides about it."""

    answer: str
    checks: str
    """Statements, usually asserts. The names that neither they nor Python define are the answer's."""
    exports: tuple[str, ...] = ()
    """Names of the checks that are the answer's although Python has such a name too: a function to be written called `sum`."""
    setup: str = ""
    """Trusted text that is executed in the answer's namespace, after the answer: objects of classes that it has to define."""


TRIAL = CheckedProgram("def f(): return 1", "assert f() == 1")
"""What a worker runs before anything else: where it fails, the sandbox does, and no answer."""


@dataclass(frozen=True)
class CheckedResult:
    """What became of one program."""

    verdict: Verdict
    reason: str
    """One printable line: "passed", "AssertionError: line 7 of the checks: assert f(1) == 2", "timed out after 3 s"…"""
    integrity_flag: bool = False
    """The answer returned an object whose class has its own `__eq__`, and a check compared it."""

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return self.verdict == "passed"


@dataclass(frozen=True)
class Walls:
    """What was tried and holds on this machine, limits apart."""

    network: bool
    """No network can be reached."""
    processes: bool
    """A namespace of processes: nothing of an answer outlives it and nothing outside can be signalled."""
    files: bool
    """An answer sees the interpreter's folders, read-only, and a folder of its own."""
    user: bool
    """It runs as a user without rights, or in a user namespace."""

    def missing(self) -> list[str]:
        """The names of the walls that do not stand."""
        return [name for name, stands in asdict(self).items() if not stands]


def run_programs(
    programs: Sequence[CheckedProgram],
    workers: int = 2,
    limits: ProgramLimits = PROGRAM_LIMITS,
    container: str | None = None,
) -> list[CheckedResult]:
    """Run answers against their checks, each in processes of its own; one result per program, in order.

    Args:
        programs: answers with their checks.
        workers: how many run at the same time.
        limits: of each answer.
        container: a runtime that speaks docker's command line ("docker", "podman"): each worker then runs in a container.

    Raises:
        UserError: the sandbox itself cannot run here. An answer can only fail.
    """
    return run_all(programs, workers, lambda: _Worker(limits, container))


def walls(container: str | None = None) -> Walls:
    """The walls that stand here: tried in a fresh worker, not assumed."""
    with _Worker(PROGRAM_LIMITS, container) as worker:
        return worker.walls


def free_names(checks: str, exports: Sequence[str] = ()) -> list[str]:
    """The names that checks read and neither define nor find in Python, and those of `exports` that they read."""
    read, bound = set(), set()
    for node in ast.walk(ast.parse(checks)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                read.add(name)
            case ast.Name(id=name):
                bound.add(name)
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.alias(name=name, asname=alias):
                bound.add(alias or name.partition(".")[0])
    return sorted(name for name in read if name in exports or (name not in bound and not hasattr(builtins, name)))


# ---------------------------------------------------------------------------------------------------------------------------
# One worker


class _Worker(Worker[CheckedProgram, CheckedResult]):
    """The caller's side of one server."""

    def __init__(self, limits: ProgramLimits, container: str | None = None) -> None:
        super().__init__()
        self.limits = limits
        self.container = container
        self.walls = Walls(False, False, False, False)

    def run(self, job: CheckedProgram) -> CheckedResult:
        """Run one program."""
        wish = {"program": asdict(job), "limits": asdict(self.limits)}
        reply, word = self.request(wish, self.limits.wall_seconds + START_SECONDS)
        if reply["word"] != word:
            raise UserError("the sandbox answered for another program: its replies cannot be trusted")
        return self._result(reply["message"], reply["late"], reply["status"])

    def _result(self, message: Mapping[str, Any], late: bool, status: int) -> CheckedResult:
        flag = bool(message.get("integrity_flag"))
        if late:
            return CheckedResult("timeout", f"timed out after {self.limits.wall_seconds:g} s of waiting")
        if message.get("passed"):
            return CheckedResult("passed", "passed", flag)
        if "ended" in message:
            return self._ended(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
        reason = str(message.get("reason") or "the checks took too long with the answer's values")
        return CheckedResult("failed", reason, flag)

    def _ended(self, code: int) -> CheckedResult:
        """Why an answer's process ended before its checks."""
        if code in (128 + signal.SIGPROF, 128 + signal.SIGXCPU):
            return CheckedResult("timeout", f"timed out after {self.limits.seconds:g} s")
        if code > 128:
            return CheckedResult("failed", f"crashed (signal {code - 128})")
        return CheckedResult("failed", f"the answer ended its process (exit code {code}) before its checks were through")

    def start(self) -> None:
        """Start the server."""
        if not hasattr(os, "fork"):
            raise UserError("running programs needs Linux or macOS: this system cannot fork")
        self._folder = "" if self.container else tempfile.mkdtemp(prefix="gsil-bench-")
        self.launch(self._command(), ("PATH", "HOME", "DOCKER_HOST", "XDG_RUNTIME_DIR") if self.container else ())
        limits = json.dumps({"limits": asdict(self.limits)}).encode() + b"\n"
        self.walls = Walls(**self.greet(limits, "the sandbox cannot start")["walls"])
        trial = self.run(TRIAL)
        if not trial.passed:
            self.stop()
            raise UserError(f"no program can be run in the sandbox with {sys.executable}: {trial.reason}")

    def _command(self) -> list[str]:
        """How the server is started."""
        if self.container is None:
            return [sys.executable, "-s", "-P", "-W", "ignore", "-c", BOOT.format(root=str(ROOT), folder=self._folder)]
        runtime = shutil.which(self.container)
        if runtime is None:
            raise UserError(f"container runtime {self.container!r} is not installed: install it, or run without a container")
        options = ["run", "--rm", "-i", "--network", "none", "--read-only", "--pids-limit", "128", "--memory", "4g"]
        options += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65534:65534"]
        options += ["--tmpfs", "/tmp:size=256m", "-v", f"{ROOT / 'gsil_bench'}:/suite/gsil_bench:ro", CONTAINER_IMAGE]
        return [runtime, *options, "python", "-s", "-P", "-W", "ignore", "-c", BOOT.format(root="/suite", folder="")]
