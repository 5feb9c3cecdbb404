"""Where a weight store lives: an anonymous file that exists only as long as somebody holds it.

The file has no name in any directory. It is reached through its owner's descriptor, `/proc/PID/fd/N`, by any
process of the same user on the same machine, and the kernel frees it with its last holder. So there is
nothing to clean up, whoever is killed and in whichever order.

It lies in memory (`memfd_create`: not limited by the size of /dev/shm, which containers keep at 64 MB),
unless its two buffers would take more than half of the memory that is available now on this machine and to this
container; then it is an unnamed
disk file, which the page cache keeps in memory as far as there is room.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil

from sgpo_async.errors import WeightsError

CGROUP = Path("/sys/fs/cgroup")  # of this container (version 2)


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that can be taken without swapping, and within the limit of the cgroup, if it has one."""
    available = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except FileNotFoundError:  # the root of the machine, or version 1
        return available
    if limit == "max":
        return available
    return max(0, min(available, int(limit) - used + int(stat["inactive_file"])))  # cached files make room


class StoreFile:
    """An empty anonymous file for one weight store; close it, or die, to free it."""

    def __init__(self, folder: str | Path, *, expected_bytes: int = 0) -> None:
        """`folder` is used only when `expected_bytes` of weights (one buffer) do not fit into memory.

        Raises WeightsError if the file cannot be made.
        """
        self.in_memory = 4 * expected_bytes <= available_memory()
        try:
            self._fd = os.memfd_create("sgpo-weights") if self.in_memory else _unnamed_file(folder)
        except OSError as error:
            where = "memory" if self.in_memory else folder
            raise WeightsError(f"weight store: cannot make a file in {where}: {error.strerror}") from None
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Let go of the file; whoever still has it open keeps it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _unnamed_file(folder: str | Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())
