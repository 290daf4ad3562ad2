"""Summaries: sentences, every measure on texts small enough to be counted by hand, the protocols, files, and made failures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsil_bench.data import sources
from gsil_bench.data.degradations import CLASSES, DEGRADATIONS, Failure, Inapplicable, failed_rules, failures, unavailable
from gsil_bench.errors import UserError
from gsil_bench.evaluation.learned_metrics import EmbeddingF1, matching_f1
from gsil_bench.evaluation.scoring import check_canaries
from gsil_bench.tasks import summarization, text_measures
from gsil_bench.tasks.summarization import (
    ROUGE,
    ROUGE_FINISHED,
    ROUGE_FIRST_STOP,
    ROUGE_NO_REPEATS,
    ROUGE_POST_PROCESSED,
    VARIANTS,
    file_task,
    score_summary,
)
from gsil_bench.tasks.task import Item, ScoringResources, Task
from gsil_bench.tasks.text_measures import (
    LearnedMetric,
    copied_share,
    cut_at_first_stop,
    drop_repeats,
    drop_unfinished,
    first_paragraph,
    is_finished,
    longest_copy,
    post_processed,
    repeated_share,
    rouge,
    rouge_l,
    sentences,
    words,
)

TASKS = (ROUGE, ROUGE_FIRST_STOP, ROUGE_NO_REPEATS, ROUGE_FINISHED, ROUGE_POST_PROCESSED)
RESOURCES = ScoringResources()
ROOT = Path(__file__).parent.parent

# --- sentences -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t\n", []),
        ("One.", ["One."]),
        ("no stop at all", ["no stop at all"]),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("One.  Two.\tThree.", ["One.", "Two.", "Three."]),
        # lines
        ("A title\nA sentence. Another.", ["A title", "A sentence.", "Another."]),
        ("One.\r\n\r\n  Two.", ["One.", "Two."]),
        ("1. First point.\n2. Second point.", ["1. First point.", "2. Second point."]),
        ("We take step 2. Then we stop.", ["We take step 2.", "Then we stop."]),
        # abbreviations
        ("See e.g. Smith et al. (2017) for more. It works.", ["See e.g. Smith et al. (2017) for more.", "It works."]),
        ("Models (i.e. Transformers) win. Yes.", ["Models (i.e. Transformers) win.", "Yes."]),
        ("Dr. Who met Mr. Smith vs. Jones. They spoke.", ["Dr. Who met Mr. Smith vs. Jones.", "They spoke."]),
        ("As Fig. 3 and Eq. 2 show. Done.", ["As Fig. 3 and Eq. 2 show.", "Done."]),
        ("See No. 5. No. It is not.", ["See No. 5.", "No.", "It is not."]),
        ("Cats, dogs, etc. We like them.", ["Cats, dogs, etc.", "We like them."]),
        ("Cats, dogs, etc. are fine.", ["Cats, dogs, etc. are fine."]),
        ("J. R. Smith wrote it. K.-R. Mueller read it.", ["J. R. Smith wrote it.", "K.-R. Mueller read it."]),
        ("In the U.S. Congress it passed. Then it failed.", ["In the U.S. Congress it passed.", "Then it failed."]),
        ("She has a Ph.D. Nobody else has.", ["She has a Ph.D. Nobody else has."]),  # may be either: no end
        # decimals and versions
        ("It gains 0.5 points. Then 1.25.", ["It gains 0.5 points.", "Then 1.25."]),
        ("Use v1.0. 3 people did.", ["Use v1.0.", "3 people did."]),
        ("Read example.com today. Good.", ["Read example.com today.", "Good."]),
        # quotes and brackets
        ('He said "Go." Then he left.', ['He said "Go."', "Then he left."]),
        ("He said \u201cGo!\u201d \u201cWhy?\u201d she asked.", ["He said \u201cGo!\u201d", "\u201cWhy?\u201d she asked."]),
        ("It works. (It really does.) Good.", ["It works.", "(It really does.)", "Good."]),
        ("**Bold.** Plain.", ["**Bold.**", "Plain."]),
        # ellipses and several stops
        ("Wait... what? Yes... No.", ["Wait... what?", "Yes...", "No."]),
        ("Wait\u2026 Then go.", ["Wait\u2026", "Then go."]),
        ("Really?! Yes!!!", ["Really?!", "Yes!!!"]),
        # lower case goes on
        ("It is fast. and cheap.", ["It is fast. and cheap."]),
        # other scripts
        ("Ça va. Élan vital. Ü ist gut.", ["Ça va.", "Élan vital.", "Ü ist gut."]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(alphabet='aB. \n?"(1)\u2026', max_size=60))
def test_no_word_is_lost_or_moved(text: str) -> None:
    assert " ".join(" ".join(sentences(text)).split()) == " ".join(text.split())


@pytest.mark.parametrize(
    "text", ["One.", "Is it?", "It is!", 'He said "Go."', "(It is.)", "Wait...", "A\nB.", "a U.S.", "Is it? No.", "x. \n"]
)
def test_finished(text: str) -> None:
    assert is_finished(text)


@pytest.mark.parametrize(
    "text", ["", " ", "One", "One,", "One. Two", "A.\nB", "by Smith et al.", "as in e.g.", "3.5", "the (end)"]
)
def test_not_finished(text: str) -> None:
    assert not is_finished(text)


@pytest.mark.parametrize("text", [".", "a. ", "Fig. 1 ", "A. ", '".', "*_", "a.\n", ".*", "\u2026x"])
def test_long_hostile_texts_come_to_an_end(text: str) -> None:
    long = text * (200_000 // len(text))
    assert "".join(sentences(long)).replace(" ", "") == long.replace(" ", "").replace("\n", "")
    is_finished(long)


def test_a_million_stops_in_a_word_come_to_an_end() -> None:
    """Time that grows with the square of the length would run into the test's time limit."""
    text = "." * 1_000_000 + "x"
    assert sentences(text) == [text]


