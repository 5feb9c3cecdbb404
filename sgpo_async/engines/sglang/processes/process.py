"""One server's processes on this machine, as their parent sees them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

from sgpo_async.engines.sglang.processes.launch import Launch
from sgpo_async.errors import DeadlineExceeded, EngineError
from sgpo_async.processes import watchdog

WATCHDOG = Path(watchdog.__file__)
STOP_S = 10.0
PORTS = 12_000  # that servers are given to choose from
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class ServerProcess:
    """A launched server; it lives in a process group of its own, which ends as a whole."""

    def __init__(self, launch: Launch, log: Path) -> None:
        """Start it. Raises EngineError if its Python does not exist."""
        self.log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = launch.command(port)
        if not Path(command[0]).exists():
            raise EngineError(
                f"engine.sglang.python: there is no {command[0]!r}; name the Python of an environment with sglang "
                "(on a CPU: make sglang-cpu)"
            )
        with log.open("ab") as output:
            self._begun_at = output.tell()
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", str(WATCHDOG), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=launch.environment(),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether the server's main process runs."""
        return self._watchdog.poll() is None

    @property
    def port_taken(self) -> bool:
        """Whether it could not bind its port. SGLang says so, serves nothing, and does not end."""
        with self.log.open("rb") as log:
            log.seek(self._begun_at)
            return b"address already in use" in log.read()

    @property
    def group(self) -> int:
        """Id of the process group."""
        return self._watchdog.pid

    def last_words(self, lines: int = 8) -> str:
        """The end of its log, one line a line, indented."""
        text = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        return "\n".join([f"the end of {self.log}:", *(f"    {line[:300]}" for line in text[-lines:])])

    def stop(self) -> None:
        """Kill the whole group: a server has nothing to clean up. Raises DeadlineExceeded if that takes too long."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        try:
            self._watchdog.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"server {self.url}", "end after SIGKILL", STOP_S) from None
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()


def _free_port() -> int:
    """A port that is free now, and stays so: below those that the system gives to connections.

    A server binds its port only when it has loaded, seconds later. One of the system's own choice may meanwhile have
    become the near end of anybody's connection.
    """
    below = _first_ephemeral()
    for _ in range(100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(below - PORTS, below)))
            return int(probe.getsockname()[1])
    raise EngineError(f"of the ports from {below - PORTS} to {below - 1} hardly any is free; stop what uses them")


def _first_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768  # Linux's default
