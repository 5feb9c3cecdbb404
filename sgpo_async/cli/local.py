"""`sgpo-async local`: a whole run on this machine: starts, supervises and shows it, and leaves no process behind.

    hub (torch-free)  ◀── learner: torchrun, local.ranks ranks
         ▲
         └── actor-0 ... actor-(local.actors - 1)

The hub listens on a free loopback port, unless hub.address differs from its default; then it listens exactly there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sgpo_async.cli.options import add_config, config_arguments, load_run, print_dry_run, record_config, say_notes
from sgpo_async.errors import SgpoError
from sgpo_async.processes.torchrun import torchrun

if TYPE_CHECKING:
    from sgpo_async.config import Run
    from sgpo_async.local.show import Show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--dry-run]."""
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    """Run to the end; returns 0, or 128 + the signal that ended it. Raises SgpoError."""
    settings = load_run(args)
    plan = LocalCommandLines(settings, config_arguments(args, f"hub.address={hub_address(settings)}"))
    if args.dry_run:
        address = hub_address(settings)
        actors = [plan.actor(f"actor-{number}", address) for number in range(plan.actors)]
        print_dry_run(settings, [plan.hub(), plan.learner(address), *actors])
        return 0
    from sgpo_async.local.show import Show

    prepare(settings)
    return run_shown(plan, Show(settings))


def prepare(settings: Run) -> None:
    """Check whether the run can start, and write its configuration into its folder. Raises SgpoError."""
    from sgpo_async.cli.preflight import preflight
    from sgpo_async.cli.resources import check_resume, check_start
    from sgpo_async.local.run_folder import claim

    check_start(settings, checkpoints=True)
    check_resume(settings)
    say_notes(preflight(settings))
    claim(Path(settings.folder))
    # This command's torchrun is always a new one, so that auto never continues.
    record_config(settings, continues=settings.learner.resume is True)


def run_shown(plan: LocalCommandLines, show: Show) -> int:
    """Run to the end and show it; returns 0, or 128 + the signal that ended it. Raises SgpoError."""
    from sgpo_async.local.supervisor import supervise

    try:
        code = supervise(plan, Path(plan.settings.folder), show)
    except SgpoError:
        show.stopped(failed=True)
        raise
    show.closing()
    if code:
        show.stopped()
    return code


def hub_address(settings: Run) -> str:
    """The address at which the hub shall listen. With port 0 the kernel chooses a port, which hub.json then names."""
    from sgpo_async.config import Hub

    return "tcp://127.0.0.1:0" if settings.hub.address == Hub().address else settings.hub.address


@dataclass(frozen=True)
class LocalCommandLines:
    """The command lines of the processes of one run; `arguments` are the arguments of its configuration."""

    settings: Run
    arguments: Sequence[str]

    @property
    def actors(self) -> int:
        """The number of actors."""
        return self.settings.local.actors

    @property
    def batch_timeout_s(self) -> float:
        """How long the learner waits for a batch before it gives up."""
        return self.settings.learner.batch_timeout_s

    def hub(self, address: str = "") -> list[str]:
        """The hub's command line. `address` is that of a hub which it replaces."""
        same = [f"hub.address={address}"] if address else []
        return [sys.executable, "-m", "sgpo_async.cli", "hub", *self.arguments, *same]

    def learner(self, address: str) -> list[str]:
        """torchrun's command line; its rendezvous chooses a free loopback port itself."""
        ranks = torchrun(self.settings.local.ranks)
        return [*ranks, "-m", "sgpo_async.cli", "learner", *self.arguments, "--hub", address]

    def actor(self, name: str, address: str) -> list[str]:
        """One actor's command line."""
        command = [sys.executable, "-m", "sgpo_async.cli", "actor", "--hub", address, "--name", name]
        if self.settings.engine.kind == "sglang":
            command += ["--logs", str(Path(self.settings.folder, "logs"))]
        return [*command, "--keys", self.settings.hub.keys] if self.settings.hub.keys else command
