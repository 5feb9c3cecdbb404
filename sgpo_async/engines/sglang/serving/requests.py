"""The requests of one actor: the queue, the assignment to servers, and the outcome of each attempt.

    submit ─▶ waiting ─dispatch─▶ server ─┬─ finished ─▶ results
                 ▲                         ├─ partial ──┐      (aborted for an update, or the server died)
                 └─────────────────────────┼────────────┘
                                           └─ blamed ─▶ Failed: it kills servers (see `quarantine`)

Requests go only to open servers with the newest version among the open servers, and with their `min_version` or a newer
one; a server on trial counts only for itself. What it samples becomes a result, or is reported as progress, when its
version is verified; if that fails, it is dropped. All calls come from one asyncio loop.
"""

from __future__ import annotations

import asyncio
import functools
import queue
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Hashable, Iterable

from sgpo_async.engines.base import Failed, Generate, Generated, Result, SampledTokens, Score, Scored
from sgpo_async.engines.sglang.processes.api import ServerGone, ServerRefused, ServerUnreached
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.engines.sglang.serving.quarantine import (
    ISOLATE_AFTER,
    Quarantine,
    ServerLoad,
    server_for_request,
    server_for_suspect,
)
from sgpo_async.engines.sglang.serving.server import Running, Server, Trial
from sgpo_async.errors import EngineError, SgpoError

MAX_REFUSALS = 5  # of one request in a row
REFUSAL_PAUSE_S = 0.5  # before a refused request is sent again

Item = Partial | Score


