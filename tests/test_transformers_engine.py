"""What may not change an answer: neighbours, order, batch size, shared beginnings, memory that runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, ENDS, generate, make_model, random_ids
from torch import Tensor
from transformers import PreTrainedModel

from gsil_bench.data.chat import ChatFormat
from gsil_bench.errors import UserError
from gsil_bench.generation import transformers_engine
from gsil_bench.generation.decoder import OneAtATime, SlotDecoder, attending_to_slots
from gsil_bench.generation.engine import Completion, Request, Sampling
from gsil_bench.generation.engines import Served
from gsil_bench.generation.slots import CPU_BAND, Piece
from gsil_bench.generation.transformers_engine import TransformersEngine, TransformersOptions
from gsil_bench.models.checkpoint import load_model, load_tokenizer

ROW = 2 * 2 * 2 * 8 * 4
"""Bytes of a token's keys and values in the tiny Llama: two kinds, layers, heads, 8 numbers of 4 bytes."""
DRAWN = Sampling(12, 1.0, 0.95, seed=3)


def engine_of(model: PreTrainedModel, rows: int | None = None) -> TransformersEngine:
    """The engine, perhaps with memory for so many of the longest sequences and the spare one."""
    memory = None if rows is None else (rows + 1) * CONTEXT * ROW
    return TransformersEngine(model, ENDS, CONTEXT, lambda ids: " ".join(map(str, ids)), memory_bytes=memory)


def complete(engine: TransformersEngine, requests: Sequence[Request]) -> list[Completion]:
    pairs = list(engine.complete(requests))
    completions = dict(pairs)
    assert len(pairs) == len(completions) == len(requests)
    return [completions[index] for index in range(len(requests))]


def mixed(count: int, sampling: Sampling = DRAWN, longest: int = CONTEXT - 1) -> list[Request]:
    """Prompts of 1 to `longest` tokens, some of them more than once."""
    random = np.random.default_rng(0)
    prompts = [random_ids(random, length) for length in random.integers(1, longest + 1, count)]
    prompts[1::5] = prompts[0::5][: len(prompts[1::5])]
    return [Request(prompt, sampling, sample) for sample, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make_model("llama")


class Counting(SlotDecoder):
    """Notes what passes went through it; may run out of memory."""

    filled: list[Sequence[Piece]]
    rows: list[int]
    fail: Callable[[str], None] = staticmethod(lambda what: None)

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int, autocast: bool) -> None:
        type(self).rows.append(rows - 1)
        super().__init__(model, rows, capacity, autocast)

    def fill(self, pieces: Sequence[Piece]) -> Tensor:
        type(self).filled.append(pieces)
        type(self).fail("fill")
        return super().fill(pieces)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        type(self).fail("step")
        return super().step(tokens, positions)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    """The engine's decoders, from here on; the check of the model before has its own."""
    kind = type("Fresh", (Counting,), {"filled": [], "rows": []})
    monkeypatch.setattr(transformers_engine, "SlotDecoder", kind)
    return kind


def filled_tokens(counting: type[Counting]) -> int:
    return sum(len(piece.tokens) for pieces in counting.filled for piece in pieces)


# ---- greedy -----------------------------------------------------------------------------------------------------------


