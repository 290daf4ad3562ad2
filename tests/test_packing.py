"""The layouts: what a row holds, which token may see which, and groups within a budget; expected values written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsil_bench.models.packing import LAYOUTS, Layout, TokenTree, lay_out, micro_batches

TREE = TokenTree((10, 11), ((20, 21, 22), (30,), (40, 41)))


def test_a_shared_row_by_hand() -> None:
    """Prompt 10 11, then each completion but its last token. 11 predicts the first token of every completion."""
    row = lay_out([TREE, TokenTree((50,), ((60, 61),))], "shared")
    assert row.input_ids.tolist() == [[10, 11, 20, 21, 40, 50, 60]]
    assert row.position_ids is not None and row.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert row.sources.tolist() == [1, 2, 3, 1, 1, 4, 5, 6]
    assert row.targets.tolist() == [20, 21, 22, 30, 40, 41, 60, 61]
    assert row.segments is not None and row.segments.trees == ((2, (2, 0, 1)), (1, (1,)))


def test_a_packed_row_repeats_the_prompt() -> None:
    row = lay_out([TREE], "packed")
    assert row.input_ids.tolist() == [[10, 11, 20, 21, 10, 11, 10, 11, 40]]
    assert row.sources.tolist() == [1, 2, 3, 5, 7, 8]
    assert row.targets.tolist() == [20, 21, 22, 30, 40, 41]


def test_padded_rows() -> None:
    row = lay_out([TREE], "padded")
    assert row.input_ids.tolist() == [[10, 11, 20, 21, 22], [10, 11, 30, 0, 0], [10, 11, 40, 41, 0]]
    assert row.sources.tolist() == [1, 2, 3, 6, 11, 12]
    assert row.position_ids is None


def test_width_is_padded_to_a_multiple_and_the_padding_is_a_tree_of_its_own() -> None:
    row = lay_out([TREE], "shared", multiple=8)
    assert row.input_ids.shape == (1, 8)
    assert row.segments is not None and row.segments.lengths == [2, 2, 0, 1, 3]
    visible = seen(row.segments, None)
    assert not visible[5:, :5].any() and not visible[:5, 5:].any()
    assert row.sources.max() < 5


def seen(segments: object, window: int | None) -> torch.Tensor:
    rule = segments.rule(window, torch.device("cpu"))  # type: ignore[attr-defined]
    width = sum(segments.lengths)  # type: ignore[attr-defined]
    zero = torch.tensor(0)
    return torch.stack([rule(zero, zero, torch.tensor(query), torch.arange(width)) for query in range(width)])


def test_who_sees_whom_by_hand() -> None:
    """Inputs: prompt a b, first completion c d, third e (the second has no input). c and e see a b, never each other."""
    row = lay_out([TREE], "shared")
    assert row.segments is not None
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert seen(row.segments, None).int().tolist() == expected
    # A window of 2 sees a token and the one before it on its own path: e, at position 2, sees b at position 1.
    windowed = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    assert seen(row.segments, 2).int().tolist() == windowed


lengths = st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=3))
forests = st.lists(lengths, min_size=1, max_size=4)


def grow(forest: list[tuple[int, list[int]]]) -> list[TokenTree]:
    return [TokenTree(tuple(range(1, prompt + 1)), tuple(tuple(range(50, 50 + n)) for n in sides)) for prompt, sides in forest]


@given(forests, st.sampled_from(["shared", "packed"]), st.sampled_from([None, 1, 3]), st.sampled_from([1, 4]))
def test_segments_and_rule_say_the_same(
    forest: list[tuple[int, list[int]]], layout: Layout, window: int | None, multiple: int
) -> None:
    """The masks of attention segment by segment, put together to a whole matrix, are FlexAttention's rule."""
    segments = lay_out(grow(forest), layout, multiple).segments
    assert segments is not None
    width, start = sum(segments.lengths), 0
    whole = torch.zeros(width, width, dtype=torch.bool)
    for prompt, branches in [*segments.trees, (segments.padding, ())]:
        whole[start : start + prompt, start : start + prompt] = segments.mask(0, prompt, window, torch.device("cpu"))
        at = start + prompt
        for length in branches:
            mask = segments.mask(prompt, length, window, torch.device("cpu"))
            whole[at : at + length, start : start + prompt] = mask[:, :prompt]
            whole[at : at + length, at : at + length] = mask[:, prompt:]
            at += length
        start = at
    assert torch.equal(whole, seen(segments, window))


@given(forests, st.sampled_from(LAYOUTS))
def test_every_scored_token_has_its_predecessor_as_source(forest: list[tuple[int, list[int]]], layout: Layout) -> None:
    trees = grow(forest)
    row = lay_out(trees, layout)
    before = [token for tree in trees for side in tree.completions for token in (tree.prompt_ids[-1], *side[:-1])]
    assert row.input_ids.flatten()[row.sources].tolist() == before
    assert row.targets.tolist() == [token for tree in trees for side in tree.completions for token in side]
    assert sum(tree.positions(layout) for tree in trees) <= row.input_ids.numel()
    if layout != "padded":
        assert sum(tree.positions(layout) for tree in trees) == row.input_ids.numel()


@given(forests, st.sampled_from(LAYOUTS), st.integers(1, 40), st.integers(0, 3))
def test_groups_hold_every_tree_once_within_the_budget(
    forest: list[tuple[int, list[int]]], layout: Layout, tokens: int, most: int
) -> None:
    trees = grow(forest)
    groups = micro_batches(trees, layout, tokens, most)
    assert sorted(index for group in groups for index in group) == list(range(len(trees)))
    for group in groups:
        width = lay_out([trees[index] for index in group], layout).input_ids.numel()
        assert width <= tokens or len(group) == 1
        assert not most or len(group) <= most


def test_groups_are_filled_with_little_waste() -> None:
    """Sizes 6 5 4 3 2 under 10: 6 + 4, 5 + 3 + 2."""
    trees = [TokenTree((1,) * size, ((2,),)) for size in (3, 6, 2, 5, 4)]
    assert micro_batches(trees, "shared", 10) == [[1, 4], [0, 2, 3]]


def test_a_tree_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="needs a prompt"):
        TokenTree((), ((1,),))
