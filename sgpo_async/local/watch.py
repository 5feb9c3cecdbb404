"""The state of a run, from its hub (asked twice a second) and from the files in its folder (read as they grow)."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

from sgpo_async.files import written_since
from sgpo_async.metrics import MetricsTail
from sgpo_async.metrics.reader import METRICS
from sgpo_async.metrics.samples import SAMPLES, SamplesTail
from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.wire.records import Settings, SettingsRequest, Status, StatusRequest

ASK_EVERY_S = 0.5
SAMPLES_KEPT = 64  # newest groups
FROM_STATUS = (  # keys of metrics.jsonl that the status has, too
    *("step", "version", "pass_auto", "pass_guided", "reward_auto", "reward_guided", "uniform", "cut"),
    *("length_auto", "length_guided"),
    *("tokens_dropped", "canary_mean", "canary_max", "tokens_per_s", "engine_idle", "engine_waits"),
)


class Watch:
    """Newest status, newest value of every metric and newest samples; `poll` never waits.

    Without metrics.jsonl, which may be on another machine, there are no metrics, and `history` has what the hub has
    reported of the steps.

    `since` is when the run began (seconds since the epoch): older files belong to an earlier run. Without it the hub's
    first answer says when that was.
    """

    def __init__(self, folder: Path | None, *, keys: str = "", max_bytes: int, since: float = 0.0) -> None:
        self.status: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.samples: deque[dict[str, Any]] = deque(maxlen=SAMPLES_KEPT)
        self.settings: dict[str, Any] = {}  # the run's configuration as plain data, once the hub has sent it
        self.answered = 0.0  # when the last status arrived, by the monotonic clock; 0: never
        self._folder, self._since = folder, since
        self.from_hub = False  # whether `history` is what the hub has reported, and no lines of metrics.jsonl
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
            lines = self._tail.poll()
            if lines and (self.from_hub or lines[0]["step"] <= self.metrics.get("step", 0)):
                self._forget()  # the hub's lines, or those of an attempt before this one
            for line in lines:
                self.history.append(line)
                self.metrics.update({key: value for key, value in line.items() if value is not None})
        if self._written(SAMPLES):
            samples = self._samples.poll()
            if samples and self.samples and samples[0]["step"] < self.samples[-1]["step"]:
                self.samples.clear()  # the file was written anew
            self.samples.extend(samples)
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
            if not self.settings:
                self._hub.send(SettingsRequest())
        for answer in self._hub.receive(0.0):
            if isinstance(answer, Status):
                self._take(answer.status, now)
            elif isinstance(answer, Settings):
                self.settings = answer.settings
        self._hub.dealer.check_refused()

    def _take(self, status: dict[str, Any], now: float) -> None:
        if not self.answered and not self._since:
            self._since = time.time() - (status.get("uptime_s") or 0.0)
            if not self._written(METRICS):
                self._forget()
            if not self._written(SAMPLES):
                self.samples.clear()
        self.status, self.answered = status, now
        step, lag = status.get("step", 0), status.get("lag") or {}
        if not self._written(METRICS) and step and (not self.history or step > self.history[-1]["step"]):
            own = {"lag_mean": lag.get("mean"), "lag_max": lag.get("max"), "lag_histogram": lag.get("histogram")}
            self.history.append({key: status.get(key) for key in FROM_STATUS} | own)
            self.from_hub = True

    @property
    def sample(self) -> dict[str, Any] | None:
        """The newest sample."""
        return self.samples[-1] if self.samples else None

    def _forget(self) -> None:
        """Forget all steps."""
        self.history.clear()
        self.metrics.clear()
        self.from_hub = False

    def close(self) -> None:
        """Close the connection to the hub."""
        if self._hub is not None:
            self._hub.close()
