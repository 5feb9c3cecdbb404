"""HTTP requests to one SGLang server. Every request has a timeout, and every status is checked.

Bodies and answers are those of SGLang 0.5.23. A call has one of three outcomes: an answer; ServerRefused, if the
server answered with an error; ServerGone, if it did not answer, so that the effect of the call is unknown
(ServerUnreached: there was no connection, so the call had no effect; ServerSilent: it did not answer in time).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import aiohttp

from sgpo_async.errors import EngineError

Json = dict[str, Any]
PIECE = 2**20  # bytes of a ready body that are handed to the connection at a time
KEEPALIVE_S = 2.0  # an idle connection is closed after this time
# How a call fails without a usable answer. ValueError: the answer is not UTF-8, or a message of a stream is not JSON.
FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


class ServerRefused(EngineError):
    """The server answered with an error."""


class ServerGone(EngineError):
    """The server gave no answer: it is dead, hangs, or cannot be reached."""


class ServerUnreached(ServerGone):
    """No connection to the server was established, so the call had no effect on it."""


class ServerSilent(ServerGone):
    """The server got the call and did not answer in time."""


class Connection:
    """Whether a call has a connection to the server; `on_connected` is called when it gets one."""

    def __init__(self, on_connected: Callable[[], None] | None = None) -> None:
        self.established = False
        self._on_connected = on_connected

    def establish(self) -> None:
        """Record that there is a connection."""
        self.established = True
        if self._on_connected is not None:
            self._on_connected()


def http_session() -> aiohttp.ClientSession:
    """A session for any number of servers.

    It closes idle connections before SGLang does (after 5 s): a request on a connection that the server has just
    closed would fail as if the server had died. It never uses a proxy: the servers are on this machine or beside it.
    """
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(_connected)
    trace.on_connection_reuseconn.append(_connected)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    return aiohttp.ClientSession(connector=connector, trace_configs=[trace], trust_env=False)


class ServerApi:
    """One server at `url`; `http` is shared by all servers of an engine and closed by its owner."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = http

    async def get(self, path: str, *, timeout_s: float) -> Json:
        """The answer to a GET request. Raises ServerRefused, ServerGone."""
        return await self._call("GET", path, None, timeout_s)

    async def post(
        self, path: str, body: Mapping[str, Any], *, timeout_s: float, on_connected: Callable[[], None] | None = None
    ) -> Json:
        """The answer to a POST request. Raises ServerRefused (also if the answer has `success: false`), ServerGone.

        `on_connected` is called as soon as there is a connection.
        """
        return await self._call("POST", path, body, timeout_s, on_connected)

    async def post_encoded(self, path: str, body: Sequence[bytes], *, timeout_s: float) -> Json:
        """The answer to a POST request whose body is ready: JSON, in consecutive parts of any size.

        Neither encodes nor copies the body, so streams on the same loop do not wait. Raises ServerRefused, ServerGone.
        """
        return await self._call("POST", path, body, timeout_s)

    async def stream(
        self, body: Mapping[str, Any], *, idle_timeout_s: float, on_connected: Callable[[], None] | None = None
    ) -> AsyncIterator[Json]:
        """The messages of a streamed /generate; each must arrive within `idle_timeout_s` of the previous one.

        Raises ServerRefused for an error message in the stream, ServerGone if the stream breaks off before its end.
        `on_connected` is called as soon as there is a connection.
        """
        connection = Connection(on_connected)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=idle_timeout_s, sock_read=idle_timeout_s)
        try:
            async with self._http.post(
                f"{self.url}/generate", json=body, timeout=timeout, trace_request_ctx=connection
            ) as response:
                if response.status != 200:
                    raise ServerRefused(f"{self.url}/generate: {_reason(await response.text())}")
                async for line in _lines(response.content):
                    if not line.startswith(b"data: "):
                        continue
                    if line.startswith(b"data: [DONE]"):
                        return
                    message: Json = json.loads(line[6:])
                    if "error" in message:
                        raise ServerRefused(f"{self.url}/generate: {message['error'].get('message', message['error'])}")
                    yield message
        except FAILURES as error:
            raise _no_answer(connection, f"{self.url}/generate", error, idle_timeout_s) from error
        raise ServerGone(f"{self.url}/generate: the answer broke off")

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | Sequence[bytes] | None,
        timeout_s: float,
        on_connected: Callable[[], None] | None = None,
    ) -> Json:
        connection = Connection(on_connected)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        content = {"json": body} if body is None or isinstance(body, Mapping) else _ready(body)
        try:
            async with self._http.request(
                method, self.url + path, timeout=timeout, trace_request_ctx=connection, **content
            ) as response:
                text = await response.text()
        except FAILURES as error:
            raise _no_answer(connection, self.url + path, error, timeout_s) from error
        answer = _parse(text)
        if response.status != 200 or answer.get("success") is False:
            raise ServerRefused(f"{self.url}{path}: {_reason(text)}")
        return answer


