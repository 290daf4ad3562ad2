"""Which tokens a model is given and which are scored, for many templates and the tokenizers of three families."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gsil_bench.data.chat import ChatFormat
from gsil_bench.errors import UserError
from gsil_bench.records import Message

DATA = Path(os.environ.get("GSIL_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_llama = pytest.mark.skipif(
    not (DATA / "models" / "stories260K").is_dir(), reason=f"no models/stories260K in {DATA} (set GSIL_BENCH_DATA)"
)
needs_gpt2 = pytest.mark.skipif(
    not (DATA / "tokenizers" / "gpt2").is_dir(), reason=f"no tokenizers/gpt2 in {DATA} (set GSIL_BENCH_DATA)"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
THINKS_IN_THE_PROMPT_ONLY = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
"""R1's way: generation starts inside a think block, and the written conversation has none."""
EMPTY_THINK_BLOCK = CHATML.replace(
    "m['content'] +", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '') + m['content'] +"
)
"""Qwen 3's way: the last answer gets an empty think block, the generation prompt gets none."""
DROPS_THOUGHTS = CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +")
NO_END = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n### Response:\n' }}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
)
NO_GENERATION_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system messages here') }}{% endif %}{% endfor %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML

TEXT = [
    "<think> </think> the capital of France is Paris and that of Italy is Rome, user assistant system",
    "### Instruction: ### Response: You are kind. Today is 26 Jul 2024 [INST] [/INST] Zanzibar Where?",
    "What is the answer? The answer is 42. def f(x): return x + 1",
]
QUESTION: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]


def byte_level(template: str | None, seed_text: Sequence[str] = TEXT) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer whose eos is <|endoftext|>, trained in a moment."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(seed_text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=template, model_max_length=10_000
    )


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def id_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(id, int)
    return id


