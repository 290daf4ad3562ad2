"""Reading demonstrations: every row shape, every way a file can be wrong, splitting and lengths."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsil_bench.data.chat import ChatFormat
from gsil_bench.data.demonstrations import (
    Counts,
    check_lengths,
    from_items,
    read_demonstrations,
    split_held_out,
)
from gsil_bench.errors import UserError
from gsil_bench.records import Demonstration, Encoded, Message
from gsil_bench.tasks.task import Item

DATA = Path(os.environ.get("GSIL_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"no data in {DATA} (set GSIL_BENCH_DATA)")

ASKED = ({"role": "user", "content": "2 + 2?"},)
CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
WRONG = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}]


def write(folder: Path, *rows: Any, name: str = "mine.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, *rows: Any, fields: dict[str, str] | None = None) -> list[Demonstration]:
    return read_demonstrations(write(folder, *rows), fields or {})[0]


# Shapes.


@pytest.mark.parametrize(
    ("row", "rejected"),
    [
        ({"messages": CHAT}, None),
        ({"prompt": "2 + 2?", "completion": "4"}, None),
        ({"prompt": CHAT[:1], "completion": "4"}, None),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, None),
        ({"question": "2 + 2?", "answer": "4"}, None),
        ({"instruction": "2 + 2?", "output": "4"}, None),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, None),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, "5"),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": WRONG[1:]}, "5"),
        ({"prompt": "2 + 2?", "chosen": CHAT, "rejected": WRONG, "messages": CHAT}, "5"),
        ({"chosen": CHAT, "rejected": WRONG}, "5"),
        ({"prompt": "2 + 2?", "chosen": "4"}, None),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": " "}, None),
    ],
)
def test_all_shapes_give_the_same_demonstration(tmp_path: Path, row: dict[str, Any], rejected: str | None) -> None:
    (found,) = read(tmp_path, row)

    assert (found.messages, found.answer, found.rejected) == (ASKED, "4", rejected)
    assert found.where == f"{tmp_path}/mine.jsonl:1"


def test_shapes_may_be_mixed_in_a_file(tmp_path: Path) -> None:
    found = read(tmp_path, {"question": "a", "answer": "b"}, {"messages": CHAT}, {"prompt": "c", "completion": "d"})

    assert [one.answer for one in found] == ["b", "4", "d"]


def test_an_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"instruction": "Spell it.", "input": "freind", "output": "friend"})

    assert found.messages[0]["content"] == "Spell it.\n\nfreind"


def test_system_messages_and_earlier_turns_are_kept_and_other_keys_dropped(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [system, *CHAT, {"role": "user", "content": "And 3 + 3?", "date": "today"}]
    (found,) = read(tmp_path, {"messages": [*turns, {"role": "assistant", "content": "6", "name": "x"}]})

    assert found.messages == (system, *CHAT, {"role": "user", "content": "And 3 + 3?"})
    assert found.answer == "6"


def test_fields_map_anything_else(tmp_path: Path) -> None:
    row = {"source": "2 + 2?", "target": "4", "answer": "x"}
    (found,) = read(tmp_path, row, fields={"prompt": "source", "completion": "target"})

    assert (found.messages, found.answer) == (ASKED, "4")


def test_the_id_names_the_content_and_not_the_shape_or_the_place(tmp_path: Path) -> None:
    first = read(tmp_path, {"messages": CHAT})[0].id
    second = read(tmp_path, {"question": "other", "answer": "x"}, {"question": "2 + 2?", "answer": "4"})

    assert second[1].id == first != second[0].id


# What is left out.


def test_duplicates_and_empty_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": answer} for answer in ("1", "1", " \n", "2", "1", "")]
    found, counts = read_demonstrations(write(tmp_path, *rows))

    assert [one.answer for one in found] == ["1", "2"]
    assert counts == Counts(rows=6, kept=2, duplicates=2, empty=2)


def test_a_limit_keeps_the_first_that_are_good(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": answer} for answer in ("", "1", "1", "2", "3")]
    found, counts = read_demonstrations(write(tmp_path, *rows), limit=2)

    assert [one.answer for one in found] == ["1", "2"]
    assert counts == Counts(rows=4, kept=2, duplicates=1, empty=1)


@pytest.mark.parametrize(("rows", "message"), [([], "it is empty"), ([{"question": "a", "answer": " "}], "all 1 answers")])
def test_nothing_left_is_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=f"no demonstrations: .*{message}"):
        read(tmp_path, *rows)


# What is refused.


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "output": "b"}, "field 'completion' is missing; the row has: prompt, output"),
        ({"completion": "a"}, "field 'prompt' is missing"),
        ({"question": "a"}, "field 'answer' is missing"),
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ({"text": "a", "label": 1}, "no known shape of a demonstration; the row has: text, label"),
        ({}, "the row has: nothing"),
        ([1, 2], "a row must be an object with fields, not a list"),
        ("text", "a row must be an object with fields, not a text"),
        (None, "not null"),
        ({"prompt": 3, "completion": "b"}, "field 'prompt' must be a list of messages, not a number"),
        ({"prompt": "a", "completion": None}, "field 'completion' must be a list of messages, not null"),
        ({"question": "a", "answer": 4}, "field 'answer' must be a text, not a number"),
        ({"question": "a", "answer": "\ud800"}, "field 'answer' holds half a character"),
        ({"messages": []}, "field 'messages' is an empty list"),
        ({"messages": "a"}, "field 'messages' must be a list of messages, not a text"),
        ({"messages": ["a"]}, r"field 'messages\[0\]' must be a message with role and content, not a text"),
        ({"messages": [{"role": "user"}]}, r"field 'messages\[0\].content' is missing; the message has: role"),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"field 'messages\[0\].role' is 'tool'; known: system, user"),
        ({"messages": [{"role": "user", "content": None}]}, r"field 'messages\[0\].content' must be a text, not null"),
        ({"messages": CHAT[:1]}, "must end in an assistant's message, not user's"),
        ({"messages": CHAT[1:]}, "the message before the answer must be the user's"),
        ({"messages": [*CHAT, CHAT[1]]}, "the message before the answer must be the user's"),
        ({"prompt": "a", "completion": CHAT}, "field 'completion' must be one message"),
        ({"chosen": CHAT, "rejected": [{"role": "user", "content": "?"}, WRONG[1]]}, "answer different conversations"),
    ],
)
def test_a_wrong_row_is_refused_with_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, {"messages": CHAT}, row)

    assert str(caught.value).startswith(f"{tmp_path}/mine.jsonl:2: ")
    assert "\n" not in str(caught.value)


def test_a_mapped_field_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine.jsonl:1: field 'target' is missing; the row has: source"):
        read(tmp_path, {"source": "a"}, fields={"prompt": "source", "completion": "target"})
    with pytest.raises(UserError, match="did you mean 'prompt'"):
        read(tmp_path, {"source": "a"}, fields={"promt": "source"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a", "answer": "b"}\n\n{"question": "a" "answer": "b"}\n', r"mine.jsonl:3: column 18: not JSON"),
        (b"not json", r"mine.jsonl:1: column 1: not JSON"),
        (b'[\n {"question": "a"\n]', r"mine.jsonl:3: column 1: not JSON"),
        (b'{"question": "a", "answer": "b"}\n{"question": "\xff"}', r"mine.jsonl:2: not UTF-8 \(byte 0xff\)"),
        (b"[" * 100_000, "mine.jsonl:1: not readable as JSON"),
        (b"1" * 5_000, "mine.jsonl:1: not readable as JSON"),
        (b"", "it is empty"),
        (b"[]", "it is empty"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)

    with pytest.raises(UserError, match=message) as caught:
        read_demonstrations(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_offers_the_nearest_in_its_folder(tmp_path: Path) -> None:
    write(tmp_path, {"messages": CHAT}, name="train.jsonl")

    with pytest.raises(UserError, match=r"unknown file in .* 'trian.jsonl': did you mean 'train.jsonl'"):
        read_demonstrations(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="no such file, and no folder"):
        read_demonstrations(str(tmp_path / "nowhere" / "train.jsonl"))


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n")

    with pytest.raises(UserError, match=r"cannot read \.csv; known: \.jsonl, \.json, \.parquet"):
        read_demonstrations(str(tmp_path / "mine.csv"))


def test_a_limit_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1"):
        read_demonstrations(write(tmp_path, {"messages": CHAT}), limit=0)


# Sources.


def test_json_lines_may_hold_separators_that_are_no_newlines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes('\ufeff{"question": "a\u2028b", "answer": "c\u0085d"}\r\n'.encode())

    ((found,), _) = read_demonstrations(str(path))
    assert (found.messages[0]["content"], found.answer) == ("a\u2028b", "c\u0085d")


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_a_list_of_rows_names_the_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps([{"messages": CHAT}, {"question": "a"}], indent=2))

    with pytest.raises(UserError, match=rf"{name}, row 2: field 'answer' is missing"):
        read_demonstrations(str(path))


def test_parquet(tmp_path: Path) -> None:
    """Columns that a row does not have are null, as when two shapes were concatenated."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": CHAT}, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"question": "d", "answer": "e"}]
    columns = ("messages", "prompt", "chosen", "rejected", "question", "answer")
    table = pyarrow.Table.from_pylist([{column: row.get(column) for column in columns} for row in rows])
    parquet.write_table(table, tmp_path / "mine.parquet")

    found, _ = read_demonstrations(str(tmp_path / "mine.parquet"))

    assert [(one.answer, one.rejected) for one in found] == [("4", None), ("b", "c"), ("e", None)]
    assert found[1].where.endswith("mine.parquet, row 2")


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "mine.parquet").write_bytes(b"PAR1 no, it is not")

    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_demonstrations(str(tmp_path / "mine.parquet"))


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path, {"question": "a", "answer": "2"}, name="b.jsonl")
    write(tmp_path, {"question": "a", "answer": "1"}, name="a.json")
    (tmp_path / "README.md").write_text("no rows")

    assert [one.answer for one in read_demonstrations(str(tmp_path))[0]] == ["1", "2"]


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.jsonl, \.json, \.parquet files"):
        read_demonstrations(str(tmp_path))


