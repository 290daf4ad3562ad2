"""The leaderboard: entries say what was run, pages follow from entries, and every kind of tampering is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from leaderboard_support import TASKS, cell, provenance, run_of, write_run
from typer.testing import CliRunner

from gsil_bench import cli
from gsil_bench.errors import MissingLibraryError, UserError
from gsil_bench.leaderboard import check as checks
from gsil_bench.leaderboard import submit as submission
from gsil_bench.leaderboard.board import Board, boards_of
from gsil_bench.leaderboard.build import build, generated
from gsil_bench.leaderboard.check import check_task
from gsil_bench.leaderboard.entries import Entry, Said, entry_of, entry_path, entry_text, mean_score, read_entries, without_paths
from gsil_bench.leaderboard.export import export
from gsil_bench.leaderboard.schema import KEYWORDS, SCHEMA, problems
from gsil_bench.methods import load_method
from gsil_bench.records import digest
from gsil_bench.reporting.comparison import Comparison
from gsil_bench.tasks import load_task

ROOT = Path(__file__).parent.parent
RUNNER = CliRunner()
METHODS = ("start", "sft", "sft-continued", "gsil-logistic")
OUTSIDE = {"my-ipo": "https://github.com/my-lab/ipo"}


def submit(run: Path, to: Path, said: Said = Said(), **choices: Any) -> submission.Submission:
    return submission.submit(run, to, **{"methods": None, "said": said, "allow_limit": False, "replace": False} | choices)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A leaderboard with four methods, two seeds and three tasks."""
    folder = tmp_path_factory.mktemp("built")
    submit(write_run(folder / "run", run_of(METHODS)), folder / "board" / "results")
    board = folder / "board"
    build(board, boards_of(read_entries(board)[0]))
    return board


@pytest.fixture
def board(built: Path, tmp_path: Path) -> Path:
    """A copy of it to tamper with."""
    shutil.copytree(built, tmp_path / "board")
    return tmp_path / "board"


def check(folder: Path) -> tuple[int, str]:
    done = RUNNER.invoke(cli.app, ["leaderboard", "check", str(folder)])
    return done.exit_code, done.output


def path_of(folder: Path, method: str = "sft", seed: int = 0, task: str = "quiz") -> Path:
    return next(folder.glob(f"results/*/{task}/{method}-seed{seed}.json"))


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Change a file's content and write it as the tool would; returns the content."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(entry_text(data), encoding="utf-8")
    return data


def test_the_committed_leaderboard_is_what_its_results_give() -> None:
    code, output = check(ROOT / "leaderboards")
    assert code == 0, output


def test_a_built_leaderboard_passes(built: Path) -> None:
    """Four methods, two seeds (the given model has one), three tasks: (3 · 2 + 1) · 3 = 21 results."""
    assert check(built) == (0, "21 results, all as their items say; the pages are what the results give\n")


def test_an_entry_holds_the_scores_and_no_trace_of_the_machine(built: Path) -> None:
    path = path_of(built)
    data = json.loads(path.read_text(encoding="utf-8"))
    original = cell(load_method("sft"), 0, "quiz", TASKS["quiz"])
    assert data["items"]["scores"] == [item.score for item in original.items]
    assert data["score"] == sum(item.score or 0 for item in original.items) / 40
    assert data["demonstrations"]["source"] == "mine.jsonl"
    assert not re.search(r"/home|/tmp|ada\b|why", "".join(each.read_text("utf-8") for each in built.rglob("*") if each.is_file()))


def test_a_thousand_items_take_less_than_25_kilobytes() -> None:
    entry = entry_of(cell(load_method("sft"), 0, "quiz", 1000))
    assert len(entry_text(entry.data).encode()) < 25_000


