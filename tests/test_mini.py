"""The embedded suite: deterministic, disjoint, solvable, judged as the rubrics say, and with a model that loads."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gsil_bench.data import mini
from gsil_bench.data.mini import arithmetic, articles, corpus, dialogues, functions
from gsil_bench.data.mini.arithmetic import Step, WordProblem
from gsil_bench.data.mini.streams import PARTS, digest, part_of
from gsil_bench.errors import UserError
from gsil_bench.evaluation.rescore import differences
from gsil_bench.tasks import SUITES, load_task
from gsil_bench.tasks.judge import JudgeRequest, parse_rating
from gsil_bench.tasks.mini import (
    CHECKS,
    GSM8K,
    GSM8K_SAMPLED,
    HUMANEVAL,
    MT_BENCH,
    SUMMARIZATION,
    SUMMARIZATION_GREEDY,
    SUMMARIZATION_POST_PROCESSED,
    RubricJudge,
    unwrap_code,
)
from gsil_bench.tasks.sandbox import run_restricted
from gsil_bench.tasks.task import Item, ScoringResources, Split, Task

ROOT = Path(__file__).parent.parent
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
SIZES = {
    "mini-gsm8k": {"train": 600, "dev": 300, "test": 1000},
    "mini-humaneval": {"train": 300, "dev": 150, "test": 300},
    "mini-mt-bench": {"train": 300, "dev": 80, "test": 160},
}
ARTICLES = {"mini-summarization": {"train": 2400, "dev": 200, "test": 400}}
RECORDED = "36622f5a650f20f3b541dd9d33220d2aa22d601510ebb7d4698bd6d1b9a5b790"
"""sha256 of every item of every split. A change here needs a new mini.VERSION, and old results no longer compare."""

RECORDED_ARTICLES = "9fa99004d00c67d5408e3ccfb3e98ddd98cd4d0212b2b9957e37551f6d5e2429"
"""The same of mini-summarization. A change here needs a new articles.VERSION."""

DIGEST_PROGRAM = """
import hashlib, json, sys
from gsil_bench.data import mini
import gsil_bench.tasks.mini
from gsil_bench.data.mini import corpus
assert not {"torch", "numpy", "transformers"} & set(sys.modules), "the data and the scorers must not need them"
rows = [
    [item.id, item.turns, item.reference, item.group, item.gold]
    for task in sorted(mini.TASKS) for split in ("train", "dev", "test") for item in mini.items(task, split)
]
articles = [
    [item.id, item.turns, item.reference, item.group, item.gold]
    for split in ("train", "dev", "test") for item in mini.items("mini-summarization", split)
]
read = [conversation.messages for conversation in corpus.conversations(0, 500)]
print(*(hashlib.sha256(json.dumps(made).encode()).hexdigest() for made in (rows, articles, read)))
"""


def everything(task: str) -> list[Item]:
    """All items of a task."""
    return [item for split in SPLITS for item in mini.items(task, split)]


def digests(hash_seed: str) -> list[str]:
    """The digests of the items and of a corpus sample, from a process of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", DIGEST_PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return process.stdout.split()


def test_items_are_the_same_in_every_process_and_as_recorded() -> None:
    first, second = digests("1"), digests("2")
    assert first == second
    assert first[:2] == [RECORDED, RECORDED_ARTICLES]


@pytest.mark.parametrize("task", sorted({**SIZES, **ARTICLES}))
def test_splits_have_their_sizes_and_share_nothing(task: str) -> None:
    sizes = {**SIZES, **ARTICLES}[task]
    assert {split: len(mini.items(task, split)) for split in SPLITS} == sizes
    many = mini.train_items(task, 10 * sizes["train"])
    held_out = [*mini.items(task, "dev"), *mini.items(task, "test")]
    ids = [item.id for item in [*many, *held_out]]
    assert len(set(ids)) == len(ids)
    first_turns = [item.turns[0] for item in [*many, *held_out]]
    assert len(set(first_turns)) == len(first_turns)


@pytest.mark.parametrize("task", sorted({**SIZES, **ARTICLES}))
def test_fewer_training_items_are_a_prefix_of_more(task: str) -> None:
    assert mini.train_items(task, 40) == mini.train_items(task, 90)[:40] == mini.items(task, "train")[:40]


def test_the_corpus_never_meets_the_splits() -> None:
    read = list(corpus.conversations(0, 4000))
    assert {part_of(conversation.key) for conversation in read} == {"corpus"}
    asked = {conversation.messages[0] for conversation in read}
    assert not asked & {item.turns[0] for task in SIZES for item in everything(task)}


