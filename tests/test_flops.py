"""FLOPs of a training step: against transformers' own parameters, torch's counter, and the table of arithmetic they come from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gsil_bench.models.flops import (
    EXPERTS,
    GATED,
    PLAIN,
    ModelFlops,
    Recomputed,
    backbone_parameters,
    measured_peak_flops,
    mfu,
    model_flops,
    packed_flops,
    padded_flops,
    peak_flops,
    tree_flops,
)

MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "sliding_window": 4096,
}
QWEN_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "sliding_window": 32768,
    "use_sliding_window": False,
}
TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 4, "n_head": 4, "vocab_size": 101, "n_positions": 64},
    "gpt_neox": {name: value for name, value in TINY.items() if name != "num_key_value_heads"},
    "gemma2": {**TINY, "head_dim": 20, "sliding_window": 8},  # heads · head size is not the hidden size
    "ministral": {**TINY, "head_dim": 12},
    "mixtral": {**TINY, "num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {**TINY, "num_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {**TINY, **QWEN_EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "qwen3_moe": {**TINY, **QWEN_EXPERTS, "mlp_only_layers": [1], "head_dim": 16},
}


def tiny(family: str, **changes: Any) -> PretrainedConfig:
    config: PretrainedConfig = CONFIG_MAPPING[family](**{**VARIANTS.get(family, TINY), **changes})
    return config


def of(config: dict[str, Any] | PretrainedConfig) -> ModelFlops:
    flops, reason = model_flops(config)
    assert flops is not None, reason
    return flops


def matrices_of(model: PreTrainedModel) -> int:
    """Entries of all parameters with two dimensions or more, but the embeddings' and the head's."""
    outside = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    left_out = {id(module.weight) for module in [*outside, model.get_output_embeddings()]}
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1 and id(parameter) not in left_out)


@pytest.mark.parametrize("family", sorted(GATED | PLAIN | EXPERTS.keys()))
def test_parameters_are_those_of_the_real_model(family: str) -> None:
    config = tiny(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert backbone_parameters(config, every_expert=True) == matrices_of(model)


def test_parameters_by_hand() -> None:
    """Mistral-7B: 32 · (2 · 4096² + 2 · 4096 · 1024 + 3 · 4096 · 14336); with embedding and head 7.24 billion."""
    mistral = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert backbone_parameters(MISTRAL_7B) == mistral == 6_979_321_856
    assert mistral + 2 * 4096 * 32000 == pytest.approx(7.24e9, rel=1e-3)
    qwen = 24 * (2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864)
    assert backbone_parameters(QWEN_05B) == qwen == 357_826_560


def test_a_token_pays_for_the_experts_it_uses() -> None:
    """Mixtral: 2 of 6 experts. The other four of each of four layers, 3 · 48 · 80 entries each, are stored and not used."""
    config = tiny("mixtral")
    unused = backbone_parameters(config, every_expert=True) - backbone_parameters(config)
    assert unused == 4 * 4 * 3 * 48 * 80
    assert of(config).linear == 2 * backbone_parameters(config)


@pytest.mark.parametrize("family", ["mamba", "t5", "deepseek_v3", "falcon", "llama4_text", "qwen3_next"])
def test_unknown_families_are_refused_with_a_reason(family: str) -> None:
    flops, reason = model_flops(CONFIG_MAPPING[family]())
    assert flops is None and family in reason


def test_other_reasons_to_refuse() -> None:
    assert model_flops({"model_type": "nobody-knows"}) == (None, "model_type 'nobody-knows' is not one that transformers knows")
    assert model_flops({"hidden_size": 8})[0] is None
    linear = tiny("qwen2", layer_types=["full_attention"] * 3 + ["linear_attention"])
    assert model_flops(linear) == (None, "what linear_attention costs is not known here")


def test_windows_come_from_the_configuration() -> None:
    assert of(MISTRAL_7B).windows == (4096,) * 32
    assert of({**MISTRAL_7B, "sliding_window": None}).windows == (None,) * 32
    assert of(QWEN_05B).windows == (None,) * 24  # use_sliding_window is off
    assert of(tiny("gemma2")).windows == (8, None, 8, None)


def test_attention_by_hand() -> None:
    """A full layer, one with a window of 3; a key costs 10. After 2 tokens, 3 queries see 3 + 4 + 5 and 3 + 3 + 3 keys."""
    flops = ModelFlops(linear=0, attention=10, windows=(None, 3), head=0)
    assert flops.attend(2, 3) == 10 * (12 + 9)
    assert flops.attend(0, 4) == 10 * (10 + (1 + 2 + 3 + 3))
    assert flops.attend(7, 2) == 10 * (8 + 9 + 3 + 3)  # the window is behind the start
    assert flops.attend(5, 0) == 0


HAND = ModelFlops(linear=1000, attention=1, windows=(None,), head=100)


def test_layouts_by_hand() -> None:
    """Prompt 4, completions 3 and 1: inputs 4 + 2 + 0, 4 scored. Keys: 1 + 2 + 3 + 4, then 5 + 6."""
    assert tree_flops(HAND, 4, [3, 1], backward=False) == 6 * 1000 + (10 + 11) + 4 * 100
    # Packed: the prompt twice.
    assert packed_flops(HAND, 4, [3, 1], backward=False) == 10 * 1000 + (10 + 10 + 11) + 4 * 100
    # Padded: two rows of 7 tokens, 28 keys each.
    assert padded_flops(HAND, 2, 7, scored=4, backward=False) == 14 * 1000 + 2 * 28 + 400


def test_a_branch_without_tokens_costs_nothing_where_the_prompt_is_shared() -> None:
    assert tree_flops(HAND, 4, [3, 0], True) == tree_flops(HAND, 4, [3], True)
    assert packed_flops(HAND, 4, [3, 0], False) == tree_flops(HAND, 4, [3], False) + 4 * 1000 + 10


@pytest.mark.parametrize(
    ("recompute", "frozen", "passes"),
    [
        ((), False, (3, 3, 3)),
        (("head",), False, (3, 3, 4)),
        (("backbone", "head"), False, (4, 4, 4)),
        ((), True, (2, 3, 2)),  # LoRA: no gradients of weights; attention has none, so it costs what it did
        (("backbone",), True, (3, 4, 2)),
    ],
)
def test_passes(recompute: Collection[Recomputed], frozen: bool, passes: tuple[int, int, int]) -> None:
    linear, attention, head = passes
    expected = linear * 6000 + attention * 21 + head * 400
    assert tree_flops(HAND, 4, [3, 1], True, recompute, frozen) == expected
    assert tree_flops(HAND, 4, [3, 1], False, recompute, frozen) == 6000 + 21 + 400  # nothing is computed twice forward


@pytest.mark.parametrize(("prompt", "branches"), [(0, [3]), (4, [3, -1])])
def test_impossible_lengths(prompt: int, branches: list[int]) -> None:
    with pytest.raises(ValueError, match="a prompt of"):
        tree_flops(HAND, prompt, branches, True)


# The ladder of reference/training.md, section 5, in TFLOP per pair: 8 pairs a micro-batch with mean lengths P 175, R 258, G 190,
# padded to 1548 tokens per pair. Its lengths vary, and attention grows with their squares; here all have the mean.
PROMPT, REAL, GENERATED, PADDED = 175, 258, 190, 774
LADDER = {"A": (111.3, 7.49), "B": (110.2, 6.41), "C": (88.2, 5.13), "D": (45.3, 2.83), "E": (35.5, 2.31), "F": (26.7, 1.86)}
FLOOR = (26.6, 1.73)


def ladder(model: ModelFlops) -> dict[str, float]:
    """TFLOP per pair. A: padded, head everywhere; B: head on completions; C: cached reference; D: packed; E: shared prompt;
    F: without activation checkpointing. A to E compute the backbone twice, B to F the head.
    """
    scored, branches = REAL + GENERATED, [REAL, GENERATED]
    both: tuple[Recomputed, ...] = ("backbone", "head")
    of_reference = [padded_flops(model, 2, PADDED, positions, False) for positions in (2 * PADDED, scored)]
    rungs = {
        "A": padded_flops(model, 2, PADDED, 2 * PADDED, True, ("backbone",)) + of_reference[0],
        "B": padded_flops(model, 2, PADDED, scored, True, both) + of_reference[1],
        "C": padded_flops(model, 2, PADDED, scored, True, both),
        "D": packed_flops(model, PROMPT, branches, True, both),
        "E": tree_flops(model, PROMPT, branches, True, both),
        "F": tree_flops(model, PROMPT, branches, True, ("head",)),
        "floor": tree_flops(model, PROMPT, branches, True),
    }
    return {name: flops / 1e12 for name, flops in rungs.items()}


@pytest.mark.parametrize(("config", "column"), [(MISTRAL_7B, 0), (QWEN_05B, 1)], ids=["7b", "0.5b"])
def test_the_ladder_of_the_training_study(config: dict[str, Any], column: int) -> None:
    computed = ladder(of(config))
    expected = {name: row[column] for name, row in {**LADDER, "floor": FLOOR}.items()}
    assert computed == pytest.approx(expected, rel=0.005)
    assert computed["A"] / computed["F"] == pytest.approx(4.16 if column == 0 else 4.04, rel=0.005)


@pytest.mark.parametrize(("config", "padded", "shared"), [(MISTRAL_7B, 0.014, 0.009), (QWEN_05B, 0.034, 0.020)])
def test_how_much_of_the_ladder_is_attention(config: dict[str, Any], padded: float, shared: float) -> None:
    """1.4 % and 3.4 % of A, 0.9 % and 2.0 % of F."""
    model = of(config)
    without = ladder(ModelFlops(model.linear, 0, model.windows, model.head))
    shares = {name: 1 - without[name] / flops for name, flops in ladder(model).items()}
    assert (shares["A"], shares["F"]) == pytest.approx((padded, shared), abs=0.001)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("backward", [False, True])
def test_torch_counts_the_same(family: str, backward: bool) -> None:
    """Eager attention multiplies every query with every key and masks afterwards: L² products instead of L · (L + 1) / 2."""
    length, rows = 24, 3
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(family), attn_implementation="eager")
    ids = torch.randint(3, 100, (rows, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    flops = of(model.config)
    everything = rows * len(flops.windows) * flops.attention * length**2
    attended = rows * flops.attend(0, length)
    passes = 3 if backward else 1
    by_hand = padded_flops(flops, rows, length, rows * length, backward) + passes * (everything - attended)
    assert counter.get_total_flops() == pytest.approx(by_hand, rel=0.02)
    # The comparison is sharp enough to see attention, and the head.
    assert min(everything, rows * length * flops.head) > 0.03 * by_hand / passes


def test_torch_counts_the_same_for_frozen_weights() -> None:
    """LoRA: no gradients of the weights. Its input, an embedding, has one here, as the input of LoRA's first layer has."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny("llama"), attn_implementation="eager").requires_grad_(False)
    inputs = torch.randn(1, 24, 48, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
    flops = of(model.config)
    masked = 4 * flops.attention * 24**2 - flops.attend(0, 24)
    by_hand = padded_flops(flops, 1, 24, 24, True, frozen=True) + 3 * masked
    assert counter.get_total_flops() == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("H100 SXM", "torch.bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "float16", 756.5),
        ("NVIDIA H100 NVL", "tf32", 417.5),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "torch.float32", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L40", "bf16", 181.05),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GeForce RTX 4090", "fp16", 165.2),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("Tesla T4", "fp16", 65),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_peaks(name: str, dtype: str, teraflops: float) -> None:
    assert peak_flops(name, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H100", "bf16"),  # which one?
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),  # a slice
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA H20", "bf16"),
        ("Tesla T4", "bf16"),  # does not have it
        ("NVIDIA H200", "fp8"),
        ("NVIDIA H200", "words"),
        ("cpu", "fp32"),
        ("", "bf16"),
    ],
)
def test_no_peak_is_guessed(name: str, dtype: str) -> None:
    assert peak_flops(name, dtype) is None


