"""One row of the ladder in a process of its own, stopped between steps by the process that started it.

Lines of JSON: the parent writes the row (see `Row`), then {"go": steps} or {"profile": true}; the worker answers {"imported": …},
{"ready": …}, {"seconds": […], …}, {"table": …}, and at the end {"done": …} or {"failed": reason}. So rows that are compared take
turns, a few steps each, under the same conditions of the machine, and each one's peak memory is its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import peers
import profiles
import shapes
import torch
from peers import BETA, LEARNING_RATE, MAX_GRAD_NORM, PLAIN, TRL, Boundary, Outcome, Task
from shapes import Rung

from gsil_bench.models.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OURS = {
    "D": {"layout": "packed", "gradient_checkpointing": "on"},
    "E": {"layout": "shared", "gradient_checkpointing": "on"},
    "F": {"layout": "shared", "gradient_checkpointing": "off"},
    "defaults": {},
}
"""Rungs that go through the suite's own loop; `defaults` lets it choose layout, micro-batches and checkpointing itself."""
VARIANTS = ("A", "B", "C", "D", "E", "F", "defaults", "trl-like", "trl-like-precomputed", *TRL)
UNLIMITED = 1 << 40
REFERENCE_TOKENS = 8192
"""Positions of one forward pass of the reference, as in a comparison."""


@dataclass(frozen=True)
class Row:
    """What a worker measures."""

    variant: str
    profile: str
    micro_batch: int
    model: str
    device: str
    threads: int
    precision: str
    """"fp32", "autocast" (bf16 products over fp32 weights) or "bf16" (weights; ours and A to C with fp32 masters)."""
    pairs_per_step: int
    steps: int
    seed: int = 0
    data_dir: str = ""

    def task(self, vocabulary: int) -> Task:
        """Its pairs."""
        folder = Path(self.data_dir) if self.data_dir else None
        trees = profiles.pairs(self.profile, self.steps * self.pairs_per_step, vocabulary, self.seed, folder)
        return Task(trees, self.pairs_per_step, self.micro_batch, self.precision == "autocast")


def rung(variant: str, device: str) -> Rung:
    """The arithmetic of a variant."""
    if variant in OURS:
        settings = OURS[variant]
        return Rung(settings.get("layout", "shared"), recomputes=settings.get("gradient_checkpointing") == "on")
    # Off a GPU, TRL's fused head scores every position (trl/trainer/utils.py, `compact = _use_triton(...)`).
    every = variant == "A" or (variant in TRL and device == "cpu")
    resident = variant in ("A", "B", "trl-like", "trl", "trl-defaults")
    recomputes = variant in ("A", "B", "C", "trl-defaults")
    return Rung("padded", "all" if every else "scored", recomputes, resident, recomputes_head=variant != "A" or recomputes)


