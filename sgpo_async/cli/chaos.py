"""`sgpo-async chaos`: a run under seeded faults of every kind, and an audit of its journal afterwards.

sgpo-async chaos --seed 1 --faults 200                    the demo, as long as it takes
sgpo-async chaos builtin:demo steps=30 --faults 12 --bar 0      a short one
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sgpo_async.cli.options import CONFIG, print_dry_run

# A lost lease is given again soon, and a killed learner loses few steps. What the user sets goes over this.
SETTINGS = ("learner.checkpoint_every=5", "hub.lease_timeout_s=30", "hub.address=tcp://127.0.0.1:0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[CONFIG] [key=value ...] [--seed S] [--faults N] [--bar P] [--to DIR] [--dry-run]."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", default="builtin:demo", help=f"{CONFIG} (the default)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides a key, e.g. steps=30")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the faults (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--bar",
        type=float,
        default=0.9,
        metavar="P",
        help="pass rate without strategies that the run must reach, in [0, 1] (default: %(default)s, the demo's)",
    )
    parser.add_argument(
        "--to", type=Path, default=Path("runs/chaos"), metavar="DIR", help="folder of all files (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the faults")


def run(args: argparse.Namespace) -> int:
    """Attack and audit; 0 if the run has learned and the audit finds nothing, else 1. Raises SgpoError."""
    from sgpo_async.chaos.schedule import schedule
    from sgpo_async.config import load
    from sgpo_async.config.schema import require

    require(args.faults >= 0, "--faults", "must be >= 0", args.faults)
    require(0 <= args.bar <= 1, "--bar", "must be in [0, 1]", args.bar)
    to = args.to.resolve()
    settings = load(args.config, [*SETTINGS, *args.overrides, f"out={to}", "name=run"])
    require(settings.hub.journal, "hub.journal", "must be true: the audit reads the journal", settings.hub.journal)
    require(
        not settings.hub.keys, "hub.keys", "must be empty: the relay cannot read encrypted messages", settings.hub.keys
    )
    if args.dry_run:
        print_dry_run(settings, [])
        for fault in schedule(seed=args.seed, faults=args.faults, steps=settings.steps):
            print(f"# step {fault.step}: {fault.kind}")
        return 0
    from sgpo_async.chaos.attack import attack

    return attack(settings, seed=args.seed, faults=args.faults, bar=args.bar, to=to)
