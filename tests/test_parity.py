"""Whole commands beside lm-eval's own: `compare` and `rescore` give the verdicts of `simple_evaluate`, item by item.

lm-eval loads the model by itself (HFLM: its batches, its tokens before a prompt, its cutting of long prompts), reads the same
local files under its stock definitions, and reaches no network. What differs by design: HFLM decodes an answer by itself, without
the prompt, which drops the space that a sentencepiece answer begins with.

lm-eval's HumanEval runs programs by a script that it downloads (`code_eval`); here a plain interpreter does what that does.
"""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gsil_bench import cli, compare
from gsil_bench.evaluation.stored import read_item_scores, read_results, read_stored_answers
from gsil_bench.records import ItemAnswer, ItemScore
from gsil_bench.tasks import load_task
from gsil_bench.tasks.task import Item, ScoringResources

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'gsil-bench[lm-eval]')"),
]

LIMIT = 6
LONG = 4096
"""Tokens of context in which five shots, and HumanEval's 1,024 new tokens, are not cut."""
SECONDS = 3
"""What lm-eval's HumanEval gives a program."""


# --- data, and no network --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No connection leaves this process, and what `datasets` makes of files stays out of the user's cache."""
    if find_spec("datasets") is None:
        yield
        return
    import datasets

    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"a connection to {address}"
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


