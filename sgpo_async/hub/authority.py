"""Who may act as the learner: only it can begin and end the run, commit steps, restore state and publish weights.

    hub with keys       who holds the learner's secret key, also for each later message of a rank
    hub without keys    who knows the token in the run's folder, hub.token, which only the hub's user can read;
                        such a hub serves this machine only

A hub without keys lets everybody on its machine join as an actor. Everybody who can connect may ask for status and
settings.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

from sgpo_async.wire import records as wire

OF_LEARNERS = (
    wire.BatchRequest,
    wire.Commit,
    wire.Published,
    wire.Evaluate,
    wire.SnapshotRequest,
    wire.Restore,
    wire.Finish,
)


@dataclass(frozen=True)
class Authority:
    """What a learner has to prove: that it has `key` (public, Z85), or without keys that it knows `token`."""

    key: bytes = b""
    token: str = field(default="", repr=False)
    token_file: str = ""  # for the error

    def objection(self, message: wire.Message, *, key: bytes, from_rank: bool) -> str:
        """Why the sender of `message` may not send it, with the remedy; "" if it may.

        Args:
            key: the public key with which its connection was authenticated.
            from_rank: whether it comes under the identity of a connected rank of the learner.
        """
        hello = message if isinstance(message, wire.Hello) and message.role == "learner" else None
        if self.key and (hello or from_rank or isinstance(message, OF_LEARNERS)) and key != self.key:
            return (
                f"{type(message).__name__} of a learner needs the learner's key: give the learner a hub.keys with "
                "learner.key_secret of this hub"
            )
        if not self.key and hello and not hmac.compare_digest(hello.token.encode(), self.token.encode()):
            return (
                f"a learner without keys must know the token in {self.token_file}: start it as the hub's user with the "
                "hub's out= and name=, or make keys with 'sgpo-async keys DIR'"
            )
        return ""
