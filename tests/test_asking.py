"""How items are asked, to the token: chat and text form, stops, likelihoods, names of tasks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TASK, LengthTask
from test_answer_store import Fake
from test_chat import CHATML, LLAMA_2, byte_level, ids_of, llama, needs_llama
from test_compare import call_quietly, command
from tiny_models import CONTEXT, ENDS, MODELS, make_model, random_ids
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gsil_bench import tasks
from gsil_bench.data.chat import ChatFormat
from gsil_bench.errors import MissingLibraryError, UserError
from gsil_bench.evaluation import answers, scoring
from gsil_bench.generation.answer_store import AnswerStore
from gsil_bench.generation.engine import Completion, Request, Sampling
from gsil_bench.generation.likelihoods import POSITIONS, TREE, Given, Likelihoods
from gsil_bench.generation.transformers_engine import TransformersEngine
from gsil_bench.models.checkpoint import load_model, load_tokenizer
from gsil_bench.models.packing import TokenTree
from gsil_bench.records import ItemAnswer, read_jsonl
from gsil_bench.tasks.task import AnswerProtocol, Continuation, Item, Score, ScoringResources

__all__ = ["command"]  # a fixture

TEXT = AnswerProtocol("t/text-v1", 8, form="text")
CHAT = AnswerProtocol("t/chat-v1", 8)


class Script:
    """Completes every request with the next of some texts, as tokens of the chat's, and keeps the requests."""

    def __init__(self, chat: ChatFormat, *texts: str) -> None:
        self.chat, self.texts = chat, list(texts)
        self.requests: list[Request] = []

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        self.requests += requests
        return [self._completion(self.texts.pop(0) if self.texts else "fine") for _ in requests]

    def _completion(self, text: str) -> Completion:
        tokens = (*self.chat.tokens(text), self.chat.end_token_id)
        return Completion(tokens, self.chat.decode(tokens), "stop")


def ask(
    complete: answers.Complete, chat: ChatFormat, items: Sequence[Item], protocol: AnswerProtocol, context: int = 512
) -> list[ItemAnswer]:
    return answers.answer(answers.Asked(complete, chat, context, context + 1), items, protocol)


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with "<s>", unless it is told not to."""
    tokenizer = byte_level(CHATML)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert isinstance(tokenizer.bos_token_id, int)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def chat(mini_folder: Path) -> ChatFormat:
    return ChatFormat.of(load_tokenizer(mini_folder))


# ---- chat -------------------------------------------------------------------------------------------------------------


def test_a_chat_has_system_history_and_turns_with_answers_as_they_are_scored() -> None:
    """The template is spelt out here; the answer "one STOP two" is quoted as "one "."""
    tokenizer = byte_level(CHATML)
    complete = Script(ChatFormat.of(tokenizer), "one STOP two", "three")
    protocol = dataclasses.replace(CHAT, system="Be kind.", stops=("STOP",))
    item = Item("a", ("First?", "Second?"), history=(("Shot?", "Shown."), ("Again?", "So.")))
    (given,) = ask(complete, complete.chat, [item], protocol)
    header = (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nShot?<|im_end|>\n<|im_start|>assistant\nShown.<|im_end|>\n"
        "<|im_start|>user\nAgain?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
        "<|im_start|>user\nFirst?<|im_end|>\n<|im_start|>assistant\n"
    )
    second = header + "one <|im_end|>\n<|im_start|>user\nSecond?<|im_end|>\n<|im_start|>assistant\n"
    assert [request.prompt_ids for request in complete.requests] == [ids_of(tokenizer, header), ids_of(tokenizer, second)]
    assert given.texts == ("one ", "three")
    assert given.cut == (0, 0)


def test_an_opening_follows_the_generation_prompt_and_the_answer_goes_on_from_it() -> None:
    """In the second turn the first answer has its opening again: it is what the model's message was."""
    tokenizer = byte_level(CHATML)
    complete = Script(ChatFormat.of(tokenizer), "    return x", "Because.")
    item = Item("a", ("Write f.", "Why?"), opening="Sure:\n```python\n")
    (given,) = ask(complete, complete.chat, [item], CHAT)
    first = "<|im_start|>user\nWrite f.<|im_end|>\n<|im_start|>assistant\nSure:\n```python\n"
    second = first + "    return x<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert [request.prompt_ids for request in complete.requests] == [ids_of(tokenizer, first), ids_of(tokenizer, second)]
    assert given.texts == ("    return x", "Because.")


