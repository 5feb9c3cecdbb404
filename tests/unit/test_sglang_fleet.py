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
from sgpo_async.errors import DeadlineExceeded, EngineError, SessionError


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_module, "verify", verify_nothing)
    monkeypatch.setattr(fleet_module, "BACKOFF_S", (0.01,))
    monkeypatch.setattr(fleet_module, "RETRY_S", 0.01)
    monkeypatch.setattr(server_slot_module, "EXIT_GRACE_S", 0.01)


async def nothing(*_: Any, **__: Any) -> list[str]:
    return []


class Started:
    """The fake servers that a fleet has started in its only slot; `make` makes one, where a real one would be asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, make: Callable[[], FakeServer]) -> None:
        self.servers: list[FakeServer] = []
        self._make, self.slot = make, ServerSlot(launch=None, url="fake", log=None)
        monkeypatch.setattr(fleet_module, "Server", self._start)
        for name in ("wait_until_ready", "clean_up_attached"):
            monkeypatch.setattr(fleet_module, name, nothing)

    def _start(self, *_: Any, **__: Any) -> FakeServer:
        server = self._make()
        server.version, server.open = None, False
        self.servers.append(server)
        return server

    def fleet(self, in_flight: InFlight, *transports: FakeTransport) -> Fleet:
        settings = FleetSettings(slots=4, ends=frozenset(), in_flight=in_flight, start_s=1.0, phase_s=PHASE_S)
        return Fleet([self.slot], settings, [cast(Transport, one) for one in transports], nothing)


async def run_with_updates(fleet: Fleet, started: Started, count: int) -> dict[Any, Any]:
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
            server = started.slot.server
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
def test_a_fleet_blames_a_request_that_hangs_its_servers_during_updates(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        def make() -> FakeServer:
            server = FakeServer("server", hangs=at(1))
            if not answers:
                server.fake_api.answer = lambda path: fail_with_request_1(server)
            return server

        def fail_with_request_1(server: FakeServer) -> None:
            if any(cast(Any, running.item).request.id == 1 for running in server.running.values()):
                raise ServerGone("no answer")

        started = Started(monkeypatch, make)
        fleet = started.fleet("abort-resume", FakeTransport())
        results = await run_with_updates(fleet, started, 3)
        assert [id for id, result in results.items() if isinstance(result, Failed)] == [1]
        assert all(len(result.tokens) == TOKENS for result in results.values() if isinstance(result, Generated))
        assert 3 <= len(started.servers) <= 4, events(fleet)  # the last server may have been replaced already

    asyncio.run(scenario())


@pytest.mark.parametrize("paused", [True, False])
def test_a_death_during_an_update_counts_for_paused_requests_only(
    paused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paused request may have caused the death; a request whose stream had been aborted before cannot."""
    in_flight_at_death: list[int] = []
    record_death = Quarantine.record_death

    def counting(self: Quarantine, in_flight: Collection[Any], *, others: int = 0) -> Any:
        in_flight_at_death.append(len(in_flight) + others)
        return record_death(self, in_flight, others=others)

    monkeypatch.setattr(Quarantine, "record_death", counting)

    async def scenario() -> None:
        dies = iter([True])
        process = SimpleNamespace(alive=True, log_tail=lambda: "the end of its log", stop=lambda: None)

        def make() -> FakeServer:
            process.alive = True
            started.slot.process = cast(Any, process)
            first = not started.servers
            return FakeServer("server", slow=lambda partial: first and len(partial.tokens) >= 2)

        def end() -> None:
            if not process.alive:  # it cannot go back to the version that it had
                raise ServerGone("no answer")
            if started.servers[-1].changes > 1 and next(dies, False):
                process.alive = False
                raise SessionError("the group is broken")

        started = Started(monkeypatch, make)
        fleet = started.fleet("retract" if paused else "abort-resume", FakeTransport(end))
        results = await run_with_updates(fleet, started, 3)
        assert all(isinstance(result, Generated) for result in results.values())
        assert in_flight_at_death == [3 if paused else 0] and len(started.servers) == 2, events(fleet)

    asyncio.run(scenario())


def test_a_server_that_does_not_stop_is_said_and_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []

    def stop() -> None:
        stopped.append("server")
        raise DeadlineExceeded("server fake", "end after SIGKILL", 10.0)

    async def scenario() -> None:
        def make() -> FakeServer:
            process = SimpleNamespace(alive=True, log_tail=lambda: "the end of its log", stop=stop)
            started.slot.process = cast(Any, process)
            return FakeServer("server")

        started = Started(monkeypatch, make)
        fleet = started.fleet("abort-resume", FakeTransport())
        running = asyncio.create_task(fleet.run())
        await until(lambda: started.slot.server is not None, "the first server")
        cast(Any, started.slot.server).fault = ServerGone("no answer")
        await until(lambda: len(started.servers) == 2, "the second server")
        assert not running.done() and "server fake: no end after SIGKILL within 10 s" in events(fleet)
        fleet.close()
        await running
        assert len(stopped) == 2

    asyncio.run(scenario())