def test_the_completion_is_the_answer_and_one_end_token_and_not_the_newline_after_it() -> None:
    tokenizer = byte_level(CHATML)
    chat = ChatFormat.of(tokenizer)

    encoded = chat.encode(QUESTION, "Paris")

    assert encoded.prompt_ids == ids_of(
        tokenizer, "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encoded.completion_ids == (*ids_of(tokenizer, "Paris"), id_of(tokenizer, "<|im_end|>"))


def test_the_prompt_of_a_demonstration_is_the_prompt_of_a_generation() -> None:
    """And both are what transformers makes of the messages."""
    tokenizer = byte_level(CHATML)
    chat = ChatFormat.of(tokenizer)
    conversation: list[Message] = [
        {"role": "system", "content": "You are kind."},
        *QUESTION,
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Italy?"},
    ]
    expected: Any = tokenizer.apply_chat_template([dict(m) for m in conversation], add_generation_prompt=True)

    assert chat.prompt_ids(conversation) == tuple(expected["input_ids"])
    assert chat.encode(conversation, "Rome").prompt_ids == chat.prompt_ids(conversation)


def test_generation_stops_at_the_eos_at_what_the_template_writes_and_at_given_tokens() -> None:
    tokenizer = byte_level(CHATML)
    eos, end, other = (id_of(tokenizer, token) for token in ("<|endoftext|>", "<|im_end|>", "!"))

    assert ChatFormat.of(tokenizer).end_token_ids == tuple(sorted((eos, end)))
    assert ChatFormat.of(tokenizer).end_token_id == end
    assert ChatFormat.of(tokenizer, extra_end_ids=[other]).end_token_ids == tuple(sorted((eos, end, other)))


def test_a_default_system_message_is_in_the_prompt() -> None:
    tokenizer = byte_level(DEFAULT_SYSTEM)
    encoded = ChatFormat.of(tokenizer).encode(QUESTION, "Paris")

    assert "You are kind." in str(tokenizer.decode(encoded.prompt_ids))
    assert encoded.completion_ids == (*ids_of(tokenizer, "Paris"), id_of(tokenizer, "<|im_end|>"))


def test_a_template_whose_generation_prompt_opens_a_think_block_is_refused() -> None:
    """Generation would start after "<think>", training right after "assistant"."""
    with pytest.raises(UserError, match=r"token \d+ is .* in the prompt and .* in the conversation") as caught:
        ChatFormat.of(byte_level(THINKS_IN_THE_PROMPT_ONLY))

    assert "--chat-template" in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_think_block_that_the_template_inserts_belongs_to_the_prompt() -> None:
    tokenizer = byte_level(EMPTY_THINK_BLOCK)
    chat = ChatFormat.of(tokenizer)

    encoded = chat.encode(QUESTION, "Paris")

    assert str(tokenizer.decode(encoded.prompt_ids)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert encoded.completion_ids == (*ids_of(tokenizer, "Paris"), id_of(tokenizer, "<|im_end|>"))
    assert chat.prompt_ids(QUESTION) == encoded.prompt_ids


def test_a_template_that_cuts_the_thoughts_out_of_an_answer_is_refused() -> None:
    chat = ChatFormat.of(byte_level(DROPS_THOUGHTS))

    assert chat.decode(chat.encode(QUESTION, "Paris").completion_ids) == "Paris"
    with pytest.raises(UserError, match="changes the answer"):
        chat.encode(QUESTION, "<think>France, so</think>Paris")


def test_where_a_template_writes_no_end_token_the_eos_is_added() -> None:
    tokenizer = byte_level(NO_END)
    chat = ChatFormat.of(tokenizer)

    encoded = chat.encode(QUESTION, "Paris")

    assert encoded.completion_ids == (*ids_of(tokenizer, "Paris"), id_of(tokenizer, "<|endoftext|>"))
    assert chat.end_token_ids == (id_of(tokenizer, "<|endoftext|>"),)


def test_a_template_that_ends_only_some_answers_is_refused_where_it_does_not() -> None:
    tokenizer = byte_level(CHATML.replace("+ '<|im_end|>\n'", "+ ('<|im_end|>\n' if m['content'] != 'Rome' else '')"))
    chat = ChatFormat.of(tokenizer)

    assert chat.encode(QUESTION, "Paris").completion_ids[-1] == chat.end_token_id
    with pytest.raises(UserError, match="no end token after the answer 'Rome'"):
        chat.encode(QUESTION, "Rome")


def test_without_any_end_token_nothing_can_be_trained() -> None:
    tokenizer = byte_level(NO_END)
    tokenizer.eos_token = None  # type: ignore[assignment]

    with pytest.raises(UserError, match="nothing ends an answer"):
        ChatFormat.of(tokenizer)


def test_a_header_that_the_generation_prompt_forgets_is_neither_generated_nor_scored() -> None:
    tokenizer = byte_level(NO_GENERATION_PROMPT)
    chat = ChatFormat.of(tokenizer)

    encoded = chat.encode(QUESTION, "Paris")

    assert str(tokenizer.decode(encoded.prompt_ids)).endswith("<|im_start|>assistant\n")
    assert encoded.completion_ids == (*ids_of(tokenizer, "Paris"), id_of(tokenizer, "<|im_end|>"))


def test_a_space_before_the_answer_and_one_before_the_end_are_part_of_the_completion() -> None:
    """They are of the template's making, and the model must write them for its eos to be in its place."""
    tokenizer = byte_level(LLAMA_2)
    chat = ChatFormat.of(tokenizer)

    encoded = chat.encode(QUESTION, "Paris")

    assert encoded.completion_ids == (*ids_of(tokenizer, " Paris "), id_of(tokenizer, "<|endoftext|>"))
    assert chat.decode(encoded.completion_ids) == "Paris "


def test_a_newline_that_the_generation_prompt_leaves_out_is_generated_and_scored() -> None:
    tokenizer = byte_level(CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant' }}{% endif"))
    chat = ChatFormat.of(tokenizer)

    encoded = chat.encode(QUESTION, "Paris")

    assert str(tokenizer.decode(encoded.prompt_ids)).endswith("<|im_start|>assistant")
    assert encoded.completion_ids == (*ids_of(tokenizer, "\nParis"), id_of(tokenizer, "<|im_end|>"))
    assert chat.decode(encoded.completion_ids) == "Paris"


def test_a_role_that_the_template_refuses_is_a_users_error() -> None:
    chat = ChatFormat.of(byte_level(LLAMA_2))

    with pytest.raises(UserError, match="conversation of system, user: no system messages here"):
        chat.prompt_ids([{"role": "system", "content": "Be kind."}, *QUESTION])


def test_a_token_that_spans_prompt_and_answer_is_refused_with_its_place() -> None:
    """The vocabulary has ":P" as one token: "A:" alone ends in ":", "A:Paris" has ":P" in its place, token 3 of Q ? A :."""
    letters = sorted({*"Q?A:Paris", *"Zanzibar", *"Where"})
    vocabulary = {token: id for id, token in enumerate(["<unk>", "<eos>", *letters, ":P"])}
    backend = Tokenizer(models.BPE(vocabulary, [(":", "P")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}A:"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    chat = ChatFormat.of(tokenizer, template)

    assert chat.decode(chat.encode([{"role": "user", "content": "?"}], "Zanzibar").completion_ids)
    with pytest.raises(UserError, match=rf"token 3 is ':' \({vocabulary[':']}\) .* ':P' \({vocabulary[':P']}\)"):
        chat.encode([{"role": "user", "content": "?"}], "Paris")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_control_token_in_a_text_is_refused_by_name(token: str) -> None:
    chat = ChatFormat.of(byte_level(CHATML))
    name = token.replace("|", r"\|")

    with pytest.raises(UserError, match=rf"assistant's message .* holds '{name}'"):
        chat.encode(QUESTION, f"Paris{token}")
    with pytest.raises(UserError, match=rf"user's message .* holds '{name}'"):
        chat.encode([{"role": "user", "content": f"Hi{token}assistant"}], "Paris")
    with pytest.raises(UserError, match=name):
        chat.prompt_ids([{"role": "user", "content": token}])


def test_an_end_token_that_was_added_without_being_special_is_one_all_the_same() -> None:
    tokenizer = byte_level(CHATML.replace("<|im_end|>", "<end>"))
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    chat = ChatFormat.of(tokenizer)

    assert chat.end_token_id == id_of(tokenizer, "<end>")
    assert chat.encode(QUESTION, "Paris").completion_ids[-1] == id_of(tokenizer, "<end>")
    assert chat.decode(chat.encode(QUESTION, "Paris").completion_ids) == "Paris"
    with pytest.raises(UserError, match="'<end>'"):
        chat.encode(QUESTION, "Paris<end>")


def test_an_answer_that_holds_an_ordinary_end_token_is_refused_rather_than_cut() -> None:
    """A generation config may stop at "!"; an answer with it would be cut there in generation but not in training."""
    tokenizer = byte_level(CHATML)
    chat = ChatFormat.of(tokenizer, extra_end_ids=[id_of(tokenizer, "!")])

    with pytest.raises(UserError, match=r"becomes the token '!'"):
        chat.encode(QUESTION, "Paris! Yes")


def test_other_added_tokens_may_be_in_an_answer() -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    chat = ChatFormat.of(tokenizer)

    assert chat.decode(chat.encode(QUESTION, "<think>so</think>Paris").completion_ids) == "<think>so</think>Paris"


def test_white_space_around_an_answer_is_kept_unless_the_template_trims_it() -> None:
    plain, chatml = ChatFormat.of(byte_level(None), "plain"), ChatFormat.of(byte_level(CHATML))

    assert plain.decode(plain.encode(QUESTION, "  Paris\n").completion_ids) == "Paris"
    assert chatml.decode(chatml.encode(QUESTION, "  Paris\n").completion_ids) == "  Paris\n"


def test_many_are_encoded_as_one_by_one() -> None:
    chat = ChatFormat.of(byte_level(CHATML))
    conversations: list[tuple[list[Message], str]] = [
        ([{"role": "user", "content": "x" * number}], "y" * (number % 7)) for number in range(1, 1100, 3)
    ]

    assert chat.encode_many(conversations) == [chat.encode(*one) for one in conversations]


def test_decoding_leaves_control_tokens_out_and_spaces_alone() -> None:
    tokenizer = byte_level(CHATML)
    chat = ChatFormat.of(tokenizer)
    ids = (*ids_of(tokenizer, "it 's  so , yes"), id_of(tokenizer, "<|im_end|>"))

    assert chat.decode(ids) == "it 's  so , yes"


# Which template.


def test_a_tokenizer_without_template_says_how_to_give_one() -> None:
    with pytest.raises(UserError, match=r"--chat-template FILE .*--chat-template plain"):
        ChatFormat.of(byte_level(None))


def test_a_template_may_be_a_file_a_text_or_a_name(tmp_path: Path) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML, encoding="utf-8")
    tokenizer = byte_level(None)

    assert ChatFormat.of(tokenizer, str(file)).template == CHATML
    assert ChatFormat.of(tokenizer, CHATML).template == CHATML
    assert "User: " in ChatFormat.of(tokenizer, "plain").template


def test_an_unknown_template_name_offers_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'plain'"):
        ChatFormat.of(byte_level(None), "plian")


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = byte_level(None)
    tokenizer.chat_template = {"tool_use": NO_END, "default": CHATML}  # type: ignore[assignment]

    assert ChatFormat.of(tokenizer).template == CHATML


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages.nothing.at_all }}", "{{ 1 + 'a' }}"])
def test_a_broken_template_is_a_users_error(template: str) -> None:
    with pytest.raises(UserError, match="the chat template refuses"):
        ChatFormat.of(byte_level(None), template)


def test_a_template_that_forgets_the_answer_is_refused() -> None:
    with pytest.raises(UserError, match="does not write the assistant's answer"):
        ChatFormat.of(byte_level(None), "{{ messages[0]['content'] }}")


def test_a_template_that_prints_the_date_gets_the_same_one_every_day() -> None:
    """The 26th of July 2024, which Llama 3's templates print where they know no other."""
    tokenizer = byte_level(DATED)

    assert "Today is 26 Jul 2024\n" in str(tokenizer.decode(ChatFormat.of(tokenizer).prompt_ids(QUESTION)))


# The fingerprint.


def test_the_fingerprint_is_that_of_template_vocabulary_and_end_tokens() -> None:
    base = ChatFormat.of(byte_level(CHATML)).fingerprint

    assert ChatFormat.of(byte_level(CHATML)).fingerprint == base
    assert ChatFormat.of(byte_level(DEFAULT_SYSTEM)).fingerprint != base
    assert ChatFormat.of(byte_level(CHATML, ["another text, other merges"])).fingerprint != base
    assert ChatFormat.of(byte_level(CHATML), extra_end_ids=[9]).fingerprint != base


def test_the_fingerprint_does_not_depend_on_what_the_tokenizer_was_used_for() -> None:
    tokenizer = byte_level(CHATML)
    before = ChatFormat.of(tokenizer).fingerprint
    tokenizer.pad_token_id = tokenizer.eos_token_id
    expected = ChatFormat.of(tokenizer).fingerprint
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)

    assert ChatFormat.of(tokenizer).fingerprint == expected
    assert len(before) == 64


def test_earlier_padding_and_truncation_leave_no_trace_in_the_tokens() -> None:
    tokenizer = byte_level(CHATML)
    chat = ChatFormat.of(tokenizer)
    expected = chat.encode(QUESTION, "Paris")
    tokenizer.pad_token = "!"
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)

    assert chat.encode(QUESTION, "Paris") == expected


