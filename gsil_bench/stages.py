"""The stages of a comparison, in the order of the data's path. Each fills one folder from the folders of the stages it needs.

    demonstrations → self-generations → reference log-probs → training (repeated by rounds) → answers → scores
                                                                                            → held-out loss

Which stages there are, and how they hang together, is in plan.py; how they are run, in execution/.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from gsil_bench.evaluation import answers, held_out, scoring
from gsil_bench.generation.answer_store import AnswerStore
from gsil_bench.generation.engine import Completion, Engine, Request, Sampling
from gsil_bench.generation.engines import Served
from gsil_bench.generation.likelihoods import Given, Likelihoods
from gsil_bench.inputs import Inputs, TaskInput
from gsil_bench.methods import OF_TOKENS, Critic, Method, baseline_methods, load_method
from gsil_bench.models import checkpoint
from gsil_bench.records import Encoded, Generation, digest, file_sha256, read_jsonl, write_jsonl
from gsil_bench.store import Artefact, Produced
from gsil_bench.tasks.task import ScoringResources
from gsil_bench.training.batches import Branch, Tree
from gsil_bench.training.config import TrainConfig
from gsil_bench.training.contrasts import (
    Contrast,
    against_failures,
    against_samples,
    counts_of,
    missing_of,
    split,
    told_apart,
    unclear,
)
from gsil_bench.training.critics import HEAD_FILE, critic_of, load_critic
from gsil_bench.training.learner import NAMED_IDS, TrainingError
from gsil_bench.training.loop import Surroundings
from gsil_bench.training.metrics import PAIRWISE
from gsil_bench.training.reference import audit_reference, read_reference, write_reference
from gsil_bench.training.rollouts import Company
from gsil_bench.training.round import TEMPORARY, Round, launch, run_round
from gsil_bench.training.shortcuts import audit_shortcuts
from gsil_bench.training.state import FILE as STATE
from gsil_bench.training.tracking import tracking

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Side = Literal["real", "generated", "rejected"]

FORWARD_TOKENS = 8192
"""Positions of a forward pass without gradients."""
ALL = slice(None)
"""Of the training demonstrations: those that a stage is about."""

VERSIONS = {
    "canaries": 1,
    "demonstrations": 1,
    "generations": 3,
    "reference": 2,
    "reward-model": 1,
    "training": 3,
    "answers": 3,
    "scores": 2,
    "held-out": 2,
}
"""Of each stage's code: raised when a change makes other artefacts from the same inputs."""


@dataclass
class Resources:
    """What stages share while a plan runs: the inputs, the model that was loaded last, and a way to report and to stop."""

    inputs: Inputs
    advance: Callable[[int], None] = lambda done: None
    """Called with units of work done; may raise KeyboardInterrupt. Generation, answers and training have saved what they did by
    then; log-probs, a single pass over the data, start again."""
    scoring: ScoringResources = field(default_factory=ScoringResources)
    _loaded: tuple[str, PreTrainedModel] | None = None
    _engine: tuple[str, Engine] | None = None

    def model(self, artefact: Artefact) -> PreTrainedModel:
        """A model that will not be changed; kept until another one is asked for."""
        if self._loaded is None or self._loaded[0] != artefact.content:
            self.release()  # the old one goes before the new one comes
            self._loaded = (artefact.content, self.load(artefact))
        return self._loaded[1]

    def load(self, artefact: Artefact) -> PreTrainedModel:
        """A model of its own, in the comparison's precision."""
        return checkpoint.load_model(artefact.folder, self.inputs.model.device, self.inputs.model.dtype)

    def release(self) -> None:
        """Forget the loaded model, close the engine, and hand their memory back: training, perhaps elsewhere, needs it."""
        if self._engine is not None:
            self._engine[1].close()
        self._engine = self._loaded = None
        gc.collect()
        torch.cuda.empty_cache()

    def engine(self, artefact: Artefact) -> Engine:
        """The generation engine on a checkpoint; kept until that of another one is asked for."""
        if self._engine is None or self._engine[0] != artefact.content:
            shares = self.inputs.engine.in_process and self._loaded is not None and self._loaded[0] == artefact.content
            if not shares:
                self.release()
            self._engine = (artefact.content, self.inputs.engine.make(self.served(artefact)))
        return self._engine[1]

    def served(self, artefact: Artefact) -> Served:
        """What an engine has to know to serve a checkpoint."""
        model = self.inputs.model
        return Served(
            artefact.folder, partial(self.model, artefact), model.chat.end_token_ids, model.context_length,
            model.chat.decode, model.device, model.dtype, model.autocast, model.chat.tokens, model.chat.spell,
        )  # fmt: skip

    def complete(self, artefact: Artefact, requests: Sequence[Request]) -> list[Completion]:
        """A checkpoint's completions, in order: those that were produced before, and the missing ones now. Requests for
        log-probs of given tokens (`Given`) are not mixed with others.
        """
        model = self.inputs.model
        frame = {
            "weights": artefact.content,
            "chat": model.chat.fingerprint,
            "precision": model.precision,
            "context_length": model.context_length,
            "engine": self.inputs.engine.identity(model.dtype, model.autocast),
        }
        store = AnswerStore(Path(self.inputs.config.out) / "store" / "completions", frame)

        def engine() -> Engine | Likelihoods:
            given = any(isinstance(request, Given) for request in requests)
            return Likelihoods(self.engine(artefact)) if given else self.engine(artefact)

        return store.complete(engine, requests, self.advance)

    @property
    def engine_notes(self) -> list[str]:
        """Why the engine in use is slower than possible."""
        return list(getattr(self._engine[1], "notes", ())) if self._engine else []


