"""Stage 5: a checkpoint's answers to a task's items. Needs an engine; scoring does not.

How an item is asked is its protocol's `form`:

- "chat": turn by turn in the model's template, after system message and history. Earlier answers are quoted as they were scored,
  behind the opening that the first one was given.
- "text": the turn is the prompt, tokenised with what special tokens the tokenizer adds by itself (a BOS, or none), as lm-eval's
  HFLM does for base models. Turns stand alone. A prompt that leaves no room for `max_new_tokens` is cut on the left, as there;
  in a chat that would cut the system message, so it is an error of the item.

An answer ends at the first of the protocol's stops, whether the engine stopped there or not.

An item with continuations is answered by their log-likelihoods, with lm-eval's convention of what the continuation's tokens are
(`ChatFormat.pairs_tokens`). In chat form a context is the last user message. What is too long for the model loses the beginning
of its context; how many tokens is in the answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from gsil_bench.data.chat import ChatFormat
from gsil_bench.errors import UserError
from gsil_bench.generation.engine import Completion, Request, Sampling
from gsil_bench.generation.likelihoods import Given
from gsil_bench.records import ItemAnswer, Message
from gsil_bench.tasks.task import AnswerProtocol, Continuation, Item

FILE = "answers.jsonl"

Complete = Callable[[Sequence[Request]], list[Completion]]


@dataclass(frozen=True)
class Asked:
    """A model as items are asked of it."""

    complete: Complete
    """Its completions of requests, in order; of a `Given`, the log-probs of its continuation."""
    chat: ChatFormat
    context_length: int
    """Tokens of prompt and answer together."""
    scored_length: int
    """Tokens of context and continuation together. One more than the context in the model's own forward pass, where the last
    token is no input; no more than it on a server."""


@dataclass(frozen=True)
class _Turn:
    """The answer to a turn, as it is scored."""

    text: str
    finish_reason: str
    tokens: int = 0
    cut: int = 0
    error: str = ""


@dataclass
class _Conversation:
    """An item and what was answered so far."""

    item: Item
    sample: int
    turns: list[_Turn] = field(default_factory=list)

    @property
    def goes_on(self) -> bool:
        """Whether there is a turn to be asked; none after an error."""
        return len(self.turns) < len(self.item.turns) and all(turn.finish_reason != "error" for turn in self.turns)


def answer(model: Asked, items: Sequence[Item], protocol: AnswerProtocol) -> list[ItemAnswer]:
    """Ask every item, `protocol.samples` times (log-likelihoods once); the answers in the items' order.

    A turn that ended in an error (a prompt longer than the context, say) ends that conversation; the other items go on.
    """
    likelihoods = iter(_likelihoods(model, [item for item in items if item.continuations], protocol))
    conversations = [_Conversation(item, n) for item in items if not item.continuations for n in range(protocol.samples)]
    while open_ones := [conversation for conversation in conversations if conversation.goes_on]:
        _ask_turn(model, open_ones, protocol)
    answered = iter(map(_item_answer, conversations))
    times = [1 if item.continuations else protocol.samples for item in items]
    return [next(likelihoods if item.continuations else answered) for item, n in zip(items, times, strict=True) for _ in range(n)]


def cut(text: str, stops: Sequence[str]) -> str:
    """What stands before the first of the stops; the whole text if none is in it."""
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


def _ask_turn(model: Asked, conversations: Sequence[_Conversation], protocol: AnswerProtocol) -> None:
    """Ask the next turn of conversations and append the answers."""
    asked: list[tuple[_Conversation, int]] = []
    requests: list[Request] = []
    for conversation in conversations:
        try:
            ids = _prompt(model.chat, conversation, protocol)
        except UserError as error:  # an answer that spells out a control token cannot be quoted in the next prompt
            conversation.turns.append(_Turn("", "error", error=str(error)))
            continue
        # A limit that leaves a prompt no room at all is not kept to: the answer gets what the context leaves.
        room = model.context_length - protocol.max_new_tokens
        kept = ids[-room:] if protocol.form == "text" and room > 0 else ids
        requests.append(Request(kept, _sampling(conversation.item, protocol), conversation.sample))
        asked.append((conversation, len(ids) - len(kept)))
    for (conversation, left_out), request, completion in zip(asked, requests, model.complete(requests), strict=True):
        conversation.turns.append(_turn(model.chat, conversation, request, completion, protocol, left_out))


def _sampling(item: Item, protocol: AnswerProtocol) -> Sampling:
    temperature = protocol.temperature if item.temperature is None else item.temperature
    stops = tuple(stop for stop in protocol.stops if stop)
    return Sampling(protocol.max_new_tokens, temperature, protocol.top_p, protocol.seed, stops)


def _prompt(chat: ChatFormat, conversation: _Conversation, protocol: AnswerProtocol) -> tuple[int, ...]:
    """The tokens of the next turn's prompt."""
    item, number = conversation.item, len(conversation.turns)
    opening = "" if number else item.opening
    if protocol.form == "text":
        _refuse_messages(item, protocol)
        return chat.text_ids(item.turns[number] + opening)
    return chat.prompt_ids(_messages(conversation, protocol), opening)


