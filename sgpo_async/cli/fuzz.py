"""`sgpo-async fuzz`: messages, checkpoints and configurations, changed at random: is each refused as it should be?

sgpo-async fuzz                                    a million messages and all other targets: some minutes
sgpo-async fuzz codec hub --seed 7 --inputs 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

TARGETS = ("codec", "hub", "checkpoint", "configuration")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[TARGET ...] [--seed S] [--inputs N] [--to DIR]."""
    parser.add_argument(
        "targets", metavar="TARGET", nargs="*", help=f"one or more of {', '.join(TARGETS)} (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="other inputs (default: 0)")
    parser.add_argument("--inputs", type=int, default=0, metavar="N", help="of each target (default: its own number)")
    parser.add_argument("--to", type=Path, default=Path("runs/fuzz"), metavar="DIR", help="folder of the results")


def run(args: argparse.Namespace) -> int:
    """Attack; 1 if there is a finding. Raises SgpoError."""
    from sgpo_async.config.schema import require
    from sgpo_async.fuzz import run_fuzz

    unknown = [name for name in args.targets if name not in TARGETS]
    require(not unknown, "fuzz: TARGET", f"must be one of {', '.join(TARGETS)}", " ".join(unknown))
    require(args.inputs >= 0, "fuzz: --inputs", "must be >= 0", args.inputs)
    return run_fuzz(args.targets or TARGETS, seed=args.seed, inputs=args.inputs, to=args.to)
