"""Durations in words, and estimates that learn from what was seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from gsil_bench.estimate import SECONDS_PER_STAGE, Speeds, sampled_tokens
from gsil_bench.inputs import Model
from gsil_bench.plan import Stage
from gsil_bench.reporting.progress import seconds_text
from gsil_bench.store import Store


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (8.3, "8.3 s"), (42.2, "42 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def model(parameters: int, device: str = "cpu") -> Model:
    return Model("m", Path("."), "", None, 512, parameters, device)  # type: ignore[arg-type]


def test_a_stage_that_was_seen_is_estimated_by_its_speed(tmp_path: Path) -> None:
    """10,000 tokens in 5 seconds: 2,000 a second, so 4,000 tokens take 2 seconds and the stage's own overhead."""
    store = Store(tmp_path)
    seen = Stage("training", "t", {}, {}, None, tokens=10_000)
    Speeds.of(store).observe(seen, model(1_000_000), 5.0)
    again = Stage("training", "u", {}, {}, None, tokens=4_000)
    assert Speeds.of(store).seconds(again, model(1_000_000)) == pytest.approx(2.0 + SECONDS_PER_STAGE)
    assert Speeds.of(store).seconds(again, model(2_000_000)) != pytest.approx(2.0 + SECONDS_PER_STAGE)


def test_damaged_speeds_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "speeds.json").write_text("[1, 2")
    assert Speeds.of(Store(tmp_path)).seen == {}


SAMPLES = {"method": {"rollouts": {"updates": 2}, "protocol": {"samples": 3, "max_new_tokens": 20}}, "steps": 5, "batch_size": 4}


def test_training_that_samples_has_a_speed_of_its_own(tmp_path: Path) -> None:
    """What it was seen to take says nothing about training that does not sample, and the other way round."""
    store = Store(tmp_path)
    slow, fast = Stage("training", "t", SAMPLES, {}, None, tokens=1000), Stage("training", "u", {}, {}, None, tokens=1000)
    Speeds.of(store).observe(slow, model(1_000_000), 10.0)
    assert Speeds.of(store).seconds(slow, model(1_000_000)) == pytest.approx(10.0 + SECONDS_PER_STAGE)
    unseen = Speeds.of(Store(tmp_path / "empty")).seconds(fast, model(1_000_000))
    assert Speeds.of(store).seconds(fast, model(1_000_000)) == unseen
    assert Speeds.of(Store(tmp_path / "empty")).seconds(slow, model(1_000_000)) > unseen


def test_sampled_tokens_by_hand() -> None:
    """Five steps, two on the same samples: 3 samplings of 4 · 3 = 12 answers, 36. At 8 tokens 288, at most 20 each 720."""
    stage = Stage("training", "t", SAMPLES, {}, None)
    assert sampled_tokens(stage, 8.0) == (288.0, 720.0)
    assert sampled_tokens(stage, 50.0) == (720.0, 720.0)
    assert sampled_tokens(Stage("training", "u", {"method": {}}, {}, None), 8.0) == (0.0, 0.0)