class Requests:
    """All unfinished requests. `servers` returns the servers that are running at the moment."""

    def __init__(self, servers: Callable[[], list[Server]], ends: Collection[int]) -> None:
        """`ends` are the token ids that end a completion."""
        self.results: queue.SimpleQueue[Result | SgpoError] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # set by a bug here
        self.tokens = 0
        self._servers, self._ends = servers, ends
        self._items: dict[Hashable, Item] = {}
        self._waiting: deque[Item] = deque()
        self._suspects: deque[Item] = deque()  # suspects that wait for an empty server
        self._quarantine = Quarantine()
        self._refusals: dict[Hashable, int] = {}
        self._trials: dict[Partial, Trial] = {}  # of running attempts that began on a server on trial
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """The number of requests that are on no server."""
        return len(self._waiting) + len(self._suspects)

    def submit(self, request: Generate | Score) -> None:
        """Queue a valid request."""
        item = Partial(request) if isinstance(request, Generate) else request
        self._items[request.id] = item
        self._waiting.append(item)
        self.dispatch()

    def progress(self, ids: Iterable[Hashable]) -> dict[Hashable, SampledTokens]:
        """What these unfinished generations have sampled so far; see `Engine.progress`."""
        items = {id: self._items.get(id) for id in ids}
        return {
            id: item.sampled()
            for id, item in items.items()
            if isinstance(item, Partial) and item.versioned and not self._complete(item) and self._is_verified(item)
        }

    def cancel(self, ids: Iterable[Hashable]) -> None:
        """Cancel these requests; results of running ones are dropped."""
        cancelled = set(ids)
        for id in cancelled:
            self._forget(id)
        self._waiting = deque(item for item in self._waiting if _id(item) not in cancelled)
        self._suspects = deque(item for item in self._suspects if _id(item) not in cancelled)
        for server in self._servers():
            for rid, running in server.running.items():
                if _id(running.item) in cancelled and not server.death_recorded:
                    self._background(server.abort(rid))

    def cancel_all(self) -> None:
        """Cancel every request."""
        self.cancel(list(self._items))

    def dispatch(self) -> None:
        """Assign waiting requests to the servers with the newest version and the most room, suspects to empty ones."""
        servers = self._servers()
        if all(not server.open or server.generates is None for server in servers):
            return
        while self._suspects:
            index = server_for_suspect(self._loads(servers, _min_version(self._suspects[0])))
            if index is None:
                break
            self._begin(servers[index], self._suspects.popleft())
        while (found := self._next(servers)) is not None:
            position, server = found
            item = self._waiting[position]
            del self._waiting[position]
            self._begin(server, item)

    def _next(self, servers: list[Server]) -> tuple[int, Server] | None:
        """The position of the first waiting request that some server can take, and that server.

        After the only server with the newest version has died, the others may be too old for some requests.
        """
        tried: set[int] = set()
        for position, item in enumerate(self._waiting):
            if (lowest := _min_version(item)) in tried:
                continue
            index = server_for_request(self._loads(servers, lowest), suspect_waits=bool(self._suspects))
            if index is not None:
                return position, servers[index]
            tried.add(lowest)
        return None

    def server_died(self, server: Server) -> None:
        """Record the death of a server that is dead or does not answer, for every request that may have caused it.

        These are the requests that ran on it at the first sign of its death, including requests that a failed update
        interrupted (they wait or run elsewhere by now), but not requests that never got a connection.
        """
        if server.death_recorded:
            return
        server.death_recorded, server.open = True, False
        in_flight = [running.item for running in (server.interrupted | server.running).values() if running.connected]
        known = [item for item in in_flight if self._items.get(_id(item)) is item]
        blamed = self._quarantine.record_death([_id(item) for item in known], others=len(in_flight) - len(known))
        if new := sum(self._quarantine.deaths(_id(item)) == ISOLATE_AFTER for item in known):
            isolated = (
                f"{new} of its requests were running on {ISOLATE_AFTER} servers that died; they run alone from now on"
            )
            self.events.put(f"server {server.api.url}: {isolated}")
        for item in known:
            if _id(item) == blamed and not self._complete(item):
                self._fail(item)
        self._separate_suspects()

    def _separate_suspects(self) -> None:
        """Move requests that became suspects while they waited into the queue of suspects."""
        suspects = [item for item in self._waiting if self._quarantine.is_suspect(_id(item))]
        if suspects:
            self._waiting = deque(item for item in self._waiting if not self._quarantine.is_suspect(_id(item)))
            self._suspects.extendleft(reversed(suspects))

    def _loads(self, servers: list[Server], lowest: int) -> list[ServerLoad]:
        """The load of each server; without room for a request that needs the version `lowest` if it is older."""
        verified = (s.version for s in servers if s.open and s.trial is None and s.version is not None)
        oldest = max([lowest, *verified])  # that may get requests
        return [
            ServerLoad(
                running=len(server.running),
                room=server.room if server.generates is not None and server.generates >= oldest else 0,
                suspect=any(self._quarantine.is_suspect(_id(running.item)) for running in server.running.values()),
            )
            for server in servers
        ]

    def _begin(self, server: Server, item: Item) -> None:
        """Start an attempt with the server's present version: a session may end before the task runs."""
        assert server.generates is not None
        rid = server.next_rid()
        if server.trial is not None and isinstance(item, Partial):
            self._trials[item] = server.trial
        task = asyncio.create_task(self._attempt(server, item, rid, server.generates, server.trial))
        server.running[rid] = Running(task, item)
        task.add_done_callback(functools.partial(self._ended, server, item, rid))

    async def _attempt(
        self, server: Server, item: Item, rid: str, version: int, trial: Trial | None
    ) -> Generated | Scored | None:
        """Run one attempt of one request; returns its result, or None if the request needs another attempt.

        On a server on trial the attempt lasts until the verdict.
        """
        if isinstance(item, Score):
            scored = await server.score(item, rid, version)
            return scored if trial is None or await asyncio.shield(trial.verdict) else None
        before = len(item.tokens)
        if not self._complete(item):  # it is complete if its server died after the last token
            try:
                await server.extend(item, rid, version)
                if trial is not None:
                    await asyncio.shield(trial.verdict)
            finally:
                if trial is not None and not trial.passed:
                    item.truncate(before)
                if (more := len(item.tokens) - before) > 0:
                    self.tokens += more
                    self._refusals.pop(_id(item), None)
        return item.result(self._ends) if self._complete(item) else None

    def _ended(self, server: Server, item: Item, rid: str, task: asyncio.Task[Generated | Scored | None]) -> None:
        """Handle the end of an attempt, also of a task that was cancelled before it ran.

        Keeps the result; a request without a result returns to the head of the queue.
        """
        if isinstance(item, Partial):
            self._trials.pop(item, None)
        result: Result | None = None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ServerGone):
            server.running[rid].connected = not isinstance(error, ServerUnreached)
            server.open, server.fault = False, server.fault or error
            self.server_died(server)
        elif task.cancelled():
            if server.fault is not None:  # an update found the fault first and cancelled all streams
                self.server_died(server)
        elif isinstance(error, ServerRefused):
            self._count_refusal(item, error)
        elif error is not None and not self.failed.done():
            self.failed.set_exception(error)
        elif error is None:
            result = task.result()
        del server.running[rid]
        if self._items.get(_id(item)) is item:  # not cancelled by the actor
            if isinstance(error, ServerRefused):
                self._background(self._requeue_later(item))
            elif result is None:
                self._requeue(item)
            else:
                self.results.put(result)
                self._forget(_id(item))
        self.dispatch()

    def _requeue(self, item: Item) -> None:
        queue = self._suspects if self._quarantine.is_suspect(_id(item)) else self._waiting
        queue.appendleft(item)

    async def _requeue_later(self, item: Item) -> None:
        await asyncio.sleep(REFUSAL_PAUSE_S)
        if self._items.get(_id(item)) is item:
            self._requeue(item)
            self.dispatch()

    def _count_refusal(self, item: Item, error: ServerRefused) -> None:
        """Requests are validated before they get here, so a refused one is retried up to MAX_REFUSALS times."""
        count = self._refusals[_id(item)] = self._refusals.get(_id(item), 0) + 1
        if count >= MAX_REFUSALS:
            self.results.put(EngineError(f"request {_id(item)}: servers refused it {count} times; last error: {error}"))

    def _fail(self, item: Item) -> None:
        """End a request that is blamed for the deaths of servers."""
        deaths = self._quarantine.deaths(_id(item))
        reason = f"{deaths} servers died while it ran on them, the last one with nothing else on it"
        self.results.put(Failed(id=_id(item), error=EngineError(f"request {_id(item)}: {reason}")))
        self.cancel([_id(item)])  # it may be waiting, or running on another server

    def _forget(self, id: Hashable) -> None:
        self._items.pop(id, None)
        self._refusals.pop(id, None)
        self._quarantine.forget(id)

    def _is_verified(self, item: Partial) -> bool:
        """Whether a verified version sampled all its tokens."""
        return (trial := self._trials.get(item)) is None or trial.passed

    def _complete(self, item: Item) -> bool:
        return isinstance(item, Partial) and item.finish(self._ends) is not None

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _min_version(item: Item) -> int:
    return item.request.min_version if isinstance(item, Partial) else 0


def _id(item: Item) -> Hashable:
    return item.request.id if isinstance(item, Partial) else item.id
