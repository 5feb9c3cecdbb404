"""`sgpo-async bench`: throughput of a configuration, as a table and as JSON."""

from __future__ import annotations

import argparse

from sgpo_async.cli.options import add_config, load_run, print_dry_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--seconds S] [--dry-run]."""
    add_config(parser)
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="duration of each measurement (default: 20)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises SgpoError."""
    settings = load_run(args)
    if args.dry_run:
        print_dry_run(settings, [["sgpo-async", "bench", args.config, *args.overrides]])
        return 0
    from sgpo_async.bench import run_bench

    return run_bench(settings, seconds=args.seconds)
