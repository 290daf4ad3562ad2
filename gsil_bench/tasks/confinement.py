"""What the two sandboxes share (`sandbox`, the restricted language, and `programs`, any Python): a program's process, the server
that forks it, and the caller's side of such a server.

It is imported in all of these processes. What a confined process calls must be loaded before it is confined, because it may be
able to open no file; what a server imports is paid for by every worker.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, Self, TypeVar

from gsil_bench.errors import UserError

if sys.platform != "win32":  # so that the module can be imported, and say what is missing, everywhere
    import resource

Job = TypeVar("Job")
Result = TypeVar("Result")

ROOT = Path(__file__).absolute().parents[2]
"""The folder that holds the package: a server, which is started elsewhere, imports from it."""
MEBIBYTE = 1 << 20
NOBODY = 65534
DIE_WITH_PARENT, NO_NEW_PRIVILEGES = 1, 38  # options of prctl
LONGEST_REASON = 200
START_SECONDS = 60.0
ANSWER_FILE = "<answer>"
CHECKS_FILE = "<checks>"


# ---------------------------------------------------------------------------------------------------------------------------
# The process of a program


@functools.cache
def c_library() -> Any:
    """The C library, None where it cannot be called. A server loads it before it forks: a confined process can open no file."""
    try:
        import ctypes

        return ctypes.CDLL(None)
    except (ImportError, OSError, TypeError):
        return None


def process_control(option: int, value: int) -> None:
    """Call prctl with one value, on Linux; nothing elsewhere."""
    libc = c_library()
    if sys.platform != "linux" or libc is None:
        return
    import ctypes

    libc.prctl(option, *(ctypes.c_ulong(argument) for argument in (value, 0, 0, 0)))


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    process_control(DIE_WITH_PARENT, signal.SIGKILL)


def drop_capabilities() -> None:
    """Give up, on Linux, every capability and every way to get one: an ordinary user has all of them in a new user namespace."""
    libc = c_library()
    if sys.platform != "linux" or libc is None:
        return
    import ctypes

    version_3 = 0x20080522
    with contextlib.suppress(AttributeError):
        process_control(NO_NEW_PRIVILEGES, 1)
        libc.capset((ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)())


def limit(name: str, soft: int, hard: int | None = None) -> None:
    """Lower one resource limit, never below what is already lower."""
    what = getattr(resource, name)
    present = resource.getrlimit(what)[1]
    wanted = [value if present == resource.RLIM_INFINITY else min(value, present) for value in (soft, hard or soft)]
    try:
        resource.setrlimit(what, (wanted[0], wanted[1]))
    except (OSError, ValueError):
        if sys.platform != "darwin":  # macOS refuses a limit on address space; there the other limits must do
            raise


def silence_streams() -> None:
    """Let the standard streams lead nowhere."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)


def describe(error: BaseException, answer: str, checks: str) -> str:
    """The class of an exception, the line of the program that raised it, and the exception's words or the failed assert.

    Args:
        error: what running the texts raised.
        answer: the text that was compiled as ANSWER_FILE.
        checks: the text that was compiled as CHECKS_FILE.
    """
    file, line = _place(error)
    try:
        # Errors of the system and of the import machinery speak of this machine's paths.
        words = "" if isinstance(error, OSError | ImportError) else str(error)
    except Exception:  # an exception may hold values whose text is too long or too deep to make
        words = ""
    text = checks if file == CHECKS_FILE else answer
    # Not splitlines: that splits at characters which do not end a line of Python.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if isinstance(error, AssertionError) and not words and 0 < line <= len(lines):
        words = lines[line - 1].strip()
    place = f": line {line}" + (" of the checks" if file == CHECKS_FILE else "") if line else ""
    return f"{type(error).__name__}{place}" + (f": {words}" if words else "")


def _place(error: BaseException) -> tuple[str, int]:
    """The last line of a program that an exception came through, and its file; "" and 0 if none."""
    file, line = "", 0
    traceback = error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename in (ANSWER_FILE, CHECKS_FILE):
            file, line = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    return file, line


def printable(text: str) -> str:
    """One line of a bounded length without control characters and addresses, which differ from run to run."""
    text = re.sub("0x[0-9a-f]+", "0x…", " ".join(text[: 4 * LONGEST_REASON].split()))
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------------------
# The server: a fresh interpreter that forks once per program


