"""Keeps a weight uploader for `hub.weight_folder`; starts another one when it ends or the store is another file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from sgpo_async.session.stopping import Stopping
from sgpo_async.session.uploader_process import UploaderDown, WeightUploader

log = logging.getLogger(__name__)

AGAIN_S = 5.0
STOP_S = 5.0


class Uploads:
    """Copies the versions of the store at `path` to `folder` (a URL)."""

    def __init__(self, path: str, folder: str, *, start: Callable[[str, str], WeightUploader] = WeightUploader) -> None:
        self._path, self._folder, self._start = path, folder, start
        self._uploader: WeightUploader | None = None
        self._due = 0.0  # time of the next start
        self._stopping = Stopping(seconds=STOP_S, threads=1)

    def poll(self) -> None:
        """Start the uploader if there is none, and log what it says. Does not wait."""
        if self._uploader is None:
            if time.monotonic() < self._due:
                return
            self._due = time.monotonic() + AGAIN_S
            try:
                self._uploader = self._start(self._path, self._folder)
            except OSError as error:
                log.warning("cannot start a weight uploader: %s; trying again", error)
                return
        for event in self._uploader.poll():
            if isinstance(event, UploaderDown):
                log.warning("%s; starting another one", event.reason)
                self.restart()
                return
            log.debug("weights version %d is in %s after %.1f s", event.version, self._folder, event.seconds)

    def restart(self) -> None:
        """End the uploader; the next `poll` that is due starts another one."""
        uploader, self._uploader = self._uploader, None
        if uploader:
            self._stopping.stop(uploader)

    def close(self) -> None:
        """End the uploader."""
        self.restart()
        self._stopping.close()
