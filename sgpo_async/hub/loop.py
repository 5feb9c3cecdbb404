"""Thin I/O around the core: one loop in one thread.

    members ── ZeroMQ ──▶ mailbox.receive ──┐                        ┌──▶ mailbox.send ── ZeroMQ ──▶ members
    link processes ── stdout ──▶ link.poll ─┼─▶ core.handle ─▶ effects ──▶ spawn a link, stop a link
    clock ── every TICK_S ──▶ Tick ─────────┤                        └──▶ Shutdown: the loop ends
    signals ── interrupted() ──▶ Interrupted┘

The loop waits for a message, TICK_S at most, and for nothing else: sends never block, and links are stopped by worker
threads, because a link process takes a moment to end.
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
LINK_STOP_S = 1.0  # a link process that has not ended by then is killed
LINGER_S = 0.3  # for the last messages to leave


class SenderHandle(Protocol):
    """What is needed of `session.WeightSender`."""

    host: str

    def poll(self) -> Sequence[SenderEvent]:
        """Events since the last call."""
        ...

    def stop(self, deadline_s: float) -> None:
        """End the process."""
        ...


class Loop:
    """Carries events into a core and its effects out, until it shuts down."""

    def __init__(self, core: HubCore, *, mailbox: RouterMailbox, spawn_sender: Callable[[str], SenderHandle]) -> None:
        """`spawn_sender(name)` starts the link process of the actor `name`."""
        self._core, self._mailbox, self._spawn_sender = core, mailbox, spawn_sender
        self._links: dict[bytes, SenderHandle] = {}
        self._reaper = ThreadPoolExecutor(max_workers=16, thread_name_prefix="stop-link")
        self._stopping: list[Future[None]] = []
        self._ended = ""  # the reason, once it is over

    def run(self, *, interrupted: Callable[[], str]) -> str:
        """Serve until the core shuts down; return its reason. `interrupted()` says why to end early, or nothing."""
        tick = 0.0
        try:
            while not self._ended:
                for member, message in self._mailbox.receive(TICK_S):
                    self._handle(_received(member, message))
                self._poll_links()
                if reason := interrupted():
                    self._handle(ev.Interrupted(reason))
                if time.monotonic() >= tick:
                    tick = time.monotonic() + TICK_S
                    self._handle(ev.Tick())
            return self._ended
        finally:
            self._close()

    def _handle(self, event: ev.Event) -> None:
        for effect in self._core.handle(event, time.monotonic()):
            self._do(effect)

    def _do(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Send(member, message):
                self._send(member, message)
            case ev.OpenSender(member, name):
                self._open_link(member, name)
            case ev.CloseSender(member):
                self._stop_link(member)
            case ev.Shutdown(reason):
                self._ended = reason

    def _send(self, member: bytes, message: wire.Message) -> None:
        """A member that cannot be reached is not an error here: its silence is noticed by the core."""
        try:
            self._mailbox.send(member, message)
        except WireError as error:  # too large: whoever waits for it had better know
            self._mailbox.send(member, wire.Refused(reason=str(error)))

    def _poll_links(self) -> None:
        for member, link in list(self._links.items()):
            for event in link.poll():
                match event:
                    case SenderUp(port=port):
                        self._handle(ev.SenderUp(member, link.host, port))
                    case SenderDown(reason=reason):
                        self._handle(ev.SenderDown(member, reason))

    def _open_link(self, member: bytes, name: str) -> None:
        """A link that cannot be started (too many processes, no memory) costs one session, not the hub."""
        try:
            self._links[member] = self._spawn_sender(name)
        except OSError as error:
            self._handle(ev.SenderDown(member, f"the hub cannot start a link process: {error}"))

    def _stop_link(self, member: bytes) -> None:
        link = self._links.pop(member, None)
        if link:
            self._stopping.append(self._reaper.submit(link.stop, LINK_STOP_S))
        for stop in [stop for stop in self._stopping if stop.done()]:
            self._stopping.remove(stop)
            _tell_of(stop)

    def _close(self) -> None:
        for member in list(self._links):
            self._stop_link(member)
        self._mailbox.close(LINGER_S)
        self._reaper.shutdown()
        for stop in self._stopping:
            _tell_of(stop)


def _tell_of(stop: Future[None]) -> None:
    """A link that is slow to die (the machine is busy) costs a line, not the run: it has had its SIGKILL."""
    try:
        stop.result()
    except DeadlineExceeded as error:
        log.warning("%s", error)


def _received(member: bytes, message: wire.Message | WireError) -> ev.Event:
    if isinstance(message, WireError):
        return ev.Rejected(member, str(message))
    return ev.Received(member, message)
