"""Reference log-probs: what their key depends on, how often they are computed in a sweep, and that a file that lies is found."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.numpy import load_file, save_file
from test_backend import bushes, lines_of
from test_trajectory import logp

from gsil_bench import compare
from gsil_bench.config import parse_settings, resolve
from gsil_bench.inputs import read_inputs
from gsil_bench.models.checkpoint import load_model
from gsil_bench.plan import Plan, Planner, Stage
from gsil_bench.records import digest, file_sha256, read_jsonl
from gsil_bench.training.batches import ShuffledSteps, Tree
from gsil_bench.training.metrics import FILE as METRICS
from gsil_bench.training.reference import FILE, StaleReferenceError, audit_reference

SIX = "gsil-logistic,gsil-brier,gsil-hinge,gsil-kliep,gsil-lsif,gsil-exponential"
Asked = Callable[..., Plan]


@pytest.fixture
def planned(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> Asked:
    """The plan of a comparison."""

    def plan(settings: Sequence[str] = (), **flags: object) -> Plan:
        asked = {
            "model": str(tiny_model),
            "demonstrations": str(demonstrations_file),
            "tasks": "support:TASK",
            "methods": "gsil-logistic",
            "out": str(tmp_path / "out"),
            "set": parse_settings(settings),
        }
        return Planner(read_inputs(resolve({**asked, **flags}, None, compare.RECIPES))).plan()

    return plan


def of_kind(plan: Plan, kind: str) -> list[Stage]:
    return [stage for stage in plan.stages if stage.kind == kind]


def real_side(plan: Plan) -> str:
    """The fingerprint of the demonstrations' reference log-probs under the starting model."""
    (stage,) = [stage for stage in of_kind(plan, "reference") if stage.inputs["side"] == "real"]
    policy = stage.needs["policy"]
    assert policy.given is not None and list(stage.needs) == ["policy"]
    return stage.fingerprint({policy.key: policy.given})


# ---- keys -------------------------------------------------------------------------------------------------------------

SAME: dict[str, tuple[list[str], dict[str, str]]] = {
    "another loss": ([], {"methods": "gsil-lsif"}),
    "another protocol": (["dpo.rounds=1"], {"methods": "dpo"}),
    "several losses and seeds": ([], {"methods": SIX, "seeds": "0,1,2"}),
    "the loss's settings": (["gsil-logistic.scale=0.1", "gsil-logistic.shift=-1"], {}),
    "learning rate": (["gsil-logistic.learning_rate=1e-3"], {}),
    "budget and batches": (["gsil-logistic.epochs=7", "gsil-logistic.batch_size=3", "gsil-logistic.micro_batch_tokens=99"], {}),
    "optimiser and adapter": (["gsil-logistic.optimizer=rmsprop", "gsil-logistic.lora_rank=4"], {}),
    "sampling": (["gsil-logistic.samples=3", "gsil-logistic.temperature=0.5", "gsil-logistic.max_new_tokens=9"], {}),
    "seed": ([], {"seeds": "5"}),
    "seed of the generations": ([], {"generation_seed": "5"}),
    "tasks": ([], {"tasks": "support:TWO_TURNS", "limit": "3"}),
    "processes": ([], {"processes": "2"}),
}

SAME_WEIGHTS = {"what is logged": "log_every=3", "memory": "gradient_checkpointing=on"}


@pytest.mark.parametrize("name", SAME_WEIGHTS)
def test_what_leaves_the_weights_alone_trains_nothing_again(planned: Asked, name: str) -> None:
    plain, changed = planned(), planned([f"gsil-logistic.{SAME_WEIGHTS[name]}"])
    assert [stage.key for stage in of_kind(plain, "training")] == [stage.key for stage in of_kind(changed, "training")]
    other = planned(["gsil-logistic.micro_batch_tokens=99"])
    assert [stage.key for stage in of_kind(plain, "training")] != [stage.key for stage in of_kind(other, "training")]


@pytest.mark.parametrize("name", SAME)
def test_the_key_does_not_depend_on_what_log_probs_do_not(planned: Asked, name: str) -> None:
    settings, flags = SAME[name]
    assert real_side(planned(settings, **flags)) == real_side(planned())


