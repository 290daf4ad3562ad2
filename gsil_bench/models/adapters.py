"""LoRA and QLoRA: train a few fp32 matrices beside frozen weights, and leave a plain checkpoint behind.

No stage after training knows about adapters. A round's result is merged, so the reference of the next round is the model that
the run started from, whatever adapters it had, and never its bare base; a user's adapter folder becomes a plain checkpoint
before anything else looks at it.

QLoRA trains on weights in 4 bits (nf4). Its checkpoint is the dequantised weights plus the adapter, in bf16: not the numbers of
the quantised model with its adapter (activations are rounded differently, and the sum is rounded once more); how far they lie
apart is for the caller to measure. Policy and reference must agree at step 0, so the reference log-probs of a QLoRA round are
those of the quantised model, not of the folder it was loaded from. Tried on a CPU with bitsandbytes 0.50; not on a GPU.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gsil_bench.errors import UserError, library, unknown_name
from gsil_bench.models.checkpoint import load_model, load_tokenizer, resolve_model, save_model, weight_files

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

ADAPTER = "adapter"
"""Subfolder of a checkpoint for its adapter. Beside the weights themselves, transformers would load it on top of them."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
QUANTIZATIONS = ("nf4",)


def add_lora(model: PreTrainedModel, rank: int, alpha: float, targets: str = "all-linear", seed: int = 0) -> Any:
    """The model with trainable fp32 LoRA matrices and all else frozen; the function it computes does not change by a bit.

    Args:
        model: in any dtype, or quantised and through `prepare_quantized`. It is wrapped, not copied.
        rank: columns of each pair of matrices.
        alpha: the product of a pair is scaled by alpha / rank.
        targets: "all-linear" (each linear layer of the blocks; never the LM head or embeddings), or names of layers, such as
            "q_proj,v_proj". Experts that a model stores in one tensor are no linear layers.
        seed: of the first matrix of each pair; the second starts at zero. The global generator is left as it was.

    Returns:
        A PeftModel in eval mode. No dropout: policy and reference must agree at step 0.

    Raises:
        UserError: a value out of range, a target that the model does not have, or peft is not installed.
    """
    if rank < 1 or not alpha > 0:
        raise UserError(f"LoRA needs a rank of at least 1 and an alpha above 0, not rank={rank}, alpha={alpha}")
    peft = library("peft", "LoRA")
    names = targets if targets == "all-linear" else [target.strip() for target in targets.split(",")]
    # peft learns a Conv1D's orientation (GPT-2) by itself, with a warning per layer
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.default_generator.manual_seed(seed)  # peft draws on the CPU; torch.manual_seed would touch the GPU's too
            return peft.get_peft_model(model, config, autocast_adapter_dtype=True).eval()
    except ValueError as error:
        raise UserError(f"LoRA targets {targets!r}: {_line(error)}") from error


