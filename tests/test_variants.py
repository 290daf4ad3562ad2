"""Variants, rows after each round, and the record of a tuning, from a recipe to the result files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gsil_bench import compare
from gsil_bench.compare import RECIPES
from gsil_bench.config import Config, resolve
from gsil_bench.errors import UserError
from gsil_bench.inputs import check_targets, read_inputs, resolve_methods
from gsil_bench.methods import load_method, with_settings
from gsil_bench.plan import Plan, Planner, Stage
from gsil_bench.variants import tuning_of

SOFT: dict[str, Any] = {"method": "gsil-logistic", "scale": 0.1}


def tiny(model: Path, demonstrations: Path, out: Path, **changes: object) -> Config:
    """A comparison that takes seconds."""
    fields: dict[str, Any] = {
        "model": str(model),
        "demonstrations": str(demonstrations),
        "methods": ("gsil-logistic", "soft"),
        "tasks": ("support:TASK",),
        "out": str(out),
        "training": {"learning_rate": 1e-3},
        "variants": {"soft": SOFT},
    } | changes
    return Config(**fields)


def stages_of(plan: Plan, method: str, kind: str = "training") -> list[Stage]:
    """The stages of that kind that a method's cells need, each once."""
    found: dict[str, Stage] = {}
    for cell in plan.cells:
        if cell.method.name == method:
            needed = [need for stage in cell.training for need in stage.needs.values()]
            for stage in [*cell.training, *needed]:
                if stage.kind == kind:
                    found[stage.key] = stage
    return list(found.values())


def test_a_variant_changes_its_settings_and_keeps_the_rest_of_its_method() -> None:
    config = Config(
        methods=("gsil-logistic", "soft"),
        start=False,
        training={"epochs": 3},
        set={"gsil-logistic": {"shift": 0.5, "scale": 2}},
        variants={"soft": {**SOFT, "rounds": 2, "learning_rate": "2e-5"}},
    )
    full, soft = resolve_methods(config)
    assert soft.settings == {"scale": 0.1, "shift": 0.5}  # its own scale over the method's, the method's shift
    assert (soft.protocol.rounds, full.protocol.rounds) == (2, 1)
    assert soft.training == {"learning_rate": 2e-5, "epochs": 3.0}
    assert (soft.name, soft.variant_of, soft.loss) == ("soft", "gsil-logistic", full.loss)
    assert (soft.describe()["name"], soft.describe()["method"]) == ("soft", "gsil-logistic")
    assert (full.describe()["name"], full.describe()["method"]) == ("gsil-logistic", "gsil-logistic")


def test_what_is_set_of_a_variant_by_its_name_wins() -> None:
    config = Config(methods=("soft",), start=False, set={"soft": {"scale": 7}}, variants={"soft": SOFT})
    assert resolve_methods(config)[0].settings["scale"] == 7


def test_settings_of_a_variant_reach_its_training_and_its_self_generations(
    tiny_model: Path, demonstrations_file: Path, tmp_path: Path
) -> None:
    variants = {"soft": {**SOFT, "temperature": 0, "learning_rate": 3e-3, "samples": 2}}
    plan = Planner(read_inputs(tiny(tiny_model, demonstrations_file, tmp_path, variants=variants))).plan()
    (soft,) = stages_of(plan, "soft")
    assert soft.inputs["method"]["settings"] == {"scale": 0.1, "shift": 0.0}
    assert soft.inputs["training"]["learning_rate"] == 3e-3
    (generations,) = stages_of(plan, "soft", "generations")
    assert (generations.inputs["sampling"]["temperature"], generations.inputs["samples"]) == (0, 2)
    assert "soft" not in json.dumps(soft.inputs)


