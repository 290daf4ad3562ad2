"""What a user asks for: one frozen record, from defaults, a recipe (YAML) and flags, in that order of precedence."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.yaml_files import read_yaml

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Config:
    """A comparison. Each field is a flag (`--drop-long`) and a key of a recipe (`drop_long: true`)."""

    model: str = "mini"
    """Folder, hub id or "mini"."""
    demonstrations: str | None = None
    """File, folder, hub id or the name of a task (its train split); None: the train splits of the compared tasks."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """How a file names its fields: {"prompt": "question", "completion": "answer"}."""
    methods: tuple[str, ...] = ("sft", "gsil-logistic")
    tasks: tuple[str, ...] = ("mini",)
    split: str = "test"
    """Items that are asked: "test" to report, "dev" to choose settings."""
    seeds: tuple[int, ...] = (0,)
    generation_seed: int | None = None
    """Draw the self-generations of all runs with this seed, so that a sweep over seeds pays for them once; None: with the run's
    own, so that a seed's spread holds that of its samples."""
    set: Settings = field(default_factory=dict)
    """METHOD → SETTING → VALUE."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Training settings of all methods."""
    variants: Settings = field(default_factory=dict)
    """NAME → {"method": METHOD, SETTING: VALUE, …}: a method with other settings, which `methods` can name beside the unchanged
    one (variants.py). In recipes only."""
    every_round: bool = False
    """Also show each method after each of its rounds, as the row METHOD--round-K."""
    tuning: Mapping[str, Any] = field(default_factory=dict)
    """How the settings were chosen (tune.py), for the provenance of results. In recipes only."""
    start: bool = True
    """Show the model as given, untrained, as the first row."""
    control: str | None = None
    """The method that the others are compared with; None: sft-continued if it is compared, otherwise the first
    that trains."""
    chat_template: str | None = None
    """A Jinja file or "plain", for a tokenizer that brings none."""
    data_dir: str | None = None
    """Folder that is searched for data files before they are downloaded; also GSIL_BENCH_DATA."""
    out: str = "runs"
    """Folder of results and artefacts."""
    limit: int | None = None
    """Items per task."""
    limit_demonstrations: int | None = None
    drop_long: bool = False
    """Leave out demonstrations that are longer than the context, instead of stopping."""
    allow_code_execution: bool = False
    """Consent to run arbitrary generated code in the sandbox."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu" or "cuda"."""
    precision: str = "auto"
    """Of all forward passes: "fp32"; "bf16" (fp32 masters in training); "bf16-autocast" (fp32 weights, products in bf16); "nf4"
    (4 bits, for QLoRA). "auto" is bf16 on a GPU and fp32 on a CPU. Log-probs, sums and losses are fp32 in all of them."""
    processes: int = 1
    """Processes of this machine that share each training step, one a GPU where there are GPUs."""
    sharded: bool = False
    """Divide weights and optimiser among them (FSDP2) instead of copying them (DDP)."""
    engine: str = "auto"
    """What completes prompts: "transformers"; "vllm"; "endpoint" (a served model, in place of the untrained one). "auto" is vLLM
    where it is installed and a GPU is there."""
    engine_set: Mapping[str, Any] = field(default_factory=dict)
    """Options of the engine."""
    judge: str | None = None
    """What rates answers of tasks that are judged (MT-Bench): "endpoint", "engine", "replay", or "module:ATTRIBUTE"."""
    judge_set: Mapping[str, Any] = field(default_factory=dict)
    """Options of the judge."""
    learned_metric: str | None = None
    """Folder or hub id of a model whose hidden states compare summaries with their references, beside ROUGE."""
    trackers: tuple[str, ...] = ()
    """Where metrics of training are also sent: tensorboard, wandb, mlflow, trackio."""

    def as_dict(self) -> dict[str, Any]:
        """JSON and YAML types only."""
        data = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


LISTS: dict[str, type] = {"methods": str, "tasks": str, "seeds": int, "trackers": str}
NUMBERS = ("limit", "limit_demonstrations", "processes")
NULLABLE = (
    "judge",
    "learned_metric",
    "demonstrations",
    "control",
    "chat_template",
    "data_dir",
    "limit",
    "limit_demonstrations",
    "generation_seed",
)
SWITCHES = ("start", "every_round", "sharded", "drop_long", "allow_code_execution")
NESTED = {"set": "METHOD: {SETTING: VALUE}", "variants": "NAME: {method: METHOD, SETTING: VALUE}"}
MAPPINGS = ("fields", "training", "tuning", "engine_set", "judge_set", *NESTED)


