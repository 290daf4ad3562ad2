"""What a method is: a frozen record of a loss, what it needs and its protocol; and how one is found by name.

Nothing in the suite asks a method's name; everything asks what the record needs. A loss is a pure function of named log-prob
vectors and returns one value per example:

    def logistic(pair: PairLogProbs, scale: float, shift: float) -> Tensor:  # (pairs,)

One that looks at single tokens reads `pair.real` and `pair.generated`, and sums what it makes of them with their `sum`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.source import source_sha256
from gsil_bench.training.config import TrainConfig, as_type_of

if TYPE_CHECKING:
    from torch import Tensor

REGISTRY = "baselines"
"""The module whose METHODS maps names to "module:ATTRIBUTE"; named, not imported, so that this module stays below it."""

Need = Literal["generated", "reference", "preferences", "tokens", "normalisers"]
OF_TOKENS: frozenset[Need] = frozenset({"tokens", "normalisers"})
"""Needs of a loss that looks at single tokens, not only at their sums."""


@dataclass(frozen=True)
class TokenLogProbs:
    """The scored tokens of one side of the pairs, pair by pair and in order; a vector of (tokens,) each."""

    logps: Tensor
    """log π_θ(token | everything before it), fp32."""
    normalisers: Tensor
    """log Σ_v exp z_v over the vocabulary, where z are the logits that the token was predicted from; NaN unless the method needs
    "normalisers". With the log-prob it gives the token's logit: z = log-prob + normaliser."""
    pair: Tensor
    """Index of the token's pair."""
    position: Tensor
    """Of the token in its completion, from 0."""
    length: Tensor
    """Scored tokens of the token's completion."""
    pairs: int
    longest: int
    """Tokens of the longest completion."""

    @staticmethod
    def unknown(like: Tensor) -> TokenLogProbs:
        """A stand-in with a single NaN for each pair: every sum over it is NaN.

        Args:
            like: (pairs,)
        """
        nan = like * float("nan")  # with its graph: a loss of nothing else still has a gradient to fail with
        one = like.new_ones(len(like)).long()
        return TokenLogProbs(nan, nan, one.cumsum(0) - 1, one - 1, one, len(like), 1)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over each pair's tokens, added in fp64 and rounded once; a completion without tokens gives 0.

        Args:
            values: (tokens,)

        Returns:
            (pairs,), in the dtype of the values.
        """
        table = values.new_zeros(self.pairs, max(1, self.longest)).double()
        return table.index_put((self.pair, self.position), values.double()).sum(1).to(values.dtype)

    def following(self, values: Tensor) -> Tensor:
        """For each token the value of the next one of its completion, and 0 for the last.

        Args:
            values: (tokens,)

        Returns:
            (tokens,)
        """
        last = self.position + 1 == self.length
        return values.roll(-1).masked_fill(last, 0.0)


@dataclass(frozen=True)
class PairLogProbs:
    """Sums of log-probs over the scored tokens of a completion, fp32, shape (pairs,) each.

    A vector that the method did not ask for in `needs` is NaN, so that a forgotten need shows at the first step.
    """

    policy_real_logps: Tensor
    """log π_θ(y | x) of the demonstration."""
    policy_generated_logps: Tensor
    """log π_θ(y' | x) of the self-generation (or of the rejected answer, for a method on preference data)."""
    reference_real_logps: Tensor
    reference_generated_logps: Tensor
    real_tokens: Tensor
    """Scored tokens of the demonstration, end token included."""
    generated_tokens: Tensor
    tokens: tuple[TokenLogProbs, TokenLogProbs] | None = None
    """`real` and `generated`, where the method needs "tokens" or "normalisers"."""
    temperature: float = 1.0
    """T of the policy's likelihood: its log-probs are those of softmax(z / T) (`likelihood_temperature` of the training)."""

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The vectors with a value for each pair, by name."""
        return {name: value for name, value in vars(self).items() if name not in ("tokens", "temperature")}

    @property
    def real(self) -> TokenLogProbs:
        """The demonstrations' tokens under the policy."""
        return self.tokens[0] if self.tokens else TokenLogProbs.unknown(self.policy_real_logps)

    @property
    def generated(self) -> TokenLogProbs:
        """The self-generations' tokens under the policy."""
        return self.tokens[1] if self.tokens else TokenLogProbs.unknown(self.policy_real_logps)

    def detached(self) -> PairLogProbs:
        """The same sums without the graph that they came from, and without the single tokens."""
        kept: dict[str, Any] = {name: value.detach() for name, value in self.vectors.items()}
        return PairLogProbs(**kept, temperature=self.temperature)

    @property
    def real_log_ratios(self) -> Tensor:
        """log π_θ(y|x) − log π_ref(y|x) of the demonstrations, (pairs,)."""
        return self.policy_real_logps - self.reference_real_logps

    @property
    def generated_log_ratios(self) -> Tensor:
        """log π_θ(y'|x) − log π_ref(y'|x) of the self-generations, (pairs,)."""
        return self.policy_generated_logps - self.reference_generated_logps


@dataclass(frozen=True)
class SelfPlay:
    """The protocol of a method: who the opponent is, how it is sampled, and how often it changes.

    SPIN and DPO on own samples have the same formula; only this record separates them, so it is part of the method,
    of every fingerprint and of every result.
    """

    opponent: Literal["initial", "previous"] = "previous"
    """Whose samples are the generated side and whose log-probs the reference: the initial policy or that of the last round."""
    rounds: int = 1
    """Times that self-generation, reference and training are repeated; the epochs are split evenly among them. 0: no training."""
    mix_rounds: int = 1
    """Rounds whose self-generations are trained on together: 1 is the newest only, 2 adds the one before (SPIN's authors)."""
    temperature: float = 1.0
    """Of the self-generations; 0 is greedy. The theory of density ratios wants samples (1.0)."""
    samples: int = 1
    """Self-generations of each demonstration's prompt; the losses of a demonstration's pairs are averaged."""
    max_new_tokens: int = 256
    """Longest self-generation; one that is cut there gets no end token."""


Batches = Literal["pairs", "matched-demonstrations"]


@dataclass(frozen=True)
class Method:
    """A way of learning from demonstrations."""

    name: str
    """Exactly as typed after --methods and printed in tables."""
    summary: str
    """One sentence."""
    loss: Callable[..., Tensor] | None
    """loss(pair, **settings) → (pairs,). None only for a method that does not train."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """The loss's keywords with their defaults; `--set NAME.KEY=VALUE` changes them."""
    needs: frozenset[Need] = frozenset()
    """"generated": self-generations of the opponent; "reference": its log-probs; "preferences": rejected answers
    instead of self-generations where the data carries them; "tokens": the log-probs of single tokens; "normalisers": these, and
    the log Σ exp of the logits at each token."""
    protocol: SelfPlay = SelfPlay()
    training: Mapping[str, float | int | str] = field(default_factory=dict)
    """Fields of TrainConfig that this method changes (a pairwise loss wants a lower learning rate than SFT)."""
    normalise: Literal["examples", "tokens"] = "examples"
    """What a step's summed loss is divided by: its examples, or their scored real tokens."""
    batches: Batches = "pairs"
    """Where steps come from: the pairs themselves, or demonstrations matched to the pairs' tokens (the control)."""
    paper: str = ""
    """Citation with the equation."""
    formula: str = ""
    """The loss in one line of text."""
    variant_of: str = ""
    """Name of the method that this is with other settings; "" for a method of its own."""
    after_round: int | None = None
    """Rounds that are done, of a row that shows a run before its end."""

    @property
    def trains(self) -> bool:
        """False for the starting model itself."""
        return self.loss is not None and self.protocol.rounds > 0

    @property
    def source_sha256(self) -> str:
        """Digest of the source that defines the loss: editing it makes new artefacts instead of serving old ones."""
        return source_sha256(self.loss.__module__) if self.loss is not None else ""

    def decides(self) -> dict[str, Any]:
        """What changes the weights, besides the training settings: not the name, nor the words about it."""
        record = self.describe()
        kept = ("loss", "settings", "needs", "protocol", "normalise", "batches")
        return {key: record[key] for key in kept} | {"source_sha256": self.source_sha256}

    def describe(self) -> dict[str, Any]:
        """The whole record as JSON; "method" names the method itself, also where `name` is that of a variant."""
        record = dataclasses.asdict(self) | {"loss": getattr(self.loss, "__qualname__", None), "needs": sorted(self.needs)}
        record["method"] = record.pop("variant_of") or self.name
        if self.after_round is None:
            del record["after_round"]
        return {**record, "settings": dict(self.settings), "training": dict(self.training)}


def load_method(name: str, registry: Mapping[str, str] | None = None) -> Method:
    """The method of that name, an installed plug-in's, or the one at "module:ATTRIBUTE".

    Args:
        name: a key of the registry, the name of an entry point in the group "gsil_bench.methods", or "module:ATTRIBUTE".
        registry: name → "module:ATTRIBUTE"; the baselines' by default.

    Raises:
        UserError: unknown name (the nearest is offered), or an attribute that cannot be loaded or is no Method.
    """
    known = known_methods(registry)
    target = known.get(name, name)
    if ":" not in target:
        raise unknown_name("method", name, known)
    module, _, attribute = target.partition(":")
    try:
        method = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        raise UserError(f"method {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(method, Method):
        raise UserError(f"method {name!r}: {target} is a {type(method).__name__}, not a gsil_bench.methods.Method")
    _check(method)
    return method


def known_methods(registry: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name → "module:ATTRIBUTE" of the registry's methods (the baselines by default) and of installed plug-ins."""
    known = dict(baseline_methods() if registry is None else registry)
    return known | {entry.name: entry.value for entry in entry_points(group="gsil_bench.methods") if entry.name not in known}


def baseline_methods() -> Mapping[str, str]:
    """METHODS of the registry module."""
    return cast(Mapping[str, str], importlib.import_module(REGISTRY).METHODS)


def with_settings(method: Method, changes: Mapping[str, Any]) -> Method:
    """The method with some of its settings changed: a keyword of its loss, a field of its protocol, or of TrainConfig.

    Raises:
        UserError: an unknown setting (the nearest is offered) or a value of the wrong type.
    """
    groups = {
        "settings": dict(method.settings),
        "protocol": dataclasses.asdict(method.protocol),
        "training": TrainConfig.defaults(),
    }
    for key, value in changes.items():
        group = next((name for name, fields in groups.items() if key in fields), None)
        if group is None:
            raise unknown_name(f"setting of {method.name}", key, [key for fields in groups.values() for key in fields])
        typed = as_type_of(groups[group][key], value, f"{method.name}.{key}")
        if group == "settings":
            method = dataclasses.replace(method, settings={**method.settings, key: typed})
        elif group == "protocol":
            method = dataclasses.replace(method, protocol=dataclasses.replace(method.protocol, **{key: typed}))
        else:
            method = dataclasses.replace(method, training={**method.training, key: typed})
    _check(method)
    return method


def _check(method: Method) -> None:
    _check_record(method)
    protocol = method.protocol
    choices: Iterable[tuple[str, bool, str]] = (
        ("opponent", protocol.opponent in ("initial", "previous"), "initial or previous"),
        ("rounds", protocol.rounds >= (1 if method.loss else 0), "at least 1"),
        ("mix_rounds", protocol.mix_rounds >= 1, "at least 1"),
        ("samples", protocol.samples >= 1, "at least 1"),
        ("temperature", protocol.temperature >= 0, "0 (greedy) or more"),
        ("max_new_tokens", protocol.max_new_tokens >= 1, "at least 1"),
    )
    for key, fine, wanted in choices:
        if not fine:
            raise UserError(f"{method.name}.{key}={getattr(protocol, key)}: must be {wanted}")
    config = TrainConfig.of(method.training, where=method.name)
    if config.likelihood_temperature != 1 and "reference" in method.needs:
        raise UserError(f"{method.name}.likelihood_temperature: must be 1, the reference's log-probs are at temperature 1")


def _check_record(method: Method) -> None:
    """What a record of the user's own may get wrong: fields of the wrong kind, or a loss that no artefact could be named by."""
    loss, what = method.loss, f"method {method.name!r}"
    if not isinstance(method.name, str):
        raise UserError(f"{what}: its name must be a text")
    for field_name, value, known in (
        ("batches", method.batches, get_args(Batches)),
        ("normalise", method.normalise, ("examples", "tokens")),
        *(("needs", need, get_args(Need)) for need in method.needs),
    ):
        if value not in known:
            raise unknown_name(f"value in {field_name} of {what}", value, known)
    if loss is None:
        return
    if not inspect.isfunction(loss) or loss.__closure__ or not loss.__qualname__.isidentifier():
        # A partial, a lambda or a closure looks the same whatever it holds: two losses would share one checkpoint.
        raise UserError(
            f"{what}: its loss must be a function defined at the top of a module; what it varies belongs into settings"
        )
    try:
        inspect.signature(loss).bind(None, **method.settings)
    except TypeError as error:
        raise UserError(f"{what}: its settings do not fit its loss: {error}") from error
    taken = {*dataclasses.asdict(method.protocol), *TrainConfig.defaults()} & set(method.settings)
    if taken:
        raise UserError(f"{what}: its setting {min(taken)!r} has the name of a field of the protocol or of the training")
