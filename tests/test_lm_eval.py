"""lm-eval both ways: its tasks through our engines, our engines in lm-eval, its results imported.

Parity is shown against lm-eval's own run with its own model class (HFLM: its batching, its tokens before the prompt, its cutting
of long prompts), item by item, on local data and without a network.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gsil_bench.data.chat import ChatFormat
from gsil_bench.errors import UserError
from gsil_bench.evaluation import scoring
from gsil_bench.evaluation.answers import Asked, answer
from gsil_bench.evaluation.lm_eval_import import import_results
from gsil_bench.evaluation.lm_eval_model import engine_lm
from gsil_bench.generation.engine import Completion, Request
from gsil_bench.generation.likelihoods import Given, Likelihoods
from gsil_bench.generation.transformers_engine import TransformersEngine
from gsil_bench.models.checkpoint import load_model, load_tokenizer
from gsil_bench.records import ItemAnswer
from gsil_bench.tasks import lm_eval as bridge
from gsil_bench.tasks.lm_eval import HarnessTask, harness_task
from gsil_bench.tasks.task import Item, ScoringResources, Task

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'gsil-bench[lm-eval]')"
)

OPENLLM = [
    bridge.OPENLLM_ARC,
    bridge.OPENLLM_HELLASWAG,
    bridge.OPENLLM_MMLU,
    bridge.OPENLLM_TRUTHFULQA,
    bridge.OPENLLM_WINOGRANDE,
    bridge.OPENLLM_GSM8K,
]
GSM8K_ROWS = 40
WORDS = ["the", "cat", "dog", "sun", "moon", "tree", "little", "girl", "boy", "park", "ball", "happy", "sad", "ran", "to", "saw"]


# --- data ------------------------------------------------------------------------------------------------------------------


def _rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _words(source: random.Random, count: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(count))


def _arc_row(source: random.Random) -> dict[str, Any]:
    choices = {"text": [_words(source, source.randint(1, 4)) for _ in range(4)], "label": list("ABCD")}
    return {"id": "x", "question": _words(source, 8) + "?", "choices": choices, "answerKey": source.choice("ABCD")}


def _hellaswag_row(source: random.Random) -> dict[str, Any]:
    endings = [_words(source, source.randint(2, 6)) + " [substeps] ." for _ in range(4)]
    label = str(source.randrange(4))
    return {
        "activity_label": "Play",
        "ctx_a": _words(source, 6) + ".",
        "ctx_b": _words(source, 3),
        "endings": endings,
        "label": label,
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the leaderboard's tasks but MMLU and GSM8K, a few rows each, in their formats."""
    source, root = random.Random(0), tmp_path_factory.mktemp("data")
    place = root / bridge.FOLDER
    for split, count in (("train", 40), ("validation", 4), ("test", 16)):
        _rows(place / "arc_challenge" / f"{split}.jsonl", [_arc_row(source) for _ in range(count)])
    for split, count in (("train", 40), ("validation", 16)):
        _rows(place / "hellaswag" / f"{split}.jsonl", [_hellaswag_row(source) for _ in range(count)])
        sentences = [
            {
                "sentence": f"The {a} saw the {b} , so _ ran to the park.",
                "option1": a,
                "option2": b,
                "answer": source.choice("12"),
            }
            for a, b in (source.sample(WORDS, 2) for _ in range(count))
        ]
        _rows(place / "winogrande" / f"{split}.jsonl", sentences)
    questions = [
        {"question": _words(source, 6) + "?", "mc2_targets": _truths(source), "mc1_targets": _truths(source)} for _ in range(12)
    ]
    _rows(place / "truthfulqa_mc2" / "validation.jsonl", questions)
    return root


def _truths(source: random.Random) -> dict[str, Any]:
    true, false = source.randint(1, 6), source.randint(1, 3)
    return {"choices": [_words(source, 3) for _ in range(true + false)], "labels": [1] * true + [0] * false}


@pytest.fixture(scope="session")
def gsm8k_folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the real test split, and a part of the real train split for the shots."""
    root = tmp_path_factory.mktemp("gsm8k")
    for split, count in (("train", 200), ("test", GSM8K_ROWS)):
        lines = (data_dir / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        path = root / bridge.FOLDER / "gsm8k" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` makes of the files stays out of the user's cache, and nothing is fetched."""
    if find_spec("datasets") is None:
        yield
        return
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


# --- both ways of asking ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, for lm-eval and for us."""

    weights: Any
    chat: ChatFormat
    context_length: int

    def engine(self) -> TransformersEngine:
        return TransformersEngine(self.weights, self.chat.end_token_ids, self.context_length, self.chat.decode)

    def asked(self) -> Asked:
        engine = self.engine()

        def complete(requests: Sequence[Request]) -> list[Completion]:
            given = requests and isinstance(requests[0], Given)
            found = dict(Likelihoods(engine).complete(requests) if given else engine.complete(requests))
            return [found[index] for index in range(len(requests))]

        return Asked(complete, self.chat, self.context_length, self.context_length + 1)

    def hflm(self, batch_size: int) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=self.weights, tokenizer=self.chat.tokenizer, batch_size=batch_size)


