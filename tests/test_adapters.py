"""LoRA and QLoRA: the same function at the start, only adapter weights trained, a plain checkpoint at the end."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gsil_bench.errors import UserError
from gsil_bench.models import adapters, checkpoint

pytest.importorskip("peft", reason="pip install peft")

WITH_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])


def new_model(kind: str, tied: bool = True) -> Any:
    """A random model that is far from linear, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def shake(wrapped: Any, size: float = 0.2) -> Any:
    """Give the adapter weights that change the function, as training would."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, size)
    return wrapped


def adapter_folder(folder: Path, base: Path, **settings: Any) -> tuple[Path, torch.Tensor]:
    """A user's adapter as peft writes it, and the logits of its base with it."""
    import peft

    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    wrapped = shake(peft.get_peft_model(checkpoint.load_model(base), config)).eval()
    wrapped.save_pretrained(folder)
    return folder, logits(wrapped)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    new_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_function_does_not_change_by_a_bit(kind: str, dtype: torch.dtype) -> None:
    model = new_model(kind).to(dtype)
    before = logits(model)
    wrapped = adapters.add_lora(model, rank=4, alpha=8)
    assert torch.equal(logits(wrapped), before)
    assert not any(module.training for module in wrapped.modules())
    assert not torch.equal(logits(shake(wrapped)), before)  # it is attached


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_adapter_weights_are_trained_and_they_are_fp32(kind: str) -> None:
    wrapped = shake(adapters.add_lora(new_model(kind).bfloat16(), rank=4, alpha=8))
    wrapped(input_ids=IDS, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained.items())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.values())
    assert all(parameter.grad is None for parameter in wrapped.parameters() if not parameter.requires_grad)
    layers = {"llama": 2 * 7, "gpt2": 2 * 4}[kind]  # linear layers of the blocks
    assert len(trained) == 2 * layers
    assert not [name for name in trained if "lm_head" in name or "embed" in name or "wte" in name or "wpe" in name]


