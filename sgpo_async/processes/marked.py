"""Find every process of one run by its mark, and end them all.

The mark of a run is a random string in the environment of every process that the run starts. Children inherit it, also
in another session or after their parent has died (torchrun starts its workers in new sessions). So the mark finds
processes that process groups and parent ids miss.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable

import psutil

MARK = "SGPO_ASYNC_RUN"
GRACE_S = 3.0  # from SIGTERM to SIGKILL
SWEEP_S = 5.0  # how long to kill and wait; a process that still exists then is stuck in the kernel


def members(mark: str) -> list[psutil.Process]:
    """Every living process with this mark, except this process."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    own = psutil.Process().pid
    return [process for process in found if process.pid != own]


def end_run(mark: str, *, grace_s: float = GRACE_S, hurry: Callable[[], bool] = lambda: False) -> None:
    """Send SIGTERM to the outermost processes, kill the rest after `grace_s` or when `hurry()`, wait for their end.

    Outermost processes are those without a parent in the run. They end their own children within `grace_s`.
    """
    present = members(mark)
    pids = {process.pid for process in present}
    _signal_all((process for process in present if _parent(process) not in pids), kill=False)
    deadline = time.monotonic() + grace_s
    while members(mark) and time.monotonic() < deadline and not hurry():
        time.sleep(0.05)
    kill_run(mark)


def kill_run(mark: str) -> None:
    """Kill every process of the run at once, so that none of them can say goodbye to others; wait for their end."""
    deadline = time.monotonic() + SWEEP_S
    while (rest := members(mark)) and time.monotonic() < deadline:  # repeatedly, because they may be forking
        _signal_all(rest, kill=True)
        time.sleep(0.02)


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def _signal_all(processes: Iterable[psutil.Process], *, kill: bool) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill() if kill else process.terminate()