@pytest.mark.parametrize(("opening", "rendered"), [("Sure", "[INST] Go [/INST] Sure"), (" ```", "[INST] Go [/INST] ```")])
def test_an_opening_has_the_space_that_answers_have_once(opening: str, rendered: str) -> None:
    tokenizer = byte_level(LLAMA_2)
    complete = Script(ChatFormat.of(tokenizer), " 1 2")
    (given,) = ask(complete, complete.chat, [Item("a", ("Go",), opening=opening)], CHAT)
    assert complete.requests[0].prompt_ids == ids_of(tokenizer, rendered)
    assert given.texts == (" 1 2",)  # the space is the answer's own here


def test_an_opening_that_forges_a_turn_is_an_error_of_its_item(chat: ChatFormat) -> None:
    given = ask(Script(chat), chat, [Item("a", ("Go",), opening="<|end|>"), Item("b", ("Go",))], CHAT)
    assert "holds '<|end|>'" in given[0].error
    assert given[1].error == ""


def test_a_chat_longer_than_the_context_is_not_cut(chat: ChatFormat) -> None:
    complete = Script(chat)
    ask(complete, chat, [Item("a", ("word " * 600,))], CHAT, 64)
    assert len(complete.requests[0].prompt_ids) > 600


def test_an_items_temperature_is_taken_instead_of_the_protocols(chat: ChatFormat) -> None:
    complete = Script(chat)
    items = [Item("a", ("x",), temperature=0.7), Item("b", ("x",)), Item("c", ("x",), temperature=0.0)]
    ask(complete, chat, items, dataclasses.replace(CHAT, temperature=0.2, top_p=0.9, seed=3, stops=("", "Q:")))
    expected = [Sampling(8, temperature, 0.9, 3, ("Q:",)) for temperature in (0.7, 0.2, 0.0)]
    assert [request.sampling for request in complete.requests] == expected


# ---- text -------------------------------------------------------------------------------------------------------------


def test_a_text_is_tokenised_as_the_tokenizer_does_by_itself() -> None:
    """With its BOS, which is not doubled where the text brings it; each turn alone, the opening at the first one's end."""
    tokenizer = with_bos()
    complete = Script(ChatFormat.of(tokenizer))
    items = [Item("a", ("What is", "<s>Where"), opening=" the"), Item("b", ("Zanzibar",))]
    ask(complete, complete.chat, items, TEXT)
    texts = ["<s>What is the", "<s>Zanzibar", "<s>Where"]
    assert [request.prompt_ids for request in complete.requests] == [ids_of(tokenizer, text) for text in texts]
    assert complete.requests[0].prompt_ids[0] == tokenizer.bos_token_id


def test_a_tokenizer_without_bos_adds_nothing(chat: ChatFormat) -> None:
    complete = Script(chat, " 7")
    (given,) = ask(complete, chat, [Item("a", ("Answer:",))], TEXT)
    assert complete.requests[0].prompt_ids == (37, 82, 453, 293, 30)
    assert given.texts == (" 7",)


def test_the_white_space_that_an_answer_begins_with_is_kept_in_text_form() -> None:
    """The template writes a space before answers, so `ChatFormat.decode` drops one; a program needs all four."""
    complete = Script(ChatFormat.of(byte_level(LLAMA_2)), "    return x")
    (given,) = ask(complete, complete.chat, [Item("a", ("def f(x):\n",))], TEXT)
    assert given.texts == ("    return x",)


@needs_llama
def test_the_white_space_is_kept_with_a_tokenizer_that_drops_it_from_the_first_token() -> None:
    tokenizer = llama()
    prompt, whole = (tuple(tokenizer(text)["input_ids"]) for text in ("def f(x):\n", "def f(x):\n    return x"))
    new = whole[len(prompt) :]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(new) == "   return x"
    assert ChatFormat.of(tokenizer, "plain").decode_after(prompt, new) == "    return x"


def test_an_answer_behind_half_a_character_is_decoded_alone() -> None:
    """The prompt ends in the first of the two bytes of "é"; what follows makes it whole, so the prompt's text changes."""
    chat = ChatFormat.of(byte_level(CHATML))
    first, second = ids_of(byte_level(CHATML), "é")
    assert chat.decode_after((first,), (second, *chat.tokens("x"))) == chat.tokenizer.decode([second, *chat.tokens("x")])


