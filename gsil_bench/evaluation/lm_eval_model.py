"""An engine as a model of lm-eval's, for those who run lm-eval itself: `lm_eval.simple_evaluate(model=engine_lm(…), tasks=…)`.

Prompts are tokenised as in this suite's own evaluation, so that both ways give the same answers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gsil_bench.data.chat import ChatFormat
from gsil_bench.errors import library
from gsil_bench.generation.engine import Completion, Engine, EngineError, Request, Sampling
from gsil_bench.generation.likelihoods import Given, Likelihoods

MAX_NEW_TOKENS = 256
"""Where a task has no limit."""
SEED = 1234


def engine_lm(
    engine: Engine,
    chat: ChatFormat,
    context_length: int,
    scored_length: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = SEED,
) -> Any:
    """An `lm_eval.api.model.LM` over an engine.

    Log-likelihoods come with whether the continuation is the greedy one, which takes a greedy completion of each context. A
    prompt that is too long loses its beginning, as with lm-eval's own models.

    Args:
        context_length: tokens of prompt and answer together.
        scored_length: tokens of context and continuation together; None: `context_length`. lm-eval's own HFLM takes one more,
            since the last token is no input.
        max_new_tokens: of an answer, where the task has no limit.
        seed: of sampled answers.

    Raises:
        UserError: lm-eval is not installed. Its methods raise EngineError for what cannot be answered.
    """
    library("lm_eval", "a model for lm-eval")
    base: Any = importlib.import_module("lm_eval.api.model").LM
    return _engine_lm_class(base)(_Asked(engine, chat, context_length, scored_length or context_length, max_new_tokens, seed))


class _Asked:
    """What lm-eval asks, put to an engine."""

    def __init__(
        self, engine: Engine, chat: ChatFormat, context_length: int, scored_length: int, max_new_tokens: int, seed: int
    ) -> None:
        self.engine, self.chat = engine, chat
        self.context_length, self.scored_length = context_length, scored_length
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.rendered: set[str] = set()
        """Prompts that the chat template made: they hold their special tokens already."""

    def texts(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Answers to (context, generation settings), without what follows a stop."""
        utils = importlib.import_module("lm_eval.models.utils")
        repeats: dict[str, int] = {}
        requests, stops = [], []
        for context, given in asked:
            settings = utils.normalize_gen_kwargs(given, self.max_new_tokens)
            sample = repeats[context] = repeats.get(context, -1) + 1
            requests.append(self._request(context, settings, sample))
            stops.append(settings["until"])
        completions = _completions(self.engine.complete, requests)
        texts = [
            self.chat.decode_after(request.prompt_ids, completion.tokens)
            for request, completion in zip(requests, completions, strict=True)
        ]
        return [utils.postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy one) of continuations after contexts."""
        tokens = [self._fitted(*pair) for pair in self.chat.pairs_tokens(pairs)]
        scored = _completions(Likelihoods(self.engine).complete, [Given.after(context, text) for context, text in tokens])
        longest: dict[tuple[int, ...], int] = {}
        for context, text in tokens:
            longest[context] = max(longest.get(context, 0), len(text))
        greedy = [Request(context, Sampling(length)) for context, length in longest.items()]
        said = dict(zip(longest, _completions(self.engine.complete, greedy), strict=True))
        return [
            (sum(completion.logps or ()), said[context].tokens[: len(text)] == text)
            for (context, text), completion in zip(tokens, scored, strict=True)
        ]

    def _request(self, context: str, settings: dict[str, Any], sample: int) -> Request:
        ids = self.chat.tokens(context) if context in self.rendered else self.chat.text_ids(context)
        unknown = settings.keys() - {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
        if unknown:
            raise EngineError(f"this engine has no generation setting {', '.join(sorted(unknown))}")
        room = self.context_length - settings["max_gen_toks"]
        if room < 1:
            raise EngineError(f"{settings['max_gen_toks']} new tokens leave no room for a prompt in {self.context_length}")
        temperature = float(settings.get("temperature") or 0.0) if settings["do_sample"] else 0.0
        top_p = float(settings.get("top_p") or 1.0)
        sampling = Sampling(
            settings["max_gen_toks"], temperature, top_p, self.seed, tuple(text for text in settings["until"] if text)
        )
        return Request(ids[-room:], sampling, sample)

    def _fitted(self, context: tuple[int, ...], text: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A context cut on the left to what there is room for."""
        room = self.scored_length - len(text)
        if not text or room < 1:
            raise EngineError(f"a continuation of {len(text)} tokens cannot be scored in a context of {self.scored_length}")
        return context[-room:], text


def _completions(
    complete: Callable[[Sequence[Request]], Iterator[tuple[int, Completion]]], requests: Sequence[Request]
) -> list[Completion]:
    """Completions in the requests' order. lm-eval has no place for an answer that is missing, so one error ends the run."""
    found = dict(complete(requests)) if requests else {}
    for index in range(len(requests)):
        if found[index].error:
            raise EngineError(f"request {index} of {len(requests)} was not answered: {found[index].error}")
    return [found[index] for index in range(len(requests))]


def _engine_lm_class(base: Any) -> Any:
    """lm-eval's model class can only be subclassed where it is installed."""

    class EngineLM(base):  # type: ignore[misc]
        """An engine behind lm-eval's interface."""

        def __init__(self, asked: _Asked) -> None:
            super().__init__()
            self.asked = asked

        @property
        def tokenizer_name(self) -> str:
            """Names tokenizer and template in lm-eval's cache of requests."""
            return self.asked.chat.fingerprint[:16]

        def chat_template(self, chat_template: bool | str = False) -> str:
            """The template's text, for lm-eval's records."""
            return self.asked.chat.template if chat_template else ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """The prompt of a conversation; without generation prompt its last message is how the answer begins."""
            messages, opening = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
            text = self.asked.chat.prompt_text(messages, opening)
            self.asked.rendered.add(text)
            return text

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """Answers, without what follows a stop."""
            return self.asked.texts([request.args for request in requests])

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(log-likelihood, whether it is the greedy continuation)."""
            return self.asked.likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """Not offered."""
            raise EngineError("the log-likelihood of whole documents is not offered; leave perplexity tasks away")

    return EngineLM
