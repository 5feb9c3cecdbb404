"""`sgpo-async bench`: throughput of a configuration, as a table and as JSON; or how fast weights or rollouts travel.

sgpo-async bench builtin:demo         generation alone, learning alone, synchronous, asynchronous
sgpo-async bench weights --quick      every road of the weights, and fleets of nodes (as root: needs ip and tc)
sgpo-async bench transport --quick    rollouts into the hub, against ZeroMQ alone, TransferQueue, Ray, MessagePack lists
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sgpo_async.cli.options import add_config, load_run, print_dry_run

WEIGHTS, TRANSPORT = "weights", "transport"  # in place of a configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--seconds S] [--dry-run], or: weights | transport [--quick] [--to DIR]."""
    add_config(parser)
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="duration of each measurement (default: 20)"
    )
    parser.add_argument("--quick", action="store_true", help="weights, transport: small sizes, few turns")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="weights, transport: folder of the results (default: runs/bench-...)"
    )
    parser.add_argument(
        "--peers", default="", metavar="PYTHON", help="transport: Python of an environment with TransferQueue and Ray"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises SgpoError."""
    if args.config in (WEIGHTS, TRANSPORT):
        from sgpo_async.config.schema import require

        unused = [*args.overrides, *(["--dry-run"] if args.dry_run else [])]
        require(
            not unused, f"bench {args.config}", "must not be given settings of a run or --dry-run", " ".join(unused)
        )
        to = args.to or Path(f"runs/bench-{args.config}")
        return _weights(to, args) if args.config == WEIGHTS else _transport(to, args)
    settings = load_run(args)
    if args.dry_run:
        print_dry_run(settings, [["sgpo-async", "bench", args.config, *args.overrides]])
        return 0
    from sgpo_async.bench import run_bench

    return run_bench(settings, seconds=args.seconds)


def _weights(to: Path, args: argparse.Namespace) -> int:
    from sgpo_async.bench.weights import run_bench_weights

    return run_bench_weights(quick=args.quick, to=to)


def _transport(to: Path, args: argparse.Namespace) -> int:
    from sgpo_async.bench.transport import QUICK, Sizes, run_bench_transport

    return run_bench_transport(sizes=QUICK if args.quick else Sizes(), peers=args.peers, to=to)
