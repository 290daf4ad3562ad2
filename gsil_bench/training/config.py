"""How a method is trained: one frozen record, the same for every method unless its own record or the user says otherwise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gsil_bench.errors import UserError, unknown_name

LAYOUTS = ("shared", "packed", "padded")
OPTIMIZERS = ("adamw", "rmsprop", "adamw-8bit")
"""Names, here without torch; a test holds them equal to those of packing.py and optimizers.py."""
LOSS_FIELDS = ("likelihood_temperature", "embedding_noise")
"""Settings that change what is minimised, not only how."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop. Every field can be set as METHOD.FIELD=VALUE, or for all methods in a recipe's `training`."""

    learning_rate: float = 1e-5
    """Peak of the schedule, given for a model of a few billion parameters."""
    learning_rate_factor: float = 1.0
    """Multiplies it: how a recipe says that its model wants larger steps, for every method alike."""
    epochs: float = 2.0
    """Passes over the demonstrations in the whole run, split evenly among a method's rounds: the compute budget."""
    batch_size: int = 32
    """Demonstrations per optimiser step."""
    micro_batch_tokens: int = 8192
    """Positions per forward pass; memory only, the result does not depend on it beyond rounding. A demonstration that does not
    fit with its self-generations is left out, counted and reported."""
    micro_batch_trees: int = 0
    """Demonstrations (each with its self-generations) per forward pass at most; 0 does not limit them."""
    layout: str = "auto"
    """How a forward pass lays them out: "shared" (a prompt once for all its completions), "packed" (one after the other) or
    "padded"; "auto" takes the first that gives on this model what padding gives."""
    gradient_checkpointing: str = "auto"
    """Recompute activations in the backward pass: "on", "off", or "auto": from the first time that memory runs out."""
    lora_rank: int = 0
    """Train a low-rank adapter on all linear layers but the head, and merge it at the round's end; 0 trains all weights."""
    lora_alpha: float = 16.0
    """The adapter's update is scaled by lora_alpha / lora_rank."""
    warmup: float = 0.1
    """Share of a round's steps in which the learning rate rises linearly."""
    schedule: str = "linear"
    """After the warm-up: "linear" or "cosine" to zero, or "constant"."""
    optimizer: str = "adamw"
    """"adamw", "rmsprop" or "adamw-8bit"."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.999
    """AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    likelihood_temperature: float = 1.0
    """T: the log-probs that are trained on are those of softmax(z / T). The reference's and those of evaluation stay at 1."""
    embedding_noise: float = 0.0
    """alpha: while training, uniform noise within ± alpha / √(L d) is added to the embeddings of a sequence of L tokens and d
    dimensions; 0 adds none."""
    log_every: int = 10
    """Steps after which metrics are read from the device and written, one line a step."""

    @property
    def peak_learning_rate(self) -> float:
        """What the optimiser is given after the warm-up."""
        return self.learning_rate * self.learning_rate_factor

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Field → default."""
        return dataclasses.asdict(TrainConfig())

    @staticmethod
    def of(changes: Mapping[str, Any], where: str) -> TrainConfig:
        """The defaults with changes, checked.

        Raises:
            UserError: an unknown field or a value out of range; `where` (a method, a recipe) is named.
        """
        defaults = TrainConfig.defaults()
        for key in changes:
            if key not in defaults:
                raise unknown_name(f"training setting of {where}", key, defaults)
        config = TrainConfig(**{key: as_type_of(defaults[key], value, f"{where}.{key}") for key, value in changes.items()})
        members = {
            "schedule": ("linear", "cosine", "constant"),
            "layout": ("auto", *LAYOUTS),
            "gradient_checkpointing": ("auto", "on", "off"),
            "optimizer": OPTIMIZERS,
        }
        for key, names in members.items():
            if getattr(config, key) not in names:
                raise unknown_name(f"value of {where}.{key}", getattr(config, key), names)
        limits = {
            "learning_rate": config.learning_rate > 0,
            "learning_rate_factor": config.learning_rate_factor > 0,
            "epochs": config.epochs > 0,
            "batch_size": config.batch_size >= 1,
            "micro_batch_tokens": config.micro_batch_tokens >= 1,
            "micro_batch_trees": config.micro_batch_trees >= 0,
            "lora_rank": config.lora_rank >= 0,
            "lora_alpha": config.lora_alpha > 0,
            "log_every": config.log_every >= 1,
            "warmup": 0 <= config.warmup < 1,
            "weight_decay": config.weight_decay >= 0,
            "beta1": 0 <= config.beta1 < 1,
            "beta2": 0 <= config.beta2 < 1,
            "max_grad_norm": config.max_grad_norm >= 0,
            "likelihood_temperature": config.likelihood_temperature > 0,
            "embedding_noise": config.embedding_noise >= 0,
        }
        for key, fine in limits.items():
            if not fine:
                raise UserError(f"{where}.{key}={getattr(config, key)} is out of range")
        return config


def as_type_of(default: object, value: object, where: str) -> Any:
    """The value converted to the default's type: text from a command line, or 2e-6 without a dot from YAML, becomes a number.

    Raises:
        UserError: it cannot be; `where` names the setting.
    """
    kind = type(default)
    try:
        if isinstance(value, bool):
            raise ValueError
        if not isinstance(default, int | float):
            return str(value)
        number = float(str(value))
        if not math.isfinite(number) or abs(number) > 1e15 or (kind is int and number != int(number)):
            raise ValueError
        return int(number) if kind is int else number
    except ValueError:
        article = {int: "a whole number", float: "a number"}.get(kind, "a text")
        raise UserError(f"{where}={value}: expected {article}, such as {default}") from None
