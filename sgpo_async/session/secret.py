"""The secret of a session: who shows that it knows it is the peer for whom this session was opened.

    handle of the weight sender, new_secret ─┬─ standard input ─▶ its process
                                             └─ Welcome (or Published) ─▶ handle of the receiver ─▶ its process

It never stands on a command line, which all users of a machine can read, nor in a log.
"""

from __future__ import annotations

import hmac
import secrets
from hashlib import blake2b

SECRET_BYTES = 32
TAG_BYTES = 32


class Forged(Exception):
    """These bytes were not made by a process that knows the session's secret."""


def new_secret() -> bytes:
    """A fresh secret for one session."""
    return secrets.token_bytes(SECRET_BYTES)


def seal(secret: bytes, purpose: bytes, data: bytes) -> bytes:
    """`data` with a keyed hash (BLAKE2b, RFC 7693) before it, also of `purpose`: no message passes for another."""
    return tag(secret, purpose, data) + data


def unseal(secret: bytes, purpose: bytes, sealed: bytes) -> bytes:
    """The data of `seal`. Raises Forged if it was not sealed with this secret for this purpose."""
    found, data = sealed[:TAG_BYTES], sealed[TAG_BYTES:]
    if not hmac.compare_digest(found, tag(secret, purpose, data)):
        raise Forged("it does not prove the session's secret")
    return data


def tag(secret: bytes, purpose: bytes, data: bytes) -> bytes:
    """The keyed hash of `data` for this purpose."""
    # The length makes it unambiguous where the purpose ends.
    return blake2b(len(purpose).to_bytes(4, "little") + purpose + data, key=secret, digest_size=TAG_BYTES).digest()
