"""Runs an experiment from its file to its tables: bases, tuning, trials. Existing bases and results are reused."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgpo_async.config.experiment import BASE, Experiment
from sgpo_async.errors import SgpoError
from sgpo_async.experiments.code_version import code_version
from sgpo_async.experiments.identity import recipe, same_recipe
from sgpo_async.experiments.plan import Result, Trial, base_levels, best_rates, check_budget, final, tuning
from sgpo_async.experiments.pool import Pool
from sgpo_async.experiments.results import read_results
from sgpo_async.experiments.tables import write_tables
from sgpo_async.experiments.work import BaseJob, TrialJob, make_base, run_trial
from sgpo_async.files import to_json, write_whole

log = logging.getLogger(__name__)


def run_experiment(experiment: Experiment, *, out: Path, workers: int, limit_s: float | None = None) -> int:
    """Make missing bases, run missing trials, and write the tables of the experiment; returns the exit status.

    Args:
        out: folder of bases and results, which several experiments may share.
        limit_s: start no trial after this many seconds; a later call runs the rest.

    Raises:
        SgpoError: one line.
    """
    check_budget(experiment)
    began = time.monotonic()

    def in_time() -> bool:
        return limit_s is None or time.monotonic() - began < limit_s

    runner = _Runner(experiment, out, in_time=in_time)
    pool = Pool(workers)
    try:
        runner.make_bases(pool)
        runner.do(pool, tuning(experiment, runner.results), "tuning")
        if experiment.tune.finalists:  # which are known now
            runner.do(pool, tuning(experiment, runner.results), "tuning of the best rates")
        runner.do(pool, final(experiment, best_rates(experiment, runner.results)), "trials")
    finally:
        pool.close()
        write_tables(experiment, runner.results, folder=runner.folder)
    print(f"tables: {runner.folder / 'README.md'}")
    return 0


class _Runner:
    """The files of one experiment."""

    def __init__(self, experiment: Experiment, out: Path, *, in_time: Callable[[], bool]) -> None:
        self.experiment, self.folder, self._in_time = experiment, out / experiment.name, in_time
        self._bases, self._files = out / "bases", out / "results"
        for folder in (self.folder, self._bases, self._files):
            folder.mkdir(parents=True, exist_ok=True)
        self._levels = base_levels(experiment)
        self._code = code_version()  # read now: the checkout may change while trials run
        self.results: dict[str, Result] = read_results(self._files)

    def make_bases(self, pool: Pool) -> None:
        """Make the missing base policies, each after the base that it starts from."""
        for name in self.experiment.bases:
            self._check_base(name)
        for names in self._levels:
            jobs = [self._base_job(name) for name in names if not self._base(name).exists()]
            for job, rates in pool.run(make_base, jobs):
                log.info(f"base {job.name}: {_percent(rates['auto'])} alone, {_percent(rates['guided'])} guided")

    def _base_job(self, name: str) -> BaseJob:
        base = self.experiment.bases[name]
        start = self._model(base.start)
        overrides = self.experiment.overrides(base.train, {"model.path": start} if base.train else {})
        made_by = recipe(self.experiment, name)
        return BaseJob(name, base, start, str(self._base(name)), self.experiment.config, overrides, made_by)

    def _check_base(self, name: str) -> None:
        """Raise SgpoError if an existing base was made by another recipe: results record the current recipe."""
        folder = self._base(name)
        if folder.exists() and not same_recipe(_recipe_in(folder), recipe(self.experiment, name)):
            raise SgpoError(
                f"{folder}: its base.json does not hold the recipe of bases.{name}; move the folder away, so that the "
                "base is made again, or give the base another name"
            )

    def do(self, pool: Pool, trials: Sequence[Trial], what: str) -> None:
        """Run the `trials` that have no result."""
        unique = {trial.id: trial for trial in trials}  # cells may share trials
        missing = [trial for trial in unique.values() if trial.id not in self.results]
        log.info(f"{self.experiment.name}: {what}: {len(unique) - len(missing)} of {len(unique)} done before")
        began = time.monotonic()
        results = pool.run(run_trial, [self._job(trial) for trial in missing], while_=self._in_time)
        for done, (job, result) in enumerate(results, 1):
            trial = unique[job.id]
            record = {**self._code, "config": trial.config, "rate": trial.rate, **result}
            write_whole(self._files / f"{job.id}.json", to_json(record) + "\n")
            self.results[job.id] = record
            left = (time.monotonic() - began) / done * (len(missing) - done)
            log.info(f"{what} {done}/{len(missing)}, {left / 60:.0f} min left: {_line(trial, result)}")

    def _job(self, trial: Trial) -> TrialJob:
        model = self._model(trial.run.model.path)
        return TrialJob(trial.id, self.experiment.config, (*trial.overrides, f"model.path={model}"))

    def _model(self, path: str) -> str:
        return str(self._base(path.removeprefix(BASE))) if path.startswith(BASE) else path

    def _base(self, name: str) -> Path:
        return self._bases / name


def _recipe_in(folder: Path) -> object:
    """The recipe recorded in `folder`; None if there is none."""
    try:
        return json.loads((folder / "base.json").read_text(encoding="utf-8")).get("recipe")
    except (OSError, ValueError, AttributeError):
        return None


def _line(trial: Trial, result: Mapping[str, Any]) -> str:
    end = "diverged" if result["diverged"] is not None else f"{_percent(result['test']['auto'])} alone"
    return f"{trial.setting} {trial.method}, lr {trial.rate:g}, seed {trial.seed}: {end} ({result['wall_s']:.0f} s)"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
