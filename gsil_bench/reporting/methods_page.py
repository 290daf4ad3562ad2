"""Every method from its record: what it needs, its formula, its cost, its paper and its settings; for the terminal and for
docs/methods.md.

    gsil-bench methods
    gsil-bench methods --markdown > docs/methods.md

Nothing about a method is written here. The long text of the page is the docstring of the module that defines the loss.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gsil_bench.methods import OF_TOKENS, Method
from gsil_bench.training.config import TrainConfig

BACKWARD = 2
"""Forward passes that a backward pass costs."""
WIDTH = 110

NOTATION = """\
x is a prompt, y its demonstration ("real"), y' another answer to it ("generated"): a sample of the policy that `opponent`
names, or the data's rejected answer. π is the policy that is trained, π_ref its reference, the opponent. A log-prob is a
sum over the answer's tokens and its end token, never over the prompt; a log-ratio is log π − log π_ref of an answer. σ is
the logistic function, sg(·) lets no gradient pass, z are logits."""

COST = """\
**A step** counts the sequences that pass forward and backward for each demonstration, in units of SFT's one. **A run
without sampling** adds the reference's forward passes, a third of such a unit each, spread over the method's epochs; they
are computed once a round and shared by all methods with the same reference. **Samples** are answers that the opponent
generates for each demonstration in the whole run; what they cost depends on the engine. All three follow from the record.
Prompts that both answers share are computed once where the model allows it, so a measured step is cheaper than its count."""


@dataclass(frozen=True)
class Cost:
    """Work for each demonstration, in units that do not depend on the model."""

    sequences: int
    """That pass forward and backward in a step."""
    reference: int
    """That pass forward through a reference, in the whole run."""
    samples: int
    """That are generated in the whole run."""
    epochs: float

    @staticmethod
    def of(method: Method) -> Cost:
        """From the record's needs, protocol and training."""
        protocol, epochs = method.protocol, TrainConfig.of(method.training, where=method.name).epochs
        if not method.trains:
            return Cost(0, 0, 0, epochs)
        others = protocol.samples if method.needs & {"generated", "preferences"} else 0
        references = 1 if protocol.opponent == "initial" else protocol.rounds
        reference = references + others * protocol.rounds if "reference" in method.needs else 0
        samples = protocol.samples * protocol.rounds if "generated" in method.needs else 0
        return Cost(1 + others, reference, samples, epochs)

    @property
    def run(self) -> float:
        """Training and reference, relative to SFT's run of as many epochs."""
        return self.sequences + self.reference / ((1 + BACKWARD) * self.epochs)


def group_of(method: Method) -> str:
    """What the method needs besides the model, in words."""
    if not method.trains:
        return "nothing"
    parts = ["demonstrations"]
    if "preferences" in method.needs:
        parts.append("rejected answers (or self-generations where the data has none)")
    elif "generated" in method.needs:
        parts.append("self-generations")
    return " and ".join(parts) + (", compared with a reference" if "reference" in method.needs else "")


def grouped(methods: Iterable[Method]) -> dict[str, list[Method]]:
    """Methods by what they need, those that need least first."""
    found: dict[str, list[Method]] = {}
    for method in methods:
        found.setdefault(group_of(method), []).append(method)
    return dict(sorted(found.items(), key=lambda item: (item[1][0].trains, len(item[1][0].needs - OF_TOKENS))))


def defaults_of(method: Method) -> str:
    """Settings of the loss and of the training, and the protocol where it matters."""
    if not method.trains:
        return "-"
    parts = [f"{key}={value:g}" for key, value in method.settings.items()]
    parts += [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in method.training.items()]
    if "generated" in method.needs and method.batches == "pairs":
        protocol = method.protocol
        parts += [f"opponent={protocol.opponent}", f"rounds={protocol.rounds}", f"temperature={protocol.temperature:g}"]
    return ", ".join(parts)


def cost_text(method: Method) -> str:
    """The cost in one line."""
    cost = Cost.of(method)
    if not method.trains:
        return "no training"
    text = f"a step {cost.sequences}x SFT's"
    text += f", a run {cost.run:.2f}x with {cost.reference} reference passes" if cost.reference else ""
    return text + (f" and {cost.samples} sample{'s' * (cost.samples > 1)} a demonstration" if cost.samples else "")


def as_text(methods: Sequence[Method]) -> str:
    """For a terminal."""
    lines: list[str] = []
    for group, members in grouped(methods).items():
        lines += [f"NEEDS {group}", ""]
        for method in members:
            facts = [method.formula, method.summary, cost_text(method), defaults_of(method), method.paper]
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
    lines += ["", COST, ""]
    lines += ["| method | needs | a step | a run without sampling | samples |", "|---|---|---|---|---|"]
    for group, members in grouped(methods).items():
        for method in members:
            cost = Cost.of(method)
            lines.append(
                f"| [`{method.name}`](#{method.name}) | {_cell(group)} | {cost.sequences}× | {cost.run:.2f}× | {cost.samples} |"
            )
    for group, members in grouped(methods).items():
        lines += ["", f"## Needs {group}"]
        for method in members:
            lines += ["", *_entry(method)]
    return "\n".join([*lines, "", "## From the sources", *_modules(methods)]) + "\n"


def _entry(method: Method) -> list[str]:
    lines = [f"### {method.name}", "", method.summary, ""]
    if method.formula:
        lines += [f"    {method.formula}", ""]
    lines += [f"- cost: {cost_text(method)}", f"- defaults: {defaults_of(method)}"]
    return [*lines, f"- paper: {method.paper}"] if method.paper else lines


def _modules(methods: Sequence[Method]) -> list[str]:
    """The docstring of every module that defines a loss, once."""
    lines: list[str] = []
    sources = [(method.loss.__module__, method.name) for method in methods if method.loss is not None]
    for module in dict.fromkeys(module for module, _ in sources):
        names = ", ".join(f"`{name}`" for source, name in sources if source == module)
        text = textwrap.dedent(sys.modules[module].__doc__ or "").strip()
        lines += ["", f"### {module.replace('.', '/')}.py: {names}", "", text]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
