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
from gsil_bench.training.config import LOSS_FIELDS, TrainConfig, as_type_of

if TYPE_CHECKING:
    from torch import Tensor

REGISTRY = "baselines"
"""The module whose METHODS maps names to "module:ATTRIBUTE"; named, not imported, so that this module stays below it."""

Need = Literal["generated", "first", "reference", "preferences", "tokens", "normalisers", "values", "scores"]
OF_TOKENS: frozenset[Need] = frozenset({"tokens", "normalisers", "values", "scores"})
"""Needs of a loss that looks at single tokens, not only at their sums."""
OF_SCALARS: frozenset[Need] = frozenset({"values", "scores"})
"""Needs of a loss on the output of a scalar head over the trunk."""


@dataclass(frozen=True)
class TokenLogProbs:
    """The scored tokens of one side of the pairs, pair by pair and in order; a vector of (tokens,) each."""

    logps: Tensor
    """log π_θ(token | everything before it), fp32."""
    normalisers: Tensor
    """log Σ_v exp z_v over the vocabulary, where z are the logits that the token was predicted from, divided by
    `likelihood_temperature`; NaN unless the method needs "normalisers". With the log-prob it gives z = log-prob + normaliser."""
    pair: Tensor
    """Index of the token's pair."""
    position: Tensor
    """Of the token in its completion, from 0."""
    length: Tensor
    """Scored tokens of the token's completion."""
    pairs: int
    longest: int
    """Tokens of the longest completion."""
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """Further vectors of (tokens,), read by the properties below; what is not here is NaN there."""

    @property
    def ids(self) -> Tensor:
        """The token itself (of the losses' pairs only)."""
        return self._known("ids")

    @property
    def values(self) -> Tensor:
        """V(s_t): the scalar head on what comes before the token (needs "values")."""
        return self._known("values")

    @property
    def scores(self) -> Tensor:
        """The scalar head on everything up to the token, itself included (needs "scores"; of a critic for rewards)."""
        return self._known("scores")

    @property
    def sampled_logps(self) -> Tensor:
        """log π(token) of the policy that drew it, at temperature 1 (samples only)."""
        return self._known("sampled_logps")

    @property
    def reference_logps(self) -> Tensor:
        """log π_ref(token) of the policy that the round's reference is (samples only)."""
        return self._known("reference_logps")

    @property
    def initial_logps(self) -> Tensor:
        """log π_init(token) of the model that the whole run starts from (samples of a reward that needs "initial")."""
        return self._known("initial_logps")

    @property
    def advantages(self) -> Tensor:
        """What the token was better than expected (samples only)."""
        return self._known("advantages")

    @property
    def returns(self) -> Tensor:
        """Sum of the rewards from the token on, as the value head should predict it (samples only)."""
        return self._known("returns")

    @property
    def similarity(self) -> Tensor:
        """Of the sample to its prompt's demonstration, −1 to 1, at each of its tokens (rewards that need "similarity")."""
        return self._known("similarity")

    @property
    def real_length(self) -> Tensor:
        """Scored tokens of the demonstration of the sample's prompt (samples only)."""
        return self._known("real_length")

    @property
    def finished(self) -> Tensor:
        """1 for tokens of a sample that ended by itself, 0 for those of one that was cut (samples only)."""
        return self._known("finished")

    def _known(self, name: str) -> Tensor:
        return self.more[name] if name in self.more else self.logps * float("nan")

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
        return self.table(values.double()).sum(1).to(values.dtype)

    def table(self, values: Tensor) -> Tensor:
        """The values pair by pair, 0 after a completion's end.

        Args:
            values: (tokens,)

        Returns:
            (pairs, longest), differentiable; in the tokens' order where it is read row by row.
        """
        return values.new_zeros(self.pairs, max(1, self.longest)).index_put((self.pair, self.position), values)

    def following(self, values: Tensor) -> Tensor:
        """For each token the value of the next one of its completion, and 0 for the last.

        Args:
            values: (tokens,)

        Returns:
            (tokens,)
        """
        return values.roll(-1).masked_fill(self.is_last, 0.0)

    @property
    def is_last(self) -> Tensor:
        """Whether the token is its completion's last one, (tokens,) bool."""
        return self.position + 1 == self.length

    def last(self, values: Tensor) -> Tensor:
        """The value at each pair's last token; 0 for a completion without tokens.

        Args:
            values: (tokens,)

        Returns:
            (pairs,)
        """
        return self.sum(values.masked_fill(~self.is_last, 0.0))

    def at_end(self, values: Tensor) -> Tensor:
        """A value for each pair at its last token, 0 at all others: how a reward for a whole answer is given.

        Args:
            values: (pairs,)

        Returns:
            (tokens,)
        """
        return values[self.pair].masked_fill(~self.is_last, 0.0)


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
    first_logps: Tensor | None = None
    """`policy_first_logps`, where the method needs "first"."""

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The vectors with a value for each pair, by name."""
        others = ("tokens", "temperature") if self.first_logps is not None else ("tokens", "temperature", "first_logps")
        return {name: value for name, value in vars(self).items() if name not in others}

    @property
    def policy_first_logps(self) -> Tensor:
        """log π_θ(y₀ | x) of the first round's self-generation, (pairs,); in the first round y₀ is y' itself."""
        return self.policy_real_logps * float("nan") if self.first_logps is None else self.first_logps

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
    demonstrations: Literal["all", "disjoint"] = "all"
    """Of a round: all of them, or every `rounds`-th one, which no other round has."""


RewardNeed = Literal["scores", "initial", "similarity"]
Baseline = Literal["value", "leave-one-out", "group", "none"]
Answers = Literal["demonstrations", "policy", "initial", "failures"]


@dataclass(frozen=True)
class Critic:
    """What tells answers apart: a trunk with a scalar head, trained by the same loop as a policy.

    A reward model is trained once, before the policy; a discriminator (`alongside`) at every sampling, on the newest samples.
    """

    loss: Callable[..., Tensor]
    """loss(pair, **settings) → (pairs,), on `scores` of the positives (`pair.real`) and of the negatives (`pair.generated`)."""
    alongside: bool = False
    positives: Answers = "demonstrations"
    """Answers that are to score high, for a reward model: demonstrations, or samples of the policy that the round starts from."""
    negatives: Answers = "policy"
    """Those that are to score low: samples of that policy, of the model that the run starts from ("initial"), or constructed
    failures together with the policy's own samples that fail a rule."""
    settings: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, float | int | str] = field(default_factory=dict)
    """Fields of TrainConfig; `--set NAME.critic_FIELD=VALUE`. What is not here it shares with the method (sizes of batches, the
    factor of the rate) or is the default. A discriminator's rate is constant, its `epochs` unused."""
    updates: int = 1
    """Steps of a discriminator at every sampling."""


