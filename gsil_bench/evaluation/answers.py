"""Stage 5: a checkpoint's answers to a task's items, turn by turn. Needs an engine; scoring does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gsil_bench.data.chat import ChatFormat
from gsil_bench.errors import UserError
from gsil_bench.generation.engine import Completion, Request, Sampling
from gsil_bench.records import ItemAnswer, Message
from gsil_bench.tasks.task import AnswerProtocol, Item

FILE = "answers.jsonl"


def answer(
    complete: Callable[[Sequence[Request]], list[Completion]], chat: ChatFormat, items: Sequence[Item], protocol: AnswerProtocol
) -> list[ItemAnswer]:
    """Ask every item, `protocol.samples` times; the answers in the items' order.

    A turn that ended in an error (a prompt longer than the context, say) ends that conversation; the other items go on.

    Args:
        complete: a model's completions of requests, in order.
    """
    sampling = Sampling(protocol.max_new_tokens, protocol.temperature, protocol.top_p, protocol.seed)
    conversations = [(item, sample, list[Completion]()) for item in items for sample in range(protocol.samples)]
    for turn in range(max((len(item.turns) for item in items), default=0)):
        asked: list[list[Completion]] = []
        requests: list[Request] = []
        for item, sample, given in conversations:
            if not _goes_on(item, given, turn):
                continue
            try:
                requests.append(Request(chat.prompt_ids(_conversation(item, given, protocol)), sampling, sample))
                asked.append(given)
            except UserError as error:  # an answer that spells out a control token cannot be quoted in the next prompt
                given.append(Completion((), "", "error", str(error)))
        for given, completion in zip(asked, complete(requests), strict=True):
            given.append(completion)
    return [_item_answer(item, sample, given) for item, sample, given in conversations]


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
