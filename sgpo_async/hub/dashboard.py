"""Keeps the dashboard of `hub.dashboard`, a process of its own beside the hub (`sgpo-async dashboard`).

    hub ──stdin, held open, never written──▶ dashboard ── StatusRequest ──▶ hub

The dashboard ends when its standard input ends, so it does not outlive the hub, even after `kill -9`. When it dies it
is started again; whatever happens to it, the run goes on.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

CONTACT = "dashboard.json"  # in the run's folder: its URL, while it runs
LOG = "logs/dashboard.log"
AGAIN_S = 5.0
STOP_S = 5.0  # for it to end after its standard input


class DashboardProcess:
    """The dashboard of the run in `folder`, whose hub listens at `address`."""

    def __init__(self, folder: Path, address: str, *, listen: str, keys: str) -> None:
        self._log, self._contact = folder / LOG, folder / CONTACT
        self._command: Sequence[str] = [
            *(sys.executable, "-m", "sgpo_async.cli", "dashboard", str(folder)),
            *("--hub", address, "--listen", listen, "--contact", str(self._contact)),
            *(("--keys", keys) if keys else ()),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._due = 0.0  # time of the next start
        self._warned = False

    def poll(self) -> None:
        """Start it if it does not run. Does not wait."""
        if self._process and (code := self._process.poll()) is not None:
            text = "the dashboard ended with code %d, see %s; starting it again every %g s"
            log.log(logging.DEBUG if self._warned else logging.WARNING, text, code, self._log, AGAIN_S)
            self._process, self._warned = None, True
        if self._process is None and time.monotonic() >= self._due:
            self._due = time.monotonic() + AGAIN_S
            self._start()

    def _start(self) -> None:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("wb") as output:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C is for the hub, which may still answer for a while
                )
        except OSError as error:
            log.warning("cannot start the dashboard: %s; trying again", error)

    def close(self) -> None:
        """End it."""
        if self._process:
            try:
                self._process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._contact.unlink(missing_ok=True)  # that of one that was killed
