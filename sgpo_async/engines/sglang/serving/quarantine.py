"""Which request kills servers: deaths counted by request, and who may be served beside whom. Rules without I/O.

    a server dies ──▶ one death for everybody on it; who was on ISOLATE_AFTER servers when they died is a suspect
    a suspect     ──▶ served on a server with nothing else, one suspect in the fleet at a time
    its server dies then ──▶ it is blamed: nothing else was there

So a request that kills every server it is on costs ISOLATE_AFTER + 1 of them, and one that never kills is blamed only if
its server dies by itself while it is there alone, after two such deaths before. Company alone condemns nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

ISOLATE_AFTER = 2  # deaths after which a request is served without company


@dataclass(frozen=True, kw_only=True)
class ServerLoad:
    """One server: how many run on it, how many more it may take (0 if it takes none now), whether one is a suspect."""

    running: int
    room: int
    suspect: bool


class Quarantine:
    """Deaths of servers by the requests that were on them."""

    def __init__(self) -> None:
        self._deaths: Counter[Hashable] = Counter()

    def deaths(self, id: Hashable) -> int:
        """Servers that died while this request was on them."""
        return self._deaths[id]

    def is_suspect(self, id: Hashable) -> bool:
        """Whether it may run alone only."""
        return self._deaths[id] >= ISOLATE_AFTER

    def record_death(self, aboard: Collection[Hashable], *, others: int = 0) -> Hashable | None:
        """A server died with these requests on it; returns the one that is blamed by that, if any.

        `others` more were on it that nobody waits for any longer: they are not counted, but were company.
        """
        alone = len(aboard) == 1 and not others
        blamed = next((id for id in aboard if alone and self.is_suspect(id)), None)
        self._deaths.update(set(aboard))
        return blamed

    def forget(self, id: Hashable) -> None:
        """It is finished, or nobody waits for it any more."""
        self._deaths.pop(id, None)


def server_for_suspect(servers: Sequence[ServerLoad]) -> int | None:
    """The server for a waiting suspect: an empty one, if no other suspect runs anywhere."""
    if any(server.suspect for server in servers):
        return None
    return next((i for i, server in enumerate(servers) if server.running == 0 and server.room > 0), None)


def server_for_request(servers: Sequence[ServerLoad], *, suspect_waits: bool) -> int | None:
    """The server with most room for anybody else, but not beside a suspect.

    While a suspect waits for its turn, the emptiest server takes no newcomers, or none would ever be empty.
    """
    kept = None
    if suspect_waits and not any(server.suspect for server in servers):
        kept = min((i for i, s in enumerate(servers) if s.room > 0), key=lambda i: servers[i].running, default=None)
    free = [i for i, server in enumerate(servers) if server.room > 0 and not server.suspect and i != kept]
    return max(free, key=lambda i: servers[i].room, default=None)
