"""From messages to token ids and back: the only place that knows what a prompt looks like and which tokens are scored.

Demonstrations, self-generation, training and evaluation all come through here, so a policy is sampled, trained and
evaluated under the same bytes. What cannot be tokenised without a doubt about what is scored is refused:

1. The prompt's tokens must be the beginning of the whole conversation's. A template that rewrites history (drops think
   blocks) or a token that spans prompt and answer breaks this, and the policy would be trained on a prompt it is never
   given.
2. A completion is the answer and exactly one end token. What a template renders after it (a newline) is never
   generated, hence never scored.
3. No message may hold a control token as text: it would forge the end of a turn.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.records import Encoded, Message, canonical

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The answer starts with its space, so that no token spans prompt and answer: "Assistant: " would end in a space that
# belongs to the next word's token. Texts are trimmed for the same reason.
_PLAIN = (
    "{% if bos_token is defined and bos_token != eos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] | trim + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] | trim + eos_token + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

TEMPLATES: dict[str, str] = {"plain": _PLAIN}
"""Built-in chat templates by name, for `--chat-template NAME`."""

_TODAY = datetime(2024, 7, 26)
"""What templates that print the date are told. With the true date, a run's prompts would change overnight."""

_BATCH = 1024
"""Conversations tokenised in one call."""