def _model(folder: Path, template: str | None) -> Model:
    weights, tokenizer = load_model(folder), load_tokenizer(folder)
    ends = weights.generation_config.eos_token_id
    chat = ChatFormat.of(tokenizer, template, [ends] if isinstance(ends, int) else ends)
    return Model(weights, chat, weights.config.max_position_embeddings)


@pytest.fixture(scope="session")
def mini(mini_folder: Path) -> Model:
    return _model(mini_folder, None)


@pytest.fixture(scope="session", params=["mini", "stories260K"])
def model(request: pytest.FixtureRequest, mini_folder: Path) -> Model:
    """The embedded model (byte-level tokens, no BOS), and a real one (sentencepiece, BOS before every text)."""
    if request.param == "mini":
        return _model(mini_folder, None)
    return _model(request.getfixturevalue("data_dir") / "models" / "stories260K", "plain")


def theirs(lm: Any, root: Path, tmp_path: Path, name: str, changes: str = "", **settings: Any) -> list[dict[str, Any]]:
    """lm-eval's own run of a stock definition on local files: its samples, one for each document and filter."""
    return list(_evaluate(lm, root, tmp_path, name, changes, **settings)["samples"][f"{name}_local"])


def _evaluate(lm: Any, root: Path, tmp_path: Path, name: str, changes: str = "", **settings: Any) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    stock = next(Path(lm_eval.__file__).parent.glob(f"tasks/*/{name}.yaml"), None)
    stock = stock or Path(lm_eval.__file__).parent / "tasks" / name / "default.yaml"
    files = {path.stem: str(path) for path in (root / bridge.FOLDER / name).iterdir()}
    definition = (
        f"include: {stock}\ntask: {name}_local\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {json.dumps(files)}}}\n{changes}"
    )
    (tmp_path / "definitions").mkdir(exist_ok=True)
    (tmp_path / "definitions" / f"{name}.yaml").write_text(definition, encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path / "definitions"), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=lm, tasks=[f"{name}_local"], task_manager=manager, log_samples=True, bootstrap_iters=0, **settings
    )


def ours(task: HarnessTask, model: Model, root: Path) -> tuple[Sequence[Item], list[ItemAnswer], list[Any]]:
    """Items, answers and scores of a task, as the pipeline makes them."""
    items = task.items("test", root)
    answers = answer(model.asked(), items, task.protocol)
    assert not [given.error for given in answers if given.error]
    return items, answers, task.score(items, [given.texts for given in answers], ScoringResources())


def by_document(samples: Sequence[Mapping[str, Any]], metric: str, name: str = "none") -> dict[int, float]:
    return {sample["doc_id"]: float(sample[metric]) for sample in samples if sample["filter"] == name}


# --- parity ----------------------------------------------------------------------------------------------------------------

SHOTS = "fewshot_split: train\nnum_fewshot: {}\n"
CHOICES = [
    (bridge.OPENLLM_ARC, SHOTS.format(25)),
    (bridge.OPENLLM_HELLASWAG, SHOTS.format(10)),
    (bridge.OPENLLM_WINOGRANDE, SHOTS.format(5)),
    (bridge.OPENLLM_TRUTHFULQA, ""),
]


@needs_lm_eval
@pytest.mark.parametrize(("task", "changes"), CHOICES, ids=[task.harness_name for task, _ in CHOICES])
def test_multiple_choice_equals_lm_evals_run(task: HarnessTask, changes: str, model: Model, folder: Path, tmp_path: Path) -> None:
    """Log-likelihoods within 1e-4, every metric of every item equal. 25 shots are longer than the context: both cut them."""
    samples = theirs(model.hflm(4), folder, tmp_path, task.harness_name, changes)
    items, answers, scores = ours(task, model, folder)
    assert [item.published_id for item in items] == [str(sample["doc_id"]) for sample in samples]
    for item, given, score, sample in zip(items, answers, scores, samples, strict=True):
        assert [(each.context, each.text) for each in item.continuations] == sample["arguments"]
        logps = [json.loads(text)["logp"] for text in given.texts]
        assert logps == pytest.approx([response[0][0] for response in sample["resps"]], abs=1e-4)
        metrics = {f"{metric},none": float(sample[metric]) for metric in sample["metrics"]}
        assert score.details["metrics"] == pytest.approx(metrics, abs=1e-5)
        assert score.value == pytest.approx(metrics[task.key], abs=1e-5)
    assert len({json.loads(text)["logp"] for given in answers for text in given.texts}) > len(items)


