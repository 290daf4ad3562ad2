"""What a comparison is about, read and checked before any work starts: model, chat format, demonstrations, tasks, methods.

Everything that a user can get wrong is found here, as one `UserError`, with nothing written yet.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gsil_bench.config import Config, Settings
from gsil_bench.data.chat import ChatFormat
from gsil_bench.data.demonstrations import check_lengths, from_items, read_demonstrations, split_held_out
from gsil_bench.errors import UnavailableError, UserError, library, unknown_name
from gsil_bench.evaluation import held_out
from gsil_bench.generation.engines import Options, choose_engine
from gsil_bench.methods import Method, baseline_methods, load_method, with_settings
from gsil_bench.models import checkpoint
from gsil_bench.models.adapters import merge_adapter_folder, resolve_adapter
from gsil_bench.records import NAME, Demonstration, Encoded, digest, file_sha256
from gsil_bench.tasks import expand, is_task, load_task
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources, Split, Task, require_consent
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.tracking import check_trackers
from gsil_bench.variants import base_names, check_round_names, check_variants, load_with_variants, settings_of

STARTING_MODEL = "start"
"""The method that does not train, which every comparison shows unless it is told not to."""


@dataclass(frozen=True)
class Model:
    """The starting model and everything that its folder says."""

    name: str
    folder: Path
    weights_sha256: str
    chat: ChatFormat
    context_length: int
    parameters: int
    device: str
    dtype: checkpoint.Dtype = "fp32"
    """Of the weights in memory."""
    autocast: bool = False
    """Whether matrix products are computed in bf16 over them."""

    @property
    def precision(self) -> str:
        """Of forward passes; part of every fingerprint."""
        name = "bf16-autocast" if self.autocast else self.dtype
        return name if self.device == "cpu" else f"{name}-{self.device}"


@dataclass(frozen=True)
class Demonstrations:
    """Demonstrations with their tokens, split into those that are trained on and those that are held out."""

    source: str
    train: tuple[Demonstration, ...]
    held_out: tuple[Demonstration, ...]
    counts: Mapping[str, int]
    """Rows read, duplicates, empty and over-long answers left out, held out, kept for training."""
    train_encoded: tuple[Encoded, ...]
    held_out_encoded: tuple[Encoded, ...]

    @cached_property
    def content(self) -> str:
        """Digest of both sides, in order."""
        return digest([[demonstration.id for demonstration in side] for side in (self.train, self.held_out)])

    @cached_property
    def train_tokens(self) -> str:
        """Digest of the token ids of the training side: all that log-probs depend on besides weights and precision."""
        return digest([[encoded.prompt_ids, encoded.completion_ids] for encoded in self.train_encoded])

    @property
    def preferences(self) -> int:
        """Training demonstrations that come with a rejected answer."""
        return sum(demonstration.rejected is not None for demonstration in self.train)


@dataclass(frozen=True)
class TaskInput:
    """A task and the items that are asked."""

    task: Task
    items: tuple[Item, ...]

    @cached_property
    def content(self) -> str:
        """Digest of the items: how they are asked and what the scorer reads."""
        return digest([_content(item) for item in self.items])


def _content(item: Item) -> list[Any]:
    continuations = [[given.context, given.text] for given in item.continuations]
    asked = [item.turns, item.history, item.opening, item.temperature, continuations]
    return [item.id, asked, dict(item.reference)]


@dataclass(frozen=True)
class MissingTask:
    """Stands for a task that needs something that is not here: its canary fails with the reason, and the other tasks go on."""

    name: str
    error: UnavailableError
    version: str = ""
    metric: str = "score"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False
    protocol: AnswerProtocol = field(default_factory=lambda: AnswerProtocol("missing", 1))

    @property
    def summary(self) -> str:
        """Why it is not there."""
        return str(self.error)

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        """None: nothing can be read."""
        return ()

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """Raise the reason."""
        raise self.error


@dataclass(frozen=True)
class Inputs:
    """All of it."""

    config: Config
    model: Model
    demonstrations: Demonstrations
    tasks: tuple[TaskInput, ...]
    methods: tuple[Method, ...]
    """In the user's order, with their settings resolved."""
    data_dir: Path | None
    engine: Options
    """What completes prompts."""
    notes: tuple[str, ...]
    """What a reader of the table should know: which data a method used, what was left out."""
    judge: Any = None
    """What rates answers, for tasks with `needs_judge`; part of the fingerprint of their scores."""
    bases: Mapping[str, Method] = field(default_factory=dict)
    """What methods start from, by their names, with the run's settings."""
    learned: Any = None
    """A further measure, for tasks with `takes_learned_metric`; part of the fingerprint of their scores."""

    @property
    def control(self) -> str:
        """The method that differences are taken from."""
        names = [method.name for method in self.methods]
        matched = [method.name for method in self.methods if method.batches == "matched-demonstrations"]
        trained = [method.name for method in self.methods if method.trains]
        chosen = self.config.control or [*matched, *trained, *names][0]
        if chosen not in names:
            raise unknown_name("control", chosen, names)
        return chosen


