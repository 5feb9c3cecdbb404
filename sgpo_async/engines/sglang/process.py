"""One server's processes on this machine, as their parent sees them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from sgpo_async.engines.sglang.launch import Launch
from sgpo_async.errors import DeadlineExceeded, EngineError

KEEPER = Path(__file__).with_name("keeper.py")
STOP_S = 10.0


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
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", str(KEEPER), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=launch.environment(),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether the server's main process runs."""
        return self._keeper.poll() is None

    @property
    def group(self) -> int:
        """Id of the process group."""
        return self._keeper.pid

    def last_words(self, lines: int = 8) -> str:
        """The end of its log, one line a line, indented."""
        text = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        return "\n".join([f"the end of {self.log}:", *(f"    {line[:300]}" for line in text[-lines:])])

    def stop(self) -> None:
        """Kill the whole group: a server has nothing to clean up. Raises DeadlineExceeded if that takes too long."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        try:
            self._keeper.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"server {self.url}", "end after SIGKILL", STOP_S) from None
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