@dataclass(frozen=True)
class Rollouts:
    """How a method learns from samples of the policy that it trains, besides what its protocol says about sampling.

    Every `updates` steps, answers to a batch of prompts are sampled, `protocol.samples` for each. Each token's reward is what
    `reward` says, less kl · (log π − log π_ref) at sampling. From rewards and baseline follow the advantages that the loss sees.
    """

    reward: Callable[..., Tensor]
    """reward(samples, **settings) → (tokens,), from a TokenLogProbs of the samples."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Keywords of the reward."""
    needs: frozenset[RewardNeed] = frozenset()
    """What the reward reads: "scores" of the critic, "initial" log-probs, "similarity" to the demonstration."""
    critic: Critic | None = None
    baseline: Baseline = "leave-one-out"
    """What a return is compared with: the value head's prediction (PPO, by generalised advantage estimation), the mean of the
    prompt's other samples at the same token (RLOO), the prompt's mean and standard deviation (GRPO), or nothing."""
    kl: float = 0.05
    """Coefficient of the penalty for leaving the reference, in reward per nat."""
    discount: float = 1.0
    gae_lambda: float = 0.95
    """With the baseline "value"."""
    updates: int = 1
    """Optimiser steps on the same samples."""
    score_clip: float = 10.0
    """Scores of the critic are kept within ± this when they become rewards; 0 leaves them."""
    kl_limit: float = 200.0
    """Nats per answer: training stops where the samples' mean log-ratio exceeds it."""


