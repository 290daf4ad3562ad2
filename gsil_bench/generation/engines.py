"""Engines by name: which there are, which one "auto" takes, what each can be told, and how it is made for a checkpoint.

    --engine vllm --engine-set tensor_parallel_size=2

An engine is a module with a frozen record of its options, which knows its identity before anything is loaded: plans need it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.generation.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gsil_bench.models.checkpoint import Dtype

KINDS: Mapping[str, str] = {
    "transformers": "gsil_bench.generation.transformers_engine:TransformersOptions",
    "vllm": "gsil_bench.generation.vllm_engine:VllmOptions",
    "endpoint": "gsil_bench.generation.endpoint_engine:EndpointOptions",
}
"""Name → the record of its options."""


@dataclass(frozen=True)
class Served:
    """What an engine is to serve."""

    folder: Path
    """Of the checkpoint: safetensors, configuration and tokenizer."""
    load: Callable[[], PreTrainedModel]
    """The model in this process, for an engine that runs there."""
    end_token_ids: Sequence[int]
    context_length: int
    """Tokens of prompt and answer together."""
    decode: Callable[[Sequence[int]], str]
    """Text of tokens, without special ones."""
    device: str
    """"cpu" or "cuda"."""
    dtype: Dtype
    """Of the weights."""
    autocast: bool
    """Whether matrix products are to be computed in bf16 over fp32 weights."""
    encode: Callable[[str], Sequence[int]]
    """Tokens of a text, none added."""
    spell: Callable[[Sequence[int]], str]
    """Text of tokens, special ones written out."""


class Options(Protocol):
    """A frozen dataclass whose fields are an engine's options."""

    @property
    def in_process(self) -> bool:
        """Whether the model is that of `Served.load`; other engines need the memory that it takes."""

    @property
    def weights(self) -> str | None:
        """What stands for the weights of a model that a server holds; None where the checkpoint's answer."""

    def check(self, device: str, dtype: str, autocast: bool) -> None:
        """Raise UserError if the engine cannot run here, or not in this precision; nothing is loaded."""

    def identity(self, dtype: str, autocast: bool) -> str:
        """All that decides an answer besides weights, tokenizer and request: engine, version, settings."""

    def make(self, served: Served) -> Engine:
        """The engine for a checkpoint."""


def choose_engine(name: str, settings: Mapping[str, Any], device: str, dtype: str, autocast: bool) -> Options:
    """The options of the engine of that name; "auto" takes vLLM where it is installed and a GPU is there.

    Raises:
        UserError: an unknown name or option, a value of the wrong kind, or an engine that cannot run here.
    """
    if name not in ("auto", *KINDS):
        raise unknown_name("engine", name, ["auto", *KINDS])
    module, _, record = KINDS[_automatic(device, dtype) if name == "auto" else name].partition(":")
    options: Options = make_options(getattr(import_module(module), record), settings, f"engine {name}", "--engine-set")
    options.check(device, dtype, autocast)
    return options


def make_options(kind: Any, settings: Mapping[str, Any], whose: str, flag: str) -> Any:
    """A record of options from what was typed.

    Args:
        kind: the dataclass; its fields are the options.
        whose: for messages: "engine vllm".
        flag: for messages: "--engine-set".

    Raises:
        UserError: an unknown option, or a value of the wrong kind.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in settings:
        if key not in fields:
            raise unknown_name(f"option of {whose}", key, fields)
    return kind(**{key: _typed(f"{flag} {key}", str(value), str(fields[key].type)) for key, value in settings.items()})


def _automatic(device: str, dtype: str) -> str:
    from importlib.util import find_spec

    return "vllm" if device == "cuda" and dtype != "nf4" and find_spec("vllm") is not None else "transformers"


def _typed(option: str, text: str, kind: str) -> Any:
    """A value as its field's type says."""
    words = {"true": True, "false": False}
    try:
        if "bool" in kind:
            return words[text.lower()]
        return int(text) if "int" in kind else float(text) if "float" in kind else text
    except (KeyError, ValueError):
        wanted = "true or false" if "bool" in kind else "a whole number" if "int" in kind else "a number"
        raise UserError(f"{option}={text}: expected {wanted}") from None
