"""Handle of a link process, for the hub. Torch-free; only `stop` waits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sgpo_async.session.parent_side import Child
from sgpo_async.session.settings import Deadlines, Settings


@dataclass(frozen=True)
class SenderUp:
    """The link waits for its node at this port of its host."""

    port: int


@dataclass(frozen=True)
class SenderDown:
    """The session is over; the last event of a link."""

    reason: str


SenderEvent = SenderUp | SenderDown


class WeightSender:
    """The hub's end of one session: listens on `host`, serves the weights in `store` to actor `name`.

    With `cuda` it may use this machine's GPUs, for weight-update groups over NCCL.
    """

    def __init__(
        self, store: str, name: str, host: str, *, cuda: bool = False, deadlines: Deadlines | None = None
    ) -> None:
        settings = Settings(
            name=name, parent=os.getpid(), store=store, host=host, cuda=cuda, deadlines=deadlines or Deadlines()
        )
        self._child = Child("sgpo_async.session.sender", settings)
        self.name, self.host, self.pid = name, host, self._child.pid

    def fileno(self) -> int:
        """Readable whenever `poll` has something to say, and for ever after the last event."""
        return self._child.fileno()

    def poll(self) -> list[SenderEvent]:
        """Events since the last call."""
        return [_event(raw) for raw in self._child.poll()]

    def control(self, word: str) -> None:
        """Pass a word, such as "drain", on to the actor, which gets it as `NodeControl`."""
        self._child.send({"control": word})

    def stop(self, deadline_s: float = 5.0) -> None:
        """End the session at once. Raises DeadlineExceeded if the process does not go in `deadline_s`."""
        self._child.stop(deadline_s)


def _event(raw: dict[str, Any]) -> SenderEvent:
    return SenderUp(raw["port"]) if raw["event"] == "up" else SenderDown(raw["reason"])