def test_a_text_that_leaves_no_room_is_cut_on_the_left_and_counted(chat: ChatFormat, tmp_path: Path) -> None:
    """Of 40 tokens a context of 32 keeps the last 24, and 8 are for the answer: 16 are left out."""
    text = "Answer: 7" * 6
    ids = chat.tokens(text)[:40]
    prompt = chat.spell(ids)
    assert chat.tokens(prompt) == ids
    complete = Script(chat)
    given = ask(complete, chat, [Item("a", (prompt,)), Item("b", ("Answer:",))], TEXT, 32)
    assert complete.requests[0].prompt_ids == ids[-24:]
    assert [item.cut for item in given] == [(16,), (0,)]
    _, counts = scoring.score_answers(TASK, [Item("a"), Item("b")], given, ScoringResources(), tmp_path)
    assert counts["prompts_cut"] == 1


@pytest.mark.parametrize("changes", [{"history": (("a", "b"),)}, {}])
def test_text_form_has_no_messages(chat: ChatFormat, changes: dict[str, Any]) -> None:
    protocol = TEXT if changes else dataclasses.replace(TEXT, system="Be kind.")
    complete = Script(chat)
    (given,) = ask(complete, chat, [Item("a", ("x",), **changes)], protocol)
    assert "no system message and no history" in given.error
    assert complete.requests == []


# ---- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("12\n\nQuestion: 3", ("Question:", "\n\n"), "12"),  # the first place counts, not the first stop
        ("a Question b", ("Question:", "Question"), "a "),
        ("Question: 3", ("Question:",), ""),
        ("no stop: here", ("Stop",), "no stop: here"),
        ("a", (), "a"),
        ("a", ("",), "a"),
        ("abab", ("b", "ab"), ""),
    ],
)
def test_a_text_is_cut_at_the_first_place_of_any_stop(text: str, stops: tuple[str, ...], kept: str) -> None:
    assert answers.cut(text, stops) == kept


def test_an_answer_that_was_cut_ended_at_a_stop(chat: ChatFormat) -> None:
    """Whatever the engine said; tokens are those that were generated. The third answer is nothing but its stop."""

    def complete(requests: Sequence[Request]) -> list[Completion]:
        return [Completion((1, 2, 3), text, "length") for text in ("one Q: two", "one two", "Q:")]

    given = ask(complete, chat, [Item(name, ("x",)) for name in "abc"], dataclasses.replace(CHAT, stops=("Q:",)))
    assert [item.texts for item in given] == [("one ",), ("one two",), ("",)]
    assert [item.finish_reasons for item in given] == [("stop",), ("length",), ("stop",)]
    assert [item.tokens for item in given] == [(3,)] * 3


class Spoken:
    """Decodes token n as the n-th of some pieces, and notes how many tokens it was given."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces
        self.lengths: list[int] = []

    def __call__(self, ids: Sequence[int]) -> str:
        self.lengths.append(len(ids))
        return "".join(self.pieces[id % len(self.pieces)] for id in ids)


PIECES = ["a", "b", "Qu", "es", "tion", ":", "\n", " ", "c", "Question", "", "d"]


def engine_of(decode: Callable[[Sequence[int]], str], name: str = "llama") -> TransformersEngine:
    return TransformersEngine(make_model(name), ENDS, CONTEXT, decode)


def complete_with(engine: TransformersEngine, requests: Sequence[Request]) -> list[Completion]:
    found = dict(engine.complete(requests))
    return [found[index] for index in range(len(requests))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stops", [("b",), ("Ques",), ("tion:", "\n "), ("d", "ac"), ("never",)])
def test_an_engine_that_stops_early_gives_the_beginning_of_what_it_gives_without(
    stops: tuple[str, ...], temperature: float
) -> None:
    """Without: the first token after which a stop is in the text is looked for by hand. Stops span tokens ("Ques", "tion:")."""
    import numpy as np

    random = np.random.default_rng(0)
    prompts = [random_ids(random, length) for length in range(3, 43)]
    free = [Request(prompt, Sampling(40, temperature), n) for n, prompt in enumerate(prompts)]
    stopping = [Request(prompt, Sampling(40, temperature, stops=stops), n) for n, prompt in enumerate(prompts)]
    engine = engine_of(Spoken(PIECES))
    stopped = 0
    for whole, cut in zip(complete_with(engine, free), complete_with(engine, stopping), strict=True):
        texts = ["".join(PIECES[id % len(PIECES)] for id in whole.tokens[:n]) for n in range(len(whole.tokens) + 1)]
        first = next((n for n, text in enumerate(texts) if any(stop in text for stop in stops)), None)
        assert cut.tokens == whole.tokens[:first]
        assert cut.finish_reason == ("stop" if first is not None else whole.finish_reason)
        assert answers.cut(cut.text, stops) == answers.cut(whole.text, stops)
        stopped += first is not None
    assert (stopped > 0) == (stops != ("never",))


def test_a_model_that_answers_one_prompt_at_a_time_stops_too() -> None:
    engine = engine_of(Spoken(PIECES), "position biases")
    (free,) = complete_with(engine, [Request((20, 21, 22), Sampling(30))])
    stop = PIECES[free.tokens[3] % len(PIECES)] or "b"
    (cut,) = complete_with(engine, [Request((20, 21, 22), Sampling(30, stops=(stop,)))])
    assert cut.tokens == free.tokens[: len(cut.tokens)]
    assert len(cut.tokens) < len(free.tokens)
    assert cut.text.endswith(stop)


def test_only_a_few_tokens_are_decoded_at_each_step() -> None:
    """8 before a stop's two bytes, and the whole answer once, when it is there."""
    decode = Spoken(["x"])
    engine = TransformersEngine(make_model("llama"), [], CONTEXT, decode)
    complete_with(engine, [Request((20,), Sampling(100, stops=("éx",)))])
    assert sorted(decode.lengths)[-2:] == [3 + 8, 100]
    decode.lengths.clear()
    complete_with(engine, [Request((20,), Sampling(100))])
    assert decode.lengths == [100]


