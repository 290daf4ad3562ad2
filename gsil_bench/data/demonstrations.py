"""Reading demonstrations: files, folders and hub data sets in the usual row shapes, checked where they enter.

A row may have any of these shapes, and a file may mix them:

| fields | meaning |
|---|---|
| prompt, chosen[, rejected] | preferences; each a text or a list of messages (with or without the prompt's) |
| messages | a conversation that ends in the assistant's answer |
| prompt, completion | the prompt a text or a list of messages, the completion a text or one message in a list |
| question, answer | GSM8K |
| instruction[, input], output | Alpaca; a non-empty input follows the instruction after an empty line |

Anything else is read by saying which field is which: `fields={"prompt": "source", "completion": "target"}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.records import Demonstration, Message, demonstration_id, digest

if TYPE_CHECKING:
    from gsil_bench.data.chat import ChatFormat
    from gsil_bench.tasks.task import Item

ROLES = ("system", "user", "assistant")
FIELDS = ("prompt", "completion", "chosen", "rejected", "messages")
"""What `fields` may map."""
SUFFIXES = (".jsonl", ".json", ".parquet")

_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]:%+-]+))?")
_NO_FIELDS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Counts:
    """What became of a source's rows; printed, and part of a result's provenance."""

    rows: int = 0
    """Read, up to the limit."""
    kept: int = 0
    duplicates: int = 0
    """Left out: the same prompt and answer once more."""
    empty: int = 0
    """Left out: an answer of nothing but white space."""


def read_demonstrations(
    source: str,
    fields: Mapping[str, str] = _NO_FIELDS,
    data_dir: Path | None = None,
    limit: int | None = None,
) -> tuple[list[Demonstration], Counts]:
    """Read a file (.jsonl, .json, .parquet), a folder of them in sorted order, or a data set of the Hugging Face hub.

    Args:
        source: path, from the working folder or from `data_dir`; or "org/name" or "org/name:split" on the hub.
        fields: field of a demonstration (prompt, completion, messages, …) → the row's field that holds it.
        data_dir: folder in which relative paths are looked for as well.
        limit: keep the first so many.

    Raises:
        UserError: names the file, the line and the field.
    """
    for key in fields:
        if key not in FIELDS:
            raise unknown_name("field of a demonstration", key, FIELDS)
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} demonstrations: must be at least 1")
    kept: dict[str, Demonstration] = {}
    rows = duplicates = empty = 0
    for where, row in _rows(source, data_dir):
        demonstration = _demonstration(row, where, fields)
        rows += 1
        empty += not demonstration.answer.strip()
        duplicates += demonstration.id in kept
        if demonstration.answer.strip():
            kept.setdefault(demonstration.id, demonstration)
        if len(kept) == limit:
            break
    if not kept:
        raise UserError(f"{source}: no demonstrations: " + (f"all {rows} answers are empty" if rows else "it is empty"))
    return list(kept.values()), Counts(rows, len(kept), duplicates, empty)


def from_items(items: Sequence[Item], system: str = "") -> list[Demonstration]:
    """Demonstrations from a task's gold answers: one per turn, each with the conversation before it in gold answers."""
    found: dict[str, Demonstration] = {}
    for item in items:
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for question, answer in zip(item.turns, item.gold, strict=False):  # an item may have gold for its first turns only
            messages.append({"role": "user", "content": question})
            id = demonstration_id(messages, answer)
            found.setdefault(id, Demonstration(id, tuple(messages), answer, where=item.id))
            messages.append({"role": "assistant", "content": answer})
    if not found:
        raise UserError("none of the task's items has a gold answer to demonstrate; give a file of demonstrations")
    return list(found.values())


def split_held_out(
    demonstrations: Sequence[Demonstration], share: float = 0.1, at_most: int = 200
) -> tuple[list[Demonstration], list[Demonstration]]:
    """(to train on, held out), each in the given order.

    Chosen by a hash of the prompt: a prompt's answers are on one side, and a further demonstration moves few others.
    None are held out of fewer than 10 demonstrations, of a single prompt, or where every prompt has more answers than wanted.
    """
    groups: dict[str, int] = {}
    prompts = [digest([dict(message) for message in demonstration.messages]) for demonstration in demonstrations]
    for prompt in prompts:
        groups[prompt] = groups.get(prompt, 0) + 1
    if len(demonstrations) < 10 or len(groups) < 2 or share <= 0 or at_most < 1:
        return list(demonstrations), []
    wanted = min(at_most, max(1, round(share * len(demonstrations))))
    held_out: set[str] = set()
    for prompt in sorted(groups):
        if groups[prompt] <= wanted:
            held_out.add(prompt)
            wanted -= groups[prompt]
    sides = list(zip(demonstrations, (prompt in held_out for prompt in prompts), strict=True))
    return [one for one, held in sides if not held], [one for one, held in sides if held]


