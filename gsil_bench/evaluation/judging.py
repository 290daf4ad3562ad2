"""Judges by name: a model behind an OpenAI-compatible API, a checkpoint in an engine of ours, or judgments that are in a file.

    --judge endpoint --judge-set url=http://host:8000/v1 --judge-set model=NAME
    --judge engine --judge-set model=FOLDER --judge-set engine=vllm --judge-set engine.tensor_parallel_size=2
    --judge replay --judge-set file=gpt-4_single.jsonl --judge-set model=NAME

What a language model was asked once is kept (generation/answer_store.py), in one file for each judge: model, address or weights,
engine, temperature, token limit. A kept judgment is found under its whole prompt and the number of its repeat, so a run that is
taken up again, or asked for more repeats, asks nothing twice. What failed is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gsil_bench.errors import UserError, library, unknown_name
from gsil_bench.generation.answer_store import AnswerStore, Completes
from gsil_bench.generation.endpoint_client import EndpointClient, Refusal, check_key_variable, check_url
from gsil_bench.generation.endpoint_client import Reply as HttpReply
from gsil_bench.generation.engine import Completion, Engine, Request, Sampling
from gsil_bench.generation.engines import Served, choose_engine, make_options
from gsil_bench.records import Message, digest
from gsil_bench.tasks.judge import Judge, JudgeRequest, NoReply, ReplayJudge, Reply
from gsil_bench.tasks.mt_bench import numbered_rows, read_fastchat_judgments

if TYPE_CHECKING:
    from gsil_bench.data.chat import ChatFormat

Advance = Callable[[int], None]

VERSION = "v1"
PATH = "/chat/completions"
TOKEN_FIELDS = ("max_tokens", "max_completion_tokens")
ENGINE_PREFIX = "engine."
"""Of options that are handed on to a judge's engine."""
FEWEST_TOLERATED = 8
"""Requests in a row that may go unserved before the server counts as gone."""


class Options(Protocol):
    """A frozen dataclass whose fields are what a judge can be told (`--judge-set KEY=VALUE`)."""

    def make(self, engine_settings: Mapping[str, str], folder: Path | None, advance: Advance) -> Judge:
        """The judge.

        Raises:
            UserError: an option is missing or wrong. Nothing is asked or loaded yet.
        """


@dataclass(frozen=True)
class EndpointJudgeOptions:
    """A model that is served elsewhere."""

    url: str = ""
    """Where the API starts: http://host:8000/v1. Required."""
    model: str = ""
    """The model's name on the server. Required."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key, which is sent to `url`; empty: none is sent."""
    temperature: float = 0.0
    max_tokens: int = 2048
    """Of a judgment."""
    max_tokens_field: str = "max_tokens"
    """Newer models of OpenAI want "max_completion_tokens"."""
    repeats: int = 1
    """Judgments of each turn."""
    seed: int = 0
    """Above temperature 0."""
    concurrency: int = 8
    """Requests in flight."""
    requests_per_minute: int | None = None
    retries: int = 5
    """Of a request, when the server is busy or out of reach."""
    timeout: float = 600.0
    """Seconds for one judgment."""

    def make(self, engine_settings: Mapping[str, str], folder: Path | None, advance: Advance) -> EndpointJudge:
        """See Options."""
        self._check(engine_settings)
        client = EndpointClient(
            self.url, self.api_key_env, self.concurrency, self.requests_per_minute, self.retries, self.timeout,
            tolerated=max(FEWEST_TOLERATED, 2 * self.concurrency),
        )  # fmt: skip
        return EndpointJudge(self, client, folder, advance)

    def _check(self, engine_settings: Mapping[str, str]) -> None:
        for key in ("url", "model"):
            if not getattr(self, key):
                raise UserError(f"--judge endpoint needs --judge-set {key}=…")
        if engine_settings:
            raise UserError(f"--judge endpoint has no engine of ours: leave out --judge-set {ENGINE_PREFIX}…")
        check_url(self.url, "--judge-set url")
        check_key_variable(self.api_key_env, "--judge-set api_key_env")
        if self.max_tokens_field not in TOKEN_FIELDS:
            raise unknown_name("value of --judge-set max_tokens_field", self.max_tokens_field, TOKEN_FIELDS)
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"--judge-set timeout={self.timeout:g}: must be a number of seconds above 0")
        _check_least(self, concurrency=1, requests_per_minute=1, retries=0, max_tokens=1, repeats=1)
        _check_temperature(self.temperature)
        library("httpx2", "--judge endpoint")


