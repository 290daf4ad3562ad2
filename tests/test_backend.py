"""The training step against sums written out by hand: several self-generations, precisions, adapters, and what stops a run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_loop import ids
from test_policy import forest, make
from test_trajectory import logp

from gsil_bench.errors import UserError
from gsil_bench.methods import Method, PairLogProbs, load_method, with_settings
from gsil_bench.models import packing
from gsil_bench.models.checkpoint import load_model
from gsil_bench.models.policy import Policy
from gsil_bench.training import config, learner, metrics, optimizers, state
from gsil_bench.training.batches import Branch, ShuffledSteps, Tree
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.loop import Schedule, Surroundings, train
from gsil_bench.training.pairs import pair_logps
from gsil_bench.training.round import Round, run_round

ODD = 13
"""Scored tokens of the demonstration that the losses below stumble over; no other has as many."""


def method_for(name: str, **changes: object) -> Method:
    return with_settings(load_method(name), {"learning_rate": 1e-3, "warmup": 0, "schedule": "constant", **changes})


def bushes(folder: Path, counts: Sequence[int], offset: float = 0.4) -> list[Tree]:
    """Trees with so many self-generations each; reference log-probs differ from the policy's by known amounts."""
    model, seeds, trees = load_model(folder), iter(range(1000, 2000)), []
    for n, count in enumerate(counts):
        prompt = ids(n, 3 + n % 4)
        completions = [ids(next(seeds), 3 + (5 * n + 3 * k) % 8) for k in range(count + 1)]
        with torch.no_grad():
            known = [logp(model, prompt, completion).item() for completion in completions]
        branches = [Branch(c, value + offset * (k - n)) for k, (c, value) in enumerate(zip(completions, known, strict=True))]
        trees.append(Tree(f"t{n}", prompt, branches[0], tuple(branches[1:])))
    return trees


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def lines_of(folder: Path) -> list[dict[str, float]]:
    return metrics.read_metrics(folder / metrics.FILE)


# ---- several self-generations of a demonstration ----------------------------------------------------------------------

COUNTS = {"two each": [2] * 5, "three each": [3] * 4, "one to four": [1, 3, 2, 4, 1]}
PAIR_LOSSES = {
    "gsil-logistic": lambda real, generated: torch.nn.functional.softplus(-real) + torch.nn.functional.softplus(generated),
    "spin": lambda real, generated: torch.nn.functional.softplus(-0.1 * (real - generated)),
}


