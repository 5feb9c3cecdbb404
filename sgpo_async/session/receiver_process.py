"""The handle of a weight receiver process, which an actor or the hub has started.

It does not import torch; only `stop` blocks.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from sgpo_async.session.parent_side import Child
from sgpo_async.session.rpc_client import RpcClient
from sgpo_async.session.settings import Deadlines, Deltas, Settings
from sgpo_async.session.weight_groups import WeightGroups
from sgpo_async.wire.records import Road


@dataclass(frozen=True)
class VersionReceived:
    """The local store at `path` (see `weights.StoreReader`) holds a complete, verified version."""

    version: int
    path: str  # the same for all events of one session
    digest: str
    nbytes: int
    received: int  # bytes that were transferred for it, less than `nbytes` if as differences to an earlier version
    seconds: float  # duration of the transfer
    published_at: float  # by the learner's clock, seconds since 1970


@dataclass(frozen=True)
class VersionAnnounced:
    """The learner's store holds this version; replaces `VersionReceived` when `pulls` is false."""

    version: int
    digest: str
    nbytes: int
    published_at: float  # by the learner's clock, seconds since 1970


@dataclass(frozen=True)
class VersionRejected:
    """A version arrived damaged and was discarded; the receiver will try the next version."""

    version: int
    reason: str


@dataclass(frozen=True)
class ReceiverDown:
    """The session is over. This is the last event of a weight receiver."""

    reason: str


ReceiverEvent = VersionReceived | VersionAnnounced | VersionRejected | ReceiverDown
_EVENTS: dict[str, type[Any]] = {
    "weights": VersionReceived,
    "announced": VersionAnnounced,
    "rejected": VersionRejected,
    "down": ReceiverDown,
}


class WeightReceiver:
    """The receiving end of one session, of an actor or of the hub; `road` must be that of the weight sender.

    Start it early: it imports torch while its parent does other work.

    It pulls every announced version into the store at `store`. If `pulls` is false, the parent gets weights through
    `groups` or by `pull` instead.
    """

    def __init__(
        self,
        name: str,
        *,
        store: str,
        road: Road = "rpc",
        deltas: Deltas = "auto",
        pulls: bool = True,
        deadlines: Deadlines | None = None,
    ) -> None:
        deadlines = deadlines or Deadlines()
        settings = Settings(
            name=name, parent=os.getpid(), store=store, road=road, deltas=deltas, pulls=pulls, deadlines=deadlines
        )
        self._child = Child("sgpo_async.session.receiver", settings, role="weight receiver")
        self._rpc = RpcClient(self._child.send)
        self.groups = WeightGroups(self._rpc, deadlines.group_s)
        self.name, self.pid = name, self._child.pid

    def connect(self, host: str, port: int, secret: bytes) -> None:
        """Connect to the weight sender that `SenderUp` has reported at this port, with this secret. Call it once."""
        self._child.send({"host": host, "port": port, "secret": secret.hex()})

    def open_folder(self, url: str) -> None:
        """Read from the folder at this URL, instead of `connect`, if `road` is folder. Call it once."""
        self._child.send({"host": "", "folder": url})

    def fileno(self) -> int:
        """Return the descriptor to select on: readable when `poll` has events, and always after the last event."""
        return self._child.fileno()

    def poll(self) -> list[ReceiverEvent]:
        """Return the events since the last call; complete futures of `groups` and `pull` (response or timeout)."""
        events = []
        for raw in self._child.poll():
            kind = raw.pop("event")
            if kind == "response":
                self._rpc.complete(raw["id"], raw["value"], raw["error"])
                continue
            if kind == "down":
                self._rpc.end(raw["reason"])
            events.append(_EVENTS[kind](**raw))
        self._rpc.expire()
        return events

    def pull(self, version: int) -> Future[str]:
        """Pull `version` into the local store; the future's result is the path of the store. There is no timeout.

        The future fails with Superseded if `version` is no longer the newest, WeightsError if it arrived damaged,
        SessionError if the session ends. As with `groups`, the thread that waits must not be the one that polls.
        """
        return self._rpc.request("pull", seconds=math.inf, version=version)

    def stop(self, deadline_s: float = 5.0) -> None:
        """End the session immediately. Raises DeadlineExceeded if the process still runs after `deadline_s`."""
        self._rpc.end("the session was ended")
        self._child.stop(deadline_s)
