"""One trajectory of 50 steps, many ways to compute it.

The pinned one is a plain loop written here: one sequence at a time through the model's own forward pass, full log_softmax,
torch's AdamW. Micro-batches, accumulation, layouts, recomputed activations and two processes must give its losses and its weights
to 1e-5; a resumed run must give those of an uninterrupted one bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_loop import TRAINED, make_trees, trees_for

from gsil_bench.methods import Method, PairLogProbs, TokenLogProbs, load_method, with_settings
from gsil_bench.models.checkpoint import load_model
from gsil_bench.models.noise import EmbeddingNoise
from gsil_bench.training import metrics
from gsil_bench.training.batches import Tree
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.loop import Surroundings, learning_rate
from gsil_bench.training.round import Round, launch, run_round

STEPS, BATCH, RATE = 50, 6, 1e-4
WAYS = {
    "as it comes": {},
    "one demonstration at a time": {"micro_batch_trees": 1},
    "a small budget": {"micro_batch_tokens": 60},
    "packed without sharing": {"layout": "packed", "micro_batch_trees": 4},
    "padded": {"layout": "padded", "micro_batch_tokens": 90},
    "recomputed activations": {"gradient_checkpointing": "on"},
}


OTHERS = ("a small budget", "padded")
"""What methods take that add nothing to the loop."""
CORE = ("sft", "sft-continued", "spin", "dpo", "gsil-logistic", "gsil-brier", "gsil-hinge", "gsil-kliep", "gsil-lsif",
        "gsil-exponential")  # fmt: skip
CASES = [(name, way) for name in TRAINED for way in WAYS if name in CORE or way in OTHERS]


def method_for(name: str, **changes: object) -> Method:
    return with_settings(load_method(name), {"learning_rate": RATE, "batch_size": BATCH, **changes})


def job_for(folder: Path, method: Method, trees: tuple[Tree, ...]) -> Round:
    return Round(folder, method, trees, BATCH, STEPS, (3, 0), None)


def outcome(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the weights that a round left."""
    lines = metrics.read_metrics(folder / metrics.FILE)
    return [line["loss"] for line in lines], load_file(folder / "model.safetensors")


@functools.cache
def forest(folder: Path, name: str = "gsil-logistic") -> tuple[Tree, ...]:
    return tuple(trees_for(name, make_trees(folder, 40)))


def logp(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    return scored(model, prompt, completion)[0].sum()


def scored(
    model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...], noise: torch.Tensor | None = None, t: float = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and normalisers of the completion's tokens at temperature t, with noise on all inputs but the last."""
    embeddings = model.get_input_embeddings()(torch.tensor([[*prompt, *completion]]))  # type: ignore[operator]
    if noise is not None:
        embeddings = embeddings + torch.nn.functional.pad(noise, (0, 0, 0, 1))
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0] / t
    places = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return torch.log_softmax(logits, -1)[places, torch.tensor(completion)], logits.logsumexp(-1)[places]


def view(logps: torch.Tensor, normalisers: torch.Tensor) -> TokenLogProbs:
    """Of a single pair."""
    count = len(logps)
    position = torch.arange(count)
    return TokenLogProbs(logps, normalisers, 0 * position, position, torch.full_like(position, count), 1, count)


