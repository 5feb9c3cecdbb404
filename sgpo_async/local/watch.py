"""The state of a run, from its hub (asked twice a second) and from metrics.jsonl (read as it grows)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sgpo_async.metrics import MetricsTail
from sgpo_async.metrics.reader import METRICS
from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.wire.records import Status, StatusRequest

ASK_EVERY_S = 0.5


class Watch:
    """Newest status and newest value of every metric; `poll` never waits.

    `since` is when the run began (seconds since the epoch): an older metrics.jsonl belongs to an earlier run.
    """

    def __init__(self, folder: Path, *, keys: str = "", max_bytes: int, since: float = 0.0) -> None:
        self.status: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self._path, self._since = folder / METRICS, since
        self._tail = MetricsTail(folder)
        self._keys, self._max_bytes = keys, max_bytes
        self._hub: Mailbox | None = None
        self._asked = 0.0

    def poll(self, address: str) -> None:
        """Read what is new; `address` is the hub's address, or empty while it is unknown."""
        if self._path.exists() and self._path.stat().st_mtime >= self._since:
            for line in self._tail.poll():
                self.history.append(line)
                self.metrics.update({key: value for key, value in line.items() if value is not None})
        if address:
            self._ask(address)

    def _ask(self, address: str) -> None:
        if self._hub is None:
            self._hub = Mailbox(Dealer(address, keys=self._keys, max_bytes=self._max_bytes))
        now = time.monotonic()
        if now - self._asked >= ASK_EVERY_S:
            self._asked = now
            self._hub.send(StatusRequest())
        for answer in self._hub.receive(0.0):
            if isinstance(answer, Status):
                self.status = answer.status

    def close(self) -> None:
        """Close the connection to the hub."""
        if self._hub is not None:
            self._hub.close()