def _rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def root(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: the published GSM8K and HumanEval, and ARC and HellaSwag rows in their formats made of GSM8K's sentences."""
    root = tmp_path_factory.mktemp("data")
    for name in ("gsm8k", "humaneval"):
        shutil.copytree(data_dir / name, root / name)
    for split, kept in (("train", None), ("test", len(GSM8K_ANSWERS))):
        rows = (data_dir / f"gsm8k/{split}.jsonl").read_text(encoding="utf-8").splitlines()[:kept]
        _rows(root / f"lm-eval/gsm8k/{split}.jsonl", [json.loads(row) for row in rows])
    lines = (data_dir / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[:600]
    sentences = [json.loads(line)["question"].split(". ") for line in lines]
    told = [parts for parts in sentences if len(parts) > 2]
    for split, start, count in (("train", 0, 60), ("validation", 60, 20), ("test", 80, 20)):
        numbers = range(start, start + count)
        _rows(root / f"lm-eval/arc_challenge/{split}.jsonl", [_arc_row(told, number) for number in numbers])
        if split != "test":
            _rows(root / f"lm-eval/hellaswag/{split}.jsonl", [_hellaswag_row(told, number) for number in numbers])
    return root


def _choices(told: Sequence[Sequence[str]], number: int) -> tuple[list[str], int]:
    """The sentence that goes on and three of other stories, of different lengths; which is right."""
    right = number * 7 % 4
    return [told[(number + (choice - right) % 4 * 31) % len(told)][1][: 20 + 15 * choice] for choice in range(4)], right


def _arc_row(told: Sequence[Sequence[str]], number: int) -> dict[str, Any]:
    texts, right = _choices(told, number)
    choices = {"text": texts, "label": list("ABCD")}
    return {"id": f"q{number}", "question": f"{told[number][0]}. What then?", "choices": choices, "answerKey": "ABCD"[right]}


def _hellaswag_row(told: Sequence[Sequence[str]], number: int) -> dict[str, Any]:
    texts, right = _choices(told, number)
    first, _, second = told[number][0].partition(" and ")
    endings = [f"{text} [step] ." for text in texts]
    return {"activity_label": "Sums", "ctx_a": first, "ctx_b": second or "then", "endings": endings, "label": str(right)}


# --- both commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model on disk, which each side loads by itself."""

    folder: Path
    template: tuple[str, ...]
    """Flags of ours."""
    cuts: bool
    """Whether five shots are longer than its context."""
    spaces: bool
    """Whether an answer may begin with a space that HFLM drops."""


@pytest.fixture(scope="module", params=["stories260K", "stories260K-long", "mini"])
def model(request: pytest.FixtureRequest, data_dir: Path, mini_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A real model (sentencepiece, BOS before a text), the same with a longer context, and the embedded one (byte-level)."""
    if request.param == "mini":
        return Model(mini_folder, (), cuts=True, spaces=False)
    if request.param == "stories260K-long":
        return long_model(data_dir, tmp_path_factory.mktemp("long"))
    return Model(data_dir / "models/stories260K", ("--chat-template", "plain"), cuts=True, spaces=True)


def long_model(data_dir: Path, place: Path) -> Model:
    folder = place / "model"
    folder.mkdir()
    for path in (data_dir / "models/stories260K").iterdir():
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LONG}), encoding="utf-8")
    return Model(folder, ("--chat-template", "plain"), cuts=False, spaces=True)


@dataclass(frozen=True)
class Cell:
    """What `compare` stored of a task: items as they were asked, answers, scores."""

    items: Sequence[Item]
    answers: Sequence[ItemAnswer]
    scores: Sequence[ItemScore]


def ours(model: Model, tasks: Sequence[str], root: Path, out: Path, limit: int = LIMIT) -> dict[str, Cell]:
    """`compare` on tasks, and what it left on disk."""
    demonstrations = out.parent / "demonstrations.jsonl"
    _rows(demonstrations, [{"prompt": "Hello?", "completion": "Hello."}])
    words = ["compare", "--methods", "start", "--model", str(model.folder), *model.template, "--tasks", ",".join(tasks)]
    words += ["--demonstrations", str(demonstrations), "--data-dir", str(root), "--limit", str(limit), "--out", str(out)]
    code = compare.call(cli.app, [*words, "--device", "cpu", "--engine", "transformers", "--allow-code-execution"])
    assert code == 0
    cells = {}
    for result in read_results(out):
        items = load_task(result.task if "/" in result.task else tasks[0], root).items("test", root)[:limit]
        answers, scores = read_stored_answers(out, result).answers, read_item_scores(out, result)
        assert [item.id for item in items] == [given.id for given in answers] == [score.id for score in scores]
        assert not [given.error for given in answers if given.error]
        cells[result.task] = Cell(items, answers, scores)
    assert len(cells) == len(tasks)
    return cells


def theirs(lm: Any, name: str, stock: str, files: Mapping[str, Path], place: Path, changes: str = "", **settings: Any) -> Any:
    """lm-eval's own run of a stock definition on local files: its samples, one for each document and filter."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    data = json.dumps({split: str(path) for split, path in files.items()})
    source = (
        f"include: {Path(lm_eval.__file__).parent}/tasks/{stock}\ntask: {name}_local\ndataset_path: json\ndataset_name: null\n"
    )
    (place / "definitions").mkdir(exist_ok=True)
    written = f"{source}dataset_kwargs: {{data_files: {data}}}\n{changes}"
    (place / f"definitions/{name}.yaml").write_text(written, encoding="utf-8")
    manager = TaskManager(include_path=str(place / "definitions"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[f"{name}_local"], task_manager=manager, log_samples=True, bootstrap_iters=0, **settings
    )
    return found["samples"][f"{name}_local"]


def hflm(model: Model) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model.folder), batch_size=4, device="cpu", dtype="float32")


def splits(root: Path, name: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted((root / name).iterdir())}


def same_words(given: str, wanted: str, model: Model) -> bool:
    return given == wanted or (model.spaces and given == f" {wanted}")


# --- a model's own answers -------------------------------------------------------------------------------------------------


def test_gsm8k(model: Model, root: Path, tmp_path: Path) -> None:
    """Prompts, answers and both filters, under our record of the definition and under lm-eval's."""
    samples = theirs(hflm(model), "gsm8k", "gsm8k/gsm8k.yaml", splits(root, "gsm8k"), tmp_path, limit=LIMIT)
    by_filter = {
        name: [sample for sample in samples if sample["filter"] == name] for name in ("strict-match", "flexible-extract")
    }
    cells = ours(model, ["lm-eval:gsm8k", "gsm8k/lm-eval-v3"], root, tmp_path / "out")
    strict, flexible = by_filter.values()
    assert len(strict) == len(flexible) == LIMIT
    for cell in cells.values():
        assert [item.published_id for item in cell.items] == [str(sample["doc_id"]) for sample in strict]
        assert [item.turns[0] for item in cell.items] == [sample["arguments"][0][0] for sample in strict]
        assert [given.cut != (0,) for given in cell.answers] == [model.cuts] * LIMIT
        for given, sample in zip(cell.answers, strict, strict=True):
            assert same_words(given.texts[0], sample["resps"][0][0], model)
        assert [score.score for score in cell.scores] == [sample["exact_match"] for sample in strict]
    wanted = [sample["exact_match"] for sample in flexible]
    assert [score.details["flexible"] for score in cells["gsm8k/lm-eval-v3"].scores] == [value == 1 for value in wanted]
    found = [score.details["metrics"]["exact_match,flexible-extract"] for score in cells["lm-eval/gsm8k"].scores]
    assert found == wanted
    assert len({given.texts for given in cells["lm-eval/gsm8k"].answers}) > 1  # the model says different things


@pytest.mark.parametrize(
    ("task", "name", "stock", "shots"),
    [
        ("openllm-v1/arc", "arc_challenge", "arc/arc_challenge.yaml", 25),
        ("openllm-v1/hellaswag", "hellaswag", "hellaswag/hellaswag.yaml", 10),
        ("lm-eval:arc_challenge", "arc_challenge", "arc/arc_challenge.yaml", None),
        ("lm-eval:hellaswag", "hellaswag", "hellaswag/hellaswag.yaml", None),
    ],
)
def test_multiple_choice(task: str, name: str, stock: str, shots: int | None, model: Model, root: Path, tmp_path: Path) -> None:
    """Contexts, continuations, log-likelihoods, acc and acc_norm (the score of the leaderboard)."""
    changes = "" if shots is None else f"fewshot_split: train\nnum_fewshot: {shots}\n"
    files, count = splits(root, f"lm-eval/{name}"), 20 if shots is None else 8
    samples = theirs(hflm(model), name, stock, files, tmp_path, changes, limit=count)
    (cell,) = ours(model, [task], root, tmp_path / "out", count).values()
    assert len(samples) == len(cell.items) == count
    for item, given, score, sample in zip(cell.items, cell.answers, cell.scores, samples, strict=True):
        assert item.published_id == str(sample["doc_id"])
        assert [(each.context, each.text) for each in item.continuations] == [tuple(pair) for pair in sample["arguments"]]
        logps = [json.loads(text)["logp"] for text in given.texts]
        assert logps == pytest.approx([response[0][0] for response in sample["resps"]], abs=1e-3)
        assert score.details["metrics"] == {"acc,none": sample["acc"], "acc_norm,none": sample["acc_norm"]}
        assert score.score == sample["acc" if shots is None else "acc_norm"]
    assert len({sample["acc_norm"] for sample in samples}) == 2  # right and wrong ones


# --- HumanEval -------------------------------------------------------------------------------------------------------------


def runs(program: str) -> bool:
    """Whether a program ends without an exception, as `code_eval` has it: exec in an empty namespace, 3 s."""
    code = "import sys\nexec(sys.stdin.read(), {})\nprint('reached the end')"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], input=program, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.stdout.endswith("reached the end\n")


class CodeEval:
    """In place of the script that lm-eval downloads: `compute` of its interface."""

    def compute(self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]) -> Any:
        passed = [runs(f"{text}\n{test}") for test, texts in zip(references, predictions, strict=True) for text in texts]
        assert list(k) == [1]
        return {"pass@1": sum(passed) / len(passed)}, {}


