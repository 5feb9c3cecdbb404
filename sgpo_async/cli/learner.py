"""`sgpo-async learner`: one rank of the learner, started by torchrun.

    torchrun --nproc-per-node 2 launch/learner.py CONFIG [key=value ...] [--hub tcp://HOST:PORT]

Without --hub, rank 0 starts the hub beside itself, listening at hub.address, and stops it at its own end. When torchrun
restarts the ranks, rank 0 starts a new hub, which continues from the state in the checkpoint. Actors leave with the old
hub and must be started again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sgpo_async.cli.options import add_config, config_arguments, load_run, print_dry_run, record_config
from sgpo_async.errors import ConfigError, DeadlineExceeded, HubError

if TYPE_CHECKING:
    from sgpo_async.config import Run

HUB_START_S = 60.0
HUB_KILLED_S = 30.0  # after a kill of rank 0, in which the watchdog ends the hub beside it
HUB_LEAVING_S = 10.0  # after the learner's Finish, in which the hub tells its actors that the run is over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--hub ADDRESS] [--dry-run]."""
    add_config(parser)
    parser.add_argument("--hub", default="", metavar="tcp://HOST:PORT", help="address of a hub that is already running")


def run(args: argparse.Namespace) -> int:
    """Train to the end. Raises SgpoError."""
    settings = load_run(args)
    arguments = config_arguments(args)
    if args.dry_run:
        hub = [] if args.hub else [["sgpo-async", "hub", *arguments]]
        print_dry_run(
            settings, [*hub, ["torchrun", "launch/learner.py", *arguments, "--hub", _address(args, settings)]]
        )
        return 0
    if "RANK" not in os.environ:
        raise ConfigError(f"learner: RANK is not set; start it by torchrun launch/learner.py {args.config}")
    first = os.environ["RANK"] == "0"
    if not first:
        return _train(settings, _address(args, settings))
    from sgpo_async.config.schema import CHECKPOINTS
    from sgpo_async.learner.resume import continues

    earlier = continues(settings.learner.resume, Path(settings.folder) / CHECKPOINTS)
    record_config(settings, continues=earlier)
    if args.hub:
        return _train(settings, args.hub)
    with hub_beside(settings, arguments, claim_s=HUB_KILLED_S if earlier else 0.0) as address:
        return _train(settings, address)


def _address(args: argparse.Namespace, settings: Run) -> str:
    return args.hub or settings.hub.address


def _train(settings: Run, address: str) -> int:
    from sgpo_async.learner import train

    return train(settings, address)


@contextmanager
def hub_beside(settings: Run, arguments: list[str], *, claim_s: float) -> Iterator[str]:
    """A hub process that lives as long as this context; yields its address.

    Waits up to `claim_s` for the end of an earlier hub of this run, whose rank 0 has been killed.

    Raises HubError if it ends at once (for example because the port is taken), DeadlineExceeded if it does not start.
    """
    from sgpo_async.local.children import Processes, python, wait_for
    from sgpo_async.local.run_folder import claim, read_hub_file

    folder = Path(settings.folder)
    deadline = time.monotonic() + claim_s
    while True:
        try:
            claim(folder)
            break
        except HubError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    processes = Processes(folder)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # torchrun ends ranks by SIGTERM: stop the hub, too
    try:
        hub = processes.start("hub", python("sgpo_async.cli", "hub", *arguments))
        deadline = time.monotonic() + HUB_START_S
        while read_hub_file(folder).get("pid") != hub.process.pid:
            if wait_for(hub, 0.1):
                raise HubError(f"the hub {hub.ending()}: {hub.complaint()}")
            if time.monotonic() > deadline:
                raise DeadlineExceeded("learner rank 0: the hub", "hub.json", HUB_START_S)
        yield str(read_hub_file(folder)["address"])
        wait_for(hub, HUB_LEAVING_S)
    finally:
        processes.stop()