def test_the_seed_decides_the_start_and_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    starts = [adapters.add_lora(new_model("llama"), 4, 8, seed=seed).state_dict() for seed in (0, 0, 1)]
    keys = [key for key in starts[0] if "lora_A" in key]
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in keys)
    assert not any(torch.equal(starts[0][key], starts[2][key]) for key in keys)
    torch.random.set_rng_state(state)
    model = new_model("llama")
    before = torch.random.get_rng_state()
    adapters.add_lora(model, 4, 8)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_targets_by_name_and_targets_that_there_are_not() -> None:
    wrapped = adapters.add_lora(new_model("llama"), rank=2, alpha=2, targets="q_proj, v_proj")
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all("q_proj" in name or "v_proj" in name for name in trained)
    with pytest.raises(UserError, match="LoRA targets 'query'"):
        adapters.add_lora(new_model("llama"), rank=2, alpha=2, targets="query")
    with pytest.raises(UserError, match="rank of at least 1"):
        adapters.add_lora(new_model("llama"), rank=0, alpha=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_merged_model_is_plain_and_computes_the_same(kind: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    model = new_model(kind).to(dtype)
    plain_keys, config = set(model.state_dict()), model.config.to_dict()
    before = logits(model)
    wrapped = shake(adapters.add_lora(model, rank=4, alpha=8), 0.05).to(dtype)
    adapted = logits(wrapped)
    merged = adapters.merge_lora(wrapped)
    assert (logits(merged) - adapted).abs().max() < tolerance * adapted.abs().max()
    assert (adapted - before).abs().max() > 0.1 * adapted.abs().max()
    assert set(merged.state_dict()) == plain_keys and merged.config.to_dict() == config
    assert not [module for module in merged.modules() if "peft" in type(module).__module__]
    assert all(parameter.requires_grad for parameter in merged.parameters()) and not merged.training
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(checkpoint.load_model(tmp_path)), logits(merged.float()))


def test_a_bf16_weight_is_rounded_once() -> None:
    wrapped = shake(adapters.add_lora(new_model("llama").bfloat16(), rank=4, alpha=8))
    layer = wrapped.base_model.model.model.layers[1].mlp.up_proj
    exact = (
        layer.base_layer.weight.double() + 2 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    merged = adapters.merge_lora(wrapped)
    weight = merged.get_submodule("model.layers.1.mlp.up_proj").weight
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(weight, exact.float().bfloat16())


def test_a_second_round_starts_from_the_merged_model(tmp_path: Path) -> None:
    first = adapters.merge_lora(shake(adapters.add_lora(new_model("llama"), rank=4, alpha=8)))
    first.save_pretrained(tmp_path)
    opponent = logits(first)
    second = adapters.add_lora(checkpoint.load_model(tmp_path), rank=4, alpha=8)
    assert torch.equal(logits(second), opponent)
    assert not torch.allclose(opponent, logits(new_model("llama")), atol=0.1)  # the base is another model


def test_the_adapter_lies_beside_the_weights_and_is_not_loaded_with_them(base_folder: Path, tmp_path: Path) -> None:
    wrapped = shake(adapters.add_lora(checkpoint.load_model(base_folder), rank=4, alpha=8))
    out = tmp_path / "out"
    saved = adapters.save_adapter(wrapped, out, base=str(base_folder))
    merged = adapters.merge_lora(wrapped)
    merged.save_pretrained(out)
    assert sorted(path.name for path in saved.glob("adapter_*")) == [adapters.CONFIG, adapters.WEIGHTS]
    assert [path.name for path in checkpoint.weight_files(out)] == ["model.safetensors"]
    assert torch.equal(logits(checkpoint.load_model(out)), logits(merged))
    assert adapters.resolve_adapter(out) is None
    assert adapters.resolve_adapter(saved) == (str(base_folder), saved)
    assert torch.equal(logits(adapters.load_with_adapter(saved)), logits(merged))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True, "lora_dropout": 0.5}, {"lora_bias": False, "target_modules": ["v_proj"]}],
    ids=["plain", "dora", "rslora", "one-target"],
)
def test_a_start_with_an_adapter_is_base_and_adapter(base_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """A reference that is the bare base is a bug that others had: the log-probs must be those of base and adapter."""
    folder, adapted = adapter_folder(tmp_path / "adapter", base_folder, **settings)
    start = adapters.load_with_adapter(folder)
    logps = logits(start).log_softmax(-1)
    assert (logps - adapted.log_softmax(-1)).abs().max() < 1e-5
    assert (logps - logits(checkpoint.load_model(base_folder)).log_softmax(-1)).abs().max() > 0.1
    assert not [module for module in start.modules() if "peft" in type(module).__module__]


@pytest.mark.filterwarnings("ignore")  # peft warns of what is tested here
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["lora", "copy"],
)
def test_an_adapted_lm_head_leaves_tied_embeddings_alone(base_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder, adapted = adapter_folder(tmp_path / "adapter", base_folder, **settings)
    start = adapters.load_with_adapter(folder)
    assert (logits(start) - adapted).abs().max() < 1e-5
    start.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(checkpoint.load_model(tmp_path / "merged")), logits(start))


def test_an_adapter_folder_becomes_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    folder, _ = adapter_folder(tmp_path / "adapter", tiny_model)
    sha = adapters.merge_adapter_folder(folder, tmp_path / "one")
    assert sha == checkpoint.weights_sha256(checkpoint.resolve_model(str(tmp_path / "one")))
    assert sha != checkpoint.weights_sha256(tiny_model)
    tokenizer = checkpoint.load_tokenizer(tiny_model)
    assert checkpoint.load_tokenizer(tmp_path / "one").chat_template == tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    assert adapters.merge_adapter_folder(folder, tmp_path / "two") == sha
    assert checkpoint.load_tokenizer(tmp_path / "two").chat_template == tokenizer.chat_template