def test_the_key_does_not_depend_on_a_templates_bytes(planned: Asked, mini_folder: Path, tmp_path: Path) -> None:
    """Another template text that renders the same tokens."""
    template = json.loads((mini_folder / "tokenizer_config.json").read_text()).get("chat_template")
    template = template or (mini_folder / "chat_template.jinja").read_text()
    (tmp_path / "same.jinja").write_text("{# a remark #}" + template)
    plan = planned(chat_template=str(tmp_path / "same.jinja"))
    assert plan.inputs.model.chat.fingerprint != planned().inputs.model.chat.fingerprint
    assert real_side(plan) == real_side(planned())


def test_the_key_depends_on_precision(planned: Asked) -> None:
    keys = {real_side(planned(precision=name, methods="gsil-logistic")) for name in ("fp32", "bf16", "bf16-autocast")}
    assert len(keys) == 3
    assert real_side(planned(precision="auto")) in keys


def test_the_key_depends_on_token_ids(planned: Asked, tmp_path: Path, demonstrations_file: Path) -> None:
    """Another template, one demonstration less, one letter changed."""
    lines = demonstrations_file.read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[:-1]))
    (tmp_path / "other.jsonl").write_text("".join(lines).replace("2 + 2 =", "2 - 2 ="))
    plans = [
        planned(),
        planned(chat_template="plain"),
        planned(demonstrations=str(tmp_path / "fewer.jsonl")),
        planned(demonstrations=str(tmp_path / "other.jsonl")),
    ]
    assert len({real_side(plan) for plan in plans}) == 4


def test_the_key_depends_on_every_weight(planned: Asked, tiny_model: Path, tmp_path: Path) -> None:
    """One weight by one unit in its last place; a copy elsewhere is the same model."""
    for name in ("copy", "changed"):
        shutil.copytree(tiny_model, tmp_path / name)
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[3, 5] = np.nextafter(weight[3, 5], np.float32(9))
    save_file(tensors, path, metadata={"format": "pt"})
    assert real_side(planned(model=str(tmp_path / "copy"))) == real_side(planned())
    assert real_side(planned(model=str(tmp_path / "changed"))) != real_side(planned())


# ---- how often in a sweep ---------------------------------------------------------------------------------------------


def counts(plan: Plan) -> dict[str, int]:
    return {kind: len(of_kind(plan, kind)) for kind in ("generations", "reference", "training")}


def test_six_losses_cost_the_generations_and_references_of_one(planned: Asked) -> None:
    """Three seeds: three sets of self-generations; their references and one of the demonstrations."""
    one, six = planned(seeds="0,1,2"), planned(methods=SIX, seeds="0,1,2")
    assert counts(one) == {"generations": 3, "reference": 4, "training": 3}
    assert counts(six) == {"generations": 3, "reference": 4, "training": 18}
    for kind in ("generations", "reference"):
        assert [stage.key for stage in of_kind(six, kind)] == [stage.key for stage in of_kind(one, kind)]


def test_a_generation_seed_makes_it_one_for_the_whole_sweep(planned: Asked) -> None:
    sweep = planned(methods=SIX, seeds="0,1,2", generation_seed="0")
    assert counts(sweep) == {"generations": 1, "reference": 2, "training": 18}
    assert sorted(stage.inputs["side"] for stage in of_kind(sweep, "reference")) == ["generated", "real"]
    single = of_kind(planned(seeds="0"), "generations")  # the seed that it names is the one that it would have had
    assert [stage.key for stage in of_kind(sweep, "generations")] == [stage.key for stage in single]
    assert len({stage.key for stage in of_kind(sweep, "training")}) == 18


def test_settings_of_a_sweep_share_them_too(planned: Asked) -> None:
    """Scale, learning rate and loss of every cell differ; the pairs do not."""
    keys = set()
    for scale in (0.1, 1.0, 10.0):
        plan = planned([f"gsil-logistic.scale={scale}", f"gsil-logistic.learning_rate={scale * 1e-6}"])
        keys.add(tuple(stage.key for kind in ("generations", "reference") for stage in of_kind(plan, kind)))
    assert len(keys) == 1


# ---- several self-generations, end to end -----------------------------------------------------------------------------