def read_inputs(config: Config) -> Inputs:
    """Read and check everything.

    Raises:
        UserError: whatever is wrong first.
    """
    check_writable(Path(config.out))
    methods = resolve_methods(config)
    data_dir = _data_dir(config)
    tasks = _tasks(config, data_dir)
    model = read_model(config)
    demonstrations = _demonstrations(config, tasks, model, data_dir)
    _check_needs(methods, demonstrations)
    _check_training(methods, model, config.sharded)
    engine = choose_engine(config.engine, config.engine_set, model.device, model.dtype, model.autocast)
    notes = tuple(_notes(config, methods, demonstrations))
    if engine.weights is not None:
        _check_untrained(config, methods)
        model = dataclasses.replace(model, weights_sha256=engine.weights)
        notes += ("answers are a served model's; no held-out loss: its log-probs are not asked for",)
    bases = {method.name: base_of(method, config) for method in methods if method.starts_from}
    if config.processes > 1:
        _check_alone([*methods, *bases.values()])
    inputs = Inputs(
        config, model, demonstrations, tasks, methods, data_dir, engine, notes, _judge(config), bases, _learned(config)
    )
    _ = inputs.control  # a wrong --control is found now
    return inputs


def _judge(config: Config) -> Any:
    """What rates answers, its judgments kept beside the comparison's other artefacts; None if none was named."""
    if config.judge is None:
        if config.judge_set:
            raise UserError("--judge-set: name the judge with --judge")
        return None
    from gsil_bench.evaluation.judging import make_judge

    return make_judge(config.judge, config.judge_set, Path(config.out) / "store" / "judgments")


