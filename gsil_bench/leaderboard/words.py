"""What the leaderboard says in words, for both of its pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gsil_bench.leaderboard.board import Board
from gsil_bench.leaderboard.entries import Entry
from gsil_bench.reporting.comparison import Cell
from gsil_bench.reporting.wording import footer

ABOUT = (
    "Ways of learning from demonstrations, compared on the same model, demonstrations, budget and items. Rows share a table only "
    "where nothing but the method differs. Every score is recomputed from its items when this page is built."
)
HOW_TO_READ = (
    ("Score", "mean over the items, with its 95 % interval; with several seeds it covers items and training runs."),
    ("Difference", "to the control of the table, on the same items, with its 95 % interval."),
    ("Letters", "methods that share a letter are not significantly different from each other (all pairs, Holm)."),
    (
        "Verdict",
        "better or worse: p < 0.05 after Holm's correction within the table; equivalent: the 90 % interval lies within the "
        "margin; not resolved: this design cannot tell.",
    ),
    ("Best", "marks every method that is not significantly worse than the best of its table, never just the maximum."),
    ("Tuned", "how many configurations were tried on which split before the test items were asked."),
    ("Cost", "seconds of training, sampling included, and positions that its steps computed (a pair shares its prompt)."),
)
NO_AVERAGE = (
    "Tasks are not averaged into one ranking: they have different scales, and some ask the same items. Rank by the task that you "
    "care about; with three tasks and methods or more, a summary over tasks stands below the tables."
)


def notes(board: Board) -> list[tuple[str, str]]:
    """The comparison's footer. Its tables mark with a star what these pages mark as best."""
    return [("Best" if label == "Marked *" else label, text) for label, text in footer(board.comparison)]


def tuning_text(tuning: Mapping[str, Any] | None) -> str:
    """How many trials on which split; "not said" for null."""
    if tuning is None:
        return "not said"
    trials = tuning["trials"]
    return f"{trials} trial{'' if trials == 1 else 's'} on {tuning['split']}"


def search_space_text(tuning: Mapping[str, Any]) -> str:
    """Setting and values: "learning_rate: 1e-05, 2e-05"."""
    return "; ".join(f"{key}: {_values(value)}" for key, value in sorted(tuning["search_space"].items()))


def _values(value: Any) -> str:
    return ", ".join(map(scalar_text, value)) if isinstance(value, list) else scalar_text(value)


def scalar_text(value: Any) -> str:
    """A setting's value as one types it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def pairs_text(settings: Mapping[str, Any]) -> str:
    """ "scale=1, shift=0"."""
    return ", ".join(f"{key}={scalar_text(value)}" for key, value in sorted(settings.items()))


def cost_text(cell: Cell) -> str:
    """Of one seed, on average: seconds and tokens of its training."""
    runs = max(1, len(cell.seeds))
    seconds, tokens = cell.cost.get("seconds"), cell.cost.get("tokens")
    parts = [f"{seconds / runs:,.0f} s"] if seconds else []
    parts += [f"{short_number(tokens / runs)} tokens"] if tokens else []
    return ", ".join(parts) or "none"


def short_number(value: float) -> str:
    """Three digits: 367k, 1.24M."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{sign}"
    return f"{value:.3g}"


def variant_of(entry: Entry) -> str:
    """The method that this is with other settings; "" for a method of its own."""
    base = entry.data["method"]["record"].get("method", entry.method)
    return "" if base == entry.method else str(base)