Batches = Literal["pairs", "matched-demonstrations"]
Normalise = Literal["examples", "tokens", "generated-tokens"]


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
    """"generated": self-generations of the opponent; "first": those of the first round beside them; "reference": the
    opponent's log-probs; "preferences": rejected answers
    instead of self-generations where the data carries them; "tokens": the log-probs of single tokens; "normalisers": these, and
    the log Σ exp of the logits at each token."""
    protocol: SelfPlay = SelfPlay()
    rollouts: Rollouts | None = None
    """Of a method that learns from samples of the policy as it is being trained."""
    starts_from: str = ""
    """Name of the method whose trained policy (same seed, same settings of the run) this one goes on from; "" is the model as
    given. Its steps are part of this one's budget."""
    start_share: float = 0.5
    """Share of the epochs that go to it."""
    training: Mapping[str, float | int | str] = field(default_factory=dict)
    """Fields of TrainConfig that this method changes (a pairwise loss wants a lower learning rate than SFT)."""
    normalise: Normalise = "examples"
    """What a step's summed loss is divided by: its examples, the demonstrations' scored tokens, or those of the generated side
    (a prompt's mean over its samples)."""
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
        functions = [self.loss, self.rollouts and self.rollouts.reward, self.rollouts and self.rollouts.critic]
        return source_sha256(*dict.fromkeys(_module_of(function) for function in functions if function is not None))

    @property
    def module(self) -> str:
        """Where what is special about it is written: its reward's module, or its loss's."""
        return _module_of(self.rollouts.reward if self.rollouts else self.loss) if self.loss is not None else ""

    def decides(self) -> dict[str, Any]:
        """What changes the weights, besides the training settings: not the name, nor the words about it."""
        record = self.describe()
        kept = ("loss", "settings", "needs", "protocol", "normalise", "batches", "rollouts")
        return {key: record[key] for key in kept if key in record} | {"source_sha256": self.source_sha256}

    def describe(self) -> dict[str, Any]:
        """The whole record as JSON; "method" names the method itself, also where `name` is that of a variant."""
        record = dataclasses.asdict(self) | {"loss": getattr(self.loss, "__qualname__", None), "needs": sorted(self.needs)}
        record["method"] = record.pop("variant_of") or self.name
        record["rollouts"] = _describe_rollouts(self.rollouts) if self.rollouts else None
        absent = [key for key in ("after_round", "rollouts", "starts_from") if not record[key]]
        for key in [*absent, *(["start_share"] if not self.starts_from else [])]:
            del record[key]
        if self.protocol.demonstrations == "all":
            del record["protocol"]["demonstrations"]
        return {**record, "settings": dict(self.settings), "training": dict(self.training)}


def _module_of(function: Any) -> str:
    return str(function.loss.__module__ if isinstance(function, Critic) else function.__module__)


def _describe_rollouts(rollouts: Rollouts) -> dict[str, Any]:
    """As JSON: functions by their names."""
    critic = rollouts.critic and {
        **dataclasses.asdict(rollouts.critic),
        "loss": rollouts.critic.loss.__qualname__,
        "settings": dict(rollouts.critic.settings),
        "training": dict(rollouts.critic.training),
    }
    record = dataclasses.asdict(dataclasses.replace(rollouts, critic=None))
    settings = dict(rollouts.settings)
    return {
        **record,
        "reward": rollouts.reward.__qualname__,
        "settings": settings,
        "needs": sorted(rollouts.needs),
        "critic": critic,
    }


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
    for key, value in changes.items():
        groups = setting_groups(method)
        group = next((name for name, fields in groups.items() if key in fields), None)
        if group is None:
            raise unknown_name(f"setting of {method.name}", key, [key for fields in groups.values() for key in fields])
        method = _with_setting(method, group, key, as_type_of(groups[group][key], value, f"{method.name}.{key}"))
    _check(method)
    return method


