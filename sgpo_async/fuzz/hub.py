"""Changed messages at a hub, from strangers and from a member, while the others train.

    nodes, learner ── valid messages ────────────▶ the hub's real core, in a simulated run
    node-0, strangers ── the same, changed ── decode ▶

The hub may end the membership of whoever sends something wrong. It must go on, its ledger must agree after each
message, the learner must get all its steps, and what the hub keeps of the attacks must not grow with their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from sgpo_async.errors import WireError
from sgpo_async.fuzz.corpus import SMALL, messages
from sgpo_async.fuzz.mutate import changed_frames
from sgpo_async.fuzz.outcome import Record, refusal
from sgpo_async.hub.authority import Authority
from sgpo_async.hub.events import Event, Forbidden, OpenSender, Received, Rejected, Send, Shutdown
from sgpo_async.simulation.world import World
from sgpo_async.transport.mailbox import unpack
from sgpo_async.wire import encode
from sgpo_async.wire import records as wire

MAX_BYTES = 2**22
RETURN_S = 0.5  # after which the insider comes back when the hub has ended its membership
AGAIN = 6  # attacks at each valid message
SENT = 0.6  # share of them that change this message, so that tasks and attempts are those of now
STRANGERS = tuple(f"stranger-{number}".encode() for number in range(4))
INSIDER = b"node-0"
MOST_REASONS = 100  # by which the hub counts what it rejects
MOST_STATUS = 30_000  # characters
AUTHORITY = Authority(token="known to the learner only")


def attacks(seed: int, inputs: int, record: Record) -> None:
    """Attack one simulated run after the other, with `inputs` changed messages in all."""
    corpus, number = [encode(message) for message in messages()], 0

    def one(world: Attacked, sent: wire.Message) -> None:
        nonlocal number
        if number < inputs:
            random = Random(f"{seed} {number}")
            number += 1
            frames = encode(sent) if random.random() < SENT else random.choice(corpus)
            record(world.attack(changed_frames(frames, random), random))

    while number < inputs:
        world = Attacked(number, one)
        world.run()
        world.look()


Attack = Callable[["Attacked", wire.Message], None]  # at a message that a member has just sent


class Attacked(World):
    """A simulated run that is attacked at each message of its members."""

    def __init__(self, seed: int, attack: Attack) -> None:
        self._attack = attack
        self._names = itertools.count()
        super().__init__(replace(SMALL, nodes=4, steps=12, seed=seed))

    def attack(self, frames: list[bytes], random: Random) -> str:
        """Give the hub one changed message of a stranger or of the insider; return how it was taken."""
        sender = random.choice((INSIDER, *STRANGERS))
        message = unpack(frames, MAX_BYTES)
        event: Event
        if isinstance(message, WireError):
            event = Rejected(sender, str(message))
            how = refusal(message)
        elif objection := AUTHORITY.objection(message, key=b"", from_rank=False):
            event, how = Forbidden(sender, objection), "forbidden"
        else:
            event, how = Received(sender, message), "given to the core"
        before = self.core.rejected.total()
        self._deliver(event)
        return "rejected by the core" if how == "given to the core" and self.core.rejected.total() > before else how

    def look(self) -> None:
        """Assert what must be so at the end of a run."""
        assert len(self.core.rejected) < MOST_REASONS, f"reasons must not hold values, got {self.core.rejected}"
        assert len(str(self.core.status())) < MOST_STATUS, "the status must not grow with the number of attacks"

    def _handle(self, event: Any) -> None:
        self._deliver(event)
        if isinstance(event, Received):
            for _ in range(AGAIN):
                self._attack(self, event.message)

    def _deliver(self, event: Any) -> None:
        for effect in self.core.handle(event, self.now):
            match effect:
                case Send(member, message) if self._is_for_the_simulation(member, message):
                    self._inbox.append((member, message))
                case Send(member, wire.Refused()) if member == INSIDER:
                    self._at(self.now + RETURN_S, self._return)
                case OpenSender(member) if member in self.nodes:
                    self._at(self.now, partial(self._open, member))
                case Shutdown(reason):
                    raise AssertionError(f"a stranger has ended the run: {reason}")
        self.core.check_ledgers()

    def _return(self) -> None:
        """The insider comes back under another name: that of a quarantined actor is refused for good."""
        if INSIDER not in self.core.actors:
            self._deliver(Received(INSIDER, wire.Hello(role="actor", name=f"insider-{next(self._names)}")))
            self._settle(INSIDER)

    def _is_for_the_simulation(self, member: bytes, message: wire.Message) -> bool:
        """Strangers do not listen, and the insider goes on as if it was not refused."""
        return member not in STRANGERS and not (member == INSIDER and isinstance(message, wire.Refused))
