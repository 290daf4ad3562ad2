"""What a sweep pays for: losses × seeds over one set of self-generations and reference log-probs.

    python tests/speed/sweep.py [--seeds 0,1,2] [--demonstrations N] [--json FILE]

Runs the comparison of the six GSIL losses and compares its wall time, evaluation left out, with the seconds of one generation,
one reference pass over both sides and the trainings: the parts that cannot be shared. Parts and whole are of the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gsil_bench.provenance import provenance
from gsil_bench.records import write_atomically

LOSSES = ("gsil-logistic", "gsil-brier", "gsil-hinge", "gsil-kliep", "gsil-lsif", "gsil-exponential")
EVALUATION = ("answers", "scores", "held-out", "canaries")


def sweep(losses: tuple[str, ...], seeds: str, demonstrations: int, out: Path) -> dict[str, Any]:
    """Run a comparison and add up what its stages cost, by kind."""
    command = [sys.executable, "-m", "gsil_bench.compare", "--methods", ",".join(losses), "--seeds", seeds, "--no-start"]
    command += ["--generation-seed", "0", "--limit", "1", "--limit-demonstrations", str(demonstrations), "--out", str(out)]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.monotonic() - started
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "store").glob("*/*/manifest.json")]
    kinds = sorted({manifest["kind"] for manifest in manifests})
    seconds = {kind: [manifest["seconds"] for manifest in manifests if manifest["kind"] == kind] for kind in kinds}
    return {"wall": wall, "seconds": seconds}


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """Wall time without evaluation, against the parts that cannot be shared."""
    seconds = run["seconds"]
    evaluated = sum(sum(seconds.get(kind, [])) for kind in EVALUATION)
    parts = {kind: sum(seconds[kind]) for kind in ("generations", "reference", "training")}
    return {
        "stages": {kind: len(seconds[kind]) for kind in parts},
        "seconds": parts,
        "wall_without_evaluation": run["wall"] - evaluated,
        "ratio": (run["wall"] - evaluated) / sum(parts.values()),
    }


def main() -> None:
    """Print the sweep's cost beside that of its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--demonstrations", type=int, default=450)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one = summary(sweep(LOSSES[:1], given.seeds, given.demonstrations, Path(folder) / "one"))
        six = summary(sweep(LOSSES, given.seeds, given.demonstrations, Path(folder) / "six"))
    for name, result in (("one loss", one), ("six losses", six)):
        parts = ", ".join(f"{kind} {count} x, {result['seconds'][kind]:.1f} s" for kind, count in result["stages"].items())
        wall = f"{result['wall_without_evaluation']:.1f} s without evaluation"
        print(f"{name}: {parts}; {wall}, {result['ratio']:.3f} times the parts")
    if given.json:
        write_atomically(given.json, json.dumps({"one": one, "six": six, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