@dataclass
class EndpointJudge:
    """A model behind an OpenAI-compatible API, asked with chat messages."""

    options: EndpointJudgeOptions
    client: EndpointClient
    folder: Path | None = None
    """Where judgments are kept; None: nowhere."""
    advance: Advance = lambda done: None
    """Called with the number of judgments that are done."""

    @property
    def repeats(self) -> int:
        """Judgments of each turn."""
        return self.options.repeats

    @property
    def asked_as(self) -> str:
        """The served model and how it is asked; neither key nor pace."""
        options = self.options
        how = _how(options.temperature, options.max_tokens, options.seed)
        return f"endpoint-judge/{VERSION} {options.model} at {self.client.url}, {how}"

    @property
    def identity(self) -> str:
        """See Judge."""
        return _with_repeats(self.asked_as, self.repeats)

    def replies(self, requests: Sequence[JudgeRequest]) -> list[Reply]:
        """See Judge. A request that fails for good has no reply; the others are not affected.

        Raises:
            EndpointError: no server, a wrong key, a wrong model. What came before is kept.
        """
        return _replies(self, self.asked_as, requests, self.folder, self.advance)

    def complete(self, requests: Sequence[JudgeRequest]) -> Generator[tuple[int, Completion], None, None]:
        """Each judgment as it arrives."""
        with closing(self.client.post_many(PATH, [self._body(request) for request in requests])) as arriving:
            for index, reply in arriving:
                yield index, _judgment(reply)

    def _body(self, request: JudgeRequest) -> dict[str, Any]:
        options = self.options
        body = {
            "model": options.model,
            "messages": _messages(request),
            "temperature": options.temperature,
            options.max_tokens_field: options.max_tokens,
        }
        if options.temperature > 0:  # 31 bits: some servers hold it in an int32
            body["seed"] = int(digest([options.seed, request.key])[:8], 16) % 2**31
        return body


