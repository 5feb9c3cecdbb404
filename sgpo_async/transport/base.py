"""The interface of both transports (ZeroMQ and memory), and their common limits.

A transport carries lists of frames and does not decode them. No call blocks longer than its timeout. `send` never
blocks: it returns False if it could not queue the frames, and the caller decides what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Frames = list[bytes]

HIGH_WATER = 10_000  # most messages in the queue of one peer and direction; a member that reads none is removed earlier
BATCH = 256  # most messages that one poll returns
RANDOM_BYTES = 32  # of an identity, at its end; with keys the public key of its owner (Z85) comes before them


def owner_of(member: bytes) -> bytes:
    """The public key to which the identity of a member belongs; b"" without keys."""
    return member[:-RANDOM_BYTES]


class RouterEnd(Protocol):
    """The hub's endpoint: many members, each with an identity."""

    address: str  # address to which members connect
    max_bytes: int  # largest size of one message

    def poll(self, timeout_s: float) -> list[tuple[bytes, Frames, bytes]]:
        """The messages that have arrived, as (member, frames, public key); waits at most `timeout_s` for the first one.

        The key (Z85) is that with which the connection was authenticated; it is empty without keys.
        """
        ...

    def gone(self) -> list[bytes]:
        """The members whose connection has ended since the last call, and that have sent nothing over another one."""
        ...

    def expelled(self) -> list[tuple[bytes, str]]:
        """Who may not go on since the last call, and why: one member, or all with this public key."""
        ...

    def send(self, member: bytes, frames: Sequence[bytes]) -> bool:
        """Queue frames for a member; False if it is not connected or its queue is full."""
        ...

    def close(self, linger_s: float = 0.0) -> None:
        """Wait at most `linger_s` until the queued frames are sent, then close."""
        ...


class DealerEnd(Protocol):
    """A member's endpoint: one hub, to which it reconnects by itself."""

    address: str  # of the hub
    max_bytes: int
    connections: int  # how often it has connected to the hub; grows with every reconnection
    connected: bool  # as of the last `poll`

    def poll(self, timeout_s: float) -> list[Frames]:
        """The messages that have arrived; waits at most `timeout_s` for the first one."""
        ...

    def send(self, frames: Sequence[bytes]) -> bool:
        """Queue frames for the hub, whether it is connected at the moment or not; False if the queue is full."""
        ...

    def check_refused(self) -> None:
        """Raise HubError if the hub has been refusing the connection for a while, for example because of its keys."""
        ...

    def close(self, linger_s: float = 0.0) -> None:
        """Wait at most `linger_s` until the queued frames are sent, then close."""
        ...
