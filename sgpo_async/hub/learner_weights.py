"""The hub's weight store, from which the weight senders serve what the learner publishes.

    rank 0 on this machine    writes into this store, or into one of its own that the hub then uses
    rank 0 on another one     its own store ─ weight sender ◀── Torch RPC ──▶ weight receiver ─▶ this store
                              Published(version, tcp://HOST:PORT) ─▶ here ─ pulled ─▶ Published(version, path) ─▶ core

The link to another machine is that between the hub and an actor. When it is lost, rank 0 starts another weight sender
and names its address in another Published.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.hub import events as ev
from sgpo_async.session import ReceiverDown, VersionReceived, VersionRejected, WeightReceiver
from sgpo_async.weights.store_file import StoreFile
from sgpo_async.wire.records import Published

log = logging.getLogger(__name__)

SCHEME = "tcp://"
STOP_S = 1.0  # timeout for the end of a weight receiver after it was killed


class LearnerWeights:
    """Keeps `store` at what rank 0 has published."""

    def __init__(self, store: StoreFile, *, receiver: Callable[..., WeightReceiver] = WeightReceiver) -> None:
        self._store, self._receiver = store, receiver
        self._link: WeightReceiver | None = None
        self._offer: tuple[bytes, Published] | None = None  # the newest of another machine

    def use(self, path: str) -> bool:
        """Use the store at `path` of this machine from now on; return whether that is another file."""
        return self._store.follow(path)

    def offered(self, member: bytes, message: Published) -> Published | None:
        """What the core is told of this message of rank 0; None if the version is still to be pulled."""
        if not message.store.startswith(SCHEME):
            return message
        moved = self._offer is None or self._offer[1].store != message.store or self._link is None
        self._offer = member, message
        newest = self._store.version
        if newest is not None and newest >= message.version:
            return replace(message, store=self._store.path)
        if moved:
            self._connect(message.store)
        return None

    def events(self) -> list[ev.Event]:
        """The versions that have arrived since the last call, as if rank 0 had published them on this machine."""
        found: list[ev.Event] = []
        for event in self._link.poll() if self._link else ():
            match event:
                case VersionReceived(version=version):
                    assert self._offer
                    found.append(ev.Received(self._offer[0], Published(version=version, store=self._store.path)))
                case VersionRejected(version=version, reason=reason):
                    log.warning("weights version %d of the learner: %s", version, reason)
                case ReceiverDown(reason=reason):
                    log.warning("the link to the learner's weights is lost: %s", reason)
                    self.close()
        return found

    def close(self) -> None:
        """End the link."""
        link, self._link = self._link, None
        if link:
            try:
                link.stop(STOP_S)
            except DeadlineExceeded as error:  # on a busy machine a killed process ends late
                log.warning("%s", error)

    def _connect(self, address: str) -> None:
        self.close()
        host, _, port = address.removeprefix(SCHEME).rpartition(":")
        self._link = self._receiver("the hub", store=self._store.path)
        self._link.connect(host.strip("[]"), int(port))
        log.info("pulling the learner's weights from %s", address)
