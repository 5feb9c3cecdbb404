"""Handle of a node process, for the actor. Torch-free; only `stop` waits."""

from __future__ import annotations

import math
import os
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from sgpo_async.session.parent_side import Child
from sgpo_async.session.rpc_client import RpcClient
from sgpo_async.session.settings import Deadlines, Settings
from sgpo_async.session.weight_groups import WeightGroups


@dataclass(frozen=True)
class VersionReceived:
    """A whole, verified version stands in the local store at `path` (for `weights.StoreReader`)."""

    version: int
    path: str  # the same for all events of one session
    digest: str
    nbytes: int
    seconds: float  # the transfer took
    published_at: float  # by the learner's clock, seconds since 1970


@dataclass(frozen=True)
class VersionAnnounced:
    """A version that the learner's store holds; with `pulls=False` in place of `VersionReceived`."""

    version: int
    digest: str
    nbytes: int
    published_at: float  # by the learner's clock, seconds since 1970


@dataclass(frozen=True)
class VersionRejected:
    """A version that arrived damaged and was not taken; the next one will be tried."""

    version: int
    reason: str


@dataclass(frozen=True)
class NodeControl:
    """A word of the hub, such as "drain"."""

    word: str


@dataclass(frozen=True)
class ReceiverDown:
    """The session is over; the last event of a node."""

    reason: str


ReceiverEvent = VersionReceived | VersionAnnounced | VersionRejected | NodeControl | ReceiverDown
_EVENTS: dict[str, type[Any]] = {
    "weights": VersionReceived,
    "announced": VersionAnnounced,
    "rejected": VersionRejected,
    "control": NodeControl,
    "down": ReceiverDown,
}


class WeightReceiver:
    """The actor's end of one session. Start it early: it imports torch while the actor does other things.

    It pulls every version that is announced, unless `pulls` is false: then weights come through `groups`, or by `pull`.
    """

    def __init__(self, name: str, *, pulls: bool = True, deadlines: Deadlines | None = None) -> None:
        deadlines = deadlines or Deadlines()
        settings = Settings(name=name, parent=os.getpid(), pulls=pulls, deadlines=deadlines)
        self._child = Child("sgpo_async.session.receiver", settings)
        self._questions = RpcClient(self._child.send)
        self.groups = WeightGroups(self._questions, deadlines.group_s)
        self.name, self.pid = name, self._child.pid

    def connect(self, host: str, port: int) -> None:
        """Meet the link process at this address; once."""
        self._child.send({"host": host, "port": port})

    def fileno(self) -> int:
        """Readable whenever `poll` has something to say, and for ever after the last event."""
        return self._child.fileno()

    def poll(self) -> list[ReceiverEvent]:
        """Events since the last call; ends the futures of `groups` and `pull` that are due."""
        events = []
        for raw in self._child.poll():
            kind = raw.pop("event")
            if kind == "answer":
                self._questions.settle(raw["id"], raw["value"], raw["error"])
                continue
            if kind == "down":
                self._questions.end(raw["reason"])
            events.append(_EVENTS[kind](**raw))
        self._questions.expire()
        return events

    def pull(self, version: int) -> Future[str]:
        """Have the newest version in the local store; done with its path. Without a deadline of its own.

        Ends with Superseded if `version` is no longer the newest, WeightsError if it arrived damaged, SessionError
        if the session ends. As with `groups`, some other thread has to `poll`.
        """
        return self._questions.ask("pull", seconds=math.inf, version=version)

    def stop(self, deadline_s: float = 5.0) -> None:
        """End the session at once. Raises DeadlineExceeded if the process does not go in `deadline_s`."""
        self._questions.end("the session was ended")
        self._child.stop(deadline_s)
