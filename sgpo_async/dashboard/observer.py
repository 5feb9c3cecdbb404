"""What is known of a run: asked of its hub, read from its folder, or both."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo_async.errors import DataError, SgpoError
from sgpo_async.local.display import View
from sgpo_async.local.remote import LATE_S, MAX_BYTES, phase_of
from sgpo_async.local.run_folder import read_hub_file
from sgpo_async.local.watch import Watch
from sgpo_async.logs import one_line
from sgpo_async.metrics import read_summary
from sgpo_async.report.page import read_config

SUMMARY_EVERY_S = 2.0  # how often summary.json is read

# Only an interrupted run, a stalled one and one whose hub is silent are not healthy.
STATES = ("waiting", "training", "closing", "ended", "stalled", "silent", "interrupted")
HEALTHY = STATES[:4]


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The state of a run at one moment."""

    view: View
    state: str  # one of STATES
    reason: str  # the state in one line, in this package's own words: it may be shown to everybody
    age_s: float | None  # since the hub's last answer; None: it has never answered
    hub: str  # its address; "" without one
    settings: Mapping[str, Any]  # the run's configuration as plain data; {} while it is not known
    summary: Mapping[str, Any]  # summary.json; {} while the run goes on
    samples: Sequence[Mapping[str, Any]]
    error: str = ""  # what cannot be read or reached, in one line

    @property
    def healthy(self) -> bool:
        """Whether the hub answers and the run makes progress, or has ended well."""
        return self.state in HEALTHY

    def setting(self, key: str) -> Any:
        """The value of a key such as hub.max_lag; None if it is not known."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


class Observer:
    """Follows the run with the hub at `hub`, or that which writes to `folder`; its hub.json then names the hub."""

    def __init__(self, *, hub: str = "", folder: Path | None = None, keys: str = "") -> None:
        self._hub, self._folder, self._keys = hub, folder, keys
        self._config = read_config(folder / "config.yaml") if folder else {}
        self._address = ""
        self._watch = self._new_watch()
        self._summary: dict[str, Any] = {}
        self._read_at = 0.0
        self._error = self._unreadable = ""

    def poll(self) -> None:
        """Read what is new; never waits. An error is kept for the view: another hub or file may come."""
        self._error = ""
        try:
            self._follow_hub()
            self._watch.poll(self._address)
            if self._folder and time.monotonic() - self._read_at > SUMMARY_EVERY_S:
                self._read_at = time.monotonic()
                self._summary = read_summary(self._folder)
                if not self._watch.settings:
                    self._config = read_config(self._folder / "config.yaml")
        except DataError as error:
            self._unreadable = str(error)  # what came with a bad line stays missing
        except SgpoError as error:
            self._error = str(error)

    def close(self) -> None:
        """Close the connection to the hub."""
        self._watch.close()

    def view(self) -> RunView:
        """What is known now."""
        watch, settings = self._watch, self._watch.settings or self._config
        age = time.monotonic() - watch.answered if watch.answered else None
        state, reason = self._state(age)
        status = watch.status
        phase = phase_of(status) if status and state not in ("stalled", "silent") else reason
        name = settings.get("name") or (self._folder.resolve().name if self._folder else self._hub)
        return RunView(
            view=View(
                name=one_line(name, 200),
                phase=phase,
                steps=status.get("steps") or settings.get("steps") or 0,
                elapsed_s=status.get("uptime_s") or watch.metrics.get("wall_s") or 0.0,
                metrics=watch.metrics,
                history=watch.history,
                status=status,
                actors={},
            ),
            state=state,
            reason=reason,
            age_s=age,
            hub=self._address,
            settings=settings,
            summary=self._summary,
            samples=list(watch.samples),
            error=self._error or self._unreadable,
        )

    def _state(self, age: float | None) -> tuple[str, str]:
        status = self._watch.status
        if age is not None and age <= LATE_S:
            if status.get("closing"):
                return "closing", "the run is ending"
            if status.get("stalled"):
                return "stalled", "the run makes no progress"
            phase = phase_of(status)
            return ("training" if phase == "training" else "waiting"), phase
        if self._summary:
            interrupted = self._summary.get("interrupted")
            return ("interrupted", "the run was interrupted") if interrupted else ("ended", "the run has ended")
        if status.get("closing"):
            return "ended", "the run has ended"
        if age is not None:
            return "silent", f"the hub has not answered for {age:.0f} s"
        if self._address:
            return "silent", "the hub has not answered yet"
        return "interrupted", "no hub runs here, and there is no summary.json: the run was killed, or has not begun"

    def _follow_hub(self) -> None:
        """Find the hub's address; a hub at another address is another run, or another attempt."""
        address = self._hub or (read_hub_file(self._folder).get("address", "") if self._folder else "")
        if address and address != self._address:
            if self._address:
                self._watch.close()
                self._watch = self._new_watch()
            self._address = address

    def _new_watch(self) -> Watch:
        keys = self._keys or self._config.get("hub", {}).get("keys", "")
        return Watch(self._folder, keys=keys, max_bytes=MAX_BYTES)
