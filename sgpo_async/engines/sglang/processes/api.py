"""The HTTP interface of one SGLang server: what is asked of it, with deadlines, and with every status read.

Bodies and answers are those of SGLang 0.5.23. A call ends in one of three ways: an answer, ServerRefused (the server
lives and says no), ServerGone (nobody can say what it did; ServerUnreached: it has never heard of the call).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import aiohttp

from sgpo_async.errors import EngineError

Json = dict[str, Any]
KEPT_S = 2.0  # connections without a request


class ServerRefused(EngineError):
    """A server answered that it would not, or could not."""


class ServerGone(EngineError):
    """A server gave no answer: it is dead, hangs, or is out of reach."""


class ServerUnreached(ServerGone):
    """No connection came about, so nothing of the call can have done anything to the server."""


class Reach:
    """Whether a call has got a connection; `told` is called when it has."""

    def __init__(self, told: Callable[[], None] | None = None) -> None:
        self.made = False
        self._told = told

    def make(self) -> None:
        """There is a connection."""
        self.made = True
        if self._told is not None:
            self._told()


def http_session() -> aiohttp.ClientSession:
    """For any number of servers. A connection is given up before SGLang closes it (after 5 s without a request), which
    would look like a server's death to whoever uses it next."""
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(_connected)
    trace.on_connection_reuseconn.append(_connected)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S)
    return aiohttp.ClientSession(connector=connector, trace_configs=[trace])


class ServerApi:
    """One server at `url`; `http` is shared by all servers of an engine and closed by its owner."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = http

    async def get(self, path: str, *, timeout_s: float) -> Json:
        """Answer of a GET. Raises ServerRefused, ServerGone."""
        return await self._call("GET", path, None, timeout_s)

    async def post(
        self, path: str, body: Mapping[str, Any], *, timeout_s: float, reached: Callable[[], None] | None = None
    ) -> Json:
        """Answer of a POST. Raises ServerRefused (also where the answer has `success: false`), ServerGone.

        `reached` is called as soon as there is a connection.
        """
        return await self._call("POST", path, body, timeout_s, reached)

    async def stream(
        self, body: Mapping[str, Any], *, silence_s: float, reached: Callable[[], None] | None = None
    ) -> AsyncIterator[Json]:
        """Messages of a streamed /generate; each must come within `silence_s` of the one before.

        Raises ServerRefused for an error message in the stream; ServerGone if it breaks off before its end.
        `reached` is called as soon as there is a connection.
        """
        reach = Reach(reached)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence_s, sock_read=silence_s)
        try:
            async with self._http.post(
                f"{self.url}/generate", json=body, timeout=timeout, trace_request_ctx=reach
            ) as response:
                if response.status != 200:
                    raise ServerRefused(f"{self.url}/generate: {_reason(await response.text())}")
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.startswith(b"data: [DONE]"):
                        return
                    message: Json = json.loads(line[6:])
                    if "error" in message:
                        raise ServerRefused(f"{self.url}/generate: {message['error'].get('message', message['error'])}")
                    yield message
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _gone(reach, f"{self.url}/generate", error, silence_s) from error
        raise ServerGone(f"{self.url}/generate: the answer broke off")

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float,
        reached: Callable[[], None] | None = None,
    ) -> Json:
        reach = Reach(reached)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._http.request(
                method, self.url + path, json=body, timeout=timeout, trace_request_ctx=reach
            ) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _gone(reach, self.url + path, error, timeout_s) from error
        answer = _parse(text)
        if response.status != 200 or answer.get("success") is False:
            raise ServerRefused(f"{self.url}{path}: {_reason(text)}")
        return answer


async def wait_ready(api: ServerApi, *, deadline: float) -> Json:
    """The server's /model_info once it answers; ServerGone if it does not before `deadline` (the loop's clock).

    Not /health, which generates a token, and which a paused server answers with 503 after 20 s.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            return await api.get("/model_info", timeout_s=5.0)
        except (ServerGone, ServerRefused):
            if loop.time() > deadline:
                raise
            await asyncio.sleep(0.2)


async def settle(api: ServerApi, *, timeout_s: float) -> None:
    """End what an earlier user left open on a server that is attached to: requests, an update, a pause."""
    await api.post("/abort_request", {"abort_all": True}, timeout_s=timeout_s)
    with contextlib.suppress(ServerRefused):  # there was no update
        await api.post("/end_weight_update", {}, timeout_s=timeout_s)
    await api.post("/continue_generation", {}, timeout_s=timeout_s)


def _parse(text: str) -> Json:
    """Some endpoints answer with nothing, some with a line of text."""
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
    if isinstance(reach := context.trace_request_ctx, Reach):
        reach.make()


def _gone(reach: Reach, url: str, error: BaseException, seconds: float) -> ServerGone:
    """Not by the kind of `error` alone: while a call waits for a connection its whole time may run out."""
    silent = isinstance(error, TimeoutError)
    fault = f"no answer within {seconds:g} s" if silent else f"{error or type(error).__name__}"
    unreached = isinstance(error, aiohttp.ClientConnectorError) or not reach.made
    return (ServerUnreached if unreached else ServerGone)(f"{url}: {fault}")