@torch.no_grad()
def merge_lora(model: Any) -> PreTrainedModel:
    """The plain model with the active adapter in its weights: summed in fp32, rounded once to the weights' dtype.

    A bf16 weight has 8 bits, so a change below a 512th of it is lost. Weights that were quantised become bf16 (the dtype that
    the model was loaded in).

    Args:
        model: what `add_lora` returned; it is taken apart.

    Raises:
        ValueError: the merged weights are not finite.
    """
    shared = _shared_parameters(model)
    for layer in list(_adapted_layers(model)):
        base = layer.get_base_layer()
        if _is_quantized(base):
            layer.base_layer = _dequantized(base)
            layer.base_layer.weight.data = _sum(layer.base_layer.weight, layer)
            layer.merged_adapters.extend(layer.active_adapters)
        else:
            _merge_layer(layer, base, shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "already merged" is what is wanted here
        plain: PreTrainedModel = model.merge_and_unload()
    plain = _without_quantization(plain)
    plain.requires_grad_(True)
    plain.eval()
    return plain


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """The weights that `merge_lora` would leave, by name, or None if there is no adapter. The model is not touched.

    Args:
        model: what was given to `add_lora`, whose layers are wrapped now; it may be in training.

    Returns:
        Merged weights on the CPU, each summed in fp32 and rounded once to the weight's dtype; the others are the model's own.

    Raises:
        UserError: a weight with an adapter is quantised, or tied to another one.
    """
    if not any(".lora_A." in name for name, _ in model.named_parameters()):
        return None
    weights: dict[str, torch.Tensor] = model.state_dict()
    shared, adapted = _shared_parameters(model), set(_adapted_layers(model))
    for name, layer in model.named_modules():
        if layer not in adapted:
            continue
        base = layer.get_base_layer()
        if _is_quantized(base) or id(base.weight) in shared:
            raise UserError(f"{name}: an adapter on a quantised or tied weight is not merged while it is trained")
        for key in [key for key in weights if key.startswith(f"{name}.")]:
            del weights[key]
        weights |= {f"{name}.{key}": value for key, value in base.state_dict().items()}
        weights[f"{name}.weight"] = _sum(base.weight, layer).cpu()
    return weights


def save_adapter(model: Any, folder: Path, base: str | None = None) -> Path:
    """Write the adapter alone as safetensors to a subfolder of a checkpoint; call it before `merge_lora`.

    Args:
        model: what `add_lora` returned.
        folder: of the merged checkpoint.
        base: folder or hub id to be named as the adapter's base; by default where the model was loaded from.

    Returns:
        The subfolder, which peft and this module load.
    """
    target = folder / ADAPTER
    model.save_pretrained(target, save_embedding_layers=False)  # True or "auto" would ask the hub about the base's vocabulary
    if base is not None:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def resolve_adapter(folder: Path) -> tuple[str, Path] | None:
    """Name of the base (a folder or hub id) and the adapter's folder, or None if the folder holds no adapter.

    Raises:
        UserError: the adapter cannot be used, or the folder holds a model's weights too: which of them is meant?
    """
    if not (folder / CONFIG).is_file():
        return None
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is not JSON: {_line(error)}") from error
    base, kind, revision = (config.get(key) for key in ("base_model_name_or_path", "peft_type", "revision"))
    if [path for path in weight_files(folder) if path.name != WEIGHTS]:
        raise UserError(f"{folder} holds both a model and an adapter; move {CONFIG} and {WEIGHTS} away, or the model's weights")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"the adapter in {folder} has no {WEIGHTS}; other formats are not loaded, save it again with peft")
    if kind != "LORA":
        raise UserError(f"the adapter in {folder} is of the kind {kind}; only LORA can be merged here")
    if not base:
        raise UserError(f"the adapter in {folder} names no base model: set base_model_name_or_path in its {CONFIG}")
    if revision not in (None, "main") and not Path(base).is_dir():
        raise UserError(
            f"the adapter in {folder} wants revision {revision} of {base}: download that, and set base_model_name_or_path to it"
        )
    return str(base), folder


