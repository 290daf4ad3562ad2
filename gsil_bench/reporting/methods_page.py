"""Every method from its record: what it needs, its formula, its cost, its paper and its settings; for the terminal and for
docs/methods.md.

    gsil-bench methods
    gsil-bench methods --markdown > docs/methods.md

Nothing about a method is written here. The long text of the page is the docstring of the module that defines its reward, or
its loss.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gsil_bench.data.degradations import CLASSES
from gsil_bench.methods import CRITIC, OF_TOKENS, Critic, Method, Rollouts, load_method, setting_groups
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.critics import critic_of

BACKWARD = 2
"""Forward passes that a backward pass costs."""
WIDTH = 110

NOTATION = """\
x is a prompt, y its demonstration ("real"), y' another answer to it ("generated"): a sample of the policy that `opponent`
names, or the data's rejected answer. π is the policy that is trained, π_ref its reference, the opponent. A log-prob is a
sum over the answer's tokens and its end token, never over the prompt; a log-ratio is log π − log π_ref of an answer. σ is
the logistic function, sg(·) lets no gradient pass, z are logits. E_π is a mean over samples of the policy as it is at that
step; `kl` is what a nat of log π − log π_ref costs there."""

COST = """\
**A step** counts the sequences that pass forward and backward for each demonstration, in units of SFT's one. **A run
without sampling** adds the reference's forward passes, a third of such a unit each, spread over the method's epochs; they
are computed once a round and shared by all methods with the same reference. **Samples** are answers that the opponent
generates for each demonstration in the whole run; what they cost depends on the engine. All three follow from the record.
Prompts that both answers share are computed once where the model allows it, so a measured step is cheaper than its count."""

COST_OF_SAMPLERS = """\
**Own samples.** These methods sample from the policy that they train. Per demonstration and optimiser step: **a step** is
what the policy's update passes forward and backward. **Forward** is what is only read to reward and to check the samples:
each under the policy (its log-probs at sampling) and under the reference; under the initial model, an encoder or a reward
model where the reward asks for them; by a discriminator the samples twice and the demonstration once, before and after it
learns. **Critic** is what a discriminator passes forward and backward. Where `updates` steps share the same samples, the
last two are divided by it. **Reward models** are sequences forward and backward in the whole run, on top of the steps that
all methods have. **A run without sampling** weighs all of it, the starting method's share of the epochs included, relative
to SFT's run of as many epochs. **Samples** are answers generated for each demonstration in the whole run, those for reward
models included. A sequence counts as one whatever its length: samples may be longer than demonstrations, up to
`max_new_tokens`. Sampling itself is in none of the factors; what it takes is in each run's facts (`sampling_seconds`)."""


