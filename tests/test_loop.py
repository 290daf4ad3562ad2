"""The training loop: accumulation, order, resume, step 0, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import support
import torch

from baselines import METHODS
from gsil_bench.methods import Method, PairLogProbs, TokenLogProbs, load_method, with_settings
from gsil_bench.models.checkpoint import load_model
from gsil_bench.models.logprobs import completion_logps, tree_logps
from gsil_bench.models.policy import Policy
from gsil_bench.records import Encoded
from gsil_bench.training import learner, loop, metrics, pairs, state
from gsil_bench.training.batches import Branch, MatchedDemonstrations, ShuffledSteps, Tree, steps_of_round, steps_of_run
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.reference import read_reference, write_reference

TRAINED = [name for name in METHODS if load_method(name).trains and load_method(name).rollouts is None]
"""tests/test_on_policy_methods.py has the others."""


def ids(seed: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def make_trees(folder: Path, count: int = 24) -> list[Tree]:
    """Trees of varying lengths with reference log-probs of the model itself."""
    trees = [
        Tree(f"t{n}", ids(n, 3 + n % 5), Branch(ids(100 + n, 4 + n % 7)), (Branch(ids(200 + n, 2 + n % 9)),))
        for n in range(count)
    ]
    model = load_model(folder)
    with Policy(model) as policy:
        sums = [float(logps.sum()) for logps in tree_logps(policy, [tree.tokens for tree in trees], 4096)]
    known = [
        Branch(branch.completion_ids, logp) for branch, logp in zip([b for t in trees for b in t.branches], sums, strict=True)
    ]
    return [Tree(tree.id, tree.prompt_ids, known[2 * n], (known[2 * n + 1],)) for n, tree in enumerate(trees)]


def trees_for(name: str, trees: Sequence[Tree]) -> list[Tree]:
    """The trees as a method takes them: with a first round's self-generation where it needs one."""
    if "first" not in load_method(name).needs:
        return list(trees)
    return [dataclasses.replace(tree, first=(Branch(ids(300 + n, 3 + n % 6)),)) for n, tree in enumerate(trees)]


def settings_for(name: str, **changes: object) -> Method:
    return with_settings(load_method(name), {"learning_rate": 1e-3, "batch_size": 8, **changes})


def encoded(trees: list[Tree]) -> list[Encoded]:
    return [Encoded(tree.prompt_ids, branch.completion_ids) for tree in trees for branch in tree.branches]


def read_lines(folder: Path) -> list[dict[str, float]]:
    return metrics.read_metrics(folder / metrics.FILE)


def weights_after(folder: Path, method: Method, steps: list[list[Tree]], work: Path, floor: float | None = 1e-3) -> torch.Tensor:
    model = load_model(folder)
    work.mkdir(exist_ok=True)
    loop.train(model, method, loop.Schedule(steps, floor), work)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", TRAINED)