CRITIC = "critic_"
"""Before the name of a critic's setting."""
CRITIC_TRAINING = ("learning_rate", "batch_size", "lora_rank", "lora_alpha", "weight_decay")
"""Training settings of a critic that can be changed from outside."""


def setting_groups(method: Method) -> dict[str, dict[str, Any]]:
    """Everything that can be set of a method, with its present values: of its loss, protocol and training, and where it has them
    of its rollouts, its reward and its critic.
    """
    training = vars(TrainConfig.of(method.training, where=method.name))
    groups = {"settings": dict(method.settings), "protocol": dataclasses.asdict(method.protocol), "training": training}
    if method.trains:
        groups["beginning"] = {"starts_from": method.starts_from, "start_share": method.start_share}
    if method.rollouts is None:
        return groups
    groups["reward"] = dict(method.rollouts.settings)
    groups["rollouts"] = {key: getattr(method.rollouts, key) for key in ROLLOUT_SETTINGS}
    if critic := method.rollouts.critic:
        config = TrainConfig.of(critic.training, where=f"{method.name}.critic")
        own = {"updates": critic.updates} if critic.alongside else {"epochs": config.epochs}
        known = {**{key: getattr(config, key) for key in CRITIC_TRAINING}, **own, **critic.settings}
        groups["critic"] = {CRITIC + key: value for key, value in known.items()}
    return groups


ROLLOUT_SETTINGS = ("baseline", "kl", "discount", "gae_lambda", "updates", "score_clip", "kl_limit")


def _with_setting(method: Method, group: str, key: str, value: Any) -> Method:
    """The method with one setting changed, whose group is known."""
    replace, rollouts = dataclasses.replace, method.rollouts
    if group == "settings":
        return replace(method, settings={**method.settings, key: value})
    if group == "protocol":
        return replace(method, protocol=replace(method.protocol, **{key: value}))
    if group == "training":
        return replace(method, training={**method.training, key: value})
    if group == "beginning":
        return replace(method, **{key: value})
    assert rollouts is not None
    if group == "rollouts":
        return replace(method, rollouts=replace(rollouts, **{key: value}))
    if group == "reward":
        return replace(method, rollouts=replace(rollouts, settings={**rollouts.settings, key: value}))
    assert rollouts.critic is not None
    critic, own = rollouts.critic, key.removeprefix(CRITIC)
    if own == "updates":
        critic = replace(critic, updates=value)
    elif own in critic.settings:
        critic = replace(critic, settings={**critic.settings, own: value})
    else:
        critic = replace(critic, training={**critic.training, own: value})
    return replace(method, rollouts=replace(rollouts, critic=critic))


def _check(method: Method) -> None:
    _check_record(method)
    if method.rollouts is not None:
        _check_rollouts(method, method.rollouts)
    protocol = method.protocol
    choices: Iterable[tuple[str, bool, str]] = (
        ("opponent", protocol.opponent in ("initial", "previous"), "initial or previous"),
        ("rounds", protocol.rounds >= (1 if method.loss else 0), "at least 1"),
        ("demonstrations", protocol.demonstrations in ("all", "disjoint"), "all or disjoint"),
        ("demonstrations", protocol.demonstrations == "all" or "first" not in method.needs, "all: each has its first answers"),
        ("mix_rounds", protocol.mix_rounds >= 1, "at least 1"),
        ("mix_rounds", protocol.demonstrations == "all" or protocol.mix_rounds == 1, "1 with demonstrations=disjoint"),
        ("samples", protocol.samples >= 1, "at least 1"),
        ("temperature", protocol.temperature >= 0, "0 (greedy) or more"),
        ("max_new_tokens", protocol.max_new_tokens >= 1, "at least 1"),
    )
    for key, fine, wanted in choices:
        if not fine:
            raise UserError(f"{method.name}.{key}={getattr(protocol, key)}: must be {wanted}")
    _check_arithmetic(method)
    if not 0 < method.start_share < 1:
        raise UserError(f"{method.name}.start_share={method.start_share}: must be between 0 and 1")
    config = TrainConfig.of(method.training, where=method.name)
    if config.likelihood_temperature != 1 and "reference" in method.needs:
        raise UserError(f"{method.name}.likelihood_temperature: must be 1, the reference's log-probs are at temperature 1")