@dataclass(frozen=True)
class Workspace:
    """What one stage is given."""

    folder: Path
    needs: Mapping[str, Artefact]
    resources: Resources


def write_demonstrations(work: Workspace) -> Produced:
    """Stage 1: the demonstrations as they are trained on and held out, with tokens."""
    demonstrations = work.resources.inputs.demonstrations
    write_jsonl(work.folder / "train.jsonl", demonstrations.train)
    write_jsonl(work.folder / "held_out.jsonl", demonstrations.held_out)
    return Produced({"source": demonstrations.source, **demonstrations.counts}, demonstrations.content)


def self_generate(work: Workspace, sampling: Sampling, samples: int, part: slice = ALL) -> Produced:
    """Stage 2: completions of the opponent for each training demonstration's prompt, token-in/token-out."""
    demonstrations = work.resources.inputs.demonstrations
    items, all_encoded = demonstrations.train[part], demonstrations.train_encoded[part]
    wanted = [(item.id, sample, encoded) for item, encoded in zip(items, all_encoded, strict=True) for sample in range(samples)]
    requests = [Request(encoded.prompt_ids, sampling, sample) for _, sample, encoded in wanted]
    completions = work.resources.complete(work.needs["policy"], requests)
    generations = [
        Generation(name, item.tokens, item.text, item.finish_reason, sample)
        for (name, sample, _), item in zip(wanted, completions, strict=True)
    ]
    write_jsonl(work.folder / "generations.jsonl", generations)
    completions_of = [item.completion_ids for item in all_encoded]
    audit = audit_shortcuts(completions_of, [item.tokens for item in generations], [item.finish_reason for item in generations])
    return Produced(
        {
            "shortcuts": audit.as_facts(),
            "warnings": [*audit.warnings(), *work.resources.engine_notes],
            "generations": len(generations),
            "tokens": sum(len(item.tokens) for item in generations),
            "truncated": sum(item.finish_reason == "length" for item in generations),
            "equal_to_demonstration": sum(
                item.tokens == encoded.completion_ids for (_, _, encoded), item in zip(wanted, generations, strict=True)
            ),
        }
    )


def reference_logps(work: Workspace, side: Side, part: slice = ALL) -> Produced:
    """Stage 3: per-token log-probs of the opponent over one side of the pairs."""
    inputs = work.resources.inputs
    sequences: Sequence[Encoded] = inputs.demonstrations.train_encoded[part]
    if side == "generated":
        sequences = generated_sequences(inputs, work.needs["generations"])
    elif side == "rejected":
        sequences = rejected_sequences(inputs)[part]
    model = work.resources.model(work.needs["policy"])
    floor = write_reference(model, sequences, FORWARD_TOKENS, work.folder, work.resources.advance, inputs.model.autocast)
    return Produced({"noise_floor": floor})