_BEFORE = 8
"""Tokens of a prompt that an answer is decoded behind."""


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with a chat template. Built by `ChatFormat.of`, which probes how the template treats an answer."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    """The Jinja text."""
    end_token_id: int
    """The token that ends each scored completion."""
    end_token_ids: tuple[int, ...]
    """All tokens at which a generation stops, ascending."""
    renders_end: bool
    """Whether the template writes an end token after an answer; if not, the tokenizer's is added."""
    answer_opening: str
    """What the template writes between its generation prompt and an answer: an empty think block, or a header that it
    forgets in the generation prompt. It is part of every prompt, so that it is neither generated nor scored."""
    answer_space: str
    """White space before an answer, generated and scored as part of it, left out of decoded text."""
    fingerprint: str
    """Digest of all that decides how text becomes tokens."""

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, template: str | None = None, extra_end_ids: Iterable[int] = ()) -> ChatFormat:
        """Probe a tokenizer and a template.

        Args:
            tokenizer: of the model.
            template: name of a built-in template, a file with a Jinja template, or its text; None: the tokenizer's.
            extra_end_ids: further tokens at which generation stops, such as the generation config's eos_token_id.

        Raises:
            UserError: no template, one that fails, or one that no model can be trained on.
        """
        text = _template_text(tokenizer, template)
        opening, space, closing = _probe(tokenizer, text)
        rendered_end = _end_token(tokenizer, closing, extra_end_ids)
        end = tokenizer.eos_token_id if rendered_end is None else rendered_end
        if end is None:
            raise UserError(
                "nothing ends an answer: the chat template writes no end token after it and the tokenizer has no eos "
                "token. Give a template that writes one with --chat-template FILE"
            )
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        ends = tuple(sorted({end, *eos, *extra_end_ids}))
        return ChatFormat(
            tokenizer=tokenizer,
            template=text,
            end_token_id=end,
            end_token_ids=ends,
            renders_end=rendered_end is not None,
            answer_opening=opening,
            answer_space=space,
            fingerprint=_fingerprint(tokenizer, text, end, ends),
        )

    def prompt_ids(self, messages: Sequence[Message], opening: str = "") -> tuple[int, ...]:
        """The tokens after which the model answers.

        Args:
            opening: how its answer is made to begin; it goes on from there.
        """
        return self._tokenize([self.prompt_text(messages, opening)])[0]

    def prompt_text(self, messages: Sequence[Message], opening: str = "") -> str:
        """The same as text. A template's space before answers comes before the opening too, if that does not begin with one."""
        self._refuse_control_tokens([*messages, {"role": "assistant", "content": opening}])
        space = self.answer_space if opening and not opening[0].isspace() else ""
        return self._prompt_text(messages) + space + opening

    def text_ids(self, text: str) -> tuple[int, ...]:
        """A text as base models are given it: with the special tokens that the tokenizer adds by itself (a BOS, or none), as
        lm-eval's HFLM has it; none are added to a text that begins with the BOS (the EOS, for a tokenizer without).
        """
        return self._texts_ids([text])[0]

    def pair_tokens(self, context: str, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of a context, and those of a text after it; see `pairs_tokens`."""
        return self.pairs_tokens([(context, text)])[0]

    def pairs_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Contexts and texts after them in tokens, with lm-eval's convention.

        White space at the end of a context belongs to the text. Both are tokenised as one, as `text_ids` has it, and the text's
        tokens are those that follow as many as the context has alone. After nothing, the text follows a BOS (or EOS), and is
        tokenised without special tokens; one that it brings itself is not doubled. A text may be left without tokens of its own:
        they have all become part of the context's.
        """
        found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for start in range(0, len(pairs), _BATCH):
            moved = [_with_space(context, text) for context, text in pairs[start : start + _BATCH]]
            texts = dict.fromkeys(part for context, text in moved if context for part in (context, context + text))
            ids = dict(zip(texts, self._texts_ids(list(texts)), strict=True))
            for context, text in moved:
                if context:
                    found.append((ids[context], ids[context + text][len(ids[context]) :]))
                else:
                    found.append(self._after_nothing(text))
        return found

    def decode_after(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that new tokens add to a prompt's, without control tokens. Unlike `decode`, it keeps white space at the
        beginning, which some tokenizers drop from the first of the tokens that are decoded.
        """
        kept = [token for token in ids if token not in self.end_token_ids]
        before = self._plain(prompt_ids[-_BEFORE:])
        whole = self._plain([*prompt_ids[-_BEFORE:], *kept])
        return whole[len(before) :] if whole.startswith(before) else self._plain(kept)  # the prompt ends in half a character

    def encode(self, messages: Sequence[Message], answer: str) -> Encoded:
        """The tokens of a prompt and of an answer to it.

        Raises: UserError: prompt and answer cannot be told apart in tokens, the template changes the answer, or a text
        holds a control token.
        """
        return self.encode_many([(messages, answer)])[0]

    def encode_many(self, conversations: Sequence[tuple[Sequence[Message], str]]) -> list[Encoded]:
        """`encode` for many, faster."""
        encoded: list[Encoded] = []
        for start in range(0, len(conversations), _BATCH):
            texts = [self._texts(messages, answer) for messages, answer in conversations[start : start + _BATCH]]
            ids = self._tokenize([text for pair in texts for text in pair])
            encoded += [self._split(prompt, whole) for prompt, whole in zip(ids[::2], ids[1::2], strict=True)]
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without end token and other control tokens."""
        return self._plain([token for token in ids if token not in self.end_token_ids]).removeprefix(self.answer_space)

    def tokens(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, none added."""
        return self._tokenize([text])[0]

    def spell(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens written out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _plain(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def _prefix(self) -> tuple[int, str]:
        """The token that stands before a text that follows nothing, and how it is written."""
        own = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.end_token_id)
        token = next(token for token in own if token is not None)
        return token, self.spell([token])

    def _after_nothing(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        prefix, ids = self._prefix[0], self.tokens(text)
        return ((prefix,), ids[1:] if ids[:1] == (prefix,) else ids)

    def _texts_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        own = [text.startswith(self._prefix[1]) for text in texts]
        batches = {adds: [text for text, has in zip(texts, own, strict=True) if has != adds] for adds in (True, False)}
        ids = {adds: iter(self._tokenize(batch, adds)) for adds, batch in batches.items()}
        return [next(ids[not has]) for has in own]

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        return _render(self.tokenizer, self.template, messages, add_generation_prompt=True) + self.answer_opening

    def _texts(self, messages: Sequence[Message], answer: str) -> tuple[str, str]:
        """The prompt, and the conversation with its answer (and, if the template writes an end token, what follows)."""
        answered = [*messages, {"role": "assistant", "content": answer}]
        self._refuse_control_tokens(answered)
        prompt = self._prompt_text(messages)
        whole = _render(self.tokenizer, self.template, answered, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise _not_a_prefix(self.tokenizer, *self._tokenize([prompt, whole]))
        body = whole[len(prompt) :].lstrip()
        kept = next((text for text in (answer.lstrip(), answer.strip()) if body.startswith(text)), None)
        if kept is None:
            raise UserError(
                f"the chat template changes the answer {_excerpt(answer)} to {_excerpt(body)}. Change the answers, or "
                "give a template that keeps them with --chat-template FILE"
            )
        return prompt, whole if self.renders_end else whole[: len(whole) - len(body) + len(kept)]

    def _split(self, prompt: tuple[int, ...], whole: tuple[int, ...]) -> Encoded:
        if whole[: len(prompt)] != prompt:
            raise _not_a_prefix(self.tokenizer, prompt, whole)
        completion = whole[len(prompt) :]
        if self.renders_end:
            # The probe's answer was followed by the end token; a template may still treat this conversation otherwise.
            if self.end_token_id not in completion:
                raise UserError(f"the chat template writes no end token after the answer {_excerpt(self.decode(completion))}")
            completion = completion[: completion.index(self.end_token_id)]
        forged = next((token for token in completion if token in self._control_ids), None)
        if forged is not None:
            raise UserError(
                f"the answer {_excerpt(self.decode(completion))} becomes the token {_token(self.tokenizer, forged)}, "
                "which ends a turn or controls the conversation. Remove it from the answer"
            )
        return Encoded(prompt, (*completion, self.end_token_id))

    def _tokenize(self, texts: list[str], add_special_tokens: bool = False) -> list[tuple[int, ...]]:
        # A template writes the special tokens; `verbose` is off since lengths are checked elsewhere, with a better
        # message.
        if not texts:
            return []
        settings = {"add_special_tokens": add_special_tokens, "padding": False, "truncation": False, "verbose": False}
        ids: Any = self.tokenizer(texts, **settings)
        return [tuple(row) for row in ids["input_ids"]]

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Special and end tokens; not the one for unknown text, which any rare character becomes."""
        return frozenset({*self.tokenizer.all_special_ids, *self.end_token_ids} - {self.tokenizer.unk_token_id})

    @cached_property
    def _control_texts(self) -> re.Pattern[str]:
        """Finds a control token that is written out."""
        added = self.tokenizer.added_tokens_decoder.items()
        ends = {str(token.content) for id, token in added if token.special or id in self.end_token_ids}
        longest_first = sorted({*ends, *self.tokenizer.all_special_tokens}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _refuse_control_tokens(self, messages: Iterable[Message]) -> None:
        for message in messages:
            found = self._control_texts.search(message["content"])
            if found is not None:
                raise UserError(
                    f"the {message['role']}'s message {_excerpt(message['content'])} holds {found.group()!r}, a "
                    "control token of this tokenizer: it would forge the end of a turn. Remove it or write it otherwise"
                )


def _with_space(context: str, text: str) -> tuple[str, str]:
    """A context without the white space at its end, and a text that has it."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + text


def _template_text(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The Jinja text that a --chat-template argument, or its absence, stands for."""
    if template is None:
        own: Any = tokenizer.chat_template
        text = own.get("default") if isinstance(own, dict) else own
        if not text:
            raise UserError(
                "this tokenizer has no chat template. Give one with --chat-template FILE (a Jinja template), or use "
                'the built-in --chat-template plain ("User: …", "Assistant: …")'
            )
        return str(text)
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{{" in template or "{%" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise unknown_name("chat template (built-in name, or file)", template, TEMPLATES) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {template} cannot be read: {error}") from None


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                strftime_now=_TODAY.strftime,
            )
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses a conversation of {roles}: {error}") from error


def _probe(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str, str]:
    """What the template writes around an answer: (opening that belongs to the prompt, the answer's space, closing)."""
    question, answer = {"role": "user", "content": "Where?"}, "Zanzibar"
    prompt = _render(tokenizer, template, [question], add_generation_prompt=True)
    whole = _render(tokenizer, template, [question, {"role": "assistant", "content": answer}], add_generation_prompt=False)
    if not whole.startswith(prompt):
        ids: Any = tokenizer([prompt, whole], add_special_tokens=False)["input_ids"]
        raise _not_a_prefix(tokenizer, tuple(ids[0]), tuple(ids[1]))
    before, found, closing = whole[len(prompt) :].partition(answer)
    if not found:
        raise UserError("the chat template does not write the assistant's answer; give another with --chat-template FILE")
    if not before.strip():
        return "", before, closing
    # A space before the answer is part of its first token.
    opening = before.rstrip(" ")
    return opening, before[len(opening) :], closing


def _end_token(tokenizer: PreTrainedTokenizerBase, closing: str, extra_end_ids: Iterable[int]) -> int | None:
    """The first control token of what a template writes after an answer; special ones first, then any added token."""
    ids: Any = tokenizer(closing, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *extra_end_ids} - {tokenizer.unk_token_id}
    for candidates in (special, set(tokenizer.added_tokens_decoder)):
        found = next((token for token in ids if token in candidates), None)
        if found is not None:
            return int(found)
    return None


def _not_a_prefix(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], whole: Sequence[int]) -> UserError:
    pairs = enumerate(itertools.zip_longest(prompt, whole))
    end = (len(prompt), (None, None))  # texts that differ in characters which the tokenizer does not know
    position, (in_prompt, in_whole) = next(((at, pair) for at, pair in pairs if pair[0] != pair[1]), end)
    return UserError(
        "the chat template's prompt is not the beginning of the conversation with its answer, so what would be trained "
        f"is not what is generated: token {position} is {_token(tokenizer, in_prompt)} in the prompt and "
        f"{_token(tokenizer, in_whole)} in the conversation. The template rewrites the prompt when there is an answer "
        "(think blocks, for instance), or a token spans prompt and answer. Give a template without that with "
        "--chat-template FILE, or use --chat-template plain"
    )


def _token(tokenizer: PreTrainedTokenizerBase, token: int | None) -> str:
    return "missing" if token is None else f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")


def _fingerprint(tokenizer: PreTrainedTokenizerBase, template: str, end: int, ends: tuple[int, ...]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # Calls with padding or truncation leave their traces in the backend; every call here sets both anyway.
    rules = {key: value for key, value in vocabulary.items() if key not in ("padding", "truncation")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    content = [template, rules, special, end, ends, _TODAY.isoformat()]
    return hashlib.sha256(canonical(content).encode()).hexdigest()
