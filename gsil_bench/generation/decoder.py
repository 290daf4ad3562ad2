"""Forward passes of generation: prompts in, next-token logits out, then token by token.

`SlotDecoder` keeps many sequences in slots. Whether a model can be run that way is found out on first use: its logits must be
those of the model's plain forward pass, or `OneAtATime` is taken, with the model's own cache, and the reason is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gsil_bench.generation.slots import PASS, Fill, Piece, Slots, Step, use_slot_attention
from gsil_bench.models.attention import CannotShareError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Nats that a log-prob through slots may differ by from the plain forward pass in fp32."""
LOW_PRECISION_TOLERANCE = 0.25
"""The same in bf16."""


class Decoder(Protocol):
    """Runs a model over sequences in rows 0 … n-1."""

    def fill(self, pieces: Sequence[Piece]) -> Tensor:
        """Take prompts in; logits after each piece's last token, (pieces, vocabulary), fp32."""

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append a token to each of the first rows; logits after it, (rows, vocabulary), fp32."""

    def move(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Copy rows, up to a width."""

    def alone(self, tokens: Sequence[int]) -> Tensor:
        """Logits after a sequence, from a pass over it alone: a function of weights and tokens, (1, vocabulary), fp32."""


class SlotDecoder:
    """Sequences in slots. The model's attention must be that of slots.py."""

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int, autocast: bool) -> None:
        self._model, self._autocast = model, autocast
        self._slots = Slots(rows, capacity)

    def fill(self, pieces: Sequence[Piece]) -> Tensor:
        """See Decoder."""
        pass_ = Fill(pieces, self._slots, self._model.device)
        return self._logits(pass_, pass_.last)[0]

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """See Decoder."""
        return self._logits(Step(tokens, positions, self._slots, self._model.device), 1)[:, 0]

    def move(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """See Decoder."""
        self._slots.move(sources, targets, width)

    def alone(self, tokens: Sequence[int]) -> Tensor:
        """See Decoder."""
        pass_ = Fill([Piece(tuple(tokens))], None, self._model.device)
        return self._logits(pass_, pass_.last)[0]

    @torch.no_grad()
    def _logits(self, pass_: Fill | Step, keep: Tensor | int) -> Tensor:
        with _precision(self._model, self._autocast):
            output: Any = self._model(**pass_.inputs, use_cache=False, logits_to_keep=keep, **{PASS: pass_})
        logits: Tensor = output.logits.float()
        return logits


class OneAtATime:
    """A single sequence in the model's own cache: for models that cannot be run over slots."""

    def __init__(self, model: PreTrainedModel, autocast: bool) -> None:
        self._model, self._autocast = model, autocast
        self._cache: Any = None

    def fill(self, pieces: Sequence[Piece]) -> Tensor:
        """See Decoder; one piece without a prefix."""
        (piece,) = pieces
        self._cache = None
        return self._logits(piece.tokens)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """See Decoder; one row."""
        return self._logits(tokens)

    def move(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Nothing: there is one row."""

    @torch.no_grad()
    def alone(self, tokens: Sequence[int]) -> Tensor:
        """See Decoder."""
        with _precision(self._model, self._autocast):
            logits: Tensor = self._model(input_ids=self._ids(tokens), use_cache=False).logits[:, -1].float()
        return logits

    @torch.no_grad()
    def _logits(self, tokens: Sequence[int]) -> Tensor:
        cached = {} if self._cache is None else _named_cache(self._cache)
        with _precision(self._model, self._autocast):
            output: Any = self._model(input_ids=self._ids(tokens), use_cache=True, **cached)
        self._cache = output
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self._model.device)


def _named_cache(output: Any) -> dict[str, Any]:
    """The cache of an earlier pass under the name that the model takes it by."""
    found = {name: output[name] for name in ("past_key_values", "cache_params", "state") if output.get(name) is not None}
    if not found:
        raise CannotShareError("its forward pass returns no cache")
    return found


def _precision(model: PreTrainedModel, autocast: bool) -> Any:
    return torch.autocast(model.device.type, torch.bfloat16) if autocast else nullcontext()


def is_exact(model: PreTrainedModel, autocast: bool) -> bool:
    """Whether everything is computed in fp32."""
    return not autocast and all(parameter.dtype == torch.float32 for parameter in model.parameters())


@contextmanager
def attending_to_slots(model: PreTrainedModel, autocast: bool) -> Iterator[str]:
    """The model with the attention of slots for as long as the block lasts, if it passes the check.

    Yields:
        Why it cannot be run over slots, or nothing.
    """
    before, reason = model.config._attn_implementation, ""
    try:
        reason = _differs_from_plain(model, autocast)
        yield reason
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@torch.no_grad()
def _differs_from_plain(model: PreTrainedModel, autocast: bool) -> str:
    """Put the attention of slots into the model; why its logits are not those of before, and its own attention back, if so."""
    sequences = _probe(model)
    before = model.config._attn_implementation
    plain = OneAtATime(model, autocast)
    try:
        wanted = [plain.alone(sequence[:end]) for sequence in sequences for end in range(len(sequence) - 2, len(sequence) + 1)]
        use_slot_attention(model)
        got = _through_slots(SlotDecoder(model, len(sequences) + 1, max(map(len, sequences)), autocast), sequences)
    except (CannotShareError, RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        model.set_attn_implementation(before)
        return " ".join(str(error).split())[:200]
    difference = float((torch.cat(got).log_softmax(1) - torch.cat(wanted).log_softmax(1)).abs().max())
    exact = is_exact(model, autocast)
    rounding = 0.0 if exact else float(torch.cat(wanted).abs().max()) * torch.finfo(torch.bfloat16).eps
    if difference <= (TOLERANCE if exact else LOW_PRECISION_TOLERANCE) + rounding:
        return ""
    model.set_attn_implementation(before)
    return f"log-probs differ by {difference:.2g} nats from the plain forward pass"


def _through_slots(decoder: SlotDecoder, sequences: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Logits after each sequence without its last two tokens, without the last, and whole: filled, then two steps.

    The first two share a prefix of 4, which lies in a row of its own.
    """
    spare = len(sequences)
    decoder.fill([Piece(sequences[0][:4], (spare,))])
    decoder.move([spare, spare], [0, 1], 4)
    prompts = [sequence[:-2] for sequence in sequences]
    first = decoder.fill([Piece(prompt[4:], (row,), spare, 4) for row, prompt in enumerate(prompts[:2])])
    others = decoder.fill([Piece(prompt, (row,)) for row, prompt in enumerate(prompts[2:], 2)])
    passes = [torch.cat((first, others))]
    for back in (2, 1):
        tokens = [sequence[-back] for sequence in sequences]
        passes.append(decoder.step(tokens, [len(sequence) - back for sequence in sequences]))
    return [logits[row, None] for row in range(len(sequences)) for logits in passes]


def _probe(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Random sequences; longer than a sliding window where the window is short."""
    config = model.config.get_text_config()
    random = torch.Generator().manual_seed(0)
    long = min(getattr(config, "sliding_window", None) or 0, 64) + 11

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, config.vocab_size, (length,), generator=random).tolist())

    shared = ids(4)
    return [shared + ids(5), shared + ids(9), ids(3), ids(long)]
