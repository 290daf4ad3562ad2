"""The engine that runs everywhere: a transformers model in this process, with continuous batching.

Sequences lie in slots (slots.py). A finished one leaves at once, and when a quarter of the rows is free, waiting prompts take
their place, packed into one forward pass; samples of one prompt share its pass, prompts with a long common beginning share that.
Rows are as many as the memory budget holds at the longest sequence, and half as many after memory ran out.

An answer does not depend on its neighbours. Sampling inverts the cumulative distribution at a number that belongs to (seed,
prompt, sample, position). Batches still differ in the last bits of their logits, so a choice that another one comes close to is
made again from a forward pass over that sequence alone (sampling.py has the margins). In fp32, whose rounding is far below them,
answers are therefore the same in any batch. In bf16 too many choices are close: with `batch_invariant` prompts are completed one
at a time there.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import transformers
from torch import Tensor

from gsil_bench.errors import UserError
from gsil_bench.generation.decoder import Decoder, OneAtATime, SlotDecoder, attending_to_slots, is_exact
from gsil_bench.generation.engine import Completion, Request, too_long, unknown_tokens
from gsil_bench.generation.engines import Served
from gsil_bench.generation.sampling import choose
from gsil_bench.generation.slots import Piece
from gsil_bench.models.logprobs import tree_logps
from gsil_bench.models.packing import TokenTree
from gsil_bench.models.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ROWS = 256
"""Sequences in flight at most."""
REFILL = 0.25
"""Share of the rows that must be free before waiting prompts take their place."""
FILL_TOKENS = 8192
"""Prompt tokens of a forward pass at most."""
LOGITS = 2**25
"""Elements of a step's logits at most: rows times vocabulary."""
SHARED = 32
"""Tokens that prompts must have in common for their beginning to be computed once."""
FALLING = 4
"""Requests that need a so much shorter slot than the longest ones are served after them, in slots of their own."""
STOP_MARGIN = 8
"""Tokens that are decoded before those that a stop can consist of: the first may lack its space, or half a character."""
CPU_BYTES, CPU_SHARE, GPU_SHARE = 4 * 2**30, 0.25, 0.8
"""Memory for keys and values: shares of what is free, and on a CPU no more than this."""


VERSION = f"transformers-{transformers.__version__}/v2"


@dataclass(frozen=True)
class TransformersOptions:
    """What the engine can be told (`--engine-set KEY=VALUE`)."""

    in_process: ClassVar[bool] = True
    weights: ClassVar[None] = None
    batch_invariant: bool | None = None
    """Answers that do not depend on their neighbours. In fp32 that costs next to nothing, and None takes it; in bf16 prompts are
    then completed one at a time."""
    memory_gb: float | None = None
    """For keys and values; None takes a share of what is free."""

    def check(self, device: str, dtype: str, autocast: bool) -> None:
        """It runs everywhere."""
        if self.memory_gb is not None and not 0 < self.memory_gb < float("inf"):
            raise UserError(f"--engine-set memory_gb={self.memory_gb}: must be a number above 0")

    def identity(self, dtype: str, autocast: bool) -> str:
        """Engine, version, and whether answers are the same in any batch."""
        return VERSION + ("/batch-invariant" if self.is_invariant(dtype, autocast) else "")

    def is_invariant(self, dtype: str, autocast: bool) -> bool:
        """Whether answers are the same in any batch."""
        return dtype == "fp32" and not autocast if self.batch_invariant is None else self.batch_invariant

    def make(self, served: Served) -> TransformersEngine:
        """The engine on the model in this process."""
        memory = None if self.memory_gb is None else int(self.memory_gb * 2**30)
        invariant = self.is_invariant(served.dtype, served.autocast)
        ends, context = served.end_token_ids, served.context_length
        return TransformersEngine(served.load(), ends, context, served.decode, served.autocast, invariant, memory)