def _learned(config: Config) -> Any:
    """The learned metric, its weights read once so that a wrong folder is found now; None if none was named."""
    if config.learned_metric is None:
        return None
    from gsil_bench.evaluation.learned_metrics import EmbeddingF1

    metric = EmbeddingF1(Path(config.learned_metric))
    _ = metric.identity
    return metric


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be made in the folder, or in the nearest parent that exists."""
    nearest = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"--out {folder}: {nearest} is not a folder")
    try:
        with tempfile.TemporaryDirectory(dir=nearest):  # permissions alone do not tell: the file system may be read-only
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write in {nearest} ({error.strerror}); choose another folder") from error


def resolve_methods(config: Config) -> tuple[Method, ...]:
    """The methods by their names, with the settings of recipe and flags."""
    check_variants(config.variants)
    loaded = [(typed, load_with_variants(typed, config.variants)) for typed in config.methods]
    if config.start and all(method.trains for _, method in loaded):
        loaded.insert(0, (STARTING_MODEL, load_method(STARTING_MODEL)))
    methods = []
    for typed, method in loaded:
        if not NAME.fullmatch(method.name):
            raise UserError(f"method {typed!r} is named {method.name!r}: letters, digits, '.', '_' and '-' only (64 at most)")
        fitting = config.training if method.loss is not None else {}
        methods.append(with_settings(method, {**fitting, **settings_of(typed, method, config.set, config.variants)}))
    names = [method.name for method in methods]
    known = [*names, *baseline_methods(), *config.variants, *base_names(config.variants)]
    for target in config.set:
        if target not in {*config.methods, *known}:
            raise unknown_name("method in set", target, known)
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"two methods are named {repeated.pop()!r}")
    if config.every_round:
        check_round_names(methods)
    return tuple(methods)


def base_of(method: Method, config: Config) -> Method:
    """What a method starts from: the method of that name with the run's settings, for its share of the epochs.

    Raises:
        UserError: there is none, it does not train, or starts from another one itself.
    """
    typed, epochs = method.starts_from, TrainConfig.of(method.training, where=method.name).epochs
    base = load_with_variants(typed, config.variants)
    base = with_settings(base, {**config.training, **settings_of(typed, base, config.set, config.variants)})
    if not base.trains or base.starts_from:
        why = f"starts from {base.starts_from} itself" if base.starts_from else "does not train"
        raise UserError(f"{method.name}.starts_from={typed}: {typed} {why}")
    batch_size = TrainConfig.of(method.training, where=method.name).batch_size
    return with_settings(base, {"epochs": epochs * method.start_share, "batch_size": batch_size})


def _check_alone(methods: Sequence[Method]) -> None:
    """Raise UserError for a method that only one process can train."""
    for method in methods:
        if method.rollouts is not None:
            raise UserError(
                f"--processes: {method.name} samples from the policy that it trains, in one process only; leave it out"
            )


def check_targets(settings: Settings, typed: Sequence[str], variants: Settings) -> None:
    """Raise UserError if a setting of the command line belongs to a method that is not compared: it would change nothing."""
    compared = {name: variants[name] for name in typed if name in variants}
    loaded = {word: load_with_variants(word, variants) for word in typed}
    known = {name for word, method in loaded.items() for name in (word, method.name)} | base_names(compared)
    known |= {method.starts_from for method in loaded.values() if method.starts_from}
    for target in settings:
        if target not in known:
            raise unknown_name("method in --set (not among --methods)", target, known)


def _data_dir(config: Config) -> Path | None:
    named = config.data_dir or os.environ.get("GSIL_BENCH_DATA")
    if named and not Path(named).is_dir():
        where = "--data-dir" if config.data_dir else "GSIL_BENCH_DATA"
        raise UserError(f"{where} {named}: no such folder")
    return Path(named) if named else None


def _tasks(config: Config, data_dir: Path | None) -> tuple[TaskInput, ...]:
    split = _split(config.split)
    tasks: list[TaskInput] = []
    for name in expand(list(config.tasks)):
        try:
            task = load_task(name, data_dir)
            items = tuple(_checked(name, task, config).items(split, data_dir))[: config.limit]
        except UnavailableError as error:
            task, items = MissingTask(name.replace(":", "/"), error), ()
            _checked(name, task, config)
        if task.name in {other.task.name for other in tasks}:
            raise UserError(f"two tasks are named {task.name!r}")
        tasks.append(TaskInput(task, items))
    return tuple(tasks)


def _checked(typed: str, task: Task, config: Config) -> Task:
    """The task, if its name is harmless and it may run."""
    if not all(NAME.fullmatch(part) for part in task.name.split("/")):
        raise UserError(
            f"task {typed!r} is named {task.name!r}: letters, digits, '.', '_' and '-' only (64 at most), parts by '/'"
        )
    if task.name == held_out.NAME:
        raise UserError(f"task {typed!r} is named {task.name!r}, the name of the column of the held-out loss")
    require_consent(task, config.allow_code_execution)
    if getattr(task, "needs_judge", False) and config.judge is None:
        raise UserError(
            f"task {task.name} needs a judge: --judge endpoint --judge-set url=http://host:8000/v1 --judge-set model=NAME"
        )
    return task


def _split(name: str) -> Split:
    if name not in ("dev", "test"):
        raise unknown_name("split", name, ["dev", "test"])
    return "dev" if name == "dev" else "test"


def read_model(config: Config) -> Model:
    """The starting model's folder, tokenizer and chat format."""
    device = _device(config.device)
    dtype, autocast = _precision(config.precision, device)
    _check_processes(config, device, dtype)
    check_trackers(config.trackers)
    folder = _merged(config) or checkpoint.resolve_model(config.model)
    checkpoint.check_architecture(folder)
    tokenizer = checkpoint.load_tokenizer(folder)
    chat = ChatFormat.of(tokenizer, config.chat_template, checkpoint.end_token_ids(folder))
    return Model(
        name=Path(config.model).name if Path(config.model).is_dir() else config.model,
        folder=folder,
        weights_sha256=checkpoint.weights_sha256(folder),
        chat=chat,
        context_length=checkpoint.context_length(folder),
        parameters=checkpoint.parameter_count(folder),
        device=device,
        dtype=dtype,
        autocast=autocast,
    )