def test_the_statistics_of_entries_are_those_of_the_results(built: Path) -> None:
    """Every number of every cell, from the run's own results and from what the leaderboard keeps of them."""
    before = Comparison.of(run_of(METHODS), methods=METHODS, tasks=sorted(TASKS), control="sft-continued")
    (found,) = boards_of(read_entries(built)[0])
    assert [column.task for column in found.comparison.columns] == ["quiz", "talk", "held-out-nll"]
    after = {column.task: column.cells for column in found.comparison.columns}
    for column in before.columns:
        for mine, theirs in zip(column.cells, after[column.task], strict=True):
            assert (mine.score, mine.against, mine.among_best) == (theirs.score, theirs.against, theirs.among_best)


def test_pages_do_not_depend_on_the_order_of_results(built: Path) -> None:
    entries = read_entries(built)[0]
    for seed in range(3):
        shuffled = random.Random(seed).sample(entries, len(entries))
        assert generated(boards_of(shuffled)) == generated(boards_of(entries))


def test_mean_is_rounded_once() -> None:
    """Ten times 0.1 is 1 exactly when it is summed exactly; a running sum gives 0.9999999999999999."""
    assert mean_score([0.1] * 10) == 0.1
    assert mean_score([None, 1.0]) == 1.0
    assert mean_score([None]) is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/ada/mine.jsonl", "mine.jsonl"),
        ("wrote '/tmp/x y'", "wrote 'x y'"),
        (r"C:\Users\ada\mine.jsonl", "mine.jsonl"),
        ("~/runs/mine.jsonl", "mine.jsonl"),
        ("https://arxiv.org/abs/2410.10093", "https://arxiv.org/abs/2410.10093"),
        ("quiz/greedy-v1 and a / b", "quiz/greedy-v1 and a / b"),
    ],
)
def test_paths_of_a_machine_are_cut_to_names(text: str, kept: str) -> None:
    assert without_paths({"a": [text]}) == {"a": [kept]}


# Tampering. Each change writes a file as the tool would, so that only what was changed can be wrong.


def set_score(data: dict[str, Any]) -> None:
    data["score"] = 0.99


def flip_item(data: dict[str, Any]) -> None:
    data["items"]["scores"][0] = 1 - data["items"]["scores"][0]


def flip_item_and_mean(data: dict[str, Any]) -> None:
    flip_item(data)
    data["score"] = mean_score(data["items"]["scores"])


