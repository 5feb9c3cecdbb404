"""Where each actor gets its weights from, so that the hub sends few copies however many actors there are.

    hub ──▶ actor ──▶ actor        over Torch RPC; each source serves at most `fanout` of them
             │ store
             └──▶ actor            on the same machine: it reads the other one's store

An actor that serves others starts a weight sender for each of them when the hub says so (OpenSender), and reports where
it listens (SenderUp). It can pass a version on while it still receives it, so the time until all actors have a version
hardly grows with their number.

Every route leads to the hub: an actor never gets its weights from those that get theirs from it. When a source is lost,
the actors behind it say Hello again and get another one; they go on with the buckets that they have. Those that do not
notice it, because the store of a process that hangs stays where it is, are told by the hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sgpo_async.hub.actors import FROM_HUB, Actor, Actors, Route
from sgpo_async.hub.events import CloseSender, Effect, OpenSender, Send, SenderUp
from sgpo_async.wire import records as wire

OPEN_S = 60.0  # how long an actor may take to start a weight sender for another one, which gives up after two minutes


@dataclass
class WeightRoutes:
    """Chooses, opens and closes the routes of these actors.

    Args:
        actors: all actors of the run.
        run_id: for their Welcome.
        fanout: how many weight senders a source may have; 0: every actor gets the weights from the hub.
        shared: whether actors may read the store of another one on their machine.
        folder: URL of the folder with the weights of this run, which no other run writes to; "" without one.
    """

    actors: Actors
    run_id: str
    fanout: int
    shared: bool
    folder: str = ""
    opened: int = 0  # weight senders that actors were asked for; their ids

    def open(self, actor: Actor, *, now: float, direct: bool = False, lost: Route | None = None) -> list[Effect]:
        """Choose a route for an actor without one; `direct`: from the hub; `lost`: the one that it could not keep.

        A folder and a shared store can be used at once, so the actor is welcomed. Otherwise SenderUp or SenderDown
        follows, as an event or as a message; see `ready`.
        """
        if actor.road == "folder":
            return [self._welcome(actor, now=now, folder=self.folder)]
        if not direct and self.shared and (leader := self._leader(actor, lost)):
            actor.route = Route(leader.member, shared=True)
            return [self._welcome(actor, now=now, store=leader.store)]
        source = None if direct else self._source(actor)
        if source is None:
            actor.route = FROM_HUB
            return [OpenSender(actor.member, actor.name, actor.road)]
        self.opened += 1
        actor.route = Route(source.member, sender=self.opened)
        return [Send(source.member, wire.OpenSender(sender=self.opened, name=actor.name, road=actor.road))]

    def ready(self, actor: Actor, sender: SenderUp | wire.SenderUp, *, now: float) -> Effect:
        """Welcome an actor whose weight sender is running."""
        address = {"session_host": sender.host, "session_port": sender.port, "session_secret": sender.secret}
        return self._welcome(actor, now=now, **address)

    def reopen(self, source: bytes, *, now: float) -> list[Effect]:
        """Find another route for the actors that wait until `source` has started a weight sender for them."""
        waiting = [actor for actor in self._behind(source) if not actor.welcomed and actor.return_by is None]
        return [effect for actor in waiting for effect in (*self.close(actor), *self.open(actor, now=now))]

    def replace_silent(self, actor: Actor, *, now: float) -> list[Effect]:
        """Serve an actor from the hub if the actor that was to serve it has not answered in time."""
        if not actor.route or not actor.route.source or now - actor.last_seen < OPEN_S:
            return []
        return [*self.close(actor), *self.open(actor, now=now, direct=True)]

    def close(self, actor: Actor) -> list[Effect]:
        """End an actor's route."""
        route, actor.route = actor.route, None
        if route is None or not route.source:
            return [CloseSender(actor.member)]
        if route.shared or route.source not in self.actors:
            return []
        return [Send(route.source, wire.CloseSender(sender=route.sender))]

    def served_by(self, source: bytes, sender: int) -> Actor | None:
        """The actor for which `source` has started this weight sender; None if it has another route by now."""
        return next((actor for actor in self._behind(source) if actor.route == Route(source, sender)), None)

    def depending_on(self, source: bytes) -> list[Actor]:
        """The actors that have their weights from `source`."""
        return [actor for actor in self._behind(source) if actor.welcomed]

    def _welcome(self, actor: Actor, *, now: float, **contact: Any) -> Send:
        actor.welcomed, actor.last_seen = True, now
        return Send(actor.member, wire.Welcome(run_id=self.run_id, source=self.actors.source_of(actor), **contact))

    def _behind(self, source: bytes) -> Iterator[Actor]:
        """The actors whose next hop is `source` (b"": the hub)."""
        return (actor for actor in self.actors.values() if actor.route is not None and actor.route.source == source)

    def _leader(self, actor: Actor, lost: Route | None) -> Actor | None:
        """Another actor of this machine that keeps a store of its own, which others may read.

        An actor on which others depend keeps its own store up to date, also when it joins again. An actor that has read
        a store until now does not read it again: if its owner was killed, the hub may hear of that later.
        """
        if not actor.machine or any(self._behind(actor.member)):
            return None
        return next(
            (
                other
                for other in self.actors.values()
                if other is not actor
                and Route(other.member, shared=True) != lost
                and other.machine == actor.machine
                and other.store
                and other.return_by is None
                and other.route is not None
                and not other.route.shared
            ),
            None,
        )

    def _source(self, actor: Actor) -> Actor | None:
        """The actor that shall serve this one, as near to the hub as possible; None: the hub itself."""
        if not self.fanout or self._served(b"") < self.fanout:
            return None
        hops = {
            other.member: found
            for other in self.actors.values()
            if other.serves
            and self._served(other.member) < self.fanout
            and (found := self._hops(other, without=actor)) is not None
        }
        nearest = min(hops, key=lambda member: (hops[member], self._served(member)), default=None)
        return None if nearest is None else self.actors[nearest]

    def _served(self, source: bytes) -> int:
        """How many weight senders this source has for actors that are there.

        That of an actor whose connection is lost ends, or is replaced when the actor returns.
        """
        return sum(actor.return_by is None and not actor.route.shared for actor in self._behind(source) if actor.route)

    def _hops(self, actor: Actor, *, without: Actor) -> int | None:
        """Number of hops from the hub to an actor with a store of its own; None if its route is broken or by `without`.

        It need not have joined its session yet: who comes after it waits for it, as when all actors start at once.
        """
        hops, at = 0, actor
        while at is not without and at.return_by is None and at.route is not None and not at.route.shared:
            hops += 1
            if not at.route.source:
                return hops
            if at.route.source not in self.actors:
                return None
            at = self.actors[at.route.source]
        return None
