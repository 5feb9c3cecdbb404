"""What both transports (ZeroMQ and memory) offer, and the limits that they share.

A transport carries lists of frames and knows nothing of messages. No call blocks longer than the time it is
given; a send never blocks: False says that the frames were not taken, and the caller decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Frames = list[bytes]

HIGH_WATER = 1000  # messages queued per peer and direction
BATCH = 256  # messages that one poll hands out at most


class RouterEnd(Protocol):
    """The hub's end: many members, each known by its identity."""

    address: str  # where members connect to
    max_bytes: int  # of one message

    def poll(self, timeout_s: float) -> list[tuple[bytes, Frames]]:
        """What has arrived, as (member, frames); waits until something has, at most `timeout_s`."""
        ...

    def send(self, member: bytes, frames: Sequence[bytes]) -> bool:
        """Queue frames for a member; False if it is not connected or does not read."""
        ...

    def close(self, linger_s: float = 0.0) -> None:
        """Let queued frames leave for at most `linger_s`, then close."""
        ...


class DealerEnd(Protocol):
    """A member's end: one hub, found again by itself after a loss."""

    max_bytes: int
    connections: int  # how often the hub has been reached; grows with every reconnection

    def poll(self, timeout_s: float) -> list[Frames]:
        """What has arrived; waits until something has, at most `timeout_s`."""
        ...

    def send(self, frames: Sequence[bytes]) -> bool:
        """Queue frames for the hub, reachable just now or not; False if they were not taken."""
        ...

    def close(self, linger_s: float = 0.0) -> None:
        """Let queued frames leave for at most `linger_s`, then close."""
        ...
