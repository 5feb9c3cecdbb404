"""One rank that joins the world of all ranks and computes a sum, unless it is to be killed on the way.

    torchrun ... restart_member.py RESULT DEATH ...

Each DEATH is RANK:PHASE and ends one attempt: the first DEATH the first attempt, and so on. That rank kills itself by
SIGKILL before `joining`, when the name of the attempt is `agreed`, in the midst of `init`, or when it has `trained`.
After all deaths every rank writes the sum over all ranks, and its agent's count of restarts, to RESULT.RANK. The
deaths are counted by files, because the count of restarts differs between agents.
"""

import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from sgpo_async.config.schema import Learner
from sgpo_async.learner import process_group


def main() -> None:
    result, *deaths = sys.argv[1:]
    rank = int(os.environ["RANK"])
    survived = sum(Path(f"{result}.death-{number}").exists() for number in range(len(deaths)))
    victim, phase = deaths[survived].split(":") if survived < len(deaths) else ("", "")

    def die(now: str) -> None:
        if (victim, phase) == (str(rank), now):
            Path(f"{result}.death-{survived}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    agree = process_group.agree

    def observed(store: dist.Store, *args: int, timeout_s: float) -> str:
        die("joining")
        name = agree(store, *args, timeout_s=timeout_s)
        die("agreed")
        threading.Timer(0.01, die, ["init"]).start()
        return name

    process_group.agree = observed
    process_group.join_world(Learner(), timeout_s=120)
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    die("trained")
    dist.barrier()
    die("init")  # if initialisation took less than the timer
    if survived < len(deaths):
        signal.pause()  # until the agent ends this attempt
    Path(f"{result}.{rank}").write_text(f"{total.item()} {os.environ['TORCHELASTIC_RESTART_COUNT']}")


if __name__ == "__main__":
    main()
