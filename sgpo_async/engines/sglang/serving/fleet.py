"""Starts, supervises and updates all servers of one actor, in one asyncio loop without locks.

    load ───▶ wanted ─▶ each server's watchdog: prepare (once for all servers), shut, send, verify, open;
                        if that fails: try the next transport; if all fail, or the server died: restart it

The watchdog is one task per server. It waits until another version is wanted, its server ends, or the next health check
is due. `requests` decides which requests run on which server.
"""

from __future__ import annotations

import asyncio
import math
import queue
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
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
from sgpo_async.engines.sglang.weight_sync.transports import Prepared, Transport
from sgpo_async.errors import DeadlineExceeded, EngineError, SessionError, SgpoError, Superseded, WeightsError

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
MAX_FAILED_STARTS = 6  # the engine fails when every server has failed this often in a row
RETRY_S = 15.0  # until a version is tried again that no transport could prepare, e.g. because a disk was full
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
        self._transports, self._examine = transports, examine
        self.canaries: queue.SimpleQueue[ScoredCanary] = queue.SimpleQueue()
        self._canary: Score | None = None
        self._canary_every_s = math.inf
        self._scoring: set[asyncio.Task[None]] = set()
        self._wanted: Weights | None = None
        self._changed = asyncio.Event()  # set when another version is wanted, then replaced by a new event
        self._prepared: dict[tuple[int, str], asyncio.Task[Prepared]] = {}  # wanted version, by (version, transport)
        self._session = 0  # equal version numbers of different sessions are different weights
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
        self._wanted = weights
        self._prepared.clear()
        if weights is None:
            self._session += 1
            self._requests.cancel_all()
            for server in self._servers():
                server.version, server.open = None, False
                server.digests = {}
        self._changed.set()
        self._changed = asyncio.Event()

    def version(self) -> int | None:
        """The newest version in service."""
        return max((s.version for s in self._servers() if s.version is not None), default=None)

    def digest(self) -> int:
        """Short digest of the newest version in service; 0 if there is none."""
        version = self.version()
        return next((s.digests[version] for s in self._servers() if version is not None and s.version == version), 0)

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
            closing = asyncio.create_task(self._closing.wait())
            try:
                # A watchdog task ends only by a bug in this program.
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
        server_slot.server = server
        if all(other.server is not None for other in self._server_slots) and not self.ready.done():
            self.ready.set_result(None)

    async def _serve(self, server_slot: ServerSlot) -> None:
        """Keep the server at the wanted version as long as it runs. Raises the error that ended it."""
        server = server_slot.server
        assert server is not None
        loaded: Weights | None = None
        while True:
            changed, pause_s = self._changed, self._canary_every_s
            if self._wanted is not None and self._wanted is not loaded:
                weights = self._wanted
                prepared = await self._update_to(server, weights)
                server_slot.failures = 0
                self._requests.dispatch()
                if prepared:
                    loaded = weights
                    self._begin_canary(server)
                    continue
                pause_s = RETRY_S
            waiting = asyncio.create_task(changed.wait())
            try:
                if not await self._wait_for_new_version(server_slot, server, waiting, at_most_s=pause_s):
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
            task = asyncio.create_task(self._score_canary(server, self._canary, about, self._session))
            self._scoring.add(task)
            task.add_done_callback(self._scoring.discard)

    async def _score_canary(self, server: Server, canary: Score, about: ScoredCanary, session: int) -> None:
        """Complete `about` with the score, unless an update begins meanwhile. A dead server is found elsewhere."""
        try:
            scored = await server.score(canary, server.next_rid(), about.version)
        except (ServerRefused, ServerGone) as error:
            self.events.put(f"the canary was not scored: {error}")
            return
        if scored is not None and session == self._session:
            self.canaries.put(replace(about, logprobs=scored.logprobs))

    async def _wait_for_new_version(
        self, server_slot: ServerSlot, server: Server, waiting: asyncio.Task[bool], *, at_most_s: float
    ) -> bool:
        """Wait until another version is wanted; False after `at_most_s`.

        Raises EngineError if the server dies or no longer answers.
        """
        loop = asyncio.get_running_loop()
        end, next_check = loop.time() + at_most_s, loop.time() + CHECK_INTERVAL_S
        while not waiting.done() and loop.time() < end:
            await asyncio.wait([waiting], timeout=0.1)
            require_alive(server_slot)
            if server.fault is not None:
                raise server.fault
            if loop.time() > next_check:
                reported = (await server.api.get("/model_info", timeout_s=CHECK_TIMEOUT_S))["weight_version"]
                if server.version is not None and reported != str(server.version):
                    raise WeightsError(
                        f"{server.api.url}: the server reports weight version {reported}, but this actor loaded "
                        f"{server.version}; make sure that no other program updates it"
                    )
                next_check = loop.time() + CHECK_INTERVAL_S
        return waiting.done()

    async def _update_to(self, server: Server, weights: Weights) -> bool:
        """Load `weights` into the server by the first transport that succeeds; False if none could prepare them.

        A version that does not fit the model, or that has been overwritten, is skipped: the server keeps the version
        that it has, as it does after False. Raises EngineError if all transports fail to send.
        """
        errors: list[str] = []
        touched = False  # whether an update may have changed the server's weights
        session = self._session
        for transport in self._transports:
            try:
                prepared = await self._prepare(weights, transport)
            except Superseded:
                return True  # a newer version has been announced
            except WeightsError as error:
                self.events.put(f"version {weights.version} is not loaded: {error}")
                return True
            except (EngineError, SessionError) as error:
                errors.append(f"by {transport.name}: {error}")
                if transport is not self._transports[-1]:
                    self.events.put(f"version {weights.version} {errors[-1]}; another transport is tried")
                continue
            if self._wanted is not weights:
                return True
            touched = True
            try:
                timings = await update(
                    server, prepared, transport, in_flight=self._settings.in_flight, phase_s=self._settings.phase_s
                )
            except (ServerRefused, SessionError, WeightsError, DeadlineExceeded) as error:
                if server.fault is not None:  # the server itself is faulty: another transport cannot help
                    raise server.fault from None
                errors.append(f"by {transport.name}: {error}")
                self.events.put(f"version {weights.version} by {transport.name}: {error}; the server is out of service")
                continue
            if self._session != session:
                server.version, server.open = None, False
                server.digests = {}
            self.updates.append(timings)
            if all(server.version == weights.version for server in self._servers()):
                self._prepared.clear()
            return True
        if self._wanted is not weights:
            return True
        if not touched:  # the server keeps its weights and stays in service
            found = "; ".join(errors)
            self.events.put(f"version {weights.version} is not loaded, next try in {RETRY_S:g} s: {found}")
            return False
        raise EngineError(f"{server.api.url}: version {weights.version} cannot be loaded: {'; '.join(errors)}")

    async def _prepare(self, weights: Weights, transport: Transport) -> Prepared:
        """What `transport` sends for this version; prepared once for all servers."""
        key = (weights.version, transport.name)
        if key not in self._prepared:
            self._prepared[key] = asyncio.create_task(asyncio.to_thread(transport.prepare, weights))
        task = self._prepared[key]
        try:
            return await asyncio.shield(task)
        except SgpoError:
            if self._prepared.get(key) is task:
                del self._prepared[key]
            raise

    def _report(self, server_slot: ServerSlot, error: SgpoError) -> None:
        server_slot.failures += 1
        """Count a failure of the server in this slot, and report it."""
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
        server, server_slot.server = server_slot.server, None
        if server is not None:
            await server.cancel_streams()
            self._requests.dispatch()  # a suspect may be next, and no other event may trigger a dispatch
        if server_slot.process is not None:
            process, server_slot.process = server_slot.process, None
            await asyncio.to_thread(process.stop)
