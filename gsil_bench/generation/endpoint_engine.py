"""A model that is served elsewhere, behind an OpenAI-compatible API: vLLM, SGLang, llama.cpp, TGI, a hosted service.

    --engine endpoint --engine-set url=http://host:8000/v1 --engine-set model=NAME

Prompts go to /completions as token ids, so the server must have this tokenizer. New tokens come back as ids where the server can
say them (vLLM 0.10 and later); elsewhere the returned text is tokenised here, and the tokens may be others than those drawn.

Some fields are not OpenAI's: the end tokens, "say the token ids", and "no top-k, min-p or repetition penalty", without which vLLM
takes those of the model's generation configuration and llama.cpp its own. vLLM, SGLang, llama.cpp and TGI ignore a field that
they do not know. OpenAI refuses it: `extensions=false` leaves them out, and the server then stops at its own end tokens.

How a server batches is not ours to say: answers are not promised to be the same to the last bit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.generation.endpoint_client import (
    RETRIED,
    EndpointClient,
    EndpointError,
    Refusal,
    Reply,
    check_key_variable,
    check_url,
)
from gsil_bench.generation.engine import Completion, EngineError, FinishReason, Request, too_long, unknown_tokens
from gsil_bench.generation.engines import Served
from gsil_bench.models.checkpoint import vocabulary_size
from gsil_bench.models.packing import TokenTree
from gsil_bench.records import digest

VERSION = "endpoint/v1"
PATH = "/completions"


@dataclass(frozen=True)
class EndpointOptions:
    """What the engine can be told (`--engine-set KEY=VALUE`)."""

    in_process: ClassVar[bool] = False
    url: str = ""
    """Where the API starts: http://host:8000/v1. Required."""
    model: str = ""
    """The model's name on the server. Required."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key, which is sent to `url`; empty: none is sent."""
    concurrency: int = 8
    """Requests in flight."""
    requests_per_minute: int | None = None
    retries: int = 5
    """Of a request, when the server is busy or out of reach."""
    timeout: float = 600.0
    """Seconds for one answer."""
    prompt: str = "tokens"
    """"tokens" is exact; "text" is for servers that take no token ids, and which may tokenise it differently."""
    extensions: bool = True
    """Whether fields are sent that are not OpenAI's (see above)."""

    def check(self, device: str, dtype: str, autocast: bool) -> None:
        """Nothing is sent; device and precision are the server's."""
        for key in ("url", "model"):
            if not getattr(self, key):
                raise UserError(f"--engine endpoint needs --engine-set {key}=…")
        check_url(self.url, "--engine-set url")
        check_key_variable(self.api_key_env, "--engine-set api_key_env")
        for key, least in (("concurrency", 1), ("requests_per_minute", 1), ("retries", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"--engine-set {key}={value}: must be at least {least}")
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"--engine-set timeout={self.timeout:g}: must be a number of seconds above 0")
        if self.prompt not in ("tokens", "text"):
            raise unknown_name("value of --engine-set prompt", self.prompt, ("tokens", "text"))
        if find_spec("httpx2") is None:
            raise UserError("--engine endpoint needs the package httpx2: pip install 'gsil-bench[endpoint]' -c constraints.txt")

    def identity(self, dtype: str, autocast: bool) -> str:
        """The served model and how it is asked; neither key nor pace."""
        asked = f"prompt={self.prompt}" + ("" if self.extensions else ", OpenAI's fields only")
        return f"{VERSION} {self.model} at {self.url.rstrip('/')}, {asked}, not bit-exact"

    @property
    def weights(self) -> str:
        """Stands for the weights that are served, which nobody here can see: a digest of address and name."""
        return digest([self.url.rstrip("/"), self.model])

    def client(self) -> EndpointClient:
        """The client with these settings."""
        return EndpointClient(
            self.url, self.api_key_env, self.concurrency, self.requests_per_minute, self.retries, self.timeout
        )  # fmt: skip

    def make(self, served: Served) -> EndpointEngine:
        """The engine; the checkpoint's tokenizer is used, its weights are not."""
        return EndpointEngine(
            self, self.client(), served.end_token_ids, served.context_length, vocabulary_size(served.folder),
            served.decode, served.encode, served.spell,
        )  # fmt: skip