@dataclass(frozen=True)
class Cost:
    """Work for each demonstration, in units that do not depend on the model."""

    sequences: int
    """That pass forward and backward in a step."""
    reference: int
    """That pass forward through a reference, in the whole run."""
    samples: float
    """That are generated in the whole run."""
    epochs: float
    passes: Mapping[str, float] = field(default_factory=dict)
    """Forward only, in a step: whose → how many. For samples of the policy in training."""
    critic: float = 0.0
    """That pass forward and backward through a discriminator in a step."""
    reward_model: float = 0.0
    """That pass forward and backward through reward models in the whole run."""
    share: float = 0.0
    """Of the epochs that go to the method that it starts from."""
    start: float = 0.0
    """That method's run, relative to SFT's of as many epochs."""

    @staticmethod
    def of(method: Method) -> Cost:
        """From the record's needs, protocol and training."""
        protocol, epochs = method.protocol, TrainConfig.of(method.training, where=method.name).epochs
        if not method.trains:
            return Cost(0, 0, 0, epochs)
        share = method.start_share if method.starts_from else 0.0
        start = Cost.of(load_method(method.starts_from)).run if method.starts_from else 0.0
        if method.rollouts is not None:
            k, updates = protocol.samples, method.rollouts.updates
            discriminator, model, sampled = _critic_work(method, method.rollouts)
            passes, samples = _passes(method.rollouts, k), (1 - share) * epochs * k / updates + sampled
            return Cost(k, 0, samples, epochs, passes, discriminator / updates, model, share, start)
        others = protocol.samples if method.needs & {"generated", "preferences"} else 0
        others *= 2 if "first" in method.needs else 1
        seen = protocol.rounds if protocol.demonstrations == "all" else 1  # rounds that a demonstration takes part in
        references = 1 if protocol.opponent == "initial" else seen
        reference = references + others * seen if "reference" in method.needs else 0
        samples = protocol.samples * seen if "generated" in method.needs else 0
        return Cost(1 + others, reference, samples, epochs, share=share, start=start)

    @property
    def forward(self) -> float:
        """Forward only, in a step."""
        return sum(self.passes.values())

    @property
    def run(self) -> float:
        """Training, what is only read, and critics, relative to SFT's run of as many epochs."""
        step = self.sequences + self.critic + self.forward / (1 + BACKWARD)
        whole = (self.reference / (1 + BACKWARD) + self.reward_model) / self.epochs
        return (1 - self.share) * step + self.share * self.start + whole


def _passes(rollouts: Rollouts, samples: int) -> dict[str, float]:
    """Sequences that are read at a sampling, for each optimiser step: under the policy and the reference always."""
    read = {"policy": samples, "reference": samples}
    if "initial" in rollouts.needs:
        read["initial model"] = samples
    if "similarity" in rollouts.needs:
        read["encoder"] = samples + 1  # and the demonstration
    if rollouts.critic is not None and rollouts.critic.alongside:
        read["discriminator"] = 2 * samples + 1  # before it learns also the demonstration
    elif rollouts.critic is not None:
        read["reward model"] = samples
    return {name: count / rollouts.updates for name, count in read.items()}


def _critic_work(method: Method, rollouts: Rollouts) -> tuple[float, float, float]:
    """Sequences forward and backward of a discriminator at a sampling and of reward models in the run; samples for these."""
    critic, k = rollouts.critic, method.protocol.samples
    if critic is None:
        return 0.0, 0.0, 0.0
    if critic.alongside:
        return float(critic.updates * (1 + k)), 0.0, 0.0
    epochs, rounds = TrainConfig.of(critic_of(method).training, where=method.name).epochs, method.protocol.rounds
    low = len(CLASSES) + 1 if critic.negatives == "failures" else k  # and one of the policy's own
    sequences = 2 if critic.positives != "demonstrations" else 1 + low  # of one contrast
    sampled = sum(answers != "demonstrations" for answers in (critic.positives, critic.negatives))
    return 0.0, rounds * epochs * sequences, float(rounds * sampled * k)


def group_of(method: Method) -> str:
    """What the method needs besides the model, in words."""
    if not method.trains:
        return "nothing"
    if method.rollouts is not None:
        return " and ".join(["demonstrations and own samples", *_rewarded_by(method.rollouts)])
    parts = ["demonstrations"]
    if "preferences" in method.needs:
        parts.append("rejected answers (or self-generations where the data has none)")
    elif "generated" in method.needs:
        parts.append("self-generations")
    return " and ".join(parts) + (", compared with a reference" if "reference" in method.needs else "")


def _rewarded_by(rollouts: Rollouts) -> list[str]:
    """What a reward is made from, the cheapest first."""
    found = {"log-probs of the model as given": "initial" in rollouts.needs}
    found["similarity to the demonstration"] = "similarity" in rollouts.needs
    found["a reward model"] = rollouts.critic is not None and not rollouts.critic.alongside
    found["a discriminator"] = rollouts.critic is not None and rollouts.critic.alongside
    return [name for name, needed in found.items() if needed]