def generated_sequences(inputs: Inputs, artefact: Artefact) -> list[Encoded]:
    """Self-generations under their prompts: all of the first demonstration's, then the second's."""
    demonstrations = inputs.demonstrations
    prompts = {
        item.id: encoded.prompt_ids for item, encoded in zip(demonstrations.train, demonstrations.train_encoded, strict=True)
    }
    records = read_jsonl(artefact.folder / "generations.jsonl")
    return [Encoded(prompts[record["id"]], tuple(record["tokens"])) for record in records]


def rejected_sequences(inputs: Inputs) -> list[Encoded]:
    """The rejected answers of preference data, in the demonstrations' order."""
    pairs = [(item.messages, item.rejected) for item in inputs.demonstrations.train if item.rejected is not None]
    return inputs.model.chat.encode_many(pairs)


def train_round(
    work: Workspace,
    method: Method,
    seed: int,
    round_index: int,
    steps: int,
    batch_size: int,
    starts_at_reference: bool,
    part: slice = ALL,
) -> Produced:
    """Stage 4: one round of a method, from the policy of the round before."""
    resources, config = work.resources, TrainConfig.of(method.training, where=method.name)
    trees, too_long = within_budget(build_trees(work, method, part), config)
    floor, audit = audited_floor(work, trees)
    resources.release()
    start_floor = floor if starts_at_reference else None
    model = resources.inputs.model
    # A first round's adapter can be shared with others if its base has a name on the hub.
    base = "" if round_index or Path(resources.inputs.config.model).is_dir() else model.name
    job = Round(
        work.needs["policy"].folder, method, tuple(trees), batch_size, steps, (seed, round_index), start_floor,
        base, model.device, model.dtype, model.autocast, shadow_methods(), company(work, method),
    )  # fmt: skip
    run_name = f"{method.name}-seed{seed}-round{round_index}"
    record = {**method.describe()["settings"], **vars(config), "seed": seed, "round": round_index}
    names, folder = resources.inputs.config.trackers, Path(resources.inputs.config.out) / "trackers"
    with tracking(names, folder, run_name, record) as track:
        if resources.inputs.config.processes > 1:
            asked = resources.inputs.config
            facts = launch(job, work.folder, asked.processes, asked.sharded, Surroundings(resources.advance, track=track))
        else:
            facts = run_round(job, work.folder, Surroundings(resources.advance, track=track))
    content = checkpoint.save_tokenizer(model.chat.tokenizer, work.folder)
    warnings = [*facts.pop("notes"), *_left_out(too_long, config), *_shortcuts_of_rejected(work)]
    warnings += [*facts.pop("sampling_warnings", []), *_larger_than_budget(trees, method, config)]
    left_out = f"{len(too_long)}, {digest([tree.id for tree in too_long])[:8]}" if too_long else "none"
    more = {"too_long": len(too_long), "left_out": left_out, "noise_floor": start_floor, "audit": audit, "warnings": warnings}
    return Produced({**facts, **more}, content, temporary=(STATE, *TEMPORARY))


def train_reward_model(work: Workspace, method: Method, seed: int, steps: int, batch_size: int, part: slice = ALL) -> Produced:
    """Between stages 2 and 4: a critic, and how well it tells apart answers that it was not trained on, class by class."""
    assert method.rollouts is not None and method.rollouts.critic is not None
    resources, model = work.resources, work.resources.inputs.model
    resources.release()
    contrasts = contrasts_of(work, method.rollouts.critic, seed, method.protocol.max_new_tokens, part)
    fitted, kept = split(contrasts)
    trees = tuple(contrast.tree for contrast in fitted)
    job = Round(
        work.needs["policy"].folder, critic_of(method), trees, min(batch_size, len(trees)), steps,
        (seed, 0), None, device=model.device, dtype=model.dtype, autocast=model.autocast,
    )  # fmt: skip
    facts = run_round(job, work.folder, Surroundings(resources.advance))
    content = digest([checkpoint.save_tokenizer(model.chat.tokenizer, work.folder), file_sha256(work.folder / HEAD_FILE)])
    critic = load_critic(work.folder, model.device, model.dtype, model.autocast)
    told = told_apart(critic, kept)
    warnings = [*facts.pop("notes"), *unclear(told)]
    counts = {"classes": counts_of(contrasts), "missing": missing_of(contrasts), "held_out_contrasts": len(kept)}
    more = {"auc": told, **counts, "warnings": warnings}
    return Produced({**facts, **more}, content, temporary=(STATE, *TEMPORARY))


