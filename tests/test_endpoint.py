"""The endpoint engine and its client against a server that the test scripts, over real sockets.

The server's model, unless a test says otherwise: the answer to a prompt is its first token plus 100, then the end token 0. Text
is numbers: tokens 7 and 8 are "7 8", the end token is special and left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="needs the extra `endpoint`")

from gsil_bench.errors import UserError
from gsil_bench.generation.answer_store import AnswerStore
from gsil_bench.generation.endpoint_client import EndpointClient, EndpointError, Refusal, retry_after
from gsil_bench.generation.endpoint_engine import EndpointEngine, EndpointOptions
from gsil_bench.generation.engine import Completion, EngineError, Request, Sampling
from gsil_bench.generation.engines import choose_engine
from gsil_bench.models.packing import TokenTree

END = 0
VOCABULARY = 1000
KEY = "sk-secret-4711"
Body = dict[str, Any]
Script = Callable[["Server", Body, int], tuple[int, Body] | tuple[int, Body, dict[str, str]] | None]


class Server(ThreadingHTTPServer):
    """Answers by a script: (server, body, number of the request from 0) → status, JSON, headers; None closes the connection."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.bodies, self.headers, self.paths = script, list[Body](), list[dict[str, str]](), list[str]()
        self.lock, self.let_go, self.in_flight, self.most = threading.Lock(), threading.Event(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.in_flight += 1
            server.most = max(server.most, server.in_flight)
        outcome = server.script(server, body, number)
        with server.lock:
            server.in_flight -= 1
        if outcome is None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')  # the connection ends in the middle of the reply
            self.close_connection = True
            return
        status, reply, headers = (*outcome, {})[:3]
        data = json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def choice(tokens: Sequence[int], finish: str = "stop", **more: Any) -> tuple[int, Body]:
    return 200, {"choices": [{"index": 0, "text": decode(tokens), "finish_reason": finish, "token_ids": [*tokens], **more}]}


def model(server: Server, body: Body, number: int) -> tuple[int, Body]:
    return choice([body["prompt"][0] + 100, END])


def decode(tokens: Sequence[int]) -> str:
    return " ".join(str(token) for token in tokens if token != END)


def encode(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def spell(tokens: Sequence[int]) -> str:
    return " ".join("<end>" if token == END else str(token) for token in tokens)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Script], Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(script: Script) -> Server:
        servers.append(Server(script))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.let_go.set()
        server.shutdown()
        server.server_close()


class Waits(list[float]):
    """Records how long was to be waited, and lets a clock of its own go on instead."""

    async def sleep(self, seconds: float) -> None:
        self.append(round(seconds, 6))
        await asyncio.sleep(0)

    def clock(self) -> float:
        return 0.0


def engine(server: Server, waits: Waits | None = None, context: int = 50, **settings: Any) -> EndpointEngine:
    waits = Waits() if waits is None else waits
    options = EndpointOptions(server.url, "served", **settings)
    client = replace(options.client(), sleep=waits.sleep, clock=waits.clock, jitter=lambda: 1.0)
    return EndpointEngine(options, client, (END,), context, VOCABULARY, decode, encode, spell)


def greedy(*prompts: tuple[int, ...], most: int = 5, logps: bool = False) -> list[Request]:
    return [Request(prompt, Sampling(most), logps=logps) for prompt in prompts]


def answers(asked: EndpointEngine, requests: Sequence[Request]) -> list[Completion]:
    found = dict(asked.complete(requests))
    assert sorted(found) == list(range(len(requests)))
    return [found[index] for index in range(len(requests))]


def stopped(*tokens: int) -> Completion:
    return Completion((*tokens, END), decode(tokens), "stop")


# What is sent and what is made of the reply


def test_a_greedy_request_as_it_is_sent(serve: Callable[[Script], Server]) -> None:
    """The context has room for 50 − 2 tokens, fewer than the 60 asked for; a greedy request has neither seed nor top_p."""
    server = serve(model)
    asked = [Request((7, 8), Sampling(60, temperature=0.0, top_p=0.5, seed=3))]
    assert answers(engine(server), asked) == [stopped(107)]
    assert server.paths == ["/v1/completions"]
    assert server.bodies == [
        {
            "model": "served",
            "prompt": [7, 8],
            "max_tokens": 48,
            "temperature": 0.0,
            "return_token_ids": True,
            "stop_token_ids": [0],
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
    ]


def test_a_sampled_request_has_a_seed_for_each_sample_whatever_its_neighbours(serve: Callable[[Script], Server]) -> None:
    server = serve(model)
    drawn = [Request((7,), Sampling(5, 0.8, 0.9, seed=1), sample) for sample in (0, 1)]
    answers(engine(server, concurrency=1), drawn)
    answers(engine(server, concurrency=1), [*greedy((3,)), *reversed(drawn)])
    seeds = [body.get("seed") for body in server.bodies]
    assert (server.bodies[0]["temperature"], server.bodies[0]["top_p"]) == (0.8, 0.9)
    assert seeds[0] != seeds[1] and seeds[2:] == [None, seeds[1], seeds[0]]
    assert all(0 <= seed < 2**31 for seed in seeds[:2])


def test_only_openais_fields_without_extensions(serve: Callable[[Script], Server]) -> None:
    server = serve(model)
    answers(engine(server, extensions=False), greedy((7,)))
    assert server.bodies == [{"model": "served", "prompt": [7], "max_tokens": 5, "temperature": 0.0}]


def test_a_refused_extension_is_an_error_of_all_that_says_what_to_do(serve: Callable[[Script], Server]) -> None:
    said = {"error": {"message": "Unrecognized request argument supplied: top_k", "type": "invalid_request_error"}}
    server = serve(lambda server, body, number: (400, said))
    with pytest.raises(EngineError, match=r"refuses the field top_k .*--engine-set extensions=false"):
        answers(engine(server), greedy((7,)))


def test_text_prompts_have_their_special_tokens_and_get_no_others(serve: Callable[[Script], Server]) -> None:
    server = serve(lambda server, body, number: choice([9, END]))
    assert answers(engine(server, prompt="text"), greedy((7, END, 8))) == [stopped(9)]
    assert server.bodies[0]["prompt"] == "7 <end> 8"
    assert server.bodies[0]["add_special_tokens"] is False


def text_only(text: str, finish: str, **more: Any) -> Script:
    return lambda server, body, number: (200, {"choices": [{"text": text, "finish_reason": finish, **more}]})


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (text_only("7 8", "stop"), Completion((7, 8, END), "7 8", "stop")),
        (text_only("7 8", "length"), Completion((7, 8), "7 8", "length")),
        (text_only("", "stop"), Completion((END,), "", "stop")),
        (text_only("7", "stop", token_ids=None, stop_reason=1), Completion((7, 1), "7 1", "stop")),  # the end token it names
        (lambda *_: choice([7, 8], "length"), Completion((7, 8), "7 8", "length")),
        (lambda *_: choice([7, END, 8, 9], "length"), Completion((7, END), "7", "stop")),  # ran over our end token
        (
            lambda *_: choice([7], "content_filter"),
            Completion((), "", "error", "the server ended the answer with finish_reason 'content_filter'"),
        ),
    ],
)  # fmt: skip
def test_tokens_of_a_reply(serve: Callable[[Script], Server], script: Script, expected: Completion) -> None:
    asked = engine(serve(script))
    asked.end_token_ids = (END, 1)
    assert answers(asked, greedy((5,))) == [expected]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (lambda *_: choice([7, 8]), "ends an answer with token 8, no end token here"),
        (lambda *_: choice([7, END], prompt_token_ids=[6]), "answers another prompt than was sent"),
        (lambda *_: (200, {"object": "list"}), "a reply without one choice"),
        (lambda *_: choice([7] * 6, "length"), "answers with 6 tokens where 5 were the limit"),
        (lambda *_: choice([7, VOCABULARY], "length"), f"token ids 7 to {VOCABULARY} do not fit a vocabulary of {VOCABULARY}"),
        (lambda *_: choice([-5, 7], "length"), "token ids -5 to 7 do not fit"),
        (lambda *_: choice([], "length"), "an empty answer reached its limit of 5 tokens"),
        (lambda *_: choice([True, True], "length"), "answers with token ids that are no numbers"),
        (text_only(5, "length"), "answers with what is no text"),  # type: ignore[arg-type]
        (text_only("\ud800", "length"), "answers with what is no text"),
    ],
)
def test_a_server_of_another_model_is_refused(serve: Callable[[Script], Server], script: Script, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        answers(engine(serve(script)), greedy((5,)))


def test_prompts_that_leave_no_room_are_not_sent(serve: Callable[[Script], Server]) -> None:
    server = serve(model)
    found = answers(engine(server, context=4), [*greedy((1, 2, 3, 4), (), (1, 2)), *greedy((4,), most=0)])
    assert [item.finish_reason for item in found] == ["error", "error", "stop", "length"]
    assert [body["prompt"] for body in server.bodies] == [[1, 2]]


# Log-probs


def test_logps_of_new_tokens(serve: Callable[[Script], Server]) -> None:
    server = serve(lambda *_: choice([7, END, 9], logprobs={"token_logprobs": [-0.5, -1.5, -9.0]}))
    assert answers(engine(server), greedy((5,), logps=True))[0].logps == (-0.5, -1.5)
    assert server.bodies[0]["logprobs"] == 1


@pytest.mark.parametrize(
    "reply", [{}, {"logprobs": None}, {"logprobs": {"token_logprobs": [-0.5]}}, {"logprobs": {"content": []}}]
)
def test_logps_of_other_tokens_are_refused(serve: Callable[[Script], Server], reply: Body) -> None:
    with pytest.raises(EngineError, match="does not tell token ids and log-probs"):
        answers(engine(serve(lambda *_: choice([7, END], **reply))), greedy((5,), logps=True))


def echo(server: Server, body: Body, number: int) -> tuple[int, Body]:
    """Token t has log-prob −t/10; the first has none; one new token is added, as vLLM does."""
    values = [None, *(-token / 10 for token in body["prompt"][1:]), -77.0]
    return choice([99], "length", logprobs={"token_logprobs": values}, prompt_token_ids=body["prompt"])


def test_logps_of_given_continuations(serve: Callable[[Script], Server]) -> None:
    server = serve(echo)
    trees = [TokenTree((1, 2), ((3, 4), (), (5,))), TokenTree((6,), ((7,),))]
    assert engine(server).logps(trees) == [[(-0.3, -0.4), (), (-0.5,)], [(-0.7,)]]
    assert sorted(body["prompt"] for body in server.bodies) == [[1, 2, 3, 4], [1, 2, 5], [6, 7]]
    assert {(body["echo"], body["logprobs"], body["max_tokens"]) for body in server.bodies} == {(True, 1, 1)}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (lambda *_: (400, {"error": {"message": "Only no echo is supported"}}), "Only no echo is supported"),  # older llama.cpp
        # New tokens only: llama.cpp, in its own form.
        (lambda *_: choice([9], "length", logprobs={"token_logprobs": [-1.0]}), "does not tell log-probs of given"),
        (lambda *_: choice([9], "length", logprobs={"content": [{"logprob": -1.0}]}), "does not tell log-probs of given"),
        (lambda *_: choice([9], "length", logprobs={"token_logprobs": [None, None, -1.0]}), "does not tell log-probs of given"),
        (lambda *_: choice([9], "length", prompt_token_ids=[2]), "another prompt"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_tell_continuations(serve: Callable[[Script], Server], script: Script, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        engine(serve(script)).logps([TokenTree((1,), ((2,),))])


def test_continuations_in_text_are_refused(serve: Callable[[Script], Server]) -> None:
    with pytest.raises(EngineError, match="prompt=tokens"):
        engine(serve(echo), prompt="text").logps([TokenTree((1,), ((2,),))])


# Retries, errors of one and of all


def failing(times: int, *outcome: Any) -> Script:
    return lambda server, body, number: (outcome if outcome[0] else None) if number < times else model(server, body, number)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, None])
def test_trouble_passes_and_waits_double(serve: Callable[[Script], Server], status: int | None) -> None:
    """Jitter at its largest: 0.5 s, 1 s, 2 s. With 429 nothing else is sent meanwhile either: each wait is taken twice, by the
    request and by the pace, since the test's clock stands still.
    """
    server, waits = serve(failing(3, status, {"error": "busy"})), Waits()
    assert answers(engine(server, waits), greedy((7,))) == [stopped(107)]
    assert waits == ([0.5, 0.5, 1.0, 1.0, 2.0, 2.0] if status == 429 else [0.5, 1.0, 2.0])
    assert len(server.bodies) == 4


def test_waits_are_between_half_and_all_and_bounded() -> None:
    client = EndpointClient("http://h/v1", jitter=lambda: 0.0)
    assert [client.wait_before(attempt, None) for attempt in (0, 1, 2, 50)] == [0.25, 0.5, 1.0, 15.0]


@pytest.mark.parametrize(
    ("asked", "waited"), [("3", 3.0), ("100000", 120.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", 0.5)]
)
def test_retry_after_is_honoured_within_bounds(serve: Callable[[Script], Server], asked: str, waited: float) -> None:
    server, waits = serve(failing(1, 503, {}, {"Retry-After": asked})), Waits()
    assert answers(engine(server, waits), greedy((7,))) == [stopped(107)]
    assert waits == [waited]


def test_a_retry_after_that_says_nothing() -> None:
    assert retry_after(None) is None and retry_after("") is None and retry_after("-4") == 0.0


def test_a_refused_prompt_is_its_own_error(serve: Callable[[Script], Server]) -> None:
    said = "This model's maximum context length is 8 tokens.\n  " + "x" * 1000

    def script(server: Server, body: Body, number: int) -> tuple[int, Body]:
        return (400, {"error": {"message": said}}) if body["prompt"] == [9] else model(server, body, number)

    server = serve(script)
    found = answers(engine(server), greedy((7,), (9,), (8,)))
    assert (found[0], found[2]) == (stopped(107), stopped(108))
    assert found[1].finish_reason == "error" and found[1].error.startswith("This model's maximum context length is 8 tokens. xxx")
    assert len(found[1].error) == 300 and found[1].error.endswith("x…") and "\n" not in found[1].error
    assert len(server.bodies) == 3


def test_one_prompt_that_breaks_the_server_is_its_own_error(serve: Callable[[Script], Server]) -> None:
    def script(server: Server, body: Body, number: int) -> tuple[int, Body]:
        return (500, {"detail": "assertion failed"}) if body["prompt"] == [9] else model(server, body, number)

    server = serve(script)
    found = answers(engine(server, retries=2), greedy((9,), (8,)))
    assert found == [Completion((), "", "error", "assertion failed", passing=True), stopped(108)]
    assert sum(body["prompt"] == [9] for body in server.bodies) == 3


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, r"a key is wanted: set \$OPENAI_API_KEY"),
        (403, r"a key is wanted: set \$OPENAI_API_KEY"),
        (404, "check the model's name and the address"),
        (307, "give the address it moved to"),
        (429, r"tried 2 times\): lower concurrency"),
        (503, r"tried 2 times\): is the server overloaded"),
        (None, r"cannot be reached \(.*tried 2 times\): is the server running"),
    ],
)
def test_errors_of_all_come_after_what_arrived(serve: Callable[[Script], Server], status: int | None, said: str) -> None:
    def script(server: Server, body: Body, number: int) -> tuple[int, Body] | None:
        return model(server, body, number) if number < 2 else (status, {"message": "no"}) if status else None

    server = serve(script)
    arriving = engine(server, concurrency=1, retries=1).complete(greedy((1,), (2,), (3,), (4,)))
    assert [next(arriving), next(arriving)] == [(0, stopped(101)), (1, stopped(102))]
    with pytest.raises(EngineError, match=said) as caught:
        next(arriving)
    assert server.url in str(caught.value) and "\n" not in str(caught.value)
    assert [body["prompt"] for body in server.bodies][2:] == [[3]] * (1 if status in (401, 403, 404, 307) else 2)


