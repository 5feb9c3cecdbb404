"""Whether a call that got no answer has reached the server."""

from __future__ import annotations

import asyncio
import socket

import pytest
from sglang_played import ask

from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerUnreached, http_session
from sgpo_async.engines.sglang.serving.requests import Requests
from sgpo_async.engines.sglang.serving.server import Server

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def read_request(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    await reader.readexactly(length)


async def fault_of(api: ServerApi, kind: str, reached: list[str]) -> ServerGone:
    with pytest.raises(ServerGone) as caught:
        if kind == "post":
            await api.post("/generate", {"rid": "a"}, timeout_s=0.3, reached=lambda: reached.append(kind))
        else:
            async for _ in api.stream({"rid": "a"}, idle_timeout_s=0.3, reached=lambda: reached.append(kind)):
                pass
    return caught.value


@pytest.mark.parametrize("kind", ["post", "stream"])
def test_a_refused_connection_is_none(kind: str) -> None:
    async def scenario() -> None:
        reached: list[str] = []
        async with http_session() as http:
            fault = await fault_of(ServerApi(http, f"http://127.0.0.1:{free_port()}"), kind, reached)
        assert isinstance(fault, ServerUnreached) and not reached

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["post", "stream"])
def test_a_connection_that_does_not_come_about_in_time_is_none(kind: str) -> None:
    """A full queue of connections that nobody takes, as of a machine that is gone."""

    async def scenario() -> None:
        reached: list[str] = []
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            fill = [socket.socket() for _ in range(8)]
            for one in fill:
                one.setblocking(False)
                one.connect_ex(deaf.getsockname())
            async with http_session() as http:
                fault = await fault_of(ServerApi(http, f"http://127.0.0.1:{deaf.getsockname()[1]}"), kind, reached)
            for one in fill:
                one.close()
        assert isinstance(fault, ServerUnreached) and "no answer within 0.3 s" in str(fault) and not reached

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["post", "stream"])
@pytest.mark.parametrize("silent", [True, False])
def test_who_breaks_off_or_says_nothing_was_reached(kind: str, silent: bool) -> None:
    """By a new connection, and by one that was used before."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await read_request(reader)
        if silent:
            await asyncio.sleep(1.0)
        writer.close()

    async def scenario() -> None:
        reached: list[str] = []
        async with await asyncio.start_server(talk, "127.0.0.1", 0) as served, http_session() as http:
            api = ServerApi(http, f"http://127.0.0.1:{served.sockets[0].getsockname()[1]}")
            await api.post("/generate", {}, timeout_s=1.0, reached=lambda: reached.append("new"))
            fault = await fault_of(api, kind, reached)
        assert not isinstance(fault, ServerUnreached) and reached == ["new", kind]

    asyncio.run(scenario())


def test_a_suspect_is_not_condemned_by_a_server_that_was_dead_before() -> None:
    """Two deaths by accident; then it is sent, alone, to a server that has died while nobody was on it."""

    async def scenario() -> None:
        async with http_session() as http:
            server = Server(ServerApi(http, f"http://127.0.0.1:{free_port()}"), slots=2, ends=(), idle_timeout_s=1.0)
            server.version, server.open = 0, True
            requests = Requests(lambda: [server], ends=())
            for _ in range(2):
                requests._quarantine.record_death(["it"])
            requests.submit(ask("it"))
            while server.running:
                await asyncio.sleep(0.01)
            requests.server_died(server)
            assert isinstance(server.fault, ServerUnreached)
            assert requests._quarantine.deaths("it") == 2 and requests.waiting == 1
            assert requests.results.empty()

    asyncio.run(scenario())