def grouped(methods: Iterable[Method]) -> dict[str, list[Method]]:
    """Methods by what they need, those that need least first and those that sample as they train last."""
    found: dict[str, list[Method]] = {}
    for method in methods:
        found.setdefault(group_of(method), []).append(method)
    return dict(sorted(found.items(), key=lambda item: _rank(item[1][0])))


def _rank(method: Method) -> tuple[bool, bool, float]:
    if method.rollouts is None:
        return method.trains, False, len(method.needs - OF_TOKENS)
    critic = method.rollouts.critic
    return method.trains, True, len(method.rollouts.needs) + (0 if critic is None else 2 + critic.alongside)


def defaults_of(method: Method) -> str:
    """Settings of the loss and of the training, and the protocol where it matters."""
    if not method.trains:
        return "-"
    parts = [f"{key}={value:g}" for key, value in method.settings.items()]
    parts += [f"{key}={_value(value)}" for key, value in method.training.items()]
    protocol = method.protocol
    if method.starts_from:
        parts += [f"starts_from={method.starts_from}", f"start_share={method.start_share:g}"]
    if method.rollouts is not None:
        parts += [f"{key}={getattr(protocol, key)}" for key in ("samples", "max_new_tokens", "opponent", "rounds")]
        parts += _rollout_defaults(method, method.rollouts)
    elif "generated" in method.needs and method.batches == "pairs":
        parts += [f"opponent={protocol.opponent}", f"rounds={protocol.rounds}", f"temperature={protocol.temperature:g}"]
    return ", ".join(parts)


def _rollout_defaults(method: Method, rollouts: Rollouts) -> list[str]:
    """Settings of reward, rollouts and critic, without those that nothing reads."""
    groups, critic = setting_groups(method), rollouts.critic
    unread = {"gae_lambda"} if rollouts.baseline != "value" else set()
    unread |= {"score_clip"} if "scores" not in rollouts.needs else set()
    shown = {**groups["reward"], **{key: value for key, value in groups["rollouts"].items() if key not in unread}}
    if critic is not None:
        own = {CRITIC + key for key in (*critic.training, *critic.settings, *(["updates"] if critic.alongside else []))}
        shown |= {key: value for key, value in groups["critic"].items() if key in own}
    return [f"{key}={_value(value)}" for key, value in shown.items()]


