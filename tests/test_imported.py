"""What the command line makes of stored judgments and of lm-eval's files."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from gsil_bench import cli
from gsil_bench.errors import UserError
from gsil_bench.evaluation.lm_eval_import import ImportedTask, write_imported
from gsil_bench.records import ItemScore
from gsil_bench.reporting.mt_bench import category_means

RUNNER = CliRunner()


def write_run(folder: Path, right: list[int]) -> None:
    """A run as lm-eval writes it: three documents of one task under one filter."""
    folder.mkdir(parents=True)
    mean = sum(right) / len(right)
    results = {
        "results": {"quiz": {"alias": "quiz", "acc,none": mean, "acc_stderr,none": 0.1}},
        "group_subtasks": {"quiz": []},
        "configs": {"quiz": {"metric_list": [{"metric": "acc"}]}},
        "versions": {"quiz": 1.0},
        "n-shot": {"quiz": 0},
        "n-samples": {"quiz": {"original": len(right), "effective": len(right)}},
        "model_name": "a/model",
        "lm_eval_version": "0.4.13",
        "higher_is_better": {"quiz": {"acc": True}},
    }
    (folder / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps(results))
    empty = {"doc": {}, "target": "x", "arguments": {}, "resps": [], "filtered_resps": [], "filter": "none", "metrics": ["acc"]}
    lines = [
        {
            **empty,
            "doc_id": number,
            "acc": float(score),
            **{f"{what}_hash": f"{what}{number}" for what in ("doc", "prompt", "target")},
        }
        for number, score in enumerate(right)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples_quiz_2026-01-01T00-00-00.000000.jsonl").write_text(text)


def test_two_runs_of_lm_eval_are_compared_item_by_item(tmp_path: Path) -> None:
    """Of twelve items the second solves eight more and none less: exact McNemar gives p = 2 / 2**8."""
    write_run(tmp_path / "a", [0] * 8 + [1] * 4)
    write_run(tmp_path / "b", [1] * 12)
    words = ["import-lm-eval", f"plain={tmp_path / 'a'}", f"tuned={tmp_path / 'b'}", "--out", str(tmp_path / "out"), "--json"]
    done = RUNNER.invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    tuned = next(cell for cell in json.loads(done.stdout)["cells"] if cell["method"] == "tuned")
    assert (tuned["task"], tuned["verdict"]) == ("lm-eval/quiz", "better")
    assert tuned["p"] == pytest.approx(2 / 2**8)
    result = json.loads((tmp_path / "out" / "results" / "lm-eval" / "quiz" / "tuned-seed0.json").read_text())
    assert [item["score"] for item in result["items"]] == [1.0] * 12


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    items = (ItemScore("0", 1.0, "", details={"document": "d", "target": "t"}),)
    found = ImportedTask("quiz", "acc,none", ("acc,none",), items, 1, "1", 0, "m", "0.4.13", "")
    with pytest.raises(UserError, match=r"the name '\.\.': letters, digits"):
        write_imported([found.as_result("..")], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_category_means_by_hand() -> None:
    """A question counts if both of its turns were rated; a category without any has no mean."""
    items = [
        ItemScore("81", 6.0, "", "writing", {"ratings": [5.0, 7.0], "repeats": [[5.0], [7.0]], "lengths": [10, 20]}),
        ItemScore("82", None, "", "writing", {"ratings": [9.0, None], "repeats": [[9.0], [None]], "lengths": [10, 20]}),
        ItemScore("101", None, "", "math", {"ratings": [None, None], "repeats": [[None], [None]], "lengths": [1, 1]}),
    ]
    means = category_means(items)
    assert means == {"writing": 6.0, "math": None}


def test_ratings_of_a_folder_without_any(tmp_path: Path) -> None:
    done = RUNNER.invoke(cli.app, ["ratings", str(tmp_path)])
    assert done.exit_code == 2
    assert "no results of tasks below" in done.output


def test_the_radar_is_well_formed() -> None:
    from gsil_bench.reporting.plots import radar

    root = ElementTree.fromstring(radar({"<b>&": {"writing": 6.0, "math": None, "code": 3.0}}).svg())
    assert root.tag.endswith("svg")
