"""Where rank 0 publishes: the hub's weight store if it is on this machine, else a store of its own that the hub pulls.

same machine and user     ranks ─▶ the hub's store
otherwise                 ranks ─▶ its own store ─ weight sender ◀── Torch RPC ──▶ hub (`hub.learner_weights`)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from sgpo_async.config.rules import endpoint_of, url_host
from sgpo_async.errors import DeadlineExceeded
from sgpo_async.learner.share_group import Store
from sgpo_async.session import SenderUp, WeightSender
from sgpo_async.session.interface import address_towards
from sgpo_async.weights import Manifest, StoreFile, StoreWriter, TensorEntry
from sgpo_async.weights.store_file import can_open, machine
from sgpo_async.wire.records import Welcome

log = logging.getLogger(__name__)

POLL_S = 0.05
START_S = 150.0  # until a weight sender listens; it imports torch
CLOSE_S = 10.0  # for the weight sender to end
AGAIN_S = 1.0  # after a weight sender has ended, before the next one is started

Moved = Callable[[str, bytes], None]
"""(where the hub finds the versions from now on, the secret of that link) -> None; may be called from any thread."""


def open_store(welcome: Welcome, folder: Path, hub: str, moved: Moved, *, nbytes: int) -> Store:
    """Open the store into which this learner publishes.

    Args:
        welcome: names the hub's store and the machine that it is on.
        folder: for a store of its own that does not fit into memory.
        hub: the address of the hub, tcp://HOST:PORT.
        moved: is told where the versions are, when that changes.
        nbytes: size of one version.
    """
    if welcome.machine == machine() and can_open(welcome.store):
        return StoreWriter(welcome.store)
    log.info("the hub is on another machine, or of another user: it pulls the weights from here")
    endpoint = endpoint_of(hub)
    assert endpoint, hub
    return RemoteStore(StoreFile(folder, expected_bytes=nbytes), address_towards(endpoint[0]), moved)


class RemoteStore:
    """A store on this machine with a weight sender, which is started with the first version and whenever it ends."""

    def __init__(
        self, file: StoreFile, host: str, moved: Moved, *, sender: Callable[..., WeightSender] = WeightSender
    ) -> None:
        self._file, self._host, self._moved, self._sender = file, host, moved, sender
        self._writer = StoreWriter(file.path)
        self._up, self._closing = threading.Event(), threading.Event()
        self._contact = ("", b"")
        self._thread: threading.Thread | None = None

    @property
    def place(self) -> str:
        """A path at which the ranks of this machine find the file."""
        return self._writer.place

    def begin(self, version: int, tensors: Sequence[TensorEntry]) -> int:
        """Start a version; return where in the file its data begin. Raises WeightsError."""
        return self._writer.begin(version, tensors)

    def commit(self, manifest: Manifest) -> None:
        """Make a version visible. Raises WeightsError."""
        self._writer.commit(manifest)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="weight sender", daemon=True)
            self._thread.start()

    @property
    def contact(self) -> tuple[str, bytes]:
        """Address and secret of the weight sender. Raises DeadlineExceeded if none listens in time."""
        if not self._up.wait(START_S):
            raise DeadlineExceeded("learner-0", "weight sender that listens for the hub", START_S)
        return self._contact

    def close(self) -> None:
        """End the weight sender."""
        self._closing.set()
        if self._thread:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                log.warning("the weight sender has not ended within %g s; it ends with this process", CLOSE_S)
        self._writer.close()
        self._file.close()

    def _serve(self) -> None:
        """Keep a weight sender; tell the hub the address of each one after the first, which `Publisher` tells."""
        first = True
        while not self._closing.is_set():
            try:
                self._keep(announce=not first)
            except (OSError, DeadlineExceeded) as error:  # no more processes, or one that ends late: try again
                log.warning("the weight sender for the hub: %s; another one is started", error)
            first = False
            self._closing.wait(AGAIN_S)

    def _keep(self, *, announce: bool) -> None:
        """Start a weight sender, and return when it has ended, or this store is closed."""
        sender = self._sender(self._file.path, "the hub", self._host)
        try:
            while not self._closing.wait(POLL_S):
                for event in sender.poll():
                    if not isinstance(event, SenderUp):
                        log.warning("the hub's link to the weights is lost: %s; another one is offered", event.reason)
                        return
                    self._contact = f"tcp://{url_host(self._host)}:{event.port}", event.secret
                    self._up.set()
                    if announce:
                        self._moved(*self._contact)
        finally:
            self._up.clear()
            sender.stop()
