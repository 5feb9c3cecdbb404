"""Requests on fake servers: a request that kills servers fails by name, and the other requests finish."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np
from fake_sglang import TOKENS, FakeServer, at, generate

from sgpo_async.engines.base import Failed, Generate, Generated, Score
from sgpo_async.engines.sglang.serving.requests import Requests


async def serve(servers: list[FakeServer], submitted: Iterable[Generate]) -> tuple[Requests, dict[Any, Any]]:
    requests = Requests(lambda: list(servers), ends=())
    expected = [requests.submit(request) for request in submitted]
    results: dict[Any, Any] = {}
    for _ in range(5000):
        await asyncio.sleep(0)
        for server in servers:
            if server.fault is not None and not server.running:
                server.restart()
                requests.dispatch()
        while not requests.results.empty():
            result = requests.results.get()
            assert isinstance(result, Generated | Failed) and result.id not in results
            results[result.id] = result
        if len(results) == len(expected):
            break
    return requests, results


def test_a_request_that_kills_servers_fails_by_name_and_the_others_finish() -> None:
    async def scenario() -> None:
        servers = [FakeServer(f"server-{i}", at(5)) for i in range(2)]
        requests, results = await serve(servers, [generate(i) for i in range(20)])
        assert sorted(results) == list(range(20))
        failed = [result for result in results.values() if isinstance(result, Failed)]
        assert [failure.id for failure in failed] == [5]
        assert str(failed[0].error) == (
            "request 5: 3 servers died while it ran on them, the last one with nothing else on it"
        )
        assert sum(server.deaths for server in servers) == 3
        assert all(len(result.tokens) == TOKENS for result in results.values() if isinstance(result, Generated))
        assert requests.waiting == 0 and "run alone from now on" in requests.events.get()

    asyncio.run(scenario())


def test_two_requests_that_kill_the_only_server_are_both_blamed() -> None:
    async def scenario() -> None:
        server = FakeServer("server", at(0, 3))
        _, results = await serve([server], [generate(i) for i in range(9)])
        assert sorted(id for id, result in results.items() if isinstance(result, Failed)) == [0, 3]
        assert server.deaths == 4  # two while both ran, then one while each ran alone

    asyncio.run(scenario())


def test_no_request_is_blamed_if_the_deaths_stop() -> None:
    """The server dies twice while all requests run on it; then each request runs alone and finishes."""

    async def scenario() -> None:
        deaths = iter([True, True])
        server = FakeServer("server", lambda partial: partial.request.id == 1 and next(deaths, False))
        _, results = await serve([server], [generate(i) for i in range(8)])
        assert sorted(results) == list(range(8))
        assert all(isinstance(result, Generated) for result in results.values())
        assert {1} in server.co_running and server.deaths == 2

    asyncio.run(scenario())


def test_an_abort_counts_no_death() -> None:
    async def scenario() -> None:
        server = FakeServer("server", lambda partial: False)
        requests = Requests(lambda: [server], ends=())
        requests.submit(generate(0))
        for _ in range(4):  # updates
            await asyncio.sleep(0)
            server.open = False
            server.aborted |= set(server.running)
            while server.running:
                await asyncio.sleep(0)
            server.open = True
            requests.dispatch()
        while requests.results.empty():
            await asyncio.sleep(0)
        assert isinstance(requests.results.get(), Generated) and requests.events.empty()

    asyncio.run(scenario())


def test_a_request_with_all_its_tokens_is_never_blamed() -> None:
    """The server dies three times between the last token and the end of the stream, while the request runs alone."""

    async def scenario() -> None:
        server = FakeServer("server", lambda partial: False)
        requests = Requests(lambda: [server], ends=())
        requests.submit(generate(0))
        while not (server.running and len(next(iter(server.running.values())).item.tokens) == TOKENS):  # type: ignore[union-attr]
            await asyncio.sleep(0)
        for _ in range(3):
            server.death_recorded = False
            requests.server_died(server)
        while requests.results.empty():
            await asyncio.sleep(0)
        assert isinstance(requests.results.get(), Generated)

    asyncio.run(scenario())


def test_a_cancelled_request_is_not_sent() -> None:
    async def scenario() -> None:
        server = FakeServer("server", lambda partial: False)
        server.open = False
        requests = Requests(lambda: [server], ends=())
        prompt = np.arange(3, dtype=np.int32)
        requests.submit(generate(0))
        requests.submit(Score(id=1, prompt=prompt, tokens=prompt, temperature=1.0))
        assert requests.waiting == 2
        requests.cancel_all()
        server.open = True
        requests.dispatch()
        assert requests.waiting == 0 and not server.running

    asyncio.run(scenario())
