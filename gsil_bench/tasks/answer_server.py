"""The server: a small interpreter that builds the walls around answers once, and forks for every program.

`programs` starts one per worker. For each program it has an interpreter for the answer (`answer_process`), confined and below an
init of its own, and forks a checker (`checker`); the next program's interpreter starts while this one's checks run.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import gc
import json
import marshal
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from gsil_bench.tasks.checker import run_checker
from gsil_bench.tasks.confinement import (
    NOBODY,
    c_library,
    chunks,
    die_with_parent,
    drop_capabilities,
    has_no_network,
    limit,
    process_control,
    remove,
    send,
    silence_streams,
)
from gsil_bench.tasks.programs import CheckedProgram, ProgramLimits, Walls

ANSWER_SOURCE = Path(__file__).with_name("answer_process.py")
WRITABLE = "answer"
# Flags of Linux, which Python 3.11 does not name.
NEW_MOUNT, NEW_IPC, NEW_USER, NEW_PID, NEW_NETWORK = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MOUNT_NO_SUID, MOUNT_NO_DEVICES, MOUNT_BIND, MOUNT_RECURSIVE, MOUNT_PRIVATE = 2, 4, 4096, 16384, 1 << 18
SYSCALL_MOUNT_SETATTR, AT_RECURSIVE, ATTRIBUTE_READ_ONLY = 442, 0x8000, 1
SUBREAPER, DETACH = 36, 2


@dataclass(frozen=True)
class _House:
    """Where the answers of one worker live."""

    folder: str
    """The worker's folder; the root directory of answers if `walls.files`."""
    walls: Walls
    uids: tuple[int | None, ...]
    """The users that answers become, in turn; None: they stay who they are. Two of them only where all the
    walls stand: then the next interpreter starts early."""
    own_processes: int
    """Descriptor of the server's own namespace of processes, to come back to it after each `unshare`; -1 if it cannot."""
    process_base: int
    """How many processes of that user there are already."""
    source: str
    """What the interpreter is given to run: `answer_process.py`, compiled once."""
    packages: tuple[str, ...]
    """Folders of installed packages: an answer may use numpy if it is here."""


@dataclass(frozen=True)
class _Seat:
    """An interpreter for one answer, confined and without a program yet."""

    init: int
    """The process to wait for and to kill."""
    stream: socket.socket
    """The checker's end of its channel."""
    uid: int | None
    limits: ProgramLimits


def serve(folder: str) -> None:
    """Answer jobs, one JSON line each, until the caller closes the pipe. `folder` is this server's own; it is removed."""
    c_library()
    job = json.loads(sys.stdin.buffer.readline())
    folder = folder or tempfile.mkdtemp(prefix="gsil-bench-")
    house = _build(folder, ProgramLimits(**job["limits"]))
    import random  # noqa: F401  what checks import, read once
    import string  # noqa: F401

    os.environ.pop("PYTHONPATH", None)
    gc.freeze()
    _become_subreaper()
    spare: list[_Seat] = []
    try:
        send({"walls": asdict(house.walls)})
        for line in sys.stdin.buffer:
            job = json.loads(line)
            program = CheckedProgram(**{**job["program"], "exports": tuple(job["program"]["exports"])})
            send({**_run_job(program, ProgramLimits(**job["limits"]), house, spare), "word": job["word"]})
    finally:
        if spare:
            _end(spare.pop().init)
        if libc := c_library():
            with contextlib.suppress(AttributeError):
                libc.umount2(folder.encode(), DETACH)
        remove(folder)


def _become_subreaper() -> None:
    """Have the orphans among this process's descendants handed to it, so that they can be found."""
    process_control(SUBREAPER, 1)


# ---------------------------------------------------------------------------------------------------------------------------
# The walls


