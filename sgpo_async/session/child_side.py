"""The child's side of the line protocol; it also ends the child with its parent and at its deadlines.

    parent ──stdin──▶ watchdog thread ──commands──▶ main thread     waits for a line, at most 0.2 s at a time
                          │ ends the process when its input ends, the parent is gone, or a phase takes too long
    parent ◀──stdout── main thread                                  (only the protocol writes to standard output)

The watchdog has its own thread because the main thread may hang inside a library call that cannot be interrupted.
The process needs no cleanup when it ends: weight stores are anonymous files.
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
from sgpo_async.processes.stacks import print_stacks_on_signal
from sgpo_async.session.settings import Settings

_LONGEST = 500  # characters of a message: an event must fit into one atomic write to a pipe
_TICK_S = 0.2


def run_child(role: str, body: Callable[[Settings, ChildSide], NoReturn]) -> None:
    """Run `body` as the main function of a child process, whose settings are its only command-line argument.

    `body` never returns; it ends by an error, which is reported to the parent.
    """
    print_stacks_on_signal()
    settings = Settings.decode(sys.argv[1])
    child = ChildSide(f"{role} of {settings.name}", settings.parent)
    try:
        body(settings, child)
    except SgpoError as error:
        child.down(str(error))
    except Exception as error:
        traceback.print_exc()
        child.down(f"internal error: {error!r}")


def one_line(text: str) -> str:
    """Return `text` in one line that is short enough for an event."""
    return " ".join(text.split())[:_LONGEST]


class ChildSide:
    """Receives commands from the parent, sends events to it, and ends the process when it has to end."""

    def __init__(self, name: str, parent: int) -> None:
        """`name` names this process in messages; `parent` is the process id of its parent."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the parent decides when this process ends
        self._name = name
        self.commands: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of the parent, and messages of this process
        self._parent = parent
        self._phase: tuple[str, float, float] | None = None  # name, seconds, deadline (monotonic)
        self._out = os.dup(1)
        os.dup2(2, 1)  # anything else that is printed goes to standard error
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def emit(self, event: str, **fields: Any) -> None:
        """Send an event to the parent; end this process if the parent is gone."""
        line = json.dumps({"event": event, **fields}) + "\n"
        try:
            os.write(self._out, line.encode())
        except BrokenPipeError:
            os._exit(0)

    def down(self, reason: str) -> NoReturn:
        """Send the parent the last event, with the name of this process and the reason, and exit."""
        self.emit("down", reason=one_line(f"{self._name}: {reason}"))
        os._exit(1)

    @contextmanager
    def phase(self, name: str, seconds: float) -> Iterator[None]:
        """End the process if the body takes longer than `seconds`; name the phase in every error of the body."""
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
            phase = self._phase  # read once: the main thread may reset it meanwhile
            if phase is not None:
                name, seconds, deadline = phase
                if time.monotonic() > deadline:
                    self.down(f"{name}: not done within {seconds:g} s")
            if not select.select([0], [], [], _TICK_S)[0]:
                continue
            data = os.read(0, 65536)
            if not data:
                break
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                self.commands.put(json.loads(line))
        os._exit(0)
