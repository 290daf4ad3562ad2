"""Models of known shapes with random weights, and the arithmetic of a training step on one of them.

A step's floor is what cannot be left out: forward and backward of every token, each prompt once, and the head on scored tokens
alone. `work` is what a variant does: padding, prompts twice, the reference, recomputation. Attention is counted causally in
both, also where a padding mask makes a kernel compute the masked half.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsil_bench.models import flops
from gsil_bench.models.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-6}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-10m": LLAMA
    | {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 6}
    | {"num_key_value_heads": 6, "max_position_embeddings": 2048, "tie_word_embeddings": True},
    "qwen2.5-0.5b": {"model_type": "qwen2", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True}
    | {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "mistral-7b": {"model_type": "mistral", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "tie_word_embeddings": False}
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
"""Name → its public configuration (llama-10m: this project's)."""


def config_of(name: str) -> Any:
    """The configuration of a shape, or of a model folder."""
    from transformers import AutoConfig

    if name in CONFIGS:
        fields = dict(CONFIGS[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if not (Path(name) / "config.json").is_file():
        raise SystemExit(f"--model {name}: neither a folder with a model nor one of {', '.join(CONFIGS)}")
    return AutoConfig.from_pretrained(name, local_files_only=True)


def build(name: str, device: str, bf16: bool) -> PreTrainedModel:
    """The model with random weights from seed 0, made on the device, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if bf16 else torch.float32
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()


@dataclass(frozen=True)
class Rung:
    """What decides a variant's arithmetic."""

    layout: str = "padded"
    """"shared", "packed" or "padded"."""
    head: str = "scored"
    """Positions that the LM head runs on: "scored" or "all"."""
    recomputes: bool = True
    """Activation checkpointing."""
    resident: bool = False
    """A reference model's forward pass in every step."""
    recomputes_head: bool = True
    """Its logits are not kept for the backward pass."""


class Arithmetic:
    """FLOPs of training steps on one model: `gsil_bench.models.flops` for every rung."""

    def __init__(self, config: Any) -> None:
        """Read the shape."""
        cost, reason = flops.model_flops(config)
        if cost is None:
            raise SystemExit(f"what this model computes is not known: {reason}")
        self._cost = cost

    def floor(self, trees: Sequence[TokenTree]) -> float:
        """The least that a training step on these trees takes."""
        return sum(flops.tree_flops(self._cost, *_lengths(tree), backward=True) for tree in trees)

    def work(self, trees: Sequence[TokenTree], rung: Rung, micro_batch: int) -> float:
        """What a variant computes for them: the policy's passes, and a resident reference's."""
        again: list[flops.Recomputed] = ["head"] if rung.recomputes_head else []
        policy = self._passes(trees, rung, micro_batch, True, [*again, *(["backbone"] if rung.recomputes else [])])
        return policy + (self._passes(trees, rung, micro_batch, False, []) if rung.resident else 0.0)

    def _passes(
        self, trees: Sequence[TokenTree], rung: Rung, micro_batch: int, backward: bool, again: Sequence[flops.Recomputed]
    ) -> float:
        if rung.layout == "padded":
            total = 0.0
            for group in grouped(trees, micro_batch):
                width, rows = padded_to(group)
                scored = width * rows if rung.head == "all" else sum(tree.scored_tokens for tree in group)
                total += flops.padded_flops(self._cost, rows, width, scored, backward, again)
            return total
        one = flops.tree_flops if rung.layout == "shared" else flops.packed_flops
        return sum(one(self._cost, *_lengths(tree), backward, again) for tree in trees)


def grouped(trees: Sequence[TokenTree], micro_batch: int) -> list[Sequence[TokenTree]]:
    """Micro-batches of consecutive pairs."""
    return [trees[start : start + micro_batch] for start in range(0, len(trees), micro_batch)]


def padded_to(trees: Sequence[TokenTree]) -> tuple[int, int]:
    """Width and rows of a padded micro-batch."""
    return max(tree.longest for tree in trees), sum(len(tree.completions) for tree in trees)


def _lengths(tree: TokenTree) -> tuple[int, list[int]]:
    return len(tree.prompt_ids), [len(completion) for completion in tree.completions]


def padding_share(trees: Sequence[TokenTree], layout: str, micro_batch: int) -> float:
    """Share of the computed positions that hold no token."""
    if layout != "padded":
        return 0.0
    positions = sum(width * rows for width, rows in (padded_to(group) for group in grouped(trees, micro_batch)))
    tokens = sum(len(tree.prompt_ids) * len(tree.completions) + tree.scored_tokens for tree in trees)
    return 1 - tokens / positions


def matmul_peak(device: str, threads: int) -> tuple[float, float | None, str]:
    """FLOP/s of a large product of matrices on this machine now, the data sheet's where it is known, and the device's name."""
    import torch

    if device == "cpu":
        measured = flops.measured_peak_flops("float32", threads)
        return measured.flops, None, measured.label
    size, best, name = 8192, float("inf"), torch.cuda.get_device_name()
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(3):
            left @ right
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / 3)
    measured_here = 2 * size**3 / best
    return (
        measured_here,
        flops.peak_flops(name, "bf16"),
        f"{name}, measured: {measured_here / 1e12:.0f} TFLOP/s, {size} x {size} bf16",
    )
