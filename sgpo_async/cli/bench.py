"""`sgpo-async bench`: throughput of a configuration, as a table and as JSON; or how fast weights travel.

sgpo-async bench builtin:demo         generation alone, learning alone, synchronous, asynchronous
sgpo-async bench weights --quick      every road of the weights, and fleets of nodes (as root: needs ip and tc)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sgpo_async.cli.options import add_config, load_run, print_dry_run

WEIGHTS = "weights"  # in place of a configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--seconds S] [--dry-run], or: weights [--quick] [--to DIR]."""
    add_config(parser)
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="duration of each measurement (default: 20)"
    )
    parser.add_argument("--quick", action="store_true", help="weights: small versions, few turns")
    parser.add_argument(
        "--to", type=Path, default=Path("runs/bench-weights"), metavar="DIR", help="weights: folder of the results"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises SgpoError."""
    if args.config == WEIGHTS:
        from sgpo_async.bench.weights import run_bench_weights
        from sgpo_async.config.schema import require

        unused = [*args.overrides, *(["--dry-run"] if args.dry_run else [])]
        require(not unused, "bench weights", "must not be given settings of a run or --dry-run", " ".join(unused))
        return run_bench_weights(quick=args.quick, to=args.to)
    settings = load_run(args)
    if args.dry_run:
        print_dry_run(settings, [["sgpo-async", "bench", args.config, *args.overrides]])
        return 0
    from sgpo_async.bench import run_bench

    return run_bench(settings, seconds=args.seconds)
