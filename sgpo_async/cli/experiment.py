"""`sgpo-async experiment`: methods x settings x seeds, as tables and figures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgpo_async.config.experiment import Experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE ... [--out DIR] [--workers N] [--minutes M] [--from TABLE] [--collect DIR] [--all-figures] [--dry-run]."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="YAML, e.g. builtin:experiments/methods")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/experiments"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: every core")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no trial after so long; a later call goes on")
    parser.add_argument(
        "--from",
        type=Path,
        dest="table",
        metavar="TABLE",
        help="run nothing: take the results of this trials.parquet over into --out, and write the tables of all there",
    )
    parser.add_argument(
        "--collect",
        type=Path,
        metavar="DIR",
        help="run nothing: write tables, figures and trials.parquet of the results in --out into this folder",
    )
    parser.add_argument("--all-figures", action="store_true", help="draw more than the figures that the files name")
    parser.add_argument("--dry-run", action="store_true", help="check the files and say what they hold")


def run(args: argparse.Namespace) -> int:
    """Run the experiments one after another, or write the tables of the results that are there. Raises SgpoError."""
    from sgpo_async.config.experiment import load_experiment
    from sgpo_async.experiments.plan import cells, check_budget, count_tuning
    from sgpo_async.experiments.tables import check_packages

    experiments, all_trials, all_to_tune = [], 0, 0
    for file in args.files:
        experiment = load_experiment(file)
        budgets = check_budget(experiment)
        count = len(cells(experiment)) * len(experiment.seeds)
        to_tune, bases = count_tuning(experiment), len(experiment.bases)
        print(f"{file}: {count} trials of {_rollouts(budgets)}, {to_tune} more to tune, {bases} bases to make")
        all_trials, all_to_tune = all_trials + count, all_to_tune + to_tune
        experiments.append(replace(experiment, figures=None) if args.all_figures else experiment)
    if len(experiments) > 1:
        print(f"in all {all_trials:,} trials and {all_to_tune:,} to tune; files may share trials, which run once")
    if args.dry_run:
        return 0
    check_packages()
    if args.table or args.collect:
        _write(args, experiments)
        return 0
    from sgpo_async.experiments import run_experiment

    limit_s = None if args.minutes is None else 60 * args.minutes
    return max(run_experiment(one, out=args.out, workers=args.workers, limit_s=limit_s) for one in experiments)


def _write(args: argparse.Namespace, experiments: list[Experiment]) -> None:
    from sgpo_async.experiments.collection import add_trials, collect, write_pages

    if args.table:
        add_trials(args.table, args.out)
    if args.collect:
        collect(experiments, out=args.out, folder=args.collect)
    else:
        write_pages(experiments, out=args.out)


def _rollouts(budgets: Mapping[str, int]) -> str:
    """Of each trial; setting by setting where they differ."""
    if len(set(budgets.values())) == 1:
        return f"{next(iter(budgets.values())):,} rollouts each"
    return ", ".join(f"{rollouts:,} rollouts each in {setting}" for setting, rollouts in budgets.items())