def test_some_things_only_demonstrations_teach() -> None:
    read = list(corpus.conversations(0, 4000))
    assert {conversation.key.split("/")[1] for conversation in read if conversation.key.startswith("gsm8k")} == (
        set(arithmetic.FAMILIES) - set(corpus.UNREAD_FAMILIES)
    )
    rare = ("halved", "cubed", "without its sign", "without its first letter", "tripled", "Return the first or 0.")
    asked = "\n".join(conversation.messages[0] for conversation in read)
    shown = "\n".join(item.turns[0] for item in mini.train_items("mini-humaneval", 3000))
    assert not [words for words in rare if words in asked]
    assert not [words for words in rare if words not in shown]


def test_a_problem_belongs_to_a_part_by_its_content_alone() -> None:
    assert [bound for _, bound in PARTS] == sorted(bound for _, bound in PARTS)
    counts: dict[str, int] = {part: 0 for part, _ in PARTS}
    for number in range(2000):
        counts[part_of(f"problem {number}")] += 1
    # Shares are 15, 10, 35 and 40 percent; the standard error of a share is about 1 percent.
    expected = {"test": 300, "dev": 200, "train": 700, "corpus": 800}
    assert all(abs(counts[part] - expected[part]) < 80 for part in expected)
    numbers = {"a": 5, "b": 6, "c": 7}
    same = [WordProblem("give", numbers, {"N": name, "M": "Eva", "o": "pens"}) for name in ("Tom", "Ben")]
    assert same[0].question != same[1].question
    assert same[0].key == same[1].key == "gsm8k/give/a=5,b=6,c=7"


def test_unknown_names_are_reported() -> None:
    with pytest.raises(UserError, match="mini-gsm8k"):
        mini.items("mini-gsm9k", "test")
    with pytest.raises(UserError, match="dev, test, train"):
        mini.items("mini-gsm8k", "validation")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="negative"):
        mini.train_items("mini-gsm8k", -1)


@pytest.mark.parametrize("task", [GSM8K, GSM8K_SAMPLED, HUMANEVAL, MT_BENCH], ids=lambda task: task.name)
def test_tasks_keep_the_contract(task: Task) -> None:
    assert isinstance(task, Task)
    assert not task.runs_code
    assert task.protocol.name.startswith(task.name.removesuffix("-sampled") + "/")
    for item in task.items("dev", None):
        assert json.loads(json.dumps(item.reference)) == item.reference
        assert len(item.gold) == len(item.turns) == (2 if task is MT_BENCH else 1)
        assert item.group


def test_sampled_word_problems_are_the_same_items_at_temperature_one() -> None:
    assert GSM8K_SAMPLED.items("test", None) == GSM8K.items("test", None)
    assert (GSM8K.protocol.temperature, GSM8K_SAMPLED.protocol.temperature, GSM8K_SAMPLED.protocol.samples) == (0, 1, 1)


def canaries(task: Task, items: Sequence[Item]) -> None:
    """Gold answers get full marks, empty answers the lowest."""
    resources = ScoringResources(workers=2)
    gold = task.score(items, [item.gold for item in items], resources)
    few = items[:30]  # programs are slower to run than texts to read
    empty = task.score(few, [[""] * len(item.turns) for item in few], resources)
    assert {score.value for score in gold} == {task.best}, next(s.reason for s in gold if s.value != task.best)
    assert {score.value for score in empty} == {task.worst}


@pytest.mark.parametrize("task", [GSM8K, HUMANEVAL, MT_BENCH], ids=lambda task: task.name)
@pytest.mark.parametrize("split", SPLITS)
def test_gold_answers_win_and_empty_answers_lose(task: Task, split: Split) -> None:
    canaries(task, task.items(split, None))


def test_typical_mistakes_fail_the_tests() -> None:
    problems = {problem.key: problem for problem in map(_function, range(400))}
    programs = []
    for problem in problems.values():
        for part in [part for part in problem.parts if part.careless][:1]:
            programs.append("\n".join([_spoilt(problem, part), *problem.tests()]))
    outcomes = [_passes(program) for program in programs]
    # Some mistakes change nothing, such as `x > 2` for `x >= 2` in a loop that starts at 3.
    assert len(outcomes) > 200
    assert sum(outcomes) < 0.06 * len(outcomes)
    failing = [program for program, passed in zip(programs, outcomes, strict=True) if not passed][:8]
    assert [result.passed for result in run_restricted(failing, 2)] == [False] * 8