def send(message: Mapping[str, Any]) -> None:
    """Send the caller a line."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def chunks(descriptor: int, seconds: float) -> Iterator[bytes]:
    """What arrives at a descriptor until its end. Raises TimeoutError when the time is up."""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return
            yield chunk
    raise TimeoutError


def remove(folder: str) -> None:
    """Remove a folder as far as it can be done."""
    with contextlib.suppress(RecursionError):  # a program that broke out may have left folders in folders without end
        shutil.rmtree(folder, ignore_errors=True)


def has_no_network() -> bool:
    """Whether no packet can leave this machine. The addresses tried are reserved for documentation."""
    return not any(_has_route(family, address) for family, address in (("AF_INET", "192.0.2.1"), ("AF_INET6", "2001:db8::1")))


def _has_route(family: str, address: str) -> bool:
    """Whether packets to an address would leave this machine."""
    import socket

    try:
        # Connecting a datagram socket sends nothing, but needs a route.
        with socket.socket(getattr(socket, family), socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------------
# The caller's side


class Died(Exception):
    """The server ended or fell silent."""


class Worker(ABC, Generic[Job, Result]):
    """The caller's side of one server: started on entry, restarted if it dies, ended on exit."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""
        """The server's folder: it removes that itself, unless it is killed."""

    @abstractmethod
    def run(self, job: Job) -> Result:
        """Run one program."""

    @abstractmethod
    def start(self) -> None:
        """Start the server, with `launch` and `greet`."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def launch(self, command: Sequence[str], more: Sequence[str] = ()) -> None:
        """Start a server's process.

        Args:
            command: what to execute.
            more: names of variables that it gets as they are here; there are few others.
        """
        # The fixed hash seed makes the order of sets, and with it the score of an answer that depends on it, the same in every
        # run. Some clusters' interpreters do not start without LD_LIBRARY_PATH.
        environment = {"PYTHONHASHSEED": "0", "TMPDIR": tempfile.gettempdir()}
        environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", *more) if name in os.environ}
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, cwd="/", env=environment, start_new_session=True
            )
        except OSError as error:
            if self._folder:
                remove(self._folder)
            raise UserError(f"the sandbox cannot start with {sys.executable}: {error.strerror or error}") from error

    def greet(self, line: bytes, failure: str) -> dict[str, Any]:
        """A started server's first line. If there is none, stop it and raise UserError: `failure`, and its last words."""
        process = self._process
        assert process is not None
        try:
            return self.ask(line, START_SECONDS)
        except Died:
            process.kill()
            words = process.stderr.read().decode("utf-8", "replace") if process.stderr else ""
            self.stop()
            last = words.strip().rpartition("\n")[2] or "no answer"
            raise UserError(f"{failure}: {last}") from None

    def request(self, job: Mapping[str, Any], seconds: float) -> tuple[dict[str, Any], str]:
        """The server's reply to a job, and the random word that the job was given.

        A server that dies is replaced once: a fault of the machine must not become a score of zero.
        """
        for _ in range(2):
            word = secrets.token_hex(16)
            try:
                return self.ask(json.dumps({**job, "word": word}).encode() + b"\n", seconds), word
            except Died:
                self.stop()
                self.start()
        raise UserError("the sandbox died twice while running the same program (out of memory on this machine?)")

    def ask(self, line: bytes, seconds: float) -> dict[str, Any]:
        """Send a line, receive a line."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        received = b""
        try:
            view = memoryview(line)
            while view:
                view = view[process.stdin.write(view) :]
            for chunk in chunks(process.stdout.fileno(), seconds):
                received += chunk
                if received.endswith(b"\n"):
                    answer: dict[str, Any] = json.loads(received)
                    return answer
        except (OSError, ValueError) as error:  # a broken pipe, TimeoutError, half a line
            raise Died from error
        raise Died

    def stop(self) -> None:
        """End the server, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        _close(process.stdin)
        try:
            process.wait(timeout=5)  # at the end of its input it removes its folder and ends
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _close(process.stdout)
        _close(process.stderr)
        if self._folder:
            remove(self._folder)  # still there if it was killed


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()


def run_all(jobs: Sequence[Job], workers: int, new_worker: Callable[[], Worker[Job, Result]]) -> list[Result]:
    """Run programs on so many workers at the same time; one result per program, in order."""
    results: dict[int, Result] = {}
    todo = deque(range(len(jobs)))

    def work() -> None:
        with new_worker() as worker:
            for index in _drain(todo):
                results[index] = worker.run(jobs[index])

    count = max(1, min(workers, len(jobs))) if jobs else 0
    if count:
        with ThreadPoolExecutor(count) as pool:
            try:
                for future in [pool.submit(work) for _ in range(count)]:
                    future.result()
            except BaseException:
                todo.clear()  # the other workers stop after the program they are at, instead of finishing the list
                raise
    return [results[index] for index in range(len(jobs))]


def _drain(todo: deque[int]) -> Iterator[int]:
    """Take entries until none is left. popleft is atomic, so no two workers take the same one."""
    while True:
        try:
            index = todo.popleft()
        except IndexError:
            return
        yield index
