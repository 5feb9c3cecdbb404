"""Pull one version, bucket by bucket, into the local store.

Several buckets are always in flight, so that the network works while one bucket is checked and written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sgpo_async.errors import Superseded, WeightsError
from sgpo_async.weights.manifest import Manifest
from sgpo_async.weights.writer import Incoming, StoreWriter

IN_FLIGHT = 4
ATTEMPTS = 3

PendingBucket = Callable[[], memoryview | None]  # waits for the bucket; None: the version was superseded
RequestBucket = Callable[[int, int], PendingBucket]  # (version, index): sends the request, does not wait


def pull(manifest: Manifest, request: RequestBucket, writer: StoreWriter) -> None:
    """Receive the version of `manifest` and make it visible in `writer`'s store.

    Raises Superseded if the source overwrites the version during the pull, WeightsError if one bucket arrives damaged
    `ATTEMPTS` times or the tensors differ from those of earlier versions, and whatever `request` raises. After an error
    the store still holds the version that it held before.
    """
    incoming = writer.receive(manifest)
    in_flight: deque[tuple[int, PendingBucket]] = deque()
    for index in range(len(manifest.buckets)):
        in_flight.append((index, request(manifest.version, index)))
        if len(in_flight) == IN_FLIGHT:
            _store_bucket(manifest, request, incoming, *in_flight.popleft())
    while in_flight:
        _store_bucket(manifest, request, incoming, *in_flight.popleft())
    incoming.commit()


def _store_bucket(
    manifest: Manifest, request: RequestBucket, incoming: Incoming, index: int, pending: PendingBucket
) -> None:
    """Wait for a bucket and store it; request it again if it arrived damaged."""
    for attempt in range(1, ATTEMPTS + 1):
        data = pending()
        if data is None:
            raise Superseded(f"weights version {manifest.version}: overwritten before it was pulled")
        try:
            incoming.put(index, data)
            return
        except WeightsError:
            if attempt == ATTEMPTS:
                raise
            pending = request(manifest.version, index)
