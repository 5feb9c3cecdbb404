"""torchrun's command line for ranks that all live on this machine."""

from __future__ import annotations

import sys


def torchrun(ranks: int) -> list[str]:
    """To be followed by `-m MODULE ...` or a script.

    The rendezvous chooses a free port on loopback by itself. Without --local-addr the ranks would look for each other
    under this machine's own name, which may lead elsewhere or nowhere.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*launcher, f"--nproc-per-node={ranks}"]
