"""Judges: a served model over real sockets, with everything that goes wrong there; a model in an engine; judgments in files."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="needs the extra `endpoint`")

from test_endpoint import KEY, Body, Script, Server, Waits
from test_endpoint import serve as scripted_servers  # noqa: F401

from gsil_bench.errors import UserError
from gsil_bench.evaluation.judging import EndpointJudge, EngineJudge, make_judge, read_judgments
from gsil_bench.generation.endpoint_client import EndpointError, Refusal
from gsil_bench.generation.engine import Completion, Engine, EngineError, Request, Sampling
from gsil_bench.models.packing import TokenTree
from gsil_bench.records import ItemAnswer, ItemScore, write_jsonl
from gsil_bench.reporting.mt_bench import RatingBounds, rating_bounds, turn_scores
from gsil_bench.tasks.judge import JudgeRequest, NoReply, ReplayJudge
from gsil_bench.tasks.mini import MT_BENCH
from gsil_bench.tasks.mt_bench import FASTCHAT_SINGLE
from gsil_bench.tasks.task import Item, Score, ScoringResources

Serve = Callable[[Script], Server]


@pytest.fixture(name="serve")
def _serve(scripted_servers: Serve) -> Serve:  # noqa: F811
    return scripted_servers


def says(text: str | None, finish: str = "stop") -> tuple[int, Body]:
    return 200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def asked_of(body: Body) -> str:
    """ "question/turn" of the answer that is to be rated: the last one that the prompt quotes."""
    question, turn = re.findall(r"«(\d+)/(\d)»", body["messages"][-1]["content"])[-1]
    return f"{question}/{turn}"


def answers_to(items: Sequence[Item]) -> list[tuple[str, str]]:
    """Answers that say whose they are."""
    return [(f"Answer «{item.id}/1».", f"Answer «{item.id}/2».") for item in items]


def fair(name: str) -> int:
    """What the served judge thinks of an answer: 1 to 9 by its question, 1 more for the second turn."""
    question, turn = map(int, name.split("/"))
    return 1 + question % 9 + (turn - 1)


def rates(server: Server, body: Body, number: int) -> tuple[int, Body]:
    return says(f"A short explanation. Rating: [[{fair(asked_of(body))}]]")


def judge_at(server: Server, folder: Path | None = None, waits: Waits | None = None, **settings: Any) -> EndpointJudge:
    waits = Waits() if waits is None else waits
    judge = make_judge("endpoint", {"url": server.url, "model": "served", **settings}, folder)
    assert isinstance(judge, EndpointJudge)
    judge.client = replace(judge.client, sleep=waits.sleep, clock=waits.clock, jitter=lambda: 1.0)
    return judge


def score(judge: Any, items: Sequence[Item]) -> list[Score]:
    return FASTCHAT_SINGLE.score(items, answers_to(items), ScoringResources(judge=judge))


def bounds(items: Sequence[Item], scores: Sequence[Score]) -> RatingBounds:
    kept = [
        ItemScore(item.id, each.value, each.reason, item.group, each.details) for item, each in zip(items, scores, strict=True)
    ]
    return rating_bounds(turn_scores(kept))


@pytest.fixture(scope="module")
def items(data_dir: Path) -> list[Item]:
    return list(FASTCHAT_SINGLE.items("test", data_dir))


def prompts(*texts: str, repeat: int = 0) -> list[JudgeRequest]:
    return [JudgeRequest((), (), name=text, system="Judge.", prompt=text, repeat=repeat) for text in texts]


# A served judge


@pytest.mark.data
def test_all_of_mt_bench_from_a_server(serve: Serve, items: list[Item], tmp_path: Path) -> None:
    server = serve(rates)
    done: list[int] = []
    judge = judge_at(server, tmp_path)
    judge.advance = done.append
    scores = score(judge, items)
    assert [each.value for each in scores] == [1.5 + number % 9 for number in range(81, 161)]
    assert sorted(map(asked_of, server.bodies)) == sorted(f"{n}/{turn}" for n in range(81, 161) for turn in (1, 2))
    assert set(server.paths) == {"/v1/chat/completions"} and sum(done) == 160
    assert server.most <= 8
    first = next(body for body in server.bodies if asked_of(body) == "81/1")
    assert {key: value for key, value in first.items() if key != "messages"} == {
        "model": "served",
        "temperature": 0.0,
        "max_tokens": 2048,
    }
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert first["messages"][0]["content"] == "You are a helpful assistant."
    assert first["messages"][1]["content"].startswith("[Instruction]\nPlease act as an impartial judge")
    again = serve(rates)
    judge = judge_at(again, tmp_path)
    judge.client.url = server.url  # only the port differs; a judge's address is part of what it is
    assert [each.value for each in score(judge, items)] == [each.value for each in scores]
    assert again.bodies == []


TROUBLE = {
    "81/1": "429 once",
    "82/1": "500 twice",
    "83/2": "hangs up once",
    "84/1": "500 always",
    "85/2": "429 always",
    "87/2": "no rating",
    "88/1": "400",
    "89/2": "no text",
    "90/1": "off the scale",
    "91/2": "no choices",
    "92/1": "hangs up always",
}


def troubled(server: Server, body: Body, number: int) -> tuple[int, Body] | tuple[int, Body, dict[str, str]] | None:
    name = asked_of(body)
    with server.lock:
        before = sum(asked_of(other) == name for other in server.bodies) - 1
    trouble = TROUBLE.get(name, "")
    if trouble in ("hangs up once", "hangs up always") and (before == 0 or trouble.endswith("always")):
        return None
    if trouble == "429 once" and before == 0:
        return 429, {"error": {"message": "slow down"}}, {"Retry-After": "1"}
    if trouble in ("500 always", "429 always"):
        return int(trouble[:3]), {"error": {"message": "overloaded"}}
    if trouble == "500 twice" and before < 2:
        return 500, {"error": "broken"}
    if trouble == "400":
        return 400, {"error": {"message": "too many tokens"}}
    if trouble == "no choices":
        return 200, {"object": "error"}
    texts = {"no rating": "I would say 7 of 10.", "no text": None, "off the scale": "[[0]]"}
    return says(texts[trouble]) if trouble in texts else rates(server, body, number)


@pytest.mark.data
def test_everything_that_goes_wrong_with_a_server(serve: Serve, items: list[Item], tmp_path: Path) -> None:
    """Twelve questions. Transient trouble changes nothing; lasting trouble costs the turn that has it and no other."""
    server, dozen = serve(troubled), items[:12]
    scores = dict(zip([item.id for item in dozen], score(judge_at(server, tmp_path, retries=2), dozen), strict=True))
    for name in ("81", "82", "83"):
        assert scores[name].value == 1.5 + int(name) % 9
    assert (scores["90"].value, scores["90"].details["out_of_range"]) == ((0 + fair("90/2")) / 2, True)
    reasons = {name: each.reason for name, each in scores.items() if each.value is None}
    assert reasons.pop("92").startswith("turn 1: RemoteProtocolError: ")
    assert reasons == {
        "84": "turn 1: 500: overloaded",
        "85": "turn 2: 429: overloaded; tried 3 times",
        "87": "turn 2: no rating in the judgment",
        "88": "turn 1: 400: too many tokens",
        "89": "turn 2: the judge said nothing (finish_reason 'stop')",
        "91": "turn 2: the reply has no choices[0].message.content; is this an OpenAI-compatible server?",
    }
    asked = [asked_of(body) for body in server.bodies]
    tries = {"81/1": 2, "82/1": 3, "83/2": 2, "84/1": 3, "85/2": 3, "92/1": 3}
    assert {name: asked.count(name) for name in set(asked)} == {
        f"{item.id}/{turn}": tries.get(f"{item.id}/{turn}", 1) for item in dozen for turn in (1, 2)
    }
    # 17 of 24 turns have a rating: 16 fair ones and the 0.
    lost = ("84/1", "85/2", "87/2", "88/1", "89/2", "91/2", "92/1")
    total = sum(fair(name) for name in set(asked) if name not in lost) - fair("90/1")
    assert bounds(dozen, list(scores.values())) == RatingBounds(total / 17, (total + 7) / 24, (total + 70) / 24, 24, 7)


@pytest.mark.data
def test_a_prompt_that_a_server_hangs_on_costs_its_turn(serve: Serve, items: list[Item]) -> None:
    def script(server: Server, body: Body, number: int) -> tuple[int, Body]:
        if asked_of(body) == "81/2":
            server.let_go.wait(60)
        return rates(server, body, number)

    server = serve(script)
    scores = score(judge_at(server, retries=0, timeout=5), items[:2])
    assert [each.value for each in scores] == [None, 1.5 + 82 % 9]
    assert scores[0].reason == "turn 2: no answer within 5 seconds; tried 1 times"
    assert scores[0].details["ratings"] == [1.0, None] and len(server.bodies) == 4


@pytest.mark.data
def test_what_failed_is_asked_again_and_nothing_else(serve: Serve, items: list[Item], tmp_path: Path) -> None:
    """The same server gets well."""
    dozen, well = items[:12], threading.Event()
    server = serve(lambda server, body, number: (rates if well.is_set() else troubled)(server, body, number))
    first = score(judge_at(server, tmp_path, retries=2), dozen)
    before = len(server.bodies)
    well.set()
    second = score(judge_at(server, tmp_path, retries=2), dozen)
    again = sorted(asked_of(body) for body in server.bodies[before:])
    assert again == ["84/1", "85/2", "88/1", "89/2", "91/2", "92/1"]  # not the garbage of 87/2: it was an answer
    assert [each.value for each in first].count(None) == 7
    assert [item.id for item, each in zip(dozen, second, strict=True) if each.value is None] == ["87"]
    for name, each in zip([item.id for item in dozen], second, strict=True):
        if name not in ("87", "90"):
            assert each.value == 1.5 + int(name) % 9
    third = len(server.bodies)
    score(judge_at(server, tmp_path), dozen)
    assert len(server.bodies) == third


@pytest.mark.data
def test_a_server_that_dies_costs_only_what_was_missing(serve: Serve, items: list[Item], tmp_path: Path) -> None:
    well = threading.Event()

    def script(server: Server, body: Body, number: int) -> tuple[int, Body] | None:
        return rates(server, body, number) if number < 50 or well.is_set() else None

    server = serve(script)
    with pytest.raises(EndpointError, match=r"cannot be reached \(.*tried 1 times\): is the server running") as caught:
        score(judge_at(server, tmp_path, retries=0, concurrency=1), items)
    assert "\n" not in str(caught.value)
    before = {asked_of(body) for body in server.bodies[:50]}
    assert len(server.bodies) == 50 + 9  # eight failures in a row are borne
    well.set()
    scores = score(judge_at(server, tmp_path), items)
    everything = {f"{item.id}/{turn}" for item in items for turn in (1, 2)}
    assert sorted(asked_of(body) for body in server.bodies[59:]) == sorted(everything - before)
    assert [each.value for each in scores] == [1.5 + number % 9 for number in range(81, 161)]


@pytest.mark.data
@pytest.mark.parametrize(("status", "said"), [(401, r"a key is wanted: set \$OPENAI_API_KEY"), (404, "check the model's name")])
def test_a_wrong_key_or_model_is_one_error(serve: Serve, items: list[Item], status: int, said: str) -> None:
    server = serve(lambda *_: (status, {"error": {"message": "no"}}))
    with pytest.raises(UserError, match=said):
        score(judge_at(server, concurrency=1), items)
    assert len(server.bodies) == 1


@pytest.mark.data
def test_a_judge_that_refuses_everything_is_one_error(serve: Serve, items: list[Item]) -> None:
    said = {"error": {"message": "Unsupported parameter: 'max_tokens'"}}
    with pytest.raises(UserError) as caught:
        score(judge_at(serve(lambda *_: (400, said))), items[:2])
    assert re.fullmatch(
        r"mt-bench/fastchat-single: the judge \(endpoint-judge/v1 served at http://127\.0\.0\.1:\d+/v1, temperature 0, 2048 "
        r"tokens\) gave none of 4 judgments: 400: Unsupported parameter: 'max_tokens'",
        str(caught.value),
    )


def test_one_prompt_that_fails_alone_does_not_stop_a_sequential_client(serve: Serve) -> None:
    """One request at a time: eight in a row may fail, and one that is served starts the count again."""

    def script(server: Server, body: Body, number: int) -> tuple[int, Body]:
        return (503, {"message": "no"}) if body["messages"][-1]["content"] == "bad" else says("[[5]]")

    judge = judge_at(serve(script), concurrency=1, retries=0)
    asked = [request for n in range(20) for request in (prompts("bad", repeat=n) + prompts(f"good {n}"))]
    replies = judge.replies(asked)
    assert replies[1::2] == ["[[5]]"] * 20
    assert replies[::2] == [NoReply("503: no; tried 1 times")] * 20
    with pytest.raises(EndpointError, match="serves nothing"):
        judge.replies([prompts("bad", repeat=n)[0] for n in range(17)])


def test_the_client_bears_no_failure_unless_told_to(serve: Serve) -> None:
    client = judge_at(serve(lambda *_: (503, {"message": "no"})), retries=0).client
    body = {"messages": []}
    with pytest.raises(EndpointError):
        list(replace(client, tolerated=0).post_many("/chat/completions", [body]))
    assert list(client.post_many("/chat/completions", [body])) == [(0, Refusal(503, "no; tried 1 times"))]


# How it is asked


def test_temperature_and_repeats(serve: Serve) -> None:
    """Above 0 each repeat has a seed of its own, the same at every run."""
    server = serve(lambda *_: says("[[5]]"))
    asked = [replace(request, repeat=repeat) for request in prompts("a", "b") for repeat in range(3)]
    judge_at(server, temperature=0.7, seed=3).replies(asked)
    seeds = {(body["messages"][-1]["content"], body["seed"]) for body in server.bodies}
    assert len(seeds) == 6 and len({seed for _, seed in seeds}) == 6 and all(0 <= seed < 2**31 for _, seed in seeds)
    judge_at(server, temperature=0.7, seed=3).replies(asked)
    assert {(body["messages"][-1]["content"], body["seed"]) for body in server.bodies[6:]} == seeds
    judge_at(server, temperature=0.7, seed=4).replies(asked)
    assert {body["seed"] for body in server.bodies[12:]}.isdisjoint(seed for _, seed in seeds)
    judge_at(server).replies(asked)
    assert ["seed" in body for body in server.bodies[18:]] == [False] * 6  # plain repeats


def test_more_repeats_ask_only_for_the_new_ones(serve: Serve, items: list[Item], tmp_path: Path) -> None:
    texts = iter(["[[4]]", "[[6]]", "[[8]]", "[[2]]", "[[6]]", "[[4]]"])
    server = serve(lambda *_: says(next(texts)))
    (one,) = score(judge_at(server, tmp_path, concurrency=1), items[:1])
    assert (one.value, one.details["ratings"]) == (5.0, [4.0, 6.0]) and len(server.bodies) == 2
    (three,) = score(judge_at(server, tmp_path, concurrency=1, repeats=3), items[:1])
    assert three.details["repeats"] == [[4.0, 8.0, 2.0], [6.0, 6.0, 4.0]] and len(server.bodies) == 6
    assert three.value == ((4 + 8 + 2) / 3 + (6 + 6 + 4) / 3) / 2


def test_another_judge_has_its_own_judgments(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda *_: says("[[5]]"))
    one = prompts("a")
    for settings in ({}, {"model": "other"}, {"temperature": 1.0}, {"max_tokens": 100}, {"temperature": 1.0, "seed": 1}):
        for _ in range(2):
            assert judge_at(server, tmp_path, **settings).replies(one) == ["[[5]]"]
    assert len(server.bodies) == 5
    judge_at(server, tmp_path, concurrency=1, retries=0, timeout=9, repeats=2, api_key_env="K").replies(one)
    assert len(server.bodies) == 5
    assert judge_at(server, tmp_path).replies([replace(one[0], system="Otherwise.")]) == ["[[5]]"]
    assert len(server.bodies) == 6


def test_equal_requests_are_asked_once(serve: Serve) -> None:
    server, done = serve(lambda *_: says("[[5]]")), list[int]()
    judge = judge_at(server)
    judge.advance = done.append
    assert judge.replies(prompts("a", "b", "a")) == ["[[5]]"] * 3
    assert len(server.bodies) == 2 and sum(done) == 3


def test_identities() -> None:
    fine = {"url": "http://h:8000/v1", "model": "m"}
    name = make_judge("endpoint", fine).identity
    assert name == "endpoint-judge/v1 m at http://h:8000/v1, temperature 0, 2048 tokens"
    same = {"url": "http://h:8000/v1/", "concurrency": "1", "retries": "0", "timeout": "3", "api_key_env": "K", "seed": "4"}
    assert make_judge("endpoint", {**fine, **same}).identity == name
    for change in ({"url": "http://i/v1"}, {"model": "n"}, {"temperature": "0.5"}, {"max_tokens": "9"}, {"repeats": "3"}):
        assert make_judge("endpoint", {**fine, **change}).identity != name
    assert make_judge("endpoint", {**fine, "repeats": "3"}).identity.endswith("2048 tokens, mean of 3 judgments")


def test_a_cut_judgment_is_read_as_it_is(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda *_: says("Rating: [[6]], because", "length"))
    assert judge_at(server, tmp_path).replies(prompts("a")) == ["Rating: [[6]], because"]
    assert judge_at(server, tmp_path).replies(prompts("a")) == ["Rating: [[6]], because"] and len(server.bodies) == 1


def test_the_key_is_in_no_file(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the server repeats it."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    refused = {"error": {"message": f"bad key {KEY}"}}
    server = serve(lambda server, body, number: (400, refused) if number else says("[[5]]"))
    replies = judge_at(server, tmp_path, api_key_env="JUDGE_KEY", concurrency=1).replies(prompts("a", "b"))
    assert replies == ["[[5]]", NoReply("400: bad key [key]")]
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 2
    assert KEY not in "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir() if path.is_file())


def test_a_field_for_newer_models(serve: Serve) -> None:
    server = serve(lambda *_: says("[[5]]"))
    judge_at(server, max_tokens_field="max_completion_tokens", max_tokens=99).replies(prompts("a"))
    assert server.bodies[0]["max_completion_tokens"] == 99 and "max_tokens" not in server.bodies[0]


def test_a_rubric_is_not_for_language_models(serve: Serve) -> None:
    mini = replace(MT_BENCH, judge=judge_at(serve(rates)))
    item = mini.items("dev", None)[0]
    with pytest.raises(UserError, match="this task's judge follows a rubric"):
        mini.score([item], [item.gold], ScoringResources())


OWN = ReplayJudge({})
FINE = {"url": "http://h:8000/v1", "model": "m"}


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("endpoint", {}, "--judge endpoint needs --judge-set url=…"),
        ("endpoint", {"url": "http://h/v1"}, "--judge endpoint needs --judge-set model=…"),
        ("endpiont", {}, "unknown judge 'endpiont': did you mean 'endpoint'? Known: endpoint, engine, replay"),
        ("endpoint", {**FINE, "url": "h:8000"}, "--judge-set url 'h:8000': not an address such as http://host:8000/v1"),
        ("endpoint", {**FINE, "repeats": "two"}, "--judge-set repeats=two: expected a whole number"),
        ("endpoint", {**FINE, "repeats": "0"}, "--judge-set repeats=0: must be at least 1"),
        ("endpoint", {**FINE, "retries": "-1"}, "--judge-set retries=-1: must be at least 0"),
        ("endpoint", {**FINE, "concurrency": "0"}, "--judge-set concurrency=0: must be at least 1"),
        ("endpoint", {**FINE, "temperature": "-1"}, "--judge-set temperature=-1: must be a number from 0 up"),
        ("endpoint", {**FINE, "temperature": "nan"}, "--judge-set temperature=nan: must be a number from 0 up"),
        ("endpoint", {**FINE, "timeout": "0"}, "--judge-set timeout=0: must be a number of seconds above 0"),
        (
            "endpoint",
            {**FINE, "max_tokens_field": "max_token"},
            "unknown value of --judge-set max_tokens_field 'max_token': did you mean 'max_tokens'? Known: "
            "max_completion_tokens, max_tokens",
        ),
        ("endpoint", {**FINE, "engine.x": "1"}, "--judge endpoint has no engine of ours: leave out --judge-set engine.…"),
        ("engine", {}, "--judge engine needs --judge-set model=…"),
        ("replay", {}, "--judge replay needs --judge-set file=…"),
        ("replay", {"file": "f", "engine.x": "1"}, "--judge replay has no engine: leave out --judge-set engine.…"),
        (
            "json:loads",
            {},
            "judge 'json:loads' is not a Judge (see gsil_bench/tasks/judge.py): it lacks identity, repeats, replies",
        ),
        ("json:loads", {"a": "b"}, "--judge json:loads: a judge of your own takes no --judge-set"),
    ],
)  # fmt: skip
def test_wrong_options(name: str, settings: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make_judge(name, settings)
    assert str(caught.value) == said


def test_a_misspelt_option() -> None:
    with pytest.raises(UserError, match=r"unknown option of judge endpoint 'modle': did you mean 'model'\?"):
        make_judge("endpoint", {"url": "http://h/v1", "modle": "m"})


@pytest.mark.parametrize("settings", [{"url": f"http://user:{KEY}@h/v1"}, {"api_key_env": KEY}])
def test_secrets_in_options_are_refused_and_not_shown(settings: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        make_judge("endpoint", {**FINE, **settings})
    assert KEY not in str(caught.value)


def test_a_judge_of_ones_own() -> None:
    assert make_judge("test_judging:OWN", {}) is OWN
    with pytest.raises(UserError, match="cannot be loaded: ModuleNotFoundError"):
        make_judge("no_such_module:JUDGE", {})


# A judge in an engine


class Fake:
    """Answers a prompt of n tokens with "[[n]]"; a prompt of more than 40 is too long."""

    identity = "fake/v1"

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.closed = 0

    def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        for index in reversed(range(len(requests))):
            self.asked.append(requests[index])
            length = len(requests[index].prompt_ids)
            yield (
                index,
                Completion((), "", "error", "too long") if length > 40 else Completion((1,), f"[[{length}]]", "stop"),
            )

    def logps(self, trees: Sequence[TokenTree]) -> list[list[tuple[float, ...]]]:
        raise NotImplementedError

    def close(self) -> None:
        self.closed += 1


class Letters:
    """A chat format of one token a letter, which refuses "|" as a control token."""

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        text = "".join(message["role"][0] + message["content"] for message in messages)
        if "|" in text:
            raise UserError("the user's message holds '|', a control token")
        return tuple(map(ord, text))


def engine_judge(fake: Fake, folder: Path | None = None, temperature: float = 0.0, repeats: int = 1) -> EngineJudge:
    chat: Any = Letters()
    return EngineJudge(lambda: fake, chat, "fake model", Sampling(20, temperature, seed=5), repeats, folder)


def test_a_judge_in_an_engine(tmp_path: Path) -> None:
    """ "s" + "Judge." + "u" + the prompt: 8 letters more than it has."""
    fake = Fake()
    replies = engine_judge(fake, tmp_path).replies(prompts("abc", "a|b", "x" * 50, "abcd"))
    assert replies == ["[[11]]", NoReply("the user's message holds '|', a control token"), NoReply("too long"), "[[12]]"]
    assert fake.closed == 1 and {request.sampling for request in fake.asked} == {Sampling(20, 0.0, seed=5)}
    again = Fake()
    assert engine_judge(again, tmp_path).replies(prompts("abc", "abcd")) == ["[[11]]", "[[12]]"]
    assert (again.asked, again.closed) == ([], 0)


def test_repeats_of_an_engine_are_its_samples() -> None:
    fake = Fake()
    judge = engine_judge(fake, temperature=0.7, repeats=2)
    judge.replies([*prompts("abc"), *prompts("abc", repeat=1)])
    assert sorted(request.sample for request in fake.asked) == [0, 1] and len({request.key for request in fake.asked}) == 2
    assert judge.identity == "engine-judge/v1 fake model, temperature 0.7 (seed 5), 20 tokens, mean of 2 judgments"


def test_an_engine_is_closed_even_if_it_fails() -> None:
    class Broken(Fake):
        def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
            raise EngineError("gone")
            yield

    fake = Broken()
    with pytest.raises(EngineError, match="gone"):
        engine_judge(fake).replies(prompts("abc"))
    assert fake.closed == 1


def test_no_engine_is_made_for_nothing() -> None:
    def fails() -> Engine:
        raise AssertionError("made")

    chat: Any = Letters()
    judge = EngineJudge(fails, chat, "fake", Sampling(5))
    assert judge.replies([]) == [] and isinstance(judge.replies(prompts("|"))[0], NoReply)


def test_the_packaged_model_as_a_judge(mini_folder: Path, tmp_path: Path) -> None:
    """The text is that of model.generate under the model's own template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(mini_folder)
    model = AutoModelForCausalLM.from_pretrained(mini_folder, dtype=torch.float32).eval()
    question = "Ali has 5 pens and gets 3 more. How many pens does Ali have?"
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        made = model.generate(**ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    settings = {"model": str(mini_folder), "device": "cpu", "max_tokens": "12", "engine": "transformers"}
    judge = make_judge("engine", settings, tmp_path)
    assert judge.replies([JudgeRequest((), (), prompt=question)])[0] == expected
    assert expected
    assert re.fullmatch(
        r"engine-judge/v1 model \(weights [0-9a-f]{16}, chat [0-9a-f]{16}, context \d+, fp32\) by transformers-.*, "
        r"temperature 0, 12 tokens",
        judge.identity,
    )
    with pytest.raises(UserError, match="unknown option of engine transformers 'tensor_parallel_size'"):
        make_judge("engine", {**settings, "engine.tensor_parallel_size": "2"})
    with pytest.raises(UserError, match="no such folder"):
        make_judge("engine", {"model": "nowhere"})


# Judgments in files


def test_judgments_of_the_suites_own_form(tmp_path: Path) -> None:
    rows = [{"item": "81/1", "completion": "…", "judgment": "[[7]]"}, {"item": "81/2", "judgment": "[[4]]"}]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judge = make_judge("replay", {"file": str(path)})
    assert isinstance(judge, ReplayJudge) and judge.judgments == {"81/1": "[[7]]", "81/2": "[[4]]"}
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"item": "81/2", "completion": "…"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r'f\.jsonl:2: expected \{"item": "question_id/turn", "judgment": TEXT\}'):
        read_judgments(path)
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[0], "judgment": "[[1]]"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"f\.jsonl:2: a second judgment of 81/1"):
        read_judgments(path)