def set_at(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def delete(*keys: str) -> Callable[[dict[str, Any]], object]:
    def change(data: dict[str, Any]) -> object:
        for key in keys[:-1]:
            data = data[key]
        return data.pop(keys[-1])

    return change


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "score": (set_score, "score: says 0.99"),
    "item": (flip_item, "items.sha256: says"),
    "item and mean": (flip_item_and_mean, "items.sha256: says"),
    "unscored": (set_at("unscored", value=1), "unscored: says 1, its items and inputs say 0"),
    "short list": (lambda data: data["items"]["scores"].pop(), "items.scores: 39 scores for 40 items"),
    "twice": (set_at("items", "ids", value=["0" * 12] * 40), "items.sha256"),
    "other model": (set_at("model", "weights_sha256", value="0" * 64), "model.weights_sha256: says"),
    "other protocol": (set_at("protocol", value="easier-v1"), "protocol: says"),
    "missing": (delete("metric"), "metric: missing"),
    "missing inside": (delete("demonstrations", "sha256"), "demonstrations.sha256: missing"),
    "extra": (set_at("comment", value="trust me"), "comment: no field of this schema"),
    "text for number": (set_at("seed", value="0"), "seed: a text, not a whole number"),
    "version": (set_at("schema_version", value=2), "schema_version: 2, must be 1"),
    "tuned on test": (
        set_at("tuning", value={"search_space": {}, "trials": 3, "split": "test"}),
        'tuning.split: "test", must be one of "dev"',
    ),
    "path as task": (set_at("task", value="../../outside"), "task: "),
    "line end": (set_at("method", "name", value="sft\n"), "method.name: "),
    "GPUs": (set_at("provenance", "hardware", value={"gpus": 3}), "provenance.hardware.gpus: a number, not a list"),
    "budget": (set_at("comparable", "budget", value={"steps": 1}), "comparable.budget: an object, not a text or null"),
    "link": (set_at("link", value="javascript:alert(1)"), "link: "),
    "path": (set_at("warnings", value=["see /home/ada/log"]), "names a path of some machine"),
    "other loss": (set_at("method", "record", "loss", value="logistic"), 'method.record.loss: says "logistic", sft'),
    "needless source": (set_at("method", "source", value="https://x.org"), "method.source: sft is in this repository"),
    "other settings": (
        set_at("method", "record", "training", "learning_rate", value=1.0),
        "record.training.learning_rate",
    ),
    "other tuning": (
        set_at("tuning", value={"search_space": {}, "trials": 3, "split": "dev"}),
        "made otherwise than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_result_is_refused(board: Path, what: str) -> None:
    change, message = TAMPERED[what]
    edited(path_of(board), change)
    code, output = check(board)
    assert code == 1
    assert message in output
    assert "quiz/sft-seed" in output  # the file is named


def consistent(data: dict[str, Any]) -> None:
    """As a careful forger leaves it: score, counts and digest follow from the items."""
    items = data["items"]
    data["score"], data["unscored"] = mean_score(items["scores"]), sum(score is None for score in items["scores"])
    items["sha256"] = digest([list(pair) for pair in zip(items["ids"], items["scores"], strict=True)])


def keep_right_items(data: dict[str, Any]) -> None:
    right = [number for number, score in enumerate(data["items"]["scores"]) if score]
    data["items"] |= {key: [data["items"][key][number] for number in right] for key in ("ids", "scores")}


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "wrong answers left out": (keep_right_items, "items.ids: not the items of"),
    "an invented item": (lambda data: data["items"]["ids"].__setitem__(0, "0" * 12), "items.ids: not the items of"),
    "another scale": (set_at("best", value=2), "best: 2 against 1"),
    "a limit that was none": (set_at("limit", value=10), "limit: 10 against null"),
    "a cost below nothing": (set_at("cost", "seconds", value=-1.0), "cost.seconds: -1.0 is below 0"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_consistent_forgery_differs_from_the_other_rows(board: Path, what: str) -> None:
    change, message = FORGED[what]
    edited(path_of(board), lambda data: (change(data), consistent(data)))
    code, output = check(board)
    assert code == 1
    assert message in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["items"]["ids"].__setitem__(0, "0" * 12), "items.ids: not the 1000 items that the task asks"),
        (lambda data: data["items"]["scores"].__setitem__(0, 0.5), "items.scores: 0.5, but accuracy gives one answer 0 or 1"),
        (set_at("metric", value="exact_match"), 'metric: says "exact_match", the task has "accuracy"'),
    ],
)
def test_items_of_an_embedded_task_are_the_tasks_own(change: Callable[[dict[str, Any]], object], message: str) -> None:
    path = next((ROOT / "leaderboards" / "results").glob("mini-*/mini-gsm8k/sft-seed0.json"))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert list(check_task(Entry("mini", data))) == []
    change(data)
    assert any(message in line for line in check_task(Entry("mini", data)))


