"""Pull one version, bucket by bucket, into the local store.

Several buckets are always in flight, so that the network works while one bucket is checked and written. A bucket may
arrive as the difference to the version that is here already (`weights.delta`). It is checked like any other; if it is
wrong, the whole bucket is requested.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sgpo_async.errors import Superseded, WeightsError
from sgpo_async.weights.delta import decode
from sgpo_async.weights.manifest import Manifest
from sgpo_async.weights.writer import Incoming, StoreWriter

IN_FLIGHT = 4
ATTEMPTS = 3


class Sent(NamedTuple):
    """A bucket as it was sent."""

    data: memoryview
    is_delta: bool = False  # a difference to the version that the request named


PendingBucket = Callable[[], Sent | None]  # waits for the bucket; None: the version was superseded
# (version, index, base): sends the request, does not wait. If there is a base, a bucket may come as a difference to it.
RequestBucket = Callable[[int, int, int | None], PendingBucket]


def pull(manifest: Manifest, request: RequestBucket, writer: StoreWriter, *, deltas: bool = False) -> int:
    """Receive the version of `manifest`, make it visible in `writer`'s store; return the number of bytes received.

    Args:
        deltas: whether to accept differences to the version that the store holds.

    Raises Superseded if the source overwrites the version during the pull, WeightsError if one bucket arrives damaged
    `ATTEMPTS` times or the tensors differ from those of earlier versions, and whatever `request` raises. After an error
    the store still holds the version that it held before.
    """
    incoming = writer.receive(manifest)
    base = incoming.base if deltas else None
    in_flight: deque[tuple[int, PendingBucket]] = deque()
    received = 0
    for index in range(len(manifest.buckets)):
        in_flight.append((index, request(manifest.version, index, base)))
        if len(in_flight) == IN_FLIGHT:
            received += _store_bucket(manifest, request, incoming, *in_flight.popleft())
    while in_flight:
        received += _store_bucket(manifest, request, incoming, *in_flight.popleft())
    incoming.commit()
    return received


def _store_bucket(
    manifest: Manifest, request: RequestBucket, incoming: Incoming, index: int, pending: PendingBucket
) -> int:
    """Wait for a bucket and store it; request all of it if it arrived damaged. Returns the number of bytes received."""
    received = attempts = 0
    while True:
        sent = pending()
        if sent is None:
            raise Superseded(f"weights version {manifest.version}: overwritten before it was pulled")
        received, attempts = received + len(sent.data), attempts + 1
        try:
            incoming.put(index, decode(incoming.base_bytes(index), sent.data) if sent.is_delta else sent.data)
            return received
        except WeightsError:
            if attempts == ATTEMPTS:
                raise
        pending = request(manifest.version, index, None)
