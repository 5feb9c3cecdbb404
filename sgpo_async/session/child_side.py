"""The child's side: speaks the line protocol and never outlives its parent or its deadlines.

    parent ──stdin──▶ guard thread ──commands──▶ main thread        waits for: a line, or 0.2 s
                          │ ends the process: the input ends, the parent is gone, a phase runs too long
    parent ◀──stdout── main thread                                  (standard output is the protocol's alone)

The guard is a thread of its own because the main thread may hang inside a library call that cannot be
interrupted. Nothing needs cleaning up on the way out: weight stores are anonymous files.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sgpo_async.errors import SessionError, SgpoError
from sgpo_async.session.settings import Settings

_LONGEST = 500  # characters: an event stays below the size that a pipe takes at once
_TICK_S = 0.2


def run_child(role: str, body: Callable[[Settings, ChildSide], NoReturn]) -> None:
    """Main of a child process: its settings are the one argument, `body` ends by an error."""
    settings = Settings.decode(sys.argv[1])
    guard = ChildSide(f"{role} of {settings.name}", settings.parent)
    try:
        body(settings, guard)
    except SgpoError as error:
        guard.down(str(error))
    except Exception as error:
        traceback.print_exc()
        guard.down(f"internal error: {error!r}")


def one_line(text: str) -> str:
    """Text that fits into an event."""
    return " ".join(text.split())[:_LONGEST]


class ChildSide:
    """Holds a child's three ties: its parent, its deadlines, its protocol."""

    def __init__(self, who: str, parent: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides when we stop
        self._who = who
        self.commands: queue.SimpleQueue[Any] = queue.SimpleQueue()  # the parent's, and what else the child puts in
        self._parent = parent
        self._phase: tuple[str, float, float] | None = None  # name, seconds, when it is over (monotonic)
        self._out = os.dup(1)
        os.dup2(2, 1)  # whatever else prints goes to standard error
        threading.Thread(target=self._watch, name="guard", daemon=True).start()

    def emit(self, event: str, **fields: Any) -> None:
        """Tell the parent; if it is gone, so are we."""
        line = json.dumps({"event": event, **fields}) + "\n"
        try:
            os.write(self._out, line.encode())
        except BrokenPipeError:
            os._exit(0)

    def down(self, reason: str) -> NoReturn:
        """Tell the parent who ends and why, and end."""
        self.emit("down", reason=one_line(f"{self._who}: {reason}"))
        os._exit(1)

    @contextmanager
    def phase(self, name: str, seconds: float) -> Iterator[None]:
        """End the process if the body takes longer; name the phase in every failure of the body."""
        self._phase = (name, seconds, time.monotonic() + seconds)
        try:
            yield
        except (RuntimeError, OSError, SgpoError) as error:
            raise SessionError(f"{name}: {error}") from error
        finally:
            self._phase = None

    def _watch(self) -> None:
        partial = b""
        while os.getppid() == self._parent:
            phase = self._phase
            if phase and time.monotonic() > phase[2]:
                self.down(f"{phase[0]}: not done within {phase[1]:g} s")
            if not select.select([0], [], [], _TICK_S)[0]:
                continue
            data = os.read(0, 65536)
            if not data:
                break
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                self.commands.put(json.loads(line))
        os._exit(0)