@pytest.fixture
def code_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda name: CodeEval())


def test_humaneval(root: Path, data_dir: Path, tmp_path: Path, code_eval: None) -> None:
    """Prompts, answers and verdicts; nothing is cut in a context that holds 1,024 new tokens."""
    model = long_model(data_dir, tmp_path)
    files = {"test": root / "humaneval/HumanEval.jsonl.gz"}
    samples = theirs(
        hflm(model), "humaneval", "humaneval/humaneval.yaml", files, tmp_path, limit=LIMIT, confirm_run_unsafe_code=True
    )
    (cell,) = ours(model, ["humaneval/lm-eval-base"], root, tmp_path / "out").values()
    assert len(samples) == LIMIT
    for item, given, score, sample in zip(cell.items, cell.answers, cell.scores, samples, strict=True):
        assert item.id == sample["doc"]["task_id"]
        assert item.turns == (sample["arguments"][0][0],)
        assert same_words(given.texts[0], sample["resps"][0][0], model)
        assert score.score == sample["pass@1"]
    assert len({given.texts for given in cell.answers}) > 1


# --- stored answers --------------------------------------------------------------------------------------------------------


def rescored(task: str, completions: Mapping[str, str], root: Path, tmp_path: Path, capsys: Any) -> tuple[list[Any], Any]:
    """What `rescore --answers --json` prints: a score for every line, and the aggregate."""
    answers = tmp_path / "answers.jsonl"
    _rows(answers, [{"item": item, "completion": text} for item, text in completions.items()])
    words = ["rescore", "--answers", str(answers), "--protocol", task, "--data-dir", str(root), "--json"]
    capsys.readouterr()
    assert compare.call(cli.app, [*words, "--allow-code-execution"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [line["item"] for line in printed["items"]] == list(completions)
    return [line["score"] for line in printed["items"]], printed["aggregate"]


def scripted(completions: Sequence[str]) -> Any:
    """A model of lm-eval's that says what is written, cut at the definition's stops by lm-eval's own function."""
    from lm_eval.api.model import LM
    from lm_eval.models.utils import postprocess_generated_text

    class Scripted(LM):  # type: ignore[misc]
        tokenizer_name = "none"

        def apply_chat_template(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
            return json.dumps(list(messages))

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            pairs = zip(completions, requests, strict=True)
            return [postprocess_generated_text(text, request.args[1]["until"], None) for text, request in pairs]

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Scripted()


GSM8K_ANSWERS: Sequence[tuple[Callable[[str, str], str], bool, bool]] = [
    (lambda gold, n: gold, True, True),
    (lambda gold, n: f"#### {n}.", True, True),
    (lambda gold, n: f"The answer is {n}.", False, True),
    (lambda gold, n: f"#### ${n}", False, True),
    (lambda gold, n: f"#### {n}.00", False, False),
    (lambda gold, n: "", False, False),
    (lambda gold, n: f"#### 7777\n#### {n}", False, True),
    (lambda gold, n: f"#### {n}\n#### 7777", True, False),
    (lambda gold, n: f"{gold}\n\nQuestion: What is 3 + 4?\nAnswer: 7\n#### 7", True, True),
    (lambda gold, n: f"{gold}</s> 12 and 13", True, True),
    (lambda gold, n: f"{gold}<|im_end|> 12 and 13", True, True),
    (lambda gold, n: f"Question: again?\n#### {n}", False, False),
    (lambda gold, n: f"#### -{n}", False, False),
    (lambda gold, n: f"####{n}", False, True),
    (lambda gold, n: f"#### {n[0]},{n[1:]}" if len(n) > 1 else f"#### ,{n}", True, True),
    (lambda gold, n: f"#### {n} dollars in 2 days", True, False),
    (lambda gold, n: f"so {n} (for 2 days).", False, False),
    (lambda gold, n: f"#### {n}{n}1", False, False),
    (lambda gold, n: "#### ,", False, False),
    (lambda gold, n: f"  \n\t#### {n}\n", True, True),
    (lambda gold, n: f"**#### {n}**", True, True),
    (lambda gold, n: f"#### {n}\u00a0km\u00b2", True, True),
]
"""What is said, from the gold answer and its number; whether it is right, and whether the flexible filter finds it right."""


def test_scripted_gsm8k(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (root / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()]
    golds = [row["answer"] for row in rows[: len(GSM8K_ANSWERS)]]
    texts = [write(gold, gold.rpartition("#### ")[2]) for gold, (write, _, _) in zip(golds, GSM8K_ANSWERS, strict=True)]
    files = splits(root, "gsm8k")
    samples = theirs(scripted(texts), "gsm8k", "gsm8k/gsm8k.yaml", files, tmp_path, limit=len(texts))
    strict, flexible = (
        [sample["exact_match"] == 1 for sample in samples if sample["filter"] == name]
        for name in ("strict-match", "flexible-extract")
    )
    assert strict == [right for _, right, _ in GSM8K_ANSWERS]
    assert flexible == [found for _, _, found in GSM8K_ANSWERS]
    completions = {str(number): text for number, text in enumerate(texts)}
    for task in ("gsm8k/lm-eval-v3", "lm-eval:gsm8k"):
        scores, aggregate = rescored(task, completions, root, tmp_path, capsys)
        assert scores == [float(right) for right in strict]
        assert aggregate["counts"]["flexible"] == sum(flexible)
        loaded = load_task(task, root)
        kept = [(sample["resps"][0][0],) for sample in samples if sample["filter"] == "strict-match"]
        details = loaded.score(loaded.items("test", root)[: len(kept)], kept, ScoringResources())
        assert [score.details["flexible"] for score in details] == flexible


Row = Mapping[str, str]
SHARED: Sequence[tuple[Callable[[Row], str], bool]] = [
    (lambda row: row["canonical_solution"], True),
    (lambda row: row["canonical_solution"] + "\n\ndef other():\n    return (", True),  # a stop cuts what would not parse
    (lambda row: row["canonical_solution"] + "\n# done\n)", True),
    (lambda row: row["canonical_solution"] + "\nprint(undefined)", True),
    (lambda row: row["canonical_solution"] + "\nif __name__ == '__main__':\n    raise ValueError", True),
    (lambda row: row["canonical_solution"].rstrip() + "  # as asked: größer", True),
    (lambda row: row["prompt"] + row["canonical_solution"], False),  # again from its imports: the stop cuts at its def
    (lambda row: row["canonical_solution"].lstrip(" "), False),
    (lambda row: row["canonical_solution"][1:], False),
    (lambda row: "    return None\n", False),
    (lambda row: "    pass", False),
    (lambda row: "", False),
    (lambda row: "    raise SystemExit(0)\n", False),
    (lambda row: "    import os\n    os._exit(0)\n", False),
    (lambda row: "    while True:\n        pass\n", False),
    (lambda row: f"    return {row['entry_point']}(*locals().values())\n", False),
    (lambda row: row["canonical_solution"] + "\nimport no_such_module\n", False),
    (lambda row: row["canonical_solution"] + f"\ndel {row['entry_point']}\n", False),
    (lambda row: row["canonical_solution"] + "\nassert __name__ != '__main__'\n", True),
    (lambda row: row["canonical_solution"] + "\nx = [print for print in 'ab']\n", True),
]
"""What is said of a problem, and whether it passes."""
FENCED: Sequence[tuple[Callable[[Row], str], bool]] = [
    (lambda row: row["canonical_solution"] + "```\nThat is it.", True),
    (lambda row: row["canonical_solution"] + "\n```\n\nSecond:\n```python\nsyntax error", True),
    (lambda row: f"```python\n{row['prompt']}{row['canonical_solution']}```", False),
    (lambda row: row["canonical_solution"] + "``\n", False),
]


@pytest.mark.parametrize("task", ["humaneval/lm-eval-base", "humaneval/lm-eval-instruct-v4"])
def test_scripted_humaneval(task: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], code_eval: None) -> None:
    instruct = task == "humaneval/lm-eval-instruct-v4"
    with gzip.open(root / "humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    scripts = [*SHARED, *((write, passes and instruct) for write, passes in FENCED)]
    texts = [write(row) for row, (write, _) in zip(rows, scripts, strict=False)]
    name = "humaneval_instruct" if instruct else "humaneval"
    samples = theirs(
        scripted(texts),
        name,
        f"humaneval/{name}.yaml",
        {"test": root / "humaneval/HumanEval.jsonl.gz"},
        tmp_path,
        limit=len(texts),
        confirm_run_unsafe_code=True,
        apply_chat_template=instruct,
    )
    verdicts = [sample["pass@1"] for sample in samples]
    scores, aggregate = rescored(
        task, {row["task_id"]: text for row, text in zip(rows, texts, strict=False)}, root, tmp_path, capsys
    )
    assert scores == verdicts
    assert verdicts == [float(passes) for _, passes in scripts]
    assert aggregate["score"] == pytest.approx(sum(verdicts) / len(verdicts))
    if instruct:
        for item, sample in zip(load_task(task).items("test", root), samples, strict=False):
            messages = json.loads(sample["arguments"][0][0])
            assert [message["content"] for message in messages] == [*item.turns, item.opening]