# --- what is done to an answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("We do it. We do it well.", "We do it."),
        ("\n\nWe do it. More.", "We do it."),
        ("A title\n\nThe text. More.", "A title"),
        ("We gain 0.5 points, e.g. here. More.", "We gain 0.5 points, e.g. here."),
        ("no stop at all", "no stop at all"),
    ],
)
def test_cut_at_first_stop(text: str, expected: str) -> None:
    assert cut_at_first_stop(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("A b. C d. A b.", "A b.\nC d."),
        ("A b. A, B! C d.", "A b.\nC d."),  # the same words
        ("A b. A b. A b. A", "A b.\nA"),
        ("A b. B a.", "A b.\nB a."),
        ("a b a b a b", "a b a b a b"),
    ],
)
def test_drop_repeats(text: str, expected: str) -> None:
    assert drop_repeats(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("We do it. We do", "We do it."),
        ("We do it. We do it well.", "We do it.\nWe do it well."),
        ("We do", "We do"),
        ("A title\nWe do", "A title"),
        ("We do it. As shown by Smith et al.", "We do it."),
    ],
)
def test_drop_unfinished(text: str, expected: str) -> None:
    assert drop_unfinished(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("We do it.\nWe do more.", "We do it.\nWe do more."),  # a line break is no empty line
        ("We do it.\n\nWe do more.", "We do it."),
        ("We do it.\n \t\nWe do more.\n\nYes.", "We do it."),
        ("\n\n We do it. \n\n", "We do it."),
        ("We do it.<|im_end|>\nWe do more.", "We do it."),
        ("We do it.</s></s>\n\nMore.", "We do it."),
        ("We do it.\nUser: And then?", "We do it."),
        ("The User: field stays.", "The User: field stays."),
        ("<|end|>We do it.", ""),
    ],
)
def test_first_paragraph(text: str, expected: str) -> None:
    assert first_paragraph(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("We do it.", "We do it."),
        ("We do it. We do it. We do", "We do it."),
        ("We do it. We do more. We do it!\n\nYes.", "We do it.\nWe do more."),
        ("We do", "We do"),  # nothing would be left
        ("We do it. We do<|end|> it well.", "We do it."),  # the end mark first: then the last sentence is not finished
        ("We do\n\nit.", "We do"),
        ("We do it.\nA title\nWe do it.", "We do it."),  # repeats first: then the title is last, and not finished
    ],
)
def test_post_processed(text: str, expected: str) -> None:
    assert post_processed(text) == expected


@given(st.text(alphabet="aB. \n?", max_size=40))
def test_doing_it_twice_changes_nothing(text: str) -> None:
    for apply in (
        cut_at_first_stop,
        drop_repeats,
        first_paragraph,
    ):  # not drop_unfinished: the sentence before may be unfinished too
        assert apply(apply(text)) == apply(text)


# --- ROUGE ---------------------------------------------------------------------------------------------------------------------


def test_rouge_of_one_sentence() -> None:
    """Candidate: the cat sat on the mat; reference: the cat lay on the mat. Six words each.

    Unigrams: the x2, cat, on, mat = 5 of 6. Bigrams: the-cat, on-the, the-mat = 3 of 5. Longest common subsequence: the cat on
    the mat = 5 of 6. Precision equals recall, so F1 is that.
    """
    found = rouge("The cat sat on the mat.", ["the cat lay on the mat"])
    assert found.rouge1 == pytest.approx(5 / 6)
    assert found.rouge2 == pytest.approx(3 / 5)
    assert found.rougeL == pytest.approx(5 / 6)
    assert found.rougeLsum == pytest.approx(5 / 6)


def test_rouge_of_different_lengths() -> None:
    """Candidate: red fox; reference: a quick red fox ran off. Unigrams 2 of 2 and 2 of 6: F1 = 2 * 1 * (1/3) / (4/3) = 1/2.
    Bigrams 1 of 1 and 1 of 5: F1 = 2 * (1/5) / (6/5) = 1/3.
    """
    found = rouge("red fox", ["a quick red fox ran off"])
    assert (found.rouge1, found.rouge2, found.rougeL) == pytest.approx((1 / 2, 1 / 3, 1 / 2))