def _function(number: int) -> functions.FunctionProblem:
    return functions.draw(functions.FAMILIES[number % 4], random.Random(number))


def _spoilt(problem: functions.FunctionProblem, wrong: functions.Part) -> str:
    return problem.written(lambda part: part.careless if part is wrong else part.code)


def _passes(program: str) -> bool:
    try:
        exec(program, {})
    except Exception:
        return False
    return True


def test_fenced_code_is_unwrapped() -> None:
    item = HUMANEVAL.items("dev", None)[0]
    answers = [
        [f"```python\n{item.gold[0]}\n```"],
        [f"Sure:\n```\n{item.gold[0]}\n```\nDone."],
        [f"Sure: {item.gold[0]}"],
    ]
    scores = HUMANEVAL.score([item] * 3, answers, ScoringResources())
    assert [score.value for score in scores] == [1.0, 1.0, 0.0]
    assert unwrap_code("def f(x):\n    return x") == "def f(x):\n    return x"


def test_a_worked_solution_by_hand() -> None:
    numbers = {"a": 12, "b": 3, "c": 6, "d": 4}
    problem = WordProblem("share", numbers, {"N": "Mia", "M": "Tom", "K": "Leo", "o": "pens"})
    # 12 bags of 3 are 36 pens; 6 friends get 6 each; with 4 more each has 10.
    assert problem.solution == ("The bags hold 12*3=36 pens.\nEach gets 36/6=6 pens.\nEach has 6+4=10 pens.\n#### 10")
    assert (
        GSM8K.score([Item("x", ("",), reference={"answer": problem.solution})], [["#### 10"]], ScoringResources())[0].value == 1
    )
    # A slip of +1 in step 0 carries on: 37 pens cannot be shared by 6, which counts as impossible (-1).
    assert arithmetic.solve(arithmetic.FAMILIES["share"].steps, numbers, {0: 1}) == [37, -1, 3]
    assert arithmetic.solve((Step("{}", "a", "-", "b"), Step("{}", "r0", "*", "2")), numbers, {0: 1}) == [10, 20]


@pytest.mark.parametrize(
    ("check", "fulfilled", "failed"),
    [
        ({"check": "contains", "text": "5"}, "It is 5.", "It is 57."),
        ({"check": "contains", "text": "=24."}, "13+11=24.", "13+11=124."),
        ({"check": "contains", "text": "cat"}, "A cat!", "A cattle!"),
        ({"check": "excludes", "text": "old"}, "The golden cat.", "The old cat."),
        ({"check": "exact", "text": "Rome, Oslo"}, "Rome, Oslo", "Rome, Oslo."),
        ({"check": "starts_with", "text": "Hear me"}, "Hear me, Tom!", "Tom, Hear me!"),
        ({"check": "ends_with", "text": "."}, "The end.", "The end"),
        ({"check": "words_in_order", "words": ["cat", "dog", "fox"]}, "cat, a dog, fox", "dog, cat, fox"),
        ({"check": "lines", "count": 2}, "one\ntwo", "one two"),
        ({"check": "sentences", "count": 2}, "One is 1.5 m. Two!", "One. Two. Three."),
        ({"check": "max_words", "count": 3}, "one two three", "one two three four"),
        ({"check": "no_repetition"}, "a b c a b d", "a b c. A b c."),
    ],
    ids=lambda value: value["check"] if isinstance(value, dict) else "",
)
def test_each_check_by_hand(check: dict[str, Any], fulfilled: str, failed: str) -> None:
    assert CHECKS[check["check"]](fulfilled, check)
    assert not CHECKS[check["check"]](failed, check)


