"""Pull one version, bucket by bucket, into the local store.

Several buckets are always in flight, so that the network works while one bucket is checked and written. A bucket may
arrive as the difference to the version that is here already (`weights.delta`). It is checked like any other; if it is
wrong, the whole bucket is requested.

The source may be a node that is still receiving the version itself: a bucket that it does not have yet is requested
again. A pull that was interrupted continues after the last verified bucket, from whichever source.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sgpo_async.errors import SessionError, WeightsError
from sgpo_async.weights.delta import decode
from sgpo_async.weights.manifest import Manifest
from sgpo_async.weights.writer import Incoming, StoreWriter

IN_FLIGHT = 4
ATTEMPTS = 3


class Sent(NamedTuple):
    """A bucket as it was sent."""

    data: memoryview
    is_delta: bool = False  # a difference to the version that the request named


# Waits for the bucket; None: the source does not have it yet. Raises Superseded if the source has given the version up.
PendingBucket = Callable[[], Sent | None]
# (version, index, base): sends the request, does not wait. If there is a base, a bucket may come as a difference to it.
RequestBucket = Callable[[int, int, int | None], PendingBucket]


def pull(
    manifest: Manifest, request: RequestBucket, writer: StoreWriter, *, deltas: bool = False, silence_s: float = 60.0
) -> int:
    """Receive the version of `manifest`, make it visible in `writer`'s store; return the number of bytes received.

    Args:
        deltas: whether to accept differences to the version that the store holds.
        silence_s: how long the source may have no new bucket.

    Raises Superseded if the source gives the version up during the pull, WeightsError if one bucket arrives damaged
    `ATTEMPTS` times or the tensors differ from those of earlier versions, SessionError after `silence_s`, and whatever
    `request` raises. After an error the store still holds the version that it held before, and the verified buckets.
    """
    return _Pull(manifest, request, writer.receive(manifest), deltas=deltas, silence_s=silence_s).run()


class _Pull:
    """One pull of one version."""

    def __init__(
        self, manifest: Manifest, request: RequestBucket, incoming: Incoming, *, deltas: bool, silence_s: float
    ) -> None:
        self._manifest, self._incoming, self._silence_s = manifest, incoming, silence_s
        self._request = request
        self._base = incoming.base if deltas else None
        self._received = 0

    def run(self) -> int:
        in_flight: deque[tuple[int, PendingBucket]] = deque()
        for index in range(self._incoming.verified, len(self._manifest.buckets)):
            in_flight.append((index, self._request(self._manifest.version, index, self._base)))
            if len(in_flight) == IN_FLIGHT:
                self._store(*in_flight.popleft())
        while in_flight:
            self._store(*in_flight.popleft())
        self._incoming.commit()
        return self._received

    def _store(self, index: int, pending: PendingBucket) -> None:
        """Wait for a bucket and store it; request all of it if it arrived damaged."""
        attempts, base = 0, self._base
        while True:
            sent = self._wait(index, pending, base)
            self._received, attempts = self._received + len(sent.data), attempts + 1
            try:
                data = decode(self._incoming.base_bytes(index), sent.data) if sent.is_delta else sent.data
                self._incoming.put(index, data)
                return
            except WeightsError:
                if attempts == ATTEMPTS:
                    raise
            base = None
            pending = self._request(self._manifest.version, index, base)

    def _wait(self, index: int, pending: PendingBucket, base: int | None) -> Sent:
        """Wait for a bucket, which the source may still have to receive."""
        deadline = time.monotonic() + self._silence_s
        while (sent := pending()) is None:
            if time.monotonic() > deadline:
                raise SessionError(
                    f"weights version {self._manifest.version}: no new bucket within {self._silence_s:g} s from a node "
                    "that still receives the version itself"
                )
            pending = self._request(self._manifest.version, index, base)
        return sent