def test_order_of_sentences_matters_to_rouge_l_only() -> None:
    """Two sentences of 3 and 2 words in swapped order. Longest common subsequence of the whole: 3 of 5. Sentence by sentence
    every word is found: 1. Bigrams: ab, bc, de = 3 of 4. The stops alone make the sentences: there is no line break.
    """
    found = rouge("Dd ee. Aa bb cc.", ["Aa bb cc. Dd ee."])
    assert (found.rouge1, found.rouge2, found.rougeL, found.rougeLsum) == pytest.approx((1, 3 / 4, 3 / 5, 1))
    assert rouge("Dd ee.\nAa bb cc.", ["Aa bb cc.\nDd ee."]) == found
    # Of one sentence, the two of the candidate find their words each; read as one, it would have 3 of 5.
    assert rouge("Dd ee. Aa bb cc.", ["Aa bb cc dd ee."]).rougeLsum == 1


def test_words_are_stemmed_and_hyphens_separate() -> None:
    """Training and trained both become train; "self-play" is two words. Candidate: 3 words, reference: 3 words, all the same."""
    assert rouge("Trained self-play", ["training SELF play!"]).rougeL == 1
    assert rouge("cats", ["cat"]).rougeL == 1
    assert rouge("run", ["ran"]).rougeL == 0


def test_each_measure_takes_its_best_reference() -> None:
    """Candidate: a b c d. The first reference, d c b a, has all words (ROUGE-1 = 1), no bigram, a subsequence of 1 (1/4). The
    second, a b x y, has 2 of 4 words, 1 of 3 bigrams, a subsequence of 2 (1/2).
    """
    found = rouge("a b c d", ["d c b a", "a b x y"])
    assert (found.rouge1, found.rouge2, found.rougeL, found.best) == pytest.approx((1, 1 / 3, 1 / 2, 1))
    assert rouge("a", ["a", "a"]).best == 0


@pytest.mark.parametrize("text", ["", " \n", "...", "\u6a21\u578b"])
def test_rouge_without_words_is_zero(text: str) -> None:
    assert rouge(text, ["a model"]).rougeL == 0.0


@given(st.lists(st.sampled_from(["Alpha", "beta.", "Gamma", "gamma?", "\n", "e.g.", "delta-epsilon"]), min_size=1, max_size=12))
def test_a_text_is_its_own_best_summary(tokens: list[str]) -> None:
    text = " ".join(["start", *tokens])
    found = rouge(text, ["other", text])
    assert (found.rouge1, found.rougeL, found.rougeLsum, found.best) == (1.0, 1.0, 1.0, 1)


def test_rouge_equals_rouge_scores_own_choice() -> None:
    """The same numbers as `RougeScorer.score_multi` gives for texts of a sentence per line."""
    from rouge_score.rouge_scorer import RougeScorer

    references = ["We propose a method.\nIt learns quickly.", "A method that learns.", "Something else entirely."]
    text = "A quick method is proposed.\nIt learns something."
    expected = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True).score_multi(references, text)
    found = rouge(text, references)
    assert {name: getattr(found, name) for name in expected} == {name: score.fmeasure for name, score in expected.items()}


def test_rouge_l_without_a_library() -> None:
    """the cat sat on the mat / the cat lay on the mat: a common subsequence of 5 words, 6 words each: 10/12. red fox / a quick
    red fox ran off: 2 of 2 and 6 words: 4/8. Words are not stemmed: cats and cat differ. a b c d / d c b a: one word, 2/8.
    """
    assert rouge_l("The cat sat on the mat.", "the cat lay on the mat") == pytest.approx(5 / 6)
    assert rouge_l("red fox", "a quick red fox ran off") == 0.5
    assert rouge_l("cats", "cat") == 0.0
    assert rouge_l("a b c d", "d c b a") == 0.25
    assert (rouge_l("", "a"), rouge_l("a", ""), rouge_l("a", "A!")) == (0.0, 0.0, 1.0)