@pytest.mark.data
def test_fastchats_judgments_replayed(items: list[Item], tmp_path: Path) -> None:
    rows = [
        {"question_id": 81, "turn": turn, "model": model, "judge": ["gpt-4", "p"], "judgment": f"[[{score}]]", "score": score}
        for model, scores in (("a", (3, 5)), ("b", (9, 9)))
        for turn, score in enumerate(scores, 1)
    ]
    path = tmp_path / "gpt-4_single.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judge = make_judge("replay", {"file": str(path), "model": "a"})
    assert [each.value for each in score(judge, items[:1])] == [4.0]
    with pytest.raises(UserError, match="holds the judgments of 2 models"):
        make_judge("replay", {"file": str(path)})


# --- in a run ----------------------------------------------------------------------------------------------------------------


def test_judging_reports_to_the_run_that_it_is_a_part_of(tmp_path: Path) -> None:
    """So that its progress is seen, and an interruption stops it between two judgments."""
    from gsil_bench import stages

    class Rated:
        metric, best, worst, runs_code = "rating", 10.0, 1.0, False

        def score(self, items: Any, answers: Any, resources: ScoringResources) -> list[Score]:
            resources.judge.advance(3)
            return [Score(7.0, "") for _ in items]

    def stop(done: int) -> None:
        raise KeyboardInterrupt(done)

    write_jsonl(tmp_path / "answers.jsonl", [ItemAnswer("81", 0, ("Yes.",), ("stop",), (2,))])
    resources = SimpleNamespace(advance=stop, scoring=ScoringResources(judge=SimpleNamespace(advance=lambda done: None)))
    work: Any = SimpleNamespace(needs={"answers": SimpleNamespace(folder=tmp_path)}, resources=resources, folder=tmp_path)
    task: Any = SimpleNamespace(task=Rated(), items=(Item("81", ("Really?",)),))
    with pytest.raises(KeyboardInterrupt, match="3"):
        stages.score_task(work, task)