def test_a_tail_that_looks_like_a_stop_is_not_one_if_the_text_has_none() -> None:
    """This decoder writes a mark before what is not the beginning of the answer, as some drop a space there."""
    (free,) = complete_with(engine_of(Spoken(["x"])), [Request((20,), Sampling(60))])
    assert len(free.tokens) > 20

    def decode(ids: Sequence[int]) -> str:
        return ("" if tuple(ids) == free.tokens[: len(ids)] else "^") + "x" * len(ids)

    (completion,) = complete_with(engine_of(decode), [Request((20,), Sampling(60, stops=("^x",)))])
    assert completion == free


def test_stops_are_part_of_a_requests_key_and_not_of_its_seed() -> None:
    one, other = (Request((1,), Sampling(8, 1.0, stops=stops)) for stops in ((), ("Q:",)))
    assert one.key != other.key
    assert one.seed == other.seed
    greedy = [Request((1,), Sampling(8, stops=stops)).key for stops in ((), ("Q:",), ("Q:",))]
    assert greedy[0] != greedy[1] == greedy[2]


# ---- continuations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "text", "expected"),
    [
        ("Answer:", " 7", ((37, 82, 453, 293, 30), (225, 27))),
        ("Answer: ", "7", ((37, 82, 453, 293, 30), (225, 27))),  # the space is the text's
        ("Answer: ", " 7", ((37, 82, 453, 293, 30), (261, 27))),  # two spaces are one token
        ("se", "ven apples", ((538,), (90, 313, 548))),
        ("", " seven", ((4,), (557, 90, 313))),  # no BOS: the EOS, 4, stands before it
        ("  ", "7", ((4,), (261, 27))),
        ("s", "e", ((87,), ())),  # both are the one token "se"
    ],
)
def test_the_tokens_of_a_continuation(
    chat: ChatFormat, context: str, text: str, expected: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """Tokens by the embedded tokenizer's vocabulary: 37 82 453 293 30 is A n sw er ':', 225 a space, 261 two, 27 is 7."""
    assert chat.pair_tokens(context, text) == expected


def test_a_bos_stands_before_a_context_once() -> None:
    tokenizer = with_bos()
    chat, bos = ChatFormat.of(tokenizer), tokenizer.bos_token_id
    where, paris = ids_of(tokenizer, "Where?"), ids_of(tokenizer, " Paris")
    assert chat.pair_tokens("Where?", " Paris") == ((bos, *where), paris)
    assert chat.pair_tokens("<s>Where?", " Paris") == ((bos, *where), paris)
    assert chat.pair_tokens("", " Paris") == ((bos,), paris)
    assert chat.pair_tokens("", "<s> Paris") == ((bos,), paris)


def test_many_pairs_are_tokenised_as_one_by_one(chat: ChatFormat) -> None:
    pairs = [("Answer:" * (n % 5), f" {n} apples") for n in range(1500)]
    assert chat.pairs_tokens(pairs) == [chat.pair_tokens(*pair) for pair in pairs]


def likelihoods_of(given: ItemAnswer) -> list[tuple[float, int]]:
    return [(record["logp"], record["tokens"]) for record in map(json.loads, given.texts)]


def through(engine: TransformersEngine, folder: Path) -> answers.Complete:
    """The engine behind a store, as a comparison has it."""

    def complete(requests: Sequence[Request]) -> list[Completion]:
        return AnswerStore(folder, {"engine": "test"}).complete(lambda: Likelihoods(engine), requests)

    return complete


def test_likelihoods_are_those_of_a_plain_forward_pass(mini_folder: Path, chat: ChatFormat, tmp_path: Path) -> None:
    model = load_model(mini_folder)
    engine = TransformersEngine(model, chat.end_token_ids, 512, chat.decode)
    texts = [("Tom has 3 apples and gets 4.", choice) for choice in (" He has 7.", " He has 8 apples.", " No.")]
    items = [
        Item("a", continuations=tuple(Continuation(*pair) for pair in texts)),
        Item("b", continuations=(Continuation("", "7"),)),
    ]
    given = ask(through(engine, tmp_path), chat, items, TEXT)
    for (context, text), (logp, tokens) in zip(
        [*texts, ("<|end|>", "7")], [*likelihoods_of(given[0]), *likelihoods_of(given[1])], strict=True
    ):
        before, after = chat.tokens(context), chat.tokens(text)
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([[*before, *after]])).logits[0].double().log_softmax(1)
        expected = sum(float(logps[len(before) - 1 + n, token]) for n, token in enumerate(after))
        assert logp == pytest.approx(expected, abs=1e-5)
        assert tokens == len(after)
    assert given[0].finish_reasons == ("stop",) * 3
    assert given[0].tokens == (0,) * 3
    assert given[0].cut == (0,) * 3


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"state space"}))
def test_a_context_too_long_loses_its_beginning(name: str, chat: ChatFormat, tmp_path: Path) -> None:
    """A context of 128 takes 128 inputs, and the last token of a continuation is none: 129 tokens, as lm-eval has it."""

    class Numbers:
        """Texts of numbers, each a token."""

        def pairs_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
            return [(tuple(map(int, one.split())), tuple(map(int, other.split()))) for one, other in pairs]

    model = make_model(name)
    context, text = [16 + n % 150 for n in range(140)], [20, 30, 40, 50]
    numbers: Any = Numbers()
    item = Item("a", continuations=(Continuation(" ".join(map(str, context)), " ".join(map(str, text))),))
    engine = TransformersEngine(model, ENDS, CONTEXT, lambda ids: "")
    (given,) = ask(through(engine, tmp_path), numbers, [item], TEXT, CONTEXT)
    kept = context[-(CONTEXT + 1 - 4) :]
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([[*kept, *text[:-1]]])).logits[0].double().log_softmax(1)
    assert given.cut == (140 - 125,)
    assert likelihoods_of(given)[0][0] == pytest.approx(sum(float(logps[124 + n, id]) for n, id in enumerate(text)), abs=1e-4)


