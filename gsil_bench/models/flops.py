"""What a training step costs in floating-point operations, from a model's configuration alone, and what share of a device's peak
that is.

One multiplication with one addition is two FLOPs. Counted are matrix products: a weight costs 2 per token forward and 4 backward
(the gradients of its input and of itself); attention costs 4 · heads · head size per query, key that it sees and layer (scores
and weighted values), twice that backward; the head 2 · hidden · vocabulary per scored position. Not counted: embeddings (a
look-up), norms, biases, rotary positions, softmax, activations, router sorting, the optimiser: below 1 % at a billion parameters.

The units are those of PaLM's appendix B (Chowdhery et al., arXiv 2204.02311), with one difference: a query is charged for the
keys it sees, where PaLM charges it for the whole sequence. Its formula would call half of causal attention useful that is masked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Config = Mapping[str, Any]
"""A config.json as read; a PretrainedConfig is taken in its place everywhere."""
Recomputed = Literal["backbone", "head"]
"""What a backward pass computes again: "backbone" under activation checkpointing, "head" by a head that keeps no logits."""

GATED = frozenset(
    {"llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2", "olmo3"}
    | {"granite", "smollm3", "stablelm", "cohere", "cohere2", "glm", "glm4", "exaone4", "seed_oss"}
)
"""Families whose MLP has three matrices: gate, up and down."""
PLAIN = frozenset({"gpt2", "gpt_neox", "starcoder2", "phi", "nemotron"})
"""Families whose MLP has two."""
EXPERTS = {
    "mixtral": "intermediate_size",
    "olmoe": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
}
"""Families with gated experts, of which each token uses a few, and what they call an expert's size."""


class UnknownCostError(ValueError):
    """What a model computes is not known from its configuration."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one forward pass, by what they are paid for."""

    linear: float
    """Per token: 2 · parameters of the backbone that a token uses."""
    attention: float
    """Per query, key and layer: 4 · heads · head size."""
    windows: tuple[int | None, ...]
    """By layer: how many keys a query sees at most; None: all before it."""
    head: float
    """Per scored position: 2 · hidden · vocabulary."""

    def attend(self, start: int, queries: int) -> float:
        """Causal attention of `queries` tokens that follow `start` others and see them, in all layers."""
        return self.attention * sum(_keys_seen(start, queries, window) for window in self.windows)


def model_flops(config: Config | PretrainedConfig) -> tuple[ModelFlops | None, str]:
    """What a forward pass of a model costs, or None and why that is not known.

    Returns:
        (the record, "") or (None, one line): unknown families, and those with other layers than attention and MLP.
    """
    try:
        config = _text_config(config)
        heads, _, size = _heads(config)
        weights, windows = backbone_parameters(config), _windows(config)
    except UnknownCostError as error:
        return None, str(error)
    return ModelFlops(2.0 * weights, 4.0 * heads * size, windows, 2.0 * config.hidden_size * config.vocab_size), ""


def backbone_parameters(config: Config | PretrainedConfig, every_expert: bool = False) -> int:
    """Entries of all weight matrices between embedding and head. Without norms and biases: no matrix product has them.

    Args:
        every_expert: those that a token does not use as well: what is stored rather than what is computed with.

    Raises:
        UnknownCostError: the family is not one of GATED, PLAIN, EXPERTS.
    """
    config = _text_config(config)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads, key_heads, size = _heads(config)
    attention = 2 * hidden * size * (heads + key_heads)  # queries and output; keys and values
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    if config.model_type in GATED:
        return int(layers * (attention + 3 * hidden * inner))
    if config.model_type in PLAIN:
        return int(layers * (attention + 2 * hidden * inner))
    sparse = sum(_is_sparse(config, layer) for layer in range(layers))
    return int(layers * attention + sparse * _experts(config, every_expert) + (layers - sparse) * 3 * hidden * inner)


def tree_flops(
    model: ModelFlops,
    prompt: int,
    branches: Sequence[int],
    backward: bool,
    recompute: Collection[Recomputed] = (),
    frozen: bool = False,
) -> float:
    """FLOPs of a tree whose prompt is computed once: prompt + Σ (branch − 1) inputs, Σ branch scored positions.

    A completion's last token is scored and predicts nothing: it is no input (models/packing.py). Without `recompute` these are
    the useful FLOPs of an example, whatever layout it is computed in.

    Args:
        prompt: tokens, at least 1.
        branches: tokens of each completion.
        backward: forward and backward pass; otherwise the forward pass alone.
        recompute: what the backward pass computes again.
        frozen: the weights have no gradients of their own (LoRA; the adapters' few FLOPs are left out).

    Raises:
        ValueError: no prompt, or a negative length.
    """
    inputs = _inputs(prompt, branches)
    attention = model.attend(0, prompt) + sum(model.attend(prompt, length) for length in inputs)
    return _passes(model, prompt + sum(inputs), attention, sum(branches), backward, recompute, frozen)


