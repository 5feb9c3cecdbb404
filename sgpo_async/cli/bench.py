"""`sgpo-async bench`: throughput of a configuration, as a table and as JSON; or one part of the system by itself.

sgpo-async bench builtin:demo         generation alone, learning alone, synchronous, asynchronous
sgpo-async bench overlap --quick      does asynchrony pay: synchronous, colocated and asynchronous runs, simulated
sgpo-async bench pinned --quick       the same for real on this machine, with a core for each side
sgpo-async bench engine --quick       the embedded engine against generate of transformers, and SGLang with --sglang
sgpo-async bench pack --quick         padding, and how long ranks wait for each other, against naive micro-batches
sgpo-async bench loss --quick         time and memory of the fused losses, against all logits at once and Liger
sgpo-async bench scale --quick        how many inference nodes one hub serves: a real hub, simulated nodes
sgpo-async bench transport --quick    rollouts into the hub, against ZeroMQ alone, TransferQueue, Ray, MessagePack lists
sgpo-async bench weights --quick      every road of the weights, and fleets of nodes (as root: needs ip and tc)
sgpo-async bench trl --trl PYTHON     the demo against TRL's GRPOTrainer (make trl makes an environment)
sgpo-async bench all --quick          all of these; weights only as root, trl only with --trl
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

from sgpo_async.cli.options import add_config, load_run, print_dry_run

# In place of a configuration: modules of `bench`, and the options that are theirs alone.
PARTS: dict[str, tuple[str, ...]] = {
    "overlap": (),
    "pinned": (),
    "engine": ("model", "sglang"),
    "pack": ("run",),
    "loss": (),
    "scale": (),
    "transport": ("peers",),
    "weights": (),
    "trl": ("trl", "trl_set"),
}
NEED_ROOT = ("weights",)  # network namespaces
ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--seconds S] [--dry-run], or: PART [--quick] [--to DIR]."""
    add_config(parser)
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="CONFIG: duration of each measurement (default: 20)"
    )
    parser.add_argument("--quick", action="store_true", help="parts: less of everything, in a minute")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="parts: folder of the results (default: runs/bench-PART)"
    )
    parser.add_argument(
        "--peers", default="", metavar="PYTHON", help="transport: Python of an environment with TransferQueue and Ray"
    )
    parser.add_argument("--trl", default="", metavar="PYTHON", help="trl: Python of an environment with TRL")
    parser.add_argument(
        "--trl-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="trl: an argument of TRL's GRPOConfig, e.g. steps_per_generation=1; may be repeated",
    )
    parser.add_argument("--model", default="", metavar="FOLDER", help="engine: measure this model, too")
    parser.add_argument(
        "--sglang", default="", metavar="PYTHON", help="engine: Python of an environment with SGLang, on the CPU"
    )
    parser.add_argument(
        "--run", default="", metavar="FOLDER", help="pack: measure the lengths, too, that this run has recorded"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises SgpoError."""
    _refuse_options_of_others(args)
    if args.config in (*PARTS, ALL):
        return _parts(args)
    settings = load_run(args)
    if args.dry_run:
        print_dry_run(settings, [["sgpo-async", "bench", args.config, *args.overrides]])
        return 0
    from sgpo_async.bench import run_bench

    return run_bench(settings, seconds=args.seconds)


def _refuse_options_of_others(args: argparse.Namespace) -> None:
    """Raise ConfigError for an option that this part, or a configuration, does not read."""
    from sgpo_async.config.schema import require

    read = [*PARTS] if args.config == ALL else [args.config]
    for part, options in PARTS.items():
        for option in options:
            unread = part not in read and getattr(args, option)
            flag = f"--{option.replace('_', '-')}"
            require(
                not unread, f"bench {args.config}", f"must not be given {flag}, which is an option of {part}", unread
            )


def _parts(args: argparse.Namespace) -> int:
    """One part, or all that can be measured here; the exit code of the first that failed, or 0."""
    from sgpo_async.config.schema import require

    unused = [*args.overrides, *(["--dry-run"] if args.dry_run else [])]
    require(not unused, f"bench {args.config}", "must not be given settings of a run or --dry-run", " ".join(unused))
    if args.config != ALL:
        return _measured(args.config, args, args.to or Path(f"runs/bench-{args.config}"))
    codes = []
    for part in PARTS:
        if part in NEED_ROOT and os.geteuid() != 0:
            print(f"{part}: left out, because it must be started as root")
            continue
        if part == "trl" and not args.trl:
            print("trl: left out, because --trl does not name the Python of an environment with TRL")
            continue
        codes.append(_measured(part, args, (args.to or Path("runs/bench-all")) / part))
    return next((code for code in codes if code), 0)


def _measured(part: str, args: argparse.Namespace, to: Path) -> int:
    """Measure a part and draw what was found."""
    from sgpo_async.bench.pictures import draw

    code = _measure(part, args, to)
    draw(part, to)
    return code


def _measure(part: str, args: argparse.Namespace, to: Path) -> int:
    if part == "transport":
        from sgpo_async.bench.transport import QUICK, Sizes, run_bench_transport

        return run_bench_transport(sizes=QUICK if args.quick else Sizes(), peers=args.peers, to=to)
    module = importlib.import_module(f"sgpo_async.bench.{part}")
    own = {name: getattr(args, name) for name in PARTS[part]}
    code: int = getattr(module, f"run_bench_{part}")(quick=args.quick, to=to, **own)
    return code
