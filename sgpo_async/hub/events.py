"""The input (events) and the output (effects) of the hub's core.

    sockets, clock, weight senders ── event ──▶ HubCore.handle ── effects ──▶ sockets, weight senders

The core does no I/O. The caller of `HubCore.handle` carries out the effects in the order in which they are returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sgpo_async.wire.records import Message, Road, SettingsRequest, StatusRequest


@dataclass(frozen=True)
class Received:
    """A message arrived, from a member or from a process that has not joined."""

    member: bytes
    message: Message

    @property
    def is_question(self) -> bool:
        """Whether it is only answered: it is not in the journal, so it must not change the state."""
        return isinstance(self.message, StatusRequest | SettingsRequest)


@dataclass(frozen=True)
class Rejected:
    """Bytes arrived that cannot be decoded as a message."""

    member: bytes
    reason: str
    other_release: bool = False  # because their sender uses another protocol version


@dataclass(frozen=True)
class Forbidden:
    """A message arrived whose sender may not send it (`hub.authority`); `reason` is one line with a remedy."""

    member: bytes
    reason: str


@dataclass(frozen=True)
class SenderUp:
    """The weight sender of this actor is running and waits at `host`:`port` for who knows its secret."""

    member: bytes
    host: str
    port: int
    secret: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class SenderDown:
    """The weight sender of this actor ended, and with it the actor's session."""

    member: bytes
    reason: str


@dataclass(frozen=True)
class Disconnected:
    """The connection of this member has ended: it is dead, or it connects again and says Hello."""

    member: bytes


@dataclass(frozen=True)
class Expelled:
    """A member, or all with a public key, may not go on: the key was revoked, or it sends too much (`reason`)."""

    member: bytes
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed; the loop sends this event at regular intervals."""


@dataclass(frozen=True)
class HubRestarted:
    """A new hub process has taken over the state; all connections and weight senders of the old one are gone."""


@dataclass(frozen=True)
class Interrupted:
    """The hub has been asked to stop, for example by a signal; `at_once`: without waiting for the learner."""

    reason: str
    at_once: bool = False


Event = (
    Received
    | Rejected
    | Forbidden
    | SenderUp
    | SenderDown
    | Disconnected
    | Expelled
    | Tick
    | HubRestarted
    | Interrupted
)


@dataclass(frozen=True)
class Send:
    """Send `message` to `member`."""

    member: bytes
    message: Message


@dataclass(frozen=True)
class OpenSender:
    """Start a weight sender for this actor; the event SenderUp or SenderDown follows."""

    member: bytes
    name: str
    road: Road = "rpc"


@dataclass(frozen=True)
class CloseSender:
    """Stop the weight sender of this actor, if it has one; no SenderDown follows."""

    member: bytes


@dataclass(frozen=True)
class UseStore:
    """The learner publishes into the weight store at `path`. If it is another file than the hub's, use it.

    A SenderDown follows for each weight sender that has the other file open.
    """

    path: str


@dataclass(frozen=True)
class Left:
    """This actor is no member any more; `reason` is for the log."""

    member: bytes
    reason: str


@dataclass(frozen=True)
class Warn:
    """Log a line that the user should see."""

    text: str


@dataclass(frozen=True)
class Shutdown:
    """Stop the hub. This is always the last effect."""

    reason: str


Effect = Send | OpenSender | CloseSender | UseStore | Left | Warn | Shutdown