def test_a_relative_path_is_looked_for_in_the_data_folder_as_well(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", {"messages": CHAT})

    assert read_demonstrations("sub/mine.jsonl", data_dir=tmp_path)[1].kept == 1


def test_without_the_package_a_hub_data_set_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(UserError, match=r"no such file; .* pip install 'gsil-bench\[hub\]'"):
        read_demonstrations("some-org/some-set:train")


def test_a_hub_data_set_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no network\nat all")

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)

    with pytest.raises(UserError, match="the hub cannot give some-org/some-set:test: no network at all"):
        read_demonstrations("some-org/some-set:test")


def test_a_hub_data_set_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return [{"question": "a", "answer": "b", "messages": None}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)

    found, _ = read_demonstrations("some-org/some-set:train[:10]")

    assert asked == [("some-org/some-set", "train[:10]")]
    assert (found[0].answer, found[0].where) == ("b", "some-org/some-set:train[:10], row 1")


@needs_data
def test_real_gsm8k() -> None:
    """7,473 rows in the published file; one question's answer ends in "#### 72", the first."""
    found, counts = read_demonstrations("gsm8k/train.jsonl", data_dir=DATA)

    assert counts.rows == 7473
    assert counts.kept + counts.duplicates + counts.empty == 7473
    assert found[0].answer.endswith("#### 72")
    assert len({one.id for one in found}) == len(found)


