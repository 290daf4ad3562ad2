"""An HTTP client for OpenAI-compatible servers: JSON out, JSON in, many requests at once, each reply as soon as it is there.

It keeps to a number of requests in flight and to requests per minute, waits and asks again when a server is busy or out of reach,
and tells what concerns one request (a prompt that is too long) from what concerns all of them (no server, a wrong key). It knows
nothing of engines or judges. The key is read from the environment when requests are sent; it is in no message, log or file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gsil_bench.errors import UserError

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the first retry, doubled at each further one up to the longest."""
LONGEST_RETRY_AFTER = 120.0
"""Seconds that a server's Retry-After is honoured for; a longer one is cut."""
LONGEST_CONNECT = 30.0
"""Seconds that a connection may take: a wrong address is not waited for as long as an answer."""
LONGEST_CLOSE = 5.0
"""Seconds that giving up what is in flight may take."""
MESSAGE_LENGTH = 300
"""Characters of a server's message that are kept."""
NO_SERVER = frozenset({429, 502, 503, 504})
"""Statuses that, when retries do not help, say that no request will be served; 500 may be one prompt's fault."""
RETRIED = frozenset({408, 409, 429, *range(500, 600)})
FOR_ALL = frozenset({401, 403, 404, *range(300, 400)})
"""Statuses that every request would get."""

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class EndpointError(UserError):
    """No request can be served: wrong address, wrong key, or a server that does not answer."""


@dataclass(frozen=True)
class Refusal:
    """What a server said instead of answering one request."""

    status: int
    """0: there was no reply at all."""
    message: str
    """On one line, shortened."""


Reply = dict[str, Any] | Refusal


@dataclass(frozen=True)
class _Trouble:
    """Why a request is sent again."""

    what: str
    status: int | None = None
    """None: no reply at all."""
    retry_after: float | None = None