def test_micro_batches_do_not_change_the_result(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """One optimiser step in one forward pass and in many: equal gradients, so equal metrics and weights up to rounding."""
    steps = list(ShuffledSteps(trees_for(name, make_trees(tiny_model)), 8, 1, (0, 0)))
    steps = [[tree.demonstration_only() for tree in steps[0]]] if "generated" not in load_method(name).needs else steps
    one = weights_after(tiny_model, settings_for(name, micro_batch_tokens=100_000), steps, tmp_path / "one")
    many = weights_after(tiny_model, settings_for(name, micro_batch_trees=1), steps, tmp_path / "many")
    first, second = (json.loads((tmp_path / side / metrics.FILE).read_text()) for side in ("one", "many"))
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
    start = weights_after(tiny_model, settings_for(name), [], tmp_path / "none")
    assert float((one - start).abs().max()) > 1e-4
    # Adam's first step is the sign of the gradient: a coordinate whose gradient is rounding noise may flip, others may not.
    assert float(((one - many).abs() > 1e-5).double().mean()) < 0.01


@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_run_resumes_bit_for_bit(tiny_model: Path, tmp_path: Path, name: str) -> None:
    steps = list(ShuffledSteps(trees_for(name, make_trees(tiny_model)), 8, 6, (1, 0)))
    method = settings_for(name)
    whole = weights_after(tiny_model, method, steps, tmp_path / "whole")
    done: list[int] = []

    def stop(steps_done: int) -> None:
        done.append(steps_done)
        if sum(done) == 3:
            raise KeyboardInterrupt

    work = tmp_path / "stopped"
    work.mkdir()
    with pytest.raises(KeyboardInterrupt):
        loop.train(load_model(tiny_model), method, loop.Schedule(steps, 1e-3), work, loop.Surroundings(stop))
    (work / metrics.FILE).open("a").write('{"torn')  # what a kill while writing leaves
    resumed = load_model(tiny_model)
    _, facts = loop.train(resumed, method, loop.Schedule(steps, 1e-3), work)
    assert torch.equal(whole, torch.cat([parameter.detach().flatten() for parameter in resumed.parameters()]))
    assert (work / metrics.FILE).read_text() == (tmp_path / "whole" / metrics.FILE).read_text()
    assert facts["steps"] == 6
    assert facts["tokens"] == sum(tree.tokens.positions("shared") for step in steps for tree in step)


def spoil(state_file: Path) -> None:
    """Change one bit of a weight: no shape or size tells, only the checksum does."""
    weights = torch.load(state_file, weights_only=True)["weights"]
    largest = max(weights.values(), key=torch.numel).numpy().tobytes()
    data = bytearray(state_file.read_bytes())
    data[data.index(largest)] ^= 1
    state_file.write_bytes(data)


@pytest.mark.parametrize("damage", [lambda path: path.write_text("junk"), spoil], ids=["junk", "one bit"])
def test_a_damaged_state_starts_the_round_again(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    steps = list(ShuffledSteps(make_trees(tiny_model), 8, 2, (1, 0)))
    whole = weights_after(tiny_model, settings_for("sft"), steps, tmp_path / "whole")

    def stop(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    with pytest.raises(KeyboardInterrupt):
        loop.train(load_model(tiny_model), settings_for("sft"), loop.Schedule(steps, None), damaged, loop.Surroundings(stop))
    damage(damaged / state.FILE)
    assert torch.equal(weights_after(tiny_model, settings_for("sft"), steps, damaged), whole)
    assert "the round starts again" in caplog.text


def test_a_state_that_cannot_be_read_just_now_is_kept(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails is no damaged file: what was trained is not thrown away."""
    steps = list(ShuffledSteps(make_trees(tiny_model), 8, 2, (1, 0)))
    weights_after(tiny_model, settings_for("sft"), steps, tmp_path)
    (tmp_path / state.FILE).write_text("perhaps good")

    def fail(*arguments: object, **named: object) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(state.zipfile, "ZipFile", fail)
    with pytest.raises(OSError, match="input/output"):
        weights_after(tiny_model, settings_for("sft"), steps, tmp_path)
    assert (tmp_path / state.FILE).read_text() == "perhaps good"


def test_divergence_is_a_failure_even_in_the_last_step(tiny_model: Path, tmp_path: Path) -> None:
    steps = list(ShuffledSteps(make_trees(tiny_model), 8, 3, (1, 0)))
    with pytest.raises(learner.TrainingError, match="training diverged"):
        weights_after(tiny_model, settings_for("sft", learning_rate=1e14), steps, tmp_path / "run")


def test_a_reference_without_generated_answers_is_checked_at_step_zero(tiny_model: Path, tmp_path: Path) -> None:
    trees = [tree.demonstration_only() for tree in make_trees(tiny_model)]
    method = dataclasses.replace(support.FORGETFUL, needs=frozenset({"reference"}))
    _, facts = loop.train(load_model(tiny_model), method, loop.Schedule([trees], 1e-4), tmp_path)
    assert facts["step_zero"] <= 1e-3


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_lowers_its_own_loss(tiny_model: Path, tmp_path: Path, name: str) -> None:
    trees = trees_for(name, make_trees(tiny_model, 8))
    weights_after(tiny_model, settings_for(name, schedule="constant"), [trees] * 20, tmp_path / "run")
    # A loss with a weight that is held constant is no function that its own gradient descends: its likelihood must fall.
    value = "real_nll_per_token" if name == "dft" else "loss"
    losses = [json.loads(line)[value] for line in (tmp_path / "run" / metrics.FILE).read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_step_zero_is_measured_and_a_foreign_reference_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    trees = make_trees(tiny_model)
    method, model = settings_for("gsil-logistic"), load_model(tiny_model)
    _, facts = loop.train(model, method, loop.Schedule([trees[:8]], 1e-4), tmp_path)
    assert facts["step_zero"] <= 1e-3
    shifted = [dataclasses.replace(tree, real=Branch(tree.real.completion_ids, tree.real.reference_logp + 0.5)) for tree in trees]  # type: ignore[operator]
    with pytest.raises(learner.TrainingError, match=r"step 0: a log-ratio of 0\.5"):
        loop.train(load_model(tiny_model), method, loop.Schedule([shifted[:8]], 1e-4), tmp_path / "other")


def test_a_need_that_was_not_declared_shows_at_the_first_step(tiny_model: Path, tmp_path: Path) -> None:
    trees = [dataclasses.replace(tree, real=Branch(tree.real.completion_ids), generated=()) for tree in make_trees(tiny_model)]
    with pytest.raises(learner.TrainingError, match="not finite at step 1; it declares that it needs nothing"):
        loop.train(load_model(tiny_model), support.FORGETFUL, loop.Schedule([trees]), tmp_path)


@pytest.mark.parametrize("method", [support.FORGETS_TOKENS, support.FORGETS_NORMALISERS], ids=lambda method: method.name)
def test_a_need_of_tokens_that_was_not_declared_shows_at_the_first_step(tiny_model: Path, tmp_path: Path, method: Method) -> None:
    with pytest.raises(learner.TrainingError, match="not finite at step 1; it declares that it needs"):
        loop.train(load_model(tiny_model), method, loop.Schedule([make_trees(tiny_model, 4)]), tmp_path)


def test_a_loss_that_averages_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    def mean(pair: PairLogProbs) -> torch.Tensor:
        return -pair.policy_real_logps.mean()

    with pytest.raises(learner.TrainingError, match="not one value each"):
        loop.train(load_model(tiny_model), Method("mean", "", mean), loop.Schedule([make_trees(tiny_model)]), tmp_path)


def test_learning_rate_by_hand() -> None:
    """10 steps, warm-up 0.2: two steps at 1/3 and 2/3 of the peak, then 8/8, 7/8, …, 1/8."""
    config = TrainConfig(learning_rate=3.0, warmup=0.2)
    rates = [loop.learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 3.0, 2.625, 2.25, 1.875, 1.5, 1.125, 0.75, 0.375])
    cosine = TrainConfig(learning_rate=2.0, warmup=0.0, schedule="cosine")
    assert loop.learning_rate(cosine, 2, 4) == pytest.approx(1.0)  # half way: (1 − cos(π/2)) / 2 of the peak
    constant = TrainConfig(learning_rate=2.0, learning_rate_factor=3.0, warmup=0.0, schedule="constant")
    assert loop.learning_rate(constant, 9, 10) == 6.0


def test_steps_are_split_among_rounds_without_loss() -> None:
    """100 demonstrations, 2 epochs, batches of 32: ⌈200/32⌉ = 7 steps; two rounds get 3 and 4; a round never gets none."""
    assert steps_of_run(100, 2, 32) == 7
    assert steps_of_run(5, 1, 32) == 1
    assert [steps_of_round(7, 2, index) for index in range(2)] == [3, 4]
    assert [steps_of_round(1, 3, index) for index in range(3)] == [1, 1, 1]


def test_shuffle_takes_every_tree_once_before_any_twice(tiny_model: Path) -> None:
    trees = [Tree(str(n), (1,), Branch((2,))) for n in range(10)]
    steps = list(ShuffledSteps(trees, 4, 5, (0, 0)))
    order = [tree.id for step in steps for tree in step]
    assert [len(step) for step in steps] == [4] * 5
    assert sorted(order[:10]) == sorted(order[10:20]) == sorted(str(n) for n in range(10))
    assert steps == list(ShuffledSteps(trees, 4, 5, (0, 0)))
    assert steps != list(ShuffledSteps(trees, 4, 5, (1, 0)))


def test_control_matches_the_pairs_tokens_step_by_step(tiny_model: Path) -> None:
    trees = make_trees(tiny_model)
    pairs = ShuffledSteps(trees, 8, 6, (0, 0))
    control = list(MatchedDemonstrations(pairs))
    longest = max(len(tree.real.completion_ids) for tree in trees)
    ahead = 0
    for step, matched in zip(pairs, control, strict=True):
        ahead += sum(tree.scored_tokens for tree in matched) - sum(tree.scored_tokens for tree in step)
        assert abs(ahead) <= longest
        assert [tree.id for tree in matched[:8]] == [tree.id for tree in step]
        assert not any(tree.generated for tree in matched)


def test_a_long_demonstration_does_not_starve_the_control() -> None:
    """60 demonstrations of 10 tokens, one of 1,000: the control's tokens follow the pairs' over the round."""
    trees = [Tree(str(n), (1,), Branch((2,) * (1000 if n == 7 else 10)), (Branch((2,) * 10),)) for n in range(60)]
    pairs = ShuffledSteps(trees, 4, 150, (0, 0))
    wanted = sum(tree.scored_tokens for step in pairs for tree in step)
    got = sum(tree.scored_tokens for step in MatchedDemonstrations(pairs) for tree in step)
    assert abs(wanted - got) <= 1000


def test_reference_file_round_trip_and_refusal_of_other_sequences(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model)
    sequences = encoded(make_trees(tiny_model, 6))
    floor = write_reference(model, sequences, 512, tmp_path)
    kept = read_reference(tmp_path, sequences)
    for logps, exact in zip(kept, completion_logps(model.double(), sequences), strict=True):
        assert logps.dtype.name == "float32"
        torch.testing.assert_close(torch.tensor(logps).double(), exact, rtol=0, atol=1e-5)
    assert 0 < floor < 1e-3
    with pytest.raises(ValueError, match="other sequences"):
        read_reference(tmp_path, sequences[1:])


def test_pair_logps_are_nan_where_nothing_was_computed(tiny_model: Path) -> None:
    trees = [tree.demonstration_only() for tree in make_trees(tiny_model, 3)]
    pair, weights = pairs.pair_logps(Policy(load_model(tiny_model)), trees)
    assert weights.tolist() == [1.0] * 3
    assert pair.real_tokens.tolist() == [len(tree.real.completion_ids) for tree in trees]
    assert all(math.isnan(value) for value in pair.policy_generated_logps.tolist())
    assert pair.policy_real_logps.dtype == torch.float32


def test_token_views_are_the_tokens_of_each_pair(tiny_model: Path) -> None:
    """Two trees, the second with two self-generations: three pairs, whose real sides are those of trees 0, 1 and 1."""
    one, two = make_trees(tiny_model, 2)
    two = dataclasses.replace(two, generated=(two.generated[0], Branch(ids(7, 1))))
    with Policy(load_model(tiny_model)) as policy:
        pair, _ = pairs.pair_logps(policy, [one, two], pairs.Scored(tokens=True, normalisers=True))
        both = [policy([tree.tokens], ("logps", "normalisers")) for tree in (one, two)]
    lengths = [[len(branch.completion_ids) for branch in tree.branches] for tree in (one, two)]
    parts = [part for whole, sizes in zip(both, lengths, strict=True) for part in whole.split(sizes, 1)]
    for view, chosen in ((pair.real, [0, 2, 2]), (pair.generated, [1, 3, 4])):
        wanted = torch.cat([parts[n] for n in chosen], 1)
        counts = [parts[n].shape[1] for n in chosen]
        torch.testing.assert_close(view.logps, wanted[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(view.normalisers, wanted[1], rtol=0, atol=1e-5)
        assert view.pair.tolist() == [n for n, count in enumerate(counts) for _ in range(count)]
        assert view.position.tolist() == [position for count in counts for position in range(count)]
        assert view.length.tolist() == [count for count in counts for _ in range(count)]
    assert torch.equal(pair.real.sum(pair.real.logps), pair.policy_real_logps)
    assert torch.equal(pair.generated.sum(pair.generated.logps), pair.policy_generated_logps)


def test_sums_and_followers_by_hand() -> None:
    """Completions of 2, 0 and 3 tokens: sums 1 + 2, nothing, 3 + 4 + 5; the next value of each token, 0 after the last."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    view = TokenLogProbs(
        values, values, torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 0, 1, 2]), torch.tensor([2, 2, 3, 3, 3]), 3, 3
    )
    assert view.sum(values).tolist() == [3.0, 0.0, 12.0]
    assert view.following(values).tolist() == [2.0, 0.0, 4.0, 5.0, 0.0]
    (gradient,) = torch.autograd.grad((view.sum(view.following(values)) * torch.tensor([1.0, 5.0, 10.0])).sum(), values)
    assert gradient.tolist() == [0.0, 1.0, 0.0, 10.0, 10.0]


def test_noise_is_another_in_every_step_and_none_where_it_is_not_set(tiny_model: Path, tmp_path: Path) -> None:
    """Constant weights (a rate that changes nothing): the loss of the same trees moves from step to step with noise alone."""
    trees = [tree.demonstration_only() for tree in make_trees(tiny_model, 4)]
    losses = {}
    for alpha in (0.0, 5.0):
        folder = tmp_path / str(alpha)
        weights_after(tiny_model, settings_for("sft", embedding_noise=alpha, learning_rate=1e-30), [trees] * 3, folder)
        losses[alpha] = [line["loss"] for line in read_lines(folder)]
    assert len(set(losses[0.0])) == 1
    assert len({*losses[5.0], losses[0.0][0]}) == 4
