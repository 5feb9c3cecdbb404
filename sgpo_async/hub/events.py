"""What goes into the hub's core (events) and what comes out (effects).

    sockets, clock, link processes ── event ──▶ HubCore.handle ── effects ──▶ sockets, link processes

The core does no I/O: whoever calls it turns effects into deeds, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgpo_async.wire.records import Message


@dataclass(frozen=True)
class Received:
    """A message of a member, or of somebody who is not one."""

    member: bytes
    message: Message


@dataclass(frozen=True)
class Rejected:
    """Something arrived that is not a message."""

    member: bytes
    reason: str


@dataclass(frozen=True)
class SenderUp:
    """The link process of this actor waits for it at `host`:`port`."""

    member: bytes
    host: str
    port: int


@dataclass(frozen=True)
class SenderDown:
    """The link process of this actor ended: its session is over."""

    member: bytes
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time passes."""


@dataclass(frozen=True)
class Interrupted:
    """Somebody wants the hub to end now."""

    reason: str


Event = Received | Rejected | SenderUp | SenderDown | Tick | Interrupted


@dataclass(frozen=True)
class Send:
    """Send `message` to `member`."""

    member: bytes
    message: Message


@dataclass(frozen=True)
class OpenSender:
    """Start a link process for this actor; SenderUp or SenderDown follows."""

    member: bytes
    name: str


@dataclass(frozen=True)
class CloseSender:
    """Stop this actor's link process, if it has one; no SenderDown follows."""

    member: bytes


@dataclass(frozen=True)
class Shutdown:
    """The hub's work is done. The last effect there is."""

    reason: str


Effect = Send | OpenSender | CloseSender | Shutdown