def _check_rollouts(method: Method, rollouts: Rollouts) -> None:
    """Settings out of range, and records of the user's own that do not fit together."""
    samples, what = method.protocol.samples, f"method {method.name!r}"
    if rollouts.baseline not in get_args(Baseline):
        raise unknown_name(f"value of {method.name}.baseline", rollouts.baseline, get_args(Baseline))
    choices: Iterable[tuple[str, bool, str]] = (
        ("kl", rollouts.kl >= 0, "0 or more"),
        ("discount", 0 < rollouts.discount <= 1, "above 0, 1 at most"),
        ("gae_lambda", 0 <= rollouts.gae_lambda <= 1, "between 0 and 1"),
        ("updates", rollouts.updates >= 1, "at least 1"),
        ("score_clip", rollouts.score_clip >= 0, "0 (none) or more"),
        ("kl_limit", rollouts.kl_limit > 0, "above 0"),
    )
    for key, fine, wanted in choices:
        if not fine:
            raise UserError(f"{method.name}.{key}={getattr(rollouts, key)}: must be {wanted}")
    if bad := rollouts.needs - set(get_args(RewardNeed)):
        raise unknown_name(f"value in rollouts' needs of {what}", min(bad), get_args(RewardNeed))
    if rollouts.critic is not None:
        sides = {"positives": ("demonstrations", "policy"), "negatives": ("policy", "initial", "failures")}
        for side, known in sides.items():
            if getattr(rollouts.critic, side) not in known:
                raise unknown_name(f"{side} of the critic of {what}", getattr(rollouts.critic, side), known)
    config = TrainConfig.of(method.training, where=method.name)
    for key in LOSS_FIELDS:
        if getattr(config, key) != TrainConfig.defaults()[key]:
            raise UserError(
                f"{method.name}.{key}={getattr(config, key):g}: must be {TrainConfig.defaults()[key]:g}, it samples itself"
            )
    if not method.starts_from and _compares_start_with_initial(rollouts):
        raise UserError(f"{method.name}.starts_from=: its reward compares where it starts with the model as given, name a method")
    if "initial" in rollouts.needs and method.protocol.opponent == "previous" and method.protocol.rounds > 1:
        raise UserError(
            f"{method.name}.opponent=previous: must be initial with several rounds, its reward compares where the first one "
            "starts with the model as given"
        )
    if rollouts.baseline in ("leave-one-out", "group") and samples < 2:
        raise UserError(f"{method.name}.samples={samples}: baseline={rollouts.baseline} compares samples of a prompt: 2 at least")
    if method.protocol.temperature != 1:
        raise UserError(
            f"{method.name}.temperature={method.protocol.temperature:g}: must be 1, the policy that is trained is sampled"
        )
    if method.protocol.mix_rounds != 1:
        raise UserError(
            f"{method.name}.mix_rounds={method.protocol.mix_rounds}: must be 1, it learns from its newest samples only"
        )
    if method.batches != "pairs":
        raise UserError(f"{what}: batches must be 'pairs', its steps come from samples")
    if (rollouts.baseline == "value") != ("values" in method.needs):
        raise UserError(
            f"{what}: baseline=value needs a loss that trains the value head, and only that one does ('values' in needs)"
        )
    if ("scores" in rollouts.needs) != (rollouts.critic is not None):
        raise UserError(f"{what}: a reward that needs scores needs a critic, and a critic a reward that reads its scores")
    _check_function(rollouts.reward, rollouts.settings, what, "reward")
    if critic := rollouts.critic:
        _check_function(critic.loss, critic.settings, what, "critic's loss")
        TrainConfig.of(critic.training, where=f"{method.name}.critic")
        if critic.updates < 1:
            raise UserError(f"{method.name}.critic_updates={critic.updates}: must be at least 1")