class Memory:
    """Peak above what was there when it was made: the model, loaded, and the libraries."""

    def __init__(self, device: str) -> None:
        """Start to watch."""
        self._cuda = device == "cuda"
        self._highest = self._base = 0 if self._cuda else resident_bytes()
        self.exact = self._reset()
        if not self._cuda:
            threading.Thread(target=self._watch, daemon=True).start()

    def peak(self) -> int:
        """Bytes: on a GPU all that was allocated, weights included; on a CPU without them."""
        if self._cuda:
            return int(torch.cuda.max_memory_allocated())
        mark = high_water_bytes() if self.exact else 0
        return max(self._highest, mark) - self._base

    def _reset(self) -> bool:
        """Forget the kernel's own high-water mark, where it lets us: ru_maxrss, which it shows, then starts from here."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return False
        return high_water_bytes() < 1.1 * self._base

    def _watch(self) -> None:
        while True:
            self._highest = max(self._highest, resident_bytes())
            time.sleep(0.005)


def resident_bytes() -> int:
    """Resident set of this process."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def high_water_bytes() -> int:
    """Its highest value, as the kernel keeps it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


class Gate:
    """Stands between steps: reports what was done and waits for what comes next."""

    def __init__(self, row: Row, answers: IO[str], facts: dict[str, Any]) -> None:
        """Watch memory from now on."""
        self._row, self._answers, self._facts = row, answers, facts
        self._memory = Memory(row.device)
        self._seconds: list[float] = []
        self._left = self._done = 0
        self._since = 0.0
        self._profiler: Any = None

    def say(self, **message: Any) -> None:
        """A line to the parent."""
        print(json.dumps(message), file=self._answers, flush=True)

    def __call__(self, done: int) -> None:
        """A boundary between steps."""
        if self._row.device == "cuda":
            torch.cuda.synchronize()
        if done == 0:
            self.say(ready=True, **self._facts)
        else:
            self._count()
        if self._left == 0 and self._done < self._row.steps:
            self._wait()
        self._since = time.perf_counter()

    def _count(self) -> None:
        self._seconds.append(time.perf_counter() - self._since)
        self._done, self._left = self._done + 1, self._left - 1
        if self._left:
            return
        if self._profiler is not None:
            self._profiler.stop()
            self.say(table=_table(self._profiler, self._row.device))
        else:
            self.say(seconds=self._seconds, peak_bytes=self._memory.peak(), cpu_seconds=time.process_time())
        self._profiler, self._seconds = None, []

    def _wait(self) -> None:
        command = json.loads(sys.stdin.readline() or '{"quit": true}')
        if command.get("quit"):
            os._exit(0)
        self._left = command.get("go", 1)
        if command.get("profile"):
            from torch.profiler import ProfilerActivity, profile

            kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._row.device == "cuda" else [])
            self._profiler = profile(activities=kinds)
            self._profiler.start()


KINDS = {
    "products of matrices": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "gemm", "cutlass", "nvjet"),
    "attention": ("scaled_dot_product", "flash", "flex"),
    "joining, filling, copying": ("aten::cat", "aten::fill_", "aten::copy_", "aten::index", "aten::zero_", "aten::gather"),
    "optimiser and clipping": ("adam", "_foreach", "optimizer"),
}
"""What an operation's name shows it to be; anything else is elementwise, or Python."""


def _table(profiler: Any, device: str) -> dict[str, Any]:
    """Shares of a step's time by kind of operation, and the longest operations."""
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, attribute) / 1e6 for event in profiler.key_averages()}
    total = sum(spent.values()) or 1.0
    shares = dict.fromkeys((*KINDS, "elementwise and other"), 0.0)
    for name, seconds in spent.items():
        kind = next(
            (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), "elementwise and other"
        )
        shares[kind] += seconds / total
    longest = sorted(spent.items(), key=lambda item: -item[1])[:12]
    return {"seconds": total, "shares": shares, "longest": {name[:70]: seconds / total for name, seconds in longest}}


def train_ours(model: PreTrainedModel, task: Task, variant: str, boundary: Boundary, folder: Path) -> Outcome:
    """The suite's loop as a comparison runs it, shadow losses included, on a schedule of these pairs."""
    from gsil_bench.methods import load_method, with_settings
    from gsil_bench.training.loop import Schedule, Surroundings, train
    from gsil_bench.training.metrics import FILE, read_metrics

    outcome = Outcome()
    started = time.perf_counter()
    logps = _reference(model, task)
    outcome.reference_seconds = time.perf_counter() - started
    settings = {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0, "max_grad_norm": MAX_GRAD_NORM, "beta": BETA}
    if variant != "defaults":
        settings |= {"micro_batch_trees": task.micro_batch, "micro_batch_tokens": UNLIMITED}
    method = with_settings(load_method("dpo"), {**settings, **OURS[variant]})
    # Saving depends on a disk and on how long a run is; TRL does not save either.
    run = Surroundings(boundary, save_every_seconds=UNLIMITED, autocast=task.autocast, shadows=_shadows())
    exact = model.dtype == torch.float32 and not task.autocast  # then the loop also checks its log-ratios before the first step
    _, facts = train(model, method, Schedule(Steps(task, logps), noise_floor=0.0 if exact else None), folder, run)
    first = read_metrics(folder / FILE)[0]
    outcome.loss, outcome.grad_norm = first["loss"], first["grad_norm"]
    outcome.notes = [f"layout {facts['layout']}", *facts["notes"]]
    return outcome


