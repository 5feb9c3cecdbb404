"""Logs who joins and leaves, by comparing the members before and after the core has handled events."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sgpo_async.hub import events as ev
from sgpo_async.hub.core import HubCore
from sgpo_async.logs import fields
from sgpo_async.wire import records as wire

log = logging.getLogger(__name__)


class Announcer:
    """Follows the members of one core; those that it has at the start are not announced."""

    def __init__(self, core: HubCore) -> None:
        self._core = core
        self._actors = self._names()
        self._ranks = set(core.learner_ranks.ranks)
        self._counts = self._counted()
        self._away: set[bytes] = set()  # actors that have lost their session and may return
        self._reasons: dict[bytes, str] = {}  # why a member leaves, as far as it or its weight sender has said so

    def look(self, events: Iterable[ev.Event]) -> None:
        """Log what these events, which the core has just handled, have changed."""
        for event in events:
            self._hear(event)
        if self._counted() != self._counts:
            self._counts = self._counted()
            self._announce_actors()
        if self._core.learner_ranks.ranks.keys() != self._ranks:
            self._announce_ranks()

    def ended(self, reason: str) -> None:
        """Log the end of the run."""
        step, steps = self._core.training.step, self._core.run.steps
        values = fields(event="ended", reason=reason, step=step, steps=steps)
        log.info("the run has ended at step %d of %d: %s", step, steps, reason, extra=values)

    def _hear(self, event: ev.Event) -> None:
        match event:
            case ev.Received(member, wire.Goodbye(reason=reason)):
                self._reasons[member] = reason
            case ev.Disconnected(member):
                self._reasons.setdefault(member, "its connection was closed")
            case ev.SenderDown(member, reason):
                self._reasons[member] = reason
                if member in self._core.actors:
                    self._away.add(member)
                    log.info("%s has lost its session: %s", self._core.actors[member].name, reason)
            case ev.SenderUp(member) if member in self._away and member in self._core.actors:
                self._away.discard(member)
                log.info("%s is back", self._core.actors[member].name)

    def _announce_actors(self) -> None:
        before, self._actors = self._actors, self._names()
        for member in before.keys() - self._actors.keys():
            reason = self._reasons.pop(member, "") or "the hub has not heard from it in time"
            self._away.discard(member)
            self._announce("left", before[member], f"has left: {reason}")
        for member in self._actors.keys() - before.keys():
            self._announce("joined", self._actors[member], "has joined")

    def _announce(self, event: str, name: str, what: str) -> None:
        count = len(self._actors)
        log.info("%s %s; actors: %d", name, what, count, extra=fields(event=event, actor=name, actors=count))

    def _announce_ranks(self) -> None:
        ranks, before = self._core.learner_ranks, self._ranks
        self._ranks = set(ranks.ranks)
        for rank in sorted(before - self._ranks):
            log.info("learner rank %d has left", rank, extra=fields(event="left", learner_rank=rank))
        if ranks.complete:
            values = fields(event="joined", learner_ranks=ranks.size)
            log.info("the learner has joined with %d rank%s", ranks.size, "s" * (ranks.size > 1), extra=values)

    def _names(self) -> dict[bytes, str]:
        return {member: actor.name for member, actor in self._core.actors.items()}

    def _counted(self) -> tuple[int, int]:
        """Return two numbers that change whenever an actor joins or leaves."""
        return self._core.actors.joined, self._core.actors.left
