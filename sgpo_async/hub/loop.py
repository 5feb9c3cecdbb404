"""The hub's I/O: one loop in one thread that feeds events to the core and carries out its effects.

    members ── ZeroMQ ──▶ mailbox.receive, gone┐  journal                      ┌▶ mailbox.send ── ZeroMQ ──▶ members
    weight senders ── stdout ──▶ sender.poll ──┼──▶ and ──▶ effects ─ commit ─▶┼▶ start or stop a weight sender
    clock ── every TICK_S ──▶ Tick ────────────┤  core                         └▶ Shutdown: the loop ends
    signals ── interrupted() ──▶ Interrupted ──┘

All events that have arrived are one group. They are written to the journal and handled, the journal is committed
once, and only then are their effects carried out. So no member has ever been told anything that a restarted hub would
not know.

The loop only ever waits for a message, for at most TICK_S, and for the disk. Sending never blocks. A weight sender
takes a moment to end, so worker threads stop it.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from sgpo_async.errors import ProtocolMismatch, WireError
from sgpo_async.hub import events as ev
from sgpo_async.hub.announce import Announcer
from sgpo_async.hub.authority import Authority
from sgpo_async.hub.core import HubCore
from sgpo_async.hub.dashboard import DashboardProcess
from sgpo_async.hub.journal import Journal
from sgpo_async.hub.learner_weights import LearnerWeights
from sgpo_async.hub.recovery import save, write_event
from sgpo_async.session import SenderDown, SenderEvent, SenderUp
from sgpo_async.session.stopping import Stopping
from sgpo_async.transport import RouterMailbox
from sgpo_async.transport.base import Frames
from sgpo_async.transport.mailbox import Mail
from sgpo_async.wire import records as wire

log = logging.getLogger(__name__)

TICK_S = 0.1
YOUNG_OBJECTS = 50_000  # new objects after which Python looks for cycles
SENDER_STOP_S = 1.0  # timeout for the end of a weight sender after it was killed
COMMIT_S = 1.0  # longest time without a commit of the journal
LINGER_S = 0.3  # time for the last messages to be delivered
WATCHING_S = 5.0  # who has asked for the status so recently follows the run


class SenderHandle(Protocol):
    """The part of `session.WeightSender` that the loop uses."""

    host: str

    def poll(self) -> Sequence[SenderEvent]:
        """Events since the last call."""
        ...

    def stop(self, deadline_s: float) -> None:
        """End the process. Raises DeadlineExceeded if it has not ended after `deadline_s` seconds."""
        ...


class Loop:
    """Passes events to a core and carries out its effects until the core shuts down."""

    def __init__(  # noqa: PLR0913 (all that stands around the core)
        self,
        core: HubCore,
        *,
        mailbox: RouterMailbox,
        authority: Authority,
        spawn_sender: Callable[[str, wire.Road], SenderHandle],
        weights: LearnerWeights | None = None,
        journal: Journal | None = None,
        dashboard: DashboardProcess | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to run `core`.

        Args:
            authority: who may act as the learner.
            spawn_sender: starts the weight sender of the actor of this name, for connections by this road.
            clock: the core's.
        """
        self._core, self._mailbox, self._spawn_sender = core, mailbox, spawn_sender
        self._weights, self._journal, self._clock = weights, journal, clock
        self._authority, self._dashboard = authority, dashboard
        self._senders: dict[bytes, SenderHandle] = {}
        self._stopping = Stopping(seconds=SENDER_STOP_S, threads=16)
        self._committed_at = time.monotonic()
        self._shutdown_reason = ""  # empty while the hub runs
        self._announcer = Announcer(core)
        self._watchers: dict[bytes, float] = {}  # who has asked for the status, and when

    def run(self, *, interrupted: Callable[[], str], hurried: Callable[[], bool] = lambda: False) -> str:
        """Run until the core shuts down; return the reason.

        `interrupted()` returns the reason to stop early, or an empty string; `hurried()` whether to stop at once.
        """
        next_tick = 0.0
        try:
            while not self._shutdown_reason:
                received = self._mailbox.receive_mail(TICK_S)
                group = [found for mail in received if (found := self._event_of(mail)) is not None]
                events: list[ev.Event] = [ev.Disconnected(member) for member in self._mailbox.gone()]
                events += [ev.Expelled(who, reason) for who, reason in self._mailbox.expelled()]
                events += self._sender_events()
                events += self._weights.events() if self._weights else []
                if reason := interrupted():
                    events.append(ev.Interrupted(reason, hurried()))
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_S
                    events.append(ev.Tick())
                    if self._dashboard:
                        self._dashboard.poll()
                self._handle([*group, *((event, []) for event in events)])
            return self._shutdown_reason
        finally:
            self._close()

    def _event_of(self, mail: Mail) -> tuple[ev.Event, Frames] | None:
        """What the core is told of a message: nothing yet of weights on another machine.

        With its frames, if it is the message itself.
        """
        member, message, frames, key = mail
        if isinstance(message, WireError):
            return ev.Rejected(member, str(message), isinstance(message, ProtocolMismatch)), frames
        rank = self._core.learner_ranks.rank_of(member)
        if objection := self._authority.objection(message, key=key, from_rank=rank is not None):
            return ev.Forbidden(member, objection), []
        if not self._weights or rank != 0 or not isinstance(message, wire.Published):
            return ev.Received(member, message), frames
        told = self._weights.offered(member, message)
        return (ev.Received(member, told), frames if told is message else []) if told else None

    def restart(self) -> None:
        """Tell a recovered core that this process has taken over."""
        self._handle([(ev.HubRestarted(), [])])

    def _handle(self, group: Sequence[tuple[ev.Event, Frames]]) -> None:
        """Write events to the journal, let the core handle them, commit, and carry out the effects.

        Carrying out an effect may lead to another event (a weight sender does not start), which is handled after it.
        """
        effects: list[ev.Effect] = []
        for event, frames in group:
            now = self._clock()
            if self._journal and _changes_state(event):
                write_event(self._journal, event, at=now, frames=frames)
            effects += self._core.handle(event, now)
        if self._journal:
            self._write(self._journal, now_needed=bool(effects))
        self._announcer.look((event for event, _ in group), effects)
        for event, _ in group:
            if isinstance(event, ev.Received) and isinstance(event.message, wire.StatusRequest):
                self._watched_by(event.member, time.monotonic())
        for effect in effects:
            self._carry_out(effect)

    def _write(self, journal: Journal, *, now_needed: bool) -> None:
        """Commit at once if there are effects, otherwise every COMMIT_S: the sender of a lost event repeats it."""
        if now_needed or time.monotonic() - self._committed_at > COMMIT_S:
            journal.commit()
            self._committed_at = time.monotonic()
            if journal.save_due:
                save(self._core, journal)

    def _carry_out(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Send(member, message):
                self._send(member, message)
            case ev.OpenSender(member, name, road):
                self._open_sender(member, name, road)
            case ev.CloseSender(member):
                self._stop_sender(member)
            case ev.UseStore(path):
                if self._weights and self._weights.use(path):
                    self._handle([(ev.SenderDown(member, "another weight store"), []) for member in self._senders])
            case ev.Warn(text):
                log.warning("%s", text)
            case ev.Shutdown(reason):
                self._shutdown_reason = reason
                self._announcer.ended(reason)
                self._tell_watchers()

    def _send(self, member: bytes, message: wire.Message) -> None:
        """Send a message. An unreachable member is not an error here: the core removes members that stay silent."""
        try:
            self._mailbox.send(member, message)
        except WireError as error:  # the message is too large; tell the member, which may be waiting for it
            self._mailbox.send(member, wire.Refused(reason=str(error)))

    def _watched_by(self, member: bytes, now: float) -> None:
        """Note who asks for the status; the newest is the last. Forget who has not asked lately."""
        self._watchers.pop(member, None)
        self._watchers[member] = now
        while self._watchers[oldest := next(iter(self._watchers))] < now - WATCHING_S:
            del self._watchers[oldest]

    def _tell_watchers(self) -> None:
        """Send the last status to those who follow the run; they could not ask for it any more."""
        recent = time.monotonic() - WATCHING_S
        for member in [member for member, asked in self._watchers.items() if asked > recent]:
            self._send(member, wire.Status(status=self._core.status()))

    def _sender_events(self) -> list[ev.Event]:
        events: list[ev.Event] = []
        for member, sender in self._senders.items():
            for event in sender.poll():
                match event:
                    case SenderUp(port, secret):
                        events.append(ev.SenderUp(member, sender.host, port, secret))
                    case SenderDown(reason=reason):
                        events.append(ev.SenderDown(member, reason))
        return events

    def _open_sender(self, member: bytes, name: str, road: wire.Road) -> None:
        """Start a weight sender. If that fails (too many processes, no memory), only this actor's session ends."""
        try:
            self._senders[member] = self._spawn_sender(name, road)
        except OSError as error:
            reason = f"the hub cannot start a weight sender: {error}"
            self._handle([(ev.SenderDown(member, reason), [])])

    def _stop_sender(self, member: bytes) -> None:
        sender = self._senders.pop(member, None)
        if sender:
            self._stopping.stop(sender)

    def _close(self) -> None:
        for member in list(self._senders):
            self._stop_sender(member)
        self._mailbox.close(LINGER_S)
        self._stopping.close()


def collect_rarely() -> None:
    """Have Python look for cycles less often: the hub makes hardly any, and holds thousands of rollouts."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def _changes_state(event: ev.Event) -> bool:
    """Whether an event must be in the journal."""
    return not (isinstance(event, ev.Received) and event.is_question)