def call(words: Sequence[object]) -> int:
    app = typer.Typer()
    app.command()(compare.compare)
    return compare.call(app, [str(word) for word in words])


@pytest.fixture
def words(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> list[object]:
    words: list[object] = ["--model", tiny_model, "--demonstrations", demonstrations_file, "--tasks", "support:TASK"]
    return [*words, "--out", tmp_path / "out", "--no-start"]


def folder_of(out: Path, kind: str, holding: str = "") -> Path:
    """The one artefact of a kind whose manifest holds a text."""
    (found,) = [path.parent for path in (out / "store" / kind).rglob("manifest.json") if holding in path.read_text()]
    return found


def test_two_self_generations_each_from_demonstrations_to_the_first_step(
    words: list[object], tiny_model: Path, tmp_path: Path
) -> None:
    """Each is drawn for its own prompt, its reference log-probs are its own, and the first step's means are those written out."""
    settings = ["gsil-logistic.samples=2", "gsil-logistic.max_new_tokens=8", "gsil-logistic.batch_size=16"]
    assert call([*words, "--methods", "gsil-logistic", *(word for item in settings for word in ("--set", item))]) == 0
    out, model = tmp_path / "out", load_model(tiny_model)
    names = [record["id"] for record in read_jsonl(folder_of(out, "demonstrations") / "train.jsonl")]
    drawn = list(read_jsonl(folder_of(out, "generations") / "generations.jsonl"))
    assert [(record["id"], record["sample"]) for record in drawn] == [(name, k) for name in names for k in (0, 1)]
    assert sum(drawn[2 * n]["tokens"] != drawn[2 * n + 1]["tokens"] for n in range(len(names))) > 30
    inputs = read_inputs(
        resolve({"model": str(tiny_model), "demonstrations": str(words[3]), "tasks": "support:TASK"}, None, compare.RECIPES)
    )
    demonstrations = inputs.demonstrations
    assert [item.id for item in demonstrations.train] == names
    generated = load_file(folder_of(out, "reference", '"side": "generated"') / FILE)
    real = load_file(folder_of(out, "reference", '"side": "real"') / FILE)
    sums = [part.sum(dtype=np.float64) for part in np.split(generated["logps"], np.cumsum(generated["lengths"])[:-1])]
    real_sums = [part.sum(dtype=np.float64) for part in np.split(real["logps"], np.cumsum(real["lengths"])[:-1])]
    with torch.no_grad():
        for n, record in enumerate(drawn):
            prompt = demonstrations.train_encoded[n // 2].prompt_ids
            assert sums[n] == pytest.approx(logp(model, prompt, tuple(record["tokens"])).item(), abs=1e-3)
    trees = [Tree(str(n), (1,), None) for n in range(len(names))]  # type: ignore[arg-type]
    step = [int(tree.id) for tree in next(iter(ShuffledSteps(trees, 16, 1, (0, 0))))]
    line = lines_of(folder_of(out, "training"))[0]
    assert line["loss"] == pytest.approx(2 * math.log(2), abs=1e-3)
    assert line["real_logps"] == pytest.approx(sum(real_sums[n] for n in step) / 16, abs=1e-3)
    assert line["generated_logps"] == pytest.approx(sum(sums[2 * n] + sums[2 * n + 1] for n in step) / 32, abs=1e-3)


# ---- a file that lies -------------------------------------------------------------------------------------------------


def tamper(folder: Path, nats: float) -> None:
    """Change every sequence's log-prob, and the manifest with it, so that the store believes the file."""
    tensors = load_file(folder / FILE)
    tensors["logps"][np.cumsum([0, *tensors["lengths"][:-1]])] += np.float32(nats)
    save_file(tensors, folder / FILE)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][FILE] = {"bytes": (folder / FILE).stat().st_size, "sha256": file_sha256(folder / FILE)}
    manifest["content"] = digest({name: entry["sha256"] for name, entry in manifest["files"].items()})
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cells(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "results" / "letters").glob("*.json"))


