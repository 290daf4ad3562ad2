"""What ours is compared with: the published self-play codes' step, TRL's step in plain torch, and TRL's own trainer.

| variant | head | reference | activation checkpointing |
|---|---|---|---|
| A | every position, whole logits in fp32 (SPIN, GSIL, LLaMA-Factory) | resident | on |
| B | completions only, in chunks that are computed again in the backward pass (TRL) | resident | on |
| C | as B | cached | on |
| trl-like, trl-like-precomputed | as B, as C | | off: what stands for TRL where it is not installed |
| trl, trl-precomputed | TRL's DPOTrainer | | off |
| trl-defaults | the same with its own defaults: bf16 autocast, resident reference | | on |

All are padded, with an attention mask, micro-batches being consecutive pairs of the shuffled order.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from gsil_bench.models.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETA = 0.1
LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0
HEAD_CHUNK = 2048
"""Scored positions whose logits exist at a time in B and C."""

Boundary = Callable[[int], None]
"""Called between steps with the steps done since the last call, 0 before the first; it waits, and takes the time."""


@dataclass(frozen=True)
class Peer:
    """How a plain variant differs from the others."""

    whole_logits: bool = False
    resident: bool = False
    recomputes: bool = True


PLAIN = {
    "A": Peer(whole_logits=True, resident=True),
    "B": Peer(resident=True),
    "C": Peer(),
    "trl-like": Peer(resident=True, recomputes=False),
    "trl-like-precomputed": Peer(recomputes=False),
}
TRL = ("trl", "trl-precomputed", "trl-defaults")


@dataclass
class Outcome:
    """Facts of a row besides its times."""

    loss: float = float("nan")
    """Of the first step; ln 2 where policy and reference are the same."""
    grad_norm: float = float("nan")
    reference_seconds: float = 0.0
    """To compute the reference's log-probs of all pairs once, where they are cached."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """What a row trains on."""

    pairs: Sequence[TokenTree]
    pairs_per_step: int
    micro_batch: int
    autocast: bool

    @property
    def steps(self) -> list[Sequence[TokenTree]]:
        """The pairs of each step."""
        return [self.pairs[start : start + self.pairs_per_step] for start in range(0, len(self.pairs), self.pairs_per_step)]

    def micro_batches(self, pairs: Sequence[TokenTree]) -> list[Sequence[TokenTree]]:
        """Consecutive pairs, as a data loader hands them out."""
        return [pairs[start : start + self.micro_batch] for start in range(0, len(pairs), self.micro_batch)]


def train_plainly(model: PreTrainedModel, task: Task, peer: Peer, boundary: Boundary) -> Outcome:
    """A, B or C: gradient accumulation, clipping, AdamW."""
    from gsil_bench.training.optimizers import build_optimizer, trained_parameters

    outcome, optimizer = Outcome(), build_optimizer(model.parameters(), "adamw", LEARNING_RATE, (0.9, 0.999), 0.0)
    reference = copy.deepcopy(model).requires_grad_(False) if peer.resident else None
    started = time.perf_counter()
    with torch.no_grad():
        batches = [batch for step in task.steps for batch in task.micro_batches(step)]
        cached = iter([] if reference else [_sums(model, batch, peer, task.autocast) for batch in batches])
    outcome.reference_seconds = 0.0 if reference else time.perf_counter() - started
    if peer.recomputes:
        _recompute(model)
    boundary(0)
    for number, step in enumerate(task.steps):
        total = torch.zeros((), device=model.device)
        for batch in task.micro_batches(step):
            sums = _sums(model, batch, peer, task.autocast)
            with torch.no_grad():
                known = next(cached) if reference is None else _sums(reference, batch, peer, task.autocast)
            ratios = sums - known  # (2 * pairs,)
            loss = -logsigmoid(BETA * (ratios[: len(batch)] - ratios[len(batch) :])).sum() / len(step)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained_parameters(optimizer), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number == 0:
            outcome.loss, outcome.grad_norm = float(total), float(norm)
        boundary(1)
    return outcome