class TransformersEngine:
    """Completes prompts with a model in this process."""

    def __init__(
        self,
        model: PreTrainedModel,
        end_token_ids: Sequence[int],
        context_length: int,
        decode: Callable[[Sequence[int]], str],
        autocast: bool = False,
        batch_invariant: bool = True,
        memory_bytes: int | None = None,
    ) -> None:
        """Serve a model.

        Args:
            decode: text of tokens, without special ones.
            autocast: compute matrix products in bf16.
            batch_invariant, memory_bytes: see TransformersOptions.
        """
        self.model, self.autocast = model, autocast
        self.end_token_ids = frozenset(end_token_ids)
        self.context_length, self.decode = context_length, decode
        self.notes: list[str] = []
        """Why something slower than possible is used."""
        self.batch_invariant = batch_invariant
        self._memory_bytes = memory_bytes

    @property
    def identity(self) -> str:
        """Engine, version, and whether answers are the same in any batch."""
        return VERSION + ("/batch-invariant" if self.batch_invariant else "")

    def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        """See Engine."""
        fitting = []
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for index, request in enumerate(requests):
            error = too_long(request.prompt_ids, self.context_length) or unknown_tokens(request.prompt_ids, vocabulary)
            if error:
                yield index, error
            elif self._budget(request) == 0:
                yield index, self._completion([], None)
            else:
                fitting.append(index)
        if fitting:
            with self._attention() as reason:
                self._note(reason)
                for group in self._groups(requests, fitting):
                    yield from self._serve(requests, group, 1 if reason else self._rows(requests, group))

    def logps(self, trees: Sequence[TokenTree]) -> list[list[tuple[float, ...]]]:
        """See Engine."""
        with torch.no_grad(), Policy(self.model, autocast=self.autocast) as policy:
            parts = iter(tree_logps(policy, trees, FILL_TOKENS))
        return [[tuple(next(parts).tolist()) for _ in tree.completions] for tree in trees]

    def close(self) -> None:
        """Nothing: the model is the caller's."""

    def _attention(self) -> AbstractContextManager[str]:
        """The model for as long as it completes; why that is one prompt at a time, or nothing."""
        if self.batch_invariant and not is_exact(self.model, self.autocast):
            return nullcontext("in bf16 only then an answer does not depend on its neighbours (batch_invariant)")
        return attending_to_slots(self.model, self.autocast)

    def _note(self, reason: str) -> None:
        if reason and reason not in self.notes:
            self.notes.append(reason)
            logger.warning("%s: prompts are completed one at a time: %s", type(self.model).__name__, reason)

    def _budget(self, request: Request) -> int:
        """New tokens that a request gets at most."""
        return min(request.sampling.max_new_tokens, self.context_length - len(request.prompt_ids))

    def _need(self, request: Request) -> int:
        """Tokens of a request's slot: its last new token is chosen but not written."""
        return len(request.prompt_ids) + self._budget(request) - 1

    def _groups(self, requests: Sequence[Request], indices: Sequence[int]) -> list[list[int]]:
        """Requests that are served together, those that need the longest slots first."""
        groups: list[list[int]] = []
        for index in sorted(indices, key=lambda index: -self._need(requests[index])):
            if not groups or self._need(requests[index]) * FALLING < self._need(requests[groups[-1][0]]):
                groups.append([])
            groups[-1].append(index)
        return [_in_order(requests, group) for group in groups]

    def _rows(self, requests: Sequence[Request], group: Sequence[int]) -> int:
        """Sequences in flight that memory allows."""
        longest = max(self._need(requests[index]) for index in group)
        budget = self._memory_bytes or _free_bytes(self.model.device)
        config = self.model.config.get_text_config()
        most: int = min(ROWS, LOGITS // config.vocab_size, budget // (longest * _bytes_per_token(self.model)) - 1)
        return max(1, min(most, len(group)))

    def _serve(self, requests: Sequence[Request], group: Sequence[int], rows: int) -> Iterator[tuple[int, Completion]]:
        """Complete a group; when memory runs out, what is unfinished starts again in half as many rows."""
        left = dict.fromkeys(group)
        while left:
            capacity = max(self._need(requests[index]) for index in left)
            flight = _Flight(self, requests, deque(left), rows, capacity)
            try:
                for index, completion in flight.run():
                    del left[index]
                    yield index, completion
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if rows == 1 or not _is_out_of_memory(error):
                    raise
            if left:
                del flight
                rows = max(1, rows // 2)
                logger.warning("out of memory: these prompts go on %d at a time", rows)
                torch.cuda.empty_cache()

    def _completion(self, tokens: Sequence[int], logps: Sequence[float] | None, stopped: bool = False) -> Completion:
        finished = stopped or (bool(tokens) and tokens[-1] in self.end_token_ids)
        kept = None if logps is None else tuple(logps)
        return Completion(tuple(tokens), self.decode(tokens), "stop" if finished else "length", "", kept)


@dataclass
class _Live:
    """A sequence in flight."""

    index: int
    request: Request
    budget: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    stopped: bool = False
    """Whether the text of the new tokens holds a stop."""

    def __post_init__(self) -> None:
        self.uniforms = self.request.uniforms().tolist()
        stops = self.request.sampling.stops
        self._window = STOP_MARGIN + max((len(stop.encode()) for stop in stops), default=0)

    def look_for_stops(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Note whether the newest token completes a stop. A token has a byte at least, so that a few of the last ones tell; what
        they show must be in the whole text too. A stop with skipped tokens inside may be missed: then the answer goes on.
        """
        stops, tail = self.request.sampling.stops, decode(self.tokens[-self._window :])
        if any(stop in tail for stop in stops):
            whole = decode(self.tokens)
            self.stopped = any(stop in whole for stop in stops)

    @property
    def position(self) -> int:
        """Of the newest token, which the next pass takes in."""
        return len(self.request.prompt_ids) + len(self.tokens) - 1


@dataclass
class _Flight:
    """The sequences of a group, from the first prompt taken in to the last completion."""

    engine: TransformersEngine
    requests: Sequence[Request]
    waiting: deque[int]
    rows: int
    capacity: int
    _live: list[_Live] = field(default_factory=list)
    """By row."""
    _shared: tuple[int, ...] = ()
    """The tokens of the prefix in the spare row."""

    def __post_init__(self) -> None:
        engine = self.engine
        one = bool(engine.notes)
        self._decoder: Decoder = (
            OneAtATime(engine.model, engine.autocast)
            if one
            else SlotDecoder(engine.model, self.rows + 1, self.capacity, engine.autocast)
        )

    def run(self) -> Iterator[tuple[int, Completion]]:
        """Every completion as it is finished."""
        while self.waiting or self._live:
            if self.waiting and len(self._live) <= self.rows * (1 - REFILL):
                self._admit()
            else:
                logits = self._decoder.step([live.tokens[-1] for live in self._live], [live.position for live in self._live])
                self._extend(self._live, logits)
            yield from self._finished()

    def _admit(self) -> None:
        """Take waiting prompts in: each prompt once, whatever the number of its samples."""
        new: list[_Live] = []
        prompts: dict[tuple[int, ...], list[int]] = {}  # to their rows
        tokens = 0
        while self.waiting and len(self._live) + len(new) < self.rows:
            request = self.requests[self.waiting[0]]
            tokens += 0 if request.prompt_ids in prompts else len(request.prompt_ids)
            if new and tokens > FILL_TOKENS:
                break
            prompts.setdefault(request.prompt_ids, []).append(len(self._live) + len(new))
            new.append(_Live(self.waiting.popleft(), request, self.engine._budget(request)))
        pieces = self._pieces(prompts)
        logits = self._decoder.fill(pieces)
        which = {prompt: number for number, prompt in enumerate(prompts)}
        self._extend(new, logits[[which[live.request.prompt_ids] for live in new]])
        self._live += new

    def _pieces(self, prompts: dict[tuple[int, ...], list[int]]) -> list[Piece]:
        """What has to be computed of the prompts: all of them, or what follows the prefix in the spare row."""
        seen = self._share(list(prompts))
        if not seen:
            return [Piece(prompt, tuple(rows)) for prompt, rows in prompts.items()]
        targets = [row for rows in prompts.values() for row in rows]
        self._decoder.move([self.rows] * len(targets), targets, seen)
        return [Piece(prompt[seen:], tuple(rows), self.rows, seen) for prompt, rows in prompts.items()]

    def _share(self, prompts: list[tuple[int, ...]]) -> int:
        """Length of the prefix in the spare row that all prompts begin with, put there now if it is worth it; or 0."""
        if self._shared and all(_common(prompt[:-1], self._shared) == len(self._shared) for prompt in prompts):
            return len(self._shared)
        common = min(_common(prompts[0], prompt[:-1]) for prompt in prompts)
        if self.rows == 1 or len(prompts) < 2 or common < SHARED or 2 * common * len(prompts) < sum(map(len, prompts)):
            return 0
        self._shared = prompts[0][:common]
        self._decoder.fill([Piece(self._shared, (self.rows,))])
        return common

    def _extend(self, lives: Sequence[_Live], logits: Tensor) -> None:
        """Choose the next token of sequences, from logits (sequences, vocabulary)."""
        samplings = [live.request.sampling for live in lives]
        choice = choose(logits, samplings, [live.uniforms[len(live.tokens)] for live in lives])
        tokens: list[int] = choice.tokens.tolist()
        if self.engine.batch_invariant:
            for row in choice.close.nonzero().flatten().tolist():
                tokens[row] = self._settle(lives[row])
        wanted = any(live.request.logps for live in lives)
        logps = logits.log_softmax(1).gather(1, torch.tensor(tokens, device=logits.device)[:, None]) if wanted else None
        for row, live in enumerate(lives):
            live.tokens.append(tokens[row])
            if logps is not None:
                live.logps.append(float(logps[row]))
            if live.request.sampling.stops:
                live.look_for_stops(self.engine.decode)

    def _settle(self, live: _Live) -> int:
        """The token of a close choice: a function of weights and tokens alone."""
        logits = self._decoder.alone([*live.request.prompt_ids, *live.tokens])
        return int(choose(logits, [live.request.sampling], [live.uniforms[len(live.tokens)]]).tokens)

    def _finished(self) -> Iterator[tuple[int, Completion]]:
        """Hand out what is complete, and close the gaps that it leaves with the last rows."""
        ended = self.engine.end_token_ids
        done = [
            row
            for row, live in enumerate(self._live)
            if live.stopped or live.tokens[-1] in ended or len(live.tokens) >= live.budget
        ]
        if not done:
            return
        completions = [self._live[row] for row in done]
        count = len(self._live) - len(done)
        gaps, gone = [row for row in done if row < count], set(done)
        movers = [row for row in range(count, len(self._live)) if row not in gone]
        if movers:
            self._decoder.move(movers, gaps, max(self._live[row].position for row in movers) + 1)
        for gap, mover in zip(gaps, movers, strict=True):
            self._live[gap] = self._live[mover]
        del self._live[count:]
        for live in completions:
            yield live.index, self.engine._completion(live.tokens, live.logps if live.request.logps else None, live.stopped)


def _in_order(requests: Sequence[Request], group: Sequence[int]) -> list[int]:
    """Longest prompts first, so that neighbouring rows are of similar length; but equal prompts, and those of which half is the
    same, stand together.
    """
    families: list[list[int]] = []
    before: tuple[int, ...] = ()
    for index in sorted(group, key=lambda index: (requests[index].prompt_ids, requests[index].sample)):
        prompt = requests[index].prompt_ids
        if not before or 2 * _common(prompt, before) < len(prompt):
            families.append([])
        families[-1].append(index)
        before = prompt

    def falling(index: int) -> int:  # sorting keeps the order of equals
        return -len(requests[index].prompt_ids)

    ordered = [sorted(family, key=falling) for family in families]
    return [index for family in sorted(ordered, key=lambda family: falling(family[0])) for index in family]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for number, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return number
    return min(len(one), len(other))


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Of keys and values in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


def _free_bytes(device: torch.device) -> int:
    """Memory that keys and values may take."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + reusable))
    return min(CPU_BYTES, int(CPU_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def _is_out_of_memory(error: RuntimeError) -> bool:
    """A CPU allocator has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
