"""`sgpo-async report`: write a run's report.html (again), even while the run goes on or after it crashed."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FOLDER."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the run, e.g. runs/demo")


def run(args: argparse.Namespace) -> int:
    """Write it and print its path. Raises SgpoError."""
    from sgpo_async.report import write_report

    print(write_report(args.folder))
    return 0
