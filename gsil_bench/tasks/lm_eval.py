"""Tasks that lm-eval defines: its prompts, shots, filters and metrics, asked through this suite's engines.

`items` builds lm-eval's own requests; `score` feeds the answers back into lm-eval's own filters and scorers, document by
document. Nothing of a definition is rewritten here, so a score equals that of lm-eval's own run on the same answers.

The data comes from DATA/lm-eval/NAME/SPLIT.jsonl (or .json, .parquet; SPLIT as the definition calls it) where that folder exists,
DATA being the user's data folder or $GSIL_BENCH_DATA; otherwise lm-eval fetches it from its public home. Definitions of one's own
are read from DATA/lm-eval/*.yaml.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gsil_bench.data.sources import DATA_VARIABLE
from gsil_bench.errors import UnavailableError, UserError, library, unknown_name
from gsil_bench.records import digest, file_sha256
from gsil_bench.tasks.task import AnswerProtocol, Continuation, Item, Score, ScoringResources, Split

TESTED = "0.4.13"
"""The version of lm-eval whose internals this file knows."""
FOLDER = "lm-eval"
"""Below a data folder."""
SHOT_SEED = 1234
"""What lm-eval draws shots by, unless told otherwise."""
MAX_NEW_TOKENS = 256
"""Where a definition has no limit."""
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Suffix of a data file → its builder in `datasets`."""
SAMPLING = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
"""Generation settings that a protocol can express."""
NEVER = -1000.0
"""Log-likelihood of the wrong choices of a canary, in nats."""
TARGET_IS_GOLD = frozenset({"gsm8k"})
"""Tasks whose target, generated as it is, gets full marks; elsewhere a filter may want other words around it."""


