"""The hub's I/O: one loop in one thread that feeds events to the core and carries out its effects.

    members ── ZeroMQ ──▶ mailbox.receive ─────┐                        ┌──▶ mailbox.send ── ZeroMQ ──▶ members
    weight senders ── stdout ──▶ sender.poll ──┼─▶ core.handle ─▶ effects ──▶ start or stop a weight sender
    clock ── every TICK_S ──▶ Tick ────────────┤                        └──▶ Shutdown: the loop ends
    signals ── interrupted() ──▶ Interrupted ──┘

The loop only ever waits for a message, for at most TICK_S. Sending never blocks. A weight sender takes a moment to end,
so worker threads stop it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from sgpo_async.errors import DeadlineExceeded, WireError
from sgpo_async.hub import events as ev
from sgpo_async.hub.core import HubCore
from sgpo_async.session import SenderDown, SenderEvent, SenderUp
from sgpo_async.transport import RouterMailbox
from sgpo_async.wire import records as wire

log = logging.getLogger(__name__)

TICK_S = 0.1
SENDER_STOP_S = 1.0  # timeout for the end of a weight sender after it was killed
LINGER_S = 0.3  # time for the last messages to be delivered


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

    def __init__(self, core: HubCore, *, mailbox: RouterMailbox, spawn_sender: Callable[[str], SenderHandle]) -> None:
        """`spawn_sender(name)` starts the weight sender of the actor `name`."""
        self._core, self._mailbox, self._spawn_sender = core, mailbox, spawn_sender
        self._senders: dict[bytes, SenderHandle] = {}
        self._stop_threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="stop-sender")
        self._stopping: list[Future[None]] = []
        self._shutdown_reason = ""  # empty while the hub runs

    def run(self, *, interrupted: Callable[[], str]) -> str:
        """Run until the core shuts down; return the reason.

        `interrupted()` returns the reason to stop early, or an empty string.
        """
        next_tick = 0.0
        try:
            while not self._shutdown_reason:
                for member, message in self._mailbox.receive(TICK_S):
                    self._handle(_to_event(member, message))
                self._poll_senders()
                if reason := interrupted():
                    self._handle(ev.Interrupted(reason))
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_S
                    self._handle(ev.Tick())
            return self._shutdown_reason
        finally:
            self._close()

    def _handle(self, event: ev.Event) -> None:
        for effect in self._core.handle(event, time.monotonic()):
            self._carry_out(effect)

    def _carry_out(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Send(member, message):
                self._send(member, message)
            case ev.OpenSender(member, name):
                self._open_sender(member, name)
            case ev.CloseSender(member):
                self._stop_sender(member)
            case ev.Shutdown(reason):
                self._shutdown_reason = reason

    def _send(self, member: bytes, message: wire.Message) -> None:
        """Send a message. An unreachable member is not an error here: the core removes members that stay silent."""
        try:
            self._mailbox.send(member, message)
        except WireError as error:  # the message is too large; tell the member, which may be waiting for it
            self._mailbox.send(member, wire.Refused(reason=str(error)))

    def _poll_senders(self) -> None:
        for member, sender in list(self._senders.items()):
            for event in sender.poll():
                match event:
                    case SenderUp(port=port):
                        self._handle(ev.SenderUp(member, sender.host, port))
                    case SenderDown(reason=reason):
                        self._handle(ev.SenderDown(member, reason))

    def _open_sender(self, member: bytes, name: str) -> None:
        """Start a weight sender. If that fails (too many processes, no memory), only this actor's session ends."""
        try:
            self._senders[member] = self._spawn_sender(name)
        except OSError as error:
            self._handle(ev.SenderDown(member, f"the hub cannot start a weight sender: {error}"))

    def _stop_sender(self, member: bytes) -> None:
        sender = self._senders.pop(member, None)
        if sender:
            self._stopping.append(self._stop_threads.submit(sender.stop, SENDER_STOP_S))
        for stop in [stop for stop in self._stopping if stop.done()]:
            self._stopping.remove(stop)
            _log_timeout(stop)

    def _close(self) -> None:
        for member in list(self._senders):
            self._stop_sender(member)
        self._mailbox.close(LINGER_S)
        self._stop_threads.shutdown()
        for stop in self._stopping:
            _log_timeout(stop)


def _log_timeout(stop: Future[None]) -> None:
    """Log if a weight sender did not end in time. The run continues: on a busy machine a killed process ends late."""
    try:
        stop.result()
    except DeadlineExceeded as error:
        log.warning("%s", error)


def _to_event(member: bytes, message: wire.Message | WireError) -> ev.Event:
    if isinstance(message, WireError):
        return ev.Rejected(member, str(message))
    return ev.Received(member, message)
