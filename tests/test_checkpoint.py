"""Model folders: fingerprints, formats, names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gsil_bench.errors import UserError
from gsil_bench.models import checkpoint


def test_fingerprint_follows_the_weights_not_the_path(tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    before = checkpoint.weights_sha256(tiny_model)
    assert checkpoint.weights_sha256(copy) == before
    config = json.loads((copy / "config.json").read_text()) | {"transformers_version": "9.9"}
    (copy / "config.json").write_text(json.dumps(config))
    assert checkpoint.weights_sha256(copy) == before
    model = checkpoint.load_model(copy)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert checkpoint.save_model(model, checkpoint.load_tokenizer(copy), copy) != before


def test_save_and_load_keep_every_bit(tiny_model: Path, tmp_path: Path) -> None:
    model = checkpoint.load_model(tiny_model)
    checkpoint.save_model(model, checkpoint.load_tokenizer(tiny_model), tmp_path)
    again = checkpoint.load_model(tmp_path)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not again.training


def test_a_pickle_is_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        checkpoint.resolve_model(str(tmp_path))


def test_a_damaged_weight_file_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.load_model(copy)
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.parameter_count(copy)


def test_a_model_that_lacks_weights_is_not_filled_with_random_ones(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: model\.layers\.0\.mlp\.up_proj\.weight"):
        checkpoint.load_model(copy)


def test_weights_that_are_not_finite(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights that are not finite \(model\.norm\.weight\)"):
        checkpoint.load_model(copy)


def test_a_model_with_code_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    own = {"model_type": "lab-model", "auto_map": {"AutoConfig": "lab.LabConfig", "AutoModelForCausalLM": "lab.LabModel"}}
    (copy / "config.json").write_text(json.dumps({**config, **own}))
    (copy / "lab.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(UserError, match=r"needs Python code of its own \(lab-model\), which is not run"):
        checkpoint.check_architecture(copy)


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.resolve_model("/no/such/folder")
    with pytest.raises(UserError, match=r"has no config\.json"):
        checkpoint.resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="the hub did not give it"):
        checkpoint.resolve_model("nobody/no-such-model")


def test_facts_of_a_folder(mini_folder: Path) -> None:
    assert checkpoint.context_length(mini_folder) == 512
    assert checkpoint.parameter_count(mini_folder) == sum(
        tensor.numel() for tensor in checkpoint.load_model(mini_folder).parameters()
    )
    assert checkpoint.end_token_ids(mini_folder)


def test_soft_capped_attention_is_capped(mini_folder: Path, tmp_path: Path) -> None:
    """transformers' default kernel for Gemma 2 leaves the cap out; a cap of 0.5 on scores of some units is not to be missed."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    config = Gemma2Config(
        **sizes, num_attention_heads=2, num_key_value_heads=1, attn_logit_softcapping=0.5, initializer_range=1.0
    )
    model = Gemma2ForCausalLM(config)
    model.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    model.set_attn_implementation("eager")
    loaded = checkpoint.load_model(tmp_path)
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, wanted)
        loaded.set_attn_implementation("sdpa")
        assert float((loaded(ids).logits - wanted).abs().max()) > 0.1
