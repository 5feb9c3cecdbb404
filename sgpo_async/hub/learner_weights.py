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

from sgpo_async.config.rules import endpoint_of
from sgpo_async.hub import events as ev
from sgpo_async.hub.uploads import Uploads
from sgpo_async.session import ReceiverDown, VersionRejected, WeightReceiver
from sgpo_async.session.settings import Deltas
from sgpo_async.session.stopping import Stopping
from sgpo_async.weights.store_file import StoreFile, can_open
from sgpo_async.wire.records import Published

log = logging.getLogger(__name__)

STOP_S = 1.0  # timeout for the end of a weight receiver after it was killed


class LearnerWeights:
    """Keeps `store`, and the folder of `uploads` if there is one, at what rank 0 has published."""

    def __init__(
        self,
        store: StoreFile,
        *,
        deltas: Deltas = "auto",
        uploads: Uploads | None = None,
        receiver: Callable[..., WeightReceiver] = WeightReceiver,
    ) -> None:
        self._store, self._deltas, self._receiver, self._uploads = store, deltas, receiver, uploads
        self._stopping = Stopping(seconds=STOP_S, threads=2)
        self._link: WeightReceiver | None = None
        self._member, self._contact = b"", ("", b"")  # of the newest message of another machine
        self._offers: dict[int, Published] = {}  # those that the core was not told of, by version

    def use(self, path: str) -> bool:
        """Use the store at `path` of this machine from now on; return whether that is another file."""
        if not can_open(path):
            log.warning(
                "the learner's weights at %s cannot be opened here, so no actor gets them: this hub is not on the "
                "learner's machine, and the one before it was; start the learner again with learner.resume=true",
                path,
            )
        other = self._store.follow(path)
        if other and self._uploads:
            self._uploads.restart()
        return other

    def offered(self, member: bytes, message: Published) -> Published | None:
        """What the core is told of this message of rank 0 now; None if `events` tells it when the version is here.

        A message with a malformed address goes to the core as it is, which rejects it.
        """
        if not message.is_elsewhere or (endpoint := endpoint_of(message.store)) is None or not endpoint[1]:
            return message
        moved = self._contact != (message.store, message.secret) or self._link is None
        self._member, self._contact = member, (message.store, message.secret)
        self._offers[message.version] = message
        if moved:  # also if the version is here already: rank 0 offers this link for the next ones, too
            self._connect(*endpoint, message.secret)
            log.info("pulling the learner's weights from %s", message.store)
        return None

    def events(self) -> list[ev.Event]:
        """The versions that are here since the last call, as if rank 0 had published them on this machine.

        Also those that the link has skipped, in order: an actor may have one that was overwritten since, and the core
        must know its digest.
        """
        if self._uploads:
            self._uploads.poll()
        for event in self._link.poll() if self._link else ():
            match event:
                case VersionRejected(version=version, reason=reason):
                    log.warning("weights version %d of the learner: %s", version, reason)
                case ReceiverDown(reason=reason):
                    log.warning("the link to the learner's weights is lost: %s", reason)
                    self._disconnect()
                    break
        newest = self._store.version
        here = sorted(version for version in self._offers if newest is not None and version <= newest)
        told = [replace(self._offers.pop(version), store=self._store.path, secret=b"") for version in here]
        return [ev.Received(self._member, message) for message in told]

    def close(self) -> None:
        """End the link and the uploads."""
        self._disconnect()
        self._stopping.close()
        if self._uploads:
            self._uploads.close()

    def _disconnect(self) -> None:
        """End the link, without waiting for the end of its process."""
        link, self._link = self._link, None
        if link:
            self._stopping.stop(link)

    def _connect(self, host: str, port: int, secret: bytes) -> None:
        self._disconnect()
        try:
            self._link = self._receiver("the hub", store=self._store.path, deltas=self._deltas)
        except OSError as error:  # no more processes: the next publication tries again
            log.warning("cannot start a weight receiver for the learner's weights: %s", error)
            return
        self._link.connect(host, port, secret)
