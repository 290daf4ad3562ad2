"""What the plan says before a run of methods that sample as they train."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gsil_bench import cli

ARGUMENTS = ("--limit-demonstrations", "24", "--tasks", "mini-gsm8k", "--limit", "2", "--dry-run")


def plan(out: Path, methods: str, *more: str) -> str:
    done = CliRunner().invoke(cli.app, ["compare", "--methods", methods, "--out", str(out), *ARGUMENTS, *more])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_method_that_samples_says_from_what_and_how_much(tmp_path: Path) -> None:
    """24 demonstrations, 2 held out, so 22 in one batch. Two epochs are 2 steps, one is sft's: one sampling of 22 prompts
    a seed, 3 samples of at most 10 tokens: 2 · 22 · 3 · 10 = 1,320 tokens at most. Rows after each round are not counted again.
    """
    changes = [
        word
        for pair in (
            "starts_from=sft",
            "samples=3",
            "max_new_tokens=10",
            "kl=0.5",
            "score_clip=5",
            "critic_learning_rate=1e-6",
            "critic_weight_decay=0.5",
        )
        for word in ("--set", f"airl-reverse-kl.{pair}")
    ]
    shown = plan(tmp_path, "sft,airl-reverse-kl", "--seeds", "0,1", "--every-round", *changes)
    (line,) = [line for line in shown.splitlines() if line.startswith("  airl-reverse-kl: ")]
    for said in (
        "starts from sft, which gets 50% of the epochs",
        "3 samples a prompt at each step",
        "a discriminator of demonstrations against the newest samples, 1 step at each sampling",
        "baseline leave-one-out",
        "kl=0.5 to the policy that it starts from",
        "1,320 at most",
        "score_clip=5",
        "critic lr 5e-05",
        "critic_weight_decay=0.5",
    ):
        assert said in line, said
    assert "kl_limit" not in line  # as always
    about = re.search(r"about ([\d,]+) tokens sampled in training", line)
    assert about is not None and 0 < int(about[1].replace(",", "")) <= 1320
    assert "sampled in training" not in next(line for line in shown.splitlines() if line.startswith("  sft: "))


def test_the_same_as_json(tmp_path: Path) -> None:
    """Two steps on the same samples, and one step: one sampling still, 22 · 2 · 5 = 220 tokens, which no demonstration is shorter
    than.
    """
    changes = ("starts_from=sft", "samples=2", "max_new_tokens=5", "updates=2")
    found = plan(tmp_path, "sft,airl-reverse-kl", "--json", *(f"--set=airl-reverse-kl.{pair}" for pair in changes))
    assert json.loads(found)["sampled_in_training"] == {"airl-reverse-kl": {"about": 220, "at_most": 220}}


@pytest.mark.parametrize("name", ["sft", "spin"])
def test_other_methods_sample_nothing_in_training(tmp_path: Path, name: str) -> None:
    assert json.loads(plan(tmp_path, name, "--json"))["sampled_in_training"] == {}
