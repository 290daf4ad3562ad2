"""What a reward model is trained on: answers that fail, in tokens, and which of a policy's samples are among them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gsil_bench.data.chat import ChatFormat
from gsil_bench.data.degradations import CLASSES
from gsil_bench.records import Demonstration, Encoded, demonstration_id
from gsil_bench.training.contrasts import OWN, Contrast, against_failures, against_samples, counts_of, missing_of, split, unclear

DOCUMENT = "Tom has a cat. The cat sleeps. Mia has a dog. The dog runs."
GOOD = "The cat of Tom sleeps, but the dog of Mia runs."
FINE = "Tom and Mia have a cat and a dog."
LIMIT = 200


def demonstration(answer: str, document: str = DOCUMENT) -> Demonstration:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": document})
    return Demonstration(demonstration_id(messages, answer), messages, answer)


FIRST, OTHER = demonstration(GOOD), demonstration("Eva sings in the garden.", "Eva is in the garden. Eva sings.")


@pytest.fixture(scope="module")
def chat(mini_folder: Path) -> ChatFormat:
    return ChatFormat.of(AutoTokenizer.from_pretrained(mini_folder))


def encode(chat: ChatFormat, text: str, item: Demonstration = FIRST) -> Encoded:
    return chat.encode(item.messages, text)


def made(
    chat: ChatFormat, *items: Demonstration, samples: tuple[str, ...] = (FINE,), seed: int = 0, limit: int = LIMIT
) -> list[Contrast]:
    """Contrasts whose demonstrations all have samples of the same texts."""
    encoded = [encode(chat, item.answer, item) for item in items]
    drawn = [encode(chat, text, item) for item in items for text in samples]
    return against_failures(items, encoded, drawn, chat, seed, limit, 512)


def answers(contrast: Contrast) -> dict[str, tuple[int, ...]]:
    ids = [branch.completion_ids for branch in contrast.tree.generated]
    return dict(zip(contrast.classes, ids, strict=True))


def test_each_class_that_there_is_has_one_answer_under_the_demonstrations_prompt(chat: ChatFormat) -> None:
    """The first has all eight text classes and missing-end; its one sample is fine. `Yes` has no stop, no other order, no cut."""
    one, two = made(chat, FIRST, demonstration("Yes", "Is it? It is."))
    assert one.classes == CLASSES
    assert one.missing == (OWN,)
    assert one.tree.prompt_ids == encode(chat, GOOD).prompt_ids
    assert one.tree.real.completion_ids == encode(chat, GOOD).completion_ids
    assert two.missing == ("truncated", "without-end", "shuffled", OWN)
    assert counts_of([one, two]) == {name: 1 if name in two.missing else 2 for name in CLASSES}
    assert missing_of([one, two]) == {OWN: 2, "truncated": 1, "without-end": 1, "shuffled": 1}


def test_failures_of_the_text_end_and_failures_of_the_end_do_not(chat: ChatFormat) -> None:
    """Only what is after the body tells missing-end from the demonstration; what is empty is an end token and no space."""
    found, good, end = answers(made(chat, FIRST, OTHER)[0]), encode(chat, GOOD).completion_ids, chat.end_token_id
    assert found["missing-end"] == good[:-1]
    assert found["empty"] == (end,)
    assert found["without-end"] == encode(chat, GOOD.removesuffix(".")).completion_ids
    assert found["off-topic"] == encode(chat, OTHER.answer).completion_ids
    assert found["run-on"][: len(good) - 1] == good[:-1]
    assert len(found["run-on"]) > len(good)
    assert {name: ids.count(end) for name, ids in found.items()} == {
        name: 0 if name in ("run-on", "missing-end") else 1 for name in CLASSES
    }
    assert all(ids[-1] == end for name, ids in found.items() if name not in ("run-on", "missing-end"))


def test_what_is_empty_has_no_space_where_answers_begin_with_one(mini_folder: Path) -> None:
    plain = ChatFormat.of(AutoTokenizer.from_pretrained(mini_folder), "plain")
    assert encode(plain, "").completion_ids != (plain.end_token_id,)
    assert answers(made(plain, FIRST)[0])["empty"] == (plain.end_token_id,)


def test_no_failure_is_the_demonstration(chat: ChatFormat) -> None:
    items = [demonstration(text) for text in (GOOD, "No.", "a a", "Tom has a cat.", DOCUMENT)]
    for seed in range(5):
        for contrast in made(chat, *items, samples=("a a", ""), seed=seed):
            assert contrast.tree.real.completion_ids not in answers(contrast).values()


def test_what_is_longer_than_the_limit_is_cut_and_has_no_end(chat: ChatFormat) -> None:
    """The demonstration has more tokens than the limit of 5; only `empty` is shorter."""
    assert len(encode(chat, GOOD).completion_ids) > 5
    for name, ids in answers(made(chat, FIRST, OTHER, limit=5)[0]).items():
        assert len(ids) <= 5, name
        assert (chat.end_token_id in ids) == (name in ("empty",) or len(ids) < 5), name
    assert answers(made(chat, FIRST, limit=5)[0])["missing-end"] == encode(chat, GOOD).completion_ids[:5]


@pytest.mark.parametrize(
    ("samples", "own"),
    [
        ((FINE,), None),
        ((FINE, "The cat", "Tom."), "The cat"),
        ((GOOD, ""), ""),
        (("Tom and Mia. Tom and Mia.",), "Tom and Mia. Tom and Mia."),
        (("A cat.\n\nThere is more: a dog.",), "A cat.\n\nThere is more: a dog."),
        (("The dog runs.",), "The dog runs."),
    ],
)
def test_own_samples_are_negatives_if_they_fail_a_rule(chat: ChatFormat, samples: tuple[str, ...], own: str | None) -> None:
    """Unfinished, empty, repeated, a further paragraph, copied: the first such sample, whole."""
    contrast = made(chat, FIRST, samples=samples)[0]
    assert answers(contrast).get(OWN) == (encode(chat, own).completion_ids if own is not None else None)
    assert (OWN in contrast.missing) == (own is None)


def test_a_sample_without_end_token_fails_however_good_its_text(chat: ChatFormat) -> None:
    good, fine = encode(chat, GOOD), encode(chat, FINE)
    cut = Encoded(fine.prompt_ids, fine.completion_ids[:-1])
    (contrast,) = against_failures([FIRST], [good], [fine, cut], chat, 0, LIMIT, 512)
    assert answers(contrast)[OWN] == cut.completion_ids


def test_no_failure_goes_beyond_the_context(chat: ChatFormat) -> None:
    """Six tokens after the prompt: every failure is cut there."""
    good, fine = encode(chat, GOOD), encode(chat, FINE)
    (contrast,) = against_failures([FIRST], [good], [fine], chat, 0, LIMIT, len(good.prompt_ids) + 6)
    lengths = {name: len(ids) for name, ids in answers(contrast).items()}
    assert max(lengths.values()) == 6 and lengths["run-on"] == 6


def test_a_sample_that_is_the_demonstration_is_no_negative(chat: ChatFormat) -> None:
    """The demonstration has no stop, so it fails a rule itself."""
    contrast = made(chat, demonstration("Tom has a cat and Mia a dog"), samples=("Tom has a cat and Mia a dog",))[0]
    assert OWN in contrast.missing


def test_samples_are_read_demonstration_by_demonstration(chat: ChatFormat) -> None:
    good = [encode(chat, item.answer, item) for item in (FIRST, OTHER)]
    drawn = [encode(chat, FINE), encode(chat, FINE), encode(chat, FINE, OTHER), encode(chat, "Eva is", OTHER)]
    one, two = against_failures([FIRST, OTHER], good, drawn, chat, 0, LIMIT, 512)
    assert OWN not in one.classes
    assert answers(two)[OWN] == encode(chat, "Eva is", OTHER).completion_ids


def test_off_topic_is_never_an_answer_to_the_same_prompt(chat: ChatFormat) -> None:
    same = [demonstration(text) for text in (GOOD, "A cat sleeps and a dog runs.")]
    assert "off-topic" in made(chat, *same)[0].missing
    assert all(answers(made(chat, *same, OTHER, seed=seed)[0]).get("off-topic") != same[1] for seed in range(10))


def test_the_few_that_off_topic_is_drawn_from_are_others_with_another_seed(chat: ChatFormat) -> None:
    """From the same 8 of 40, twelve seeds could not draw more than 8."""
    items = [FIRST, *(demonstration(f"There are {n} hens.", f"Tom has {n} hens.") for n in range(40))]
    assert len({answers(made(chat, *items, seed=seed)[0])["off-topic"] for seed in range(12)}) > 8


def test_draws_follow_from_seed_and_demonstration(chat: ChatFormat) -> None:
    """With the others in another order only off-topic may change: it is drawn from them."""

    def classes(seed: int, *items: Demonstration) -> dict[str, tuple[int, ...]]:
        return answers(next(one for one in made(chat, *items, seed=seed) if one.tree.id == FIRST.id))

    assert classes(1, FIRST, OTHER) == classes(1, FIRST, OTHER)
    once, moved = classes(1, FIRST, OTHER), classes(1, OTHER, FIRST)
    assert {name: once[name] for name in CLASSES if name != "off-topic"} == {
        name: moved[name] for name in CLASSES if name != "off-topic"
    }
    assert len({classes(seed, FIRST, OTHER)["shuffled"] for seed in range(4)}) > 1


def test_samples_of_a_prompt_stand_against_its_demonstration_or_one_against_one() -> None:
    real, low = [Encoded((1,), (n,)) for n in (10, 20)], [Encoded((1,), (n,)) for n in (11, 12, 21, 22)]
    one, two = against_samples(["a", "b"], real, low, "initial")
    assert [(one.tree.id, *answer_ids(one)), (two.tree.id, *answer_ids(two))] == [("a", 10, 11, 12), ("b", 20, 21, 22)]
    assert one.classes == ("initial", "initial")
    high = [Encoded((1,), (n,)) for n in (15, 16, 25, 26)]
    assert [answer_ids(one) for one in against_samples(["a", "b"], high, low, "initial")] == [
        (15, 11), (16, 12), (25, 21), (26, 22)
    ]  # fmt: skip


def answer_ids(contrast: Contrast) -> tuple[int, ...]:
    return tuple(branch.completion_ids[0] for branch in contrast.tree.branches)


def test_a_prompt_is_trained_on_or_kept_back_as_a_whole() -> None:
    """Of 20 prompts with two contrasts each the tenth and the twentieth are kept back; of 9 none."""

    def contrasts(prompts: int) -> list[Contrast]:
        ids = [f"{n}" for n in range(prompts)]
        pairs = [[Encoded((n,), (m,)) for n in range(prompts) for m in (1, 2)] for _ in "ab"]
        return against_samples(ids, pairs[0], pairs[1], "policy")

    fitted, kept = split(contrasts(20))
    assert (len(fitted), [one.tree.id for one in kept]) == (36, ["9", "9", "19", "19"])
    assert split(contrasts(9)) == (contrasts(9), [])


def test_classes_that_are_not_told_apart_are_named() -> None:
    assert unclear({"empty": 1.0, "copied": 0.6, "all": 0.1}) == []
    assert unclear({}) == ["fewer than 10 prompts: none was kept back to see what the reward model tells apart"]
    (warning,) = unclear({"empty": 0.99, "shuffled": 0.59, "own": math.nan, "all": 0.7})
    assert warning.endswith("(AUC): shuffled (0.59), own (nan)")
