"""Tuning with equal budgets: every method gets the same number of trials, from a declared space, on the dev split only.

    gsil-bench tune --methods sft,gsil-logistic --trials 5 --out runs
    gsil-bench compare --recipe runs/tuned.yaml --seeds 0,1,2,3,4

A trial is a variant of its method in an ordinary comparison, so trials share stages, are resumed, and are all kept. A trial that
fails or diverges counts as a trial. The objective is one number for all methods; where trials tie, the earlier one is chosen.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.special import stdtrit  # type: ignore[import-untyped, unused-ignore]

from gsil_bench.config import Config
from gsil_bench.errors import UserError, unknown_name
from gsil_bench.evaluation import held_out
from gsil_bench.evaluation.statistics import LEVEL, Array, Bounds, Interval, bound_without_spread
from gsil_bench.inputs import Inputs, read_inputs, resolve_methods
from gsil_bench.methods import Method, known_methods, with_settings
from gsil_bench.plan import Plan, Planner
from gsil_bench.records import NAME, CellFailure, CellResult, digest, write_atomically
from gsil_bench.reporting.tuned import tuning_markdown
from gsil_bench.tasks.task import Item
from gsil_bench.variants import load_with_variants, setting, spelt_out
from gsil_bench.yaml_files import read_yaml

SPLIT = "dev"
TRIALS_FOLDER = "tuning"
"""Below --out: results of the trials. Their artefacts are in the store of --out, where the final comparison finds them."""
OBJECTIVE = "mean over tasks of (score − worst) / (best − worst) on the dev split"
TRIALS = 5
"""Of each method, unless --trials says otherwise."""
WIDEST = 15
"""Trials of the default space at most: more would try rates that no model is trained with."""
STEP = 2.0
"""Neighbours of the default space: each learning rate is this times the one before; --trials 5 spans a factor of 16."""
MOST_REPEATED = 0.01
"""Share of dev questions that may also be test questions."""
ALL = "all"
"""The key of a space file for what is searched for every method."""
FACTORS = "factors"
"""Values as multiples of the method's own."""

Settings = Mapping[str, Any]
Grid = Mapping[str, Sequence[Any]]
"""SETTING → values, all of them tried with all of the others unless there are more combinations than trials."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One setting of one method."""

    method: str
    """As it is named in results."""
    number: int
    """From 1."""
    settings: Settings

    @property
    def name(self) -> str:
        """Of the variant that is compared."""
        return f"{self.method}--trial-{self.number}"


@dataclass(frozen=True)
class Space:
    """What is searched."""

    grids: Mapping[str, Grid]
    """METHOD → SETTING → values, typed, in the method's own units."""
    trials: tuple[Trial, ...]
    """The same number for each method."""

    @property
    def budget(self) -> int:
        """Trials of each method."""
        return len(self.trials) // len(self.grids)

    @property
    def sha256(self) -> str:
        """Digest of the grids and of the trials drawn from them."""
        return digest([self.as_dict(), [[trial.name, dict(trial.settings)] for trial in self.trials]])

    def as_dict(self) -> dict[str, dict[str, list[Any]]]:
        """The grids as JSON."""
        return {name: {key: list(values) for key, values in grid.items()} for name, grid in self.grids.items()}


@dataclass(frozen=True)
class Tried:
    """A trial and what became of it."""

    trial: Trial
    score: Interval | None
    """The objective; None for a trial that failed."""
    by_task: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Normalised scores: 0 is an empty answer's, 1 a perfect one's."""
    from_chosen: Interval | None = None
    """Objective minus the chosen trial's, on the same items and seeds; None for the chosen one."""
    unscored: int = 0
    failure: str = ""
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of training, summed over seeds."""


@dataclass(frozen=True)
class Tuned:
    """A method's trials."""

    method: str
    tried: tuple[Tried, ...]
    chosen: Trial | None
    """None if every trial failed."""
    warnings: tuple[str, ...] = ()


