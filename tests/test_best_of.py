"""Best of N: the exact mean over subsets by hand and against enumeration, and the command from sampling to the table."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gsil_bench import best_of, cli, compare
from gsil_bench.best_of import (
    Drawn,
    chances,
    chances_of_distinct,
    divergence,
    expected_best,
    expected_distinct,
    parse_numbers,
    spearman_within,
    task_record,
)
from gsil_bench.errors import UserError
from gsil_bench.execution import local
from gsil_bench.inputs import TaskInput
from gsil_bench.methods import Critic, Method, Rollouts, SelfPlay, TokenLogProbs
from gsil_bench.records import CellResult, ItemScore, read_jsonl
from gsil_bench.reporting.best_of import render_markdown, render_text
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources, Split
from gsil_bench.training.critics import discrimination
from gsil_bench.training.policy_gradient import clipped_policy_gradient

# The mean over subsets.


def test_the_chances_of_places_by_hand() -> None:
    """Of 4 samples, 6 subsets of two: the first is in 3 of them, the second first of 2, the third of 1, the last of none."""
    assert chances(4, 2).tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    assert chances(4, 1).tolist() == pytest.approx([1 / 4] * 4)
    assert chances(4, 4).tolist() == pytest.approx([1, 0, 0, 0])
    assert chances(4, 3).tolist() == pytest.approx([3 / 4, 1 / 4, 0, 0])


def test_chances_of_many_samples_sum_to_one() -> None:
    """C(500, 128) is beyond a double's 1e308 no more than some, its product with others is: logarithms."""
    found = chances(500, 128)
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert found[0] == pytest.approx(128 / 500, rel=1e-9)  # the best of all is in a subset with probability n / M


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="a subset of 5 among 4"):
        chances(4, 5)


def test_the_expected_best_by_hand() -> None:
    """Rewards 3, 2, 1 rank the values 1, 0, 5. Pairs: {1, 0} → 1, {1, 5} → 1, {0, 5} → 0, in the mean 2/3; singles 2; all 1."""
    values, rewards = np.array([[1.0, 0.0, 5.0]]), np.array([[3.0, 2.0, 1.0]])
    assert [float(expected_best(values, rewards, n)[0]) for n in (1, 2, 3)] == pytest.approx([2, 2 / 3, 1])


def test_equal_rewards_are_drawn_among_by_hand() -> None:
    """Rewards 2, 2, 1 and values 1, 0, 5. {1, 0} → ½, {1, 5} → 1, {0, 5} → 0: ½. All three: ½. Singles: 2."""
    values, rewards = np.array([[1.0, 0.0, 5.0]]), np.array([[2.0, 2.0, 1.0]])
    assert [float(expected_best(values, rewards, n)[0]) for n in (1, 2, 3)] == pytest.approx([2, 0.5, 0.5])


def enumerated(values: Sequence[float], rewards: Sequence[float], n: int) -> float:
    """The definition: every subset, the mean of what has its highest reward."""
    found = []
    for subset in itertools.combinations(range(len(values)), n):
        highest = max(rewards[at] for at in subset)
        found.append(np.mean([values[at] for at in subset if rewards[at] == highest]))
    return float(np.mean(found))


@pytest.mark.parametrize("levels", [2, 4, 1000])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_the_expected_best_is_the_mean_over_all_subsets(n: int, levels: int) -> None:
    """With many equal rewards, with some, with none."""
    random = np.random.default_rng(levels)
    values, rewards = random.normal(size=(3, 8)), random.integers(0, levels, size=(3, 8)).astype(float)
    wanted = [enumerated(list(mine), list(theirs), n) for mine, theirs in zip(values, rewards, strict=True)]
    np.testing.assert_allclose(expected_best(values, rewards, n), wanted, rtol=1e-12)


def test_the_order_of_samples_does_not_matter() -> None:
    values, rewards = np.array([[1.0, 0.0, 5.0, 2.0]]), np.array([[2.0, 2.0, 1.0, 0.0]])
    shuffled = [2, 0, 3, 1]
    assert expected_best(values, rewards, 2) == pytest.approx(expected_best(values[:, shuffled], rewards[:, shuffled], 2))


# A reward that says nothing.


