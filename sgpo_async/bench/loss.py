"""Time and memory of the fused losses, beside the same losses from all logits at once (the naive way).

    python -m sgpo_async.bench.loss [--tokens T] [--vocabulary V] [--width H] [--repetitions N] [--to FILE]

Each measurement is one forward and backward in a process of its own (`worker_loss`), in float32 on one CPU thread. The
repetitions of the ways alternate. Time is the process's CPU time, because other processes then matter less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_async.bench.worker_loss import LOSSES
from sgpo_async.config.schema import require
from sgpo_async.errors import SgpoError
from sgpo_async.files import write_whole


def measure(sizes: Sequence[int], *, repetitions: int) -> dict[str, dict[str, Any]]:
    """Measure each way of each loss at these sizes (T, V, H); return the medians by loss and way, and fused/naive.

    Raises SgpoError with the last lines of a process that failed.
    """
    found: dict[str, dict[str, Any]] = {}
    for loss, ways in LOSSES.items():
        runs = [{way: _one(loss, way, sizes) for way in ways} for _ in range(repetitions)]
        medians = {
            way: {figure: statistics.median(run[way][figure] for run in runs) for figure in runs[0][way]}
            for way in ways
        }
        ratios = {
            figure: statistics.median(run["fused"][figure] / run["naive"][figure] for run in runs)
            for figure in ("cpu_s", "extra_gb")
        }
        found[loss] = medians | {"fused_over_naive": ratios}
    return found


def _one(loss: str, way: str, sizes: Sequence[int]) -> dict[str, float]:
    print(f"measuring {loss} {way} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "sgpo_async.bench.worker_loss", loss, way, *map(str, sizes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SgpoError(f"bench: {loss} {way} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures as JSON and return 0; after a mistake of the user print one line and return 2."""
    parser = argparse.ArgumentParser(prog="python -m sgpo_async.bench.loss", description=(__doc__ or "").split("\n")[0])
    for name, default in {"tokens": 2048, "vocabulary": 151_936, "width": 896, "repetitions": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default: %(default)d")
    parser.add_argument("--to", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args(argv)
    try:
        for name in ("tokens", "vocabulary", "width", "repetitions"):
            require(getattr(args, name) > 0, f"--{name}", "must be > 0", getattr(args, name))
        sizes = {"T": args.tokens, "V": args.vocabulary, "H": args.width}
        measured = measure(list(sizes.values()), repetitions=args.repetitions)
        report = json.dumps({"sizes": sizes, "repetitions": args.repetitions} | measured, indent=2)
        print(report)
        if args.to:
            write_whole(args.to, report + "\n")
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
