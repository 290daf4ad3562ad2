"""The plan: which stages a comparison needs, each once, and which cells they end in.

A stage is named by a key, the digest of what it does and of the keys of the stages it needs, so that two methods that share a
stage plan it once. What it makes is stored under a fingerprint, the digest of what it does and of the *contents* it needs: a
checkpoint's answers are found by its weights, never by a path or a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from gsil_bench import stages
from gsil_bench.errors import UserError
from gsil_bench.evaluation import held_out
from gsil_bench.generation.engine import Sampling
from gsil_bench.inputs import Inputs, TaskInput
from gsil_bench.methods import Critic, Method, SelfPlay
from gsil_bench.records import digest
from gsil_bench.source import source_sha256
from gsil_bench.stages import VERSIONS, Workspace
from gsil_bench.store import Artefact, Produced
from gsil_bench.tasks.task import AnswerProtocol, Item, Task
from gsil_bench.training.batches import steps_of_round, steps_of_run
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.critics import critic_of
from gsil_bench.variants import after_round


@dataclass(frozen=True, eq=False)
class Stage:
    """Something to be made once, by `run`, from what it needs."""

    kind: str
    label: str
    """For a person: "train gsil-logistic, seed 0, round 1"."""
    inputs: Mapping[str, Any]
    """Everything that decides the result besides the needs; JSON."""
    needs: Mapping[str, Stage]
    run: Callable[[Workspace], Produced] | None
    """None for what is given: the starting model."""
    units: float = 0.0
    """Work in the unit that progress is shown in: steps, prompts, answers."""
    tokens: float = 0.0
    """Tokens processed (training, log-probs) or generated (answers), about; for the estimate."""
    given: Artefact | None = None

    @cached_property
    def key(self) -> str:
        """Names the stage within a plan."""
        if self.given is not None:
            return self.given.content
        return digest([self.kind, VERSIONS[self.kind], self.inputs, {name: need.key for name, need in self.needs.items()}])

    def fingerprint(self, made: Mapping[str, Artefact]) -> str:
        """Names the artefact; `made` maps the keys of all needs to their artefacts."""
        contents = {name: made[need.key].content for name, need in self.needs.items()}
        return digest([self.kind, VERSIONS[self.kind], self.inputs, contents])[:32]


@dataclass(frozen=True)
class Cell:
    """A method with a seed, scored on a task: one result file, one entry of the table."""

    method: Method
    seed: int
    task: str
    metric: str
    best: float
    worst: float | None
    policy: Stage
    scores: Stage
    training: tuple[Stage, ...]
    """The rounds, oldest first; empty for a method that does not train."""
    comparable: Mapping[str, Any]
    """What must be equal in two cells for their difference to be the method's."""


@dataclass(frozen=True)
class Plan:
    """All cells of a comparison."""

    inputs: Inputs
    cells: tuple[Cell, ...]

    @cached_property
    def stages(self) -> list[Stage]:
        """Every stage once, each after those it needs."""
        ordered: dict[str, Stage] = {}
        for cell in self.cells:
            if CANARIES in cell.scores.needs:
                _add_with_needs(cell.scores.needs[CANARIES], ordered)
        for cell in self.cells:
            _add_with_needs(cell.scores, ordered)
        return list(ordered.values())


CANARIES = "canaries"
CHARACTERS_PER_TOKEN = 4
"""About, for the estimate."""
SAME_WEIGHTS = ("log_every", "gradient_checkpointing")
"""Settings that leave every bit of the weights as it is; the others decide what is summed with what."""


def _add_with_needs(stage: Stage, ordered: dict[str, Stage]) -> None:
    if stage.key not in ordered:
        for need in stage.needs.values():
            _add_with_needs(need, ordered)
        ordered[stage.key] = stage