def load_with_adapter(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """Base and adapter of an adapter folder as one plain model in fp32. Safetensors only, no remote code.

    Raises:
        UserError: there is no adapter, the base cannot be had, or the two do not fit together or give no finite weights.
    """
    base, adapter = _adapter(folder)
    model = load_model(_base_folder(base, adapter), device)
    try:
        return merge_lora(_attach(model, adapter, base))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the adapter in {adapter} cannot be merged into its base {base}: {_line(error)}") from error


def merge_adapter_folder(folder: Path, into: Path) -> str:
    """Write base and adapter as one plain checkpoint, with the adapter's own tokenizer if it brings one.

    Returns:
        The fingerprint of the merged weights.

    Raises:
        UserError: as `load_with_adapter`.
    """
    base, adapter = _adapter(folder)
    own = (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter if own else _base_folder(base, adapter))
    return save_model(load_with_adapter(folder), tokenizer, into)


def quantized_loading_config(kind: str = "nf4") -> BitsAndBytesConfig:
    """What transformers' `from_pretrained(..., quantization_config=..., dtype=torch.bfloat16)` needs to load for QLoRA.

    Linear layers of the blocks in 4 bits with quantised scales, computing in bf16; the LM head stays whole.

    Raises:
        UserError: an unknown kind, or bitsandbytes is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise unknown_name("quantization", kind, QUANTIZATIONS)
    library("bitsandbytes", "QLoRA")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def prepare_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """A freshly loaded quantised model made fit for `add_lora`: frozen, and norms, embeddings and LM head in fp32.

    Call it before the first forward pass: on a CPU with AVX512-BF16, bitsandbytes repacks the weights of a model in eval mode at
    its first pass without gradients, and from then on backward passes through them give zeros without an error.
    """
    peft = library("peft", "QLoRA")
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in model.modules():
        if _is_quantized(module):
            module.support_avx512bf16_for_cpu = False
    return model


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _adapter(folder: Path) -> tuple[str, Path]:
    found = resolve_adapter(folder)
    if found is None:
        raise UserError(f"{folder} holds no adapter ({CONFIG})")
    return found


def _base_folder(base: str, adapter: Path) -> Path:
    try:
        return resolve_model(base)
    except UserError as error:
        raise UserError(f"base of the adapter in {adapter}: {error}") from error


def _attach(model: PreTrainedModel, adapter: Path, base: str) -> Any:
    """The base with the adapter of a folder, whose tensors must all find their place: peft would go on without them."""
    from safetensors import SafetensorError, safe_open

    peft = library("peft", "an adapter")
    try:
        with safe_open(adapter / WEIGHTS, framework="numpy") as tensors:
            given = sum("lora_" in name for name in tensors.keys())  # noqa: SIM118  (no mapping)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.filterwarnings("error", message=".*missing adapter keys")
            wrapped = peft.PeftModel.from_pretrained(model, str(adapter), torch_device=str(model.device))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning, SafetensorError) as error:
        raise UserError(f"the adapter in {adapter} does not fit its base {base}: {_line(error)}") from error
    taken = sum("lora_" in name for name, _ in wrapped.named_parameters())
    if given != taken:
        raise UserError(f"the adapter in {adapter} does not fit its base {base}: {given} LoRA tensors for {taken} places")
    return wrapped


def _adapted_layers(model: nn.Module) -> Iterator[Any]:
    """Layers that hold adapter weights."""
    tuners = library("peft", "LoRA").tuners.tuners_utils
    return (module for module in model.modules() if isinstance(module, tuners.BaseTunerLayer))


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds: tied embeddings."""
    counts = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {identity for identity, count in counts.items() if count > 1}


def _merge_layer(layer: Any, base: nn.Module, shared: set[int]) -> None:
    """Merge one layer through peft, which knows every variant of LoRA, with the layer in fp32 meanwhile.

    A tied weight is untied first: an adapter of the LM head must not change the embeddings. peft then says so in the
    configuration.
    """
    dtypes = {}
    for name, parameter in list(base.named_parameters(recurse=False)):
        dtypes[name] = parameter.dtype
        wide = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if id(parameter) in shared:
            setattr(base, name, nn.Parameter(wide.clone()))
        else:
            parameter.data = wide
    layer.merge(safe_merge=True)  # refuses NaN
    for name, dtype in dtypes.items():
        parameter = base.get_parameter(name)
        parameter.data = parameter.data.to(dtype)


def _sum(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    """A plain weight plus its layer's products, in fp32, rounded once."""
    total = weight.float()
    for name in layer.active_adapters:
        total = total + layer.get_delta_weight(name).float()
    return total.to(weight.dtype)


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state")


def _dequantized(layer: Any) -> nn.Linear:
    """A plain linear layer with the weights that the quantised one computes with."""
    functional = library("bitsandbytes", "QLoRA").functional
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data)
    return plain


def _without_quantization(model: Any) -> Any:
    """Forget that weights were quantised, dequantise those without an adapter, and undo the fp32 of `prepare_quantized`."""
    if not getattr(model, "is_quantized", False):
        return model
    dtype = model.config.dtype
    for name, module in list(model.named_modules()):
        if _is_quantized(module):
            model.set_submodule(name, _dequantized(module))
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    for parameter in model.parameters():  # not the buffers: rotary frequencies are in fp32 in any model
        parameter.data = parameter.data.to(dtype)
    return model