@needs_lm_eval
def test_gsm8k_equals_lm_evals_run(model: Model, gsm8k_folder: Path, tmp_path: Path) -> None:
    """The same words, and both filters equal. Five shots and 256 tokens do not fit: both cut the prompt."""
    samples = theirs(model.hflm(8), gsm8k_folder, tmp_path, "gsm8k")
    items, answers, scores = ours(bridge.OPENLLM_GSM8K, model, gsm8k_folder)
    strict = [sample for sample in samples if sample["filter"] == "strict-match"]
    assert len(items) == len(strict) == GSM8K_ROWS
    for item, given, score, sample in zip(items, answers, scores, strict, strict=True):
        assert item.turns == (sample["arguments"][0][0],)
        assert given.texts[0].strip() == sample["resps"][0][0].strip()
        assert score.value == sample["exact_match"]
    assert any(text.strip() for given in answers for text in given.texts)
    for name in ("strict-match", "flexible-extract"):
        found = [score.details["metrics"][f"exact_match,{name}"] for score in scores]
        assert found == list(by_document(samples, "exact_match", name).values())


def _spoken(gold: str, number: int) -> str:
    """Answers of many kinds to a question: right, wrong, in another format, cut, empty."""
    value = gold.rpartition("#### ")[2]
    kinds = [
        gold, f"#### {value}", f"The answer is {value}.", f"#### ${value}", f"#### {value}.00", "", f"#### 7\n#### {value}",
        f"so {value} (2 meals).", "#### 12345678", f" {value},", f"#### -{value}", "#### ,", f"{gold} and 3 more", "No idea.",
    ]  # fmt: skip
    return kinds[number % len(kinds)]


@needs_lm_eval
def test_stored_answers_are_scored_as_lm_eval_scores_them(gsm8k_folder: Path, tmp_path: Path) -> None:
    samples = theirs(_scripted(), gsm8k_folder, tmp_path, "gsm8k")
    task = harness_task("gsm8k", data_dir=gsm8k_folder)
    items = task.items("test", gsm8k_folder)
    answers = [(_spoken(item.reference["target"], number),) for number, item in enumerate(items)]
    scores = task.score(items, answers, ScoringResources())
    for name in ("strict-match", "flexible-extract"):
        found = [score.details["metrics"][f"exact_match,{name}"] for score in scores]
        assert found == list(by_document(samples, "exact_match", name).values())
        assert 0 < sum(found) < len(found)
    assert scores[0].details | {"metrics": 0} == {"metrics": 0, "empty": False, "format_ok": True, "flexible": True}
    assert scores[5].details | {"metrics": 0} == {"metrics": 0, "empty": True, "format_ok": False, "flexible": False}


def _scripted() -> Any:
    """A model of lm-eval's that speaks by `_spoken`."""
    from lm_eval.api.model import LM

    class Scripted(LM):  # type: ignore[misc]
        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [_spoken(request.doc["answer"], number) for number, request in enumerate(requests)]

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Scripted()


@needs_lm_eval
@pytest.mark.parametrize(("name", "opening"), [("gsm8k", ""), ("arc_challenge", ""), ("gsm8k", "So"), ("arc_challenge", "It is")])
def test_chat_form_asks_what_lm_eval_asks(
    name: str, opening: str, mini: Model, folder: Path, gsm8k_folder: Path, tmp_path: Path
) -> None:
    """The prompt that our template makes of an item is the one that lm-eval sends with its template applied."""
    root = gsm8k_folder if name == "gsm8k" else folder
    changes = f"num_fewshot: 2\ndescription: 'Be short.'\n{f'gen_prefix: {opening}' if opening else ''}\n"
    samples = theirs(mini.hflm(4), root, tmp_path, name, changes, apply_chat_template=True, limit=4)
    mine = tmp_path / "mine"
    _copy_as_own(root, mine, name, tmp_path)
    task = harness_task(f"{name}_local", chat=True, data_dir=mine)
    assert task.name == f"lm-eval-chat/{name}_local" and task.protocol.form == "chat" and task.protocol.system == "Be short."
    samples = [sample for sample in samples if sample["filter"] == task.key.partition(",")[2]]
    assert len(samples) == 4
    for item, sample in zip(task.items("test", mine), samples, strict=False):
        question = item.turns[0] if item.turns else item.continuations[0].context
        roles = ("user", "assistant")
        shots = [{"role": role, "content": text} for pair in item.history for role, text in zip(roles, pair, strict=True)]
        messages = [{"role": "system", "content": "Be short."}, *shots, {"role": "user", "content": question}]
        assert len(item.history) == 2 and item.opening == opening
        assert mini.chat.prompt_text(messages, item.opening) == sample["arguments"][0][0]
        assert [each.text for each in item.continuations] == [text for _, text in sample["arguments"] if isinstance(text, str)]


def _copy_as_own(root: Path, mine: Path, name: str, tmp_path: Path) -> None:
    """A definition of the user's, with its data files beside it."""
    place = mine / bridge.FOLDER
    shutil.copytree(root / bridge.FOLDER / name, place / "files", dirs_exist_ok=True)
    text = (tmp_path / "definitions" / f"{name}.yaml").read_text(encoding="utf-8")
    (place / f"{name}.yaml").write_text(text.replace(str(root / bridge.FOLDER / name), "files"), encoding="utf-8")


