"""The difference between two versions of a bucket, lossless and much smaller than the bucket.

A step at a small learning rate moves most bfloat16 weights by less than half of their last digit, so they keep their
bits, and most of the others move to a neighbouring number. Numbers of one sign and their bits, read as an integer, have
the same order. So the difference is taken of 16-bit words as integers: few words have one, and it is mostly 1 or -1.

    number of changed words (4 bytes) │ gaps between them, a byte each │ gaps of 255 and more, 4 bytes each │
    differences: their low bytes, then their high bytes                                          all deflated (zlib)

Differences are modulo 2^16 and folded (0, -1, 1, -2, 2, ... -> 0, 1, 2, 3, 4, ...), so most high bytes are 0.
"""

from __future__ import annotations

import zlib

import numpy as np

from sgpo_async.errors import WeightsError

# Share of words. With more, the difference has a fifth of the bytes or more, and one core encodes less than 0.2 GB/s.
MOST_CHANGED = 0.25
_LONG = 255  # gaps from here on have 4 bytes of their own
_COUNT_BYTES = 4
_FASTEST = 1  # zlib's level: a higher one saves few bytes here and takes several times as long

Buffer = bytes | bytearray | memoryview


def encode(old: Buffer, new: Buffer) -> bytes | None:
    """Encode the bytes of `new` as a difference to `old`, which has the same length.

    Returns None if the bucket itself is smaller or faster to send, or is no sequence of 16-bit words.
    """
    assert len(old) == len(new), f"a bucket keeps its length, got {len(old)} and {len(new)} bytes"
    if len(new) % 2:
        return None
    before, after = np.frombuffer(old, "<u2"), np.frombuffer(new, "<u2")
    differ = before != after
    if np.count_nonzero(differ) > MOST_CHANGED * len(after):
        return None
    changed = np.flatnonzero(differ)
    gaps = np.diff(changed, prepend=-1) - 1
    folded = _fold((after[changed] - before[changed]).view("<i2"))
    plain = b"".join(
        (
            len(changed).to_bytes(_COUNT_BYTES, "little"),
            np.minimum(gaps, _LONG).astype(np.uint8).tobytes(),
            gaps[gaps >= _LONG].astype("<u4").tobytes(),
            (folded & 0xFF).astype(np.uint8).tobytes(),
            (folded >> 8).astype(np.uint8).tobytes(),
        )
    )
    deflated = zlib.compress(plain, _FASTEST)
    return deflated if len(deflated) < len(new) else None


def decode(old: Buffer, delta: Buffer) -> bytearray:
    """Return the bytes that `encode` was given as `new`.

    Raises WeightsError if `delta` cannot be a difference to `old`. It need not notice all damage: compare the result
    with the bucket's checksum.
    """
    words = np.frombuffer(old, "<u2").copy()
    plain = _inflate(delta, most=_COUNT_BYTES + 7 * len(words))
    count = int.from_bytes(plain[:_COUNT_BYTES], "little")
    short = np.frombuffer(plain, np.uint8, min(count, len(plain) - _COUNT_BYTES), _COUNT_BYTES)
    long_at = np.flatnonzero(short == _LONG)
    if len(plain) != _COUNT_BYTES + 3 * count + 4 * len(long_at):
        raise _damaged(delta)
    gaps = short.astype(np.int64)
    gaps[long_at] = np.frombuffer(plain, "<u4", len(long_at), _COUNT_BYTES + count)
    changed = np.cumsum(gaps + 1) - 1
    if count and changed[-1] >= len(words):
        raise WeightsError(f"weights: a delta changes word {changed[-1]} of {len(words)}; send the bucket")
    low, high = np.frombuffer(plain, np.uint8, 2 * count, len(plain) - 2 * count).reshape(2, count).astype(np.uint16)
    words[changed] += _unfold(low | high << 8).view("<u2")
    return bytearray(words.tobytes())


def _inflate(delta: Buffer, *, most: int) -> bytes:
    """Inflate at most `most` bytes, so that a damaged delta takes no more memory than its bucket allows."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(delta, most)
    except zlib.error as error:
        raise _damaged(delta, f" ({error})") from None
    if not inflater.eof or len(plain) < _COUNT_BYTES:
        raise _damaged(delta)
    return plain


def _damaged(delta: Buffer, reason: str = "") -> WeightsError:
    return WeightsError(f"weights: a delta of {len(delta)} bytes is damaged{reason}; send the bucket")


def _fold(difference: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, 2, ... -> 0, 1, 2, 3, 4, ...: int16 -> uint16."""
    return ((difference << 1) ^ (difference >> 15)).view("<u2")


def _unfold(folded: np.ndarray) -> np.ndarray:
    """The inverse of `_fold`."""
    return ((folded >> 1) ^ -(folded & 1)).astype("<u2").view("<i2")
