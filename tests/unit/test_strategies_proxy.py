"""Requests go through the proxy of the environment, but never those to this machine or to a host of NO_PROXY."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from sgpo_async.engines.sglang.processes.api import ServerApi, http_session
from sgpo_async.errors import EndpointError
from sgpo_async.strategies.endpoint import Declined, Endpoint, Reply, Server, proxy_of
from sgpo_async.strategies.prompts import Prompt

BODY = json.dumps({"choices": [{"message": {"content": "hello"}}]})
PROMPT = Prompt("p", {"type": "object"})


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)


@pytest.mark.parametrize(
    ("url", "environment", "proxy"),
    [
        ("https://host/v1", {"HTTPS_PROXY": "http://proxy:3128"}, "http://proxy:3128"),
        ("https://host/v1", {"https_proxy": "proxy:3128"}, "http://proxy:3128"),
        ("http://host/v1", {"HTTP_PROXY": "http://proxy:3128", "HTTPS_PROXY": "http://b:1"}, "http://proxy:3128"),
        ("https://host/v1", {"ALL_PROXY": "http://proxy:3128"}, "http://proxy:3128"),
        ("https://host/v1", {"HTTP_PROXY": "http://proxy:3128"}, None),
        ("https://host/v1", {}, None),
        ("https://api.host/v1", {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost,.host"}, None),
        ("https://host:8443/v1", {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "host:8443"}, None),
        ("https://host/v1", {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, None),
        ("http://localhost:8000/v1", {"HTTP_PROXY": "http://proxy:3128"}, None),
        ("http://127.0.0.1:8000/v1", {"HTTP_PROXY": "http://proxy:3128"}, None),
        ("http://[::1]:8000/v1", {"HTTP_PROXY": "http://proxy:3128"}, None),
        ("http://127.8.9.1:8000/v1", {"ALL_PROXY": "socks5://proxy:1080"}, None),
    ],
)
def test_the_proxy_of_a_url(
    url: str, environment: dict[str, str], proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_of(url) == proxy


def test_another_kind_of_proxy_is_refused_in_one_line_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@proxy:1080")
    with pytest.raises(EndpointError, match=r"HTTPS_PROXY must be .* got socks5://proxy:1080"):
        proxy_of("https://host/v1")


async def through(
    answer: bytes, monkeypatch: pytest.MonkeyPatch, use: Callable[[int], Any]
) -> tuple[list[list[str]], Any]:
    """The heads of all requests that reach a server on loopback, and the result of `use(port)`."""
    heads: list[list[str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode().splitlines())
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{port}")
    try:
        return heads, await use(port)
    finally:
        server.close()


def ask(url: str) -> Callable[[int], Any]:
    async def use(port: int) -> Reply | Exception:
        async with Endpoint(Server(url=url.format(port), model="m", tries=2), backoff_s=0.01) as endpoint:
            try:
                return await endpoint.chat(PROMPT, temperature=0.0, seed=0)
            except (EndpointError, Declined) as error:
                return error

    return use


def ok(body: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def test_a_request_goes_through_the_proxy_with_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, reply = asyncio.run(through(ok(BODY), monkeypatch, ask("http://host.invalid/v1")))
    assert reply.text == "hello"
    assert heads[0][0] == "POST http://host.invalid/v1/chat/completions HTTP/1.1"
    assert any(line.startswith("Proxy-Authorization: Basic ") for line in heads[0])


@pytest.mark.parametrize(
    ("status", "error", "requests"), [("407 Who are you", EndpointError, 1), ("502 Broken", Declined, 2)]
)
def test_a_tunnel_that_the_proxy_does_not_open(
    status: str, error: type[Exception], requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()
    pauses: list[int] = []
    monkeypatch.setattr(Endpoint, "_pause", lambda self, attempt, after_s: pauses.append(attempt) or 0.0)
    heads, raised = asyncio.run(through(answer, monkeypatch, ask("https://host.invalid/v1")))
    assert len(pauses) == requests - 1  # between two tries, and none after the last
    assert [head[0] for head in heads] == ["CONNECT host.invalid:443 HTTP/1.1"] * requests
    assert type(raised) is error and f"answers with status {status[:3]}" in str(raised)
    assert "secret" not in str(raised)


def test_a_server_on_this_machine_is_asked_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, reply = asyncio.run(through(ok(BODY), monkeypatch, ask("http://127.0.0.1:{}/v1")))
    assert reply.text == "hello" and heads[0][0] == "POST /v1/chat/completions HTTP/1.1"

    async def engine(port: int) -> Any:
        async with http_session() as http:
            return await ServerApi(http, f"http://127.0.0.1:{port}").get("/model_info", timeout_s=60.0)

    heads, _ = asyncio.run(through(ok("{}"), monkeypatch, engine))
    assert heads[0][0] == "GET /model_info HTTP/1.1"