# --- our engine in lm-eval -------------------------------------------------------------------------------------------------


@needs_lm_eval
def test_an_engine_in_lm_eval_answers_as_its_own_model(model: Model, folder: Path, gsm8k_folder: Path, tmp_path: Path) -> None:
    lm = engine_lm(model.engine(), model.chat, model.context_length, model.context_length + 1)
    changes = SHOTS.format(3)
    mine, reference = (theirs(each, folder, tmp_path, "arc_challenge", changes) for each in (lm, model.hflm(4)))
    for sample, other in zip(mine, reference, strict=True):
        assert [sample[key] for key in ("doc_id", "acc", "acc_norm")] == [other[key] for key in ("doc_id", "acc", "acc_norm")]
        for (pair,), (wanted,) in zip(sample["resps"], other["resps"], strict=True):
            assert pair[0] == pytest.approx(wanted[0], abs=1e-4)
            assert pair[1] == wanted[1]
    mine, reference = (theirs(each, gsm8k_folder, tmp_path, "gsm8k", limit=8) for each in (lm, model.hflm(8)))
    for sample, other in zip(mine, reference, strict=True):
        assert sample["resps"][0][0].strip() == other["resps"][0][0].strip()
        assert sample["exact_match"] == other["exact_match"]


@needs_lm_eval
def test_short_prompts_are_answered_alike_in_all_three_ways(model: Model, gsm8k_folder: Path, tmp_path: Path) -> None:
    """lm-eval with its model, lm-eval with our engine, and our own path. Nothing is cut here, so a BOS makes a difference."""
    changes = "num_fewshot: 0\ngeneration_kwargs: {until: ['Question:', ' the'], max_gen_toks: 24}\n"
    lm = engine_lm(model.engine(), model.chat, model.context_length)
    reference, inside = (theirs(each, gsm8k_folder, tmp_path, "gsm8k", changes, limit=12) for each in (model.hflm(4), lm))
    _copy_as_own(gsm8k_folder, tmp_path / "mine", "gsm8k", tmp_path)
    task = harness_task("gsm8k_local", data_dir=tmp_path / "mine")
    answers = answer(model.asked(), task.items("test", tmp_path / "mine")[:12], task.protocol)
    wanted = [sample["resps"][0][0].strip() for sample in reference if sample["filter"] == "strict-match"]
    assert len(set(wanted)) > 1
    assert [sample["resps"][0][0].strip() for sample in inside if sample["filter"] == "strict-match"] == wanted
    assert [given.texts[0].strip() for given in answers] == wanted
    assert [given.cut for given in answers] == [(0,)] * 12


@needs_lm_eval
def test_greedy_continuations_are_recognised(mini: Model) -> None:
    """What the model says greedily is greedy, and a text with another last letter is not."""
    from lm_eval.api.instance import Instance

    lm = engine_lm(mini.engine(), mini.chat, mini.context_length)
    context = "Question: the cat"
    prompt = mini.chat.text_ids(context)
    said = mini.weights.generate(_tensor(prompt), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
    spoken = mini.chat.tokenizer.decode(said)
    assert mini.chat.pair_tokens(context, spoken)[1] == tuple(said.tolist())
    requests = [Instance("loglikelihood", {}, (context, text), 0) for text in (spoken, spoken[:-1] + "q")]
    assert [greedy for _, greedy in lm.loglikelihood(requests)] == [True, False]


def _tensor(ids: Sequence[int]) -> Any:
    import torch

    return torch.tensor([list(ids)])


@needs_lm_eval
def test_an_engine_in_lm_eval_uses_our_template(mini: Model, gsm8k_folder: Path, tmp_path: Path) -> None:
    lm = engine_lm(mini.engine(), mini.chat, mini.context_length)
    samples = theirs(lm, gsm8k_folder, tmp_path, "gsm8k", "num_fewshot: 0\n", limit=3, apply_chat_template=True)
    for sample in samples[::2]:
        messages = [{"role": "user", "content": f"Question: {sample['doc']['question']}\nAnswer:"}]
        assert sample["arguments"][0][0] == mini.chat.prompt_text(messages)
        ids = mini.chat.prompt_ids(messages)
        ids = ids[-(mini.context_length - 256) :]
        said = mini.weights.generate(_tensor(ids), max_new_tokens=256, do_sample=False)[0, len(ids) :]
        assert sample["resps"][0][0] == mini.chat.decode_after(ids, said.tolist()).split("Question:")[0]
    assert lm.chat_template(True) == mini.chat.template
    assert lm.apply_chat_template([*messages, {"role": "assistant", "content": "So"}], False) == mini.chat.prompt_text(
        messages, "So"
    )


@needs_lm_eval
def test_what_an_engine_cannot_answer_ends_the_run_with_one_line(mini: Model) -> None:
    from lm_eval.api.instance import Instance

    lm = engine_lm(mini.engine(), mini.chat, 64)
    for settings, problem in (({"num_beams": 4}, "no generation setting num_beams"), ({"max_gen_toks": 64}, "leave no room")):
        with pytest.raises(UserError, match=problem):
            lm.generate_until([Instance("generate_until", {}, ("Hello", {"until": ["."], **settings}), 0)])
    with pytest.raises(UserError, match="whole documents"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("Hello",), 0)])
    with pytest.raises(UserError, match="cannot be scored in a context of 64"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("Hello", " big" * 80), 0)])


