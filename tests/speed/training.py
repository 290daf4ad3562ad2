"""The training ladder: what each idea of the backend is worth, and TRL's DPOTrainer beside it, in one run.

    python tests/speed/training.py                       # all variants, profiles and micro-batches on two threads: an hour
    python tests/speed/training.py --quick               # one small step of each: shows that it works
    python tests/speed/training.py --profiles ultrafeedback --micro-batches 8 --variants F,trl-precomputed,trl --profile
    python tests/speed/training.py --preset h200 --json FILE   # 0.5B and 7B shapes on a GPU, within nine minutes

| variant | what it is |
|---|---|
| A | padded, resident reference, whole logits: what SPIN's and GSIL's codes do |
| B | TRL's way: head on completions only, in chunks |
| C | B with a cached reference |
| D | C, packed: no padding |
| E | D with the prompt shared by its two completions |
| F | E without activation checkpointing (A to E have it on) |
| defaults | the suite's own loop left to itself: layout, micro-batches and checkpointing are its own |
| trl, trl-precomputed | TRL 1.16's DPOTrainer, activation checkpointing off, resident or precomputed reference |
| trl-defaults | TRL's DPOTrainer as it comes: bf16 autocast, checkpointing on, resident reference |
| trl-like, trl-like-precomputed | B and C without checkpointing: they stand for TRL where it is not installed |

D, E, F and `defaults` go through `gsil_bench.training.loop.train`, shadow losses, clipping and metrics included. All rows get
the same pairs of random tokens in the same shuffled order, the same optimiser steps, loss (sigmoid, beta 0.1), AdamW, precision
(but for trl-defaults). Each row is a process of its own; on a CPU the rows of a comparison take turns, and a ratio is the median
over rounds of neighbours in time. A pair's time is a step's, from boundary to boundary, with collation, optimiser and metrics;
the reference's precomputation is reported apart, and spread over two epochs in a column. Peak memory on a CPU is what the process
takes above the loaded model; on a GPU all that it allocates. "useful" is the share of the machine's rate on a large product of
matrices that the least arithmetic of a step (`shapes.py`) makes up, "done" that of all the arithmetic that the variant does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: waiting threads must not spin
sys.path.insert(0, str(ROOT))

import shapes  # noqa: E402
from worker import TRL, VARIANTS, Row  # noqa: E402

EPOCHS = 2
"""Over which a reference's computation is spread: the suite's default."""
QUIET = 0.15
"""Cores of other load above which a run is not called quiet."""
TARGETS = {("trl-precomputed", 8): 2.2, ("trl", 8): 2.8, ("trl-precomputed", 1): 1.35}
"""Ratios that were set for llama-10m with the profile ultrafeedback on a CPU."""
STAND_INS = {"trl": "trl-like", "trl-precomputed": "trl-like-precomputed"}
LN_2 = 0.6931472
DEADLINE = 3600.0


class RowError(RuntimeError):
    """A row could not be measured."""


@dataclass
class Result:
    """What was measured of a row."""

    row: Row
    seconds: list[float] = field(default_factory=list)
    """Of each round of steps."""
    step_seconds: list[list[float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    peak_bytes: int = 0
    other_load: list[float] = field(default_factory=list)
    """Cores that others used in each round."""
    failure: str = ""
    table: dict[str, Any] | None = None

    @property
    def pairs_per_second(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rates) if self.seconds else float("nan")

    @property
    def rates(self) -> list[float]:
        """Pairs per second of each round."""
        return [self.row.pairs_per_step * len(steps) / sum(steps) for steps in self.step_seconds]

    @property
    def with_reference(self) -> float:
        """Pairs per second when the reference's computation is spread over EPOCHS passes."""
        own = self.facts.get("reference_seconds", 0.0) / (self.row.steps * self.row.pairs_per_step)
        return 1 / (1 / self.pairs_per_second + own / EPOCHS)

    def ratio(self, other: Result) -> float:
        """How many times as fast as another: the median over rounds that were neighbours in time."""
        shared = list(zip(self.rates, other.rates, strict=False))
        return statistics.median(mine / theirs for mine, theirs in shared) if shared else float("nan")


