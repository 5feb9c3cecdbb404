"""The file of a weight store: an anonymous file that exists only while a process has it open.

The file has no name in any directory. Any process of the same user on the same machine can open it through the
descriptor of a process that has it open, `/proc/PID/fd/N`. The kernel frees the file when the last process closes it,
so nothing needs cleaning up, whichever processes are killed and in whichever order.

The file is in memory (`memfd_create`, which is not limited by the size of /dev/shm, in containers usually 64 MB). If
its two buffers would take more than half of the memory that is currently available on this machine and to this
container, it is an unnamed disk file instead, which the page cache keeps in memory as far as there is room.
"""

from __future__ import annotations

import functools
import os
import tempfile
import uuid
from pathlib import Path

import psutil

from sgpo_async.errors import WeightsError
from sgpo_async.weights import store_layout

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
CGROUP = Path("/sys/fs/cgroup")  # the cgroup of this container (version 2)


@functools.cache
def machine() -> str:
    """Identifies this machine, or this container of it: within it, a path in /proc means the same everywhere.

    It is the boot id of the kernel and the number of the namespace of process ids. A sandbox that does not show them
    shares paths with nobody: each of its processes is a machine of its own, and gets weights over the network.
    """
    try:
        return f"{BOOT_ID.read_text().strip()} {PID_NAMESPACE.readlink()}"
    except OSError:
        return uuid.uuid4().hex


def available_memory(cgroup: Path = CGROUP) -> int:
    """Return how many bytes can be allocated without swapping and within the limit of the cgroup, if it has one."""
    available = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except FileNotFoundError:  # this is the root cgroup, or cgroups are of version 1
        return available
    if limit == "max":
        return available
    return max(0, min(available, int(limit) - used + int(stat["inactive_file"])))  # the kernel can drop cached files


def can_open(path: str) -> bool:
    """Whether this process may read and write the file at `path`."""
    return os.access(path, os.R_OK | os.W_OK)


class StoreFile:
    """An empty anonymous file for one weight store; the kernel frees it after `close` or the end of the process."""

    def __init__(self, folder: str | Path, *, expected_bytes: int = 0, earlier: str = "") -> None:
        """Open the store at `earlier`, a descriptor of another process, or create a file if there is none any more.

        A new file is in `folder` only if `expected_bytes` of weights (one buffer) do not fit into memory.
        Raises WeightsError if it cannot be created.
        """
        self.in_memory = 4 * expected_bytes <= available_memory()
        self._fd = _open_store(earlier) if earlier else -1
        try:
            if self._fd < 0:
                self._fd = os.memfd_create("sgpo-weights") if self.in_memory else _unnamed_file(folder)
        except OSError as error:
            where = "memory" if self.in_memory else folder
            raise WeightsError(f"weight store: cannot create a file in {where}: {error.strerror}") from None
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def version(self) -> int | None:
        """The newest complete version in the file; None if there is none."""
        complete = store_layout.read_header(self._fd).complete
        return complete[-1].version if complete else None

    def follow(self, path: str) -> bool:
        """Use the store at `path` instead, if it exists and is another file; returns whether it is.

        `self.path` stays the same, but who has opened it before has the other file.
        """
        fd = _open_store(path)
        if fd < 0:
            return False
        other = not os.path.sameopenfile(fd, self._fd)
        if other:
            os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        return other

    def close(self) -> None:
        """Close the file; a process that still has it open can continue to use it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _unnamed_file(folder: str | Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def _open_store(path: str) -> int:
    """Open the store at `path`; -1 if the process that had it open is gone, or another one has its id now."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        stride = store_layout.read_header(fd).stride
    except OSError:  # a pipe, for example
        stride = 0
    if stride == 0:
        os.close(fd)
        return -1
    return fd
