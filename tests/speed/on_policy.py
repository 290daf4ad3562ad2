"""Where the time of an on-policy step goes: sampling, rewards (log-probs, critic, advantages), and the update of the policy.

    python tests/speed/on_policy.py --methods dense-path-reinforce,gail-js --steps 8

Trains the embedded model on the embedded demonstrations in one thread, each method with its own settings and a new critic.
The share of sampling is what it takes of a whole step. Half is the most that it should take.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import baselines
from gsil_bench.config import resolve
from gsil_bench.inputs import read_inputs
from gsil_bench.methods import Method, load_method, with_settings
from gsil_bench.models.policy import Policy
from gsil_bench.records import canonical
from gsil_bench.stages import Resources
from gsil_bench.store import Artefact
from gsil_bench.training import loop
from gsil_bench.training.batches import Branch, ShuffledSteps, Tree
from gsil_bench.training.critics import save_head
from gsil_bench.training.rollouts import Company

RECIPES = Path(baselines.__file__).parent / "recipes"


def shares(method: Method, resources: Resources, steps: int, folder: Path) -> dict[str, float]:
    """Seconds of a step's parts, and tokens sampled a second."""
    data, model = resources.inputs.demonstrations, resources.inputs.model
    start = Artefact(model.folder, model.weights_sha256)
    trees = [
        Tree(item.id, encoded.prompt_ids, Branch(encoded.completion_ids))
        for item, encoded in zip(data.train, data.train_encoded, strict=True)
    ]
    assert method.rollouts is not None, f"{method.name} does not sample"
    reward_model = folder / "reward-model"
    policy = Policy(resources.load(start), scalar=True)
    policy.restore()
    policy.model.save_pretrained(reward_model)
    save_head(policy, reward_model)
    before = method.rollouts.critic is not None and not method.rollouts.critic.alongside
    initial = model.folder if method.rollouts.needs & {"initial", "similarity"} else None
    company = Company(
        resources.inputs.engine, resources.served(start), model.folder, initial, reward_model if before else None
    )  # fmt: skip
    batch = int(method.training.get("batch_size", 32))
    live = company.steps(method, ShuffledSteps(trees, batch, steps, (0, 0)), model.folder, folder, (0, 0))
    _, facts = loop.train(resources.load(start), method, loop.Schedule(live, None, 0), folder)
    parts = {part: facts[f"{part}_seconds"] / steps for part in ("sampling", "reward", "step")}
    return {**parts, "rate": facts["sampled_tokens"] / facts["sampling_seconds"]}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", required=True, help="on-policy methods, with commas between them")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    print("seconds a step, the share of sampling in it, and sampled tokens a second")
    print(f"{'method':24} {'sampling':>9} {'rewards':>9} {'update':>9} {'share':>6} {'tokens/s':>9}")
    with tempfile.TemporaryDirectory() as out:
        resources = Resources(read_inputs(resolve({"methods": ["sft"], "out": out}, None, RECIPES)))
        for name in asked.methods.split(","):
            folder = Path(out) / name
            folder.mkdir()
            method = with_settings(load_method(name), {"learning_rate_factor": 50.0})
            one = found[name] = shares(method, resources, asked.steps, folder)
            share = one["sampling"] / (one["sampling"] + one["reward"] + one["step"])
            print(f"{name:24} {one['sampling']:9.2f} {one['reward']:9.2f} {one['step']:9.2f} {share:6.0%} {one['rate']:9.0f}")
    if asked.json:
        asked.json.write_text(canonical(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