class Worker:
    """A row's process."""

    def __init__(self, row: Row, log: Path) -> None:
        """Start it; it imports what it needs and waits."""
        threads = {"OMP_NUM_THREADS": str(row.threads), "MKL_NUM_THREADS": str(row.threads)} if row.device == "cpu" else {}
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "passive"}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w", encoding="utf-8"),
            text=True,
            env={**os.environ, **quiet, **threads, "PYTHONPATH": path},
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.tell(**asdict(row))

    def tell(self, **message: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise RowError(self._reason()) from None

    def hear(self, seconds: float) -> dict[str, Any]:
        """Its next line.

        Raises:
            RowError: it failed, ended, or took too long.
        """
        try:
            line = self._answers.get(timeout=max(0.1, seconds))
        except queue.Empty:
            raise RowError("skipped: no time left") from None
        if not line:
            raise RowError(self._reason())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise RowError(answer["failed"])
        return answer

    def end(self) -> None:
        """Kill it if it still runs."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _reason(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"ended: {lines[-1][:200]}" if lines else "ended without a word"


@dataclass(frozen=True)
class Pace:
    """How much is measured."""

    warm_up: int
    rounds: int
    steps: int
    """Of a round."""

    @property
    def total(self) -> int:
        """Steps of a row."""
        return self.warm_up + self.rounds * self.steps


class Load:
    """Cores that others keep busy, from the system's own counters."""

    def __init__(self) -> None:
        """Start now."""
        self._busy, self._time, self._own = self._read(), time.monotonic(), time.process_time()

    def others(self, worker_seconds: float) -> float:
        """Mean since the start, without this process and the worker that ran."""
        busy = self._read() - self._busy - worker_seconds - (time.process_time() - self._own)
        return max(0.0, busy / max(1e-9, time.monotonic() - self._time))

    @staticmethod
    def _read() -> float:
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        except OSError:
            return 0.0
        ticks = list(map(int, fields))
        return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


class Seat:
    """A worker at the table: its turns and what it has answered."""

    def __init__(self, row: Row, pace: Pace, logs: Path, until: float) -> None:
        """Start the process."""
        self.result, self._pace, self._until = Result(row), pace, until
        self._worker = Worker(row, logs / f"{row.model.replace('/', '-')}-{row.variant}-{row.profile}-{row.micro_batch}.log")
        self._cpu_seconds = 0.0

    def attempt(self, turn: Callable[[], None]) -> None:
        """Take a turn unless it has failed before; a failure ends the row, not the run."""
        if self.result.failure:
            return
        try:
            turn()
        except RowError as error:
            self.result.failure = str(error)
            self._worker.end()

    def load(self) -> None:
        """Build the model, compute the reference, and warm up."""
        self._hear()
        self._worker.tell(load=True)
        self.result.facts |= self._hear()
        self._go(self._pace.warm_up)

    def measure(self) -> None:
        """One round."""
        load = Load()
        before = self._cpu_seconds
        answer = self._go(self._pace.steps)
        self.result.other_load.append(load.others(self._cpu_seconds - before))
        self.result.step_seconds.append(answer["seconds"])
        self.result.seconds.append(sum(answer["seconds"]))

    def finish(self) -> None:
        """Profile if that was asked for, and hear the outcome."""
        if self.result.row.steps > self._pace.total:
            self._worker.tell(profile=True)
            self.result.table = self._hear()["table"]
        self.result.facts |= self._hear()
        self._worker.end()

    def close(self) -> None:
        """End the process whatever happened."""
        self._worker.end()

    def _go(self, steps: int) -> dict[str, Any]:
        self._worker.tell(go=steps)
        answer = self._hear()
        self._cpu_seconds = answer["cpu_seconds"]
        self.result.peak_bytes = max(self.result.peak_bytes, answer["peak_bytes"])
        return answer

    def _hear(self) -> dict[str, Any]:
        return self._worker.hear(self._until - time.monotonic())


def take_turns(rows: Sequence[Row], pace: Pace, logs: Path, until: float) -> list[Result]:
    """Measure rows side by side: each waits while another works, and the first of a round is another each time."""
    with ExitStack() as stack:
        seats = []
        for row in rows:
            seats.append(Seat(row, pace, logs, until))
            stack.callback(seats[-1].close)
            seats[-1].attempt(seats[-1].load)
            tell(f"  {row.variant}: {seats[-1].result.failure or 'ready'}")
        for number in range(pace.rounds):
            for seat in [*seats[number % len(seats) :], *seats[: number % len(seats)]]:
                seat.attempt(seat.measure)
            tell(
                f"  round {number + 1} of {pace.rounds}: " + ", ".join(f"{s.result.row.variant} {_last(s.result)}" for s in seats)
            )
        for seat in seats:
            seat.attempt(seat.finish)
        return [seat.result for seat in seats]


def one_by_one(rows: Sequence[Row], pace: Pace, logs: Path, until: float, least: float) -> Iterator[Result]:
    """Measure rows one after the other (a GPU holds one at a time); the next imports its libraries meanwhile."""
    with ExitStack() as stack:
        following: Seat | None = None
        for number, row in enumerate(rows):
            if until - time.monotonic() < least:
                yield Result(
                    row,
                    failure=f"skipped: {until - time.monotonic():.0f} s were left of the whole run, it needs about {least:.0f}",
                )
                continue
            seat = following or Seat(row, pace, logs, until)
            stack.callback(seat.close)
            following = Seat(rows[number + 1], pace, logs, until) if number + 1 < len(rows) else None
            if following:
                stack.callback(following.close)
            for turn in (seat.load, *[seat.measure] * pace.rounds, seat.finish):
                seat.attempt(turn)
            seat.close()
            tell(f"  {row.variant}, {row.micro_batch} pairs: {seat.result.failure or _last(seat.result)}")
            yield seat.result


def _last(result: Result) -> str:
    return f"{result.rates[-1]:.2f}/s" if result.seconds else "-"


def tell(text: str) -> None:
    """Progress, beside the tables."""
    print(text, file=sys.stderr, flush=True)


class Report:
    """All results of a run: tables, and the JSON file."""

    def __init__(self, file: Path | None, peak: float, data_sheet: float | None) -> None:
        """Take the machine's rate on a large product of matrices, and the data sheet's."""
        self._file, self._peak, self._data_sheet, self._measured_peak = file, data_sheet or peak, data_sheet, peak
        self._results: list[Result] = []
        self._loads: list[float] = []

    def add(self, results: Sequence[Result]) -> None:
        """Keep and write results."""
        self._results += results
        self._loads += [load for result in results for load in result.other_load]
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    def of(self, like: Row, variant: str) -> Result | None:
        """The row of a variant beside another row, if it was measured; TRL's stand-in where TRL is missing."""
        for name in (variant, STAND_INS.get(variant, "")):
            for result in self._results:
                if result.seconds and result.row == replace(like, variant=name, steps=result.row.steps):
                    return result
        return None

    def table(self, results: Sequence[Result]) -> str:
        """Markdown of one comparison."""
        head = (
            "variant | pairs/s | min to max | × trl-precomputed | by FLOPs | × trl | by FLOPs | with reference, 2 epochs | "
            "peak MB | padding | GFLOP/pair | done | useful | tokens/s"
        )
        lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
        for result in results:
            cells = self._cells(result) if result.seconds else [result.failure] + [""] * head.count("|")
            lines.append("| " + " | ".join([result.row.variant, *cells][: head.count("|") + 1]) + " |")
        return "\n".join(lines)

    def _cells(self, result: Result) -> list[str]:
        facts, rate = result.facts, result.pairs_per_second
        comparisons = []
        for peer in ("trl-precomputed", "trl"):
            other = self.of(result.row, peer)
            comparisons += ["-", "-"] if other is None else [f"{result.ratio(other):.2f}", f"{_by_flops(result, other):.2f}"]
        return [
            f"{rate:.2f}",
            f"{min(result.rates):.2f} to {max(result.rates):.2f}",
            *comparisons,
            f"{result.with_reference:.2f}",
            f"{result.peak_bytes / 1e6:.0f}",
            f"{100 * facts['padding_share']:.0f} %",
            f"{facts['work_flops'] / 1e9:.1f}",
            f"{100 * facts['work_flops'] * rate / self._peak:.0f} %",
            f"{100 * facts['floor_flops'] * rate / self._peak:.0f} %",
            f"{facts['tokens_per_pair'] * rate:.0f}",
        ]

    def checks(self, results: Sequence[Result]) -> list[str]:
        """Whether all rows did the same work, and what else must be said of them."""
        late = [result for result in results if result.failure and result.seconds]
        lines = [f"{result.row.variant} failed after it was measured: {result.failure}" for result in late]
        compared = [result for result in results if result.seconds and result.row.variant != "trl-defaults"]
        measured = [result for result in compared if "loss" in result.facts]
        if not measured:
            return lines
        against = [self.of(result.row, peer) for result in compared[:1] for peer in STAND_INS]
        stand_ins = [other.row.variant for other in against if other is not None and other.row.variant not in TRL]
        if stand_ins:
            lines.append(
                f"trl was not measured: its columns compare with {' and '.join(stand_ins)}, the same step in plain torch"
            )
        norms = {result.row.variant: result.facts["grad_norm"] for result in measured}
        middle = statistics.median(norms.values())
        limit = 1e-3 if measured[0].row.precision == "fp32" else 0.05
        strange = [result for result in measured if not abs(result.facts["grad_norm"] / middle - 1) < limit]
        strange += [result for result in measured if not abs(result.facts["loss"] - LN_2) < max(1e-3, limit)]
        said = f"first loss {measured[0].facts['loss']:.6f} (ln 2), gradient norm {middle:.4f}, in {', '.join(norms)}"
        different = {result.row.variant: (result.facts["loss"], result.facts["grad_norm"]) for result in strange}
        lines += [f"NOT the same work: {different}; {said}" if strange else f"same work: {said}"]
        lines += [f"{result.row.variant}: {note}" for result in measured for note in result.facts["notes"]]
        loads = [load for result in results for load in result.other_load]
        if loads and max(loads) > QUIET:
            lines.append(
                f"WARNING: the machine was not quiet: others used {statistics.mean(loads):.2f} cores, {max(loads):.2f} at most"
            )
        return lines

    def targets(self) -> list[str]:
        """How far F is from what was set."""
        lines = []
        for result in self._results:
            row = result.row
            if (row.variant, row.model, row.profile, row.device) != (
                "F",
                "llama-10m",
                "ultrafeedback",
                "cpu",
            ) or not result.seconds:
                continue
            for (peer, micro_batch), wanted in TARGETS.items():
                other = self.of(row, peer) if micro_batch == row.micro_batch else None
                if other is not None:
                    ratio, less = result.ratio(other), result.peak_bytes < other.peak_bytes
                    verdict = "reached" if ratio >= wanted else "NOT reached"
                    memory = f"{result.peak_bytes / 1e6:.0f} of {other.peak_bytes / 1e6:.0f} MB{'' if less else ', NOT less'}"
                    said = f"F at {micro_batch} pairs {ratio:.2f} × {other.row.variant} (wanted {wanted})"
                    lines.append(f"target: {said}: {verdict}; {memory}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Everything, with where it comes from."""
        from gsil_bench.provenance import provenance, version

        models = sorted({result.row.model for result in self._results})
        packages = {name: version(name) for name in ("trl", "accelerate", "datasets")}
        single = len(models) == 1
        return {
            "provenance": provenance() | {"peers": packages, "cpu": _cpu(), "other_load_cores": self._loads},
            "peak_flops": {"measured": self._measured_peak, "data_sheet": self._data_sheet, "shares_are_of": self._peak},
            "model": models,
            **(self._keys(models[0]) if single else {"models": {model: self._keys(model) for model in models}}),
            "rows": [self._row(result) for result in self._results],
        }

    def _keys(self, model: str) -> dict[str, Any]:
        results = [result for result in self._results if result.row.model == model]
        done = [result for result in results if result.seconds]
        fastest = [result for result in done if result.row.variant == "F"]
        keys: dict[str, Any] = {
            "pairs_per_second": _nested(done, lambda result: result.pairs_per_second),
            "pairs_per_second_with_reference": _nested(done, lambda result: result.with_reference),
            "peak_bytes": _nested(done, lambda result: result.peak_bytes),
            "not_measured": _nested([result for result in results if not result.seconds], lambda result: result.failure),
        }
        for peer in ("trl-precomputed", "trl"):
            found: dict[str, Any] = {}
            for result in fastest:
                other = self.of(result.row, peer)
                if other is not None:
                    found.setdefault(result.row.profile, {})[str(result.row.micro_batch)] = result.ratio(other)
                    if other.row.variant != peer:
                        keys[f"ratio_vs_{peer.replace('-', '_')}_is_against"] = f"{other.row.variant}: trl was not measured"
            keys[f"ratio_vs_{peer.replace('-', '_')}"] = found
        return keys

    def _row(self, result: Result) -> dict[str, Any]:
        useful = result.facts.get("floor_flops", float("nan")) * result.pairs_per_second / self._peak
        extra = {"pairs_per_second": result.pairs_per_second, "useful_share_of_peak": useful} if result.seconds else {}
        return {**asdict(result), **extra, "first_loss_and_norm": [result.facts.get("loss"), result.facts.get("grad_norm")]}


def _nested(results: Sequence[Result], value: Callable[[Result], Any]) -> dict[str, Any]:
    """variant → profile → micro-batch → value."""
    found: dict[str, Any] = {}
    for result in results:
        row = result.row
        found.setdefault(row.variant, {}).setdefault(row.profile, {})[str(row.micro_batch)] = value(result)
    return found


def _by_flops(result: Result, other: Result) -> float:
    return float(other.facts["work_flops"] / result.facts["work_flops"])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def profile_lines(table: dict[str, Any]) -> list[str]:
    """Where a step's time goes."""
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in table["shares"].items())
    longest = ", ".join(f"{name} {100 * share:.1f} %" for name, share in table["longest"].items())
    return [f"profile of F's step ({table['seconds']:.2f} s under the profiler): {shares}", f"longest operations: {longest}"]


def compare(options: argparse.Namespace, report: Report, until: float) -> None:
    """Every profile at every micro-batch."""
    pace = Pace(options.warm_up, options.rounds, options.steps)
    for profile in options.profiles:
        for micro_batch in options.micro_batches:
            base = Row("", profile, micro_batch, options.model, options.device, options.threads, options.precision, 0, pace.total)
            base = replace(base, pairs_per_step=options.pairs_per_step, seed=options.seed, data_dir=options.data_dir)
            rows = [replace(base, variant=variant) for variant in options.variants]
            if options.profile:  # one more step of F, which is not measured
                rows = [replace(row, steps=pace.total + 1) if row.variant == "F" else row for row in rows]
            tell(f"{options.model}, {profile}, {micro_batch} pairs in a micro-batch")
            if options.device == "cpu":
                results = take_turns(rows, pace, options.logs, until)
            else:
                results = list(one_by_one(rows, pace, options.logs, until, 0.0))
            show(report, results)


def show(report: Report, results: Sequence[Result]) -> None:
    """Print one comparison."""
    report.add(results)
    row = results[0].row
    print(f"\n## {row.model}, {row.profile}, {row.micro_batch} pairs in a micro-batch ({row.device}, {row.precision})\n")
    print(report.table(results) + "\n")
    for line in report.checks(results):
        print(f"- {line}")
    for result in results:
        if result.table and result.row.variant == "F":
            print("\n".join(f"- {line}" for line in profile_lines(result.table)))
    sys.stdout.flush()


H200 = (
    # model, precision, pairs in a step, micro-batch, least seconds for a row, variants; the most telling first
    ("qwen2.5-0.5b", "autocast", 64, 8, 30.0, ("F", "trl-precomputed", "trl")),
    ("mistral-7b", "bf16", 32, 8, 45.0, ("E", "C", "defaults")),
    ("mistral-7b", "bf16", 32, 1, 45.0, ("F", "trl-like-precomputed")),
    ("qwen2.5-0.5b", "autocast", 64, 1, 25.0, ("F", "trl-precomputed")),
    ("qwen2.5-0.5b", "autocast", 64, 8, 25.0, ("E", "D", "C", "B", "A")),
)
"""The GPU ladder. 7 billion parameters with AdamW and fp32 masters take 130 GB: at 8 pairs their rows recompute activations."""


def on_one_gpu(options: argparse.Namespace, report: Report, until: float) -> None:
    """The preset for one card: rows that would overrun the whole are left out, and named."""
    pace = Pace(warm_up=3, rounds=2, steps=3)
    for model, precision, pairs, micro_batch, least, variants in H200:
        if options.only_models and model not in options.only_models:
            continue
        base = Row("", "ultrafeedback", micro_batch, model, "cuda", options.threads, precision, pairs, pace.total)
        rows = [replace(base, variant=variant) for variant in with_stand_ins(variants, substitute=True)]
        tell(f"{model}, {micro_batch} pairs in a micro-batch, {until - time.monotonic():.0f} s left")
        show(report, list(one_by_one(rows, pace, options.logs, until, least)))


def with_stand_ins(variants: Sequence[str], substitute: bool = False) -> list[str]:
    """The variants, and what stands for TRL where it is not installed (instead of it, or beside its message)."""
    if importlib.util.find_spec("trl") is not None:
        return list(variants)
    if any(variant in TRL for variant in variants):
        tell("trl is not installed (pip install trl==1.16.0): trl-like, the same step in plain torch, stands for it")
    if substitute:
        return [STAND_INS.get(variant, variant) for variant in variants]
    return list(dict.fromkeys([*variants, *(STAND_INS[variant] for variant in variants if variant in STAND_INS)]))


def names(text: str) -> list[str]:
    """A list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama-10m", help=f"{', '.join(shapes.CONFIGS)}, or a folder with a config.json (weights are random)")
    add("--profiles", type=names, default=["ultrafeedback", "mini", "instructions"])
    add("--micro-batches", type=lambda text: list(map(int, names(text))), default=[8, 1], help="pairs in a forward pass")
    add("--variants", type=names, default=[name for name in VARIANTS if not name.startswith("trl-like")])
    add("--pairs-per-step", type=int, default=32, help="a multiple of the micro-batches")
    add("--steps", type=int, default=1, help="optimiser steps of a round")
    add("--rounds", type=int, default=3)
    add("--warm-up", type=int, default=1, help="steps before the first round")
    add("--threads", type=int, default=2)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", choices=["auto", "fp32", "autocast", "bf16"], default="auto", help="auto: fp32 on a CPU, else autocast")
    add("--seed", type=int, default=0, help="of the lengths and their order")
    add("--data-dir", default="", help="folder with instructions/ and tokenizers/ (or GSIL_BENCH_DATA, or ../shared/data)")
    add("--json", type=Path, help="write everything there; runs worth keeping go to leaderboards/speed/")
    add("--quick", action="store_true", help="one profile, few pairs: shows that it works, not how fast it is")
    add("--profile", action="store_true", help="where the time of a step of F goes")
    add("--preset", choices=["h200"], help="the ladder for one large GPU, within --budget seconds")
    add("--only-models", type=names, default=[], help="of the preset")
    add("--budget", type=float, default=530.0, help="seconds for the preset")
    add("--logs", type=Path, default=Path("/tmp" if os.name == "posix" else ".") / "gsil-bench-speed", help="what rows print")
    return _completed(parser.parse_args(arguments), parser)


def _completed(options: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    if options.quick:
        options.profiles, options.pairs_per_step, options.steps, options.rounds = options.profiles[:1], 8, 1, 1
    if options.preset:
        options.device = "cuda"
    if options.precision == "auto":
        options.precision = "fp32" if options.device == "cpu" else "autocast"
    unknown = [variant for variant in options.variants if variant not in VARIANTS]
    if unknown:
        parser.error(f"unknown variants {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    if any(options.pairs_per_step % size for size in options.micro_batches):
        parser.error(f"--pairs-per-step {options.pairs_per_step} is no multiple of every micro-batch of {options.micro_batches}")
    options.variants = with_stand_ins(options.variants)
    options.logs.mkdir(parents=True, exist_ok=True)
    return options


def peak_in_child(device: str, threads: int) -> tuple[float, float | None, str]:
    """`shapes.matmul_peak` in a process of its own: this one stays off the GPU."""
    code = f"import json, shapes; print(json.dumps(shapes.matmul_peak({device!r}, {threads})))"
    path = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"--device {device}: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
    peak, data_sheet, name = json.loads(done.stdout)
    return peak, data_sheet, name


def main() -> None:
    """Run what the command line says."""
    started = time.monotonic()
    options = parse()
    peak, data_sheet, name = peak_in_child(options.device, options.threads)
    report = Report(options.json, peak, data_sheet)
    print(f"{_cpu()}; {name}" + (f"; shares are of the data sheet's {data_sheet / 1e12:.0f} TFLOP/s" if data_sheet else ""))
    run = on_one_gpu if options.preset else compare
    run(options, report, started + (options.budget if options.preset else DEADLINE * 4))
    print("\n" + "\n".join(report.targets()))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