def test_a_task_whose_library_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results are not refused, but nobody may think that they were checked."""

    def absent(name: str) -> Any:
        if name == "mini-gsm8k":
            raise MissingLibraryError("needs a library")
        return load_task(name)

    monkeypatch.setattr(checks, "load_task", absent)
    code, said = check(ROOT / "leaderboards")
    assert code == 0
    assert [line for line in said.splitlines() if line.startswith("note: ")] == [
        "note: mini-gsm8k: its scale and metric are not checked here: needs a library"
    ]


def test_scores_outside_the_scale_are_refused(board: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["items"]["scores"][0] = 2
        data["score"] = mean_score(data["items"]["scores"])
        pairs = zip(data["items"]["ids"], data["items"]["scores"], strict=True)
        data["items"]["sha256"] = digest([list(pair) for pair in pairs])

    edited(path_of(board), change)
    assert "items.scores: 2 is outside the scale of 0 to 1" in check(board)[1]


def test_an_unknown_method_is_refused_and_one_from_outside_needs_its_code(board: Path, tmp_path: Path) -> None:
    method = dataclasses.replace(load_method("gsil-brier"), name="my-ipo", summary="A bounded margin.", formula="(f − f')²")
    run = write_run(tmp_path / "run", [cell(method, seed, task, count) for task, count in TASKS.items() for seed in (0, 1)])
    with pytest.raises(UserError, match=r"unknown method 'my-ipo'.*needs a link to its code: --source my-ipo=https"):
        submit(run, board)
    submit(run, board, Said(sources=OUTSIDE))
    build(board, boards_of(read_entries(board)[0]))
    assert check(board)[0] == 0
    assert "my-ipo (from outside)" in (board / "README.md").read_text(encoding="utf-8")
    for seed in (0, 1):
        for task in TASKS:
            edited(path_of(board, "my-ipo", seed, task), set_at("method", "source", value=None))
    assert "unknown method 'my-ipo'" in check(board)[1]


def test_a_copy_under_another_name_is_refused(board: Path) -> None:
    """The same cell as another seed: one path for each cell, and one fingerprint."""
    data = json.loads(path_of(board).read_text(encoding="utf-8"))
    data["seed"] = 7
    (board / entry_path(data)).write_text(entry_text(data), encoding="utf-8")
    code, output = check(board)
    assert code == 1 and "sft-seed7.json: fingerprint: the same cell as" in output
    assert "no result for seed 7 on talk, which other tasks have" in output


def test_a_result_in_another_place_is_refused(board: Path) -> None:
    shutil.copy(path_of(board), path_of(board).with_name("sft-seed9.json"))
    assert "sft-seed9.json: its content belongs into results/" in check(board)[1]


def test_a_result_that_was_left_out_shows(board: Path) -> None:
    path_of(board, "sft", 1).unlink()
    assert "sft: no result for seed 1 on quiz, which other tasks have" in check(board)[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sft-seed0.json", "{", "not JSON"),
        ("sft-seed0.json", '{"score": NaN}', "NaN is no JSON number"),
        ("sft-seed0.json", '{"score": 1e999}', "not JSON"),
        ("sft-seed0.json", '{"score": "\\ud800"}', "not JSON"),
        ("sft-seed0.json", "[" * 100_000, "not JSON"),
        ("sft-seed0.json", "[]", "the file: a list, not an object"),
        ("notes.txt", "hello", "only .json files belong below results/"),
    ],
)
def test_files_that_are_no_results_are_refused(board: Path, name: str, content: str, message: str) -> None:
    path_of(board).with_name(name).write_text(content, encoding="utf-8")
    code, output = check(board)
    assert code == 1 and message in output


def test_another_layout_of_the_same_content_is_refused(board: Path) -> None:
    path = path_of(board)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    assert "not as `gsil-bench submit` writes it" in check(board)[1]


@pytest.mark.parametrize("name", ["README.md", "index.html", "schema.json"])
def test_a_page_that_the_results_do_not_give_is_refused(board: Path, name: str) -> None:
    with (board / name).open("a", encoding="utf-8") as file:
        file.write(" ")
    code, output = check(board)
    assert code == 1 and f"{name}: not what the results give" in output
    (board / name).unlink()
    assert f"{name}: missing" in check(board)[1]


def test_build_writes_nothing_while_a_result_is_refused(board: Path) -> None:
    before = (board / "README.md").read_text(encoding="utf-8")
    edited(path_of(board), set_score)
    done = RUNNER.invoke(cli.app, ["leaderboard", "build", str(board)])
    assert done.exit_code == 1 and "score: says 0.99" in done.output
    assert (board / "README.md").read_text(encoding="utf-8") == before


def test_a_folder_without_results_is_one_line(tmp_path: Path) -> None:
    done = RUNNER.invoke(cli.app, ["leaderboard", "check", str(tmp_path)])
    assert done.exit_code == 2 and "name the leaderboard's folder" in done.output


# The schema.


def walk(schema: dict[str, Any], where: str = "") -> list[tuple[str, dict[str, Any]]]:
    inner = [walk(each, f"{where}.{name}") for name, each in schema.get("properties", {}).items()]
    return [(where, schema), *(pair for pairs in inner for pair in pairs)]


def test_the_schema_is_one_and_describes_every_field() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    unused = {"$schema", "title", "description", "properties", "required", "additionalProperties", "items"}
    for where, schema in walk(SCHEMA):
        assert set(schema) <= KEYWORDS | unused, where
        assert schema.get("description") or where.startswith(".comparable."), where


def test_our_check_agrees_with_jsonschema(built: Path) -> None:
    """On a good file, and on 300 in which one value was replaced or removed."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    good = json.loads(path_of(built).read_text(encoding="utf-8"))
    assert validator.is_valid(good) and not list(problems(good))
    rng, verdicts = random.Random(0), []
    for _ in range(300):
        bad = copy.deepcopy(good)
        spoil(bad, rng)
        verdicts.append(validator.is_valid(bad))
        assert (not list(problems(bad))) == verdicts[-1], bad
    assert {True, False} == set(verdicts)  # both kinds occur


