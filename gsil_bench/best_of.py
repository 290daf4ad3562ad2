"""Best of N: how good the answers are that a reward chooses among samples of the policy that reinforcement learning starts from.

    gsil-bench best-of --methods afd-init-sft,afd-closed-form --tasks mini-gsm8k --n 1,2,4,8,16

No policy is trained on the reward, so what is seen is the reward's alone. Each method's reward ranks the same samples: the
largest N of --n for each item, at temperature 1, from the policy that the method starts from. Every sample has a task score. What
is reported for N is the expected score of the first-ranked of N samples, exactly: the mean over all subsets of N of them.

    P(the k-th of M ranked samples is the first of a random subset of N) = C(M − k, N − 1) / C(M, N)

Samples with equal rewards share their places: one of them is drawn. A reward that goes on rising with N while the score falls is
over-optimised. Beside the rewards stands what needs none:

    any sample           one at random, which is N = 1 of every row
    any distinct sample  one at random of the N, equal texts counting once: a reward that says nothing about quality. It is worse
                         than the row above where a good answer is drawn often and bad ones are all different
    the most likely      by log π of the policy itself
    greedy               the answer that the task asks for
    the best possible    by the task's own score: no reward can surpass it

A reward is that of a method's first round. It reads an answer's tokens as they were sampled, also what a task's stop texts cut
off, and scores of a critic as they are, without the bounds that reinforcement learning sets them (`score_clip`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln  # type: ignore[import-untyped, unused-ignore]
from scipy.stats import rankdata

from gsil_bench.config import Config, whole_number
from gsil_bench.errors import UserError
from gsil_bench.evaluation import answers, scoring
from gsil_bench.evaluation.statistics import Array, Bounds, Interval, score_interval, t_interval
from gsil_bench.generation.engine import Completion, Request
from gsil_bench.generation.likelihoods import Given
from gsil_bench.inputs import STARTING_MODEL, Inputs, TaskInput, read_inputs, resolve_methods
from gsil_bench.methods import Method, TokenLogProbs, baseline_methods, load_method
from gsil_bench.models.packing import TokenTree
from gsil_bench.plan import CANARIES, Cell, Plan, Planner, Stage
from gsil_bench.records import CellFailure, CellResult, ItemScore, canonical, digest, read_jsonl, write_atomically, write_jsonl
from gsil_bench.stages import FORWARD_TOKENS, Workspace
from gsil_bench.store import Artefact, Produced, Store
from gsil_bench.training.critics import load_critic, token_scores

FOLDER = "best-of"
"""Below --out: results of the cells, of which each item's score is that of the largest N. They share the store of --out."""
NUMBERS = "1,2,4,8,16"
SAMPLES, REWARDS = "samples.jsonl", "rewards.jsonl"
VERSION = 2
"""Of what the two stages here write."""
RANDOM, DISTINCT, LIKELY, GREEDY, BEST = "any sample", "any distinct sample", "the most likely", "greedy", "the best possible"
"""Rows without a reward."""


# What is chosen from.


