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
from gsil_bench.evaluation import held_out
from gsil_bench.generation.engine import Sampling
from gsil_bench.inputs import Inputs, TaskInput
from gsil_bench.methods import Method
from gsil_bench.records import digest
from gsil_bench.source import source_sha256
from gsil_bench.stages import VERSIONS, Workspace
from gsil_bench.store import Artefact, Produced
from gsil_bench.tasks.task import AnswerProtocol, Item, Task
from gsil_bench.training.batches import steps_of_round
from gsil_bench.training.config import TrainConfig
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
        inputs = {**self._frame, "engine": self._engine_identity, "sampling": vars(sampling), "samples": protocol.samples}
        label = f"self-generate from {_policy_name(opponent)}" + (f", seed {seed}" if protocol.temperature > 0 else ", greedy")
        return self._stage(
            "generations",
            label,
            inputs,
            {"policy": opponent, "demonstrations": self.demonstrations},
            partial(stages.self_generate, sampling=sampling, samples=protocol.samples),
            len(data.train) * protocol.samples,
            sum(len(encoded.completion_ids) for encoded in data.train_encoded) * protocol.samples,
        )

    def reference(self, opponent: Stage, side: stages.Side, generations: Stage | None = None, samples: int = 1) -> Stage:
        """Stage 3: decided by weights, token ids and precision, so that all methods, losses, settings and seeds share it."""
        data = self.data.demonstrations
        needs = {"policy": opponent} | ({"generations": generations} if generations else {})
        inputs = {"side": side, "precision": self.data.model.precision, "tokens": data.train_tokens}
        inputs |= {"rejected": self._rejected_tokens} if side == "rejected" else {}
        count = len(data.train) * (samples if generations else 1)
        label = f"reference log-probs of {side} answers under {_policy_name(opponent)}"
        return self._stage(
            "reference", label, inputs, needs, partial(stages.reference_logps, side=side), count, self._train_tokens
        )

    def training(self, method: Method, seed: int) -> tuple[Stage, ...]:
        """Stages 2 to 4, once a round."""
        config = TrainConfig.of(method.training, where=method.name)
        rounds = method.protocol.rounds if method.trains else 0
        policy, played, trained = self.start, list[Stage](), list[Stage]()
        for index in range(rounds):
            opponent = self.start if method.protocol.opponent == "initial" else policy
            needs = {"policy": policy, **self._pair_needs(method, opponent, seed, index, played)}
            steps = steps_of_round(len(self.data.demonstrations.train), config.epochs, self._batch_size(config), rounds, index)
            starts_at_reference = opponent is policy
            inputs = {
                **self._frame,
                "method": method.decides(),
                "training": {key: value for key, value in vars(config).items() if key not in SAME_WEIGHTS},
                "batch_size": self._batch_size(config),
                "seed": seed,
                "round": index,
                "steps": steps,
                "starts_at_reference": starts_at_reference,
            }
            run = partial(
                stages.train_round,
                method=method,
                seed=seed,
                round_index=index,
                steps=steps,
                batch_size=self._batch_size(config),
                starts_at_reference=starts_at_reference,
            )
            label = f"train {method.name}, seed {seed}" + (f", round {index + 1}" if rounds > 1 else "")
            branches = 1 if needs.keys() == {"policy", "demonstrations"} else 1 + method.protocol.samples
            tokens = steps * self._batch_size(config) * branches * self._train_tokens / len(self.data.demonstrations.train)
            policy = self._stage("training", label, inputs, needs, run, steps, tokens)
            trained.append(policy)
        return tuple(trained)

    def _pair_needs(self, method: Method, opponent: Stage, seed: int, index: int, played: list[Stage]) -> dict[str, Stage]:
        """What a round needs besides its starting point; `played` collects the self-generations of all rounds."""
        needs: dict[str, Stage] = {"demonstrations": self.demonstrations}
        reference, data = "reference" in method.needs, self.data.demonstrations
        if reference:
            needs |= {"real_reference": self.reference(opponent, "real"), "reference_policy": opponent}
        if "preferences" in method.needs and data.preferences == len(data.train):
            return needs | ({"rejected_reference": self.reference(opponent, "rejected")} if reference else {})
        if "generated" in method.needs:
            played.append(self.generations(opponent, method, seed, index))
            for age, generations in enumerate(reversed(played[-method.protocol.mix_rounds :])):
                number = f"{index - age:03d}"
                needs[f"generations/{number}"] = generations
                if reference:
                    needs[f"generated_reference/{number}"] = self.reference(
                        opponent, "generated", generations, method.protocol.samples
                    )
        return needs

    def _cells(self, method: Method, seed: int) -> Iterator[Cell]:
        """The method's row, after those of its earlier rounds if they are asked for."""
        trained = self.training(method, seed)
        earlier = range(1, len(trained)) if self.data.config.every_round else ()
        for done in earlier:
            yield from self._row(after_round(method, done), seed, trained[:done])
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
            count, batch, rounds = len(data.demonstrations.train), self._batch_size(config), method.protocol.rounds
            done = range(method.after_round or rounds)
            steps = sum(steps_of_round(count, config.epochs, batch, rounds, index) for index in done)
            budget = f"{steps} steps of {batch} demonstrations"
        return {
            "model": data.model.weights_sha256,
            "chat": data.model.chat.fingerprint,
            "precision": data.model.precision,
            "demonstrations": data.demonstrations.content,
            "engine": self._engine_identity,
            "budget": budget,
        }

    def _batch_size(self, config: TrainConfig) -> int:
        """Never more than there are: a step that took a demonstration twice would not be the epochs that were asked for."""
        return min(config.batch_size, len(self.data.demonstrations.train))

    @cached_property
    def _rejected_tokens(self) -> str:
        sequences = stages.rejected_sequences(self.data)
        return digest([[encoded.prompt_ids, encoded.completion_ids] for encoded in sequences])

    @cached_property
    def _train_tokens(self) -> int:
        return sum(len(encoded) for encoded in self.data.demonstrations.train_encoded)


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
