"""Follows a supervised run without a display: passes every line of its metrics to a function."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sgpo_async.config import Run
from sgpo_async.local.supervisor import Supervisor
from sgpo_async.local.watch import Watch

Progress = Callable[[Mapping[str, Any]], None]
"""Called with each line of metrics.jsonl, one per step, as soon as it is written."""


class Follow:
    """An Observer of `sgpo_async.local.supervisor` for programs."""

    def __init__(self, settings: Run, progress: Progress) -> None:
        self._progress = progress
        hub = settings.hub
        folder = Path(settings.folder)
        self._watch = Watch(folder, keys=hub.keys, max_bytes=hub.max_message_mb << 20, since=time.time())
        self._told = 0  # the last step whose line was passed on

    @property
    def stalled(self) -> str:
        """The hub's reason why the run makes no progress; empty if it does."""
        return str(self._watch.status.get("stalled", ""))

    def update(self, supervisor: Supervisor) -> None:
        """Pass on what is new."""
        self._pass_on(supervisor.address)

    def close(self, *, stopping: bool) -> None:  # noqa: ARG002
        """Pass on what came last."""
        self._pass_on("")
        self._watch.close()

    def _pass_on(self, address: str) -> None:
        self._watch.poll(address)
        if self._watch.from_hub:  # until metrics.jsonl exists
            return
        for line in [line for line in self._watch.history if line["step"] > self._told]:
            self._told = line["step"]
            self._progress(line)
