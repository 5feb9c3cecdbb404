"""All servers of one actor, in one asyncio loop without locks; `requests` says what runs on them.

    load ───▶ wanted ─▶ each server's keeper: prepare (once), shut, send, verify, open;
                        failed? the next transport; all failed, or dead? start it anew

A keeper waits for one of: another version is wanted, its server ends, its next check is due.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from sgpo_async.engines.base import EngineLoad, Generate, Score, Weights
from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerRefused, http_session, settle
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.engines.sglang.serving.requests import Requests
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.serving.server_slot import ServerSlot, alive, with_log_tail, require_alive, wait_until_ready
from sgpo_async.engines.sglang.serving.update import InFlight, UpdateTimings, update
from sgpo_async.engines.sglang.weight_sync.transports import Prepared, Transport
from sgpo_async.errors import DeadlineExceeded, EngineError, SessionError, SgpoError, Superseded, WeightsError

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
MAX_FAILED_STARTS = 6  # failed starts in a row of every server
CHECK_S = 5.0  # between two looks at a server that says nothing by itself
ALIVE_S = 30.0  # for an answer to such a look

Examine = Callable[[Server], Awaitable[Sequence[str]]]  # before a server takes work; returns news, raises EngineError


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """What the servers of an actor have in common."""

    slots: int  # of each server
    ends: frozenset[int]  # token ids that end a continuation
    in_flight: InFlight
    start_s: float
    phase_s: float


class Fleet:
    """Runs until closed. `submit`, `cancel`, `want` and `close` belong to the loop's thread; any may read figures."""

    def __init__(
        self, places: Sequence[ServerSlot], settings: FleetSettings, transports: Sequence[Transport], examine: Examine
    ) -> None:
        """`transports` in the order in which they are tried."""
        self._requests = Requests(self._servers, settings.ends)
        self.results, self.events = self._requests.results, self._requests.events
        self.updates: deque[UpdateTimings] = deque(maxlen=1000)
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # every server has been up once
        self._server_slots, self._settings = list(places), settings
        self._transports, self._examine = transports, examine
        self._wanted: Weights | None = None
        self._changed = asyncio.Event()  # another version is wanted; replaced by a new one each time
        self._prepared: dict[tuple[int, str], asyncio.Task[Prepared]] = {}  # of the wanted version
        self._session = 0  # versions of different sessions have nothing to do with each other
        self._closing = asyncio.Event()

    # -- what the engine calls ------------------------------------------------------------------------------------

    def submit(self, request: Generate | Score) -> None:
        """Queue a valid request."""
        self._requests.submit(request)

    def cancel(self, ids: Iterable[Hashable]) -> None:
        """Forget these requests; what running ones still bring is dropped."""
        self._requests.cancel(ids)

    def want(self, weights: Weights | None) -> None:
        """The version that every server is to hold from now on; None: none, until another is wanted."""
        self._wanted = weights
        self._prepared.clear()
        if weights is None:
            self._session += 1
            self._requests.cancel_all()
            for server in self._servers():
                server.version, server.open = None, False
        self._changed.set()
        self._changed = asyncio.Event()

    def version(self) -> int | None:
        """The newest version in service."""
        return max((s.version for s in self._servers() if s.version is not None), default=None)

    def load_status(self) -> EngineLoad:
        """Counters of the moment."""
        running = sum(len(server.running) for server in self._servers())
        slots = self._settings.slots * len(self._server_slots)
        return EngineLoad(running=running, waiting=self._requests.waiting, slots=slots, tokens=self._requests.tokens)

    async def run(self) -> None:
        """Keep every place filled until `close`. Cleans up whatever happens."""
        async with http_session() as http:
            keepers = [asyncio.create_task(self._keep(server_slot, http)) for server_slot in self._server_slots]
            closing = asyncio.create_task(self._closing.wait())
            try:
                # A keeper ends by a fault of this program only.
                ends: list[asyncio.Future[Any]] = [closing, self._requests.failed, *keepers]
                ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for one in ended:
                    one.result()
            finally:
                for task in (closing, *keepers):
                    task.cancel()
                await asyncio.wait(keepers)
                for server_slot in self._server_slots:
                    await self._clear(server_slot)

    def close(self) -> None:
        """End `run`."""
        self._closing.set()

    # -- servers ----------------------------------------------------------------------------------------------------

    def _servers(self) -> list[Server]:
        return [server_slot.server for server_slot in self._server_slots if server_slot.server is not None]

    async def _keep(self, server_slot: ServerSlot, http: aiohttp.ClientSession) -> None:
        """A server's life: start, serve, and again when it ends. Its end is news, and the end of hope an error."""
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
                await self._clear(server_slot)
            pause = BACKOFF_S[min(server_slot.failures, len(BACKOFF_S)) - 1]
            self.events.put(f"server {server_slot.url}: starts again in {pause:g} s")
            await asyncio.sleep(pause)

    async def _start(self, server_slot: ServerSlot, http: aiohttp.ClientSession) -> None:
        """Launch or attach, wait until it answers, examine it. Raises EngineError with its last words if it dies."""
        deadline = asyncio.get_running_loop().time() + self._settings.start_s
        if server_slot.launch is not None:
            assert server_slot.log is not None
            server_slot.process = await asyncio.to_thread(ServerProcess, server_slot.launch, server_slot.log)
            server_slot.url = server_slot.process.url
        api = ServerApi(http, server_slot.url)
        await wait_until_ready(server_slot, api, deadline=deadline)
        if server_slot.launch is None:
            await settle(api, timeout_s=self._settings.phase_s)
        silence = 2 * self._settings.phase_s
        server = Server(api, slots=self._settings.slots, ends=self._settings.ends, idle_timeout_s=silence)
        for line in await self._examine(server):
            self.events.put(line)
        server_slot.server = server
        if all(other.server is not None for other in self._server_slots) and not self.ready.done():
            self.ready.set_result(None)

    async def _serve(self, server_slot: ServerSlot) -> None:
        """Keep the server at the wanted version as long as it lives. Raises what ends it."""
        server = server_slot.server
        assert server is not None
        held: Weights | None = None
        while True:
            changed = self._changed
            if self._wanted is not None and self._wanted is not held:
                held = await self._bring(server, self._wanted)
                server_slot.failures = 0
                self._requests.dispatch()
                continue
            waiting = asyncio.create_task(changed.wait())
            try:
                await self._watch(server_slot, server, waiting)
            finally:
                waiting.cancel()

    async def _watch(self, server_slot: ServerSlot, server: Server, waiting: asyncio.Task[bool]) -> None:
        """Until another version is wanted. Raises EngineError if the server dies, or answers no longer."""
        loop = asyncio.get_running_loop()
        look = loop.time() + CHECK_S
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.1)
            require_alive(server_slot)
            if server.fault is not None:
                raise server.fault
            if loop.time() > look:
                told = (await server.api.get("/model_info", timeout_s=ALIVE_S))["weight_version"]
                if server.version is not None and told != str(server.version):
                    raise WeightsError(f"{server.api.url}: holds version {told}, which is none of ours")
                look = loop.time() + CHECK_S

    async def _bring(self, server: Server, weights: Weights) -> Weights:
        """Bring the server to `weights` by the first transport that succeeds; returns what it has been brought to.

        A version that does not fit the model, or that is gone, leaves the server as it is, until the next.
        """
        faults: list[str] = []
        touched = False
        session = self._session
        for transport in self._transports:
            try:
                prepared = await self._ready_to_send(weights, transport)
            except Superseded:
                return weights  # a newer one is announced
            except WeightsError as error:
                self.events.put(f"version {weights.version} is not loaded: {error}")
                return weights
            except (EngineError, SessionError) as error:
                faults.append(f"by {transport.name}: {error}")
                continue
            if self._wanted is not weights:
                return weights
            touched = True
            try:
                figures = await update(
                    server, prepared, transport, in_flight=self._settings.in_flight, phase_s=self._settings.phase_s
                )
            except (ServerRefused, SessionError, WeightsError, DeadlineExceeded) as error:
                if server.fault is not None:  # it has not ended, or not answered, a stream: no transport mends that
                    raise server.fault from None
                faults.append(f"by {transport.name}: {error}")
                self.events.put(f"version {weights.version} by {transport.name}: {error}; the server is out of service")
                continue
            if self._session != session:
                server.version, server.open = None, False
            self.updates.append(figures)
            if all(server.version == weights.version for server in self._servers()):
                self._prepared.clear()
            return weights
        if self._wanted is not weights:
            return weights
        if not touched:  # the server is as good as it was
            self.events.put(f"version {weights.version} is not loaded: {'; '.join(faults)}")
            return weights
        raise EngineError(f"{server.api.url}: version {weights.version} cannot be loaded: {'; '.join(faults)}")

    async def _ready_to_send(self, weights: Weights, transport: Transport) -> Prepared:
        """Prepared once for all servers."""
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
        if not self.ready.done():  # the first start: the user is waiting, and can mend it
            self.ready.set_exception(error)
        else:
            self.events.put(str(error))
        if min(server_slot.failures for server_slot in self._server_slots) >= MAX_FAILED_STARTS:
            self.results.put(EngineError(f"no SGLang server can be kept in service; the last fault: {error}"))

    async def _clear(self, server_slot: ServerSlot) -> None:
        """Whatever stands there ends; its streams wait again."""
        server, server_slot.server = server_slot.server, None
        if server is not None:
            await server.cancel_streams()
            self._requests.dispatch()  # a suspect's turn may have come, and nobody else ends where nobody runs
        if server_slot.process is not None:
            process, server_slot.process = server_slot.process, None
            await asyncio.to_thread(process.stop)
