"""The parent's side of a child process: send it JSON lines, read JSON lines from it, and end it.

Only `stop` blocks. The child's standard error is the parent's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.session.settings import Settings

_UNWANTED = ("TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_")  # set by torchrun


class Child:
    """One child process. Its last event is always {"event": "down", "reason": ...}, however the process ended."""

    def __init__(self, module: str, settings: Settings, *, role: str) -> None:
        """Start `module`; `role` names the process in messages."""
        self._name = f"{role} of {settings.name}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, settings.encode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(settings),
            process_group=0,  # Ctrl-C in a terminal must not reach the child
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._in.fileno(), False)
        os.set_blocking(self._out.fileno(), False)
        self._partial = b""
        self._unsent = bytearray()
        self._sending = threading.Lock()
        self._down = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def fileno(self) -> int:
        """Return the descriptor to select on: readable when `poll` has events, and always after the last event."""
        return self._out.fileno()

    def send(self, command: dict[str, Any]) -> None:
        """Send the child a command, from any thread. The next `poll` sends what does not fit into the pipe now.

        If the child is dead, nothing happens; `poll` reports its death.
        """
        with self._sending:
            self._unsent += json.dumps(command).encode() + b"\n"
            self._flush()

    def poll(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        if self._down:
            return []
        with self._sending:
            self._flush()
        data, ended = self._read()
        *lines, self._partial = (self._partial + data).split(b"\n")
        events = []
        for line in lines:
            event = json.loads(line)
            self._down = event["event"] == "down"
            events.append(event)
            if self._down:
                return events
        if ended:
            self._down = True
            events.append({"event": "down", "reason": f"{self._name}: {self._exit_reason()}"})
        return events

    def stop(self, deadline_s: float = 5.0) -> None:
        """Kill the child, which needs no cleanup. Raises DeadlineExceeded if it still runs after `deadline_s`."""
        self._down = True
        self._process.kill()
        with self._sending:
            self._in.close()
        self._out.close()
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(self._name, "end after SIGKILL", deadline_s) from None

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: os.write(self._in.fileno(), self._unsent)]
        except BlockingIOError:
            return
        except (BrokenPipeError, ValueError):
            self._unsent.clear()

    def _read(self) -> tuple[bytes, bool]:
        data = bytearray()
        while True:
            try:
                piece = os.read(self.fileno(), 65536)
            except BlockingIOError:
                return bytes(data), False
            if not piece:
                return bytes(data), True
            data += piece

    def _exit_reason(self) -> str:
        try:
            code = self._process.wait(1.0)  # its output is closed, so it is about to exit
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _environment(settings: Settings) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_UNWANTED)}
    added = {
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # Torch would print a warning whenever the peer leaves
    }
    if not settings.cuda:
        added["CUDA_VISIBLE_DEVICES"] = ""  # the weights pass through CPU memory; avoids a CUDA context per session
    return kept | added
