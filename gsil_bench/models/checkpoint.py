"""Model folders: where a name leads, what its weights' fingerprint is, loading (safetensors only, no remote code) and saving."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gsil_bench.errors import UserError
from gsil_bench.fingerprints import remembered_sha256
from gsil_bench.records import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["fp32", "bf16", "nf4"]
"""Of the weights in memory; "nf4" is bitsandbytes' 4 bits, computing in bf16, on which only adapters can be trained."""

PACKAGED = {"mini": "data/mini/model"}
"""Models that come with the package."""

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
"""What is downloaded: never a pickle, never code."""


def resolve_model(name: str) -> Path:
    """The folder of a model: a packaged name, a local folder, or a hub id (downloaded to the hub's cache).

    Raises:
        UserError: there is no such folder, it holds no model, its weights are not safetensors, or the hub cannot be reached.
    """
    folder = _find(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"model {name!r}: {folder} has no config.json; give the folder that save_pretrained wrote")
    if not weight_files(folder):
        raise UserError(f"model {name!r}: no *.safetensors in {folder}; other formats are not loaded, convert the weights first")
    return folder


def _find(name: str) -> Path:
    if name in PACKAGED:
        return Path(str(files("gsil_bench"))) / PACKAGED[name]
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model {name!r}: no such folder; give a folder, a hub id such as org/name, or {', '.join(PACKAGED)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many kinds; each means that the model cannot be had
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model {name!r}: not a folder here, and the hub did not give it ({reason})") from error


def weight_files(folder: Path) -> list[Path]:
    """The weights' shards, sorted; not the same weights once more in their makers' own format ("consolidated")."""
    files = sorted(folder.glob("*.safetensors"))
    return [path for path in files if path.name.startswith("model")] or files


def weights_sha256(folder: Path) -> str:
    """Fingerprint of a model: its architecture and the bytes of its shards, wherever they lie."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    return digest([config, [remembered_sha256(shard) for shard in weight_files(folder)]])


def load_model(folder: Path, device: str = "cpu", dtype: Dtype = "fp32") -> PreTrainedModel:
    """The causal language model of a folder, dropout off. Safetensors only, no remote code.

    Raises:
        UserError: it cannot be loaded, lacks weights, or its quantisation needs a library that is not installed.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from gsil_bench.models.adapters import prepare_quantized

    disable_progress_bar()  # a bar per load would drown the run's own progress
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32 if dtype == "fp32" else torch.bfloat16,
            **(_quantized(device) if dtype == "nf4" else {}),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unloadable("model", folder, error) from error
    if info["missing_keys"]:  # the library would go on with random numbers in their place
        raise UserError(f"the model in {folder} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}")
    wrong = next((name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())), None)
    if wrong is not None:
        raise UserError(
            f"the model in {folder} has weights that are not finite ({wrong}): a damaged file, or a diverged training"
        )
    model = prepare_quantized(model) if dtype == "nf4" else model.to(device)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers' fast kernels leave the cap out without a word
    model.eval()  # dropout stays off in training too: policy and reference must agree at step 0
    return model


def _quantized(device: str) -> dict[str, Any]:
    """How `from_pretrained` loads a model for QLoRA."""
    from gsil_bench.models.adapters import quantized_loading_config

    return {"quantization_config": quantized_loading_config("nf4"), "device_map": {"": device}}


def check_architecture(folder: Path) -> None:
    """Raise UserError if transformers does not know the model: code that it brings along is not run."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if "auto_map" in model_config(folder):
            kind = model_config(folder).get("model_type")
            raise UserError(f"the model in {folder} needs Python code of its own ({kind}), which is not run") from error
        raise _unloadable("configuration", folder, error) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; no remote code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable("tokenizer", folder, error) from error


def _unloadable(what: str, folder: Path, error: Exception) -> UserError:
    return UserError(f"the {what} in {folder} cannot be loaded: {' '.join(str(error).split())[:200]}")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write weights, configuration and tokenizer; returns the weights' fingerprint."""
    model.save_pretrained(folder)
    return save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write the tokenizer beside weights that are there already; returns their fingerprint."""
    tokenizer.save_pretrained(folder)
    return weights_sha256(folder)


def model_config(folder: Path) -> dict[str, Any]:
    """config.json as it is."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def context_length(folder: Path) -> int:
    """Tokens that the model can attend to, prompt and answer together."""
    whole = model_config(folder)
    for config in (whole, whole.get("text_config", {})):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
            if isinstance(config.get(key), int):
                return int(config[key])
    raise UserError(f"{folder}/config.json states no context length (max_position_embeddings)")


def vocabulary_size(folder: Path) -> int:
    """Rows of the embedding."""
    whole = model_config(folder)
    size = whole.get("vocab_size") or whole.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise UserError(f"{folder}/config.json states no vocab_size")
    return size


def end_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end generation according to the model's own files."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else model_config(folder)
    ids = settings.get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)


def parameter_count(folder: Path) -> int:
    """Number of weights, read from the shards' headers without loading them."""
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for shard in weight_files(folder):
            with safe_open(shard, framework="numpy") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  (no mapping)
                total += sum(math.prod(shape) for shape in shapes)
    except (OSError, SafetensorError) as error:
        raise _unloadable("model", folder, error) from error
    return total