@dataclass(frozen=True)
class Definition:
    """One task of lm-eval's, without its data."""

    name: str
    path: Path
    """Of the YAML file."""
    config: Mapping[str, Any]
    """Includes resolved, functions not imported, changes applied."""
    changes: Mapping[str, Any]
    """Of the file's settings: shots, and where the data is."""
    files: Mapping[str, Path]
    """Local data: split → file."""


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval's, or a group of them (then every subtask is a group of items)."""

    name: str
    harness_name: str
    """As lm-eval knows it."""
    summary: str
    key: str
    """The metric that is the item's score, as lm-eval prints it: "acc_norm,none" (metric, filter)."""
    protocol: AnswerProtocol
    metric: str
    version: str = "1"
    chat: bool = False
    """Whether the context becomes messages in the model's template instead of a text."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the definition's settings."""
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        """One item for each document that lm-eval evaluates, in its order.

        Raises:
            UserError: lm-eval is not installed, the data cannot be had, a split other than "test", or a definition that differs
                from this task's protocol.
        """
        if split == "train":
            return ()
        if split != "test":
            raise unknown_name(f"split of {self.name}", split, ["test"])
        definitions = find_definitions(self.harness_name, data_dir, self.changes)
        self._check(definitions)
        return [item for definition in definitions for item in self._items(definition, grouped=len(definitions) > 1)]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        """What lm-eval's filters and scorers make of answers.

        An answer is a text, or for each continuation {"logp", "tokens"}. Several answers to one item are its repeats: they are
        scored together, as lm-eval does, and each gets the document's score.

        Raises:
            UserError: items that `items` did not make in this process.
        """
        repeats: dict[str, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            repeats[item.id].append(index)
        scores: dict[int, Score] = {}
        documents = [_Document.of(items[found[0]], [answers[index] for index in found]) for found in repeats.values()]
        _apply_filters([document for document in documents if not document.problem])
        for document, found in zip(documents, repeats.values(), strict=True):
            scores |= dict.fromkeys(found, document.score(self.key))
        return [scores[index] for index in range(len(items))]

    def _check(self, definitions: Sequence[Definition]) -> None:
        """Raise unless the definitions are asked as the protocol says."""
        found, key = read_protocol(self.name, definitions, self.chat)
        decisive = ("max_new_tokens", "temperature", "top_p", "samples", "system", "form", "stops", "shots", "shot_seed")
        different = [name for name in decisive if getattr(found, name) != getattr(self.protocol, name)]
        if self.key not in (key, *_keys(definitions)):
            different.append(f"metric {self.key}")
        if different:
            raise UserError(
                f"{self.name}: lm-eval's definition ({definitions[0].path.name}) has another {', '.join(different)} than the "
                f"protocol {self.protocol.name}. Use lm-eval {TESTED}, or name the task lm-eval:{self.harness_name}"
            )

    def _items(self, definition: Definition, grouped: bool) -> Iterator[Item]:
        with redirect_stderr(io.StringIO()):  # a progress bar for every subject of MMLU
            task = _load(definition)
            task.set_fewshot_seed(seed=SHOT_SEED)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            spell = _spell if self.chat else None
            task.build_all_requests(apply_chat_template=self.chat, fewshot_as_multiturn=True, chat_template=spell)
        documents: dict[int, list[Any]] = defaultdict(list)
        for instance in task.instances:
            documents[instance.doc_id].append(instance)
        scoring = digest(_scoring(task))[:16]
        for number, instances in documents.items():
            item = self._item(task, definition.name, number, sorted(instances, key=lambda found: found.idx), scoring)
            _MADE[item.id] = (task, tuple(sorted(instances, key=lambda found: found.idx)))
            if grouped:
                item = dataclasses.replace(item, group=definition.name, published_id=f"{definition.name}/{number}")
            yield item

    def _item(self, task: Any, name: str, number: int, instances: Sequence[Any], scoring: str) -> Item:
        first = instances[0]
        target = task.doc_to_target(first.doc)
        arguments = [list(instance.args) for instance in instances]
        identity = digest([name, number, json.dumps([first.doc, arguments, target], default=str), scoring])[:16]
        reference = {"task": name, "document": number, "target": str(target), "scoring": scoring, "lm_eval": _installed()}
        item = Item(identity, published_id=str(number), reference=reference)
        if all(instance.request_type == "loglikelihood" for instance in instances):
            asked = self._continuations(item, [(context, text) for context, text in arguments])
            return dataclasses.replace(asked, gold=_gold_choice(task, first.doc, len(instances)))
        if len(instances) != 1 or first.request_type != "generate_until":
            raise UserError(f"{self.name}: document {number} asks for {first.request_type}, which no protocol here expresses")
        if _settings(self.name, first.args[1]) != _settings_of(self.protocol):
            raise UserError(f"{self.name}: document {number} has generation settings of its own; a protocol has one for all")
        gold = (str(target),) if name in TARGET_IS_GOLD else ()
        return dataclasses.replace(self._question(item, first.args[0]), gold=gold)

    def _question(self, item: Item, context: str) -> Item:
        """The item that asks a context: a text, or the JSON of messages."""
        if not self.chat:
            return dataclasses.replace(item, turns=(context,))
        messages = json.loads(context)
        opening = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        if system != self.protocol.system:
            raise UserError(f"{self.name}: the system message depends on the document; use lm-eval:{self.harness_name}")
        roles = [message["role"] for message in messages]
        if roles != [*["user", "assistant"] * (len(messages) // 2), "user"]:
            raise UserError(f"{self.name}: its shots are not questions and answers in turn ({', '.join(roles)})")
        texts = [message["content"] for message in messages]
        history = tuple(zip(texts[:-1:2], texts[1::2], strict=True))
        return dataclasses.replace(item, turns=(texts[-1],), history=history, opening=opening)

    def _continuations(self, item: Item, pairs: Sequence[tuple[str, str]]) -> Item:
        """The item that asks for log-likelihoods. In chat form the last user message is the context; an empty one stays empty."""
        asked = [self._question(item, context) if context else dataclasses.replace(item, turns=("",)) for context, _ in pairs]
        if len({(each.history, each.opening) for each, (context, _) in zip(asked, pairs, strict=True) if context}) > 1:
            raise UserError(f"{self.name}: its choices have shots of their own; use lm-eval:{self.harness_name}")
        texts = [text for _, text in pairs]
        continuations = tuple(Continuation(each.turns[0], text) for each, text in zip(asked, texts, strict=True))
        return dataclasses.replace(asked[0], turns=(), continuations=continuations)


_MADE: dict[str, tuple[Any, tuple[Any, ...]]] = {}
"""Item's id → its task and requests in lm-eval. A scorer needs the whole document, which JSON may not hold."""


# --- finding definitions ---------------------------------------------------------------------------------------------------


def find_definitions(name: str, data_dir: Path | None, changes: Mapping[str, Any]) -> list[Definition]:
    """The definition of a task, or those of a group's tasks, in lm-eval's order.

    Raises:
        UserError: lm-eval is not installed, or the name is unknown to it.
    """
    folder = _folder(data_dir)
    missing = ""
    for index, whole in _indices(name, folder):
        try:
            return [_definition(entry, folder, changes) for entry in list(_leaves(name, index, whole))]
        except KeyError as error:  # a group whose tasks lie elsewhere: the whole index has them
            missing = str(error)
    raise UserError(f"lm-eval's group {name} names a task {missing} that there is not; name that group's tasks one by one")


def _folder(data_dir: Path | None) -> Path | None:
    """The user's folder of definitions and data."""
    for place in (data_dir, os.environ.get(DATA_VARIABLE)):
        if place and (Path(place).expanduser() / FOLDER).is_dir():
            return Path(place).expanduser() / FOLDER
    return None


def _harness(module: str) -> Any:
    library("lm_eval", "a task of lm-eval's")
    return importlib.import_module(f"lm_eval.{module}")


def _installed() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _indices(name: str, folder: Path | None) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Indices of definitions in which the name is, and whether it is the whole one: that takes ten seconds, so it comes last."""
    tasks = _harness("tasks")
    stock = Path(tasks.__file__).parent
    own: Mapping[str, Any] = {} if folder is None else _index(folder)
    if name in own:
        yield own, False
    likely = [path.parent for pattern in (f"{name}.yaml", f"_{name}.yaml") for path in sorted(stock.rglob(pattern))]
    for place in dict.fromkeys((*likely, stock / name)):
        if place.is_dir() and name in (index := _index(place)):
            yield index, False
    index = {**_stock_index(), **own}
    if name not in index:
        nearest = difflib.get_close_matches(name, index, n=1, cutoff=0.5)
        hint = f": did you mean {nearest[0]!r}?" if nearest else ". `lm-eval ls tasks` lists them"
        raise UserError(f"unknown task of lm-eval's {name!r}{hint}")
    yield index, True


def _index(place: Path) -> Mapping[str, Any]:
    """Name → entry of the definitions below a folder."""
    index: Mapping[str, Any] = _harness("tasks").TaskManager(include_path=str(place), include_defaults=False).task_index
    return index


@functools.cache
def _stock_index() -> Mapping[str, Any]:
    index: Mapping[str, Any] = _harness("tasks").TaskManager().task_index
    return index


def _leaves(name: str, index: Mapping[str, Any], whole: bool) -> Iterator[Any]:
    """The tasks that a name stands for. Raises KeyError for one that the index does not have, or may have a part of (a tag)."""
    entry = index[name]
    if entry.yaml_path is None:
        if not whole:
            raise KeyError(name)
        members: Sequence[Any] = sorted(entry.tags)
    elif "group" in entry.cfg:
        members = entry.cfg.get("task") or ()
    else:
        yield entry
        return
    for member in members:
        if not isinstance(member, str):
            raise UserError(f"lm-eval's group {name} changes the settings of its tasks; name its tasks one by one")
        yield from _leaves(member, index, whole)


def _definition(entry: Any, folder: Path | None, changes: Mapping[str, Any]) -> Definition:
    own = folder is not None and entry.yaml_path.is_relative_to(folder)
    files = _own_files(entry) if own else {}
    place = None if folder is None else folder / entry.name
    if place is not None and place.is_dir():
        files = {path.stem: path for path in sorted(place.iterdir()) if path.suffix in READERS}
        if not files:
            raise UserError(f"{place} holds no data: put a file for each split there, such as test.jsonl")
    if files:
        changes = {**changes, **_reading(files)}
    return Definition(entry.name, entry.yaml_path, {**entry.cfg, **changes}, changes, files)


def _own_files(entry: Any) -> dict[str, Path]:
    """Local data files that a definition of the user's names, relative to the definition."""
    named = (entry.cfg.get("dataset_kwargs") or {}).get("data_files") or {}
    if not isinstance(named, dict) or not all(isinstance(path, str) for path in named.values()):
        return {}
    files = {split: entry.yaml_path.parent / path for split, path in named.items()}
    return files if all(path.is_file() for path in files.values()) else {}


def _reading(files: Mapping[str, Path]) -> dict[str, Any]:
    """Settings that make lm-eval read files."""
    readers = {READERS.get(path.suffix, "json") for path in files.values()}
    if len(readers) > 1:
        raise UserError(f"{next(iter(files.values())).parent} holds files of several kinds; give all splits as one kind")
    named = {split: str(path.resolve()) for split, path in files.items()}
    return {"dataset_path": readers.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": named}}


def _load(definition: Definition) -> Any:
    """lm-eval's task with its data."""
    yaml = importlib.import_module("lm_eval.tasks._yaml_loader")
    manager = _harness("tasks").TaskManager(include_defaults=False)
    try:
        config = {**yaml.load_yaml(definition.path, resolve_func=True), **deepcopy(dict(definition.changes))}
        return manager.load(config)["tasks"][definition.name]
    except ImportError as error:
        raise UnavailableError(
            f"lm-eval's task {definition.name} needs a package that is not here: {_one_line(error)}"
        ) from error
    except Exception as error:  # a definition's own code, the network, a file's columns: anything may fail
        remedy = f"put the data at {FOLDER}/{definition.name}/SPLIT.jsonl in a folder and set {DATA_VARIABLE} to that folder"
        if definition.files:
            remedy = f"its data is {', '.join(map(str, definition.files.values()))}"
        raise UnavailableError(f"lm-eval's task {definition.name} cannot be loaded ({_one_line(error)}); {remedy}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# --- from definition to protocol -------------------------------------------------------------------------------------------


def harness_task(name: str, chat: bool = False, data_dir: Path | None = None) -> HarnessTask:
    """The task of that name in lm-eval, as "lm-eval/NAME", or in the model's chat template as "lm-eval-chat/NAME".

    Args:
        data_dir: where definitions and data of the user's are, as given to `items`.

    Raises:
        UserError: lm-eval is not installed, does not know the name, or the task cannot be asked or scored here.
    """
    definitions = find_definitions(name, data_dir, {})
    full_name = f"{'lm-eval-chat' if chat else 'lm-eval'}/{name}"
    protocol, key = read_protocol(full_name, definitions, chat)
    versions = {str((definition.config.get("metadata") or {}).get("version", "")) for definition in definitions}
    return HarnessTask(
        name=full_name,
        harness_name=name,
        summary=f"lm-eval's {name}, {'in the chat template' if chat else 'in text form'}, scored by its {key}",
        key=key,
        protocol=protocol,
        metric=key.partition(",")[0],
        version="+".join(sorted(versions)) or "none",
        chat=chat,
    )


def read_protocol(name: str, definitions: Sequence[Definition], chat: bool) -> tuple[AnswerProtocol, str]:
    """How definitions are asked, and the key of the metric that scores an item.

    Raises:
        UserError: they differ among themselves, or cannot be asked or scored here.
    """
    found = [_protocol(name, definition, chat) for definition in definitions]
    protocol, key = found[0]
    if any(dataclasses.replace(other, data=protocol.data) != protocol or metric != key for other, metric in found):
        raise UserError(f"{name}: its tasks are asked or scored in different ways; name them one by one")
    data = {file: sha256 for other, _ in found for file, sha256 in other.data.items()}
    return dataclasses.replace(protocol, data=data), key


def _protocol(name: str, definition: Definition, chat: bool) -> tuple[AnswerProtocol, str]:
    config = definition.config
    _refuse(name, config)
    chosen = config.get("output_type", "generate_until") != "generate_until"
    key = f"{_metric(name, config)},{_filters(config)[0]}"
    shots = config.get("num_fewshot") or 0
    tokens, temperature, top_p, stops = (0, 0.0, 1.0, ()) if chosen else _settings(name, _generation(config))
    protocol = AnswerProtocol(
        name=name,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        samples=1 if chosen else int(config.get("repeats") or 1),
        seed=SHOT_SEED if temperature > 0 else 0,
        system=str(config.get("description") or "") if chat else "",
        form="chat" if chat else "text",
        stops=stops,
        prompt=f"lm-eval's {name.partition('/')[2]}" + (f", {shots} shots" if shots else ""),
        shots=shots,
        shot_seed=SHOT_SEED if shots else None,
        extraction=f"lm-eval's {key}" + (" of the continuations' log-likelihoods" if chosen else ""),
        data={f"{FOLDER}/{definition.name}/{path.name}": file_sha256(path) for path in definition.files.values()},
    )
    return protocol, key


def _refuse(name: str, config: Mapping[str, Any]) -> None:
    """Raise for what cannot be asked through an engine, or should not be run."""
    kind = config.get("output_type", "generate_until")
    reasons = {
        "is written in Python, not in YAML": "class" in config,
        "runs generated code outside a sandbox; use this suite's own tasks, such as humaneval": bool(config.get("unsafe_code")),
        "shows images or sounds": bool(config.get("doc_to_image") or config.get("doc_to_audio")),
        "asks for the log-likelihood of whole documents": kind == "loglikelihood_rolling",
        "asks what the model would say greedily after a context": kind == "loglikelihood" and not config.get("process_results"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{name}: this task {reason}")


def _generation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A definition's generation settings, with lm-eval's defaults."""
    delimiter = config.get("fewshot_delimiter", "\n\n")
    return {"until": [delimiter], **(config.get("generation_kwargs") or {})}


def _settings(name: str, generation: Mapping[str, Any]) -> tuple[int, float, float, tuple[str, ...]]:
    """(tokens, temperature, top_p, stops) of generation settings."""
    utils = _harness("models.utils")
    settings = utils.normalize_gen_kwargs(deepcopy(dict(generation)), MAX_NEW_TOKENS)
    unknown = sorted(key for key, value in settings.items() if key not in SAMPLING and value is not None)
    if unknown:
        raise UserError(f"{name}: no protocol here expresses its generation setting {', '.join(unknown)}")
    temperature = float(settings.get("temperature") or 0.0) if settings["do_sample"] else 0.0
    if settings["do_sample"] and temperature == 0:
        raise UserError(f"{name}: it samples, but its definition gives no temperature")
    top_p = float(settings.get("top_p") or 1.0) if temperature else 1.0
    return int(settings["max_gen_toks"]), temperature, top_p, tuple(text for text in settings["until"] if text)


def _settings_of(protocol: AnswerProtocol) -> tuple[int, float, float, tuple[str, ...]]:
    return protocol.max_new_tokens, protocol.temperature, protocol.top_p, protocol.stops


def _filters(config: Mapping[str, Any]) -> list[str]:
    """Names of a definition's filters, in order."""
    return [str(entry["name"]) for entry in config.get("filter_list") or ()] or ["none"]


def _metric(name: str, config: Mapping[str, Any]) -> str:
    """The first metric of a definition that is a mean over documents: others have no value for a single item."""
    found = list(_metrics(config))
    for metric, is_mean, higher_is_better in found:
        if is_mean and higher_is_better and not _needs_greedy(metric, config):
            return metric
    named = ", ".join(metric for metric, _, _ in found)
    raise UserError(
        f"{name}: none of its metrics ({named}) is a mean over documents, better when higher, that needs no greedy answer beside "
        "log-likelihoods"
    )


def _needs_greedy(metric: str, config: Mapping[str, Any]) -> bool:
    """Whether a metric asks what the model would say, which log-likelihoods do not tell."""
    return config.get("output_type") == "multiple_choice" and metric == "exact_match" and not config.get("process_results")


def _metrics(config: Mapping[str, Any]) -> Iterator[tuple[str, bool, bool]]:
    """(name, whether it is a mean, whether higher is better) of a definition's metrics, in order."""
    registry = _harness("api.registry")
    importlib.import_module("lm_eval.api.metrics")  # registers them
    listed = config.get("metric_list")
    if listed is None:
        listed = [{"metric": name} for name in registry.DEFAULT_METRIC_REGISTRY[config.get("output_type", "generate_until")]]
    for entry in listed:
        metric = str(entry["metric"])
        aggregation = entry.get("aggregation")
        if aggregation is None and "/" not in metric:
            is_mean = registry.get_metric_aggregation(metric) is registry.get_aggregation("mean")
        else:
            is_mean = aggregation == "mean"
        higher = entry.get("higher_is_better", registry.is_higher_better(metric) if "/" not in metric else True)
        yield metric.rpartition(".")[2] if "/" in metric else metric, is_mean, bool(higher)


def _keys(definitions: Sequence[Definition]) -> list[str]:
    """Every "metric,filter" that all definitions have."""
    found = [
        [f"{metric},{name}" for name in _filters(definition.config) for metric, _, _ in _metrics(definition.config)]
        for definition in definitions
    ]
    return [key for key in found[0] if all(key in keys for keys in found)]


def _spell(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
    """What lm-eval takes for a rendered chat template: the messages themselves."""
    return json.dumps(list(messages))


def _scoring(task: Any) -> dict[str, str]:
    """What of a definition decides a score."""
    config = task.config.to_dict()
    parts = ("output_type", "metric_list", "filter_list", "process_results", "doc_to_target", "doc_to_choice")
    return {key: json.dumps(config.get(key), default=str) for key in parts}


def _gold_choice(task: Any, doc: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Log-likelihoods that get full marks, or nothing where only the definition's own code knows them."""
    if callable(task.config.process_results):
        labels = (doc.get("mc2_targets") or {}).get("labels") or []
        target: Any = labels.index(1) if 1 in labels and len(labels) == count else None
    elif task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        target = target[0] if isinstance(target, list) and target else target
        target = choices.index(target) if isinstance(target, str) and target in choices else target
    else:
        target = None
    if not isinstance(target, int) or not 0 <= target < count:
        return ()
    return tuple(json.dumps({"logp": 0.0 if index == target else NEVER, "tokens": 1}) for index in range(count))


# --- scoring ---------------------------------------------------------------------------------------------------------------


class _Unasked:
    """Stands where lm-eval expects whether a continuation is what the model would say: that is not asked."""

    def _refuse(self, *others: object) -> NoReturn:
        raise UserError("this scorer asks whether a continuation is the greedy one, which is not known here")

    __bool__ = __int__ = __index__ = __float__ = __add__ = __radd__ = _refuse


@dataclass
class _Document:
    """A document with its answers, on the way through lm-eval's filters and scorer."""

    task: Any
    instances: list[Any]
    target: str
    empty: bool
    problem: str = ""
    """Why it has no score."""

    @staticmethod
    def of(item: Item, answers: Sequence[Sequence[str]]) -> _Document:
        """The document of an item; `answers` are its repeats."""
        if item.id not in _MADE:
            raise UserError(f"item {item.id} was not made by this process; make the task's items again before scoring them")
        task, requests = _MADE[item.id]
        empty = not any(text.strip() for texts in answers for text in texts)
        document = _Document(task, [], str(item.reference["target"]), empty)
        greedy: Any = _Unasked() if callable(task.config.process_results) else False
        for index, request in enumerate(requests):
            try:
                responses = [_response(item, texts, index, greedy) for texts in answers]
            except (ValueError, KeyError, IndexError, TypeError) as error:
                responses = []
                document.problem = f"continuation {index} has no log-likelihood ({_one_line(error)})"
            document.instances.append(dataclasses.replace(request, resps=responses, filtered_resps={}))
        return document

    def score(self, key: str) -> Score:
        """The document's value of a metric, all the others in `details`."""
        if self.empty and self.instances[0].request_type == "loglikelihood":
            return Score(0.0, "no log-likelihoods were given", {"empty": True})
        if self.problem:
            return Score(None, self.problem, {"empty": self.empty})
        try:
            metrics = self._metrics()
        except Exception as error:  # a definition's own code
            return Score(None, f"lm-eval's scorer failed: {_one_line(error)}", {"empty": self.empty})
        value = metrics.get(key)
        details = {"metrics": metrics, "empty": self.empty, **self._diagnoses(key, metrics)}
        if value is None:
            return Score(None, f"lm-eval's scorer gave no {key}", details)
        if not 0 <= value <= 1:
            return Score(None, f"lm-eval's {key} is {value:g}, which is not between 0 and 1", details)
        return Score(value, self._reason(key, value), details)

    def _metrics(self) -> dict[str, float]:
        """Every metric under every filter that is a number for one document."""
        metrics: dict[str, float] = {}
        config = {name: getattr(self.task.config, name) for name in ("output_type", "process_results")}
        doc = self.instances[0].doc
        for name in self.instances[0].filtered_resps:
            found = self.task.process_results(doc, [instance.filtered_resps[name] for instance in self.instances])
            for metric, value in found.items():
                number = _number(value)
                if number is not None and not _needs_greedy(metric, config):
                    metrics[f"{metric},{name}"] = number
        return metrics

    def _diagnoses(self, key: str, metrics: Mapping[str, float]) -> dict[str, bool]:
        """Whether the format was kept, and whether the flexible filter would have said right."""
        found: dict[str, bool] = {}
        metric, _, name = key.partition(",")
        filters = {entry["name"]: entry["filter"] for entry in self.task.config.filter_list or ()}
        if any("regex" in step["function"] for step in filters.get(name, ())):
            found["format_ok"] = self.instances[0].filtered_resps[name] not in ("[invalid]", ["[invalid]"])
        if f"{metric},flexible-extract" in metrics:
            found["flexible"] = metrics[f"{metric},flexible-extract"] == 1
        return found

    def _reason(self, key: str, value: float) -> str:
        filtered = [instance.filtered_resps[key.partition(",")[2]] for instance in self.instances]
        if self.instances[0].request_type == "loglikelihood":
            given = "log-likelihoods " + ", ".join(f"{pair[0]:.2f}" for pair in filtered)
        else:
            given = repr(_short(str(filtered[0])))
        return f"{key} is {value:g}: {given}; the target is {_short(self.target)!r}"


def _response(item: Item, texts: Sequence[str], index: int, greedy: Any) -> Any:
    """What lm-eval expects of a model: a text, or (log-likelihood, whether it is the greedy one)."""
    if not item.continuations:
        return texts[0]
    logp = float(json.loads(texts[index])["logp"])
    if math.isnan(logp):
        raise ValueError("the log-likelihood is not a number")
    return logp, greedy


def _apply_filters(documents: Sequence[_Document]) -> None:
    """Run lm-eval's filters over all documents of each task; if one fails, over each alone, so that the others are scored."""
    groups: dict[int, list[_Document]] = defaultdict(list)
    for document in documents:
        groups[id(document.task)].append(document)
    for members in groups.values():
        try:
            _filter(members)
        except Exception:
            for document in members:
                _filter_alone(document)


def _filter(documents: Iterable[_Document]) -> None:
    documents = list(documents)
    task = documents[0].task
    kept = task._instances
    task._instances = [instance for document in documents for instance in document.instances]
    try:
        task.apply_filters()
    finally:
        task._instances = kept


def _filter_alone(document: _Document) -> None:
    try:
        _filter([document])
    except Exception as error:  # a definition's own code
        document.problem = f"lm-eval's filter failed: {_one_line(error)}"


def _number(value: Any) -> float | None:
    """A metric's value as a number, if it is one and finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:60] + "…"


# --- Open LLM Leaderboard v1 -----------------------------------------------------------------------------------------------

_GREATEST: Callable[[str], str] = "the choice of the greatest log-likelihood{} must be the right one".format


def _openllm(
    short: str,
    harness_name: str,
    shots: int,
    key: str,
    summary: str,
    extraction: str,
    metric: str = "",
    draws: bool = True,
    tokens: int = 0,
    stops: tuple[str, ...] = (),
) -> HarnessTask:
    """A task of the leaderboard's first version. `draws`: whether its shots are drawn at random from the train split."""
    name = f"openllm-v1/{short}"
    protocol = AnswerProtocol(
        name=name,
        max_new_tokens=tokens,
        form="text",
        stops=stops,
        prompt=f"lm-eval's {harness_name}, {shots} shots" + (" drawn from train" if draws and shots else ""),
        shots=shots,
        shot_seed=SHOT_SEED if shots else None,
        extraction=extraction,
    )
    changes: dict[str, Any] = {"num_fewshot": shots}
    if draws:
        changes["fewshot_split"] = "train"  # as in lm-eval's group openllm; it also decides which shots are drawn
    return HarnessTask(name, harness_name, summary, key, protocol, metric or key.partition(",")[0], changes=changes)


OPENLLM_ARC = _openllm(
    "arc",
    "arc_challenge",
    25,
    "acc_norm,none",
    "ARC-Challenge, 25 shots, by log-likelihood per character",
    _GREATEST(" per character"),
)
OPENLLM_HELLASWAG = _openllm(
    "hellaswag",
    "hellaswag",
    10,
    "acc_norm,none",
    "HellaSwag, 10 shots, by log-likelihood per character",
    _GREATEST(" per character"),
)
OPENLLM_MMLU = _openllm(
    "mmlu",
    "mmlu",
    5,
    "acc,none",
    "MMLU, 5 shots; the mean over questions, as lm-eval's group today (the leaderboard took the mean over 57 subjects)",
    _GREATEST("") + "; the mean is over questions, so subjects count by their size",
    draws=False,
)
OPENLLM_TRUTHFULQA = _openllm(
    "truthfulqa-mc2",
    "truthfulqa_mc2",
    0,
    "acc,none",
    "TruthfulQA mc2, no drawn shots (six fixed ones are in the prompt)",
    "the share of the choices' probability that is on true ones",
    metric="mc2",
    draws=False,
)
OPENLLM_WINOGRANDE = _openllm(
    "winogrande", "winogrande", 5, "acc,none", "Winogrande, 5 shots, by log-likelihood of the sentence's end", _GREATEST("")
)
OPENLLM_GSM8K = _openllm(
    "gsm8k",
    "gsm8k",
    5,
    "exact_match,strict-match",
    "GSM8K, 5 shots, as lm-eval defines it today; gsm8k/openllm-v1 has the stops of the leaderboard's commit",
    'the first "#### number" must equal the target\'s',
    tokens=MAX_NEW_TOKENS,
    stops=("Question:", "</s>", "<|im_end|>"),
)