def test_no_server_at_all(serve: Callable[[Script], Server]) -> None:
    server = serve(model)
    server.shutdown()
    server.server_close()
    waits = Waits()
    with pytest.raises(EngineError, match=r"completions cannot be reached \(ConnectError"):
        answers(engine(server, waits), greedy((1,)))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]


def hanging(server: Server, body: Body, number: int) -> tuple[int, Body]:
    server.let_go.wait(60)
    return model(server, body, number)


def test_a_server_that_hangs_is_given_up(serve: Callable[[Script], Server]) -> None:
    with pytest.raises(EngineError, match=r"no answer within 0\.05 seconds; tried 2 times"):
        answers(engine(serve(hanging), timeout=0.05, retries=1), greedy((1,)))


def test_a_page_instead_of_json(serve: Callable[[Script], Server]) -> None:
    with pytest.raises(EngineError, match="not a JSON object; is this an OpenAI-compatible server"):
        answers(engine(serve(lambda *_: (200, [1]))), greedy((1,)))  # type: ignore[arg-type, return-value]


# Pace, order, leaving


def test_concurrency_is_used_and_kept(serve: Callable[[Script], Server]) -> None:
    """Each of four senders waits until four requests are in the server, which never sees a fifth one at a time."""
    together = threading.Barrier(4, timeout=30)

    def script(server: Server, body: Body, number: int) -> tuple[int, Body]:
        together.wait()
        return model(server, body, number)

    server = serve(script)
    prompts = [(n,) for n in range(1, 13)]
    assert answers(engine(server, concurrency=4), greedy(*prompts)) == [stopped(n + 100) for n in range(1, 13)]
    assert server.most == 4