def packed_flops(
    model: ModelFlops,
    prompt: int,
    branches: Sequence[int],
    backward: bool,
    recompute: Collection[Recomputed] = (),
    frozen: bool = False,
) -> float:
    """The same tree as sequences one after the other: the prompt is computed again for each branch. Arguments as `tree_flops`."""
    return sum(tree_flops(model, prompt, [branch], backward, recompute, frozen) for branch in branches)


def padded_flops(
    model: ModelFlops,
    rows: int,
    width: float,
    scored: int,
    backward: bool,
    recompute: Collection[Recomputed] = (),
    frozen: bool = False,
) -> float:
    """FLOPs of rows padded to one width, padding included, with causal attention over the width.

    Args:
        rows: sequences.
        width: tokens of each, with padding; may be a mean over batches.
        scored: positions the head is applied to, in all rows: rows · width where it is applied everywhere.
        backward: as the rest, see `tree_flops`.
    """
    return _passes(model, rows * width, rows * model.attend(0, round(width)), scored, backward, recompute, frozen)


def _passes(
    model: ModelFlops,
    tokens: float,
    attention: float,
    scored: int,
    backward: bool,
    recompute: Collection[Recomputed],
    frozen: bool,
) -> float:
    """FLOPs of all passes over a layout, from its counts of one forward pass."""
    again = {name: backward and name in recompute for name in ("backbone", "head")}
    weights = (1 if frozen else 2) * backward
    linear = (1 + weights + again["backbone"]) * model.linear * tokens
    attended = (1 + 2 * backward + again["backbone"]) * attention
    return linear + attended + (1 + weights + again["head"]) * model.head * scored


def _inputs(prompt: int, branches: Iterable[int]) -> list[int]:
    """Of each completion, the tokens that are an input."""
    branches = list(branches)
    if prompt < 1 or any(length < 0 for length in branches):
        raise ValueError(f"a prompt of {prompt} tokens with completions of {branches}")
    return [max(0, length - 1) for length in branches]


def _keys_seen(start: int, queries: int, window: int | None) -> int:
    """Σ of min(start + n, window) over n = 1 … queries."""
    free = queries if window is None else min(queries, max(0, window - start))
    return free * start + free * (free + 1) // 2 + (queries - free) * (window or 0)


def _text_config(config: Any) -> Any:
    """The language model's configuration as an object, with the family's defaults for what a config.json leaves out."""
    if isinstance(config, Mapping):
        from transformers import CONFIG_MAPPING

        values = dict(config)
        family = values.pop("model_type", None)
        if family not in CONFIG_MAPPING:
            raise UnknownCostError(f"model_type {family!r} is not one that transformers knows")
        config = CONFIG_MAPPING[family](**values)
    config = config.get_text_config()
    if config.model_type not in GATED | PLAIN | EXPERTS.keys():
        raise UnknownCostError(f"the layers of {config.model_type} are not known here")
    return config


def _heads(config: Any) -> tuple[int, int, int]:
    """Heads of queries, heads of keys, size of a head."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size


def _windows(config: Any) -> tuple[int | None, ...]:
    """By layer: how many keys a query sees at most."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * int(config.num_hidden_layers)
    strange = set(kinds) - {"full_attention", "sliding_attention"}
    if strange:
        raise UnknownCostError(f"what {', '.join(sorted(strange))} costs is not known here")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _is_sparse(config: Any, layer: int) -> bool:
    """Whether a layer of a family with experts has them."""
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or []
    return layer not in dense and (layer + 1) % step == 0


def _experts(config: Any, every_expert: bool) -> int:
    """Entries of one layer's router and experts."""
    used = config.num_experts if every_expert else config.num_experts_per_tok
    inner = used * getattr(config, EXPERTS[config.model_type])
    if config.model_type == "qwen2_moe":  # one expert that every token uses, with a gate of its own
        return int(config.hidden_size * (3 * (inner + config.shared_expert_intermediate_size) + config.num_experts + 1))
    return int(config.hidden_size * (3 * inner + config.num_experts))


class _Peak(NamedTuple):
    """A device and its peaks in TFLOP/s; None: the device does not have the format."""

    words: str
    """All of them are words of the device's name."""
    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float