def test_what_cannot_be_scored_is_an_error_of_its_item(chat: ChatFormat, tmp_path: Path) -> None:
    items = [
        Item("a", continuations=(Continuation("Answer:", " 7"), Continuation("s", "e"))),
        Item("b", continuations=(Continuation("Answer:", " 7" * 20),)),
        Item("c", continuations=(Continuation("Answer:", " 7"),)),
        Item("d", history=(("x", "y"),), continuations=(Continuation("Answer:", " 7"),)),
    ]
    asked: list[Request] = []

    def complete(requests: Sequence[Request]) -> list[Completion]:
        asked.extend(requests)
        return [Completion((225, 27), "", "stop", logps=(-0.5, -1.0)) for _ in requests]

    given = ask(complete, chat, items, TEXT, 32)
    assert [item.error for item in given] == [
        "a continuation has no tokens of its own",
        "a continuation of 40 tokens leaves no room for its context",
        "",
        "t/text-v1: a prompt in text form has no system message and no history",
    ]
    assert likelihoods_of(given[2]) == [(-1.5, 2)]
    scores, counts = scoring.score_answers(Ranked(), items, given, ScoringResources(), tmp_path)
    assert [item.score for item in scores] == [None, None, 1.0, None]
    assert (counts["empty"], counts["refused"], counts["unscored"]) == (0, 0, 3)


