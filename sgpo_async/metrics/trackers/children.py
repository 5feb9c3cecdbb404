"""The learner's side of the trackers: starts their processes, logs what they say, and gives them a last deadline."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sgpo_async.metrics.trackers.base import END_S, FINISHED, INTERRUPTED, state_file

log = logging.getLogger(__name__)

SLACK_S = 5.0  # beyond the deadline that the processes have themselves


class Trackers:
    """The trackers of a run; without `resumes` they begin a new run. Nothing here waits, except `wait`."""

    def __init__(self, kinds: Sequence[str], folder: Path, *, resumes: bool) -> None:
        if not resumes:
            for kind in kinds:
                state_file(folder, kind).unlink(missing_ok=True)
        self._children = [_Child(kind, folder) for kind in kinds]

    def end(self, *, finished: bool) -> None:
        """The files are complete: each writes what is left, within its deadline."""
        for child in self._children:
            child.end(FINISHED if finished else INTERRUPTED)

    def wait(self) -> None:
        """Wait until all have ended; kill those that have not after their deadline."""
        deadline = time.monotonic() + END_S + SLACK_S
        for child in self._children:
            child.wait(deadline)


class _Child:
    """One process and the thread that logs what it says."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind, self._later = kind, f"sgpo-async track {folder} {kind}"
        command = [sys.executable, "-m", "sgpo_async.metrics.trackers.process", kind, str(folder)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at the terminal is the learner's to handle
        )
        self._ended = False  # by itself, with its last event
        self._thread = threading.Thread(target=self._listen, name=f"tracker {kind}", daemon=True)
        self._thread.start()

    def end(self, word: bytes) -> None:
        assert self._process.stdin
        with suppress(OSError):  # it has died
            self._process.stdin.write(word)
        with suppress(OSError):
            self._process.stdin.close()

    def wait(self, deadline: float) -> None:
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(SLACK_S)
        if not self._ended:
            status = self._process.returncode
            how = (
                f"had not ended {END_S:g} s after the run" if status < 0 else f"its process ended with status {status}"
            )
            log.warning("tracker %s: %s; to go on: %s", self._kind, how, self._later)

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with suppress(ValueError):
                self._say(json.loads(line))

    def _say(self, event: dict[str, Any]) -> None:
        kind, text = self._kind, event.get("text")
        if event["event"] == "note":
            log.info("tracker %s: %s", kind, text)
        elif event["event"] == "failed":
            log.warning("tracker %s: cannot be written, is tried again, and training goes on (%s)", kind, text)
        else:
            self._ended = True
            if event["missing"]:
                about = (kind, event["missing"], event["failures"], text, self._later)
                log.warning("tracker %s: %d steps are missing after %d failures (%s); to write them: %s", *about)
            elif event["failures"]:
                log.info("tracker %s: complete after %d failures", kind, event["failures"])