def test_a_text_that_is_drawn_often_counts_once() -> None:
    """Texts a, a, a, b; a is worth 1, b 0. One: 3/4. Pairs: {a, a} three times → 1, {a, b} three times → ½: ¾. All: ½."""
    values, texts = np.array([[1.0, 1.0, 1.0, 0.0]]), [["a", "a", "a", "b"]]
    assert [float(expected_distinct(values, texts, n)[0]) for n in (1, 2, 4)] == pytest.approx([3 / 4, 3 / 4, 1 / 2])
    assert chances_of_distinct([3, 1], 3).tolist() == pytest.approx([1 / 4 + 3 / 4 / 2, 3 / 4 / 2])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_distinct_texts_are_the_mean_over_all_subsets(n: int) -> None:
    """Of each subset the mean of its distinct texts."""
    values, texts = [3.0, 3.0, 3.0, 1.0, 1.0, 7.0, 2.0], ["a", "a", "a", "b", "b", "c", "d"]
    worth = dict(zip(texts, values, strict=True))
    subsets = itertools.combinations(range(7), n)
    wanted = np.mean([np.mean([worth[text] for text in {texts[at] for at in subset}]) for subset in subsets])
    assert expected_distinct(np.array([values]), [texts], n) == pytest.approx(wanted, rel=1e-12)


def test_spearman_by_hand() -> None:
    """Ranks 1 2 3 4 against 2 1 4 3: Σd² = 4, 1 − 6·4 / (4·15) = 0.6. Reversed: −1. A constant side has none.
    Ranks 1.5 1.5 3 against 1 2 3: deviations (−.5, −.5, 1), (−1, 0, 1): 1.5 / √(1.5 · 2) = 0.866.
    """
    found = spearman_within(
        np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4.0]]), np.array([[20, 10, 40, 30], [4, 3, 2, 1], [7] * 4])
    )
    assert found[:2].tolist() == pytest.approx([0.6, -1.0])
    assert math.isnan(found[2])
    assert spearman_within(np.array([[5, 5, 9.0]]), np.array([[1, 2, 3.0]])).tolist() == pytest.approx([math.sqrt(0.75)])


