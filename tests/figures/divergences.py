"""Draws the figures of docs/divergences.md and prints its table. Exact and seeded: with the same versions, the same bytes.

python tests/figures/divergences.py [FOLDER]        # docs/figures by default, some seconds
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tabular import (
    METHODS,
    MODES,
    TWO_MODES,
    Imitation,
    World,
    a_demonstrator,
    fit_two_modes,
    imitate,
    js_reward,
    kl,
    modes_held,
    off_modes,
    two_modes,
    two_modes_table,
)
from torch import Tensor

from gsil_bench.records import write_atomically
from gsil_bench.reporting.plots import BLUE, DASHES, GREEN, INK, MUTED, ORANGE, PURPLE, STYLE, VERMILLION, Plot

FOLDER = Path(__file__).parent.parent.parent / "docs" / "figures"
SHOWN = ("forward KL", "Jensen-Shannon", "reverse KL")
COLOURS = dict(zip(METHODS, (BLUE, BLUE, GREEN, GREEN, VERMILLION, VERMILLION), strict=True))
BAR = 1e-2
"""Of the issue: the divergence that counts as having arrived."""


def fits() -> dict[str, Tensor]:
    """log-probs of the texts at each method's optimum in the restricted family."""
    return {name: fit_two_modes(method) for name, method in METHODS.items()}


def modes(fitted: Mapping[str, Tensor]) -> Plot:
    """Every text's probability under the demonstrator and under three fits."""
    import matplotlib.pyplot as plt

    shown = {"demonstrator": two_modes().log(), **{name: fitted[name] for name in SHOWN}}
    order = sorted(range(len(TWO_MODES.texts)), key=lambda at: (TWO_MODES.texts[at] not in MODES, TWO_MODES.texts[at]))
    places = [1.6 * at if at < len(MODES) else at + 1.8 for at in range(len(order))]  # room for the modes' numbers
    words = ["".join("abc"[word] for word in TWO_MODES.texts[at]) for at in order]
    with plt.rc_context(STYLE):
        figure, rows = plt.subplots(len(shown), 1, figsize=(7.5, 6.4), sharex=True, sharey=True)
        figure.subplots_adjust(0.09, 0.1, 0.99, 0.96, hspace=0.32)  # no layout is searched for, so that bytes repeat
        for axes, (name, logps) in zip(rows, shown.items(), strict=True):
            heights = [logps[at].exp().item() for at in order]
            colours = [BLUE if at < len(MODES) else ORANGE for at in range(len(order))]
            axes.bar(places, heights, color=colours, width=0.8)
            for at, height in list(zip(places, heights, strict=True))[: len(MODES)]:
                axes.annotate(f"{height:.2f}", (at, height), (0, 2), textcoords="offset points", ha="center", fontsize=8)
            axes.set_title(f"{name}: {_said(logps)}" if name == "demonstrator" else f"fitted by {name}: {_said(logps)}")
            axes.set_ylim(0, 1)
            axes.set_yticks([0, 0.5, 1])
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        rows[-1].set_xticks(places, words, rotation=90, fontsize=8, family="monospace")
        rows[-1].set_xlabel("the two modes, then the 25 other texts")
        figure.supylabel("probability", x=0.012, fontsize=9.5)
        plt.close(figure)
    text = "; ".join(f"{name}: {_said(logps)}" for name, logps in shown.items())
    return Plot("divergences-modes", "Two modes and a family that holds one", text, figure)


def _said(logps: Tensor) -> str:
    held = modes_held(logps)
    return f"{held} mode{'s' * (held != 1)} held, {off_modes(logps):.2f} elsewhere"


def curves(discriminator_steps: int) -> dict[str, list[float]]:
    """KL(β ‖ π) before every step and at the end, of each method and of the token reward that pays for length."""
    world, found = World(), {}
    demonstrations = a_demonstrator(world)
    for name, method in {**METHODS, "softplus(l) of tokens": Imitation("", "token", js_reward)}.items():
        tables = imitate(method, world, demonstrations, world.zeros(), discriminator_steps=discriminator_steps)
        found[name] = [kl(demonstrations.log(), world.logps(table)).item() for table in tables]
    return found


def convergence() -> Plot:
    """Each method on the way to a demonstrator that it can reach, on a logarithmic scale."""
    import matplotlib.pyplot as plt

    panels = {"best discriminator at once": curves(0), "discriminator trained, 5 steps for one": curves(5)}
    with plt.rc_context(STYLE):
        figure, columns = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True)
        figure.subplots_adjust(0.085, 0.32, 0.98, 0.93, wspace=0.08)
        for axes, (title, found) in zip(columns, panels.items(), strict=True):
            for name, values in found.items():
                dash = DASHES[2] if name not in METHODS else DASHES[name.endswith("occupancies")]
                axes.plot(values, color=COLOURS.get(name, PURPLE), linestyle=dash, label=name)
            axes.axhline(BAR, color=MUTED, linewidth=1)
            axes.annotate("the bar", (400, BAR), (0, 3), textcoords="offset points", ha="right", color=INK, fontsize=8.5)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_ylim(1e-4, 2)
            axes.set_xlim(0, 400)
            axes.set_xticks(range(0, 401, 100))
            axes.set_title(title)
            axes.set_xlabel("policy steps")
        columns[0].set_ylabel("KL(demonstrator ‖ policy), nats")
        figure.legend(*columns[0].get_legend_handles_labels(), loc="lower center", ncols=3)
        plt.close(figure)
    ends = "; ".join(f"{title}: {_ends(found)}" for title, found in panels.items())
    return Plot("divergences-convergence", "Divergence from the demonstrator over steps", ends, figure)


def _ends(found: Mapping[str, list[float]]) -> str:
    arrived = [name for name, values in found.items() if values[-1] < BAR]
    away = ", ".join(f"{name} ends at {values[-1]:.2f}" for name, values in found.items() if name not in arrived)
    return f"{len(arrived)} of {len(found)} end below {BAR:g}" + (f", {away}" if away else "")


def main() -> None:
    """Draw and print."""
    folder, fitted = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER, fits()
    folder.mkdir(parents=True, exist_ok=True)
    for plot in (modes(fitted), convergence()):
        write_atomically(folder / f"{plot.name}.svg", plot.svg())
        print(f"wrote {plot.name}.svg: {plot.text}")
    print(f"\n{two_modes_table(fitted)}")


if __name__ == "__main__":
    main()
