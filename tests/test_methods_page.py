"""The page of methods: equal to the committed file, in the terminal too, with costs that follow from the records."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import support
from typer.testing import CliRunner

from baselines import METHODS
from gsil_bench.cli import app
from gsil_bench.methods import SelfPlay, load_method, with_settings
from gsil_bench.reporting.methods_page import Cost, as_markdown, as_text, cost_text, group_of, grouped

ROOT = Path(__file__).parent.parent
RECORDS = [load_method(name) for name in METHODS]
BARE_PREFERENCES = dataclasses.replace(load_method("dpo"), name="bare-preferences", needs=frozenset({"generated", "preferences"}))
"""A pairwise loss without a reference."""


def test_the_committed_page_is_what_is_generated() -> None:
    """gsil-bench methods --markdown > docs/methods.md"""
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == as_markdown(RECORDS)


def test_the_command_prints_the_page() -> None:
    shown = CliRunner().invoke(app, ["methods", "--markdown"])
    assert shown.exit_code == 0
    assert shown.stdout == as_markdown(RECORDS)
    plain = CliRunner().invoke(app, ["methods"])
    assert plain.stdout == as_text(RECORDS) + "\n"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_there_with_its_formula_paper_and_settings(name: str) -> None:
    method = load_method(name)
    flat = " ".join(as_text(RECORDS).split())
    page = as_markdown(RECORDS)
    entry = page.split(f"\n### {name}\n")[1].split("\n##")[0]
    for text in (method.summary, method.formula, method.paper, *(f"{key}={value:g}" for key, value in method.settings.items())):
        assert " ".join(text.split()) in flat
        assert text in entry
    assert page.count(f"| [`{name}`](#{name}) |") == 1


def test_groups_by_hand() -> None:
    """Of records in another order; single tokens of a demonstration are no further need."""
    records = [BARE_PREFERENCES, *map(load_method, ("dpo", "spin", "sft-continued")), support.FORGETS_NORMALISERS]
    records += map(load_method, ("sft", "start"))
    assert [(group, [method.name for method in members]) for group, members in grouped(records).items()] == [
        ("nothing", ["start"]),
        ("demonstrations", ["forgets-normalisers", "sft"]),
        ("demonstrations and self-generations", ["sft-continued"]),
        ("demonstrations and rejected answers (or self-generations where the data has none)", ["bare-preferences"]),
        ("demonstrations and self-generations, compared with a reference", ["spin"]),
        ("demonstrations and rejected answers (or self-generations where the data has none), compared with a reference", ["dpo"]),
    ]
    assert sum(map(len, grouped(RECORDS).values())) == len(METHODS)


def test_costs_by_hand() -> None:
    """Two epochs, a forward pass a third of a sequence's forward and backward.

    SFT: 1. SPIN: 2 sequences; 2 rounds × 2 reference passes, 4/3 over 2 epochs = 2/3; a sample a round. DPO with 3 samples and
    one opponent: 4 sequences; 1 + 3 reference passes, 4/3 over 2 epochs. Without its reference: none of these. The control: as
    many tokens as pairs have.
    """
    found = {name: Cost.of(load_method(name)) for name in ("start", "sft", "spin", "sft-continued")}
    assert found["start"] == Cost(0, 0, 0, 2.0)
    assert (found["sft"], found["sft"].run) == (Cost(1, 0, 0, 2.0), 1.0)
    assert (found["spin"], found["spin"].run) == (Cost(2, 4, 2, 2.0), pytest.approx(2 + 2 / 3))
    assert Cost.of(BARE_PREFERENCES) == found["sft-continued"] == Cost(2, 0, 1, 2.0)
    many = Cost.of(with_settings(load_method("dpo"), {"samples": 3}))
    assert (many, many.run) == (Cost(4, 4, 3, 2.0), pytest.approx(4 + 2 / 3))
    thrice = Cost.of(with_settings(load_method("dpo"), {"rounds": 3}))
    assert thrice.reference == 1 + 3  # the demonstrations' once, under the initial policy


def test_a_method_from_outside_has_its_place() -> None:
    one = dataclasses.replace(support.MARGIN, formula="f' − f", protocol=SelfPlay(rounds=1, samples=2))
    assert group_of(one) == "demonstrations and self-generations, compared with a reference"
    assert cost_text(one) == "a step 3x SFT's, a run 3.50x with 3 reference passes and 2 samples a demonstration"
    assert "    f' − f" in as_text([one])


def test_the_page_has_no_lines_of_the_machine() -> None:
    """The same bytes everywhere."""
    assert not re.search(r"/tmp|/home|/root|0x[0-9a-f]{6}", as_markdown(RECORDS))