def _check_processes(config: Config, device: str, dtype: checkpoint.Dtype) -> None:
    """Raise UserError for what several processes cannot do together, or one alone."""
    import torch

    if config.sharded and config.processes == 1:
        raise UserError("--sharded divides the weights among processes: add --processes, the number of GPUs")
    if device == "cuda" and config.processes > torch.cuda.device_count():
        raise UserError(f"--processes {config.processes}: torch sees {torch.cuda.device_count()} GPUs here, one for each process")
    if config.processes > 1 and not config.sharded and dtype == "bf16":
        raise UserError("--processes: copies in bf16 have no common fp32 masters; add --sharded, or --precision bf16-autocast")


def _merged(config: Config) -> Path | None:
    """A plain checkpoint of base and adapter, if the model is an adapter's folder: what a run starts from, and its reference."""
    if not Path(config.model).is_dir() or resolve_adapter(Path(config.model)) is None:
        return None
    adapter = Path(config.model)
    parts = [file_sha256(adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    folder = Path(config.out) / "store" / "merged" / digest(parts)[:32]
    if not (folder / "config.json").is_file():
        partial = folder.with_suffix(".partial")
        merge_adapter_folder(adapter, partial)
        partial.rename(folder)
    return folder


def _precision(asked: str, device: str) -> tuple[checkpoint.Dtype, bool]:
    """Dtype of the weights, and whether to compute under autocast."""
    known: dict[str, tuple[checkpoint.Dtype, bool]] = {
        "auto": ("fp32" if device == "cpu" else "bf16", False),
        "fp32": ("fp32", False),
        "bf16": ("bf16", False),
        "bf16-autocast": ("fp32", True),
        "nf4": ("nf4", False),
    }
    if asked not in known:
        raise unknown_name("precision", asked, known)
    return known[asked]


def _device(asked: str) -> str:
    import torch

    if asked not in ("auto", "cpu", "cuda"):
        raise unknown_name("device", asked, ["auto", "cpu", "cuda"])
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def _demonstrations(config: Config, tasks: Sequence[TaskInput], model: Model, data_dir: Path | None) -> Demonstrations:
    """Read, filter, split and tokenise."""
    source, named, counts = _read(config, tasks, data_dir)
    kept, dropped = check_lengths(named, model.chat, model.context_length, config.drop_long)
    train, held_out = split_held_out(kept)
    encoded = dict(
        zip([item.id for item in kept], model.chat.encode_many([(item.messages, item.answer) for item in kept]), strict=True)
    )
    return Demonstrations(
        source=source,
        train=tuple(train),
        held_out=tuple(held_out),
        counts={**counts, "too long": dropped, "held out": len(held_out), "trained on": len(train)},
        train_encoded=tuple(encoded[item.id] for item in train),
        held_out_encoded=tuple(encoded[item.id] for item in held_out),
    )


def _read(
    config: Config, tasks: Sequence[TaskInput], data_dir: Path | None
) -> tuple[str, list[Demonstration], Mapping[str, int]]:
    """Demonstrations by file, folder, hub id or task name; the compared tasks' train splits if none are named."""
    source = config.demonstrations
    if source is not None and not is_task(source):
        demonstrations, counts = read_demonstrations(source, config.fields, data_dir=data_dir, limit=config.limit_demonstrations)
        return source, demonstrations, dataclasses.asdict(counts)
    chosen = [load_task(name, data_dir) for name in expand([source])] if source is not None else [item.task for item in tasks]
    if config.fields:
        raise UserError("--field: names the fields of a file; give the file with --demonstrations")
    pools: list[list[Demonstration]] = []
    sources, seen = [], set[str]()
    for task in chosen:
        fresh = [item for item in task.items("train", data_dir) if item.id not in seen]
        seen |= {item.id for item in fresh}
        if fresh:  # greedy and sampled variants share their items
            sources.append(task.name)
            pools.append(from_items(fresh))
    if not pools:
        raise UserError(f"{', '.join(task.name for task in chosen)}: no train split; name a file with --demonstrations")
    demonstrations = list({item.id: item for item in _first_of_each(pools, config.limit_demonstrations)}.values())
    label = "train split of " + ", ".join(sources)
    return label, demonstrations, {"rows": len(demonstrations)}


def _first_of_each(pools: Sequence[Sequence[Demonstration]], limit: int | None) -> list[Demonstration]:
    """All demonstrations, task by task; with a limit the first ones of each task, as evenly as their numbers allow."""
    if limit is None:
        return [demonstration for pool in pools for demonstration in pool]
    turns = itertools.zip_longest(*pools)
    return [demonstration for turn in turns for demonstration in turn if demonstration is not None][:limit]


def _check_needs(methods: Sequence[Method], demonstrations: Demonstrations) -> None:
    """Raise UserError if a method lives on rejected answers alone and some demonstrations have none."""
    missing = len(demonstrations.train) - demonstrations.preferences
    for method in methods:
        if "preferences" in method.needs and "generated" not in method.needs and missing:
            raise UserError(
                f"method {method.name} needs preference data: {missing} of {len(demonstrations.train)} demonstrations have no "
                "rejected answer"
            )


def _check_training(methods: Sequence[Method], model: Model, sharded: bool) -> None:
    """Raise UserError if a method would train weights held in 4 bits, an adapter of divided weights or wider than the model, or
    needs a library that is missing.
    """
    width = checkpoint.model_config(model.folder).get("hidden_size")
    for method in [method for method in methods if method.trains]:
        config = TrainConfig.of(method.training, where=method.name)
        adapter = config.lora_rank > 0
        if isinstance(width, int) and config.lora_rank > width:
            raise UserError(f"{method.name}.lora_rank={config.lora_rank} is above the model's width of {width}")
        if model.dtype == "nf4" or "8bit" in config.optimizer:
            library("bitsandbytes", f"{method.name}.optimizer={config.optimizer} or --precision nf4")
        if model.dtype == "nf4" or adapter:
            library("peft", f"{method.name}.lora_rank or --precision nf4")
        if model.dtype == "nf4" and not adapter:
            raise UserError(f"--precision nf4 trains adapters only: --set {method.name}.lora_rank=16")
        if sharded and (adapter or model.dtype == "nf4"):
            raise UserError("--sharded divides weights that are all trained: leave it out with lora_rank or --precision nf4")


def _check_untrained(config: Config, methods: Sequence[Method]) -> None:
    """Raise UserError if a method would train: the weights that answer are out of reach."""
    trained = [method.name for method in methods if method.trains]
    if trained:
        raise UserError(
            f"--engine {config.engine}: a served model cannot be trained; leave out {', '.join(trained)} "
            f"(--methods {STARTING_MODEL})"
        )


def _notes(config: Config, methods: Sequence[Method], demonstrations: Demonstrations) -> list[str]:
    """What was left out, and which generated side each method on preferences was given."""
    left_out = {why: demonstrations.counts.get(why, 0) for why in ("duplicates", "empty", "too long")}
    notes = [f"{count} demonstrations left out: {why}" for why, count in left_out.items() if count]
    notes += ["scored on the dev split, which is for choosing settings and not for reporting"] if config.split == "dev" else []
    for method in methods:
        if "preferences" in method.needs:
            notes.append(f"{method.name}: {preference_source(demonstrations)}")
    return notes


def preference_source(demonstrations: Demonstrations) -> str:
    """Which rejected answers a method on preference data trains on, in words."""
    given, total = demonstrations.preferences, len(demonstrations.train)
    if given == total:
        return "trained on the rejected answers of the preference data"
    some = f" (only {given} of {total} demonstrations have a rejected answer)" if given else ""
    return f"trained on demonstrations against samples of the initial policy{some}"


def describe(inputs: Inputs) -> dict[str, Any]:
    """The inputs in words and hashes, for the plan and for provenance."""
    model, demonstrations = inputs.model, inputs.demonstrations
    return {
        "model": {"name": model.name, "weights_sha256": model.weights_sha256, "parameters": model.parameters},
        "chat_sha256": model.chat.fingerprint,
        "demonstrations": {"source": demonstrations.source, "sha256": demonstrations.content, **demonstrations.counts},
        "tasks": {item.task.name: {"items": len(item.items), "sha256": item.content} for item in inputs.tasks},
        "device": model.device,
        "precision": model.precision,
    }
