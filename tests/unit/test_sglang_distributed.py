"""Rounds of broadcasts to the servers of a node: who is in a group, how many copies are sent, what a loss costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, cast

import pytest

from sgpo_async.engines.base import BroadcastGroups
from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerRefused
from sgpo_async.engines.sglang.weight_sync.distributed import DistributedTransport, _Version
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts
from sgpo_async.engines.sglang.weight_sync.transports import Prepared
from sgpo_async.errors import SessionError
from sgpo_async.weights.broadcast_plan import Broadcast, BroadcastPlan

TIMEOUT_S = 60.0
PIECES = 3
Hook = Callable[[str, str], Coroutine[Any, Any, None]]


async def nothing(url: str, path: str) -> None:
    pass


class Network:
    """Rank 0 of every group, and the servers: a collective ends when all ranks are in it, or fails when one is lost."""

    def __init__(self, tp: int = 1) -> None:
        self.tp, self.hook = tp, nothing
        self.groups: dict[str, dict[int, str]] = {}  # ranks that have joined: rank -> server
        self.world_sizes: dict[str, int] = {}
        self.closed: set[str] = set()
        self.sent: list[str] = []  # the group of each broadcast
        self.received: dict[str, int] = {}  # pieces, by server
        self.posts: list[tuple[str, str]] = []
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: dict[tuple[str, str], int] = {}

    def transport(self) -> DistributedTransport:
        facts = type("Facts", (), {"device": "cpu"})()
        return DistributedTransport(cast(ModelFacts, facts), tp=self.tp)

    def version(self, number: int = 1) -> Prepared:
        piece = Broadcast(("w",), ("float32",), ((1,),))
        return Prepared(
            number,
            "00" * 16,
            [],
            _Version(cast(BroadcastGroups, self), BroadcastPlan(number, "00" * 16, (piece,) * PIECES)),
        )

    def slow_to_shut(self, server: str) -> asyncio.Event:
        """This server ends its streams only when the event is set."""
        event = asyncio.Event()

        async def hook(url: str, path: str) -> None:
            if (url, path) == (server, "shut"):
                await event.wait()

        self.hook = hook
        return event

    def api(self, url: str) -> ServerApi:
        return cast(ServerApi, Api(self, url))

    # what the weight sender does

    def open(self, group: str, *, backend: str, world_size: int) -> Future[tuple[str, int]]:
        assert backend == "gloo" and group not in self.groups
        self.groups[group], self.world_sizes[group] = {}, world_size
        future: Future[tuple[str, int]] = Future()
        future.set_result(("host", 1))
        return future

    def join(self, group: str) -> Future[None]:
        return self._later(self._all_joined(group))

    def broadcast(self, group: str, plan: BroadcastPlan) -> Future[None]:
        self.sent.append(group)
        return self._later(self._all_received(group))

    def close(self, group: str) -> None:
        self.closed.add(group)
        self._tasks.add(asyncio.ensure_future(self._tell()))

    def _later(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        future: Future[None] = Future()

        async def run() -> None:
            try:
                await work
            except SessionError as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._tasks.add(asyncio.ensure_future(run()))
        return future

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, group: str, condition: Callable[[], bool], error: Exception) -> None:
        async with self._changed:
            self._changed.notify_all()
            await self._changed.wait_for(lambda: condition() or group in self.closed)
            if not condition():
                raise error

    async def _all_joined(self, group: str) -> None:
        servers = (self.world_sizes[group] - 1) // self.tp
        await self.until(group, lambda: len(self.groups[group]) == servers, SessionError(f"group {group}: join"))

    async def _all_received(self, group: str) -> None:
        goal = PIECES * self.sent.count(group)
        members = list(self.groups[group].values())
        error = SessionError(f"group {group}: broadcast")
        await self.until(group, lambda: all(self.counts.get((group, one), 0) >= goal for one in members), error)


class Api:
    """One server."""

    def __init__(self, network: Network, url: str) -> None:
        self.network, self.url = network, url

    async def post(self, path: str, body: dict[str, Any], *, timeout_s: float) -> None:
        network = self.network
        network.posts.append((self.url, path))
        await network.hook(self.url, path)
        refused = ServerRefused(f"{self.url}: refused")
        if path == "/init_weights_update_group":
            group = body["group_name"]
            network.groups[group][body["rank_offset"]] = self.url
            assert body["world_size"] == network.world_sizes[group]
            servers = (body["world_size"] - 1) // network.tp
            await network.until(group, lambda: len(network.groups[group]) == servers, refused)
        if path == "/update_weights_from_distributed":
            group = body["group_name"]
            key = (group, self.url)
            network.counts[key] = number = network.counts.get(key, 0) + 1
            peers = [(group, one) for one in network.groups[group].values()]
            await network.until(group, lambda: all(network.counts.get(one, 0) >= number for one in peers), refused)
            network.received[self.url] = network.received.get(self.url, 0) + 1


async def update(network: Network, transport: DistributedTransport, prepared: Prepared, url: str) -> Exception | None:
    """What the fleet does with one server; returns its error."""
    api = network.api(url)
    try:
        async with transport.joining(api, prepared):
            await network.hook(url, "shut")
            await transport.send(api, prepared, flush=True, timeout_s=TIMEOUT_S)
    except (ServerGone, ServerRefused, SessionError) as error:
        return error
    return None


async def update_all(network: Network, transport: DistributedTransport, number: int, *urls: str) -> list[Any]:
    prepared = network.version(number)
    return await asyncio.gather(*(update(network, transport, prepared, url) for url in urls))


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("tp", [1, 2])
def test_the_servers_of_a_node_are_one_group_and_get_one_copy_of_each_version(tp: int) -> None:
    async def scenario() -> None:
        network = Network(tp)
        transport = network.transport()
        for number in (1, 2, 3):
            assert await update_all(network, transport, number, "a", "b", "c") == [None] * 3
        (ranks,) = network.groups.values()
        assert ranks == {1: "a", 1 + tp: "b", 1 + 2 * tp: "c"}
        assert len(network.sent) == 3 and network.received == dict.fromkeys("abc", 3 * PIECES)
        assert not network.closed

    play(scenario)


def test_a_round_waits_for_a_server_that_still_ends_its_streams() -> None:
    async def scenario() -> None:
        network = Network()
        slow = network.slow_to_shut("b")
        updates = asyncio.ensure_future(update_all(network, network.transport(), 1, "a", "b"))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not network.groups
        slow.set()
        assert await updates == [None, None]
        assert list(network.world_sizes.values()) == [3] and len(network.sent) == 1

    play(scenario)


def test_a_server_that_could_not_be_made_ready_is_not_waited_for() -> None:
    async def scenario() -> None:
        network = Network()

        async def hook(url: str, path: str) -> None:
            if (url, path) == ("b", "shut"):
                await asyncio.sleep(0.01)
                raise ServerGone("b: gone")

        network.hook = hook
        first, second = await update_all(network, network.transport(), 1, "a", "b")
        assert first is None and isinstance(second, ServerGone)
        assert list(network.world_sizes.values()) == [2] and network.received == {"a": PIECES}

    play(scenario)


@pytest.mark.parametrize("path", ["/init_weights_update_group", "/update_weights_from_distributed"])
@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_server_that_is_lost_in_a_round_costs_the_others_a_second_try(path: str, lost: str) -> None:
    async def scenario() -> None:
        network = Network()

        async def hook(url: str, posted: str) -> None:
            if (url, posted) == (lost, path):
                await asyncio.sleep(0)
                raise ServerGone(f"{lost}: gone")

        network.hook = hook
        transport = network.transport()
        results = dict(zip("abc", await update_all(network, transport, 1, "a", "b", "c"), strict=True))
        assert isinstance(results.pop(lost), ServerGone) and list(results.values()) == [None, None]
        assert all(network.received[url] >= PIECES for url in results)
        assert sorted(network.world_sizes.values()) == [2, 2, 4]  # the group of all, then one for each of the others
        network.hook = nothing
        assert await update_all(network, transport, 2, "a", "b", "c") == [None] * 3  # it has been restarted
        assert sorted(network.world_sizes.values()) == [2, 2, 4, 4]

    play(scenario)


def test_a_server_that_refuses_twice_reports_it() -> None:
    async def scenario() -> None:
        network = Network()

        async def hook(url: str, posted: str) -> None:
            if (url, posted) == ("b", "/update_weights_from_distributed"):
                raise ServerRefused("b: no memory")

        network.hook = hook
        first, second = await update_all(network, network.transport(), 1, "a", "b")
        assert first is None and str(second) == "b: no memory"

    play(scenario)


def test_a_server_that_comes_alone_leaves_the_group_of_the_others() -> None:
    """It was restarted: the group of all has a rank that is gone, so the next round of all makes another one."""

    async def scenario() -> None:
        network = Network()
        transport = network.transport()
        await update_all(network, transport, 1, "a", "b")
        (old,) = network.groups
        assert await update_all(network, transport, 1, "b") == [None]
        assert network.closed == {old} and ("b", "/destroy_weights_update_group") in network.posts
        assert await update_all(network, transport, 2, "a", "b") == [None, None]
        assert sorted(network.world_sizes.values()) == [2, 3, 3]

    play(scenario)


def test_a_new_session_has_a_group_of_its_own() -> None:
    async def scenario() -> None:
        network, other = Network(), Network()
        transport = network.transport()
        await update_all(network, transport, 1, "a", "b")
        assert await update_all(other, transport, 1, "a", "b") == [None, None]
        assert len(other.groups) == 1 and len(network.sent) == len(other.sent) == 1

    play(scenario)


def test_a_cancelled_server_is_no_member_of_the_round() -> None:
    async def scenario() -> None:
        network = Network()
        slow = network.slow_to_shut("b")
        transport, prepared = network.transport(), network.version()
        updates = {url: asyncio.ensure_future(update(network, transport, prepared, url)) for url in "ab"}
        await asyncio.sleep(0.01)
        updates["a"].cancel()
        await asyncio.wait([updates["a"]])
        slow.set()
        assert await updates["b"] is None
        assert list(network.world_sizes.values()) == [2]

    play(scenario)