@dataclasses.dataclass(frozen=True)
class Ranked(LengthTask):
    """Full marks for the first choice being the likeliest."""

    def score(self, items: Sequence[Item], texts: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        logps = [[json.loads(text)["logp"] for text in given] for given in texts]
        return [Score(float(given[0] == max(given)), "by likelihood") for given in logps]


def test_in_chat_form_a_context_is_the_last_user_message() -> None:
    tokenizer = byte_level(CHATML)
    requests: list[Request] = []

    def complete(asked: Sequence[Request]) -> list[Completion]:
        requests.extend(asked)
        return [Completion((1,), "", "stop", logps=(-1.0,)) for _ in asked]

    item = Item("a", history=(("Shot?", "Shown."),), opening="It is", continuations=(Continuation("Where?", " Paris"),))
    ask(complete, ChatFormat.of(tokenizer), [item], dataclasses.replace(CHAT, system="Be kind."))
    prompt = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nShot?<|im_end|>\n<|im_start|>assistant\nShown.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nIt is"
    )
    assert requests == [Given.after(ids_of(tokenizer, prompt), ids_of(tokenizer, " Paris"))]


def test_items_of_both_kinds_are_answered_in_their_order(chat: ChatFormat) -> None:
    def complete(requests: Sequence[Request]) -> list[Completion]:
        return [Completion((1,), "text", "stop", logps=(-1.0,)) for _ in requests]

    items = [Item("a", ("x",)), Item("b", continuations=(Continuation("x", " y"),)), Item("c", ("x",))]
    given = ask(complete, chat, items, dataclasses.replace(TEXT, samples=2))
    assert [(item.id, item.sample) for item in given] == [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1)]


class Scoring(Fake):
    """Scores every token with its own number, and notes the trees."""

    def __init__(self) -> None:
        super().__init__()
        self.trees: list[Sequence[TokenTree]] = []

    def logps(self, trees: Sequence[TokenTree]) -> list[list[tuple[float, ...]]]:
        self.trees.append(trees)
        return [[tuple(-float(token) for token in given) for given in tree.completions] for tree in trees]


def test_continuations_of_a_context_share_a_tree_and_are_kept(tmp_path: Path) -> None:
    engine, store = Scoring(), AnswerStore(tmp_path, {"engine": "fake"})
    pairs = [((1, 2), (3,)), ((7,), (3,)), ((1, 2), (4, 5)), ((1, 2), (3,))]
    requests = [Given.after(*pair) for pair in pairs]
    done: list[int] = []
    found = store.complete(lambda: Likelihoods(engine), requests, done.append)
    assert [completion.logps for completion in found] == [(-3.0,), (-3.0,), (-4.0, -5.0), (-3.0,)]
    assert engine.trees == [[TokenTree((1, 2), ((3,), (4, 5))), TokenTree((7,), ((3,),))]]
    assert sum(done) == 4
    fresh = AnswerStore(tmp_path, {"engine": "fake"})
    assert fresh.complete(lambda: pytest.fail("asked again"), requests) == found


def test_likelihoods_are_handed_out_in_portions() -> None:
    """A continuation of a thousand tokens after each of 130 contexts of as many; and too many of one context for one tree."""
    engine = Scoring()
    requests = [Given.after((n,) * 1000, (1,) * 1000) for n in range(130)]
    assert [index for index, _ in Likelihoods(engine).complete(requests)] == list(range(130))
    assert [len(trees) for trees in engine.trees] == [33, 33, 33, 31]
    assert 2000 * 33 >= POSITIONS > 2000 * 32
    engine.trees.clear()
    assert len(list(Likelihoods(engine).complete([Given.after((1,), (n, *(1,) * 99)) for n in range(200)]))) == 200
    assert [len(trees[0].completions) for trees in engine.trees] == [82, 82, 36]
    assert 100 * 82 >= TREE > 100 * 81


def test_likelihoods_that_are_no_numbers_are_an_error() -> None:
    class Broken(Scoring):
        def logps(self, trees: Sequence[TokenTree]) -> list[list[tuple[float, ...]]]:
            return [[(float("nan"),)]]

    with pytest.raises(ArithmeticError, match="not finite"):
        list(Likelihoods(Broken()).complete([Given.after((1,), (2,))]))


# ---- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, no.", True),
        ("Sorry, I cannot do that.", True),
        ("I cannot answer this.", True),
        ("I am unable to say.", True),
        ("As an AI language model, I have no apples.", True),
        ("Unfortunately, I do not know.", True),
        ("I can add 3 and 4.", False),
        ("He is sorry. The answer is 7.", False),
        ("Icannot", False),
        ("The answer is 7. I'm sorry.", False),
        ("", False),
    ],
)
def test_refusals_are_known_by_how_they_begin(text: str, refused: bool, tmp_path: Path) -> None:
    given = [ItemAnswer("a", 0, (text,), ("stop",), (3,))]
    _, counts = scoring.score_answers(TASK, [Item("a", ("x",))], given, ScoringResources(), tmp_path)
    assert counts["refused"] == refused
    assert counts["empty"] == (not text)


