"""The hub's handle of the weight uploader process. It does not import torch; only `stop` blocks."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sgpo_async.session.parent_side import Child
from sgpo_async.session.settings import Settings


@dataclass(frozen=True)
class Uploaded:
    """The folder has this version."""

    version: int
    seconds: float


@dataclass(frozen=True)
class UploaderDown:
    """The uploader has ended. This is its last event."""

    reason: str


class WeightUploader:
    """Copies every version of `store` into the folder at the URL `folder`."""

    def __init__(self, store: str, folder: str) -> None:
        settings = Settings(name="the hub", parent=os.getpid(), store=store, folder=folder)
        self._child = Child("sgpo_async.session.uploader", settings, role="weight uploader")

    def poll(self) -> list[Uploaded | UploaderDown]:
        """Return the events since the last call."""
        return [
            UploaderDown(raw["reason"]) if raw["event"] == "down" else Uploaded(raw["version"], raw["seconds"])
            for raw in self._child.poll()
        ]

    def stop(self, deadline_s: float = 5.0) -> None:
        """End it immediately. Raises DeadlineExceeded if the process still runs after `deadline_s`."""
        self._child.stop(deadline_s)
