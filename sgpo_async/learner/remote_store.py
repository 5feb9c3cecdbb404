"""Where rank 0 publishes: the hub's weight store if it is on this machine, else a store of its own that the hub pulls.

same machine and user     rank 0 ─▶ the hub's store
otherwise                 rank 0 ─▶ its own store ─ weight sender ◀── Torch RPC ──▶ hub (`hub.relay`)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.learner.publish import Store
from sgpo_async.session import SenderUp, WeightSender
from sgpo_async.session.interface import address_towards
from sgpo_async.weights import StoreFile, StoreWriter
from sgpo_async.weights.store_file import can_open, machine
from sgpo_async.wire.records import Welcome

log = logging.getLogger(__name__)

POLL_S = 0.05
START_S = 150.0  # until a weight sender listens; it imports torch
AGAIN_S = 1.0  # after a weight sender has ended, before the next one is started

Published = Callable[[int, str], None]
"""(version, where the hub finds it) -> None; may be called from any thread."""


def open_store(welcome: Welcome, folder: Path, hub: str, published: Published) -> Store:
    """Open the store into which this learner publishes.

    Args:
        welcome: names the hub's store and the machine that it is on.
        folder: for a store of its own that does not fit into memory.
        hub: the address of the hub, tcp://HOST:PORT.
        published: is told where the newest version is, when that changes.
    """
    if welcome.machine == machine() and can_open(welcome.store):
        return StoreWriter(welcome.store)
    log.info("the hub is on another machine, or of another user: it pulls the weights from here")
    return RemoteStore(folder, address_towards(hub.removeprefix("tcp://").rpartition(":")[0]), published)


class RemoteStore:
    """A store on this machine with a weight sender, which is started with the first version and whenever it ends."""

    def __init__(self, folder: Path, host: str, published: Published) -> None:
        self._file = StoreFile(folder)
        self._writer, self._host, self._published = StoreWriter(self._file.path), host, published
        self._up, self._closing = threading.Event(), threading.Event()
        self._port = 0
        self._thread: threading.Thread | None = None

    def publish(self, version: int, named_tensors: Iterable[tuple[str, Tensor]]) -> object:
        """Write a version. Raises WeightsError."""
        manifest = self._writer.publish(version, named_tensors)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="weight sender", daemon=True)
            self._thread.start()
        return manifest

    @property
    def place(self) -> str:
        """The address of the weight sender. Raises DeadlineExceeded if none listens in time."""
        if not self._up.wait(START_S):
            raise DeadlineExceeded("learner-0", "a weight sender that listens for the hub", START_S)
        return f"tcp://{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"

    def close(self) -> None:
        """End the weight sender."""
        self._closing.set()
        if self._thread:
            self._thread.join()
        self._writer.close()
        self._file.close()

    def _serve(self) -> None:
        """Keep a weight sender; tell the hub the address of each one after the first, which `Publisher` tells."""
        first = True
        while not self._closing.is_set():
            sender = WeightSender(self._file.path, "the hub", self._host)
            try:
                self._follow(sender, announce=not first)
            finally:
                self._up.clear()
                sender.stop()
            first = False
            self._closing.wait(AGAIN_S)

    def _follow(self, sender: WeightSender, *, announce: bool) -> None:
        """Return when the weight sender has ended, or this store is closed."""
        while not self._closing.wait(POLL_S):
            for event in sender.poll():
                if not isinstance(event, SenderUp):
                    log.warning("the hub's link to the weights is lost: %s; another one is offered", event.reason)
                    return
                self._port = event.port
                self._up.set()
                if announce and (version := self._writer.version) is not None:
                    self._published(version, self.place)