def contrasts_of(work: Workspace, critic: Critic, seed: int, limit: int, part: slice = ALL) -> list[Contrast]:
    """What a reward model learns to tell apart; failures are cut at `limit` tokens, where samples are."""
    inputs, needs = work.resources.inputs, work.needs
    items, encoded = inputs.demonstrations.train[part], inputs.demonstrations.train_encoded[part]
    sampled = {side: generated_sequences(inputs, needs[side]) for side in ("positives", "negatives") if side in needs}
    if critic.negatives == "failures":
        length = inputs.model.context_length
        return against_failures(items, encoded, sampled["negatives"], inputs.model.chat, seed, limit, length)
    positives = sampled.get("positives", encoded)
    return against_samples([item.id for item in items], positives, sampled["negatives"], critic.negatives)


def company(work: Workspace, method: Method) -> Company | None:
    """What a method that samples from the policy in training needs besides it."""
    if method.rollouts is None:
        return None
    needs, inputs = work.needs, work.resources.inputs
    served = work.resources.served(needs["policy"])
    initial, critic = (needs[name].folder if name in needs else None for name in ("initial", "critic"))
    return Company(inputs.engine, served, needs["reference_policy"].folder, initial, critic)


def _larger_than_budget(trees: Sequence[Tree], method: Method, config: TrainConfig) -> list[str]:
    """A prompt with its samples is one forward pass, whatever the budget is: what a user who set it should know."""
    if method.rollouts is None:
        return []
    most = max(len(tree.prompt_ids) for tree in trees) + method.protocol.samples * method.protocol.max_new_tokens
    if most <= config.micro_batch_tokens:
        return []
    return [
        f"a prompt with its samples may take {most} positions of a forward pass, more than "
        f"micro_batch_tokens={config.micro_batch_tokens}"
    ]


def _left_out(too_long: Sequence[Tree], config: TrainConfig) -> list[str]:
    if not too_long:
        return []
    named = ", ".join(tree.id for tree in too_long[:NAMED_IDS]) + (", …" if len(too_long) > NAMED_IDS else "")
    return [
        f"{len(too_long)} demonstrations left out: longer with their self-generations than micro_batch_tokens="
        f"{config.micro_batch_tokens} ({named})"
    ]


def _shortcuts_of_rejected(work: Workspace) -> list[str]:
    """Warnings of the shortcut audit where a method is trained on the rejected answers of the data."""
    if "rejected_reference" not in work.needs:
        return []
    rejected = [sequence.completion_ids for sequence in rejected_sequences(work.resources.inputs)]
    real = [sequence.completion_ids for sequence in work.resources.inputs.demonstrations.train_encoded]
    return audit_shortcuts(real, rejected, ["stop"] * len(rejected)).warnings()


def within_budget(trees: Sequence[Tree], config: TrainConfig) -> tuple[list[Tree], list[Tree]]:
    """Trees that fit into one forward pass, and those that do not: they are left out and reported, never cut.

    Raises:
        TrainingError: none fits.
    """
    sizes = [tree.tokens.positions("shared") for tree in trees]
    fitting = [tree for tree, size in zip(trees, sizes, strict=True) if size <= config.micro_batch_tokens]
    if not fitting:
        raise TrainingError(
            f"no demonstration fits into a forward pass: the shortest takes {min(sizes)} tokens with its self-generations, "
            f"micro_batch_tokens is {config.micro_batch_tokens}"
        )
    return fitting, [tree for tree, size in zip(trees, sizes, strict=True) if size > config.micro_batch_tokens]


def audited_floor(work: Workspace, trees: Sequence[Tree]) -> tuple[float | None, float | None]:
    """Noise floor of the reference log-probs, and by how much a sample of them differs now; None where there are none."""
    floors = [need.facts["noise_floor"] for name, need in work.needs.items() if "_reference" in name]
    if not floors:
        return None, None
    resources = work.resources
    model = resources.model(work.needs.get("reference_policy", work.needs["policy"]))
    return max(floors), audit_reference(model, trees, max(floors), resources.inputs.model.autocast)