def test_answers_do_not_depend_on_order(serve: Callable[[Script], Server]) -> None:
    """The first request is answered last."""

    def script(server: Server, body: Body, number: int) -> tuple[int, Body]:
        if body["prompt"] == [1]:
            server.let_go.wait(30)
        elif body["prompt"] == [3]:
            server.let_go.set()
        return model(server, body, number)

    server = serve(script)
    arriving = list(engine(server, concurrency=2).complete(greedy((1,), (2,), (3,))))
    assert arriving[0] == (1, stopped(102)) and sorted(index for index, _ in arriving) == [0, 1, 2]
    found = answers(engine(server), greedy((3,), (1,), (2,)))
    assert found == [stopped(103), stopped(101), stopped(102)]


def test_requests_per_minute(serve: Callable[[Script], Server]) -> None:
    """30 a minute are 2 s apart; the clock stands still, so that the waits add up, over calls too. Retries take their turns."""
    server, waits = serve(failing(1, 500, {})), Waits()
    asked = engine(server, waits, concurrency=1, requests_per_minute=30)
    answers(asked, greedy((1,)))
    assert waits == [0.5, 2.0]
    answers(asked, greedy((2,), (3,)))
    assert waits == [0.5, 2.0, 4.0, 6.0]


def test_leaving_early_cancels_what_is_in_flight(serve: Callable[[Script], Server]) -> None:
    def script(server: Server, body: Body, number: int) -> tuple[int, Body]:
        return model(server, body, number) if body["prompt"] == [1] else hanging(server, body, number)

    server = serve(script)
    arriving = engine(server, concurrency=2).complete(greedy((1,), (2,), (3,), (4,)))
    assert next(arriving) == (0, stopped(101))
    arriving.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "endpoint" for thread in threading.enumerate())
    assert [4] not in [body["prompt"] for body in server.bodies]


