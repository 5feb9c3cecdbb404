"""The processes of one run, wherever they have gone, and their certain end.

Each run has a mark, a random word in the environment of all that it starts. Children of children inherit it, whatever
session or parent they have by now (torchrun puts its workers into sessions of their own), so the mark finds what
process groups and parent pids lose.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable

import psutil

MARK = "SGPO_ASYNC_RUN"
GRACE_S = 3.0  # from the request to end to the kill
SWEEP_S = 5.0  # a killed process that is still there after this is the kernel's trouble, not ours


def members(mark: str) -> list[psutil.Process]:
    """Every living process that carries the mark, this one excepted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    own = psutil.Process().pid
    return [process for process in found if process.pid != own]


def end_run(mark: str, *, grace_s: float = GRACE_S, hurry: Callable[[], bool] = lambda: False) -> None:
    """Ask the outermost processes to end, kill what is left after `grace_s` or when `hurry`, wait until all are gone.

    Inner processes are their parents' to end, within the grace.
    """
    present = members(mark)
    inner = {process.pid for process in present}
    _signal_all((process for process in present if _parent(process) not in inner), kill=False)
    deadline = time.monotonic() + grace_s
    while members(mark) and time.monotonic() < deadline and not hurry():
        time.sleep(0.05)
    deadline = time.monotonic() + SWEEP_S
    while (rest := members(mark)) and time.monotonic() < deadline:  # again and again: they may be forking
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