def test_a_variant_shares_what_its_settings_leave_as_it_is(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    variants = {"soft": SOFT, "same": {"method": "gsil-logistic", "scale": 1}}
    config = tiny(tiny_model, demonstrations_file, tmp_path, variants=variants, methods=("gsil-logistic", "soft", "same"))
    plan = Planner(read_inputs(config)).plan()
    for kind in ("generations", "reference"):
        assert stages_of(plan, "soft", kind) == stages_of(plan, "gsil-logistic", kind)
    assert stages_of(plan, "same") == stages_of(plan, "gsil-logistic")
    assert stages_of(plan, "soft") != stages_of(plan, "gsil-logistic")


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a b": SOFT}, "variant 'a b': letters, digits"),
        ({"sft": SOFT}, "variant 'sft': a method has that name"),
        ({"soft": {"scale": 1}}, "variant 'soft': say which method it changes"),
        ({"soft": {"method": "gsil-logistik"}}, "method of variant 'soft' 'gsil-logistik': did you mean 'gsil-logistic'"),
        ({"soft": SOFT, "softer": {"method": "soft"}}, "'soft' is a variant itself"),
        ({"soft": {"method": "gsil-logistic", "scal": 1}}, "setting of soft 'scal': did you mean 'scale'"),
        ({"soft": {"method": "gsil-logistic", "scale": "high"}}, "soft.scale=high: expected a number"),
    ],
)
def test_a_wrong_variant_is_one_line(variants: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve_methods(Config(methods=("soft",) if "soft" in variants else ("sft",), variants=variants))
    assert "\n" not in str(caught.value)


def test_a_misspelt_variant_is_offered() -> None:
    with pytest.raises(UserError, match="unknown method 'sooft': did you mean 'soft'"):
        resolve_methods(Config(methods=("sooft",), variants={"soft": SOFT}))


def test_a_setting_of_the_command_line_may_name_a_variant_or_its_method() -> None:
    check_targets({"soft": {"scale": 1}, "gsil-logistic": {"shift": 1}}, ("soft",), {"soft": SOFT})
    with pytest.raises(UserError, match="'gsil-brier'"):
        check_targets({"gsil-brier": {"scale": 1}}, ("soft",), {"soft": SOFT})


def test_a_recipe_declares_variants(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("methods: [soft]\nvariants:\n  soft: {method: gsil-logistic, scale: 0.1}\n")
    assert resolve({}, str(recipe), RECIPES).variants == {"soft": SOFT}
    recipe.write_text("variants: {soft: 3}\n")
    with pytest.raises(UserError, match=r"variants: expected NAME: \{method: METHOD"):
        resolve({}, str(recipe), RECIPES)


def test_rows_after_each_round_are_those_checkpoints(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    """40 demonstrations, of which 4 are held out: 36 in two epochs are 3 steps, in three rounds 1 step each."""
    changes = {"methods": ("gsil-logistic", "sft"), "set": {"gsil-logistic": {"rounds": 3}}, "every_round": True}
    plan = Planner(read_inputs(tiny(tiny_model, demonstrations_file, tmp_path, training={}, **changes))).plan()
    rows = {cell.method.name: cell for cell in plan.cells if cell.task == "letters"}
    assert list(rows) == ["start", "gsil-logistic--round-1", "gsil-logistic--round-2", "gsil-logistic", "sft"]
    last = rows["gsil-logistic"].training
    assert [rows[f"gsil-logistic--round-{k}"].training for k in (1, 2)] == [last[:1], last[:2]]
    assert rows["gsil-logistic--round-2"].policy is last[1]
    budgets = [rows[name].comparable["budget"] for name in list(rows)[1:4]]
    steps = [sum(stage.inputs["steps"] for stage in last[:k]) for k in (1, 2, 3)]
    assert budgets == [f"{count} steps of 32 demonstrations" for count in steps]
    record = rows["gsil-logistic--round-2"].method.describe()
    assert (record["name"], record["after_round"], record["protocol"]["rounds"]) == ("gsil-logistic--round-2", 2, 3)


def test_names_that_rows_after_rounds_would_take_are_refused() -> None:
    for name, message in (("a--round-1", "named like a row after a round"), ("x" * 60, "too long a name")):
        with pytest.raises(UserError, match=message):
            resolve_methods(Config(methods=(name,), variants={name: SOFT}, every_round=True))


def test_a_comparison_shows_rounds_and_variants(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> None:
    settings = {"gsil-logistic": {"rounds": 2, "max_new_tokens": 8}}
    config = tiny(tiny_model, demonstrations_file, tmp_path, every_round=True, set=settings, limit=4)
    assert compare.run(config) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    expected = ["start", "gsil-logistic--round-1", "gsil-logistic", "soft--round-1", "soft"]
    assert table["methods"] == expected
    result = json.loads((tmp_path / "results" / "letters" / "soft-seed0.json").read_text())
    assert (result["method"], result["record"]["method"], result["record"]["settings"]["scale"]) == ("soft", "gsil-logistic", 0.1)
    assert result["provenance"]["tuning"] is None


def test_the_record_of_a_tuning_goes_with_the_settings_that_it_chose() -> None:
    tuning = {"trials": 5, "split": "dev", "methods": {"gsil-logistic": {"settings": {"scale": 0.5, "learning_rate": 1e-5}}}}
    chosen = with_settings(load_method("gsil-logistic"), {"scale": 0.5, "learning_rate": 1e-5})
    assert tuning_of(tuning, chosen) == {"trials": 5, "split": "dev", "settings": {"scale": 0.5, "learning_rate": 1e-5}}
    assert tuning_of(tuning, with_settings(chosen, {"scale": 1})) is None  # changed since
    assert tuning_of(tuning, load_method("sft")) is None  # not tuned
    assert tuning_of({}, chosen) is None