def written_out(folder: Path, name: str, trees: Sequence[Tree], normaliser: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of a step: one sequence at a time, a plain sum over demonstrations of the mean over their pairs."""
    model, total = load_model(folder), torch.zeros(())
    for tree in trees:
        real = logp(model, tree.prompt_ids, tree.real.completion_ids) - tree.real.reference_logp
        values = [
            PAIR_LOSSES[name](real, logp(model, tree.prompt_ids, branch.completion_ids) - branch.reference_logp)
            for branch in tree.generated
        ]
        total = total + sum(values) / len(values)
    (total / normaliser).backward()
    return (total / normaliser).item(), {key: value.grad.clone() for key, value in model.named_parameters()}


def one_step(
    folder: Path, work: Path, method: Method, trees: list[Tree], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The metrics of one step of the loop, and the gradient that its optimiser was given."""
    model, kept = load_model(folder), {}

    class Keeps(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            kept.update({key: value.grad.clone() for key, value in model.named_parameters()})

    monkeypatch.setattr(learner, "build_optimizer", lambda parameters, *others: Keeps(list(parameters), lr=1.0))
    train(model, method, Schedule([trees]), work)
    return lines_of(work)[0], kept


@pytest.mark.parametrize("micro_batch_trees", [0, 2])
@pytest.mark.parametrize("normalise", ["examples", "tokens"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_step_is_the_mean_over_demonstrations_of_the_mean_over_their_pairs(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    counts: list[int],
    normalise: str,
    micro_batch_trees: int,
) -> None:
    """Loss to 1e-5 and every weight's gradient to 1e-4 of its norm, for k = 2, 3 and different k in one step."""
    trees = bushes(tiny_model, counts)
    method = dataclasses.replace(
        method_for(name, max_grad_norm=0, micro_batch_trees=micro_batch_trees),
        normalise=normalise,  # type: ignore[arg-type]
    )
    normaliser = len(trees) if normalise == "examples" else sum(len(tree.real.completion_ids) for tree in trees)
    loss, wanted = written_out(tiny_model, name, trees, normaliser)
    line, got = one_step(tiny_model, tmp_path, method, trees, monkeypatch)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    for key, gradient in wanted.items():
        assert float((got[key] - gradient).norm()) <= 1e-4 * float(gradient.norm()), key
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in wanted.values()))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_pairs_and_their_weights_by_hand(tiny_model: Path) -> None:
    """Two self-generations and one: three pairs, the first demonstration twice with weight 1/2, sides in the trees' order."""
    trees = bushes(tiny_model, [2, 1])
    model = load_model(tiny_model)
    with torch.no_grad():
        logps = [[logp(model, tree.prompt_ids, branch.completion_ids).item() for branch in tree.branches] for tree in trees]
        pair, weights = pair_logps(Policy(model), trees)
    (first, second) = trees
    assert weights.tolist() == [0.5, 0.5, 1.0]
    assert pair.policy_real_logps.tolist() == pytest.approx([logps[0][0], logps[0][0], logps[1][0]], abs=1e-4)
    assert pair.policy_generated_logps.tolist() == pytest.approx([logps[0][1], logps[0][2], logps[1][1]], abs=1e-4)
    assert pair.reference_real_logps.tolist() == pytest.approx(
        [first.real.reference_logp, first.real.reference_logp, second.real.reference_logp]
    )
    assert pair.reference_generated_logps.tolist() == pytest.approx(
        [branch.reference_logp for tree in trees for branch in tree.generated]
    )
    assert pair.real_tokens.tolist() == [len(tree.real.completion_ids) for tree in (first, first, second)]
    assert pair.generated_tokens.tolist() == [len(branch.completion_ids) for tree in trees for branch in tree.generated]


def test_a_step_of_pairs_and_single_demonstrations_is_refused(tiny_model: Path) -> None:
    one, other = bushes(tiny_model, [1, 1])
    with pytest.raises(ValueError, match="either every tree of a step has a self-generation or none"):
        pair_logps(Policy(load_model(tiny_model)), [one, other.demonstration_only()])


# ---- a loss or a gradient that is not finite --------------------------------------------------------------------------


def nan_loss(pair: PairLogProbs) -> torch.Tensor:
    return torch.where(pair.real_tokens == ODD, math.nan, -pair.policy_real_logps)


def infinite_loss(pair: PairLogProbs) -> torch.Tensor:
    return torch.where(pair.real_tokens == ODD, math.inf, -pair.policy_real_logps)


def infinite_slope(pair: PairLogProbs) -> torch.Tensor:
    """0 with an infinite derivative."""
    odd = pair.real_tokens == ODD
    nothing = pair.policy_real_logps - pair.policy_real_logps.detach()
    return torch.where(odd, torch.where(odd, nothing, 1.0).sqrt(), -pair.policy_real_logps)


def raising_loss(pair: PairLogProbs) -> torch.Tensor:
    if (pair.real_tokens == ODD).any():
        raise ArithmeticError("this demonstration cannot be computed")
    return -pair.policy_real_logps


STUMBLES = {
    nan_loss: r"the loss is not finite at step 3; training diverged.* \(demonstrations odd\)",
    infinite_loss: r"the loss is not finite at step 3; training diverged.* \(demonstrations odd\)",
    infinite_slope: "the gradient is not finite at step 3",
}


def steps_with_an_odd_one(k: int = 0) -> list[list[Tree]]:
    """Three steps of four demonstrations; the second of the third step is the odd one."""
    trees = [Tree(f"t{n}", ids(n, 4), Branch(ids(50 + n, 3 + n % 5)), (Branch(ids(90 + n, 4)),) * k) for n in range(12)]
    trees[9] = dataclasses.replace(trees[9], id="odd", real=Branch(ids(59, ODD)))
    return [trees[0:4], trees[4:8], trees[8:12]]


@pytest.mark.parametrize("micro_batch_trees", [0, 1])
@pytest.mark.parametrize("loss", STUMBLES, ids=lambda loss: loss.__name__)
def test_what_is_not_finite_stops_before_the_step_and_keeps_what_was(
    tiny_model: Path, tmp_path: Path, loss: object, micro_batch_trees: int
) -> None:
    """The demonstration is named; state and metrics are those of the two steps before, and the same call fails the same way."""
    training = {"learning_rate": 1e-3, "schedule": "constant", "warmup": 0, "micro_batch_trees": micro_batch_trees}
    method, steps = Method("stumbles", "", loss, training=training), steps_with_an_odd_one()  # type: ignore[arg-type]
    (tmp_path / "two").mkdir()
    two = load_model(tiny_model)
    train(two, method, Schedule(steps[:2]), tmp_path / "two")
    for _ in range(2):  # the first time from the start, the second from the state that the first has left
        with pytest.raises(learner.TrainingError, match=STUMBLES[loss]):  # type: ignore[index]
            train(load_model(tiny_model), method, Schedule(steps), tmp_path)
        kept = torch.load(tmp_path / state.FILE, weights_only=True)
        assert kept["step"] == 2
        for name, value in two.named_parameters():
            assert torch.equal(kept["weights"][f"model.{name}"], value), name
        assert lines_of(tmp_path) == lines_of(tmp_path / "two")
        assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_demonstration_with_many_pairs_is_named_once(tiny_model: Path, tmp_path: Path) -> None:
    """Six self-generations of it are six pairs; nothing else went wrong, so nothing else is hinted at."""
    with pytest.raises(learner.TrainingError, match=r"\(demonstrations odd\)"):
        train(load_model(tiny_model), Method("stumbles", "", nan_loss), Schedule(steps_with_an_odd_one(k=6)), tmp_path)


def test_all_bad_demonstrations_are_named_however_many_pairs_they_have(tiny_model: Path, tmp_path: Path) -> None:
    """Two demonstrations with six pairs each: the pairs of the first do not crowd out the second."""
    steps = steps_with_an_odd_one(k=6)
    steps[2][3] = dataclasses.replace(steps[2][3], id="queer", real=Branch(ids(60, ODD)))
    with pytest.raises(learner.TrainingError, match=r"\(demonstrations odd, queer\)"):
        train(load_model(tiny_model), Method("stumbles", "", nan_loss), Schedule(steps), tmp_path)


def test_a_loss_that_raises_loses_no_metrics(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        train(load_model(tiny_model), Method("stumbles", "", raising_loss), Schedule(steps_with_an_odd_one()), tmp_path)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


# ---- adapters, precisions, optimisers, recomputation ------------------------------------------------------------------


def job_for(folder: Path, method: Method, steps: int = 4, **changes: object) -> Round:
    return Round(folder, method, tuple(bushes(folder, [1] * 8, offset=0.0)), 4, steps, (3, 0), None, **changes)  # type: ignore[arg-type]


def run(job: Round, into: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    into.mkdir()
    run_round(job, into, Surroundings())
    return lines_of(into), load_file(into / "model.safetensors")


def test_lora_leaves_a_plain_checkpoint_and_starts_where_full_training_starts(tiny_model: Path, tmp_path: Path) -> None:
    """The merged weights are base + alpha / rank · B A on the linear layers, and bit for bit the base's elsewhere."""
    full, _ = run(job_for(tiny_model, method_for("gsil-logistic")), tmp_path / "full")
    method = method_for("gsil-logistic", lora_rank=4, lora_alpha=8)
    lines, merged = run(job_for(tiny_model, method), tmp_path / "lora")
    base, adapter = load_file(tiny_model / "model.safetensors"), tmp_path / "lora" / "adapter"
    assert merged.keys() == base.keys()
    changes = load_file(adapter / "adapter_model.safetensors")
    adapted = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in changes if ".lora_A." in key}
    assert len(adapted) == 2 * 7  # q, k, v, o, gate, up, down of two layers
    for key, weight in merged.items():
        layer = key.removesuffix(".weight")
        if layer in adapted:
            a, b = (changes[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
            assert float((b @ a).abs().max()) > 1e-5
            torch.testing.assert_close(weight, base[key] + 8 / 4 * b @ a, rtol=0, atol=1e-6)
        else:
            assert torch.equal(weight, base[key]), key
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    same = ("loss", "real_logps", "generated_logps", "real_log_ratio", "generated_log_ratio", "margin", "learning_rate")
    assert {name: lines[0][name] for name in same} == {name: full[0][name] for name in same}
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert load_model(tmp_path / "lora").num_parameters() == load_model(tiny_model).num_parameters()


@pytest.mark.parametrize("name", ["sft", "gsil-logistic"])
@pytest.mark.parametrize("changes", [{"dtype": "bf16"}, {"autocast": True}], ids=["bf16", "bf16-autocast"])
def test_lower_precisions_start_near_fp32(tiny_model: Path, tmp_path: Path, name: str, changes: dict[str, object]) -> None:
    """First loss within 2 % of fp32's and not equal to it, log-probs within 0.2 nats; weights are left in their precision."""
    exact, _ = run(job_for(tiny_model, method_for(name)), tmp_path / "fp32")
    lines, weights = run(job_for(tiny_model, method_for(name), **changes), tmp_path / "low")
    assert lines[0]["loss"] != exact[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02 if name == "sft" else 0.1)
    assert lines[0]["real_logps"] == pytest.approx(exact[0]["real_logps"], abs=0.2)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {value.dtype for value in weights.values()} == {torch.bfloat16 if "dtype" in changes else torch.float32}


def test_rmsprop_takes_ten_times_the_rate_in_its_first_step(tiny_model: Path, tmp_path: Path) -> None:
    """g / sqrt(0.01 g²) is 10 in size; AdamW's first step is 1."""
    base = load_file(tiny_model / "model.safetensors")
    for name, size in (("rmsprop", 10.0), ("adamw", 1.0)):
        _, weights = run(job_for(tiny_model, method_for("sft", optimizer=name, learning_rate=1e-4), steps=1), tmp_path / name)
        moved = torch.cat([(weights[key] - base[key]).abs().flatten() for key in base]) / 1e-4
        assert float(moved.median()) == pytest.approx(size, rel=0.01)


def test_recomputed_activations_give_the_same_run_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    results = [
        run(job_for(tiny_model, method_for("gsil-logistic", gradient_checkpointing=mode)), tmp_path / mode)
        for mode in ("on", "off")
    ]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())


class OutOfMemoryOnce:
    """Stands for Tensor.backward: runs out of memory in one call, before or after it has added its gradients."""

    def __init__(self, call: int, after: bool, times: int = 1) -> None:
        self.call, self.after, self.left, self.count = call, after, times, 0
        self.backward = torch.Tensor.backward

    def __call__(self, tensor: torch.Tensor, *others: object, **named: object) -> None:
        self.count += 1
        raises = self.count >= self.call and self.left > 0
        self.left -= raises
        if not raises or self.after:
            self.backward(tensor, *others, **named)  # type: ignore[arg-type]
        if raises:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.Tensor, "backward", lambda *arguments, **named: self(*arguments, **named))


def test_memory_that_runs_out_between_a_gradient_and_its_master_counts_it_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy to fp32 is the likeliest place: the bf16 gradient is there already, its master has not got it."""
    method = method_for("sft", micro_batch_trees=2)
    wanted = run(job_for(tiny_model, method, dtype="bf16"), tmp_path / "whole")
    move, calls = optimizers._move_gradient, []

    def failing(master: torch.nn.Parameter, parameter: torch.nn.Parameter) -> None:
        calls.append(parameter)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        move(master, parameter)

    monkeypatch.setattr(optimizers, "_move_gradient", failing)
    got = run(job_for(tiny_model, method, dtype="bf16"), tmp_path / "broken")
    assert len(calls) > 4 and got[0] == wanted[0]
    assert all(torch.equal(got[1][name], value) for name, value in wanted[1].items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("call", "after"), [(1, False), (2, True), (5, True)])
def test_memory_that_runs_out_once_is_answered_by_recomputing(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: int,
    after: bool,
    dtype: str,
) -> None:
    """In the first micro-batch, in the second when it has added its gradients already, and in the second step: no gradient
    counts twice.
    """
    wanted = run(
        job_for(tiny_model, method_for("sft", gradient_checkpointing="on", micro_batch_trees=2), dtype=dtype), tmp_path / "on"
    )
    caplog.clear()
    OutOfMemoryOnce(call, after).install(monkeypatch)
    got = run(job_for(tiny_model, method_for("sft", micro_batch_trees=2), dtype=dtype), tmp_path / "auto")
    assert sum("out of memory" in record.message for record in caplog.records) == 1
    assert got[0] == wanted[0]
    assert all(torch.equal(got[1][name], value) for name, value in wanted[1].items())


@pytest.mark.parametrize(("mode", "times"), [("off", 1), ("on", 1), ("auto", 2)])
def test_memory_that_cannot_be_had_is_an_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, times: int
) -> None:
    OutOfMemoryOnce(1, False, times).install(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        run(job_for(tiny_model, method_for("sft", gradient_checkpointing=mode)), tmp_path / "run")


# ---- settings ---------------------------------------------------------------------------------------------------------

BAD_VALUES: dict[str, list[object]] = {
    "learning_rate": [0, -1e-5, "nan", "inf"],
    "learning_rate_factor": [0, -1],
    "epochs": [0, -2],
    "batch_size": [0, -1, 1.5],
    "micro_batch_tokens": [0, -1, 0.5],
    "micro_batch_trees": [-1, 1.5],
    "layout": ["share", "", 3],
    "gradient_checkpointing": ["yes", "", True],
    "lora_rank": [-1, 2.5],
    "lora_alpha": [0, -16],
    "warmup": [-0.1, 1, 1.5],
    "schedule": ["quadratic", ""],
    "optimizer": ["adam", ""],
    "weight_decay": [-0.1],
    "beta1": [-0.1, 1],
    "beta2": [-0.1, 1],
    "max_grad_norm": [-1],
    "log_every": [0, -3],
    "likelihood_temperature": [0, -1],
    "embedding_noise": [-1],
}


def test_there_is_a_bad_value_for_every_setting() -> None:
    """A setting that is added needs a range, and a line above."""
    assert BAD_VALUES.keys() == TrainConfig.defaults().keys()


@pytest.mark.parametrize("name", BAD_VALUES)
def test_every_setting_is_checked(name: str) -> None:
    for value in BAD_VALUES[name]:
        with pytest.raises(UserError, match=rf"^(?s:.*)\bm\.{name}\b"):
            TrainConfig.of({name: value}, where="m")
    assert getattr(TrainConfig.of({name: TrainConfig.defaults()[name]}, where="m"), name) == TrainConfig.defaults()[name]


@pytest.mark.parametrize(
    ("name", "typed", "meant"),
    [
        ("layout", "share", "shared"),
        ("optimizer", "adam", "adamw"),
        ("schedule", "linea", "linear"),
        ("gradient_checkpointing", "of", "off"),
    ],
)
def test_a_misspelt_choice_is_answered_with_the_nearest(name: str, typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        TrainConfig.of({name: typed}, where="m")


def test_names_that_are_written_twice_agree() -> None:
    assert config.LAYOUTS == packing.LAYOUTS
    assert tuple(optimizers.OPTIMIZERS) == config.OPTIMIZERS


# ---- FlexAttention ----------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_flex() -> None:  # type: ignore[misc]
    """FlexAttention without its compiler: the same rule, block mask and grouped heads, in seconds instead of minutes."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    except AttributeError:
        pytest.skip("this torch cannot run compiled functions eagerly")


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3"])
def test_flex_attention_gives_what_segments_give(
    eager_flex: None, monkeypatch: pytest.MonkeyPatch, name: str, k: int, multiple: int
) -> None:
    """Grouped heads in all; a sliding window of 16 in Mistral and Gemma; soft-caps in Gemma 2; a padded row."""
    trees = forest(k)
    with torch.no_grad(), Policy(make(name), "shared") as used:
        wanted = used(trees)
        used.attention_kernel = "flex"
        row = packing.lay_out(trees, "shared", multiple)
        assert row.input_ids.shape[1] % multiple == 0
        torch.testing.assert_close(used._found(row, ("logps",))["logps"], wanted, rtol=0, atol=1e-5)


def test_steps_are_what_the_order_says(tiny_model: Path) -> None:
    """A round's steps come from its trees, batch size and seed, with the self-generations beside their demonstrations."""
    job = job_for(tiny_model, method_for("gsil-logistic"))
    steps = list(job.schedule(job.folder).steps)
    assert steps == list(ShuffledSteps(job.trees, 4, 4, (3, 0)))
    assert sorted(tree.id for step in steps[:2] for tree in step) == [f"t{n}" for n in range(8)]
