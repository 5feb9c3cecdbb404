"""Fleets whose servers die or hang while new weight versions keep arriving, as in training."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_sglang import PHASE_S, TOKENS, FakeServer, FakeTransport, at, generate, verify_nothing

from sgpo_async.engines.base import Failed, Generated, Weights
from sgpo_async.engines.sglang.processes.api import ServerGone
from sgpo_async.engines.sglang.serving import fleet as fleet_module
from sgpo_async.engines.sglang.serving import server_slot as server_slot_module
from sgpo_async.engines.sglang.serving import update as update_module
from sgpo_async.engines.sglang.serving.fleet import Fleet, FleetSettings
from sgpo_async.engines.sglang.serving.quarantine import Quarantine
from sgpo_async.engines.sglang.serving.server_slot import ServerSlot
from sgpo_async.engines.sglang.serving.update import InFlight
from sgpo_async.engines.sglang.weight_sync.transports import Transport
from sgpo_async.errors import SessionError


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_module, "verify", verify_nothing)
    monkeypatch.setattr(fleet_module, "BACKOFF_S", (0.01,))
    monkeypatch.setattr(server_slot_module, "EXIT_GRACE_S", 0.01)


class FakeFleet(Fleet):
    """A fleet of one slot with fake servers; `started` contains all servers that were ever started."""

    def __init__(self, make: Callable[[ServerSlot], FakeServer], in_flight: InFlight, transport: FakeTransport) -> None:
        settings = FleetSettings(slots=4, ends=frozenset(), in_flight=in_flight, start_s=1.0, phase_s=PHASE_S)
        server_slots = [ServerSlot(launch=None, url="fake", log=None)]
        super().__init__(server_slots, settings, [cast(Transport, transport)], cast(Any, None))
        self.make, self.started, self.server_slot = make, list[FakeServer](), server_slots[0]

    async def _start(self, server_slot: ServerSlot, http: Any) -> None:
        server = self.make(server_slot)
        server.version, server.open = None, False
        server_slot.server = server
        self.started.append(server)
        if not self.ready.done():
            self.ready.set_result(None)


async def run_with_updates(fleet: FakeFleet, count: int) -> dict[Any, Any]:
    """Publish new versions while `count` requests run, until every request has a result."""
    running = asyncio.create_task(fleet.run())
    results: dict[Any, Any] = {}
    fleet.want(cast(Weights, SimpleNamespace(version=1)))
    for id in range(count):
        fleet.submit(generate(id))
    version = 1
    async with asyncio.timeout(60):
        while len(results) < count:
            await asyncio.sleep(0.05)
            server = fleet.server_slot.server
            if server is not None and server.open:
                version += 1
                fleet.want(cast(Weights, SimpleNamespace(version=version)))
            while not fleet.results.empty():
                result = fleet.results.get()
                assert isinstance(result, Generated | Failed)
                results[result.id] = result
    fleet.close()
    await running
    return results


def events(fleet: Fleet) -> list[str]:
    lines = []
    while True:
        try:
            lines.append(fleet.events.get_nowait())
        except queue.Empty:
            return lines


@pytest.mark.parametrize("answers", [True, False])
def test_a_fleet_blames_a_request_that_hangs_its_servers_during_updates(answers: bool) -> None:
    async def scenario() -> None:
        def make(server_slot: ServerSlot) -> FakeServer:
            server = FakeServer("server", hangs=at(1))
            if not answers:
                server.fake_api.answer = lambda path: fail_with_request_1(server)
            return server

        def fail_with_request_1(server: FakeServer) -> None:
            if any(cast(Any, running.item).request.id == 1 for running in server.running.values()):
                raise ServerGone("no answer")

        fleet = FakeFleet(make, "abort-resume", FakeTransport())
        results = await run_with_updates(fleet, 3)
        assert [id for id, result in results.items() if isinstance(result, Failed)] == [1]
        assert all(len(result.tokens) == TOKENS for result in results.values() if isinstance(result, Generated))
        assert 3 <= len(fleet.started) <= 4, events(fleet)  # the last server may have been replaced already

    asyncio.run(scenario())


class CountingQuarantine(Quarantine):
    """Records how many requests were in flight at each death."""

    def __init__(self) -> None:
        super().__init__()
        self.in_flight: list[int] = []

    def record_death(self, in_flight: Collection[Any], *, others: int = 0) -> Any:
        self.in_flight.append(len(in_flight) + others)
        return super().record_death(in_flight, others=others)


@pytest.mark.parametrize("paused", [True, False])
def test_a_death_during_an_update_counts_for_paused_requests_only(paused: bool) -> None:
    """A paused request may have caused the death; a request whose stream had been aborted before cannot."""

    async def scenario() -> None:
        dies = iter([True])
        process = SimpleNamespace(alive=True, log_tail=lambda: "the end of its log", stop=lambda: None)

        def make(server_slot: ServerSlot) -> FakeServer:
            process.alive = True
            server_slot.process = cast(Any, process)
            return FakeServer("server", slow=lambda partial: len(fleet.started) == 1 and len(partial.tokens) >= 2)

        def end() -> None:
            if fleet.started[-1].changes > 1 and next(dies, False):
                process.alive = False
                raise SessionError("the group is broken")

        fleet = FakeFleet(make, "retract" if paused else "abort-resume", FakeTransport(end))
        counting = CountingQuarantine()
        fleet._requests._quarantine = counting
        results = await run_with_updates(fleet, 3)
        assert all(isinstance(result, Generated) for result in results.values())
        assert counting.in_flight == [3 if paused else 0] and len(fleet.started) == 2, events(fleet)

    asyncio.run(scenario())