def spoil(value: Any, rng: random.Random) -> None:
    """Replace or remove something at a random depth."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
            value = inner
            continue
        if rng.random() < 0.3 and isinstance(value, dict):
            del value[key]
        else:
            value[key] = rng.choice([None, True, 0, -1, 1.0, 1.5, "", "x", [], {}, ["x"], {"x": 1}])
        return


# Which rows share a table.


def entries_with(**comparable: Any) -> list[Entry]:
    """Two methods and the model as given, with something changed in what must be equal."""
    found = []
    for result in run_of(("start", "sft", "gsil-logistic"), (0,), {"quiz": 20}):
        changed = {key: value for key, value in comparable.items() if not (key == "budget" and result.method == "start")}
        fingerprint = digest([result.fingerprint, comparable])
        found.append(entry_of(dataclasses.replace(result, comparable={**result.comparable, **changed}, fingerprint=fingerprint)))
    return found


def rows_of(boards: list[Board]) -> list[list[str]]:
    return [[cell.method for column in board.comparison.columns for cell in board.ranked(column)] for board in boards]


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", "m"), ("chat", "c" * 64), ("precision", "bf16"), ("engine", "vllm-0.32"), ("demonstrations", "d")],
)
def test_what_differs_in_more_than_the_method_has_another_table(key: str, value: str) -> None:
    value = digest(value) if key in ("model", "demonstrations") else value
    results = run_of(("start", "sft", "gsil-logistic"), (0,), {"quiz": 20})
    others = []
    for result in results:
        changed = dataclasses.replace(
            result, comparable={**result.comparable, key: value}, fingerprint=digest(result.fingerprint)
        )
        others.append(entry_of(changed))
    boards = boards_of([*map(entry_of, results), *others])
    assert [sorted(rows) for rows in rows_of(boards)] == [["gsil-logistic", "sft", "start"]] * 2


def test_another_budget_has_another_table_and_the_given_model_stands_on_both() -> None:
    more = [entry for entry in entries_with(budget="170 steps of 32 demonstrations") if entry.trained]
    boards = boards_of([*entries_with(), *more])
    assert [sorted(rows) for rows in rows_of(boards)] == [["gsil-logistic", "sft", "start"]] * 2


def test_a_task_asked_in_two_ways_has_two_columns() -> None:
    boards = boards_of([*entries_with(), *entries_with(protocol="quiz/sampled-v1", items=digest("others"))])
    (found,) = boards
    assert len(found.comparison.columns) == 2
    assert all(re.fullmatch(r"quiz \([0-9a-f]{6}\)", column.task) for column in found.comparison.columns)
    assert not any(cell.against.outcome == "refused" for column in found.comparison.columns for cell in column.cells)


def test_rows_are_ranked_by_the_metrics_own_direction(built: Path) -> None:
    (found,) = boards_of(read_entries(built)[0])
    for column in found.comparison.columns:
        scores = [cell.score.estimate for cell in found.ranked(column) if cell.score]
        assert scores == sorted(scores, reverse=column.task != "held-out-nll")


# Submitting.


def test_submitting_twice_changes_nothing_and_other_results_need_replace(tmp_path: Path) -> None:
    run, folder = write_run(tmp_path / "run", run_of(METHODS)), tmp_path / "board"
    assert len(submit(run, folder).written) == 21
    assert submit(run, folder / "results") == submission.Submission((), 21, submit(run, folder).warnings)
    changed = [dataclasses.replace(each, cost={"seconds": 1.0}) for each in run_of(METHODS)]
    other = write_run(tmp_path / "other", changed)
    with pytest.raises(UserError, match=r"holds another result of this cell \(21 such\); --replace overwrites them"):
        submit(other, folder)
    assert len(submit(other, folder, replace=True).written) == 21


def refuse(results: list[Any], tmp_path: Path, match: str, **choices: Any) -> None:
    run, folder = write_run(tmp_path / "run", results, choices.pop("failures", ())), tmp_path / "board"
    with pytest.raises(UserError, match=match):
        submit(run, folder, **choices)
    assert not folder.exists()


def test_an_incomplete_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    """A canary that failed leaves no result; the run's table knows why."""
    results = [each for each in run_of(METHODS) if (each.method, each.task) != ("sft", "quiz")]
    reason = "canaries of quiz: CanaryError: gold answers score 0.9"
    refuse(
        results, tmp_path, rf"no result of sft, seed 0, on quiz \(and 1 more cells\): {reason}; finish the comparison",
        failures=[{"method": "sft", "task": "quiz", "reason": reason}],
    )  # fmt: skip


