"""The actors that are here: what they hold, what they can take, how busy they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sgpo_async.wire.records import Heartbeat


@dataclass
class Meter:
    """Rates of one actor, from the differences of the counters in its heartbeats."""

    last: Heartbeat | None = None
    tokens_per_s: float = 0.0
    idle: float | None = None  # share of time in which the engine had nothing to do

    def read(self, heartbeat: Heartbeat) -> tuple[float, float]:
        """Take in the next heartbeat; return busy and wall seconds since the one before."""
        before, self.last = self.last, heartbeat
        if before is None or heartbeat.wall_s <= before.wall_s:
            return 0.0, 0.0
        wall = heartbeat.wall_s - before.wall_s
        busy = min(max(heartbeat.busy_s - before.busy_s, 0.0), wall)
        self.tokens_per_s = max(heartbeat.tokens - before.tokens, 0) / wall
        self.idle = 1 - busy / wall
        return busy, wall


@dataclass(kw_only=True)
class Actor:
    """One actor."""

    member: bytes
    name: str
    seen: float  # when it last gave a sign of life
    tokenizer: str = ""  # fingerprint
    welcomed: bool = False  # its link stands
    state: str = "joining"
    version: int = -1  # that its engine serves; -1: none
    credit: int = 0  # leases it can still take
    meter: Meter = field(default_factory=Meter)

    def plain(self, *, version: int, leases: int) -> dict[str, Any]:
        """Its state, as plain data, when the newest version is `version`."""
        heartbeat = self.meter.last or Heartbeat()
        return {
            "name": self.name,
            "state": self.state,
            "version": self.version,
            "running": heartbeat.running,
            "tokens": heartbeat.tokens,
            "tokens_per_s": self.meter.tokens_per_s,
            "idle": self.meter.idle,
            "leases": leases,
            "lag": version - self.version if self.version >= 0 else None,
        }


class Actors(dict[bytes, Actor]):
    """Living actors by member, in the order in which they came."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = self.left = 0
        self.busy_s = self.wall_s = 0.0  # of all engines, over the life of the hub

    def join(self, member: bytes, name: str, *, now: float, tokenizer: str = "") -> None:
        """A new actor."""
        self[member] = Actor(member=member, name=name, seen=now, tokenizer=tokenizer)
        self.joined += 1

    def leave(self, member: bytes) -> None:
        """This actor is gone."""
        del self[member]
        self.left += 1

    def silent_since(self, moment: float) -> list[Actor]:
        """Actors without a sign of life since `moment`. One that joins waits for the hub, not the hub for it."""
        return [actor for actor in self.values() if actor.welcomed and actor.seen < moment]

    def pick(self, min_version: int) -> Actor | None:
        """Of those that hold `min_version` or newer, the one with most credit left; the eldest of equals."""
        able = [actor for actor in self.values() if actor.credit > 0 and actor.version >= min_version]
        return max(able, key=lambda actor: actor.credit, default=None)

    def read(self, actor: Actor, heartbeat: Heartbeat) -> None:
        """Take in an actor's heartbeat."""
        actor.state = heartbeat.state
        busy, wall = actor.meter.read(heartbeat)
        self.busy_s += busy
        self.wall_s += wall

    @property
    def idle(self) -> float | None:
        """Share of engine time without work, over the life of the hub."""
        return 1 - self.busy_s / self.wall_s if self.wall_s else None