@given(*[st.lists(st.sampled_from("abcde"), min_size=1, max_size=12).map(" ".join)] * 2)
def test_rouge_l_is_what_rouge_score_says_without_its_stemmer(text: str, reference: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(["rougeL"], use_stemmer=False).score(reference, text)["rougeL"].fmeasure
    assert rouge_l(text, reference) == pytest.approx(expected)


def test_missing_package_is_one_line_and_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    text_measures._scorer.cache_clear()
    with pytest.raises(UserError, match="ROUGE needs rouge_score: pip install rouge_score") as error:
        ROUGE.score([item("a b", ["a"])], [("a",)], RESOURCES)
    assert "\n" not in str(error.value)


# --- the other measures --------------------------------------------------------------------------------------------------------


def test_words() -> None:
    assert words("The U.S., self-play; naïve_text: 3.5\n") == ["the", "u", "s", "self", "play", "naïve", "text", "3", "5"]


def test_repeated_share() -> None:
    """a b c a b c a: trigrams abc bca cab abc bca, 3 of 5 are different; 4-grams abca bcab cabc abca, 3 of 4."""
    text = "A b c. A b c. A"
    assert repeated_share(text, 3) == pytest.approx(2 / 5)
    assert repeated_share(text, 4) == pytest.approx(1 / 4)
    assert repeated_share("a b", 3) == 0.0
    assert repeated_share("", 3) == 0.0
    assert repeated_share("a " * 100, 3) == pytest.approx(97 / 98)  # 98 trigrams, one kind


def test_copies() -> None:
    """x b c d y c d e f: trigrams xbc bcd cdy dyc ycd cde def; the document a b c d e f g has bcd, cde, def = 3 of 7. 4-grams: of
    xbcd bcdy cdyc dycd ycde cdef it has cdef = 1 of 6. The longest shared run is c d e f.
    """
    text, document = "x b c d y c d e f", "A b c. D e f g."
    assert copied_share(text, document, 3) == pytest.approx(3 / 7)
    assert copied_share(text, document, 4) == pytest.approx(1 / 6)
    assert longest_copy(text, document) == 4
    assert longest_copy("a a a", "a a b a") == 2
    assert (copied_share("a b", document, 3), longest_copy("", document), longest_copy("x y", document)) == (0.0, 0, 0)


def test_details_of_a_score() -> None:
    """b c d e f: 5 words against "b c x", 3 words. Two words in common: precision 2/5, recall 2/3, F1 = 1/2."""
    score = score_summary("B c. D e f", {"document": "a b c d e f g", "summaries": ["y z", "b c x"]})
    assert score.value == pytest.approx(1 / 2)
    assert score.reason == "ROUGE-L 0.500 against summary 2 of 2"
    assert score.details == {
        "rouge1": pytest.approx(1 / 2),
        "rouge2": pytest.approx(1 / 3),  # bc is 1 of 4 and 1 of 2
        "rougeL": pytest.approx(1 / 2),
        "rougeLsum": pytest.approx(1 / 2),
        "length_ratio": pytest.approx(5 / 3),
        "repeated_3": 0.0,
        "copied_3": 1.0,
        "repeated_4": 0.0,
        "copied_4": 1.0,
        "longest_copy": 5,
        "finished": False,
        "empty": False,
    }
    json.dumps(score.details)


def test_an_empty_answer() -> None:
    score = score_summary(" ", {"document": "a b", "summaries": ["a"]})
    assert (score.value, score.reason, score.details["empty"], score.details["finished"]) == (0.0, "an empty answer", True, False)


@given(st.text(max_size=200))
def test_any_text_gets_a_score(text: str) -> None:
    for task in TASKS:
        value = task.score([item("Aa bb cc. Dd.", ["aa bb", "dd"])], [(text,)], RESOURCES)[0].value
        assert value is not None and 0.0 <= value <= 1.0


# --- the tasks -----------------------------------------------------------------------------------------------------------------


def item(document: str, summaries: list[str]) -> Item:
    return Item("0", (document,), reference={"document": document, "summaries": summaries})


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_task_record(task: summarization.Summarization) -> None:
    assert isinstance(task, Task)
    assert (task.metric, task.best, task.worst, task.runs_code) == ("ROUGE-L", 1.0, 0.0, False)
    assert task.protocol.name == task.name
    assert (task.protocol.max_new_tokens, task.protocol.temperature, task.protocol.samples) == (128, 0.0, 1)
    assert set(task.protocol.data) == {"scitldr/train.jsonl", "scitldr/dev.jsonl", "scitldr/test.jsonl"}
    assert task.summary and "\n" not in task.summary


def test_protocols_differ_in_scoring_only() -> None:
    assert len({task.name for task in TASKS}) == len({task.protocol.extraction for task in TASKS}) == len(TASKS)
    alike = [replace(task.protocol, name="", extraction="") for task in TASKS]
    assert alike == [alike[0]] * len(TASKS)
    assert [task.name for task in TASKS] == [f"summarization/{variant}" for variant in VARIANTS]


def test_one_answer_under_every_protocol() -> None:
    """The answer has 10 words: a b, a b, c d, c d e f; the reference is a b c d.

    Whole: subsequence a b c d, precision 4/10, recall 1, F1 = 8/14. First stop: a b, precision 1, recall 1/2, F1 = 2/3. Without
    repeats: 8 words, F1 = 8/12. Finished: a b a b c d, 4 of 6, F1 = 8/10. Without repeats and then finished: a b c d, 1.
    """
    wanted = {"rouge": 8 / 14, "rouge-first-stop": 2 / 3, "rouge-no-repeats": 2 / 3, "rouge-finished": 4 / 5}
    wanted["rouge-post-processed"] = 1.0
    for task in TASKS:
        score = task.score([item("x", ["A b c d"])], [("A b. A b. C d. C d e f",)], RESOURCES)[0]
        assert score.value == pytest.approx(wanted[task.name.partition("/")[2]]), task.name


def test_answers_must_match_the_items() -> None:
    with pytest.raises(ValueError, match="zip"):
        ROUGE.score([item("x", ["a"])], [], RESOURCES)


def test_no_torch() -> None:
    code = "import sys, gsil_bench.tasks.summarization; print({'torch', 'rouge_score', 'nltk'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@dataclass(frozen=True)
class Counting:
    """A learned metric that counts letters."""

    identity: str = "letters-v1"

    def score(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        return [len(text) + len(several) / 10 for text, several in zip(candidates, references, strict=True)]


def test_a_learned_metric_sees_what_is_scored() -> None:
    metric: LearnedMetric = Counting()
    resources = ScoringResources(learned=metric)
    details = ROUGE_FIRST_STOP.score([item("x", ["a", "b"])], [("One. Two.",)], resources)[0].details
    assert (details["learned"], details["learned_metric"]) == (4.2, "letters-v1")
    assert "learned" not in ROUGE.score([item("x", ["a"])], [("One.",)], RESOURCES)[0].details


# --- files ---------------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"document": "  A long text.\nOf two lines.  ", "summaries": [" Two lines. A text", "A text."], "id": "first"},
    {"document": "Braces {document} stay.", "summaries": ["Braces."], "more": 1},
]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_file(tmp_path: Path) -> None:
    task = file_task(write(tmp_path / "my texts!.jsonl", ROWS))
    assert isinstance(task, Task)
    assert task.name == "summarization-my-texts-/rouge"
    assert task.protocol.name == "summarization-file/rouge"
    assert task.protocol.max_new_tokens == 256
    assert list(task.protocol.data) == ["my texts!.jsonl"]
    first, second = task.items("test", None)
    assert first.turns == ("Write a short summary of this text.\n\nA long text.\nOf two lines.",)
    assert first.reference == {"document": "A long text.\nOf two lines.", "summaries": ["Two lines. A text", "A text."]}
    assert (first.gold, first.published_id, second.published_id) == (("Two lines. A text",), "first", "1")
    assert second.turns[0].endswith("Braces {document} stay.")
    check_canaries(task, [first, second], RESOURCES)
    assert task.items("train", None) == []
    with pytest.raises(UserError, match="unknown split of summarization 'tests': did you mean 'test'"):
        task.items("tests", None)  # type: ignore[arg-type]


def test_gold_is_what_the_protocol_leaves_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", ROWS)
    ids = set()
    for variant, gold in (
        ("rouge-first-stop", "A text."),
        ("rouge-finished", "A text."),
        ("rouge-no-repeats", "Two lines. A text"),
    ):
        task = file_task(path, variant)
        items = task.items("test", None)
        assert items[0].gold == (gold,)
        check_canaries(task, items, RESOURCES)
        ids.add(items[0].id)
    assert len(ids) == 1  # answers can be scored under another protocol
    only = write(tmp_path / "two.jsonl", [{"document": "x", "summaries": ["One. Two."]}])
    assert file_task(only, "rouge-first-stop").items("test", None)[0].gold == ()


def test_folder_of_splits(tmp_path: Path) -> None:
    write(tmp_path / "set/train.jsonl", ROWS)
    write(tmp_path / "set/test.jsonl", ROWS[:1])
    task = file_task(tmp_path / "set")
    assert (len(task.items("train", None)), len(task.items("test", None))) == (2, 1)
    assert list(task.protocol.data) == ["train.jsonl", "test.jsonl"]
    with pytest.raises(UserError, match=r"no dev split beside .*train.jsonl, .*test.jsonl: give a folder that holds dev.jsonl$"):
        task.items("dev", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], '"document" must be a text'),
        ({"summaries": ["a"]}, '"document" must be a text'),
        ({"document": " ", "summaries": ["a"]}, '"document" must be a text'),
        ({"document": "a"}, '"summaries" must be a list'),
        ({"document": "a", "summaries": "a"}, '"summaries" must be a list'),
        ({"document": "a", "summaries": []}, '"summaries" must be a list'),
        ({"document": "a", "summaries": [1]}, '"summaries" must be a list'),
        ({"document": "a", "summaries": ["a", "\u6a21\u578b"]}, "no word in a-z or 0-9"),
        (ROWS[0], r"bad.jsonl:2 repeats .*bad.jsonl:1"),
    ],
)
def test_bad_rows(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=message) as error:
        file_task(path).items("test", None)
    assert "bad.jsonl:2" in str(error.value) and "\n" not in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file or folder"):
        file_task(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has none of train"):
        file_task(tmp_path)
    with pytest.raises(UserError, match="did you mean 'rouge-finished'"):
        file_task(write(tmp_path / "a.jsonl", ROWS), "rouge-finish")
    for content, message in ((b"", "has no rows"), (b"{", ":1: not JSON"), (b"\xff", "cannot be read")):
        (tmp_path / "b.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            file_task(tmp_path / "b.jsonl").items("test", None)
    (tmp_path / "c.jsonl").write_text('{"document": "\\ud800", "summaries": ["a"]}')
    with pytest.raises(UserError, match="surrogate"):
        file_task(tmp_path / "c.jsonl").items("test", None)


# --- SciTLDR -------------------------------------------------------------------------------------------------------------------


def test_unknown_split() -> None:
    with pytest.raises(UserError, match="unknown split of summarization 'tests': did you mean 'test'"):
        ROUGE.items("tests", None)  # type: ignore[arg-type]


def test_wrong_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "scitldr/test.jsonl", ROWS)
    with pytest.raises(UserError, match="is not the pinned scitldr-test"):
        ROUGE.items("test", tmp_path)


def test_sources_are_listed() -> None:
    assert {"scitldr-train", "scitldr-dev", "scitldr-test"} <= set(sources.SOURCES)


@pytest.mark.data
def test_real_canaries(data_dir: Path) -> None:
    for task in TASKS:
        items = task.items("test", data_dir)
        assert len(items) == len({item.id for item in items}) == 618
        assert all(item.gold for item in items)
        check_canaries(task, items, RESOURCES)
    assert [task.items("test", data_dir)[5].id for task in TASKS] == [items[5].id] * len(TASKS)


@pytest.mark.data
def test_real_gold_gets_full_marks(data_dir: Path) -> None:
    items = ROUGE.items("dev", data_dir)
    assert len(items) == 619
    assert {score.value for score in ROUGE.score(items, [item.gold for item in items], RESOURCES)} == {1.0}


@pytest.mark.data
def test_real_train(data_dir: Path) -> None:
    """1,992 rows, one of them twice."""
    items = ROUGE.items("train", data_dir)
    assert len(items) == len({item.id for item in items}) == 1991
    assert items[0].turns[0].startswith("Say in one short sentence what this paper contributes.\n\n")
    assert not any("\n" in item.reference["document"] for item in items)
    assert all(item.gold == (item.reference["summaries"][0],) for item in items)


@pytest.mark.data
def test_real_answers_to_other_documents_score_low(data_dir: Path) -> None:
    items = ROUGE.items("test", data_dir)[:120]
    shifted = [item.gold for item in [*items[1:], items[0]]]
    values = [score.value or 0.0 for score in ROUGE.score(items, shifted, RESOURCES)]
    assert 0.05 < sum(values) / len(values) < 0.25  # "we propose a" is common to many


@pytest.mark.data
def test_real_sentences(data_dir: Path) -> None:
    """SciTLDR's documents are split already; joined and split again, most are as they were. Many others have torn lines."""
    rows = [json.loads(line) for line in (data_dir / "scitldr/test.jsonl").open(encoding="utf-8")]
    original = [[" ".join(text.split()) for text in row["source"] if text.strip()] for row in rows]
    same = sum(sentences(" ".join(source)) == source for source in original)
    assert same / len(rows) > 0.8


# --- learned metrics -----------------------------------------------------------------------------------------------------------


def test_matching_by_hand() -> None:
    """Candidate tokens (1, 0), (0, 1); reference tokens (1, 0), (0.6, 0.8), (0, -1).

    Cosines: 1, 0.6, 0 and 0, 0.8, -1. Precision: (1 + 0.8) / 2 = 0.9. Recall: (1 + 0.8 + 0) / 3 = 0.6. F1 = 1.08 / 1.5 = 0.72.
    """
    candidate = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    reference = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    assert matching_f1(candidate, reference) == pytest.approx(0.72)
    assert matching_f1(candidate, candidate[:0]) == matching_f1(candidate[:0], candidate) == 0.0
    assert matching_f1(candidate[:1], -candidate[:1]) == 0.0


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 10 words, whose texts are [CLS] words [SEP]; its context holds 8 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "bert"
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdef"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=10, max_position_embeddings=8, initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(left * right for left, right in zip(one, other, strict=True))


def by_loops(folder: Path, candidate: str, reference: str, specials: Sequence[int]) -> float:
    """The same F1 from the definition: one text at a time, no padding, cosines in Python's floats."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in (candidate, reference):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0].tolist()
        vectors.append([state for state, id in zip(states, ids, strict=True) if id not in specials])
    cosines = [[dot(one, other) / math.sqrt(dot(one, one) * dot(other, other)) for other in vectors[1]] for one in vectors[0]]
    precision = sum(max(row) for row in cosines) / len(cosines)
    recall = sum(max(column) for column in zip(*cosines, strict=True)) / len(cosines[0])
    return 2 * precision * recall / (precision + recall)


def test_embedding_f1_of_a_bert(tiny_bert: Path) -> None:
    metric = EmbeddingF1(tiny_bert, batch_size=3)
    candidates = ["a b c", "d", "a b", "f f f f", "c"]
    references = [["a c"], ["e f a b c d", "b"], ["a b"], ["a"], ["b", "a", "d e"]]
    expected = [
        max(by_loops(tiny_bert, candidate, reference, (1, 2)) for reference in several)
        for candidate, several in zip(candidates, references, strict=True)
    ]
    assert metric.score(candidates, references) == pytest.approx(expected, abs=1e-5)
    assert expected[2] == pytest.approx(1.0)
    assert len({round(value, 3) for value in expected}) == 5


def test_embedding_f1_of_a_llama(tiny_model: Path) -> None:
    metric = EmbeddingF1(tiny_model)
    assert metric.score(["two plus two"], [["three plus two is five"]]) == pytest.approx(
        [by_loops(tiny_model, "two plus two", "three plus two is five", ())], abs=1e-5
    )


def test_embedding_f1_without_words_or_with_too_many(tiny_bert: Path) -> None:
    metric = EmbeddingF1(tiny_bert)
    assert metric.score(["", "a"], [["a"], [""]]) == [0.0, 0.0]
    assert metric.score([], []) == []
    # Eight tokens with [CLS] and [SEP]: six words count.
    assert metric.score(["a b c d e f a a a"], [["a b c d e f b"]]) == pytest.approx([1.0])


def test_identity_names_weights_and_length(tiny_bert: Path, tiny_model: Path) -> None:
    identity = EmbeddingF1(tiny_bert).identity
    assert identity.startswith("embedding-f1-v1:") and identity.endswith(":8")
    assert identity == EmbeddingF1(tiny_bert, batch_size=1).identity
    assert identity != EmbeddingF1(tiny_model).identity
    metric: LearnedMetric = EmbeddingF1(tiny_bert)
    assert metric.identity == identity


def test_learned_metric_bad_input(tmp_path: Path, tiny_bert: Path) -> None:
    from transformers import T5Config, T5Model

    with pytest.raises(UserError, match="has no config"):
        EmbeddingF1(tmp_path).score(["a"], [["a"]])
    with pytest.raises(UserError, match="there is none for 'a'"):
        EmbeddingF1(tiny_bert).score(["a"], [[]])
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8, "vocab_size": 10}
    T5Model(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "t5" / name).write_bytes((tiny_bert / name).read_bytes())
    with pytest.raises(UserError, match="encoder-decoder"):
        EmbeddingF1(tmp_path / "t5").score(["a"], [["a"]])


# --- made failures -------------------------------------------------------------------------------------------------------------

SUMMARY = "We propose a fast method. It learns from 3.5 examples."
DOCUMENT = "Learning is slow. Many examples are needed by all known methods. We show another way. It is quick and needs few."
OTHERS = [SUMMARY, "Cats sleep all day.", "", "Graphs are drawn nicely."]


def degrade(name: str, seed: int = 0, summary: str = SUMMARY, document: str = DOCUMENT, others: Sequence[str] = OTHERS) -> str:
    return DEGRADATIONS[name](summary, document, others, np.random.default_rng(seed))


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_degradations_are_deterministic_and_change_the_text(name: str) -> None:
    texts = [degrade(name, seed) for seed in range(20)]
    assert texts == [degrade(name, seed) for seed in range(20)]
    assert SUMMARY not in texts
    assert len(set(texts)) > 1 or name in ("without-end", "empty")


@pytest.mark.parametrize("seed", range(20))
def test_what_each_degradation_makes(seed: int) -> None:
    run_on = degrade("run-on", seed)
    assert run_on.startswith(SUMMARY + " ")
    assert all(sentence in DOCUMENT for sentence in sentences(run_on[len(SUMMARY) :]))
    assert len(words(run_on)) >= 2 * len(words(SUMMARY))  # the document has more words than the summary
    truncated = degrade("truncated", seed)
    assert SUMMARY.startswith(truncated) and truncated and not is_finished(truncated)
    repeated = degrade("repeated", seed)
    counts = [repeated.count(sentence) for sentence in sentences(SUMMARY)]
    assert sorted(counts)[0] == 1 and sorted(counts)[1] in (3, 4, 5)
    assert drop_repeats(repeated) == "\n".join(sentences(SUMMARY))
    copied = degrade("copied", seed)
    assert all(sentence in DOCUMENT for sentence in sentences(copied)) and len(words(copied)) >= len(words(SUMMARY))
    assert degrade("off-topic", seed) in OTHERS[1:] and degrade("off-topic", seed)
    assert sorted(degrade("shuffled", seed).split()) == sorted(SUMMARY.split())
    assert degrade("truncated", seed, summary="Two words.") == "Two"


def test_missing_end_and_empty() -> None:
    assert degrade("without-end") == "We propose a fast method. It learns from 3.5 examples"
    assert degrade("without-end", summary='He said "Go!"') == 'He said "Go'
    assert degrade("empty") == ""


def test_a_passage_goes_round_the_end_of_a_short_document() -> None:
    """The document has fewer words than the summary: all of it is taken, whatever the start."""
    for seed in range(5):
        assert sorted(sentences(degrade("copied", seed, document="Aa bb. Cc dd."))) == ["Aa bb.", "Cc dd."]


@pytest.mark.parametrize(
    ("name", "summary", "document", "others"),
    [
        ("run-on", SUMMARY, " ", OTHERS),
        ("truncated", "Word.", DOCUMENT, OTHERS),
        ("truncated", "... word", DOCUMENT, OTHERS),
        ("without-end", "A title (of a paper)", DOCUMENT, OTHERS),
        ("without-end", "...", DOCUMENT, OTHERS),
        ("repeated", " ", DOCUMENT, OTHERS),
        ("copied", "Aa bb.", "Aa bb.", OTHERS),
        ("off-topic", SUMMARY, DOCUMENT, [SUMMARY, " we propose a fast method; it learns from 3.5 examples", ""]),
        ("off-topic", SUMMARY, DOCUMENT, []),
        ("shuffled", "no no no", DOCUMENT, OTHERS),
        ("empty", " ", DOCUMENT, OTHERS),
    ],
)
def test_what_cannot_be_made_is_said(name: str, summary: str, document: str, others: Sequence[str]) -> None:
    with pytest.raises(Inapplicable):
        degrade(name, 0, summary, document, others)


def test_one_failure_of_each_class() -> None:
    made = failures(SUMMARY, DOCUMENT, OTHERS, seed=3)
    assert tuple(made) == CLASSES == (*DEGRADATIONS, "missing-end")
    assert made == failures(SUMMARY, DOCUMENT, OTHERS, seed=3) != failures(SUMMARY, DOCUMENT, OTHERS, seed=4)
    # The summary itself, ended, is the only answer that is no failure.
    assert all(failure is not None and failure != Failure(SUMMARY, ended=True) for failure in made.values())
    assert made["missing-end"] == Failure(SUMMARY, ended=False)
    assert [name for name, failure in made.items() if failure and not failure.ended] == ["run-on", "missing-end"]


def test_a_class_is_drawn_alone() -> None:
    """What others there are matters to off-topic, and to nothing else."""
    some, more = failures(SUMMARY, DOCUMENT, OTHERS, 0), failures(SUMMARY, DOCUMENT, [], 0)
    assert more["off-topic"] is None
    assert {name: failure for name, failure in some.items() if name != "off-topic"} == {
        name: failure for name, failure in more.items() if name != "off-topic"
    }


def test_what_cannot_be_made_is_counted_and_never_the_summary() -> None:
    """One word without a stop: not cut, not shuffled, no stop to lose. The second has all but another summary."""
    one, two = failures("Word", DOCUMENT, OTHERS, 0), failures("Two words.", DOCUMENT, ["two words"], 0)
    assert [name for name, failure in one.items() if failure is None] == ["truncated", "without-end", "shuffled"]
    assert unavailable([one, two]) == dict.fromkeys(CLASSES, 0) | {
        "truncated": 1, "without-end": 1, "shuffled": 1, "off-topic": 1,
    }  # fmt: skip
    assert unavailable([]) == {}


def test_white_space_alone_is_no_failure() -> None:
    with pytest.raises(Inapplicable):
        degrade("copied", 0, "Aa  bb.", "Aa bb.")


@pytest.mark.parametrize(
    ("answer", "ended", "expected"),
    [
        ("A method is shown.", True, ()),
        ("A method is shown.", False, ("missing-end",)),
        ("A method is shown", True, ("without-end",)),
        ("A method is shown. A method is shown.", True, ("repeated",)),
        ("The red fox runs.", True, ("copied",)),
        ("A method is shown. The red fox runs! The", False, ("without-end", "copied", "missing-end")),
        ("The red fox", True, ("without-end",)),  # part of a sentence is no copied one
        ("", True, ("empty",)),
        (" ", False, ("empty", "missing-end")),
        ("A method is shown.\n\nYes, it is.", True, ("markup",)),
    ],
)
def test_rules_that_an_answer_fails(answer: str, ended: bool, expected: tuple[str, ...]) -> None:
    assert failed_rules(answer, ended, "The red fox runs. It is quick.") == expected


def test_measures_see_the_failures() -> None:
    """Each failure lowers ROUGE-L of the summary against itself, and the measure made for it tells it from the others."""
    reference = {"document": DOCUMENT, "summaries": [SUMMARY]}
    found = {name: score_summary(degrade(name), reference) for name in DEGRADATIONS}
    full = score_summary(SUMMARY, reference)
    assert full.value == 1.0
    assert all((score.value or 0.0) < 1.0 for name, score in found.items() if name != "without-end")
    assert found["run-on"].details["length_ratio"] >= 2
    assert found["truncated"].details["length_ratio"] < 1
    assert not found["without-end"].details["finished"] and not found["truncated"].details["finished"]
    assert found["repeated"].details["repeated_3"] > 0.3 > full.details["repeated_3"]
    assert found["copied"].details["copied_4"] > 0.7 > 0.1 > full.details["copied_4"]  # less than 1 where it goes round the end
    assert (found["off-topic"].value or 0.0) < 0.2
    assert found["shuffled"].details["rouge1"] == 1.0
    assert found["empty"].details["empty"] and found["empty"].value == 0.0