def read_space(path: str | None, methods: Sequence[Method], trials: int | None) -> Space:
    """The space in a file, or the default one: learning rates around each method's own, each twice the one before.

    A file maps "all" or a method's name to settings, and those to values or to `{factors: […]}` of the method's own value:

        all: {learning_rate: {factors: [0.25, 0.5, 1, 2, 4]}}
        gsil-logistic: {scale: [0.1, 1]}

    Args:
        path: a YAML file; None for the default space.
        methods: with the settings that they have in the comparison.
        trials: of each method; None for 5, or with a file the number of combinations if it is the same for all.

    Raises:
        UserError: an unreadable file, an unknown method or setting, a value twice, fewer combinations than trials. Methods that
            are known but not compared are passed over.
    """
    if path is None and (trials or 0) > WIDEST:
        raise UserError(f"--trials {trials}: the default space doubles the learning rate with each; name what to search: --space")
    declared = {ALL: {"learning_rate": {FACTORS: factors(trials or TRIALS)}}} if path is None else _load(path)
    where = "the default space" if path is None else f"--space {path}"
    names = [method.name for method in methods]
    for key in declared:
        if key not in (ALL, *names, *known_methods()):  # one file serves several searches, each of some of its methods
            raise unknown_name(f"method in {where}", key, [ALL, *names])
    grids = {method.name: _grid({**declared.get(ALL, {}), **declared.get(method.name, {})}, method, where) for method in methods}
    sizes = {name: math.prod(len(values) for values in grid.values()) for name, grid in grids.items()}
    budget = trials or next(iter(sizes.values()))
    if trials is None and len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"{where}: the methods have different numbers of combinations ({listed}); say how many each gets: --trials"
        )
    for name, size in sizes.items():
        if size < budget:
            raise UserError(f"{where}: {name} has {size} combinations, fewer than --trials {budget}; every method gets as many")
    return Space(grids, tuple(trial for name, grid in grids.items() for trial in _trials(name, grid, budget)))


