"""The page of a run: one HTML file that opens from disk and asks the network for nothing.

Table with verdicts, paired differences, training curves, rewards beside scores, costs, every item with all answers,
configuration and provenance. Style and script are inline, plots are inline SVG, texts are JSON in a script tag. Text of users and
models reaches the page on two ways only: through the template, which escapes it, and through that JSON, in which "<" is spelt so
that no answer can end the tag; the script sets it as text, never as HTML. The page's own rule (Content-Security-Policy) allows no
script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gsil_bench.errors import MissingLibraryError, UserError
from gsil_bench.records import write_atomically
from gsil_bench.reporting import on_policy, plots, tables
from gsil_bench.reporting.comparison import Cell, Column, Comparison
from gsil_bench.reporting.plots import Line, Plot
from gsil_bench.reporting.run_data import COSTS, Curve, RunData, ShownCell, ShownTask, collect
from gsil_bench.reporting.wording import (
    across_table,
    cut,
    difference_text,
    footer,
    heading,
    letter_texts,
    one_line,
    outcome_text,
    remarks,
    render_summary,
    row_names,
    score_texts,
)

ASSETS = files("gsil_bench.reporting") / "assets"
LONGEST = 24_000
"""Characters of one text that the page holds; what is longer says how much was left out."""
CURVES = {
    "real_logps": "log-prob of demonstrations (nats)",
    "generated_logps": "log-prob of self-generations (nats)",
    "real_log_ratio": "log-ratio of demonstrations to the reference (nats)",
    "generated_log_ratio": "log-ratio of self-generations to the reference (nats)",
    "margin": "margin: log-ratio of demonstrations − self-generations (nats)",
    "loss": "training loss",
    "grad_norm": "gradient norm",
    "real_nll_per_token": "negative log-likelihood of demonstrations (nats per token)",
    "learning_rate": "learning rate",
    "reward": "reward of the samples (mean of an answer's sum)",
    "reward_std": "reward of the samples: standard deviation",
    "kl": "KL from the reference, estimated on the samples (nats per answer)",
    "sampling_gap": "largest difference of a sample's log-prob between engine and training (nats)",
    "discriminator_auc": "discriminator: AUC on the newest samples, before it learns from them",
    "discriminator_loss": "discriminator: training loss",
    "finished": "share of samples that ended by themselves",
    "sample_tokens": "length of the samples (tokens)",
    "sample_nll_per_token": "negative log-likelihood of the samples (nats per token)",
}
"""Quantities whose names need words; any other number of the metrics is shown under its own name."""
FIRST = ("real_logps", "generated_logps", "margin", "loss", "grad_norm", "real_nll_per_token")
"""Quantities shown at once; the others are chosen."""
SHADOWS = {
    "loss": ("shadow losses", "Each pairwise loss on the log-probs of the step; nothing is trained on them."),
    "real_weight": ("shadow weights: demonstrations", "How hard each loss would push demonstrations up at the step's log-probs."),
    "generated_weight": (
        "shadow weights: self-generations",
        "How hard each loss would push self-generations down at the step's log-probs.",
    ),
}
PROVENANCE = {
    "suite": "suite", "python": "python", "packages": "packages", "hardware": "hardware", "command": "command",
    "created": "made",
}  # fmt: skip
"""What is shown of a result's provenance, and its label."""
COST_WORDS = {
    "seconds": "seconds", "steps": "steps", "tokens": "tokens processed", "scored_tokens": "tokens scored", "flops": "FLOPs",
}  # fmt: skip


def write_page(run: Path) -> Path:
    """Write RUN/report.html from what the folder keeps.

    Raises:
        UserError: the folder holds no finished comparison.
    """
    data = collect(run)
    write_atomically(run / "report.html", render_page(data, *draw(data)))
    return run / "report.html"


def write_report(run: Path, out: Path) -> list[Path]:
    """Write the page, its tables (Markdown, CSV, JSON, LaTeX) and its plots (SVG, PNG) below a folder.

    Raises:
        UserError: the folder holds no finished comparison, or `out` cannot be written.
    """
    data = collect(run)
    drawn, missing = draw(data)
    texts = {out / "report.html": render_page(data, drawn, missing), **_tables(data.comparison, out)}
    if found := _traces(data):
        record = on_policy.record(found, _told(data))
        texts[out / "on-policy.json"] = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    texts |= {out / "plots" / f"{plot.name}.svg": plot.svg() for plot in drawn}
    try:
        for path, text in texts.items():
            write_atomically(path, text)
        for plot in drawn:
            _write_bytes(out / "plots" / f"{plot.name}.png", plot.png())
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from error
    return [*texts, *(out / "plots" / f"{plot.name}.png" for plot in drawn)]