def test_adapters_that_cannot_be_used(base_folder: Path, tmp_path: Path) -> None:
    assert adapters.resolve_adapter(base_folder) is None
    with pytest.raises(UserError, match="holds no adapter"):
        adapters.load_with_adapter(base_folder)
    good, _ = adapter_folder(tmp_path / "adapter", base_folder)
    both = Path(shutil.copytree(good, tmp_path / "both"))
    shutil.copy(base_folder / "model.safetensors", both)
    with pytest.raises(UserError, match="both a model and an adapter"):
        adapters.resolve_adapter(both)
    pickled = Path(shutil.copytree(good, tmp_path / "pickled"))
    (pickled / adapters.WEIGHTS).rename(pickled / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        adapters.resolve_adapter(pickled)
    changes = {
        "only LORA": {"peft_type": "PREFIX_TUNING"},
        "names no base model": {"base_model_name_or_path": None},
        "wants revision abc of org/name": {"revision": "abc", "base_model_name_or_path": "org/name"},
        "base of the adapter in .* no such folder": {"base_model_name_or_path": "/no/such/folder"},
    }
    for number, (message, change) in enumerate(changes.items()):
        folder = Path(shutil.copytree(good, tmp_path / str(number)))
        config = json.loads((folder / adapters.CONFIG).read_text()) | change
        (folder / adapters.CONFIG).write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            adapters.load_with_adapter(folder)
    (good / adapters.WEIGHTS).write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="does not fit its base"):
        adapters.load_with_adapter(good)
    (good / adapters.CONFIG).write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        adapters.resolve_adapter(good)


@pytest.mark.parametrize("change", ["missing", "surplus", "renamed", "rank"])
def test_an_adapter_of_another_model_is_refused(base_folder: Path, tmp_path: Path, change: str) -> None:
    """peft would leave the rest as it is and go on."""
    from safetensors.torch import load_file, save_file

    folder, _ = adapter_folder(tmp_path / "adapter", base_folder)
    tensors = load_file(folder / adapters.WEIGHTS)
    name = next(name for name in tensors if "layers.1" in name and "lora_A" in name)
    if change == "rank":
        tensors[name] = tensors[name][:2].clone()
    if change in ("surplus", "renamed"):
        tensors[name.replace("layers.1", "layers.7")] = tensors[name].clone()
    if change in ("missing", "renamed"):
        del tensors[name]
    save_file(tensors, folder / adapters.WEIGHTS)
    with pytest.raises(UserError, match="does not fit its base"):
        adapters.load_with_adapter(folder)


def test_an_adapter_that_is_not_finite_is_refused(base_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = adapter_folder(tmp_path / "adapter", base_folder)
    tensors = load_file(folder / adapters.WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / adapters.WEIGHTS)
    with pytest.raises(UserError, match="cannot be merged into its base"):
        adapters.load_with_adapter(folder)


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="QLoRA needs bitsandbytes: pip install bitsandbytes") as caught:
        adapters.quantized_loading_config("nf4")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unknown quantization 'nf5': did you mean 'nf4'"):
        adapters.quantized_loading_config("nf5")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="LoRA needs peft: pip install peft"):
        adapters.add_lora(new_model("llama"), rank=2, alpha=2)


def load_quantized(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    config = adapters.quantized_loading_config("nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16).eval()
    return adapters.prepare_quantized(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@WITH_BITSANDBYTES
@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_qlora_trains_what_lora_on_the_dequantised_weights_would(base_folder: Path) -> None:
    """After a pass without gradients in eval mode, which is what the check at step 0 does."""
    model = load_quantized(base_folder)
    before = logits(model)
    wrapped = adapters.add_lora(model, rank=4, alpha=8)
    assert torch.equal(logits(wrapped), before)
    assert {parameter.dtype for name, parameter in wrapped.named_parameters() if "norm" in name} == {torch.float32}
    mine = gradients(shake(wrapped, 0.05))
    assert mine and all("lora_" in name for name in mine)
    plain = adapters.merge_lora(adapters.add_lora(load_quantized(base_folder), rank=4, alpha=8)).float()
    theirs = gradients(shake(adapters.add_lora(plain, rank=4, alpha=8), 0.05))
    for name, gradient in mine.items():
        assert (gradient - theirs[name]).norm() < 0.05 * theirs[name].norm(), name  # activations in bf16


@WITH_BITSANDBYTES
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_qlora_leaves_a_plain_bf16_checkpoint(base_folder: Path, tmp_path: Path, targets: str) -> None:
    wrapped = shake(adapters.add_lora(load_quantized(base_folder), rank=4, alpha=8, targets=targets))
    adapted = logits(wrapped)
    merged = adapters.merge_lora(wrapped)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = checkpoint.load_model(tmp_path)
    assert set(again.state_dict()) == set(new_model("llama").state_dict())
    merged = merged.float()
    assert torch.equal(logits(again), logits(merged))
    assert (logits(merged) - adapted).norm() < 0.05 * adapted.norm()  # 4-bit weights in both, activations in bf16 in one
