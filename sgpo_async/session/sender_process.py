"""The handle of a weight sender process, which the hub, an actor or the learner has started.

It does not import torch; only `stop` blocks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sgpo_async.session.parent_side import Child
from sgpo_async.session.secret import new_secret
from sgpo_async.session.settings import JOBS, Deadlines, Settings
from sgpo_async.wire.records import Road


@dataclass(frozen=True)
class SenderUp:
    """The weight sender waits at this port of its host for the weight receiver that knows the secret."""

    port: int
    secret: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class SenderDown:
    """The session is over. This is the last event of a weight sender."""

    reason: str


SenderEvent = SenderUp | SenderDown


class WeightSender:
    """The sending end of one session: listens on `host`, serves the weights in `store` to `name`: an actor, or the hub.

    With `cuda` it may use this machine's GPUs, for weight-update groups over NCCL. `jobs` are the functions that it
    computes for the receiver (`WeightGroups.compute`), as MODULE:NAME.
    """

    def __init__(  # noqa: PLR0913 (what the process is told)
        self,
        store: str,
        name: str,
        host: str,
        *,
        road: Road = "rpc",
        cuda: bool = False,
        jobs: Sequence[str] = JOBS,
        deadlines: Deadlines | None = None,
    ) -> None:
        deadlines = deadlines or Deadlines()
        settings = Settings(
            name=name,
            parent=os.getpid(),
            store=store,
            host=host,
            road=road,
            cuda=cuda,
            jobs=list(jobs),
            deadlines=deadlines,
        )
        self._secret = new_secret()
        self._child = Child("sgpo_async.session.sender", settings, role="weight sender")
        self._child.send({"secret": self._secret.hex()})
        self.name, self.host, self.pid = name, host, self._child.pid

    def fileno(self) -> int:
        """Return the descriptor to select on: readable when `poll` has events, and always after the last event."""
        return self._child.fileno()

    def poll(self) -> list[SenderEvent]:
        """Return the events since the last call."""
        return [self._event(raw) for raw in self._child.poll()]

    def stop(self, deadline_s: float = 5.0) -> None:
        """End the session immediately. Raises DeadlineExceeded if the process still runs after `deadline_s`."""
        self._child.stop(deadline_s)

    def _event(self, raw: dict[str, Any]) -> SenderEvent:
        return SenderUp(raw["port"], self._secret) if raw["event"] == "up" else SenderDown(raw["reason"])