def test_a_measured_peak_says_that_it_is_one() -> None:
    threads = torch.get_num_threads()
    peak = measured_peak_flops("torch.float32", 1, sizes=(64, 128), seconds=0.5)
    assert torch.get_num_threads() == threads
    assert peak.flops > 1e8 and peak.size in (64, 128)
    assert peak.label.startswith("measured: ") and "float32 on 1 thread" in peak.label


def test_a_measurement_without_time_takes_the_first_size() -> None:
    assert measured_peak_flops("float32", 1, sizes=(32, 4096), seconds=0).size == 32


def test_mfu_by_hand() -> None:
    """The study's floor at 50 % of an H200: 19 pairs of a 7B model per second."""
    useful = tree_flops(of(MISTRAL_7B), PROMPT, [REAL, GENERATED], True)
    assert mfu(19 * useful, 1.0, peak_flops("NVIDIA H200", "bf16")) == pytest.approx(0.51, abs=0.01)
    assert mfu(30.0, 2.0, 60.0) == 0.25
    assert mfu(30.0, 2.0, None) is None


@pytest.mark.parametrize(("seconds", "peak"), [(0.0, 1.0), (1.0, 0.0)])
def test_mfu_of_no_time_or_no_peak(seconds: float, peak: float) -> None:
    with pytest.raises(ValueError, match="seconds at a peak"):
        mfu(1.0, seconds, peak)
