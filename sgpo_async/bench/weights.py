"""`sgpo-async bench weights`: how versions travel, by every road and to fleets of nodes; tables and JSON."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sgpo_async.bench import fleet, roads
from sgpo_async.bench.figures import as_json
from sgpo_async.bench.namespaces import why_not
from sgpo_async.files import write_whole

ROADS_MB, TURNS = 1024, 5
FLEETS = ((1, 2), (4, 2), (4, 0), (16, 2), (16, 0))  # nodes, fan-out
FLEET_MB, FLEET_MBIT = 64, 200.0
KILLED = 2  # nodes, in the largest fleet
QUICK_MB, QUICK_TURNS = 128, 3
QUICK_FLEETS = ((4, 2), (4, 0))
QUICK_FLEET_MB = 16


def run_bench_weights(*, quick: bool, to: Path) -> int:
    """Measure, print the tables, and write them with all figures into the folder `to`.

    Raises SgpoError if a process fails.
    """
    lines = [f"# {_machine()}", ""]
    rows = roads.measure(QUICK_MB if quick else ROADS_MB, QUICK_TURNS if quick else TURNS)
    lines += _show("publish to whole and verified, on this machine", roads.table(QUICK_MB if quick else ROADS_MB, rows))
    fleets: list[dict[str, Any]] = []
    if reason := why_not():
        print(f"no fleet: {reason}", file=sys.stderr)
    else:
        fleets = _fleets(quick=quick)
        heading = f"fleets of nodes that send {FLEET_MBIT:g} Mbit/s each, seconds until all have a version"
        lines += _show(heading, ["  ".join(fleet.COLUMNS), *map(fleet.line, fleets)])
    write_whole(to / "weights.txt", "\n".join(lines) + "\n")
    write_whole(to / "weights.json", as_json({"machine": _machine(), "roads": rows, "fleets": fleets}))
    print(f"details in {to / 'weights.json'}")
    return 0


def _fleets(*, quick: bool) -> list[dict[str, Any]]:
    settings = QUICK_FLEETS if quick else FLEETS
    largest = max(nodes for nodes, _ in settings)
    rows = []
    for nodes, fanout in settings:
        print(f"measuring {nodes} nodes, fan-out {fanout or 'unlimited'} ...", file=sys.stderr, flush=True)
        setting = fleet.Setting(nodes, fanout, QUICK_FLEET_MB if quick else FLEET_MB, FLEET_MBIT)
        rows.append(fleet.measure(setting, kill=min(KILLED, nodes // 3) if fanout and nodes == largest else 0))
    return rows


def _show(heading: str, lines: list[str]) -> list[str]:
    shown = [heading, *lines, ""]
    print("\n".join(shown), flush=True)
    return shown


def _machine() -> str:
    cores, day = len(os.sched_getaffinity(0)), time.strftime("%Y-%m-%d")
    return f"{day}, {cores} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
