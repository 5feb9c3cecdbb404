"""Handle of a node process, for the actor. Torch-free; only `stop` waits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sgpo_async.session.child import Child
from sgpo_async.session.settings import Deadlines, Settings


@dataclass(frozen=True)
class NodeWeights:
    """A whole, verified version stands in the local store at `path` (for `weights.StoreReader`)."""

    version: int
    path: str  # the same for all events of one session
    digest: str
    nbytes: int
    seconds: float  # the transfer took
    published_at: float  # by the learner's clock, seconds since 1970


@dataclass(frozen=True)
class NodeRejected:
    """A version that arrived damaged and was not taken; the next one will be tried."""

    version: int
    reason: str


@dataclass(frozen=True)
class NodeControl:
    """A word of the hub, such as "drain"."""

    word: str


@dataclass(frozen=True)
class NodeDown:
    """The session is over; the last event of a node."""

    reason: str


NodeEvent = NodeWeights | NodeRejected | NodeControl | NodeDown
_EVENTS: dict[str, type[Any]] = {
    "weights": NodeWeights,
    "rejected": NodeRejected,
    "control": NodeControl,
    "down": NodeDown,
}


class NodeProcess:
    """The actor's end of one session. Start it early: it imports torch while the actor does other things."""

    def __init__(self, name: str, *, deadlines: Deadlines | None = None) -> None:
        settings = Settings(name=name, parent=os.getpid(), deadlines=deadlines or Deadlines())
        self._child = Child("sgpo_async.session.node", settings)
        self.name, self.pid = name, self._child.pid

    def connect(self, host: str, port: int) -> None:
        """Meet the link process at this address; once."""
        self._child.send({"host": host, "port": port})

    def fileno(self) -> int:
        """Readable whenever `poll` has something to say."""
        return self._child.fileno()

    def poll(self) -> list[NodeEvent]:
        """Events since the last call."""
        return [_EVENTS[raw.pop("event")](**raw) for raw in self._child.poll()]

    def stop(self, deadline_s: float = 5.0) -> None:
        """End the session at once. Raises DeadlineExceeded if the process does not go in `deadline_s`."""
        self._child.stop(deadline_s)
