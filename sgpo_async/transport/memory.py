"""In-memory Router and Dealer: the same Protocols without sockets, safe between threads.

    MemoryDealer.send ─▶ MemoryRouter's inbox ─▶ poll()
    MemoryDealer's inbox ◀─ MemoryRouter.send

One condition variable protects all inboxes of a router; `poll` waits on it and `send` notifies it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TypeVar

from sgpo_async.transport.base import BATCH, HIGH_WATER, Frames

MAX_BYTES = 64 * 2**20

T = TypeVar("T")


class MemoryRouter:
    """Implements `RouterEnd`; `dealer(identity)` adds a member."""

    def __init__(self, *, max_bytes: int = MAX_BYTES) -> None:
        self.address = "memory"
        self.max_bytes = max_bytes
        self.changed = threading.Condition()
        self.inbox: deque[tuple[bytes, Frames, bytes]] = deque()
        self.dealers: dict[bytes, MemoryDealer] = {}
        self.ended: list[bytes] = []
        self.unwanted: list[tuple[bytes, str]] = []  # what `expelled` returns next

    def dealer(self, identity: bytes, key: bytes = b"") -> MemoryDealer:
        """Connect a new member, which has authenticated itself with `key`.

        A member with the same identity is disconnected, as with ROUTER_HANDOVER.
        """
        with self.changed:
            self.dealers[identity] = MemoryDealer(self, identity, key)
            return self.dealers[identity]

    def poll(self, timeout_s: float) -> list[tuple[bytes, Frames, bytes]]:
        return take(self.inbox, self.changed, timeout_s)

    def gone(self) -> list[bytes]:
        with self.changed:
            ended, self.ended = self.ended, []
        return ended

    def expelled(self) -> list[tuple[bytes, str]]:
        unwanted, self.unwanted = self.unwanted, []
        return unwanted

    def send(self, member: bytes, frames: Sequence[bytes]) -> bool:
        dealer = self.dealers.get(member)
        return dealer is not None and put(dealer.inbox, list(frames), self.changed)

    def close(self, linger_s: float = 0.0) -> None:  # noqa: ARG002
        with self.changed:
            self.dealers.clear()


class MemoryDealer:
    """Implements `DealerEnd`; `MemoryRouter.dealer` creates it."""

    def __init__(self, router: MemoryRouter, identity: bytes, key: bytes = b"") -> None:
        self.identity, self.key, self.address = identity, key, router.address
        self.max_bytes = router.max_bytes
        self.connections, self.connected = 1, True
        self.inbox: deque[Frames] = deque()
        self._router = router

    def poll(self, timeout_s: float) -> list[Frames]:
        return take(self.inbox, self._router.changed, timeout_s)

    def send(self, frames: Sequence[bytes]) -> bool:
        if self._router.dealers.get(self.identity) is not self:
            return False
        return put(self._router.inbox, (self.identity, list(frames), self.key), self._router.changed)

    def check_refused(self) -> None:
        """Nothing refuses a connection in memory."""

    def close(self, linger_s: float = 0.0) -> None:  # noqa: ARG002
        with self._router.changed:
            if self._router.dealers.get(self.identity) is self:
                del self._router.dealers[self.identity]
                self._router.ended.append(self.identity)


def memory_pair(identity: bytes = b"member") -> tuple[MemoryRouter, MemoryDealer]:
    """A router and one dealer connected to it."""
    router = MemoryRouter()
    return router, router.dealer(identity)


def take(inbox: deque[T], changed: threading.Condition, timeout_s: float) -> list[T]:
    """Remove and return up to `BATCH` items; waits at most `timeout_s` for the first one."""
    with changed:
        changed.wait_for(lambda: inbox, timeout_s)
        return [inbox.popleft() for _ in range(min(len(inbox), BATCH))]


def put(inbox: deque[T], item: T, changed: threading.Condition) -> bool:
    """Append an item; False if the inbox is full."""
    with changed:
        if len(inbox) >= HIGH_WATER:
            return False
        inbox.append(item)
        changed.notify_all()
        return True