def shadow_methods() -> tuple[str, ...]:
    """Names of the registered pairwise methods, each formula once."""
    methods = [load_method(name) for name in baseline_methods()]
    beyond = OF_TOKENS | {"first"}  # what a pair of another method does not carry
    pairwise = [method for method in methods if method.loss and method.needs >= PAIRWISE and not method.needs & beyond]
    formulas = {(method.formula, tuple(sorted(method.settings.items()))): method for method in reversed(pairwise)}
    return tuple(method.name for method in reversed(formulas.values()))


def build_trees(work: Workspace, method: Method, part: slice = ALL) -> list[Tree]:
    """Demonstrations joined with what the method needs: newest self-generations first, then those of mixed-in rounds."""
    inputs = work.resources.inputs
    items, all_encoded = inputs.demonstrations.train[part], inputs.demonstrations.train_encoded[part]
    reals = _branches(all_encoded, work.needs.get("real_reference"))
    sides: list[Sequence[Branch]] = []
    for name in sorted((need for need in work.needs if need.startswith("generations")), reverse=True):
        sequences = generated_sequences(inputs, work.needs[name])
        sides.append(_branches(sequences, work.needs.get(name.replace("generations", "generated_reference"))))
    if "preferences" in method.needs and not sides:
        sides.append(_branches(rejected_sequences(inputs)[part], work.needs.get("rejected_reference")))
    earlier = work.needs.get("first_generations")
    first = _branches(generated_sequences(inputs, earlier), None) if earlier is not None else []
    trees = []
    for side in sides or [()]:
        k = len(side) // len(reals)  # self-generations of each demonstration; they lie one after the other
        for n, (item, encoded) in enumerate(zip(items, all_encoded, strict=True)):
            own = slice(n * k, (n + 1) * k)
            trees.append(Tree(item.id, encoded.prompt_ids, reals[n], tuple(side[own]), tuple(first[own])))
    return trees


def _branches(sequences: Sequence[Encoded], reference: Artefact | None) -> list[Branch]:
    if reference is None:
        return [Branch(sequence.completion_ids) for sequence in sequences]
    logps = read_reference(reference.folder, sequences)
    return [
        Branch(sequence.completion_ids, float(logp.sum(dtype="float64"))) for sequence, logp in zip(sequences, logps, strict=True)
    ]


def answer_task(work: Workspace, task: TaskInput) -> Produced:
    """Stage 5: a checkpoint's answers to a task."""
    inputs = work.resources.inputs
    complete = partial(work.resources.complete, work.needs["policy"])
    length = inputs.model.context_length
    model = answers.Asked(complete, inputs.model.chat, length, length + inputs.engine.in_process)
    given = answers.answer(model, task.items, task.task.protocol)
    write_jsonl(work.folder / answers.FILE, given)
    tokens = sum(sum(item.tokens) for item in given)
    return Produced({"answers": len(given), "tokens": tokens, "warnings": work.resources.engine_notes})


def check_scorer(work: Workspace, task: TaskInput) -> Produced:
    """Gold answers of a task must get full marks and empty ones none, or its scores would mean nothing."""
    scoring.check_canaries(task.task, task.items, work.resources.scoring)
    return Produced({"task": task.task.name})


def score_task(work: Workspace, task: TaskInput) -> Produced:
    """Stage 6: scores of a checkpoint's answers; no model."""
    given, resources = scoring.read_answers(work.needs["answers"].folder), work.resources
    if hasattr(resources.scoring.judge, "advance"):  # so that judging is seen, and stops between two judgments
        resources.scoring.judge.advance = resources.advance
    scores, counts = scoring.score_answers(task.task, task.items, given, resources.scoring, work.folder)
    return Produced({"counts": counts, "unscored": sum(item.score is None for item in scores)})


def held_out_loss(work: Workspace) -> Produced:
    """Negative log-likelihood of the held-out demonstrations."""
    demonstrations = work.resources.inputs.demonstrations
    model, autocast = work.resources.model(work.needs["policy"]), work.resources.inputs.model.autocast
    ids = [item.id for item in demonstrations.held_out]
    scores = held_out.score_held_out(
        model, ids, demonstrations.held_out_encoded, FORWARD_TOKENS, work.folder, work.resources.advance, autocast
    )
    return Produced({"counts": {"answers": len(scores)}, "unscored": 0})


def protocol_record(task: TaskInput) -> dict[str, Any]:
    """A task's protocol as JSON."""
    return dataclasses.asdict(task.task.protocol)
