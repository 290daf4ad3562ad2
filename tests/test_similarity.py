"""How alike answers are: the embedding by hand and against the model's own hidden states, and on the way to a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gsil_bench.models.checkpoint import load_model
from gsil_bench.models.packing import TokenTree
from gsil_bench.models.policy import Policy
from gsil_bench.training.batches import Branch, Tree
from gsil_bench.training.similarity import embeddings, similarities


class Table:
    """Stands for a policy whose hidden state after a token is a vector of a table, whatever is before it."""

    layout = "shared"
    states = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-3.0, 0.0]])

    def hidden_states(self, trees: Sequence[TokenTree]) -> Tensor:
        before = [(*tree.prompt_ids, *ids)[len(tree.prompt_ids) - 1 : -1] for tree in trees for ids in tree.completions]
        return self.states[torch.tensor([token for each in before for token in each])]


def tree(real: tuple[int, ...], *generated: tuple[int, ...]) -> Tree:
    return Tree("a", (4,), Branch(real), tuple(map(Branch, generated)))


def test_similarity_by_hand() -> None:
    """The demonstration (1, 2) is embedded as ((1, 0) + (0, 1)) / 2, a sample (3) as (1, 1): cosine 1. (1, 1) is (1, 0): 1/√2.
    (4) is (−3, 0): −1/√2. The prompt's own state, (−3, 0), is in none of them.
    """
    found = similarities(Table(), [tree((1, 2), (3,), (1, 1)), tree((1, 2), (4,))])  # type: ignore[arg-type]
    assert found[0] == pytest.approx([1.0, 1 / math.sqrt(2)])
    assert found[1] == pytest.approx([-1 / math.sqrt(2)])


@pytest.mark.parametrize("tokens", [8192, 20], ids=["together", "one at a time"])
def test_embeddings_are_the_models_own_hidden_states(tiny_model: Path, tokens: int) -> None:
    """Against the model's plain forward pass over prompt and completion: the mean of its last layer over the completion."""
    trees = [TokenTree((5, 6, 7), ((8, 9), (10, 11, 12, 13))), TokenTree((20,), ((21,), (5,), (7, 8)))]
    model = load_model(tiny_model)
    wanted = [
        model.model(torch.tensor([[*each.prompt_ids, *ids]])).last_hidden_state[0, len(each.prompt_ids) :].mean(0)
        for each in trees
        for ids in each.completions
    ]
    with Policy(model) as policy:
        found = embeddings(policy, trees, tokens)
    assert [len(each) for each in found] == [2, 3]
    torch.testing.assert_close(torch.cat(found).float(), torch.stack(wanted), atol=1e-5, rtol=1e-4)


def test_an_answer_is_as_alike_as_can_be_to_itself_alone(tiny_model: Path) -> None:
    with Policy(load_model(tiny_model)) as policy:
        ((same, other),) = similarities(policy, [Tree("a", (5, 6), Branch((7, 8, 9)), (Branch((7, 8, 9)), Branch((9, 40, 30))))])
    assert same == pytest.approx(1.0, abs=1e-6)
    assert other < 0.99