def _build(folder: str, limits: ProgramLimits) -> _House:
    """Raise every wall that the kernel allows, and try it."""
    libc = c_library()
    namespaces = sys.platform == "linux" and libc is not None and _new_namespaces(libc)
    network = has_no_network()
    files = bool(namespaces) and _mount_root(libc, folder, limits.folder_bytes)
    processes = bool(namespaces) and _new_process_namespace(libc)
    own_processes = _own_process_namespace(libc) if processes else -1
    uids: tuple[int | None, ...] = (None,)
    base = 4
    if os.geteuid() == 0 and namespaces != "user":
        uids = (_unused_user(),)
        if own_processes >= 0 and files and (other := _unused_user(0x68000000)) not in (*uids, NOBODY):
            uids += (other,)
    elif namespaces != "user":
        base += _processes_of_this_user()
    walls_here = Walls(network, processes, files, uids[0] is not None or namespaces == "user")
    packages = tuple(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    return _House(folder, walls_here, uids, own_processes, base, _compiled(ANSWER_SOURCE.read_text(encoding="utf-8")), packages)


def _compiled(source: str) -> str:
    """A text for "-c" that runs another one which this interpreter, the same one, has compiled already."""
    code = marshal.dumps(compile(source, "<string>", "exec", dont_inherit=True))
    return f"import marshal, binascii\nexec(marshal.loads(binascii.a2b_base64({base64.b64encode(code).decode()!r})))"


def _new_namespaces(libc: Any) -> str:
    """Namespaces of mounts, network and shared memory: "root" if root made them, "user" in a user namespace, "" if neither."""
    wanted = NEW_MOUNT | NEW_NETWORK | NEW_IPC
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(wanted) == 0:
        return "root"
    if libc.unshare(wanted | NEW_USER) != 0:
        return ""
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError:
        return ""
    return "user"


def _unused_user(base: int = 0x60000000) -> int:
    """A user id that nobody has, so that the limit on processes counts this worker's only; "nobody" where ids are few."""
    candidate = base + os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(candidate)
            os._exit(0)
        finally:
            os._exit(1)
    return candidate if os.waitpid(pid, 0)[1] == 0 else NOBODY


def _processes_of_this_user() -> int:
    """Where the limit on processes counts all of the user's, how many there are already (threads included)."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*/task"):
        with contextlib.suppress(OSError):
            count += len(list(folder.iterdir())) if folder.stat().st_uid == os.geteuid() else 0
    return count or 256


def _new_process_namespace(libc: Any) -> bool:
    """Whether a process may make a namespace of processes for its children: tried in one that ends at once."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if libc.unshare(NEW_PID) == 0 else 1)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _own_process_namespace(libc: Any) -> int:
    """A descriptor with which this process can leave a namespace that it made for its children; -1 if it may not."""
    try:
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if libc.unshare(NEW_PID) == 0 and libc.setns(own, NEW_PID) == 0 and libc.unshare(NEW_PID) == 0 else 1)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1] == 0:
        return own
    os.close(own)
    return -1


def _mount_root(libc: Any, folder: str, size: int) -> bool:
    """Make of a folder a root directory that holds the interpreter, read-only, and one writable folder. Whether that worked."""
    text = folder.encode()
    if libc.mount(b"none", b"/", None, MOUNT_RECURSIVE | MOUNT_PRIVATE, None) != 0:
        return False
    options = f"size={size},nr_inodes=4096,mode=755".encode()
    if libc.mount(b"tmpfs", text, b"tmpfs", MOUNT_NO_SUID | MOUNT_NO_DEVICES, options) != 0:
        return False
    try:
        for path in _visible():
            _bind(libc, path, folder + path)
        os.mkdir(f"{folder}/{WRITABLE}")
    except OSError:
        libc.umount2(text, DETACH)
        return False
    return True


