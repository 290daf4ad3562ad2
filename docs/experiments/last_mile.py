"""Prints the tables of last-mile.md from finished runs, and draws its figure from that of the trials.

python docs/experiments/last_mile.py RUN TASK [FIGURE]        # TASK: mini-summarization or summarization
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsil_bench.evaluation.statistics import holm, paired_difference, score_interval
from gsil_bench.records import read_jsonl, write_atomically
from gsil_bench.reporting.plots import COLOURS, DASHES, STYLE, Plot

PROTOCOLS = {
    "mini-summarization": ("raw", "post-processed", "greedy"),
    "summarization": ("rouge", "rouge-post-processed"),
}
CONTROL = "sft"
NEWEST = 5
"""Samplings whose mean is a training's final reward."""

Scores = Mapping[tuple[str, str], NDArray[np.float64]]
"""(protocol, method) → (seeds, items)."""


def read(run: Path, task: str) -> tuple[Scores, dict[str, Mapping[str, Any]]]:
    """Scores, and of each method the record of its first seed."""
    scores, records = {}, {}
    for protocol in PROTOCOLS[task]:
        cells = [json.loads(file.read_text()) for file in sorted((run / "results" / task / protocol).glob("*.json"))]
        for method in dict.fromkeys(cell["method"] for cell in cells):
            own = [cell for cell in cells if cell["method"] == method]
            scores[protocol, method] = np.array([[item["score"] for item in cell["items"]] for cell in own], dtype=np.float64)
            records[method] = own[0]["record"]
    return scores, records


def four_cells(scores: Scores, methods: Iterable[str], raw: str, mended: str) -> str:
    """The differences within and across the two protocols.

    Of one method's two protocols the answers are the same, so the differences are taken answer by answer; between methods seeds
    are not paired, and Holm's correction is over these comparisons.
    """
    rows, between = [], []
    for method in sorted(method for method in methods if method != "start"):
        gain = score_interval(scores[mended, method] - scores[raw, method], binary=False, bounds=(-1.0, 1.0))
        rows.append(f"| {method}: post-processed − raw | {_said(gain.estimate, gain.low, gain.high)} | |")
        if method != CONTROL:
            ours = ((raw, raw), (raw, mended), (mended, mended))
            between += [((one, method), (other, CONTROL)) for one, other in ours]
    found = [paired_difference(scores[one], scores[other], scale=1.0) for one, other in between]
    for (one, other), each, p in zip(between, found, holm([each.p_value for each in found]), strict=True):
        rows.append(f"| {one[1]} {one[0]} − {other[1]} {other[0]} | {_said(each.estimate, each.low, each.high)} | {p:.2g} |")
    return "\n".join(["| difference | | p (Holm) |", "|---|---|---|", *rows])


def _said(estimate: float, low: float, high: float) -> str:
    return f"{estimate:+.3f} [{low:.3f}, {high:.3f}]"


def aucs(run: Path) -> str:
    """AUC of demonstrations against each class on prompts that were kept back, for every reward model."""
    models = [json.loads(file.read_text()) for file in sorted(run.glob("store/reward-model/*/manifest.json"))]
    models.sort(key=lambda model: model["inputs"]["seed"])
    names = list(models[0]["facts"]["auc"])
    rows = []
    for name in names:
        values = " | ".join(f"{model['facts']['auc'][name]:.3f}" for model in models)
        counts = [models[0]["facts"][kind].get(name, 0) for kind in ("classes", "missing")]
        rows.append(f"| {name} | {values} | {' | '.join(map(str, counts)) if name != 'all' else ' | '} |")
    head = " | ".join(f"seed {model['inputs']['seed']}" for model in models)
    return "\n".join([f"| class | {head} | answers | prompts without |", "|---" * (len(models) + 3) + "|", *rows])


def trainings(run: Path, records: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each method's RL with the lowest seed, found by what decides its weights."""
    found: dict[str, tuple[int, list[dict[str, Any]]]] = {}
    for file in run.glob("store/training/*/manifest.json"):
        inputs = json.loads(file.read_text())["inputs"]
        for name, record in records.items():
            same = all(inputs["method"].get(key) == record.get(key) for key in ("rollouts", "protocol", "settings"))
            same = same and all(
                inputs["training"].get(key) == value for key, value in record["training"].items() if key in inputs["training"]
            )
            if record.get("rollouts") and same and inputs["seed"] < found.get(name, (sys.maxsize, []))[0]:
                found[name] = (inputs["seed"], list(read_jsonl(file.parent / "metrics.jsonl")))
    return {name: found[name][1] for name in sorted(found)}


def ends(curves: Mapping[str, Sequence[Mapping[str, Any]]], scores: Scores, protocols: Sequence[str]) -> str:
    """Reward and KL at the end of each training, beside the task's scores."""
    rows = []
    for name, lines in curves.items():
        sampled = [line for before, line in zip([{}, *lines], lines, strict=False) if line["reward"] != before.get("reward")]
        last = sampled[-NEWEST:]
        reward, kl = (sum(line[key] for line in last) / len(last) for key in ("reward", "kl"))
        means = " | ".join(f"{scores[protocol, name].mean():.3f}" for protocol in protocols)
        rows.append(f"| {name} | {sampled[0]['reward']:.2f} | {reward:.2f} | {kl:.2f} | {means} |")
    head = f"| method | first reward | last reward | KL | {' | '.join(protocols)} |"
    return "\n".join([head, "|---" * (len(protocols) + 4) + "|", *rows])


def curves_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], scores: Scores, protocol: str) -> Plot:
    """Reward and KL over the steps, and what the task's score is at the end of each."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, columns = plt.subplots(1, 3, figsize=(10.5, 3.8))
        figure.subplots_adjust(0.06, 0.3, 0.985, 0.92, wspace=0.3)
        for number, (name, lines) in enumerate(curves.items()):
            look = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "label": name}
            steps = [line["step"] for line in lines]
            columns[0].plot(steps, [line["reward"] for line in lines], **look)
            columns[1].plot(steps, [line["kl"] for line in lines], **look)
            last = lines[-4 * NEWEST :]
            score = scores[protocol, name].mean()
            columns[2].plot(sum(line["kl"] for line in last) / len(last), score, marker="o", color=look["color"])
        for axes, title in zip(
            columns, ("reward of the samples", "KL from sft, nats per answer", f"{protocol} score against KL"), strict=True
        ):
            axes.set_title(title)
            axes.set_xlabel("steps of RL" if axes is not columns[2] else "KL, nats per answer")
        figure.legend(*columns[0].get_legend_handles_labels(), loc="lower center", ncols=4)
        plt.close(figure)
    said = "; ".join(f"{name} {scores[protocol, name].mean():.3f}" for name in curves)
    return Plot("last-mile", "Reward, KL and score of the trials", f"Scores on {protocol}: {said}", figure)


def main() -> None:
    """Print, and draw if a file is named."""
    run, task = Path(sys.argv[1]), sys.argv[2]
    scores, records = read(run, task)
    protocols = PROTOCOLS[task]
    for name in records:
        print(f"{name}: " + ", ".join(f"{protocol} {scores[protocol, name].mean():.3f}" for protocol in protocols))
    curves = trainings(run, records)
    print("", four_cells(scores, records, *protocols[:2]), "", aucs(run), "", ends(curves, scores, protocols), sep="\n")
    if len(sys.argv) > 3:
        write_atomically(Path(sys.argv[3]), curves_plot(curves, scores, protocols[0]).svg())


if __name__ == "__main__":
    main()