# Real tokenizers and real demonstrations.


def gsm8k(count: int) -> list[tuple[list[Message], str]]:
    lines = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    return [([{"role": "user", "content": row["question"]}], row["answer"]) for row in rows]


def llama() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "models" / "stories260K")


def gpt2() -> PreTrainedTokenizerFast:
    from tokenizers import ByteLevelBPETokenizer

    folder = DATA / "tokenizers" / "gpt2"
    backend = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    return PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="<|endoftext|>")


@needs_llama
def test_plain_with_llama_2s_tokenizer_on_gsm8k() -> None:
    """bos is 1 and eos is 2; the generation config stops at both, since the model ends a story with a bos."""
    tokenizer = llama()
    chat = ChatFormat.of(tokenizer, "plain", extra_end_ids=[1, 2])
    conversations = gsm8k(300)

    encoded = chat.encode_many(conversations)

    assert (chat.end_token_id, chat.end_token_ids) == (2, (1, 2))
    for (messages, answer), one in zip(conversations, encoded, strict=True):
        assert one.prompt_ids[0] == 1
        assert one.completion_ids[-1] == 2 and not {1, 2} & set(one.completion_ids[:-1])
        assert chat.decode(one.completion_ids) == answer.strip()
        whole = f"<s>User: {messages[0]['content'].strip()}\nAssistant: {answer.strip()}</s>"
        assert one.prompt_ids + one.completion_ids == ids_of(tokenizer, whole)


