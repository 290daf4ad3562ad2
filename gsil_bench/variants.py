"""Variants: a method with other settings under a name of its own, so that one comparison holds both.

A recipe declares them and `methods` selects them:

    methods: [gsil-logistic, gsil-softer]
    variants:
      gsil-softer: {method: gsil-logistic, scale: 0.1, learning_rate: 2e-5}

A variant begins with the settings that its method has in this comparison (`training`, `set`) and changes its own on top.
No fingerprint holds a name, so a variant shares every stage that its settings leave as it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gsil_bench.config import Config, Settings
from gsil_bench.errors import UserError, unknown_name
from gsil_bench.methods import Method, known_methods, load_method, setting_groups
from gsil_bench.records import NAME

BASE = "method"
"""The key of a variant that is no setting: whose settings it changes."""

ROUND = re.compile(r"--round-\d+$")
"""How the name of a row ends that shows a method before its last round."""


def check_variants(variants: Settings) -> None:
    """Raise UserError for a name that is taken or no name, or for a variant of nothing."""
    known = known_methods()
    for name, record in variants.items():
        if not NAME.fullmatch(name):
            raise UserError(f"variant {name!r}: letters, digits, '.', '_' and '-' only (64 at most)")
        if name in known:
            raise UserError(f"variant {name!r}: a method has that name; choose another one")
        if not isinstance(record.get(BASE), str):
            raise UserError(f"variant {name!r}: say which method it changes, as {BASE}: NAME")
        if record[BASE] in variants:
            raise UserError(f"variant {name!r}: {record[BASE]!r} is a variant itself; name the method that both change")
        if record[BASE] not in known and ":" not in record[BASE]:
            raise unknown_name(f"method of variant {name!r}", record[BASE], known)


def load_with_variants(typed: str, variants: Settings) -> Method:
    """The method of that name, or the variant of that name with its method's own settings still.

    Raises:
        UserError: neither.
    """
    if typed not in variants:
        if ":" not in typed and typed not in known_methods():
            raise unknown_name("method", typed, [*known_methods(), *variants])
        return load_method(typed)
    base = load_method(str(variants[typed][BASE]))
    return dataclasses.replace(base, name=typed, variant_of=base.name)


def settings_of(typed: str, method: Method, settings: Settings, variants: Settings) -> dict[str, Any]:
    """What a comparison changes of a method or variant: later ones win.

    Args:
        typed: as it was selected.
        method: what `load_with_variants` gave for it.
        settings: METHOD → SETTING → VALUE; by the method's name or by its "module:ATTRIBUTE".
        variants: NAME → METHOD and settings.
    """
    record = variants.get(typed, {})
    own = {key: value for key, value in record.items() if key != BASE}

    def said(*names: str) -> dict[str, Any]:
        return {key: value for name in names for key, value in settings.get(name, {}).items()}

    return {**said(method.variant_of, str(record.get(BASE, ""))), **own, **said(method.name, typed)}


def base_names(variants: Settings) -> set[str]:
    """The methods that variants change, by their names and as they were typed."""
    typed = {str(record[BASE]) for record in variants.values()}
    return typed | {load_method(word).name for word in typed}


def after_round(method: Method, done: int) -> Method:
    """The row of a method after `done` of its rounds."""
    return dataclasses.replace(method, name=f"{method.name}--round-{done}", after_round=done)


def check_round_names(methods: Sequence[Method]) -> None:
    """Raise UserError if the rows after each round would have no usable names."""
    for method in methods:
        if ROUND.search(method.name):
            raise UserError(f"--every-round: {method.name!r} is named like a row after a round; rename it")
        if not NAME.fullmatch(after_round(method, method.protocol.rounds).name):
            raise UserError(f"--every-round: {method.name!r} is too long a name for rows after its rounds")


def spelt_out(typed: str, config: Config) -> dict[str, Any]:
    """The record from which a further variant of a method or of a variant starts: no variant is made of a variant."""
    if typed not in config.variants:
        return {BASE: typed}
    return {**config.variants[typed], **config.set.get(typed, {})}


def all_settings(method: Method) -> dict[str, Any]:
    """Everything that can be set of a method, with its present values."""
    return {key: value for group in setting_groups(method).values() for key, value in group.items()}


def setting(method: Method, key: str) -> Any:
    """What a method's setting is, wherever it lies.

    Raises:
        UserError: it has none of that name.
    """
    known = all_settings(method)
    if key not in known:
        raise unknown_name(f"setting of {method.name}", key, known)
    return known[key]


def tuning_of(tuning: Mapping[str, Any], method: Method) -> dict[str, Any] | None:
    """How a method's settings were chosen, for its results; None if they were not, or were changed since.

    Args:
        tuning: the comparison's, from the recipe that `tune` wrote.
        method: with the settings of the comparison.
    """
    found = tuning.get("methods", {}).get(method.name)
    if found is None or any(setting(method, key) != value for key, value in found["settings"].items()):
        return None
    return {**{key: value for key, value in tuning.items() if key != "methods"}, "settings": dict(found["settings"])}