def test_ctrl_c_ends_at_once(serve: Callable[[Script], Server]) -> None:
    def script(server: Server, body: Body, number: int) -> tuple[int, Body]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return hanging(server, body, number)

    server = serve(script)
    with pytest.raises(KeyboardInterrupt):
        answers(engine(server), greedy((1,)))
    assert not any(thread.name == "endpoint" for thread in threading.enumerate())
    assert not server.let_go.is_set()


def test_a_caller_with_an_event_loop(serve: Callable[[Script], Server]) -> None:
    server = serve(model)

    async def notebook() -> list[Completion]:
        return answers(engine(server), greedy((1,)))

    assert asyncio.run(notebook()) == [stopped(101)]


def test_chat_messages_through_the_same_client(serve: Callable[[Script], Server]) -> None:
    """As a judge sends them."""
    server = serve(lambda *_: (200, {"choices": [{"message": {"role": "assistant", "content": "[[7]]"}}]}))
    body = {"model": "judge", "messages": [{"role": "user", "content": "Rate this."}]}
    replies = list(EndpointClient(server.url + "/").post_many("/chat/completions", [body]))
    assert replies == [(0, {"choices": [{"message": {"role": "assistant", "content": "[[7]]"}}]})]
    assert server.paths == ["/v1/chat/completions"] and server.bodies == [body]
    refused = serve(lambda *_: (422, {"detail": [{"msg": "messages"}]}))
    assert list(EndpointClient(refused.url).post_many("/chat/completions", [body])) == [
        (0, Refusal(422, '[{"msg": "messages"}]'))
    ]


