"""What a file of the leaderboard may hold, as a JSON Schema (draft 2020-12), and the check of a file against it.

`SCHEMA` is published as leaderboards/schema.json by `gsil-bench leaderboard build`. Only the keywords of `KEYWORDS` are used, so
that the check below needs no library; a test compares it with the package jsonschema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

VERSION = 1
"""Raised when a field changes its meaning; files of another version are refused."""

KEYWORDS = frozenset({"type", "const", "enum", "pattern", "minimum", "minLength", "maxLength", "minItems"})
"""Those that say something of one value; besides them: properties, required, additionalProperties, items."""

SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
LINK = {"type": ["string", "null"], "pattern": "^https?://[^\\s<>\"']+$", "maxLength": 500}
COUNTS = {"type": "object", "additionalProperties": {"type": "number"}}
COST = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}}
UTC = "^\\d{4}-\\d\\d-\\d\\dT[\\d:.]+([+]00:00|Z)$"
NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
TASK_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,63})*$"
LARGEST = 1e300
"""A number beyond it is none that a run gives; JSON's 1e999 is read as infinite."""


def _field(description: str, **keywords: Any) -> dict[str, Any]:
    return {"description": description, **keywords}


def _object(description: str, properties: Mapping[str, Any], optional: Sequence[str] = (), **keywords: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return _field(
        description, **{"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}
        | keywords,
    )  # fmt: skip


_MODEL = _object(
    "The model that all methods started from.",
    {
        "name": _field("Its name, never a path.", type="string", minLength=1, maxLength=200),
        "weights_sha256": _field("sha256 over its weights.", **SHA256),
        "parameters": _field("How many it has.", type=["integer", "null"], minimum=1),
    },
)

_DEMONSTRATIONS = _object(
    "What was learned from.",
    {
        "sha256": _field("Digest of the demonstrations' ids on both sides of the split, in order.", **SHA256),
        "source": _field("Where they come from, in words; the name of a file, never its folder.", type="string", maxLength=500),
        "trained_on": _field("How many were trained on.", type="integer", minimum=0),
        "held_out": _field("How many were held out for the held-out loss.", type="integer", minimum=0),
    },
)

_METHOD = _object(
    "The method.",
    {
        "name": _field("As in the table.", type="string", pattern=NAME_PATTERN),
        "record": _field(
            "The resolved record: loss, formula, settings, needs, protocol of self-play, training.",
            type="object",
            properties={
                "summary": _field("One sentence.", type="string"),
                "loss": _field("Name of the loss's function; null for the model as given.", type=["string", "null"]),
                "formula": _field("The loss in one line.", type="string"),
                "paper": _field("Citation.", type="string"),
                "settings": _field("The loss's keywords.", type="object"),
                "needs": _field("What it lives on: generated, reference, preferences.", type="array", items={"type": "string"}),
                "protocol": _field("Opponent, rounds, sampling of self-generations.", type="object"),
                "training": _field("What it changes of the training settings.", type="object"),
            },
            required=["summary", "loss", "formula", "settings", "needs", "protocol", "training"],
        ),
        "source": _field("Where its code is, for a method that is not in this repository; null for one that is.", **LINK),
    },
)

_ITEMS = _object(
    "Every item's score: all that the table's intervals and verdicts are computed from.",
    {
        "ids": _field(
            "sha256 of each item's id, its first 12 hex digits, in the task's order.",
            type="array",
            minItems=1,
            items={"type": "string", "pattern": "^[0-9a-f]{12}$"},
        ),
        "scores": _field("Their scores in that order; null is unscored.", type="array", items={"type": ["number", "null"]}),
        "sha256": _field("sha256 of the canonical JSON of [[id, score], …].", **SHA256),
    },
)

_TUNING = _field(
    "How the settings were chosen; null: not tuned, or not said.",
    type=["object", "null"],
    properties={
        "search_space": _field("Setting → the values that were tried.", type="object"),
        "trials": _field("Number of configurations that were trained and scored.", type="integer", minimum=1),
        "split": _field("Whose items chose among them; never the test split.", enum=["dev", "train", "held-out"]),
        "objective": _field("What was maximised.", type="string", maxLength=300),
        "seeds": _field("Training seeds of each trial.", type="array", items={"type": "integer", "minimum": 0}),
    },
    required=["search_space", "trials", "split"],
    additionalProperties=False,
)

_PROVENANCE = _object(
    "Where the numbers come from. No paths and no names of people or machines.",
    {
        "created": _field("When the cell was finished, ISO 8601, UTC.", type="string", pattern=UTC),
        "suite_version": _field("Of gsil_bench.", type=["string", "null"]),
        "commit": _field("Of gsil_bench's checkout; null outside one.", type=["string", "null"], pattern="^[0-9a-f]{7,64}$"),
        "dirty": _field("Whether the checkout had uncommitted changes.", type=["boolean", "null"]),
        "packages": _field("Name → version.", type="object", additionalProperties={"type": ["string", "null"]}),
        "python": _field("Its version.", type=["string", "null"]),
        "hardware": _field(
            "Cores, memory, GPUs.",
            type="object",
            properties={"gpus": _field("Their names.", type="array", items={"type": "string"})},
        ),
        "weights_sha256": _field("Of the trained weights after each round.", type="array", items=SHA256),
    },
)

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A cell of gsil_bench's leaderboard",
    **_object(
        "One method with one seed, scored on one task. Written by `gsil-bench submit`, never by hand.",
        {
            "schema_version": _field("Of this schema.", const=VERSION),
            "fingerprint": _field("Of the stages that made the cell: the same fingerprint is the same cell.", **SHA256),
            "model": _MODEL,
            "demonstrations": _DEMONSTRATIONS,
            "chat_sha256": _field("Fingerprint of the chat template and its tokens.", type="string", minLength=8),
            "method": _METHOD,
            "seed": _field("Of the training.", type="integer", minimum=0),
            "task": _field("Name, with its protocol where it has several.", type="string", pattern=TASK_PATTERN),
            "protocol": _field("How the task was asked; null for the held-out loss.", type=["string", "null"]),
            "metric": _field("What is averaged.", type="string", minLength=1, maxLength=64),
            "best": _field("Score of a perfect answer.", type="number"),
            "worst": _field("Score of an empty answer; null for a loss without an upper end.", type=["number", "null"]),
            "limit": _field("Items asked if not all were (--limit); null: all.", type=["integer", "null"], minimum=1),
            "comparable": _field(
                "All that must be equal in two cells for their difference to be the method's. Only such cells share a table.",
                type="object",
                properties={
                    "model": SHA256,
                    "demonstrations": SHA256,
                    "items": {"type": "string", "minLength": 8},
                    "budget": {"type": ["string", "null"]},
                    "left_out": {"type": ["string", "null"]},
                },
                required=["model", "demonstrations", "items"],
            ),
            "score": _field("Mean over the scored items; null if none is scored. Recomputed from them.", type=["number", "null"]),
            "unscored": _field("Items without a score.", type="integer", minimum=0),
            "items": _ITEMS,
            "counts": _field("Diagnoses: answers, truncated, errors, generated_tokens, …", **COUNTS),
            "cost": _field("Of the training: steps, tokens, scored_tokens, flops, seconds.", **COST),
            "tuning": _TUNING,
            "warnings": _field(
                "What a reader should know of how it was trained.", type="array", items={"type": "string", "maxLength": 1000}
            ),
            "link": _field("Of the submitter, to whatever explains the run.", **LINK),
            "provenance": _PROVENANCE,
        },
    ),
}  # fmt: skip


def schema_text() -> str:
    """The published file."""
    return json.dumps(SCHEMA, indent=1, ensure_ascii=False) + "\n"


def problems(value: Any, schema: Mapping[str, Any] = SCHEMA, where: str = "") -> Iterator[str]:
    """What of a value breaks the schema, as "items.scores[3]: a text, not a number or null".

    Args:
        value: JSON, as read.
        schema: of the keywords of `KEYWORDS`, with properties, required, additionalProperties and items.
        where: the field's path, "" for the whole file.
    """
    broken = next((message for key, rule in schema.items() if key in _RULES for message in _RULES[key](value, rule)), None)
    if broken is not None:
        yield f"{where or 'the file'}: {broken}"
    elif isinstance(value, Mapping):
        yield from _of_object(value, schema, where)
    elif isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            yield from problems(item, schema["items"], f"{where}[{number}]")


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> Iterator[str]:
    known, prefix = schema.get("properties", {}), f"{where}." if where else ""
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{prefix}{name}: missing"
    for name, item in value.items():
        if name in known:
            yield from problems(item, known[name], prefix + name)
        elif schema.get("additionalProperties") is False:
            yield f"{prefix}{name}: no field of this schema"
        elif isinstance(schema.get("additionalProperties"), Mapping):
            yield from problems(item, schema["additionalProperties"], prefix + name)


_WORDS = {
    "object": "an object", "array": "a list", "string": "a text", "number": "a number", "integer": "a whole number",
    "boolean": "true or false", "null": "null",
}  # fmt: skip


def _is(value: Any, kind: str) -> bool:
    """JSON's types: true is no number, 1.0 is a whole number."""
    if kind in ("number", "integer"):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
        return number and (kind == "number" or float(value).is_integer())
    types: dict[str, type | tuple[type, ...]] = {"object": Mapping, "array": list, "string": str, "boolean": bool}
    return value is None if kind == "null" else isinstance(value, types[kind])


def _type(value: Any, rule: Any) -> Iterator[str]:
    kinds = [rule] if isinstance(rule, str) else rule
    if not any(_is(value, kind) for kind in kinds):
        found = next((words for kind, words in _WORDS.items() if _is(value, kind)), "a number without bounds")
        yield f"{found}, not {' or '.join(_WORDS[kind] for kind in kinds)}"


def _const(value: Any, rule: Any) -> Iterator[str]:
    if value != rule or isinstance(value, bool):
        yield f"{_shown(value)}, must be {_shown(rule)}"


def _enum(value: Any, rule: Any) -> Iterator[str]:
    if value not in rule:
        yield f"{_shown(value)}, must be one of {', '.join(map(_shown, rule))}"


def _pattern(value: Any, rule: str) -> Iterator[str]:
    strict = re.sub(r"\$$", r"\\Z", rule)  # "$" would let a line end pass
    if isinstance(value, str) and not re.search(strict, value):
        yield f"{_shown(value)} does not match {rule}"


def _minimum(value: Any, rule: float) -> Iterator[str]:
    if _is(value, "number") and value < rule:
        yield f"{value} is below {rule}"


def _sized(
    kind: type[str] | type[list[Any]], word: str, long_enough: Callable[[int, int], bool]
) -> Callable[[Any, int], Iterator[str]]:
    def check(value: Any, rule: int) -> Iterator[str]:
        if isinstance(value, kind) and not long_enough(len(value), rule):
            yield f"{len(value)} {word}, the bound is {rule}"

    return check


_RULES: dict[str, Callable[[Any, Any], Iterator[str]]] = {
    "type": _type, "const": _const, "enum": _enum, "pattern": _pattern, "minimum": _minimum,
    "minLength": _sized(str, "characters", lambda size, bound: size >= bound),
    "maxLength": _sized(str, "characters", lambda size, bound: size <= bound),
    "minItems": _sized(list, "items", lambda size, bound: size >= bound),
}  # fmt: skip


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:59] + "…"