@dataclasses.dataclass(frozen=True)
class Unsure(LengthTask):
    """Scores nothing, for the reason that is the answer, and counts what it likes."""

    def score(self, items: Sequence[Item], texts: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        return [Score(None, turns[0], {"empty": True}) for turns in texts]


def test_unscored_items_are_counted_by_reason_and_a_scorers_own_counts_are_believed(tmp_path: Path) -> None:
    reasons = ["no rating"] * 3 + ["late"] * 2 + ["x"] * 2 + ["seldom", "sorry, no"]
    items = [Item(str(n), ("?",)) for n in range(9)]
    given = [ItemAnswer(str(n), 0, (reason,), ("stop",), (1,)) for n, reason in enumerate(reasons)]
    _, counts = scoring.score_answers(Unsure(), items, given, ScoringResources(), tmp_path)
    named = {key: count for key, count in counts.items() if key.startswith("unscored")}
    assert named == {"unscored": 9, "unscored: no rating": 3, "unscored: late": 2, "unscored: x": 2}
    assert (counts["empty"], counts["refused"]) == (9, 1)


def test_a_canary_of_likelihoods_has_no_empty_answer() -> None:
    gold = tuple(json.dumps({"logp": logp, "tokens": 1}) for logp in (0.0, -9.0))
    item = Item("a", continuations=(Continuation("x", " y"), Continuation("x", " z")), gold=gold)
    scoring.check_canaries(Ranked(), [item], ScoringResources())
    with pytest.raises(scoring.CanaryError, match="the gold answer of item a scores 0"):
        scoring.check_canaries(Ranked(), [dataclasses.replace(item, gold=gold[::-1])], ScoringResources())


# ---- names ------------------------------------------------------------------------------------------------------------


def test_every_task_has_the_name_that_it_is_listed_by() -> None:
    assert {name: tasks.load_task(name).name for name in tasks.TASKS} == {name: name for name in tasks.TASKS}
    assert set(tasks.ALIASES.values()) <= set(tasks.TASKS)
    assert {name for names in tasks.SUITES.values() for name in names} <= {*tasks.TASKS, *tasks.ALIASES}
    assert not {*tasks.ALIASES, *tasks.SUITES} & set(tasks.TASKS)


def test_a_bare_name_stands_for_a_protocol() -> None:
    assert tasks.load_task("gsm8k").name == "gsm8k/lm-eval-v3"
    assert tasks.expand(["gsm8k", "mini-gsm8k", "gsm8k/lm-eval-v3", "gsm8k/lm-eval-v1"]) == [
        "gsm8k/lm-eval-v3",
        "mini-gsm8k",
        "gsm8k/lm-eval-v1",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gms8k", "unknown task 'gms8k': did you mean 'gsm8k'?"),
        (
            "gsm8k/lm-eval-v4",
            "unknown protocol of gsm8k 'lm-eval-v4': did you mean 'lm-eval-v3'? Known: chat-0shot-v1, lm-eval-v1,",
        ),
        ("mini-gsm8k/greedy", "unknown task 'mini-gsm8k/greedy': did you mean 'mini-gsm8k'?"),
        ("lm-eval:", "task 'lm-eval:' cannot be loaded"),
    ],
)
def test_a_name_that_is_not_known_offers_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        tasks.load_task(name)
    assert message in str(caught.value)


@pytest.mark.parametrize("typed", ["lm-eval:arc_easy", "lm-eval/arc_easy", "lm-eval-chat:arc_easy", "lm-eval-chat/arc_easy"])
def test_a_task_of_lm_evals_is_made_by_the_bridge(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def harness_task(name: str, chat: bool, data_dir: Path | None) -> LengthTask:
        asked.append((name, chat, data_dir))
        return TASK

    monkeypatch.setattr("gsil_bench.tasks.lm_eval.harness_task", harness_task)
    assert tasks.load_task(typed, Path("data")) is TASK
    assert asked == [("arc_easy", "chat" in typed, Path("data"))]
    assert tasks.is_task(typed) == (":" in typed)


def test_a_file_of_summaries_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"document": "A long text.", "summaries": ["Short."]}\n')
    one, other = tasks.load_task(f"summarization:{path}"), tasks.load_task(f"summarization/rouge-finished:{path}")
    assert [task.items("test", None)[0].reference for task in (one, other)]
    assert one.name != other.name
    with pytest.raises(UserError, match="did you mean 'rouge-finished'"):
        tasks.load_task(f"summarization/rouge-finishd:{path}")