@needs_llama
def test_html_that_is_a_control_token_of_llama_2_is_refused() -> None:
    chat = ChatFormat.of(llama(), "plain")

    with pytest.raises(UserError, match="'<s>'"):
        chat.encode(QUESTION, "it is <s>Rome</s> Paris")


@needs_gpt2
def test_plain_with_gpt_2s_tokenizer_on_gsm8k() -> None:
    tokenizer = gpt2()
    chat = ChatFormat.of(tokenizer, "plain")
    conversations = gsm8k(300)

    encoded = chat.encode_many(conversations)

    assert chat.end_token_ids == (50256,)
    for (messages, answer), one in zip(conversations, encoded, strict=True):
        assert chat.decode(one.completion_ids) == answer.strip()
        whole = f"User: {messages[0]['content'].strip()}\nAssistant: {answer.strip()}<|endoftext|>"
        assert one.prompt_ids + one.completion_ids == ids_of(tokenizer, whole)


@pytest.mark.parametrize("make", [pytest.param(llama, marks=needs_llama), pytest.param(gpt2, marks=needs_gpt2)])
@pytest.mark.parametrize(
    "answer", ["(a)", '"quoted"', "- a list\n- of two", "    indented", "\n\nlate", "42", "é", "日本", ":)", ""]
)
def test_plain_has_no_seam_whatever_an_answer_starts_with(make: Any, answer: str) -> None:
    chat = ChatFormat.of(make(), "plain")

    encoded = chat.encode(QUESTION, answer)

    assert chat.prompt_ids(QUESTION) == encoded.prompt_ids
    assert chat.decode(encoded.completion_ids) == answer.strip()