# The key


def test_the_key_is_sent_and_nowhere_else(
    serve: Callable[[Script], Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Not even where the server repeats it."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def script(server: Server, body: Body, number: int) -> tuple[int, Body] | None:
        refused = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
        return {0: (500, refused), 1: None, 2: (400, refused), 3: model(server, body, number)}.get(number, (401, refused))

    server = serve(script)
    asked = engine(server, concurrency=1, api_key_env="JUDGE_KEY")
    store = AnswerStore(tmp_path, {"engine": asked.identity})
    with pytest.raises(
        EngineError, match=r"Incorrect API key provided: \[key\]\): the key in \$JUDGE_KEY is not accepted"
    ) as caught:
        store.complete(lambda: asked, greedy((1,), (2,), (3,)))
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 5
    assert len(store.path.read_text().splitlines()) == 2  # the frame and the one answer
    shown = [str(caught.value), repr(asked.client), repr(asked.options), *(path.read_text() for path in tmp_path.iterdir())]
    assert len(caplog.records) > 5
    assert KEY not in "".join([*shown, *(repr(vars(record)) + record.getMessage() for record in caplog.records)])


def test_no_key_no_header(serve: Callable[[Script], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(model)
    answers(engine(server), greedy((1,)))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    answers(engine(server, api_key_env=""), greedy((1,)))
    assert ["Authorization" in headers for headers in server.headers] == [False, False]


def test_a_key_that_cannot_be_sent_is_not_shown(serve: Callable[[Script], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a\nb")
    with pytest.raises(EngineError) as caught:
        answers(engine(serve(model)), greedy((1,)))
    assert str(caught.value) == "the key in $OPENAI_API_KEY has characters that no key has"


# With the answer store


def test_a_server_that_dies_costs_only_what_was_missing(serve: Callable[[Script], Server], tmp_path: Path) -> None:
    prompts = [(n,) for n in range(1, 7)]

    def dying(server: Server, body: Body, number: int) -> tuple[int, Body] | None:
        if number == 3:
            threading.Thread(target=server.shutdown, daemon=True).start()
            server.socket.close()
        return model(server, body, number) if number < 3 else None

    first = serve(dying)
    store = AnswerStore(tmp_path, {"weights": "w"})
    with pytest.raises(EngineError, match="cannot be reached"):
        store.complete(lambda: engine(first, concurrency=1), greedy(*prompts))
    second = serve(model)
    again = AnswerStore(tmp_path, {"weights": "w"})
    assert again.complete(lambda: engine(second), greedy(*prompts)) == [stopped(n + 100) for n in range(1, 7)]
    assert sorted(body["prompt"] for body in second.bodies) == [[4], [5], [6]]


# Options


FINE = {"url": "http://h:8000/v1", "model": "m"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": ""}, "--engine endpoint needs --engine-set url=…"),
        ({"model": ""}, "--engine endpoint needs --engine-set model=…"),
        ({"url": "h:8000/v1"}, "--engine-set url 'h:8000/v1': not an address such as http://host:8000/v1"),
        ({"url": "ftp://h/v1"}, "--engine-set url 'ftp://h/v1': not an address such as http://host:8000/v1"),
        ({"url": "http://h:99999/v1"}, "--engine-set url: not an address such as http://host:8000/v1"),
        (
            {"url": "http://h/v1/completions"},
            "--engine-set url http://h/v1/completions: give the address that the API starts at, up to /v1",
        ),
        ({"concurrency": 0}, "--engine-set concurrency=0: must be at least 1"),
        ({"requests_per_minute": 0}, "--engine-set requests_per_minute=0: must be at least 1"),
        ({"retries": -1}, "--engine-set retries=-1: must be at least 0"),
        ({"timeout": 0.0}, "--engine-set timeout=0: must be a number of seconds above 0"),
        ({"timeout": "nan"}, "--engine-set timeout=nan: must be a number of seconds above 0"),
        ({"prompt": "token"}, "unknown value of --engine-set prompt 'token': did you mean 'tokens'? Known: text, tokens"),
    ],
)  # fmt: skip
def test_wrong_options(settings: Body, said: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_engine("endpoint", {**FINE, **settings}, "cpu", "fp32", False)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "settings",
    [{"url": f"http://user:{KEY}@h/v1"}, {"url": f"http://h/v1?key={KEY}"}, {"url": f"http://h/v1#{KEY}"}, {"api_key_env": KEY}],
)
def test_secrets_in_options_are_refused_and_not_shown(settings: Body) -> None:
    with pytest.raises(UserError) as caught:
        choose_engine("endpoint", {**FINE, **settings}, "cpu", "fp32", False)
    assert KEY not in str(caught.value)


def test_the_identity_has_what_decides_and_nothing_else() -> None:
    base = EndpointOptions("http://h:8000/v1", "m")
    name = base.identity("fp32", False)
    assert name == "endpoint/v1 m at http://h:8000/v1, prompt=tokens, not bit-exact"
    same = replace(base, url="http://h:8000/v1/", concurrency=1, retries=0, timeout=1.0, requests_per_minute=3, api_key_env="K")
    assert same.identity("bf16", True) == name
    for change in ({"url": "http://i/v1"}, {"model": "n"}, {"prompt": "text"}, {"extensions": False}):
        assert replace(base, **change).identity("fp32", False) != name


def test_what_stands_for_the_weights() -> None:
    base = EndpointOptions("http://h:8000/v1", "m")
    assert replace(base, url="http://h:8000/v1/", prompt="text").weights == base.weights
    assert len({base.weights, replace(base, model="n").weights, replace(base, url="http://i/v1").weights}) == 3


def test_the_client_closes_its_sockets(serve: Callable[[Script], Server], recwarn: pytest.WarningsRecorder) -> None:
    server = serve(model)
    for _ in range(3):
        answers(engine(server), greedy((1,), (2,)))
    with contextlib.suppress(EndpointError):
        list(EndpointClient(server.url).post_many("/completions", []))
    assert [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)] == []