def resolve(flags: Mapping[str, Any], recipe: str | None, recipes: Path) -> Config:
    """The configuration that flags and recipe ask for.

    The packaged recipe of a packaged model (`mini.yaml` for `mini`) lies under every other layer: it holds settings that suit
    its size.

    Args:
        flags: field → value for those the user typed; strings as typed.
        recipe: a YAML file, or the name of one in `recipes`.
        recipes: folder of the packaged recipes.

    Raises:
        UserError: an unreadable recipe, an unknown key, a value of the wrong type.
    """
    asked = _load_recipe(recipe, recipes) if recipe else {}
    model = str(flags.get("model") or asked.get("model") or Config.model)
    base = _load_recipe(model, recipes) if model in {path.stem for path in recipes.glob("*.yaml")} else {}
    layers = [base, asked, {key: _typed(key, value, f"--{key.replace('_', '-')}") for key, value in flags.items()}]
    merged: dict[str, Any] = {}
    for layer in layers:
        for method in merged.get("set", {}):  # what a higher layer says of all methods counts for each of them
            kept = {key: value for key, value in merged["set"][method].items() if key not in layer.get("training", {})}
            merged["set"] = {**merged["set"], method: kept}
        for key, value in layer.items():
            merged[key] = _merge(merged.get(key), value) if key in MAPPINGS else value
    return Config(**merged)


def parse_settings(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """METHOD.SETTING=VALUE, several times, as METHOD → SETTING → VALUE."""
    settings: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        method, dot, setting = target.rpartition(".")
        if not (equals and dot and method and setting):  # no value is one: starts_from= is the model as given
            raise UserError(f"--set {assignment}: expected METHOD.SETTING=VALUE, such as gsil-logistic.scale=0.5")
        settings.setdefault(method, {})[setting] = value
    return settings


def parse_pairs(flag: str, assignments: Sequence[str], example: str, may_be_empty: bool = False) -> dict[str, str]:
    """NAME=VALUE, several times."""
    pairs = [assignment.partition("=") for assignment in assignments]
    for (name, equals, value), assignment in zip(pairs, assignments, strict=True):
        if not (name and equals and (value or may_be_empty)):
            raise UserError(f"{flag} {assignment}: expected NAME=VALUE, such as {example}")
    return {name: value for name, _, value in pairs}


def _load_recipe(name: str, recipes: Path) -> dict[str, Any]:
    """A recipe's fields, checked."""
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else recipes / f"{name}.yaml"
    try:
        data = read_yaml(path, f"recipe {path}") or {}
    except OSError as error:
        known = sorted(item.stem for item in recipes.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"recipe {name!r}: {error.strerror}; {hint}packaged ones: {', '.join(known)}") from error
    if not isinstance(data, dict):
        raise UserError(f"recipe {path}: expected keys and values, found {type(data).__name__}")
    known_keys = [item.name for item in dataclasses.fields(Config)]
    fields = {str(key).replace("-", "_"): value for key, value in data.items()}
    for key in fields:
        if key not in known_keys:
            raise unknown_name(f"key in recipe {path}", key, known_keys)
    return {key: _typed(key, value, f"recipe {path}: {key}") for key, value in fields.items()}


def _typed(key: str, value: Any, where: str) -> Any:
    """A value converted to its field's type, or a UserError that names where it came from."""
    if key == "trackers" and value in ([], ()):
        return ()
    if key in LISTS:
        return _list(value, LISTS[key], where)
    if value is None and key not in NULLABLE:
        raise UserError(f"{where}: has no value")
    if key in (*NUMBERS, "generation_seed") and value is not None:
        return whole_number(value, where, 1 if key in NUMBERS else 0)
    if key in SWITCHES and not isinstance(value, bool):
        raise UserError(f"{where}: expected true or false, found {value!r}")
    if key in MAPPINGS:
        fine = isinstance(value, Mapping) and (key not in NESTED or all(isinstance(item, Mapping) for item in value.values()))
        if not fine:
            raise UserError(f"{where}: expected {NESTED.get(key, 'keys and values')}, found {value!r}")
        return {str(name): item for name, item in value.items()}
    if value == "":
        raise UserError(f"{where}: is empty")
    return value if key in SWITCHES or value is None else str(value)


def whole_number(value: Any, where: str, least: int = 1) -> int:
    """A number as it was typed. Raises UserError, naming where, for anything else or for one below `least`."""
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < least:
        raise UserError(f"{where}: expected a whole number of at least {least}, found {value!r}")
    return int(value)


def _list(value: Any, kind: type, where: str) -> tuple[Any, ...]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    words = [part.strip() if isinstance(part, str) else part for part in parts if str(part).strip()]
    try:
        if any(isinstance(word, bool) or not isinstance(word, int | str) for word in words):
            raise ValueError
        items = tuple(kind(word) for word in words)
    except ValueError:
        raise UserError(f"{where}: expected {kind.__name__} values separated by commas, found {value!r}") from None
    if not items:
        raise UserError(f"{where}: is empty")
    if kind is int and any(item < 0 for item in items):
        raise UserError(f"{where}: {min(items)} is negative")
    return tuple(dict.fromkeys(items))


def _merge(below: Any, above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, inner ones (a method's settings) too."""
    merged = dict(below or {})
    for key, value in above.items():
        merged[key] = {**merged[key], **value} if isinstance(value, Mapping) and key in merged else value
    return merged
