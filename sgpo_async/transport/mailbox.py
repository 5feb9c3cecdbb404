"""Messages instead of frames: what cannot be read is counted, never raised.

A message that is too large for the other side is an error of the sender's, and raised there.
"""

from __future__ import annotations

from sgpo_async.errors import WireError
from sgpo_async.transport.base import DealerEnd, Frames, RouterEnd
from sgpo_async.wire import decode, encode
from sgpo_async.wire.records import Message


class Mailbox:
    """A member's typed end."""

    def __init__(self, dealer: DealerEnd) -> None:
        self.dealer = dealer
        self.rejected = 0
        self.last_rejection: WireError | None = None

    def send(self, message: Message) -> bool:
        """Queue a message for the hub; False if the queue is full.

        Raises:
            WireError: the message does not fit its record, or `max_bytes`.
        """
        return self.dealer.send(pack(message, self.dealer.max_bytes))

    def receive(self, timeout_s: float) -> list[Message]:
        """The messages that have arrived; waits until something has, at most `timeout_s`."""
        read = [unpack(frames, self.dealer.max_bytes) for frames in self.dealer.poll(timeout_s)]
        for message in read:
            if isinstance(message, WireError):
                self.rejected += 1
                self.last_rejection = message
        return [message for message in read if not isinstance(message, WireError)]

    def close(self, linger_s: float = 0.0) -> None:
        """Let queued messages leave for at most `linger_s`, then close."""
        self.dealer.close(linger_s)


class RouterMailbox:
    """The hub's typed end."""

    def __init__(self, router: RouterEnd) -> None:
        self.router = router
        self.rejected = 0

    def send(self, member: bytes, message: Message) -> bool:
        """Queue a message for a member; False if it is not connected or does not read.

        Raises:
            WireError: the message does not fit its record, or `max_bytes`.
        """
        return self.router.send(member, pack(message, self.router.max_bytes))

    def receive(self, timeout_s: float) -> list[tuple[bytes, Message | WireError]]:
        """What has arrived, by member: a message, or why it cannot be read."""
        polled = self.router.poll(timeout_s)
        read = [(member, unpack(frames, self.router.max_bytes)) for member, frames in polled]
        self.rejected += sum(isinstance(message, WireError) for _, message in read)
        return read

    def close(self, linger_s: float = 0.0) -> None:
        """Let queued messages leave for at most `linger_s`, then close."""
        self.router.close(linger_s)


def pack(message: Message, max_bytes: int) -> Frames:
    """Encode a message that the other side will take."""
    frames = encode(message)
    size = sum(map(len, frames))
    if size > max_bytes:
        raise WireError(
            f"{type(message).__name__} of {size} bytes is larger than {max_bytes}; raise hub.max_message_mb"
        )
    return frames


def unpack(frames: Frames, max_bytes: int) -> Message | WireError:
    """The message, or the reason why there is none."""
    try:
        return decode(frames, max_bytes=max_bytes)
    except WireError as error:
        return error
