"""A relay of messages between the members of a run and its hub, with faults on request.

    actor-0 ── DEALER ─▶ Router of link actor-0 ─▶ MessageFaults ─▶ Dealer of the same identity ──┐
    rank 0 ─── DEALER ─▶ Router of link learner ─▶ MessageFaults ─▶ Dealer of the same identity ──┼─▶ the hub's ROUTER
    rank 1 ─── DEALER ─▶                 "                                   "           ─────────┘

The hub knows every member by its own identity, as without the relay. When the hub's side of a connection ends, so does
the member's, and the other way round: neither side believes that it is connected while the other one is not.

One thread moves all messages, so a link keeps their order unless a fault changes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import zmq

from sgpo_async.chaos.schedule import ON_MESSAGES, Fault
from sgpo_async.errors import DeadlineExceeded, HubError, RunFailed
from sgpo_async.transport import Dealer, Router
from sgpo_async.transport.base import Frames

MAX_BYTES = 2**28
WAIT_MS = 20
REOPEN_S = 60.0  # to get the address again after a reset: another process may have taken it meanwhile
RETRY_S = 0.2
ORDER_S = 60.0  # for the thread to begin a fault
WITHIN_S = 15.0  # in which a fault of messages must find as many as it hits; a delay lasts as long as the fault says

RoutedMessage = tuple[bytes, Frames]
"""A message, with the identity of the member that sends or receives it."""


def truncated(frames: Frames, rng: Random) -> Frames:
    """Without its last frame, or without the end of its only one."""
    return frames[:-1] if len(frames) > 1 else [frames[0][: rng.randrange(len(frames[0]))]]


def corrupted(frames: Frames, rng: Random) -> Frames:
    """With one byte changed."""
    place = rng.randrange(sum(map(len, frames)))
    changed = list(frames)
    for number, frame in enumerate(frames):
        if place < len(frame):
            other = frame[place] ^ rng.randrange(1, 256)
            changed[number] = frame[:place] + bytes([other]) + frame[place + 1 :]
            break
        place -= len(frame)
    return changed


@dataclass
class MessageFaults:
    """The faults in one direction of one link."""

    faults: list[tuple[Fault, float]] = field(default_factory=list)  # that have begun, with their ends
    hits: dict[int, int] = field(default_factory=dict)  # messages that each of them has hit, by number
    _delayed: list[RoutedMessage] = field(default_factory=list)
    _overtaken: list[tuple[RoutedMessage, float]] = field(default_factory=list)  # with the latest time of delivery

    def begin(self, fault: Fault, now: float) -> None:
        """From now on, hit the next messages."""
        self.faults.append((fault, now + (fault.seconds if fault.action == "delay" else WITHIN_S)))
        self.hits[fault.number] = 0

    def let_through(self, messages: list[RoutedMessage], now: float) -> list[RoutedMessage]:
        """What is delivered now of these messages and of those that were held back."""
        passed: list[RoutedMessage] = []
        for message in messages:
            passed += self._apply(message, now)
        passed += [message for message, until in self._overtaken if until <= now]
        self._overtaken = [(message, until) for message, until in self._overtaken if until > now]
        self.faults = [(fault, until) for fault, until in self.faults if until > now]
        if any(fault.action == "delay" for fault, _ in self.faults):
            self._delayed += passed
            return []
        delayed, self._delayed = self._delayed, []
        return delayed + passed

    def _apply(self, message: RoutedMessage, now: float) -> list[RoutedMessage]:
        faults = (fault for fault, until in self.faults if until > now and self.hits[fault.number] < fault.messages)
        fault = next(faults, None)
        if fault is None:
            return self._before_overtaken([message])
        self.hits[fault.number] += 1
        member, frames = message
        rng = Random(fault.seed + self.hits[fault.number])
        match fault.action:
            case "duplicate":
                return self._before_overtaken([message, message])
            case "truncate":
                return self._before_overtaken([(member, truncated(frames, rng))])
            case "corrupt":
                return self._before_overtaken([(member, corrupted(frames, rng))])
            case "reorder":
                self._overtaken.append((message, now + fault.seconds))
                return []
        return self._before_overtaken([message])  # a delay, which counts what it hits

    def _before_overtaken(self, messages: list[RoutedMessage]) -> list[RoutedMessage]:
        """These, and after them those that they have overtaken."""
        overtaken, self._overtaken = [message for message, _ in self._overtaken], []
        return messages + overtaken


class Link:
    """The way of one started process, and of its children, to the hub. Only the relay's thread uses it."""

    def __init__(self, name: str, hub: str) -> None:
        self.name, self._hub = name, hub
        self._router: Router | None = Router("tcp://127.0.0.1:0", max_bytes=MAX_BYTES)
        self.address = self._router.address
        self._dealers: dict[bytes, Dealer] = {}
        self._opens_at = self._open_by = 0.0  # after a reset
        self.to_hub, self.from_hub = MessageFaults(), MessageFaults()

    @property
    def sockets(self) -> list[zmq.Socket]:
        """What to wait for."""
        return [end.socket for end in (self._router, *self._dealers.values()) if end]

    def move(self, now: float) -> None:
        """Deliver what has arrived on both sides. Raises HubError if the address is still taken after REOPEN_S."""
        if self._router is None:
            if now < self._opens_at:
                return
            try:
                self._router = Router(self.address, max_bytes=MAX_BYTES)
            except HubError:
                if now > self._open_by:
                    raise
                self._opens_at = now + RETRY_S
                return
        arrived = [(member, frames) for member, frames, _ in self._router.poll(0)]
        for member in self._router.gone():
            if member in self._dealers:
                self._dealers.pop(member).close(linger_s=0.2)
        for member, _ in arrived:
            if member not in self._dealers:
                self._dealers[member] = Dealer(self._hub, identity=member, max_bytes=MAX_BYTES)
        for member, frames in self.to_hub.let_through(arrived, now):
            if member in self._dealers:
                self._dealers[member].send(frames)
        answers = [(member, frames) for member, dealer in self._dealers.items() for frames in dealer.poll(0)]
        if any(dealer.connections > 1 for dealer in self._dealers.values()):
            self.reset(now)  # the hub's side was lost, and is back
            return
        for member, frames in self.from_hub.let_through(answers, now):
            self._router.send(member, frames)

    def reset(self, now: float, *, seconds: float = 0.0) -> None:
        """End all connections, and accept new ones after `seconds`."""
        self.close()
        self._opens_at = now + seconds
        self._open_by = self._opens_at + REOPEN_S

    def close(self) -> None:
        """End all connections."""
        for end in (self._router, *self._dealers.values()):
            if end:
                end.close()
        self._router = None
        self._dealers.clear()


