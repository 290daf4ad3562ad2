"""A real pretrained model and real GSM8K, end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import typer

from gsil_bench import compare


@pytest.mark.data
def test_stories260k_on_gsm8k(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()
    app.command()(compare.compare)
    words = ["--model", str(data_dir / "models" / "stories260K"), "--chat-template", "plain", "--data-dir", str(data_dir)]
    words += [
        "--demonstrations",
        "gsm8k",
        "--limit-demonstrations",
        "120",
        "--drop-long",
        "--tasks",
        "gsm8k/chat-0shot-v1",
        "--limit",
        "12",
    ]
    words += ["--methods", "sft,gsil-logistic", "--out", str(tmp_path), "--set", "gsil-logistic.max_new_tokens=64"]
    for method in ("sft", "gsil-logistic"):
        words += ["--set", f"{method}.learning_rate_factor=100", "--set", f"{method}.epochs=1"]
    assert compare.call(app, words) == 0
    rows = {(row["method"], row["task"]): row for row in csv.DictReader((tmp_path / "table.csv").read_text().splitlines())}
    start, sft, gsil = (float(rows[name, "held-out-nll"]["score"]) for name in ("start", "sft", "gsil-logistic"))
    assert sft < start
    assert gsil < start
    assert rows["gsil-logistic", "gsm8k/chat-0shot-v1"]["verdict"] == "not resolved"
    assert float(rows["gsil-logistic", "gsm8k/chat-0shot-v1"]["difference_high"]) > 0
    result = json.loads((tmp_path / "results" / "gsm8k" / "chat-0shot-v1" / "gsil-logistic-seed0.json").read_text())
    assert result["provenance"]["rounds"][0]["step_zero"] < 1e-3
    assert result["provenance"]["inputs"]["demonstrations"]["too long"] > 0
