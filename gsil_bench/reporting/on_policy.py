"""What methods show that learn from their own samples: reward, distance from the reference, and scores on the way.

A reward stands for what is wanted and is not it. So the reward at each step is laid beside the scores of those policies of the
run that have a row: the policy that the samples start from, if it has one, that of each round (`--every-round`), and the last.
Which row is which policy is decided by the digests of its weights, not by its name.

How well a reward model or a discriminator tells answers apart stands here too: nothing that it misses can be learned from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from gsil_bench.records import CellResult
from gsil_bench.reporting.comparison import Column
from gsil_bench.reporting.plots import Line, Panel, Strip
from gsil_bench.reporting.run_data import Curve, method_of, weights_of
from gsil_bench.reporting.wording import one_line, value_text

MORE_ROUNDS = 4
"""What is proposed to a method of one round."""


@dataclass(frozen=True)
class Scored:
    """A policy of the run that has a row of its own, on one task."""

    rounds: int
    """Of the method's own that were done; 0 is the policy that its samples start from."""
    step: float
    """Training steps done, those of the method that it starts from included."""
    seed: int
    score: float
    """Mean over the scored items, in the task's units."""


@dataclass(frozen=True)
class Trace:
    """One method over its steps."""

    method: str
    curves: Mapping[int, Curve]
    """By seed. A seed that failed has those of its rounds that were done."""
    rounds: int
    """Of the protocol, done or not."""
    before: int
    """Rounds of the method that it starts from."""
    starts_from: str
    scores: Mapping[str, tuple[Scored, ...]]
    """By task; by rounds and seed within."""
    caveat: str
    """Why rewards, or distances, of different steps may not be compared; "" if they may."""

    def line(self, quantity: str, seed: int) -> Line:
        """A seed's values of one quantity of the metrics, at the steps that have it."""
        curve = self.curves[seed]
        rows = [row for row in curve.rows if isinstance(row.get(quantity), int | float)]
        return self._line({row["step"]: row[quantity] for row in rows})

    def mean(self, quantity: str, seeds: Sequence[int] = ()) -> Line:
        """Means over the seeds that have a step."""
        found: dict[float, list[float]] = {}
        for seed in seeds or self.curves:
            line = self.line(quantity, seed)
            for step, value in zip(line.steps, line.values, strict=True):
                found.setdefault(step, []).append(value)
        return self._line({step: _mean(found[step]) for step in sorted(found)})

    def _line(self, values: Mapping[float, float]) -> Line:
        steps = tuple(values)
        firsts = [next((at for at, step in enumerate(steps) if step > end), 0) for end in self.ends[:-1]]
        return Line(self.method, steps, tuple(values.values()), tuple(at for at in dict.fromkeys(firsts) if at))

    @cached_property
    def ends(self) -> tuple[float, ...]:
        """Steps done after each round, those of the method that it starts from first."""
        return max((curve.ends for curve in self.curves.values()), key=len)

    @property
    def start(self) -> float:
        """Steps of the method that it starts from."""
        return self.ends[self.before - 1] if self.before else 0.0

    def change(self, task: str) -> list[tuple[float, float]]:
        """(step, mean score) of the first and of the last policy that has a row, over the seeds that have both; one pair if they
        are the same, none without a row.
        """
        found = self.scores.get(task, ())
        last = max((each.rounds for each in found), default=0)
        seeds = {each.seed for each in found if each.rounds == last}
        kept = [each for each in found if each.seed in seeds]
        counted = sorted({each.rounds for each in kept if {other.seed for other in kept if other.rounds == each.rounds} == seeds})
        ends = dict.fromkeys((counted[0], counted[-1])) if counted else {}
        groups = [[each for each in kept if each.rounds == rounds] for rounds in ends]
        return [(group[0].step, _mean([each.score for each in group])) for group in groups]

    def seeds(self, task: str) -> list[int]:
        """Those that got furthest: what is said of the task is said of them."""
        found = self.scores.get(task, ())
        last = max((each.rounds for each in found), default=0)
        return sorted({each.seed for each in found if each.rounds == last}) or sorted(self.curves)


def traces(results: Sequence[CellResult], curves: Sequence[Curve]) -> list[Trace]:
    """One of each method that samples from the policy it trains, in the results' order."""
    drawn = {(curve.method, curve.seed): curve for curve in curves}
    runs: dict[str, dict[int, tuple[CellResult, Curve]]] = {}
    for result in results:
        curve = drawn.get((result.method, result.seed))
        if result.record.get("rollouts") and curve is not None and any("reward" in row for row in curve.rows):
            runs.setdefault(method_of(result), {}).setdefault(result.seed, (result, curve))
    return [_trace(method, seeds, results) for method, seeds in runs.items()]