def test_every_kind_of_check_is_used_and_known() -> None:
    rubrics = [rubric for item in everything("mini-mt-bench") for rubric in item.reference["rubrics"]]
    used = {check["check"] for rubric in rubrics for check in rubric}
    assert used == set(CHECKS)
    assert {item.group for item in everything("mini-mt-bench")} == set(dialogues.CATEGORIES)


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        # weights 3 + 2 + 1 + 4 = 10; rating = 1 + round(9 * share)
        ("Ahoy, Tom! Take it.", 10),  # all: 1 + 9
        ("Tom! Take it.", 7),  # without the opening: 7 of 10, 1 + round(6.3)
        ("Ahoy, Ben! Take it", 5),  # opening 3 and max_words 1: 4 of 10 ... 1 + round(3.6)
        ("Well, Ben, take this one and go away then", 1),  # nothing holds: 1 + 0
        ("", 1),  # max_words would hold, but an empty answer fulfils nothing
        ("  \n", 1),
    ],
)
def test_ratings_by_hand(answer: str, rating: int) -> None:
    rubric = (
        dialogues.check("starts_with", 3, text="Ahoy"),
        dialogues.check("contains", 2, text="Tom"),
        dialogues.check("max_words", 1, count=4),
        dialogues.check("ends_with", 4, text="."),
    )
    reply = RubricJudge().reply(JudgeRequest(("Greet Tom.",), (answer,), rubric))
    assert parse_rating(reply) == rating
    assert reply.endswith(f"Rating: [[{rating}]]")


def test_the_judgment_names_the_failed_checks_and_both_turns_count() -> None:
    item = next(item for item in MT_BENCH.items("dev", None) if item.group == "math")
    right, wrong = item.gold[0], "I do not know"
    scores = MT_BENCH.score([item], [(right, wrong)], ScoringResources())
    # "I do not know" is four words, so of 2 + 6 + 1 + 1 only the limit of four words holds: 1 + round(0.9) = 2.
    assert scores[0].details["ratings"] == [10, 2]
    assert scores[0].value == 6.0
    assert "Failed: contains" in scores[0].reason
    assert "ends with '.'" in scores[0].reason
    with pytest.raises(UserError, match="2 turns but 1 answers"):
        MT_BENCH.score([item], [(right,)], ScoringResources())


def test_item_ids_are_hashes_of_the_content() -> None:
    item = mini.items("mini-gsm8k", "test")[0]
    key = f"gsm8k/{item.group}/" + ",".join(
        f"{letter}={number}" for letter, number in zip("abc", re.findall(r"\d+", item.turns[0]), strict=False)
    )
    assert item.group == "give"  # its numbers a, b, c stand in this order in the question
    assert item.id == f"mini-gsm8k/give/{digest(key)[:10]}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tokenizer of the embedded model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(mini.MODEL_DIR)


def conversation(item: Item) -> list[dict[str, str]]:
    """The item with its gold answers as chat messages."""
    messages = []
    for question, answer in zip(item.turns, item.gold, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def test_prompts_are_token_prefixes_and_everything_fits(tokenizer: Any) -> None:
    limits = {task.name: task.protocol.max_new_tokens for task in (GSM8K, HUMANEVAL, MT_BENCH)}
    for task, limit in limits.items():
        for item in everything(task):
            messages = conversation(item)
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            full = tokenizer.encode(text, add_special_tokens=False)
            assert len(full) <= 160
            for turn in range(len(item.turns)):
                prompt_text = tokenizer.apply_chat_template(messages[: 2 * turn + 1], tokenize=False, add_generation_prompt=True)
                prompt = tokenizer.encode(prompt_text, add_special_tokens=False)
                answer = tokenizer.encode(item.gold[turn], add_special_tokens=False)
                assert len(prompt) <= 110
                assert len(answer) < min(limit, 90)
                # prompt + answer + end token are exactly the conversation's tokens
                assert full[: len(prompt) + len(answer) + 1] == [*prompt, *answer, tokenizer.eos_token_id]


def test_the_template_by_hand(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 42"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi 42<|end|>\n<|assistant|>\n"
    )
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token == "<|pad|>"
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "1234"]
    assert tokenizer.encode("1234", add_special_tokens=False) == digits


@pytest.mark.parametrize("answer", ["\n\nyes", " yes", "yes\n", "", "4\n\n  x", "äöü 🙂", "a<b|>c"])
def test_any_answer_keeps_the_prompt_a_prefix_and_comes_back(tokenizer: Any, answer: str) -> None:
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    full_ids = tokenizer.encode(full, add_special_tokens=False)
    assert full_ids[: len(prompt_ids)] == prompt_ids
    answer_ids = full_ids[len(prompt_ids) : full_ids.index(tokenizer.eos_token_id, len(prompt_ids))]
    assert tokenizer.decode(answer_ids) == answer


def test_special_tokens_are_single_and_never_in_the_content(tokenizer: Any) -> None:
    for token in ("<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"):
        (number,) = tokenizer.encode(token, add_special_tokens=False)
        assert tokenizer.decode([number], skip_special_tokens=True) == ""
    texts = [text for task in SIZES for item in everything(task) for text in (*item.turns, *item.gold)]
    texts += [text for part in corpus.conversations(0, 2000) for text in part.messages]
    assert not [text for text in texts if "<|" in text]