async def wait_ready(api: ServerApi, *, deadline: float) -> Json:
    """Wait until the server answers /model_info, and return the answer. `deadline` is a time of the loop's clock.

    /health is not used: it generates a token, and a paused server answers it with 503 after 20 s. Raises ServerGone
    or ServerRefused at the deadline.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            return await api.get("/model_info", timeout_s=5.0)
        except (ServerGone, ServerRefused):
            if loop.time() > deadline:
                raise
            await asyncio.sleep(0.2)


async def clean_up_attached(api: ServerApi, *, timeout_s: float) -> None:
    """End requests, an update and a pause that an earlier actor may have left on a server that we attach to."""
    await api.post("/abort_request", {"abort_all": True}, timeout_s=timeout_s)
    with contextlib.suppress(ServerRefused):  # no update was open
        await api.post("/end_weight_update", {}, timeout_s=timeout_s)
    await api.post("/continue_generation", {}, timeout_s=timeout_s)


def _ready(body: Sequence[bytes]) -> Json:
    """The arguments of a request with a ready body of JSON."""

    async def pieces() -> AsyncIterator[memoryview]:
        for part in body:
            for start in range(0, len(part), PIECE):
                yield memoryview(part)[start : start + PIECE]

    length = str(sum(map(len, body)))
    return {"data": pieces(), "headers": {"Content-Type": "application/json", "Content-Length": length}}


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The lines of an answer, of any length, each as soon as it is complete.

    aiohttp's own iterator refuses lines above twice its read buffer (512 KiB), and the message after an abort may
    repeat a whole completion. It also takes quadratic time, so a larger buffer would not be a remedy.
    """
    begun: list[bytes] = []  # the parts of a line that has no end yet
    async for received in content.iter_any():
        *ended, rest = received.split(b"\n")
        for part in ended:
            yield b"".join([*begun, part])
            begun.clear()
        begun.append(rest)


def _parse(text: str) -> Json:
    """The answer as JSON; {} for endpoints that answer with an empty body or a line of text."""
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _reason(text: str) -> str:
    answer = _parse(text)
    reason = answer.get("message") or answer.get("error") or text
    if isinstance(reason, dict):
        reason = reason.get("message", reason)
    return " ".join(str(reason).split())[:300]


async def _connected(_session: object, context: SimpleNamespace, _params: object) -> None:
    if isinstance(connection := context.trace_request_ctx, Connection):
        connection.establish()


def _no_answer(connection: Connection, url: str, error: BaseException, seconds: float) -> ServerGone:
    """The error of a call without an answer: ServerUnreached if there was no connection, else one of the others.

    The type of `error` does not tell them apart: a call can also time out while it waits for a connection.
    """
    timed_out = isinstance(error, TimeoutError)
    fault = f"no answer within {seconds:g} s" if timed_out else " ".join(str(error).split()) or type(error).__name__
    unreached = isinstance(error, aiohttp.ClientConnectorError) or not connection.established
    kind = ServerUnreached if unreached else ServerSilent if timed_out else ServerGone
    return kind(f"{url}: {fault}")
