"""torchrun's command line for ranks that all run on this machine."""

from __future__ import annotations

import sys


def torchrun(ranks: int) -> list[str]:
    """The beginning of a command line; `-m MODULE ...` or a script follows it.

    torchrun chooses a free port on loopback. Without --local-addr the ranks would connect to this machine's host name,
    which may resolve to another address or to none.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*launcher, f"--nproc-per-node={ranks}"]