@needs_lm_eval
def test_repeats_of_one_prompt_are_different_samples(mini: Model) -> None:
    from lm_eval.api.instance import Instance

    lm = engine_lm(mini.engine(), mini.chat, mini.context_length)
    settings = {"until": [], "do_sample": True, "temperature": 1.5, "max_gen_toks": 24}
    texts = lm.generate_until([Instance("generate_until", {}, ("Hello", settings), 0)] * 3)
    assert len(set(texts)) == 3
    assert texts == lm.generate_until([Instance("generate_until", {}, ("Hello", settings), 0)] * 3)


# --- tasks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", OPENLLM, ids=lambda task: task.name)
def test_records_of_the_leaderboard(task: HarnessTask) -> None:
    """Shots and metric of the archived leaderboard; no lm-eval is needed to look at them."""
    assert isinstance(task, Task)
    shots = {"arc": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa-mc2": 0, "winogrande": 5, "gsm8k": 5}
    metrics = {"arc": "acc_norm", "hellaswag": "acc_norm", "truthfulqa-mc2": "mc2", "gsm8k": "exact_match"}
    name = task.name.removeprefix("openllm-v1/")
    assert task.protocol.shots == shots[name] and task.metric == metrics.get(name, "acc")
    assert task.protocol.shot_seed == (1234 if shots[name] else None)
    assert (task.protocol.name, task.protocol.form, task.runs_code) == (task.name, "text", False)
    assert task.protocol.max_new_tokens == (256 if name == "gsm8k" else 0)
    assert task.items("train", None) == ()
    with pytest.raises(UserError, match="unknown split"):
        task.items("dev", None)


@needs_lm_eval
@pytest.mark.parametrize("task", [task for task in OPENLLM if task.name != "openllm-v1/mmlu"], ids=lambda task: task.name)
def test_canaries(task: HarnessTask, folder: Path, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue("gsm8k_folder") if task.harness_name == "gsm8k" else folder
    items = task.items("test", root)
    assert all(item.gold and len(item.gold) == item.asked for item in items)
    assert len({item.id for item in items}) == len(items)
    scoring.check_canaries(task, items, ScoringResources())
    wrong = [
        tuple(json.dumps({"logp": -1000.0 - json.loads(text)["logp"], "tokens": 1}) for text in item.gold)
        for item in items
        if item.continuations
    ]
    if wrong:
        assert {score.value for score in task.score(items, wrong, ScoringResources())} != {1.0}


@needs_lm_eval
def test_mmlu_is_a_group_of_subjects(tmp_path: Path) -> None:
    """57 subjects, five shots from dev in their order, the subject's name in the first line."""
    import lm_eval

    subjects = sorted(path.stem for path in (Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml"))
    for subject in subjects:
        for split, count in (("dev", 5), ("test", 2)):
            rows = [{"question": f"{split} {n}?", "choices": ["p", "q", "r", "s"], "answer": n % 4} for n in range(count)]
            _rows(tmp_path / bridge.FOLDER / subject / f"{split}.jsonl", rows)
    items = bridge.OPENLLM_MMLU.items("test", tmp_path)
    assert len(subjects) == 57 and len(items) == 2 * 57
    assert [item.published_id for item in items if item.group == "mmlu_astronomy"] == ["mmlu_astronomy/0", "mmlu_astronomy/1"]
    item = next(item for item in items if item.group == "mmlu_astronomy")
    shots = "".join(f"dev {n}?\nA. p\nB. q\nC. r\nD. s\nAnswer: {'ABCD'[n % 4]}\n\n" for n in range(5))
    first = "The following are multiple choice questions (with answers) about astronomy.\n\n"
    assert item.continuations[0].context == f"{first}{shots}test 0?\nA. p\nB. q\nC. r\nD. s\nAnswer:"
    assert [each.text for each in item.continuations] == [" A", " B", " C", " D"]
    scoring.check_canaries(bridge.OPENLLM_MMLU, items, ScoringResources())


@needs_lm_eval
def test_data_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hellaswag cannot be loaded .*put the data at lm-eval/hellaswag/SPLIT\.jsonl") as error:
        bridge.OPENLLM_HELLASWAG.items("test", tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / bridge.FOLDER / "hellaswag").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no data"):
        bridge.OPENLLM_HELLASWAG.items("test", tmp_path)


@needs_lm_eval
def test_a_name_misspelt_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown task of lm-eval's 'hellaswagg': did you mean 'hellaswag'"):
        harness_task("hellaswagg", data_dir=tmp_path)


def test_without_lm_eval_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, mini: Model) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for use in (
        lambda: harness_task("gsm8k"),
        lambda: bridge.OPENLLM_ARC.items("test", None),
        lambda: engine_lm(mini.engine(), mini.chat, mini.context_length),
    ):
        with pytest.raises(UserError, match="needs lm_eval: pip install lm_eval"):
            use()


OWN = """task: own
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def own(
    root: Path, text: str, rows: Sequence[Mapping[str, Any]] = ({"q": "1 + 1 =", "a": "2"}, {"q": "1 + 2 =", "a": "3"})
) -> Path:
    """A data folder with a definition of the user's."""
    _rows(root / bridge.FOLDER / "rows.jsonl", rows)
    (root / bridge.FOLDER / "own.yaml").write_text(text, encoding="utf-8")
    return root


@needs_lm_eval
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("unsafe_code: true", "runs generated code outside a sandbox"),
        ("output_type: loglikelihood_rolling", "log-likelihood of whole documents"),
        ("output_type: loglikelihood", "would say greedily"),
        ("doc_to_image: q", "images or sounds"),
        ("class: !function scorer.Own", "written in Python"),
        ("metric_list: [{metric: bleu, aggregation: bleu, higher_is_better: true}]", r"none of its metrics \(bleu\) is a mean"),
        ("metric_list: [{metric: wer, aggregation: mean, higher_is_better: false}]", r"\(wer\) is a mean .* better when higher"),
        ("generation_kwargs: {until: ['.'], num_beams: 4}", "generation setting num_beams"),
        ("generation_kwargs: {until: ['.'], do_sample: true}", "gives no temperature"),
        ("output_type: multiple_choice\ndoc_to_choice: ['2', '3']", r"\(exact_match\) is a mean"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_one_line(change: str, problem: str, tmp_path: Path) -> None:
    kept = [line for line in OWN.splitlines() if line.partition(":")[0] not in change]
    with pytest.raises(UserError, match=f"^lm-eval/own: .*{problem}") as error:
        harness_task("own", data_dir=own(tmp_path, "\n".join([*kept, change])))
    assert "\n" not in str(error.value)


@needs_lm_eval
def test_a_name_stands_for_the_tasks_that_lm_eval_takes_it_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task, a group, a group whose tasks lie elsewhere, a tag over several folders: lm-eval's own loader is asked."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager, _yaml_loader

    named = type("Config", (), {"__init__": lambda self, task, **others: setattr(self, "task", task)})
    monkeypatch.setattr(ConfigurableTask, "__init__", lambda self, config: setattr(self, "_config", named(**config)))
    monkeypatch.setattr(_yaml_loader, "_import_func_in_yml", lambda name, folder: name)
    manager = TaskManager()
    for name in ("arc_challenge", "winogrande", "gsm8k", "mmlu", "minerva_math", "math_word_problems"):
        wanted = list(manager.load(name)["tasks"])
        assert [definition.name for definition in bridge.find_definitions(name, None, {})] == wanted
    assert len(wanted) > 3


@needs_lm_eval
def test_a_package_that_a_definition_needs_is_named(tmp_path: Path) -> None:
    root = own(tmp_path, OWN + "process_results: !function scorer.results\n")
    (root / bridge.FOLDER / "scorer.py").write_text("import a_package_that_is_not_there\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"own needs a package that is not here: .*'a_package_that_is_not_there'"):
        harness_task("own", data_dir=root).items("test", root)


@needs_lm_eval
def test_a_definition_of_ones_own(tmp_path: Path) -> None:
    """Settings become the protocol; data files are found beside the definition and hashed."""
    settings = 'generation_kwargs: {until: ["\\n", "."], do_sample: true, temperature: 0.7, top_p: 0.9, max_tokens: 12}\n'
    root = own(tmp_path, OWN + settings + "num_fewshot: 1\nfewshot_split: test\nmetadata: {version: 7}\n")
    task = harness_task("own", data_dir=root)
    wanted = (12, 0.7, 0.9, ("\n", "."), 1, 1234, 1234)
    names = ("max_new_tokens", "temperature", "top_p", "stops", "shots", "shot_seed", "seed")
    assert wanted == tuple(getattr(task.protocol, name) for name in names)
    assert list(task.protocol.data) == ["lm-eval/own/rows.jsonl"] and task.version == "7"
    items = task.items("test", root)
    assert [item.turns for item in items] == [("1 + 2 = 3\n\n1 + 1 =",), ("1 + 1 = 2\n\n1 + 2 =",)]  # never the item itself
    scores = task.score(items, [("2",), ("4",)], ScoringResources())
    assert [score.value for score in scores] == [1.0, 0.0]
    (root / bridge.FOLDER / "own.yaml").write_text(OWN, encoding="utf-8")
    with pytest.raises(
        UserError, match="has another max_new_tokens, temperature, top_p, stops, shots, shot_seed than the protocol"
    ):
        task.items("test", root)


@needs_lm_eval
def test_repeats_are_scored_together(tmp_path: Path) -> None:
    """Three answers, of which the majority counts: 2, 5, 2 is right, 5, 5, 2 is wrong."""
    vote = "repeats: 3\nfilter_list: [{name: maj, filter: [{function: majority_vote}, {function: take_first}]}]\n"
    root = own(tmp_path, OWN + vote)
    task = harness_task("own", data_dir=root)
    assert task.protocol.samples == 3 and task.key == "exact_match,maj"
    first, second = task.items("test", root)
    answers = [("2",), ("5",), ("2",), ("5",), ("5",), ("3",)]
    scores = task.score([first] * 3 + [second] * 3, answers, ScoringResources())
    assert [score.value for score in scores] == [1.0] * 3 + [0.0] * 3


@needs_lm_eval
def test_one_answer_that_cannot_be_scored_does_not_touch_the_others(folder: Path) -> None:
    task = bridge.OPENLLM_ARC
    items = task.items("test", folder)[:5]
    answers = [list(item.gold) for item in items]
    answers[1][2] = "garbage"
    answers[2] = answers[2][:3]
    answers[3][0] = json.dumps({"logp": math.nan, "tokens": 1})
    scores = task.score(items, answers, ScoringResources())
    assert [score.value for score in scores] == [1.0, None, None, None, 1.0]
    assert scores[1].reason.startswith("continuation 2 has no log-likelihood")


@needs_lm_eval
def test_a_scorer_that_fails_leaves_its_item_unscored(tmp_path: Path) -> None:
    """The definition's own code fails on "5" and gives 37 for "37"; another one asks what is greedy."""
    code = (
        "def results(doc, found):\n    if found[0] == '5': raise KeyError('five')\n    return {'exact_match': float(found[0])}\n"
        "def greedy(doc, found):\n    return {'exact_match': int(found[0][1])}\n"
    )
    root = own(tmp_path, OWN + "process_results: !function scorer.results\n")
    (root / bridge.FOLDER / "scorer.py").write_text(code, encoding="utf-8")
    task = harness_task("own", data_dir=root)
    items = task.items("test", root)
    scores = task.score(items, [("5",), ("0.25",)], ScoringResources())
    assert (scores[0].value, scores[1].value) == (None, 0.25)
    assert scores[0].reason == "lm-eval's scorer failed: KeyError: 'five'"
    beyond = task.score(items, [("37",), ("1",)], ScoringResources())[0]
    assert (beyond.value, beyond.reason) == (None, "lm-eval's exact_match,none is 37, which is not between 0 and 1")
    choice = OWN + "output_type: multiple_choice\ndoc_to_choice: [two, three]\nprocess_results: !function scorer.greedy\n"
    task = harness_task("own", data_dir=own(root, choice, [{"q": "1 + 1 =", "a": "two"}]))
    items = task.items("test", root)
    score = task.score(items[:1], [['{"logp": -1, "tokens": 1}'] * 2], ScoringResources())[0]
    assert score.value is None and "whether a continuation is the greedy one" in score.reason


@needs_lm_eval
def test_items_of_another_process_are_refused(folder: Path) -> None:
    item = dataclasses.replace(bridge.OPENLLM_ARC.items("test", folder)[0], id="0" * 16)
    with pytest.raises(UserError, match="was not made by this process"):
        bridge.OPENLLM_ARC.score([item], [item.gold], ScoringResources())


# --- importing results -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(gsm8k_folder: Path, tmp_path: Path) -> Path:
    """What lm-eval writes of a run over scripted answers."""
    if find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    results = _evaluate(_scripted(), gsm8k_folder, tmp_path, "gsm8k", limit=28, evaluation_tracker=tracker)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples("gsm8k_local", samples["gsm8k_local"])
    return tmp_path / "out"


@needs_lm_eval
def test_imported_results_are_those_of_the_run(run: Path) -> None:
    (task,) = import_results(run)
    assert (task.task, task.key, task.shots, task.version) == ("gsm8k_local", "exact_match,strict-match", 5, "3.0")
    assert task.keys == ("exact_match,strict-match", "exact_match,flexible-extract")
    assert (len(task.items), task.documents, task.harness) == (28, GSM8K_ROWS, "0.4.13")
    assert [item.id for item in task.items] == [str(number) for number in range(28)]
    # The kinds of `_spoken` that the strict filter takes: the gold answer, the bare number, the one with words behind it.
    right = [number for number, item in enumerate(task.items) if item.score == 1]
    assert {number % 14 for number in right} >= {0, 1, 12} and not {number % 14 for number in right} & {2, 3, 5, 7, 8, 11, 13}
    (flexible,) = import_results(next(run.rglob("results_*.json")), "exact_match,flexible-extract")
    assert [item.score for item in flexible.items] == [
        item.details["metrics"]["exact_match,flexible-extract"] for item in task.items
    ]
    assert flexible.items[2].score == 1 and task.items[2].score == 0
    assert all(len(task.items[0].details[name]) == 64 for name in ("document", "prompt", "target"))


def _rewrite(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        path = next(run.rglob("samples_*.jsonl"))
        path.write_text("".join(change(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")

    return apply


def _other_run(run: Path) -> None:
    path = next(run.rglob("results_*.json"))
    shutil.copy(path, path.with_name("results_2026-01-01.json"))


@needs_lm_eval
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda run: next(run.rglob("samples_*.jsonl")).unlink(), "is missing: .*--log_samples"),
        (_rewrite(lambda lines: lines[:-1]), "not there under every filter"),
        (_rewrite(lambda lines: [*lines, lines[0]]), "document 0 is there twice under filter strict-match"),
        (_rewrite(lambda lines: [line for line in lines if '"doc_id": 3,' not in line]), "scored on 28 documents, but 27"),
        (_rewrite(lambda lines: [line.replace('"exact_match": 1.0', '"exact_match": 0.0') for line in lines]), "of another run"),
        (_rewrite(lambda lines: ["{", *lines]), "line 1: "),
        (_rewrite(lambda lines: ["[]\n", *lines]), "line 1: not a sample"),
        (_rewrite(lambda lines: []), "is empty"),
        (lambda run: next(run.rglob("results_*.json")).write_text("{"), "cannot be read"),
        (lambda run: next(run.rglob("results_*.json")).write_text('{"results": {"a": {}}}'), "is not a results file"),
        (lambda run: next(run.rglob("results_*.json")).unlink(), "holds no results_DATE.json"),
        (_other_run, "holds 2 runs"),
    ],
)
def test_damaged_results_are_refused_with_one_line(damage: Callable[[Path], None], problem: str, run: Path) -> None:
    damage(run)
    with pytest.raises(UserError, match=problem) as error:
        import_results(run)
    assert "\n" not in str(error.value)


@needs_lm_eval
def test_an_unknown_metric_is_one_line(run: Path) -> None:
    with pytest.raises(UserError, match=r"unknown metric of gsm8k_local's items 'acc'.*exact_match,strict-match"):
        import_results(run, "acc")


# What follows needs no lm-eval: its files are written by hand.


def _written(tmp_path: Path, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Path:
    full = {
        "versions": {"quiz": 2},
        "n-shot": {"quiz": 0},
        "config": {"model": "hf"},
        "group_subtasks": {"all": ["quiz"], "quiz": []},
    }
    (tmp_path / "results_1.json").write_text(json.dumps({**full, **results}), encoding="utf-8")
    _rows(tmp_path / "samples_quiz_1.jsonl", samples)
    return tmp_path


def _quiz(printed: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "results": {"all": {"acc,none": 0.0}, "quiz": dict(printed)},
        "configs": {"quiz": {"metric_list": [{"metric": metric} for metric in metrics]}},
        "n-samples": {"quiz": {"original": 9, "effective": 3}},
    }


def _line(number: int, **metrics: Any) -> dict[str, Any]:
    return {"doc_id": number, "filter": "none", "filtered_resps": [["x"]], "metrics": list(metrics), **metrics}


def test_groups_and_metrics_without_a_value_for_an_item_are_passed_over(tmp_path: Path) -> None:
    """F1 is a pair for each document, so accuracy scores the items; the documents are put in order; 2 of 3 are right."""
    samples = [_line(number, f1=[1, 0], acc=float(number < 2)) for number in (2, 0, 1)]
    (task,) = import_results(_written(tmp_path, _quiz({"f1,none": 0.4, "acc,none": 2 / 3}, ["f1", "acc"]), samples))
    assert (task.task, task.key, task.keys, task.documents, task.model) == ("quiz", "acc,none", ("acc,none",), 9, "hf")
    assert [(item.id, item.score) for item in task.items] == [("0", 1.0), ("1", 1.0), ("2", 0.0)]
    assert task.items[2].reason == 'lm-eval\'s acc,none is 0 for [["x"]]'


def test_results_without_any_value_for_an_item_are_refused(tmp_path: Path) -> None:
    run = _written(tmp_path, _quiz({"f1,none": 0.4}, ["f1"]), [_line(number, f1=[1, 0]) for number in range(3)])
    with pytest.raises(UserError, match=r"quiz: none of its metrics \(f1\) has a value for each document"):
        import_results(run)


def test_a_figure_that_is_not_the_samples_mean_is_refused(tmp_path: Path) -> None:
    run = _written(tmp_path, _quiz({"acc,none": 0.5}, ["acc"]), [_line(number, acc=float(number < 2)) for number in range(3)])
    with pytest.raises(UserError, match=r"has acc,none 0.5, but its samples' mean is 0.666667"):
        import_results(run)
