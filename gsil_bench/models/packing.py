"""Trees in one row: a prompt once, then its completions side by side, each of which sees the prompt and itself.

A prompt P with completions R and G takes P + R + G positions instead of the 2P + R + G of two sequences, and no padding.
Trees follow one another in a single row; positions restart at every tree, and every completion's positions go on where its prompt
ends. Which token may see which is kept twice: as segments (for attention segment by segment) and as a rule on token indices
(for FlexAttention); a test holds them equal. A completion's last token is scored but predicts nothing, so it is no input.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Layout = Literal["shared", "packed", "padded"]
"""The rungs: trees with a shared prompt; sequences one after the other without sharing; sequences side by side, padded."""

LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")
"""The fastest first, the reference last."""


@dataclass(frozen=True)
class TokenTree:
    """A prompt and its completions, in tokens. Every token of a completion is scored, none of the prompt's is."""

    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("a tree needs a prompt: the first token of a text has no log-prob")

    @property
    def scored_tokens(self) -> int:
        """Tokens that have a log-prob."""
        return sum(map(len, self.completions))

    @property
    def longest(self) -> int:
        """Tokens of the longest path from the prompt's first token to a completion's last."""
        return len(self.prompt_ids) + max(map(len, self.completions), default=0)

    def positions(self, layout: Layout) -> int:
        """Positions that the tree takes in a forward pass, its own padding included."""
        if layout == "padded":
            return len(self.completions) * self.longest
        inputs = [max(0, len(completion) - 1) for completion in self.completions]
        prompts = 1 if layout == "shared" else len(self.completions)
        return prompts * len(self.prompt_ids) + sum(inputs)

    def unshared(self) -> list[TokenTree]:
        """One tree for each completion."""
        return [TokenTree(self.prompt_ids, (completion,)) for completion in self.completions]


