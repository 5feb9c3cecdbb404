"""The requests of one actor: who waits, who goes to which server, and what becomes of an attempt.

    submit ─▶ waiting ─dispatch─▶ server ─┬─ finished ─▶ results
                 ▲                         ├─ partial ──┐      (aborted for an update, or the server died)
                 └─────────────────────────┼────────────┘
                                           └─ blamed ─▶ Failed: it kills servers (see `quarantine`)

Requests go to the open servers that hold the newest version that any open server holds. Everything here belongs to one
asyncio loop.
"""

from __future__ import annotations

import asyncio
import functools
import queue
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Hashable, Iterable

from sgpo_async.engines.base import Failed, Generate, Generated, Result, Score, Scored
from sgpo_async.engines.sglang.processes.api import ServerGone, ServerRefused, ServerUnreached
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.engines.sglang.serving.quarantine import ISOLATE_AFTER, Quarantine, ServerLoad, server_for_request, server_for_suspect
from sgpo_async.engines.sglang.serving.server import Running, Server
from sgpo_async.errors import EngineError, SgpoError

REFUSALS = 5  # in a row of one request
REFUSED_S = 0.5  # before a refused request is sent again

Item = Partial | Score


class Requests:
    """All requests that are not finished. `servers` gives those that stand at the moment."""

    def __init__(self, servers: Callable[[], list[Server]], ends: Collection[int]) -> None:
        """`ends` are the token ids that end a continuation."""
        self.results: queue.SimpleQueue[Result | SgpoError] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # by a fault of this program
        self.tokens = 0
        self._servers, self._ends = servers, ends
        self._items: dict[Hashable, Item] = {}
        self._waiting: deque[Item] = deque()
        self._suspects: deque[Item] = deque()  # those that wait
        self._quarantine = Quarantine()
        self._refusals: dict[Hashable, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Requests that no server has."""
        return len(self._waiting) + len(self._suspects)

    def submit(self, request: Generate | Score) -> None:
        """Queue a valid request."""
        item = Partial(request) if isinstance(request, Generate) else request
        self._items[request.id] = item
        self._waiting.append(item)
        self.dispatch()

    def cancel(self, ids: Iterable[Hashable]) -> None:
        """Forget these requests; what running ones still bring is dropped."""
        gone = set(ids)
        for id in gone:
            self._forget(id)
        self._waiting = deque(item for item in self._waiting if _id(item) not in gone)
        self._suspects = deque(item for item in self._suspects if _id(item) not in gone)
        for server in self._servers():
            for rid, running in server.running.items():
                if _id(running.item) in gone and not server.death_recorded:
                    self._background(server.abort(rid))

    def cancel_all(self) -> None:
        """Forget every request."""
        self.cancel(list(self._items))

    def dispatch(self) -> None:
        """Give waiting requests to the servers with most room that hold the newest version, suspects to empty ones."""
        servers = self._servers()
        newest = max((s.version for s in servers if s.open and s.version is not None), default=None)
        if newest is None:
            return
        while self._suspects and (place := server_for_suspect(self._seats(servers, newest))) is not None:
            self._begin(servers[place], self._suspects.popleft(), newest)
        while self._waiting:
            place = server_for_request(self._seats(servers, newest), suspect_waits=bool(self._suspects))
            if place is None:
                return
            self._begin(servers[place], self._waiting.popleft(), newest)

    def server_died(self, server: Server) -> None:
        """The server is dead, or gives no answer: whoever was on it at its first sign of that may be the reason.

        Also those that a failed update has cut off, who wait again or run elsewhere by now; not those that never got
        a connection.
        """
        if server.death_recorded:
            return
        server.death_recorded, server.open = True, False
        aboard = [running.item for running in (server.interrupted | server.running).values() if running.reached]
        known = [item for item in aboard if self._items.get(_id(item)) is item]
        blamed = self._quarantine.record_death([_id(item) for item in known], others=len(aboard) - len(known))
        if new := sum(self._quarantine.deaths(_id(item)) == ISOLATE_AFTER for item in known):
            told = f"{new} of its requests have seen {ISOLATE_AFTER} servers die, and run alone from now on"
            self.events.put(f"server {server.api.url}: {told}")
        for item in known:
            if _id(item) == blamed and not self._complete(item):
                self._fail(item)
        self._set_apart()

    def _set_apart(self) -> None:
        """Who has become a suspect while it waited."""
        apart = [item for item in self._waiting if self._quarantine.is_suspect(_id(item))]
        if apart:
            self._waiting = deque(item for item in self._waiting if not self._quarantine.is_suspect(_id(item)))
            self._suspects.extendleft(reversed(apart))

    def _seats(self, servers: list[Server], version: int) -> list[ServerLoad]:
        return [
            ServerLoad(
                running=len(server.running),
                room=server.room if server.version == version else 0,
                suspect=any(self._quarantine.is_suspect(_id(running.item)) for running in server.running.values()),
            )
            for server in servers
        ]

    def _begin(self, server: Server, item: Item, version: int) -> None:
        """With the server's version of now: a session may end before the task begins."""
        rid = server.next_rid()
        task = asyncio.create_task(self._attempt(server, item, rid, version))
        server.running[rid] = Running(task, item)
        task.add_done_callback(functools.partial(self._ended, server, item, rid))

    async def _attempt(self, server: Server, item: Item, rid: str, version: int) -> Generated | Scored | None:
        """One attempt at one request: its result, or None if somebody must go on with it."""
        if isinstance(item, Score):
            return await server.score(item, rid, version)
        before = len(item.tokens)
        if not self._complete(item):  # or its server died between the last token and its last word
            try:
                await server.extend(item, rid, version)
            finally:
                if (more := len(item.tokens) - before) > 0:
                    self.tokens += more
                    self._refusals.pop(_id(item), None)
        return item.result(self._ends) if self._complete(item) else None

    def _ended(self, server: Server, item: Item, rid: str, task: asyncio.Task[Generated | Scored | None]) -> None:
        """Take the result; what has none waits again, first in the queue. Also for a task cut off before it began."""
        result: Result | None = None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ServerGone):
            server.running[rid].reached = not isinstance(error, ServerUnreached)
            server.open, server.fault = False, server.fault or error
            self.server_died(server)
        elif task.cancelled():
            if server.fault is not None:  # an update has met it first, and cuts everybody off
                self.server_died(server)
        elif isinstance(error, ServerRefused):
            self._refused(item, error)
        elif error is not None and not self.failed.done():
            self.failed.set_exception(error)
        elif error is None:
            result = task.result()
        del server.running[rid]
        if self._items.get(_id(item)) is item:  # not cancelled by the actor
            if isinstance(error, ServerRefused):
                self._background(self._later(item))
            elif result is None:
                self._wait_again(item)
            else:
                self.results.put(result)
                self._forget(_id(item))
        self.dispatch()

    def _wait_again(self, item: Item) -> None:
        queue = self._suspects if self._quarantine.is_suspect(_id(item)) else self._waiting
        queue.appendleft(item)

    async def _later(self, item: Item) -> None:
        await asyncio.sleep(REFUSED_S)
        if self._items.get(_id(item)) is item:
            self._wait_again(item)
            self.dispatch()

    def _refused(self, item: Item, error: ServerRefused) -> None:
        """Requests are valid when they come, so a refusal is tried again; but not for ever."""
        count = self._refusals[_id(item)] = self._refusals.get(_id(item), 0) + 1
        if count >= REFUSALS:
            self.results.put(EngineError(f"request {_id(item)}: refused {count} times; the last time: {error}"))

    def _fail(self, item: Item) -> None:
        deaths = self._quarantine.deaths(_id(item))
        reason = f"{deaths} servers died while it ran on them, the last one with nothing else on it"
        self.results.put(Failed(id=_id(item), error=EngineError(f"request {_id(item)}: {reason}")))
        self.cancel([_id(item)])  # it may wait again, or run elsewhere

    def _forget(self, id: Hashable) -> None:
        self._items.pop(id, None)
        self._refusals.pop(id, None)
        self._quarantine.forget(id)

    def _complete(self, item: Item) -> bool:
        return isinstance(item, Partial) and item.finish(self._ends) is not None

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _id(item: Item) -> Hashable:
    return item.request.id if isinstance(item, Partial) else item.id
