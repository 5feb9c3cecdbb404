"""Starts the processes of one run on this machine, each with a log, and ends them all."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sgpo_async.files import FREE_SOME, disk_full, reporting_write_errors
from sgpo_async.local.run_folder import forget_hub
from sgpo_async.processes.marked import GRACE_S, MARK, end_run, kill_run
from sgpo_async.processes.stacks import request_stacks

log = logging.getLogger(__name__)

REAP_S = 10.0  # for killed processes to end; one that still exists then is stuck in the kernel
TORCHRUN_FAILURE = (
    "torch/distributed/elastic/multiprocessing/api.py"  # lines after this one repeat what the log already says
)
ROOT = Path(__file__).resolve().parents[2]  # the folder that contains the package, installed or not


@dataclass(frozen=True)
class Child:
    """One process that this package started, and the log of its output."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while the process runs."""
        return self.process.poll()

    def complaint(self, lines: int = 12) -> str:
        """Why the process ended: the `error:` line of its log, else the last lines."""
        text = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        for line in text[-200:]:
            if line.startswith("error: "):
                return line.removeprefix("error: ")
        if disk_full(self.log):
            return f"{self.log}: its disk is full; {FREE_SOME}"
        torchruns = [number for number, line in enumerate(text) if TORCHRUN_FAILURE in line]
        own = text[: torchruns[0]] if torchruns else text
        return "\n".join([f"the end of {self.log}:", *(f"    {line}" for line in own[-lines:])])

    def ending(self) -> str:
        """How the process ended, as text for a message."""
        code = self.code
        assert code is not None
        return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


class Processes:
    """All processes of one run. A watchdog ends them if this process dies without `stop`, even by `kill -9`."""

    def __init__(self, folder: Path, *, comes_back: bool = False) -> None:
        """`comes_back`: if this process fails, another one continues the run."""
        self.folder, self._comes_back = folder, comes_back
        self.mark = uuid.uuid4().hex
        self._logs = folder / "logs"
        with reporting_write_errors(self._logs):
            self._logs.mkdir(parents=True, exist_ok=True)
        self._children: list[Child] = []
        self._watchdog = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sgpo_async.local.watchdog",
                self.mark,
                str(folder),
                "kill" if comes_back else "end",
            ],
            stdin=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )

    def start(self, name: str, command: Sequence[str]) -> Child:
        """Start `command` in a new session, with its output in logs/`name`.log."""
        log = self._logs / f"{name}.log"
        with reporting_write_errors(log), log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment() | {MARK: self.mark},
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def request_stacks(self) -> list[str]:
        """Make all processes log their stacks; return the name and process id of each."""
        return request_stacks(self.mark)

    def stop(
        self, *, grace_s: float = GRACE_S, hurry: Callable[[], bool] = lambda: False, failed: bool = False
    ) -> None:
        """End all processes: SIGTERM, then SIGKILL after `grace_s`, or at once when `hurry()` is true.

        If this process has `failed` and another one continues the run, kill them at once, so that they do not tell the
        actors that the run is over. A process that still exists afterwards is logged and raises nothing, because an
        error that ends the run may be on its way.
        """
        try:
            if failed and self._comes_back:
                kill_run(self.mark)
            else:
                end_run(self.mark, grace_s=grace_s, hurry=hurry)
            deadline = time.monotonic() + REAP_S
            if left := [child.name for child in self._children if not wait_for(child, deadline - time.monotonic())]:
                log.error("%s: still exist %g s after SIGKILL", ", ".join(left), REAP_S)
        finally:
            forget_hub(self.folder)
            self._watchdog.kill()
            self._watchdog.communicate()


def wait_for(child: Child, seconds: float) -> bool:
    """Wait up to `seconds` for `child` to end by itself; returns whether it did."""
    deadline = time.monotonic() + seconds
    while child.code is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return child.code is not None


def python(module: str, *arguments: str) -> list[str]:
    """Command line of a Python module, with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def _environment() -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT),
    }