def parse_numbers(text: str) -> tuple[int, ...]:
    """The Ns of --n, ascending.

    Raises:
        UserError: no whole numbers, one twice, or none above 1.
    """
    numbers = [whole_number(word.strip(), "--n") for word in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--n {text}: a number is there twice")
    if max(numbers) < 2:
        raise UserError(f"--n {text}: there is nothing to choose among fewer than 2 samples")
    return tuple(sorted(numbers))


def prepare(config: Config, numbers: Sequence[int]) -> Plan:
    """The comparison that samples, scores and rewards; everything that can be wrong is found here.

    Raises:
        UserError: a method without a reward, methods that start from different policies, a task that cannot be sampled.
    """
    config = dataclasses.replace(config, start=False, control=None, every_round=False)
    for method in resolve_methods(config):
        _check_reward(method)
    inputs = read_inputs(config)
    _check_tasks(inputs.tasks)
    bases = [inputs.bases.get(method.name) or load_method(STARTING_MODEL) for method in inputs.methods]
    _check_one_policy(inputs.methods, bases)
    sampled = dataclasses.replace(inputs, tasks=tuple(_sampled(given, max(numbers)) for given in inputs.tasks))
    return Plan(sampled, (*_greedy_cells(inputs, bases[0]), *_cells(sampled, bases[0])))


def _check_reward(method: Method) -> None:
    reason = _without_reward(method)
    if reason:
        known = [name for name in baseline_methods() if not _without_reward(load_method(name))]
        raise UserError(f"best-of: {method.name} {reason}; --methods takes those that have one: {', '.join(known)}")


def _without_reward(method: Method) -> str:
    """Why a method has no reward of a task's answers before its policy is trained, or ""."""
    rollouts = method.rollouts
    if rollouts is None:
        return "has no reward to choose by"
    if rollouts.critic is not None and rollouts.critic.alongside:
        return "learns its reward alongside its policy, so that there is none to choose by before"
    if "similarity" in rollouts.needs:
        return "is rewarded for likeness to a prompt's demonstration, and a task's items have none"
    return ""


def _check_tasks(tasks: Sequence[TaskInput]) -> None:
    """Raise UserError for a task that is not answered by one greedy answer to one turn."""
    refusals = {given.task.name: _refusal(given) for given in tasks}
    fine = ",".join(name for name, reason in refusals.items() if not reason)
    for name, reason in refusals.items():
        if reason:
            hint = f"name the others: --tasks {fine}" if fine else "name another: --tasks"
            raise UserError(f"best-of: task {name} {reason}; {hint}")


def _refusal(given: TaskInput) -> str:
    """Why a task is not sampled here, or ""."""
    if not given.items:
        return f"has no items ({given.task.summary})"
    if any(len(item.turns) != 1 for item in given.items):
        return "is not answered in one turn, and only whole conversations could be chosen"
    if given.task.protocol.temperature > 0 or any(item.temperature for item in given.items):
        return "is sampled already; its greedy form is asked here at temperature 1"
    return "" if dataclasses.is_dataclass(given.task) else "is no record whose protocol can be changed"


def _check_one_policy(methods: Sequence[Method], bases: Sequence[Method]) -> None:
    records = [(base.decides(), base.training) for base in bases]
    for method, record in zip(methods, records, strict=True):
        if record != records[0]:
            raise UserError(
                f"best-of: {methods[0].name} and {method.name} start from different policies and have other samples; "
                "run them apart"
            )


def _sampled(given: TaskInput, samples: int) -> TaskInput:
    """The task with so many samples of each item."""
    task: Any = given.task
    protocol = task.protocol
    name = f"{protocol.name}, {samples} samples"
    changed = dataclasses.replace(protocol, name=name, temperature=1.0, top_p=1.0, samples=samples)
    return TaskInput(dataclasses.replace(task, protocol=changed), given.items)


def _greedy_cells(inputs: Inputs, base: Method) -> list[Cell]:
    """The policy's answers as the task asks for them."""
    names = [given.task.name for given in inputs.tasks]
    return [cell for cell in Planner(dataclasses.replace(inputs, methods=(base,))).plan().cells if cell.task in names]


def _cells(inputs: Inputs, base: Method) -> list[Cell]:
    """A cell for each method, seed and task: the samples that its reward chooses."""
    planner = Planner(dataclasses.replace(inputs, methods=(base,)))
    sampled = {(cell.policy.key, cell.task): cell for cell in planner.plan().cells}
    cells = []
    for method, seed in itertools.product(inputs.methods, inputs.config.seeds):
        trained = planner.training(base, seed)
        policy = trained[-1] if trained else planner.start
        needs = _reward_needs(planner, method, policy, seed)
        for given in inputs.tasks:
            cell = sampled[policy.key, given.task.name]
            chosen = _ranking(method, needs, _samples(cell, given), given, seed)
            cells.append(dataclasses.replace(cell, method=method, seed=seed, scores=chosen))
    return cells


def _reward_needs(planner: Planner, method: Method, policy: Stage, seed: int) -> dict[str, Stage]:
    """What a reward reads besides the samples; the same stages as in a comparison."""
    rollouts = method.rollouts
    assert rollouts is not None, f"{method.name} has no reward"
    needs = {"policy": policy}
    if "initial" in rollouts.needs:
        needs["initial"] = planner.start
    if rollouts.critic is not None:
        needs["critic"] = planner.reward_model(method, rollouts.critic, policy, seed, 0)
    return needs


def _samples(cell: Cell, given: TaskInput) -> Stage:
    """The task's score of every sample; `cell` is the policy's cell on the sampled task."""
    plain, samples = cell.scores.needs["answers"], given.task.protocol.samples
    asked = dataclasses.replace(plain, label=f"{plain.label}, {samples} samples each")
    label = f"score {cell.scores.label.removeprefix('score ')}, sample by sample"
    inputs = {**asked.inputs, **cell.scores.inputs, "of": "every sample", "best_of": VERSION}
    needs = {"answers": asked, "policy": cell.policy, CANARIES: cell.scores.needs[CANARIES]}
    return Stage("scores", label, inputs, needs, partial(score_samples, task=given), units=asked.units)


def _ranking(method: Method, needs: Mapping[str, Stage], samples: Stage, given: TaskInput, seed: int) -> Stage:
    """The method's reward of every sample."""
    label = f"reward {given.task.name} by {method.name}, seed {seed}"
    decides = method.decides()
    inputs = {
        **samples.inputs,
        "of": "rewards",
        "best_of": VERSION,
        "reward": {key: decides["rollouts"][key] for key in ("reward", "settings", "needs")},
        "source_sha256": decides["source_sha256"],
        "best": [given.task.best, given.task.worst],
    }
    run = partial(reward_samples, method=method)
    wanted = {"samples": samples, CANARIES: samples.needs[CANARIES], **needs}
    return Stage("scores", label, inputs, wanted, run, units=len(given.items) * given.task.protocol.samples)


# The stages.


@dataclass(frozen=True)
class Sample:
    """One of an item's samples."""

    id: str
    """Of the item."""
    sample: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    finished: bool
    """It ended by itself."""
    logp: float
    """log π(answer) of the policy that drew it."""
    score: float | None
    """None: unscored, and the reason says why."""
    reason: str
    group: str = ""


def score_samples(work: Workspace, task: TaskInput) -> Produced:
    """The task's score of every sample, and its log-prob under the policy that drew it."""
    resources, model = work.resources, work.resources.inputs.model
    asked: list[tuple[Request, Completion]] = []

    def complete(requests: Sequence[Request]) -> list[Completion]:
        completions = resources.complete(work.needs["policy"], requests)
        asked.extend(zip(requests, completions, strict=True))
        return completions

    length = model.context_length
    asking = answers.Asked(complete, model.chat, length, length + resources.inputs.engine.in_process)
    given = answers.answer(asking, task.items, task.task.protocol)
    if len(given) != len(asked):
        raise UserError(f"{task.task.name}: {next(answer.error for answer in given if answer.error)}")
    items = {item.id: item for item in task.items}
    sound = [answer for answer in given if not answer.error]
    found = task.task.score([items[answer.id] for answer in sound], [answer.texts for answer in sound], resources.scoring)
    scored = iter(found)
    drawn = [(request.prompt_ids, completion) for request, completion in asked]
    logps = iter(_logps(work, work.needs["policy"], [(prompt, one.tokens) for prompt, one in drawn if one.tokens]))
    samples = []
    for answer, (prompt, completion) in zip(given, drawn, strict=True):
        score = next(scored) if not answer.error else None
        logp = math.fsum(next(logps)) if completion.tokens else 0.0
        value, reason = (score.value, score.reason) if score is not None else (None, answer.error)
        end = completion.finish_reason == "stop"
        group = items[answer.id].group
        samples.append(Sample(answer.id, answer.sample, prompt, completion.tokens, end, logp, value, reason, group))
    write_jsonl(work.folder / SAMPLES, samples)
    return Produced({"counts": {"answers": len(samples)}, "unscored": sum(one.score is None for one in samples)})


def _logps(
    work: Workspace, policy: Artefact, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[float, ...]]:
    """Log-probs of every token of answers to prompts, from the store of answers where they are known."""
    found = work.resources.complete(policy, [Given.after(prompt, tokens) for prompt, tokens in texts])
    return [completion.logps or () for completion in found]


def read_samples(folder: Path) -> list[Sample]:
    """What `score_samples` wrote."""
    records = read_jsonl(folder / SAMPLES)
    return [Sample(**{**each, "prompt": tuple(each["prompt"]), "tokens": tuple(each["tokens"])}) for each in records]


def reward_samples(work: Workspace, method: Method) -> Produced:
    """A method's reward of every sample; the item's score is that of the best of all its samples."""
    samples = read_samples(work.needs["samples"].folder)
    read = [sample for sample in samples if sample.tokens]
    rewards = dict(zip([(each.id, each.sample) for each in read], _rewards(work, method, read), strict=True))
    records = [
        {
            "id": each.id,
            "score": each.score,
            "logp": each.logp,
            "length": len(each.tokens),
            "text": digest(each.tokens)[:16],
            "reward": rewards.get((each.id, each.sample)),
        }
        for each in samples
    ]
    write_atomically(work.folder / REWARDS, "".join(canonical(record) + "\n" for record in records))
    names = list(dict.fromkeys(each.id for each in samples))
    of_item = {name: [each for each in samples if each.id == name] for name in names}
    scores = [_chosen(of_item[name], [rewards.get((name, each.sample)) for each in of_item[name]]) for name in names]
    write_jsonl(work.folder / scoring.FILE, scores)
    return Produced({"counts": {"answers": len(samples)}, "unscored": sum(score.score is None for score in scores)})


def _chosen(samples: Sequence[Sample], rewards: Sequence[float | None]) -> ItemScore:
    """An item's score: what the best-rewarded of its samples has; unscored if one of them is."""
    first = samples[0]
    scores, known = [each.score for each in samples if each.score is not None], [each for each in rewards if each is not None]
    if len(scores) < len(samples) or len(known) < len(samples):
        reason = next((each.reason for each in samples if each.score is None), "a sample is empty")
        return ItemScore(first.id, None, reason, first.group)
    value = float(expected_best(np.array([scores]), np.array([known]), len(samples))[0])
    return ItemScore(first.id, value, f"best of {len(samples)} by reward: {max(known):.4g}", first.group)


def _rewards(work: Workspace, method: Method, samples: Sequence[Sample]) -> list[float]:
    """The reward of each sample's tokens, summed.

    Raises:
        UserError: a reward that is not finite, as of one that reads what only training knows.
    """
    rollouts, texts = method.rollouts, [(each.prompt, each.tokens) for each in samples]
    assert rollouts is not None, f"{method.name} has no reward"
    counts = torch.tensor([len(each.tokens) for each in samples])
    logps = torch.tensor([logp for one in _logps(work, work.needs["policy"], texts) for logp in one])
    finished = torch.tensor([float(each.finished) for each in samples]).repeat_interleave(counts)
    more = {"sampled_logps": logps, "reference_logps": logps, "finished": finished}
    if "initial" in work.needs:
        more["initial_logps"] = torch.tensor([logp for one in _logps(work, work.needs["initial"], texts) for logp in one])
    if "critic" in work.needs:
        more["scores"] = torch.cat(_scores(work, texts))
    pair = torch.arange(len(samples)).repeat_interleave(counts)
    position = torch.arange(len(logps)) - (counts.cumsum(0) - counts)[pair]
    unknown = torch.full_like(logps, math.nan)
    view = TokenLogProbs(logps, unknown, pair, position, counts[pair], len(samples), int(counts.max()), more)
    rewards = view.sum(rollouts.reward(view, **rollouts.settings))
    bad = [each.id for each, fine in zip(samples, rewards.isfinite().tolist(), strict=True) if not fine]
    if bad:
        raise UserError(
            f"the reward of {method.name} is not finite for {len(bad)} of {len(samples)} samples (item {bad[0]}): "
            "it diverged, or it reads what only training knows"
        )
    return [float(reward) for reward in rewards]


def _scores(work: Workspace, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[torch.Tensor]:
    """The critic's scores after every token of every answer. Samples of one item follow each other and share its prompt."""
    resources, model = work.resources, work.resources.inputs.model
    resources.release()
    critic = load_critic(work.needs["critic"].folder, model.device, model.dtype, model.autocast)
    groups = itertools.groupby(texts, key=lambda text: text[0])
    trees = [TokenTree(prompt, tuple(tokens for _, tokens in members)) for prompt, members in groups]
    return token_scores(critic, trees, FORWARD_TOKENS)


# The mathematics.


def chances(samples: int, n: int) -> Array:
    """Probability that the k-th of the ranked samples is the first of a random subset of n, k = 1, 2, …; (samples,)."""
    if not 1 <= n <= samples:
        raise ValueError(f"a subset of {n} among {samples} samples")
    below = samples - np.arange(1, samples + 1)  # how many rank below the k-th
    with np.errstate(invalid="ignore"):
        logs = _log_choose(below, n - 1) - _log_choose(np.array([samples]), n)
    return np.where(below >= n - 1, np.exp(logs), 0.0)


def _log_choose(of: NDArray[Any], k: int) -> Array:
    """log C(of, k); NaN where k > of."""
    return np.where(of >= k, gammaln(of + 1.0) - gammaln(k + 1.0) - gammaln(np.maximum(of - k, 0) + 1.0), math.nan)


def expected_best(values: Array, rewards: Array, n: int) -> Array:
    """Expected value of the best-rewarded of n samples without replacement; samples with equal rewards are drawn among.

    Args:
        values: what the samples are worth, (items, samples).
        rewards: what they are ranked by, higher first, (items, samples).

    Returns:
        (items,)
    """
    weights = chances(values.shape[1], n)
    return np.array([float(_shared(row, weights) @ mine) for row, mine in zip(rewards, values, strict=True)])


def _shared(rewards: Array, weights: Array) -> Array:
    """The chance of each sample, (samples,): equal ones have the mean chance of the places that they take together."""
    _, group, counts = np.unique(-rewards, return_inverse=True, return_counts=True)  # the best is group 0
    ends = np.cumsum(counts)
    sums = np.concatenate(([0.0], np.cumsum(weights)))
    means = (sums[ends] - sums[ends - counts]) / counts
    return np.asarray(means[group], dtype=np.float64)


def chances_of_distinct(sizes: Sequence[int], n: int) -> Array:
    """Probability that a group of equal samples holds the first of a random subset of n, where the groups are ranked at random.

    A group of c is first if those before it are absent, t samples in k groups: in C(M − t, n) − C(M − t − c, n) of the C(M, n)
    subsets. All orders of the G groups are equally likely: a set of k is before it in a share 1 / (G · C(G − 1, k)) of them.

    Args:
        sizes: of the groups.
        n: of the subset.

    Returns:
        (groups,)
    """
    samples, count = sum(sizes), len(sizes)
    absent = np.array([math.comb(samples - t, n) / math.comb(samples, n) for t in range(samples + 1)])
    orders = np.array([1 / (count * math.comb(count - 1, k)) for k in range(count)])
    found = dict.fromkeys(sizes, 0.0)
    for size in found:
        others = list(sizes)
        others.remove(size)
        sets = np.zeros((count, samples + 1))  # how many sets of k other groups have t samples
        sets[0, 0] = 1
        for other in others:
            sets[1:, other:] += sets[:-1, :-other].copy()
        gone = np.append(absent[size:], np.zeros(size))
        found[size] = float(orders @ sets @ (absent - gone))
    return np.array([found[size] for size in sizes])


def expected_distinct(values: Array, texts: Sequence[Sequence[str]], n: int) -> Array:
    """Expected value of one at random of the distinct texts among n samples without replacement.

    Args:
        values: (items, samples)
        texts: what makes samples equal, likewise.

    Returns:
        (items,)
    """
    found = []
    for row, mine in zip(values, texts, strict=True):
        groups = {text: [value for value, other in zip(row, mine, strict=True) if other == text] for text in dict.fromkeys(mine)}
        weights = chances_of_distinct([len(group) for group in groups.values()], n)
        found.append(sum(weight * sum(group) / len(group) for weight, group in zip(weights, groups.values(), strict=True)))
    return np.array(found)


def spearman_within(first: Array, second: Array) -> Array:
    """Spearman's rank correlation of an item's samples, ties at mean ranks; NaN where either side is all equal.

    Args:
        first: (items, samples)
        second: (items, samples)

    Returns:
        (items,)
    """
    ranks = [rankdata(side, axis=1) - (side.shape[1] + 1) / 2 for side in (first, second)]
    norms = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    with np.errstate(invalid="ignore"):
        return np.asarray((ranks[0] * ranks[1]).sum(axis=1) / np.where(norms > 0, norms, math.nan), dtype=np.float64)


def divergence(n: int) -> float:
    """Upper bound of KL(best of n ‖ the policy), in nats: log n − (n − 1) / n, reached where no two samples rank equal."""
    return math.log(n) - (n - 1) / n


# What came out.


@dataclass(frozen=True)
class Drawn:
    """A task's samples, of those items that are scored under every seed."""

    items: tuple[str, ...]
    scores: Array
    """(seeds, items, samples)"""
    logps: Array
    lengths: Array
    texts: Sequence[Sequence[Sequence[str]]]
    """Digests, seed by seed and item by item."""
    left_out: int
    """Items with a sample that is unscored or empty."""
    rewards: Mapping[str, Array]
    """Method → (seeds, items, samples)"""


def conclude(
    plan: Plan, results: Sequence[CellResult], failures: Sequence[CellFailure], numbers: Sequence[int]
) -> dict[str, Any]:
    """What best_of.json holds. No path, no date; what failed is named, and its row left out.

    Args:
        plan: of `prepare`.
        results: of its cells.
        failures: likewise.
        numbers: the Ns.
    """
    inputs, store = plan.inputs, Store(Path(plan.inputs.config.out) / "store")
    known = {(result.method, result.task, result.seed): result for result in results}
    names = [method.name for method in inputs.methods]
    greedy = next(cell.method.name for cell in plan.cells if cell.method.name not in names)
    tasks = {}
    for given in inputs.tasks:
        done = [name for name in names if all((name, given.task.name, seed) in known for seed in inputs.config.seeds)]
        if done:
            drawn = _drawn(store, {name: [known[name, given.task.name, seed] for seed in inputs.config.seeds] for name in done})
            plain = [known[key] for key in known if key[:2] == (greedy, given.task.name)]
            tasks[given.task.name] = task_record(given, drawn, plain, numbers)
    return {
        "schema_version": 1,
        "n": list(numbers),
        "samples": max(numbers),
        "kl": {str(n): divergence(n) for n in numbers},
        "policy": greedy,
        "split": inputs.config.split,
        "seeds": list(inputs.config.seeds),
        "model": {"name": inputs.model.name, "weights_sha256": inputs.model.weights_sha256},
        "demonstrations": {"sha256": inputs.demonstrations.content, **inputs.demonstrations.counts},
        "methods": {method.name: method.describe() for method in inputs.methods},
        "tasks": tasks,
        "failures": [dataclasses.asdict(failure) for failure in failures],
        "warnings": list(dict.fromkeys(warning for result in results for warning in result.warnings)),
    }


def _drawn(store: Store, results: Mapping[str, Sequence[CellResult]]) -> Drawn:
    """The samples and rewards behind results of one task, seed by seed."""
    found = {name: [_table(store, result) for result in own] for name, own in results.items()}
    tables = next(iter(found.values()))
    names = list(tables[0])
    kept = [name for name in names if all(_is_whole(table[name]) for own in found.values() for table in own)]

    def stack(own: Sequence[Mapping[str, list[Any]]], field: str) -> Array:
        rows = [[[float(each[field]) for each in table[name]] for name in kept] for table in own]
        return np.array(rows, dtype=np.float64).reshape(len(own), len(kept), -1)

    rewards = {name: stack(own, "reward") for name, own in found.items()}
    sides = [stack(tables, field) for field in ("score", "logp", "length")]
    texts = [[[each["text"] for each in table[name]] for name in kept] for table in tables]
    return Drawn(tuple(kept), sides[0], sides[1], sides[2], texts, len(names) - len(kept), rewards)


def _table(store: Store, result: CellResult) -> dict[str, list[dict[str, Any]]]:
    """Item → its samples with score, log-prob, length and reward."""
    ranked = store.lookup("scores", str(result.provenance["scores"]))
    if ranked is None:
        raise UserError(f"{result.method} on {result.task}: its rewards are no longer in {store.root}; run the command again")
    table: dict[str, list[dict[str, Any]]] = {}
    for record in read_jsonl(ranked.folder / REWARDS):
        table.setdefault(record["id"], []).append(record)
    return table


def _is_whole(samples: Sequence[Mapping[str, Any]]) -> bool:
    return all(each["score"] is not None and each["reward"] is not None for each in samples)


def task_record(given: TaskInput, drawn: Drawn, greedy: Sequence[CellResult], numbers: Sequence[int]) -> dict[str, Any]:
    """A task's rows: the rewards', then those without one.

    Args:
        given: the task.
        drawn: its samples.
        greedy: results of the policy as the task asks it, a seed each; none if they failed.
        numbers: the Ns.
    """
    task, samples = given.task, drawn.scores.shape[2]
    sign, bounds = (1.0 if task.best > task.worst else -1.0), (min(task.best, task.worst), max(task.best, task.worst))
    distinct = {
        n: np.stack([expected_distinct(*seed, n) for seed in zip(drawn.scores, drawn.texts, strict=True)]) for n in numbers
    }
    rank_by = {**drawn.rewards, LIKELY: drawn.logps, BEST: sign * drawn.scores}
    one = drawn.scores.mean(axis=2)  # (seeds, items)
    rows = []
    for name, ranking in rank_by.items():
        tables = {n: _by_seed(drawn.scores, ranking, n) for n in numbers}
        row: dict[str, Any] = {"choice": name, "is_reward": name in drawn.rewards}
        row["cells"] = [{"n": n, **_cell(tables[n], one, bounds)} for n in numbers]
        if name in drawn.rewards:
            for cell, n in zip(row["cells"], numbers, strict=True):
                cell["over_distinct"] = _difference(tables[n], distinct[n], bounds)
        if name != BEST:
            row |= _of_reward(ranking, drawn, sign, numbers) | {"fall": _fall(tables, sign, bounds)}
        rows.append(row)
    for name, tables in ((DISTINCT, distinct), (RANDOM, dict.fromkeys(numbers, one))):
        rows.append({"choice": name, "is_reward": False, "cells": [{"n": n, **_cell(tables[n], one, bounds)} for n in numbers]})
    if greedy:
        plain = _of_items(greedy, drawn.items)
        rows.append({"choice": GREEDY, "is_reward": False, "cells": [{"n": n, **_cell(plain, one, bounds)} for n in numbers]})
    facts = {"metric": task.metric, "best": task.best, "worst": task.worst, "items": len(drawn.items)}
    undecided = float((drawn.scores.max(axis=2) == drawn.scores.min(axis=2)).mean()) if drawn.items else math.nan
    different = [len(set(texts)) for seed in drawn.texts for texts in seed]
    facts["distinct"] = sum(different) / len(different) if different else None
    return {**facts, "samples": samples, "left_out": drawn.left_out, "nothing_to_choose": _number(undecided), "rows": rows}


def _by_seed(values: Array, rewards: Array, n: int) -> Array:
    """`expected_best` under every seed, (seeds, items)."""
    return np.stack([expected_best(mine, theirs, n) for mine, theirs in zip(values, rewards, strict=True)])


def _of_items(results: Sequence[CellResult], items: Sequence[str]) -> Array:
    """Item scores, (seeds, items), NaN where unscored."""
    tables = [{item.id: item.score for item in result.items} for result in results]
    rows = [[math.nan if table.get(name) is None else table[name] for name in items] for table in tables]
    return np.array(rows, dtype=np.float64).reshape(len(tables), len(items))


def _cell(table: Array, one: Array, bounds: Bounds) -> dict[str, Any]:
    """A mean score with its interval, and the difference to any sample of the same items under the same seeds."""
    score = score_interval(table, binary=False, bounds=bounds)
    return {"score": _interval(score), "difference": _difference(table, one, bounds)}


def _difference(table: Array, other: Array, bounds: Bounds) -> dict[str, Any] | None:
    """Of two tables (seeds, items), paired; None where they are the same."""
    if table.shape == other.shape and bool(np.allclose(table, other, rtol=0, atol=1e-12, equal_nan=True)):
        return None
    scale = bounds[1] - bounds[0]
    return _interval(score_interval(table - other, binary=False, bounds=(-scale, scale)))


def _fall(tables: Mapping[int, Array], sign: float, bounds: Bounds) -> dict[str, Any] | None:
    """From the best N to the largest one, where the interval of the difference is on the wrong side of 0; the best N was looked
    for, so this is a description and no test.
    """
    best, last = max(tables, key=lambda n: sign * float(np.mean(tables[n]))), max(tables)
    if best == last or not tables[last].size:
        return None
    lost = _difference(tables[last], tables[best], bounds)
    gone = lost is not None and all(sign * (lost[end] or 0.0) < 0 for end in ("low", "high"))
    return {"from": best, "to": last, **lost} if lost is not None and gone else None


def _of_reward(ranking: Array, drawn: Drawn, sign: float, numbers: Sequence[int]) -> dict[str, Any]:
    """What rises with N by construction, and how it goes together with the task's score and with an answer's length."""
    means = {n: _by_seed(ranking, ranking, n).mean() for n in numbers} if drawn.items else {}
    spread = float(np.sqrt(ranking.var(axis=2, ddof=1).mean())) if drawn.items else math.nan
    return {
        "reward": [{"n": n, "mean": float(mean)} for n, mean in means.items()],
        "mean_reward": _number(float(ranking.mean())) if drawn.items else None,
        "spread": _number(spread),
        "spearman": _correlation(ranking, sign * drawn.scores),
        "spearman_length": _correlation(ranking, drawn.lengths),
    }


def _correlation(first: Array, second: Array) -> dict[str, Any]:
    """Mean over items of the correlation among an item's samples, of those items where there is one; a mean over seeds first."""
    of_items = np.stack([spearman_within(mine, theirs) for mine, theirs in zip(first, second, strict=True)])  # (seeds, items)
    defined = ~np.isnan(of_items)
    some = defined.any(axis=0)
    values = np.where(defined, of_items, 0.0).sum(axis=0)[some] / defined.sum(axis=0)[some]
    return {**_interval(t_interval(values, (-1.0, 1.0))), "items": int(some.sum())}


def _interval(found: Interval) -> dict[str, Any]:
    return {"estimate": _number(found.estimate), "low": _number(found.low), "high": _number(found.high)}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def write(record: Mapping[str, Any], out: Path) -> list[Path]:
    """Write best_of.json and best_of.md below a folder, and a plot as SVG and PNG below plots/.

    Raises:
        MissingLibraryError: no plot without matplotlib; the tables are written.
    """
    from gsil_bench.reporting import best_of as tables
    from gsil_bench.reporting import plots

    write_atomically(out / "best_of.json", json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(out / "best_of.md", tables.render_markdown(record))
    files = [out / "best_of.md", out / "best_of.json"]
    if record["tasks"]:
        plot = plots.best_of(record)
        files += [out / "plots" / f"{plot.name}{ending}" for ending in (".svg", ".png")]
        write_atomically(files[-2], plot.svg())
        files[-1].write_bytes(plot.png())
    return files