def check_lengths(
    demonstrations: Sequence[Demonstration], chat: ChatFormat, context_length: int, drop: bool
) -> tuple[list[Demonstration], int]:
    """The demonstrations that fit the model's context, and how many do not. Nothing is ever cut.

    Raises:
        UserError: some do not fit and `drop` is False, or none fit.
    """
    lengths = _lengths(demonstrations, chat)
    long = [index for index, length in enumerate(lengths) if length > context_length]
    if not long:
        return list(demonstrations), 0
    first = demonstrations[long[0]]
    found = (
        f"{len(long)} of {len(demonstrations)} demonstrations are longer than the model's context of {context_length} "
        f"tokens; the first is {first.where or first.id} with {lengths[long[0]]} tokens"
    )
    if not drop:
        raise UserError(f"{found}. Shorten them, or leave them out with --drop-long")
    if len(long) == len(demonstrations):
        raise UserError(f"{found}. None are left")
    return [one for one, length in zip(demonstrations, lengths, strict=True) if length <= context_length], len(long)


def _lengths(demonstrations: Sequence[Demonstration], chat: ChatFormat) -> list[int]:
    """Tokens of each prompt with the longer of its answers."""
    answers = [
        (index, text) for index, one in enumerate(demonstrations) for text in (one.answer, one.rejected) if text is not None
    ]
    try:
        encoded = chat.encode_many([(demonstrations[index].messages, text) for index, text in answers])
    except UserError:
        for index, text in answers:  # one by one, for the place of the first that is refused
            try:
                chat.encode(demonstrations[index].messages, text)
            except UserError as error:
                raise UserError(f"{demonstrations[index].where or demonstrations[index].id}: {error}") from error
        raise
    lengths = [0] * len(demonstrations)
    for (index, _), one in zip(answers, encoded, strict=True):
        lengths[index] = max(lengths[index], len(one.prompt_ids) + len(one.completion_ids))
    return lengths


# Rows of a source. `where` is "file:line", or "file, row n" where there are no lines.


def _rows(source: str, data_dir: Path | None) -> Iterator[tuple[str, Any]]:
    path = next((path for path in _places(source, data_dir) if path.exists()), None)
    if path is None:
        hub = _HUB.fullmatch(source)
        # A folder of that name here, or a file's suffix, means a path that was mistyped.
        if hub and not Path(source).parent.exists() and not source.endswith(SUFFIXES):
            yield from _hub_rows(hub["name"], hub["split"] or "train")
            return
        raise _missing(source, _places(source, data_dir)[-1])
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file() and not file.name.startswith(".")
        )
        if not files:
            raise UserError(f"{source}: no {', '.join(SUFFIXES)} files in this folder")
    else:
        files = [path]
    for file in files:
        yield from _file_rows(file)


def _places(source: str, data_dir: Path | None) -> list[Path]:
    return [Path(source).expanduser()] + ([data_dir / source] if data_dir is not None else [])


def _missing(source: str, path: Path) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        return UserError(f"{source}: no such file, and no folder {folder}")
    beside = [file.name for file in folder.iterdir() if file.suffix in SUFFIXES or file.is_dir()]
    return unknown_name(f"file in {folder}", path.name, beside)


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix not in SUFFIXES:
        raise UserError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; known: {', '.join(SUFFIXES)}")
    else:
        text = _read_text(path)
        yield from _array_rows(path, text) if text.lstrip().startswith("[") else _line_rows(path, text)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {content[error.start]:#04x}); convert the file to UTF-8") from None


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not str.splitlines, which also splits at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _json(line, path, number)


def _array_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(_json(text, path, 1), start=1))


def _json(text: str, path: Path, line: int) -> Any:
    """The value of a text that starts at that line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{path}:{line + error.lineno - 1}: column {error.colno}"
        raise UserError(f"{at}: not JSON (one row a line, or a list of rows): {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        raise UserError(f"{path}:{line}: not readable as JSON: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'gsil-bench[parquet]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _without_nulls(row)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {_one_line(error)}") from None


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: no such file; reading it from the hub needs the package datasets: pip install 'gsil-bench[hub]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many kinds: network, no such set, split, access, …
        raise UserError(f"{name}: no such file, and the hub cannot give {name}:{split}: {_one_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{split}, row {number}", _without_nulls(row)


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tables write an absent field as null."""
    return {key: value for key, value in row.items() if value is not None}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# One row.


