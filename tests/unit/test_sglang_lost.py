"""Servers that die or hang during an update: the death counts only for requests that were in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from fake_sglang import PHASE_S, FakeServer, FakeTransport, at, generate, offer_of, verify_nothing

from sgpo_async.engines.base import Failed, Generated
from sgpo_async.engines.sglang.processes.api import ServerGone, ServerUnreached
from sgpo_async.engines.sglang.serving import update as update_module
from sgpo_async.engines.sglang.serving.requests import Requests
from sgpo_async.engines.sglang.serving.update import InFlight, update
from sgpo_async.errors import DeadlineExceeded, SessionError, SgpoError


@pytest.fixture(autouse=True)
def without_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_module, "verify", verify_nothing)


def raises(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0)


def hanging(server: FakeServer, *ids: Any) -> Callable[[], bool]:
    """Whether exactly these requests run on the server, and each has the two tokens after which it hangs or is slow."""
    return lambda: (
        {cast(Any, running.item).request.id for running in server.running.values() if running.connected} == set(ids)
        and (all(len(cast(Any, running.item).tokens) >= 2 for running in server.running.values()))
    )


async def update_weights(
    server: FakeServer, on_send: Callable[[], None] = lambda: None, *, in_flight: InFlight = "abort-resume"
) -> None:
    await update(server, offer_of(1, FakeTransport(on_send)), in_flight=in_flight, phase_s=PHASE_S)


@pytest.mark.parametrize("answers", [True, False])
def test_an_update_blames_a_request_that_hangs_servers(answers: bool) -> None:
    """The server answers the abort but does not end the stream, or does not answer at all."""

    async def scenario() -> None:
        server = FakeServer("server", hangs=at("hangs"))
        requests = Requests(lambda: [server], ends=())
        requests.submit(generate("hangs"))
        requests.submit(generate("neighbour"))
        await until(lambda: requests.results.qsize() == 1 and hanging(server, "hangs")())
        if not answers:
            server.fake_api.answer = raises(ServerGone("no answer"))
        for deaths in (1, 2):
            with pytest.raises(DeadlineExceeded if answers else ServerGone):
                await update_weights(server)
            assert server.fault is not None and requests._quarantine.deaths("hangs") == deaths
            requests.server_died(server)  # as the watchdog does: the death counts once
            assert requests._quarantine.deaths("hangs") == deaths and requests.waiting == 1
            server.restart()
            server.version = 0
            requests.dispatch()
            await until(hanging(server, "hangs"))
        with pytest.raises(SgpoError):
            await update_weights(server)
        assert isinstance(requests.results.get_nowait(), Generated)
        failed = requests.results.get_nowait()
        assert isinstance(failed, Failed) and "request hangs: 3 servers died" in str(failed.error)
        assert requests.waiting == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("in_flight", ["abort-resume", "retract", "in-place"])
def test_an_update_that_succeeds_counts_no_death(in_flight: InFlight) -> None:
    async def scenario() -> None:
        server = FakeServer("server", slow=at("slow"))
        requests = Requests(lambda: [server], ends=())
        requests.submit(generate("slow"))
        await until(hanging(server, "slow"))
        for _ in range(3):
            server.version = 0
            await update_weights(server, in_flight=in_flight)
            assert server.open and server.version == 1 and not server.interrupted and server.fault is None
            requests.dispatch()
            await until(hanging(server, "slow"))
        assert requests._quarantine.deaths("slow") == 0
        await server.cancel_streams()

    asyncio.run(scenario())


def test_a_failed_update_counts_no_death_for_requests_whose_streams_had_ended() -> None:
    async def scenario() -> None:
        server = FakeServer("server")
        requests = Requests(lambda: [server], ends=())
        requests.submit(generate(0))
        await until(lambda: server.co_running)
        with pytest.raises(ServerGone):
            await update_weights(server, raises(ServerGone("no answer")))
        requests.server_died(server)
        assert requests._quarantine.deaths(0) == 0 and requests.waiting == 1

    asyncio.run(scenario())


def test_a_death_counts_for_requests_that_were_paused_when_an_update_failed() -> None:
    async def scenario() -> None:
        server = FakeServer("server", hangs=at(0, 1))
        requests = Requests(lambda: [server], ends=())
        for id in (0, 1):
            requests.submit(generate(id))
        await until(hanging(server, 0, 1))
        for _ in range(2):
            with pytest.raises(SessionError):
                await update_weights(server, raises(SessionError("broken")), in_flight="retract")
            assert server.fault is None and len(server.interrupted) == 2 and requests.waiting == 2
            requests.server_died(server)
            server.restart()
            server.version = 0
            requests.dispatch()
            await until(lambda: len(server.running) + requests.waiting == 2)
            if not requests._suspects:
                await until(hanging(server, 0, 1))
        assert [requests._quarantine.deaths(id) for id in (0, 1)] == [2, 2]
        assert (
            len(requests._suspects) == 1 and len(server.running) == 1
        )  # suspects run alone, although they were already waiting
        await server.cancel_streams()

    asyncio.run(scenario())


def test_a_blamed_request_is_aborted_on_another_server() -> None:
    async def scenario() -> None:
        servers = [FakeServer(f"server-{i}", hangs=at("hangs")) for i in range(2)]
        requests = Requests(lambda: list(servers), ends=())
        requests.submit(generate("hangs"))
        await until(hanging(servers[0], "hangs"))
        for _ in range(2):
            requests._quarantine.record_death(["hangs"])
        with pytest.raises(SessionError):
            await update_weights(servers[0], raises(SessionError("broken")), in_flight="retract")
        await until(hanging(servers[1], "hangs"))
        requests.server_died(servers[0])
        assert isinstance(requests.results.get_nowait(), Failed)
        await asyncio.sleep(0.01)
        assert servers[1].aborted
        await servers[1].cancel_streams()
        assert requests.waiting == 0 and requests.results.empty()

    asyncio.run(scenario())


def test_a_death_does_not_count_for_requests_without_a_connection() -> None:
    """One request is still connecting when another fails because the server cannot be reached."""

    class Unreached(FakeServer):
        async def extend(self, partial: Any, rid: str, version: int) -> None:
            if partial.request.id == "connecting":
                await asyncio.Event().wait()
            if partial.request.id == "connected":
                self.running[rid].connected = True
                await asyncio.Event().wait()
            await asyncio.sleep(0)
            raise ServerUnreached("connection refused")

    async def scenario() -> None:
        server = Unreached("server")
        requests = Requests(lambda: [server], ends=())
        for id in ("refused", "connecting", "connected"):
            requests.submit(generate(id))
        await until(lambda: server.fault is not None)
        await server.cancel_streams()
        requests.server_died(server)
        deaths = [requests._quarantine.deaths(id) for id in ("refused", "connecting", "connected")]
        assert deaths == [0, 0, 1] and requests.waiting == 3

    asyncio.run(scenario())
