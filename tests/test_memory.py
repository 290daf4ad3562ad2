"""What a step holds at its peak, tensor by tensor: it follows the token budget, not the longest pair nor the vocabulary."""

from __future__ import annotations

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM

from gsil_bench.models.packing import TokenTree, micro_batches
from gsil_bench.models.policy import Policy

HIDDEN = 64


def model_of(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def trees(prompt: int, answer: int, count: int) -> list[TokenTree]:
    return [TokenTree((3,) * prompt, ((5,) * answer, (7,) * answer)) for _ in range(count)]


def peak(vocabulary: int, given: list[TokenTree], budget: int) -> int:
    """Bytes at the worst moment of a step of several micro-batches, without the weights, their gradients, and what a micro-batch
    adds to the head's: three tensors of the head's size.
    """
    policy = Policy(model_of(vocabulary), "shared")
    tracker = MemTracker()
    tracker.track_external(policy)
    with tracker:
        for group in micro_batches(given, "shared", budget):
            policy([given[index] for index in group]).sum().backward()
            tracker.reset_mod_stats()  # it follows modules through one pass only
    held = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    own: int = sum(value for name, value in held.items() if str(name).rpartition(".")[2] in ("PARAM", "GRAD", "BUFFER"))
    return int(held["Total"] - own - vocabulary * HIDDEN * 4)


def test_peak_does_not_grow_with_the_vocabulary() -> None:
    """32,000 and 152,000 entries at the same hidden size: less than 10 % apart, though whole logits would be 80 and 380 MB."""
    given = trees(100, 100, 8)
    small, large = peak(32_000, given, 1200), peak(152_000, given, 1200)
    logits = 152_000 * 4 * sum(tree.scored_tokens for tree in given[:4])
    assert abs(large / small - 1) < 0.1
    assert large < logits / 10


def test_peak_grows_with_the_budget() -> None:
    given = trees(100, 100, 16)
    one, four = peak(1000, given, 1200), peak(1000, given, 4800)
    assert 3 < four / one < 4.5


def test_peak_does_not_grow_with_the_longest_pair() -> None:
    """The same budget filled with short pairs, and with short ones beside one that is eight times as long."""
    even, uneven = trees(100, 50, 16), [*trees(100, 50, 12), *trees(400, 600, 1)]
    assert peak(1000, uneven, 1700) < 1.25 * peak(1000, even, 1700)
