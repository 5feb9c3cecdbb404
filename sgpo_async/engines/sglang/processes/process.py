"""The processes of one server on this machine, started and stopped by their parent."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from sgpo_async.engines.sglang.processes.launch import Launch
from sgpo_async.errors import DeadlineExceeded, EngineError
from sgpo_async.installation import sglang_for_cpus
from sgpo_async.processes import watchdog

WATCHDOG = Path(watchdog.__file__)
STOP_S = 10.0
POLL_S = 0.05
PORTS = 12_000  # number of ports that servers choose from
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class ServerProcess:
    """A launched server. Its processes form a process group of their own, which is killed as a whole."""

    def __init__(self, launch: Launch, log: Path) -> None:
        """Start the server. Raises EngineError if its Python does not exist."""
        self.log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = launch.command(port)
        if not Path(command[0]).exists():
            raise EngineError(
                f"engine.sglang.python: {command[0]!r} does not exist; set it to the Python of an environment with "
                f"sglang ({sglang_for_cpus()})"
            )
        with log.open("ab") as output:
            self._log_start = output.tell()
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
        """Whether the server's main process is running."""
        return self._watchdog.poll() is None

    @property
    def port_taken(self) -> bool:
        """Whether another process had taken its port. SGLang then logs an error and keeps running without serving."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return b"address already in use" in log.read()

    @property
    def group(self) -> int:
        """The id of the process group."""
        return self._watchdog.pid

    def log_tail(self, lines: int = 8) -> str:
        """The last lines of its log, indented."""
        text = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        return "\n".join([f"the end of {self.log}:", *(f"    {line[:300]}" for line in text[-lines:])])

    def stop(self) -> None:
        """Kill the process group, and wait until all of it has ended: until then it may hold the memory of a GPU.

        A server needs no clean-up. Raises DeadlineExceeded if its end takes too long.
        """
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        deadline = time.monotonic() + STOP_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        while self.alive or _has_members(self.group):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"server {self.url}", "end after SIGKILL", STOP_S)
            time.sleep(POLL_S)


def _has_members(group: int) -> bool:
    """Whether a process of the group lives. Zombies do not count: where no init process reaps them, they stay."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _free_port() -> int:
    """A free port below the range from which the system takes the local ports of connections.

    A server binds its port only after it has loaded its model, seconds later. A port from the system's range could
    meanwhile become the local port of some connection.
    """
    below = _first_ephemeral()
    for _ in range(100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(below - PORTS, below)))
            return int(probe.getsockname()[1])
    raise EngineError(
        f"cannot find a free port: 100 random ports in [{below - PORTS}, {below - 1}] are in use; "
        f"stop the processes that use them"
    )


def _first_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768  # the default of Linux
