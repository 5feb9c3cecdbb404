"""Starts, supervises and updates all servers of one actor, in one asyncio loop without locks.

    load ───▶ versions: prepare, offer ───▶ each server's watchdog, in its turn: update to the newest offer;
                                            if that fails: serve the previous version, try the next transport;
                                            if there is no previous version, or the server died: restart it

The watchdog is one task per server. It waits until there is another offer, its server ends, or the next health check
is due. Servers that have a version are updated one after another, so that the others generate; the one that has waited
longest is next, and gets the newest offer: none is left out while versions keep arriving, and when no more arrive all
have the newest. `requests` decides which requests run on which server.
"""

from __future__ import annotations

import asyncio
import math
import queue
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import numpy as np

from sgpo_async.engines.base import EngineLoad, Generate, SampledTokens, Score, ScoredCanary, Weights
from sgpo_async.engines.sglang.processes.api import (
    ServerApi,
    ServerGone,
    ServerRefused,
    clean_up_attached,
    http_session,
)
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.engines.sglang.serving.requests import Requests
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.serving.server_slot import (
    ServerSlot,
    alive,
    require_alive,
    wait_until_ready,
    with_log_tail,
)
from sgpo_async.engines.sglang.serving.update import InFlight, UpdateTimings, update
from sgpo_async.engines.sglang.serving.versions import Offer, Versions
from sgpo_async.engines.sglang.weight_sync.transports import Transport
from sgpo_async.errors import DeadlineExceeded, EngineError, SgpoError, WeightsError

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
MAX_FAILED_STARTS = 6  # the engine fails when every server has failed this often in a row
RETRY_S = 15.0  # until a version is tried again that no transport could prepare or load, e.g. as a disk was full
CHECK_INTERVAL_S = 5.0  # between two health checks of a server
CHECK_TIMEOUT_S = 30.0  # for the answer to a health check

