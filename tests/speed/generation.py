"""How fast engines generate: ours beside padded `model.generate`, lm-eval's HFLM and vLLM, in one run on two threads of a CPU.

    python tests/speed/generation.py --python-hflm HFLM/bin/python --python-vllm VLLM/bin/python --json FILE
    python tests/speed/generation.py --quick                  # half a minute: shows that it works, not how fast it is

| engine | what it is |
|---|---|
| transformers | the suite's own engine: continuous batching in slots |
| generate | `model.generate` in left-padded batches of 16 in the order of arrival, with its default cache |
| generate-static | the same with a static cache, which transformers offers but does not choose |
| hflm | lm-eval's HFLM at batch_size="auto", text in and text out; the time that it takes to find that size is not counted |
| vllm | the suite's vLLM engine |

An engine that is not installed is left out, and the table says why. Each runs in a process of its own, under the interpreter that
has it. 256 prompts of 16 to 256 tokens are answered by 5 to 200 tokens; every request allows 200. The models' weights are such
that a prompt's last token decides the answer (`generation_worker.py`), so all engines do the same work: the run fails if an
engine returns other tokens. Loading is not counted; a round is all prompts, with new tokens in each round; rounds take turns. A
ratio is the median over rounds of neighbours in time, "by CPU time" compares processor seconds, which other load disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from generation_worker import ENGINES, MODELS, Seat, Work, write_model
from training import HERE, QUIET, ROOT, Load, names, tell  # it also makes waiting threads passive

OURS = "transformers"
TARGETS = {"generate": 2.0, "hflm": 1.5}
"""Ratios of our engine that were set."""
DEADLINE = 1800.0
"""Seconds that a worker may take to answer."""


class EngineFailure(RuntimeError):
    """An engine could not be measured."""


@dataclass
class Result:
    """What was measured of an engine on a model."""

    engine: str
    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    cpu_seconds: list[float] = field(default_factory=list)
    other_load: list[float] = field(default_factory=list)
    """Cores that others used in each round."""
    failure: str = ""

    def rates(self, new_tokens: int) -> list[float]:
        """New tokens per second of each round."""
        return [new_tokens / seconds for seconds in self.seconds]

    def ratio(self, other: Result) -> float:
        """How many times as fast as another: the median over rounds that were neighbours in time."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True))

    def cpu_ratio(self, other: Result) -> float:
        """The same by processor time."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.cpu_seconds, other.cpu_seconds, strict=True))


class Worker:
    """An engine's process."""

    def __init__(self, python: str, seat: Seat, log: Path) -> None:
        """Start it; it loads at once."""
        threads = {"OMP_NUM_THREADS": str(seat.threads), "MKL_NUM_THREADS": str(seat.threads)}
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "passive"}
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        self._log = log
        self._process = subprocess.Popen(
            [python, str(HERE / "generation_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w", encoding="utf-8"),
            text=True,
            env={**os.environ, **quiet, **threads, **path},
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.tell(**asdict(seat))

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a line and hear the answer."""
        self.tell(**message)
        return self.hear()

    def tell(self, **message: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise EngineFailure(self._reason()) from None

    def hear(self) -> dict[str, Any]:
        """Its next line.

        Raises:
            EngineFailure: it failed, ended, or took too long.
        """
        try:
            line = self._answers.get(timeout=DEADLINE)
        except queue.Empty:
            raise EngineFailure(f"no answer within {DEADLINE:.0f} s") from None
        if not line:
            raise EngineFailure(self._reason())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise EngineFailure(answer["failed"])
        return answer

    def end(self) -> None:
        """Let it close what it holds; kill it if it does not."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _reason(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"ended: {lines[-1][:200]}" if lines else "ended without a word"


def measure(model: str, folder: Path, options: argparse.Namespace) -> list[Result]:
    """All engines on one model: they load one after the other, then take turns."""
    results = [Result(engine, model) for engine in options.engines]
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for result in results:
            seat = Seat(result.engine, str(folder), options.threads, asdict(options.work))
            worker = Worker(
                options.pythons.get(result.engine, sys.executable), seat, options.logs / f"{model}-{result.engine}.log"
            )
            stack.callback(worker.end)
            workers[result.engine] = worker
            _attempt(result, partial(_warm_up, worker, result, options))
            tell(f"  {result.engine}: {result.failure or 'ready'}")
        for number in range(1, options.rounds + 1):
            turn = number % len(results)  # the first of a round is another each time
            for result in [*results[turn:], *results[:turn]]:
                worker = workers[result.engine]
                _attempt(result, partial(_round, worker, result, number, options.work))
            rates = (f"{r.engine} {r.rates(options.work.new_tokens)[-1]:.0f}/s" for r in results if r.seconds)
            tell(f"  round {number} of {options.rounds}: {', '.join(rates)}")
    return results


def _attempt(result: Result, turn: Callable[[], None]) -> None:
    """Take a turn unless it has failed before; a failure ends the row, not the run."""
    if result.failure:
        return
    try:
        turn()
    except EngineFailure as error:
        result.failure, result.seconds = str(error), []


def _warm_up(worker: Worker, result: Result, options: argparse.Namespace) -> None:
    result.facts |= worker.hear()["ready"]
    _check(result, worker.ask(round=0, prompts=options.warm_up)["answers"], options.work)


def _round(worker: Worker, result: Result, number: int, work: Work) -> None:
    load = Load()
    answer = worker.ask(round=number, prompts=work.prompts)
    result.other_load.append(load.others(answer["cpu_seconds"]))
    _check(result, answer["answers"], work)
    result.seconds.append(answer["seconds"])
    result.cpu_seconds.append(answer["cpu_seconds"])


def _check(result: Result, answers: Sequence[Sequence[int]], work: Work) -> None:
    """Every engine must return the same tokens: those that the model was built to answer."""
    for index, (got, wanted) in enumerate(zip(answers, work.answers(), strict=False)):
        if list(got) != wanted:
            said = f"{len(got)} tokens, {list(got)[:5]}…, instead of {len(wanted)}, {wanted[:5]}…"
            raise SystemExit(f"{result.engine}, {result.model}: prompt {index} was answered with {said}")


class Report:
    """All results of a run: tables, and the JSON file."""

    def __init__(self, work: Work, threads: int) -> None:
        """Take what every engine was asked."""
        self._work, self._threads = work, threads
        self._results: list[Result] = []

    def add(self, results: Sequence[Result]) -> None:
        """Keep results."""
        self._results += results

    def ratio(self, engine: str, peer: str, model: str) -> float | None:
        """How many times as fast as a peer an engine is; None where one was not measured."""
        pair = [self._of(name, model) for name in (engine, peer)]
        return pair[0].ratio(pair[1]) if pair[0] and pair[1] else None

    def table(self, model: str) -> str:
        """Markdown of one model."""
        head = ["engine", "new tokens/s", "min to max", "× generate", "by CPU time", "× hflm", "by CPU time", "CPU s", "facts"]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for result in self._results:
            if result.model == model:
                cells = self._cells(result) if result.seconds else [f"left out: {result.failure}", *[""] * (len(head) - 2)]
                lines.append(f"| {' | '.join([result.engine, *cells])} |")
        return "\n".join(lines)

    def targets(self) -> list[str]:
        """How far our engine is from what was set."""
        lines = []
        for model in dict.fromkeys(result.model for result in self._results):
            for peer, wanted in TARGETS.items():
                ratio = self.ratio(OURS, peer, model)
                verdict = "not measured" if ratio is None else f"{ratio:.2f}: {'reached' if ratio >= wanted else 'NOT reached'}"
                lines.append(f"target: {OURS} on {model} at least {wanted} × {peer}: {verdict}")
        loads = [load for result in self._results for load in result.other_load]
        if loads and max(loads) > QUIET:
            said = f"others used {statistics.mean(loads):.2f} cores, {max(loads):.2f} at most"
            lines.append(f"WARNING: the machine was not quiet: {said}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Everything, with where it comes from."""
        from gsil_bench.provenance import provenance

        models = list(dict.fromkeys(result.model for result in self._results))
        rates: dict[str, dict[str, float]] = {}
        for result in self._results:
            if result.seconds:
                rates.setdefault(result.engine, {})[result.model] = statistics.median(result.rates(self._work.new_tokens))
        ratios = {f"ratio_vs_{peer}": {model: self.ratio(OURS, peer, model) for model in models} for peer in TARGETS}
        return {
            "provenance": provenance(),
            "threads": self._threads,
            "work": asdict(self._work) | {"new_tokens": self._work.new_tokens},
            "models": {model: MODELS[model] for model in models},
            "tokens_per_second": rates,
            **ratios,
            "rows": [asdict(result) for result in self._results],
        }

    def _of(self, engine: str, model: str) -> Result | None:
        found = (result for result in self._results if (result.engine, result.model) == (engine, model) and result.seconds)
        return next(found, None)

    def _cells(self, result: Result) -> list[str]:
        rates = result.rates(self._work.new_tokens)
        comparisons = []
        for peer in TARGETS:
            other = self._of(peer, result.model)
            comparisons += [f"{result.ratio(other):.2f}", f"{result.cpu_ratio(other):.2f}"] if other else ["-", "-"]
        facts = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in _said(result)
        )
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        return [f"{statistics.median(rates):.0f}", spread, *comparisons, f"{statistics.median(result.cpu_seconds):.1f}", facts]


def _said(result: Result) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in result.facts.items() if value]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engines", type=names, default=list(ENGINES))
    add("--models", type=names, default=list(MODELS))
    add("--python-hflm", default=sys.executable, help="an interpreter with lm-eval")
    add("--python-vllm", default=sys.executable, help="an interpreter with vLLM")
    add("--rounds", type=int, default=3)
    add("--warm-up", type=int, default=16, help="prompts before the first round")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0, help="of lengths, order and tokens")
    add("--json", type=Path, help="write everything there; runs worth keeping go to leaderboards/speed/")
    add("--quick", action="store_true", help="one round of few and short answers")
    add("--logs", type=Path, default=Path(tempfile.gettempdir()) / "gsil-bench-speed", help="what engines print")
    return _completed(parser.parse_args(arguments), parser)


def _completed(options: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    for given, known in ((options.engines, ENGINES), (options.models, MODELS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    options.work = Work(seed=options.seed)
    if options.quick:
        options.work, options.rounds = Work(prompts=32, longest_prompt=64, longest_answer=40, seed=options.seed), 1
    pythons: Mapping[str, str] = {"hflm": options.python_hflm, "vllm": options.python_vllm}
    options.pythons = pythons
    options.logs.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    """Run what the command line says."""
    started, options = time.monotonic(), parse()
    report = Report(options.work, options.threads)
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            write_model(model, Path(folder))
            tell(f"{model}: {options.work.prompts} prompts, {options.work.new_tokens} new tokens")
            report.add(measure(model, Path(folder), options))
        print(f"\n## {model}\n\n{report.table(model)}\n", flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    if not options.quick:
        print("\n".join(f"- {line}" for line in report.targets()))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
