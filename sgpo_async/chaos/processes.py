"""Finds the processes of a run by kind, and does to them what a fault says: kill, stop, no disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import psutil

from sgpo_async.chaos.schedule import Target
from sgpo_async.processes.marked import members

MODULES: dict[Target, str] = {  # of processes that others start
    "sender": "sgpo_async.session.sender",
    "receiver": "sgpo_async.session.receiver",
    "tracker": "sgpo_async.metrics.trackers.process",
}


def running(module: str, mark: str) -> list[psutil.Process]:
    """The processes of the run that execute this module, oldest first."""
    found = []
    for process in members(mark):
        with contextlib.suppress(psutil.Error):
            if module in process.cmdline():
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def ranks_of(torchrun: int) -> list[psutil.Process]:
    """The ranks that this torchrun has started, by rank."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(torchrun).children():
            with contextlib.suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE and "RANK" in (own := child.environ()):
                    found.append((int(own["RANK"]), child))
    return [child for _, child in sorted(found, key=lambda one: one[0])]


def with_children(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


@dataclass(frozen=True)
class Suspension:
    """A process that SIGSTOP has stopped, until `end`."""

    process: psutil.Process

    @classmethod
    def begin(cls, process: psutil.Process) -> Suspension:
        """Raises psutil.Error if the process has ended."""
        process.suspend()
        return cls(process)

    def end(self) -> None:
        """Let it go on, if it lives."""
        with contextlib.suppress(psutil.Error):
            self.process.resume()


@dataclass(frozen=True)
class FullDisk:
    """A process that cannot make any file longer than it is, nor write a new one, until `end`."""

    process: psutil.Process
    before: tuple[int, int] = field(compare=False)  # soft and hard limit of a file's size, in bytes

    @classmethod
    def begin(cls, process: psutil.Process) -> FullDisk:
        """Raises psutil.Error if the process has ended."""
        before = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (0, before[1]))
        return cls(process, before)

    def end(self) -> None:
        """Give it the disk back, if it lives."""
        with contextlib.suppress(psutil.Error):  # not to the soft limit of before: another full disk may have set it
            self.process.rlimit(psutil.RLIMIT_FSIZE, (self.before[1], self.before[1]))