# The checks that a server must pass before it gets requests. They return events and raise EngineError.
Examine = Callable[[Server], Awaitable[Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """Settings that all servers of an actor share."""

    slots: int  # of each server
    ends: frozenset[int]  # token ids that end a completion
    in_flight: InFlight
    start_s: float  # timeout of a start
    phase_s: float  # timeout of each request of a weight update


class Fleet:
    """Runs until it is closed.

    Only the loop's thread may call `submit`, `progress`, `cancel`, `want` and `close`. Any thread may call `version`
    and `load_status`, and read `results`, `events` and `updates`.
    """

    def __init__(
        self,
        server_slots: Sequence[ServerSlot],
        settings: FleetSettings,
        transports: Sequence[Transport],
        examine: Examine,
    ) -> None:
        """`transports` are in the order in which an update tries them."""
        self._requests = Requests(self._servers, settings.ends)
        self.results, self.events = self._requests.results, self._requests.events
        self.updates: deque[UpdateTimings] = deque(maxlen=1000)
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # all servers have started once
        self._server_slots, self._settings = list(server_slots), settings
        self._examine = examine
        self.canaries: queue.SimpleQueue[ScoredCanary] = queue.SimpleQueue()
        self._canary: Score | None = None
        self._canary_every_s = math.inf
        self._scoring: set[asyncio.Task[None]] = set()
        self._versions = Versions(transports, needed=self._needed_offers, say=self.events.put, retry_s=RETRY_S)
        self._updating = asyncio.Lock()  # held by the server whose turn it is; servers get it in the order they ask
        self._closing = asyncio.Event()

    # -- what the engine calls ------------------------------------------------------------------------------------

    def submit(self, request: Generate | Score) -> None:
        """Queue a valid request."""
        self._requests.submit(request)

    def progress(self, ids: Iterable[Hashable]) -> dict[Hashable, SampledTokens]:
        """What these unfinished generations have sampled so far; see `Engine.progress`."""
        return self._requests.progress(ids)

    def cancel(self, ids: Iterable[Hashable]) -> None:
        """Cancel these requests; results of running ones are dropped."""
        self._requests.cancel(ids)

    def want(self, weights: Weights | None) -> None:
        """Set the version that every server shall load.

        None starts a new session: it cancels all requests, and no server is in service until the next version.
        """
        if weights is None:
            self._requests.cancel_all()
            while not self.canaries.empty():  # scores that the engine has not taken
                self.canaries.get_nowait()
            for server_slot in self._server_slots:
                server_slot.held = None
                if server_slot.server is not None:
                    server_slot.server.forget()
        self._versions.want(weights)

    def version(self) -> int | None:
        """The newest version in service."""
        return max((s.version for s in self._servers() if s.version is not None), default=None)

    def digest(self) -> int:
        """Short digest of the newest version in service; 0 if there is none."""
        version = self.version()
        if version is None:
            return 0
        return next((s.digests.get(version, 0) for s in self._servers() if s.version == version), 0)

    def watch(self, canary: Score, every_s: float) -> None:
        """Score `canary` on every server after each update, and every `every_s` seconds."""
        self._canary, self._canary_every_s = canary, every_s

    def load_status(self) -> EngineLoad:
        """The current load."""
        running = sum(len(server.running) for server in self._servers())
        slots = self._settings.slots * len(self._server_slots)
        return EngineLoad(running=running, waiting=self._requests.waiting, slots=slots, tokens=self._requests.tokens)

    async def run(self) -> None:
        """Keep a server running in every server slot until `close`. Stops all servers before it returns or raises."""
        async with http_session() as http:
            watchdogs = [asyncio.create_task(self._supervise(server_slot, http)) for server_slot in self._server_slots]
            watchdogs.append(asyncio.create_task(self._versions.run()))
            closing = asyncio.create_task(self._closing.wait())
            try:
                # Whatever ends a watchdog task is no failure of one server, so it ends the engine.
                ends: list[asyncio.Future[Any]] = [closing, self._requests.failed, *watchdogs]
                ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for future in ended:
                    future.result()
            finally:
                for task in (closing, *watchdogs, *self._scoring):
                    task.cancel()
                await asyncio.wait(watchdogs)
                for server_slot in self._server_slots:
                    await self._stop_server(server_slot)

    def close(self) -> None:
        """End `run`."""
        self._closing.set()

    # -- servers ----------------------------------------------------------------------------------------------------

    def _servers(self) -> list[Server]:
        return [server_slot.server for server_slot in self._server_slots if server_slot.server is not None]

    async def _supervise(self, server_slot: ServerSlot, http: aiohttp.ClientSession) -> None:
        """Start the server of a slot and keep it serving; restart it when it ends, and report why it ended."""
        while True:
            try:
                await self._start(server_slot, http)
                await self._serve(server_slot)
            except (EngineError, WeightsError, DeadlineExceeded) as error:
                server = server_slot.server
                if server is not None and (server.fault or isinstance(error, ServerGone) or not alive(server_slot)):
                    self._requests.server_died(server)
                self._report(server_slot, await with_log_tail(server_slot, error))
            finally:
                await self._stop_server(server_slot)
            pause = BACKOFF_S[min(server_slot.failures, len(BACKOFF_S)) - 1]
            self.events.put(f"server {server_slot.url}: restarts in {pause:g} s")
            await asyncio.sleep(pause)

    async def _start(self, server_slot: ServerSlot, http: aiohttp.ClientSession) -> None:
        """Launch or attach a server, wait until it answers, and examine it.

        Raises EngineError with the end of its log if it dies.
        """
        deadline = asyncio.get_running_loop().time() + self._settings.start_s
        if server_slot.launch is not None:
            assert server_slot.log is not None
            server_slot.process = await asyncio.to_thread(ServerProcess, server_slot.launch, server_slot.log)
            server_slot.url = server_slot.process.url
        api = ServerApi(http, server_slot.url)
        await wait_until_ready(server_slot, api, deadline=deadline)
        if server_slot.launch is None:
            await clean_up_attached(api, timeout_s=self._settings.phase_s)
        idle_timeout_s = 2 * self._settings.phase_s
        server = Server(api, slots=self._settings.slots, ends=self._settings.ends, idle_timeout_s=idle_timeout_s)
        for line in await self._examine(server):
            self.events.put(line)
        server_slot.server, server_slot.check_at = server, asyncio.get_running_loop().time() + CHECK_INTERVAL_S
        if all(other.server is not None for other in self._server_slots) and not self.ready.done():
            self.ready.set_result(None)

    async def _serve(self, server_slot: ServerSlot) -> None:
        """Keep the server at the newest version as long as it runs. Raises the error that ended it."""
        server = server_slot.server
        assert server is not None
        loaded: Offer | None = None
        while True:
            changed, pause_s = self._versions.changed, self._canary_every_s
            if (offer := self._versions.offer) is not None and offer is not loaded:
                async with self._turn(server_slot, server, offer):
                    offer = self._versions.offer  # the newest by now
                    done = offer is None or offer is loaded or await self._update_to(server_slot, server, offer)
                server_slot.failures = 0
                self._requests.dispatch()
                if done:
                    loaded = offer
                    self._begin_canary(server)
                    continue
                pause_s = RETRY_S
            waiting = asyncio.create_task(changed.wait())
            try:
                if not await self._watch(server_slot, server, waiting, at_most_s=pause_s):
                    self._begin_canary(server)
            finally:
                waiting.cancel()

    def _begin_canary(self, server: Server) -> None:
        """Score the canary on this server, which stays open; nothing waits for the result."""
        if self._canary is not None and server.version is not None:
            about = ScoredCanary(
                engine=server.api.url,
                version=server.version,
                digest=server.digests[server.version],
                logprobs=np.empty(0, np.float32),
            )
            task = asyncio.create_task(self._score_canary(server, self._canary, about))
            self._scoring.add(task)
            task.add_done_callback(self._scoring.discard)

    async def _score_canary(self, server: Server, canary: Score, about: ScoredCanary) -> None:
        """Complete `about` with the score, unless an update begins meanwhile. A dead server is found elsewhere."""
        session = server.session
        try:
            scored = await server.score(canary, server.next_rid(), about.version)
        except (ServerRefused, ServerGone) as error:
            self.events.put(f"the canary was not scored: {error}")
            return
        if scored is not None and session == server.session:
            self.canaries.put(replace(about, logprobs=scored.logprobs))

    @asynccontextmanager
    async def _turn(self, server_slot: ServerSlot, server: Server, offer: Offer) -> AsyncIterator[None]:
        """Wait until no other server is being updated, unless the transport updates all together.

        A server without a version serves nothing and need not wait. Raises EngineError if the server dies meanwhile.
        """
        if server.version is None or offer.transport.together:
            yield
            return
        acquiring = asyncio.create_task(self._updating.acquire())
        try:
            await self._watch(server_slot, server, acquiring, at_most_s=math.inf)
            yield
        finally:
            if not acquiring.cancel():
                self._updating.release()

    async def _watch(
        self, server_slot: ServerSlot, server: Server, waiting: asyncio.Task[Any], *, at_most_s: float
    ) -> bool:
        """Wait until `waiting` is done; False after `at_most_s`.

        Raises EngineError if the server dies or no longer answers.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + at_most_s
        while not waiting.done() and loop.time() < end:
            await asyncio.wait([waiting], timeout=0.1)
            require_alive(server_slot)
            if server.fault is not None:
                raise server.fault
            if loop.time() > server_slot.check_at:
                reported = (await server.api.get("/model_info", timeout_s=CHECK_TIMEOUT_S))["weight_version"]
                if server.version is not None and reported != str(server.version):
                    raise WeightsError(
                        f"{server.api.url}: the server reports weight version {reported}, but this actor loaded "
                        f"{server.version}; make sure that no other program updates it"
                    )
                server_slot.check_at = loop.time() + CHECK_INTERVAL_S
        return waiting.done()

    async def _update_to(self, server_slot: ServerSlot, server: Server, offer: Offer) -> bool:
        """Load a version by the transport that offers it, or by a later one; False if the server keeps its version.

        Raises EngineError if the server has no version then.
        """
        errors: list[str] = []
        name = f"version {offer.weights.version}"
        transports = self._versions.transports
        for transport in transports[transports.index(offer.transport) :]:
            try:
                if transport is not offer.transport:
                    offer = await self._versions.prepare(offer.weights, transport)
                await self._transact(server_slot, server, offer)
            except SgpoError as error:
                if server.fault is not None:  # the server itself is faulty: another transport cannot help
                    raise server.fault from None
                errors.append(f"by {transport.name}: {error}")
                now = f"version {server.version} is" if server.version is not None else "no version is"
                self.events.put(f"{name} {errors[-1]}; {now} in service on {server.api.url}")
                self._requests.dispatch()
            else:
                return True
        found = f"{server.api.url}: {name} cannot be loaded: {'; '.join(errors)}"
        if server.version is None:
            raise EngineError(found)
        self.events.put(f"{found}; next try in {RETRY_S:g} s")
        return False

    async def _transact(self, server_slot: ServerSlot, server: Server, offer: Offer) -> None:
        """Update the server, or leave it as it was; see `update`."""
        server_slot.loading = offer
        try:
            async with offer.transport.joining(server.api, offer.prepared):
                timings = await update(
                    server,
                    offer,
                    in_flight=self._settings.in_flight,
                    phase_s=self._settings.phase_s,
                    previous=server_slot.held,
                    on_open=self._requests.dispatch,
                )
            self.updates.append(timings)
            server_slot.held = offer
        finally:
            server_slot.loading = None
            if server.version is None:  # it has none, or its session is over
                server_slot.held = None
            self._versions.release()

    def _needed_offers(self) -> list[Offer]:
        """What servers have or load."""
        needed = [offer for server_slot in self._server_slots for offer in (server_slot.held, server_slot.loading)]
        return [offer for offer in needed if offer is not None]

    def _report(self, server_slot: ServerSlot, error: SgpoError) -> None:
        """Count a failure of the server in this slot, and report it."""
        server_slot.failures += 1
        if not self.ready.done():  # the first start: fail, so that the user can correct the cause
            self.ready.set_exception(error)
        else:
            self.events.put(str(error))
        if min(server_slot.failures for server_slot in self._server_slots) >= MAX_FAILED_STARTS:
            self.results.put(
                EngineError(f"every SGLang server failed {MAX_FAILED_STARTS} times in a row; the last error: {error}")
            )

    async def _stop_server(self, server_slot: ServerSlot) -> None:
        """Stop the server in this slot; its requests wait for another server."""
        server, server_slot.server, server_slot.held = server_slot.server, None, None
        if server is not None:
            await server.cancel_streams()
            self._requests.dispatch()  # a suspect may be next, and no other event may trigger a dispatch
        if server_slot.process is not None:
            process, server_slot.process = server_slot.process, None
            try:
                await asyncio.to_thread(process.stop)
            except DeadlineExceeded as error:  # no reason to end the other servers
                self.events.put(str(error))