@functools.cache
def pinned(folder: Path, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The plain loop."""
    method, model, losses = method_for(name), load_model(folder), []
    assert method.loss is not None
    config = TrainConfig.of(method.training, where=name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    for step, trees in enumerate(job_for(folder, method, forest(folder, name)).schedule(folder).steps):
        tokens = sum(len(tree.real.completion_ids) for tree in trees)
        total = torch.zeros(())
        for tree in trees:
            real, other = tree.real, tree.generated[0] if tree.generated else None
            noise = None
            if config.embedding_noise:
                drawn = EmbeddingNoise(config.embedding_noise, 3, step, (tree.id,)).of_tree(
                    0, tree.tokens, 32, torch.device("cpu")
                )
                noise = drawn[: len(tree.prompt_ids) + len(real.completion_ids) - 1]
            t = config.likelihood_temperature
            logps, normalisers = scored(model, tree.prompt_ids, real.completion_ids, noise, t)
            pair = PairLogProbs(
                logps.sum()[None],
                logp(model, tree.prompt_ids, other.completion_ids)[None] if other else torch.tensor([math.nan]),
                torch.tensor([real.reference_logp]),
                torch.tensor([other.reference_logp if other else math.nan]),
                torch.tensor([float(len(real.completion_ids))]),
                torch.tensor([float(len(other.completion_ids)) if other else math.nan]),
                (view(logps, normalisers), TokenLogProbs.unknown(logps[:1])),
                t,
                logp(model, tree.prompt_ids, tree.first[0].completion_ids)[None] if tree.first else None,
            )
            total = total + method.loss(pair, **method.settings).sum()
        loss = total / (len(trees) if method.normalise == "examples" else tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(got: tuple[list[float], dict[str, torch.Tensor]], wanted: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    assert len(got[0]) == len(wanted[0]) == STEPS
    for step, (one, other) in enumerate(zip(got[0], wanted[0], strict=True)):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5), f"step {step}"
    moved = max(float((wanted[1][name] - value).abs().max()) for name, value in got[1].items())
    assert moved <= 1e-5


@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_way_is_the_pinned_trajectory(tiny_model: Path, tmp_path: Path, name: str, way: str) -> None:
    run_round(job_for(tiny_model, method_for(name, **WAYS[way]), forest(tiny_model, name)), tmp_path, Surroundings())
    assert_same(outcome(tmp_path), pinned(tiny_model, name))


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_are_the_pinned_trajectory(tiny_model: Path, tmp_path: Path, sharded: bool) -> None:
    """Gloo, three micro-batches of two demonstrations: the second turn has work for one rank only."""
    method = method_for("gsil-logistic", micro_batch_trees=2)
    launch(job_for(tiny_model, method, forest(tiny_model)), tmp_path, 2, sharded, Surroundings())
    assert_same(outcome(tmp_path), pinned(tiny_model, "gsil-logistic"))


def test_the_pinned_trajectory_goes_somewhere(tiny_model: Path) -> None:
    """Or a loop that does nothing would pass."""
    losses, weights = pinned(tiny_model, "gsil-logistic")
    start = load_model(tiny_model)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert max(float((weights[name] - value.detach()).abs().max()) for name, value in start.named_parameters()) > 1e-3


class Stop:
    """Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, steps: int) -> None:
        self.left -= steps
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("changes", [{}, {"optimizer": "rmsprop"}, {"lora_rank": 4}, {"schedule": "cosine"}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny_model: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    """Stopped twice, fp32; weights and all metrics."""
    job = job_for(tiny_model, method_for("gsil-logistic", **changes), forest(tiny_model))
    (tmp_path / "whole").mkdir()
    run_round(job, tmp_path / "whole", Surroundings())
    (tmp_path / "parts").mkdir()
    for steps in (7, 20):
        with pytest.raises(KeyboardInterrupt):
            run_round(job, tmp_path / "parts", Surroundings(Stop(steps)))
    run_round(job, tmp_path / "parts", Surroundings())
    assert (tmp_path / "whole" / metrics.FILE).read_bytes() == (tmp_path / "parts" / metrics.FILE).read_bytes()
    one, other = outcome(tmp_path / "whole")[1], outcome(tmp_path / "parts")[1]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_bf16_run_keeps_its_master_weights(tiny_model: Path, tmp_path: Path) -> None:
    job = dataclasses.replace(job_for(tiny_model, method_for("gsil-logistic"), forest(tiny_model)), dtype="bf16")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    run_round(job, tmp_path / "whole", Surroundings())
    with pytest.raises(KeyboardInterrupt):
        run_round(job, tmp_path / "parts", Surroundings(Stop(9)))
    run_round(job, tmp_path / "parts", Surroundings())
    one, other = outcome(tmp_path / "whole")[1], outcome(tmp_path / "parts")[1]
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, other[name]) for name, value in one.items())
