"""Servers that die or hang during an update: whoever was aboard is noted, and nobody who never was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sglang_played import PHASE_S, FakeServer, FakeTransport, ask, at, verify_nothing

from sgpo_async.engines.base import Failed, Generated
from sgpo_async.engines.sglang.processes.api import ServerGone, ServerUnreached
from sgpo_async.engines.sglang.serving import update as update_module
from sgpo_async.engines.sglang.serving.requests import Requests
from sgpo_async.engines.sglang.serving.update import InFlight, update
from sgpo_async.engines.sglang.weight_sync.transports import Transport
from sgpo_async.errors import DeadlineExceeded, SessionError, SgpoError


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_module, "verify", verify_nothing)


def raises(error: Exception) -> Callable[..., None]:
    def play(*_: Any) -> None:
        raise error

    return play


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0)


def waiting_for_ever(server: FakeServer, *ids: Any) -> Callable[[], bool]:
    return lambda: (
        {cast(Any, one.item).request.id for one in server.running.values() if one.reached} == set(ids)
        and (all(len(cast(Any, one.item).tokens) >= 2 for one in server.running.values()))
    )


async def renew(
    server: FakeServer, does: Callable[[], None] = lambda: None, *, in_flight: InFlight = "abort-resume"
) -> None:
    transport = cast(Transport, FakeTransport(does))
    await update(server, cast(Any, SimpleNamespace(version=1)), transport, in_flight=in_flight, phase_s=PHASE_S)


@pytest.mark.parametrize("answers", [True, False])
def test_a_request_that_hangs_a_server_is_met_by_an_update(answers: bool) -> None:
    """The server takes the abort and does not end the stream, or takes nothing at all."""

    async def scenario() -> None:
        server = FakeServer("server", hangs=at("hangs"))
        requests = Requests(lambda: [server], ends=())
        requests.submit(ask("hangs"))
        requests.submit(ask("neighbour"))
        await until(lambda: requests.results.qsize() == 1 and waiting_for_ever(server, "hangs")())
        if not answers:
            server.fake_api.answer = raises(ServerGone("no answer"))
        for deaths in (1, 2):
            with pytest.raises(DeadlineExceeded if answers else ServerGone):
                await renew(server)
            assert server.fault is not None and requests._quarantine.deaths("hangs") == deaths
            requests.server_died(server)  # as the keeper does: it counts once
            assert requests._quarantine.deaths("hangs") == deaths and requests.waiting == 1
            server.restart()
            server.version = 0
            requests.dispatch()
            await until(waiting_for_ever(server, "hangs"))
        with pytest.raises(SgpoError):
            await renew(server)
        assert isinstance(requests.results.get_nowait(), Generated)
        failed = requests.results.get_nowait()
        assert isinstance(failed, Failed) and "request hangs: 3 servers died" in str(failed.error)
        assert requests.waiting == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("in_flight", ["abort-resume", "retract", "in-place"])
def test_an_update_that_succeeds_is_no_death(in_flight: InFlight) -> None:
    async def scenario() -> None:
        server = FakeServer("server", slow=at("slow"))
        requests = Requests(lambda: [server], ends=())
        requests.submit(ask("slow"))
        await until(waiting_for_ever(server, "slow"))
        for _ in range(3):
            server.version = 0
            await renew(server, in_flight=in_flight)
            assert server.open and server.version == 1 and not server.interrupted and server.fault is None
            requests.dispatch()
            await until(waiting_for_ever(server, "slow"))
        assert requests._quarantine.deaths("slow") == 0
        await server.cancel_streams()

    asyncio.run(scenario())


def test_a_failed_update_whose_streams_had_ended_is_no_death() -> None:
    async def scenario() -> None:
        server = FakeServer("server")
        requests = Requests(lambda: [server], ends=())
        requests.submit(ask(0))
        await until(lambda: server.ran)
        with pytest.raises(ServerGone):
            await renew(server, raises(ServerGone("no answer")))
        requests.server_died(server)
        assert requests._quarantine.deaths(0) == 0 and requests.waiting == 1

    asyncio.run(scenario())


def test_who_was_paused_when_an_update_failed_is_noted_if_the_server_is_found_dead() -> None:
    async def scenario() -> None:
        server = FakeServer("server", hangs=at(0, 1))
        requests = Requests(lambda: [server], ends=())
        for id in (0, 1):
            requests.submit(ask(id))
        await until(waiting_for_ever(server, 0, 1))
        for _ in range(2):
            with pytest.raises(SessionError):
                await renew(server, raises(SessionError("broken")), in_flight="retract")
            assert server.fault is None and len(server.interrupted) == 2 and requests.waiting == 2
            requests.server_died(server)
            server.restart()
            server.version = 0
            requests.dispatch()
            await until(lambda: len(server.running) + requests.waiting == 2)
            if not requests._suspects:
                await until(waiting_for_ever(server, 0, 1))
        assert [requests._quarantine.deaths(id) for id in (0, 1)] == [2, 2]
        assert len(requests._suspects) == 1 and len(server.running) == 1  # they run alone, though they waited already
        await server.cancel_streams()

    asyncio.run(scenario())


def test_a_condemned_request_that_waits_again_or_runs_elsewhere_is_ended_there() -> None:
    async def scenario() -> None:
        servers = [FakeServer(f"server-{i}", hangs=at("it")) for i in range(2)]
        requests = Requests(lambda: list(servers), ends=())
        requests.submit(ask("it"))
        await until(waiting_for_ever(servers[0], "it"))
        for _ in range(2):
            requests._quarantine.record_death(["it"])
        with pytest.raises(SessionError):
            await renew(servers[0], raises(SessionError("broken")), in_flight="retract")
        await until(waiting_for_ever(servers[1], "it"))
        requests.server_died(servers[0])
        assert isinstance(requests.results.get_nowait(), Failed)
        await asyncio.sleep(0.01)
        assert servers[1].aborted
        await servers[1].cancel_streams()
        assert requests.waiting == 0 and requests.results.empty()

    asyncio.run(scenario())


def test_who_got_no_connection_is_not_counted() -> None:
    """One is still on its way when another finds nobody there."""

    class Unreached(FakeServer):
        async def extend(self, partial: Any, rid: str, version: int) -> None:
            if partial.request.id == "on its way":
                await asyncio.Event().wait()
            if partial.request.id == "on board":
                self.running[rid].reached = True
                await asyncio.Event().wait()
            await asyncio.sleep(0)
            raise ServerUnreached("nobody there")

    async def scenario() -> None:
        server = Unreached("server")
        requests = Requests(lambda: [server], ends=())
        for id in ("refused", "on its way", "on board"):
            requests.submit(ask(id))
        await until(lambda: server.fault is not None)
        await server.cancel_streams()
        requests.server_died(server)
        deaths = [requests._quarantine.deaths(id) for id in ("refused", "on its way", "on board")]
        assert deaths == [0, 0, 1] and requests.waiting == 3

    asyncio.run(scenario())