def _value(value: float | int | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def told_apart(critic: Critic) -> str:
    """What a critic learns to tell apart."""
    names = {"policy": "samples of the policy", "initial": "samples of the model as given", "failures": "constructed failures"}
    if critic.alongside:
        return "demonstrations against the newest samples"
    return f"{names.get(critic.positives, critic.positives)} against {names.get(critic.negatives, critic.negatives)}"


def critic_text(method: Method) -> str:
    """What the reward's critic is; "" without one."""
    critic = method.rollouts and method.rollouts.critic
    return f"{'discriminator' if critic.alongside else 'reward model'}: {told_apart(critic)}" if critic else ""


def cost_text(method: Method) -> str:
    """The cost in one line."""
    cost = Cost.of(method)
    if not method.trains:
        return "no training"
    text = f"a step {cost.sequences}x SFT's"
    if cost.passes:
        text += f", besides {cost.forward:g} forward passes ({', '.join(f'{name} {n:g}' for name, n in cost.passes.items())})"
    text += f" and {cost.critic:g} sequences of the discriminator's training" if cost.critic else ""
    text += f", reward models {cost.reward_model:g} sequences in the run" if cost.reward_model else ""
    text += f", {cost.share:.0%} of the epochs are {method.starts_from}'s" if cost.share else ""
    if cost.reference or cost.passes or cost.share:
        text += f", a run {cost.run:.2f}x" + (f" with {cost.reference} reference passes" if cost.reference else "")
    return text + (f" and {cost.samples:g} sample{'s' * (cost.samples > 1)} a demonstration" if cost.samples else "")


def as_text(methods: Sequence[Method]) -> str:
    """For a terminal."""
    lines: list[str] = []
    for group, members in grouped(methods).items():
        lines += [f"NEEDS {group}", ""]
        for method in members:
            facts = [method.formula, method.summary, critic_text(method), cost_text(method), defaults_of(method), method.paper]
            lines.append(method.name)
            for fact in facts:
                if fact and fact != "-":
                    lines += textwrap.wrap(fact, WIDTH, initial_indent="    ", subsequent_indent="      ")
            lines.append("")
    lines.append("Change a setting with --set METHOD.SETTING=VALUE; use your own method with --methods module:ATTRIBUTE.")
    return "\n".join(lines)


def as_markdown(methods: Sequence[Method]) -> str:
    """docs/methods.md."""
    lines = ["<!-- Generated: gsil-bench methods --markdown > docs/methods.md -->", "", "# Methods", "", NOTATION, "", "## Cost"]
    lines += ["", COST, "", *_cost_table(method for method in methods if method.rollouts is None)]
    samplers = [method for method in methods if method.rollouts is not None]
    lines += ["", COST_OF_SAMPLERS, "", *_cost_table_of_samplers(samplers)] if samplers else []
    for group, members in grouped(methods).items():
        lines += ["", f"## Needs {group}"]
        for method in members:
            lines += ["", *_entry(method)]
    return "\n".join([*lines, "", "## From the sources", *_modules(methods)]) + "\n"


def _cost_table(methods: Iterable[Method]) -> list[str]:
    lines = ["| method | needs | a step | a run without sampling | samples |", "|---|---|---|---|---|"]
    for group, members in grouped(methods).items():
        for method in members:
            cost = Cost.of(method)
            row = (_link(method), _cell(group), f"{cost.sequences}×", f"{cost.run:.2f}×", f"{cost.samples:g}")
            lines.append(f"| {' | '.join(row)} |")
    return lines


def _cost_table_of_samplers(methods: Iterable[Method]) -> list[str]:
    work = ("a step", "forward", "critic", "reward models", "a run without sampling", "samples")
    lines = [f"| {' | '.join(('method', 'needs', 'starts from', *work))} |", "|---" * (3 + len(work)) + "|"]
    for group, members in grouped(methods).items():
        for method in members:
            cost = Cost.of(method)
            needs = _cell(group.removeprefix("demonstrations and own samples").removeprefix(" and ") or "nothing more")
            start = f"{method.starts_from}, {cost.share:.0%}" if method.starts_from else "the model as given"
            counts = (f"{cost.sequences}×", f"{cost.forward:g}", f"{cost.critic:g}", f"{cost.reward_model:g}")
            lines.append(f"| {' | '.join((_link(method), needs, start, *counts, f'{cost.run:.2f}×', f'{cost.samples:g}'))} |")
    return lines


def _link(method: Method) -> str:
    return f"[`{method.name}`](#{method.name})"


def _entry(method: Method) -> list[str]:
    lines = [f"### {method.name}", "", method.summary, ""]
    if method.formula:
        lines += [f"    {method.formula}", ""]
    lines += [f"- {critic_text(method)}"] if critic_text(method) else []
    lines += [f"- cost: {cost_text(method)}", f"- defaults: {defaults_of(method)}"]
    return [*lines, f"- paper: {method.paper}"] if method.paper else lines


def _modules(methods: Sequence[Method]) -> list[str]:
    """The docstring of every module that defines a reward or a loss, once."""
    lines: list[str] = []
    sources = [(method.module, method.name) for method in methods if method.loss is not None]
    for module in dict.fromkeys(module for module, _ in sources):
        names = ", ".join(f"`{name}`" for source, name in sources if source == module)
        text = textwrap.dedent(sys.modules[module].__doc__ or "").strip()
        lines += ["", f"### {module.replace('.', '/')}.py: {names}", "", text]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