@needs_data
def test_real_instructions() -> None:
    path = DATA / "instructions" / "instruction-data.json"
    found, counts = read_demonstrations(str(path), limit=100)

    assert counts.kept == 100
    assert found[1].messages[0]["content"] == "Edit the following sentence for grammar.\n\nHe go to the park every day."


# From a task.


def test_each_turn_with_gold_is_a_demonstration() -> None:
    items = [
        Item("one", ("a?",), gold=("a!",)),
        Item("two", ("b?", "c?"), gold=("b!", "c!")),
        Item("none", ("d?",)),
        Item("again", ("a?",), gold=("a!",)),
    ]

    found = from_items(items)

    assert [([m["content"] for m in one.messages], one.answer) for one in found] == [
        (["a?"], "a!"),
        (["b?"], "b!"),
        (["b?", "b!", "c?"], "c!"),
    ]
    assert [m["role"] for m in found[2].messages] == ["user", "assistant", "user"]
    assert [one.where for one in found] == ["one", "two", "two"]


def test_a_tasks_system_message_comes_first() -> None:
    (found,) = from_items([Item("one", ("a?",), gold=("a!",))], system="Be brief.")

    assert found.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "a?"})


def test_a_task_without_gold_is_refused() -> None:
    with pytest.raises(UserError, match="gold answer"):
        from_items([Item("one", ("a?",))])


# Held out.


def demonstrations(prompts: Sequence[int]) -> list[Demonstration]:
    """One per entry; equal entries share the prompt."""
    return [
        Demonstration(f"id{index}", ({"role": "user", "content": f"prompt {prompt}"},), f"answer {index}")
        for index, prompt in enumerate(prompts)
    ]


@settings(max_examples=100, deadline=None)
@given(prompts=st.lists(st.integers(0, 30), max_size=120), at_most=st.integers(1, 20))
def test_a_split_loses_nothing_keeps_the_order_and_never_splits_a_prompt(prompts: list[int], at_most: int) -> None:
    given_ones = demonstrations(prompts)

    train, held_out = split_held_out(given_ones, share=0.1, at_most=at_most)

    order = {one.id: index for index, one in enumerate(given_ones)}
    for side in (train, held_out):
        assert [order[one.id] for one in side] == sorted(order[one.id] for one in side)
    assert {one.id for one in train} | {one.id for one in held_out} == set(order)
    assert len(train) + len(held_out) == len(given_ones)
    assert not {one.messages[0]["content"] for one in train} & {one.messages[0]["content"] for one in held_out}
    assert bool(held_out) == (len(given_ones) >= 10 and len(set(prompts)) >= 2)
    assert bool(train) == bool(given_ones)
    wanted = min(at_most, max(1, round(0.1 * len(given_ones))))
    if any(prompts.count(prompt) <= wanted for prompt in prompts):
        assert len(held_out) <= wanted


