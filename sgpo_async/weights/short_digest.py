"""The part of a digest that travels with every span of a rollout: 64 bits are enough against accidents."""

from __future__ import annotations


def short_digest(digest: str) -> int:
    """The first 8 bytes of a digest as a signed 64-bit integer."""
    return int.from_bytes(bytes.fromhex(digest[:16]), "big", signed=True)


def digest_text(short: int) -> str:
    """A short digest for people: the first 8 digits of the digest."""
    return f"{short % 2**64:016x}"[:8]