def _demonstration(row: Any, where: str, fields: Mapping[str, str]) -> Demonstration:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row must be an object with fields, not {_kind(row)}")
    if fields:
        row = {key: _field(row, name, where) for key, name in fields.items()}
    messages, answer, rejected = _content(row, where)
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: the message before the answer must be the user's")
    rejected = rejected if rejected is None or rejected.strip() else None
    return Demonstration(demonstration_id(messages, answer, rejected), tuple(messages), answer, rejected, where)


def _content(row: Mapping[str, Any], where: str) -> tuple[list[Message], str, str | None]:
    """(messages, answer, rejected answer) of a row of any known shape."""
    if "chosen" in row:
        return _preference(row, where)
    if "messages" in row:
        return *_conversation(row["messages"], where, "messages"), None
    if "prompt" in row or "completion" in row:
        prompt = _prompt(_field(row, "prompt", where), where)
        before, answer = _answer(_field(row, "completion", where), where, "completion")
        if before:
            raise UserError(f"{where}: field 'completion' must be one message, the assistant's, not {len(before) + 1}")
        return prompt, answer, None
    if "question" in row:
        return (
            _asked(_text(row["question"], where, "question")),
            _text(_field(row, "answer", where), where, "answer"),
            None,
        )
    if "instruction" in row:
        parts = [_text(row["instruction"], where, "instruction"), _text(row.get("input") or "", where, "input")]
        prompt = _asked("\n\n".join(part for part in parts if part.strip()))
        return prompt, _text(_field(row, "output", where), where, "output"), None
    raise UserError(
        f"{where}: no known shape of a demonstration; the row has: {_names(row)}. Say which fields hold the prompt "
        "and the completion (fields: prompt=…, completion=…)"
    )


def _preference(row: Mapping[str, Any], where: str) -> tuple[list[Message], str, str | None]:
    """Lists may carry the conversation before the answer (then it is the prompt) or only the answer."""
    before, answer = _answer(row["chosen"], where, "chosen")
    rejected_before: list[Message] = before
    rejected: str | None = None
    if row.get("rejected") is not None:
        rejected_before, rejected = _answer(row["rejected"], where, "rejected")
    if before != rejected_before:
        raise UserError(f"{where}: fields 'chosen' and 'rejected' answer different conversations")
    return before or _prompt(_field(row, "prompt", where), where), answer, rejected


def _answer(value: Any, where: str, name: str) -> tuple[list[Message], str]:
    """(the messages before it, the text) of an answer given as text or as messages."""
    return ([], _text(value, where, name)) if isinstance(value, str) else _conversation(value, where, name)


def _conversation(value: Any, where: str, name: str) -> tuple[list[Message], str]:
    messages = _messages(value, where, name)
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: field '{name}' must end in an assistant's message, not {messages[-1]['role']}'s")
    return messages[:-1], messages[-1]["content"]


def _prompt(value: Any, where: str) -> list[Message]:
    return _asked(_text(value, where, "prompt")) if isinstance(value, str) else _messages(value, where, "prompt")


def _asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _messages(value: Any, where: str, name: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where}: field '{name}' must be a list of messages, not {_kind(value)}")
    if not value:
        raise UserError(f"{where}: field '{name}' is an empty list")
    return [_message(one, where, f"{name}[{index}]") for index, one in enumerate(value)]


def _message(value: Any, where: str, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: field '{name}' must be a message with role and content, not {_kind(value)}")
    role, content = _field(value, "role", where, name), _field(value, "content", where, name)
    if role not in ROLES:
        raise UserError(f"{where}: field '{name}.role' is {role!r}; known: {', '.join(ROLES)}")
    return {"role": role, "content": _text(content, where, f"{name}.content")}


def _field(row: Mapping[str, Any], name: str, where: str, inside: str = "") -> Any:
    if name not in row:
        path = f"{inside}.{name}" if inside else name
        raise UserError(f"{where}: field '{path}' is missing; the {'message' if inside else 'row'} has: {_names(row)}")
    return row[name]


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{name}' must be a text, not {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field '{name}' holds half a character ({value[error.start]!a}) at {error.start}") from None
    return value


def _names(row: Iterable[str]) -> str:
    return ", ".join(map(str, row)) or "nothing"


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        dict: "an object",
    }
    return names.get(type(value), "a list" if isinstance(value, Sequence) else type(value).__name__)