def test_what_names_a_task_and_what_a_file() -> None:
    assert all(map(tasks.is_task, ["mini", "gsm8k", "gsm8k/lm-eval-v1", "lm-eval:arc", "summarization:mine.jsonl"]))
    assert not any(map(tasks.is_task, ["gsm8k/train.jsonl", "lm-eval/arc.jsonl", "mine.jsonl", "support:TASK"]))


# ---- the command ------------------------------------------------------------------------------------------------------

NAMED = LengthTask(name="letters/text-v1", protocol=dataclasses.replace(TEXT, name="letters/text-v1", stops=("e",)))
ESCAPES = LengthTask(name="letters/../../x")


@dataclasses.dataclass(frozen=True)
class Choices(LengthTask):
    """Two continuations an item."""

    name: str = "choices/v1"
    protocol: AnswerProtocol = dataclasses.field(default_factory=lambda: AnswerProtocol("choices/v1", 1, form="text"))

    def items(self, split: str, data_dir: Path | None) -> Sequence[Item]:
        return [Item(f"{n}", continuations=(Continuation(f"{n}:", " a"), Continuation(f"{n}:", " bb"))) for n in range(5)]

    def score(self, items: Sequence[Item], texts: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        assert all(len(given) == 2 for given in texts)
        return [Score(float(json.loads(given[0])["logp"] > json.loads(given[1])["logp"]), "by likelihood") for given in texts]


CHOICES = Choices()


@dataclasses.dataclass(frozen=True)
class NeedsLibrary(LengthTask):
    """Its scorer needs what is not installed."""

    name: str = "poor"
    reads: bool = False

    def items(self, split: str, data_dir: Path | None) -> Sequence[Item]:
        if self.reads:
            raise MissingLibraryError("poor needs rouge_score: pip install rouge-score")
        return super().items("test", data_dir)

    def score(self, items: Sequence[Item], texts: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        raise MissingLibraryError("poor needs rouge_score: pip install rouge-score")


POOR = NeedsLibrary()
POORER = NeedsLibrary(reads=True)


def test_results_of_a_protocol_lie_in_the_folder_of_its_task(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tasks="test_asking:NAMED,test_asking:CHOICES,support:TASK", methods="sft")
    code, out, err = call_quietly(words, capsys)
    assert code == 0, err
    found = {path.relative_to(tmp_path / "out" / "results").as_posix() for path in (tmp_path / "out" / "results").rglob("*.json")}
    cells = [
        f"{task}/{method}-seed0.json" for task in ("letters/text-v1", "choices/v1", "letters") for method in ("sft", "start")
    ]
    assert found >= set(cells)
    assert "letters/text-v1" in out
    counts = json.loads((tmp_path / "out" / "results" / "choices" / "v1" / "sft-seed0.json").read_text())["counts"]
    assert (counts["answers"], counts["generated_tokens"]) == (5, 0)
    stops = [row["finish_reasons"] for path in tmp_path.rglob("answers.jsonl") for row in read_jsonl(path)]
    assert ["stop", "stop"] in stops  # of the continuations
    code, _, err = call_quietly(words, capsys)
    assert code == 0
    assert "nothing to do: every stage was there" in err


@pytest.mark.parametrize("task", ["POOR", "POORER"])
def test_a_missing_library_fails_its_task_before_anything_is_asked(
    task: str, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call_quietly(command(tasks=f"test_asking:{task},support:TASK", methods="sft"), capsys)
    assert code == 1
    assert "needs rouge_score: pip install rouge-score" in " ".join(out.split())
    assert "FAILED canaries of" in err
    assert not [line for line in err.splitlines() if "answer poor" in line or f"answer test_asking/{task}" in line]
    assert (tmp_path / "out" / "results" / "letters" / "sft-seed0.json").exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("test_asking:ESCAPES", "letters, digits, '.', '_' and '-' only (64 at most), parts by '/'"),
        ("support:TASK,test_asking:TWIN", "two tasks are named 'letters'"),
        ("gsm8k/openllm", "did you mean 'openllm-v1'?"),
    ],
)
def test_names_are_checked_before_anything_runs(
    typed: str, message: str, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call_quietly(command(tasks=typed), capsys)
    assert code == 2
    assert message in err


TWIN = LengthTask()
