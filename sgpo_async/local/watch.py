"""The state of a run, from its hub (asked twice a second) and from the files in its folder (read as they grow)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sgpo_async.files import written_since
from sgpo_async.metrics import MetricsTail
from sgpo_async.metrics.reader import METRICS
from sgpo_async.metrics.samples import SAMPLES, SamplesTail
from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.wire.records import Settings, SettingsRequest, Status, StatusRequest

ASK_EVERY_S = 0.5


class Watch:
    """Newest status, newest value of every metric and newest sample; `poll` never waits.

    Without a folder, which may be on another machine, there are no metrics, and `history` has the pass rates of the
    steps that the hub has reported.

    `since` is when the run began (seconds since the epoch): older files belong to an earlier run.
    """

    def __init__(self, folder: Path | None, *, keys: str = "", max_bytes: int, since: float = 0.0) -> None:
        self.status: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.sample: dict[str, Any] | None = None
        self.settings: dict[str, Any] = {}  # the run's configuration as plain data, once the hub has sent it
        self.answered = 0.0  # when the last status arrived, by the monotonic clock; 0: never
        self._folder, self._since = folder, since
        if folder is not None:
            self._tail, self._samples = MetricsTail(folder), SamplesTail(folder)
        self._keys, self._max_bytes = keys, max_bytes
        self._hub: Mailbox | None = None
        self._asked = 0.0

    def poll(self, address: str) -> None:
        """Read what is new; `address` is the hub's address, or empty while it is unknown.

        Raises HubError if the hub refuses the connection.
        """
        if self._written(METRICS):
            for line in self._tail.poll():
                self.history.append(line)
                self.metrics.update({key: value for key, value in line.items() if value is not None})
        if self._written(SAMPLES):
            for sample in self._samples.poll():
                self.sample = sample
        if address:
            self._ask(address)

    def _written(self, name: str) -> bool:
        """Whether this run has written the file."""
        return self._folder is not None and written_since(self._folder / name, self._since)

    def _ask(self, address: str) -> None:
        if self._hub is None:
            self._hub = Mailbox(Dealer(address, keys=self._keys, max_bytes=self._max_bytes))
        now = time.monotonic()
        if now - self._asked >= ASK_EVERY_S:
            self._asked = now
            self._hub.send(StatusRequest())
            if self._folder is None and not self.settings:
                self._hub.send(SettingsRequest())
        for answer in self._hub.receive(0.0):
            if isinstance(answer, Status):
                self._take(answer.status, now)
            elif isinstance(answer, Settings):
                self.settings = answer.settings
        self._hub.dealer.check_refused()

    def _take(self, status: dict[str, Any], now: float) -> None:
        self.status, self.answered = status, now
        step = status.get("step", 0)
        if self._folder is None and step and (not self.history or step > self.history[-1]["step"]):
            self.history.append({key: status.get(key) for key in ("step", "pass_auto", "pass_guided")})

    def close(self) -> None:
        """Close the connection to the hub."""
        if self._hub is not None:
            self._hub.close()
