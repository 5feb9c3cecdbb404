"""Pages and the table of trials from results that are there: no trial is run.

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
    """Write a result file into `out` for each trial in `table` that has none there."""
    trials = read_trials(table)
    there = read_results(out / "results")
    for name in trials.keys() - there.keys():
        write_whole(out / "results" / f"{name}.json", to_json(trials[name]) + "\n")
    print(f"{table}: {len(trials):,} trials, {len(trials.keys() - there.keys()):,} of them new in {out / 'results'}")


def write_pages(experiments: Sequence[Experiment], *, out: Path) -> None:
    """Write the page of each experiment into `out`, of the results there."""
    _write_pages(experiments, _results(out), out)


def collect(experiments: Sequence[Experiment], *, out: Path, folder: Path) -> None:
    """Write into `folder` what is to be kept of `out`: the experiments' pages, all trials, the bases' recipes.

    What is in `folder` besides, such as pages of other experiments, stays as it is.

    Raises:
        SgpoError: one line, before anything is written.
    """
    if folder.resolve() == out.resolve():
        raise SgpoError(f"--collect must be another folder than --out, got {folder} for both; name another one")
    results = _results(out)
    _write_pages(experiments, results, folder)
    write_trials(folder / TRIALS, results, experiments)
    for base in sorted(out.glob("bases/*/base.json")):
        write_whole(folder / "bases" / f"{base.parent.name}.json", base.read_text(encoding="utf-8"))
    print(f"trials: {folder / TRIALS}, {len(results):,} of them")


def _results(out: Path) -> dict[str, Result]:
    results = read_results(out / "results")
    if not results:
        raise SgpoError(
            f"{out / 'results'}: must hold results of trials, got none; run the experiments with --out {out} or take "
            f"results over with --from {TRIALS}"
        )
    return results


def _write_pages(experiments: Sequence[Experiment], results: Mapping[str, Result], folder: Path) -> None:
    for experiment in experiments:
        write_tables(experiment, results, folder=folder / experiment.name)
        print(f"tables: {folder / experiment.name / 'README.md'}")
