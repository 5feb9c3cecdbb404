"""Writes pages and the table of trials from existing results; runs no trial.

trials.parquet ─▶ OUT/results/ID.json ─▶ FOLDER/NAME/README.md with its figures, FOLDER/trials.parquet
                  OUT/bases/NAME/base.json ─▶ FOLDER/bases/NAME.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sgpo_async.config.experiment import Experiment
from sgpo_async.errors import SgpoError
from sgpo_async.experiments.parquet import read_trials, write_trials
from sgpo_async.experiments.plan import Result
from sgpo_async.experiments.results import read_results
from sgpo_async.experiments.tables import write_tables
from sgpo_async.files import to_json, write_whole

TRIALS = "trials.parquet"


def add_trials(table: Path, out: Path) -> None:
    """Write a result file into `out` for each trial in `table` that has none yet."""
    trials = read_trials(table)
    existing = read_results(out / "results")
    new = trials.keys() - existing.keys()
    for name in new:
        write_whole(out / "results" / f"{name}.json", to_json(trials[name]) + "\n")
    print(f"{table}: {len(trials):,} trials, {len(new):,} of them new in {out / 'results'}")


def write_pages(experiments: Sequence[Experiment], *, out: Path) -> None:
    """Write the page of each experiment into `out`, from the results in `out`."""
    _write_pages(experiments, _results(out), out)


def collect(experiments: Sequence[Experiment], *, out: Path, folder: Path) -> None:
    """Write what should be kept of `out` into `folder`: the experiments' pages, all trials, the recipes of the bases.

    Other files in `folder`, such as pages of other experiments, stay unchanged.

    Raises:
        SgpoError: one line, before anything is written: there are no results, or `folder` is `out`.
    """
    if folder.resolve() == out.resolve():
        raise SgpoError(f"--collect must be another folder than --out, got {folder} for both")
    results = _results(out)
    write_trials(folder / TRIALS, results, experiments)
    _write_pages(experiments, read_trials(folder / TRIALS), folder)  # as --from gives them
    for base in sorted(out.glob("bases/*/base.json")):
        write_whole(folder / "bases" / f"{base.parent.name}.json", base.read_text(encoding="utf-8"))
    print(f"trials: {folder / TRIALS}, {len(results):,} of them")


def _results(out: Path) -> dict[str, Result]:
    results = read_results(out / "results")
    if not results:
        raise SgpoError(
            f"{out / 'results'}: must hold results of trials, got none; run the experiments with --out {out} or import "
            f"results with --from {TRIALS}"
        )
    return results


def _write_pages(experiments: Sequence[Experiment], results: Mapping[str, Result], folder: Path) -> None:
    for experiment in experiments:
        write_tables(experiment, results, folder=folder / experiment.name)
        print(f"tables: {folder / experiment.name / 'README.md'}")
