"""Finds requests that kill servers: counts server deaths per request, and isolates suspects. Rules without I/O.

    a server dies ──▶ counts one death for each request that ran on it; with ISOLATE_AFTER deaths a request is a suspect
    a suspect     ──▶ runs alone on a server; only one suspect runs in the fleet at a time
    that server dies too ──▶ the suspect is blamed, because no other request ran there

So a request that kills every server costs ISOLATE_AFTER + 1 servers. A harmless request is blamed only if a server dies
by itself while the request runs there alone, after two such deaths before. A death is never blamed on one of several
co-running requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

ISOLATE_AFTER = 2  # deaths after which a request runs alone


@dataclass(frozen=True, kw_only=True)
class ServerLoad:
    """Load of one server: running requests, free slots (0 if it takes no requests), whether one is a suspect."""

    running: int
    room: int
    suspect: bool


class Quarantine:
    """Counts, for each request, the servers that died while it ran on them."""

    def __init__(self) -> None:
        self._deaths: Counter[Hashable] = Counter()

    def deaths(self, id: Hashable) -> int:
        """How many servers died while this request ran on them."""
        return self._deaths[id]

    def is_suspect(self, id: Hashable) -> bool:
        """Whether this request may only run alone."""
        return self._deaths[id] >= ISOLATE_AFTER

    def record_death(self, in_flight: Collection[Hashable], *, others: int = 0) -> Hashable | None:
        """Record that a server died while it ran these requests; returns the request that is blamed, if any.

        `others` is the number of cancelled requests that still ran there. They get no death, but they co-ran.
        """
        alone = len(in_flight) == 1 and not others
        blamed = next((id for id in in_flight if alone and self.is_suspect(id)), None)
        self._deaths.update(set(in_flight))
        return blamed

    def forget(self, id: Hashable) -> None:
        """Drop the count of a request that is finished or cancelled."""
        self._deaths.pop(id, None)


def server_for_suspect(servers: Sequence[ServerLoad]) -> int | None:
    """Index of the server for a waiting suspect: an empty server, if no other suspect is running; else None."""
    if any(server.suspect for server in servers):
        return None
    return next((i for i, server in enumerate(servers) if server.running == 0 and server.room > 0), None)


def server_for_request(servers: Sequence[ServerLoad], *, suspect_waits: bool) -> int | None:
    """Index of the server with the most room that runs no suspect, for any other request; None if all are full.

    While a suspect waits for its turn, the server with the fewest requests is reserved: it gets no new requests, so
    that it becomes empty.
    """
    reserved = None
    if suspect_waits and not any(server.suspect for server in servers):
        reserved = min((i for i, s in enumerate(servers) if s.room > 0), key=lambda i: servers[i].running, default=None)
    free = [i for i, server in enumerate(servers) if server.room > 0 and not server.suspect and i != reserved]
    return max(free, key=lambda i: servers[i].room, default=None)