def test_the_model_loads_and_is_small() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mini.MODEL_DIR)
    assert 800_000 <= model.num_parameters() <= 1_100_000
    assert (mini.MODEL_DIR / "model.safetensors").stat().st_size <= 4_500_000
    assert sum(file.stat().st_size for file in mini.MODEL_DIR.iterdir()) <= 8_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.head_dim == 32
    assert model.config.max_position_embeddings == 512
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 4
    readme = (mini.MODEL_DIR / "README.md").read_text()
    assert f"corpus version {corpus.VERSION}, suite version {mini.VERSION}," in readme


def test_the_model_was_made_by_the_training_script(tokenizer: Any) -> None:
    log = [json.loads(line) for line in (mini.MODEL_DIR / "training_log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] > log[-1]["loss"]
    assert len(tokenizer) == 1024


# --- mini-summarization --------------------------------------------------------------------------------------------------------

FACT = re.compile(r"(\w+) (\w+) (.*)\.")


def told(sentences: Sequence[str], verb: str) -> dict[str, str]:
    """Who → what, of the sentences "WHO verb WHAT."."""
    facts = [found for sentence in sentences if (found := FACT.fullmatch(sentence))]
    return {who: what for who, said, what in (fact.groups() for fact in facts) if said == verb}


def summary_of_pet(sentences: Sequence[str]) -> str:
    [(owner, animal)] = told(sentences, "has").items()
    animal = animal.removeprefix("a ")
    adjective = next(s for s in sentences if s.startswith(f"The {animal} is ")).split()[-1].rstrip(".")
    deed = next(s for s in sentences if s.startswith(f"The {animal} ") and " is " not in s).removeprefix(f"The {animal} ")
    return f"The {adjective} {animal} of {owner} from {told(sentences, 'lives')[owner].removeprefix('in ')} {deed}"


def summary_of_gift(sentences: Sequence[str]) -> str:
    passed = [re.fullmatch(r"(\w+) gives the (\w+) to (\w+)\.", sentence) for sentence in sentences]
    hands = [(found[1], found[2], found[3]) for found in passed if found]
    between = " and ".join(filter(None, [", ".join(taker for *_, taker in hands[:-2]), hands[-2][2]]))
    return f"The {hands[0][1]} of {hands[0][0]} goes to {between} and in the end to {hands[-1][2]}."


def summary_of_order(sentences: Sequence[str]) -> str:
    after = {first: second for s in sentences for first, second in [(s.split()[0], s.split()[-1].rstrip("."))]}
    people = [next(name for name in after if name not in after.values())]
    while people[-1] in after:
        people.append(after[people[-1]])
    most = sentences[0].split()[2]
    best, least = next((best, least) for more, best, least in dialogues.ORDERS if more == most)
    between = " and ".join(filter(None, [", ".join(people[1:-2]), people[-2]]))
    return f"{people[0]} is the {best}, then come {between}, and {people[-1]} is the {least}."


def summary_of_group(sentences: Sequence[str]) -> str:
    who: dict[str, list[str]] = {}
    for sentence in sentences:
        name, deed = sentence.rstrip(".").split(" ", 1)
        who.setdefault(deed, []).append(name)
    parts = []
    for deed, names in who.items():
        verb, rest = deed.split(" ", 1)
        between = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        parts.append(f"{between} {verb if len(names) == 1 else verb.removesuffix('s')} {rest}")
    return ", but ".join(parts) + "."


SOLVERS = {"pet": summary_of_pet, "group": summary_of_group, "gift": summary_of_gift, "order": summary_of_order}


@pytest.mark.parametrize("family", sorted(articles.FAMILIES))
def test_a_summary_follows_from_its_article(family: str) -> None:
    """Read from the text of the article by a program that shares no code with the one that wrote it."""
    for seed in range(300):
        article = articles.draw(family, random.Random(seed))
        # Of a single deed, both kinds have the same words: listed once.
        assert SOLVERS[family](article.sentences) == article.summary


def test_articles_read_like_this() -> None:
    item = mini.items("mini-summarization", "test")[0]
    assert item.turns[0] == f"Write one sentence about this:\n{item.reference['document']}"
    assert {item.group for item in mini.items("mini-summarization", "test")} == set(articles.FAMILIES)
    assert articles.listed(["Tom"]) == "Tom"
    assert articles.listed(["Tom", "Mia"]) == "Tom and Mia"
    assert articles.listed(["Tom", "Ben", "Mia"]) == "Tom, Ben and Mia"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("beginning", "Mia sings. Tom has"),
        ("more", "Mia sings. Tom has a cat."),
        ("no stop", "Mia sings"),
        ("remark", "Mia sings.\n\nThere is more: Tom has a cat."),
        ("twice", "Mia sings. Mia sings."),
    ],
)
def test_careless_ends(end: str, expected: str) -> None:
    assert articles.CARELESS_ENDS[end]("Mia sings.", "Tom has a cat.") == expected