def check_url(url: str, where: str = "url") -> None:
    """Raise UserError unless it is an http(s) address without credentials, which would end up in files and messages."""
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        raise UserError(f"{where}: not an address such as http://host:8000/v1") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UserError(
            f"{where}: leave credentials and parameters out of the address; a key belongs into an environment variable"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine or re.search(r"\s", url):
        raise UserError(f"{where} {url!r}: not an address such as http://host:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise UserError(f"{where} {url}: give the address that the API starts at, up to /v1")


def check_key_variable(name: str, where: str = "api_key_env") -> None:
    """Raise UserError unless it can be an environment variable's name. The value is not shown: it may be the key itself."""
    if name and not _VARIABLE.fullmatch(name):
        raise UserError(f"{where}: give the name of an environment variable (capital letters), not the key")


@dataclass
class EndpointClient:
    """Sends requests to one server. Not for several threads at once."""

    url: str
    """That the API starts at: http://host:8000/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; none is sent where it is unset or the name is empty."""
    concurrency: int = 8
    """Requests in flight at most."""
    requests_per_minute: int | None = None
    """Retries count; they are sent at even distances."""
    retries: int = 5
    """Of one request."""
    timeout: float = 600.0
    """Seconds for one request."""
    tolerated: int = 0
    """Requests that may go unserved in a row, none served between, before that is an error of all. Until then each is a
    `Refusal`: a single prompt can be what a server hangs on."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random
    """A number in [0, 1)."""
    _next: float = field(default=0.0, init=False)
    """Time before which nothing is sent: of the rate limit, or as the server asked."""

    def __post_init__(self) -> None:
        check_url(self.url)
        check_key_variable(self.api_key_env)
        self.url = self.url.rstrip("/")

    def post_many(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> Generator[tuple[int, Reply], None, None]:
        """Each reply beside its request's index, in the order of their arrival.

        Leaving the iterator early cancels what is in flight.

        Args:
            path: below the address: "/completions", "/chat/completions".

        Raises:
            EndpointError: no request can be served; what arrived before is handed out first.
        """
        flight = _Flight(self, path, bodies, self.read_key())
        try:
            yield from flight.arrivals()
        finally:
            flight.stop()

    def read_key(self) -> str:
        """The key as the environment has it, or nothing."""
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if not (key.isascii() and key.isprintable()):  # the HTTP library would show it in its complaint
            raise EndpointError(f"the key in ${self.api_key_env} has characters that no key has")
        return key

    def wait_before(self, attempt: int, retry_after: float | None) -> float:
        """Seconds to wait before sending again, after the attempt of that number (0 is the first)."""
        if retry_after is not None:
            return min(retry_after, LONGEST_RETRY_AFTER)
        # Between half and all of it, so that requests that failed together do not come back together.
        return min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT) * (1 + self.jitter()) / 2

    async def turn(self) -> None:
        """Wait until the next request may be sent."""
        now = self.clock()
        mine = max(now, self._next)
        self._next = mine + 60 / self.requests_per_minute if self.requests_per_minute else self._next
        if mine > now:
            await self.sleep(mine - now)

    def hold(self, seconds: float) -> None:
        """Send nothing for a while: the server said that it gets too much."""
        self._next = max(self._next, self.clock() + seconds)


class _Flight:
    """Requests on their way. An event loop in a thread of its own, so that the caller may have one, and Ctrl-C reaches it."""

    def __init__(self, client: EndpointClient, path: str, bodies: Sequence[Mapping[str, Any]], key: str) -> None:
        self._client, self._address, self._bodies, self._key = client, client.url + path, bodies, key
        self._arrived = SimpleQueue[tuple[int, Reply] | BaseException | None]()
        self._unserved = 0  # since the last one that was served
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._send_all())
        self._thread = threading.Thread(target=self._run, name="endpoint", daemon=True)
        self._thread.start()

    def arrivals(self) -> Iterator[tuple[int, Reply]]:
        """Replies until all are there."""
        while (item := self._arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """Cancel what is in flight."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: all is done
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(LONGEST_CLOSE)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:
            self._arrived.put(group.exceptions[0])
        except BaseException as error:
            self._arrived.put(error)
        finally:
            self._loop.close()
            self._arrived.put(None)

    async def _send_all(self) -> None:
        import httpx2

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx2.Timeout(None, connect=min(self._client.timeout, LONGEST_CONNECT))
        waiting = iter(enumerate(self._bodies))
        async with httpx2.AsyncClient(headers=headers, timeout=timeout) as http, asyncio.TaskGroup() as senders:
            for _ in range(min(self._client.concurrency, len(self._bodies))):
                senders.create_task(self._send(http, waiting))

    async def _send(self, http: httpx2.AsyncClient, waiting: Iterator[tuple[int, Mapping[str, Any]]]) -> None:
        for index, body in waiting:
            self._arrived.put((index, await self._reply(http, body)))

    async def _reply(self, http: httpx2.AsyncClient, body: Mapping[str, Any]) -> Reply:
        """The reply to one request, which may be sent several times."""
        client, attempt = self._client, 0
        while True:
            await client.turn()
            outcome = await self._attempt(http, body)
            if not isinstance(outcome, _Trouble):
                self._unserved = 0
                return outcome
            if attempt == client.retries:
                return self._give_up(outcome)
            wait = client.wait_before(attempt, outcome.retry_after)
            logger.info("%s: %s; again in %.1f s", self._address, outcome.what, wait)
            if outcome.status == 429:
                client.hold(wait)
            await client.sleep(wait)
            attempt += 1

    async def _attempt(self, http: httpx2.AsyncClient, body: Mapping[str, Any]) -> Reply | _Trouble:
        import httpx2

        try:
            async with asyncio.timeout(self._client.timeout):
                response = await http.post(self._address, json=body)
        except TimeoutError:
            return _Trouble(f"no answer within {self._client.timeout:g} seconds")
        except httpx2.TransportError as error:
            return _Trouble(self._one_line(f"{type(error).__name__}: {error}"))
        if response.status_code in FOR_ALL:
            raise self._for_all(response)
        if response.status_code in RETRIED:
            return _Trouble(self._message(response), response.status_code, retry_after(response.headers.get("Retry-After")))
        if response.status_code >= 400:
            return Refusal(response.status_code, self._message(response))
        with contextlib.suppress(ValueError):
            if isinstance(reply := response.json(), dict):
                return reply
        raise EndpointError(f"{self._address}: the reply is not a JSON object; is this an OpenAI-compatible server?")

    def _give_up(self, trouble: _Trouble) -> Refusal:
        """After the last retry: the refusal of one request, or an error of all."""
        tried = f"tried {self._client.retries + 1} times"
        if trouble.status is not None and trouble.status not in NO_SERVER:
            return Refusal(trouble.status, trouble.what)
        self._unserved += 1
        if self._unserved <= self._client.tolerated:
            return Refusal(trouble.status or 0, f"{trouble.what}; {tried}")
        if trouble.status is None:
            hint = "is the server running? A slow one needs a longer timeout"
            raise EndpointError(f"{self._address} cannot be reached ({trouble.what}; {tried}): {hint}")
        hint = "lower concurrency or requests_per_minute" if trouble.status == 429 else "is the server overloaded or starting?"
        raise EndpointError(f"{self._address} serves nothing ({trouble.status}: {trouble.what}; {tried}): {hint}")

    def _for_all(self, response: httpx2.Response) -> EndpointError:
        status, variable = response.status_code, self._client.api_key_env or "a variable named by api_key_env"
        said = f"{status}: {self._message(response)}"
        if status in (401, 403):
            todo = f"the key in ${variable} is not accepted" if self._key else f"a key is wanted: set ${variable}"
            return EndpointError(f"{self._address} ({said}): {todo}")
        todo = (
            "check the model's name and the address, which mostly ends in /v1"
            if status == 404
            else "give the address it moved to"
        )
        return EndpointError(f"{self._address} ({said}): {todo}")

    def _message(self, response: httpx2.Response) -> str:
        """What the server said, wherever in its reply."""
        try:
            said = json.loads(response.text)
        except ValueError:
            return self._one_line(response.text) or response.reason_phrase
        for key in ("error", "message", "detail"):
            said = said.get(key, said) if isinstance(said, dict) else said
        return self._one_line(said if isinstance(said, str) else json.dumps(said)) or response.reason_phrase

    def _one_line(self, text: str) -> str:
        text = " ".join(text.replace(self._key, "[key]").split() if self._key else text.split())
        return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 1] + "…"


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, which holds seconds or a date; None where it says nothing."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
