"""Which messages the hub reads: of a key that it knows, under an identity of that key, and not too many of a member.

admits(member, key, size)      for each message, before it is decoded
look()                         every LOOK_S: which keys are in the folder now
expelled() ─▶ who may not go on, and why: a revoked key, a member that sends too much
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sgpo_async.transport.base import owner_of
from sgpo_async.transport.keys import SHARED, actor_keys, missing_key, public_key, read_actor_keys

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the folder of keys
RATE_S = 10.0  # time over which the rate of a member is averaged
COUNTED_BYTES = 2**20  # a message counts once, and once more for each of these
PARTING_S = 1.0  # for the last message to a member that may not go on, before its connection ends


class KnownKeys:
    """The public keys of the learner and the actors in `folder`. Raises HubError if there are none."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._learner = public_key(folder, "learner")
        self._files = self._listing()
        self._actors = actor_keys(folder)
        self._shut_out: set[bytes] = set()
        if not self._actors:
            raise missing_key(self._folder / f"{SHARED}.key")

    def __contains__(self, key: bytes) -> bool:
        return key == self._learner or (key in self._actors and key not in self._shut_out)

    def shut_out(self, key: bytes) -> str:
        """Know the key of this node no more until the hub starts again; return its name.

        "" if it is not known, or more than one node has it: one of them could so have all shut out.
        """
        name = self._actors.get(key, SHARED) if key in self else SHARED
        if name == SHARED:
            return ""
        self._shut_out.add(key)
        return name

    def look(self) -> dict[bytes, str]:
        """Read the folder again if it has changed; return the names of the actors' keys that are not there any more."""
        try:
            files = self._listing()
            if files == self._files or "server.key_secret" not in files:  # a disk that is away revokes nothing
                return {}
            before, (found, unreadable) = self._actors, read_actor_keys(self._folder)
            kept = {key: name for key, name in before.items() if name in unreadable}  # it revokes nothing either
            self._files, self._actors = files, kept | found
        except OSError as error:
            log.debug("hub.keys: cannot look at %s: %s", self._folder, error)
            return {}
        return {key: name for key, name in before.items() if key not in self._actors}

    def _listing(self) -> dict[str, tuple[int, int]]:
        found = ((path.name, path.stat()) for path in self._folder.glob("*.key*"))
        return {name: (status.st_mtime_ns, status.st_size) for name, status in found}


@dataclass
class _Sending:
    """How much a member may send at once; it grows with time, up to RATE_S times its rate."""

    left: float
    at: float
    expelled_at: float | None = None


class Admission:
    """Judges messages by the keys of their connections and their number; the credentials provider of CURVE handshakes.

    Args:
        keys: None: everybody may connect, under an identity that names no key.
        max_per_s: of a member, on average over RATE_S; 0: any number.
    """

    def __init__(self, keys: KnownKeys | None, max_per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._max_per_s, self._clock = keys, max_per_s, clock
        self._looked_at = clock()
        self._members: dict[bytes, _Sending] = {}
        self._revoked: dict[bytes, float] = {}  # when which key was
        self._expelled: list[tuple[bytes, str]] = []

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a connection with this key may be made. Called by the authenticator's thread."""
        return self._keys is None or key in self._keys

    def admits(self, member: bytes, key: bytes, size: int) -> bool:
        """Whether the hub reads this message of `size` bytes, which came under this identity and with this key."""
        if self._keys is not None:
            if not self._owns(self._keys, member, key):
                return False
        elif owner_of(member):  # what no key has authenticated would count as another owner each time
            return False
        # Identities that begin with 0 are ZeroMQ's. It gives them to the rest of the messages of a connection that
        # another one with the same identity has replaced, so the limit would begin anew.
        return not self._max_per_s or (not member.startswith(b"\0") and self._counts(member, size))

    def _owns(self, keys: KnownKeys, member: bytes, key: bytes) -> bool:
        """Whether the identity belongs to this key, which is known. A node that uses one of another key is shut out."""
        owner = owner_of(member)
        if owner != key and owner in keys and (name := keys.shut_out(key)):
            self._expelled.append((key, f"the key {name} was used with the identity of a member with another key"))
        return owner == key and key in keys

    def _counts(self, member: bytes, size: int) -> bool:
        now, most = self._clock(), RATE_S * self._max_per_s
        sending = self._members.setdefault(member, _Sending(most, now))
        sending.left = min(most, sending.left + (now - sending.at) * self._max_per_s) - 1 - size // COUNTED_BYTES
        sending.at = now
        if sending.expelled_at is None and sending.left < 0:
            sending.expelled_at = now
            reason = f"more than hub.max_messages_per_s={self._max_per_s} messages a second for {RATE_S:g} s"
            self._expelled.append((member, reason))
        return sending.expelled_at is None

    def is_hopeless(self, member: bytes) -> bool:
        """Whether the connection of a message that was not admitted shall end."""
        expelled_at = self._revoked.get(owner_of(member))
        if (sending := self._members.get(member)) and sending.expelled_at is not None:
            expelled_at = sending.expelled_at
        return expelled_at is None or self._clock() - expelled_at > PARTING_S

    def look(self) -> None:
        """If it is time: notice which keys were revoked, and forget members that have sent nothing for RATE_S."""
        now = self._clock()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        for member in [member for member, sending in self._members.items() if now - sending.at > RATE_S]:
            del self._members[member]
        for key, name in (self._keys.look() if self._keys else {}).items():
            self._revoked[key] = now
            self._expelled.append((key, f"the key {name} was revoked"))

    def expelled(self) -> list[tuple[bytes, str]]:
        """Who may not go on since the last call, and why: one member, or all with this public key."""
        expelled, self._expelled = self._expelled, []
        return expelled