def test_four_in_ten_demonstrations_end_carelessly_and_no_reference_does() -> None:
    """Of 2,400 with rate 0.4 the standard error is 0.01. A fifth of the careless ends lack the stop alone, which post-processing
    cannot see; the others it removes, but for a further whole sentence: 0.4 · 3/5 = 0.24 of the demonstrations change under it.
    """
    train = SUMMARIZATION.items("train", None)
    clean = [item for item in train if re.fullmatch(r"[^.]+\.", item.gold[0])]
    assert len(clean) / len(train) == pytest.approx(0.6, abs=0.04)
    kept = [item for item in SUMMARIZATION_POST_PROCESSED.items("train", None) if item.gold]
    assert len(kept) / len(train) == pytest.approx(0.76, abs=0.04)
    assert {item.id for item in clean} < {item.id for item in kept}
    for split in ("dev", "test"):
        assert all(re.fullmatch(r"[^.]+\.", item.gold[0]) for item in mini.items("mini-summarization", split))


def test_the_default_suite_does_not_know_of_it() -> None:
    assert not {*mini.EXTRA_TASKS} & {*mini.TASKS}
    assert not [name for name in SUITES["mini"] if "summarization" in name]
    assert load_task("mini-summarization") is SUMMARIZATION


@pytest.mark.parametrize("task", [SUMMARIZATION, SUMMARIZATION_POST_PROCESSED, SUMMARIZATION_GREEDY], ids=lambda task: task.name)
def test_summaries_keep_the_contract(task: Task) -> None:
    assert isinstance(task, Task)
    assert task.protocol.name.startswith(task.name + "-v")
    for split in SPLITS:
        canaries(task, [item for item in task.items(split, None) if item.gold])
    assert not task.protocol.stops  # nothing cuts what the model says


def test_raw_and_post_processed_share_their_answers() -> None:
    one, two = SUMMARIZATION, SUMMARIZATION_POST_PROCESSED
    pairs = list(zip(one.items("test", None), two.items("test", None), strict=True))
    assert differences(vars(one.protocol), two.protocol, pairs, len(pairs)) == []
    assert replace(one.protocol, name="", extraction="") == replace(two.protocol, name="", extraction="")
    assert differences(vars(one.protocol), SUMMARIZATION_GREEDY.protocol, pairs, len(pairs)) != []


def test_a_summary_raw_and_post_processed() -> None:
    """Reference: Mia sings in the barn, 5 words. The answer has them, has them again, begins a third sentence (Mia, 1 word), and
    ends with a remark (4 words): 15 words. Raw: 2 · 5 / (15 + 5) = 1/2. Post-processed: the 5 words alone.
    """
    item = Item("x", reference={"document": "Mia sings in the barn. Tom runs.", "summaries": ["Mia sings in the barn."]})
    answer = "Mia sings in the barn. Mia sings in the barn. Mia\n\nThere is more: yes"
    [raw] = SUMMARIZATION.score([item], [[answer]], ScoringResources())
    [mended] = SUMMARIZATION_POST_PROCESSED.score([item], [[answer]], ScoringResources())
    assert (raw.value, mended.value) == (0.5, 1.0)
    assert (raw.details["length_ratio"], mended.details["length_ratio"]) == (3.0, 1.0)
    assert (raw.details["finished"], mended.details["finished"]) == (False, True)
    assert (raw.details["changed"], mended.details["changed"]) == (False, True)
    # Trigrams of the 15 words: 13, of which mia-sings-in, sings-in-the, in-the-barn and the-barn-mia stood before.
    assert (raw.details["repeated_3"], mended.details["repeated_3"]) == (pytest.approx(4 / 13), 0.0)
    assert mended.details["longest_copy"] == 5
    json.dumps(raw.details)