def _recompute(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # layers recompute in training mode only; these models have no dropout


def _sums(model: PreTrainedModel, batch: Sequence[TokenTree], peer: Peer, autocast: bool) -> Tensor:
    """Log-probs of the completions, (2 * pairs,): all demonstrations, then all self-generations."""
    ids, mask, scored = (item.to(model.device) for item in _pad(batch))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        if peer.whole_logits:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)  # (rows, width - 1)
            return (logps * scored).sum(1)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        chosen, targets = hidden[scored], ids[:, 1:][scored]
        weight = model.get_output_embeddings().weight
        parts = [
            checkpoint(_chunk, *arguments, weight, use_reentrant=False)
            for arguments in zip(chosen.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
        ]
    rows = scored.nonzero()[:, 0]
    return torch.zeros(len(ids), device=ids.device).index_add(0, rows, torch.cat(parts))


def _chunk(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Log-probs of some scored positions."""
    logits = (hidden @ weight.T).float()
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def _pad(batch: Sequence[TokenTree]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask, and which next token is scored: (rows, width), (rows, width), (rows, width - 1)."""
    rows = [(tree.prompt_ids, tree.completions[side]) for side in (0, 1) for tree in batch]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    scored = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        mask[row, :end] = 1
        scored[row, len(prompt) - 1 : end - 1] = True
    return ids, mask, scored


def import_trl() -> str:
    """Import what a TRL row needs; returns what is missing, or nothing."""
    try:
        import datasets
        import trl
        from trl import DPOTrainer
    except ImportError as error:
        return f"trl not installed ({error.name}): pip install trl==1.16.0"
    del datasets, trl, DPOTrainer
    return ""


def train_with_trl(model: PreTrainedModel, task: Task, variant: str, boundary: Boundary, folder: Path) -> Outcome:
    """TRL's DPOTrainer on the same pairs, already in tokens, in the same order."""
    from datasets import Dataset
    from trl import DPOTrainer

    outcome = Outcome()
    like_ours = variant != "trl-defaults"
    precomputed = variant == "trl-precomputed"

    class Trainer(DPOTrainer):  # type: ignore[misc]
        """Takes tokens instead of texts, and tells how long its precomputation takes; nothing else is changed."""

        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            started = time.perf_counter()
            result = super()._precompute_ref_logps(*arguments)
            outcome.reference_seconds = time.perf_counter() - started
            return result

    data = Dataset.from_list(
        [
            {
                "prompt_ids": list(tree.prompt_ids),
                "chosen_ids": list(tree.completions[0]),
                "rejected_ids": list(tree.completions[1]),
            }
            for tree in task.pairs
        ]
    )
    trainer = Trainer(
        model=model,
        ref_model=None if precomputed else copy.deepcopy(model),
        args=_arguments(task, like_ours, precomputed, model.device.type, folder),
        train_dataset=data,
        processing_class=_tokenizer(model.config.vocab_size),
        callbacks=[_callback(boundary)],
    )
    trainer.train()
    first = trainer.state.log_history[0]
    outcome.loss, outcome.grad_norm = float(first["loss"]), float(first["grad_norm"])
    return outcome


def _arguments(task: Task, like_ours: bool, precomputed: bool, device: str, folder: Path) -> Any:
    from trl import DPOConfig

    ours = {"bf16": task.autocast, "gradient_checkpointing": False, "lr_scheduler_type": "constant"} if like_ours else {}
    return DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=task.micro_batch,
        gradient_accumulation_steps=task.pairs_per_step // task.micro_batch,
        max_steps=len(task.steps),
        learning_rate=LEARNING_RATE,
        beta=BETA,
        max_grad_norm=MAX_GRAD_NORM,
        max_length=None,  # nothing is longer than its default, 1024; None also spares it a filter
        train_sampling_strategy="sequential",  # the pairs are shuffled already
        precompute_ref_log_probs=precomputed,
        use_cpu=device == "cpu",
        logging_first_step=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **ours,
    )


def _callback(boundary: Boundary) -> Any:
    from transformers import TrainerCallback

    class Boundaries(TrainerCallback):  # type: ignore[misc]
        """From the end of a step to the end of the next: collation and logging are part of it."""

        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            boundary(0)

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            boundary(1)

    return Boundaries()


def _tokenizer(size: int) -> Any:
    """TRL wants one, for its padding id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(min(size, 16))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="t0", eos_token="t1"
    )
