"""The secret of a session: whoever knows it is the peer for whom this session was opened.

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


def authenticate(secret: bytes, purpose: bytes, data: bytes) -> bytes:
    """Put the authentication tag of `data` before it. The data is not encrypted."""
    return tag(secret, purpose, data) + data


def verify(secret: bytes, purpose: bytes, message: bytes) -> bytes:
    """The data of a message of `authenticate`. Raises Forged if its tag is of another secret, purpose or data."""
    found, data = message[:TAG_BYTES], message[TAG_BYTES:]
    if not hmac.compare_digest(found, tag(secret, purpose, data)):
        raise Forged("it is not authenticated with the session's secret")
    return data


def tag(secret: bytes, purpose: bytes, data: bytes) -> bytes:
    """The authentication tag (MAC) of `data`: its keyed hash (BLAKE2b, RFC 7693).

    It includes the purpose, so that a message cannot be used in place of one with another purpose.
    """
    # The length makes it unambiguous where the purpose ends.
    return blake2b(len(purpose).to_bytes(4, "little") + purpose + data, key=secret, digest_size=TAG_BYTES).digest()