def _check_arithmetic(method: Method) -> None:
    """A setting that the loss divides by, or takes the logarithm of, is found before anything is trained."""
    import torch

    nothing = torch.full((1,), float("nan"))
    tokens = (TokenLogProbs.unknown(nothing), TokenLogProbs.unknown(nothing))
    pair = PairLogProbs(nothing, nothing, nothing, nothing, nothing, nothing, tokens)
    rollouts = method.rollouts
    functions: list[tuple[Callable[..., Tensor], object, Mapping[str, float]]] = []
    if method.loss is not None:
        functions.append((method.loss, pair, method.settings))
    if rollouts is not None:
        functions.append((rollouts.reward, tokens[1], rollouts.settings))
        functions += [(rollouts.critic.loss, pair, rollouts.critic.settings)] if rollouts.critic else []
    for function, given, settings in functions:
        try:
            function(given, **settings)
        except (ArithmeticError, ValueError) as error:
            said = ", ".join(f"{key}={value:g}" for key, value in settings.items())
            raise UserError(f"{method.name}: {function.__name__} cannot be computed with {said}: {error}") from error
        except Exception:  # what else it raises is said where it is trained, beside the other methods' results
            continue


def _compares_start_with_initial(rollouts: Rollouts) -> bool:
    """Whether a reward says nothing where a method starts from the model as given."""
    critic = rollouts.critic
    told = critic is not None and not critic.alongside and (critic.positives, critic.negatives) == ("policy", "initial")
    return told or "initial" in rollouts.needs


def _check_record(method: Method) -> None:
    """What a record of the user's own may get wrong: fields of the wrong kind, or a loss that no artefact could be named by."""
    loss, what = method.loss, f"method {method.name!r}"
    if not isinstance(method.name, str):
        raise UserError(f"{what}: its name must be a text")
    for field_name, value, known in (
        ("batches", method.batches, get_args(Batches)),
        ("normalise", method.normalise, get_args(Normalise)),
        *(("needs", need, get_args(Need)) for need in method.needs),
    ):
        if value not in known:
            raise unknown_name(f"value in {field_name} of {what}", value, known)
    if "first" in method.needs and ("generated" not in method.needs or "preferences" in method.needs):
        raise UserError(f"{what}: 'first' in needs goes with 'generated', and not with 'preferences'")
    if loss is None:
        return
    _check_function(loss, method.settings, what, "loss")
    names = [key for group in setting_groups(method).values() for key in group]
    taken = {key for key in names if names.count(key) > 1}
    if taken:
        raise UserError(f"{what}: its setting {min(taken)!r} has the name of a field of the protocol or of the training")


def _check_function(function: Any, settings: Mapping[str, Any], what: str, role: str) -> None:
    """A loss or reward must be nameable, and its settings its keywords."""
    if not inspect.isfunction(function) or function.__closure__ or not function.__qualname__.isidentifier():
        # A partial, a lambda or a closure looks the same whatever it holds: two losses would share one checkpoint.
        raise UserError(
            f"{what}: its {role} must be a function defined at the top of a module; what it varies belongs into settings"
        )
    try:
        inspect.signature(function).bind(None, **settings)
    except TypeError as error:
        raise UserError(f"{what}: its settings do not fit its {role}: {error}") from error
