"""torchrun's command line for ranks that all run on this machine; the ranks that a torchrun has started."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from sgpo_async.errors import ConfigError

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # an environment variable of torchrun


def torchrun(ranks: int) -> list[str]:
    """The beginning of a command line; `-m MODULE ...` or a script follows it.

    torchrun chooses a free port on loopback. Without --local-addr the ranks would connect to this machine's host name,
    which may resolve to another address or to none. With /dev/null it makes no folder for logs and error files, which
    it would leave behind in the temporary folder; this package keeps the output of its children itself.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*launcher, f"--log-dir={os.devnull}", f"--nproc-per-node={ranks}"]


def shutdown_timeout_s() -> int:
    """How long a torchrun that gets a signal waits for its ranks before it kills them. Raises ConfigError."""
    value = os.environ.get(SHUTDOWN_TIMEOUT, "30")  # torchrun's default
    if not value.isdecimal():
        raise ConfigError(f"{SHUTDOWN_TIMEOUT} must be a whole number of seconds, got {value!r}; correct or unset it")
    return int(value)


def forget_logs() -> None:
    """Remove the folder that torchrun has made for this rank, which has ended well, and those around it, if empty.

    Without --log-dir, torchrun makes TMP/torchelastic_X/RUN/attempt_N/RANK for each rank and leaves it behind. The last
    rank removes the folders of earlier attempts, too. What holds a file, or was named by --log-dir, stays.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or len(Path(file).parents) < 4:
        return
    rank, attempt, run, root = list(Path(file).parents)[:4]
    if not root.name.startswith("torchelastic_"):
        return
    earlier = [path for path in run.glob("attempt_*") if path != attempt]
    for folder in (rank, attempt, *(path for one in earlier for path in (*one.iterdir(), one)), run, root):
        with suppress(OSError):  # it holds a file or the folder of another rank
            folder.rmdir()


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