def _trace(method: str, runs: Mapping[int, tuple[CellResult, Curve]], results: Sequence[CellResult]) -> Trace:
    first, _ = next(iter(runs.values()))
    before, scores = _before(first), dict[str, dict[tuple[int, int], Scored]]()
    for seed, (run, curve) in runs.items():
        weights = weights_of(run)
        for row in results:
            done = weights_of(row)
            points = [item.score for item in row.items if item.score is not None]
            if done == weights[: len(done)] and len(done) >= before and points:
                step = curve.ends[len(done) - 1] if done else 0.0
                point = Scored(len(done) - before, step, seed, _mean(points))
                scores.setdefault(row.task, {}).setdefault((point.rounds, seed), point)
    ordered = {task: tuple(found[key] for key in sorted(found)) for task, found in scores.items()}
    by_seed = {seed: curve for seed, (_, curve) in runs.items()}
    rounds = int(first.record["protocol"]["rounds"])
    return Trace(method, by_seed, rounds, before, str(first.record.get("starts_from", "")), ordered, _caveat(first.record))


def _before(result: CellResult) -> int:
    """Rounds of the method that it starts from: what is trained besides its own."""
    own = int(result.record.get("after_round") or result.record["protocol"]["rounds"])
    return max(0, len(weights_of(result)) - own)


def _caveat(record: Mapping[str, Any]) -> str:
    critic, several = record["rollouts"].get("critic"), record["protocol"]["rounds"] > 1
    found = []
    if critic and critic["alongside"]:
        found.append("its discriminator learns on, so rewards of different steps are not on one scale")
    elif critic and several:
        found.append("each round has a reward model of its own, so rewards of different rounds are not on one scale")
    if several and record["protocol"].get("opponent") == "previous":
        found.append("its reference is the policy of the round before, so each round starts at a KL of 0")
    return "; ".join(found)


def sentence(trace: Trace, column: Column) -> str:
    """How reward and score changed from their first to their last point: numbers, no verdict."""
    seeds = trace.seeds(column.task)
    lines = [trace.line("reward", seed) for seed in seeds]
    first, last = _ends([line.values for line in lines])
    count = max(len(line.values) for line in lines)
    distance = _ends([trace.line("kl", seed).values for seed in seeds])
    parts = [
        f"reward {first:.3g} → {last:.3g} ({last - first:+.3g}; first and last tenth of {count} step{'s' * (count > 1)})",
        _score_part(trace, column),
        f"KL from the reference {distance[1]:.3g} nats per answer at the end" if distance[1] == distance[1] else "",
        f"{'seed' if len(seeds) == 1 else 'means over seeds'} {', '.join(map(str, seeds))}",
    ]
    said = "; ".join(part for part in parts if part)
    return f"{one_line(trace.method)} on {one_line(column.task)}: {said}.{hint(trace, column.task)}"


def _score_part(trace: Trace, column: Column) -> str:
    change, lower = trace.change(column.task), "" if column.higher_is_better else " (lower is better)"
    metric = one_line(column.metric) + lower
    if not change:
        return f"no {metric or 'score'}"
    step, score = change[-1]
    if len(change) == 1:
        return f"{metric} {value_text(score, column.unit)} after {step:g} steps"
    start, before = change[0]
    difference = value_text(score - before, column.unit, signed=True)
    texts = f"{value_text(before, column.unit)} → {value_text(score, column.unit)}"
    return f"{metric} {texts} ({difference}; after {start:g} and after {step:g} steps)"


def hint(trace: Trace, task: str) -> str:
    """What would show more of the way between the ends; "" if there is a score on the way."""
    found = {each.rounds for each in trace.scores.get(task, ())}
    if not found or any(0 < rounds < trace.rounds for rounds in found):
        return ""
    flags = f"--set {one_line(trace.method)}.rounds={MORE_ROUNDS} " if trace.rounds == 1 else ""
    what = "Only its end is scored" if found == {trace.rounds} else "Only its ends are scored"
    return f" {what}; {flags}--every-round scores it on the way."


def strip(trace: Trace, column: Column) -> Strip:
    """Reward, score and KL above each other."""
    factor, unit = column.unit.factor, column.unit.of_score
    scored = trace.scores.get(column.task, ())
    label = f"{column.metric or 'score'}{f' in{unit}' if unit else ''}"
    return Strip(
        trace.method,
        (
            Panel("reward", _quantity_lines(trace, "reward"), trace.mean("reward")),
            Panel(label, tuple(_score_lines(trace, scored, factor)), _score_line(trace, scored, factor), points=True),
            Panel("KL (nats)", _quantity_lines(trace, "kl"), trace.mean("kl")),
        ),
        trace.ends,
        trace.start,
        trace.starts_from,
    )