def _visible() -> list[str]:
    """What an interpreter reads, outer folders first, none within another."""
    here = [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent), "/usr", "/lib", "/lib64", "/bin"]
    here += ["/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom"]
    kept: list[str] = []
    for path in sorted({path for path in here if os.path.lexists(path)}, key=len):
        if path != "/" and not any(path == outer or path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def _bind(libc: Any, source: str, target: str) -> None:
    """Show a file or folder at another place, read-only. Raises OSError if the kernel refuses."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source) and not source.startswith(sys.prefix):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        Path(target).touch()
    if libc.mount(source.encode(), target.encode(), None, MOUNT_BIND | MOUNT_RECURSIVE, None) != 0:
        raise OSError(f"cannot show {source}")
    attributes = (ctypes.c_uint64 * 4)(ATTRIBUTE_READ_ONLY | MOUNT_NO_SUID, 0, 0, 0)
    if libc.syscall(SYSCALL_MOUNT_SETATTR, -100, target.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(32)) != 0:
        raise OSError(f"cannot make {source} read-only")


# ---------------------------------------------------------------------------------------------------------------------------
# One program


def _run_job(program: CheckedProgram, limits: ProgramLimits, house: _House, spare: list[_Seat]) -> dict[str, Any]:
    """Run one program and leave nothing of it behind.

    Args:
        program: what to run.
        limits: of the answer.
        house: where.
        spare: at most one interpreter, started while the program before this one was checked; replaced by the next one.
    """
    own = f"{house.folder}/{WRITABLE}" if house.walls.files else tempfile.mkdtemp(dir=house.folder)
    seat = _take(spare, limits) or _new_seat(house, limits, house.uids[0], f"/{WRITABLE}" if house.walls.files else own)
    if seat.uid is not None:
        os.chown(own, seat.uid, seat.uid)
        os.chmod(own, 0o755)  # the answer before this one owned it
        if not house.walls.files:
            os.chmod(house.folder, 0o711)
    receive, report = os.pipe()
    checker = os.fork()
    if checker == 0:
        os.close(receive)
        run_checker(seat.stream, program, report)
    seat.stream.close()
    os.close(report)
    try:
        # Two answers' processes must be unable to touch each other: neither by signals, nor by files, nor by using up the user's
        # number of processes. Only then may one start while the other runs; its program comes when that one is gone.
        if len(house.uids) == 2:
            spare.append(_new_seat(house, limits, house.uids[seat.uid == house.uids[0]], f"/{WRITABLE}"))
        message, late = _read(receive, limits.wall_seconds)
        status = _end(seat.init, grace=0.0 if late or "ended" not in message else 2.0)
    finally:
        os.close(receive)
        _end(checker)
        if not house.walls.processes:
            _kill_orphans()
        _empty(own, house.walls.files)
    return {"message": message, "late": late, "status": status}


def _take(spare: list[_Seat], limits: ProgramLimits) -> _Seat | None:
    """The interpreter that waits, if it is alive (a machine short of memory kills it first) and has these limits."""
    if not spare:
        return None
    seat = spare.pop()
    if os.waitpid(seat.init, os.WNOHANG)[0]:
        seat.stream.close()
        return None
    if seat.limits != limits:
        seat.stream.close()
        _end(seat.init)
        return None
    return seat


def _new_seat(house: _House, limits: ProgramLimits, uid: int | None, folder: str) -> _Seat:
    """Start an interpreter."""
    ours, theirs = socket.socketpair()
    with theirs:
        return _Seat(_fork_init(house, limits, uid, folder, theirs), ours, uid, limits)


def _fork_init(house: _House, limits: ProgramLimits, uid: int | None, folder: str, stream: socket.socket) -> int:
    """Fork the answer's init, in a namespace of processes of its own if there are such.

    A process that cannot come back from making one for its children needs a process between, which makes it.
    """
    libc, direct = c_library(), house.own_processes >= 0
    if direct and libc.unshare(NEW_PID) != 0:
        raise OSError("the kernel gives no namespace of processes any more")
    pid = os.fork()
    if pid:
        if direct and libc.setns(house.own_processes, NEW_PID) != 0:
            os._exit(1)  # whatever is forked now would be among the answer's processes
        return pid
    try:
        if house.walls.processes and not direct:
            die_with_parent()
            if libc.unshare(NEW_PID) != 0:
                os._exit(255)
            inner = os.fork()
            if inner:
                os.closerange(3, 256)  # an end of a pipe that is held here would never be seen to close
                status = os.waitpid(inner, 0)[1]
                os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
        _init_process(house, limits, uid, folder, stream.fileno())
    finally:
        os._exit(255)


def _read(descriptor: int, seconds: float) -> tuple[dict[str, Any], bool]:
    """What the checker reports, and whether it was late."""
    received = b""
    try:
        for chunk in chunks(descriptor, seconds):
            received += chunk
        return json.loads(received), False
    except TimeoutError:
        return {}, True
    except ValueError:  # the checker was killed before it could say anything
        return {}, False


def _end(pid: int, grace: float = 0.0) -> int:
    """Kill a process, after waiting for its own end; its status."""
    deadline = time.monotonic() + grace
    while grace and time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _empty(folder: str, keep: bool) -> None:
    """Remove a folder, or what is in it."""
    if not keep:
        remove(folder)
        return
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError, RecursionError):
            shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


def _kill_orphans() -> None:
    """Kill what an answer left behind, where no namespace does it: whatever was handed to this process, until nothing is."""
    me = os.getpid()
    for _ in range(2000):
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{me}/task/{me}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            found, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not found:
            time.sleep(0.001)


# ---------------------------------------------------------------------------------------------------------------------------
# The answer's process, up to the start of its interpreter


def _init_process(house: _House, limits: ProgramLimits, uid: int | None, folder: str, stream: int) -> NoReturn:
    """Start the answer's interpreter, wait for it, take everything it has started along, and hand on how it ended.

    With a namespace of processes this one is its init: the kernel kills the others with it.
    """
    status = 255
    try:
        die_with_parent()
        os.setsid()
        os.dup2(stream, 3)
        os.closerange(4, 256)  # an end of a pipe that is held here would never be seen to close
        pid = os.fork()
        if pid == 0:
            _exec_answer(house, limits, uid, folder)
        os.close(3)
        ended = None
        while ended is None:
            found, code = os.waitpid(-1, 0)
            ended = code if found == pid else None
        status = 128 + os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else min(os.WEXITSTATUS(ended), 127)
    finally:
        os._exit(status)


def _exec_answer(house: _House, limits: ProgramLimits, uid: int | None, folder: str) -> NoReturn:
    """Become a bare interpreter without anything that is not the answer's. It enters its folder when its program arrives."""
    try:
        die_with_parent()
        os.setsid()
        silence_streams()
        with contextlib.suppress(OSError):  # if the machine runs out of memory, this goes first
            Path("/proc/self/oom_score_adj").write_text("1000")
        if house.walls.files:
            os.chroot(house.folder)
        # In the one folder of a worker the answer before may still be running. A folder of its own may lie behind one that only
        # this user can pass.
        os.chdir("/" if house.walls.files else folder)
        arguments = [folder if house.walls.files else "", *house.packages]
        if uid is not None:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        drop_capabilities()
        _set_limits(limits, house.process_base)
        environment = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        # "-I -S", spelled out, but for the fixed hash seed; the folders of packages are the arguments, their hooks do not run.
        options = ["-s", "-S", "-P", "-B", "-c", house.source, *arguments]
        os.execve(sys.executable, [sys.executable, *options], environment)
    finally:
        os._exit(254)


def _set_limits(limits: ProgramLimits, process_base: int) -> None:
    for name in ("SIGPROF", "SIGXCPU", "SIGPIPE", "SIGINT", "SIGTERM"):  # ignored signals would be handed down
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    seconds = math.ceil(limits.seconds) + 1
    limit("RLIMIT_CPU", seconds, seconds + 1)
    limit("RLIMIT_AS", limits.memory_bytes)
    limit("RLIMIT_FSIZE", limits.file_bytes)
    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_NOFILE", limits.open_files)
    limit("RLIMIT_NPROC", limits.processes + process_base)
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)  # survives the start of the interpreter