def _tables(comparison: Comparison, out: Path) -> dict[Path, str]:
    return {
        out / "table.md": tables.render_markdown(comparison),
        out / "table.csv": tables.render_csv(comparison),
        out / "table.json": json.dumps(tables.render_json(comparison), indent=1, ensure_ascii=False) + "\n",
        out / "table.tex": tables.render_latex(comparison),
    }


def _write_bytes(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def draw(data: RunData) -> tuple[list[Plot], str]:
    """All plots of a run, or none and what is missing."""
    try:
        return [*_forests(data), *_curve_plots(data), *_reward_plots(data), *_cost_plots(data), *_radars(data)], ""
    except MissingLibraryError as error:
        return [], str(error)


def _forests(data: RunData) -> list[Plot]:
    compared = [column for column in data.comparison.columns if any(cell.against.difference for cell in column.cells)]
    return [plots.forest(column, data.comparison.control, _file("forest", column.task)) for column in compared]


def _file(kind: str, name: str) -> str:
    """A file's stem; two names that differ only in their signs get different ones."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:60]
    same = plain == name.replace("_", "-")
    return f"{kind}-{plain}" if same else f"{kind}-{plain}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:6]}"


def quantities(curves: Sequence[Curve]) -> list[str]:
    """Names of all numbers in the metrics: the known ones first, then by name; "step" is the axis."""
    found = {key for curve in curves for row in curve.rows for key, value in row.items() if isinstance(value, int | float)}
    found -= {"step"}
    return [*(key for key in CURVES if key in found), *sorted(found - CURVES.keys())]


def _curve_plots(data: RunData) -> list[Plot]:
    """A plot of each quantity; the shadow losses together, a panel for each method whose loss it is."""
    names, methods = quantities(data.curves), data.comparison.methods
    made = []
    for quantity in (name for name in names if not name.startswith("shadow/")):
        title = CURVES.get(quantity, quantity)
        lines = _lines(data.curves, quantity)
        made.append(plots.curves({title: lines}, methods, title, _curve_text(lines), _file("curve", quantity)))
    for kind, (title, text) in SHADOWS.items():
        panels = {name.split("/")[1]: _lines(data.curves, name) for name in names if re.fullmatch(f"shadow/[^/]+/{kind}", name)}
        if panels:
            made.append(plots.curves(panels, methods, title, text, _file("curve-shadow", kind)))
    return made


def _lines(curves: Sequence[Curve], quantity: str) -> list[Line]:
    lines = []
    for curve in curves:
        rows = [at for at, row in enumerate(curve.rows) if isinstance(row.get(quantity), int | float)]
        starts = tuple(place for place, at in enumerate(rows) if at in curve.round_starts)
        values = [curve.rows[at] for at in rows]
        if rows:
            lines.append(Line(curve.method, tuple(row["step"] for row in values), tuple(row[quantity] for row in values), starts))
    return lines


def _curve_text(lines: Sequence[Line]) -> str:
    """From where to where each method goes: means of the first and last tenth of its steps."""
    said = []
    for method in dict.fromkeys(line.method for line in lines):
        own = [line for line in lines if line.method == method]
        tenth = [max(1, len(line.values) // 10) for line in own]
        first = [value for line, size in zip(own, tenth, strict=True) for value in line.values[:size]]
        last = [value for line, size in zip(own, tenth, strict=True) for value in line.values[-size:]]
        said.append(f"{one_line(method)} {sum(first) / len(first):.3g} → {sum(last) / len(last):.3g}")
    return f"First and last tenth of the steps: {'; '.join(said)}."


def _traces(data: RunData) -> list[on_policy.Trace]:
    return on_policy.traces(data.results, data.curves)


def _told(data: RunData) -> list[on_policy.Told]:
    return on_policy.told_apart(data.results, data.curves)


def _reward_plots(data: RunData) -> list[Plot]:
    """Reward, score and KL of the methods that sample from the policy they train, a plot for each task."""
    found = _traces(data)
    names = list(dict.fromkeys([*data.comparison.methods, *(trace.method for trace in found)]))
    made = []
    for column in data.comparison.columns if found else ():
        shown = [on_policy.strip(trace, column) for trace in found]
        title = f"Reward against score: {one_line(column.task)}"
        text = " ".join(on_policy.sentence(trace, column) for trace in found)
        made.append(plots.strips(shown, names, title, text, _file("reward", column.task)))
    return made


def _rewards(data: RunData, drawn: Sequence[Plot]) -> list[dict[str, Any]]:
    """What is said of each task, with its plot if there is one."""
    found, shown = _traces(data), {plot["name"]: plot for plot in _shown(drawn, "reward-")}
    return [
        {
            "task": column.task,
            "plot": shown.get(_file("reward", column.task)),
            "sentences": [on_policy.sentence(trace, column) for trace in found],
        }
        for column in (data.comparison.columns if found else ())
    ]


def _critic_rows(data: RunData) -> list[list[str]]:
    """How well reward models and discriminators tell answers apart, as text."""
    return [
        [
            one_line(each.method),
            str(each.seed),
            str(each.round),
            each.critic,
            one_line(each.against) + (f" (none for {each.missing} prompts)" if each.missing else ""),
            "–" if each.answers is None else str(each.answers),
            ("" if each.first_auc is None else f"{each.first_auc:.3f} → ") + ("–" if each.auc is None else f"{each.auc:.3f}"),
        ]
        for each in _told(data)
    ]


def _cost_plots(data: RunData) -> list[Plot]:
    table = {
        COST_WORDS[measure].split()[0]: {method: row[measure] for method, row in data.costs.items() if measure in row}
        for measure in ("seconds", "tokens", "flops")
    }
    table = {measure: amounts for measure, amounts in table.items() if amounts}
    return [plots.costs(table, data.comparison.methods)] if table else []


def _radars(data: RunData) -> list[Plot]:
    methods = data.comparison.methods
    return [
        plots.radar(series, f"Mean rating by category: {task}", _file("radar", task), methods)
        for task, series in data.ratings().items()
    ]


def render_page(data: RunData, drawn: Sequence[Plot], missing: str = "") -> str:
    """The page as text.

    Args:
        drawn: the plots that belong to the data.
        missing: why there are none.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["line"] = lambda text: one_line(str(text))
    script = _asset("page.js")
    comparison = data.comparison
    return environment.from_string(_asset("page.html")).render(
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        items=Markup(embedded(browser_data(data))),
        comparison=comparison,
        headline=headline(comparison),
        sentences=render_summary(comparison),
        footer=footer(comparison),
        columns=[_column(column) for column in comparison.columns],
        rows=_rows(comparison),
        across=across_table(comparison),
        marks=[(name, plots.VERDICTS[name][2]) for name in ("better", "worse", "equivalent", "not resolved", "refused")],
        missing=missing,
        forests=_shown(drawn, "forest-"),
        first_curves=[each for each in _shown(drawn, "curve-") if each["name"] in _first_names()],
        other_curves=[each for each in _shown(drawn, "curve-") if each["name"] not in _first_names()],
        rewards=_rewards(data, drawn),
        caveats=[f"{one_line(trace.method)}: {trace.caveat}." for trace in _traces(data) if trace.caveat],
        critics=_critic_rows(data),
        cost_plots=_shown(drawn, "cost"),
        radars=_shown(drawn, "radar-"),
        costs=_cost_rows(data),
        cost_heads=[COST_WORDS[measure] for measure in COSTS],
        has_items=bool(data.tasks),
        configuration=data.configuration,
        provenance=_provenance(data),
        cells=_cell_records(data),
        failures=[(each.method, each.seed, each.task, each.reason) for each in data.failures],
        warnings=[(warning, ", ".join(runs)) for warning, runs in data.warnings.items()],
        notes=[*comparison.notes, *data.remarks],
    )


def _first_names() -> set[str]:
    return {*(_file("curve", quantity) for quantity in FIRST), _file("curve-shadow", "loss")}


def _shown(drawn: Iterable[Plot], kind: str) -> list[dict[str, Any]]:
    return [
        {"name": plot.name, "wide": plot.is_wide, "title": plot.title, "text": plot.text, "svg": Markup(plot.svg(themed=True))}
        for plot in drawn
        if plot.name.startswith(kind)
    ]


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def headline(comparison: Comparison) -> list[str]:
    """One sentence on the comparison, then one on each method that was compared."""
    tasks = [column.task for column in comparison.columns]
    counts = f"{_count(len(comparison.methods), 'method')} on {_count(len(tasks), 'task')}"
    lines = [f"{counts}; each is compared with {one_line(comparison.control)} on the same items."]
    for method in comparison.methods:
        cells = [cell for column in comparison.columns for cell in column.cells if cell.method == method]
        grouped: dict[str, list[str]] = {}
        for cell in cells:
            outcome = cell.status if cell.score is None else outcome_text(cell.against)
            grouped.setdefault(outcome, []).append(one_line(cell.task))
        grouped.pop("control", None)
        said = "; ".join(f"{outcome} on {_all_or(names, len(tasks))}" for outcome, names in grouped.items())
        lines += [f"{one_line(method)}: {said}."] if said else []
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _all_or(names: Sequence[str], total: int) -> str:
    return f"all {total} tasks" if len(names) == total > 1 else ", ".join(names)


def _column(column: Column) -> dict[str, Any]:
    return {"task": column.task, "heading": heading(column)}


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for each method, with what each cell says and by what it is sorted."""
    texts = [list(zip(score_texts(column), letter_texts(column), strict=True)) for column in comparison.columns]
    return [
        {
            "method": name,
            "cells": [
                _shown_cell(column.cells[number], column, *texts[at][number]) for at, column in enumerate(comparison.columns)
            ],
        }
        for number, name in enumerate(row_names(comparison))
    ]


def _shown_cell(cell: Cell, column: Column, score: str, letters: str) -> dict[str, Any]:
    outcome = cell.against.outcome
    sorted_by = cell.score.estimate if cell.score is not None and cell.n_items else None
    return {
        "score": score,
        "sort": "" if sorted_by is None else repr(sorted_by),
        "best": cell.among_best,
        "letters": letters,
        "difference": difference_text(cell.against.difference, column.unit),
        "outcome": outcome.replace(" ", "-"),
        "sign": plots.VERDICTS[outcome][2] if outcome else "",
        "words": outcome_text(cell.against),
        "why": [*cell.against.refused, *remarks(cell, column, limit=200)],
    }


def _cost_rows(data: RunData) -> list[dict[str, Any]]:
    rows = []
    for method, amounts in data.costs.items():
        values = [(_amount(amounts.get(measure)), amounts.get(measure)) for measure in COSTS]
        rows.append({"method": method, "values": [(text, "" if value is None else repr(value)) for text, value in values]})
    return rows


def _amount(value: float | None) -> str:
    if value is None:
        return "not known"
    if value >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}".replace(",", "\u202f") if value >= 1000 or value == int(value) else f"{value:.1f}"


def _provenance(data: RunData) -> list[tuple[str, str]]:
    """What the results record of where they come from: each distinct value once."""
    lines = []
    for name, label in PROVENANCE.items():
        values = [_words(result.provenance[name]) for result in data.results if result.provenance.get(name)]
        lines += [(label, value) for value in dict.fromkeys(values)]
    inputs = [(key, _words(value)) for result in data.results for key, value in result.provenance.get("inputs", {}).items()]
    return [*lines, *dict.fromkeys(inputs)]


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _cell_records(data: RunData) -> list[dict[str, str]]:
    """Hashes of each cell, shortened; the result files have them whole."""
    return [
        {
            "task": result.task,
            "method": result.method,
            "seed": str(result.seed),
            "protocol": str(result.comparable.get("protocol", "–")),
            "judge": cut(str(result.comparable.get("judge") or "–"), 60),
            "fingerprint": result.fingerprint[:16],
            "items": str(result.comparable.get("items", "–"))[:16],
            "weights": ", ".join(str(each["weights_sha256"])[:16] for each in result.provenance.get("rounds", ())) or "–",
        }
        for result in data.results
    ]


class Texts:
    """Texts by number, each once: prompts, shots and reasons repeat."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._known: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a text; one that is too long for the page is cut and says so."""
        if len(text) > LONGEST:
            text = f"{text[:LONGEST]}\n[… {len(text) - LONGEST} more characters are in the run's store]"
        if text not in self._known:
            self._known[text] = len(self.all)
            self.all.append(text)
        return self._known[text]


def browser_data(data: RunData) -> dict[str, Any]:
    """What the item browser shows: columns of numbers, and every text once."""
    texts = Texts()
    tasks = [_browser_task(task, texts) for task in data.tasks]
    return {"methods": [one_line(method) for method in data.comparison.methods], "tasks": tasks, "texts": texts.all}


def _browser_task(task: ShownTask, texts: Texts) -> dict[str, Any]:
    return {
        "name": one_line(task.name),
        "metric": one_line(task.metric),
        "higher": task.higher_is_better,
        "best": task.best,
        "why": task.why,
        "ids": task.ids,
        "groups": [texts.number(group) for group in task.groups],
        "prompts": [[[texts.number(who), texts.number(text)] for who, text in prompt] for prompt in task.prompts],
        "golds": [[texts.number(text) for text in gold] for gold in task.golds],
        "cells": [_browser_cell(cell, texts) for cell in task.cells],
    }


def _browser_cell(cell: ShownCell, texts: Texts) -> dict[str, Any]:
    return {
        "method": one_line(cell.method),
        "seed": cell.seed,
        "why": cell.why,
        "scores": [None if score is None else round(score, 6) for score in cell.scores],
        "reasons": [texts.number(reason) for reason in cell.reasons],
        "answers": [[[texts.number(text) for text in turns] for turns in samples] for samples in cell.answers],
    }


UNSAFE = re.compile("[<>&\u007f-\u009f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def embedded(value: Any) -> str:
    """JSON that may stand in a script tag: no "<" that could end it, no sign that UTF-8 or HTML cannot hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