def test_the_share_is_met_where_prompts_are_distinct() -> None:
    assert len(split_held_out(demonstrations(range(10)))[1]) == 1
    assert len(split_held_out(demonstrations(range(1000)))[1]) == 100
    assert len(split_held_out(demonstrations(range(5000)))[1]) == 200
    assert split_held_out(demonstrations(range(9)))[1] == []


def test_a_split_depends_on_the_prompts_and_not_on_their_order() -> None:
    _, held_out = split_held_out(demonstrations(range(200)))
    _, reversed_held_out = split_held_out(demonstrations(range(199, -1, -1)))

    assert {one.messages[0]["content"] for one in held_out} == {one.messages[0]["content"] for one in reversed_held_out}


def test_one_more_demonstration_moves_few_to_the_other_side() -> None:
    before = {one.id for one in split_held_out(demonstrations(range(1000)))[1]}
    after = {one.id for one in split_held_out(demonstrations(range(1010)))[1]}

    assert len(before ^ after) <= 20


# Lengths.


class Letters:
    """A chat format with a token per letter, one for the prompt's end and one for the answer's."""

    def encode_many(self, conversations: Sequence[tuple[Sequence[Message], str]]) -> list[Encoded]:
        return [self.encode(messages, answer) for messages, answer in conversations]

    def encode(self, messages: Sequence[Message], answer: str) -> Encoded:
        if "!" in answer:
            raise UserError("the answer becomes the token '!'")
        return Encoded((0,) * (len(messages[-1]["content"]) + 1), (0,) * (len(answer) + 1))


def of_length(prompt: int, answer: int, rejected: int | None = None) -> Demonstration:
    """With the two end tokens of `Letters`, prompt + answer + 2 tokens."""
    worse = None if rejected is None else "r" * rejected
    where = f"mine.jsonl:{prompt}"
    return Demonstration("id", ({"role": "user", "content": "p" * prompt},), "a" * answer, worse, where)


def check(ones: list[Demonstration], context_length: int, drop: bool = False) -> tuple[list[Demonstration], int]:
    chat: Any = Letters()
    return check_lengths(ones, chat, context_length, drop)


def test_what_fits_exactly_is_kept() -> None:
    ones = [of_length(3, 5), of_length(1, 1)]

    assert check(ones, 10) == (ones, 0)


def test_what_is_longer_is_counted_and_the_first_named() -> None:
    ones = [of_length(3, 7), of_length(5, 6), of_length(7, 4), of_length(1, 1)]

    with pytest.raises(UserError, match=r"2 of 4 demonstrations .* 12 tokens; the first is mine.jsonl:5 with 13 .*drop-long"):
        check(ones, 12)
    assert check(ones, 12, drop=True) == ([ones[0], ones[3]], 2)


def test_a_rejected_answer_counts_too() -> None:
    with pytest.raises(UserError, match="with 22 tokens"):
        check([of_length(10, 2, rejected=10)], 15)


def test_none_left_is_refused_even_when_dropping() -> None:
    with pytest.raises(UserError, match="None are left"):
        check([of_length(10, 10)], 15, drop=True)


def test_a_demonstration_that_cannot_be_tokenised_is_named() -> None:
    bad = Demonstration("id", ASKED, "no!", where="mine.jsonl:9")

    with pytest.raises(UserError, match=r"^mine.jsonl:9: the answer becomes the token '!'$"):
        check([of_length(1, 1), bad], 100)


@needs_data
def test_lengths_with_a_real_tokenizer() -> None:
    from transformers import AutoTokenizer

    if not (DATA / "models" / "stories260K").is_dir():
        pytest.skip("no models/stories260K")
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(DATA / "models" / "stories260K"), "plain")
    found, _ = read_demonstrations("gsm8k/train.jsonl", data_dir=DATA, limit=50)
    texts = [f"<s>User: {one.messages[0]['content'].strip()}\nAssistant: {one.answer.strip()}</s>" for one in found]
    lengths = [len(ids) for ids in chat.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    kept, left_out = check_lengths(found, chat, 512, drop=True)

    assert [one.id for one in kept] == [one.id for one, length in zip(found, lengths, strict=True) if length <= 512]
    assert left_out == sum(length > 512 for length in lengths) > 0
