"""Ctrl-C and SIGTERM as facts that a loop looks at, instead of exceptions at any line."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import types

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Within this context, signals are counted; `wait` sleeps and ends early when one arrives."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> Signals:
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._old_wakeup = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._note) for number in HANDLED}
        if self._old[signal.SIGHUP] is signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._in)
        os.close(self._out)

    def _note(self, number: int, _frame: types.FrameType | None) -> None:
        self.received.append(number)

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds` or until a signal arrives."""
        select.select([self._out], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._out, 4096)

    @property
    def stop(self) -> bool:
        """Somebody wants us to end."""
        return bool(self.received)

    @property
    def kill(self) -> bool:
        """Somebody wants us to end at once."""
        return len(self.received) > 1

    @property
    def exit_code(self) -> int:
        """By convention 128 and the signal's number."""
        return 128 + self.received[0]