def factors(count: int) -> list[float]:
    """`count` factors on a logarithmic grid around 1: 1/4, 1/2, 1, 2, 4 for five."""
    return [STEP ** (index - (count - 1) // 2) for index in range(count)]


def _load(path: str) -> dict[str, Any]:
    try:
        data = read_yaml(Path(path), f"--space {path}")
    except OSError as error:
        raise UserError(f"--space {path}: {error.strerror}") from error
    if not isinstance(data, dict) or not data or not all(isinstance(grid, dict) for grid in data.values()):
        raise UserError(f"--space {path}: expected METHOD: {{SETTING: [VALUE, …]}}, such as all: {{learning_rate: [1e-5, 2e-5]}}")
    return {str(name): {str(key): values for key, values in grid.items()} for name, grid in data.items()}


def _grid(declared: Settings, method: Method, where: str) -> Grid:
    """The values of each setting, typed and checked by the method itself."""
    if not declared:
        raise UserError(f"{where}: nothing is searched for {method.name}; name a setting under it or under {ALL}")
    return {key: _values(values, key, method, f"{where}: {method.name}.{key}") for key, values in declared.items()}


def _values(declared: Any, key: str, method: Method, where: str) -> list[Any]:
    relative = isinstance(declared, Mapping)
    listed = declared.get(FACTORS) if relative and set(declared) == {FACTORS} else declared
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where}: expected a list of values or {{{FACTORS}: [0.5, 1, 2]}}, found {declared!r}")
    own = setting(method, key)
    if relative and not all(_is_number(number) for number in (own, *listed)):
        raise UserError(f"{where}: {FACTORS} multiply numbers, and {own!r} times {listed} are none")
    asked = [float(f"{own * float(factor):.6g}") for factor in listed] if relative else listed
    values = [setting(with_settings(method, {key: value}), key) for value in asked]
    repeated = [value for index, value in enumerate(values) if value in values[:index]]
    if repeated:
        raise UserError(f"{where}: {repeated[0]} is there twice; the same trial would count as two")
    return values


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _trials(method: str, grid: Grid, budget: int) -> list[Trial]:
    """All combinations in the grid's order, or as many as the budget allows, drawn by a generator seeded with the grid."""
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    drawn = sorted(random.Random(digest([method, dict(grid)])).sample(range(len(combinations)), budget))
    return [Trial(method, number, combinations[index]) for number, index in enumerate(drawn, start=1)]


def tuned_methods(config: Config) -> list[Method]:
    """The methods of a comparison, with its settings, of which all must train.

    Raises:
        UserError: one that does not; everything that is wrong with their settings.
    """
    methods = list(resolve_methods(dataclasses.replace(config, start=False)))
    for method in methods:
        if not method.trains:
            raise UserError(f"tune: {method.name} does not train, so there is nothing to tune; leave it out of --methods")
        longest = f"{method.name}--trial-{10**3}"
        if not NAME.fullmatch(longest):
            raise UserError(f"tune: {method.name!r} is too long a name for trials; shorten it")
    return methods


def trial_config(config: Config, space: Space) -> Config:
    """The comparison of all trials, on dev."""
    typed = {load_with_variants(word, config.variants).name: word for word in config.methods}
    variants = {trial.name: {**spelt_out(typed[trial.method], config), **trial.settings} for trial in space.trials}
    return dataclasses.replace(
        config,
        split=SPLIT,
        methods=tuple(variants),
        variants={**config.variants, **variants},
        control=None,
        every_round=False,
        tuning={},
    )


def check_dev(inputs: Inputs) -> list[str]:
    """Raise UserError unless every task has a dev split of its own, with scores on a scale that has two ends.

    A test item would be an answer sheet: settings that were chosen on it are not measured by it. Published splits repeat a
    question now and then (SciTLDR one of 619): that is noted.
    """
    notes = []
    for given in inputs.tasks:
        name, count = given.task.name, len(given.items)
        if not given.items:
            raise UserError(
                f"tune: task {name} has no items in its {SPLIT} split ({given.task.summary}); leave it out of --tasks"
            )
        if given.task.worst is None or given.task.best == given.task.worst:
            raise UserError(f"tune: task {name} has no scale from worst to best, which the objective needs")
        reported = {_question(item) for item in given.task.items("test", inputs.data_dir)}
        shared = sum(_question(item) in reported for item in given.items)
        if shared > MOST_REPEATED * count:
            raise UserError(f"tune: {shared} of {count} {SPLIT} items of task {name} are test items; tuning never sees test")
        notes += [f"{shared} of {count} {SPLIT} items of task {name} also stand in its test split"] if shared else []
    return notes


def _question(item: Item) -> str:
    """Digest of what is asked, whatever it is called."""
    return digest([item.turns, item.history, item.opening, [[given.context, given.text] for given in item.continuations]])


def judge(space: Space, results: Sequence[CellResult], failures: Sequence[CellFailure]) -> list[Tuned]:
    """The trials of each method with their objectives, and which one is chosen.

    Args:
        space: what was tried.
        results: of the cells of all trials; others are left out, and so is the held-out loss.
        failures: the cells without a result.
    """
    return [_judge_method(method, space, results, failures) for method in space.grids]


def _judge_method(method: str, space: Space, results: Sequence[CellResult], failures: Sequence[CellFailure]) -> Tuned:
    trials = [trial for trial in space.trials if trial.method == method]
    tables = {trial: normalised([each for each in results if each.method == trial.name]) for trial in trials}
    reasons = {trial: [each.reason for each in failures if each.method == trial.name] for trial in trials}
    scores = {trial: objective(list(tables[trial].values())) for trial in trials if tables[trial] and not reasons[trial]}
    scores = {trial: score for trial, score in scores.items() if not math.isnan(score.estimate)}
    # max takes the first of equal ones; sums in another order must not decide
    chosen = max(scores, key=lambda trial: round(scores[trial].estimate, 12)) if scores else None
    tried = []
    for trial in trials:
        compared = trial in scores and chosen is not None and trial is not chosen
        own = [each for each in results if each.method == trial.name]
        failure = "; ".join(dict.fromkeys(reasons[trial])) or ("" if trial in scores else "no task has a scored item")
        tried.append(
            Tried(
                trial,
                scores.get(trial),
                {task: float(np.nanmean(table)) for task, table in tables[trial].items() if not np.isnan(table).all()},
                _difference(tables[trial], tables[chosen]) if compared and chosen is not None else None,
                sum(int(np.isnan(table).sum()) for table in tables[trial].values()),
                failure,
                _cost(own),
            )
        )
    return Tuned(method, tuple(tried), chosen, tuple(edge_warnings(method, space.grids[method], chosen)))


def normalised(results: Sequence[CellResult]) -> dict[str, Array]:
    """Task → (score − worst) / (best − worst) of each item, (seeds, items), NaN where unscored. No held-out loss."""
    tables: dict[str, list[Array]] = {}
    for result in sorted(results, key=lambda each: (each.task, each.seed)):
        if result.task != held_out.NAME and result.worst is not None:
            scores = [math.nan if item.score is None else item.score for item in sorted(result.items, key=lambda item: item.id)]
            row = (np.array(scores, dtype=np.float64) - result.worst) / (result.best - result.worst)
            tables.setdefault(result.task, []).append(row)
    return {task: np.stack(rows) for task, rows in tables.items()}


def objective(tables: Sequence[Array], bounds: Bounds = (0.0, 1.0)) -> Interval:
    """Mean over tasks of the mean over seeds and items, with a t interval: items are drawn within tasks, tasks are given.

    The variance of the mean of T tasks is Σ s²(item means of seeds) / n / T², and with several seeds s²(objectives of seeds) / S
    more, which counts the noise of single answers twice and is slightly conservative; t has the Welch–Satterthwaite degrees of
    freedom. An item that a seed did not score counts for no seed.

    Args:
        tables: normalised scores of each task, (seeds, items), the same seeds in all.
        bounds: ends of the scale.
    """
    complete = [table[:, ~np.isnan(table).any(axis=0)] for table in tables]
    if not complete or min(table.shape[1] for table in complete) == 0:
        return bound_without_spread(math.nan, 0, bounds)
    count = len(complete)
    by_seed = np.mean([table.mean(axis=1) for table in complete], axis=0)  # (seeds,)
    estimate = float(by_seed.mean())
    items = [table.mean(axis=0) for table in complete]  # (items,) each
    parts = [(float(each.var(ddof=1)) / len(each) / count**2, len(each) - 1) for each in items if len(each) > 1]
    parts += [(float(by_seed.var(ddof=1)) / len(by_seed), len(by_seed) - 1)] if len(by_seed) > 1 else []
    variance = sum(part for part, _ in parts)
    if variance <= 1e-24:
        return bound_without_spread(estimate, min(len(each) for each in items), bounds)
    df = variance**2 / sum(part**2 / freedom for part, freedom in parts if part > 0)
    half = float(stdtrit(df, (1 + LEVEL) / 2)) * math.sqrt(variance)
    name = "t over items within tasks" + (" and over seeds" if len(by_seed) > 1 else "")
    return Interval(estimate, max(estimate - half, bounds[0]), min(estimate + half, bounds[1]), name, LEVEL)


def _difference(tables: Mapping[str, Array], chosen: Mapping[str, Array]) -> Interval:
    """Of two trials' objectives, paired by item and seed."""
    return objective([table - chosen[task] for task, table in tables.items()], (-1.0, 1.0))


def _cost(results: Sequence[CellResult]) -> dict[str, float]:
    """A run's cost is in the result of each of its tasks: each seed counts once."""
    seeds = {result.seed: result.cost for result in results}
    keys = sorted({key for cost in seeds.values() for key in cost})
    return {key: sum(cost.get(key, 0) for cost in seeds.values()) for key in keys}


def edge_warnings(method: str, grid: Grid, chosen: Trial | None) -> list[str]:
    """Settings whose chosen value is the smallest or largest of the space: the best one may lie outside."""
    if chosen is None:
        return [f"{method}: every trial failed; nothing is chosen"]
    found = []
    for key, values in grid.items():
        numbers = sorted(value for value in values if isinstance(value, int | float))
        if len(numbers) > 1 and chosen.settings[key] in (numbers[0], numbers[-1]):
            which = "smallest" if chosen.settings[key] == numbers[0] else "largest"
            found.append(
                f"{method}: best is at the edge of the space: {key} {chosen.settings[key]:g} is the {which} tried; widen it "
                "with --space"
            )
    return found


def record(space: Space, tuned: Sequence[Tuned], inputs: Inputs, results: Sequence[CellResult]) -> dict[str, Any]:
    """What tuning.json holds. No path, no date."""
    suites = {json.dumps(result.provenance.get("suite"), sort_keys=True) for result in results}
    return {
        "schema_version": 1,
        "suite": [json.loads(each) for each in sorted(suites)],
        **_protocol(space, inputs),
        "model": {"name": inputs.model.name, "weights_sha256": inputs.model.weights_sha256},
        "demonstrations": {"sha256": inputs.demonstrations.content, **inputs.demonstrations.counts},
        "notes": check_dev(inputs),
        "space": space.as_dict(),
        "methods": {each.method: _tuned_record(each) for each in tuned},
    }


def _protocol(space: Space, inputs: Inputs) -> dict[str, Any]:
    """How settings were chosen, the same for every method."""
    return {
        "split": SPLIT,
        "objective": OBJECTIVE,
        "trials": space.budget,
        "seeds": list(inputs.config.seeds),
        "space_sha256": space.sha256,
        "tasks": {given.task.name: {"items": len(given.items), "sha256": given.content} for given in inputs.tasks},
    }


def _tuned_record(tuned: Tuned) -> dict[str, Any]:
    chosen = None if tuned.chosen is None else {"trial": tuned.chosen.number, "settings": dict(tuned.chosen.settings)}
    return {"chosen": chosen, "warnings": list(tuned.warnings), "trials": [_trial_record(each) for each in tuned.tried]}


def _trial_record(tried: Tried) -> dict[str, Any]:
    return {
        "trial": tried.trial.number,
        "name": tried.trial.name,
        "settings": dict(tried.trial.settings),
        "score": _interval(tried.score),
        "tasks": dict(tried.by_task),
        "difference_to_chosen": _interval(tried.from_chosen),
        "unscored": tried.unscored,
        "failure": tried.failure,
        "cost": dict(tried.cost),
    }


def _interval(found: Interval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    ends = {key: value if math.isfinite(value) else None for key, value in (("low", found.low), ("high", found.high))}
    return {"estimate": found.estimate, **ends, "method": found.method, "level": found.level}


def prepare(config: Config, path: str | None, trials: int | None) -> tuple[Space, Plan]:
    """What will be tried, and the comparison that tries it; everything that can be wrong is found here.

    Args:
        config: of the command: methods to tune, tasks, seeds.
        path: of the space file; None for the default space.
        trials: of each method; None as in `read_space`.
    """
    space = read_space(path, tuned_methods(config), trials)
    inputs = read_inputs(trial_config(config, space))
    check_dev(inputs)
    return space, Planner(inputs).plan()


def conclude(
    config: Config, space: Space, inputs: Inputs, results: Sequence[CellResult], failures: Sequence[CellFailure]
) -> dict[str, Any]:
    """Choose, and write tuning.json, tuning.md and (unless every trial failed) tuned.yaml below --out.

    Returns:
        What tuning.json holds.
    """
    tuned, out = judge(space, results, failures), Path(config.out)
    found = record(space, tuned, inputs, results)
    write_atomically(out / "tuning.json", json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(out / "tuning.md", tuning_markdown(found))
    if any(each.chosen for each in tuned):
        chosen = yaml.safe_dump(recipe(config, space, tuned, inputs), sort_keys=False, allow_unicode=True)
        write_atomically(out / "tuned.yaml", chosen)
    else:
        (out / "tuned.yaml").unlink(missing_ok=True)  # of another tuning
    return found


NOT_TUNED = ("split", "out", "seeds", "limit", "data_dir", "control", "tuning", "methods", "set", "every_round", "trackers")
"""Fields of the tuning's configuration that the recipe of the chosen settings leaves to the comparison, or sets itself."""


def recipe(config: Config, space: Space, tuned: Sequence[Tuned], inputs: Inputs) -> dict[str, Any]:
    """A recipe with the chosen settings, for `compare --recipe`; methods of which every trial failed are left out.

    Args:
        config: of the command, without trials.
    """
    typed = {load_with_variants(word, config.variants).name: word for word in config.methods}
    chosen = {each.method: dict(each.chosen.settings) for each in tuned if each.chosen is not None}
    asked, defaults = config.as_dict(), Config().as_dict()
    kept = {key: value for key, value in asked.items() if key not in NOT_TUNED and value != defaults[key]}
    settings = {name: dict(values) for name, values in config.set.items()}
    for name, values in chosen.items():
        # what was typed wins over the name (inputs.py), so the choice goes there
        settings[typed[name]] = {**settings.get(typed[name], {}), **values}
    methods = {name: {"settings": values} for name, values in chosen.items()}
    return {
        "model": config.model,
        **kept,
        "methods": [typed[name] for name in chosen],
        "set": settings,
        "tuning": {**_protocol(space, inputs), "methods": methods},
    }
