"""Fixtures: one thread per process, the real data where it is, and an untrained model with the embedded suite's tokenizer."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # spinning threads cost more than ten times their work when tests run side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
if threading.current_thread() is threading.main_thread():
    # A shell that starts the tests in the background has Ctrl-C ignored, and whatever they start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data sets."""
    for folder in (os.environ.get("GSIL_BENCH_DATA"), ROOT.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("no real data: set GSIL_BENCH_DATA")


@pytest.fixture(scope="session")
def mini_folder() -> Path:
    """The embedded model."""
    return ROOT / "gsil_bench" / "data" / "mini" / "model"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, mini_folder: Path) -> Path:
    """An untrained Llama of 60,000 parameters with the embedded suite's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(mini_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demonstrations_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 short demonstrations."""
    path = tmp_path_factory.mktemp("demonstrations") / "mine.jsonl"
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"{n} + {n} = {2 * n}. The answer is {2 * n}."} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
