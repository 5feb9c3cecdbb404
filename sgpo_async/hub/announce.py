"""Logs who joins and leaves, by comparing the members before and after the core has handled events."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sgpo_async.hub import events as ev
from sgpo_async.hub.core import HubCore
from sgpo_async.logs import fields, one_line

log = logging.getLogger(__name__)


class Announcer:
    """Follows the members of one core; those that it has at the start are not announced."""

    def __init__(self, core: HubCore) -> None:
        self._core = core
        self._actors = self._names()
        self._ranks = set(core.learner_ranks.ranks)
        self._counts = self._counted()
        self._away: set[bytes] = set()  # actors that have lost their session and may return

    def look(self, events: Iterable[ev.Event], effects: Iterable[ev.Effect]) -> None:
        """Log what these events, which the core has just handled with these effects, have changed."""
        for event in events:
            self._hear(event)
        if self._counted() != self._counts:
            self._counts = self._counted()
            self._announce_actors({effect.member: effect.reason for effect in effects if isinstance(effect, ev.Left)})
        if self._core.learner_ranks.ranks.keys() != self._ranks:
            self._announce_ranks()

    def ended(self, reason: str) -> None:
        """Log the end of the run."""
        step, steps = self._core.training.step, self._core.run.steps
        values = fields(event="ended", reason=reason, step=step, steps=steps)
        log.info("the run has ended at step %d of %d: %s", step, steps, reason, extra=values)

    def _hear(self, event: ev.Event) -> None:
        match event:
            case ev.SenderDown(member, reason) if member in self._core.actors:
                self._away.add(member)
                log.info("%s has lost its session: %s", self._core.actors[member].name, one_line(reason))
            case ev.SenderUp(member) if member in self._away and member in self._core.actors:
                self._away.discard(member)
                log.info("%s is back", self._core.actors[member].name)

    def _announce_actors(self, reasons: dict[bytes, str]) -> None:
        before, self._actors = self._actors, self._names()
        for member in before.keys() - self._actors.keys():
            self._away.discard(member)
            self._announce("left", before[member], f"has left: {reasons[member]}")
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