@dataclass(frozen=True)
class Segments:
    """Lengths of what lies in the row, tree by tree: the prompt, then the inputs of each completion."""

    trees: tuple[tuple[int, tuple[int, ...]], ...]
    padding: int = 0
    """Positions after the last tree that nothing scored can see."""
    _biases: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)

    @cached_property
    def lengths(self) -> list[int]:
        """Of all segments in order, the padding last."""
        lengths = [length for prompt, branches in self.trees for length in (prompt, *branches)]
        return [*lengths, self.padding] if self.padding else lengths

    def mask(self, seen: int, queries: int, window: int | None, device: torch.device) -> Tensor:
        """Which keys `queries` tokens may attend to that follow `seen` others; (queries, seen + queries), bool."""
        distance = (
            torch.arange(seen, seen + queries, device=device)[:, None] - torch.arange(seen + queries, device=device)[None, :]
        )
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)

    def bias(self, seen: int, queries: int, window: int | None, like: Tensor) -> Tensor:
        """The mask as SDPA adds it to scores, 0 or -inf: made once for all layers, where a bool would be converted in each."""
        key = (seen, queries, window, like.dtype)
        if key not in self._biases:
            hidden = ~self.mask(seen, queries, window, like.device)
            self._biases[key] = torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
        return self._biases[key]

    def rule(self, window: int | None, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same as a predicate on (batch, head, query index, key index), in FlexAttention's form."""
        tree, branch, position = (to_device(torch.tensor(values), device) for values in self._labels)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            allowed = (key <= query) & (tree[query] == tree[key]) & ((branch[key] == 0) | (branch[key] == branch[query]))
            return allowed if window is None else allowed & (position[query] - position[key] < window)

        return visible

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """FlexAttention's mask; made once for all layers with the same window."""
        if window not in self._block_masks:
            width = sum(self.lengths)
            make = _block_mask_maker(compiled=device.type == "cuda")
            self._block_masks[window] = make(self.rule(window, device), None, None, width, width, device=str(device))
        return self._block_masks[window]

    def positions(self) -> list[int]:
        """Distance of every input from its prompt's first token."""
        return self._labels[2]

    @cached_property
    def _labels(self) -> tuple[list[int], list[int], list[int]]:
        """Of every input: its tree, its branch (0 is the prompt) and its position. Padding is a tree of its own."""
        trees: list[int] = []
        branches: list[int] = []
        positions: list[int] = []
        for number, (prompt, lengths) in enumerate([*self.trees, (self.padding, ())]):
            for branch, length in enumerate((prompt, *lengths)):
                trees += [number] * length
                branches += [branch] * length
                positions += range(prompt if branch else 0, (prompt if branch else 0) + length)
        return trees, branches, positions


@dataclass(frozen=True)
class PackedRow:
    """A micro-batch: the row, and which position predicts which scored token."""

    input_ids: Tensor
    """(rows, width); one row unless the layout is padded."""
    position_ids: Tensor | None
    """(1, width), or None where the model counts for itself (padded)."""
    sources: Tensor
    """(scored,): index into the flattened (rows * width) positions of the input whose hidden state predicts the token."""
    targets: Tensor
    """(scored,): the scored tokens, tree by tree, completion by completion."""
    segments: Segments | None

    def to(self, device: torch.device) -> PackedRow:
        """The same on a device."""
        position_ids = None if self.position_ids is None else to_device(self.position_ids, device)
        ids, sources, targets = (to_device(item, device) for item in (self.input_ids, self.sources, self.targets))
        return PackedRow(ids, position_ids, sources, targets, self.segments)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: from memory that the GPU reads by itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@functools.cache
def _block_mask_maker(compiled: bool) -> Callable[..., BlockMask]:
    """FlexAttention's own; compiled, it never holds the whole mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if compiled else create_block_mask


def lay_out(trees: Sequence[TokenTree], layout: Layout, multiple: int = 1) -> PackedRow:
    """The trees as one micro-batch. The scored tokens come in the trees' order in every layout.

    Args:
        multiple: the row's width is padded up to a multiple of it, so that a compiled kernel sees few widths.
    """
    if layout == "padded":
        return _padded(trees)
    if layout == "packed":
        trees = [single for tree in trees for single in tree.unshared()]
    ids: list[int] = []
    sources: list[int] = []
    for tree in trees:
        ids += tree.prompt_ids
        last_of_prompt = len(ids) - 1
        for completion in tree.completions:
            if completion:
                sources += [last_of_prompt, *range(len(ids), len(ids) + len(completion) - 1)]
                ids += completion[:-1]
    padding = -len(ids) % multiple
    segments = Segments(
        tuple((len(tree.prompt_ids), tuple(max(0, len(completion) - 1) for completion in tree.completions)) for tree in trees),
        padding,
    )
    return PackedRow(
        torch.tensor([ids + [0] * padding]),
        torch.tensor([segments.positions()]),
        torch.tensor(sources, dtype=torch.long),
        _targets(trees),
        segments,
    )


def _padded(trees: Sequence[TokenTree]) -> PackedRow:
    """A sequence a row, padded on the right with id 0. A causal model does not see what lies to the right: no mask is needed."""
    rows = [(tree.prompt_ids, completion) for tree in trees for completion in tree.completions]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    sources: list[int] = []
    for row, (prompt, completion) in enumerate(rows):
        input_ids[row, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        start = row * width + len(prompt) - 1
        sources += range(start, start + len(completion))
    return PackedRow(input_ids, None, torch.tensor(sources, dtype=torch.long), _targets(trees), None)


def _targets(trees: Sequence[TokenTree]) -> Tensor:
    completions = itertools.chain.from_iterable(tree.completions for tree in trees)
    return torch.tensor(list(itertools.chain.from_iterable(completions)), dtype=torch.long)


def micro_batches(trees: Sequence[TokenTree], layout: Layout, tokens: int, most: int = 0) -> list[list[int]]:
    """Indices of trees in groups whose positions, padding included, stay within a budget; a tree above it is a group of its own.

    Without padding the fullest group that still has room takes the next largest tree (best fit decreasing), so groups are few and
    full. Padded sequences are grouped by length. The groups depend on lengths and order alone.

    Args:
        tokens: positions of one forward pass.
        most: trees in a group at most; 0 does not limit them.
    """
    order = sorted(range(len(trees)), key=lambda index: (-trees[index].positions(layout), index))
    if layout == "padded":
        return _by_length(trees, tokens, most)
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (positions left, group) of the groups that take more trees, ascending
    for index in order:
        size = trees[index].positions(layout)
        place = bisect.bisect_left(rooms, (size, -1))
        left, group = rooms.pop(place) if place < len(rooms) else (tokens, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(index)
        if not most or len(groups[group]) < most:
            bisect.insort(rooms, (left - size, group))
    return [sorted(group) for group in groups]


def _by_length(trees: Sequence[TokenTree], tokens: int, most: int) -> list[list[int]]:
    groups: list[list[int]] = []
    rows = width = 0
    for index in sorted(range(len(trees)), key=lambda index: (trees[index].longest, index)):
        rows, width = rows + len(trees[index].completions), trees[index].longest
        if not groups or rows * width > tokens or (most and len(groups[-1]) >= most):
            groups.append([])
            rows = len(trees[index].completions)
        groups[-1].append(index)
    return groups
