"""Endpoints that send and receive messages instead of frames.

A message that cannot be read does not raise: the hub is told of it, and a member passes over it. A message that is too
large for the receiver raises at the sender.
"""

from __future__ import annotations

from typing import NamedTuple

from sgpo_async.errors import ProtocolMismatch, WireError
from sgpo_async.transport.base import DealerEnd, Frames, RouterEnd
from sgpo_async.wire import decode, encode
from sgpo_async.wire.records import Message


class Mailbox:
    """A member's mailbox."""

    def __init__(self, dealer: DealerEnd) -> None:
        self.dealer = dealer
        self.mismatch = ""  # why the hub's last message cannot be read, if it is of another release

    @property
    def connections(self) -> int:
        """How often this side has connected to the hub; messages sent before may be lost."""
        return self.dealer.connections

    def send(self, message: Message) -> bool:
        """Queue a message for the hub; False if the queue is full.

        Raises:
            WireError: the message is invalid or larger than `max_bytes`.
        """
        return self.dealer.send(pack(message, self.dealer.max_bytes))

    def receive(self, timeout_s: float) -> list[Message]:
        """The messages that have arrived and can be read; waits at most `timeout_s` for the first one."""
        read = [unpack(frames, self.dealer.max_bytes) for frames in self.dealer.poll(timeout_s)]
        for message in read:
            self.mismatch = str(message) if isinstance(message, ProtocolMismatch) else ""
        return [message for message in read if not isinstance(message, WireError)]

    def close(self, linger_s: float = 0.0) -> None:
        """Wait at most `linger_s` until the queued messages are sent, then close."""
        self.dealer.close(linger_s)


class Mail(NamedTuple):
    """A message that has arrived at the hub."""

    member: bytes
    message: Message | WireError
    frames: Frames
    key: bytes  # public key with which its connection was authenticated; empty without keys


class RouterMailbox:
    """The hub's mailbox."""

    def __init__(self, router: RouterEnd) -> None:
        self.router = router

    def send(self, member: bytes, message: Message) -> bool:
        """Queue a message for a member; False if it is not connected or its queue is full.

        Raises:
            WireError: the message is invalid or larger than `max_bytes`.
        """
        return self.router.send(member, pack(message, self.router.max_bytes))

    def receive(self, timeout_s: float) -> list[tuple[bytes, Message | WireError]]:
        """What has arrived, as (member, message), or the error instead of a message that cannot be read."""
        return [(mail.member, mail.message) for mail in self.receive_mail(timeout_s)]

    def receive_mail(self, timeout_s: float) -> list[Mail]:
        """Like `receive`, with all that is known of each message."""
        polled = self.router.poll(timeout_s)
        return [Mail(member, unpack(frames, self.router.max_bytes), frames, key) for member, frames, key in polled]

    def gone(self) -> list[bytes]:
        """The members whose connection has ended since the last call; they may come back."""
        return self.router.gone()

    def expelled(self) -> list[tuple[bytes, str]]:
        """Who may not go on since the last call, and why: one member, or all with this public key."""
        return self.router.expelled()

    def close(self, linger_s: float = 0.0) -> None:
        """Wait at most `linger_s` until the queued messages are sent, then close."""
        self.router.close(linger_s)


def pack(message: Message, max_bytes: int) -> Frames:
    """Encode a message. Raises WireError if it is invalid or larger than the receiver accepts."""
    frames = encode(message)
    size = sum(map(len, frames))
    if size > max_bytes:
        raise WireError(
            f"{type(message).__name__} of {size} bytes is larger than {max_bytes}; raise hub.max_message_mb"
        )
    return frames


def unpack(frames: Frames, max_bytes: int) -> Message | WireError:
    """The message, or the error that says why it cannot be read."""
    try:
        return decode(frames, max_bytes=max_bytes)
    except WireError as error:
        return error
