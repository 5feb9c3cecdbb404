"""The hub's handle of a weight sender process. It does not import torch; only `stop` blocks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sgpo_async.session.parent_side import Child
from sgpo_async.session.settings import Deadlines, Settings


@dataclass(frozen=True)
class SenderUp:
    """The weight sender waits for its weight receiver at this port of its host."""

    port: int


@dataclass(frozen=True)
class SenderDown:
    """The session is over. This is the last event of a weight sender."""

    reason: str


SenderEvent = SenderUp | SenderDown


class WeightSender:
    """The sending end of one session: listens on `host`, serves the weights in `store` to actor `name`.

    With `cuda` it may use this machine's GPUs, for weight-update groups over NCCL.
    """

    def __init__(
        self, store: str, name: str, host: str, *, cuda: bool = False, deadlines: Deadlines | None = None
    ) -> None:
        settings = Settings(
            name=name, parent=os.getpid(), store=store, host=host, cuda=cuda, deadlines=deadlines or Deadlines()
        )
        self._child = Child("sgpo_async.session.sender", settings, role="weight sender")
        self.name, self.host, self.pid = name, host, self._child.pid

    def fileno(self) -> int:
        """Return the descriptor to select on: readable when `poll` has events, and always after the last event."""
        return self._child.fileno()

    def poll(self) -> list[SenderEvent]:
        """Return the events since the last call."""
        return [_event(raw) for raw in self._child.poll()]

    def stop(self, deadline_s: float = 5.0) -> None:
        """End the session immediately. Raises DeadlineExceeded if the process still runs after `deadline_s`."""
        self._child.stop(deadline_s)


def _event(raw: dict[str, Any]) -> SenderEvent:
    return SenderUp(raw["port"]) if raw["event"] == "up" else SenderDown(raw["reason"])