class Relay:
    """The links of one run, moved by a thread until `close`; `failure` is the error that has ended the thread."""

    def __init__(self, hub: str) -> None:
        """`hub` is the hub's address, which stays the same when the hub is started again."""
        self._hub = hub
        self._links: dict[str, Link] = {}
        self._orders: list[Callable[[float], None]] = []  # for the thread
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="relay", daemon=True)
        self._thread.start()

    def address(self, name: str) -> str:
        """The address of the link `name`, which is made when it is first asked for."""
        with self._lock:
            if name not in self._links:
                self._links[name] = Link(name, self._hub)
            return self._links[name].address

    def inject(self, fault: Fault, name: str) -> None:
        """Have a fault of messages or of connections happen to the link `name`; it has begun at the return.

        Raises RunFailed if the relay has failed, DeadlineExceeded if it does not begin the fault within ORDER_S.
        """
        link = self._links[name]
        direction = link.to_hub if fault.to_hub else link.from_hub
        seconds = fault.seconds if fault.action == "cut off" else 0.0
        begun = threading.Event()

        def order(now: float) -> None:
            if fault.action in ON_MESSAGES:
                direction.begin(fault, now)
            else:
                link.reset(now, seconds=seconds)
            begun.set()

        with self._lock:
            self._orders.append(order)
        deadline = time.monotonic() + ORDER_S
        while not begun.wait(RETRY_S):
            self.check()
            if time.monotonic() > deadline:
                raise DeadlineExceeded("the relay", f"begin of {fault.kind}", ORDER_S)

    def check(self) -> None:
        """Raise RunFailed if an error has ended the thread."""
        if self.failure:
            raise RunFailed(f"chaos: the relay has failed: {self.failure}") from self.failure

    def hits(self, fault: Fault) -> int:
        """How many messages this fault has hit so far."""
        directions = [end for link in self._links.values() for end in (link.to_hub, link.from_hub)]
        return sum(direction.hits.get(fault.number, 0) for direction in directions)

    def close(self) -> None:
        """End the thread and all connections."""
        self._closing.set()
        self._thread.join()

    def _serve(self) -> None:
        try:
            while not self._closing.is_set():
                self._move()
        except Exception as error:  # `check` raises it in the thread of the run
            self.failure = error
        finally:
            for link in self._links.values():
                link.close()

    def _move(self) -> None:
        with self._lock:
            links, orders, self._orders = list(self._links.values()), self._orders, []
        now = time.monotonic()
        for order in orders:
            order(now)
        poller = zmq.Poller()
        for socket in (socket for link in links for socket in link.sockets):
            poller.register(socket, zmq.POLLIN)
        poller.poll(WAIT_MS)
        for link in links:
            link.move(time.monotonic())
