"""Stacks of a process on request: on SIGUSR1 it prints the stack of every thread to standard error, and continues.

Without a handler SIGUSR1 would end a process, so only processes that have one get the signal.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil

from sgpo_async.processes.marked import members

STANDARD_ERROR = 2  # the descriptor: `sys.stderr` may be something else


def print_stacks_on_signal() -> None:
    """From now on, SIGUSR1 prints the stacks of this process."""
    faulthandler.register(signal.SIGUSR1, file=STANDARD_ERROR, all_threads=True)


def request_stacks(mark: str) -> list[str]:
    """Make the processes of a run print their stacks; return the command name and process id of each."""
    asked = []
    for process in members(mark):
        with contextlib.suppress(psutil.Error, OSError):
            name = _command(process.cmdline()[1:])  # the interpreter's path may contain the name of the package
            if name and _handles(process.pid):
                process.send_signal(signal.SIGUSR1)
                asked.append(f"{name} {process.pid}")
    return asked


def _command(words: Sequence[str]) -> str:
    """The script or module of this package in a command line; empty if there is none."""
    for word in words:
        name = Path(word).name
        if name.startswith(("sgpo_async", "sgpo-async")) or "launch/" in word:
            return name
    return ""


def _handles(pid: int) -> bool:
    """Whether the process has a handler for SIGUSR1."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