def test_a_missing_seed_is_refused(tmp_path: Path) -> None:
    results = [each for each in run_of(METHODS) if not (each.method == "sft" and each.seed == 1)]
    refuse(results, tmp_path, "no result of sft, seed 1, on held-out-nll")


def test_a_method_of_which_all_failed_is_refused(tmp_path: Path) -> None:
    failures = [{"method": "spin", "task": "quiz", "reason": "train spin: diverged"}]
    refuse(run_of(METHODS), tmp_path, "no result of spin, seed 0", failures=failures)


def test_an_interrupted_run_is_refused(tmp_path: Path) -> None:
    """Stopped before a method had any result, and before there was a table: the run's recipe says what it was to hold."""
    run = write_run(tmp_path / "run", run_of(METHODS))
    (run / "table.json").unlink()
    config = {"seeds": [0, 1], "split": "test", "methods": [*METHODS, "spin", "my_lab.ipo:METHOD"]}
    (run / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"no result of spin, seed 0, .* \(and \d+ more cells\).*finish the comparison first"):
        submit(run, tmp_path / "results")
    assert submit(run, tmp_path / "results", methods=METHODS).written


def test_chosen_methods_need_not_wait_for_the_others(tmp_path: Path) -> None:
    failures = [{"method": "spin", "task": "quiz", "reason": "train spin: diverged"}]
    run = write_run(tmp_path / "run", run_of(METHODS), failures)
    assert len(submit(run, tmp_path / "board", methods=["sft", "start"]).written) == 9
    with pytest.raises(UserError, match="did you mean 'sft'"):
        submit(run, tmp_path / "other", methods=["sftt"])


def test_the_dev_split_is_refused(tmp_path: Path) -> None:
    results = [dataclasses.replace(each, provenance=provenance(split="dev")) for each in run_of(METHODS)]
    refuse(results, tmp_path, "scored on the dev split, which is for choosing settings")


def test_a_limited_run_is_refused_unless_marked(tmp_path: Path) -> None:
    results = [dataclasses.replace(each, provenance=provenance(40)) for each in run_of(METHODS)]
    refuse(results, tmp_path, "only the first 40 items of each task were asked")
    submit(tmp_path / "run", tmp_path / "board", allow_limit=True)
    build(tmp_path / "board", boards_of(read_entries(tmp_path / "board")[0]))
    assert "**only the first 40 items**" in (tmp_path / "board" / "README.md").read_text(encoding="utf-8")
    assert check(tmp_path / "board")[0] == 0