def _quantity_lines(trace: Trace, quantity: str) -> tuple[Line, ...]:
    return tuple(trace.line(quantity, seed) for seed in trace.curves)


def _score_lines(trace: Trace, scored: Sequence[Scored], factor: float) -> Iterator[Line]:
    for seed in dict.fromkeys(each.seed for each in scored):
        yield _score_line(trace, [each for each in scored if each.seed == seed], factor)


def _score_line(trace: Trace, scored: Sequence[Scored], factor: float) -> Line:
    steps: dict[float, list[float]] = {}
    for each in scored:
        steps.setdefault(each.step, []).append(each.score * factor)
    return Line(trace.method, tuple(steps), tuple(map(_mean, steps.values())))


@dataclass(frozen=True)
class Told:
    """How well a critic tells one class of answers from those that are to score high."""

    method: str
    seed: int
    round: int
    critic: str
    """ "reward model": on prompts that were kept back, after its training. "discriminator": on the newest samples, before it
    learns from them."""
    against: str
    """The class; "all" are all of them."""
    answers: int | None
    """Of the class, those that were trained on included."""
    auc: float | None
    """Of a reward model, or of a discriminator in the last tenth of the round's samplings. None: no answer was kept back."""
    first_auc: float | None = None
    """Of a discriminator, in the first tenth."""
    missing: int = 0
    """Prompts without an answer of the class."""


def told_apart(results: Sequence[CellResult], curves: Sequence[Curve]) -> list[Told]:
    """A row for each method, seed, round and class."""
    rows = list[Told]()
    runs = {(result.method, result.seed): result for result in results}
    for curve in curves:
        result = runs.get((curve.method, curve.seed))
        if result is not None and result.record.get("rollouts"):
            before, name = _before(result), method_of(result)
            for index, made in enumerate(result.provenance["rounds"][before:]):
                rows += _of_reward_model(name, curve.seed, index + 1, made.get("reward_model") or {})
                rows += _of_discriminator(name, curve, before + index, index + 1)
    return rows


def _of_reward_model(method: str, seed: int, number: int, facts: Mapping[str, Any]) -> Iterator[Told]:
    aucs, missing = facts.get("auc", {}), facts.get("missing", {})
    counts = facts.get("classes", {})
    for name in dict.fromkeys((*counts, *missing, *aucs)):
        answers = sum(counts.values()) if name == "all" and name not in counts else counts.get(name, 0)
        yield Told(method, seed, number, "reward model", name, answers, aucs.get(name), missing=missing.get(name, 0))


def _of_discriminator(method: str, curve: Curve, index: int, number: int) -> Iterator[Told]:
    """The AUC of the samplings in a round; a sampling that served several steps counts as often."""
    start, end = (curve.ends[index - 1] if index else 0.0), curve.ends[index]
    values = [row["discriminator_auc"] for row in curve.rows if start < row["step"] <= end and "discriminator_auc" in row]
    if values:
        first, last = _ends([values])
        yield Told(method, curve.seed, number, "discriminator", "samples of the policy", None, last, first)


def record(found: Sequence[Trace], told: Sequence[Told]) -> dict[str, Any]:
    """All of it as JSON."""
    return {
        "methods": [
            {
                "method": trace.method,
                "starts_from": trace.starts_from,
                "steps_of_start": trace.start,
                "steps_after_rounds": list(trace.ends),
                "caveat": trace.caveat,
                "steps": [
                    {"seed": seed, **{key: row[key] for key in ("step", "reward", "reward_std", "kl") if key in row}}
                    for seed, curve in trace.curves.items()
                    for row in curve.rows
                    if "reward" in row
                ],
                "scores": {task: [asdict(each) for each in points] for task, points in trace.scores.items()},
            }
            for trace in found
        ],
        "critics": [asdict(each) for each in told],
    }


def _ends(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Means of the first and of the last tenth of the values, one at least of each series; NaN without values."""
    sizes = [max(1, len(values) // 10) for values in series]
    first = [value for values, size in zip(series, sizes, strict=True) for value in values[:size]]
    last = [value for values, size in zip(series, sizes, strict=True) for value in values[-size:]]
    return (_mean(first), _mean(last)) if first else (float("nan"), float("nan"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
