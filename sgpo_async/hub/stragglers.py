"""Which lease of a slow actor is moved to an actor that has nothing to do.

A lease is moved with its tokens. Giving it to two actors at once would favour short rollouts: see docs/durability.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from sgpo_async.hub.actors import Actor
from sgpo_async.hub.leases import RunningLease

KNOWN = 8  # completed leases that are needed to call another one late
LATE = 3.0  # times the median duration of a lease
SLOW = 0.5  # times the median speed of the actors
SILENT_HEARTBEATS = 5.0


def late_lease(
    leases: Iterable[RunningLease],
    actors: Mapping[bytes, Actor],
    *,
    durations: Sequence[float],
    now: float,
    heartbeat_s: float,
) -> RunningLease | None:
    """The oldest lease that takes much longer than usual and whose actor is slow or silent; None if there is none.

    If a lease takes long only because its rollouts are long, its actor is as fast as the others and keeps it.

    Args:
        leases: the running leases of one purpose.
        actors: the connected actors.
        durations: seconds that the last completed leases took.
        now: the time of the core's clock.
        heartbeat_s: time between two heartbeats of an actor.
    """
    if len(durations) < KNOWN:
        return None
    latest = now - LATE * median(durations)
    slow = _slow_actors(actors, now=now, heartbeat_s=heartbeat_s)
    if not slow:
        return None  # without looking at the leases: on large clusters there are thousands
    late = [lease for lease in leases if lease.issued < latest and lease.member in slow]
    return min(late, key=lambda lease: lease.issued, default=None)


def _slow_actors(actors: Mapping[bytes, Actor], *, now: float, heartbeat_s: float) -> set[bytes]:
    speeds = {member: speed for member, actor in actors.items() if (speed := actor.meter.speed) is not None}
    limit = SLOW * median(speeds.values()) if speeds else 0.0
    silent = {member for member, actor in actors.items() if now - actor.last_seen > SILENT_HEARTBEATS * heartbeat_s}
    return silent | {member for member, speed in speeds.items() if speed < limit}
