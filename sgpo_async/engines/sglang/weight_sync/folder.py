"""The folder in which an actor keeps versions for its servers: where it is, and how it is removed.

Its owner holds a lock on the folder, which the kernel releases however the owner ends. So the next owner of a folder
beside it can tell which folders belong to nobody, also after a SIGKILL and in another namespace of process ids, and
removes them. Where folders cannot be locked (NFS), only their owner removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from sgpo_async.weights.store_file import available_memory

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "sgpo-weights-"
OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
ROOM = 3  # versions that are there at a time: the one in service, the next one, and one that is being written


def default_root(nbytes: int) -> tuple[Path, str]:
    """Where to keep versions of `nbytes`: shared memory, or the temporary folder and why.

    Containers often have 64 MB of shared memory. What is in it takes memory, of which half stays free.
    """
    needed = ROOM * nbytes
    if not os.access(SHARED_MEMORY, os.W_OK):
        reason = f"{SHARED_MEMORY} is not writable"
    elif (room := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        reason = f"{SHARED_MEMORY} has {room >> 20} MB, and {ROOM} versions need {needed >> 20}"
    elif (memory := available_memory()) < 2 * needed:
        reason = f"{ROOM} versions need {needed >> 20} MB, more than half of the available memory of {memory >> 20}"
    else:
        return SHARED_MEMORY, ""
    return Path(tempfile.gettempdir()), reason


class OwnedFolder:
    """A new folder below `root`, locked until `remove` or the end of this process."""

    def __init__(self, root: Path, *, private: bool) -> None:
        """Removes the folders below `root` that belong to nobody. Raises OSError if no folder can be made.

        A `private` folder is for processes of this user; others may read one that is not, as far as the umask allows.
        """
        root.mkdir(parents=True, exist_ok=True)
        remove_abandoned(root)
        while True:
            self.path = root / f"{PREFIX}{uuid.uuid4().hex[:12]}"
            self.path.mkdir(mode=0o700 if private else 0o777)
            with contextlib.suppress(FileNotFoundError):  # another process took it for abandoned before it was locked
                self._lock = os.open(self.path, OPEN)
                if _lock(self._lock) is not False and self.path.exists():
                    return
                os.close(self._lock)

    def remove(self) -> None:
        """Remove the folder with its contents."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned(root: Path) -> None:
    """Remove the folders below `root` whose owners have ended, as far as this user may."""
    for folder in root.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, OPEN)
        except OSError:  # it is gone, or another user's
            continue
        try:
            if _lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(descriptor: int) -> bool | None:
    """Whether this process now has the lock; None where folders cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