def _reference(model: PreTrainedModel, task: Task) -> list[float]:
    """Summed log-probs of every completion, computed as a comparison does, tree by tree."""
    from gsil_bench.models.logprobs import tree_logps
    from gsil_bench.models.policy import Policy

    with torch.no_grad(), Policy(model, "auto", task.autocast) as policy:
        return [float(logps.double().sum()) for logps in tree_logps(policy, list(task.pairs), REFERENCE_TOKENS)]


def _shadows() -> tuple[Any, ...]:
    """The pairwise methods that a comparison logs beside the trained one."""
    from gsil_bench.methods import baseline_methods, load_method
    from gsil_bench.training.metrics import PAIRWISE

    methods = map(load_method, baseline_methods())
    return tuple(method for method in methods if method.loss is not None and method.needs >= PAIRWISE)


class Steps:
    """The pairs as the loop takes them."""

    def __init__(self, task: Task, logps: Sequence[float]) -> None:
        """Put log-probs to completions: two for each pair."""
        self._steps = [self._step(task, logps, number) for number in range(len(task.steps))]

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Any:
        return iter(self._steps)

    @staticmethod
    def _step(task: Task, logps: Sequence[float], number: int) -> list[Any]:
        from gsil_bench.training.batches import Branch, Tree

        first = number * task.pairs_per_step
        return [
            Tree(
                f"pair-{first + index}",
                tree.prompt_ids,
                Branch(tree.completions[0], logps[2 * (first + index)]),
                (Branch(tree.completions[1], logps[2 * (first + index) + 1]),),
            )
            for index, tree in enumerate(task.steps[number])
        ]


def measure(row: Row, answers: IO[str]) -> None:
    """Build the model, train, answer the parent between steps."""
    torch.set_num_threads(row.threads)
    model = shapes.build(row.model, row.device, bf16=row.precision == "bf16")
    task = row.task(model.config.vocab_size)
    gate = Gate(row, answers, _facts(row, model, task.pairs))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if row.variant in TRL:
            outcome = peers.train_with_trl(model, task, row.variant, gate, folder)
        elif row.variant in PLAIN:
            outcome = peers.train_plainly(model, task, PLAIN[row.variant], gate)
        else:
            outcome = train_ours(model, task, row.variant, gate, folder)
    gate.say(done=True, **dataclasses.asdict(outcome))


def _facts(row: Row, model: PreTrainedModel, pairs: Sequence[TokenTree]) -> dict[str, Any]:
    """What the arithmetic says of this row, for one pair."""
    shape, kind = shapes.Arithmetic(model.config), rung(row.variant, row.device)
    groups = [pairs[start : start + row.pairs_per_step] for start in range(0, len(pairs), row.pairs_per_step)]
    work = sum(shape.work(group, kind, row.micro_batch) for group in groups)
    tokens = sum(len(tree.prompt_ids) + tree.scored_tokens for tree in pairs)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "floor_flops": shape.floor(pairs) / len(pairs),
        "work_flops": work / len(pairs),
        "tokens_per_pair": tokens / len(pairs),
        "padding_share": shapes.padding_share(pairs, kind.layout, row.micro_batch),
    }


def prepare(variant: str) -> str:
    """Import what the row needs, so that none of it counts as its memory; returns what is missing."""
    import transformers.models.auto.modeling_auto

    del transformers
    if variant in TRL:
        return peers.import_trl()
    if variant in OURS:
        try:
            import gsil_bench.training.loop
        except ImportError as error:
            return f"gsil_bench's training backend cannot be imported: {error}"
        del gsil_bench
    return ""


def main() -> None:
    """Serve one row."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not reach the parent
    row = Row(**json.loads(sys.stdin.readline()))
    missing = prepare(row.variant)
    if missing:
        print(json.dumps({"failed": missing}), file=answers, flush=True)
        return
    print(json.dumps({"imported": True}), file=answers, flush=True)
    if not json.loads(sys.stdin.readline() or "{}").get("load"):
        return
    try:
        measure(row, answers)
    except torch.OutOfMemoryError:
        print(json.dumps({"failed": "out of memory"}), file=answers, flush=True)
    except profiles.ProfileError as error:
        print(json.dumps({"failed": str(error)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