def test_rows_before_the_last_round_are_left_out(tmp_path: Path) -> None:
    results = run_of(METHODS)
    early = [
        dataclasses.replace(each, method="spin--round-1", record={**each.record, "after_round": 1}, fingerprint=digest(each.task))
        for each in run_of(("spin",))
    ]
    assert len(submit(write_run(tmp_path / "run", [*results, *early]), tmp_path / "board").written) == 21


def test_warnings_are_shown_before_committing(tmp_path: Path) -> None:
    results = [dataclasses.replace(each, warnings=("length alone tells them apart",)) for each in run_of(("sft",), (0,))]
    for each in results:
        each.provenance["suite"]["dirty"] = True
    words = ["submit", str(write_run(tmp_path / "run", results)), "--to", str(tmp_path / "board" / "results")]
    done = RUNNER.invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "warning: sft (seed 0): length alone tells them apart" in done.output
    assert "gsil_bench had changes that are not in commit 6243972" in done.output
    assert "sft: no tuning is stated" in done.output
    assert f"gsil-bench leaderboard build {tmp_path / 'board'}" in done.output


@pytest.mark.parametrize("link", ["javascript:alert(1)", "http://x y", "https://x.org/'><script>"])
def test_links_lead_to_the_web(tmp_path: Path, link: str) -> None:
    refuse(run_of(("sft",), (0,)), tmp_path, "must begin with https://", said=Said(link=link))


TUNED = {
    "split": "dev", "objective": "mean", "trials": 2, "seeds": [0], "space": {"sft": {"learning_rate": [1e-5, 2e-5]}},
    "methods": {"sft": {"chosen": {"trial": 1, "settings": {"learning_rate": 1e-5}}, "warnings": [], "trials": [{}, {}]}},
}  # fmt: skip


def test_the_budget_of_tuning_is_taken_from_the_run_and_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", run_of(("sft",), (0,)))
    (run / "tuning.json").write_text(json.dumps(TUNED), encoding="utf-8")
    done = RUNNER.invoke(cli.app, ["submit", str(run), "--to", str(tmp_path / "board")])
    assert done.exit_code == 0, done.output
    data = json.loads(path_of(tmp_path / "board").read_text(encoding="utf-8"))
    space = {"learning_rate": [1e-5, 2e-5]}
    assert data["tuning"] == {"search_space": space, "trials": 2, "split": "dev", "objective": "mean", "seeds": [0]}
    assert RUNNER.invoke(cli.app, ["leaderboard", "build", str(tmp_path / "board")]).exit_code == 0
    assert "2 trials on dev" in (tmp_path / "board" / "README.md").read_text(encoding="utf-8")


def test_settings_that_were_not_chosen_are_refused(tmp_path: Path) -> None:
    tuned = copy.deepcopy(TUNED)
    tuned["methods"]["sft"]["chosen"]["settings"] = {"learning_rate": 2e-5}  # type: ignore[index]
    (tmp_path / "tuning.json").write_text(json.dumps(tuned), encoding="utf-8")
    said = Said(submission.read_tuning(tmp_path / "tuning.json"))
    refuse(run_of(("sft",), (0,)), tmp_path, "sft was tuned to learning_rate=2e-05, but this run used 1e-05", said=said)


def test_tuning_on_the_test_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("sft: {search_space: {}, trials: 3, split: test}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--tuning .*mine.yaml: sft.split: .test., must be one of"):
        submission.read_tuning(tmp_path / "mine.yaml")