def _refuse_messages(item: Item, protocol: AnswerProtocol) -> None:
    if protocol.system or item.history:
        raise UserError(f"{protocol.name}: a prompt in text form has no system message and no history")


def _messages(conversation: _Conversation, protocol: AnswerProtocol) -> list[Message]:
    """The messages up to the next user turn."""
    item, given = conversation.item, conversation.turns
    messages = _before(item, protocol)
    for number, question in enumerate(item.turns[: len(given) + 1]):
        messages.append({"role": "user", "content": question})
        if number < len(given):
            opening = "" if number else item.opening
            messages.append({"role": "assistant", "content": opening + given[number].text})
    return messages


def _before(item: Item, protocol: AnswerProtocol) -> list[Message]:
    """System message and history."""
    messages: list[Message] = [{"role": "system", "content": protocol.system}] if protocol.system else []
    for question, shown in item.history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": shown}]
    return messages


def _turn(
    chat: ChatFormat,
    conversation: _Conversation,
    request: Request,
    completion: Completion,
    protocol: AnswerProtocol,
    left_out: int,
) -> _Turn:
    """A completion as the answer to a turn: without what follows the first stop."""
    if completion.finish_reason == "error":
        return _Turn("", "error", cut=left_out, error=completion.error)
    continues = protocol.form == "text" or (conversation.item.opening and not conversation.turns)
    text = chat.decode_after(request.prompt_ids, completion.tokens) if continues else completion.text
    kept = cut(text, protocol.stops)
    reason = completion.finish_reason if kept == text else "stop"
    return _Turn(kept, reason, len(completion.tokens), left_out)


def _item_answer(conversation: _Conversation) -> ItemAnswer:
    turns = conversation.turns
    return ItemAnswer(
        id=conversation.item.id,
        sample=conversation.sample,
        texts=tuple(turn.text for turn in turns),
        finish_reasons=tuple(turn.finish_reason for turn in turns),
        tokens=tuple(turn.tokens for turn in turns),
        error=next((turn.error for turn in turns if turn.error), ""),
        cut=tuple(turn.cut for turn in turns),
    )


@dataclass(frozen=True)
class _Pair:
    """A context and a continuation in tokens, cut to what the model can take; or why they cannot be scored."""

    context: tuple[int, ...] = ()
    continuation: tuple[int, ...] = ()
    cut: int = 0
    error: str = ""


def _likelihoods(model: Asked, items: Sequence[Item], protocol: AnswerProtocol) -> list[ItemAnswer]:
    """The items' answers: for each continuation the JSON text {"logp": nats, "tokens": their number}."""
    pairs = list(_pairs(model, items, protocol))
    sound = [pair for pair in pairs if not pair.error]
    found = iter(model.complete([Given.after(pair.context, pair.continuation) for pair in sound])) if sound else iter(())
    scored = iter([(pair, None if pair.error else next(found)) for pair in pairs])
    return [_likelihood_answer(item, [next(scored) for _ in item.continuations]) for item in items]


def _pairs(model: Asked, items: Sequence[Item], protocol: AnswerProtocol) -> Iterator[_Pair]:
    """Every continuation of every item."""
    texts: list[tuple[str, str]] = []
    problems: list[str] = []
    for item, given in ((owner, given) for owner in items for given in owner.continuations):
        try:
            texts.append((_context(model.chat, item, given, protocol), given.text))
            problems.append("")
        except UserError as error:
            texts.append(("", ""))
            problems.append(str(error))
    for (context, continuation), problem in zip(model.chat.pairs_tokens(texts), problems, strict=True):
        yield _Pair(error=problem) if problem else _fitted(context, continuation, model.scored_length)


def _context(chat: ChatFormat, item: Item, continuation: Continuation, protocol: AnswerProtocol) -> str:
    if protocol.form == "text":
        _refuse_messages(item, protocol)
        return continuation.context + item.opening
    if not continuation.context:
        return ""  # asks for the likelihood of the text alone
    return chat.prompt_text([*_before(item, protocol), {"role": "user", "content": continuation.context}], item.opening)


def _fitted(context: tuple[int, ...], continuation: tuple[int, ...], length: int) -> _Pair:
    """The end of the context that there is room for, one token at least."""
    room = length - len(continuation)
    if not continuation:
        return _Pair(error="a continuation has no tokens of its own")
    if room < 1:
        return _Pair(error=f"a continuation of {len(continuation)} tokens leaves no room for its context")
    return _Pair(context[-room:], continuation, max(0, len(context) - room))


def _likelihood_answer(item: Item, scored: Sequence[tuple[_Pair, Completion | None]]) -> ItemAnswer:
    """All of an item's likelihoods, or none: a choice without its rivals is no answer."""
    error = next((pair.error for pair, _ in scored if pair.error), "")
    if error:
        return ItemAnswer(item.id, 0, (), (), (), error)
    texts = [json.dumps({"logp": math.fsum(given.logps or ()), "tokens": len(given.tokens)}) for _, given in scored if given]
    count = len(texts)
    return ItemAnswer(item.id, 0, tuple(texts), ("stop",) * count, (0,) * count, "", tuple(pair.cut for pair, _ in scored))
