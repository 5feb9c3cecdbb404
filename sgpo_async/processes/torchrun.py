"""torchrun's command line for ranks that all run on this machine; the ranks that a torchrun has started."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress

import psutil


def torchrun(ranks: int) -> list[str]:
    """The beginning of a command line; `-m MODULE ...` or a script follows it.

    torchrun chooses a free port on loopback. Without --local-addr the ranks would connect to this machine's host name,
    which may resolve to another address or to none.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*launcher, f"--nproc-per-node={ranks}"]


def all_ranks_run() -> bool:
    """Whether all ranks still run that the torchrun of this process, itself a rank, has started on this machine.

    If one of them has died, torchrun ends the others.
    """
    count = 0
    for child in psutil.Process(os.getppid()).children():
        with suppress(psutil.Error):
            count += "LOCAL_RANK" in child.environ() and child.status() != psutil.STATUS_ZOMBIE
    return count >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def repeated_command(argument: str, *, rank: bool = False) -> str:
    """The command line that started this process, or for a `rank` its torchrun, with one more argument at its end."""
    command = psutil.Process(os.getppid() if rank else os.getpid()).cmdline()
    return shlex.join([*(word for word in command if word != argument), argument])