class FullDisk(FakeTransport):
    """Cannot prepare version 2 while there is no room."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.room = name, False

    def prepare(self, weights: Weights) -> Any:
        if weights.version == 2 and not self.room:
            raise EngineError("engine.sglang.folder: cannot write v2 (No space left on device)")
        return super().prepare(weights)


async def until(holds: Callable[[], object], event: str) -> None:
    deadline = asyncio.get_running_loop().time() + 60
    while not holds():
        assert asyncio.get_running_loop().time() < deadline, f"did not happen: {event}"
        await asyncio.sleep(0.01)


def test_a_version_that_cannot_be_prepared_is_skipped_said_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        started = Started(monkeypatch, lambda: FakeServer("server"))
        disk = FullDisk("disk")
        fleet = started.fleet("abort-resume", disk)
        running = asyncio.create_task(fleet.run())
        fleet.want(cast(Weights, SimpleNamespace(version=1)))
        await until(lambda: fleet.version() == 1, "version 1 is loaded")
        fleet.want(cast(Weights, SimpleNamespace(version=2)))
        said: list[str] = []
        await until(lambda: said.extend(events(fleet)) or len(said) >= 3, "it is tried three times")
        assert set(said) == {
            "version 2 is not loaded, next try in 0.01 s: by disk: engine.sglang.folder: cannot write v2 "
            "(No space left on device)"
        }
        fleet.submit(generate(0))  # meanwhile the server serves with the version that it has
        await until(lambda: not fleet.results.empty(), "a result")
        assert fleet.version() == 1 and len(fleet.results.get().tokens) == TOKENS
        disk.room = True
        await until(lambda: fleet.version() == 2, "version 2 is loaded")
        fleet.close()
        await running
        assert len(started.servers) == 1  # it was never restarted

    asyncio.run(scenario())


class FullMemory(FakeTransport):
    """Cannot prepare version 2 for the first time."""

    name = "disk"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.errors = [error]

    def prepare(self, weights: Weights) -> Any:
        if weights.version == 2 and self.errors:
            raise self.errors.pop()
        return super().prepare(weights)


TORCHS_ERROR = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes. Error code 12")


@pytest.mark.parametrize("error", [MemoryError(), TORCHS_ERROR])
def test_a_version_for_which_the_memory_does_not_suffice_is_said_and_tried_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        started = Started(monkeypatch, lambda: FakeServer("server"))
        fleet = started.fleet("abort-resume", FullMemory(error))
        running = asyncio.create_task(fleet.run())
        for version in (1, 2):
            fleet.want(cast(Weights, SimpleNamespace(version=version)))
            await until(lambda version=version: fleet.version() == version, "the version is loaded")
        assert events(fleet) == [
            "version 2 is not loaded, next try in 0.01 s: by disk: not enough memory to prepare the weights; "
            "free some, or use another engine.sglang.transport"
        ]
        fleet.close()
        await running

    asyncio.run(scenario())


def test_a_bug_in_a_transport_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        started = Started(monkeypatch, lambda: FakeServer("server"))
        fleet = started.fleet("abort-resume", FullMemory(RuntimeError("shapes do not match")))
        running = asyncio.create_task(fleet.run())
        fleet.want(cast(Weights, SimpleNamespace(version=2)))
        with pytest.raises(RuntimeError, match="shapes do not match"):
            await running
        assert not fleet._versions._preparing

    asyncio.run(scenario())


def test_a_version_that_one_transport_cannot_prepare_is_loaded_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        started = Started(monkeypatch, lambda: FakeServer("server"))
        fleet = started.fleet("abort-resume", FullDisk("disk"), FakeTransport())
        running = asyncio.create_task(fleet.run())
        for version, said in ((1, 0), (2, 1), (3, 0)):
            fleet.want(cast(Weights, SimpleNamespace(version=version)))
            await until(lambda version=version: fleet.version() == version, "the version is loaded")
            lines = events(fleet)
            assert len(lines) == said and all("No space left" in line and "another transport" in line for line in lines)
        assert [timings.transport for timings in fleet.updates] == ["disk", "fake", "disk"]
        fleet.close()
        await running

    asyncio.run(scenario())