class EndpointEngine:
    """Completes prompts with a model that is served elsewhere."""

    def __init__(
        self,
        options: EndpointOptions,
        client: EndpointClient,
        end_token_ids: Sequence[int],
        context_length: int,
        vocabulary: int,
        decode: Callable[[Sequence[int]], str],
        encode: Callable[[str], Sequence[int]],
        spell: Callable[[Sequence[int]], str],
    ) -> None:
        """Ask a server.

        Args:
            vocabulary: rows of the model's embedding.
            end_token_ids: the first stands for the end of an answer where the server does not say which it was.
            decode: text of tokens, without special ones.
            encode: tokens of a text, none added.
            spell: text of tokens, special ones written out.
        """
        self.options, self.client = options, client
        self.end_token_ids, self.context_length = tuple(end_token_ids), context_length
        self.decode, self.encode, self.spell = decode, encode, spell
        self.vocabulary = vocabulary

    @property
    def identity(self) -> str:
        """The served model and how it is asked."""
        return self.options.identity("", False)

    def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        """See Engine."""
        asked: list[int] = []
        for index, request in enumerate(requests):
            error = too_long(request.prompt_ids, self.context_length)
            if error:
                yield index, error
            elif request.sampling.max_new_tokens == 0:
                yield index, Completion((), "", "length", logps=() if request.logps else None)
            else:
                asked.append(index)
        with contextlib.closing(self._replies([self._body(requests[index]) for index in asked])) as replies:
            for number, reply in replies:
                yield asked[number], self._completion(requests[asked[number]], reply)

    def logps(self, trees: Sequence[TokenTree]) -> list[list[tuple[float, ...]]]:
        """See Engine. The server repeats prompt and continuation (`echo`) with their log-probs; vLLM does, llama.cpp does not."""
        pairs = [(tree.prompt_ids, completion) for tree in trees for completion in tree.completions]
        asked = [number for number, (_, completion) in enumerate(pairs) if completion]
        found: dict[int, tuple[float, ...]] = {}
        bodies = [self._echo((*pairs[number][0], *pairs[number][1])) for number in asked]
        with contextlib.closing(self._replies(bodies)) as replies:
            for index, reply in replies:
                found[asked[index]] = self._continuation_logps(*pairs[asked[index]], reply)
        numbers = iter(range(len(pairs)))
        return [[found.get(next(numbers), ()) for _ in tree.completions] for tree in trees]

    def close(self) -> None:
        """Nothing: connections live as long as `complete`."""

    def _replies(self, bodies: Sequence[Mapping[str, Any]]) -> Generator[tuple[int, Reply], None, None]:
        try:
            if bodies:
                yield from self.client.post_many(PATH, bodies)
        except EndpointError as error:
            raise EngineError(str(error)) from error

    def _body(self, request: Request) -> dict[str, Any]:
        """What is sent for a request. A greedy one has no seed and no top_p: neither decides anything."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.options.model,
            "prompt": self._prompt(request.prompt_ids),
            "max_tokens": self._limit(request),
            "temperature": sampling.temperature,
        }
        if sampling.temperature > 0:
            body |= {"top_p": sampling.top_p, "seed": request.seed % 2**31}  # 31 bits: some servers hold it in an int32
        if request.logps:
            body["logprobs"] = 1  # 0 would do in vLLM; others take it for "none"
        return body | self._extensions()

    def _prompt(self, ids: Sequence[int]) -> str | list[int]:
        return list(ids) if self.options.prompt == "tokens" else self.spell(ids)

    def _extensions(self) -> dict[str, Any]:
        """Fields that are not OpenAI's. A top_k of -1 is "all" in vLLM, SGLang and llama.cpp alike; SGLang refuses 0."""
        if not self.options.extensions:
            return {}
        fields = {"return_token_ids": True, "stop_token_ids": list(self.end_token_ids)}
        neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        # Text is spelt with its special tokens: a second BOS would be another prompt.
        return {**fields, **neutral, **({"add_special_tokens": False} if self.options.prompt == "text" else {})}

    def _echo(self, ids: Sequence[int]) -> dict[str, Any]:
        """One new token is asked for and dropped: not every server takes 0."""
        if self.options.prompt != "tokens":
            raise EngineError("log-probs of continuations need --engine-set prompt=tokens: in text the tokens are not ours")
        body = {
            "model": self.options.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "echo": True,
            "logprobs": 1,
        }
        return body | ({"return_token_ids": True} if self.options.extensions else {})

    def _completion(self, request: Request, reply: Reply) -> Completion:
        if isinstance(reply, Refusal):
            self._check_extensions(reply)
            return Completion((), "", "error", reply.message, passing=reply.status in RETRIED)
        choice = self._choice(reply)
        finish = choice.get("finish_reason")
        if finish not in ("stop", "length"):
            return Completion((), "", "error", f"the server ended the answer with finish_reason {finish!r}")
        tokens, reason = self._tokens(request, choice, finish)
        return Completion(tokens, self.decode(tokens), reason, logps=self._own_logps(choice, tokens) if request.logps else None)

    def _tokens(self, request: Request, choice: Mapping[str, Any], finish: FinishReason) -> tuple[tuple[int, ...], FinishReason]:
        """New tokens up to the first end token."""
        ids, prompt_ids = _ids(choice.get("token_ids")), _ids(choice.get("prompt_token_ids"))
        self._check_answer(request, choice, ids)
        if prompt_ids is not None and self.options.prompt == "tokens" and prompt_ids != request.prompt_ids:
            raise EngineError(f"{self.client.url} answers another prompt than was sent: it cuts or changes prompts")
        if ids is None:
            ids = (*self.encode(str(choice.get("text") or "")), *((self._end(choice),) if finish == "stop" else ()))
        end = next((place for place, token in enumerate(ids) if token in self.end_token_ids), None)
        if end is not None:
            return ids[: end + 1], "stop"
        if finish == "stop":
            last = f"token {ids[-1]}" if ids else "no token"
            raise EngineError(f"{self.client.url} ends an answer with {last}, no end token here: is it the same model?")
        return ids, "length"

    def _check_answer(self, request: Request, choice: Mapping[str, Any], ids: Sequence[int] | None) -> None:
        """Raise EngineError for what no server that works answers."""
        text = choice.get("text", "")
        if not isinstance(text, str) or text.encode("utf-8", "ignore").decode() != text:  # half a pair of surrogates
            raise EngineError(f"{self.client.url} answers with what is no text; is this an OpenAI-compatible server?")
        if ids is None and choice.get("token_ids") is not None:
            raise EngineError(f"{self.client.url} answers with token ids that are no numbers")
        strange = unknown_tokens(ids or (), self.vocabulary)
        if strange is not None:
            raise EngineError(f"{self.client.url} answers with {strange.error}: is it the same model?")
        limit = self._limit(request)
        if ids is not None and len(ids) > limit:
            raise EngineError(f"{self.client.url} answers with {len(ids)} tokens where {limit} were the limit")
        if not (ids or text) and choice.get("finish_reason") == "length":
            raise EngineError(f"{self.client.url} says that an empty answer reached its limit of {limit} tokens")

    def _limit(self, request: Request) -> int:
        """New tokens that a request is given at most."""
        return min(request.sampling.max_new_tokens, self.context_length - len(request.prompt_ids))

    def _end(self, choice: Mapping[str, Any]) -> int:
        """The end token that the server names, or the first."""
        named = choice.get("stop_reason")
        return named if isinstance(named, int) and named in self.end_token_ids else self.end_token_ids[0]

    def _own_logps(self, choice: Mapping[str, Any], tokens: Sequence[int]) -> tuple[float, ...]:
        """Log-probs of an answer's tokens."""
        ids, values = _ids(choice.get("token_ids")), _logps(choice)
        if ids is None or len(ids) != len(values) or not all(isinstance(value, float | int) for value in values):
            raise EngineError(f"{self.client.url} does not tell token ids and log-probs of an answer: vLLM 0.10 or later does")
        return tuple(float(value) for value in values[: len(tokens)])

    def _continuation_logps(self, prompt: Sequence[int], completion: Sequence[int], reply: Reply) -> tuple[float, ...]:
        unable = f"{self.client.url} does not tell log-probs of given continuations (echo with logprobs; vLLM does)"
        if isinstance(reply, Refusal):
            raise EngineError(f"{unable}: {reply.message}")
        choice = self._choice(reply)
        echoed, values = _ids(choice.get("prompt_token_ids")), _logps(choice)
        count = len(prompt) + len(completion)
        if echoed not in (None, (*prompt, *completion)):
            raise EngineError(f"{self.client.url} answers another prompt than was sent: it cuts or changes prompts")
        wanted = values[len(prompt) : count]
        if len(values) not in (count, count + 1) or not all(isinstance(value, float | int) for value in wanted):
            raise EngineError(unable)
        return tuple(float(value) for value in wanted)

    def _check_extensions(self, refusal: Refusal) -> None:
        """A refusal of a field that is not OpenAI's concerns all requests."""
        named = next((name for name in self._extensions() if re.search(rf"\b{name}\b", refusal.message)), None)
        if named is not None:
            raise EngineError(f"{self.client.url} refuses the field {named} ({refusal.message}): --engine-set extensions=false")

    def _choice(self, reply: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise EngineError(f"{self.client.url}: a reply without one choice; is this an OpenAI-compatible server?")
        return choices[0]


def _ids(value: object) -> tuple[int, ...] | None:
    """Token ids, or None if that is not what it is."""
    return tuple(value) if isinstance(value, list) and all(type(item) is int for item in value) else None


def _logps(choice: Mapping[str, Any]) -> list[Any]:
    """Log-probs beside the tokens as OpenAI's completions have them; none in llama.cpp's form."""
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return values if isinstance(values, list) else []
