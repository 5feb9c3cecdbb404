"""The connected actors: which weight version each one serves, how many leases it can take, how busy it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sgpo_async.weights.short_digest import digest_text
from sgpo_async.wire.records import Heartbeat, Hello, Road, State

SHORTEST_S = 1e-3  # between two heartbeats, over which a speed is computed; over less it might be infinite


@dataclass
class Meter:
    """Throughput and idle share of one actor, computed from the differences between consecutive heartbeats."""

    last: Heartbeat | None = None
    tokens_per_s: float = 0.0
    idle: float | None = None  # share of time in which the engine had no requests, in [0, 1]

    @property
    def speed(self) -> float | None:
        """Tokens per second of one sequence; None if none is running or the speed is not known yet."""
        running = self.last.running if self.last else 0
        return self.tokens_per_s / running if running and self.idle is not None else None

    def update(self, heartbeat: Heartbeat) -> tuple[float, float, float]:
        """Process the next heartbeat; return the seconds since the previous one: busy, waiting for weights, and all.

        They are 0 for the first heartbeat, within SHORTEST_S, and after the actor's counters have started again.
        """
        previous, self.last = self.last, heartbeat
        if previous is None or heartbeat.wall_s - previous.wall_s < SHORTEST_S:
            return 0.0, 0.0, 0.0
        wall = heartbeat.wall_s - previous.wall_s
        busy = min(max(heartbeat.busy_s - previous.busy_s, 0.0), wall)
        weights = min(max(heartbeat.weights_s - previous.weights_s, 0.0), wall - busy)
        self.tokens_per_s = max(heartbeat.tokens - previous.tokens, 0) / wall
        self.idle = 1 - busy / wall
        return busy, weights, wall


@dataclass(frozen=True)
class Route:
    """Where an actor gets its weights from (`hub.weight_routes`)."""

    source: bytes = b""  # member of the actor that serves it; b"": the hub
    sender: int = 0  # id of the weight sender that this actor has started for it; 0: none
    shared: bool = False  # it reads the source's store, on the same machine


FROM_HUB = Route()


@dataclass(kw_only=True)
class Actor:
    """One connected actor."""

    member: bytes
    name: str
    last_seen: float  # time of its last message
    tokenizer: str = ""  # fingerprint of its tokenizer
    machine: str = ""  # that it is on; "": it shares no store
    store: str = ""  # path of its own weight store, for other actors of this machine
    road: Road = "rpc"
    serves: bool = False  # whether other actors may get the weights from it
    route: Route | None = None  # None: not chosen yet
    welcomed: bool = False  # its route is open and the hub has sent it a Welcome
    return_by: float | None = None  # after a lost connection: the time by which it must have sent a Hello
    away: str = ""  # ... and why it is away
    invalid: int = 0  # number of invalid messages and rollouts
    state: State = "joining"
    version: int = -1  # weight version that its engine serves; -1: none
    digest: int = 0  # short digest of the weights that its engine serves, as it says; 0: none
    credit: int = 0  # number of leases it can still take
    meter: Meter = field(default_factory=Meter)

    def plain(self, *, version: int, leases: int, source: str) -> dict[str, Any]:
        """The actor's state as plain data. Its lag is computed from `version`, the newest weight version.

        `source` is the name of the actor that it has its weights from.
        """
        heartbeat = self.meter.last or Heartbeat()
        return {
            "name": self.name,
            "state": self.state,
            "source": source,
            "version": self.version,
            "digest": digest_text(self.digest) if self.version >= 0 else "",
            "running": heartbeat.running,
            "tokens": heartbeat.tokens,
            "tokens_per_s": self.meter.tokens_per_s,
            "idle": self.meter.idle,
            "leases": leases,
            "lag": version - self.version if self.version >= 0 else None,
        }


class Actors(dict[bytes, Actor]):
    """The connected actors by member, in the order in which they joined."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = self.left = 0  # numbers of actors since the hub started
        self.busy_s = self.weights_s = self.wall_s = 0.0  # summed over all engines since the hub started

    def join(self, member: bytes, hello: Hello, *, now: float) -> Actor:
        """Add a new actor, or an actor that returns after a lost connection."""
        known = self.get(member)
        actor = Actor(
            member=member,
            name=hello.name,
            last_seen=now,
            tokenizer=hello.tokenizer,
            machine=hello.machine,
            store=hello.store,
            road=hello.road,
            serves=hello.serves,
        )
        if known:
            actor.invalid, actor.meter = known.invalid, known.meter
        self[member] = actor
        self.joined += known is None
        return actor

    def leave(self, member: bytes) -> None:
        """Remove this actor."""
        del self[member]
        self.left += 1

    def source_of(self, actor: Actor) -> str:
        """The name of the actor from which this one has its weights; "" for the hub, or if its source is lost."""
        source = self.get(actor.route.source) if actor.route else None
        return source.name if source else ""

    def silent_since(self, moment: float) -> list[Actor]:
        """Actors that have sent nothing since `moment`.

        An actor that has not been welcomed yet is never one of them, because it is waiting for the hub.
        """
        return [actor for actor in self.values() if actor.welcomed and actor.last_seen < moment]

    def overdue(self, now: float) -> list[Actor]:
        """Actors that lost their connection and have not come back in time."""
        return [actor for actor in self.values() if actor.return_by is not None and actor.return_by < now]

    def pick(self, min_version: int, *, other_than: bytes = b"") -> Actor | None:
        """The actor with the most credit among those that serve `min_version` or newer; None if there is none.

        Of several with equal credit, it is the one that joined first. It is never the member `other_than`.
        """
        eligible = [actor for actor in self.values() if actor.credit > 0 and actor.version >= min_version]
        eligible = [actor for actor in eligible if actor.member != other_than]
        return max(eligible, key=lambda actor: actor.credit, default=None)

    def record_heartbeat(self, actor: Actor, heartbeat: Heartbeat) -> None:
        """Update the actor's state and meter, and the totals over all engines, from its heartbeat."""
        actor.state = heartbeat.state
        busy, weights, wall = actor.meter.update(heartbeat)
        self.busy_s += busy
        self.weights_s += weights
        self.wall_s += wall

    @property
    def idle(self) -> float | None:
        """Share of engine time without requests since the hub started; None before it is known."""
        return 1 - self.busy_s / self.wall_s if self.wall_s else None

    @property
    def waits(self) -> dict[str, float]:
        """That share by cause: an engine waits for weights, or for leases; empty before it is known."""
        if not self.wall_s:
            return {}
        weights = self.weights_s / self.wall_s
        return {"weights": weights, "leases": 1 - self.busy_s / self.wall_s - weights}
