"""Stage 5: a checkpoint's answers to a task's items, turn by turn, kept item by item. Needs an engine; scoring does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gsil_bench.data.chat import ChatFormat
from gsil_bench.errors import UserError
from gsil_bench.generation.completions import complete_all
from gsil_bench.generation.engine import Completion, Engine, Request, Sampling
from gsil_bench.records import ItemAnswer, Message, write_jsonl
from gsil_bench.tasks.task import AnswerProtocol, Item

FILE = "answers.jsonl"


def answer(
    engine: Engine,
    chat: ChatFormat,
    items: Sequence[Item],
    protocol: AnswerProtocol,
    folder: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> list[ItemAnswer]:
    """Ask every item, `protocol.samples` times, and write the answers in the items' order.

    A turn that ended in an error (a prompt longer than the context, say) ends that conversation; the other items go on.
    """
    sampling = Sampling(protocol.max_new_tokens, protocol.temperature, protocol.top_p, protocol.seed)
    keys = [(item, sample) for item in items for sample in range(protocol.samples)]
    given: dict[tuple[str, int], list[Completion]] = {(item.id, sample): [] for item, sample in keys}
    for turn in range(max((len(item.turns) for item in items), default=0)):
        asked = [(item, sample) for item, sample in keys if _goes_on(item, given[item.id, sample], turn)]
        requests, refused = [], {}
        for item, sample in asked:
            id_ = f"{item.id}/{sample}/{turn}"
            try:
                requests.append(Request(id_, chat.prompt_ids(_conversation(item, given[item.id, sample], protocol))))
            except UserError as error:  # an answer that spells out a control token cannot be quoted in the next prompt
                refused[id_] = Completion(id_, (), "", "error", str(error))
        completed = complete_all(engine, requests, sampling, folder / f"turn-{turn + 1}.jsonl", advance)
        by_id = refused | {completion.id: completion for completion in completed}
        completions = [by_id[f"{item.id}/{sample}/{turn}"] for item, sample in asked]
        for (item, sample), completion in zip(asked, completions, strict=True):
            given[item.id, sample].append(completion)
    answers = [_item_answer(item, sample, given[item.id, sample]) for item, sample in keys]
    write_jsonl(folder / FILE, answers)
    return answers


def _goes_on(item: Item, completions: Sequence[Completion], turn: int) -> bool:
    return turn < len(item.turns) and all(completion.finish_reason != "error" for completion in completions)


def _conversation(item: Item, completions: Sequence[Completion], protocol: AnswerProtocol) -> list[Message]:
    """The messages up to the next user turn."""
    messages: list[Message] = [{"role": "system", "content": protocol.system}] if protocol.system else []
    for turn, question in enumerate(item.turns[: len(completions) + 1]):
        messages.append({"role": "user", "content": question})
        if turn < len(completions):
            messages.append({"role": "assistant", "content": completions[turn].text})
    return messages


def _item_answer(item: Item, sample: int, completions: Sequence[Completion]) -> ItemAnswer:
    return ItemAnswer(
        id=item.id,
        sample=sample,
        texts=tuple(completion.text for completion in completions),
        finish_reasons=tuple(completion.finish_reason for completion in completions),
        tokens=tuple(len(completion.tokens) for completion in completions),
        error=next((completion.error for completion in completions if completion.error), ""),
    )
