"""Ctrl-C and SIGTERM as flags that a loop checks, instead of exceptions at any line."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import types

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
