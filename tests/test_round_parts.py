"""Rounds that have a part of the demonstrations to themselves, and rounds that see the first round's self-generations again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import typer
from test_loop import make_trees

from gsil_bench import compare
from gsil_bench.config import Config
from gsil_bench.errors import UserError
from gsil_bench.inputs import read_inputs
from gsil_bench.methods import PairLogProbs, SelfPlay, load_method, with_settings
from gsil_bench.models.checkpoint import load_model
from gsil_bench.models.policy import Policy
from gsil_bench.plan import Plan, Planner, Stage
from gsil_bench.training.batches import Branch, Tree
from gsil_bench.training.pairs import pair_logps
from gsil_bench.training.round import Round, _from_json, _to_json

DEMONSTRATIONS = 36
"""Of the file's 40: four are held out."""


def plan_of(model: Path, file: Path, out: Path, method: str, **settings: object) -> Plan:
    names = {"model": str(model), "demonstrations": str(file), "out": str(out)}
    config = Config(methods=(method,), tasks=("support:TASK",), set={method: settings}, start=False, **names)
    return Planner(read_inputs(config)).plan()


def rounds_of(plan: Plan) -> tuple[Stage, ...]:
    return plan.cells[0].training


def test_each_round_has_every_third_demonstration(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    """36 demonstrations in three rounds: twelve each to answer and to compute a reference of, and steps of twelve at most."""
    plan = plan_of(tiny_model, demonstrations_file, tmp_path, "irft", rounds=3)
    for index, stage in enumerate(rounds_of(plan)):
        needs = stage.needs
        generations, references = (
            needs[f"generations/{index:03d}"],
            [needs["real_reference"], needs[f"generated_reference/{index:03d}"]],
        )
        assert stage.inputs["part"] == generations.inputs["part"] == [index, 3]
        assert generations.units == 12
        assert [reference.units for reference in references] == [12, 12]
        assert stage.inputs["batch_size"] == 12
    assert sum(stage.units for stage in rounds_of(plan)) == 2 * DEMONSTRATIONS / 12
    assert plan.cells[0].comparable["budget"] == "6 steps of 12 demonstrations"


def test_a_part_is_nothing_that_other_methods_are_told_of(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    """Or every fingerprint and every result of theirs would be another one."""
    for stage in plan_of(tiny_model, demonstrations_file, tmp_path, "spin").stages:
        assert "part" not in stage.inputs
    assert "demonstrations" not in load_method("spin").describe()["protocol"]
    (alone,) = rounds_of(plan_of(tiny_model, demonstrations_file, tmp_path, "irft", rounds=1))
    assert "part" not in alone.needs["generations/000"].inputs  # all of them, in one round: the self-generations are shared


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("irft", {"rounds": 37}, "36 demonstrations are too few for a part of their own in each round"),
        ("irft", {"mix_rounds": 2}, "irft.mix_rounds=2: must be 1 with demonstrations=disjoint"),
        ("spin", {"demonstrations": "disjunct"}, "spin.demonstrations=disjunct: must be all or disjoint"),
        ("t-spin", {"demonstrations": "disjoint"}, "t-spin.demonstrations=disjoint: must be all"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tiny_model: Path, demonstrations_file: Path, tmp_path: Path, method: str, settings: Mapping[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_of(tiny_model, demonstrations_file, tmp_path, method, **settings)
    assert "\n" not in str(caught.value)


def test_the_first_rounds_answers_need_answers_of_their_own() -> None:
    method = dataclasses.replace(load_method("t-spin"), needs=frozenset({"first"}))
    with pytest.raises(UserError, match="'first' in needs goes with 'generated'"):
        with_settings(method, {"alpha": 2.0})


def run(tmp_path: Path, model: Path, demonstrations: Path, *words: str) -> int:
    app = typer.Typer()
    app.command()(compare.compare)
    given = ["--model", str(model), "--demonstrations", str(demonstrations), "--tasks", "support:TASK", "--out", str(tmp_path)]
    return compare.call(app, [*given, *words])


def answered(out: Path) -> list[list[str]]:
    """The demonstrations' ids of every set of self-generations."""
    files = (out / "store" / "generations").glob("*/generations.jsonl")
    return [[json.loads(line)["id"] for line in path.read_text().splitlines()] for path in files]


def test_every_demonstration_is_answered_once_and_trained_on_in_its_round(
    tiny_model: Path, demonstrations_file: Path, tmp_path: Path
) -> None:
    words = ["--methods", "irft", "--set", "irft.rounds=3", "--set", "irft.max_new_tokens=8", "--set", "irft.batch_size=6"]
    assert run(tmp_path, tiny_model, demonstrations_file, *words, "--no-start") == 0
    parts = answered(tmp_path)
    assert [len(part) for part in parts] == [12, 12, 12]
    assert len({name for part in parts for name in part}) == DEMONSTRATIONS
    for path in (tmp_path / "store" / "training").glob("*/metrics.jsonl"):
        # At the first step policy and reference are the same weights: the log-probs of the part belong to its demonstrations.
        assert abs(json.loads(path.read_text().splitlines()[0])["real_log_ratio"]) < 1e-4


def test_a_reward_model_has_the_part_of_its_round(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    """Twelve demonstrations against two samples each, of which every tenth prompt is kept back: one."""
    small = {"demonstrations": "disjoint", "rounds": 3, "samples": 2, "max_new_tokens": 4, "batch_size": 6}
    words = [word for key, value in small.items() for word in ("--set", f"rft.{key}={value}")]
    assert (
        run(tmp_path, tiny_model, demonstrations_file, "--methods", "rft", *words, "--set", "rft.starts_from=", "--no-start") == 0
    )
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "store" / "reward-model").glob("*/manifest.json")]
    assert len(manifests) == 3
    assert [(each["facts"]["classes"], each["facts"]["held_out_contrasts"]) for each in manifests] == [({"policy": 24}, 1)] * 3


# The first round's self-generations.


def test_t_spin_sees_the_first_rounds_answers_in_every_round(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    one, two = rounds_of(plan_of(tiny_model, demonstrations_file, tmp_path, "t-spin"))
    assert one.needs["first_generations"] is one.needs["generations/000"]
    assert two.needs["first_generations"] is one.needs["generations/000"]
    assert two.needs["generations/001"].needs["policy"] is one
    assert not [need for stage in (one, two) for need in stage.needs if "reference" in need]


def test_t_spins_first_term_alone_moves_the_first_round(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    """y₀ is y' there: β adds β log 2 to the loss of every pair and nothing to its gradient. Later rounds have two answers."""
    small = ["--set", "t-spin.max_new_tokens=8", "--set", "t-spin.log_every=1", "--no-start"]
    lines = []
    for beta in ("0.5", "0"):
        out = tmp_path / beta
        assert run(out, tiny_model, demonstrations_file, "--methods", "t-spin", *small, "--set", f"t-spin.beta={beta}") == 0
        (result,) = (out / "results").rglob("letters/*.json")
        rounds = [each["weights_sha256"] for each in json.loads(result.read_text())["provenance"]["rounds"]]
        manifests = {path: json.loads(path.read_text()) for path in (out / "store" / "training").glob("*/manifest.json")}
        folders = [next(path.parent for path, made in manifests.items() if made["content"] == digest) for digest in rounds]
        lines.append([json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in folders])
    (first_with, second_with), (first_without, second_without) = lines
    assert first_with["loss"] - first_without["loss"] == pytest.approx(0.5 * 0.6931472, rel=1e-4)
    assert first_with["grad_norm"] == pytest.approx(first_without["grad_norm"], rel=1e-3)
    assert second_with["grad_norm"] != pytest.approx(second_without["grad_norm"], rel=1e-3)


def first_alone(pair: PairLogProbs) -> torch.Tensor:
    return pair.policy_first_logps


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_pair_carries_the_log_prob_of_its_own_first_answer(tiny_model: Path, layout: str) -> None:
    """Two samples of each prompt beside two of the first round: the second pair has the second of them."""
    model = load_model(tiny_model)
    trees = [
        Tree(f"t{n}", (5, 6 + n), Branch((7, 8)), (Branch((9,)), Branch((10, 11))), (Branch((12, 13 + n)), Branch((14,))))
        for n in range(2)
    ]
    wanted = []
    for tree in trees:
        for branch in tree.first:
            ids = torch.tensor([[*tree.prompt_ids, *branch.completion_ids]])
            logps = model(ids).logits[0, 1:-1].detach().log_softmax(-1)
            wanted.append(float(logps.gather(1, torch.tensor(branch.completion_ids)[:, None]).sum()))
    with Policy(model, layout) as policy:
        pair, _ = pair_logps(policy, trees)
    assert first_alone(pair).tolist() == pytest.approx(wanted, abs=1e-4)
    assert first_alone(pair.detached()).tolist() == first_alone(pair).tolist()
    assert first_alone(dataclasses.replace(pair, first_logps=None)).isnan().all()


def test_a_job_takes_the_first_rounds_answers_along(tiny_model: Path) -> None:
    trees = tuple(dataclasses.replace(tree, first=tree.generated[::-1]) for tree in make_trees(tiny_model, 4))
    sent = Round(tiny_model, load_method("t-spin"), trees, 2, 2, (0, 0), None)
    got = _from_json(json.loads(json.dumps(_to_json(sent))))
    assert got == sent
    assert got.method.protocol == SelfPlay(opponent="previous", rounds=2)
