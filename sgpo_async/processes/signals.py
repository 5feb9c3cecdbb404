"""Ctrl-C and SIGTERM as flags that a loop checks, instead of exceptions at any line."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
import types
from collections.abc import Callable

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 2.0  # signals within this time of the first are the same request: a job manager signals torchrun and its ranks


class Signals:
    """Context that records signals; `wait` sleeps and returns early when a signal arrives."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> Signals:
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._old_wakeup = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._record) for number in HANDLED}
        if self._old[signal.SIGHUP] is signal.SIG_IGN:  # started by nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._in)
        os.close(self._out)

    def _record(self, number: int, _frame: types.FrameType | None) -> None:
        self.received.append(number)

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds` or until a signal arrives."""
        select.select([self._out], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._out, 4096)

    @property
    def stop(self) -> bool:
        """Whether the process shall end: it has received a signal."""
        return bool(self.received)

    @property
    def kill(self) -> bool:
        """Whether the process shall end at once: it has received a second signal."""
        return len(self.received) > 1

    @property
    def exit_code(self) -> int:
        """128 plus the number of the first signal, by convention."""
        return 128 + self.received[0]

    @property
    def reason(self) -> str:
        """What has arrived, e.g. "received SIGTERM"; empty without a signal."""
        return f"received {signal.Signals(self.received[0]).name}" if self.received else ""


class UrgentSignals(Signals):
    """Signals of a process whose main thread may wait in library code, where it runs no handler.

    A thread ends the process at a second signal, and at the first one unless `in_order()` says that the process can
    still end in good order.
    """

    def __init__(self, in_order: Callable[[], bool]) -> None:
        super().__init__()
        self._in_order = in_order

    def __enter__(self) -> UrgentSignals:
        super().__enter__()
        os.set_blocking(self._out, True)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._in, b"\0")
        self._thread.join()
        super().__exit__()

    def _watch(self) -> None:
        first = 0.0
        while number := os.read(self._out, 1)[0]:  # the interpreter writes the number of each signal
            if number not in HANDLED:
                continue
            now = time.monotonic()
            if now - first > SAME_S if first else not self._in_order():
                os._exit(128 + number)
            first = first or now