# Vendors' data sheets, dense: half of what they print "with sparsity". 16-bit products are accumulated in fp32, which on GeForce
# cards is half of the figure that is advertised. fp32 without tensor cores (MI300: matrix cores). NVIDIA: H100, H200 (also NVL),
# A100, A30, A40, A10, L40, L40S, L4, T4, V100 and RTX professional data sheets; GH200, HGX B200 and GB200 NVL72 pages;
# Ampere GA102, Ada and RTX Blackwell architecture white papers (appendices). AMD: Instinct MI300X, MI325X data sheets.
# The A10G, of which sources disagree, is left out. The first entry whose words all occur counts.
_PEAKS = (
    _Peak("GB200", 2500, 2500, 1250, 80),
    _Peak("B200", 2250, 2250, 1125, 75),
    _Peak("GH200", 989.4, 989.4, 494.7, 66.9),
    _Peak("H200 NVL", 835.5, 835.5, 417.5, 60),
    _Peak("H200", 989.4, 989.4, 494.7, 66.9),
    _Peak("H100 NVL", 835.5, 835.5, 417.5, 60),
    _Peak("H100 PCIE", 756.5, 756.5, 378, 51),
    _Peak("H100 HBM3", 989.4, 989.4, 494.7, 66.9),  # as the driver calls the SXM module
    _Peak("H100 SXM", 989.4, 989.4, 494.7, 66.9),
    _Peak("H100 SXM5", 989.4, 989.4, 494.7, 66.9),
    _Peak("A100", 312, 312, 156, 19.5),
    _Peak("A30", 165, 165, 82, 10.3),
    _Peak("A40", 149.7, 149.7, 74.8, 37.4),
    _Peak("A10", 125, 125, 62.5, 31.2),
    _Peak("L40S", 362.05, 362.05, 183, 91.6),
    _Peak("L40", 181.05, 181.05, 90.5, 90.5),
    _Peak("L4", 121, 121, 60, 30.3),
    _Peak("RTX A6000", 154.8, 154.8, 77.4, 38.7),
    _Peak("RTX 6000 ADA", 364.2, 364.2, 182.1, 91.1),
    _Peak("RTX 5090", 209.5, 209.5, 104.8, 104.8),
    _Peak("RTX 4090", 165.2, 165.2, 82.6, 82.6),
    _Peak("RTX 3090", 71, 71, 35.6, 35.6),
    _Peak("V100 SXM2", None, 125, None, 15.7),
    _Peak("T4", None, 65, None, 8.1),
    _Peak("MI325X", 1307.4, 1307.4, 653.7, 163.4),
    _Peak("MI300X", 1307.4, 1307.4, 653.7, 163.4),
)
_OTHER_DEVICE = frozenset({"MIG", "LAPTOP", "MOBILE", "TI", "SUPER", "D", "VF"})
"""A word that makes it another device, or a slice of one."""
_FORMATS = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of a device in FLOP/s; None where it is not known. A peak is never guessed.

    Args:
        device_name: as the driver gives it ("NVIDIA H100 80GB HBM3"), or a marketing name ("H100 SXM").
        dtype: of the products' operands: "bf16", "fp16", "tf32", "fp32", or a torch dtype's name. "fp32" is without TF32.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if words & _OTHER_DEVICE:
        return None
    name = dtype.removeprefix("torch.").lower()
    name = _FORMATS.get(name, name)
    for peak in _PEAKS:
        if words >= set(peak.words.split()):
            teraflops = peak._asdict().get(name) if name != "words" else None
            return None if teraflops is None else teraflops * 1e12
    return None


@dataclass(frozen=True)
class MeasuredPeak:
    """The fastest square matrix product that was seen on this CPU: a ceiling by measurement, not by data sheet."""

    flops: float
    """FLOP/s."""
    dtype: str
    threads: int
    size: int
    """Rows of the fastest product."""

    @property
    def label(self) -> str:
        """For the reader."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"measured: {self.flops / 1e9:.0f} GFLOP/s, {self.size} × {self.size} {self.dtype} on {threads}"


def measured_peak_flops(dtype: str, threads: int, sizes: Sequence[int] = (512, 1024, 2048), seconds: float = 2.0) -> MeasuredPeak:
    """Best of a few square matrix products on this CPU. Something else that runs at the same time makes it too low.

    Args:
        dtype: a torch dtype's name: "float32", "bfloat16".
        threads: of torch, during the measurement.
        sizes: rows of the products; the first is measured in any case.
        seconds: after them, no further product is started.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        speeds = dict(_speeds(getattr(torch, dtype.removeprefix("torch.")), sizes, seconds))
    finally:
        torch.set_num_threads(before)
    size = max(speeds, key=lambda rows: speeds[rows])
    return MeasuredPeak(speeds[size], dtype.removeprefix("torch."), threads, size)


def _speeds(dtype: torch.dtype, sizes: Sequence[int], seconds: float, repeats: int = 5) -> Iterable[tuple[int, float]]:
    """Rows and the best FLOP/s of products of that size, until the time is up."""
    end = time.perf_counter() + seconds
    for size in sizes:
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        product = left @ right  # the first call plans and allocates
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(left, right, out=product)
            best = min(best, time.perf_counter() - start)
            if time.perf_counter() > end:
                yield size, 2 * size**3 / best
                return
        yield size, 2 * size**3 / best


def mfu(useful_flops: float, seconds: float, peak: float | None) -> float | None:
    """Model-FLOPs utilisation: the share of the peak that went into FLOPs the model needs (PaLM, appendix B).

    Useful FLOPs are those of forward and backward pass over real tokens: no padding, nothing computed twice, whether activations,
    logits or a prompt. That is `tree_flops` without `recompute`, for every layout: a layout that wastes less has the higher MFU.

    Args:
        useful_flops: of all devices' work.
        seconds: it took.
        peak: FLOP/s of all devices together; None: not known, and neither is the MFU.

    Raises:
        ValueError: seconds or peak is not positive.
    """
    if peak is None:
        return None
    if seconds <= 0 or peak <= 0:
        raise ValueError(f"{seconds} seconds at a peak of {peak} FLOP/s")
    return useful_flops / (seconds * peak)
