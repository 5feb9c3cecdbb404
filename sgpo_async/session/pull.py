"""Pulling one version, bucket by bucket, into the local store.

A few buckets are always under way, so that the network works while one is checked and written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sgpo_async.errors import Superseded, WeightsError
from sgpo_async.weights.manifest import Manifest
from sgpo_async.weights.writer import Incoming, StoreWriter

UNDER_WAY = 4
ATTEMPTS = 3

Answer = Callable[[], memoryview | None]  # waits for a bucket; None: superseded
Ask = Callable[[int, int], Answer]  # (version, index): asks for a bucket


def pull(manifest: Manifest, ask: Ask, writer: StoreWriter) -> None:
    """Make the version of `manifest` visible in `writer`'s store.

    Raises Superseded if it is overwritten at the source meanwhile, WeightsError if a bucket is damaged in
    `ATTEMPTS` attempts or the tensors differ from the earlier versions', and what `ask` raises. The store
    then keeps what it had.
    """
    incoming = writer.receive(manifest)
    under_way: deque[tuple[int, Answer]] = deque()
    for index in range(len(manifest.buckets)):
        under_way.append((index, ask(manifest.version, index)))
        if len(under_way) == UNDER_WAY:
            _take(manifest, ask, incoming, *under_way.popleft())
    while under_way:
        _take(manifest, ask, incoming, *under_way.popleft())
    incoming.commit()


def _take(manifest: Manifest, ask: Ask, incoming: Incoming, index: int, answer: Answer) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        data = answer()
        if data is None:
            raise Superseded(f"weights version {manifest.version}: overwritten before it was pulled")
        try:
            incoming.put(index, data)
            return
        except WeightsError:
            if attempt == ATTEMPTS:
                raise
            answer = ask(manifest.version, index)