def test_greedy_equals_generate_with_a_trained_model(mini_folder: Path) -> None:
    """Its tokens are far more certain than an untrained model's, and its answers end."""
    model, random = load_model(mini_folder), np.random.default_rng(0)
    ends, context = [int(model.config.eos_token_id)], int(model.config.max_position_embeddings)
    tokenizer = load_tokenizer(mini_folder)
    chat = ChatFormat.of(tokenizer)
    texts = ["What is 3 plus 4?", "Write a function.", "Tom has 5 apples and eats 2. How many are left?", "Say a word. " * 9]
    prompts = [chat.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    prompts += [random_ids(random, length) for length in (1, 7, context - 1)]
    engine = TransformersEngine(model, ends, context, lambda ids: "")
    completions = complete(engine, [Request(prompt, Sampling(24)) for prompt in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.tokens == generate(model, prompt, 24, context, ends)
    assert "stop" in [completion.finish_reason for completion in completions]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_that_a_tokenizer_pads_does_not_matter(tiny_model: Path, side: str, tmp_path: Path) -> None:
    """From the folder's tokenizer to the text, as a comparison does it."""
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.padding_side = side
    tokenizer.save_pretrained(tmp_path)
    chat = ChatFormat.of(load_tokenizer(tmp_path))
    assert chat.tokenizer.padding_side == side
    model = load_model(tiny_model)
    served = Served(
        tiny_model, lambda: model, chat.end_token_ids, 256, chat.decode, "cpu", "fp32", False, chat.tokens, chat.spell
    )
    messages = [[{"role": "user", "content": "Count to " + "nine and " * number}] for number in range(0, 60, 5)]
    requests = [Request(chat.prompt_ids(message), Sampling(16)) for message in messages]
    for request, completion in zip(requests, complete(TransformersOptions().make(served), requests), strict=True):
        assert completion.tokens == generate(model, request.prompt_ids, 16, 256, chat.end_token_ids)
        assert completion.text == chat.decode(completion.tokens)


def test_the_context_is_a_limit_of_single_items(llama: PreTrainedModel) -> None:
    random = np.random.default_rng(0)
    lengths = [5, CONTEXT - 3, CONTEXT, CONTEXT - 1, 0, CONTEXT + 40, 9]
    requests = [Request(random_ids(random, length), Sampling(8)) for length in lengths]
    completions = complete(engine_of(llama), requests)
    for index in (0, 1, 3, 6):
        assert completions[index].tokens == generate(llama, requests[index].prompt_ids, 8)
        assert completions[index].error == ""
    assert len(completions[3].tokens) == 1
    assert [completion.finish_reason for completion in completions].count("error") == 3
    assert completions[2].error == "a prompt of 128 tokens leaves no room in a context of 128"
    assert completions[5].error == "a prompt of 168 tokens leaves no room in a context of 128"
    assert completions[4].error == "empty prompt"


def test_no_requests_are_no_work(llama: PreTrainedModel, counting: type[Counting]) -> None:
    assert complete(engine_of(llama), []) == []
    assert complete(engine_of(llama), [Request((), DRAWN)])[0].finish_reason == "error"
    assert counting.rows == []


def test_finish_reason_says_whether_the_end_token_came(llama: PreTrainedModel) -> None:
    completions = complete(engine_of(llama), mixed(120, Sampling(20, 1.0), longest=60))
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert (completion.tokens[-1] in ENDS) == (completion.finish_reason == "stop")
        assert not set(ENDS) & set(completion.tokens[:-1])
        assert completion.finish_reason == "stop" or len(completion.tokens) == 20
        assert completion.text == " ".join(map(str, completion.tokens))


# ---- neighbours -------------------------------------------------------------------------------------------------------


def test_samples_depend_on_nothing_but_the_request(llama: PreTrainedModel) -> None:
    """Rows, order, subsets, one at a time, and several calls instead of one."""
    requests, random = mixed(60), np.random.default_rng(1)
    whole = complete(engine_of(llama), requests)
    assert len(set(whole)) > 50
    for rows in (1, 2, 3, 7, 59):
        assert complete(engine_of(llama, rows), requests) == whole
    for order in (range(59, -1, -1), random.permutation(60), random.permutation(60)[:17]):
        assert complete(engine_of(llama, 5), [requests[n] for n in order]) == [whole[n] for n in order]
    engine = engine_of(llama)
    assert [complete(engine, [request])[0] for request in requests] == whole
    assert complete(engine, requests[:20]) + complete(engine, requests[20:]) == whole


@pytest.mark.parametrize("sampling", [Sampling(40), Sampling(40, 0.02)])
def test_choices_that_rounding_decides_do_not_depend_on_rows(sampling: Sampling) -> None:
    """Each token has a twin whose logits are the same but for rounding, which differs between batches."""
    model, random = make_model("llama"), np.random.default_rng(0)
    with torch.no_grad():
        twins = model.lm_head.weight[100:]
        twins.copy_(model.lm_head.weight[:100] * (1 + 1e-7 * torch.randn(100, 32)))
    requests = [Request(random_ids(random, length), sampling) for length in random.integers(1, 80, 40)]
    many, few, alone = (complete(engine_of(model, rows), requests) for rows in (None, 3, 1))
    assert many == few == alone


def test_requests_with_different_settings_share_a_batch(llama: PreTrainedModel) -> None:
    settings = [Sampling(12), Sampling(5, 1.0), Sampling(12, 0.5, 0.9), Sampling(1, 2.0), Sampling(0), Sampling(500, 1.0, seed=9)]
    requests = [Request((20, 21, 22), sampling, sample) for sampling in settings for sample in range(4)]
    together = complete(engine_of(llama), requests)
    assert together == [complete(engine_of(llama), [request])[0] for request in requests]
    assert {len(completion.tokens) for completion in together[16:20]} == {0}
    assert max(len(completion.tokens) for completion in together[20:]) <= CONTEXT - 3


def test_seeds_and_samples_differ_and_repeats_do_not(llama: PreTrainedModel) -> None:
    sampling = Sampling(12, 1.0, seed=3)
    engine = TransformersEngine(llama, [], CONTEXT, lambda ids: "")  # without ends, so that no two are equal for being short
    samples = complete(engine, [Request((20, 21), sampling, sample) for sample in range(50)])
    seeds = complete(engine, [Request((20, 21), Sampling(12, 1.0, seed=seed)) for seed in range(50)])
    assert len(set(samples)) == len(set(seeds)) == 50
    assert samples[0] == seeds[3]
    greedy = complete(engine_of(llama), [Request((20, 21), Sampling(12, seed=seed), seed) for seed in range(5)])
    assert len(set(greedy)) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_batch_invariant_is_kept(autocast: bool) -> None:
    model = make_model("llama", std=0.1)
    model = model if autocast else model.to(torch.bfloat16)
    requests = mixed(40, Sampling(30, 1.0), longest=90)
    engines = [TransformersEngine(model, ENDS, CONTEXT, lambda ids: "", autocast, True, memory) for memory in (None, 2**18)]
    assert complete(engines[0], requests) == complete(engines[1], requests[::-1])[::-1]
    assert engines[0].identity.endswith("/batch-invariant")
    loose = TransformersEngine(model, ENDS, CONTEXT, lambda ids: "", autocast, False)
    assert all(completion.finish_reason != "error" for completion in complete(loose, requests))
    assert loose.notes == []
    assert "batch-invariant" not in loose.identity


def test_options_say_what_is_promised() -> None:
    options = TransformersOptions()
    assert options.identity("fp32", False).endswith("/batch-invariant")
    assert not options.identity("fp32", True).endswith("/batch-invariant")
    assert not options.identity("bf16", False).endswith("/batch-invariant")
    assert TransformersOptions(batch_invariant=True).identity("bf16", False).endswith("/batch-invariant")
    with pytest.raises(UserError, match="memory_gb=0: must be a number above 0"):
        TransformersOptions(memory_gb=0).check("cpu", "fp32", False)


# ---- shared beginnings ------------------------------------------------------------------------------------------------


def test_samples_of_a_prompt_share_its_pass(llama: PreTrainedModel, counting: type[Counting]) -> None:
    prompts = [random_ids(np.random.default_rng(n), 30) for n in range(3)]
    requests = [Request(prompt, DRAWN, sample) for sample in range(8) for prompt in prompts]
    together = complete(engine_of(llama), requests)
    assert filled_tokens(counting) == 3 * 30
    assert together == [complete(engine_of(llama), [request])[0] for request in requests]


def test_a_header_is_computed_once(llama: PreTrainedModel, counting: type[Counting]) -> None:
    """64 tokens that 20 prompts begin with, and 5 of their own for each."""
    random = np.random.default_rng(0)
    header = random_ids(random, 64)
    requests = [Request((*header, 16 + n, *random_ids(random, 4)), DRAWN) for n in range(20)]
    together = complete(engine_of(llama), requests)
    assert filled_tokens(counting) == 64 + 20 * 5
    assert together == [complete(engine_of(llama), [request])[0] for request in requests]


def test_a_header_stays_while_rows_are_refilled(llama: PreTrainedModel, counting: type[Counting]) -> None:
    """In few rows, beside a second header; two prompts are nothing but a header."""
    random = np.random.default_rng(0)
    headers = [(16, *random_ids(random, 49)), (17, *random_ids(random, 49))]
    prompts = [header + random_ids(random, length) for header in headers for length in random.integers(1, 20, 30)] + headers
    requests = [Request(prompt, Sampling(12, 1.0), logps=True) for prompt in prompts]
    together = complete(engine_of(llama, 6), requests)
    assert filled_tokens(counting) < sum(map(len, prompts)) / 2
    for request, completion in zip(requests, together, strict=True):
        (alone,) = complete(engine_of(llama), [request])
        assert completion.tokens == alone.tokens
        assert completion.logps == pytest.approx(alone.logps, abs=1e-5)


def test_every_prompt_is_computed_once_in_any_number_of_rows(llama: PreTrainedModel, counting: type[Counting]) -> None:
    requests = [Request(prompt, DRAWN) for prompt in {request.prompt_ids for request in mixed(60)}]
    complete(engine_of(llama, 7), requests)
    assert filled_tokens(counting) == sum(len(request.prompt_ids) for request in requests)


# ---- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["fill", "step"])
@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_out_of_memory_halves_the_rows(
    llama: PreTrainedModel, counting: type[Counting], where: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The third and the fifth pass of a kind fail: by then some completions have been handed out."""
    requests, passes = mixed(60), []

    def fail(what: str) -> None:
        passes.append(what)
        if what == where and passes.count(what) in (3, 5):
            raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)

    whole = complete(engine_of(llama), requests)
    counting.rows.clear()
    counting.fail = staticmethod(fail)  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        assert complete(engine_of(llama, 20), requests) == whole
    assert passes.count(where) > 5
    halved = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(halved) == 2
    assert halved[0] == f"out of memory: these prompts go on {counting.rows[0] // 2} at a time"
    assert counting.rows[1] == counting.rows[0] // 2


@pytest.mark.parametrize("rows", [1, 16])
def test_out_of_memory_that_does_not_end_is_raised(llama: PreTrainedModel, counting: type[Counting], rows: int) -> None:
    def fail(what: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    counting.fail = staticmethod(fail)  # type: ignore[assignment]
    requests = [Request((20 + n,) * (CONTEXT - 1), DRAWN) for n in range(20)]
    with pytest.raises(torch.OutOfMemoryError):
        complete(engine_of(llama, rows), requests)
    assert counting.rows == {1: [1], 16: [16, 8, 4, 2, 1]}[rows]


def test_another_error_is_raised_and_leaves_the_model_as_it_was(llama: PreTrainedModel, counting: type[Counting]) -> None:
    def fail(what: str) -> None:
        raise RuntimeError("something else")

    before = llama.config._attn_implementation
    counting.fail = staticmethod(fail)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="something else"):
        complete(engine_of(llama), mixed(5))
    assert len(counting.rows) == 1
    assert llama.config._attn_implementation == before


def test_leaving_early_leaves_the_model_as_it_was(llama: PreTrainedModel) -> None:
    before, requests = llama.config._attn_implementation, mixed(30)
    iterator = engine_of(llama, 4).complete(requests)
    index, completion = next(iterator)
    assert llama.config._attn_implementation != before
    iterator.close()  # type: ignore[attr-defined]
    assert llama.config._attn_implementation == before
    assert complete(engine_of(llama, 4), requests)[index] == completion


def test_memory_decides_the_rows(llama: PreTrainedModel, counting: type[Counting]) -> None:
    """A slot holds a prompt and all of its new tokens but the last, which nothing follows. One row is that of the prefix."""
    requests = [Request((20 + n,) * 117, Sampling(11)) for n in range(30)]
    for rows in (1, 4, 30):
        counting.rows.clear()
        memory = (rows + 1) * (117 + 11 - 1) * ROW
        complete(TransformersEngine(llama, ENDS, CONTEXT, lambda ids: "", memory_bytes=memory), requests)
        assert counting.rows == [rows]


def test_short_prompts_do_not_get_the_slots_of_long_ones(llama: PreTrainedModel, counting: type[Counting]) -> None:
    """One prompt of 120 tokens beside 20 of 3: two groups, and the short ones are all in flight at once."""
    requests = [Request((20,) * 120, Sampling(8)), *(Request((20 + n,) * 3, Sampling(8)) for n in range(20))]
    complete(engine_of(llama, 3), requests)
    assert counting.rows == [1, 20]


# ---- errors and log-probs ---------------------------------------------------------------------------------------------


def test_a_model_that_diverged_is_an_error() -> None:
    model = make_model("llama")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ArithmeticError, match="not numbers"):
        complete(engine_of(model), mixed(3))


def test_a_slow_model_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(make_model("position biases"))
    for _ in range(2):
        complete(engine, mixed(2))
    assert caplog.text.count("prompts are completed one at a time") == 1
    assert len(engine.notes) == 1


def test_log_probs_come_with_those_that_asked(llama: PreTrainedModel) -> None:
    prompts = [random_ids(np.random.default_rng(n), 9) for n in range(6)]
    requests = [Request(prompt, DRAWN, logps=number % 2 == 0) for number, prompt in enumerate(prompts)]
    for request, completion in zip(requests, complete(engine_of(llama), requests), strict=True):
        assert (completion.logps is not None) == request.logps
        assert completion.logps is None or len(completion.logps) == len(completion.tokens)
        assert completion.logps is None or all(logp < 0 for logp in completion.logps)


def test_tokens_that_the_model_lacks_are_an_error_of_their_item(llama: PreTrainedModel) -> None:
    rows = llama.get_input_embeddings().num_embeddings
    good, bad, negative = complete(engine_of(llama), [Request(ids, DRAWN) for ids in ((1, 2), (1, rows), (-1, 2))])
    assert good.finish_reason != "error"
    assert bad.error == f"token ids 1 to {rows} do not fit a vocabulary of {rows}"
    assert negative.finish_reason == "error"


def test_gradients_are_the_callers_affair_between_answers(llama: PreTrainedModel) -> None:
    for _ in engine_of(llama).complete(mixed(4)):
        assert torch.is_grad_enabled()


def test_long_prompts_come_first_and_similar_ones_together() -> None:
    """Two share two thirds of their tokens, so they are neighbours although a third is between them in length."""
    prompts = [(9,) * 3, (1,) * 8 + (2,) * 4, (5,) * 10, (1,) * 8, (9,) * 3]
    order = transformers_engine._in_order([Request(ids, DRAWN) for ids in prompts], range(5))
    assert [prompts[index] for index in order] == [prompts[1], prompts[3], prompts[2], prompts[0], prompts[4]]


def test_rows_beyond_a_band_are_read_to_a_width_of_their_own(llama: PreTrainedModel) -> None:
    """More rows than a band holds, the first of them long and the last short: answers are those of each alone."""
    requests = mixed(2 * CPU_BAND + 7, Sampling(6))
    together = complete(engine_of(llama), requests)
    assert together == [complete(engine_of(llama), [request])[0] for request in requests]


def test_passes_keep_no_graph(llama: PreTrainedModel) -> None:
    """Keys and values that remember how they came about would fill the memory."""
    piece = Piece((1, 2), (0,))
    with attending_to_slots(llama, False):
        slots = SlotDecoder(llama, 2, CONTEXT, False)
        passes = [slots.fill([piece]), slots.step([3], [2]), slots.alone((1, 2))]
    one = OneAtATime(llama, False)
    passes += [one.fill([piece]), one.step([3], [2]), one.alone((1, 2))]
    assert not any(logits.requires_grad for logits in passes)