@dataclass
class Planner:
    """Builds the stages. One method for each kind; what decides a result is in `inputs`, next to the call that computes it."""

    data: Inputs
    _known: dict[str, Stage] = field(default_factory=dict)

    def plan(self) -> Plan:
        """Cells of every method, seed and task, in the user's order."""
        cells = [
            cell
            for method in self.data.methods
            for seed in (self.data.config.seeds if method.trains else self.data.config.seeds[:1])
            for cell in self._cells(method, seed)
        ]
        return Plan(self.data, tuple(cells))

    def _stage(
        self,
        kind: str,
        label: str,
        inputs: Mapping[str, Any],
        needs: Mapping[str, Stage],
        run: Callable[[Workspace], Produced],
        units: float = 0.0,
        tokens: float = 0.0,
    ) -> Stage:
        stage = Stage(kind, label, inputs, needs, run, units, tokens)
        return self._known.setdefault(stage.key, stage)

    @cached_property
    def start(self) -> Stage:
        """The model that every method starts from."""
        model = self.data.model
        given = Artefact(model.folder, model.weights_sha256)
        return Stage("model", f"model {model.name}", {}, {}, None, given=given)

    @cached_property
    def demonstrations(self) -> Stage:
        """Stage 1."""
        data = self.data.demonstrations
        inputs = {"sha256": data.content, "chat": self.data.model.chat.fingerprint}
        return self._stage("demonstrations", "demonstrations", inputs, {}, stages.write_demonstrations)

    @cached_property
    def _frame(self) -> dict[str, Any]:
        """What every stage with a model depends on besides its weights."""
        model = self.data.model
        return {"chat": model.chat.fingerprint, "precision": model.precision, "context_length": model.context_length}

    @cached_property
    def _engine_identity(self) -> str:
        return self.data.engine.identity(self.data.model.dtype, self.data.model.autocast)

    def generations(self, opponent: Stage, method: Method, seed: int, round_index: int) -> Stage:
        """Stage 2. Greedy ones do not depend on the seed and are shared by all; so are all with a seed of their own."""
        protocol, data = method.protocol, self.data.demonstrations
        seed = seed if self.data.config.generation_seed is None else self.data.config.generation_seed
        stream = seed * 1000 + round_index if protocol.temperature > 0 else 0
        sampling = Sampling(protocol.max_new_tokens, protocol.temperature, seed=stream)
        part, said = _part(protocol, round_index)
        inputs = {**self._frame, "engine": self._engine_identity, "sampling": vars(sampling), "samples": protocol.samples, **said}
        label = f"self-generate from {_policy_name(opponent)}" + (f", seed {seed}" if protocol.temperature > 0 else ", greedy")
        return self._stage(
            "generations",
            label,
            inputs,
            {"policy": opponent, "demonstrations": self.demonstrations},
            partial(stages.self_generate, sampling=sampling, samples=protocol.samples, part=part),
            len(data.train[part]) * protocol.samples,
            sum(len(encoded.completion_ids) for encoded in data.train_encoded[part]) * protocol.samples,
        )

    def reference(
        self, opponent: Stage, side: stages.Side, protocol: SelfPlay, index: int, generations: Stage | None = None
    ) -> Stage:
        """Stage 3: decided by weights, token ids and precision, so that all methods, losses, settings and seeds share it."""
        data, (part, said) = self.data.demonstrations, _part(protocol, index)
        needs = {"policy": opponent} | ({"generations": generations} if generations else {})
        inputs = {"side": side, "precision": self.data.model.precision, "tokens": data.train_tokens}
        inputs |= {"rejected": self._rejected_tokens} if side == "rejected" else {}
        inputs |= said
        count = len(data.train[part]) * (protocol.samples if generations else 1)
        label = f"reference log-probs of {side} answers under {_policy_name(opponent)}"
        return self._stage(
            "reference", label, inputs, needs, partial(stages.reference_logps, side=side, part=part), count, self._train_tokens
        )

    def training(self, method: Method, seed: int) -> tuple[Stage, ...]:
        """Stages 2 to 4, once a round, after those of the method that it starts from."""
        config = TrainConfig.of(method.training, where=method.name)
        rounds = method.protocol.rounds if method.trains else 0
        played, trained, batch = list[Stage](), list[Stage](), self._batch_size(config, method.protocol)
        before = self.training(self.data.bases[method.name], seed) if method.starts_from else ()
        start = policy = before[-1] if before else self.start
        for index in range(rounds):
            opponent = start if method.protocol.opponent == "initial" else policy
            needs = {"policy": policy, **self._pair_needs(method, opponent, seed, index, played)}
            needs |= self._sampling_needs(method, policy, opponent, seed, index)
            steps, (part, said) = self._steps(method, index), _part(method.protocol, index)
            starts_at_reference = opponent is policy
            inputs = {
                **self._frame,
                "method": method.decides(),
                "training": {key: value for key, value in vars(config).items() if key not in SAME_WEIGHTS},
                "batch_size": batch,
                "seed": seed,
                "round": index,
                "steps": steps,
                "starts_at_reference": starts_at_reference,
                **said,
            }
            run = partial(
                stages.train_round,
                method=method,
                seed=seed,
                round_index=index,
                steps=steps,
                batch_size=batch,
                starts_at_reference=starts_at_reference,
                part=part,
            )
            label = f"train {method.name}, seed {seed}" + (f", round {index + 1}" if rounds > 1 else "")
            if method.rollouts is not None:
                inputs["engine"] = self._engine_identity
            others = 0 if needs.keys() == {"policy", "demonstrations"} else method.protocol.samples
            branches = 1 + others * (2 if "first" in method.needs else 1)
            tokens = steps * batch * branches * self._train_tokens / len(self.data.demonstrations.train)
            policy = self._stage("training", label, inputs, needs, run, steps, tokens)
            trained.append(policy)
        return (*before, *trained)

    def _steps(self, method: Method, index: int) -> int:
        """Optimiser steps of a round: its share of what the method it starts from has left of the run's."""
        config, count = TrainConfig.of(method.training, where=method.name), len(self.data.demonstrations.train)
        batch = self._batch_size(config, method.protocol)
        total = steps_of_run(count, config.epochs, batch)
        spent = steps_of_run(count, config.epochs * method.start_share, batch) if method.starts_from else 0
        return steps_of_round(total - spent, method.protocol.rounds, index)

    def _sampling_needs(self, method: Method, policy: Stage, opponent: Stage, seed: int, index: int) -> dict[str, Stage]:
        """What a method needs to reward samples of the policy that it trains."""
        rollouts = method.rollouts
        if rollouts is None:
            return {}
        needs = {"reference_policy": opponent}
        if rollouts.needs & {"initial", "similarity"}:
            needs["initial"] = self.start
        if rollouts.critic is not None and not rollouts.critic.alongside:
            needs["critic"] = self.reward_model(method, rollouts.critic, policy, seed, index)
        return needs

    def reward_model(self, method: Method, critic: Critic, policy: Stage, seed: int, index: int) -> Stage:
        """Between stages 2 and 4: what scores answers, trained on some that are to score high and some that are to score low."""
        config = TrainConfig.of(critic_of(method).training, where=f"{method.name}.critic")
        batch, (part, said) = self._batch_size(config, method.protocol), _part(method.protocol, index)
        needs = {"policy": self.start, "demonstrations": self.demonstrations}
        for side, answers in (("positives", critic.positives), ("negatives", critic.negatives)):
            if answers != "demonstrations":
                needs[side] = self.generations(self.start if answers == "initial" else policy, method, seed, index)
        inputs = {
            **self._frame,
            "critic": {**method.decides()["rollouts"]["critic"], "training": None, "source_sha256": method.source_sha256},
            "training": {key: value for key, value in vars(config).items() if key not in SAME_WEIGHTS},
            "batch_size": batch,
            "seed": seed,
            **said,
        }
        contrasts = len(self.data.demonstrations.train[part]) * (
            1 if critic.positives == "demonstrations" else method.protocol.samples
        )
        steps = steps_of_run(contrasts, config.epochs, batch)
        run = partial(stages.train_reward_model, method=method, seed=seed, steps=steps, batch_size=batch, part=part)
        label = f"train the reward model of {method.name}, seed {seed}"
        return self._stage("reward-model", label, inputs, needs, run, steps, 2 * config.epochs * self._train_tokens)

    def _pair_needs(self, method: Method, opponent: Stage, seed: int, index: int, played: list[Stage]) -> dict[str, Stage]:
        """What a round needs besides its starting point; `played` collects the self-generations of all rounds."""
        needs: dict[str, Stage] = {"demonstrations": self.demonstrations}
        reference, data, protocol = "reference" in method.needs, self.data.demonstrations, method.protocol
        if reference:
            needs |= {"real_reference": self.reference(opponent, "real", protocol, index), "reference_policy": opponent}
        if "preferences" in method.needs and data.preferences == len(data.train):
            return needs | ({"rejected_reference": self.reference(opponent, "rejected", protocol, index)} if reference else {})
        if "generated" in method.needs:
            played.append(self.generations(opponent, method, seed, index))
            for age, generations in enumerate(reversed(played[-protocol.mix_rounds :])):
                number = f"{index - age:03d}"
                needs[f"generations/{number}"] = generations
                if reference:
                    needs[f"generated_reference/{number}"] = self.reference(opponent, "generated", protocol, index, generations)
        return needs | ({"first_generations": played[0]} if "first" in method.needs else {})

    def _cells(self, method: Method, seed: int) -> Iterator[Cell]:
        """The method's row, after those of its earlier rounds if they are asked for."""
        trained = self.training(method, seed)
        rounds = method.protocol.rounds if method.trains else 0
        earlier = range(1, rounds) if self.data.config.every_round else ()
        for done in earlier:
            yield from self._row(after_round(method, done), seed, trained[: len(trained) - rounds + done])
        yield from self._row(method, seed, trained)

    def _row(self, method: Method, seed: int, trained: tuple[Stage, ...]) -> Iterator[Cell]:
        policy = trained[-1] if trained else self.start
        for task in self.data.tasks:
            yield self._task_cell(method, seed, task, policy, trained)
        if self.data.demonstrations.held_out and self.data.engine.weights is None:
            yield self._held_out_cell(method, seed, policy, trained)

    def _task_cell(self, method: Method, seed: int, task: TaskInput, policy: Stage, trained: tuple[Stage, ...]) -> Cell:
        record, name = stages.protocol_record(task), task.task.name
        items = {"task": name, "items": task.content, "protocol": record}
        canaries = self._canaries(task)
        answers = self._stage(
            "answers",
            f"answer {name} with {_policy_name(policy)}",
            {**self._frame, "engine": self._engine_identity, **items},
            {"policy": policy, CANARIES: canaries},  # what cannot be scored is not asked
            partial(stages.answer_task, task=task),
            sum(_answers(item, task.task.protocol) for item in task.items),
            sum(_tokens(item, task.task.protocol) for item in task.items),
        )
        scores = self._stage(
            "scores",
            f"score {name} of {_policy_name(policy)}",
            {**items, "version": task.task.version, "scorer": self._scorer(task.task)},
            {"answers": answers, CANARIES: canaries},
            partial(stages.score_task, task=task),
            self._judgments(task),
        )
        return Cell(
            method,
            seed,
            name,
            task.task.metric,
            task.task.best,
            task.task.worst,
            policy,
            scores,
            trained,
            {
                **self._comparable(method),
                "protocol": record["name"],
                "task": f"{name} {task.task.version}",
                "items": task.content,
                "judge": self._scorer(task.task)["judge"],
            },
        )

    def _canaries(self, task: TaskInput) -> Stage:
        """Whether a task's scorer can be trusted; planned first, so that a broken one is found before anything is trained."""
        inputs = {"task": task.task.name, "items": task.content, "version": task.task.version, "scorer": self._scorer(task.task)}
        run = partial(stages.check_scorer, task=task)
        return self._stage("canaries", f"canaries of {task.task.name}", inputs, {}, run)

    def _scorer(self, task: Task) -> dict[str, Any]:
        """What gives a task's scores: the source of its class and of its parts (a judge), and the identity of its judge or, for a
        task that brings none, of the comparison's; the learned metric's if it takes one.
        """
        parts = [task, *(vars(task).values() if hasattr(task, "__dict__") else ())]
        modules = sorted({type(part).__module__ for part in parts} - {"builtins"})
        judge = self.data.judge if getattr(task, "needs_judge", False) else getattr(task, "judge", None)
        scorer = {"source": source_sha256(*modules), "judge": getattr(judge, "identity", None)}
        if self.data.learned is not None and getattr(task, "takes_learned_metric", False):
            scorer["learned"] = self.data.learned.identity
        return scorer

    def _judgments(self, task: TaskInput) -> int:
        """How often the comparison's judge is asked about a task's answers."""
        asked = getattr(task.task, "needs_judge", False) and self.data.judge is not None
        return sum(item.asked for item in task.items) * self.data.judge.repeats if asked else 0

    def _held_out_cell(self, method: Method, seed: int, policy: Stage, trained: tuple[Stage, ...]) -> Cell:
        data = self.data.demonstrations
        scores = self._stage(
            "held-out",
            f"held-out loss of {_policy_name(policy)}",
            {**self._frame},
            {"policy": policy, "demonstrations": self.demonstrations},
            stages.held_out_loss,
            len(data.held_out),
            sum(len(encoded) for encoded in data.held_out_encoded),
        )
        comparable = {**self._comparable(method), "items": data.content}
        return Cell(method, seed, held_out.NAME, held_out.METRIC, 0.0, None, policy, scores, trained, comparable)

    def _comparable(self, method: Method) -> dict[str, Any]:
        """Everything but the method. The budget is None for the untrained model: it stands for what there was before."""
        data = self.data
        budget = None
        if method.trains:
            config = TrainConfig.of(method.training, where=method.name)
            count, batch = len(data.demonstrations.train), self._batch_size(config, method.protocol)
            steps = sum(self._steps(method, index) for index in range(method.after_round or method.protocol.rounds))
            steps += steps_of_run(count, config.epochs * method.start_share, batch) if method.starts_from else 0
            budget = f"{steps} steps of {batch} demonstrations"
        return {
            "model": data.model.weights_sha256,
            "chat": data.model.chat.fingerprint,
            "precision": data.model.precision,
            "demonstrations": data.demonstrations.content,
            "engine": self._engine_identity,
            "budget": budget,
        }

    def _batch_size(self, config: TrainConfig, protocol: SelfPlay) -> int:
        """Never more than a round has: a step that took a demonstration twice would not be the epochs that were asked for."""
        count, last = len(self.data.demonstrations.train), max(0, protocol.rounds - 1)
        least = len(range(count)[_part(protocol, last)[0]])
        if not least:
            raise UserError(f"rounds={protocol.rounds}: {count} demonstrations are too few for a part of their own in each round")
        return min(config.batch_size, least)

    @cached_property
    def _rejected_tokens(self) -> str:
        sequences = stages.rejected_sequences(self.data)
        return digest([[encoded.prompt_ids, encoded.completion_ids] for encoded in sequences])

    @cached_property
    def _train_tokens(self) -> int:
        return sum(len(encoded) for encoded in self.data.demonstrations.train_encoded)


def _part(protocol: SelfPlay, index: int) -> tuple[slice, dict[str, Any]]:
    """Which of the training demonstrations a round has, and what says so in a fingerprint: nothing where it has all."""
    if protocol.demonstrations == "all" or protocol.rounds <= 1:
        return slice(None), {}
    return slice(index, None, protocol.rounds), {"part": [index, protocol.rounds]}


def _answers(item: Item, protocol: AnswerProtocol) -> int:
    """Answers to an item. Likelihoods are asked for once: they are not drawn."""
    return item.asked * (1 if item.continuations else protocol.samples)


def _tokens(item: Item, protocol: AnswerProtocol) -> float:
    """Work of answering an item, in generated tokens: half of an answer's limit is used, and a token that is only read costs a
    third of one that is written.
    """
    if not item.continuations:
        return _answers(item, protocol) * protocol.max_new_tokens / 2
    texts = {*(given.context for given in item.continuations), *(given.text for given in item.continuations)}
    return sum(map(len, texts)) / CHARACTERS_PER_TOKEN / 3


def _policy_name(policy: Stage) -> str:
    """ "the start", or which training made it."""
    return "the start" if policy.given is not None else policy.label.removeprefix("train ")