def test_how_far_choosing_goes() -> None:
    """log 2 − ½ = 0.193147 nats; nothing for one sample."""
    assert (divergence(1), divergence(2)) == (0.0, pytest.approx(0.19314718))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,2", "--n: expected a whole number of at least 1, found '0'"),
        ("1,x", "--n: expected a whole number"),
        ("1", "--n 1: there is nothing to choose among fewer than 2 samples"),
        ("2,4,2", "--n 2,4,2: a number is there twice"),
    ],
)
def test_bad_numbers(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_numbers(text)


def test_numbers_are_sorted() -> None:
    assert parse_numbers("4, 1,2") == (1, 2, 4)


# A task's record.


GREEDY = AnswerProtocol("vowels/greedy-v1", max_new_tokens=6)


@dataclasses.dataclass(frozen=True)
class Letters:
    """The share of an answer's characters that are vowels."""

    name: str = "vowels"
    version: str = "1"
    summary: str = "Say vowels."
    metric: str = "vowels"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False
    protocol: AnswerProtocol = GREEDY
    turns: int = 1

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        return [Item(f"{split}-{n}", (f"Say {n}.",) * self.turns, gold=("a",) * self.turns) for n in range(12)]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        return [Score(sum(each in "aeiou" for each in turns[-1]) / max(1, len(turns[-1])), turns[-1]) for turns in answers]


TASK = Letters()
TWO_TURNS = Letters(name="vowels-twice", turns=2)
SAMPLED = Letters(name="vowels-sampled", protocol=AnswerProtocol("vowels/sampled-v1", 6, temperature=1.0))


def drawn(scores: list[list[list[float]]], rewards: list[list[list[float]]]) -> Drawn:
    """Texts all distinct, every log-prob the reward's negative, every length the reward."""
    values, ranking = np.array(scores), np.array(rewards)
    texts = [[[str(at) for at in range(values.shape[2])] for _ in seed] for seed in scores]
    items = tuple(f"item-{n}" for n in range(values.shape[1]))
    return Drawn(items, values, -ranking, ranking, texts, 0, {"mine": ranking})


def row(record: dict[str, Any], choice: str) -> dict[str, Any]:
    (found,) = [each for each in record["rows"] if each["choice"] == choice]
    return found


def estimates(record: dict[str, Any], choice: str, field: str = "score") -> list[float | None]:
    return [cell[field] and cell[field]["estimate"] for cell in row(record, choice)["cells"]]


def test_a_tasks_rows_by_hand() -> None:
    """Two items of two samples. Item 0: scores 0 and 1, rewards 2 and 1; item 1: scores 1 and 1, rewards 1 and 2. Any sample: ½
    and 1, ¾ in the mean. The higher reward chooses 0 and 1: ½, and the likelihood (its negative) 1 and 1.
    """
    record = task_record(TaskInput(TASK, ()), drawn([[[0, 1], [1, 1]]], [[[2, 1], [1, 2]]]), [], (1, 2))
    assert estimates(record, "mine") == [0.75, 0.5]
    assert estimates(record, best_of.LIKELY) == [0.75, 1.0]
    assert estimates(record, best_of.BEST) == [0.75, 1.0]
    assert estimates(record, best_of.RANDOM) == estimates(record, best_of.DISTINCT) == [0.75, 0.75]
    assert estimates(record, "mine", "difference") == [None, -0.25]
    assert estimates(record, "mine", "over_distinct") == [None, -0.25]  # no texts are equal
    assert [each["mean"] for each in row(record, "mine")["reward"]] == [1.5, 2.0]
    assert row(record, "mine")["spread"] == pytest.approx(math.sqrt(0.5))  # of 1 and 2
    assert row(record, "mine")["spearman"] == {"estimate": -1.0, "low": -1.0, "high": pytest.approx(0.9), "items": 1}
    assert row(record, "mine")["spearman_length"]["estimate"] == 1.0
    assert (record["nothing_to_choose"], record["distinct"], record["items"]) == (0.5, 2.0, 2)


def test_where_lower_is_better_the_best_possible_is_the_lowest() -> None:
    task = dataclasses.replace(TASK, best=0.0, worst=1.0)
    record = task_record(TaskInput(task, ()), drawn([[[0, 1], [1, 1]]], [[[2, 1], [1, 2]]]), [], (2,))
    assert estimates(record, best_of.BEST) == [0.5]
    assert row(record, "mine")["spearman"]["estimate"] == 1.0  # the higher reward has the better score


def test_differences_are_paired_by_item() -> None:
    """Six items whose scores differ by far more than the choice changes: 0/0.2, 0.1/0.3, …, each gains 0.1 over its mean. The
    difference has no spread at all, and n = 6 equal ones leave 1 − 0.05^(1/6) = 0.393 of the way to the scale's ends open.
    """
    scores = [[[n / 10, n / 10 + 0.2] for n in range(6)]]
    record = task_record(TaskInput(TASK, ()), drawn(scores, [[[1, 2]] * 6]), [], (1, 2))
    cell = row(record, "mine")["cells"][1]
    share = 1 - 0.05 ** (1 / 6)
    assert cell["difference"]["estimate"] == pytest.approx(0.1)
    assert cell["difference"]["low"] == pytest.approx(0.1 - share * 1.1)


def test_a_reward_is_compared_with_one_that_says_nothing() -> None:
    """Texts a, a, a, b, worth 1, 1, 1, 0. Of all four the reward chooses b: 0. Any sample ¾, any distinct one ½: −¾ and −½."""
    given = dataclasses.replace(drawn([[[1, 1, 1, 0]]], [[[1, 1, 1, 2]]]), texts=[[["a", "a", "a", "b"]]])
    record = task_record(TaskInput(TASK, ()), given, [], (1, 4))
    assert estimates(record, best_of.DISTINCT) == [0.75, 0.5]
    assert estimates(record, "mine", "difference") == [None, -0.75]
    assert estimates(record, "mine", "over_distinct") == [None, -0.5]
    assert record["distinct"] == 2


def test_the_mean_over_seeds() -> None:
    """Item 0 has scores 0, 1, ranked wrongly under seed 0 and rightly under seed 1: ½, and the correlations −1 and 1 are 0 in the
    mean. Item 1 has 1, 1 under seed 0, of no correlation, and 0, 1 ranked rightly under seed 1: 1, and 1. Both: ¾ and ½.
    """
    both = drawn([[[0, 1], [1, 1]], [[0, 1], [0, 1]]], [[[2, 1], [1, 2]], [[1, 2], [1, 2]]])
    record = task_record(TaskInput(TASK, ()), both, [], (2,))
    assert estimates(record, "mine") == [0.75]
    found = row(record, "mine")["spearman"]
    assert (found["estimate"], found["items"]) == (pytest.approx(0.5), 2)


def falling(count: int) -> dict[str, Any]:
    """Every item's best reward has its worst score: with N = 3 always 0. With N = 1 ⅔, but 1.9 / 3 of each seventh item: of 30
    items (25 · 2 + 5 · 1.9) / 3 / 30 = 0.66111.
    """
    scores = [[[0, 1, 1] if n % 7 else [0, 1, 0.9] for n in range(count)]]
    return task_record(TaskInput(TASK, ()), drawn(scores, [[[3, 2, 1]] * count]), [], (1, 3))


def test_a_reward_that_is_followed_too_far_is_said() -> None:
    record = falling(30)
    fall = row(record, "mine")["fall"]
    assert (fall["from"], fall["to"]) == (1, 3)
    assert fall["high"] < 0
    assert row(record, best_of.LIKELY)["fall"] is None  # it rises
    whole = {"samples": 3, "policy": "sft", "seeds": [0], "split": "test", "kl": {"1": 0.0, "3": 0.43}, "n": [1, 3]}
    whole |= {"tasks": {"vowels": record}, "failures": [], "warnings": []}
    assert "mine is followed too far: from N = 1 to N = 3 the score changes by −0.661 [" in render_text(whole)
    assert "| mine | 0.661 | 0.000 (−0.661 [" in render_markdown(whole)
    assert "followed too far" not in render_text(whole | {"tasks": {"vowels": falling(1)}})  # one item shows nothing


def test_the_greedy_answer_is_paired_with_the_same_items() -> None:
    items = tuple(ItemScore(f"item-{n}", 1.0, "", "") for n in (1, 0))
    result = CellResult("sft", 0, "vowels", "vowels", 1.0, 0.0, {}, items, {}, {}, {}, {})
    record = task_record(TaskInput(TASK, ()), drawn([[[0, 1], [1, 1]]], [[[2, 1], [1, 2]]]), [result], (1, 2))
    assert estimates(record, best_of.GREEDY) == [1.0, 1.0]
    assert estimates(record, best_of.GREEDY, "difference") == [0.25, 0.25]


# The command.


def surprise(samples: TokenLogProbs) -> Tensor:
    """A reward of each token: how unlikely it is."""
    return -samples.reference_logps


def only_in_training(samples: TokenLogProbs) -> Tensor:
    """Reads how long the demonstration is, which no task's item has."""
    return samples.real_length - samples.length


def _method(name: str, reward: Any, **more: Any) -> Method:
    rollouts = Rollouts(reward=reward, **more)
    play = SelfPlay(opponent="initial", samples=2, max_new_tokens=8)
    needs = frozenset({"tokens"})
    return Method(name, "For a test.", clipped_policy_gradient, {"clip": 0.2}, needs, play, rollouts, "sft")


RARE = _method("rare", surprise)
CLUELESS = _method("clueless", only_in_training)
ALONGSIDE = _method("alongside", surprise, needs=frozenset({"scores"}), critic=Critic(discrimination, alongside=True))
LIKE = _method("like", surprise, needs=frozenset({"similarity"}))
UNTRAINED = dataclasses.replace(RARE, name="untrained", starts_from="")


@pytest.fixture
def command(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def arguments(*more: str, methods: str = "test_best_of:RARE", tasks: str = "test_best_of:TASK") -> list[str]:
        words = ["--model", str(tiny_model), "--demonstrations", str(demonstrations_file), "--out", str(tmp_path / "out")]
        return ["best-of", "--methods", methods, "--tasks", tasks, *words, *more]

    return arguments


def call(words: Sequence[str]) -> int:
    return compare.call(cli.app, words)


def test_from_samples_to_the_table(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reward is how unlikely an answer is, so that it and the likelihood choose from opposite ends."""
    assert call(command("--n", "1,2,6", "--seeds", "0,1")) == 0
    captured = capsys.readouterr()
    out = tmp_path / "out"
    found = json.loads((out / "best_of.json").read_text())
    assert (found["n"], found["samples"], found["seeds"], found["policy"]) == ([1, 2, 6], 6, [0, 1], "sft")
    record = found["tasks"]["vowels"]
    assert record["items"] == 12
    choices = [each["choice"] for each in record["rows"]]
    assert choices == ["rare", best_of.LIKELY, best_of.BEST, best_of.DISTINCT, best_of.RANDOM, best_of.GREEDY]
    starts = [estimates(record, name)[0] for name in choices[:-1]]
    assert starts == pytest.approx([starts[0]] * 5)  # N = 1 is any sample's
    best = estimates(record, best_of.BEST)
    assert best[0] < best[1] < best[2]
    rewards = [each["mean"] for each in row(record, "rare")["reward"]]
    assert rewards[0] < rewards[1] < rewards[2]
    likely = [each["mean"] for each in row(record, best_of.LIKELY)["reward"]]
    assert likely[0] == pytest.approx(-rewards[0]) and likely[2] > likely[0]
    assert row(record, "rare")["spearman"]["estimate"] == pytest.approx(-row(record, best_of.LIKELY)["spearman"]["estimate"])
    assert str(tmp_path) not in (out / "best_of.json").read_text()
    assert "vowels (vowels), 12 items" in captured.out
    assert (out / "best_of.md").read_text().startswith("# Best of N")
    svg = (out / "plots" / "best-of.svg").read_text()
    assert svg.startswith("<svg") and "rare" in svg
    # the result of a cell is the best of all six
    result = json.loads((out / best_of.FOLDER / "results" / "vowels" / "rare-seed1.json").read_text())
    of_seed = [item["score"] for item in result["items"]]
    first = json.loads((out / best_of.FOLDER / "results" / "vowels" / "rare-seed0.json").read_text())
    both = np.mean([of_seed, [item["score"] for item in first["items"]]])
    assert float(both) == pytest.approx(estimates(record, "rare")[2])
    assert result["comparable"]["protocol"] == "vowels/greedy-v1, 6 samples"


def test_a_finished_run_makes_nothing_again(command: Callable[..., list[str]], tmp_path: Path, monkeypatch: Any) -> None:
    assert call(command("--n", "2")) == 0
    before = (tmp_path / "out" / "best_of.json").read_bytes()

    def refused(self: local.LocalRun, stage: local.Stage) -> object:
        raise AssertionError(stage.label)

    monkeypatch.setattr(local.LocalRun, "_build", refused)
    assert call(command("--n", "2")) == 0
    assert (tmp_path / "out" / "best_of.json").read_bytes() == before


def records_of(out: Path, name: str, file: str) -> list[dict[str, Any]]:
    """What a cell's ranking stage wrote."""
    result = json.loads((out / best_of.FOLDER / "results" / "vowels" / f"{name}-seed0.json").read_text())
    return list(read_jsonl(out / "store" / "scores" / result["provenance"]["scores"] / file))


def test_the_closed_form_is_what_two_forward_passes_say(
    command: Callable[..., list[str]], tmp_path: Path, tiny_model: Path
) -> None:
    """log π_SFT − log π_init of every sample, summed here from transformers' own logits; and log π_SFT is its likelihood."""
    from transformers import AutoModelForCausalLM

    (tmp_path / "fast.yaml").write_text("set: {sft: {learning_rate: 1e-3}}\n")
    assert call(command("--n", "3", "--recipe", str(tmp_path / "fast.yaml"), methods="afd-closed-form")) == 0
    out = tmp_path / "out"
    rewards = records_of(out, "afd-closed-form", best_of.REWARDS)
    (samples,) = [list(read_jsonl(path)) for path in (out / "store" / "scores").rglob(best_of.SAMPLES)]
    (trained,) = [path.parent for path in (out / "store" / "training").rglob("config.json")]
    assert len(rewards) == len(samples) == 36

    def logp(model: Any, sample: dict[str, Any]) -> float:
        ids = torch.tensor([sample["prompt"] + sample["tokens"]])
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        at = torch.arange(len(sample["prompt"]) - 1, ids.shape[1] - 1)
        return float(logps[at, ids[0, at + 1]].sum())

    policy, initial = (AutoModelForCausalLM.from_pretrained(folder) for folder in (trained, tiny_model))
    with torch.no_grad():
        own = [logp(policy, sample) for sample in samples]
        differences = [mine - logp(initial, sample) for mine, sample in zip(own, samples, strict=True)]
    assert np.std(differences) > 0.1  # the policy moved
    assert [record["reward"] for record in rewards] == pytest.approx(differences, abs=1e-3)
    assert [record["logp"] for record in rewards] == pytest.approx(own, abs=1e-3)


def test_classifiers_are_those_of_a_comparison(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """A reward model is trained once for best-of-N and for reinforcement learning, and its logit is what ranks."""
    from gsil_bench.inputs import read_inputs
    from gsil_bench.plan import Planner

    words = ["--set", "afd-init-sft.max_new_tokens=8", "--set", "afd-init-sft.samples=2"]
    assert call(command("--n", "2", *words, methods="afd-init-sft")) == 0
    out = tmp_path / "out"
    (made,) = (out / "store" / "reward-model").iterdir()
    record = json.loads((made / "manifest.json").read_text())
    import yaml

    from gsil_bench.config import Config

    kept = yaml.safe_load((out / best_of.FOLDER / "config.yaml").read_text())
    config = Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()})
    planned = [stage for stage in Planner(read_inputs(config)).plan().stages if stage.kind == "reward-model"]
    assert [stage.inputs for stage in planned] == [{key: record["inputs"][key] for key in planned[0].inputs}]
    rewards = [each["reward"] for each in records_of(out, "afd-init-sft", best_of.REWARDS)]
    assert np.std(rewards) > 0
    assert (out / "best_of.md").read_text().count("afd-init-sft") >= 2


def test_a_reward_that_reads_what_only_training_knows(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its row is left out with the reason, the other method's is there, and the exit code says that something failed."""
    assert call(command("--n", "2", methods="test_best_of:RARE,test_best_of:CLUELESS")) == 1
    assert "the reward of clueless is not finite for 24 of 24 samples (item test-0)" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "best_of.json").read_text())
    assert [each["choice"] for each in record["tasks"]["vowels"]["rows"]][:2] == ["rare", best_of.LIKELY]
    assert [failure["method"] for failure in record["failures"]] == ["clueless"]


def test_a_method_that_starts_from_the_model_as_given(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert call(command("--n", "2", "--seeds", "0,1", methods="test_best_of:UNTRAINED")) == 0
    record = json.loads((tmp_path / "out" / "best_of.json").read_text())
    assert record["policy"] == "start"
    assert not (tmp_path / "out" / "store" / "training").exists()


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"methods": "sft"}, [], "best-of: sft has no reward to choose by; --methods takes those that have one: "),
        ({"methods": "test_best_of:ALONGSIDE"}, [], "best-of: alongside learns its reward alongside its policy"),
        ({"methods": "test_best_of:LIKE"}, [], "best-of: like is rewarded for likeness to a prompt's demonstration"),
        ({"methods": "afd-init-sff"}, [], "did you mean 'afd-init-sft'"),
        ({"tasks": "test_best_of:TWO_TURNS"}, [], "best-of: task vowels-twice is not answered in one turn"),
        ({"tasks": "test_best_of:TASK,test_best_of:SAMPLED"}, [], "vowels-sampled is sampled already"),
        ({"tasks": "test_best_of:TASK,test_best_of:SAMPLED"}, [], "name the others: --tasks vowels"),
        ({}, ["--n", "1"], "--n 1: there is nothing to choose among"),
        ({}, ["--control", "sft"], "No such option: --control"),
        (
            {"methods": "test_best_of:RARE,afd-closed-form"},
            ["--set", "afd-closed-form.start_share=0.25"],
            "best-of: rare and afd-closed-form start from different policies",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    more: list[str],
    message: str,
) -> None:
    assert call(command(*more, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command("--dry-run", "--n", "4")) == 0
    shown = capsys.readouterr().out
    assert "answer vowels with sft, seed 0, 4 samples each" in shown
    assert "reward vowels by rare, seed 0" in shown
    assert not (tmp_path / "out").exists()