def _judgment(reply: HttpReply) -> Completion:
    """The text of a reply. One that was cut at the token limit may still hold its rating."""
    if isinstance(reply, Refusal):
        return _failed(f"{reply.status}: {reply.message}" if reply.status else reply.message)
    try:
        choice = reply["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return _failed("the reply has no choices[0].message.content; is this an OpenAI-compatible server?")
    if not isinstance(text, str):
        return _failed(f"the judge said nothing (finish_reason {finish!r})")
    return Completion((), text, "length" if finish == "length" else "stop")


@dataclass(frozen=True)
class EngineJudgeOptions:
    """A checkpoint in one of our engines."""

    model: str = ""
    """Folder, or hub id. Required."""
    engine: str = "auto"
    """See --engine. Its options are given with --judge-set engine.KEY=VALUE."""
    device: str = "auto"
    precision: str = "auto"
    chat_template: str = ""
    """A Jinja file or "plain", for a tokenizer that brings none."""
    temperature: float = 0.0
    max_tokens: int = 2048
    """Of a judgment."""
    repeats: int = 1
    """Judgments of each turn."""
    seed: int = 0
    """Above temperature 0."""

    def make(self, engine_settings: Mapping[str, str], folder: Path | None, advance: Advance) -> EngineJudge:
        """See Options."""
        from gsil_bench.config import Config
        from gsil_bench.inputs import read_model
        from gsil_bench.models.checkpoint import load_model

        if not self.model:
            raise UserError("--judge engine needs --judge-set model=…")
        _check_least(self, max_tokens=1, repeats=1)
        _check_temperature(self.temperature)
        template = self.chat_template or None
        found = read_model(Config(model=self.model, device=self.device, precision=self.precision, chat_template=template))
        engine = choose_engine(self.engine, engine_settings, found.device, found.dtype, found.autocast)
        load = partial(load_model, found.folder, found.device, found.dtype)
        served = Served(
            found.folder, load, found.chat.end_token_ids, found.context_length, found.chat.decode, found.device, found.dtype,
            found.autocast, found.chat.tokens, found.chat.spell,
        )  # fmt: skip
        weights, chat = (engine.weights or found.weights_sha256)[:16], found.chat.fingerprint[:16]
        by = engine.identity(found.dtype, found.autocast)
        name = f"{found.name} (weights {weights}, chat {chat}, context {found.context_length}, {found.precision}) by {by}"
        sampling = Sampling(self.max_tokens, self.temperature, seed=self.seed)
        return EngineJudge(partial(engine.make, served), found.chat, name, sampling, self.repeats, folder, advance)


@dataclass
class EngineJudge:
    """A model in an engine. Its prompts are made by its own chat format."""

    engine: Callable[[], Engine]
    """Made when something is asked, closed when all is said: judged models need the memory."""
    chat: ChatFormat
    name: str
    """Of weights, chat format and engine: all that decides a judgment besides prompt and sampling."""
    sampling: Sampling
    repeats: int = 1
    folder: Path | None = None
    """Where judgments are kept; None: nowhere."""
    advance: Advance = lambda done: None
    """Called with the number of judgments that are done."""

    @property
    def asked_as(self) -> str:
        """The model and how it is asked."""
        how = _how(self.sampling.temperature, self.sampling.max_new_tokens, self.sampling.seed)
        return f"engine-judge/{VERSION} {self.name}, {how}"

    @property
    def identity(self) -> str:
        """See Judge."""
        return _with_repeats(self.asked_as, self.repeats)

    def replies(self, requests: Sequence[JudgeRequest]) -> list[Reply]:
        """See Judge. An answer that cannot be quoted in the prompt (it spells out a control token) or that is too long for the
        judge has no reply.

        Raises:
            EngineError: nothing can be served.
        """
        return _replies(self, self.asked_as, requests, self.folder, self.advance)

    def complete(self, requests: Sequence[JudgeRequest]) -> Generator[tuple[int, Completion], None, None]:
        """Each judgment as it is finished."""
        asked: list[int] = []
        prompts: list[Request] = []
        for index, request in enumerate(requests):
            try:
                prompts.append(Request(self.chat.prompt_ids(_messages(request)), self.sampling, request.repeat))
                asked.append(index)
            except UserError as error:
                yield index, _failed(str(error))
        if not prompts:
            return
        engine = self.engine()
        try:
            with closing(engine.complete(prompts)) as completions:
                for number, completion in completions:
                    yield asked[number], completion
        finally:
            engine.close()


@dataclass(frozen=True)
class ReplayJudgeOptions:
    """Judgments that were given elsewhere."""

    file: str = ""
    """FastChat's judgments, or lines {"item": "question_id/turn", "judgment": TEXT}. Required."""
    model: str = ""
    """Whose judgments, if FastChat's file holds those of several models."""

    def make(self, engine_settings: Mapping[str, str], folder: Path | None, advance: Advance) -> ReplayJudge:
        """See Options."""
        if not self.file:
            raise UserError("--judge replay needs --judge-set file=…")
        if engine_settings:
            raise UserError(f"--judge replay has no engine: leave out --judge-set {ENGINE_PREFIX}…")
        path = Path(self.file).expanduser()
        return ReplayJudge(read_judgments(path, self.model or None), f"the judgments of {path}")


KINDS: Mapping[str, type[Any]] = {
    "endpoint": EndpointJudgeOptions,
    "engine": EngineJudgeOptions,
    "replay": ReplayJudgeOptions,
}
"""Name → the record of its options."""


def make_judge(name: str, settings: Mapping[str, Any], folder: Path | None = None, advance: Advance = lambda done: None) -> Judge:
    """The judge of that name.

    Args:
        name: a kind of judge, or "module:ATTRIBUTE" of a Judge of the user's own.
        settings: its options, as typed.
        folder: where its judgments are kept; None: nowhere.
        advance: called with the number of judgments that are done; may raise to stop, what came before is kept.

    Raises:
        UserError: an unknown name or option, a value of the wrong kind, a judge that cannot be made here.
    """
    if ":" in name:
        return _own_judge(name, settings)
    if name not in KINDS:
        raise unknown_name("judge", name, KINDS)
    own = {key: value for key, value in settings.items() if not key.startswith(ENGINE_PREFIX)}
    handed_on = {key.removeprefix(ENGINE_PREFIX): value for key, value in settings.items() if key not in own}
    options: Options = make_options(KINDS[name], own, f"judge {name}", "--judge-set")
    return options.make(handed_on, folder, advance)


def _own_judge(target: str, settings: Mapping[str, Any]) -> Judge:
    if settings:
        raise UserError(f"--judge {target}: a judge of your own takes no --judge-set")
    module, _, attribute = target.partition(":")
    try:
        judge: Any = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        raise UserError(f"judge {target!r} cannot be loaded: {type(error).__name__}: {error}") from error
    missing = [name for name in ("identity", "repeats", "replies") if not hasattr(judge, name)]
    if missing:
        raise UserError(f"judge {target!r} is not a Judge (see gsil_bench/tasks/judge.py): it lacks {', '.join(missing)}")
    return judge  # type: ignore[no-any-return]


def read_judgments(path: Path, model: str | None = None) -> dict[str, str]:
    """Judgments in a file, "question_id/turn" → text.

    Args:
        path: lines {"item": "81/1", "judgment": TEXT}, or FastChat's file.
        model: whose judgments, if FastChat's file holds those of several models.

    Raises:
        UserError: the file cannot be read, or says two things of one turn.
    """
    rows = list(numbered_rows(path))
    if not rows or "item" not in rows[0][1]:
        return read_fastchat_judgments(path, model)
    judgments: dict[str, str] = {}
    for number, row in rows:
        item, text = row.get("item"), row.get("judgment")
        if not isinstance(item, str) or not isinstance(text, str):
            raise UserError(f'{path}:{number}: expected {{"item": "question_id/turn", "judgment": TEXT}}')
        if judgments.setdefault(item, text) != text:
            raise UserError(f"{path}:{number}: a second judgment of {item}")
    return judgments


def _replies(
    judge: Completes[JudgeRequest], asked_as: str, requests: Sequence[JudgeRequest], folder: Path | None, advance: Advance
) -> list[Reply]:
    """A language model's judgments in order, each prompt asked once and kept."""
    if not all(request.prompt for request in requests):
        raise UserError("this task's judge follows a rubric: it has no prompt for a language model")
    if folder is not None:
        completions = AnswerStore(folder, {"judge": asked_as}).complete(lambda: judge, requests, advance)
    else:
        completions = _unkept(judge, requests, advance)
    return [NoReply(each.error) if each.finish_reason == "error" else each.text for each in completions]


def _unkept(judge: Completes[JudgeRequest], requests: Sequence[JudgeRequest], advance: Advance) -> list[Completion]:
    wanted = list({request.key: request for request in requests}.values())
    found: dict[str, Completion] = {}
    with closing(judge.complete(wanted)) as arriving:
        for index, completion in arriving:
            found[wanted[index].key] = completion
            advance(sum(request.key == wanted[index].key for request in requests))
    return [found[request.key] for request in requests]


def _messages(request: JudgeRequest) -> list[Message]:
    system: list[Message] = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": request.prompt}]


def _failed(reason: str) -> Completion:
    return Completion((), "", "error", reason)


def _how(temperature: float, max_tokens: int, seed: int) -> str:
    drawn = f" (seed {seed})" if temperature > 0 else ""
    return f"temperature {temperature:g}{drawn}, {max_tokens} tokens"


def _with_repeats(name: str, repeats: int) -> str:
    return name if repeats == 1 else f"{name}, mean of {repeats} judgments"


def _check_least(options: Any, **least: int) -> None:
    for key, value in least.items():
        given = getattr(options, key)
        if given is not None and given < value:
            raise UserError(f"--judge-set {key}={given}: must be at least {value}")


def _check_temperature(temperature: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--judge-set temperature={temperature:g}: must be a number from 0 up")
