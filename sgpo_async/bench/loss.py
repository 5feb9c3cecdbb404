"""Time and memory of the fused losses, beside the same losses from all logits at once (the naive way).

    sgpo-async bench loss [--quick] [--to DIR]
    python -m sgpo_async.bench.loss [--tokens T] [--vocabulary V] [--width H] [--repetitions N] [--to FILE]

Each measurement is one forward and backward in a process of its own (`worker_loss`), in float32 on one CPU thread. The
repetitions of the ways alternate. Time is the process's CPU time, because other processes then matter less.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo_async.bench.figures import (
    columns,
    header,
    interval,
    load,
    machine,
    publish,
    ratio,
    spread,
    verdict,
    versions,
)
from sgpo_async.bench.worker_loss import LIGER, LOSSES
from sgpo_async.config.schema import require
from sgpo_async.errors import SgpoError
from sgpo_async.files import write_whole

FULL = {"T": 1024, "V": 151_936, "H": 896}
QUICK = {"T": 256, "V": 32_000, "H": 512}
REPETITIONS, QUICK_REPETITIONS = 3, 2
BARS = {"cpu_s": 1.0, "extra_gb": 0.1}  # fused over naive, at most
LIGER_BARS = {"cpu_s": 1.0, "extra_gb": 1.0}
NO_LIGER = "Liger was not measured: pip install --no-deps liger-kernel; its chunked losses run on CPUs"


def run_bench_loss(*, quick: bool, to: Path) -> int:
    """Measure each way of each loss in turns; print the table, write loss.txt and loss.json into `to`.

    Liger is measured where liger_kernel is installed. Raises SgpoError with the last lines of a process that failed.
    """
    liger = importlib.util.find_spec("liger_kernel") is not None
    before = load()
    sizes, repetitions = (QUICK, QUICK_REPETITIONS) if quick else (FULL, REPETITIONS)
    measured = {}
    for loss, ways in LOSSES.items():
        order = [*ways, *(LIGER[loss] if liger else ())]
        measured[loss] = figures_of(run_ways(loss, order, list(sizes.values()), repetitions=repetitions))
    report = {
        "machine": machine(),
        "versions": versions("torch", *(["liger-kernel"] if liger else [])),
        "load": [before, load()],
        "sizes": sizes,
        "repetitions": repetitions,
        "losses": measured,
        "missing": "" if liger else NO_LIGER,
    }
    publish("loss", to, table(report), report)
    return 0


def figures_of(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Median and interval of each way's time and memory, and of their ratios within a repetition that have a bar."""
    figures = {
        way: {figure: spread([run[way][figure] for run in runs]) for figure in BARS} | {"loss": runs[0][way]["loss"]}
        for way in runs[0]
    }
    ratios = []
    for way in (way for way in runs[0] if way != "fused"):
        for figure, bar in (BARS if way == "naive" else LIGER_BARS).items():
            pair = ([run["fused"][figure] for run in runs], [run[way][figure] for run in runs])
            ratios.append({"figure": figure} | ratio("fused", way, bar, pair))
    return {"ways": figures, "ratios": ratios}


def table(report: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    sizes, repetitions = report["sizes"], report["repetitions"]
    about = f"T {sizes['T']:,}, V {sizes['V']:,}, H {sizes['H']:,}, float32, one thread, seed 0"
    lines = header(report, f"{about}; median (least..most) of {repetitions} repetitions")
    rows = [["", "CPU s", "GB above inputs and gradients"]]
    ratios = [["fused over", "", "ratio", "at most", ""]]
    for loss, found in report["losses"].items():
        for way, one in found["ways"].items():
            rows.append([f"{loss}, {way}", interval(one["cpu_s"]), interval(one["extra_gb"], ".3f")])
        for one in found["ratios"]:
            name = {"cpu_s": "time", "extra_gb": "memory"}[one["figure"]]
            missed = verdict(one, at_most=True)
            ratios.append([f"{loss}, {one['to']}", name, interval(one), f"{one['bar']:g}", missed])
    return [*lines, "", *columns(rows), "", *columns(ratios), *(["", report["missing"]] if report["missing"] else [])]


def measure(sizes: Sequence[int], *, repetitions: int) -> dict[str, dict[str, Any]]:
    """Measure each way of each loss at these sizes (T, V, H); return the medians by loss and way, and fused/naive.

    Raises SgpoError with the last lines of a process that failed.
    """
    found: dict[str, dict[str, Any]] = {}
    for loss, ways in LOSSES.items():
        runs = run_ways(loss, list(ways), sizes, repetitions=repetitions)
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


def run_ways(loss: str, ways: Sequence[str], sizes: Sequence[int], *, repetitions: int) -> list[dict[str, Any]]:
    """The figures of each way in each repetition; the ways take turns."""
    return [{way: _one(loss, way, sizes) for way in ways} for _ in range(repetitions)]


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
