"""Calls without an answer: the API distinguishes whether the connection to the server was made."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import socket
from typing import Any

import pytest
import torch
from aiohttp import web
from fake_sglang import generate

from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerSilent, ServerUnreached, http_session
from sgpo_async.engines.sglang.serving.requests import Requests
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.weight_sync.transports import Prepared, TensorTransport

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def read_request(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    await reader.readexactly(length)


async def error_of(api: ServerApi, kind: str, connected: list[str]) -> ServerGone:
    with pytest.raises(ServerGone) as caught:
        if kind == "post":
            await api.post("/generate", {"rid": "a"}, timeout_s=0.3, on_connected=lambda: connected.append(kind))
        else:
            async for _ in api.stream({"rid": "a"}, idle_timeout_s=0.3, on_connected=lambda: connected.append(kind)):
                pass
    return caught.value


@pytest.mark.parametrize("kind", ["post", "stream"])
def test_after_a_refused_connection_the_server_was_not_reached(kind: str) -> None:
    async def scenario() -> None:
        connected: list[str] = []
        async with http_session() as http:
            error = await error_of(ServerApi(http, f"http://127.0.0.1:{free_port()}"), kind, connected)
        assert isinstance(error, ServerUnreached) and not connected

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["post", "stream"])
def test_after_a_connection_timeout_the_server_was_not_reached(kind: str) -> None:
    """A socket with a full backlog that accepts no connections, like a machine that is down."""

    async def scenario() -> None:
        connected: list[str] = []
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            clients = [socket.socket() for _ in range(8)]
            for client in clients:
                client.setblocking(False)
                client.connect_ex(listener.getsockname())
            async with http_session() as http:
                error = await error_of(
                    ServerApi(http, f"http://127.0.0.1:{listener.getsockname()[1]}"), kind, connected
                )
            for client in clients:
                client.close()
        assert isinstance(error, ServerUnreached) and "no answer within 0.3 s" in str(error) and not connected

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["post", "stream"])
@pytest.mark.parametrize("silent", [True, False])
def test_a_server_that_closes_the_connection_or_stays_silent_was_reached(kind: str, silent: bool) -> None:
    """The failing call follows a successful call, whose connection it may reuse."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        await read_request(reader)
        if silent:
            await asyncio.sleep(1.0)
        writer.close()

    async def scenario() -> None:
        connected: list[str] = []
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as served, http_session() as http:
            api = ServerApi(http, f"http://127.0.0.1:{served.sockets[0].getsockname()[1]}")
            await api.post("/generate", {}, timeout_s=1.0, on_connected=lambda: connected.append("new"))
            error = await error_of(api, kind, connected)
        assert not isinstance(error, ServerUnreached) and connected == ["new", kind]
        assert isinstance(error, ServerSilent) == silent

    asyncio.run(scenario())


async def messages_of(*parts: bytes) -> list[Any]:
    """The messages of a stream that a server sends in these parts."""

    async def generate(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        return response

    app = web.Application()
    app.router.add_post("/generate", generate)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with http_session() as http:
            api = ServerApi(http, f"http://127.0.0.1:{runner.addresses[0][1]}")
            return [message async for message in api.stream({"rid": "a"}, idle_timeout_s=10.0)]
    finally:
        await runner.cleanup()


def test_the_messages_of_a_stream_may_be_long_and_arrive_in_any_parts() -> None:
    """The message after an abort may repeat a whole completion with its likeliest tokens."""
    long = {"meta_info": [[-0.5, token, None] for token in range(60_000)]}
    sent = b"".join(b"data: %s\n\n" % json.dumps(one).encode() for one in ({"n": 1}, long, {"n": 2}))
    sent += b"data: [DONE]\n\n"
    assert len(sent) > 2**20
    for cuts in ([len(sent)], [3, 9, 10, 11, 2**19, len(sent) - 16, len(sent)]):
        parts = [sent[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]
        assert asyncio.run(messages_of(*parts)) == [{"n": 1}, long, {"n": 2}]


def test_a_message_that_is_not_json_is_an_error_of_its_server_alone() -> None:
    with pytest.raises(ServerGone, match=r"^http://127.0.0.1:\d+/generate: .*Expecting value"):
        asyncio.run(messages_of(b"data: <html>\n\n"))


def test_a_suspect_is_not_blamed_for_a_server_that_had_died_before() -> None:
    """After two deaths the request is sent, alone, to a server that is already dead."""

    async def scenario() -> None:
        async with http_session() as http:
            server = Server(ServerApi(http, f"http://127.0.0.1:{free_port()}"), slots=2, ends=(), idle_timeout_s=1.0)
            server.version, server.open = 0, True
            server.digests[0] = 0
            requests = Requests(lambda: [server], ends=())
            for _ in range(2):
                requests._quarantine.record_death(["suspect"])
            requests.submit(generate("suspect"))
            while server.running:
                await asyncio.sleep(0.01)
            requests.server_died(server)
            assert isinstance(server.fault, ServerUnreached)
            assert requests._quarantine.deaths("suspect") == 2 and requests.waiting == 1
            assert requests.results.empty()

    asyncio.run(scenario())


def test_a_ready_body_is_sent_as_it_is() -> None:
    """Parts of any size are one body of JSON with its length; nothing is encoded again."""
    got: list[tuple[Any, str | None]] = []

    async def take(request: web.Request) -> web.Response:
        got.append((await request.json(), request.headers.get("Content-Length")))
        return web.json_response({"success": True})

    async def scenario() -> None:
        app = web.Application(client_max_size=2**27)
        app.router.add_post("/take", take)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        (address,) = runner.addresses
        async with http_session() as http:
            api = ServerApi(http, f"http://127.0.0.1:{address[1]}")
            parts = [b'{"a": "', b"x" * (3 * 2**20 + 1), b"", b'", "b": [1, null]}']
            assert await api.post_encoded("/take", parts, timeout_s=60.0) == {"success": True}
        await runner.cleanup()
        assert got == [({"a": "x" * (3 * 2**20 + 1), "b": [1, None]}, str(sum(map(len, parts))))]

    asyncio.run(scenario())


def test_the_requests_of_a_version_are_encoded_once_and_shared_by_servers_and_ranks() -> None:
    """What `send` hands over are the bytes of `prepare`; joined they are what SGLang reads."""
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(3)}
    sent: list[tuple[str, list[bytes]]] = []

    class Api:
        url = "server"

        async def post(self, path: str, body: Any, *, timeout_s: float) -> None:
            assert path in ("/begin_weight_update", "/end_weight_update") and body == {}

        async def post_encoded(self, path: str, body: list[bytes], *, timeout_s: float) -> None:
            sent.append((path, body))

    transport = TensorTransport(None, tp=2)  # type: ignore[arg-type]
    prepared = Prepared(7, "00" * 16, [], transport.payloads(tensors))
    for _ in range(2):
        asyncio.run(transport.send(Api(), prepared, flush=True, timeout_s=1.0))  # type: ignore[arg-type]
    (parts,) = prepared.payload
    for path, body in sent:
        assert path == "/update_weights_from_tensor"
        assert sum(any(one is part for one in body) for part in parts) == len(parts)
        read = json.loads(b"".join(body))
        first, second = read.pop("serialized_named_tensors")
        assert first == second and read == {"flush_cache": True, "weight_version": "7"}
        named = pickle.loads(base64.b64decode(first))
        assert [name for name, _ in named] == list(tensors)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in named)
