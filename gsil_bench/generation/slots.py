"""Keys and values of the sequences in flight, a row of memory for each, and the attention that reads them.

Live sequences lie in rows 0 … n-1 without gaps, so a step is one forward pass over n single tokens. Prompts come in as one packed
row of pieces, without padding; a prefix that several of them share is computed once and copied. As in attention.py one function
is registered with transformers and serves every model of its attention interface; it knows its layer by `layer_idx`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gsil_bench.models.attention import attend, refuse_unknown, use_attention
from gsil_bench.models.packing import Segments, to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "gsil_bench_slots"
PASS = "gsil_bench_pass"
"""The keyword under which a forward pass hands down what it reads and writes."""
WIDTH_CLASS = 16
"""Positions that a step reads are a multiple of it, so that kernels see few widths."""
CPU_BAND = 64
"""Neighbouring rows that a step reads up to a width of their own. On a CPU reading is what attention costs; on a GPU, with more
bandwidth and dearer calls, all rows are read up to the widest.
"""


@dataclass(frozen=True)
class Piece:
    """New tokens of a sequence: all of a prompt, or what follows a prefix that is there already."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...] = ()
    """Where its keys and values go: one row for each sample of the prompt, none if only its logits are wanted."""
    prefix: int | None = None
    """The row that holds its prefix, if it has one."""
    seen: int = 0
    """Tokens of that prefix."""


@dataclass
class Slots:
    """Memory for `rows` sequences of at most `capacity` tokens, made layer by layer when its shape is known.

    It starts as zeros, because what is masked is still multiplied.
    """

    rows: int
    capacity: int
    _keys: dict[int, Tensor] = field(default_factory=dict)
    """Layer → (rows, key-value heads, capacity, head size)."""
    _values: dict[int, Tensor] = field(default_factory=dict)

    def write(self, layer: int, key: Tensor, value: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Store (tokens, heads, head size) at a row and a position each."""
        for memory, new in ((self._keys, key), (self._values, value)):
            if layer not in memory:
                memory[layer] = new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[2])
            memory[layer][rows, :, positions] = new

    def read(self, layer: int, rows: int | slice, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row or of several, up to a width."""
        return self._keys[layer][rows, :, :width], self._values[layer][rows, :, :width]

    def move(self, sources: Sequence[int], targets: Sequence[int], width: int) -> None:
        """Copy whole rows, up to a width."""
        for memory in (*self._keys.values(), *self._values.values()):
            memory[list(targets), :, :width] = memory[list(sources), :, :width]


class Fill:
    """A forward pass over pieces, one after the other in a single row."""

    def __init__(self, pieces: Sequence[Piece], slots: Slots | None, device: torch.device) -> None:
        self.pieces, self.slots = pieces, slots
        self.lengths = [len(piece.tokens) for piece in pieces]
        self._masks = Segments(())
        ends = torch.tensor(self.lengths).cumsum(0)
        self.last = to_device(ends - 1, device)
        """Index of each piece's last token."""
        numbers = [number for piece in pieces for number in range(piece.seen, piece.seen + len(piece.tokens))]
        self.inputs = {
            "input_ids": to_device(torch.tensor([[token for piece in pieces for token in piece.tokens]]), device),
            "position_ids": to_device(torch.tensor([numbers]), device),
        }
        # Every token of a piece goes to each of its rows.
        copies = [
            (row, start + offset, piece.seen + offset)
            for piece, start in zip(pieces, (ends - torch.tensor(self.lengths)).tolist(), strict=True)
            for row in piece.rows
            for offset in range(len(piece.tokens))
        ]
        self._rows, self._from, self._to = (to_device(part, device) for part in torch.tensor(copies or [(0, 0, 0)]).unbind(1))
        self._stores = bool(copies)

    def attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Piece by piece: (1, heads, width, head size) in, (1, width, heads, head size) out."""
        if self._stores and self.slots is not None:
            new_keys, new_values = (tensor[0].transpose(0, 1)[self._from] for tensor in (key, value))
            self.slots.write(layer, new_keys, new_values, self._rows, self._to)
        groups = query.shape[1] // key.shape[1]
        parts = zip(self.pieces, *(torch.split(tensor, self.lengths, 2) for tensor in (query, key, value)), strict=True)
        attended = []
        for piece, queries, keys, values in parts:
            if piece.prefix is not None and self.slots is not None:
                earlier = self.slots.read(layer, slice(piece.prefix, piece.prefix + 1), piece.seen)
                keys, values = torch.cat((earlier[0], keys), 2), torch.cat((earlier[1], values), 2)
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            attended.append(attend(queries, keys, values, piece.seen, self._masks, scaling, window, softcap))
        return torch.cat(attended, 2).transpose(1, 2)


class Step:
    """A forward pass over the next token of each live sequence."""

    def __init__(self, tokens: Sequence[int], positions: Sequence[int], slots: Slots, device: torch.device) -> None:
        self.slots, self.count = slots, len(tokens)
        band = CPU_BAND if device.type == "cpu" else self.count
        starts = range(0, self.count, band)
        self._bands = [(slice(start, start + band), self._width(positions[start : start + band])) for start in starts]
        self._positions = to_device(torch.tensor(positions), device)  # (rows,)
        self._rows = torch.arange(self.count, device=device)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}
        self.inputs = {
            "input_ids": to_device(torch.tensor(tokens), device)[:, None],
            "position_ids": self._positions[:, None],
        }

    def attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """(rows, heads, 1, head size) in, (rows, 1, heads, head size) out."""
        self.slots.write(layer, key[:, :, 0], value[:, :, 0], self._rows, self._positions)
        # Query heads that share keys stand side by side as if they were positions: nothing is copied for them.
        grouped = query.reshape(self.count, key.shape[1], -1, query.shape[3])
        mask = self._mask(window, query.dtype)
        attended = []
        for rows, width in self._bands:
            read = self.slots.read(layer, slice(rows.start, min(rows.stop, self.count)), width)
            attended.append(_attend_step(grouped[rows], *read, mask[rows, ..., :width], scaling, softcap))
        return torch.cat(attended).reshape(self.count, 1, -1, query.shape[3])

    def _width(self, positions: Sequence[int]) -> int:
        return min(self.slots.capacity, -(-(max(positions) + 1) // WIDTH_CLASS) * WIDTH_CLASS)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a position may be seen, -inf elsewhere; (rows, 1, 1, width). What lies behind a row's end is another's rest."""
        if (window, dtype) not in self._masks:
            widest = max(width for _, width in self._bands)
            distance = self._positions[:, None] - torch.arange(widest, device=self._positions.device)[None, :]
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self._masks[window, dtype] = mask[:, None, None, :]
        return self._masks[window, dtype]


def _attend_step(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attention of (rows, key-value heads, query heads of each, head size) to what is in the rows' slots."""
    if softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    scores = query @ keys.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype) @ values


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a pass over sequences in slots.

    Raises:
        CannotShareError: no pass reached this layer, or something that changes attention is not known here.
    """
    pass_: Fill | Step | None = kwargs.pop(PASS, None)
    layer: int | None = getattr(module, "layer_idx", None)
    refuse_unknown(module, pass_ is not None and layer is not None and attention_mask is None, sliding_window, kwargs)
    assert pass_ is not None and layer is not None
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in fp32
    return pass_.attention(layer, query, key, value, scaling, sliding_window, softcap), None


def use_slot_attention(model: PreTrainedModel) -> str:
    """`use_attention` over slots."""
    return use_attention(model, NAME, slot_attention)
