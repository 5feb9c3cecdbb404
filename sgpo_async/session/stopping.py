"""End session processes in threads: a killed process may end late on a busy machine, and nobody should wait for it."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from sgpo_async.errors import DeadlineExceeded

log = logging.getLogger(__name__)


class Stoppable(Protocol):
    """The part of a handle, such as `WeightSender`, that this uses."""

    def stop(self, deadline_s: float) -> None:
        """End the process. Raises DeadlineExceeded if it has not ended after `deadline_s` seconds."""
        ...


class Stopping:
    """Ends processes, each with a timeout of `seconds`; one that ends later is only logged."""

    def __init__(self, *, seconds: float, threads: int) -> None:
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="stop")
        self._ends: list[Future[None]] = []

    def stop(self, handle: Stoppable) -> None:
        """End a process, without waiting."""
        self._ends.append(self._threads.submit(handle.stop, self._seconds))
        for end in [end for end in self._ends if end.done()]:
            self._ends.remove(end)
            _log_timeout(end)

    def close(self) -> None:
        """Wait until all have ended, or had their time."""
        self._threads.shutdown()
        for end in self._ends:
            _log_timeout(end)
        self._ends.clear()


def _log_timeout(end: Future[None]) -> None:
    try:
        end.result()
    except DeadlineExceeded as error:
        log.warning("%s", error)