# What a hostile submitter may write.

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> | **b** \u202e"


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    method = dataclasses.replace(
        load_method("gsil-brier"), name="my-ipo", summary=HOSTILE, formula=HOSTILE, paper=f"{HOSTILE} javascript:x"
    )
    results = [cell(method, 0, "quiz", 20, warnings=(HOSTILE,))]
    results[0].provenance["inputs"]["model"]["name"] = HOSTILE
    submit(write_run(tmp_path / "run", results), tmp_path / "board", Said(sources=OUTSIDE))
    build(tmp_path / "board", boards_of(read_entries(tmp_path / "board")[0]))
    page = (tmp_path / "board" / "index.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "<img" not in page and "\u202e" not in page
    assert set(re.findall(r'href="([^"#]*)', page)) <= {"", "data:,", "README.md", "schema.json", OUTSIDE["my-ipo"]}
    readme = (tmp_path / "board" / "README.md").read_text(encoding="utf-8")
    assert "<script" not in readme and "<img" not in readme
    table = [line for line in readme.splitlines() if line.startswith("| my-ipo")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (6, 8) for line in table)  # its own pipes split no cell


# Export.

EEE_REQUIRED = {
    "schema_version", "evaluation_id", "retrieved_timestamp", "source_metadata", "model_info", "eval_library",
    "evaluation_results",
}  # fmt: skip
EEE_KNOWN = EEE_REQUIRED | {"evaluation_timestamp", "detailed_evaluation_results"}
EEE_PATH = re.compile(r"data/[^/]+/[^/]+/[^/]+/[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\.json")


def test_the_export_keeps_the_rules_of_every_eval_ever(built: Path, tmp_path: Path) -> None:
    """Field names and rules as published for schema 0.3.0; seven checkpoints, three results each."""
    entries = read_entries(built)[0]
    paths = export(entries, tmp_path)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in paths)
    assert len(set(names)) == 7 and all(EEE_PATH.fullmatch(name) for name in names)
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        assert EEE_REQUIRED <= set(data) <= EEE_KNOWN
        assert data["schema_version"] == "0.3.0"
        assert data["evaluation_id"].split("/")[0] == path.relative_to(tmp_path).parts[1] == "gsil-bench"
        assert data["model_info"]["id"] == "/".join(path.relative_to(tmp_path).parts[2:4])
        details = data["model_info"]["additional_details"]
        assert details["deployment_type"] in ("self_deployed", "externally_managed", "unknown")
        assert details["model_availability"] in ("open_weights", "closed_weights", "unknown")
        assert {"source_type", "source_organization_name", "evaluator_relationship"} <= set(data["source_metadata"])
        assert len(data["evaluation_results"]) == 3
        for result in data["evaluation_results"]:
            assert_result(result)
        assert all(isinstance(value, str) for value in every_detail(data))


def assert_result(result: dict[str, Any]) -> None:
    """Required fields; a continuous metric has ends, and the score lies between them."""
    assert {"evaluation_name", "source_data", "metric_config", "score_details"} <= set(result)
    metric, score = result["metric_config"], result["score_details"]["score"]
    ends = [math.inf if end == "Infinity" else end for end in (metric["min_score"], metric["max_score"])]
    assert ends[0] <= score <= ends[1]
    assert metric["lower_is_better"] is (result["evaluation_name"] == "held-out-nll")
    assert metric["metric_id"] not in ("score", "accuracy", "rating", "value")
    interval = result["score_details"]["uncertainty"]["confidence_interval"]
    assert interval["lower"] <= score <= interval["upper"] and interval["confidence_level"] == 0.95
    assert {"dataset_name", "source_type"} <= set(result["source_data"])


def every_detail(value: Any) -> list[Any]:
    """All values below the objects whose values the schema wants as texts."""
    if isinstance(value, list):
        return [found for item in value for found in every_detail(item)]
    if not isinstance(value, dict):
        return []
    own = [found for key in ("additional_details", "details") for found in value.get(key, {}).values()]
    return own + [found for item in value.values() for found in every_detail(item)]


def test_the_export_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    entries = read_entries(built)[0]
    first, second = export(entries, tmp_path / "a"), export(entries, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    done = RUNNER.invoke(
        cli.app, ["leaderboard", "export", str(tmp_path / "c"), "--folder", str(built), "--format", "every-eval"]
    )
    assert done.exit_code == 2 and "did you mean 'every-eval-ever'" in done.output
