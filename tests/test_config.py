"""Flags, recipes and their errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gsil_bench.compare import RECIPES
from gsil_bench.config import Config, parse_pairs, parse_settings, resolve
from gsil_bench.errors import UserError


def test_flags_over_recipe_over_packaged_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("methods: sft,spin\nseeds: [0, 1]\nset:\n  spin: {beta: 0.5, rounds: 3}\ntraining: {epochs: 1}\n")
    config = resolve({"seeds": "7", "set": {"spin": {"rounds": "4"}}}, str(recipe), RECIPES)
    assert config.methods == ("sft", "spin")
    assert config.seeds == (7,)
    assert config.set["spin"] == {"learning_rate": "4e-6", "beta": 0.5, "rounds": "4"}  # the rate is mini.yaml's
    assert config.training["epochs"] == 1
    assert config.training["learning_rate_factor"] == 50  # of mini.yaml, because the model is mini
    assert config.tasks == ("mini",)


def test_what_a_higher_layer_says_of_all_methods_beats_what_a_lower_one_says_of_one(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("training: {learning_rate: 7e-5}\nset: {sft: {epochs: 3}}\n")
    config = resolve({}, str(recipe), RECIPES)
    assert config.training["learning_rate"] == "7e-5"
    assert all("learning_rate" not in settings for settings in config.set.values())
    assert config.set["sft"] == {"epochs": 3}


def test_packaged_recipe_belongs_to_its_model_only() -> None:
    assert resolve({"model": "org/other"}, None, RECIPES).training == {}
    assert resolve({"model": "some/where/mini"}, None, RECIPES).training == {}


def test_the_written_configuration_is_a_recipe_that_gives_the_same(tmp_path: Path) -> None:
    config = resolve({"methods": "sft,dpo", "limit": "5", "drop_long": True, "set": {"dpo": {"beta": 0.3}}}, None, RECIPES)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    assert resolve({}, str(path), RECIPES) == config


def test_settings_and_fields_of_the_command_line() -> None:
    assert parse_settings(["a.scale=0.5", "a.rounds=2", "lab.mod:M.beta=1e-3"]) == {
        "a": {"scale": "0.5", "rounds": "2"},
        "lab.mod:M": {"beta": "1e-3"},
    }
    assert parse_pairs("--field", ["prompt=question", "completion=answer"], "") == {"prompt": "question", "completion": "answer"}
    assert parse_pairs("--judge-set", ["api_key_env="], "", may_be_empty=True) == {"api_key_env": ""}
    with pytest.raises(UserError, match="--field prompt=: expected NAME=VALUE"):
        parse_pairs("--field", ["prompt="], "a=b")


@pytest.mark.parametrize("assignment", ["scale=1", "a.scale", "a.=1", ".scale=1", "="])
def test_malformed_settings(assignment: str) -> None:
    with pytest.raises(UserError, match=r"expected METHOD\.SETTING=VALUE"):
        parse_settings([assignment])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metods: sft", "unknown key .*'metods': did you mean 'methods'"),
        ("- sft", "expected keys and values, found list"),
        ("methods: [a", "not YAML"),
        ("limit: 2\nlimit: 3", "'limit' stands twice .* line 2"),
        ("set: {sft: {epochs: 1}, sft: {lora_rank: 2}}", "'sft' stands twice"),
        ("? [limit]\n: 2", "not YAML: .*unhashable key"),
        ("limit: many", "limit: expected a whole number of at least 1, found 'many'"),
        ("limit: 0", "limit: expected a whole number of at least 1, found 0"),
        ("limit: true", "expected a whole number"),
        ("seeds: [0, x]", "seeds: expected int values separated by commas"),
        ("seeds: [1.9]", "seeds: expected int values"),
        ("seeds: [true]", "seeds: expected int values"),
        ("out:", "out: has no value"),
        ("out: ''", "out: is empty"),
        ("limit: ²", "expected a whole number"),
        ("seeds: [-1]", "-1 is negative"),
        ("methods: ''", "methods: is empty"),
        ("drop_long: 3", "drop_long: expected true or false, found 3"),
        ("set: {spin: 3}", r"set: expected METHOD: \{SETTING: VALUE\}"),
        ("training: 3", "training: expected keys and values"),
    ],
)
def test_bad_recipes_name_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        resolve({}, str(path), RECIPES)
    assert "bad.yaml" in str(error.value)


def test_missing_recipes_offer_the_packaged_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'mini'"):
        resolve({}, "mni", RECIPES)
    with pytest.raises(UserError, match="No such file"):
        resolve({}, "nowhere/x.yaml", RECIPES)


def test_every_field_can_be_a_flag_or_a_key() -> None:
    from gsil_bench import compare as command

    parameters = set(command.compare.__annotations__)
    aliases = {"set": "set_", "fields": "field", "start": "no_start", "training": "set_"}
    recipes_only = {"variants", "tuning"}
    assert {aliases.get(name, name) for name in Config().as_dict()} - recipes_only <= parameters