@pytest.mark.parametrize("side", ["real", "generated"])
def test_a_file_that_was_changed_is_found_before_it_is_trained_on(
    words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], side: str
) -> None:
    """Half a nat: the cell fails with the reason, the others have their results; the untouched side does not matter."""
    settings = ["--set", "gsil-logistic.max_new_tokens=8"]
    assert call([*words, "--methods", "gsil-logistic", *settings]) == 0
    tamper(folder_of(tmp_path / "out", "reference", f'"side": "{side}"'), 0.5)
    capsys.readouterr()
    assert (
        call([*words, "--methods", "sft,sft-continued,gsil-logistic", *settings, "--set", "sft-continued.max_new_tokens=8"]) == 1
    )
    err = " ".join(capsys.readouterr().err.split())
    assert "FAILED train gsil-logistic, seed 0: StaleReferenceError: kept reference log-probs differ by 0.5 nats" in err
    assert "reference log-probs of" not in err  # the store believed the file: it was not made again
    assert cells(tmp_path / "out") == ["sft-continued-seed0", "sft-seed0"]


def test_a_file_that_was_changed_by_less_than_rounding_is_believed(words: list[object], tmp_path: Path) -> None:
    settings = ["--methods", "gsil-logistic", "--set", "gsil-logistic.max_new_tokens=8"]
    assert call([*words, *settings]) == 0
    tamper(folder_of(tmp_path / "out", "reference", '"side": "real"'), 2e-4)
    assert call([*words, *settings]) == 0


def test_the_second_round_against_the_initial_policy_is_audited_too(
    words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There the policy has moved, so the check at step 0 cannot see it; the audit, under the model of the reference, can."""
    settings = ["--methods", "dpo", "--set", "dpo.rounds=2", "--set", "dpo.max_new_tokens=8", "--set", "dpo.learning_rate=1e-3"]
    assert call([*words, *settings]) == 0
    out = tmp_path / "out"
    manifests = [json.loads(path.read_text()) for path in (out / "store" / "training").rglob("manifest.json")]
    first, second = sorted(manifests, key=lambda manifest: manifest["inputs"]["round"])
    assert first["facts"]["step_zero"] <= 1e-3 and second["facts"]["step_zero"] is None
    assert first["facts"]["audit"] <= 1e-3 and second["facts"]["audit"] <= 1e-3
    (content,) = {second["inputs"]["needs"]["generated_reference/001"]}
    assert content != first["inputs"]["needs"]["generated_reference/000"]
    tamper(folder_of(out, "reference", content), 0.5)
    capsys.readouterr()
    assert call([*words, *settings]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "FAILED train dpo, seed 0, round 2: StaleReferenceError: kept reference log-probs differ by 0.5 nats" in err
    assert "train dpo, seed 0, round 1" not in err


def test_the_audit_returns_the_largest_difference(tiny_model: Path) -> None:
    """Of both sides of every sampled tree."""
    trees, model = bushes(tiny_model, [1, 2, 1], offset=0.0), load_model(tiny_model)
    assert audit_reference(model, trees, 1e-5) < 1e-3
    last = trees[1].generated[-1]
    wrong = dataclasses.replace(last, reference_logp=(last.reference_logp or 0) - 0.01)
    trees[1] = dataclasses.replace(trees[1], generated=(*trees[1].generated[:-1], wrong))
    with pytest.raises(StaleReferenceError, match=r"differ by 0\.01 nats"):
        audit_reference(model, trees, 1e-5)
    assert audit_reference(model, trees, 0.002) == pytest.approx(0.01, abs=1e-4)  # within ten times the noise floor


@pytest.mark.parametrize("place", [0, 2])
def test_the_audit_does_not_believe_nan(tiny_model: Path, place: int) -> None:
    trees = bushes(tiny_model, [1, 1, 1], offset=0.0)
    trees[place] = dataclasses.replace(trees[place], real=dataclasses.replace(trees[place].real, reference_logp=math.nan))
    with pytest.raises(StaleReferenceError):
        audit_reference(load_model(tiny_model), trees, 1e-5)


def test_metrics_of_a_finished_round_are_kept_and_its_state_is_not(words: list[object], tmp_path: Path) -> None:
    assert call([*words, "--methods", "sft"]) == 0
    folder = folder_of(tmp_path / "out", "training")
    assert (folder / METRICS).exists() and not (folder / "state.pt").exists()
